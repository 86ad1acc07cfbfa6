"""Initializers of a graph that still hold the base's values where the adapter changes them.

Found by content, stored as in the checkpoint or transposed, whatever their names: a graph that was
exported from the base, or from a merge that missed a layer, is told by the very tensor.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dora_export.errors import shown
from dora_export.pieces import regions
from dora_export.plan import Plan, Settings, Step
from dora_export.tensors import DType
from dora_export.verification.exact import Exact, rounded
from dora_export.verification.initializers import initializers
from dora_export.verification.model import Finding
from dora_export.verification.values import floats

LEAST = 64  # elements; smaller tensors may well be equal by chance
ROWS = 4  # of a tensor that are looked at to see whether its values change at all


def stale(plan: Plan, path: Path) -> Iterator[Finding]:
    """Yield a finding for every initializer with the base's values of a tensor that changes.

    Memory: a few times the largest changed tensor in float64.

    Args:
        plan: Base, adapter and what becomes of them.
        path: The graph; its external data must have been found to lie in its folder.
    """
    by_shape: dict[tuple[int, ...], list[Step]] = defaultdict(list)
    for step in plan.steps:
        if step.changes and step.source.size >= LEAST:
            by_shape[tuple(sorted(step.shape))].append(step)
    for found in initializers(path):
        for step in by_shape.get(tuple(sorted(found.shape)), ()):
            base = floats(step.source.raw(), step.source.dtype)
            base = rounded(base, found.dtype).reshape(step.shape)
            if _same(found.values(), base) and _changes(step, plan.settings, found.dtype):
                what = "has the base's values, which the adapter changes"
                yield Finding("graph-stale", f"{shown(found.name)} ({shown(step.name)})", what)


def _same(held: NDArray[np.float64], base: NDArray[np.float64]) -> bool:
    turned = held.ndim == 2 and held.shape == base.shape[::-1] and np.array_equal(held.T, base)
    return turned or (held.shape == base.shape and np.array_equal(held, base))


def _changes(step: Step, settings: Settings, dtype: DType) -> bool:
    """Return whether the exact values differ from the base's, once rounded to the graph's type."""
    for region in regions(step):
        if not region.changes:
            continue
        exact = Exact.open(step.source, region, settings)
        if exact.by_column:
            return True
        rows = np.unique(np.linspace(0, region.rows - 1, ROWS).astype(np.int64))
        base, values = exact.rows(rows)
        if not np.array_equal(rounded(base, dtype), rounded(values, dtype)):
            return True
    return False
