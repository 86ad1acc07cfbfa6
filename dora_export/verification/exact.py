"""The merged weight in float64, by an own formula: what every stored element is held against.

It shares no arithmetic with the engine. A ``Lines`` is one region of a tensor with its operands
read; ``rows`` and ``lines`` give base and exact values of parts of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dora_export.pieces import Region
from dora_export.plan import Settings
from dora_export.tensors import DType, Operand, TensorRef
from dora_export.update import Change, Dense, Kronecker, Product
from dora_export.verification import compiled, functions
from dora_export.verification.values import Floats, floats, operand_values

BLOCK_ELEMENTS = 1 << 17  # float64 elements of one block: the few arrays of a block fit the cache
SCAN_BYTES = 4 << 20  # read at once where columns are picked
EXPONENT = np.int64(0x7FF0000000000000)  # bits of a float64 that are its exponent
# Stored type -> bits of fraction, exponent of the smallest step, unit roundoff.
FRACTION = {"F64": 52, "F32": 23, "F16": 10, "BF16": 7}
SMALLEST = {"F64": -1074, "F32": -149, "F16": -24, "BF16": -133}
LARGEST = {"F16": 65504.0, "BF16": 3.3895313892515355e38, "F32": 3.4028234663852886e38}


@dataclass(frozen=True)
class Part:
    """One change of a region with its operands in float64.

    Attributes:
        change: The change.
        factors: Operands of its delta, the first times the scaling; empty without one.
        magnitude: One per row or per group of columns, or None.
        factor: ``m / (||V|| + eps)`` per column, where norms run down columns and were computed.
        kept: Columns that keep the base's values, with ``factor``.
        value: Rows to put in place, for kind "rows".
        whole: What the matrix becomes, for kind "function".
    """

    change: Change
    factors: tuple[Floats, ...] = ()
    magnitude: Floats | None = None
    factor: Floats | None = None
    kept: NDArray[np.bool_] | None = None
    value: Floats | None = None
    whole: Floats | None = None


@dataclass(frozen=True)
class Exact:
    """A region's exact result, ready to be asked for rows or columns.

    Attributes:
        source: Where the base's values are.
        region: Which of them.
        settings: The user's, for strength and the zero-norm rule.
        parts: The region's changes in order.
    """

    source: TensorRef
    region: Region
    settings: Settings
    parts: tuple[Part, ...] = field(repr=False)

    @classmethod
    def open(cls, source: TensorRef, region: Region, settings: Settings) -> Exact:
        """Read the operands of a region; values and norms are left for later.

        But for a function of the whole matrix, which is computed.
        """
        parts = tuple(_part(c, source, region) for c in region.changes)
        return cls(source, region, settings, parts)

    @property
    def by_column(self) -> bool:
        """Whether all norms run down stored columns, so that whole columns can be had."""
        norms = [c.over for c in self.region.changes if c.over and not c.magnitude_is_factor]
        return "column" in norms and "row" not in norms

    @property
    def rank(self) -> int:
        """Largest rank of a product, 0 without one."""
        deltas = (p.change.delta for p in self.parts)
        return max((d.right.shape[0] for d in deltas if isinstance(d, Product)), default=0)

    def with_factors(self) -> Exact:
        """Return this with the factors of its columns computed: one pass over all rows."""
        parts = list(self.parts)
        for position in self.region.column_changes:
            if parts[position].factor is None:
                parts[position] = self._with_factor(position)
        return Exact(self.source, self.region, self.settings, tuple(parts))

    @cached_property
    def rule(self) -> compiled.Rule | None:
        """What the compiled loop takes to compute the same rows; None: it does not know how to."""
        found = self._product_rule()
        if found is None or self.settings.strength != 1.0:
            return None
        (part,) = self.parts
        change = part.change
        if part.magnitude is None:
            return found
        if change.over == "row":
            kind = compiled.BY_MAGNITUDE if change.magnitude_is_factor else compiled.OVER_LENGTH
            return replace(found, kind=kind, magnitude=part.magnitude, eps=change.eps)
        if part.factor is None or part.kept is None or part.kept.any():
            return None
        return replace(found, by_column=compiled.padded(part.factor))

    def _product_rule(self) -> compiled.Rule | None:
        """Return the rule of ``W + s B A`` alone."""
        part, *others = self.parts or (None,)
        if (
            part is None
            or others
            or part.change.kind not in ("lora", "dora", "magnitude")
            or part.change.weight != 1.0
            or not isinstance(part.change.delta, Product | None)
            or self.source.dtype.name not in compiled.TYPES
            or not compiled.available()
        ):
            return None
        none = np.empty((self.region.rows, 0)), np.empty((0, self.region.columns))
        left, right = part.factors or none
        return compiled.Rule.of(left, right)

    def _with_factor(self, position: int) -> Part:
        part = self.parts[position]
        rule = self._product_rule()
        if rule is not None:
            squares = self._compiled_squares(rule)
        else:
            squares = np.zeros(self.region.columns)
            for rows in self.blocks():
                values = self._directions(self.base(rows), rows, position)
                squares += np.einsum("ij,ij->j", values, values)
        assert part.magnitude is not None, "Bug: a column change has magnitudes"
        group = part.change.group
        norm = np.sqrt(squares.reshape(-1, group).sum(axis=1))
        factor, kept = _factor(part.magnitude, norm, part.change.eps, self.settings)
        return Part(part.change, part.factors, part.magnitude,
                    np.repeat(factor, group), np.repeat(kept, group))  # fmt: skip

    def _compiled_squares(self, rule: compiled.Rule) -> Floats:
        squares = compiled.padded(np.zeros(self.region.columns))
        for rows in self.blocks():
            base = raw_rows(self.source, self.region, rows)
            compiled.add_column_squares(rule, self.source.dtype.name, base, rows, squares)
        return squares[: self.region.columns]

    def blocks(self, elements: int = BLOCK_ELEMENTS) -> Iterator[slice]:
        """Yield consecutive rows whose float64 values are about ``elements``."""
        step = max(1, elements // max(1, self.region.columns))
        for first in range(0, self.region.rows, step):
            yield slice(first, min(first + step, self.region.rows))

    def base(self, rows: slice | NDArray[Any]) -> Floats:
        """Return the base's values of some rows."""
        return read_rows(self.source, self.region, rows)

    def rows(self, rows: slice | NDArray[Any]) -> tuple[Floats, Floats]:
        """Return base and exact values of some rows; columns' factors must be there."""
        base = self.base(rows)
        return base, self.values(base, rows)

    def values(self, base: Floats, rows: slice | NDArray[Any]) -> Floats:
        """Return exact values of some rows, given the base's; columns' factors must be there."""
        return self._exact(base, rows, slice(None))

    def columns(self, columns: NDArray[Any]) -> tuple[Floats, Floats]:
        """Return base and exact values of some columns; whole groups of them."""
        base = read_columns(self.source, self.region, columns)
        return base, self._exact(base, slice(None), columns)

    def product(self, rows: slice | NDArray[Any], columns: slice | NDArray[Any]) -> Floats | None:
        """Return ``s B A`` of some rows and columns, or None where a change has no product."""
        products = [_delta(p, rows, columns) for p in self.parts if p.factors]
        return np.sum(products, axis=0) if products else None

    def product_sizes(self, columns: slice | NDArray[Any]) -> ProductSizes:
        """Return what tells the size of the terms that ``s B A`` is a sum of, row by row."""
        return ProductSizes(tuple(p for p in self.parts if p.factors), columns)

    def _exact(
        self, base: Floats, rows: slice | NDArray[Any], columns: slice | NDArray[Any]
    ) -> Floats:
        values = base
        for first, last in self._groups():
            before = values
            for position in range(first, last):
                start = base if first == 0 else before
                values = self._applied(position, values, start, base, rows, columns)
            weight = self.parts[first].change.weight
            if weight != 1.0:
                values = before + weight * (values - before)
        if self.settings.strength != 1.0:
            values = base + self.settings.strength * (values - base)
        return values

    def _groups(self) -> Iterator[tuple[int, int]]:
        """Yield where each adapter's changes begin and end."""
        first = 0
        for last in range(1, len(self.parts) + 1):
            adapters = {p.change.adapter for p in self.parts[first : last + 1]}
            if last == len(self.parts) or len(adapters) > 1:
                yield first, last
                first = last

    def _directions(self, base: Floats, rows: slice, stop: int) -> Floats:
        """Return ``V`` of some rows: what the change at ``stop`` divides by its norm."""
        values = base
        if not self.parts[stop].change.own_norm:
            for position in range(stop):
                values = self._applied(position, values, base, base, rows, slice(None))
        return _with_product(self.parts[stop], values, rows, slice(None))

    def _applied(
        self,
        position: int,
        values: Floats,
        start: Floats,
        base: Floats,
        rows: slice | NDArray[Any],
        columns: slice | NDArray[Any],
    ) -> Floats:
        """Return the values after one change.

        Args:
            position: Of the change.
            values: What the changes before it left.
            start: What its adapter started from: lines without direction keep it.
            base: The base's values, which an own norm is of.
            rows: Which rows these are.
            columns: Which columns.
        """
        part = self.parts[position]
        if part.magnitude is not None:
            own = _with_product(part, base, rows, columns) if part.change.own_norm else None
            values = _with_product(part, values, rows, columns)
            return _normalised(part, values, own, start, rows, columns, self.settings)
        if part.change.kind in ("lora", "dora"):
            return _with_product(part, values, rows, columns)
        if part.whole is not None:
            return part.whole[rows][:, columns]
        if part.change.kind == "rows":
            return _with_rows(part, values, rows, self.region.rows, columns)
        assert part.change.value is not None, "Bug: kinds add and replace carry a value"
        value = self._value(part.change.value, rows, columns)
        return value if part.change.kind == "replace" else values + part.change.scaling * value

    def _value(
        self, ref: TensorRef, rows: slice | NDArray[Any], columns: slice | NDArray[Any]
    ) -> Floats:
        own = Region(0, self.region.rows, self.region.columns)
        if isinstance(columns, slice):
            return read_rows(ref, own, rows)
        return read_columns(ref, own, columns)


