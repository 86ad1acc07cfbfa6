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


def placed(buffer: NDArray[np.uint8], offset: int, nbytes: int) -> NDArray[np.uint8]:
    """Return ``nbytes`` of a buffer that begin as far into a page as ``offset`` does in its file.

    Args:
        buffer: At least ``nbytes + PAGE`` bytes.
        offset: Where in a file the bytes belong.
        nbytes: How many there are.
    """
    first = (offset - buffer.ctypes.data) % PAGE
    return buffer[first : first + nbytes]


def whole_pages(data: NDArray[np.uint8], offset: int) -> slice:
    """Return which bytes are whole pages of their file and can go to the disk from where they are.

    Args:
        data: Bytes, contiguous.
        offset: Where in the file they belong.

    Returns:
        A slice of ``data``; empty if there are none, or if they lie otherwise in memory than in
        the file.
    """
    first = -offset % PAGE
    stop = first + max(0, data.size - first) // PAGE * PAGE
    if (data.ctypes.data + first) % PAGE or first >= stop:
        return slice(0, 0)
    return slice(first, stop)
