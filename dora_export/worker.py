"""One worker: its arithmetic, its buffers, and how it runs a piece.

Workers share the numbers of a region (``LoadedChange``) and nothing else. Where bytes go is the
business of a ``Sink``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from dora_export import cast
from dora_export.arithmetic import Arithmetic, Array
from dora_export.errors import ArithmeticRefusal, shown
from dora_export.formula import (
    LoadedChange,
    Tile,
    UndefinedRows,
    add_delta,
    factor,
    merge_tile,
)
from dora_export.pieces import ColumnSquares, Copy, Merge, Region, regions
from dora_export.plan import Precision, Settings, Step
from dora_export.refine import product, recompute_cancelled
from dora_export.tensors import BF16, F64, DType, FileRange, Operand
from dora_export.update import Change, Product

ArithmeticFactory = Callable[[Precision], Arithmetic]


class Sink(Protocol):
    """Where merged bytes go. Called from several threads at once."""

    def holds(self, file: int, offset: int, nbytes: int) -> bool:
        """Return whether bytes of an output file are there already, from a run before."""

    def write(self, file: int, offset: int, data: NDArray[np.uint8]) -> None:
        """Put bytes into an output file."""

    def copy(self, file: int, offset: int, source: FileRange) -> None:
        """Put a range of another file into an output file."""


def working_precision(step: Step, settings: Settings) -> Precision:
    """Return the precision that keeps a tensor within one unit in the last place.

    float32 does for one low-rank product into a BF16 output, with ``refine`` for cancelled
    elements. All else takes float64: F16's last place is eight times nearer to float32's, F32's is
    float32's.
    """
    if settings.precision == "float64" or step.source.dtype is F64:
        return "float64"
    if not step.changes:
        return "float32"
    simple = all(
        len(r.changes) <= 1
        and all(c.kind in ("lora", "dora", "magnitude", "rows") for c in r.changes)
        and all(isinstance(c.delta, Product | None) for c in r.changes)
        for r in regions(step)
    )
    return "float32" if simple and step.dtype is BF16 and settings.strength == 1 else "float64"


@dataclass
class _Lane:
    """A worker's arithmetic in one precision, with its buffers."""

    ops: Arithmetic
    values: Array = None
    work: Array = None

    def arrays(self, rows: int, columns: int) -> tuple[Array, Array]:
        """Return the tile's values and scratch, undefined."""
        size = rows * columns
        if self.values is None or self.values.shape[0] < size:
            self.values, self.work = self.ops.empty(size), self.ops.empty(size)
        shape = (rows, columns)
        return self.values[:size].reshape(shape), self.work[:size].reshape(shape)


@dataclass(frozen=True, eq=False)
class _Block:
    """Stored rows read at once, and their tiles, each widened when it is asked for."""

    raw: NDArray[Any]
    first_row: int
    tiles: Iterator[Tile]


