"""The merge of one tile: stored rows of one weight, in working precision, rounded once.

Everything is in stored terms (``update.Change``): a matrix of rows, a low-rank product, and a
magnitude per row or per column. The formula knows no format, no file and no device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from dora_export import fused, refine
from dora_export.arithmetic import Arithmetic, Array
from dora_export.row_factor import coarse, factor
from dora_export.tensors import DType
from dora_export.update import Change, Dense, Hadamard, Kronecker, Product

ZeroNorm = Literal["refuse", "zero", "keep-base"]


@dataclass(frozen=True, eq=False)
class LoadedChange:
    """A change with its numbers at hand, where the arithmetic computes.

    Attributes:
        change: What to do.
        factors: The operands of ``change.delta`` in working precision, the first of them times
            ``scaling``; empty without a delta.
        magnitude: float64, one per row or per column group, or None.
        value: Working precision, ``(len(row_indices), columns)``, for kind "rows".
        stored: Returns elements [start, stop) of ``change.value`` as stored, for kinds "add" and
            "replace", which may be as large as the base and are read tile by tile.
        product: The factors of a product as exactly as they are stored, on the host, where float32
            may not do for the sum; else None.
        whole: Working precision, ``(rows, columns)``: what kind "function" makes of the matrix.
        kernel: The product as the compiled kernel takes it, where that does the merge.
        column_factor: ``m / (norm + eps)`` per column, once it is known.
        column_factor_host: The same in float64 on the host.
        undefined_columns: Columns with a zero norm and a magnitude other than zero.
    """

    change: Change
    factors: tuple[Array, ...] = ()
    magnitude: Array | None = None
    value: Array | None = None
    stored: Callable[[int, int], NDArray[Any]] | None = None
    product: refine.Product | None = None
    whole: Array | None = None
    kernel: fused.Factors | fused.WideFactors | None = None
    column_factor: Array | None = None
    column_factor_host: NDArray[np.float64] | None = None
    undefined_columns: NDArray[np.intp] | None = None


class UndefinedRows(Exception):  # noqa: N818 - a finding, turned into a refusal by the engine
    """Rows of the tile whose ``||W + s B A||`` is zero although their magnitude is not."""


class CoarseRows(Exception):  # noqa: N818 - as above
    """Rows of the tile whose squares float32 cannot hold.

    Attributes:
        rows: Within the change's matrix.
    """

    def __init__(self, rows: NDArray[np.intp]) -> None:
        super().__init__()
        self.rows = rows


@dataclass(frozen=True, eq=False)
class Tile:
    """Stored rows of one weight on their way through the formula.

    Attributes:
        values: Working precision, ``(rows, columns)``; holds V, then W'.
        work: Scratch of the same shape.
        spare: Two more of them, for what several adapters do to one tensor; else None.
        raw: The stored base elements, flat, on the host.
        dtype: How ``raw`` is stored.
        first_row: Row of the change's matrix that the tile starts with.
    """

    values: Array
    work: Array
    raw: NDArray[Any]
    dtype: DType
    first_row: int
    spare: tuple[Array, Array] | None = None

    @property
    def rows(self) -> slice:
        """The tile's rows within the change's matrix."""
        return slice(self.first_row, self.first_row + int(self.values.shape[0]))


def add_delta(ops: Arithmetic, tile: Tile, loaded: LoadedChange) -> None:
    """V = W + s B A, in place; or another delta for ``B A``, or a function's rows for ``W``."""
    delta, rows = loaded.change.delta, tile.rows
    if loaded.whole is not None:
        tile.values[...] = loaded.whole[rows]
    if isinstance(delta, Product):
        left, right = loaded.factors
        ops.add_product(tile.values, left[rows], right, tile.work)
    elif isinstance(delta, Hadamard):
        left, right, other_left, other_right = loaded.factors
        ops.xp.matmul(left[rows], right, out=tile.work)
        other = ops.xp.matmul(other_left[rows], other_right)
        ops.xp.multiply(tile.work, other, out=tile.work)
        ops.xp.add(tile.values, tile.work, out=tile.values)
    elif isinstance(delta, Kronecker):
        _add_kronecker(tile, *loaded.factors)
    elif isinstance(delta, Dense):
        ops.xp.add(tile.values, loaded.factors[0][rows], out=tile.values)


