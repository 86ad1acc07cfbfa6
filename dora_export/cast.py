"""Between stored bytes and floating-point arrays: widen exactly, narrow with one rounding.

numpy has no bfloat16 and converts float16 one element at a time; both are done here on the bit
patterns, whole arrays at once. Rounding is to nearest, ties to even, as IEEE 754 asks.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dora_export.tensors import BF16, F16, F32, F64, DType, Operand

Array = NDArray[Any]


def widen(raw: Array, dtype: DType, out: Array) -> None:
    """Fill ``out`` with the values stored in ``raw``; exact unless float64 goes into float32.

    Args:
        raw: Stored elements as ``dtype.raw``, same shape as ``out``.
        dtype: F64, F32, F16 or BF16.
        out: float32 or float64, C-contiguous.
    """
    if dtype is BF16 and out.dtype == np.float32:
        bits = out.view(np.uint32)
        np.copyto(bits, raw)
        np.left_shift(bits, 16, out=bits)
    elif dtype.itemsize == 2:
        np.take(_values_of_patterns(dtype, out.dtype), raw, out=out, mode="clip")
    else:
        _convert(raw.view(np.float32 if dtype is F32 else np.float64), out)


def _convert(values: Array, out: Array) -> None:
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):  # NaN may be signalling
        np.copyto(out, values, casting="same_kind")


def widened(raw: Array, dtype: DType, precision: Any) -> Array:
    """Return the values stored in ``raw`` as a new array of ``precision`` (float32 or float64)."""
    out = np.empty(raw.shape, precision)
    widen(raw, dtype, out)
    return out


def operand_values(operand: Operand, precision: Any) -> Array:
    """Read an adapter's tensors, widen them to ``precision`` and arrange them, contiguous.

    Raises:
        InputError: A file ends too early or cannot be read.
    """
    values = operand.value(lambda ref: widened(ref.raw(), ref.dtype, precision))
    return np.ascontiguousarray(values)


def narrow(values: Array, dtype: DType, raw: Array, work: Array) -> None:
    """Round ``values`` once to ``dtype`` and put the bit patterns into ``raw``.

    Values too large for ``dtype``, inf and NaN all come out with every exponent bit set, which is
    what ``nonfinite`` looks for.

    Args:
        values: float32 or float64, C-contiguous; its contents are lost.
        dtype: F64, F32, F16 or BF16.
        raw: ``dtype.raw``, same shape.
        work: Scratch of the shape and dtype of ``values``; its contents are lost.
    """
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        if dtype is F64 or (dtype is F32 and values.dtype == np.float32):
            np.copyto(raw.view(np.float32 if dtype is F32 else np.float64), values)
        elif dtype is F32:
            np.copyto(raw.view(np.float32), values, casting="same_kind")
        elif values.dtype == np.float64 and dtype is F16:
            np.copyto(raw.view(np.float16), values, casting="same_kind")
        elif values.dtype == np.float64:
            _float64_to_bfloat16(values, raw, work)
        elif dtype is BF16:
            _float32_to_bfloat16(values, raw, work)
        else:
            _float32_to_float16(values, raw, work)


def nonfinite(raw: Array, dtype: DType) -> NDArray[np.bool_]:
    """Return where stored elements are inf or NaN."""
    mask = raw.dtype.type(dtype.exponent_mask)
    found: NDArray[np.bool_] = np.bitwise_and(raw, mask) == mask
    return found


def magnitudes(raw: Array, dtype: DType, out: Array) -> bool:
    """Put the bit patterns of the absolute values into ``out``; return whether any is inf or NaN.

    Bit patterns of absolute values are ordered as the values are.
    """
    bits = 8 * dtype.itemsize
    np.bitwise_and(raw, (1 << (bits - 1)) - 1, out=out)
    return bool(out.size) and bool(out.max() >= dtype.exponent_mask)


def _float32_to_bfloat16(values: Array, raw: Array, work: Array) -> None:
    bits, odd = values.view(np.uint32), work.view(np.uint32)
    # Add half a bfloat16 ulp, less one bit when the kept part is even: nearest, ties to even.
    # A NaN keeps its exponent bits unless its payload is all ones, which no arithmetic makes.
    np.right_shift(bits, 16, out=odd)
    np.bitwise_and(odd, 1, out=odd)
    np.add(odd, 0x7FFF, out=odd)
    np.add(bits, odd, out=bits)
    np.right_shift(bits, 16, out=bits)
    np.copyto(raw, bits, casting="unsafe")


def _float64_to_bfloat16(values: Array, raw: Array, work: Array) -> None:
    bits, odd = values.view(np.int64), work.view(np.int64)
    sign = np.right_shift(bits, 48, out=odd).astype(np.uint16)
    np.bitwise_and(sign, 0x8000, out=sign)
    np.bitwise_and(bits, (1 << 63) - 1, out=bits)
    # bfloat16's own subnormals, below 2**-126, are few: they go by way of float32.
    tiny = np.nonzero((bits < (1023 - 126) << 52) & (bits != 0))
    singles = _odd_float32(values[tiny])
    # As from float32, with 45 bits dropped and the exponent moved from 1023 to 127.
    np.right_shift(bits, 45, out=odd)
    np.bitwise_and(odd, 1, out=odd)
    np.add(odd, (1 << 44) - 1, out=odd)
    np.add(bits, odd, out=bits)
    np.right_shift(bits, 45, out=bits)
    np.subtract(bits, (1023 - 127) << 7, out=bits)
    np.clip(bits, 0, 0x7F80, out=bits)
    np.copyto(raw, bits, casting="unsafe")
    if singles.size:
        rounded = np.empty(singles.shape, np.uint16)
        _float32_to_bfloat16(singles, rounded, np.empty_like(singles))
        raw[tiny] = rounded
    np.bitwise_or(raw, sign, out=raw)


def _float32_to_float16(values: Array, raw: Array, work: Array) -> None:
    bits, out = values.view(np.uint32), work.view(np.uint32)
    sign = np.right_shift(bits, 16).astype(np.uint16)
    np.bitwise_and(sign, 0x8000, out=sign)
    np.bitwise_and(bits, 0x7FFFFFFF, out=bits)
    # Below 2**-14 float16 counts in steps of 2**-24: let the adder round to that step.
    small = bits < 0x38800000
    steps = (values[small] + np.float32(0.5)).view(np.uint32) - np.uint32(0x3F000000)
    # Elsewhere: as for bfloat16, with 13 bits dropped and the exponent moved from 127 to 15.
    np.right_shift(bits, 13, out=out)
    np.bitwise_and(out, 1, out=out)
    np.add(out, 0xFFF, out=out)
    np.add(bits, out, out=bits)
    np.right_shift(bits, 13, out=bits)
    np.subtract(bits, 112 << 10, out=bits)
    bits[small] = steps
    np.minimum(bits, 0x7C00, out=bits)
    np.copyto(raw, bits, casting="unsafe")
    np.bitwise_or(raw, sign, out=raw)


def _odd_float32(values: Array) -> Array:
    """Round float64 to float32 so that a second rounding to fewer bits is still correct.

    Inexact results get an odd last bit ("round to odd"), hence never look like a tie.
    Source: Boldo and Melquiond, "When double rounding is odd", 2005.
    """
    single = values.astype(np.float32)
    bits = single.view(np.int32)
    inexact = (single.astype(np.float64) != values) & np.isfinite(single)
    even = inexact & ((bits & 1) == 0)
    # Of the two neighbours of an inexact value one is odd: the one on the value's other side.
    step = np.where(np.abs(values) > np.abs(single.astype(np.float64)), 1, -1).astype(np.int32)
    bits[even] += step[even]
    return single


@cache
def _values_of_patterns(dtype: DType, precision: np.dtype[Any]) -> Array:
    """Return the value of each of the 65,536 patterns of a 16-bit type (256 or 512 KiB)."""
    patterns = np.arange(1 << 16, dtype=np.uint16)
    if dtype is F16:
        values = patterns.view(np.float16)
    else:
        values = np.left_shift(patterns, 16, dtype=np.uint32).view(np.float32)
    out = np.empty(values.shape, precision)
    _convert(values, out)
    return out
