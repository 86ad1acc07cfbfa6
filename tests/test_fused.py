"""The compiled merge of bfloat16 rows, against float64 and against itself in other parts."""

import shutil
from dataclasses import replace

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
        self.V = oracle.float64(tensor(self.W)) + self.left.astype(np.float64) @ self.right
        self.norm = np.sqrt((self.V**2).sum(axis=1))
        self.m = self.norm * rng.uniform(0.5, 2.0, rows)

    def merge(self, first=0, last=None, **options):
        stored = np.ascontiguousarray(self.W[first:last])
        out = np.zeros_like(stored)
        return out, fused.merge(stored, out, self.factors(), first, **options)

    def factors(self):
        product = refine.product(self.left, self.right)
        return fused.Factors.of(product, *self.W.shape)


def assert_right(out, exact):
    """Within an ulp, and nearest but for a few ties in float32."""
    got = tensor(out)
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
        assert_right(out, case.V * factor)
        assert not found.nonfinite
        assert found.undefined.size == 0


@needs_kernel
def test_wrong_formulas_are_not_taken_for_right():
    case = Case(41, 40, 6)
    out, _ = case.merge(mode="norm", magnitude=case.m)
    W = oracle.float64(tensor(case.W))
    for wrong in (
        W * (case.m / np.linalg.norm(W, axis=1))[:, None],
        case.V * (case.m / np.linalg.norm(W, axis=1))[:, None],
        case.V * np.resize(case.m, 40) / np.linalg.norm(case.V, axis=0),
        case.V,
    ):
        with pytest.raises(AssertionError):
            assert_right(out, wrong)


@needs_kernel
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_row_does_not_depend_on_its_neighbours(shape):
    case = Case(*shape, 6)
    whole, found = case.merge(mode="norm", magnitude=case.m)
    for size in (1, 2, 5, 6, 7):
        again = 0
        for first in range(0, shape[0], size):
            part, here = case.merge(first, first + size, mode="norm", magnitude=case.m)
            np.testing.assert_array_equal(part, whole[first : first + size])
            again += here.again
        assert again == found.again


def cancelled(scaling):
    """A layer of which the update leaves little more than rounding errors."""
    case = Case(64, 512, 6)
    rng = np.random.default_rng(2)
    if scaling != 1:  # not a power of two: the scaled factor is no float32
        case.left = case.left.astype(np.float64) * scaling
    W = -(case.left.astype(np.float64) @ case.right)
    case.W = bits(W * (1 + 10.0 ** rng.uniform(-7, -1, case.W.shape)))
    case.V = oracle.float64(tensor(case.W)) + case.left.astype(np.float64) @ case.right
    case.norm = np.sqrt((case.V**2).sum(axis=1))
    case.m = case.norm * rng.uniform(0.5, 2.0, 64)
    return case


@needs_kernel
@pytest.mark.parametrize("scaling", [1, 1.7])
@pytest.mark.parametrize("wide", [False, True], ids=["float32", "float64"])
def test_cancelled_elements_are_computed_again(scaling, wide):
    case = cancelled(scaling)
    if wide:  # an adapter stored in float64
        case.right = case.right + np.random.default_rng(3).standard_normal((6, 512)) * 1e-9
        case.V = oracle.float64(tensor(case.W)) + case.left.astype(np.float64) @ case.right
    columns = np.random.default_rng(4).uniform(0.5, 2.0, 512)
    for options, factor in (
        ({}, 1.0),
        ({"mode": "given", "magnitude": case.m}, case.m[:, None]),
        ({"column_factor": columns}, columns),
    ):
        out, found = case.merge(**options)
        assert found.again > 100
        exact = case.V * factor
        assert oracle.ulps(tensor(out), exact) <= 1
        alone = (oracle.float64(tensor(case.W)).astype(np.float32) + case.left.astype(np.float32)
                 @ case.right.astype(np.float32)) * np.float32(factor)  # fmt: skip
        assert oracle.ulps(tensor(bits(alone)), exact) > 2  # as float32 alone would have it


@needs_kernel
def test_as_many_are_computed_again_as_the_bound_asks_for():
    case = Case(64, 512, 6)
    out, found = case.merge(mode="given", magnitude=case.m)
    error = refine.product(case.left, case.right).error * case.m
    limit = refine._limit_bits(error)
    float32 = bits((oracle.float64(tensor(case.W)).astype(np.float32) + case.left @ case.right)
                   * case.m[:, None].astype(np.float32))  # fmt: skip
    expected = ((float32 & 0x7FFF) < limit[:, None]).sum()
    assert 0 < expected < out.size / 50
    assert abs(found.again - expected) <= 2  # an element at the limit may fall to either side


