"""Parts of pages that wait in memory until the rest of their page comes, to be written whole.

Rows and tensors seldom end where pages do. Linux lets nobody else write to a file while a part of a
page goes into it, and waits for all writes past the cache first; so neighbours put their common
page together here, and it goes past the cache like the others.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from dora_export.paged import EDGE_BYTES, PAGE, placed
from dora_export.writers.ranges import Ranges

MOST_PAGES = EDGE_BYTES // (2 * PAGE)  # each takes up to twice its size, to lie as files do


@dataclass
class Page:
    """One page of a file.

    Attributes:
        file: Position of the file.
        offset: Where in it the page begins.
        data: Its bytes, in memory that lies as files do.
        put: Which bytes of the file are in ``data``.
    """

    file: int
    offset: int
    data: NDArray[np.uint8] = field(
        default_factory=lambda: placed(np.zeros(2 * PAGE, np.uint8), 0, PAGE)
    )
    put: Ranges = field(default_factory=Ranges)


class Edges:
    """The pages that wait, of all files; called from several threads at once.

    Args:
        sizes: Of the files, in bytes: what lies on a last page that is none to its end does not
            wait.
        held: For each file what it holds from before: what shares a page with it does not wait.
    """

    def __init__(self, sizes: Sequence[int], held: Sequence[Ranges]) -> None:
        self._sizes, self._held = sizes, held
        self._pages: dict[tuple[int, int], Page] = {}
        self._lock = threading.Lock()

    def add(self, file: int, offset: int, data: NDArray[np.uint8]) -> tuple[bool, Page | None]:
        """Keep a part of a page until the rest comes.

        Args:
            file: Position of the file.
            offset: Where in it the bytes belong.
            data: At least one byte, all on one page.

        Returns:
            Whether they wait; and their page, if it is whole now. It waits until it is dropped.
        """
        start = offset // PAGE * PAGE
        with self._lock:
            page = self._pages.get((file, start))
            if page is None:
                if (
                    start + PAGE > self._sizes[file]
                    or self._held[file].touches(start, start + PAGE)
                    or len(self._pages) >= MOST_PAGES
                ):
                    return False, None
                page = self._pages[file, start] = Page(file, start)
            first = offset - start
            page.data[first : first + data.size] = data
            page.put.add(offset, offset + data.size)
            return True, page if page.put.covers(start, start + PAGE) else None

    def drop(self, page: Page) -> None:
        """Forget a page: its bytes are in the file."""
        with self._lock:
            self._pages.pop((page.file, page.offset), None)

    def outside(self, file: int, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Yield the parts of ``[start, stop)`` of a file that do not wait, in order."""
        with self._lock:
            waiting = sorted(
                (a, b)
                for page in self._pages.values()
                if page.file == file and page.offset < stop and start < page.offset + PAGE
                for a, b in page.put
            )
        for a, b in waiting:
            if start < a:
                yield start, min(a, stop)
            start = max(start, b)
        if start < stop:
            yield start, stop

    def waiting(self) -> list[Page]:
        """Return the pages that still wait for a part."""
        with self._lock:
            return list(self._pages.values())
