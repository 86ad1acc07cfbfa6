"""Large pieces of memory, bounded, and kept for their next use.

Memory that is new to a process has to be found and cleared by the system, which takes as long as
turning a matrix into it.
"""

from __future__ import annotations

import threading

import numpy as np

from dora_export.tensors import Bytes


class Memory:
    """So many bytes at most, given out in pieces. Called from several threads at once.

    Args:
        most: Bytes of all pieces, those that wait for their next use included.
    """

    def __init__(self, most: int) -> None:
        self._most, self._nbytes = most, 0
        self._free: list[Bytes] = []
        self._lock = threading.Lock()

    def take(self, nbytes: int) -> Bytes | None:
        """Return at least so many bytes, undefined, or None where there is no room for them."""
        with self._lock:
            fitting = [i for i, piece in enumerate(self._free) if piece.size >= nbytes]
            if fitting:
                return self._free.pop(min(fitting, key=lambda i: self._free[i].size))
            while self._free and self._nbytes + nbytes > self._most:
                self._nbytes -= self._free.pop().size
            if self._nbytes + nbytes > self._most:
                return None
            self._nbytes += nbytes
            return np.empty(nbytes, np.uint8)

    def give(self, piece: Bytes) -> None:
        """Take a piece back, as ``take`` returned it."""
        with self._lock:
            self._free.append(piece)
