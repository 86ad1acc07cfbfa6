"""Memory that lies as a file's pages do: what a write past the page cache takes its bytes from."""

from __future__ import annotations

import mmap

import numpy as np
from numpy.typing import NDArray

# Of files and of memory. Devices ask for multiples of their block, 512 or 4096 bytes; and a page
# that is written past the page cache must share no page with one that goes through it.
PAGE = max(4096, mmap.PAGESIZE)
# Of a thread's buffer for what lies otherwise in memory than in its file, and is copied over.
BOUNCE_BYTES = (2 << 20) + PAGE
# Of parts of pages that wait for the rest of them, at most.
EDGE_BYTES = 4 << 20


def placed(buffer: NDArray[np.uint8], offset: int, nbytes: int) -> NDArray[np.uint8]:
    """Return ``nbytes`` of a buffer that begin as far into a page as ``offset`` does in its file.

    Args:
        buffer: At least ``nbytes + PAGE`` bytes.
        offset: Where in a file the bytes belong.
        nbytes: How many there are.
    """
    first = (offset - buffer.ctypes.data) % PAGE
    return buffer[first : first + nbytes]


def pages_of(offset: int, nbytes: int) -> slice:
    """Return which of the bytes ``[offset, offset + nbytes)`` of a file make up whole pages of it.

    Returns:
        A slice of the bytes. If there is no whole page it is empty, and begins where a page does,
        or else ends with the bytes.
    """
    first = min(-offset % PAGE, nbytes)
    return slice(first, first + (nbytes - first) // PAGE * PAGE)


def lies_on_pages(data: NDArray[np.uint8]) -> bool:
    """Return whether bytes begin with a page of memory."""
    return bool(data.ctypes.data % PAGE == 0)
