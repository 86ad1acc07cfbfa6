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

Mode = Literal["none", "norm", "given"]
MODES: dict[Mode, int] = {"none": 0, "norm": 1, "given": 2}
PANEL = 16  # columns that lie together in a packed factor
CAPACITY = 1 << 15  # elements listed as doubtful by one call
NAME = "merge_rows 1"  # changes with the bytes it writes
SWITCH = "DORA_EXPORT_KERNEL"


@dataclass(frozen=True, eq=False)
class Merged:
    """What one call found, beside the rows that it wrote.

    Attributes:
        row_factor: What each row was multiplied by, float64, or None.
        undefined: Rows without direction whose magnitude is not zero, ascending.
        nonfinite: Whether any element is inf or NaN.
        doubtful: Flat positions of elements that float32 may have missed by more than half an ulp,
            ascending within six rows; None: more than are listed.
    """

    row_factor: NDArray[np.float64] | None
    undefined: NDArray[np.intp]
    nonfinite: bool
    doubtful: NDArray[np.int32] | None


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


def packed(right: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return a right factor ``(rank, columns)`` as ``merge`` takes it."""
    rank, columns = right.shape
    out = np.empty((-(-columns // PANEL), rank, PANEL), np.float32)
    _module().pack(np.ascontiguousarray(right, np.float32), out, rank, columns)
    return out


def merge(
    stored: NDArray[np.uint16],
    out: NDArray[np.uint16],
    left: NDArray[np.float32],
    panels: NDArray[np.float32],
    *,
    mode: Mode = "none",
    magnitude: NDArray[np.float64] | None = None,
    eps: float = 0.0,
    column_factor: NDArray[np.float64] | None = None,
    error: NDArray[np.float64] | None = None,
) -> Merged:
    """Merge rows of a bfloat16 weight into ``out``, rounded once to nearest, ties to even.

    What a row gives depends on that row alone. Releases the interpreter lock.

    Args:
        stored: W as bit patterns, ``(rows, columns)``.
        out: Where the result goes, same shape.
        left: B or its like, scaling included, ``(rows, rank)``; rank may be 0.
        panels: The right factor as ``packed`` returns it.
        mode: Factor on each row: none; "norm": magnitude by ``||V|| + eps``, zero where the norm
            is; "given": the magnitude itself.
        magnitude: Per row, for both.
        eps: Added to the norm.
        column_factor: Factor on each column, or None.
        error: Most that an element of V may be off, per row, for ``Merged.doubtful``.
    """
    rows, columns = stored.shape
    none: NDArray[Any] = np.empty(0)
    by_column, bound = none, 1.0
    if column_factor is not None:
        by_column = packed(column_factor.astype(np.float32)[None, :])
        bound = float(np.abs(column_factor).max(initial=0.0))
    scaled = mode != "none"
    row_factor = np.empty(rows if scaled else 0)
    undefined = np.zeros(rows if mode == "norm" else 0, np.uint8)
    found = np.empty(CAPACITY, np.int32)
    count, nonfinite = _module().merge(
        MODES[mode],
        columns,
        left.shape[1],
        eps,
        bound,
        stored,
        out,
        left,
        panels,
        by_column,
        magnitude if scaled else none,
        none if error is None else error,
        row_factor,
        undefined,
        found,
    )
    return Merged(
        row_factor if scaled else None,
        np.flatnonzero(undefined),
        nonfinite,
        found[:count] if count <= CAPACITY else None,
    )
