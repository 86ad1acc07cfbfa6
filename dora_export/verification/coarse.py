"""Whether what is not correctly rounded is the rounding of a coarser arithmetic, or an error.

Merging in bfloat16 rounds the product, the sum, the norm, the factor and the result. Elements are
rounded each for itself, to the nearest: such errors have mean zero and lean nowhere. What a line
shares (its magnitude, norm and factor) is rounded once for the whole line. So the difference from
the right result is taken apart: what lies along each line, along each element across the lines,
along all of the result, and along the update. Rounding leaves little in each; a result scaled by
1.03, or an update by 1.05, leaves all of its error in one of them, however small it is beside the
rounding of a single element.

The right result is first rounded as such arithmetic rounds it, in the way that fits best what is
stored (``fit``): where an update is far below the last place of W, ``W + s B A`` in bfloat16 is W
itself, and that is no mistake. Nor is there any telling apart what gives the same bytes: a factor
``m / ||V||`` nearer to 1 than half a ``u`` is 1 in bfloat16, so rows that are right to a rounding
are those of a plain LoRA.

The smallest faults planted in bfloat16 merges of 48 inputs (tests/test_coarse.py) and found: all
times 1.01 (sampled rows: 1.03), the update times 1.03, lines off by 2 % or columns by 3 %.

Bounds are in units of ``u``, the type's unit roundoff (2**-8 for bfloat16, 2**-11 for float16):
one ``u`` for each rounding that an average over many elements or lines does not take away, and six
standard deviations of such an average.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dora_export.tensors import DTYPES
from dora_export.verification.exact import rounded
from dora_export.verification.values import Floats

SIGMAS = 6.0
# Roundings that one line shares: magnitude, square of the norm or its root, norm, quotient.
OF_A_LINE = 4.0
# Of one element, in quadrature: A, B, product, scaling, sum, factor, result, storage.
OF_AN_ELEMENT = math.sqrt(8 / 3)
FEW_LINES = 8  # fewer have no spread to speak of
VISIBLE = 8.0  # an update of so many roundoffs of W does not disappear in W's rounding
PRODUCTS = ("exact", "once", "before", "twice")
NORMS = ("exact", "once", "squares")
ORDERS = ("factor", "rounded factor", "divided last", "apart")
# Elements that ways of rounding are tried on, spread over the lines of a few more.
TRIED_ELEMENTS, TRIED_LINES = 1 << 12, 1 << 15
ROUNDOFF = {"F16": 2.0**-11, "BF16": 2.0**-8}


@dataclass(frozen=True)
class Terms:
    """Some lines of the right result, and what it is made of.

    Attributes:
        base: W, shape (lines, length).
        product: ``s B A`` or None.
        coarse_product: The same of A and B rounded to the coarse type, or None.
        magnitude: m of each line, or None.
        scaling: s, not 0.
        exact: W'.
        formula: Whether W' is ``W + s B A`` or ``m (W + s B A) / ||W + s B A||``; if not, the
            arithmetic's own steps are not known.
    """

    base: Floats = field(repr=False)
    product: Floats | None = field(repr=False)
    coarse_product: Floats | None = field(repr=False)
    magnitude: Floats | None = field(repr=False)
    scaling: float
    exact: Floats = field(repr=False)
    formula: bool

    def some(self, count: int) -> Terms:
        """Return the terms of the first lines."""

        def first(values: Floats | None) -> Floats | None:
            return None if values is None else values[:count]

        return replace(
            self,
            base=self.base[:count],
            product=first(self.product),
            coarse_product=first(self.coarse_product),
            magnitude=first(self.magnitude),
            exact=self.exact[:count],
        )


class Recipe(NamedTuple):
    """Where a merge in a coarse type rounds.

    Attributes:
        base: W is rounded.
        operands: A and B are.
        product: How ``s B A`` is: not, once, before it is scaled, or before and after.
        sum: ``W + s B A`` is rounded.
        magnitude: m is rounded.
        norm: How the norm is: not, once, or taken of squares and of a sum that were rounded.
        order: ``f V`` with the quotient f rounded or not, ``(m V) / norm``, or ``f W + f s B A``.
        result: The result is rounded before it is stored in another type.
    """

    base: bool = False
    operands: bool = False
    product: str = "exact"
    sum: bool = False
    magnitude: bool = False
    norm: str = "exact"
    order: str = "factor"
    result: bool = False


class _Kitchen:
    """Cooks recipes for some lines; keeps their sums and norms, which recipes share."""

    def __init__(self, terms: Terms, coarse: str, stored: str, step: int = 1) -> None:
        """Take the right lines.

        Args:
            terms: The lines.
            coarse: Type of the arithmetic.
            stored: Type of the stored values.
            step: Only every so many elements of each line are cooked.
        """
        self.terms, self.coarse, self.stored, self.step = terms, coarse, stored, step
        self._sums: dict[Recipe, tuple[Floats | None, Floats, Floats, Floats]] = {}

    def rounded(self, values: Floats) -> Floats:
        """Return values rounded to the coarse type."""
        return rounded(np.ascontiguousarray(values), DTYPES[self.coarse])

    def product(self, recipe: Recipe) -> Floats | None:
        """Return ``s B A``."""
        terms = self.terms
        product = terms.coarse_product if recipe.operands else terms.product
        if product is None or recipe.product == "exact":
            return product
        if recipe.product == "once":
            return self.rounded(product)
        unscaled = self.rounded(product / terms.scaling) * terms.scaling
        return unscaled if recipe.product == "before" else self.rounded(unscaled)

    def sum(self, recipe: Recipe) -> tuple[Floats | None, Floats, Floats, Floats]:
        """Return some elements of ``s B A`` and of ``V = W + s B A``, and squares of its norms.

        The squares are exact, and the sums of rounded squares, rounded.
        """
        key = Recipe(recipe.base, recipe.operands, recipe.product, recipe.sum)
        if key not in self._sums:
            product = self.product(recipe)
            base = self.rounded(self.terms.base) if recipe.base else self.terms.base
            v = base if product is None else base + product
            v = self.rounded(v) if recipe.sum else v
            rough = self.rounded(self.rounded(np.square(v)).sum(axis=1))
            exact = np.einsum("ij,ij->i", v, v)
            some = None if product is None else product[:, :: self.step]
            self._sums[key] = some, v[:, :: self.step], exact, rough
        return self._sums[key]

    def lines(self, recipe: Recipe) -> Floats:
        """Return the lines as stored."""
        product, v, exact, rough = self.sum(recipe)
        values = v
        if self.terms.magnitude is not None:
            m = self.terms.magnitude
            m = self.rounded(m) if recipe.magnitude else m
            norm = np.sqrt(rough if recipe.norm == "squares" else exact)
            norm = norm if recipe.norm == "exact" else self.rounded(norm)
            norm = np.where(norm == 0, np.inf, norm)
            factor = m / norm
            if recipe.order == "divided last":
                values = self.rounded(m[:, None] * v) / norm[:, None]
            elif recipe.order == "apart" and product is not None:
                f = self.rounded(factor)[:, None]
                base = self.terms.base[:, :: self.step]
                base = self.rounded(base) if recipe.base else base
                values = self.rounded(f * base) + self.rounded(f * product)
            elif recipe.order == "rounded factor":
                values = self.rounded(factor)[:, None] * v
            else:
                values = factor[:, None] * v
        if recipe.result:
            values = self.rounded(values)
        return rounded(np.ascontiguousarray(values), DTYPES[self.stored])


def _sums(terms: Terms, bases: Sequence[bool]) -> list[dict[str, Any]]:
    """Return the ways in which ``W + s B A`` may be rounded, as fields of a recipe."""
    operands = (False, True) if terms.coarse_product is not None else (False,)
    products = PRODUCTS if terms.product is not None else PRODUCTS[:1]
    return [
        {"base": b, "operands": o, "product": p, "sum": s}
        for b in bases for o in operands for p in products for s in (False, True)
    ]  # fmt: skip


def _factors(terms: Terms) -> list[dict[str, Any]]:
    """Return the same for what the sum is multiplied by."""
    if terms.magnitude is None:
        return [{}]
    return [
        {"magnitude": m, "norm": n, "order": o}
        for m in (False, True) for n in NORMS for o in ORDERS
    ]  # fmt: skip


def fit(terms: Terms, merged: Floats, coarse: str, stored: str, *, counted: bool = False) -> Recipe:
    """Return how merging in a coarse type may have rounded: what comes nearest to what is stored.

    Looked for in turn, the sum given the factor and the reverse: from rounding after every step,
    which most merges in a coarse type do, then from both kinds of sum. What is stored in another
    type may have been stored in the coarse one before: that is tried first.

    Args:
        terms: The right lines; some elements of the first of them are looked at.
        merged: What is stored.
        coarse: Type of the arithmetic, "F16" or "BF16".
        stored: Type of the stored values.
        counted: Nearest is what has the fewest elements that differ, not the least distance.
    """
    if not terms.formula:
        return Recipe()
    width = max(1, merged.shape[1])
    count = max(1, TRIED_LINES // width)
    step = max(1, min(len(merged), count) * width // TRIED_ELEMENTS)
    kitchen, few = _Kitchen(terms.some(count), coarse, stored, step), merged[:count, ::step]
    distances: dict[Recipe, float] = {}

    def distance(recipe: Recipe) -> float:
        if recipe not in distances:
            gap = few - kitchen.lines(recipe)
            size = np.count_nonzero(gap) if counted else np.square(gap).sum()
            distances[recipe] = float(size)
        return distances[recipe]

    coarse_base = np.array_equal(kitchen.rounded(kitchen.terms.base), kitchen.terms.base)
    sums = _sums(terms, (False,) if coarse_base else (False, True))
    results = [{"result": False}, {"result": True}] if stored != coarse else [{}]
    starts = [_throughout(terms, coarse_base), Recipe(), Recipe(base=not coarse_base, sum=True)]
    if stored != coarse:  # often the right values, or those of such a merge, in a wider type
        starts = [Recipe(result=True), starts[0]._replace(result=True), *starts]
    for best in starts:
        before = math.inf
        while 0.0 < distance(best) < before:
            before = distance(best)
            for group in (_factors(terms), sums, results):
                best = min((best._replace(**fields) for fields in group), key=distance)
        if distance(best) == 0.0:  # nothing is nearer
            return best
    return min(distances, key=lambda recipe: distances[recipe])


def _throughout(terms: Terms, coarse_base: bool) -> Recipe:
    """Return how all is rounded where every tensor of a merge has the coarse type."""
    has_norm = terms.magnitude is not None
    return Recipe(
        base=not coarse_base,
        operands=terms.coarse_product is not None,
        product="exact" if terms.product is None else "once",
        sum=True,
        magnitude=has_norm,
        norm="once" if has_norm else "exact",
        order="rounded factor" if has_norm else "factor",
    )


def cooked(terms: Terms, recipe: Recipe, coarse: str, stored: str) -> Floats:
    """Return the right lines as stored, rounded as a recipe says."""
    if not terms.formula:
        return rounded(np.ascontiguousarray(terms.exact), DTYPES[stored])
    return _Kitchen(terms, coarse, stored).lines(recipe)


def leaning(terms: Terms, merged: Floats, recipe: Recipe, coarse: str, stored: str) -> str | None:
    """Return in what a difference is no rounding of a coarse arithmetic, None where it may be.

    Args:
        terms: The right lines.
        merged: What is stored in their place; finite.
        recipe: How the arithmetic rounded, as ``fit`` says.
        coarse: Type of the arithmetic that their rounding tells of, "F16" or "BF16".
        stored: Type of the stored values.
    """
    u = ROUNDOFF[coarse]
    right = cooked(terms, recipe, coarse, stored)
    gap = merged - right
    of_lines = OF_A_LINE if terms.magnitude is not None or not terms.formula else 1.0
    along, noise = _along(gap, right)
    if _beyond(along, of_lines * u, noise).any():
        worst = along[np.argmax(np.abs(along))]
        return f"lines are up to {1 + worst:.5g} times as long"
    if terms.formula and float(np.sqrt(np.mean(np.square(along)))) > u + SIGMAS * float(
        np.sqrt(np.mean(np.square(noise)))
    ):  # of the roundings of a factor, at most one is not among those tried
        return f"lines are {1 + along.min():.5g} to {1 + along.max():.5g} times as long"
    spread = float(along.std()) if len(along) >= FEW_LINES else of_lines * u
    size = float(np.vdot(right, right))
    whole = float(np.vdot(gap, right)) / size if size else 0.0
    # where the steps are not known, a factor's roundings may be alike in all lines
    shared = 1.0 if terms.formula else OF_A_LINE
    if abs(whole) > shared * u + SIGMAS * spread / math.sqrt(len(along)):
        return f"all of it is scaled by {1 + whole:.5g}"
    left = gap - along[:, None] * right
    across, noise = _along(left.T, right.T)
    if len(along) >= FEW_LINES and _beyond(across, u, noise).any():
        worst = across[np.argmax(np.abs(across))]
        return f"elements at one place of all lines are up to {1 + worst:.5g} times as large"
    return _of_update(terms, right, left, u) or _of_noise(terms, left, u)


def _along(gap: Floats, right: Floats) -> tuple[Floats, Floats]:
    """Return the part of each line's difference along the line, and its standard deviation."""
    size = np.einsum("ij,ij->i", right, right)
    size = np.where(size == 0, np.inf, size)
    share = np.einsum("ij,ij->i", gap, right) / size
    # the rounding of one element is as large as the element: weighted so
    weighted = np.square((gap - share[:, None] * right) * right)
    return share, np.sqrt(weighted.sum(axis=1)) / size


