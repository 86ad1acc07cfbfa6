"""What went wrong with a tensor that is not the exact result: known mistakes, tried one by one.

Every mistake is a formula. The one that comes far nearer to what is stored than the right formula
does is the diagnosis; where none does, the finding says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dora_export.errors import shown
from dora_export.tensors import DTYPES, DType, TensorRef
from dora_export.verification import coarse
from dora_export.verification.exact import Exact, Part, read_columns, read_rows, rounded
from dora_export.verification.values import Floats

LINES = 24  # rows or columns that mistakes are tried on
# A mistake must leave less than this share of the squared distance to the right result: rounding
# that only leans its way leaves more.
EXPLAINS = 0.1
ALL_BUT_ROUNDING = 1e-3  # the same for lengths of lines, which rounding of factors changes too
TOLD_ELEMENTS = 1 << 14  # that mistakes are tried on, where they could pass for rounding
LEANING_ELEMENTS = 1 << 17  # at least a few lines; enough to see a thousandth of a part
NEARER = 0.5  # share of the squared distance, or of the elements that differ
SWAP_LINES = 4  # lines that mix-ups are tried on
MOST_OTHERS = 512  # tensors of the same shape that are tried for a mix-up
SAME_LINE = 0.05  # distance of two lines that count as one, relative to their length


@dataclass(frozen=True)
class Sample:
    """Lines of one region: rows, or columns (groups of them) where norms run down columns.

    Attributes:
        lines: Which lines.
        base: W, shape (lines, length).
        product: ``s B A``, or None.
        coarse_product: The same of A and B rounded to a coarser type, where one was asked for.
        magnitude: m of each line, or None.
        exact: W'.
        merged: What is stored.
        dtype: Type it is stored in.
        scaling: s.
        rank: Rank of the product, 0 without one.
        strength: The user's.
        simple: The change is one LoRA, DoRA or magnitude update, so that formulas are known.
        factor: ``m / ||W + s B A||`` of each row, where the adapter stores that; not ``simple``.
    """

    lines: NDArray[np.int64]
    base: Floats = field(repr=False)
    product: Floats | None = field(repr=False)
    magnitude: Floats | None = field(repr=False)
    exact: Floats = field(repr=False)
    merged: Floats = field(repr=False)
    dtype: DType
    scaling: float
    rank: int
    strength: float
    simple: bool
    coarse_product: Floats | None = field(default=None, repr=False)
    factor: Floats | None = field(default=None, repr=False)

    def distance(self, values: Floats) -> float:
        """Return the squared distance of the stored lines from a result, rounded as stored."""
        gap = self.merged - rounded(np.ascontiguousarray(values), self.dtype)
        return float(np.square(gap).sum())

    @property
    def terms(self) -> coarse.Terms:
        """What the right lines are made of."""
        magnitude = self.magnitude
        if self.factor is not None:
            v = self.base if self.product is None else self.base + self.product
            magnitude = self.factor * np.sqrt(np.einsum("ij,ij->i", v, v))
        formula = (self.simple or self.factor is not None) and self.strength == 1.0
        return coarse.Terms(self.base, self.product, self.coarse_product, magnitude,
                            self.scaling or 1.0, self.exact, formula)  # fmt: skip

    def at_strength(self, values: Floats) -> Floats:
        """Return ``W + strength * (values - W)``."""
        return values if self.strength == 1.0 else self.base + self.strength * (values - self.base)


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


class Rounding(NamedTuple):
    """How an arithmetic seems to have rounded.

    Attributes:
        dtype: Its type, "F16" or "BF16".
        recipe: Where it rounds.
    """

    dtype: str
    recipe: coarse.Recipe


Others = Callable[[], Iterable[tuple[str, Exact]]]


def take(
    exact: Exact, ref: TensorRef, lines: NDArray[np.int64], arithmetic: str | None = None
) -> Sample:
    """Return some lines of a region; for norms down columns, a line is a group of columns.

    Args:
        exact: The region's exact result.
        ref: What is stored.
        lines: Which lines.
        arithmetic: Type to round A and B to for ``coarse_product``, or None.
    """
    coarser = _with_operands_in(exact, arithmetic) if arithmetic is not None else None
    simple = (
        bool(exact.parts)
        and all(p.change.kind in ("lora", "dora", "magnitude") for p in exact.parts)
        and (len(exact.parts) == 1 or all(p.change.kind == "lora" for p in exact.parts))
    )
    first = exact.parts[0]
    is_factor = simple and first.change.magnitude_is_factor and first.change.over == "row"
    is_factor = is_factor and not _several(exact)
    factor = first.magnitude[lines] if is_factor and first.magnitude is not None else None
    simple = simple and not first.change.magnitude_is_factor and not _several(exact)
    magnitude = first.magnitude[lines] if simple and first.magnitude is not None else None
    if exact.by_column:
        group = exact.parts[exact.region.column_changes[0]].change.group
        columns = (lines[:, None] * group + np.arange(group)).ravel()
        base, values = exact.columns(columns)
        product = exact.product(slice(None), columns)
        rough = coarser.product(slice(None), columns) if coarser is not None else None
        merged = read_columns(ref, exact.region, columns)
        base, values, merged = (_as_lines(a, group) for a in (base, values, merged))
        product = None if product is None else _as_lines(product, group)
        rough = None if rough is None else _as_lines(rough, group)
    else:
        base, values = exact.rows(lines)
        product = exact.product(lines, slice(None))
        rough = coarser.product(lines, slice(None)) if coarser is not None else None
        merged = read_rows(ref, exact.region, lines)
    return Sample(lines, base, product, magnitude, values, merged, ref.dtype, first.change.scaling,
                  exact.rank, exact.settings.strength, simple, rough, factor)  # fmt: skip


def _with_operands_in(exact: Exact, dtype: str) -> Exact:
    """Return a region with A and B rounded to a type; the first operand holds the scaling."""

    def coarser(part: Part) -> Part:
        s = part.change.scaling or 1.0
        factors = tuple(
            rounded(f if i else f / s, DTYPES[dtype]) * (1.0 if i else s)
            for i, f in enumerate(part.factors)
        )
        return replace(part, factors=factors)

    return replace(exact, parts=tuple(coarser(p) for p in exact.parts))


def _as_lines(columns: Floats, group: int) -> Floats:
    return np.ascontiguousarray(columns.T).reshape(columns.shape[1] // group, -1)


def diagnose(exact: Exact, ref: TensorRef, lines: NDArray[np.int64], others: Others) -> Diagnosis:
    """Return the mistake that explains some lines of a region, or that none does.

    Args:
        exact: The region's exact result.
        ref: What is stored.
        lines: Lines that are wrong.
        others: Exact results of other regions of the same shape, by name, for mix-ups.
    """
    sample = take(exact, ref, lines[:LINES])
    return (
        _nearest(sample, [*_formulas(sample), *_combinations(exact, lines[:LINES])])
        or _mixed_up(exact, ref, lines, others)
        or _rearranged(sample, exact, ref)
        or _nearest(sample, _lengths(sample), ALL_BUT_ROUNDING)
        or Diagnosis("wrong-values", _distance_words(sample))
    )


def hidden_mistake(
    exact: Exact, ref: TensorRef, lines: NDArray[np.int64], others: Others, arithmetic: str
) -> Diagnosis | None:
    """Return what is wrong with lines that could pass for rounding of an arithmetic, or None.

    Args:
        exact: The region's exact result.
        ref: What is stored.
        lines: Lines compared.
        others: Exact results of other regions of the same shape, by name, for mix-ups.
        arithmetic: Type whose rounding they could pass for, "F16" or "BF16".
    """
    length = exact.region.rows if exact.by_column else exact.region.columns
    few = pick(lines, max(LINES, TOLD_ELEMENTS // max(1, length)))
    sample = take(exact, ref, few, arithmetic)
    way = Rounding(arithmetic, coarse.fit(sample.terms, sample.merged, arithmetic, ref.dtype.name))
    known = _nearest(
        sample, [*_formulas(sample), *_combinations(exact, few)], rounding=way
    ) or _mixed_up(exact, ref, few, others, way)
    if known is not None:
        return known
    several = pick(lines, max(LINES, LEANING_ELEMENTS // max(1, length)))
    many = take(exact, ref, several, arithmetic)
    leaning = coarse.leaning(many.terms, many.merged, way.recipe, arithmetic, ref.dtype.name)
    if leaning is None:
        return None
    found = diagnose(exact, ref, pick(lines), others)
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


def _nearest(
    sample: Sample,
    candidates: Iterable[Candidate],
    explains: float = EXPLAINS,
    rounding: Rounding | None = None,
) -> Diagnosis | None:
    limit = sample.distance(sample.exact)
    if rounding is not None:
        near = coarse.cooked(sample.terms, rounding.recipe, rounding.dtype, sample.dtype.name)
        limit = min(limit, sample.distance(near))
    best, limit = None, explains * limit
    for candidate in candidates:
        distance = sample.distance(candidate.values)
        if np.isfinite(distance) and distance < limit:
            best, limit = Diagnosis(candidate.code, candidate.what), distance
    return best


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
        return finish(v * (m / _norm(v if by is None else by))[:, None])

    yield Candidate("magnitude-ignored", "V / ||V||", finish(base / _norm(base)[:, None]))
    if product is not None:
        v = base + product
        once = scaled(v)
        yield Candidate("applied-twice", "merged onto the merged weight", scaled(once + product))
        yield Candidate("sign-flipped", "m (W - s B A) / ||W - s B A||", scaled(base - product))
        yield Candidate("norm-of-base", "m V / ||W||", scaled(v, base))
        yield Candidate("magnitude-ignored", "V / ||V||", finish(v / _norm(v)[:, None]))
        ratio = (_norm(base) / _norm(v))[:, None]
        yield Candidate("magnitude-initial", "||W|| V / ||V||", finish(v * ratio))
        yield Candidate("lora-for-dora", "W + s B A", finish(v))
        yield Candidate("factors-ignored", "m W / ||W||", scaled(base))
        yield from _scalings(sample, scaled)


def _several(exact: Exact) -> bool:
    return len({p.change.adapter for p in exact.parts}) > 1


def _combinations(exact: Exact, lines: NDArray[np.int64]) -> Iterator[Candidate]:
    """Yield what mistakes about several adapters give: one left out, another order, other norms."""
    if not _several(exact):
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
    return _as_lines(other.columns(columns)[1], group)


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
    s, root = sample.scaling, math.sqrt(sample.rank)
    if not s:
        return
    usual = {1.0: "alpha left out"}
    if sample.rank:
        usual |= {
            s * root: "alpha/sqrt(r) for alpha/r",
            s / root: "alpha/r for alpha/sqrt(r)",
            s * sample.rank: "alpha, not divided by r",
        }
    fitted = _fitted_scaling(sample)
    for other, why in (*usual.items(), (fitted, "")) if fitted else usual.items():
        if abs(other - s) > 1e-3 * abs(s):
            why = why or next((w for k, w in usual.items() if abs(k - other) < 0.02 * abs(k)), "")
            what = f"scaling {other:.4g} instead of {s:.4g}" + (f" ({why})" if why else "")
            yield Candidate("scaling-other", what,
                            finish(sample.base + other / s * sample.product))  # fmt: skip


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


def _norm(lines: Floats) -> Floats:
    norm: Floats = np.sqrt(np.einsum("ij,ij->i", lines, lines))
    return np.where(norm == 0, np.inf, norm)


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
    others: Others,
    rounding: Rounding | None = None,
) -> Diagnosis | None:
    """Return which other tensor's values, update or magnitudes are in here, or None."""
    dtype = None if rounding is None else rounding.dtype
    sample = take(exact, ref, pick(lines, SWAP_LINES), dtype)
    if not sample.simple:
        return None
    return _nearest(sample, _swaps(sample, exact, others), rounding=rounding)


