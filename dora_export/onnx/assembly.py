"""Tensors put together in memory before they are written, as far as they are small enough.

A graph stores ``x @ W`` with W of (in, out): a merged row of the base is a column there, and some
rows are many short pieces of a file, far apart. The system takes as long for each as for a whole
page. Put together first, a tensor is written in one go.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from dora_export.onnx.graph_file import StoredTensor
from dora_export.onnx.layout import Place
from dora_export.paged import PAGE, placed
from dora_export.tensors import Bytes

TENSOR_BYTES = 64 << 20  # of the largest tensor that is held
HELD_BYTES = 160 << 20  # of all that are held at once


class Assembly:
    """Tensors in the making. Called from several threads at once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: dict[StoredTensor, NDArray[np.uint8] | None] = {}
        self._nbytes = 0

    def put(
        self, tensor: StoredTensor, place: Place, pieces: Iterable[tuple[int, int, Bytes]]
    ) -> Iterable[tuple[int, int, Bytes]]:
        """Take pieces of a tensor, and return those that are not held: all or none of them.

        Args:
            tensor: The tensor.
            place: Where it goes.
            pieces: Offset within the tensor, distance between rows of bytes, rows of bytes.
        """
        whole = self._whole(tensor, place)
        if whole is None:
            return pieces
        for at, stride, rows in pieces:
            count, length = rows.shape
            span = whole[at : at + (count - 1) * stride + length]
            np.lib.stride_tricks.as_strided(span, (count, length), (stride, 1))[:] = rows
        return ()

    def taken(self, tensor: StoredTensor) -> NDArray[np.uint8] | None:
        """Return a complete tensor's bytes and let go of them; None if it is not held."""
        with self._lock:
            whole = self._held.pop(tensor, None)
            self._nbytes -= 0 if whole is None else whole.size
            return whole

    def _whole(self, tensor: StoredTensor, place: Place) -> NDArray[np.uint8] | None:
        """Return a tensor's memory, or None where it is not held: decided when it is begun."""
        with self._lock:
            if tensor not in self._held:
                fits = place.nbytes <= TENSOR_BYTES and self._nbytes + place.nbytes <= HELD_BYTES
                self._nbytes += place.nbytes if fits else 0
                self._held[tensor] = (
                    placed(np.empty(place.nbytes + PAGE, np.uint8), place.offset, place.nbytes)
                    if fits
                    else None
                )
            return self._held[tensor]
