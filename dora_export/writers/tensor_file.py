"""A safetensors file written from front to back, one tensor in memory at a time."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dora_export.storage.safetensors import header_bytes
from dora_export.tensors import DType
from dora_export.writers.files import refusal

Entry = tuple[str, DType, tuple[int, ...]]


def write_tensors(
    path: Path,
    entries: Sequence[Entry],
    values: Iterable[NDArray[Any]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a new file and put it on the disk.

    Args:
        path: The file; must not exist.
        entries: Name, dtype and shape of each tensor, in order.
        values: Their elements in ``dtype.raw``, in the same order; taken one by one.
        metadata: Further entries beside the format.

    Raises:
        OutputError: The disk is full, or writing fails.
    """
    try:
        with path.open("xb") as file:
            file.write(header_bytes(entries, {"format": "pt", **(metadata or {})}))
            for (name, dtype, shape), array in zip(entries, values, strict=True):
                assert array.shape == shape, f"Bug: {name}: {array.shape} for {shape}"
                assert array.dtype == np.dtype(dtype.raw), f"Bug: {name}: {array.dtype}"
                file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise refusal(path, error) from error