class Worker:
    """One thread's arithmetic and buffers."""

    def __init__(
        self, make: ArithmeticFactory, settings: Settings, sink: Sink, block_bytes: int
    ) -> None:
        self._make, self._settings, self._sink = make, settings, sink
        self._block_bytes = block_bytes
        self._lanes: dict[Precision, _Lane] = {}
        self._stored = self._written = self._sizes = self._spare = np.empty(0, np.uint8)

    def _lane(self, step: Step) -> _Lane:
        precision = working_precision(step, self._settings)
        if precision not in self._lanes:
            self._lanes[precision] = _Lane(self._make(precision))
        return self._lanes[precision]

    def copy(self, piece: Copy) -> None:
        """Take bytes over as they are."""
        if isinstance(piece.source, FileRange):
            source = FileRange(piece.source.path, piece.source.start + piece.start, piece.nbytes)
            self._sink.copy(piece.file, piece.offset, source)
            return
        stop = piece.start + piece.nbytes
        self._sink.write(piece.file, piece.offset, piece.source.data[piece.start : stop])

    def load(self, step: Step, region: Region) -> list[LoadedChange]:
        """Read and arrange the adapter tensors of a region's changes."""
        precision = working_precision(step, self._settings)
        ops = self._lane(step).ops
        loaded = [self._load(ops, change, precision) for change in region.changes]
        return [self._with_whole(ops, step, region, change) for change in loaded]

    def _with_whole(
        self, ops: Arithmetic, step: Step, region: Region, loaded: LoadedChange
    ) -> LoadedChange:
        """Return the change with what its function makes of the whole matrix, if it has one."""
        function = loaded.change.function
        if function is None:
            return loaded
        stop = region.start + region.rows * region.columns
        raw = step.source.raw(region.start, stop)
        W = cast.widened(raw, step.source.dtype, np.float64)
        try:
            values = function.value(W.reshape(region.rows, region.columns), step.source.dtype)
        except ArithmeticRefusal as refusal:
            raise ArithmeticRefusal(f"{shown(step.name)}: {refusal}") from refusal
        return replace(loaded, whole=ops.put(np.ascontiguousarray(values)))

    def _load(self, ops: Arithmetic, change: Change, precision: Precision) -> LoadedChange:
        wide = np.float64 if precision == "float64" else np.float32
        loaded = LoadedChange(change)
        if change.delta is not None:
            first, *rest = (_values(o, _precision_of(o, wide)) for o in change.delta.operands)
            if change.scaling != 1.0:
                first = first * first.dtype.type(change.scaling) if _is_power_of_two(
                    change.scaling) else first.astype(np.float64) * change.scaling  # fmt: skip
            factors = (first, *rest)
            loaded = replace(
                loaded,
                factors=tuple(ops.put(f.astype(wide, copy=False)) for f in factors),
                product=product(first, *rest) if precision == "float32" else None,
            )
        if change.magnitude is not None:
            m = _values(change.magnitude, np.float64)
            loaded = replace(loaded, magnitude=ops.put(m))
            if change.magnitude_is_factor and change.over == "column":
                loaded = _with_column_factor(ops, loaded, np.repeat(m, change.group))
        if change.kind == "rows":
            assert change.value is not None, "Bug: kind rows carries a value"
            loaded = replace(loaded, value=ops.put(_values(Operand.matrix(change.value), wide)))
        elif change.value is not None:
            loaded = replace(loaded, stored=change.value.raw)
        return loaded

    def column_squares(
        self, piece: ColumnSquares, changes: list[LoadedChange]
    ) -> NDArray[np.float64]:
        """Return the columns' sums of squares of V over the piece's rows, tile after tile."""
        position = piece.region.column_change
        assert position is not None, "Bug: sums without a column norm"
        ops = self._lane(piece.step).ops
        total = np.zeros(piece.region.columns)
        for tile in self._tiles(piece.step, piece.region, piece.first_row, piece.last_row):
            for loaded in changes[: position + 1]:
                add_delta(ops, tile, loaded)
            total += ops.host(ops.column_squares(tile.values, tile.work))
        return total

    def with_factors(
        self, piece: ColumnSquares, loaded: LoadedChange, squares: NDArray[np.float64]
    ) -> LoadedChange:
        """Return the change with ``m / (norm + eps)`` per column."""
        change = loaded.change
        grouped = squares.reshape(-1, change.group).sum(axis=1)
        assert change.magnitude is not None, "Bug: a norm without a magnitude"
        magnitude = _values(change.magnitude, np.float64)
        scale, undefined = factor(np, magnitude, grouped, change.eps)
        if undefined.any() and self._settings.zero_norm == "refuse":
            raise _undefined(piece.step, "columns", np.flatnonzero(undefined))
        ops = self._lane(piece.step).ops
        return replace(
            _with_column_factor(ops, loaded, np.repeat(scale, change.group)),
            undefined_columns=np.flatnonzero(np.repeat(undefined, change.group)),
        )

    def merge(self, piece: Merge, changes: list[LoadedChange]) -> None:
        """Merge the piece's rows and hand their bytes to the sink."""
        step, columns, ops = piece.step, piece.region.columns, self._lane(piece.step).ops
        out = self._buffer("_written", piece.nbytes).view(step.dtype.raw)
        out = out.reshape(piece.last_row - piece.first_row, columns)
        for block in self._blocks(step, piece.region, piece.first_row, piece.last_row):
            written = out[block.first_row - piece.first_row :][: block.raw.shape[0]]
            row_factors: list[Array | None] = []
            for tile in block.tiles:
                raw = written[tile.first_row - block.first_row :][: tile.raw.shape[0]]
                row_factors.append(self._merge_tile(ops, piece, tile, changes))
                ops.narrow(tile.values, step.dtype, raw, tile.work)
            sizes = self._buffer("_sizes", written.nbytes).view(step.dtype.raw)
            sizes = sizes.reshape(written.shape)
            if cast.magnitudes(written, step.dtype, sizes):
                self._refuse_nonfinite(step, piece.region, block, written)
            self._refine(ops, piece, block, changes, written, sizes, row_factors)
        self._sink.write(piece.file, piece.offset, out.view(np.uint8))

    def _merge_tile(
        self, ops: Arithmetic, piece: Merge, tile: Tile, changes: list[LoadedChange]
    ) -> Array | None:
        settings = self._settings
        try:
            return merge_tile(ops, tile, changes, settings.zero_norm, settings.strength)
        except UndefinedRows:
            rows = self._zero_rows(piece, changes)
            raise _undefined(piece.step, "rows", rows) from None

    def _refine(
        self,
        ops: Arithmetic,
        piece: Merge,
        block: _Block,
        changes: list[LoadedChange],
        written: NDArray[Any],
        sizes: NDArray[Any],
        row_factors: list[Array | None],
    ) -> None:
        """Compute the cancelled elements of a block again, in float64."""
        if len(changes) != 1 or changes[0].product is None:
            return
        factors = [ops.host(f) for f in row_factors if f is not None]
        recompute_cancelled(
            written,
            block.raw,
            piece.step.source.dtype,
            changes[0].product,
            block.first_row,
            np.concatenate(factors) if factors else None,
            changes[0].column_factor_host,
            sizes,
            self._buffer("_spare", written.size),
        )

    def _tiles(self, step: Step, region: Region, first: int, last: int) -> Iterator[Tile]:
        """Read rows [first, last) and yield them tile by tile, widened."""
        for block in self._blocks(step, region, first, last):
            yield from block.tiles

    def _blocks(self, step: Step, region: Region, first: int, last: int) -> Iterator[_Block]:
        """Read rows [first, last) block by block; the tiles of a block share its stored bytes."""
        itemsize, columns = step.source.dtype.itemsize, region.columns
        lane = self._lane(step)
        size = region.tile_rows(lane.ops.tile_elements)
        block = max(1, self._block_bytes // (columns * itemsize * size)) * size
        for start in range(first, last, block):
            stop = min(start + block, last)
            stored = self._buffer("_stored", (stop - start) * columns * itemsize)
            step.source.source.read((region.start + start * columns) * itemsize, stored)
            raw = stored.view(step.source.dtype.raw).reshape(stop - start, columns)
            yield _Block(raw, start, self._tiles_of(lane, raw, step.source.dtype, start, size))

    def _tiles_of(
        self, lane: _Lane, raw: NDArray[Any], dtype: DType, start: int, size: int
    ) -> Iterator[Tile]:
        for row in range(0, raw.shape[0], size):
            part = raw[row : row + size]
            values, work = lane.arrays(*part.shape)
            lane.ops.widen(part, dtype, values)
            yield Tile(values, work, part, dtype, start + row)

    def _zero_rows(self, piece: Merge, changes: list[LoadedChange]) -> NDArray[np.intp]:
        """Return all rows of the region whose norm is zero although their magnitude is not."""
        found, ops = [], self._lane(piece.step).ops
        for tile in self._tiles(piece.step, piece.region, 0, piece.region.rows):
            for loaded in changes:
                add_delta(ops, tile, loaded)
                if loaded.change.over == "row":
                    assert loaded.magnitude is not None, "Bug: a norm without a magnitude"
                    squares = ops.row_squares(tile.values)
                    _, undefined = factor(ops.xp, loaded.magnitude[tile.rows], squares, 0.0)
                    found.append(np.flatnonzero(ops.host(undefined)) + tile.first_row)
        return np.concatenate(found)

    def _refuse_nonfinite(
        self, step: Step, region: Region, block: _Block, raw: NDArray[Any]
    ) -> None:
        bad = cast.nonfinite(raw, step.dtype)
        rows = np.flatnonzero(bad.any(axis=1))
        stored = cast.nonfinite(block.raw, step.source.dtype)
        if stored.any():
            if not region.changes and np.array_equal(stored, bad):
                return  # the base's own inf or NaN, kept in another dtype
            cause = (
                "the base has inf or NaN there, so the adapter cannot have been trained on it. "
                "Download the base again"
            )
        else:
            cause = (
                f"the result is larger than {step.dtype.name} holds ({step.dtype.largest:g}). "
                "Pass --dtype bf16 or fp32, and check that the adapter was trained on this base"
            )
        name = shown(step.name)
        raise ArithmeticRefusal(
            f"{name}: row {block.first_row + int(rows[0])} would not be finite: {cause}."
        )

    def _buffer(self, name: str, nbytes: int) -> NDArray[np.uint8]:
        buffer: NDArray[np.uint8] = getattr(self, name)
        if buffer.size < nbytes:
            buffer = next(iter(self._lanes.values())).ops.host_buffer(nbytes)
            setattr(self, name, buffer)
        return buffer[:nbytes]


def _with_column_factor(
    ops: Arithmetic, loaded: LoadedChange, scale: NDArray[np.float64]
) -> LoadedChange:
    return replace(loaded, column_factor=ops.as_working(ops.put(scale)), column_factor_host=scale)


def _values(operand: Operand, precision: Any) -> NDArray[Any]:
    """Read an adapter tensor, widen it and arrange it, contiguous."""
    values = operand.value(lambda ref: cast.widened(ref.raw(), ref.dtype, precision))
    return np.ascontiguousarray(values)


def _precision_of(operand: Operand, at_least: Any) -> Any:
    """Return what holds an operand exactly, or as well as float64 can."""
    wide = operand.combine is not None or any(ref.dtype is F64 for ref in operand.refs)
    return np.float64 if wide else at_least


def _is_power_of_two(value: float) -> bool:
    return abs(math.frexp(value)[0]) == 0.5


def _undefined(step: Step, what: str, where: NDArray[np.intp]) -> ArithmeticRefusal:
    listed = ", ".join(map(str, where[:8])) + (" ..." if where.size > 8 else "")
    return ArithmeticRefusal(
        f"{shown(step.name)}: ||W + s B A|| is zero in {where.size} {what} ({listed}) whose "
        "magnitude is not zero, so they have no direction to scale. Pass --zero-norm zero to make "
        "them zero, or --zero-norm keep-base to leave the base's values."
    )
