"""Elements where W and s B A cancel, computed again in float64.

In float32 the product B A carries an absolute error of some 2**-24 of its terms. Where W + s B A is
thousands of times smaller than its terms, that error is more than the last place of a bfloat16
result. Such elements are few (one in some thousands) and known by their size: everything that comes
out smaller than a proven bound is computed again, so every element of the output is within one unit
in the last place of the exact result.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dora_export import cast
from dora_export.tensors import BF16, DType

FRACTION_BITS = 7  # of bfloat16
LOOKED_AT = 1 << 16  # elements that are looked at at once
FACTOR_BYTES = 4 << 20  # of what is taken from the factors for elements computed again at once
MOST_BYTES = 2 * FACTOR_BYTES  # of all that ``recompute_cancelled`` makes


@dataclass(frozen=True, eq=False)
class Product:
    """A low-rank product as exactly as it is stored, with what bounds its float32 error.

    Attributes:
        left: ``(rows, rank)``, float32 or float64, scaling included.
        right: ``(rank, columns)``, float32 or float64.
        error: Most that a float32 element of each row can be off, float64, ``(rows,)``.
    """

    left: NDArray[Any]
    right: NDArray[Any]
    error: NDArray[np.float64]


def product(left: NDArray[Any], right: NDArray[Any]) -> Product:
    """Return a product with its error bounds.

    With k terms, ``|fl(sum) - sum| <= k u / (1 - k u) * sum |terms|`` and
    ``sum |l r| <= ||l|| ||r||``; the factors' own rounding to float32 and the addition to W add
    three more u = 2**-24. Source: Higham, Accuracy and Stability of Numerical Algorithms, 3.1.
    """
    rank = left.shape[1]
    row_norms = np.sqrt(np.einsum("ij,ij->i", left, left, dtype=np.float64))
    column_squares = np.einsum("ij,ij->j", right, right, dtype=np.float64)
    largest = float(np.sqrt(column_squares.max(initial=0.0)))
    return Product(left, right, (rank + 4) * 2.0**-24 * row_norms * largest)


def recompute_cancelled(
    out: NDArray[np.uint16],
    stored: NDArray[Any],
    stored_dtype: DType,
    factors: Product,
    first_row: int,
    row_factor: NDArray[np.float64] | None,
    column_factor: NDArray[np.float64] | None,
    sizes: NDArray[Any],
    scratch: NDArray[np.uint8],
) -> int:
    """Replace the elements of ``out`` that float32 may have missed by more than half an ulp.

    Args:
        out: Merged elements as bfloat16 bit patterns, ``(rows, columns)``; changed in place.
        stored: The base's elements, same shape.
        stored_dtype: How they are stored.
        factors: The product that was added.
        first_row: Row of ``factors.left`` that ``out`` starts with.
        row_factor: ``m / norm`` per row, or None.
        column_factor: ``m / norm`` per column, or None.
        sizes: Bit patterns of the absolute values of ``out``.
        scratch: At least one byte per element; its contents are lost.

    Returns:
        How many elements were computed again. Doing so takes at most ``MOST_BYTES``, but for one
        row and one column of the factors where those alone are larger.
    """
    rows = slice(first_row, first_row + out.shape[0])
    error = factors.error[rows]
    if row_factor is not None:
        error = error * np.abs(row_factor)
    if column_factor is not None:
        error = error * np.abs(column_factor).max(initial=0.0)
    limit = _limit_bits(error)
    if not limit.any():
        return 0
    # Without new arrays: this looks at every element, and fresh memory would cost more than that.
    small = scratch[: out.size].view(np.bool_).reshape(out.shape)
    np.less(sizes, limit[:, None], out=small)
    flags, count = small.reshape(-1), 0
    # Of each element: a row and a column of the factors in float64, one of them as stored too.
    step = max(1, FACTOR_BYTES // (24 * max(1, factors.left.shape[1])))
    for first in range(0, flags.size, LOOKED_AT):
        found = _positions(flags[first : first + LOOKED_AT])
        found += first
        count += found.size
        for start in range(0, found.size, step):
            row, column = np.divmod(found[start : start + step], out.shape[1])
            values = cast.widened(stored[row, column], stored_dtype, np.float64)
            left = factors.left[row + first_row].astype(np.float64)
            right = factors.right[:, column].astype(np.float64)
            values += np.einsum("ij,ji->i", left, right)
            if row_factor is not None:
                values *= row_factor[row]
            if column_factor is not None:
                values *= column_factor[column]
            raw = np.empty(values.shape, np.uint16)
            cast.narrow(values, BF16, raw, np.empty_like(values))
            out[row, column] = raw
    return count


def _positions(flags: NDArray[np.bool_]) -> NDArray[np.intp]:
    """Return where few of many flags are set: eight are looked at at once."""
    whole = flags.size - flags.size % 8
    words = np.flatnonzero(flags[:whole].view(np.uint64) != 0)
    word, byte = np.nonzero(flags[:whole].reshape(-1, 8)[words])
    return np.concatenate([words[word] * 8 + byte, whole + np.flatnonzero(flags[whole:])])


def _limit_bits(error: NDArray[np.float64]) -> NDArray[np.uint16]:
    """Return, as bit patterns, the sizes below which an error is more than half an ulp.

    A unit in the last place of x is at least ``|x| * 2**-(fraction bits + 1)``.
    """
    limit = np.minimum(error * 2.0 ** (FRACTION_BITS + 2), 3e38)
    bits = (limit.astype(np.float32).view(np.uint32) >> 16) + 1
    found: NDArray[np.uint16] = np.where(limit > 0, bits, 0).astype(np.uint16)
    return found
