"""One worker: its arithmetic, its buffers, and how it runs a piece.

Workers share the numbers of a region (``LoadedChange``) and nothing else. Where bytes go is the
business of a ``Sink``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from dora_export import cast, fused
from dora_export.arithmetic import Arithmetic, Array
from dora_export.errors import ArithmeticRefusal, shown
from dora_export.formula import (
    CoarseRows,
    LoadedChange,
    Tile,
    UndefinedRows,
    add_delta,
    alone,
    merge_tile,
)
from dora_export.paged import PAGE, placed
from dora_export.pieces import ColumnSquares, Copy, Merge, Region, regions
from dora_export.plan import Precision, Settings, Step
from dora_export.refine import product, recompute_cancelled
from dora_export.row_factor import coarse, factor
from dora_export.tensors import BF16, F32, F64, DType, FileRange, Operand
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
        not r.composed
        and all(c.kind in ("lora", "dora", "magnitude", "rows") for c in r.changes)
        and all(isinstance(c.delta, Product | None) for c in r.changes)
        for r in regions(step)
    )
    return "float32" if simple and step.dtype is BF16 and settings.strength == 1 else "float64"


@dataclass
class _Lane:
    """A worker's arithmetic in one precision, with its buffers."""

    ops: Arithmetic
    buffers: list[Array] = field(default_factory=list)

    def arrays(self, rows: int, columns: int, count: int) -> list[Array]:
        """Return arrays of a tile's shape, undefined: values, scratch, and more where needed."""
        size = rows * columns
        if self.buffers and self.buffers[0].shape[0] < size:
            self.buffers.clear()
        while len(self.buffers) < count:
            self.buffers.append(self.ops.empty(self.buffers[0].shape[0] if self.buffers else size))
        return [buffer[:size].reshape(rows, columns) for buffer in self.buffers[:count]]


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
        self._laned: Step | None = None  # the step whose lane is ...
        self._lane_now: _Lane
        self._precision_now: Precision
        self._stored = self._written = self._sizes = self._spare = np.empty(0, np.uint8)

    def _lane(self, step: Step) -> _Lane:
        if step is not self._laned:
            precision = working_precision(step, self._settings)
            if precision not in self._lanes:
                self._lanes[precision] = _Lane(self._make(precision))
            self._laned, self._lane_now = step, self._lanes[precision]
            self._precision_now = precision
        return self._lane_now

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
        ops = self._lane(step).ops
        precision = self._precision_now
        loaded = [self._load(ops, change, precision) for change in region.changes]
        loaded = [self._with_whole(ops, step, region, change) for change in loaded]
        if _for_kernel(step, region, ops, self._settings):
            shape = (region.rows, region.columns)
            kernel = (fused.Factors.of(loaded[0].product, *shape) if precision == "float32"
                      else fused.WideFactors.of(loaded[0].factors, *shape))  # fmt: skip
            loaded[0] = replace(loaded[0], kernel=kernel)
        return loaded

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
            first, *rest = (
                cast.operand_values(o, _precision_of(o, wide)) for o in change.delta.operands
            )
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
            m = cast.operand_values(change.magnitude, np.float64)
            loaded = replace(loaded, magnitude=ops.put(m))
            if change.magnitude_is_factor and change.over == "column":
                loaded = _with_column_factor(ops, loaded, np.repeat(m, change.group))
        if change.kind == "rows":
            assert change.value is not None, "Bug: kind rows carries a value"
            loaded = replace(
                loaded, value=ops.put(cast.operand_values(Operand.matrix(change.value), wide))
            )
        elif change.value is not None:
            loaded = replace(loaded, stored=change.value.raw)
        return loaded

    def column_squares(
        self, piece: ColumnSquares, changes: list[LoadedChange]
    ) -> NDArray[np.float64]:
        """Return the columns' sums of squares of V over the piece's rows, tile after tile.

        Returns:
            One row of sums per column change, float64.
        """
        region, ops = piece.region, self._lane(piece.step).ops
        total = np.zeros((len(region.column_changes), region.columns))
        for tile in self._tiles(piece.step, region, piece.first_row, piece.last_row):
            for i, position in enumerate(region.column_changes):
                values = _column_values(ops, tile, changes, position)
                total[i] += ops.host(ops.column_squares(values, tile.work))
        return total

    def with_factors(
        self, piece: ColumnSquares, loaded: LoadedChange, squares: NDArray[np.float64]
    ) -> LoadedChange:
        """Return the change with ``m / (norm + eps)`` per column."""
        change = loaded.change
        grouped = squares.reshape(-1, change.group).sum(axis=1)
        assert change.magnitude is not None, "Bug: a norm without a magnitude"
        magnitude = cast.operand_values(change.magnitude, np.float64)
        scale, undefined = factor(np, magnitude, grouped, change.eps)
        if self._precision_now == "float32":
            count = piece.region.rows * change.group
            wrong = coarse(np, scale, grouped, count)
            if wrong.any():
                raise _coarse(piece.step, "columns", np.flatnonzero(wrong))
        if undefined.any() and self._settings.zero_norm == "refuse":
            raise _undefined(piece.step, "columns", np.flatnonzero(undefined))
        ops = self._lane(piece.step).ops
        return replace(
            _with_column_factor(ops, loaded, np.repeat(scale, change.group)),
            undefined_columns=np.flatnonzero(np.repeat(undefined, change.group)),
        )

    def merge(self, piece: Merge, changes: list[LoadedChange]) -> None:
        """Merge the piece's rows and hand their bytes to the sink."""
        self._lane(piece.step)  # its library gives the buffers
        out = self._out(piece)
        compiled = bool(changes) and changes[0].kernel is not None
        for block in self._blocks(piece.step, piece.region, piece.first_row, piece.last_row):
            written = out[block.first_row - piece.first_row :][: block.raw.shape[0]]
            if compiled:
                self._merge_compiled(piece, block, changes[0], written)
            else:
                self._merge_tiles(piece, block, changes, written)
        self._sink.write(piece.file, piece.offset, out.view(np.uint8))

    def _out(self, piece: Merge) -> NDArray[Any]:
        """Return where the piece's rows are put together: as they lie in the file's pages."""
        offset = piece.offset if piece.offset % piece.step.dtype.itemsize == 0 else 0
        buffer = self._buffer("_written", piece.nbytes + PAGE)
        out = placed(buffer, offset, piece.nbytes).view(piece.step.dtype.raw)
        return out.reshape(piece.last_row - piece.first_row, piece.region.columns)

    def _merge_tiles(
        self, piece: Merge, block: _Block, changes: list[LoadedChange], written: NDArray[Any]
    ) -> None:
        """Merge a block tile by tile with the array library."""
        ops, dtype = self._lane(piece.step).ops, piece.step.dtype
        row_factors: list[Array | None] = []
        for tile in block.tiles:
            raw = written[tile.first_row - block.first_row :][: tile.raw.shape[0]]
            row_factors.append(self._merge_tile(ops, piece, tile, changes))
            ops.narrow(tile.values, dtype, raw, tile.work)
        sizes = self._buffer("_sizes", written.nbytes).view(dtype.raw).reshape(written.shape)
        if cast.magnitudes(written, dtype, sizes):
            self._refuse_nonfinite(piece.step, piece.region, block, written)
        if len(changes) == 1 and changes[0].product is not None:
            factors = [ops.host(f) for f in row_factors if f is not None]
            row_factor = np.concatenate(factors) if factors else None
            recompute_cancelled(
                written,
                block.raw,
                piece.step.source.dtype,
                changes[0].product,
                block.first_row,
                row_factor,
                changes[0].column_factor_host,
                sizes,
                self._buffer("_spare", written.size),
            )

    def _merge_compiled(
        self, piece: Merge, block: _Block, loaded: LoadedChange, written: NDArray[Any]
    ) -> None:
        """Merge a block of rows with the compiled kernel."""
        merged = _compiled(block, loaded, written)  # cancelled elements and all
        if merged.undefined.size and self._settings.zero_norm == "refuse":
            raise _undefined(piece.step, "rows", self._zero_rows(piece, [loaded]))
        if merged.nonfinite:
            self._refuse_nonfinite(piece.step, piece.region, block, written)
        if merged.coarse.size:
            raise _coarse(piece.step, "rows", merged.coarse)
        if self._settings.zero_norm == "keep-base":
            dtype, kept = piece.step.source.dtype, merged.undefined - block.first_row
            written[kept] = _restored(block.raw[kept], dtype, piece.step.dtype)
            if (columns := loaded.undefined_columns) is not None:
                base = _restored(block.raw[:, columns], dtype, piece.step.dtype)
                written[:, columns] = base

    def _merge_tile(
        self, ops: Arithmetic, piece: Merge, tile: Tile, changes: list[LoadedChange]
    ) -> Array | None:
        settings = self._settings
        try:
            return merge_tile(ops, tile, changes, settings.zero_norm, settings.strength)
        except UndefinedRows:
            rows = self._zero_rows(piece, changes)
            raise _undefined(piece.step, "rows", rows) from None
        except CoarseRows as found:
            raise _coarse(piece.step, "rows", found.rows) from None

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
            yield _Block(raw, start, self._tiles_of(lane, step, region, raw, start, size))

    def _tiles_of(
        self, lane: _Lane, step: Step, region: Region, raw: NDArray[Any], start: int, size: int
    ) -> Iterator[Tile]:
        dtype = step.source.dtype
        for row in range(0, raw.shape[0], size):
            part = raw[row : row + size]
            count = 4 if region.composed else 2
            values, work, *spare = lane.arrays(part.shape[0], part.shape[1], count)
            lane.ops.widen(part, dtype, values)
            spares = (spare[0], spare[1]) if spare else None
            yield Tile(values, work, part, dtype, start + row, spares)

    def _zero_rows(self, piece: Merge, changes: list[LoadedChange]) -> NDArray[np.intp]:
        """Return all rows of the region whose norm is zero although their magnitude is not."""
        found, ops = [], self._lane(piece.step).ops
        if changes[0].kernel is not None:
            for block in self._blocks(piece.step, piece.region, 0, piece.region.rows):
                out = np.empty(block.raw.shape, piece.step.dtype.raw)
                merged = _compiled(block, changes[0], out)
                found.append(merged.undefined)
            return np.concatenate(found)
        for tile in self._tiles(piece.step, piece.region, 0, piece.region.rows):
            for loaded in changes:
                own = alone(ops, tile, loaded) if loaded.change.own_norm else None
                add_delta(ops, tile, loaded)
                if loaded.change.over == "row":
                    assert loaded.magnitude is not None, "Bug: a norm without a magnitude"
                    squares = ops.row_squares(tile.values if own is None else own)
                    _, undefined = factor(
                        ops.xp, loaded.magnitude[tile.rows], squares, loaded.change.eps
                    )
                    found.append(np.flatnonzero(ops.host(undefined)) + tile.first_row)
        return np.unique(np.concatenate(found))

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


