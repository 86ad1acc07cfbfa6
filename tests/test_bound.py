"""Terms of the bound on a merge's memory that small models never need, one at a time.

All other terms are made small, so that a merge takes more than what is left without the one.
"""

import threading
import tracemalloc
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dora_export import engine, extensions, refine
from dora_export.arithmetic import NumpyArithmetic
from dora_export.engine import Engine, Resources, memory_bound
from dora_export.plan import Settings, Step
from dora_export.tensors import Operand
from dora_export.update import Update
from dora_export.verification.ahead import bytes_beside
from dora_export.verification.oracle import tensor_check
from dora_export.worker import Worker
from tests.plants import Layer, ref

TILE = 1 << 11  # elements


@pytest.fixture(autouse=True)
def tight(monkeypatch):
    """Leave out what every merge may take, whatever it merges."""
    monkeypatch.setenv(extensions.SWITCH, "numpy")  # the kernel takes less
    monkeypatch.setattr(NumpyArithmetic, "tile_elements", TILE)
    monkeypatch.setattr(refine, "MOST_BYTES", 0)
    monkeypatch.setattr(engine, "BOUNCE_BYTES", 0)


class Nowhere:
    def holds(self, *place):
        return False

    def write(self, *place):
        """Keep nothing."""


def planned(*steps):
    files = [SimpleNamespace(offsets=lambda: [(step, 0) for step in steps])]
    return SimpleNamespace(steps=steps, files=files, settings=Settings())


def peak(run):
    tracemalloc.start()
    try:
        run()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def assert_bounded(plan, threads=1):
    resources = Resources(threads=threads, block_bytes=1)
    most = peak(Engine(plan, Nowhere(), resources).run)
    assert most <= memory_bound(plan, resources, NumpyArithmetic.tile_elements)
    return most


def step_of(base, *updates, name="w"):
    W = ref(name, base)
    return Step(name, W.dtype, W, tuple(u.change(W.shape) for u in updates), (), "merged")


def adapted(rows, columns, rank):
    W = torch.randn(rows, columns).bfloat16()
    update = Update(
        "w", "dora", (), Operand.plain(ref("A", torch.randn(rank, columns))),
        Operand.plain(ref("B", torch.randn(rows, rank))), 0.5,
        Operand.plain(ref("m", W.float().norm(dim=1))), layout="oi",
    )  # fmt: skip
    return step_of(W, update)


def test_operands_are_counted():
    most = assert_bounded(planned(adapted(64, 256, 512)))
    assert most > 2 * 512 * (64 + 256) * 4  # as they are stored, and laid out


def test_partial_norms_of_columns_are_counted():
    parts, columns = 24, 2048
    rows = 16 * parts
    W, A, B = torch.randn(rows, columns).bfloat16(), torch.randn(1, columns), torch.randn(rows, 1)
    update = Update(
        "w", "dora", (), Operand.plain(ref("A", A)), Operand.plain(ref("B", B)), 0.5,
        Operand.plain(ref("m", W.float().norm(dim=0))), axis="in", layout="oi",
    )  # fmt: skip
    most = assert_bounded(planned(step_of(W, update)))
    assert most > parts * columns * 8  # a float64 for each column, of every part


@pytest.mark.parametrize(
    ("out", "experts"), [(128, 4096), (2, 1 << 19)], ids=["many rows", "one wide row"]
)
def test_rows_that_columns_are_picked_from_are_counted(out, experts):
    A = torch.randn(1, 8)
    B = ref("B", torch.randn(out, experts)).columns(3, 1, 1)
    down, up = Operand.plain(ref("A", A)), Operand.plain(B)
    update = Update("w", "lora", (), down, up, 0.5, layout="oi")
    most = assert_bounded(planned(step_of(torch.randn(out, 8).bfloat16(), update)))
    assert most > 1 << 20


@dataclass(frozen=True)
class Doubled:
    """A function of a whole matrix that takes so much besides."""

    beside: int
    what: str = "doubled"
    refs: tuple = ()

    def misfit(self, shape, layout):
        return None

    def placed(self, shape, layout):
        return self

    def value(self, W, dtype):
        taken = np.zeros(self.beside, np.uint8)
        return 2 * W + taken[:1]

    def working_bytes(self):
        return self.beside


def doubled(size, beside=0, name="w"):
    update = Update("w", "function", (), None, None, 1.0, layout="oi", function=Doubled(beside + 1))
    return step_of(torch.randn(size, size), update, name=name)


@pytest.mark.parametrize("beside", [0, 8 << 20])
def test_what_functions_of_a_whole_matrix_take_is_counted(beside):
    most = assert_bounded(planned(doubled(512, beside)))
    assert most > 2 * 512 * 512 * 8 + beside


def test_whole_matrices_that_are_held_are_counted(monkeypatch):
    """The last part of one is still being written when the next has been computed."""
    load, merge, loaded = Worker.load, Worker.merge, threading.Semaphore(0)
    first, last = doubled(512), doubled(512, name="x")

    def load_and_tell(self, step, region):
        found = load(self, step, region)
        if step is last:
            loaded.release()
        return found

    def wait_and_merge(self, piece, changes):
        if piece.step is first and piece.last_row == 512:
            assert loaded.acquire(timeout=60)
        merge(self, piece, changes)

    monkeypatch.setattr(Worker, "load", load_and_tell)
    monkeypatch.setattr(Worker, "merge", wait_and_merge)
    most = assert_bounded(planned(first, last), threads=2)
    assert most > 3 * 512 * 512 * 8  # one held, one given, one made


@pytest.mark.parametrize("level", ["fast", "full"])
def test_arrays_of_a_check_beside_the_writing_stay_under_its_bound(level):
    rank = 1536
    W, A, B = torch.randn(256, 1024).bfloat16(), torch.randn(rank, 1024), torch.randn(256, rank)
    layer = Layer("w", (W, A, B, torch.rand(256) + 0.5), 0.01, rank)
    plan = planned(layer.step())
    merged = ref("w", torch.from_numpy(layer.merged()).bfloat16())
    found = []
    most = peak(lambda: found.append(tensor_check(plan, level)(layer.step(), merged)))
    assert found[0][0].status == "exact"
    assert most <= bytes_beside(plan, 1)
