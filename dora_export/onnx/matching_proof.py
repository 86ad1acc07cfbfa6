"""The proof of a match: the base's rows, encoded, are the graph's bytes; all of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dora_export.onnx.encodings import NeverZero, Plain, converted
from dora_export.onnx.lines import gather, rows_of
from dora_export.onnx.matching import KEPT, Match, Weight
from dora_export.tensors import F16, Bytes, TensorRef

BLOCK_BYTES = 4 << 20  # of lines that are compared at once
COLUMN_BYTES = 4096  # of a row that columns are read from at once: fewer make too many reads
MOST_BYTES = 16 << 20
SPREAD = 4  # rows within as many times their number are read in one go


def proven(match: Match) -> Match | None:
    """Return a match with its proof, or None where the graph holds other bytes.

    Reads both sides once, a few MB at a time. float16 that onnxruntime's converter made is told
    from float16 rounded to nearest here: they differ in the tiniest values only.

    Raises:
        InputError: The base or the graph cannot be read.
    """
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
