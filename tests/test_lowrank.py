"""The nearest plain LoRA, against numpy's full SVD of the oracle's update."""

import re

import numpy as np
import pytest
import torch

import dora_export
from dora_export import lowrank
from dora_export.errors import ArithmeticRefusal
from dora_export.pieces import regions
from dora_export.verification.exact import Exact
from tests import oracle, small
from tests.test_peft_parity import case


def opened(tmp_path, shape, axis="out", layout="oi", dtype=torch.bfloat16):
    """A trained DoRA layer as the plan has it, and its update W' - W by the oracle, as stored."""
    bench, update, (W, A, B, m) = case(tmp_path, shape, axis, layout, dtype)
    plan = bench.plan(update)
    (step,) = [s for s in plan.steps if s.changes]
    seen = W.T if layout == "io" else W.reshape(W.shape[0], -1)
    exact = oracle.dora(seen, A, B, m, 1.7, axis=1 if axis == "out" else 0) - seen
    (region,) = regions(step)
    stored = exact.T if layout == "io" else exact
    return Exact.open(step.source, region, plan.settings), stored


@pytest.mark.parametrize("axis", ["out", "in"])
@pytest.mark.parametrize("layout", ["oi", "io"])
@pytest.mark.parametrize("rank", [1, 7, 40])
def test_small_matrix_is_decomposed_exactly(tmp_path, monkeypatch, axis, layout, rank):
    monkeypatch.setattr(lowrank, "BLOCK_ELEMENTS", 500)  # norms down columns span the blocks
    region, update = opened(tmp_path, (60, 44), axis, layout)
    found = lowrank.nearest(region, rank)
    _, values, _ = np.linalg.svd(update)
    assert found.singular == pytest.approx(values[:rank], rel=1e-9)
    assert found.size == pytest.approx(np.linalg.norm(update), rel=1e-9)
    left_over = np.linalg.norm(update - found.left @ found.right)
    assert left_over == pytest.approx(np.sqrt(np.square(values[rank:]).sum()), rel=1e-9)
    assert found.error == pytest.approx(left_over / np.linalg.norm(update), rel=1e-6)


@pytest.mark.parametrize("rank", [4, 32])
def test_large_matrix_comes_within_a_percent_of_the_best_error(tmp_path, rank):
    shape = (1100, 800)
    assert min(shape) > lowrank.WHOLE_SIDE
    region, update = opened(tmp_path, shape)
    found = lowrank.nearest(region, rank)
    _, values, _ = np.linalg.svd(update)
    best = np.sqrt(np.square(values[rank:]).sum())
    left_over = np.linalg.norm(update - found.left @ found.right)
    assert best <= left_over <= 1.01 * best
    assert found.error == pytest.approx(left_over / np.linalg.norm(update), rel=1e-6)
    again = lowrank.nearest(region, rank)
    assert np.array_equal(again.left, found.left)


def test_rank_beyond_the_matrix_is_filled_with_zeros(tmp_path):
    region, update = opened(tmp_path, (20, 12))
    found = lowrank.nearest(region, 16)
    assert (found.left.shape, found.right.shape) == ((20, 16), (16, 12))
    assert found.left @ found.right == pytest.approx(update, abs=1e-12)
    assert found.energy == pytest.approx(1.0)


def test_base_that_holds_nan_is_refused_with_its_layer(tmp_path):
    tensors = small.base_tensors(dtype=torch.float32)
    name = next(n for n in tensors if n.endswith("q_proj.weight"))
    tensors[name][3, 2] = torch.nan
    base = small.write_base(tmp_path / "base", tensors)
    parts = small.adapter_tensors(small.base_tensors(dtype=torch.float32), dora=True)
    adapter = small.write_adapter(tmp_path / "adapter", parts, use_dora=True)
    with pytest.raises(ArithmeticRefusal, match=rf"{re.escape(name)}: W' - W holds NaN or inf"):
        dora_export.convert(adapter, "lora", tmp_path / "out", base=base, rank=2)
    assert not (tmp_path / "out").exists()