def _part(change: Change, source: TensorRef, region: Region) -> Part:
    if change.function is not None:
        W = read_rows(source, region, slice(None))
        return Part(change, whole=functions.exact(change.function, W, source.dtype))
    factors = [operand_values(o) for o in change.delta.operands] if change.delta is not None else []
    if factors:
        factors[0] = change.scaling * factors[0]
    magnitude = None if change.magnitude is None else operand_values(change.magnitude).ravel()
    value = None
    if change.kind == "rows":
        assert change.value is not None, "Bug: kind rows carries a value"
        value = operand_values(Operand.matrix(change.value))
    return Part(change, tuple(factors), magnitude, value=value)


def _delta(part: Part, rows: slice | NDArray[Any], columns: slice | NDArray[Any]) -> Floats:
    """Return ``s B A``, or what stands for it, of some rows and columns."""
    delta = part.change.delta
    if isinstance(delta, Kronecker):
        first, second = part.factors
        i, k = np.divmod(np.arange(delta.shape[0])[rows], second.shape[0])
        j, l = np.divmod(np.arange(delta.shape[1])[columns], second.shape[1])  # noqa: E741
        picked: Floats = first[np.ix_(i, j)] * second[np.ix_(k, l)]
        return picked
    if isinstance(delta, Dense):
        return part.factors[0][rows][:, columns]
    left, right, *others = part.factors
    product: Floats = left[rows] @ right[:, columns]
    if others:
        product *= others[0][rows] @ others[1][:, columns]
    return product


