"""One run of a plan: the same bytes however it is cut, in memory that does not grow."""

import hashlib
import json
import subprocess
import sys
import threading
import tracemalloc
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import dora_export
from dora_export import engine, extensions, worker
from dora_export.arithmetic import NumpyArithmetic
from dora_export.arithmetic_torch import TorchArithmetic
from dora_export.checkpoints import open_checkpoint
from dora_export.pieces import ColumnSquares, cut
from dora_export.plan import Settings, plan_merge
from dora_export.writers import identity
from tests import oracle

RANK, ALPHA = 6, 9.0
SCALING = ALPHA / RANK


def write_case(
    folder: Path, layers: int, out: int, inputs: int, dtype=torch.bfloat16, seed=0, rank=RANK
):
    """A base with square, wide and embedding weights and a trained DoRA adapter on all of them."""
    g = torch.Generator().manual_seed(seed)
    shapes = {"attn.q_proj": (inputs, inputs), "mlp.up_proj": (out, inputs)}
    base = {
        "model.embed_tokens.weight": (torch.randn(4 * out, inputs, generator=g) * 0.02).to(dtype)
    }
    base["model.norm.weight"] = torch.ones(inputs, dtype=dtype)
    adapter = {}
    for layer in range(layers):
        for name, (o, i) in shapes.items():
            module = f"model.layers.{layer}.{name}"
            W = (torch.randn(o, i, generator=g) * 0.02).to(dtype)
            A = torch.randn(rank, i, generator=g) * 0.1
            B = torch.randn(o, rank, generator=g) * 0.1
            m = W.float().norm(dim=1) * (0.7 + 0.6 * torch.rand(o, generator=g))
            base[f"{module}.weight"] = W
            key = f"base_model.model.{module}"
            adapter |= {f"{key}.lora_A.weight": A, f"{key}.lora_B.weight": B}
            adapter[f"{key}.lora_magnitude_vector"] = m
    # an embedding's norms run down the columns, over all tokens
    A, B = torch.randn(rank, 4 * out, generator=g), torch.randn(inputs, rank, generator=g) * 0.01
    key = "base_model.model.model.embed_tokens"
    norms = base["model.embed_tokens.weight"].float().norm(dim=0)
    adapter |= {f"{key}.lora_embedding_A": A, f"{key}.lora_embedding_B": B}
    adapter[f"{key}.lora_magnitude_vector"] = norms * (0.7 + 0.6 * torch.rand(inputs, generator=g))
    (folder / "base").mkdir(parents=True)
    (folder / "adapter").mkdir()
    save_file(base, folder / "base" / "model.safetensors", metadata={"format": "pt"})
    save_file(adapter, folder / "adapter" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": ALPHA, "use_dora": True,
              "bias": "none", "target_modules": ["q_proj", "up_proj", "embed_tokens"]}  # fmt: skip
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    return base, adapter


def exact(base, adapter):
    """Every merged tensor in float64."""
    merged = {}
    for name, W in base.items():
        key = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{key}.lora_A.weight" in adapter:
            A, B = adapter[f"{key}.lora_A.weight"], adapter[f"{key}.lora_B.weight"]
            m = adapter[f"{key}.lora_magnitude_vector"]
            merged[name] = oracle.dora(oracle.float64(W), A, B, m, SCALING)
        elif f"{key}.lora_embedding_A" in adapter:
            A, B = adapter[f"{key}.lora_embedding_A"], adapter[f"{key}.lora_embedding_B"]
            m = adapter[f"{key}.lora_magnitude_vector"]
            merged[name] = oracle.dora(oracle.float64(W).T, A, B, m, SCALING).T
    return merged


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    folder = tmp_path_factory.mktemp("case")
    base, adapter = write_case(folder, layers=2, out=1100, inputs=700)
    return folder, exact(base, adapter)


@pytest.mark.usefixtures("either_kernel")
@pytest.mark.parametrize("options", [
    {"threads": 2}, {"block_bytes": 1}, {"threads": 3, "block_bytes": 777_777},
    *(pytest.param(o, marks=pytest.mark.nightly)
      for o in ({"threads": 5}, {"block_bytes": 300_000}, {"block_bytes": 64 << 20})),
])  # fmt: skip
@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_bytes_do_not_depend_on_threads_or_blocks(case, tmp_path, options, precision):
    folder, _ = case
    paths = folder / "base", folder / "adapter"
    dora_export.merge(*paths, tmp_path / "one", threads=1, precision=precision)
    dora_export.merge(*paths, tmp_path / "other", precision=precision, **options)
    assert digest(tmp_path / "one") == digest(tmp_path / "other")
    assert digest(tmp_path / "one") != digest(folder / "base")


