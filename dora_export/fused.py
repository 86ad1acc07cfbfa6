"""The compiled merge of rows: one pass over memory, where numpy takes a dozen.

``kernel/merge_rows.c`` merges bfloat16 into bfloat16, in float32 with what cancels in float64;
``kernel/merge_wide.c`` bfloat16 or float32 into float32, in float64 throughout. Where the package
was built without a C compiler, or with ``DORA_EXPORT_KERNEL=numpy`` in the environment, numpy does
the same work. The two add in another order, so about one bfloat16 in 100,000, and practically no
float32, differs in its last place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from dora_export import extensions, refine
from dora_export.tensors import Bytes

Mode = Literal["none", "norm", "given"]
MODES: dict[Mode, int] = {"none": 0, "norm": 1, "given": 2}
PANEL = 16  # columns that lie together in a packed factor
WIDE_PANEL = 8  # the same of float64
SIZES = (1, 2, 4, 8)  # bytes of an item of a matrix that is turned
MODULE = "dora_export._kernel"
# As in kernel/module.c; changes with the bytes that a merge writes, and with what there is to call.
NAME = "merge_rows 1, merge_wide 1, turn 3, sha256 1"


@dataclass(frozen=True, eq=False)
class Factors:
    """A low-rank product as the kernel takes it.

    Attributes:
        left: float32, scaling included, ``(rows, rank)``.
        panels: The right factor, float32, packed.
        error: Most that a float32 element of each row can be off, ``(rows,)``; see ``refine``.
        exact_left: As exactly as it is stored, float64, ``(rows, rank)``.
        exact_right: The same of the right factor, ``(rank, columns)``; None: ``panels`` are exact.
    """

    left: NDArray[np.float32]
    panels: NDArray[np.float32]
    error: NDArray[np.float64]
    exact_left: NDArray[np.float64]
    exact_right: NDArray[np.float64] | None = None

    @classmethod
    def of(cls, product: refine.Product | None, rows: int, columns: int) -> Factors:
        """Return a product ready for the kernel; None: one of rank 0, for magnitudes alone."""
        if product is None:
            none = np.empty((rows, 0))
            panels = packed(np.empty((0, columns), np.float32))
            return cls(none.astype(np.float32), panels, np.zeros(rows), none)
        wide = product.right.dtype == np.float64
        return cls(
            np.ascontiguousarray(product.left, np.float32),
            packed(product.right),
            product.error,
            np.ascontiguousarray(product.left, np.float64),
            np.ascontiguousarray(product.right) if wide else None,
        )


@dataclass(frozen=True, eq=False)
class WideFactors:
    """A low-rank product as the kernel takes it that merges into float32.

    Attributes:
        left: float64, scaling included, ``(rows, rank)``.
        panels: The right factor, float64, packed.
    """

    left: NDArray[np.float64]
    panels: NDArray[np.float64]

    @classmethod
    def of(cls, factors: Sequence[NDArray[np.float64]], rows: int, columns: int) -> WideFactors:
        """Return two factors ready for the kernel; none: of rank 0, for magnitudes alone."""
        left, right = factors or (np.empty((rows, 0)), np.empty((0, columns)))
        return cls(np.ascontiguousarray(left), packed_wide(right))


@dataclass(frozen=True, eq=False)
class Merged:
    """What one call found, beside the rows that it wrote.

    Attributes:
        undefined: Rows without direction whose magnitude is not zero, ascending.
        coarse: Rows whose norm float32 has not the range for, ascending.
        nonfinite: Whether any element is inf or NaN.
        again: How many elements were computed again in float64.
    """

    undefined: NDArray[np.intp]
    coarse: NDArray[np.intp]
    nonfinite: bool
    again: int


def _module() -> Any:
    return extensions.loaded(MODULE, NAME)


def available() -> bool:
    """Return whether the kernel is there and not switched off."""
    return extensions.available(MODULE, NAME)


def packed(right: NDArray[Any]) -> NDArray[np.float32]:
    """Return a right factor ``(rank, columns)`` in float32, in the order the kernel reads it."""
    rank, columns = right.shape
    out = np.empty((-(-columns // PANEL), rank, PANEL), np.float32)
    _module().pack(np.ascontiguousarray(right, np.float32), out, rank, columns)
    return out


def packed_wide(right: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return a right factor ``(rank, columns)`` in the order ``merge_wide`` reads it."""
    rank, columns = right.shape
    out = np.empty((-(-columns // WIDE_PANEL), rank, WIDE_PANEL))
    _module().pack_wide(np.ascontiguousarray(right), out, rank, columns)
    return out


def merge(
    stored: NDArray[np.uint16],
    out: NDArray[np.uint16],
    factors: Factors,
    first_row: int = 0,
    *,
    mode: Mode = "none",
    magnitude: NDArray[np.float64] | None = None,
    eps: float = 0.0,
    column_factor: NDArray[np.float64] | None = None,
) -> Merged:
    """Merge rows of a bfloat16 weight into ``out``, rounded once to nearest, ties to even.

    What a row gives depends on that row alone. Releases the interpreter lock.

    Args:
        stored: W as bit patterns, ``(rows, columns)``.
        out: Where the result goes, same shape.
        factors: What is added.
        first_row: Row of ``factors`` and ``magnitude`` that ``stored`` starts with.
        mode: Factor on each row: none; "norm": magnitude by ``||V|| + eps``, zero where the norm
            is; "given": the magnitude itself.
        magnitude: Per row, for both.
        eps: Added to the norm.
        column_factor: Factor on each column, or None.
    """
    rows, columns = stored.shape
    these = slice(first_row, first_row + rows)
    none: NDArray[Any] = np.empty(0)
    by_column, bound = none, 1.0
    if column_factor is not None:
        by_column = packed(column_factor[None, :])
        bound = float(np.abs(column_factor).max(initial=0.0))
    undefined = np.zeros(rows if mode == "norm" else 0, np.uint8)
    again, nonfinite = _module().merge(
        MODES[mode],
        columns,
        factors.left.shape[1],
        eps,
        bound,
        stored,
        out,
        factors.left[these],
        factors.panels,
        by_column,
        none if magnitude is None or mode == "none" else magnitude[these],
        factors.error[these],
        factors.exact_left[these],
        none if factors.exact_right is None else factors.exact_right,
        none if column_factor is None else column_factor,
        undefined,
    )
    return _merged(undefined, first_row, nonfinite, again)


def merge_wide(
    stored: NDArray[Any],
    out: NDArray[Any],
    factors: WideFactors,
    first_row: int = 0,
    *,
    mode: Mode = "none",
    magnitude: NDArray[np.float64] | None = None,
    eps: float = 0.0,
    column_factor: NDArray[np.float64] | None = None,
) -> Merged:
    """Merge rows of a bfloat16 or float32 weight into float32, in float64, rounded once.

    What a row gives depends on that row alone. Releases the interpreter lock.

    Args:
        stored: W as bit patterns, ``(rows, columns)``: uint16 is bfloat16, uint32 is float32.
        out: Where the result goes, uint32, same shape.
        factors: What is added.
        first_row: As in ``merge``.
        mode: As in ``merge``.
        magnitude: As in ``merge``.
        eps: As in ``merge``.
        column_factor: As in ``merge``.
    """
    rows, columns = stored.shape
    these = slice(first_row, first_row + rows)
    none: NDArray[Any] = np.empty(0)
    undefined = np.zeros(rows if mode == "norm" else 0, np.uint8)
    nonfinite = _module().merge_wide(
        MODES[mode],
        columns,
        factors.left.shape[1],
        eps,
        stored.itemsize,
        stored,
        out,
        factors.left[these],
        factors.panels,
        none if column_factor is None else packed_wide(column_factor[None, :]),
        none if magnitude is None or mode == "none" else magnitude[these],
        undefined,
    )
    return _merged(undefined, first_row, nonfinite, 0)


def _merged(flags: NDArray[np.uint8], first_row: int, nonfinite: bool, again: int) -> Merged:
    undefined, coarse = (np.flatnonzero(flags == kind) + first_row for kind in (1, 2))
    return Merged(undefined, coarse, nonfinite, again)


def turned(matrix: NDArray[Any]) -> NDArray[Any] | None:
    """Return the transpose of a matrix, contiguous, or None where the kernel is not there."""
    rows, columns = matrix.shape
    out = np.empty((columns, rows), matrix.dtype)
    nbytes = out.reshape(-1).view(np.uint8)
    return out if turn_into(matrix, nbytes, 0, rows * matrix.itemsize) else None


def turn_into(matrix: NDArray[Any], out: Bytes, first: int, stride: int) -> bool:
    """Put the transpose of a matrix into a larger one that is given as bytes.

    Args:
        matrix: Of items of 1, 2, 4 or 8 bytes.
        out: Written into.
        first: Where in it the first row begins.
        stride: Bytes from one row to the next.

    Returns:
        Whether it was; False: the kernel is not there, and nothing was.
    """
    if not available() or matrix.itemsize not in SIZES:
        return False
    rows, columns = matrix.shape
    matrix = np.ascontiguousarray(matrix)
    _module().turn(matrix, out, rows, columns, matrix.itemsize, first, stride)
    return True


def is_turned(matrix: NDArray[Any], turned: NDArray[Any], first: int = 0) -> bool | None:
    """Return whether columns of a matrix are the rows of another one, bit for bit.

    Args:
        matrix: Shape ``(rows, columns)``.
        turned: Shape ``(n, rows)``, n at most ``columns``. Where its items have four bytes and the
            matrix's two, those are bfloat16, and compared after they are widened.
        first: The column that belongs to the first row.

    Returns:
        Whether they are; None: the kernel is not there.
    """
    size, stored = turned.itemsize, matrix.itemsize
    if not available() or size not in SIZES:
        return None
    one, other = np.ascontiguousarray(matrix), np.ascontiguousarray(turned)
    (rows, columns), (count, _) = one.shape, other.shape
    stride, wider = columns * stored, stored != size
    assert not wider or (stored, size) == (2, 4), "Bug: only bfloat16 is widened"
    found = _module().is_turned(one, other, rows, count, size, first * stored, stride, wider)
    return bool(found)


def read_rows(descriptor: int, offset: int, stride: int, out: Bytes) -> bool | None:
    """Read rows of bytes, ``stride`` apart in a file, without the interpreter lock.

    Args:
        descriptor: Of the file.
        offset: Of the first byte.
        stride: Bytes from one row to the next.
        out: Filled, shape ``(rows, bytes)``.

    Returns:
        Whether the file held them all; None: the kernel is not there, and nothing was read.

    Raises:
        OSError: Reading fails.
    """
    if not _transfers():
        return None
    if not out.size:
        return True
    count: int = _module().read_rows(descriptor, offset, stride, out.shape[1], out)
    return bool(count == out.shape[0])


def write_rows(descriptor: int, offset: int, stride: int, rows: Bytes) -> bool:
    """Write rows of bytes, ``stride`` apart in a file, without the interpreter lock.

    Args:
        descriptor: Of the file.
        offset: Of the first byte.
        stride: Bytes from one row to the next.
        rows: Shape ``(rows, bytes)``.

    Returns:
        Whether they were written; False: the kernel is not there, and nothing was.

    Raises:
        OSError: Writing fails.
    """
    if not _transfers():
        return False
    if rows.size:
        _module().write_rows(descriptor, offset, stride, rows.shape[1], rows)
    return True


def digests_two() -> bool:
    """Return whether ``digest_two`` can be called."""
    return available() and bool(_module().hashes)


def digest_two(state: bytearray, blocks: Bytes, other: bytearray, other_blocks: Bytes) -> None:
    """Take blocks of two messages into their SHA-256, side by side, without the interpreter lock.

    Args:
        state: Of the first message: eight uint32, in the machine's order of bytes.
        blocks: What follows of it, a multiple of 64 bytes; may be empty.
        other: As ``state``, of the second message.
        other_blocks: As ``blocks``.
    """
    _module().sha256_two(state, blocks, other, other_blocks)


def _transfers() -> bool:
    return available() and hasattr(_module(), "read_rows")
