"""Stored numbers as float64, and float64 rounded to a storage type: the verifier's own way.

Written apart from ``dora_export.cast``, whose results it is held against, and by other means:
where the engine works on bit patterns, this scales to integers and lets ``rint`` round.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from dora_export.tensors import DType

Floats = NDArray[np.float64]
Array = NDArray[Any]
NUMPY = {"F64": np.float64, "F32": np.float32, "F16": np.float16}
BFLOAT16_DIGITS = 8  # significant bits, the leading one included
BFLOAT16_STEP = -133  # exponent of the smallest subnormal


def floats(raw: Array, dtype: DType) -> Floats:
    """Return stored elements as float64, exactly.

    Args:
        raw: Bit patterns as ``dtype.raw``.
        dtype: F64, F32, F16 or BF16.
    """
    if dtype.name != "BF16":
        return np.ascontiguousarray(raw).view(NUMPY[dtype.name]).astype(np.float64)
    # bfloat16 is the upper half of a float32.
    halves = np.zeros((*raw.shape, 2), np.dtype("<u2"))
    halves[..., 1] = raw
    return halves.view(np.dtype("<f4"))[..., 0].astype(np.float64)


def rounded(values: Floats, dtype: DType) -> Array:
    """Return the bit patterns of float64 values rounded once to a storage type.

    To nearest, ties to even; values beyond the largest finite one become inf, as IEEE 754 asks.

    Args:
        values: float64 of any shape.
        dtype: F64, F32, F16 or BF16.
    """
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        if dtype.name != "BF16":
            return values.astype(NUMPY[dtype.name]).view(np.dtype(dtype.raw))
        _, exponent = np.frexp(values)  # values = f * 2**exponent with 0.5 <= |f| < 1
        step = np.maximum(exponent - BFLOAT16_DIGITS, BFLOAT16_STEP)
        nearest = np.ldexp(np.rint(np.ldexp(values, -step)), step)
        # Eight digits fit a float32: no second rounding, and 2**128 becomes inf.
        single = nearest.astype(np.dtype("<f4")).view(np.dtype("<u4"))
        return (single >> 16).astype(np.uint16)


def is_nan(raw: Array, dtype: DType) -> NDArray[np.bool_]:
    """Return where stored elements are NaN, whatever their sign and payload."""
    magnitude = raw & raw.dtype.type((1 << (8 * dtype.itemsize - 1)) - 1)
    found: NDArray[np.bool_] = magnitude > raw.dtype.type(dtype.exponent_mask)
    return found
