"""Containers of tensors: safetensors and torch's pickled files, opened without reading data."""

from __future__ import annotations

from pathlib import Path

from dora_export.errors import InputError
from dora_export.storage.pickled import read_pickled
from dora_export.storage.safetensors import read_header
from dora_export.tensors import TensorRef

PICKLED = (".bin", ".pt", ".pth")


def read_tensors(path: Path, *, allow_pickle: bool) -> dict[str, TensorRef]:
    """Return the tensors in a ``.safetensors``, ``.bin``, ``.pt`` or ``.pth`` file, by name.

    Raises:
        InputError: The file is missing or malformed, or pickled without ``allow_pickle``.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file. Check the path.")
    if path.suffix == ".safetensors":
        return dict(read_header(path).tensors)
    if path.suffix in PICKLED:
        return read_pickled(path, allow_pickle=allow_pickle)
    raise InputError(
        f"{path}: unknown kind of file '{path.suffix}'. "
        f"Expected .safetensors or one of {', '.join(PICKLED)}."
    )
