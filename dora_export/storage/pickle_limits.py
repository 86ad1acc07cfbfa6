"""What a pickled file is checked for before torch's restricted loader sees it.

That loader executes nothing from the file, but believes its sizes: records of a zip file are
unpacked into memory whole, lists and dictionaries are made as the opcodes say, and a view may
show one element a trillion times. So the directory and the opcodes are walked first, which takes
neither memory nor trust; views are checked once the tensors are there.

Source: torch/serialization.py (_load, _legacy_load), caffe2/serialize/inline_container.cc.
"""

from __future__ import annotations

import io
import pickletools
import struct
import zipfile
from collections.abc import Mapping
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO

from dora_export import limits
from dora_export.errors import InputError, shown

ZIP_MAGIC = b"PK\x03\x04"  # by this torch tells the two formats apart
LEGACY_PICKLES = 5  # magic number, protocol, machine, state dict, keys of storages
END = struct.Struct("<4sHHHHIIH")  # end of central directory
END64 = struct.Struct("<4sQHHIIQQQQ")
LOCATOR64 = struct.Struct("<4sIQI")
COMMENT_BYTES = 1 << 16


def check_pickled(path: Path) -> bool:
    """Check a file saved by torch within what can be known without unpickling it.

    Returns:
        Whether it is in torch's zip format.

    Raises:
        InputError: It is neither of torch's formats, or beyond a limit.
    """
    try:
        with path.open("rb") as file:
            zipped = file.read(4) == ZIP_MAGIC
            if zipped:
                _check_zip(path, file)
            else:
                file.seek(0)
                _check_opcodes(path, file.read(limits.PICKLE_BYTES), LEGACY_PICKLES)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}. Check the path.") from error
    return zipped


def _check_zip(path: Path, file: BinaryIO) -> None:
    size = file.seek(0, io.SEEK_END)
    _check_directory(path, file, size)
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            for entry in entries:
                _check_entry(path, entry, size)
            root = entries[0].filename.partition("/")[0] if entries else ""
            code = archive.getinfo(f"{root}/data.pkl")
            if code.file_size > limits.PICKLE_BYTES:
                raise _refused(path, f"{code.file_size} bytes of pickle, more than any model has")
            data = archive.read(code)
    except (zipfile.BadZipFile, KeyError, ValueError, RuntimeError) as error:
        # all of these are what zipfile raises for archives that are damaged, or that use what torch
        # never writes (a subclass of RuntimeError for other zip versions and patched data)
        raise _damaged(path, error) from error
    _check_opcodes(path, data, 1)


def _check_entry(path: Path, entry: zipfile.ZipInfo, size: int) -> None:
    """Refuse what torch never writes: a record that is compressed, encrypted, or not all there."""
    where = f"record '{shown(entry.filename)}'"
    if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
        raise _refused(path, f"{where} is compressed")
    if entry.flag_bits & 1:
        raise _refused(path, f"{where} is encrypted")
    if entry.header_offset < 0 or entry.header_offset + entry.file_size > size:
        raise _refused(path, f"{where} ends after the file")


def _check_directory(path: Path, file: BinaryIO, size: int) -> None:
    """Refuse a directory that is too large, or read in one way here and in another way there."""
    tail = min(size, END.size + COMMENT_BYTES)
    file.seek(size - tail)
    text = file.read(tail)
    at = text.rfind(b"PK\x05\x06")
    if at < 0 or len(text) - at < END.size:
        raise _damaged(path, "no directory at its end")
    _, _, _, _, _, nbytes, start, _ = END.unpack_from(text, at)
    end = size - tail + at
    locator = at - LOCATOR64.size
    if locator >= 0 and text[locator : locator + 4] == b"PK\x06\x07":
        _, _, place, _ = LOCATOR64.unpack_from(text, locator)
        if place + END64.size > size:
            raise _damaged(path, "its directory is not there")
        file.seek(place)
        found = END64.unpack(file.read(END64.size))
        if found[0] != b"PK\x06\x06":
            raise _damaged(path, "its directory is not there")
        nbytes, start, end = found[8], found[9], place
    if nbytes > limits.ZIP_DIRECTORY_BYTES:
        raise _refused(path, f"{nbytes} bytes of directory, more than any model has")
    if start + nbytes != end:
        raise _damaged(path, "its directory is not where it says")


def _check_opcodes(path: Path, data: bytes, pickles: int) -> None:
    """Walk the opcodes, which executes nothing, and count them."""
    file = io.BytesIO(data)
    opcodes = chain.from_iterable(pickletools.genops(file) for _ in range(pickles))
    try:
        count = sum(1 for _ in islice(opcodes, limits.PICKLE_OPCODES + 1))
    except Exception as error:  # pickletools raises many kinds; each means a file that is no pickle
        raise _damaged(path, error) from error
    if count > limits.PICKLE_OPCODES:
        raise _refused(path, "more opcodes than any model has")


def check_views(path: Path, tensors: Mapping[str, Any], size: int) -> None:
    """Refuse tensors that show more bytes than the file has.

    Args:
        path: The file.
        tensors: torch tensors by name.
        size: Bytes of the file.

    Raises:
        InputError: A tensor repeats elements, or several are copies in another order of one range.
    """
    storages: dict[int, int] = {}
    copied = 0
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage()
        nbytes = tensor.numel() * tensor.element_size()
        storages[storage.data_ptr()] = storage.nbytes()
        if nbytes > storage.nbytes():
            raise _refused(path, f"tensor '{shown(name)}' repeats its elements")
        copied += 0 if tensor.is_contiguous() else nbytes
    if max(copied, sum(storages.values())) > size:
        raise _refused(path, "its tensors take more bytes than the file has")


def _refused(path: Path, what: str) -> InputError:
    return InputError(f"{path}: {what}. Do not trust it; get the model as safetensors.")


def _damaged(path: Path, why: object) -> InputError:
    return InputError(
        f"{path}: not a file saved by torch ({shown(why, 80)}). It is damaged or of another "
        "format; get it as safetensors, or download it again."
    )
