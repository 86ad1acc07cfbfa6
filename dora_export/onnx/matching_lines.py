"""Packed, padded, sliced and reordered weights: found row by row, and column by column.

Each row of the base is known by a few of its elements, in the graph's type. Rows that are alike
there are told apart by their neighbours: weights are packed in runs. The proof comes afterwards.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dora_export.onnx.encodings import Encoding, Plain, converted
from dora_export.onnx.graph_file import StoredTensor
from dora_export.onnx.lines import Lines, rows_of
from dora_export.onnx.matching import KEPT, Match, Weight
from dora_export.onnx.matching_proof import values_of
from dora_export.tensors import Bytes, DType

SHORTEST = 4  # elements of a row that can tell it from others
ELEMENTS = 8  # compared at the start, in the middle and at the end of a row
BLOCK_BYTES = 4 << 20
Keys = NDArray[np.uint64]
# Takes rows of the base as stored, and their type; returns bytes that tell them apart.
Sample = Callable[[NDArray[Any], DType], Bytes]


@dataclass(frozen=True, eq=False)
class Found:
    """What a stored tensor's lines are.

    Attributes:
        match: Its lines, those of no base row ``KEPT``.
        known: How many lines are rows of the base, lines of zeros left out.
        strange: Lines that are neither rows of the base nor zeros.
        unclear: Lines that could be rows of several base tensors, of which one changes.
    """

    match: Match
    known: int
    strange: NDArray[np.int64]
    unclear: NDArray[np.int64]


def positions(length: int) -> NDArray[np.int64]:
    """Return the positions of the elements by which a row of a length is known."""
    if length <= 3 * ELEMENTS:
        return np.arange(length)
    parts = (0, (length - ELEMENTS) // 2, length - ELEMENTS)
    return np.concatenate([np.arange(start, start + ELEMENTS) for start in parts])


def keys_of(samples: Bytes) -> Keys:
    """Return a 64-bit number for each row of bytes: equal for equal rows, else hardly ever."""
    count, nbytes = samples.shape
    padded = np.zeros((count, -(-nbytes // 4) * 4), np.uint8)
    padded[:, :nbytes] = samples
    words = padded.view(np.uint32)
    factors = np.random.default_rng(7).integers(1, 1 << 63, words.shape[1], dtype=np.uint64)
    keys = np.zeros(count, np.uint64)
    for word, factor in zip(words.T, factors * np.uint64(2) + np.uint64(1), strict=True):
        keys += (word.astype(np.uint64) + np.uint64(1)) * factor
        keys ^= keys >> np.uint64(29)
    return keys


def row_lengths(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the lengths of the rows that a base tensor of a shape can be seen as."""
    if len(shape) < 2 or not all(shape):
        return ()
    flat = int(np.prod(shape[1:]))
    return (flat, shape[2]) if len(shape) == 3 else (flat,)


@dataclass(frozen=True, eq=False)
class Index:
    """All rows of the base of one length, in one type, by their keys.

    Attributes:
        weights: The tensors.
        keys: Sorted.
        weight_of: Position in ``weights`` for each key.
        row_of: The row.
    """

    weights: tuple[Weight, ...]
    keys: Keys
    weight_of: NDArray[np.int32]
    row_of: NDArray[np.int64]

    @classmethod
    def of(cls, weights: Sequence[Weight], length: int, sample: Sample) -> Index:
        """Read some of every row."""
        keys = [base_keys(weight, length, sample) for weight in weights]
        joined = np.concatenate(keys)
        order = np.argsort(joined, kind="stable")
        which = [np.full(found.size, i, np.int32) for i, found in enumerate(keys)]
        rows = [np.arange(found.size) for found in keys]
        return cls(
            tuple(weights), joined[order], np.concatenate(which)[order], np.concatenate(rows)[order]
        )


