"""What the formula asks of an array library, and numpy's answer: the reference, on the CPU.

The formula is written once, for arrays that behave alike in numpy and torch. The few things the
two spell differently are the methods below; ``arithmetic_torch`` holds torch's, for CUDA devices.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from dora_export import cast, fused
from dora_export.tensors import DType

Array = Any  # numpy.ndarray or torch.Tensor, whichever the Arithmetic at hand works on
# A product of few rows with a right side that stays in the cache takes BLAS's path without packing,
# twice as fast where the rank is small.
BATCH_ROWS = 8
BATCH_BYTES = 512 << 10
# Elements that numpy may buffer. A small number keeps it from buffering the single factor of a row,
# which makes a multiplication by rows twice as fast.
UFUNC_BUFFER = 1024
SQUARES_PER_SUM = 512  # float32 squares added up before the sum goes on in float64


class Arithmetic(Protocol):
    """One worker's array library: numpy, or torch on one device and stream."""

    xp: Any
    """Module with ``add``, ``multiply``, ``subtract``, ``sqrt`` and ``where``."""
    tile_elements: int
    """Elements that go through the formula at once, so that they stay in the fastest memory."""
    compiled: bool
    """Whether what the compiled kernel can do is left to it."""

    def empty(self, size: int) -> Array:
        """Return ``size`` elements of working precision with undefined values."""

    def host_buffer(self, nbytes: int) -> NDArray[np.uint8]:
        """Return host memory for stored bytes, fit for fast copies to and from the device."""

    def put(self, host: NDArray[Any]) -> Array:
        """Return an array, dtype and all, where this library computes, ready for all workers."""

    def as_working(self, values: Array) -> Array:
        """Return float64 values in working precision."""

    def host(self, values: Array) -> NDArray[Any]:
        """Return values as a numpy array."""

    def widen(self, raw: NDArray[Any], dtype: DType, out: Array) -> None:
        """Fill ``out`` with the values that the host bytes ``raw`` stand for."""

    def narrow(self, values: Array, dtype: DType, raw: NDArray[Any], work: Array) -> None:
        """Round ``values`` once to ``dtype`` into host memory; ``values`` and ``work`` are lost."""

    def add_product(self, values: Array, left: Array, right: Array, work: Array) -> None:
        """Add ``left @ right`` to ``values``; ``work`` is lost."""

    def row_squares(self, values: Array) -> Array:
        """Return each row's sum of squares, float64, shape ``(rows,)``."""

    def column_squares(self, values: Array, work: Array) -> Array:
        """Return each column's sum of squares, float64, shape ``(columns,)``; ``work`` is lost."""


class NumpyArithmetic:
    """numpy on the CPU, in float32 or float64.

    Args:
        precision: Working precision.
    """

    xp: Any = np
    tile_elements = 1 << 18  # 1 MiB of float32: near the core, and few calls per element

    def __init__(self, precision: type[np.floating[Any]]) -> None:
        self.precision = precision
        self.compiled = fused.available()

    def empty(self, size: int) -> Array:  # noqa: D102 - as in the Protocol
        return _aligned(size, np.dtype(self.precision))

    def host_buffer(self, nbytes: int) -> NDArray[np.uint8]:  # noqa: D102
        return np.empty(nbytes, np.uint8)

    def put(self, host: NDArray[Any]) -> Array:  # noqa: D102
        out = _aligned(host.size, host.dtype).reshape(host.shape)
        np.copyto(out, host)
        return out

    def as_working(self, values: Array) -> Array:  # noqa: D102
        return values.astype(self.precision)

    def host(self, values: Array) -> NDArray[Any]:  # noqa: D102
        array: NDArray[Any] = values
        return array

    def widen(self, raw: NDArray[Any], dtype: DType, out: Array) -> None:  # noqa: D102
        cast.widen(raw, dtype, out)

    def narrow(self, values: Array, dtype: DType, raw: NDArray[Any], work: Array) -> None:  # noqa: D102
        cast.narrow(values, dtype, raw, work)

    def add_product(  # noqa: D102
        self, values: Array, left: Array, right: Array, work: Array
    ) -> None:
        rows, rank = left.shape
        whole = rows - rows % BATCH_ROWS if right.nbytes <= BATCH_BYTES else 0
        if whole:
            batches = left[:whole].reshape(-1, BATCH_ROWS, rank)
            np.matmul(batches, right, out=work[:whole].reshape(-1, BATCH_ROWS, right.shape[1]))
        if whole < rows:
            np.matmul(left[whole:], right, out=work[whole:])
        np.add(values, work, out=values)

    @np.errstate(over="ignore")  # told of as rows beyond the range, see row_factor.py
    def row_squares(self, values: Array) -> Array:  # noqa: D102
        rows, columns = values.shape
        if columns % SQUARES_PER_SUM == 0:
            chunks = values.reshape(rows, -1, SQUARES_PER_SUM)
            return np.vecdot(chunks, chunks).sum(axis=1, dtype=np.float64)
        whole = columns - columns % SQUARES_PER_SUM
        strides = values.strides
        chunks = np.lib.stride_tricks.as_strided(
            values,
            (rows, whole // SQUARES_PER_SUM, SQUARES_PER_SUM),
            (strides[0], SQUARES_PER_SUM * strides[1], strides[1]),
            writeable=False,
        )
        rest = values[:, whole:]
        squares = np.vecdot(chunks, chunks).sum(axis=1, dtype=np.float64)
        return squares + np.vecdot(rest, rest)

    @np.errstate(over="ignore")  # as above
    def column_squares(self, values: Array, work: Array) -> Array:  # noqa: D102
        np.multiply(values, values, out=work)
        return work.sum(axis=0, dtype=np.float64)


def _aligned(size: int, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return an array at a multiple of 64 bytes: BLAS may choose its path by alignment."""
    spare = 64 // dtype.itemsize
    buffer = np.empty(size + spare, dtype)
    first = (-buffer.ctypes.data % 64) // dtype.itemsize
    return buffer[first : first + size]