def _add_kronecker(tile: Tile, first: Array, second: Array) -> None:
    """Add rows of ``first (x) second``: one row of ``first`` goes with all rows of ``second``."""
    height, (start, stop) = int(second.shape[0]), (tile.rows.start, tile.rows.stop)
    for block in range(start // height, -(-stop // height)):
        top, bottom = max(start, block * height), min(stop, (block + 1) * height)
        part = second[top - block * height : bottom - block * height]
        values = tile.values[top - start : bottom - start]
        values += (first[block][None, :, None] * part[:, None, :]).reshape(values.shape)


def merge_tile(
    ops: Arithmetic,
    tile: Tile,
    changes: Sequence[LoadedChange],
    zero_norm: ZeroNorm = "refuse",
    strength: float = 1.0,
) -> Array | None:
    """Turn ``tile.values`` from W into ``W + strength * (W' - W)``, in place.

    Args:
        ops: Array library to compute with.
        tile: Rows of W; with ``spare`` where there are several changes or weights.
        changes: Applied in turn; all of them about the matrix that the tile is part of.
        zero_norm: What becomes of rows with ``||V|| = 0`` and ``m != 0``.
        strength: Dimensionless; 1 gives W'.

    Returns:
        The factor on each row, float64, if a change had one.

    Raises:
        UndefinedRows: ``zero_norm`` is "refuse" and there is such a row.
        CoarseRows: In float32 there is such a row.
    """
    row_factor = None
    for number, (_, group) in enumerate(groupby(changes, key=lambda c: c.change.adapter)):
        own = list(group)
        weight = own[0].change.weight
        before = _before(tile) if number or weight != 1.0 else None
        for loaded in own:
            found = _apply(ops, tile, loaded, zero_norm, before if number else None)
            row_factor = found if found is not None else row_factor
        if weight != 1.0:
            _interpolate(ops, tile.values, before, weight)
    if strength != 1.0:
        ops.widen(tile.raw, tile.dtype, tile.work)
        _interpolate(ops, tile.values, tile.work, strength)
    return row_factor


def _before(tile: Tile) -> Array:
    """Return a copy of what the changes of one adapter start from."""
    assert tile.spare is not None, "Bug: what several adapters change has spare arrays"
    tile.spare[0][...] = tile.values
    return tile.spare[0]


def _interpolate(ops: Arithmetic, values: Array, before: Array, weight: float) -> None:
    """``before + weight * (values - before)``, in place of ``values``."""
    ops.xp.subtract(values, before, out=values)
    ops.xp.multiply(values, weight, out=values)
    ops.xp.add(values, before, out=values)


def _apply(
    ops: Arithmetic, tile: Tile, loaded: LoadedChange, zero_norm: ZeroNorm, before: Array | None
) -> Array | None:
    """Apply one change; return its factor on each row, if it has one.

    Args:
        ops: Array library to compute with.
        tile: Its ``values`` change.
        loaded: The change.
        zero_norm: What becomes of rows with ``||V|| = 0`` and ``m != 0``.
        before: Values before this change's adapter, for "keep-base"; None: the base's.
    """
    squares = None
    if loaded.change.over == "row" and loaded.change.own_norm and before is not None:
        squares = ops.row_squares(alone(ops, tile, loaded))
    add_delta(ops, tile, loaded)
    if loaded.change.over == "row":
        return _normalise_rows(ops, tile, loaded, zero_norm, squares, before)
    if loaded.change.over == "column":
        _normalise_columns(ops, tile, loaded, zero_norm, before)
    elif loaded.change.kind == "rows":
        _replace_rows(tile, loaded)
    elif loaded.change.kind in ("add", "replace"):
        _stored_values(ops, tile, loaded)
    return None


def alone(ops: Arithmetic, tile: Tile, loaded: LoadedChange) -> Array:
    """Return the base with one delta alone, whatever V is; takes the second spare array."""
    assert tile.spare is not None, "Bug: what several adapters change has spare arrays"
    own = replace(tile, values=tile.spare[1])
    ops.widen(tile.raw, tile.dtype, own.values)
    add_delta(ops, own, loaded)
    return own.values


def _normalise_rows(
    ops: Arithmetic,
    tile: Tile,
    loaded: LoadedChange,
    zero_norm: ZeroNorm,
    squares: Array | None,
    before: Array | None,
) -> Array:
    """Multiply rows by ``m / norm``; ``squares`` of another matrix than V, or None for V's."""
    assert loaded.magnitude is not None, "Bug: a norm without a magnitude"
    magnitude = loaded.magnitude[tile.rows]
    if loaded.change.magnitude_is_factor:
        ops.xp.multiply(tile.values, ops.as_working(magnitude)[:, None], out=tile.values)
        return magnitude
    if squares is None:
        squares = ops.row_squares(tile.values)
    scale, undefined = factor(ops.xp, magnitude, squares, loaded.change.eps)
    if loaded.product is not None:  # that is, in float32
        _refuse_coarse(ops, tile, scale, squares)
    ops.xp.multiply(tile.values, ops.as_working(scale)[:, None], out=tile.values)
    if bool(undefined.any()):
        if zero_norm == "refuse":
            raise UndefinedRows
        if zero_norm == "keep-base":
            kept = _base_or(ops, tile, before)
            tile.values[undefined] = kept[undefined]
    return scale


def _refuse_coarse(ops: Arithmetic, tile: Tile, scale: Array, squares: Array) -> None:
    wrong = coarse(ops.xp, scale, squares, int(tile.values.shape[1])) | (squares == 0)
    if bool(wrong.any()):
        rows = np.flatnonzero(ops.host(wrong))
        values = ops.host(tile.values)[rows]
        # Rows of zeros have no direction, and what is not finite is refused as that.
        told = (values != 0).any(axis=1) & np.isfinite(values).all(axis=1)
        if told.any():
            raise CoarseRows(rows[told] + tile.first_row)


def _normalise_columns(
    ops: Arithmetic,
    tile: Tile,
    loaded: LoadedChange,
    zero_norm: ZeroNorm,
    before: Array | None,
) -> None:
    assert loaded.column_factor is not None, "Bug: column norms are computed before the merge"
    ops.xp.multiply(tile.values, loaded.column_factor, out=tile.values)
    columns = loaded.undefined_columns
    if zero_norm == "keep-base" and columns is not None and columns.size:
        kept = _base_or(ops, tile, before)
        tile.values[:, columns] = kept[:, columns]


def _base_or(ops: Arithmetic, tile: Tile, before: Array | None) -> Array:
    """Return what a line without direction keeps: the values before the change, or the base's."""
    if before is not None:
        return before
    ops.widen(tile.raw, tile.dtype, tile.work)
    return tile.work


def _replace_rows(tile: Tile, loaded: LoadedChange) -> None:
    assert loaded.value is not None, "Bug: kind rows carries a value"
    for position, row in enumerate(loaded.change.row_indices):
        if tile.rows.start <= row < tile.rows.stop:
            tile.values[row - tile.first_row] = loaded.value[position]


def _stored_values(ops: Arithmetic, tile: Tile, loaded: LoadedChange) -> None:
    assert loaded.stored is not None, "Bug: kinds add and replace carry a value"
    assert loaded.change.value is not None, "Bug: kinds add and replace carry a value"
    columns = int(tile.values.shape[1])
    raw = loaded.stored(tile.rows.start * columns, tile.rows.stop * columns)
    ops.widen(raw.reshape(tuple(tile.values.shape)), loaded.change.value.dtype, tile.work)
    if loaded.change.kind == "replace":
        tile.values[...] = tile.work
        return
    ops.xp.multiply(tile.work, loaded.change.scaling, out=tile.work)
    ops.xp.add(tile.values, tile.work, out=tile.values)
