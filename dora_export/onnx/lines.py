"""Stored tensors seen as lines of equal length: the rows or the columns of a matrix.

A line of a graph's tensor holds one row of a base tensor, wherever an exporter has put it. Reading
and writing go by ranges of lines, so that no tensor is ever held whole.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dora_export import fused
from dora_export.errors import InputError
from dora_export.machine import advice
from dora_export.onnx.graph_file import StoredTensor
from dora_export.tensors import Bytes, FileRange, HeldBytes, Source, TensorRef

GLIMPSE = 8  # elements in the middle of a line
STRIP_ROWS, STRIP_COLUMNS = 32, 1024  # turned at once

# Offset of the first byte within the tensor, distance between rows of bytes, rows of bytes.
Strided = tuple[int, int, Bytes]


@dataclass(frozen=True)
class Lines:
    """Equal panels of a stored tensor, each a matrix whose rows or columns are the lines.

    Attributes:
        tensor: The stored tensor; ``panels * rows * columns`` elements.
        itemsize: Bytes of one element here (bytes themselves may be the elements).
        panels: Matrices, one after the other (experts); mostly 1.
        rows: Rows of one matrix.
        columns: Columns of one matrix.
        by_column: Whether columns are the lines, as in ``x @ W`` with ``W`` of (in, out).
    """

    tensor: StoredTensor
    itemsize: int
    panels: int
    rows: int
    columns: int
    by_column: bool = False

    @property
    def count(self) -> int:
        """Number of lines."""
        return self.panels * (self.columns if self.by_column else self.rows)

    @property
    def length(self) -> int:
        """Elements of one line."""
        return self.rows if self.by_column else self.columns

    def read(self, first: int, last: int) -> Bytes:
        """Return the lines ``[first, last)`` as bytes, shape ``(last - first, line bytes)``.

        Raises:
            InputError: The file ends too early or cannot be read.
        """
        source = self.tensor.source
        assert source is not None, f"Bug: {self.tensor.name} has no bytes"
        if not self.by_column:
            each = self.columns * self.itemsize
            out = np.empty((last - first, each), np.uint8)
            source.read(first * each, out)
            return out
        parts = [
            _transposed(_columns(self, source, panel, start, stop), self.itemsize)
            for panel, start, stop in self._panels(first, last)
        ]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def hold(self, first: int, block: Bytes) -> bool:
        """Return whether the lines from ``first`` on are these bytes, all of them.

        Columns are compared as they lie, without being turned.

        Raises:
            InputError: The file ends too early or cannot be read.
        """
        source, last = self.tensor.source, first + block.shape[0]
        assert source is not None, f"Bug: {self.tensor.name} has no bytes"
        if not self.by_column:
            return _same(block, self.read(first, last))
        done = 0
        for panel, start, stop in self._panels(first, last):
            stored = _columns(self, source, panel, start, stop)
            expected = block[done : done + stop - start]
            done += stop - start
            item = f"u{self.itemsize}"
            same = fused.is_turned(expected.view(item), stored.view(item))
            if same is None:
                same = _same(expected, _transposed(stored, self.itemsize))
            if not same:
                return False
        return True

    def placed(self, first: int, block: Bytes) -> Iterator[Strided]:
        """Yield where the bytes of some lines go.

        Args:
            first: The first of the lines.
            block: Their bytes, shape ``(lines, line bytes)``.
        """
        if not self.by_column:
            yield first * block.shape[1], block.nbytes, block.reshape(1, -1)
            return
        done = 0
        for panel, start, stop in self._panels(first, first + block.shape[0]):
            count = stop - start
            turned = _transposed(block[done : done + count], self.itemsize)
            at = (panel * self.rows * self.columns + start) * self.itemsize
            if count == self.columns:
                yield at, turned.nbytes, turned.reshape(1, -1)
            else:
                yield at, self.columns * self.itemsize, turned
            done += count

    def put(self, first: int, block: Bytes, whole: Bytes) -> None:
        """Put columns into place in memory.

        Args:
            first: The first of them.
            block: Their bytes, shape ``(lines, line bytes)``.
            whole: The bytes of the stored tensor.
        """
        assert self.by_column, "Bug: rows lie together and are written as they come"
        done, stride = 0, self.columns * self.itemsize
        for panel, start, stop in self._panels(first, first + block.shape[0]):
            part = block[done : done + stop - start]
            done += stop - start
            at = panel * self.rows * stride + start * self.itemsize
            if not fused.turn_into(part.view(f"u{self.itemsize}"), whole, at, stride):
                turned = _transposed(part, self.itemsize)
                panes = whole[panel * self.rows * stride :][: self.rows * stride]
                place = panes.reshape(self.rows, stride)[:, start * self.itemsize :]
                place[:, : turned.shape[1]] = turned

    def _panels(self, first: int, last: int) -> Iterator[tuple[int, int, int]]:
        """Yield panel, first and last column of the parts of a range of lines."""
        while first < last:
            panel, column = divmod(first, self.columns)
            stop = min(self.columns, column + last - first)
            yield panel, column, stop
            first += stop - column


def _same(a: Bytes, b: Bytes) -> bool:
    if a.shape == b.shape and a.shape[-1] % 8 == 0:
        one, other = (np.ascontiguousarray(x).view(np.uint64) for x in (a, b))
        return np.array_equal(one, other)
    return np.array_equal(a, b)


def glimpse(lines: Lines) -> Bytes:
    """Return some bytes of every line: equal for equal lines, and quick to read.

    Raises:
        InputError: The file ends too early or cannot be read.
    """
    source = lines.tensor.source
    assert source is not None, f"Bug: {lines.tensor.name} has no bytes"
    item, across = lines.itemsize, lines.columns * lines.itemsize
    if not lines.by_column:
        width = min(GLIMPSE * item, across)
        out = np.empty((lines.count, width), np.uint8)
        _read_strided(source, (across - width) // 2 // item * item, across, out)
        return out
    rows = min(GLIMPSE, lines.rows)
    first = (lines.rows - rows) // 2
    found = np.empty((lines.panels, rows, across), np.uint8)
    for panel in range(lines.panels):
        source.read((panel * lines.rows + first) * across, found[panel].reshape(-1))
    split = found.reshape(lines.panels, rows, lines.columns, item)
    return np.ascontiguousarray(split.transpose(0, 2, 1, 3)).reshape(lines.count, rows * item)


def _columns(
    lines: Lines, source: FileRange | HeldBytes, panel: int, start: int, stop: int
) -> Bytes:
    """Return columns of a panel as they are stored, shape ``(rows, bytes)``."""
    item, columns = lines.itemsize, lines.columns
    out = np.empty((lines.rows, (stop - start) * item), np.uint8)
    at = (panel * lines.rows * columns + start) * item
    if stop - start == columns:
        source.read(at, out)
    else:
        _read_strided(source, at, columns * item, out)
    return out


def _read_strided(source: FileRange | HeldBytes, at: int, stride: int, out: Bytes) -> None:
    """Read rows of bytes that lie equally far apart.

    Raises:
        InputError: The file ends too early or cannot be read.
    """
    if isinstance(source, FileRange):
        with _opened(source.path) as descriptor:
            whole = fused.read_rows(descriptor, source.start + at, stride, out)
        if whole:
            return
        if whole is False:
            raise _too_short(source.path, source.start + source.nbytes)
    gather(source, at + np.arange(out.shape[0]) * stride, out)


def _transposed(block: Bytes, itemsize: int) -> Bytes:
    """Return the transpose of elements given as bytes, contiguous.

    Without the compiled kernel, some rows at a time go through a buffer whose rows are not a power
    of two apart: columns of a matrix as wide as weights are all fall into the same few places of
    the cache.
    """
    values = block.view(f"u{itemsize}")
    if (quickly := fused.turned(values)) is not None:
        return quickly.view(np.uint8)
    rows, columns = values.shape
    turned = np.empty((columns, rows), values.dtype)
    strip = np.empty((STRIP_ROWS, STRIP_COLUMNS + 64 // itemsize), values.dtype)
    for column in range(0, columns, STRIP_COLUMNS):
        last = min(column + STRIP_COLUMNS, columns)
        for row in range(0, rows, STRIP_ROWS):
            part = strip[: min(STRIP_ROWS, rows - row), : last - column]
            np.copyto(part, values[row : row + STRIP_ROWS, column:last])
            turned[column:last, row : row + STRIP_ROWS] = part.T
    return turned.view(np.uint8)


def gather(source: Source, offsets: NDArray[Any], out: Bytes) -> None:
    """Read equally long pieces of bytes, one row of ``out`` for each offset.

    Raises:
        InputError: The file ends too early or cannot be read.
    """
    if not isinstance(source, FileRange):
        for row, offset in zip(out, offsets.tolist(), strict=True):
            source.read(offset, row)
        return
    length = out.shape[1]
    with _opened(source.path) as descriptor:
        read = _reader(descriptor)
        for row, offset in zip(out, (offsets + source.start).tolist(), strict=True):
            if read(row.data, offset) != length:
                raise _too_short(source.path, offset + length)


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    """Open a file to read; what goes wrong with it is told as a refusal."""
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        try:
            yield descriptor
        finally:
            os.close(descriptor)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}. {advice(error)}") from error


def _too_short(path: Path, nbytes: int) -> InputError:
    return InputError(
        f"{path}: ends before byte {nbytes}. The file changed while it was read; copy it again."
    )


def _reader(descriptor: int) -> Callable[[memoryview, int], int]:
    if hasattr(os, "preadv"):
        return lambda view, offset: os.preadv(descriptor, [view], offset)

    def read(view: memoryview, offset: int) -> int:  # macOS before 11, Windows
        os.lseek(descriptor, offset, os.SEEK_SET)
        found = os.read(descriptor, len(view))
        view[: len(found)] = found
        return len(found)

    return read


@dataclass(frozen=True, eq=False)
class GatheredBytes(HeldBytes):
    """A base tensor's elements, in its own order, read from the lines of a graph's tensors.

    Attributes:
        rows: Number of rows of the base tensor that there are.
        row_bytes: Bytes of one row.
        fetch: Returns rows ``[first, last)`` as bytes, shape ``(last - first, row_bytes)``.
    """

    rows: int = 0
    row_bytes: int = 1
    fetch: Callable[[int, int], Bytes] = lambda first, last: np.empty((last - first, 1), np.uint8)

    @classmethod
    def of(
        cls, path: Path, rows: int, row_bytes: int, fetch: Callable[[int, int], Bytes]
    ) -> GatheredBytes:
        """Return what reads through ``fetch``."""
        return cls(path, np.empty(0, np.uint8), rows, row_bytes, fetch)

    @property
    def nbytes(self) -> int:
        """Number of bytes."""
        return self.rows * self.row_bytes

    def read(self, start: int, out: Bytes) -> None:
        """Fill ``out`` with the bytes from ``start``; reads the whole rows that they lie in."""
        first, last = start // self.row_bytes, -(-(start + out.size) // self.row_bytes)
        begin = start - first * self.row_bytes
        found = self.fetch(first, last).reshape(-1)
        np.copyto(out.reshape(-1), found[begin : begin + out.size])


def rows_of(ref: TensorRef, length: int, first: int, last: int) -> NDArray[Any]:
    """Return rows of a base tensor as stored, ``length`` elements each, shape ``(rows, length)``.

    Raises:
        InputError: The file ends too early or cannot be read.
    """
    return ref.raw(first * length, last * length).reshape(last - first, length)
