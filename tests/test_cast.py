"""Stored bits to floats and back: against torch and numpy, on every pattern that can go wrong."""

import numpy as np
import pytest
import torch

from dora_export import cast
from dora_export.tensors import BF16, F16, F32, F64

PATTERNS = np.arange(1 << 16, dtype=np.uint16)


def narrowed(values, dtype):
    raw = np.empty(values.shape, dtype.raw)
    cast.narrow(values.copy(), dtype, raw, np.empty_like(values))
    return raw


def torch_bits(values, torch_dtype):
    return torch.from_numpy(values).to(torch_dtype).view(torch.int16).numpy().view(np.uint16)


def finite_values(torch_dtype):
    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16)
    values = bits.view(torch_dtype).double()
    return np.unique(values[values.isfinite()].numpy())


@pytest.mark.parametrize("precision", [np.float32, np.float64])
@pytest.mark.parametrize(("dtype", "torch_dtype"), [(BF16, torch.bfloat16), (F16, torch.float16)])
def test_widen_gives_the_value_of_every_16_bit_pattern(dtype, torch_dtype, precision):
    expected = torch.from_numpy(PATTERNS.view(np.int16)).view(torch_dtype).double().numpy()
    np.testing.assert_array_equal(cast.widened(PATTERNS, dtype, precision), expected)


@pytest.mark.parametrize(("dtype", "torch_dtype"), [(BF16, torch.bfloat16), (F16, torch.float16)])
def test_narrow_from_float32_agrees_with_torch_on_values_ties_and_neighbours(dtype, torch_dtype):
    exact = finite_values(torch_dtype)
    ties = ((exact[1:] + exact[:-1]) / 2).astype(np.float32)
    near = [np.nextafter(ties, np.float32(side)) for side in (np.inf, -np.inf)]
    rng = np.random.default_rng(0)
    anything = rng.integers(0, 1 << 32, 200_000, dtype=np.uint32).view(np.float32)
    values = np.concatenate([exact.astype(np.float32), ties, *near, anything])
    values = values[~np.isnan(values)]
    expected = torch_bits(values, torch_dtype)
    np.testing.assert_array_equal(narrowed(values, dtype), expected)


@pytest.mark.parametrize(("dtype", "torch_dtype"), [(BF16, torch.bfloat16), (F16, torch.float16)])
def test_narrow_from_float64_rounds_once(dtype, torch_dtype):
    exact = finite_values(torch_dtype)
    low, high = exact[:-1], exact[1:]
    tie = (low + high) / 2  # exact in float64
    for shift, expected in ((1 + 1e-15, "away"), (1 - 1e-15, "toward")):
        # A value this close to a tie rounds to the tie in float32: two roundings would go wrong.
        values = tie * shift
        outer = np.where(np.abs(high) > np.abs(low), high, low)
        inner = np.where(np.abs(high) > np.abs(low), low, high)
        wanted = outer if expected == "away" else inner
        got = cast.widened(narrowed(values, dtype), dtype, np.float64)
        np.testing.assert_array_equal(got, wanted)
    naive = torch.from_numpy(tie * (1 + 1e-15)).float().to(torch_dtype).double().numpy()
    assert (naive != np.where(np.abs(high) > np.abs(low), high, low)).mean() > 0.3


def test_narrow_float64_to_float32_is_the_nearest():
    values = np.random.default_rng(0).standard_normal(1000)
    np.testing.assert_array_equal(narrowed(values, F32).view(np.float32), values.astype(np.float32))
    np.testing.assert_array_equal(narrowed(values, F64).view(np.float64), values)


@pytest.mark.parametrize("dtype", [BF16, F16, F32, F64])
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan, 1e300])
def test_values_that_do_not_fit_are_found(dtype, bad):
    values = np.array([1.0, bad, 2.0])
    raw = narrowed(values, dtype)
    fits = dtype is F64 and np.isfinite(bad)
    assert cast.nonfinite(raw, dtype).tolist() == [False, not fits, False]
    assert cast.magnitudes(raw, dtype, np.empty_like(raw)) is not fits


def test_magnitudes_are_ordered_as_absolute_values():
    values = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    raw = narrowed(values, BF16)
    sizes = np.empty_like(raw)
    cast.magnitudes(raw, BF16, sizes)
    stored = np.abs(cast.widened(raw, BF16, np.float64))
    np.testing.assert_array_equal(
        np.argsort(sizes, kind="stable"), np.argsort(stored, kind="stable")
    )
