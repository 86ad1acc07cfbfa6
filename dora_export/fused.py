"""The compiled merge of bfloat16 rows: one pass over memory, where numpy takes a dozen.

``kernel/merge_rows.c`` holds the arithmetic. Where the package was built without a C compiler, or
with ``DORA_EXPORT_KERNEL=numpy`` in the environment, numpy does the same work. The two add in
another order, so about one stored element in 100,000 differs in its last place.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from dora_export import refine

Mode = Literal["none", "norm", "given"]
MODES: dict[Mode, int] = {"none": 0, "norm": 1, "given": 2}
PANEL = 16  # columns that lie together in a packed factor
NAME = "merge_rows 1"  # changes with the bytes it writes
SWITCH = "DORA_EXPORT_KERNEL"


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
class Merged:
    """What one call found, beside the rows that it wrote.

    Attributes:
        undefined: Rows without direction whose magnitude is not zero, ascending.
        nonfinite: Whether any element is inf or NaN.
        again: How many elements were computed again in float64.
    """

    undefined: NDArray[np.intp]
    nonfinite: bool
    again: int


@cache
def _module() -> Any:
    """Return the compiled module, or None where it is not there or the processor is too old."""
    if find_spec("dora_export._kernel") is None:
        return None
    module = import_module("dora_export._kernel")
    return module if module.usable else None


def available() -> bool:
    """Return whether the kernel is there and not switched off."""
    return os.environ.get(SWITCH) != "numpy" and _module() is not None


def packed(right: NDArray[Any]) -> NDArray[np.float32]:
    """Return a right factor ``(rank, columns)`` in float32, in the order the kernel reads it."""
    rank, columns = right.shape
    out = np.empty((-(-columns // PANEL), rank, PANEL), np.float32)
    _module().pack(np.ascontiguousarray(right, np.float32), out, rank, columns)
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
    return Merged(np.flatnonzero(undefined) + first_row, nonfinite, again)
