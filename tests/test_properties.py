"""Any update of the normal form, of any shape and place: the engine gives what the oracle does.

The oracle sees one matrix ``(out, in)`` at a time; which elements of the stored tensor that is, is
said here with plain indexing.
"""

import math
import tempfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from dora_export.adapters.model import Adapter
from dora_export.checkpoints import open_checkpoint
from dora_export.engine import Engine, Resources
from dora_export.plan import Settings, plan_merge
from dora_export.storage import read_tensors
from dora_export.tensors import Operand
from dora_export.update import Update
from dora_export.verification.oracle import check_oracle
from tests import oracle
from tests.test_peft_parity import Memory

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SIZES = st.integers(1, 40)


@st.composite
def shapes(draw):
    """A stored shape, and which slices and rows of it are changed."""
    kind = draw(st.sampled_from(["matrix", "rows", "stack", "rows of a stack", "convolution"]))
    out, inner = draw(SIZES), draw(SIZES)
    if kind == "convolution":
        kernel = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
        return (out, inner, *kernel), [(None, None)]
    if kind == "matrix":
        return (out, inner), [(None, None)]
    rows = _ranges(draw, out) if "rows" in kind else [None]
    if "stack" not in kind:
        return (out, inner), [(None, r) for r in rows]
    experts = draw(st.integers(1, 4))
    indices = draw(st.sets(st.integers(0, experts - 1), min_size=1))
    return (experts, out, inner), [(e, r) for e in sorted(indices) for r in rows]


def _ranges(draw, rows):
    """Ranges of rows that do not overlap."""
    cuts = sorted(draw(st.sets(st.integers(0, rows), min_size=2, max_size=4)))
    if len(cuts) < 2:
        return [(0, rows)]
    pairs = list(pairwise(cuts))
    keep = draw(st.sets(st.integers(0, len(pairs) - 1), min_size=1))
    return [pairs[i] for i in sorted(keep)]


@st.composite
def cases(draw):
    shape, places = draw(shapes())
    dtype = draw(st.sampled_from(DTYPES))
    adapter_dtype = draw(st.sampled_from([*DTYPES, torch.float32, torch.float64]))
    seed = draw(st.integers(0, 2**32 - 1))
    make = torch.Generator().manual_seed(seed)
    W = (torch.randn(shape, generator=make) * draw(st.sampled_from([0.02, 1.0]))).to(dtype)
    tensors, changes = {}, []
    for number, (index, rows) in enumerate(places):
        part = shape if index is None else shape[1:]
        part = part if rows is None else (rows[1] - rows[0], *part[1:])
        layout = draw(st.sampled_from(["oi", "io"])) if len(part) == 2 else "oi"
        out, inner = (part[0], math.prod(part[1:])) if layout == "oi" else (part[1], part[0])
        kind = draw(st.sampled_from(["lora", "dora", "dora"]))
        axis = draw(st.sampled_from(["out", "in"])) if kind == "dora" else "out"
        rank = draw(st.integers(1, 6))
        count = out if axis == "out" else (part[1] if layout == "oi" else part[0])
        size = float(W.float().std()) if W.numel() > 1 else 1.0
        drawn = {
            "A": torch.randn(rank, inner, generator=make),
            "B": torch.randn(out, rank, generator=make) * size,
            "m": (0.5 + torch.rand(count, generator=make)) * size * inner**0.5,
        }
        for name, tensor in drawn.items():
            if name != "m" or kind == "dora":
                tensors[f"{number}.{name}"] = tensor.to(adapter_dtype)
        changes.append({
            "number": number, "index": index, "rows": rows, "layout": layout, "kind": kind,
            "axis": axis, "scaling": draw(st.sampled_from([1.0, 2.0, 0.3, 5 / 3, -1.5])),
            "eps": draw(st.sampled_from([0.0, 0.0, 1e-7])),
        })  # fmt: skip
    return W, tensors, changes, draw(st.sampled_from(["float32", "float32", "float64"]))


