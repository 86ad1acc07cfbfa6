"""Stored values as float64, by verification's own reading of their bytes."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from dora_export.tensors import DType, Operand

Floats = NDArray[np.float64]


def operand_values(operand: Operand) -> Floats:
    """Return an arranged adapter tensor."""
    return np.ascontiguousarray(operand.value(lambda ref: floats(ref.raw(), ref.dtype)))


def floats(raw: NDArray[Any], dtype: DType) -> Floats:
    """Return stored elements as float64; bfloat16 is the upper half of a float32."""
    if dtype.name == "BF16":
        bits: NDArray[np.uint32] = np.left_shift(raw, 16, dtype=np.uint32)
        return bits.view(np.float32).astype(np.float64)
    stored = {"F16": np.float16, "F32": np.float32, "F64": np.float64}[dtype.name]
    return np.ascontiguousarray(raw).view(stored).astype(np.float64)
