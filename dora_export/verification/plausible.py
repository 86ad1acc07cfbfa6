"""Whether base and adapter can belong together: a look at some rows before anything is written.

TensorRT-LLM wants DoRA magnitudes divided by ``||W + s B A||`` beforehand; its script leaves names
and config as they were, so such a file looks like the trainer's own. Only the base tells: a trained
magnitude stays near the norm of its row, a divided one near 1.
Likewise an adapter that begins with a part of the base (PiSSA, OLoRA) looks the same beside the
original and beside what was left of it.
Source: github.com/NVIDIA/TensorRT-LLM, examples/dora/normalize_weights.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from dora_export.errors import PlanError, shown
from dora_export.pieces import regions
from dora_export.plan import Plan
from dora_export.residual import Residual
from dora_export.verification import magnitudes
from dora_export.verification.exact import Exact
from dora_export.verification.magnitudes import Look

TENSORS, ROWS = 24, 16  # looked at, evenly spread
NEAR = 4.0  # a trained magnitude is within this factor of its norm, a divided one of 1
FAR = 10.0


def refuse_implausible(plan: Plan) -> tuple[str, ...]:
    """Refuse magnitudes that look divided by the norms, and a base that is not the one meant.

    Refuses nothing where the adapter's format stores no doubtful magnitudes, or the user has said.

    Returns:
        What is left to doubt: magnitudes far from the norms that they belong to.

    Raises:
        PlanError: The median magnitude is far from the median norm; or the base holds what the
            adapter began with although it should be the residual, or does not though it should.
    """
    found: list[str] = []
    for position, adapter in enumerate(plan.adapters):
        _refuse_other_base(plan, position)
        looked = magnitudes.looks(plan, position)
        if adapter.doubtful_magnitudes:
            _refuse_implausible(adapter.path, looked)
        found += _doubts(plan, position, looked)
    return tuple(found)


def doubts(plan: Plan) -> tuple[str, ...]:
    """Return what ``refuse_implausible`` leaves to doubt, without refusing anything."""
    return tuple(
        doubt
        for position in range(len(plan.adapters))
        for doubt in _doubts(plan, position, magnitudes.looks(plan, position))
    )


def _doubts(plan: Plan, position: int, looked: Sequence[Look]) -> Iterator[str]:
    if (told := magnitudes.doubt(looked)) is not None:
        name = shown(plan.adapters[position].path.name)
        yield told if len(plan.adapters) == 1 else f"'{name}': {told}"


def _refuse_implausible(path: Path, looked: Sequence[Look]) -> None:
    if not looked:
        return
    m = np.concatenate([look.magnitudes for look in looked])
    norm = np.concatenate([look.norms for look in looked])
    there = np.isfinite(norm) & (norm > 0)  # lines without direction say nothing
    if not there.any():
        return
    m, norm = np.abs(m[there]), norm[there]
    size, ratio = float(np.median(m)), float(np.median(m / norm))
    if 1 / NEAR <= ratio <= NEAR:
        return
    if 1 / NEAR <= size <= NEAR and not magnitudes.are_of_the_base(looked):
        raise PlanError(
            f"{path}: magnitudes around {size:.3g} for rows of norm "
            f"{float(np.median(norm)):.3g}: they look divided by the norms already, as "
            "TensorRT-LLM wants them. Pass --magnitude-is-normalised if they are, "
            "--magnitude-is-not-normalised if they were trained so."
        )
    if not 1 / FAR <= ratio <= FAR:
        raise PlanError(
            f"{path}: magnitudes are around {ratio:.2g} times the norms of the rows "
            f"they belong to. {magnitudes.reason(looked)}; pass "
            "--magnitude-is-not-normalised to merge it all the same."
        )


def _refuse_other_base(plan: Plan, position: int) -> None:
    """Refuse the original base in the place of the residual, and the reverse.

    Both begin with a projection P of the original W. PiSSA takes ``s B0 A0 = P W``: the original
    base holds all of it, the residual nothing. OLoRA takes ``B0 A0 = P W``, so in units of its
    ``s B0 A0`` the original holds ``1 / s`` and the residual ``1 / s - 1``. What the base holds of
    ``s B A`` is nearer to one of the two.
    """
    adapter = plan.adapters[position]
    found = [
        (step, region, [c for c in region.changes if c.adapter == position])
        for step in plan.steps
        for region in regions(step)
    ]
    found = [(s, r, own) for s, r, own in found if any(c.delta is not None for c in own)]
    computed = [c.function for *_, own in found for c in own if isinstance(c.function, Residual)]
    recomputed, init = bool(computed), computed[0].init if computed else adapter.residual_init or ""
    if not recomputed and not init.startswith(("pissa", "olora")):
        return
    held = size = middle = 0.0
    for step, region, own in found[:: -(-len(found) // TENSORS) or 1]:
        changes = tuple(c for c in own if c.delta is not None)
        exact = Exact.open(step.source, replace(region, changes=changes), plan.settings)
        rows = np.unique(np.linspace(0, region.rows - 1, ROWS).astype(np.intp))
        product = exact.product(rows, slice(None))
        assert product is not None, "Bug: only regions with products are looked at"
        squares = float(np.vdot(product, product))
        held += float(np.vdot(exact.base(rows), product))
        size += squares
        middle += squares * (1 / changes[0].scaling - 0.5 if init == "olora" else 0.5)
    share = f"{held / size:.0%}" if size else "nothing"
    if recomputed and held < middle:
        raise PlanError(
            f"{adapter.path}: this base holds {share} of the adapter's product, too little "
            "for the original one. If this is the residual base "
            "already, pass --base-is-residual in the place of --recompute-init; else it is not "
            "the base that the adapter was begun on."
        )
    if not recomputed and held > middle:
        raise PlanError(
            f"{adapter.path}: this base holds {share} of the adapter's product, so it "
            f"looks like the original one, not like what {init} left of it. Give the "
            "residual base that was saved"
            + (", or pass --recompute-init instead." if init in ("pissa", "olora") else ".")
        )
