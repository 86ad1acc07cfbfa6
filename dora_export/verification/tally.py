"""The figures of a tensor's region, stored values against exact ones, added up block by block."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dora_export.tensors import DType, TensorRef
from dora_export.verification import compiled
from dora_export.verification.compiled import (
    ERROR,
    EXCESS,
    LENGTH,
    MISROUNDED,
    ORDINARY,
    SIZE,
    UNITS,
    UPDATE,
    WORST,
)
from dora_export.verification.exact import FRACTION, SMALLEST, Exact, binade, raw_rows
from dora_export.verification.values import Floats, floats

TIE = 1 + 2.0**-20  # float64 cannot tell on which side of a tie the real number lies


@dataclass(frozen=True)
class Measurement:
    """A region, or sampled lines of it, against the exact result.

    Attributes:
        lines: Rows (or groups of columns) compared.
        excess: Per line, the largest arithmetic error in units of the terms' size.
        misrounded: Elements that are not the correctly rounded exact ones.
        not_finite: Elements that are not finite where the exact ones are.
        elements: Elements compared.
        max_ulp: Largest distance.
        error: Squared Frobenius norm of the error.
        one_rounding: The same for the exact result rounded once, as expected.
        exact: Squared Frobenius norm of the exact result.
        update: Squared Frobenius norm of the update.
        base: Squared Frobenius norm of the base.
        ratios: ``m / ||W||`` of each line, or None.
    """

    lines: NDArray[np.int64]
    excess: Floats
    misrounded: int
    not_finite: int
    elements: int
    max_ulp: float
    error: float
    one_rounding: float
    exact: float
    update: float
    base: float
    ratios: Floats | None


class Tally:
    """Figures of a region, added up block by block."""

    def __init__(
        self,
        exact: Exact,
        dtype: DType,
        rows: NDArray[np.int64],
        columns: NDArray[np.int64] | None = None,
    ) -> None:
        """Begin with nothing.

        Args:
            exact: The region, with the factors of its columns where whole rows are compared.
            dtype: Type of the merged model's tensor.
            rows: Rows that will be compared.
            columns: Columns, whole groups of them; None: all.
        """
        self.exact, self.dtype, self.rows = exact, dtype, rows
        self.columns = slice(None) if columns is None else columns
        count = exact.region.columns if columns is None else len(columns)
        self.row_excess, self.row_norm = np.zeros(len(rows)), np.zeros(len(rows))
        width = len(compiled.padded(np.empty(count)))
        self.column_excess, self.column_norm = np.zeros(width), np.zeros(width)
        self.width = count
        self.sizes = exact.product_sizes(self.columns)
        self.max_ulp, self.misrounded, self.not_finite, self.elements = 0.0, 0, 0, 0
        self.error = self.ulps = self.size = self.update = 0.0
        fraction = FRACTION[dtype.name]
        # errors shrink no further; those of a product grow with its scaling
        scalings = (abs(p.change.scaling) for p in exact.parts if p.factors)
        smallest_normal = 2.0 ** (SMALLEST[dtype.name] + fraction)
        self.scale = compiled.Scale(
            least=smallest_normal,
            half=0.5 * TIE * 2.0**-fraction,
            step=0.5 * 2.0**-fraction,
            floor=max((1.0, *scalings)) * smallest_normal,
        )

    def read(self, ref: TensorRef, rows: slice, picked: slice | NDArray[np.int64]) -> None:
        """Add stored rows, all of their columns.

        Args:
            ref: The merged model's tensor.
            rows: Which of ``self.rows``.
            picked: The same in the region.
        """
        base, merged = (raw_rows(r, self.exact.region, picked) for r in (self.exact.source, ref))
        rule = self.exact.rule if self.dtype.name in compiled.TYPES else None
        where = np.arange(len(self.rows))[rows]
        odd: slice | NDArray[np.int64] = slice(None)
        if rule is not None:
            columns = (self.column_excess, self.column_norm) if self.exact.by_column else None
            types = self.exact.source.dtype.name, self.dtype.name
            found = compiled.compare(rule, self.scale, types, base, merged, picked, columns)
            ordinary = found[:, ORDINARY] == 1
            self._take(where[ordinary], found[ordinary])
            odd = np.flatnonzero(~ordinary)
            if not len(odd):
                return
        W = floats(base[odd], self.exact.source.dtype)
        exact = self.exact.values(W, self.rows[where[odd]])
        self.add(where[odd], W, exact, floats(merged[odd], self.dtype))

    def _take(self, where: NDArray[np.int64], found: Floats) -> None:
        """Add what the compiled loop found out about some of ``self.rows``."""
        if not len(where):
            return
        self.max_ulp = max(
            self.max_ulp, float(found[:, WORST].max()) * 2.0 ** FRACTION[self.dtype.name]
        )
        self.misrounded += int(found[:, MISROUNDED].sum())
        self.elements += len(where) * self.width
        self.error += float(found[:, ERROR].sum())
        self.ulps += float(found[:, UNITS].sum())
        self.size += float(found[:, SIZE].sum())
        self.update += float(found[:, UPDATE].sum())
        if not self.exact.by_column:
            self.row_excess[where], self.row_norm[where] = found[:, EXCESS], found[:, LENGTH]

    def add(self, where: NDArray[np.int64], base: Floats, values: Floats, merged: Floats) -> None:
        """Add a block: some of ``self.rows``, all of ``self.columns``."""
        gap = merged - values
        unit = binade(values, self.dtype)
        self.ulps += float(np.vdot(unit, unit))
        distance = np.abs(gap)
        np.divide(distance, unit, out=distance)  # in ulps, times 2**-FRACTION
        worst = float(distance.max(initial=0.0))
        if not worst <= self.scale.half:
            wrong = ~(distance <= self.scale.half)  # NaN is wrong
            self.misrounded += int(np.count_nonzero(wrong))
            at = np.flatnonzero(wrong.any(axis=1))
            picked = self.rows[where[at]]
            block = (base, values, gap, unit)
            if len(at) < len(values):  # of an exact merge, one row in a hundred
                block = tuple(a[at] for a in block)  # type: ignore[assignment]
            excess = self._excess(picked, *block)
            if self.exact.by_column:
                most = self.column_excess[: self.width]
                np.maximum(most, excess.max(axis=0), out=most)
            else:
                self.row_excess[where[at]] = excess.max(axis=1)
            if not math.isfinite(worst):
                finite = np.isfinite(merged)
                self.not_finite += int((~finite & np.isfinite(values)).sum())
                gap = np.where(finite, gap, 0.0)
                worst = math.inf
        self.max_ulp = max(self.max_ulp, worst * 2.0 ** FRACTION[self.dtype.name])
        self.elements += values.size
        self.error += float(np.vdot(gap, gap))
        self.size += float(np.vdot(values, values))
        if self.exact.by_column:
            self.column_norm[: self.width] += np.einsum("ij,ij->j", base, base)
        else:
            self.row_norm[where] = np.einsum("ij,ij->i", base, base)
        np.subtract(values, base, out=gap)
        self.update += float(np.vdot(gap, gap))

    def _excess(
        self, rows: NDArray[np.int64], base: Floats, values: Floats, gap: Floats, unit: Floats
    ) -> Floats:
        """Return, for some rows, the arithmetic's error in units of the terms' size.

        That size is ``|f| (|W| + s ||B_i|| ||A_j||) + |W'|``.
        """
        terms = np.abs(base) + self.sizes.of(rows)
        part = next((p for p in self.exact.parts if p.magnitude is not None), None)
        if part is not None and part.factor is not None and len(self.exact.parts) == 1:
            terms *= np.abs(part.factor[self.columns])
        elif part is not None:
            product = self.exact.product(rows, self.columns)
            v = base if product is None else base + product
            line = "ij,ij->j" if self.exact.by_column else "ij,ij->i"
            before, after = (np.sqrt(np.einsum(line, a, a)) for a in (v, values))
            factor = after / np.where(before == 0, np.inf, before)
            terms *= factor if self.exact.by_column else factor[:, None]
        terms += np.abs(values)
        np.maximum(terms, self.scale.floor, out=terms)
        excess = np.abs(gap)
        unit *= self.scale.step
        excess -= unit
        np.maximum(excess, 0.0, out=excess)
        excess /= terms
        excess[~np.isfinite(terms)] = np.inf  # beyond float64: nothing is small beside that
        return np.nan_to_num(excess, copy=False, nan=np.inf)

    def measurement(self) -> Measurement:
        """Return the figures."""
        by_column = self.exact.by_column
        part = next((p for p in self.exact.parts if p.magnitude is not None), None)
        group = part.change.group if part is not None and by_column else 1
        excess, squares = self.row_excess, self.row_norm
        if by_column:
            excess = self.column_excess[: self.width].reshape(-1, group).max(axis=1)
            squares = self.column_norm[: self.width].reshape(-1, group).sum(axis=1)
        columns = np.arange(self.exact.region.columns)[self.columns]
        lines = columns[::group] // group if by_column else self.rows
        ratios = None
        if (
            part is not None
            and part.magnitude is not None
            and not part.change.magnitude_is_factor
            and not part.change.own_norm  # several magnitudes have no one ratio
        ):
            norm = np.sqrt(squares)
            ratios = part.magnitude[lines][norm > 0] / norm[norm > 0]
        return Measurement(lines, excess, self.misrounded, self.not_finite, self.elements,
                           self.max_ulp, self.error,
                           self.ulps * 4.0 ** -FRACTION[self.dtype.name] / 12,  # spread evenly
                           self.size, self.update,
                           float(squares.sum()), ratios)  # fmt: skip