@needs_kernel
def test_ties_go_to_even():
    # halves between neighbours: 1 + k/128 + 1/256, for even and odd k
    values = 1 + np.arange(32) / 128 + 1 / 256
    case = Case(1, 32, 1)
    case.W[:] = 0
    case.left, case.right = np.ones((1, 1), np.float32), values[None, :].astype(np.float32)
    out, _ = case.merge()
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
    case, out = Case(6, 32, 2), np.zeros((6, 32), np.uint16)
    good = case.factors()
    fused.merge(case.W, out, good)
    for name in ("left", "panels", "error", "exact_left"):
        bad = replace(good, **{name: getattr(good, name)[:-1].copy()})
        with pytest.raises(ValueError, match="do not fit 6 rows of 32 columns"):
            fused.merge(case.W, out, bad)
    with pytest.raises(ValueError, match="do not fit"):
        fused.merge(case.W, out, replace(good, exact_right=np.zeros((2, 31))))
    with pytest.raises(ValueError, match="do not fit"):
        fused.merge(case.W, out[:-1].copy(), good)
    with pytest.raises(ValueError, match="do not fit"):
        fused.merge(case.W, out, good, mode="norm", magnitude=case.m[:-1].copy())
    with pytest.raises(ValueError, match="do not fit"):
        fused.merge(case.W, out, good, column_factor=np.ones(31))
    with pytest.raises((ValueError, BufferError)):  # rows that are not one after the other
        fused.merge(case.W[::2], out[::2], good)


class Wide(Case):
    """The same rows merged into float32."""

    def __init__(self, rows, columns, rank, stored):
        super().__init__(rows, columns, rank)
        if stored == "F32":
            rng = np.random.default_rng(5)
            self.W = (rng.standard_normal((rows, columns)) * 0.05).astype(np.float32)
            W = self.W.astype(np.float64)
            self.W = self.W.view(np.uint32)
            self.V = W + self.left.astype(np.float64) @ self.right
            self.norm = np.sqrt((self.V**2).sum(axis=1))
            self.m = self.norm * rng.uniform(0.5, 2.0, rows)

    def merge(self, first=0, last=None, **options):
        stored = np.ascontiguousarray(self.W[first:last])
        out = np.zeros(stored.shape, np.uint32)
        factors = (self.left.astype(np.float64), self.right.astype(np.float64))
        wide = fused.WideFactors.of(factors, *self.W.shape)
        return out, fused.merge_wide(stored, out, wide, first, **options)


def misrounded(out, exact):
    """Elements that are not the float32 nearest to the exact ones."""
    return int((out.view(np.float32) != exact.astype(np.float32)).sum())


@needs_kernel
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("stored", ["BF16", "F32"])
def test_rows_are_rounded_to_the_nearest_float32(shape, stored):
    case = Wide(*shape, 6, stored)
    by_column = np.random.default_rng(1).uniform(0.5, 2.0, shape[1])
    norm = {"mode": "norm", "magnitude": case.m}
    for options, factor in (
        ({}, 1.0),
        (norm, (case.m / case.norm)[:, None]),
        ({**norm, "eps": 0.01}, (case.m / (case.norm + 0.01))[:, None]),
        ({"mode": "given", "magnitude": case.m}, case.m[:, None]),
        ({"column_factor": by_column}, by_column),
    ):
        out, found = case.merge(**options)
        assert misrounded(out, case.V * factor) == 0
        assert not found.nonfinite
        assert found.undefined.size == 0
    if shape[0] > 5 and shape[1] > 1:  # what float32 arithmetic or a wrong norm gives is not that
        single = case.V.astype(np.float32) * (case.m / case.norm).astype(np.float32)[:, None]
        assert misrounded(case.merge(**norm)[0], single.astype(np.float64)) > 0
        assert misrounded(case.merge(**norm)[0], case.V) > 0


@needs_kernel
@pytest.mark.parametrize("stored", ["BF16", "F32"])
def test_a_float32_row_does_not_depend_on_its_neighbours(stored):
    case = Wide(19, 2065, 6, stored)
    norm = {"mode": "norm", "magnitude": case.m}
    whole, _ = case.merge(**norm)
    for size in (1, 2, 5, 6, 7):
        for first in range(0, 19, size):
            part, _ = case.merge(first, first + size, **norm)
            np.testing.assert_array_equal(part, whole[first : first + size])


@needs_kernel
@pytest.mark.parametrize("column", [0, 7, 8, 39])
def test_float32_rows_tell_of_inf_and_of_no_direction(column):
    case = Wide(7, 40, 2, "BF16")
    assert not case.merge()[1].nonfinite
    case.W[6, column] = 0x7F80
    assert case.merge()[1].nonfinite
    case = Wide(9, 40, 2, "BF16")
    case.W[3], case.left[3] = 0, 0
    case.W[5], case.left[5], case.m[5] = 0, 0, 0
    out, found = case.merge(mode="norm", magnitude=case.m)
    assert found.undefined.tolist() == [3]
    assert not out[[3, 5]].any()