def base_keys(weight: Weight, length: int, sample: Sample, most: int | None = None) -> Keys:
    """Return the keys of all rows of a base tensor, or of the first ones; a few MB at a time."""
    ref = values_of(weight)
    count = ref.size // length if most is None else min(most, ref.size // length)
    step = max(1, BLOCK_BYTES // (length * ref.dtype.itemsize))
    keys = np.empty(count, np.uint64)
    for first in range(0, count, step):
        last = min(first + step, count)
        keys[first:last] = keys_of(sample(rows_of(ref, length, first, last), ref.dtype))
    return keys


def elements_of(length: int, dtype: DType) -> Sample:
    """Return what takes the elements by which a row of floats is known, in a graph's type."""
    at = positions(length)
    return lambda rows, stored: _bytes(converted(rows[:, at], stored, dtype))


def _bytes(raw: NDArray[Any]) -> Bytes:
    return np.ascontiguousarray(raw).view(np.uint8).reshape(raw.shape[0], -1)


def look_up(
    index: Index, keys: Keys, zero: NDArray[np.bool_], holders: tuple[Lines, ...], like: Match
) -> Found | None:
    """Return what lines are by their keys, or None: nothing.

    Args:
        index: Rows of the base.
        keys: Of the lines.
        zero: Lines that are all zeros.
        holders: The stored tensors as lines.
        like: What else the match says.
    """
    low = np.searchsorted(index.keys, keys, "left")
    high = np.searchsorted(index.keys, keys, "right")
    if not ((high > low) & ~zero).any():
        return None
    which = np.full(keys.size, KEPT, np.int32)
    row = np.zeros(keys.size, np.int64)
    one = high - low == 1
    which[one], row[one] = index.weight_of[low[one]], index.row_of[low[one]]
    unclear = _by_neighbours(index, low, high, which, row)
    zeros = zero & (which == KEPT)
    strange = np.flatnonzero((which == KEPT) & ~zeros & (high == low))
    used = np.unique(which[which != KEPT])
    renumbered = np.full(len(index.weights) + 1, KEPT, np.int32)
    renumbered[used] = np.arange(used.size)
    match = replace(
        like,
        holders=holders,
        weights=tuple(index.weights[i] for i in used),
        weight_of=renumbered[which],
        row_of=row,
    )
    known = int(((which != KEPT) & ~zero).sum())
    return Found(match, known, strange, unclear[~zeros[unclear]])


class ByLines:
    """Looks stored tensors up in the rows of the base; reads the base when it is first asked."""

    def __init__(self, weights: Sequence[Weight]) -> None:
        self.by_length: dict[int, list[Weight]] = defaultdict(list)
        for weight in weights:
            if weight.base is not None:
                for length in dict.fromkeys(row_lengths(weight.base.shape)):
                    self.by_length[length].append(weight)
        self._indexes: dict[tuple[int, str], Index] = {}

    def find(self, tensor: StoredTensor) -> Found | None:
        """Return what a tensor's rows or columns are, whichever says more, or None: nothing."""
        dtype = tensor.dtype
        assert dtype is not None, "Bug: only floating-point tensors are looked up"
        found: list[Found] = []
        for lines in views(tensor, dtype.itemsize):
            if lines.length >= SHORTEST and lines.length in self.by_length:
                index = self.index(lines.length, dtype.name, elements_of(lines.length, dtype))
                at = positions(lines.length)
                keys = line_keys(lines, at)
                zero = keys == keys_of(np.zeros((1, at.size * dtype.itemsize), np.uint8))[0]
                looked = look_up(index, keys, zero, (lines,), unknown(lines, Plain(dtype)))
                if looked is not None and looked.known + looked.unclear.size:
                    found.append(looked)
                    if not looked.strange.size:
                        break
        return max(found, key=lambda f: f.known / f.match.lines.count, default=None)

    def index(self, length: int, name: str, sample: Sample) -> Index:
        """Return all rows of a length, sampled in a way of that name."""
        if (length, name) not in self._indexes:
            self._indexes[length, name] = Index.of(self.by_length[length], length, sample)
        return self._indexes[length, name]


def unknown(lines: Lines, encoding: Encoding, length: int = 0) -> Match:
    """Return a match that says nothing yet of what its lines are."""
    return Match(
        (lines,),
        encoding,
        length or lines.length,
        (),
        np.full(lines.count, KEPT, np.int32),
        np.zeros(lines.count, np.int64),
    )


def views(tensor: StoredTensor, itemsize: int) -> list[Lines]:
    """Return the ways to see a tensor as lines; columns first, of which few bytes are read."""
    shape = tuple(d for d in tensor.shape if d != 1)
    if len(shape) < 2:
        return []
    panels, (rows, columns) = int(np.prod(shape[:-2])), shape[-2:]
    views = [
        Lines(tensor, itemsize, panels, rows, columns, by_column=True),
        Lines(tensor, itemsize, 1, panels * rows, columns),
    ]
    if len(shape) > 2:
        views.append(Lines(tensor, itemsize, 1, shape[0], tensor.size // shape[0]))
    return views


def line_keys(lines: Lines, at: NDArray[np.int64]) -> Keys:
    """Return the keys of all lines, by the elements at some positions."""
    item = lines.itemsize
    source = lines.tensor.source
    assert source is not None, "Bug: only tensors with bytes are looked up"
    if not lines.by_column:
        step = max(1, BLOCK_BYTES // (lines.length * item))
        parts = []
        for first in range(0, lines.count, step):
            block = lines.read(first, min(first + step, lines.count))
            parts.append(keys_of(_bytes(block.view(f"u{item}")[:, at])))
        return np.concatenate(parts)
    keys = np.empty(lines.count, np.uint64)
    for panel in range(lines.panels):
        picked = np.empty((at.size, lines.columns * item), np.uint8)
        for out, row in zip(picked, at.tolist(), strict=True):
            source.read((panel * lines.rows + row) * lines.columns * item, out)
        turned = _bytes(picked.view(f"u{item}").T)
        keys[panel * lines.columns : (panel + 1) * lines.columns] = keys_of(turned)
    return keys


def _by_neighbours(
    index: Index,
    low: NDArray[np.intp],
    high: NDArray[np.intp],
    which: NDArray[np.int32],
    row: NDArray[np.int64],
) -> NDArray[np.int64]:
    """Decide lines that could be several rows by the lines before and after; return the rest.

    Rows that none of the candidates' tensors changes may be any of them.
    """
    several = np.flatnonzero(high - low > 1)
    for order, step in ((several, 1), (several[::-1], -1)):
        for i in order.tolist():
            before = i - step
            if which[i] != KEPT or not 0 <= before < which.size or which[before] == KEPT:
                continue
            here = slice(low[i], high[i])
            goes_on = (index.weight_of[here] == which[before]) & (
                index.row_of[here] == row[before] + step
            )
            if goes_on.any():
                which[i], row[i] = which[before], row[before] + step
    left = []
    for i in several.tolist():
        if which[i] == KEPT:
            candidates = index.weight_of[low[i] : high[i]]
            if any(index.weights[c].changed for c in np.unique(candidates)):
                left.append(i)
            else:
                which[i], row[i] = candidates[0], index.row_of[low[i]]
    return np.array(left, np.int64)
