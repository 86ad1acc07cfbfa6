"""What went wrong with a tensor that is not the exact result: known mistakes, tried one by one.

Every mistake is a formula. The one that comes far nearer to what is stored than the right formula
does is the diagnosis; where none does, the finding says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dora_export.errors import shown
from dora_export.tensors import DTYPES, TensorRef
from dora_export.verification import coarse, small_mistakes
from dora_export.verification.exact import Exact, Part, rounded
from dora_export.verification.neighbours import PATIENCE, Neighbours
from dora_export.verification.samples import (
    LINES,
    Sample,
    as_lines,
    line_count,
    norm,
    pick,
    several,
    take,
)
from dora_export.verification.small_mistakes import Mistake
from dora_export.verification.update_orders import orders
from dora_export.verification.values import Floats

# A mistake must leave less than this share of the squared distance to the right result: rounding
# that only leans its way leaves more.
EXPLAINS = 0.1
CLEARLY_NEARER = 0.9  # squared distance of the better of two explanations, relative
ALL_BUT_NOISE = 0.01  # share that an explanation leaves where there is nothing more to explain
# Squared distance of lines that hold a result, in units of rounding it once: as good as none, but
# where a merge is computed in the precision that it is stored in.
ROUNDED_ONCE, ROUNDED_OFTEN = 0.1, 16.0
FITTED = ("strength-other", "scaling-other")  # with a number that comes nearer than a formula may
ALL_BUT_ROUNDING = 1e-3  # the same for lengths of lines, which rounding of factors changes too
ONE_ROUNDING = 1.5  # squared distance of rounded lines, in units of rounding them once
ONLY_LENGTHS = 0.25  # share of the elements that differ: a length is known as well as lines tell it
MULTIPLES = (2.0, 0.5)  # of a scaling, where rounding is too large to see which fits best
TOLD_ELEMENTS = 1 << 14  # that mistakes are tried on, where they could pass for rounding
SMALL_ELEMENTS = 1 << 15  # that tell mistakes apart which are as small as rounding
LEANING_ELEMENTS = 1 << 17  # at least a few lines; enough to see a thousandth of a part
NEARER = 0.5  # share of the squared distance, or of the elements that differ
RANKED = 8  # neighbours that are likely enough to be mixed up where rounding is that large
RANKED_ELEMENTS, RANKED_LINES = 1 << 11, 16  # by which they are ranked
SWAP_LINES = 4  # lines that mix-ups are tried on
SAME_LINE = 0.05  # distance of two lines that count as one, relative to their length


class Diagnosis(NamedTuple):
    """A finding without its place.

    Attributes:
        code: Of the catalog.
        what: What was found.
        leans: No mistake that was tried explains it: it only leans where rounding does not.
    """

    code: str
    what: str
    leans: bool = False


class Candidate(NamedTuple):
    """A mistake tried.

    Attributes:
        code: Of the catalog.
        what: What it would mean here.
        values: What the lines would be.
    """

    code: str
    what: str
    values: Floats


class Explanation(NamedTuple):
    """A diagnosis, and how much it explains.

    Attributes:
        diagnosis: It.
        left: Share of the squared distance to the right result that it leaves.
        but_rounding: It leaves no more than rounding its result about once does.
    """

    diagnosis: Diagnosis
    left: float
    but_rounding: bool


class Rounding(NamedTuple):
    """How an arithmetic seems to have rounded.

    Attributes:
        dtype: Its type, "F16" or "BF16".
        recipe: Where it rounds.
    """

    dtype: str
    recipe: coarse.Recipe


def diagnose(
    exact: Exact, ref: TensorRef, lines: NDArray[np.int64], others: Neighbours
) -> Diagnosis:
    """Return the mistake that explains some lines of a region, or that none does.

    Args:
        exact: The region's exact result.
        ref: What is stored.
        lines: Lines that are wrong.
        others: Other regions of the same shape, for mix-ups.
    """
    few = pick(lines)
    sample = take(exact, ref, few)
    unexplained = Diagnosis("wrong-values", _distance_words(sample))
    if not others.patience.left:
        known = [*_formulas(sample), *_combinations(exact, few), *_lengths(sample)]
        what = f"{unexplained.what}; after {PATIENCE} such tensors only formulas were tried"
        return _diagnosis(_nearest(sample, known)) or unexplained._replace(what=what)
    found = (
        _explained(exact, ref, lines, few, sample, others)
        or _rearranged(sample, exact, ref)
        or _diagnosis(_nearest(sample, _orders(sample, exact)))
        or _diagnosis(_nearest(sample, _lengths(sample), ALL_BUT_ROUNDING))
        or _small(exact, ref, lines, others)
        or _only_lengths(sample)
    )
    if found is None:
        others.patience.lose()
    return found or unexplained


def hidden_mistake(
    exact: Exact, ref: TensorRef, lines: NDArray[np.int64], others: Neighbours, arithmetic: str
) -> Diagnosis | None:
    """Return what is wrong with lines that could pass for rounding of an arithmetic, or None.

    Args:
        exact: The region's exact result.
        ref: What is stored.
        lines: Lines compared.
        others: Other regions of the same shape, for mix-ups.
        arithmetic: Type whose rounding they could pass for, "F16" or "BF16".
    """
    length = exact.region.rows if exact.by_column else exact.region.columns
    few = pick(lines, max(LINES, TOLD_ELEMENTS // max(1, length)))
    sample = take(exact, ref, few, arithmetic)
    way = Rounding(arithmetic, coarse.fit(sample.terms, sample.merged, arithmetic, ref.dtype.name))
    known = _explained(exact, ref, lines, few, sample, others, way)
    if known is not None:
        return known
    several = pick(lines, max(LINES, LEANING_ELEMENTS // max(1, length)))
    many = take(exact, ref, several, arithmetic)
    leaning = coarse.leaning(many.terms, many.merged, way.recipe, arithmetic, ref.dtype.name)
    if leaning is None:
        return None
    found = diagnose(exact, ref, lines, others)
    what = f"{found.what}; {leaning}, which rounding to {arithmetic} is not"
    return Diagnosis(found.code, what, leans=True)


def in_coarse_arithmetic(exact: Exact, ref: TensorRef, lines: NDArray[np.int64]) -> bool:
    """Whether lines are far nearer to the right result rounded step by step as they are stored.

    By their distance, or by the elements that differ: of a few, the largest has all the say in a
    distance.
    """
    arithmetic = ref.dtype.name
    sample = take(exact, ref, pick(lines), arithmetic)
    right = rounded(np.ascontiguousarray(sample.exact), sample.dtype)

    def near(counted: bool) -> Floats:
        terms, merged = sample.terms, sample.merged
        recipe = coarse.fit(terms, merged, arithmetic, arithmetic, counted=counted)
        return coarse.cooked(terms, recipe, arithmetic, arithmetic)

    if sample.distance(near(counted=False)) < NEARER * sample.distance(right):
        return True
    fewer = (sample.merged != near(counted=True)).sum()
    return bool(fewer < NEARER * (sample.merged != right).sum())


def holds(exact: Exact, ref: TensorRef, lines: NDArray[np.int64], dtype: str) -> bool:
    """Return whether some stored lines are all values of a type."""
    merged = take(exact, ref, pick(lines)).merged
    return np.array_equal(rounded(np.ascontiguousarray(merged), DTYPES[dtype]), merged)


def _explained(
    exact: Exact,
    ref: TensorRef,
    lines: NDArray[np.int64],
    few: NDArray[np.int64],
    sample: Sample,
    others: Neighbours,
    rounding: Rounding | None = None,
) -> Diagnosis | None:
    """Return the formula or mix-up that some lines are far nearer to than to the right result.

    Args:
        exact: The region's exact result.
        ref: What is stored.
        lines: Lines that are wrong.
        few: Those of the sample.
        sample: What they hold.
        others: Other regions of the same shape.
        rounding: How their arithmetic rounded, if it did.
    """
    formula = _nearest(sample, [*_formulas(sample), *_combinations(exact, few)], rounding=rounding)
    if formula is not None and formula.but_rounding:
        return formula.diagnosis
    limit = EXPLAINS if formula is None else CLEARLY_NEARER * formula.left
    known = _mixed_up(exact, ref, few, others, rounding, limit) or formula
    if known is None or (known.left <= ALL_BUT_NOISE and known.diagnosis.code not in FITTED):
        return _diagnosis(known)
    # What is left is no small part of the mistake: one that fits as it was rounded fits better.
    return _small(exact, ref, lines, others) or known.diagnosis


def _diagnosis(found: Explanation | None) -> Diagnosis | None:
    return None if found is None else found.diagnosis


def _nearest(
    sample: Sample,
    candidates: Iterable[Candidate],
    explains: float = EXPLAINS,
    rounding: Rounding | None = None,
) -> Explanation | None:
    """Return the candidate nearest to lines; the first of those that are as good as equally near.

    Args:
        sample: The lines.
        candidates: What to choose from.
        explains: Share of the squared distance to the right result that it has to fall below.
        rounding: How the lines' arithmetic rounded, if it did.
    """
    right = _distance_to_right(sample, rounding)
    best, nearest, limit = None, np.inf, explains * right
    for candidate in candidates:
        distance = sample.distance(candidate.values)
        size = float(np.square(candidate.values).sum())  # zeros are near to all that is small
        if np.isfinite(distance) and distance < min(limit, EXPLAINS * size):
            best, nearest, limit = candidate, distance, CLEARLY_NEARER * distance
    if best is None:
        return None
    narrow = sample.dtype.name in coarse.ROUNDOFF
    bound = ROUNDED_ONCE if narrow else ROUNDED_OFTEN
    but_rounding = nearest <= bound * sample.one_rounding
    return Explanation(Diagnosis(best.code, best.what), nearest / right, but_rounding)


def _distance_to_right(sample: Sample, rounding: Rounding | None) -> float:
    """Return the squared distance to the right lines, or to them as an arithmetic rounds them."""
    distance = sample.distance(sample.exact)
    if rounding is None:
        return distance
    near = coarse.cooked(sample.terms, rounding.recipe, rounding.dtype, sample.dtype.name)
    return min(distance, sample.distance(near))


def _formulas(sample: Sample) -> Iterator[Candidate]:
    """Yield what single mistakes in the formula give."""
    yield Candidate("not-applied", "holds the base's values", sample.base)
    yield from _strengths(sample)
    if not sample.simple:
        return
    finish = sample.at_strength
    base, product, m = sample.base, sample.product, sample.magnitude
    if m is None:
        assert product is not None, "Bug: a plain LoRA update has a product"
        yield Candidate("applied-twice", "W + 2 s B A", finish(base + 2 * product))
        yield Candidate("sign-flipped", "W - s B A", finish(base - product))
        yield from _scalings(sample, lambda v: v)
        return

    def scaled(v: Floats, by: Floats | None = None) -> Floats:
        return finish(v * (m / norm(v if by is None else by))[:, None])

    yield Candidate("magnitude-ignored", "V / ||V||", finish(base / norm(base)[:, None]))
    if product is not None:
        v = base + product
        plus = (1 + m) / norm(v)
        yield Candidate("magnitude-other", "(1 + m) V / ||V||", finish(v * plus[:, None]))
        once = scaled(v)
        yield Candidate("applied-twice", "merged onto the merged weight", scaled(once + product))
        yield Candidate("sign-flipped", "m (W - s B A) / ||W - s B A||", scaled(base - product))
        yield Candidate("norm-of-base", "m V / ||W||", scaled(v, base))
        yield Candidate("magnitude-ignored", "V / ||V||", finish(v / norm(v)[:, None]))
        ratio = (norm(base) / norm(v))[:, None]
        yield Candidate("magnitude-initial", "||W|| V / ||V||", finish(v * ratio))
        yield Candidate("lora-for-dora", "W + s B A", finish(v))
        yield Candidate("factors-ignored", "m W / ||W||", scaled(base))
        yield from _scalings(sample, scaled)


def _combinations(exact: Exact, lines: NDArray[np.int64]) -> Iterator[Candidate]:
    """Yield what mistakes about several adapters give: one left out, another order, other norms."""
    if not several(exact):
        return
    parts = exact.parts
    for adapter in dict.fromkeys(p.change.adapter for p in parts):
        kept = [p for p in parts if p.change.adapter != adapter]
        what = f"all but adapter {adapter + 1}"
        yield Candidate("adapter-left-out", what, _lines_with(exact, kept, lines))
    turned = sorted(parts, key=lambda p: -p.change.adapter)
    yield Candidate("adapters-reordered", "the last one first", _lines_with(exact, turned, lines))
    merged = [
        replace(p, change=replace(p.change, own_norm=False), factor=None, kept=None) for p in parts
    ]
    what = "norms of what the adapters before left, not of the base"
    yield Candidate("norms-of-merged", what, _lines_with(exact, merged, lines))


def _lines_with(exact: Exact, parts: Sequence[Part], lines: NDArray[np.int64]) -> Floats:
    """Return the lines of a region as other changes would have them."""
    region = replace(exact.region, changes=tuple(p.change for p in parts))
    other = Exact(exact.source, region, exact.settings, tuple(parts))
    if not exact.by_column:
        return other.with_factors().rows(lines)[1]
    group = exact.parts[exact.region.column_changes[0]].change.group
    columns = (lines[:, None] * group + np.arange(group)).ravel()
    return as_lines(other.columns(columns)[1], group)


def _strengths(sample: Sample) -> Iterator[Candidate]:
    """Yield the strength that fits best, unless it is the right one."""
    update = sample.exact - sample.base
    size = float(np.square(update).sum())
    if not size or not np.isfinite(sample.merged).all():
        return
    share = float(((sample.merged - sample.base) * update).sum()) / size
    strength = share * sample.strength
    if abs(share) > 1e-3:
        what = f"strength {strength:.4g} instead of {sample.strength:g}"
        yield Candidate("strength-other", what, sample.base + share * update)


def _scalings(sample: Sample, finish: Callable[[Floats], Floats]) -> Iterator[Candidate]:
    """Yield other factors on ``B A``: the usual confusions, and the one that fits best."""
    assert sample.product is not None, "Bug: only called with a product"
    for other, what in _other_scalings(sample):
        values = finish(sample.base + other / sample.scaling * sample.product)
        yield Candidate("scaling-other", what, values)


def _other_scalings(sample: Sample) -> Iterator[tuple[float, str]]:
    """Yield other factors on ``B A`` and what to say of them: the usual ones, and the best."""
    usual = list(_usual_scalings(sample))
    yield from usual
    s, best = sample.scaling, _fitted_scaling(sample) if sample.scaling else None
    if best and abs(best - s) > 1e-3 * abs(s):
        near = next((what for k, what in usual if abs(k - best) < 0.02 * abs(k)), "")
        why = near[near.index("(") :] if "(" in near else ""
        yield best, _scaling_words(best, s) + (f" {why}" if why else "")


def _usual_scalings(sample: Sample) -> Iterator[tuple[float, str]]:
    s, root = sample.scaling, math.sqrt(sample.rank)
    usual = {1.0: "alpha left out"}
    if sample.rank:
        usual |= {
            s * root: "alpha/sqrt(r) for alpha/r",
            s / root: "alpha/r for alpha/sqrt(r)",
            s * sample.rank: "alpha, not divided by r",
        }
    for other, why in usual.items():
        if s and abs(other - s) > 1e-3 * abs(s):
            yield other, f"{_scaling_words(other, s)} ({why})"


def _scaling_words(other: float, s: float) -> str:
    return f"scaling {other:.4g} instead of {s:.4g}"


def _small(
    exact: Exact, ref: TensorRef, lines: NDArray[np.int64], others: Neighbours
) -> Diagnosis | None:
    """Return the mistake that 16-bit arithmetic's rounding is as large as, or None."""
    name = ref.dtype.name
    if name not in coarse.ROUNDOFF:
        return None
    length = max(1, exact.region.rows if exact.by_column else exact.region.columns)
    sample = take(exact, ref, pick(lines, max(LINES, SMALL_ELEMENTS // length)), name)
    s, product = sample.scaling, sample.product
    if not sample.terms.formula or not sample.simple or not np.isfinite(sample.merged).all():
        return None
    scalings = list(_usual_scalings(sample)) if product is not None and s else []
    if product is not None and s:
        near = [other for other, _ in scalings]
        scalings += [(m * s, _scaling_words(m * s, s)) for m in MULTIPLES
                     if not np.isclose(m * s, near).any()]  # fmt: skip
    some = min(max(1, RANKED_ELEMENTS // length), RANKED_LINES)
    everywhere = np.arange(line_count(exact)) if others.line is not None else lines
    ranked = others.nearest(take(exact, ref, pick(everywhere, some)), RANKED)
    tried = [*small_mistakes.formulas(sample, scalings), *_small_swaps(sample, ranked)]
    found = small_mistakes.told(sample, tried)
    if found is None and scalings and (best := _fitted_scaling(sample)):
        what = _scaling_words(best, s)
        fitted = Mistake("scaling-other", what, small_mistakes.times(sample.terms, best / s))
        found = small_mistakes.told(sample, [fitted])
    return None if found is None else Diagnosis(found.code, found.what)


def _small_swaps(sample: Sample, others: Iterable[tuple[str, Exact]]) -> Iterator[Mistake]:
    terms = sample.terms
    for name, other in others:
        theirs = take(other, other.source, sample.lines, sample.dtype.name)
        if not theirs.simple or (theirs.product is None) != (sample.product is None):
            continue
        label, of = shown(name), theirs.terms
        factors = replace(
            terms, product=of.product, coarse_product=of.coarse_product, scaling=of.scaling
        )
        if terms.magnitude is None:
            yield Mistake("update-of-another", f"the update of '{label}'", factors)
        elif of.magnitude is not None:
            both = replace(factors, magnitude=of.magnitude)
            yield Mistake("update-of-another", f"the update of '{label}'", both)
            yield Mistake("update-of-another", f"A and B of '{label}'", factors)


def _fitted_scaling(sample: Sample) -> float | None:
    """Return the scaling that fits best: each line as ``a W + b P``, the median of ``b / a``."""
    assert sample.product is not None, "Bug: only called with a product"
    if sample.strength != 1.0 or not np.isfinite(sample.merged).all():
        return None
    ratios = []
    for w, p, merged in zip(sample.base, sample.product, sample.merged, strict=True):
        (a, b), _, rank, _ = np.linalg.lstsq(np.stack([w, p], 1), merged, rcond=None)
        if rank == 2 and a:
            ratios.append(b / a)
    return float(np.median(ratios)) * sample.scaling if ratios else None


def _orders(sample: Sample, exact: Exact) -> Iterator[Candidate]:
    for what, values in orders(exact, sample):
        yield Candidate("update-permuted", what, values)


def _only_lengths(sample: Sample) -> Diagnosis | None:
    """Return whether lines have the right directions, and are rounded once besides.

    For lengths so near to the right ones that rounding leaves a good part of the distance.
    """
    for found in _lengths(sample):
        gap = float(np.square(sample.merged - found.values).sum())
        once = replace(sample, exact=found.values).one_rounding
        size = float(np.square(found.values).sum())
        few = ONLY_LENGTHS * _differing(sample, sample.exact)
        # zeros have any direction
        near = gap < min(ONE_ROUNDING * once, EXPLAINS * size)
        if near and _differing(sample, found.values) <= few:
            return Diagnosis(found.code, found.what)
    return None


def _differing(sample: Sample, values: Floats) -> int:
    """Return how many stored elements are not those of a result, rounded as stored."""
    nearest = rounded(np.ascontiguousarray(values), sample.dtype)
    return int(np.count_nonzero(sample.merged != nearest))


def _lengths(sample: Sample) -> Iterator[Candidate]:
    """Yield lines of the right direction and of the lengths found."""
    if not np.isfinite(sample.merged).all():
        return
    along = np.einsum("ij,ij->i", sample.merged, sample.exact)
    size = np.einsum("ij,ij->i", sample.exact, sample.exact)
    share = along / np.where(size == 0, np.inf, size)
    what = f"lengths are {share.min():.4g} to {share.max():.4g} of the right ones"
    code = "wrong-values" if sample.magnitude is None else "magnitude-other"
    yield Candidate(code, what, sample.exact * share[:, None])


def _mixed_up(
    exact: Exact,
    ref: TensorRef,
    lines: NDArray[np.int64],
    others: Neighbours,
    rounding: Rounding | None,
    explains: float,
) -> Explanation | None:
    """Return which other tensor's values, update or magnitudes are in here, or None."""
    dtype = None if rounding is None else rounding.dtype
    few = pick(lines, SWAP_LINES)
    if others.line is not None:  # one that is kept of all regions
        few = np.unique([others.line, *few[:-1]])
    sample = take(exact, ref, few, dtype)
    if not sample.simple:
        return None
    limit = explains * _distance_to_right(sample, rounding)
    near = others.near(sample, few[0] if others.line is None else others.line, limit)
    return _nearest(sample, _swaps(sample, near), explains, rounding)


def _swaps(sample: Sample, others: Iterable[tuple[str, Exact]]) -> Iterator[Candidate]:
    for name, other in others:
        label = shown(name)
        theirs = take(other, other.source, sample.lines)
        yield Candidate("tensor-of-another", f"holds the values of '{label}'", theirs.exact)
        mixes = [(theirs.product, theirs.magnitude, "update-of-another", "the update")]
        if sample.magnitude is not None:  # what changes less first
            mixes = [
                (sample.product, theirs.magnitude, "magnitude-of-another", "the magnitudes"),
                (theirs.product, sample.magnitude, "update-of-another", "A and B"),
                *mixes,
            ]
        for product, m, code, what in mixes:
            values = sample.mixed(product, m)
            yield Candidate(code, f"{what} of '{label}'", values)


def _rearranged(sample: Sample, exact: Exact, ref: TensorRef) -> Diagnosis | None:
    """Return whether values are right but stand elsewhere, or norms ran the other way.

    Reads the whole region.
    """
    region = exact.region
    if exact.by_column or region.rows < 2 or not np.isfinite(sample.merged).all():
        return _other_axis(sample, exact) if exact.by_column else None
    square = region.rows == region.columns
    exact_columns = np.empty((region.rows, len(sample.lines))) if square else None
    nearest = np.full(len(sample.lines), np.inf)
    place = np.zeros(len(sample.lines), np.int64)
    own = np.square(sample.merged).sum(axis=1)
    for rows in exact.blocks():
        _, values = exact.rows(rows)
        if exact_columns is not None:
            exact_columns[rows] = values[:, sample.lines]
        gaps = own[:, None] - 2 * sample.merged @ values.T + np.square(values).sum(axis=1)
        best = gaps.argmin(axis=1)
        closer = gaps[np.arange(len(best)), best] < nearest
        nearest[closer] = gaps[np.arange(len(best)), best][closer]
        place[closer] = best[closer] + rows.start
    if exact_columns is not None and sample.distance(exact_columns.T) < EXPLAINS * sample.distance(
        sample.exact
    ):
        return Diagnosis("transposed-values", "rows and columns are exchanged")
    moved = place != sample.lines
    if (nearest[moved] <= SAME_LINE**2 * own[moved]).all() and moved.any():
        line, found = sample.lines[moved][0], place[moved][0]
        what = f"row {line} holds what belongs into row {found}"
        return Diagnosis("rows-permuted", f"{what}, and {moved.sum() - 1} more of {len(moved)}")
    return _other_axis(sample, exact)


def _other_axis(sample: Sample, exact: Exact) -> Diagnosis | None:
    """Return whether the magnitudes and norms ran along the other axis; a square layer only."""
    region, part = exact.region, exact.parts[0]
    if part.magnitude is None or len(exact.parts) != 1 or region.rows != region.columns:
        return None
    norms, v_lines = np.zeros(region.columns), sample.base
    if sample.product is not None:
        v_lines = sample.base + sample.product
    for rows in exact.blocks():
        v = exact.base(rows)
        product = exact.product(rows, slice(None))
        v = v if product is None else v + product
        if exact.by_column:
            norms[rows] = np.einsum("ij,ij->i", v, v)
        else:
            norms += np.einsum("ij,ij->j", v, v)
    factor = part.magnitude / np.where(norms == 0, np.inf, np.sqrt(norms))
    axis = "row" if exact.by_column else "column"
    other = Candidate("norm-other-axis", f"one norm and magnitude per stored {axis}",
                      sample.at_strength(v_lines * factor))  # fmt: skip
    return _diagnosis(_nearest(sample, [other]))


def _distance_words(sample: Sample) -> str:
    if not np.isfinite(sample.merged).all():
        return "holds values that are not finite"
    size = float(np.square(sample.exact).sum())
    update = float(np.square(sample.exact - sample.base).sum())
    gap = float(np.square(sample.merged - sample.exact).sum())
    of_size = math.sqrt(gap / size) if size else math.inf
    of_update = math.sqrt(gap / update) if update else math.inf
    return f"off by {of_size:.2g} of the weight's size, {of_update:.2g} of the update's"
