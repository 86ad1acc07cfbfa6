"""Floating-point initializers of a graph, read where they lie."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dora_export.tensors import DTYPES, DType
from dora_export.verification.values import Floats, floats

if TYPE_CHECKING:
    import onnx

# TensorProto.DataType -> stored type.
TYPES = {1: "F32", 10: "F16", 16: "BF16", 11: "F64"}


@dataclass(frozen=True, eq=False)
class Initializer:
    """One initializer.

    Attributes:
        name: In the graph.
        dtype: Its type.
        shape: Its shape.
        stored: Its values as they are stored, in that shape.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    stored: NDArray[Any]

    def values(self) -> Floats:
        """Return all values."""
        return floats(self.stored.reshape(-1), self.dtype).reshape(self.shape)

    def rows(self, rows: NDArray[np.int64], shape: tuple[int, ...]) -> Iterator[Floats]:
        """Yield some rows of a matrix of a shape that this may be, or be the transpose of."""
        for stored in (self.stored, self.stored.T):
            if stored.shape == shape:
                part = np.ascontiguousarray(stored[rows])
                yield floats(part.reshape(-1), self.dtype).reshape(part.shape)


def initializers(path: Path) -> Iterator[Initializer]:
    """Yield the floating-point initializers of a graph.

    Args:
        path: The graph; its external data must have been found to lie in its folder.
    """
    import onnx  # noqa: PLC0415 - takes a second

    model = onnx.load(str(path), load_external_data=False)
    for tensor in model.graph.initializer:
        dtype = DTYPES.get(TYPES.get(tensor.data_type, ""))
        if dtype is not None:
            shape = tuple(tensor.dims)
            stored = _bytes(tensor, path.parent).view(f"u{dtype.itemsize}").reshape(shape)
            yield Initializer(tensor.name, dtype, shape, stored)


def _bytes(tensor: onnx.TensorProto, folder: Path) -> NDArray[np.uint8]:
    """Return a tensor's stored bytes, mapped where they are in another file."""
    import onnx  # noqa: PLC0415 - as above

    entries = {e.key: e.value for e in tensor.external_data}
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        offset, length = int(entries.get("offset", 0)), int(entries.get("length", 0))
        if not length:  # none is mapped
            return np.zeros(0, np.uint8)
        found: NDArray[np.uint8] = np.memmap(
            folder / entries["location"], np.uint8, "r", offset, (length,)
        )
        return found
    if tensor.raw_data:
        return np.frombuffer(tensor.raw_data, np.uint8)
    return np.ascontiguousarray(onnx.numpy_helper.to_array(tensor)).view(np.uint8).reshape(-1)
