"""Known mistakes as models: which of them, if any, is a graph nearer to than to the right one?

Agreement within a tolerance says little where the tolerance is wide (a quantised graph's), and
choices of the best token say less: a model without its magnitudes can choose the same ones. So a
graph's outputs are also held against what base + adapter would give with a known mistake. Of the
step from the right outputs to the mistake's, the graph's own error may cover little: noise,
whatever its size, has no reason to point that way, and the mistake itself covers all of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dora_export.verification.terms import Term
from dora_export.verification.unmerged import Parts

LEANS = 0.5  # share of the way to a mistake from which on a graph is nearer to it
APART = 1e-6  # a mistake that changes less, relative, is none for this adapter


def _without_magnitudes(term: Term) -> Term:
    return replace(term, norm=None)


def _scaled(factor: float) -> Callable[[Term], Term]:
    def change(term: Term) -> Term:
        scaled = replace(term, scaling=factor * term.scaling)
        return scaled if term.adds else term

    return change


MISTAKES: Mapping[str, Callable[[Term], Term]] = {
    "magnitudes dropped": _without_magnitudes,
    "half the scaling": _scaled(0.5),
    "twice the scaling": _scaled(2.0),
}
BASE = "base"


def mistaken(parts: Parts, name: str) -> Parts:
    """Return the parts of a weight with a mistake in them, norms taken anew."""
    change = MISTAKES[name]
    return replace(parts, terms=tuple(change(term) for term in parts.terms)).measured()


@dataclass(frozen=True)
class Leaning:
    """How a graph's outputs lie between the right ones and a mistake's.

    Attributes:
        share: Part of the way from right to mistaken that its error covers, 0 to 1 (may be less
            than 0 by chance); None: the mistake makes no difference here.
        ratio: Distance to the right outputs over distance to the mistaken ones, RMS.
    """

    share: float | None
    ratio: float

    @property
    def nearer(self) -> bool:
        """Whether the graph is nearer to the mistake."""
        return self.share is not None and not self.share < LEANS

    def to_dict(self) -> dict[str, float | None]:
        """Return the numbers as JSON-ready data."""
        return {"share": self.share, "ratio": self.ratio if math.isfinite(self.ratio) else None}


def leaning(
    found: list[NDArray[Any]], right: list[NDArray[Any]], wrong: list[NDArray[Any]]
) -> Leaning:
    """Return where outputs lie, over all arrays at once."""
    step = error = along = beyond = size = 0.0
    for ours, true, false in zip(found, right, wrong, strict=True):
        a, b, c = (v.astype(np.float64).reshape(-1) for v in (ours, true, false))
        step += float(np.vdot(c - b, c - b))
        along += float(np.vdot(a - b, c - b))
        error += float(np.vdot(a - b, a - b))
        beyond += float(np.vdot(a - c, a - c))
        size += float(np.vdot(b, b))
    if not np.isfinite([step, along, error]).all():
        return Leaning(None, float("inf"))
    if step <= (APART**2) * size or step == 0.0:
        return Leaning(None, 1.0)
    return Leaning(along / step, float(np.sqrt(error / beyond)) if beyond else float("inf"))
