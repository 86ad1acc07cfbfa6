"""The compiled merge of bfloat16 rows, against float64 and against itself in other parts."""

import shutil

import numpy as np
import pytest
import torch

from dora_export import fused, refine
from tests import oracle

SHAPES = [(7, 1), (12, 15), (13, 16), (6, 17), (41, 40), (5, 130), (64, 512), (19, 2065)]
needs_kernel = pytest.mark.skipif(not fused.available(), reason="built without a C compiler")


def bits(values):
    return torch.from_numpy(np.asarray(values, np.float32)).bfloat16().view(torch.uint16).numpy()


def tensor(raw):
    return torch.from_numpy(raw.copy()).view(torch.bfloat16)


class Case:
    """Rows of a trained layer, magnitudes well off the norms."""

    def __init__(self, rows, columns, rank, seed=0):
        rng = np.random.default_rng(seed)
        self.W = bits(rng.standard_normal((rows, columns)) * 0.05)
        self.left = (rng.standard_normal((rows, rank)) * 0.2).astype(np.float32)
        self.right = (rng.standard_normal((rank, columns)) * 0.2).astype(np.float32)
        self.product = refine.product(self.left, self.right)
        self.V = oracle.float64(tensor(self.W)) + self.left.astype(np.float64) @ self.right
        self.norm = np.sqrt((self.V**2).sum(axis=1))
        self.m = self.norm * rng.uniform(0.5, 2.0, rows)

    def merge(self, rows=slice(None), **options):
        out = np.zeros_like(self.W[rows])
        left = np.ascontiguousarray(self.left[rows])
        found = fused.merge(
            np.ascontiguousarray(self.W[rows]), out, left, fused.packed(self.right),
            error=np.ascontiguousarray(self.product.error[rows]), **options,
        )  # fmt: skip
        return out, found


def assert_right(out, exact, found):
    """Within an ulp, and nearest, but for what is listed as doubtful and a few ties in float32."""
    sure = np.ones(out.size, bool)
    sure[found.doubtful] = False
    got, exact = tensor(out.reshape(-1)[sure]), exact.reshape(-1)[sure]
    assert sure.mean() > 0.9
    assert oracle.ulps(got, exact) <= 1
    assert oracle.misrounded(got, exact) * got.numel() <= 1 + 1e-4 * got.numel()


def test_it_is_built_wherever_there_is_a_compiler():
    if shutil.which("gcc") or shutil.which("clang"):
        assert fused.available()


@needs_kernel
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rank", [0, 1, 6, 33])
def test_rows_come_out_nearest_to_the_exact_ones(shape, rank):
    case = Case(*shape, rank)
    rng = np.random.default_rng(1)
    by_column = rng.uniform(0.5, 2.0, shape[1])
    eps = 0.01 * case.norm.mean()
    for options, factor in (
        ({}, 1.0),
        ({"mode": "norm", "magnitude": case.m}, (case.m / case.norm)[:, None]),
        ({"mode": "norm", "magnitude": case.m, "eps": eps},
         (case.m / (case.norm + eps))[:, None]),
        ({"mode": "given", "magnitude": case.m}, case.m[:, None]),
        ({"column_factor": by_column}, by_column),
    ):  # fmt: skip
        out, found = case.merge(**options)
        assert_right(out, case.V * factor, found)
        assert not found.nonfinite
        assert found.undefined.size == 0
        if np.ndim(factor) == 2:
            np.testing.assert_allclose(found.row_factor, factor[:, 0], rtol=1e-5)


@needs_kernel
def test_wrong_formulas_are_not_taken_for_right():
    case = Case(41, 40, 6)
    out, found = case.merge(mode="norm", magnitude=case.m)
    W = oracle.float64(tensor(case.W))
    for wrong in (
        W * (case.m / np.linalg.norm(W, axis=1))[:, None],
        case.V * (case.m / np.linalg.norm(W, axis=1))[:, None],
        case.V * np.resize(case.m, 40) / np.linalg.norm(case.V, axis=0),
        case.V,
    ):
        with pytest.raises(AssertionError):
            assert_right(out, wrong, found)