def test_partial_sums_of_norms_do_not_depend_on_blocks(case):
    """They are float64: sums of other parts would differ far below what the bytes above show."""
    folder, _ = case
    base, adapter = open_checkpoint(folder / "base"), dora_export.load_adapter(folder / "adapter")
    plan = plan_merge(base, adapter, Settings())

    def sums(block_bytes):
        pieces = [p for batch in cut(plan, 1 << 15, block_bytes) for p in batch]
        return [(p.first_row, p.last_row) for p in pieces if isinstance(p, ColumnSquares)]

    assert len(sums(1)) > 2
    assert sums(1) == sums(300_000) == sums(64 << 20)


def test_partial_sums_of_norms_are_added_in_the_order_of_rows(case, tmp_path, monkeypatch):
    """Not as threads finish them: that would differ as far below what the bytes above show."""
    folder, _ = case
    partial, totals, last = {}, [], threading.Event()
    monkeypatch.setattr(NumpyArithmetic, "tile_elements", 1 << 14)  # a dozen sums
    column_squares, with_factors = worker.Worker.column_squares, worker.Worker.with_factors

    def first_comes_last(self, piece, changes):
        squares = column_squares(self, piece, changes)
        partial[piece.position] = squares.copy()
        if piece.position == 0:
            assert last.wait(60)
        elif piece.last_row == piece.region.rows:
            last.set()
        return squares

    def noted(self, piece, loaded, squares):
        totals.append(squares.copy())
        return with_factors(self, piece, loaded, squares)

    monkeypatch.setattr(worker.Worker, "column_squares", first_comes_last)
    monkeypatch.setattr(worker.Worker, "with_factors", noted)
    dora_export.merge(folder / "base", folder / "adapter", tmp_path / "out", threads=2)
    ordered = [partial[i][0] for i in range(len(partial))]
    (total,) = totals
    assert np.array_equal(total, sum(ordered, np.zeros_like(total)))
    assert not np.array_equal(total, sum([*ordered[1:], ordered[0]], np.zeros_like(total)))


