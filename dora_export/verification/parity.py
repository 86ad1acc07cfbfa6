"""How far two sets of named outputs are apart, and how far they may be.

The measure is the same for the forward and the ONNX tier: largest and root-mean-square difference
of every output, and for logits what they are used for: the distribution they stand for (KL) and
the choice they lead to (top-1). Everything is counted in float64, a chunk at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Outputs = Mapping[str, NDArray[Any]]

CHUNK_ELEMENTS = 1 << 20
# Two results that are each as near to the exact one as the noise floor may differ by twice as much.
ROOM = 2.0


@dataclass(frozen=True)
class Distance:
    """Differences ``|found - expected|`` over some elements; distances of parts can be added.

    Attributes:
        count: Elements compared.
        largest: The largest difference; infinite where one is NaN and nothing else is.
        total: Sum of the differences.
        squares: Sum of their squares.
        scale: Largest ``|expected|``.
        energy: Sum of the squares of ``expected``.
    """

    count: int = 0
    largest: float = 0.0
    total: float = 0.0
    squares: float = 0.0
    scale: float = 0.0
    energy: float = 0.0

    def __add__(self, other: Distance) -> Distance:
        return Distance(
            self.count + other.count,
            max(self.largest, other.largest),
            self.total + other.total,
            self.squares + other.squares,
            max(self.scale, other.scale),
            self.energy + other.energy,
        )

    @property
    def mean(self) -> float:
        """Mean difference."""
        return self.total / self.count if self.count else 0.0

    @property
    def rms(self) -> float:
        """Root of the mean square of the differences."""
        return math.sqrt(self.squares / self.count) if self.count else 0.0

    @property
    def typical(self) -> float:
        """Root of the mean square of the expected values."""
        return math.sqrt(self.energy / self.count) if self.count else 0.0

    @property
    def finite(self) -> bool:
        """Whether all values were finite."""
        return math.isfinite(self.largest + self.scale)

    def to_dict(self) -> dict[str, float]:
        """Return the numbers as JSON-ready data."""
        return {"max": self.largest, "mean": self.mean, "rms": self.rms, "scale": self.scale}


def distance(found: NDArray[Any], expected: NDArray[Any]) -> Distance:
    """Return the distance of two arrays of one shape; infinities of one sign agree."""
    assert found.shape == expected.shape, f"Bug: shapes {found.shape} and {expected.shape}"
    result = Distance()
    one, other = found.reshape(-1), expected.reshape(-1)
    for start in range(0, one.size, CHUNK_ELEMENTS):
        part = slice(start, start + CHUNK_ELEMENTS)
        got, exact = (a[part].astype(np.float64) for a in (one, other))
        same = got == exact
        with np.errstate(invalid="ignore", over="ignore"):
            apart = np.abs(np.where(same, 0.0, got - exact))
            apart = np.where(np.isnan(apart), np.inf, apart)
            finite = exact[np.isfinite(exact)]
            result += Distance(
                got.size,
                float(apart.max(initial=0.0)),
                float(apart.sum()),
                float(np.vdot(apart, apart)),
                float(np.abs(finite).max(initial=0.0)),
                float(np.vdot(finite, finite)),
            )
    return result


@dataclass(frozen=True)
class Tolerance:
    """What a difference may be: ``ROOM`` times a measured noise floor.

    Attributes:
        largest: Bound on the largest difference.
        rms: Bound on the root mean square.
    """

    largest: float
    rms: float

    def excess(self, found: Distance) -> float:
        """Return how many times the tolerance a distance is: above 1 it is too much."""
        pairs = ((found.largest, self.largest), (found.rms, self.rms))
        return max(_ratio(value, bound) for value, bound in pairs)


def tolerance(noise: Distance, unit: float, peak: float = 0.0) -> Tolerance:
    """Return the tolerance that follows from a measured noise.

    Args:
        noise: Distance of the reference in storage precision from the same in high precision.
        unit: Unit roundoff of the storage precision, relative. Writing a result down in it rounds
            by up to this much, so the noise is never taken to be less, however lucky the values.
        peak: How many times its root mean square the largest noise of such outputs is, see
            ``peak_of``; 0: only this one's own.
    """
    return Tolerance(
        ROOM * max(noise.largest, unit * noise.scale, peak * noise.rms),
        ROOM * max(noise.rms, unit * noise.typical / math.sqrt(3)),  # of evenly spread roundings
    )


def peak_of(noises: Iterable[Distance]) -> float:
    """Return the most that a largest noise is of its root mean square, in any of some outputs.

    A cache has a few elements far larger than the rest, whose roundings alone make the largest
    noise of an output: that is one draw from a few, and the next may well be thrice as much. Many
    layers have such elements, and together they tell how far roundings go.
    """
    return max((one.largest / one.rms for one in noises if one.finite and one.rms), default=0.0)


def _ratio(value: float, bound: float) -> float:
    if value <= 0.0:
        return 0.0
    return value / bound if bound > 0.0 else math.inf


@dataclass(frozen=True)
class Choices:
    """What logits lead to; of parts they can be added.

    Attributes:
        positions: Distributions compared.
        agree: How many have the same largest logit.
        divergence: Sum of KL(expected || found), in nats.
        worst_divergence: Largest of them.
        clearest_parting: Largest gap between the two best expected logits where the best parted.
    """

    positions: int = 0
    agree: int = 0
    divergence: float = 0.0
    worst_divergence: float = 0.0
    clearest_parting: float = 0.0

    def __add__(self, other: Choices) -> Choices:
        return Choices(
            self.positions + other.positions,
            self.agree + other.agree,
            self.divergence + other.divergence,
            max(self.worst_divergence, other.worst_divergence),
            max(self.clearest_parting, other.clearest_parting),
        )

    def to_dict(self) -> dict[str, float]:
        """Return the numbers as JSON-ready data."""
        positions = max(1, self.positions)
        return {
            "positions": self.positions,
            "top1_agreement": self.agree / positions,
            "kl_mean": self.divergence / positions,
            "kl_max": self.worst_divergence,
            "clearest_parting": self.clearest_parting,
        }


def choices(found: NDArray[Any], expected: NDArray[Any]) -> Choices:
    """Compare logits ``(..., classes)``; distributions that are not finite diverge infinitely."""
    classes = expected.shape[-1]
    result = Choices()
    rows = max(1, CHUNK_ELEMENTS // classes)
    one, other = found.reshape(-1, classes), expected.reshape(-1, classes)
    for start in range(0, len(other), rows):
        got, exact = (a[start : start + rows].astype(np.float64) for a in (one, other))
        log_q, log_p = _log_softmax(got), _log_softmax(exact)
        with np.errstate(invalid="ignore"):
            terms = np.where(log_p == -np.inf, 0.0, np.exp(log_p) * (log_p - log_q))
        divergence = np.nan_to_num(terms.sum(axis=1), nan=np.inf).clip(min=0.0)
        best = np.sort(exact, axis=1)[:, -2:]
        parted = got.argmax(axis=1) != exact.argmax(axis=1)
        result += Choices(
            len(exact),
            int((~parted).sum()),
            float(divergence.sum()),
            float(divergence.max(initial=0.0)),
            float((best[:, 1] - best[:, 0])[parted].max(initial=0.0)),
        )
    return result


def _log_softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    with np.errstate(invalid="ignore"):
        shifted = logits - logits.max(axis=1, keepdims=True)
        result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result


@dataclass(frozen=True)
class Compared:
    """One named output, compared.

    Attributes:
        distance: Over all its elements.
        choices: If it holds logits.
    """

    distance: Distance = Distance()
    choices: Choices | None = None

    def __add__(self, other: Compared) -> Compared:
        both = self.choices and other.choices
        chosen = self.choices + other.choices if both else self.choices or other.choices  # type: ignore[operator]
        return Compared(self.distance + other.distance, chosen)


def misfits(found: Outputs, expected: Outputs) -> list[str]:
    """Return how the names and shapes of two sets of outputs differ, sorted; empty: they do not."""
    missing = [f"output '{n}' is missing" for n in expected.keys() - found.keys()]
    extra = [f"output '{n}' is not the reference's" for n in found.keys() - expected.keys()]
    shapes = [
        f"output '{n}' has shape {found[n].shape}, expected {expected[n].shape}"
        for n in expected.keys() & found.keys()
        if found[n].shape != expected[n].shape
    ]
    return [*sorted(missing), *sorted(extra), *sorted(shapes)]


def compare(
    found: Outputs, expected: Outputs, mask: NDArray[Any] | None = None
) -> dict[str, Compared]:
    """Compare outputs of the same names and shapes.

    Args:
        found: By name.
        expected: By name.
        mask: ``(batch, length)``; positions where it is 0 are padding, which no one reads, and are
            left out of outputs that begin with these two dimensions.
    """
    return {name: _compare(name, found[name], expected[name], mask) for name in expected}


def _compare(
    name: str, found: NDArray[Any], expected: NDArray[Any], mask: NDArray[Any] | None
) -> Compared:
    classes_last = name.endswith("logits")
    if classes_last and expected.ndim == 4:  # segmentation: (batch, classes, height, width)
        found, expected = (np.moveaxis(a, 1, -1) for a in (found, expected))
    if mask is not None and expected.shape[:2] == mask.shape:
        found, expected = (a[mask != 0] for a in (found, expected))
    logits = classes_last and expected.ndim > 1 and expected.shape[-1] > 1
    chosen = choices(found, expected) if logits else None
    return Compared(distance(found, expected), chosen)


def added(parts: Sequence[Mapping[str, Compared]]) -> dict[str, Compared]:
    """Return the comparisons of several runs as one, by name."""
    result: dict[str, Compared] = {}
    for part in parts:
        for name, one in part.items():
            result[name] = result[name] + one if name in result else one
    return result
