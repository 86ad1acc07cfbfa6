"""Some lines of a region: what they hold, and all that the right result of them is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dora_export.tensors import DTYPES, DType, TensorRef
from dora_export.verification import coarse
from dora_export.verification.exact import (
    FRACTION,
    Exact,
    Part,
    binade,
    read_columns,
    read_rows,
    rounded,
)
from dora_export.verification.values import Floats

LINES = 24  # rows or columns that mistakes are tried on


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
    def one_rounding(self) -> float:
        """Squared distance that rounding the right lines once leaves, as expected."""
        unit = binade(np.ascontiguousarray(self.exact), self.dtype)
        return float(np.vdot(unit, unit)) * 4.0 ** -FRACTION[self.dtype.name] / 12

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

    def mixed(self, product: Floats | None, magnitude: Floats | None) -> Floats:
        """Return the lines with another product, or other magnitudes, or both."""
        return self.lengthened(self.base if product is None else self.base + product, magnitude)

    def lengthened(self, v: Floats, magnitude: Floats | None) -> Floats:
        """Return lines ``v`` given their magnitudes, at the user's strength."""
        values = v if magnitude is None else v * (magnitude / norm(v))[:, None]
        return self.at_strength(values)

    def at_strength(self, values: Floats) -> Floats:
        """Return ``W + strength * (values - W)``."""
        return values if self.strength == 1.0 else self.base + self.strength * (values - self.base)


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
    is_factor = is_factor and not several(exact)
    factor = first.magnitude[lines] if is_factor and first.magnitude is not None else None
    simple = simple and not first.change.magnitude_is_factor and not several(exact)
    magnitude = first.magnitude[lines] if simple and first.magnitude is not None else None
    if exact.by_column:
        group = exact.parts[exact.region.column_changes[0]].change.group
        columns = (lines[:, None] * group + np.arange(group)).ravel()
        base, values = exact.columns(columns)
        product = exact.product(slice(None), columns)
        rough = coarser.product(slice(None), columns) if coarser is not None else None
        merged = base if ref is exact.source else read_columns(ref, exact.region, columns)
        base, values, merged = (as_lines(a, group) for a in (base, values, merged))
        product = None if product is None else as_lines(product, group)
        rough = None if rough is None else as_lines(rough, group)
    else:
        base, values = exact.rows(lines)
        product = exact.product(lines, slice(None))
        rough = coarser.product(lines, slice(None)) if coarser is not None else None
        merged = base if ref is exact.source else read_rows(ref, exact.region, lines)
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


def as_lines(columns: Floats, group: int) -> Floats:
    """Return columns as lines, one per group of neighbours."""
    return np.ascontiguousarray(columns.T).reshape(columns.shape[1] // group, -1)


def several(exact: Exact) -> bool:
    """Return whether more than one adapter changes a region."""
    return len({p.change.adapter for p in exact.parts}) > 1


def norm(lines: Floats) -> Floats:
    """Return the lengths of lines, infinite where one is zero."""
    length: Floats = np.sqrt(np.einsum("ij,ij->i", lines, lines))
    return np.where(length == 0, np.inf, length)


def pick(lines: Sequence[int] | NDArray[Any], count: int = LINES) -> NDArray[np.int64]:
    """Return at most ``count`` of some lines, spread evenly."""
    found = np.asarray(lines, np.int64)
    if len(found) <= count:
        return found
    return found[np.linspace(0, len(found) - 1, count).astype(np.int64)]


def line_count(exact: Exact) -> int:
    """Return how many lines a region has."""
    if not exact.by_column:
        return exact.region.rows
    return exact.region.columns // exact.region.changes[exact.region.column_changes[0]].group