@needs_kernel
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_row_does_not_depend_on_its_neighbours(shape):
    case = Case(*shape, 6)
    whole, found = case.merge(mode="norm", magnitude=case.m)
    for size in (1, 2, 5, 6, 7):
        listed = []
        for first in range(0, shape[0], size):
            rows = slice(first, first + size)
            part, here = case.merge(rows, mode="norm", magnitude=case.m[rows])
            np.testing.assert_array_equal(part, whole[rows])
            listed += [*(here.doubtful + first * shape[1])]
        assert sorted(listed) == sorted(found.doubtful)


@needs_kernel
def test_what_it_lists_is_what_the_bound_asks_for():
    case = Case(64, 512, 6)
    case.W = bits(-(case.left @ case.right) * (1 + np.linspace(0, 0.1, 512)))  # cancelled
    out, found = case.merge(mode="norm", magnitude=case.m)
    sizes, scratch = out & 0x7FFF, np.empty(out.size, np.uint8)
    expected = refine.doubtful(sizes, case.product, 0, found.row_factor, None, scratch)
    assert 0 < found.doubtful.size < out.size / 10
    assert sorted(found.doubtful) == sorted(expected)


@needs_kernel
def test_more_doubtful_elements_than_it_can_list_are_told(monkeypatch):
    monkeypatch.setattr(fused, "CAPACITY", 10)
    case = Case(64, 512, 6)
    case.W = bits(-(case.left @ case.right))
    _, found = case.merge()
    assert found.doubtful is None


@needs_kernel
def test_ties_go_to_even():
    # halves between neighbours: 1 + k/128 + 1/256, for even and odd k
    values = 1 + np.arange(32) / 128 + 1 / 256
    left, right = np.ones((1, 1), np.float32), values[None, :].astype(np.float32)
    out = np.zeros((1, 32), np.uint16)
    fused.merge(np.zeros((1, 32), np.uint16), out, left, fused.packed(right))
    np.testing.assert_array_equal(oracle.float64(tensor(out))[0] * 128 % 2, 0)


@needs_kernel
def test_rows_without_direction_are_zero_and_named():
    case = Case(9, 40, 2)
    case.W[3], case.left[3] = 0, 0
    case.W[5], case.left[5] = 0, 0
    case.m[5] = 0
    out, found = case.merge(mode="norm", magnitude=case.m)
    assert found.undefined.tolist() == [3]
    assert not out[[3, 5]].any()


@needs_kernel
@pytest.mark.parametrize("column", [0, 15, 39])
@pytest.mark.parametrize("pattern", [0x7F80, 0xFF80, 0x7FC0])
def test_inf_and_nan_are_told_wherever_they_are(column, pattern):
    case = Case(7, 40, 2)
    case.W[6, column] = pattern
    assert case.merge()[1].nonfinite
    assert case.merge(mode="norm", magnitude=case.m)[1].nonfinite
    assert not Case(7, 40, 2).merge()[1].nonfinite


@needs_kernel
def test_buffers_that_do_not_fit_are_refused():
    case = Case(6, 32, 2)
    panels = fused.packed(case.right)
    out = np.zeros_like(case.W)
    with pytest.raises(ValueError, match="do not fit"):
        fused.merge(case.W, out[:-1].copy(), case.left, panels)
    with pytest.raises(ValueError, match="do not fit"):
        fused.merge(case.W, out, case.left[:-1].copy(), panels)
    with pytest.raises(ValueError, match="do not fit"):
        fused.merge(case.W, out, case.left, panels[:-1].copy())
    with pytest.raises(ValueError, match="do not fit"):
        fused.merge(case.W, out, case.left, panels, mode="norm", magnitude=case.m[:-1].copy())
    with pytest.raises(ValueError, match="do not fit"):
        fused.merge(case.W, out, case.left, panels, error=np.ones(5))
    with pytest.raises((ValueError, BufferError)):  # rows that are not one after the other
        fused.merge(case.W[::2], out[::2], case.left[::2], panels)


def test_the_environment_switches_it_off(monkeypatch):
    monkeypatch.setenv(fused.SWITCH, "numpy")
    assert not fused.available()
