"""The safetensors container: its header, checked before anything is believed, and its writing.

Layout: 8 bytes little-endian header length, a JSON object, then the data without gaps.
Source: github.com/huggingface/safetensors, README.md "Format" and safetensors/src/tensor.rs.
The safetensors library gives tensors but not their offsets, which byte-range work needs.
"""

from __future__ import annotations

import json
import math
import os
import stat
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dora_export import limits
from dora_export.errors import InputError, shown
from dora_export.storage.json_file import JsonReader
from dora_export.tensors import DTYPES, DType, FileRange, TensorRef

ALIGNMENT = 8


@dataclass(frozen=True)
class Header:
    """What a safetensors file holds.

    Attributes:
        path: The file.
        tensors: By name, in the order of their bytes.
        metadata: The file's ``__metadata__``.
        data_start: Offset of the first data byte.
    """

    path: Path
    tensors: Mapping[str, TensorRef]
    metadata: Mapping[str, str]
    data_start: int


def read_header(path: Path) -> Header:
    """Read and check the header of a safetensors file.

    Guarantees of what it returns: names are unique, byte ranges lie in the file, follow each
    other without gaps or overlaps, and fit their shapes and dtypes.

    Raises:
        InputError: The file is missing, truncated, malformed or beyond a limit.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode) and not path.is_dir():
            raise InputError(
                f"{path}: not a regular file. Check the path."
            )  # one may wait for ever
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
            if not 2 <= length <= min(limits.HEADER_BYTES, size - 8):
                raise InputError(
                    f"{path}: not a whole safetensors file ({size} bytes, header of {length}). "
                    "It is truncated, empty, or of another format; download it again."
                )
            start = 8 + length
            reader = JsonReader(file, length, f"{path}: the header")
            refs, metadata = _entries(path, reader, start, size)
            reader.end()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}. Check the path.") from error
    refs.sort(key=lambda ref: (ref.source.start, ref.source.nbytes))  # type: ignore[union-attr]
    _check_contiguous(path, refs, start, size)
    return Header(path, {ref.name: ref for ref in refs}, metadata, start)


def header_bytes(
    tensors: Sequence[tuple[str, DType, tuple[int, ...]]],
    metadata: Mapping[str, str],
    data_start: int = 0,
) -> bytes:
    """Return the file's first bytes, up to the data, for tensors stored one after another.

    Args:
        tensors: Name, dtype and shape, in the order of their bytes.
        metadata: For ``__metadata__``.
        data_start: Pad up to this offset if the header is shorter, so that a rewritten file keeps
            the offsets of the file it comes from.
    """
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, dtype, shape in tensors:
        nbytes = math.prod(shape) * dtype.itemsize
        entries[name] = {
            "dtype": dtype.name,
            "shape": list(shape),
            "data_offsets": [offset, offset + nbytes],
        }
        offset += nbytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    text += b" " * max(0, data_start - 8 - len(text))
    return struct.pack("<Q", len(text)) + text


def _entries(
    path: Path, reader: JsonReader, start: int, size: int
) -> tuple[list[TensorRef], dict[str, str]]:
    refs: list[TensorRef] = []
    names: set[str] = set()
    metadata: dict[str, str] = {}
    for name in reader.members():
        if name in names:
            raise InputError(f"{path}: the header names a tensor twice. The file is malformed.")
        names.add(name)
        if not is_text([name]):
            raise InputError(f"{path}: the header holds half a character. The file is malformed.")
        if name == "__metadata__":
            metadata = _metadata(path, reader)
            continue
        if len(refs) >= limits.HEADER_TENSORS:
            raise InputError(
                f"{path}: holds more than {limits.HEADER_TENSORS} tensors. Not a real model."
            )
        entry = reader.value(limits.HEADER_ENTRY_CHARS)
        refs.append(_tensor(path, name, entry, start, size))
    return refs, metadata


def _metadata(path: Path, reader: JsonReader) -> dict[str, str]:
    found: dict[str, str] = {}
    whole = reader.at_object()
    for name in reader.members() if whole else ():
        value = reader.value(limits.METADATA_CHARS)
        if name in found or len(found) >= limits.METADATA_ENTRIES:
            raise InputError(
                f"{path}: __metadata__ says '{shown(name)}' twice, or has more than "
                f"{limits.METADATA_ENTRIES} entries. The file is malformed."
            )
        whole = isinstance(value, str) and is_text([name, value])
        if not whole:
            break
        found[name] = value
    if not whole:
        raise InputError(f"{path}: __metadata__ is not a map of strings. The file is malformed.")
    return found


def is_text(names: Iterable[str]) -> bool:
    """Return whether all names can be written as UTF-8; JSON's escapes allow half characters."""
    try:
        "".join(names).encode()
    except UnicodeEncodeError:
        return False
    return True


def _tensor(path: Path, name: str, entry: Any, start: int, size: int) -> TensorRef:
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (TypeError, KeyError, ValueError) as error:
        raise _wrong(path, name, "no dtype, shape and data_offsets. Malformed.") from error
    if not isinstance(dtype, str) or dtype not in DTYPES:
        known = ", ".join(DTYPES)
        raise _wrong(path, name, f"dtype {shown(dtype)} is not known. Known: {known}.")
    numbers = [*shape, begin, end] if isinstance(shape, list) else [None]
    if len(numbers) - 2 > limits.DIMENSIONS or not all(
        type(n) is int and 0 <= n < 1 << 63 for n in numbers
    ):
        raise _wrong(path, name, f"shape {shown(shape)} or offsets are not sizes. Malformed.")
    ref = TensorRef(name, DTYPES[dtype], tuple(shape), FileRange(path, start + begin, end - begin))
    if end - begin != ref.nbytes:
        raise _wrong(
            path,
            name,
            f"expected {ref.nbytes} bytes for {ref.shape} {dtype}, got {end - begin}. "
            "The file is malformed; download it again.",
        )
    if start + end > size:
        raise _wrong(
            path,
            name,
            f"its bytes end at {start + end}, the file has {size}. "
            "The file is truncated; download it again.",
        )
    return ref


def _wrong(path: Path, name: str, what: str) -> InputError:
    return InputError(f"{path}: tensor '{shown(name)}': {what}")


def _check_contiguous(path: Path, refs: Sequence[TensorRef], start: int, size: int) -> None:
    offset = start
    for ref in refs:
        assert isinstance(ref.source, FileRange), "Bug: a header's tensors lie in its file"
        if ref.source.start != offset:
            raise InputError(
                f"{path}: tensor '{shown(ref.name)}' starts at byte {ref.source.start}, expected "
                f"{offset}: there is a hole or an overlap. The file is malformed."
            )
        offset += ref.nbytes
    if offset != size:
        raise InputError(
            f"{path}: {size - offset} bytes follow the last tensor. The file is malformed."
        )
