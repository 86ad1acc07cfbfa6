"""Tensors put together in memory before they are written, as far as they are small enough.

A graph stores ``x @ W`` with W of (in, out): a merged row of the base is a column there, and some
rows are many short pieces of a file, far apart. The system takes as long for each as for a whole
page. Put together first, a tensor is written in one go.
"""

from __future__ import annotations

import threading

from dora_export.onnx.graph_file import StoredTensor
from dora_export.onnx.layout import Place
from dora_export.onnx.memory import Memory
from dora_export.paged import PAGE, placed
from dora_export.tensors import Bytes

TENSOR_BYTES = 64 << 20  # of the largest tensor that is held
HELD_BYTES = 200 << 20  # of all that are held at once: three of the largest


class Assembly:
    """Tensors in the making. Called from several threads at once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._memory = Memory(HELD_BYTES)
        self._held: dict[StoredTensor, Bytes | None] = {}

    def whole(self, tensor: StoredTensor, place: Place) -> Bytes | None:
        """Return a tensor's memory, or None where it is not held: decided when it is begun.

        Args:
            tensor: The tensor.
            place: Where it goes; it lies as its file's pages do.
        """
        with self._lock:
            if tensor not in self._held:
                fits = place.nbytes <= TENSOR_BYTES
                self._held[tensor] = self._memory.take(place.nbytes + PAGE) if fits else None
            piece = self._held[tensor]
        return None if piece is None else placed(piece, place.offset, place.nbytes)

    def release(self, tensor: StoredTensor) -> None:
        """Let go of a tensor that has been written."""
        with self._lock:
            piece = self._held.pop(tensor, None)
        if piece is not None:
            self._memory.give(piece)
