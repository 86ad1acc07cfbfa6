"""To which type the merged weights in a graph were rounded: what they hold says so.

A 16-bit base may be merged before or after it is widened to float32. The graph's weights are
float32 in either case, but only those of the first kind are all values of 16 bits. What is allowed
follows from it, so some rows of merged weights are looked at, under whatever names.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dora_export.pieces import regions
from dora_export.plan import Plan, Step
from dora_export.tensors import DTYPES, DType
from dora_export.verification.exact import Exact, rounded
from dora_export.verification.initializers import Initializer, initializers
from dora_export.verification.values import Floats

TENSORS = 12  # changed ones that are looked for, spread evenly
ROWS = 4  # of each
MATCHES = 2.0**-5  # relative distance of rows that are a merge of the right ones, or nearly
TOLD = 2.0**-14  # a change that is less, relative, leaves rows nearly the base's


def merged_in(plan: Plan, graphs: Sequence[Path]) -> DType | None:
    """Return the type that most of the merged weights in a graph were rounded to.

    Looks at floating-point initializers that are as a changed tensor, stored as in the checkpoint
    or transposed; reads a few of their rows.

    Args:
        plan: Base, adapter and what becomes of them.
        graphs: The graph, and those beside it that belong to it; their external data must have
            been found to lie in their folder.

    Returns:
        None where none could be told: other layouts, packed or quantised ones, or other values.
    """
    by_shape: dict[tuple[int, ...], list[Initializer]] = defaultdict(list)
    for path in graphs:
        for found in initializers(path):
            if len(found.shape) == 2:
                by_shape[tuple(sorted(found.shape))].append(found)
    steps = [s for s in plan.steps if s.changes and tuple(sorted(s.shape)) in by_shape]
    told = Counter(
        kind
        for step in _spread(steps)
        if (kind := _kind(plan, step, by_shape[tuple(sorted(step.shape))])) is not None
    )
    return DTYPES[told.most_common(1)[0][0]] if told else None


def _spread(steps: Sequence[Step]) -> Iterator[Step]:
    for at in np.unique(np.linspace(0, len(steps) - 1, TENSORS).astype(int)) if steps else ():
        yield steps[at]


def _kind(plan: Plan, step: Step, candidates: Iterable[Initializer]) -> str | None:
    """Return the coarsest type that holds the rows of the nearest of some initializers."""
    exact = _some_rows(plan, step)
    if exact is None:
        return None
    rows, values = exact
    found = [held for one in candidates for held in one.rows(rows, step.shape)]
    nearest = min(found, key=lambda held: _apart(held, values), default=None)
    if nearest is None or not _apart(nearest, values) < MATCHES:
        return None
    narrow = (n for n in ("BF16", "F16") if np.array_equal(rounded(nearest, DTYPES[n]), nearest))
    return next(narrow, "F32")


def _some_rows(plan: Plan, step: Step) -> tuple[NDArray[np.int64], Floats] | None:
    """Return some rows of the exact result that the adapter changes, or None: it changes none."""
    found = [r for r in regions(step) if r.changes and r.columns == step.shape[1]]
    if not found:
        return None
    region = found[0]
    exact = Exact.open(step.source, region, plan.settings).with_factors()
    rows = np.unique(np.linspace(0, region.rows - 1, ROWS).astype(np.int64))
    with np.errstate(over="ignore", invalid="ignore"):
        base, values = exact.rows(rows)
    if not _apart(base, values) > TOLD:
        return None
    return rows + region.start // region.columns, values


def _apart(held: Floats, values: Floats) -> float:
    """Return the distance of some values, relative."""
    size = float(np.linalg.norm(values))
    return float(np.linalg.norm(held - values)) / size if size else np.inf