def _column_values(
    ops: Arithmetic, tile: Tile, changes: list[LoadedChange], position: int
) -> Array:
    """Return V of the change at a position, whose columns are to be summed up."""
    loaded = changes[position]
    if loaded.change.own_norm:
        return alone(ops, tile, loaded)
    for earlier in changes[: position + 1]:
        add_delta(ops, tile, earlier)
    return tile.values


def _compiled(block: _Block, loaded: LoadedChange, written: NDArray[Any]) -> fused.Merged:
    """Run the compiled kernel on a block."""
    assert loaded.kernel is not None, "Bug: not loaded for the kernel"
    change, by_row = loaded.change, loaded.change.over == "row"
    mode: fused.Mode = "none" if not by_row else "given" if change.magnitude_is_factor else "norm"
    magnitude = loaded.magnitude if by_row else None
    columns = loaded.column_factor_host
    if isinstance(loaded.kernel, fused.WideFactors):
        return fused.merge_wide(
            block.raw, written, loaded.kernel, block.first_row,
            mode=mode, magnitude=magnitude, eps=change.eps, column_factor=columns,
        )  # fmt: skip
    return fused.merge(
        block.raw, written, loaded.kernel, block.first_row,
        mode=mode, magnitude=magnitude, eps=change.eps, column_factor=columns,
    )  # fmt: skip


