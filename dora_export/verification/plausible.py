"""Whether magnitudes can be norms at all: a look at some rows before anything is written.

TensorRT-LLM wants DoRA magnitudes divided by ``||W + s B A||`` beforehand; its script leaves names
and config as they were, so such a file looks like the trainer's own. Only the base tells: a trained
magnitude stays near the norm of its row, a divided one near 1.
Source: github.com/NVIDIA/TensorRT-LLM, examples/dora/normalize_weights.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from dora_export.errors import PlanError
from dora_export.pieces import Region, regions
from dora_export.plan import Plan, Settings, Step
from dora_export.verification.exact import Exact

TENSORS, ROWS = 24, 16  # looked at, evenly spread
NEAR = 4.0  # a trained magnitude is within this factor of its norm, a divided one of 1
FAR = 10.0


def refuse_implausible(plan: Plan) -> None:
    """Refuse magnitudes that look divided by the norms, or cannot belong to this base.

    Says nothing where the adapter's format stores no doubtful ones, or the user has said.

    Raises:
        PlanError: The median magnitude is far from the median norm.
    """
    for position, adapter in enumerate(plan.adapters):
        if adapter.doubtful_magnitudes:
            _refuse_implausible(plan, position)


def _refuse_implausible(plan: Plan, position: int) -> None:
    path = plan.adapters[position].path
    found = [(step, alone) for step in plan.steps for region in regions(step)
             if (alone := _alone(region, position)) is not None]  # fmt: skip
    every = -(-len(found) // TENSORS) or 1
    pairs = [pair for f in found[::every]
             for pair in _magnitudes_and_norms(*f, plan.settings)]  # fmt: skip
    if not pairs:
        return
    m, norm = np.array(pairs).T
    size, ratio = float(np.median(np.abs(m))), float(np.median(np.abs(m) / norm))
    if 1 / NEAR <= ratio <= NEAR:
        return
    if 1 / NEAR <= size <= NEAR:
        raise PlanError(
            f"{path}: magnitudes around {size:.3g} for rows of norm "
            f"{float(np.median(norm)):.3g}: they look divided by the norms already, as "
            "TensorRT-LLM wants them. Pass --magnitude-is-normalised if they are, "
            "--magnitude-is-not-normalised if they were trained so."
        )
    if not 1 / FAR <= ratio <= FAR:
        raise PlanError(
            f"{path}: magnitudes are around {ratio:.2g} times the norms of the rows "
            "they belong to. Check that this is the base it was trained on; pass "
            "--magnitude-is-not-normalised to merge it all the same."
        )


def _alone(region: Region, position: int) -> Region | None:
    """Return a region as one adapter alone would change it, if by one norm along its rows."""
    own = tuple(c for c in region.changes if c.adapter == position)
    return replace(region, changes=own) if len(own) == 1 and own[0].over == "row" else None


def _magnitudes_and_norms(
    step: Step, region: Region, settings: Settings
) -> Iterator[tuple[float, float]]:
    """Yield m and ``||W + s B A||`` of some rows; rows without direction say nothing."""
    exact = Exact.open(step.source, region, settings)
    rows = np.unique(np.linspace(0, region.rows - 1, ROWS).astype(np.intp))
    values, delta = exact.base(rows), exact.product(rows, slice(None))
    norms = np.linalg.norm(values if delta is None else values + delta, axis=1)
    magnitudes = exact.parts[0].magnitude
    assert magnitudes is not None, "Bug: only regions with magnitudes are looked at"
    for m, norm in zip(magnitudes[rows], norms, strict=True):
        if np.isfinite(norm) and norm > 0:
            yield float(m), float(norm)