def _beyond(found: Floats, bound: float, noise: Floats) -> NDArray[np.bool_]:
    return np.abs(found) > bound + SIGMAS * noise


def _of_update(terms: Terms, right: Floats, left: Floats, u: float) -> str | None:
    """Return whether what is left leans along the update."""
    update = terms.exact - terms.base
    if not terms.formula and np.linalg.norm(update) < VISIBLE * u * np.linalg.norm(terms.base):
        return None  # it may have disappeared in roundings that are not known
    # not along the rounded lines: their rounding is in what is left as well, so it would lean
    share, _ = _along(update, terms.exact)
    update = update - share[:, None] * terms.exact
    found, noise = _along(left, update)
    if _beyond(found, 2 * u, noise).any():
        worst = found[np.argmax(np.abs(found))]
        return f"the update of a line is {1 + worst:.4g} times as large"
    size = float(np.vdot(update, update))
    if not size:
        return None
    whole = float(np.vdot(left, update)) / size
    if abs(whole) > u + SIGMAS * float(np.linalg.norm((left - whole * update) * update)) / size:
        return f"the update is {1 + whole:.4g} times as large"
    return None


def _of_noise(terms: Terms, left: Floats, u: float) -> str | None:
    """Return whether what is left is larger than roundings of single elements add up to."""
    sizes = np.square(terms.base) + np.square(terms.exact)
    if terms.product is not None:
        sizes += np.square(terms.product)
    limit = OF_AN_ELEMENT * u * math.sqrt(float(sizes.sum()))
    found = float(np.linalg.norm(left))
    if found > limit:
        return f"differences are {found / limit:.3g} times what roundings add up to"
    return None
