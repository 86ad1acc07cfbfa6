"""A sink that puts merged rows where a graph holds them, encoded as the graph stores them."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dora_export.onnx.assembly import Assembly
from dora_export.onnx.graph_file import StoredTensor
from dora_export.onnx.layout import Layout
from dora_export.onnx.lines import Lines
from dora_export.onnx.matching import KEPT, Match
from dora_export.onnx.matching_proof import lines_at_once
from dora_export.plan import OutputFile, Plan, Step
from dora_export.tensors import DType, FileRange
from dora_export.writers.files import FileSink

COPY_BYTES = 4 << 20


@dataclass(frozen=True, eq=False)
class Part:
    """The lines of one match that hold rows of one base tensor.

    Attributes:
        match: The match.
        rows: Rows, ascending.
        lines: Where each goes.
    """

    match: Match
    rows: NDArray[np.int64] = field(repr=False)
    lines: NDArray[np.int64] = field(repr=False)


def parts_of(matches: Iterable[Match]) -> dict[str, list[Part]]:
    """Return which lines hold each base tensor, by its name."""
    found: dict[str, list[Part]] = defaultdict(list)
    for match in matches:
        for position, weight in enumerate(match.weights):
            lines = np.flatnonzero(match.weight_of == position)
            rows = match.row_of[lines]
            order = np.argsort(rows, kind="stable")
            found[weight.name].append(Part(match, rows[order], lines[order]))
    return found


def rewriting(plan: Plan, matches: Sequence[Match], dtype: DType) -> Plan:
    """Return a plan of the tensors that some matches hold, each in the type that they take.

    Args:
        plan: The merge.
        matches: Matches to write anew; those whose encoding takes another type are left out.
        dtype: The type.
    """
    steps = {s.name: s for s in plan.steps}
    wanted: dict[str, Step] = {}
    for match in matches:
        if match.encoding.source is not dtype:
            continue
        for weight in match.weights:
            step = weight.step or _unchanged(weight.base, steps[weight.name])
            wanted[weight.name] = replace(step, dtype=dtype)
    return replace(plan, files=(OutputFile("graph", b"", tuple(wanted.values())),))


def _unchanged(base: Any, step: Step) -> Step:
    """Return the step of a tensor that is written beside others that change."""
    return replace(step, source=base, changes=(), status="cast")


Emit = Callable[[Part, int, NDArray[Any]], None]


class Scatter:
    """A ``worker.Sink`` for the one file of a ``rewriting`` plan.

    Args:
        plan: That plan.
        parts: Where its tensors go, by name.
        emit: Called from several threads with a part, the position of the first of its rows, and
            rows in the plan's type, shape ``(rows, length)``.
    """

    def __init__(self, plan: Plan, parts: Mapping[str, Sequence[Part]], emit: Emit) -> None:
        (file,) = plan.files
        self._starts, self._steps = [], []
        for step, offset in file.offsets():
            self._starts.append(offset)
            self._steps.append(step)
        dtypes = {s.name: s.dtype for s in self._steps}
        self._parts = {
            name: [p for p in parts[name] if p.match.encoding.source is dtype]
            for name, dtype in dtypes.items()
        }
        self._emit = emit
        self._lock = threading.Lock()
        self._partial: dict[tuple[str, int], tuple[NDArray[np.uint8], list[int]]] = {}

    def holds(self, file: int, offset: int, nbytes: int) -> bool:
        """Return whether bytes are there already; they never are."""
        return False

    def copy(self, file: int, offset: int, source: FileRange) -> None:
        """Put a range of the base into place."""
        for start in range(0, source.nbytes, COPY_BYTES):
            chunk = np.empty(min(COPY_BYTES, source.nbytes - start), np.uint8)
            source.read(start, chunk)
            self.write(file, offset + start, chunk)

    def write(self, file: int, offset: int, data: NDArray[np.uint8]) -> None:
        """Put merged bytes into place; rows that come in parts are put together first."""
        data = data.reshape(-1)
        while data.size:  # what is copied may reach over several tensors
            position = bisect_right(self._starts, offset) - 1
            step, at = self._steps[position], offset - self._starts[position]
            count = min(data.size, step.nbytes - at)
            self._write(step, at, data[:count])
            offset, data = offset + count, data[count:]

    def _write(self, step: Step, at: int, data: NDArray[np.uint8]) -> None:
        each = self._row_bytes(step)
        if at % each:
            size = min(each - at % each, data.size)
            self._part_of_row(step, at, data[:size], each)
            at, data = at + size, data[size:]
        whole = data.size - data.size % each
        if whole:
            self._rows(step, at // each, data[:whole].reshape(-1, each))
        if whole < data.size:
            self._part_of_row(step, at + whole, data[whole:], each)

    def _row_bytes(self, step: Step) -> int:
        """Return the bytes of the longest rows that a tensor is placed by."""
        length = max(p.match.length for p in self._parts[step.name])
        return length * step.dtype.itemsize

    def _part_of_row(self, step: Step, at: int, data: NDArray[np.uint8], each: int) -> None:
        key = (step.name, at // each)
        with self._lock:
            row, left = self._partial.setdefault(key, (np.empty(each, np.uint8), [each]))
            row[at % each : at % each + data.size] = data
            left[0] -= data.size
            if left[0]:
                return
            del self._partial[key]
        self._rows(step, at // each, row.reshape(1, -1))

    def _rows(self, step: Step, first: int, block: NDArray[np.uint8]) -> None:
        raw = np.ascontiguousarray(block).view(step.dtype.raw)
        for part in self._parts[step.name]:
            times = raw.shape[1] // part.match.length
            rows = raw.reshape(-1, part.match.length)
            start, stop = np.searchsorted(part.rows, [first * times, first * times + len(rows)])
            if start == stop:
                continue
            picked = part.rows[start:stop] - first * times
            whole = stop - start == len(rows) and picked[-1] - picked[0] == len(rows) - 1
            whole = whole and bool((np.diff(picked) == 1).all())
            self._emit(part, int(start), rows if whole else rows[picked])


OnWritten = Callable[[Callable[[], bool]], None]


class Rewriter:
    """Writes the files of a re-weighted graph.

    Args:
        layout: Where everything goes.
        sink: The files, open.
        matches: What is written anew.
        on_written: Called from several threads when a match has been written, with what tells
            whether there are more.
    """

    def __init__(
        self,
        layout: Layout,
        sink: FileSink,
        matches: Sequence[Match],
        on_written: OnWritten = lambda _: None,
    ) -> None:
        self._layout, self._sink, self._on_written = layout, sink, on_written
        self._lock = threading.Lock()
        self._left = {id(m): m.lines.count for m in matches}
        self._assembly = Assembly()

    def copy(self) -> None:
        """Take over all that stays."""
        for piece in self._layout.copied:
            if isinstance(piece.source, bytes):
                data = np.frombuffer(piece.source, np.uint8)
                self._sink.write(piece.file, piece.offset, data)
            else:
                self._sink.copy(piece.file, piece.offset, piece.source)

    def replace(self, parameters: Mapping[StoredTensor, bytes]) -> None:
        """Put new scales and zero points into place."""
        for tensor, data in parameters.items():
            place = self._layout.places[tensor]
            self._sink.write(place.file, place.offset, np.frombuffer(data, np.uint8))

    def keep(self, match: Match) -> None:
        """Take over the lines of a match that hold nothing of the base."""
        kept = np.flatnonzero(match.weight_of == KEPT)
        step = lines_at_once(match)
        for run in np.split(kept, np.flatnonzero(np.diff(kept) != 1) + 1) if kept.size else ():
            for first in range(int(run[0]), int(run[-1]) + 1, step):
                last = min(first + step, int(run[-1]) + 1)
                for lines in match.holders:
                    self._place(lines, first, lines.read(first, last))
        self._done(match, kept.size)

    def emit(self, part: Part, start: int, rows: NDArray[Any]) -> None:
        """Encode rows of a part and put them into place."""
        lines = part.lines[start : start + len(rows)]
        encoded = part.match.encoding.encode(rows)
        breaks = np.flatnonzero(np.diff(lines) != 1) + 1
        for first, last in zip([0, *breaks.tolist()], [*breaks.tolist(), lines.size], strict=True):
            for holder, data in zip(part.match.holders, encoded, strict=True):
                self._place(holder, int(lines[first]), data[first:last])
        self._done(part.match, lines.size)

    def _place(self, lines: Lines, first: int, block: NDArray[np.uint8]) -> None:
        place = self._layout.places[lines.tensor]
        if lines.by_column:
            whole = self._assembly.whole(lines.tensor, place)
            if whole is not None:
                lines.put(first, block, whole)
                return
        for at, stride, rows in lines.placed(first, block):
            self._sink.put(place.file, place.offset + at, stride, rows)

    def _done(self, match: Match, count: int) -> None:
        with self._lock:
            self._left[id(match)] -= count
            complete = self._left[id(match)] == 0
        if complete:
            for lines in match.holders:
                self._finish(lines)
            del self._left[id(match)]
            self._on_written(lambda: bool(self._left))

    def _finish(self, lines: Lines) -> None:
        place = self._layout.places[lines.tensor]
        whole = self._assembly.whole(lines.tensor, place) if lines.by_column else None
        if whole is None:
            self._sink.finish(place.file, place.offset, place.nbytes)
        else:
            self._sink.write(place.file, place.offset, whole)
        self._assembly.release(lines.tensor)