def _restored(raw: NDArray[Any], dtype: DType, target: DType) -> NDArray[Any]:
    """Return the base's own elements in the output's type: as they are, or widened to float32."""
    return raw if dtype is target else cast.widened(raw, dtype, np.float32).view(target.raw)


def _for_kernel(step: Step, region: Region, ops: Arithmetic, settings: Settings) -> bool:
    """Return whether a region's merge is what a compiled kernel does.

    One of them merges BF16 into BF16, in float32 with what cancels in float64, the other BF16 or
    F32 into F32, in float64.
    """
    precision = working_precision(step, settings)
    types = (
        step.source.dtype is step.dtype is BF16
        if precision == "float32"
        else step.source.dtype in (BF16, F32) and step.dtype is F32
    )
    return (
        ops.compiled
        and types
        and settings.strength == 1
        and len(region.changes) == 1
        and not region.composed
        and region.changes[0].kind in ("lora", "dora", "magnitude")
        and isinstance(region.changes[0].delta, Product | None)
    )


def _with_column_factor(
    ops: Arithmetic, loaded: LoadedChange, scale: NDArray[np.float64]
) -> LoadedChange:
    return replace(loaded, column_factor=ops.as_working(ops.put(scale)), column_factor_host=scale)


def _precision_of(operand: Operand, at_least: Any) -> Any:
    """Return what holds an operand exactly, or as well as float64 can."""
    wide = operand.combine is not None or any(ref.dtype is F64 for ref in operand.refs)
    return np.float64 if wide else at_least


def _is_power_of_two(value: float) -> bool:
    return abs(math.frexp(value)[0]) == 0.5


def _coarse(step: Step, what: str, where: NDArray[np.intp]) -> ArithmeticRefusal:
    listed = ", ".join(map(str, where[:8])) + (" ..." if where.size > 8 else "")
    return ArithmeticRefusal(
        f"{shown(step.name)}: W + s B A is too large or too small in {where.size} {what} "
        f"({listed}) for its norm to be summed up in float32. Pass --precision float64; and check "
        "that the base is not damaged."
    )


def _undefined(step: Step, what: str, where: NDArray[np.intp]) -> ArithmeticRefusal:
    listed = ", ".join(map(str, where[:8])) + (" ..." if where.size > 8 else "")
    return ArithmeticRefusal(
        f"{shown(step.name)}: ||W + s B A|| is zero in {where.size} {what} ({listed}) whose "
        "magnitude is not zero, so they have no direction to scale. Pass --zero-norm zero to make "
        "them zero, or --zero-norm keep-base to leave the base's values."
    )
