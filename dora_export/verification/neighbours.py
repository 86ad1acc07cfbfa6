"""Regions of one shape and kind, among which mix-ups are looked for; the unlikely are left aside.

A merge in 16-bit arithmetic is near to the right result in every tensor, and so each could hide
another's update, magnitudes or values. Whether one does is told on one line first: no part of a
distance is more than the whole. Of all regions of a family that is the same line, so what it holds
is computed once and kept.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from dora_export.verification.exact import Exact, rounded
from dora_export.verification.samples import Sample, norm, take
from dora_export.verification.values import Floats

MOST_OTHERS = 512  # regions that are tried for a mix-up, the nearest in order
KEPT_BYTES = 48 << 20  # of lines, in float64
PATIENCE = 100  # regions of a model that nothing explains, until only formulas are tried
BLOCK_ELEMENTS = 1 << 15  # lines of several regions are looked at together, so many elements


class Line(NamedTuple):
    """One line of a region, in float64.

    Attributes:
        product: ``s B A`` or None.
        magnitude: m, or None.
        exact: W'.
        simple: As in ``Sample``.
    """

    product: Floats | None
    magnitude: float | None
    exact: Floats
    simple: bool

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        return self.exact.nbytes * (1 if self.product is None else 2)


@dataclass(eq=False)
class KeptLines:
    """Lines by region and number, the last used ones; threads may share it."""

    nbytes: int = KEPT_BYTES
    _held: OrderedDict[tuple[int, int], Line] = field(default_factory=OrderedDict)
    _used: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def get(self, region: int, line: int, make: Callable[[], Line]) -> Line:
        """Return a line, made if it is not here."""
        key = (region, line)
        with self._lock:
            if key in self._held:
                self._held.move_to_end(key)
                return self._held[key]
        made = make()
        with self._lock:
            if key not in self._held:
                self._held[key] = made
                self._used += made.nbytes
            while self._used > self.nbytes and len(self._held) > 1:
                self._used -= self._held.popitem(last=False)[1].nbytes
        return made


@dataclass(eq=False)
class Patience:
    """How many regions may still be found that nothing explains; threads may share it.

    To find that nothing does takes 0.2 s, so a model that is wrong throughout would take long.
    """

    left: int = PATIENCE
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def lose(self) -> None:
        """Count one."""
        with self._lock:
            self.left = max(0, self.left - 1)


class Member(NamedTuple):
    """A region of a family.

    Attributes:
        key: Tells it from all others.
        name: For people.
        open: Reads its operands.
    """

    key: int
    name: str
    open: Callable[[], Exact]


@dataclass(frozen=True, eq=False)
class Neighbours:
    """The other regions of one region's family.

    Attributes:
        members: The nearest in order first.
        kept: Their lines.
        line: One that stands for all lines of a region; None: none does, only some are wrong.
        patience: Of the whole model.
    """

    members: Sequence[Member]
    kept: KeptLines
    line: int | None
    patience: Patience = field(default_factory=Patience)

    def without_line(self) -> Neighbours:
        """Return them for lines that have nothing to do with the rest of their region."""
        return replace(self, line=None)

    def near(self, sample: Sample, line: int, limit: float) -> Iterator[tuple[str, Exact]]:
        """Yield the regions that could be mixed up with this one, by name, in order.

        That are those of which some mix comes nearer than a limit to what is stored in one line.

        Args:
            sample: Stored lines that a mix-up would have to explain.
            line: One of them.
            limit: Squared distance over all of them that would be an explanation.
        """
        for member, distance in self._distances(sample, line):
            if distance <= limit:
                yield member.name, member.open()

    def nearest(self, sample: Sample, count: int) -> list[tuple[str, Exact]]:
        """Return the regions of which some mix comes nearest to what is stored, by name.

        Args:
            sample: Stored lines; all of them are looked at.
            count: Regions to return, at most.
        """
        totals = np.zeros(len(self.members[:MOST_OTHERS]))
        for line in sample.lines:
            totals += [d for _, d in self._distances(sample, int(line), in_steps=True)]
        first = np.argsort(totals, kind="stable")[:count]
        return [(self.members[i].name, self.members[i].open()) for i in first]

    def _distances(
        self, sample: Sample, line: int, *, in_steps: bool = False
    ) -> Iterator[tuple[Member, float]]:
        """Yield how near any mix with each region comes to what one line holds, squared."""
        own = _one_line(sample, line)
        step = max(1, BLOCK_ELEMENTS // own.base.size)
        members = self.members[:MOST_OTHERS]
        for first in range(0, len(members), step):
            some = members[first : first + step]
            least = _least_distances(own, [self._line(member, line) for member in some], in_steps)
            yield from zip(some, map(float, least), strict=True)

    def _line(self, member: Member, line: int) -> Line:
        def make() -> Line:
            exact = member.open()
            held = take(exact, exact.source, np.array([line]))
            m = None if held.magnitude is None else float(held.magnitude[0])
            product = None if held.product is None else held.product[0].copy()
            return Line(product, m, held.exact[0].copy(), held.simple)

        return self.kept.get(member.key, line, make)


def _one_line(sample: Sample, line: int) -> Sample:
    """Return one line of a sample."""
    (at,) = np.flatnonzero(sample.lines == line)
    picked = slice(at, at + 1)

    def one(values: Floats | None) -> Floats | None:
        return None if values is None else values[picked]

    return replace(
        sample,
        lines=sample.lines[picked],
        base=sample.base[picked],
        product=one(sample.product),
        magnitude=one(sample.magnitude),
        exact=sample.exact[picked],
        merged=sample.merged[picked],
        coarse_product=one(sample.coarse_product),
    )


def _least_distances(own: Sample, others: Sequence[Line], in_steps: bool = False) -> Floats:
    """Return how near any mix with each other region comes to what one line holds, squared.

    Zero for regions that such a mix is not known of; infinite where none is finite. With
    ``in_steps`` a mix may have been rounded before it was given its length as well.
    """
    alike = [
        i for i, other in enumerate(others)
        if other.simple and (other.product is None) == (own.product is None)
        and (other.magnitude is None) == (own.magnitude is None)
    ]  # fmt: skip
    least = np.zeros(len(others))
    if not alike:
        return least
    exact = np.stack([others[i].exact for i in alike])
    mixes = [exact]
    products = None
    if own.product is not None:
        products = np.stack([p for i in alike if (p := others[i].product) is not None])
    if own.magnitude is None:
        mixes.append(own.mixed(products, None))
    else:
        theirs = np.array([m for i in alike if (m := others[i].magnitude) is not None])
        mixes += [own.mixed(products, theirs), own.mixed(products, own.magnitude)]
        v = own.base if own.product is None else own.base + own.product
        mixes.append(own.at_strength(v * (theirs / norm(v))[:, None]))
        if in_steps and products is not None:
            mixes.append(own.lengthened(rounded(own.base + products, own.dtype), own.magnitude))
    found = [np.square(own.merged - rounded(np.ascontiguousarray(mix), own.dtype)).sum(axis=1)
             for mix in mixes]  # fmt: skip
    least[alike] = np.min(np.nan_to_num(found, nan=np.inf), axis=0)
    return least