def _swaps(sample: Sample, exact: Exact, others: Others) -> Iterator[Candidate]:
    for count, (name, other) in enumerate(others()):
        if count == MOST_OTHERS:
            return
        label = shown(name)
        theirs = take(other, other.source, sample.lines)
        yield Candidate("tensor-of-another", f"holds the values of '{label}'", theirs.exact)
        mixes = [(theirs.product, theirs.magnitude, "update-of-another", "the update")]
        if sample.magnitude is not None:
            mixes += [
                (sample.product, theirs.magnitude, "magnitude-of-another", "the magnitudes"),
                (theirs.product, sample.magnitude, "update-of-another", "A and B"),
            ]
        for product, m, code, what in mixes:
            v = sample.base if product is None else sample.base + product
            values = v if m is None else v * (m / _norm(v))[:, None]
            yield Candidate(code, f"{what} of '{label}'", sample.at_strength(values))


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
    return _nearest(sample, [other])


def _distance_words(sample: Sample) -> str:
    if not np.isfinite(sample.merged).all():
        return "holds values that are not finite"
    size = float(np.square(sample.exact).sum())
    update = float(np.square(sample.exact - sample.base).sum())
    gap = float(np.square(sample.merged - sample.exact).sum())
    of_size = math.sqrt(gap / size) if size else math.inf
    of_update = math.sqrt(gap / update) if update else math.inf
    return f"off by {of_size:.2g} of the weight's size, {of_update:.2g} of the update's"


def pick(lines: Sequence[int] | NDArray[Any], count: int = LINES) -> NDArray[np.int64]:
    """Return at most ``count`` of some lines, spread evenly."""
    found = np.asarray(lines, np.int64)
    if len(found) <= count:
        return found
    return found[np.linspace(0, len(found) - 1, count).astype(np.int64)]
