"""Rows or ranks of an update in another order: the right base, the right numbers, mixed up.

What was added to a line is a sum of the rows of A. Its coefficients are the row of B that was used,
which is looked for among the others, as a whole (rows) and number by number (ranks).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from dora_export.update import Product
from dora_export.verification.exact import Exact
from dora_export.verification.samples import Sample
from dora_export.verification.values import Floats


def orders(exact: Exact, sample: Sample) -> Iterator[tuple[str, Floats]]:
    """Yield what some lines would be with an order that their coefficients tell of, and words.

    Args:
        exact: The region; only single products whose lines are rows are looked at.
        sample: Some of its lines as they are stored.
    """
    if exact.by_column or not sample.simple or sample.strength != 1.0 or len(exact.parts) != 1:
        return
    (part,) = exact.parts
    if not isinstance(part.change.delta, Product) or not np.isfinite(sample.merged).all():
        return
    left, right = part.factors
    found = _coefficients(sample, right)
    if found is None:
        return
    own = left[sample.lines]
    place = _nearest(found, left)
    moved = np.flatnonzero(place != sample.lines)
    if len(moved):
        first = f"row {sample.lines[moved[0]]} holds the update of row {place[moved[0]]}"
        more = f", and {len(moved) - 1} more of {len(place)}" if len(moved) > 1 else ""
        yield first + more, sample.mixed(left[place] @ right, sample.magnitude)
    order = _nearest(own.T, found.T)
    moved = np.flatnonzero(order != np.arange(len(order)))
    if len(moved) and len(set(order)) == len(order):
        k = moved[0]
        words = (
            f"column {k} of B meets row {order[k]} of A, and {len(moved) - 1} more of {len(order)}"
        )
        yield words, sample.mixed(own @ right[order], sample.magnitude)


def _coefficients(sample: Sample, right: Floats) -> Floats | None:
    """Return the row of B that each line was made with, scaling included; None: it is not told."""
    found = []
    for base, merged in zip(sample.base, sample.merged, strict=True):
        parts = np.vstack([base, right]).T
        solution, _, rank, _ = np.linalg.lstsq(parts, merged, rcond=None)
        if rank < len(solution) or not solution[0]:
            return None
        found.append(solution[1:] / solution[0])
    return np.stack(found)


def _nearest(some: Floats, others: Floats) -> NDArray[np.intp]:
    """Return the position of the row of ``others`` that is nearest to each of some rows."""
    gaps = np.square(others).sum(axis=1) - 2 * some @ others.T
    found: NDArray[np.intp] = gaps.argmin(axis=1)
    return found
