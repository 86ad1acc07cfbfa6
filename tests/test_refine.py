"""Elements that float32 may have missed: the bound holds, and what it selects is put right."""

import tracemalloc

import numpy as np
import pytest

from dora_export import cast, refine
from dora_export.tensors import BF16, F16


def low_rank(rng, rows, columns, rank, spread):
    scale = np.exp(spread * rng.standard_normal((rows, 1)))
    left = (rng.standard_normal((rows, rank)) * scale).astype(np.float32)
    right = rng.standard_normal((rank, columns)).astype(np.float32)
    return left, right


@pytest.mark.parametrize("rank", [1, 4, 16, 64])
@pytest.mark.parametrize("spread", [0.0, 3.0])
def test_error_bound_holds_for_every_element(rank, spread):
    rng = np.random.default_rng(rank)
    left, right = low_rank(rng, 200, 300, rank, spread)
    W = (-(left.astype(np.float64) @ right)).astype(np.float32)  # the worst case: all cancels
    exact = W + left.astype(np.float64) @ right
    error = np.abs((W + left @ right) - exact).max(axis=1)
    bound = refine.product(left, right).error
    assert (error <= bound).all()
    assert bound.max() < 1e-3 * np.abs(W).max()  # and it is a bound worth having


@pytest.mark.parametrize("stored_dtype", [BF16, F16])
def test_every_element_with_an_error_above_half_an_ulp_is_computed_again(stored_dtype):
    rng = np.random.default_rng(0)
    left, right = low_rank(rng, 64, 1024, 8, 0.0)
    stored = np.empty((64, 1024), np.uint16)
    noise = rng.standard_normal(stored.shape) * 10.0 ** rng.uniform(-7, 0, stored.shape)
    target = -(left.astype(np.float64) @ right) + noise
    cast.narrow(target.copy(), stored_dtype, stored, np.empty_like(target))
    exact = cast.widened(stored, stored_dtype, np.float64) + left.astype(np.float64) @ right
    wrong = np.zeros_like(stored)  # as if float32 had given nothing at all
    sizes, scratch = np.zeros_like(stored), np.empty(stored.size, np.uint8)
    product = refine.product(left, right)
    count = refine.recompute_cancelled(
        wrong, stored, stored_dtype, product, 0, None, None, sizes, scratch
    )
    assert count == stored.size  # zeros are below any bound: all were computed again
    got = cast.widened(wrong, BF16, np.float64)
    _, exponent = np.frexp(exact)
    assert (np.abs(got - exact) / np.ldexp(1.0, exponent - 8)).max() <= 0.5
    assert got.std() > 0


@pytest.mark.parametrize(("rank", "shape"), [(512, (4, 1024)), (1, (1024, 1024))])
def test_memory_does_not_grow_with_the_rank_or_the_elements(rank, shape):
    left, right = low_rank(np.random.default_rng(0), *shape, rank, 0.0)
    product = refine.product(left, right)
    out, sizes = np.zeros(shape, np.uint16), np.zeros(shape, np.uint16)
    scratch = np.empty(out.size, np.uint8)
    tracemalloc.start()
    try:
        count = refine.recompute_cancelled(out, sizes, BF16, product, 0, None, None, sizes, scratch)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == out.size
    assert peak <= refine.MOST_BYTES


def test_rows_without_a_product_are_left_alone():
    out = np.zeros((2, 4), np.uint16)
    product = refine.product(np.zeros((2, 1), np.float32), np.ones((1, 4), np.float32))
    count = refine.recompute_cancelled(
        out, out, BF16, product, 0, None, None, out.copy(), np.empty(8, np.uint8)
    )
    assert count == 0


def test_factors_move_the_limit_and_the_result():
    rng = np.random.default_rng(1)
    left, right = low_rank(rng, 8, 64, 4, 0.0)
    stored = np.zeros((8, 64), np.uint16)
    factors = rng.uniform(0.5, 2.0, 8)
    columns = rng.uniform(0.5, 2.0, 64)
    for row, column in ((factors, None), (None, columns)):
        out = np.zeros_like(stored)
        refine.recompute_cancelled(
            out, stored, BF16, refine.product(left, right), 0, row, column,
            np.zeros_like(out), np.empty(out.size, np.uint8),
        )  # fmt: skip
        exact = left.astype(np.float64) @ right
        exact = exact * row[:, None] if row is not None else exact * column
        np.testing.assert_allclose(cast.widened(out, BF16, np.float64), exact, rtol=2.0**-8)
