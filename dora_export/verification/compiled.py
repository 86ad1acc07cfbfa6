"""The oracle's compiled loop: one pass over a block of rows, where numpy takes two dozen.

``kernel/compare_rows.c`` computes what ``tally`` and ``exact`` do, in the most common case: one
low-rank product, or none, and one magnitude per row or per column. All of it is float64, none of it
is the merge's. Without a C compiler, or with ``DORA_EXPORT_KERNEL=numpy`` in the environment, numpy
does all the work.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dora_export import extensions
from dora_export.verification.values import Floats

STRIP = 8  # columns that lie together in a packed factor
MODULE = "dora_export._oracle"
# As in kernel/compare_module.c; changes with what a call takes and finds.
NAME = "compare_rows 1"
TYPES = {"BF16": 0, "F16": 1, "F32": 2}  # enum stored_type
AS_IT_IS, OVER_LENGTH, BY_MAGNITUDE = range(3)  # enum row_rule
MOST = 1e150  # sizes of factors whose product float64 holds

# What is found out about a row, as enum figure has it.
ORDINARY, EXCESS, MISROUNDED, WORST, ERROR, UNITS, SIZE, UPDATE, LENGTH = range(9)


def _module() -> Any:
    return extensions.loaded(MODULE, NAME)


def available() -> bool:
    """Return whether the loop is there and not switched off."""
    return extensions.available(MODULE, NAME)


@dataclass(frozen=True, eq=False)
class Rule:
    """What a region's exact result is, as the loop takes it.

    Attributes:
        left: Left factor, scaling included, ``(rows, rank)``.
        right: Right factor, packed.
        right_sizes: Norms of its columns.
        kind: ``AS_IT_IS``, ``OVER_LENGTH`` or ``BY_MAGNITUDE``.
        magnitude: One per row for the last two, or None.
        by_column: Factor on each column, or None.
        eps: Added to the norm.
    """

    left: Floats
    right: Floats
    right_sizes: Floats
    kind: int = AS_IT_IS
    magnitude: Floats | None = None
    by_column: Floats | None = None
    eps: float = 0.0

    @classmethod
    def of(cls, left: Floats, right: Floats) -> Rule | None:
        """Return the rule of a product alone, ``(rows, rank)`` by ``(rank, columns)``.

        None where the size of its terms may be beyond float64.
        """
        with np.errstate(over="ignore", invalid="ignore"):
            left_sizes = np.sqrt(np.einsum("ij,ij->i", left, left))
            right_sizes = np.sqrt(np.einsum("ij,ij->j", right, right))
        # NaN is not below
        if not (left_sizes.max(initial=0.0) < MOST and right_sizes.max(initial=0.0) < MOST):
            return None
        return cls(np.ascontiguousarray(left), _packed(right), padded(right_sizes))


def padded(per_column: Floats) -> Floats:
    """Return values per column with zeros behind them, to whole strips."""
    return np.pad(per_column, (0, -len(per_column) % STRIP))


def _packed(right: Floats) -> Floats:
    rank, columns = right.shape
    whole = np.pad(right, ((0, 0), (0, -columns % STRIP)))
    return np.ascontiguousarray(whole.reshape(rank, -(-columns // STRIP), STRIP).transpose(1, 0, 2))


@dataclass(frozen=True)
class Scale:
    """How the distance from the exact result is measured.

    Attributes:
        least: Smallest power of two that the stored type's steps shrink with.
        half: Largest distance of what is correctly rounded, in powers of two.
        step: Half a step of the stored type, in powers of two.
        floor: Size of terms below which their error shrinks no further.
    """

    least: float
    half: float
    step: float
    floor: float


def compare(
    rule: Rule,
    scale: Scale,
    types: tuple[str, str],
    base: NDArray[Any],
    merged: NDArray[Any],
    rows: slice | NDArray[np.int64],
    columns_found: tuple[Floats, Floats] | None = None,
) -> Floats:
    """Return what is found out about stored rows, ``(rows, 9)``; releases the interpreter lock.

    Args:
        rule: Of the region.
        scale: Of the merged type.
        types: Names of the base's and the merged type.
        base: Stored rows.
        merged: The same of the merged model.
        rows: Which rows of the region these are.
        columns_found: Excess and squared norm per column, padded, to be brought up to date; None
            where lines are rows.
    """
    none: Floats = np.empty(0)
    found = np.empty((len(base), LENGTH + 1))
    excess, lengths = columns_found or (none, none)
    _module().compare(
        (TYPES[types[0]], TYPES[types[1]]),
        rule.kind,
        base.shape[1],
        rule.left.shape[1],
        (rule.eps, scale.least, scale.half, scale.step, scale.floor),
        base,
        merged,
        rule.left[rows],
        rule.right,
        rule.right_sizes,
        none if rule.magnitude is None else rule.magnitude[rows],
        none if rule.by_column is None else rule.by_column,
        found,
        excess,
        lengths,
    )
    return found


def add_column_squares(
    rule: Rule, dtype: str, base: NDArray[Any], rows: slice, squares: Floats
) -> None:
    """Add the squares of ``W + left @ right`` of some rows to sums per column, padded."""
    _module().add_column_squares(
        TYPES[dtype], base.shape[1], rule.left.shape[1], base, rule.left[rows], rule.right, squares
    )