def test_merged_tensors_are_within_one_ulp_and_the_rest_is_untouched(case, tmp_path):
    folder, merged = case
    dora_export.merge(folder / "base", folder / "adapter", tmp_path / "out")
    base = load_file(folder / "base" / "model.safetensors")
    got = load_file(tmp_path / "out" / "model.safetensors")
    assert list(got) == list(base)
    for name, tensor in got.items():
        if name in merged:
            assert oracle.ulps(tensor, merged[name]) <= 1
            assert oracle.misrounded(tensor, merged[name]) <= 1e-4
        else:
            assert torch.equal(tensor, base[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_torch_arithmetic_agrees_with_the_oracle(tmp_path, monkeypatch, dtype):
    base, adapter = write_case(tmp_path, layers=1, out=160, inputs=96, dtype=dtype)
    device = torch.device("cpu")  # the code of a CUDA run, without streams
    monkeypatch.setattr(
        engine,
        "arithmetic_factory",
        lambda _: lambda precision: TorchArithmetic(device, getattr(torch, precision)),
    )
    dora_export.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    got = load_file(tmp_path / "out" / "model.safetensors")
    for name, expected in exact(base, adapter).items():
        assert oracle.ulps(got[name], expected) <= 1


def test_cancelled_elements_are_within_one_ulp(tmp_path):
    base, adapter = write_case(tmp_path, layers=1, out=600, inputs=512, dtype=torch.bfloat16)
    name = "model.layers.0.mlp.up_proj"
    A, B = (adapter[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
    base[f"{name}.weight"] = (-SCALING * (B @ A)).bfloat16()  # what is left is its rounding
    save_file(base, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    paths = (tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    dora_export.merge(*paths, magnitude_is_normalised=False)  # far from every norm, as meant
    got = load_file(tmp_path / "out" / "model.safetensors")[f"{name}.weight"]
    expected = exact(base, adapter)[f"{name}.weight"]
    assert oracle.ulps(got, expected) <= 1
    # the case is hard enough: float32 alone, rounded once, is further off
    W = base[f"{name}.weight"].float()
    V = W + SCALING * (B @ A)
    m = adapter[f"base_model.model.{name}.lora_magnitude_vector"]
    plain = (V * (m / V.norm(dim=1))[:, None]).bfloat16()
    assert oracle.ulps(plain, expected) > 1


CHILD = """
import json, sys
from dora_export import api
before = api.peak_rss()
report = api.merge(
    sys.argv[1] + "/base", sys.argv[1] + "/adapter", sys.argv[2], threads=2, verify=sys.argv[3]
)
print(json.dumps([before, report.peak_rss_bytes, report.memory_bytes]))
"""


def measured(folder, out, verify):
    command = [sys.executable, "-c", CHILD, str(folder), str(out), verify]
    run = subprocess.run(command, check=True, capture_output=True)
    return json.loads(run.stdout)


@pytest.mark.parametrize(
    "verify", [pytest.param("none", marks=pytest.mark.nightly), "fast", "full"]
)
def test_peak_memory_stays_under_the_printed_bound_and_does_not_grow_with_the_model(
    tmp_path, verify
):
    peaks = []
    for layers in (5, 15):
        folder = tmp_path / str(layers)
        write_case(folder, layers=layers, out=3000, inputs=1024)
        before, peak, bound = measured(folder, folder / "out", verify)
        # Lazily imported modules come on top of buffers: a few MB, measured at 9.
        assert peak - before <= bound + (16 << 20)
        peaks.append(peak)
    # Besides, how many checks and workers are at their largest at once is chance: the blocks of one
    # check. What grew with the model would grow by ten times as much.
    assert peaks[1] <= 1.05 * peaks[0] + (10 << 20)
    assert peaks[1] < (tmp_path / "15/base/model.safetensors").stat().st_size


def test_arrays_of_a_merge_stay_under_its_bound(tmp_path, monkeypatch):
    """Counted when asked for, where one term of the bound after the other is most of it."""
    monkeypatch.setenv(extensions.SWITCH, "numpy")  # the kernel takes less
    write_case(tmp_path / "wide", layers=0, out=3072, inputs=1024)
    write_case(tmp_path / "deep", layers=0, out=256, inputs=1024, rank=1024)
    run, peaks = engine.Engine.run, []

    def traced(self):
        tracemalloc.start()
        try:
            run(self)
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()

    monkeypatch.setattr(engine.Engine, "run", traced)
    for name, threads, block_bytes in (
        ("wide", 3, 8 << 20),  # blocks, of each of the workers
        ("wide", 1, 1),  # tiles: no tensor is held
        ("deep", 1, 1),  # operands
    ):
        paths = tmp_path / name / "base", tmp_path / name / "adapter", tmp_path / "out"
        report = dora_export.merge(
            *paths, threads=threads, block_bytes=block_bytes, verify="none", force=True
        )
        assert peaks[-1] <= report.memory_bytes


def test_operands_are_dropped_with_the_last_of_their_pieces(tmp_path, monkeypatch):
    write_case(tmp_path, layers=6, out=96, inputs=64)
    magnitudes, most = [], []
    load = worker.Worker.load

    def counted(self, step, region):
        changes = load(self, step, region)
        magnitudes.extend(weakref.ref(change.magnitude) for change in changes)
        most.append(sum(magnitude() is not None for magnitude in magnitudes))
        return changes

    monkeypatch.setattr(worker.Worker, "load", counted)
    dora_export.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", threads=2)
    assert len(most) == 13
    assert max(most) <= 3  # one of each worker's, and one that both have part in


def test_files_are_hashed_in_parts(tmp_path):
    path = tmp_path / "adapter.safetensors"
    with path.open("wb") as file:
        file.truncate(24 << 20)  # a hole
    tracemalloc.start()
    try:
        digest = identity._sha256(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert digest == hashlib.sha256(bytes(24 << 20)).hexdigest()
    assert peak < 4 << 20


def test_first_failure_of_a_worker_stops_the_others_and_is_raised(case, tmp_path, monkeypatch):
    folder, _ = case
    calls = []

    def merge_tile(*args):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("tile three")
        return None

    monkeypatch.setenv(extensions.SWITCH, "numpy")
    monkeypatch.setattr(worker, "merge_tile", merge_tile)
    with pytest.raises(RuntimeError, match="tile three"):
        dora_export.merge(
            folder / "base", folder / "adapter", tmp_path / "out", threads=4, block_bytes=1
        )
    assert not (tmp_path / "out").exists()


def test_progress_counts_every_byte_once(case, tmp_path):
    folder, _ = case
    seen = []
    dora_export.merge(
        folder / "base", folder / "adapter", tmp_path / "out", threads=1,
        progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    size = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert seen[-1] == (size, size)
    assert [d for d, _ in seen] == sorted(d for d, _ in seen)


def test_a_merge_leaves_numpy_as_it_was(case, tmp_path):
    folder, _ = case
    before = np.getbufsize(), np.geterr()
    for threads in (1, 2):
        dora_export.merge(
            folder / "base", folder / "adapter", tmp_path / str(threads), threads=threads
        )
    assert (np.getbufsize(), np.geterr()) == before