@needs_kernel
def test_float32_buffers_that_do_not_fit_are_refused():
    case, out = Wide(6, 32, 2, "BF16"), np.zeros((6, 32), np.uint32)
    good = fused.WideFactors.of((case.left.astype(float), case.right.astype(float)), 6, 32)
    fused.merge_wide(case.W, out, good)
    for name in ("left", "panels"):
        bad = replace(good, **{name: getattr(good, name)[:-1].copy()})
        with pytest.raises(ValueError, match="do not fit 6 rows of 32 columns"):
            fused.merge_wide(case.W, out, bad)
    for wrong in ({"column_factor": np.ones(23)}, {"mode": "norm", "magnitude": case.m[:5].copy()}):
        with pytest.raises(ValueError, match="do not fit"):
            fused.merge_wide(case.W, out, good, **wrong)
    with pytest.raises(ValueError, match="do not fit"):
        fused.merge_wide(case.W, out[:-1].copy(), good)


@needs_kernel
@pytest.mark.parametrize("kind", ["u1", "u2", "u4", "u8"])
@pytest.mark.parametrize("shape", [(1, 1), (16, 16), (17, 33), (40, 5), (0, 3)], ids=str)
def test_matrices_are_turned(kind, shape):
    matrix = np.random.default_rng(0).integers(0, 255, shape).astype(kind)
    np.testing.assert_array_equal(fused.turned(matrix), matrix.T)


@needs_kernel
@pytest.mark.parametrize("kind", ["u1", "u2", "u4", "u8"])
@pytest.mark.parametrize("shape", [(1, 1), (16, 16), (17, 33), (40, 5), (0, 3)], ids=str)
def test_matrices_are_held_against_turned_ones(kind, shape):
    top = np.iinfo(kind).max
    matrix = np.random.default_rng(0).integers(0, top, shape, dtype=kind)
    assert fused.is_turned(matrix, matrix.T)
    for position in range(matrix.size):
        for bit in (0, matrix.itemsize * 8 - 1):
            other = matrix.T.copy("C")
            other.reshape(-1)[position] ^= np.dtype(kind).type(1 << bit)
            assert not fused.is_turned(matrix, other)


@needs_kernel
@pytest.mark.parametrize("kind", ["u1", "u2", "u4", "u8"])
@pytest.mark.parametrize("shape", [(1, 1), (16, 16), (70, 33), (1100, 3), (3, 130)], ids=str)
def test_matrices_are_turned_into_larger_ones(kind, shape):
    rows, columns = shape
    matrix = np.random.default_rng(0).integers(0, 255, shape).astype(kind)
    out = np.zeros((columns, rows + 5), kind)
    expected = out.copy()
    expected[:, 3 : 3 + rows] = matrix.T
    stride, flat = out.shape[1] * out.itemsize, out.reshape(-1).view(np.uint8)
    assert fused.turn_into(matrix, flat, 3 * out.itemsize, stride)
    np.testing.assert_array_equal(out, expected)
    for first, far in ((6 * out.itemsize, stride), (-1, stride), (0, rows * out.itemsize - 1)):
        with pytest.raises(ValueError, match="do not fit"):
            fused.turn_into(matrix, flat, first, far)


@needs_kernel
@pytest.mark.parametrize("rows", [5, 16, 300])
@pytest.mark.parametrize("first", [0, 7])
@pytest.mark.parametrize("count", [1, 16, 70])
@pytest.mark.parametrize("stored", ["bfloat16", "u2", "u4"])
def test_some_columns_are_held_against_a_turned_matrix(rows, first, count, stored):
    kind = "u4" if stored == "u4" else "u2"
    matrix = np.random.default_rng(0).integers(0, 65536, (rows, 80)).astype(kind)
    turned = matrix[:, first : first + count].T.copy()
    if stored == "bfloat16":
        turned = turned.astype(np.uint32) << 16
    assert fused.is_turned(matrix, turned, first)
    if count > 1:
        assert not fused.is_turned(matrix, turned, first + 1)
    for position in range(0, turned.size, 29):
        for bit in (0, turned.itemsize * 8 - 1):
            other = turned.copy()
            other.reshape(-1)[position] ^= turned.dtype.type(1 << bit)
            assert not fused.is_turned(matrix, other, first)
    with pytest.raises(ValueError, match="do not fit"):
        fused.is_turned(matrix, turned, 80 - count + 1)
