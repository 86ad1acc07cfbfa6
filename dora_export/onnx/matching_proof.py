"""The proof of a match: the base's rows, encoded, are the graph's bytes; all of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dora_export import fused
from dora_export.onnx.encodings import NeverZero, Plain, converted
from dora_export.onnx.lines import gather, rows_of
from dora_export.onnx.matching import KEPT, Match, Weight
from dora_export.onnx.memory import Memory
from dora_export.tensors import BF16, F16, F32, Bytes, TensorRef

BLOCK_BYTES = 4 << 20  # of lines that are compared at once
COLUMN_BYTES = 4096  # of a row that columns are read from at once: fewer make too many reads
MOST_BYTES = 16 << 20
WHOLE_BYTES, HELD_BYTES = 64 << 20, 160 << 20  # of base rows that are held for one match, for all
MOST_RUNS = 64  # of neighbouring rows that are read one by one
SPREAD = 4  # rows within as many times their number are read in one go


def memory() -> Memory:
    """Return the memory for proofs that go on at the same time."""
    return Memory(HELD_BYTES)


def proven(match: Match, held: Memory | None = None) -> Match | None:
    """Return a match with its proof, or None where the graph holds other bytes.

    Reads both sides once, a few MB at a time, or all of the base's rows of a match whose columns
    they are. float16 that onnxruntime's converter made is told from float16 rounded to nearest
    here: they differ in the tiniest values only.

    Args:
        match: What is to be proven.
        held: Where memory for the base's rows comes from; None: from the system.

    Raises:
        InputError: The base or the graph cannot be read.
    """
    same = _columns_are_rows(match, memory() if held is None else held)
    if same is not None:
        return replace(match, evidence="bytes") if same else _otherwise(match)
    step = lines_at_once(match)
    for first in range(0, match.lines.count, step):
        last = min(first + step, match.lines.count)
        expected = encoded(match, first, last)
        kept = match.weight_of[first:last] == KEPT
        for holder, mine in zip(match.holders, expected, strict=True):
            if kept.any():
                mine[kept] = holder.read(first, last)[kept]
            if not holder.hold(first, mine):
                return _otherwise(match)
    return replace(match, evidence="bytes")


def _columns_are_rows(match: Match, held: Memory) -> bool | None:
    """Return whether the columns of a matrix are rows of the base, all of them.

    The graph is read in the order of its bytes, and the base's rows are held against it as they are
    stored: neither is turned or converted first, and no piece of a row is read by itself.

    Returns:
        None where it has to be found out in another way.
    """
    lines, source = match.lines, match.tensor.source
    runs = _runs(match)
    if not runs or source is None or not fused.available():
        return None
    dtype = values_of(match.weights[0]).dtype
    each = match.length * dtype.itemsize
    if (piece := held.take(lines.count * each)) is None:
        return None
    try:
        rows = piece[: lines.count * each].reshape(lines.count, each)
        for position, row, line, count in runs:
            base = values_of(match.weights[position]).source
            base.read(row * each, rows[line : line + count].reshape(-1))
        across = lines.columns * lines.itemsize
        step = max(1, BLOCK_BYTES // across)
        band = np.empty((min(step, lines.rows), across), np.uint8)
        for first in range(0, lines.rows, step):
            part = band[: min(step, lines.rows - first)]
            source.read(first * across, part.reshape(-1))
            stored = part.view(f"u{lines.itemsize}")
            if not fused.is_turned(rows.view(dtype.raw), stored, first):
                return False
        return True
    finally:
        held.give(piece)


def _runs(match: Match) -> list[tuple[int, int, int, int]]:
    """Return what the columns of one matrix are, if rows of the base as they are, or widened.

    Returns:
        Position of the weight, first row, first line, how many, for neighbours; none: it is another
        kind of match, or one of too many pieces, or too large.
    """
    lines, encoding = match.lines, match.encoding
    if not (lines.by_column and lines.panels == 1 and len(match.holders) == 1):
        return []
    if not isinstance(encoding, Plain) or encoding.inner is not None or not lines.count:
        return []
    types = {values_of(w).dtype for w in match.weights}
    if len(types) != 1 or (match.weight_of == KEPT).any():
        return []
    (dtype,) = types
    widened = dtype is BF16 and encoding.dtype is F32
    if not (dtype is encoding.dtype or widened) or lines.itemsize != encoding.dtype.itemsize:
        return []
    if lines.count * match.length * dtype.itemsize > WHOLE_BYTES:
        return []
    which, row = match.weight_of, match.row_of
    breaks = (which[1:] != which[:-1]) | (row[1:] != row[:-1] + 1)
    starts: list[int] = [0, *(np.flatnonzero(breaks) + 1).tolist()]
    if len(starts) > MOST_RUNS:
        return []
    stops = [*starts[1:], which.size]
    return [(int(which[a]), int(row[a]), a, b - a) for a, b in zip(starts, stops, strict=True)]


def _otherwise(match: Match) -> Match | None:
    encoding = match.encoding
    if isinstance(encoding, Plain) and encoding.dtype is F16 and encoding.inner is None:
        return proven(replace(match, encoding=NeverZero()))
    return None


def lines_at_once(match: Match) -> int:
    """Return how many lines to take at once."""
    lines = match.lines
    each = max(1, lines.length * lines.itemsize, match.length * match.encoding.source.itemsize)
    count = BLOCK_BYTES // each
    if lines.by_column:
        count = max(count, COLUMN_BYTES // lines.itemsize)
    return max(1, min(count, MOST_BYTES // each))


def encoded(match: Match, first: int, last: int) -> tuple[Bytes, ...]:
    """Return what lines ``[first, last)`` of each holder are by the base; kept ones undefined."""
    rows = np.zeros((last - first, match.length), match.encoding.source.raw)
    which, row = match.weight_of[first:last], match.row_of[first:last]
    for position in np.unique(which[which != KEPT]):
        here = which == position
        base = values_of(match.weights[position])
        stored = take_rows(base, match.length, row[here])
        found = converted(stored, base.dtype, match.encoding.source)
        if here.all():
            rows = found
        else:
            rows[here] = found
    return match.encoding.encode(rows)


def values_of(weight: Weight) -> TensorRef:
    """Return the base's values of a weight that has been found."""
    assert weight.base is not None, "Bug: a weight without values was found in the graph"
    return weight.base


def take_rows(ref: TensorRef, length: int, rows: NDArray[np.int64]) -> NDArray[Any]:
    """Return some rows of a base tensor as stored, shape ``(len(rows), length)``.

    Raises:
        InputError: The base cannot be read.
    """
    first, last = int(rows.min()), int(rows.max()) + 1
    if last - first <= SPREAD * rows.size:
        block = rows_of(ref, length, first, last)
        return block if last - first == rows.size and _ascend(rows) else block[rows - first]
    each = length * ref.dtype.itemsize
    out = np.empty((rows.size, each), np.uint8)
    gather(ref.source, rows * each, out)
    return out.view(ref.dtype.raw)


def _ascend(rows: NDArray[np.int64]) -> bool:
    return bool((rows[1:] == rows[:-1] + 1).all())
