"""Mistakes as small as the rounding of the arithmetic that a merge was computed in.

A distance tells two results apart only where they differ by more than rounding does. Two things
help: each mistake is rounded step by step, as the arithmetic seems to have done; and along the
direction in which two results differ, rounding adds up to nothing. Of the way from one to the
other, what is stored stands at 0 if it is the first and at 1 if it is the second, and how sure
that is grows with the number of elements. What changes nothing but the lengths of lines is left
aside, for the rounding of a line's factor does so too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from dora_export.verification import coarse
from dora_export.verification.samples import Sample, norm
from dora_export.verification.values import Floats

TOLD = 0.04  # standard deviation up to which a place on the way between two results is known
AT_THE_END = 0.2  # of the way: five of them
CLEARLY_NEARER = 0.9  # squared distance of the better of two results, relative
NAMED = 3  # mistakes with results alike
LEFT = 0.2  # share of the squared distance to the right lines that a mistake may leave
ALIKE = 1e-3  # share of the nearest result's squared distance by which others are the same


class Mistake(NamedTuple):
    """A mistake that was perhaps made.

    Attributes:
        code: Of the catalog.
        what: What it would mean here.
        terms: The lines that it gives, and what of.
    """

    code: str
    what: str
    terms: coarse.Terms


def formulas(sample: Sample, scalings: Iterable[tuple[float, str]]) -> Iterator[Mistake]:
    """Yield mistakes in the formula of some lines, with these scalings in the place of theirs."""
    terms, s = sample.terms, sample.scaling
    base, product, m = terms.base, terms.product, terms.magnitude
    bare = replace(terms, product=None, coarse_product=None)
    yield Mistake("not-applied", "holds the base's values", replace(bare, magnitude=None))
    if m is not None:
        yield Mistake("magnitude-ignored", "V / ||V||", replace(terms, magnitude=np.ones(len(m))))
        if product is None:
            return
        yield Mistake("factors-ignored", "m W / ||W||", bare)
        yield Mistake("lora-for-dora", "W + s B A", replace(terms, magnitude=None))
        initial = replace(terms, magnitude=norm(base))
        yield Mistake("magnitude-initial", "||W|| V / ||V||", initial)
    flipped = "m (W - s B A) / ||W - s B A||" if m is not None else "W - s B A"
    yield Mistake("sign-flipped", flipped, times(terms, -1.0))
    for other, what in scalings:
        twice = m is None and abs(other - 2 * s) <= 1e-3 * abs(s)
        code, words = ("applied-twice", "W + 2 s B A") if twice else ("scaling-other", what)
        yield Mistake(code, words, times(terms, other / s))


def times(terms: coarse.Terms, factor: float) -> coarse.Terms:
    """Return the terms with another factor on ``s B A``."""
    product, rough = terms.product, terms.coarse_product
    return replace(
        terms,
        product=None if product is None else factor * product,
        coarse_product=None if rough is None else factor * rough,
        scaling=factor * terms.scaling,
    )


def told(sample: Sample, mistakes: Sequence[Mistake]) -> Mistake | None:
    """Return the mistake that lines hold as 16-bit arithmetic rounds it, or None.

    Args:
        sample: The lines, finite, with ``coarse_product`` in the type they are stored in.
        mistakes: What to choose from, the simplest first.

    Returns:
        Towards the right lines and towards those of every other mistake, what is stored stands at
        this one's end of the way, and not by chance. Mistakes whose results differ by less than
        rounding leaves open count as one: the first of them, with the words of all. None where
        there is no such mistake.
    """
    name, right = sample.dtype.name, sample.terms
    first = coarse.fit(right, sample.merged, name, name)
    results = [coarse.cooked(m.terms, first, name, name) for m in mistakes]
    distances = [_distance(sample.merged, values) for values in results]
    if not mistakes or not np.isfinite(min(distances)):
        return None
    # the recipe that makes the nearest mistake nearer still, for all of them
    best = int(np.argmin(distances))
    recipe = coarse.fit(mistakes[best].terms, sample.merged, name, name)
    if recipe != first:
        results = [coarse.cooked(m.terms, recipe, name, name) for m in mistakes]
    rights = [coarse.cooked(right, r, name, name) for r in dict.fromkeys((first, recipe))]
    bound = coarse.OF_A_LINE * coarse.ROUNDOFF[name]
    likely = [i for i, lines in enumerate(results) if _as_long(sample.merged, lines, bound)]
    if not likely:
        return None
    sides = [Side(_exact(mistakes[i].terms), results[i]) for i in likely]
    others = [Side(sample.exact, lines) for lines in rights]
    found = [mistakes[likely[i]] for i in _stands_at(sample.merged, sample.exact, sides, others)]
    if not found:
        return None
    words = dict.fromkeys(m.what for m in found)
    return found[0]._replace(what=", or ".join([*words][:NAMED]))


class Side(NamedTuple):
    """A result.

    Attributes:
        exact: Its lines.
        rounded: The same as an arithmetic rounds them.
    """

    exact: Floats
    rounded: Floats


def _exact(terms: coarse.Terms) -> Floats:
    v = terms.base if terms.product is None else terms.base + terms.product
    return v if terms.magnitude is None else v * (terms.magnitude / norm(v))[:, None]


def _as_long(stored: Floats, values: Floats, bound: float) -> bool:
    """Return whether lines are as long as a result's, but for the rounding of their factors."""
    size = np.einsum("ij,ij->i", values, values)
    share = np.einsum("ij,ij->i", stored, values) / np.where(size == 0, np.inf, size)
    return float(np.median(np.abs(share - 1))) <= bound


def _distance(stored: Floats, values: Floats | float) -> float:
    return float(np.nan_to_num(np.square(stored - values).sum(), nan=np.inf))


def _stands_at(
    stored: Floats, along: Floats, results: Sequence[Side], rights: Sequence[Side]
) -> list[int]:
    """Return the position of the result at whose end of every way the stored lines stand.

    With those of results that are as good as the same; empty if there is none. Ways lead between
    exact results, for rounded ones differ by their rounding as well.

    Args:
        stored: Lines.
        along: Directions of the lines, in which nothing is told.
        results: Of mistakes; their lines are about as long as the stored ones, for rounding is
            smaller in shorter ones.
        rights: Results of none.
    """
    size = np.einsum("ij,ij->i", along, along)
    size = np.where(size == 0, np.inf, size)

    def across(values: Floats) -> Floats:
        found: Floats = values - (np.einsum("ij,ij->i", values, along) / size)[:, None] * along
        return found

    left = [_distance(across(stored - side.rounded), 0.0) for side in results]
    best = int(np.argmin(left))
    right = min(_distance(across(stored - side.rounded), 0.0) for side in rights)
    if not left[best] <= LEFT * right:
        return []  # something is left that rounding is not
    rest, same = across(stored - results[best].rounded), [best]
    for i, side in enumerate((*results, *rights)):
        if i == best:
            continue
        way = across(side.exact - results[best].exact)
        length = float(np.vdot(way, way))
        if i < len(results) and length <= ALIKE * left[best]:
            same.append(i)
            continue
        unsure = float(np.linalg.norm(way * rest))
        place = float(np.vdot(rest, way))
        if not (length and unsure <= TOLD * length and abs(place) <= AT_THE_END * length):
            return []
    distances = {i: _distance(stored, results[i].rounded) for i in sorted(same)}
    nearest = min(distances.values())
    return [i for i, distance in distances.items() if distance <= nearest / CLEARLY_NEARER]