def expected(W, tensors, changes):
    """The whole tensor by the oracle, float64."""
    result = oracle.float64(W).copy()
    for change in changes:
        part = result if change["index"] is None else result[change["index"]]
        part = part if change["rows"] is None else part[slice(*change["rows"])]
        A, B = (oracle.float64(tensors[f"{change['number']}.{x}"]) for x in "AB")
        turned = change["layout"] == "io"
        seen = part.T if turned else part
        if change["kind"] == "lora":
            new = oracle.lora(seen.reshape(len(seen), -1), A, B, change["scaling"])
        else:
            new = _dora(seen, A, B, oracle.float64(tensors[f"{change['number']}.m"]), change)
        part[...] = new.T if turned else new.reshape(part.shape)
    return result


def _dora(seen, A, B, m, change):
    """By plain definition: N, its norm over all but one axis, kernel included."""
    N = seen + (change["scaling"] * (B @ A)).reshape(seen.shape)
    kept = 0 if change["axis"] == "out" else 1
    others = tuple(i for i in range(N.ndim) if i != kept)
    norm = np.sqrt((N * N).sum(axis=others, keepdims=True)) + change["eps"]
    shape = [1] * N.ndim
    shape[kept] = -1
    return (N * m.reshape(shape) / norm).reshape(len(seen), -1)


def merged(folder, W, tensors, changes, precision, **resources):
    """What the engine makes of it, and the plan that it followed."""
    (folder / "base").mkdir()
    other = torch.arange(5, dtype=torch.float32)
    save_file({"w": W, "other": other}, folder / "base/model.safetensors", {"format": "pt"})
    (folder / "base/config.json").write_text("{}")
    save_file(tensors, folder / "adapter.safetensors")
    refs = read_tensors(folder / "adapter.safetensors", allow_pickle=False)
    updates = []
    for change in changes:
        a, b, m = (refs.get(f"{change['number']}.{x}") for x in "ABm")
        updates.append(Update(
            target="w", kind=change["kind"], down=Operand.plain(a), up=Operand.plain(b),
            source_keys=tuple(r.name for r in (a, b, m) if r), scaling=change["scaling"],
            magnitude=None if m is None else Operand.vector(m), axis=change["axis"],
            eps=change["eps"] if m else 0.0, layout=change["layout"], index=change["index"],
            rows=change["rows"],
        ))  # fmt: skip
    adapter = Adapter(folder, "ours", (folder / "adapter.safetensors",), refs, tuple(updates))
    plan = plan_merge(open_checkpoint(folder / "base"), adapter, Settings(precision=precision))
    sink = Memory(plan)
    Engine(plan, sink, Resources(**resources)).run()
    out = folder / "out.safetensors"
    out.write_bytes(bytes(sink.files[0]))
    assert torch.equal(load_file(out)["other"], other)
    return load_file(out)["w"], plan, read_tensors(out, allow_pickle=False)


def check(case):
    W, tensors, changes, precision = case
    want = expected(W, tensors, changes)
    with tempfile.TemporaryDirectory() as folder:
        got, plan, refs = merged(Path(folder), W, tensors, changes, precision)
        assert oracle.ulps(got, want) <= 1
        if precision == "float64":
            near_ties = np.abs(oracle.rounded(want, got.dtype) - oracle.float64(got)) > 0
            assert near_ties.sum() <= 1
        _, results, findings = check_oracle(plan, refs, "full")
        assert findings == ()
        assert results[0].status == "exact"


@given(cases())
@settings(max_examples=100, deadline=None, derandomize=True)
def test_engine_equals_the_oracle(case):
    check(case)


@pytest.mark.nightly
@given(cases())
@settings(max_examples=5000, deadline=None)
def test_engine_equals_the_oracle_many_times(case):
    check(case)


@given(cases(), st.sampled_from([1, 4096]), st.sampled_from([1, 3]))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_bytes_do_not_depend_on_blocks_and_threads(case, block, threads):
    W, tensors, changes, precision = case
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        first, _, _ = merged(Path(one), W, tensors, changes, precision)
        second, _, _ = merged(
            Path(other), W, tensors, changes, precision, block_bytes=block, threads=threads
        )
    assert torch.equal(first, second)
