"""Which bytes of a file are there: sorted ranges that neither overlap nor touch."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator


class Ranges:
    """A set of bytes, held as ranges ``[start, stop)``; neighbours are joined as they come.

    Args:
        ranges: (start, stop) pairs in any order; they may overlap.
    """

    def __init__(self, ranges: Iterable[tuple[int, int]] = ()) -> None:
        self._starts: list[int] = []
        self._stops: list[int] = []
        for start, stop in ranges:
            self.add(start, stop)

    def add(self, start: int, stop: int) -> None:
        """Put the bytes ``[start, stop)`` in; some may be in already."""
        if start >= stop:
            return
        first = bisect_left(self._stops, start)  # the first range that ends at start or later
        last = bisect_right(self._starts, stop)  # one past the last that begins at stop or before
        if first < last:
            start = min(start, self._starts[first])
            stop = max(stop, self._stops[last - 1])
        self._starts[first:last] = [start]
        self._stops[first:last] = [stop]

    def update(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Put all bytes of several ranges in."""
        for start, stop in ranges:
            self.add(start, stop)

    def covers(self, start: int, stop: int) -> bool:
        """Return whether all of the bytes ``[start, stop)`` are in."""
        at = bisect_right(self._starts, start) - 1
        return start >= stop or (at >= 0 and stop <= self._stops[at])

    def touches(self, start: int, stop: int) -> bool:
        """Return whether any of the bytes ``[start, stop)`` is in."""
        at = bisect_right(self._stops, start)  # the first range that ends after start
        return start < stop and at < len(self._starts) and self._starts[at] < stop

    @property
    def nbytes(self) -> int:
        """How many bytes are in."""
        return sum(stop - start for start, stop in self)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(list(zip(self._starts, self._stops, strict=True)))

    def __bool__(self) -> bool:
        return bool(self._starts)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Ranges) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]  # it changes

    def __repr__(self) -> str:
        return f"Ranges({list(self)})"