@dataclass(frozen=True)
class ProductSizes:
    """The size of the terms that products are sums of, in some columns: ``||B_i|| ||A_j||``.

    Attributes:
        parts: Changes with a delta.
        columns: Which columns.
    """

    parts: tuple[Part, ...] = field(repr=False)
    columns: slice | NDArray[Any] = field(repr=False)

    def of(self, rows: NDArray[Any]) -> Floats | float:
        """Return the sizes in some rows; 0 where nothing is a product."""
        return sum((self._part(p, rows) for p in self.parts), 0.0)

    def _part(self, part: Part, rows: NDArray[Any]) -> Floats:
        if isinstance(part.change.delta, Kronecker | Dense):
            return np.abs(_delta(part, rows, self.columns))
        lefts = [left[rows] for left in part.factors[::2]]
        norms = [np.sqrt(np.einsum("ij,ij->i", left, left)) for left in lefts]
        size: Floats = np.prod(norms, axis=0)[:, None] * self._right_norms[id(part)]
        return size

    @cached_property
    def _right_norms(self) -> Mapping[int, Floats]:
        found = {}
        for part in self.parts:
            if not isinstance(part.change.delta, Kronecker | Dense):
                rights = [right[:, self.columns] for right in part.factors[1::2]]
                norms = [np.sqrt(np.einsum("ij,ij->j", right, right)) for right in rights]
                found[id(part)] = np.prod(norms, axis=0)
        return found


def _with_product(
    part: Part, values: Floats, rows: slice | NDArray[Any], columns: slice | NDArray[Any]
) -> Floats:
    if not part.factors:
        return values
    product = _delta(part, rows, columns)
    if isinstance(part.change.delta, Dense):
        return product + values  # not in place: the product is a view
    product += values
    return product


