"""Whether what is not correctly rounded is the rounding of a coarser arithmetic, or an error.

Merging in bfloat16 rounds the product, the sum, the norm, the factor and the result. Elements are
rounded each for itself, to the nearest: such errors have mean zero and lean nowhere. What a line
shares (its magnitude, norm and factor) is rounded once for the whole line. So the difference from
the right result is taken apart: what lies along each line, along each element across the lines,
along all of the result, and along the update. Rounding leaves little in each; a result scaled by
1.03, or an update by 1.05, leaves all of its error in one of them, however small it is beside the
rounding of a single element.

The right result is first rounded as such arithmetic rounds it (``roundings``): where an update is
far below the last place of W, ``W + s B A`` in bfloat16 is W itself, and that is no mistake.

The smallest faults planted in bfloat16 merges of 48 inputs (tests/test_coarse.py) and found: all
times 1.01 (sampled rows: 1.03), the update times 1.03, lines off by 2 % or columns by 3 %.

Bounds are in units of ``u``, the type's unit roundoff (2**-8 for bfloat16, 2**-11 for float16):
one ``u`` for each rounding that an average over many elements or lines does not take away, and six
standard deviations of such an average.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

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


def roundings(terms: Terms, merged: Floats, coarse: str, stored: str) -> Iterator[Floats]:
    """Yield the right lines as stored, rounded as merging in a coarse type may have rounded them.

    Args:
        terms: The right lines.
        merged: What is stored; of the ways to round a line's factor, the nearest to it is taken.
        coarse: Type of the arithmetic, "F16" or "BF16".
        stored: Type of the stored values.
    """
    in_coarse, as_stored = _rounding(coarse), _rounding(stored)
    yield as_stored(terms.exact)
    if not terms.formula:
        return
    sums = [terms.base]
    products = [p for p in (terms.product, terms.coarse_product) if p is not None]
    if products:
        sums = [terms.base + products[0]]
        for product in products:
            unscaled = in_coarse(product / terms.scaling) * terms.scaling
            for rough in (in_coarse(product), unscaled, in_coarse(unscaled)):
                sums += [terms.base + rough, in_coarse(terms.base + rough)]
    for v in sums:
        values = v
        if terms.magnitude is not None:
            values = v * _factor(v, terms.magnitude, merged, in_coarse)[:, None]
        yield as_stored(values)
        if stored != coarse:
            yield as_stored(in_coarse(values))


def _rounding(dtype: str) -> Callable[[Floats], Floats]:
    return lambda values: rounded(np.ascontiguousarray(values), DTYPES[dtype])


def _factor(v: Floats, m: Floats, merged: Floats, in_coarse: Callable[[Floats], Floats]) -> Floats:
    """Return ``m / ||v||`` with those of its parts rounded that fit what is stored best."""
    squares = np.einsum("ij,ij->i", v, v)
    norm = np.where(squares == 0, np.inf, np.sqrt(squares))
    found = np.einsum("ij,ij->i", merged, v) / np.where(squares == 0, np.inf, squares)
    factors = [
        quotient
        for magnitude in (m, in_coarse(m))
        for length in (norm, in_coarse(norm))
        for quotient in (magnitude / length, in_coarse(magnitude / length))
    ]
    return min(factors, key=lambda f: float(np.square(f - found).sum()))


def nearest(terms: Terms, merged: Floats, coarse: str, stored: str) -> tuple[Floats, float]:
    """Return the nearest of ``roundings`` to what is stored, and its squared distance."""
    best, least = terms.exact, math.inf
    for values in roundings(terms, merged, coarse, stored):
        distance = float(np.square(merged - values).sum())
        if distance < least:
            best, least = values, distance
    return best, least


def leaning(terms: Terms, merged: Floats, coarse: str, stored: str) -> str | None:
    """Return in what a difference is no rounding of a coarse arithmetic, None where it may be.

    Args:
        terms: The right lines.
        merged: What is stored in their place; finite.
        coarse: Type of the arithmetic that their rounding tells of, "F16" or "BF16".
        stored: Type of the stored values.
    """
    u = ROUNDOFF[coarse]
    right, _ = nearest(terms, merged, coarse, stored)
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
    if _beyond(across, u, noise).any():
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
    share, _ = _along(update, right)
    update = update - share[:, None] * right
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