def _normalised(
    part: Part,
    values: Floats,
    own: Floats | None,
    start: Floats,
    rows: slice | NDArray[Any],
    columns: slice | NDArray[Any],
    settings: Settings,
) -> Floats:
    """Return ``values`` times ``m / ||own||``; ``own`` is ``values`` where it is None."""
    measured = values if own is None else own
    assert part.magnitude is not None, "Bug: only called with magnitudes"
    change = part.change
    if change.magnitude_is_factor:
        if change.over == "row":
            return values * part.magnitude[rows][:, None]
        return values * np.repeat(part.magnitude, change.group)[columns]
    if change.over == "row":
        norm = np.sqrt(np.einsum("ij,ij->i", measured, measured))
        factor, kept = _factor(part.magnitude[rows], norm, change.eps, settings)
        factor, kept = factor[:, None], kept[:, None]
    elif part.factor is not None and part.kept is not None:
        factor, kept = part.factor[columns][None], part.kept[columns][None]
    else:
        picked = np.arange(part.magnitude.size * change.group)[columns]
        squares = np.einsum("ij,ij->j", measured, measured).reshape(-1, change.group).sum(axis=1)
        m = part.magnitude[picked[:: change.group] // change.group]
        factor, kept = _factor(m, np.sqrt(squares), change.eps, settings)
        factor = np.repeat(factor, change.group)[None]
        kept = np.repeat(kept, change.group)[None]
    result = values * factor
    return np.where(kept, start, result) if kept.any() else result


def _factor(
    m: Floats, norm: Floats, eps: float, settings: Settings
) -> tuple[Floats, NDArray[np.bool_]]:
    """Return ``m / (norm + eps)``, zero where the norm is, and which lines keep the base's."""
    zero = norm == 0
    factor = np.where(zero, 0.0, m / np.where(zero, 1.0, norm + eps))
    undefined = zero & (m != 0) & (eps == 0)  # 0 / eps is 0
    return factor, undefined & (settings.zero_norm == "keep-base")


def _with_rows(
    part: Part,
    values: Floats,
    rows: slice | NDArray[Any],
    count: int,
    columns: slice | NDArray[Any],
) -> Floats:
    assert part.value is not None, "Bug: kind rows carries a value"
    values = values.copy()
    picked = np.arange(count)[rows]
    for position, row in enumerate(part.change.row_indices):
        values[picked == row] = part.value[position, columns]
    return values


def read_rows(ref: TensorRef, region: Region, rows: slice | NDArray[Any]) -> Floats:
    """Return stored rows of a region as float64."""
    return floats(raw_rows(ref, region, rows), ref.dtype)


def raw_rows(ref: TensorRef, region: Region, rows: slice | NDArray[Any]) -> NDArray[Any]:
    """Return rows of a region as they are stored."""
    columns = region.columns
    if isinstance(rows, slice):
        first, last, _ = rows.indices(region.rows)
        raw = ref.raw(region.start + first * columns, region.start + last * columns)
    else:
        raw = ref.raw_each([region.start + int(row) * columns for row in rows], columns)
    return raw.reshape(-1, columns)


def read_columns(ref: TensorRef, region: Region, columns: NDArray[Any]) -> Floats:
    """Return stored columns of a region as float64; reads all of it."""
    step = max(1, SCAN_BYTES // max(1, region.columns * ref.dtype.itemsize))
    parts = []
    for row in range(0, region.rows, step):
        last = min(row + step, region.rows)
        raw = ref.raw(region.start + row * region.columns, region.start + last * region.columns)
        parts.append(floats(raw.reshape(-1, region.columns)[:, columns], ref.dtype))
    return np.concatenate(parts)


def binade(values: Floats, dtype: DType) -> Floats:
    """Return the power of two at or below each value; times ``2**-FRACTION`` it is one ulp.

    Below the smallest normal number of ``dtype`` steps no longer shrink, nor does this.
    """
    unit: Floats = (values.view(np.int64) & EXPONENT).view(np.float64)
    least = 2.0 ** max(SMALLEST[dtype.name] + FRACTION[dtype.name], -1022)
    np.maximum(unit, least, out=unit)
    if dtype.name == "F64":
        # The exact values are float64 sums themselves: no nearer than this to the real ones.
        np.maximum(unit, np.abs(values).max(initial=0.0) * 2.0 ** (52 - 44), out=unit)
    return unit


def rounded(values: Floats, dtype: DType) -> Floats:
    """Return the nearest values of ``dtype``, ties to even; overflow becomes infinity."""
    if dtype.name == "F64":
        return values
    step = binade(np.ascontiguousarray(values), dtype) * 2.0 ** -FRACTION[dtype.name]
    nearest = np.rint(values / step) * step  # both by powers of two: exact
    too_large = np.abs(nearest) > LARGEST[dtype.name]
    return np.where(too_large, np.copysign(np.inf, values), nearest) if too_large.any() else nearest
