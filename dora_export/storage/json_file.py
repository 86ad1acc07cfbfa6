"""JSON from strangers, within limits of size, number and depth; nothing is said twice.

Small files (configs, manifests) are parsed as a whole. Headers and indexes can be large, so an
object of them is read member by member, and what one member may take is limited: memory is that of
what is kept. The standard library's scanner does the parsing; ijson would stream as well, but not
limit a single value, and this takes no further dependency.
"""

from __future__ import annotations

import codecs
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeGuard

from dora_export import limits
from dora_export.errors import InputError, shown
from dora_export.storage.paths import contained

CHUNK = 1 << 16
BLANKS = " \t\r\n"
BLANK = re.compile(f"[{BLANKS}]*")


class _TwiceError(ValueError):
    """A member of an object is there twice."""


def read_json(
    path: Path, *, most_bytes: int = limits.JSON_BYTES, most_values: int = limits.JSON_VALUES
) -> dict[str, Any]:
    """Return the JSON object in a file.

    NaN and infinities are numbers here, as some configs have them.

    Args:
        path: The file; a link only as ``contained`` allows.
        most_bytes: Size from which it is refused.
        most_values: Number of values from which it is refused.

    Raises:
        InputError: The file is missing, beyond a limit, not JSON, not an object, or says two things
            of one name.
    """
    found = _value(path, most_bytes, most_values)
    if not isinstance(found, dict):
        raise InputError(f"{path}: expected a JSON object. Download it again.")
    return found


def read_list(path: Path) -> list[Any]:
    """Return the JSON list in a file.

    Raises:
        InputError: As in ``read_json``, or it is no list.
    """
    found = _value(path, limits.JSON_BYTES, limits.JSON_VALUES)
    if not isinstance(found, list):
        raise InputError(f"{path}: expected a JSON list. Download it again.")
    return found


def _value(path: Path, most_bytes: int, most_values: int) -> Any:
    try:
        with contained(path, path.parent).open("rb") as file:
            _refuse_large(path, os.fstat(file.fileno()).st_size, most_bytes)
            texts = [file.read(most_bytes + 1)]  # no more, should it grow
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}. Check the path.") from error
    _refuse_large(path, len(texts[0]), most_bytes)
    return parse(texts.pop(), path, most_values)  # which is then the only one that has it


def _refuse_large(path: Path, nbytes: int, most: int) -> None:
    if nbytes > most:
        raise InputError(f"{path}: larger than {most} bytes. Not a real one.")


def parse(data: bytes, where: object, most_values: int = limits.JSON_VALUES) -> Any:
    """Return what JSON says.

    Raises:
        InputError: As in ``read_json``.
    """
    values = data.count(b",") + data.count(b"[") + data.count(b"{")
    if values > most_values:
        raise InputError(f"{where}: more than {most_values} values. Not a real one.")
    try:
        text = data.decode("utf-8")
        del data
        found = json.loads(text, object_pairs_hook=_once)
    except _TwiceError as error:
        raise InputError(
            f"{where}: says two things of one name: {error}. Keep the one that is meant."
        ) from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON ({shown(error)}). Download it again.") from error
    if _deeper_than(found, limits.JSON_DEPTH):
        raise InputError(f"{where}: nested more than {limits.JSON_DEPTH} deep. Not a real one.")
    return found


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        for name, value in pairs:  # the same said twice is harmless
            if repr(found[name]) != repr(value):
                values = f"{shown(value, 40)} and {shown(found[name], 40)}"
                raise _TwiceError(f"{shown(name)}: {values}")
    return found


def is_number(value: object) -> TypeGuard[int | float]:
    """Return whether a value is a number that a float can hold: no NaN, no infinity, no bool."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max  # type: ignore[arg-type]


def same(one: object, other: object) -> bool:
    """Return whether two values say the same; NaN, which some configs hold, is the same as NaN."""
    return one == other or repr(one) == repr(other)


def is_rank(value: object) -> TypeGuard[int]:
    """Return whether a value is a whole number that can be a rank."""
    return type(value) is int and 0 < value <= limits.RANK


def _deeper_than(value: Any, depth: int) -> bool:
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(depth):
        if not level:
            return False
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
    return bool(level)


def read_index(path: Path) -> dict[str, Any]:
    """Return the content of an index of shards; equal file names in it are one string.

    Raises:
        InputError: As in ``read_json``, or ``weight_map`` names a tensor twice.
    """
    try:
        with contained(path, path.parent).open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            _refuse_large(path, size, limits.INDEX_BYTES)
            return _index(JsonReader(file, size, str(path)))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}. Check the path.") from error


def _index(reader: JsonReader) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for name in reader.members():
        if name in content:
            raise InputError(f"{reader.where}: says '{shown(name)}' twice. Download it again.")
        if name != "weight_map" or not reader.at_object():
            content[name] = reader.value(limits.METADATA_CHARS)
            continue
        content[name] = {}
        files: dict[Any, Any] = {}
        for tensor in reader.members():
            if tensor in content[name]:
                raise InputError(
                    f"{reader.where}: places tensor '{shown(tensor)}' twice. Download it again."
                )
            if len(content[name]) >= limits.INDEX_TENSORS:
                raise InputError(
                    f"{reader.where}: places more than {limits.INDEX_TENSORS} tensors. "
                    "Not a real one."
                )
            file = reader.value(limits.HEADER_ENTRY_CHARS)
            content[name][tensor] = files.setdefault(file, file) if isinstance(file, str) else file
    reader.end()
    return content


class JsonReader:
    """Reads a JSON object from a file, member by member.

    After each name that ``members`` yields, the caller takes its value, by ``value`` or again by
    ``members``.

    Args:
        file: At the object's first byte.
        nbytes: Length of the text.
        where: For messages.
    """

    def __init__(self, file: BinaryIO, nbytes: int, where: str) -> None:
        self.where = where
        self._file, self._left = file, nbytes
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._scanner = json.JSONDecoder(object_pairs_hook=_once)
        self._text, self._at = "", 0

    def at_object(self) -> bool:
        """Return whether an object is next."""
        return self._next() == "{"

    def members(self) -> Iterator[str]:
        """Yield the names of the object that is next; equal names are not told apart.

        Raises:
            InputError: There is no object next, or the text is not JSON.
        """
        if self._next() != "{":
            raise self._malformed("not a JSON object")
        self._at += 1
        if self._next() == "}":
            self._at += 1
            return
        while True:
            if self._next() != '"':
                raise self._malformed("not JSON")
            name = self.value(limits.HEADER_ENTRY_CHARS)
            if self._next() != ":":
                raise self._malformed("not JSON")
            self._at += 1
            yield name
            sign = self._next()
            if sign not in (",", "}"):
                raise self._malformed("not JSON")
            self._at += 1
            if sign == "}":
                return

    def value(self, most_chars: int) -> Any:
        """Return the value that is next.

        Raises:
            InputError: It takes more characters, is not JSON, or says two things of one name.
        """
        self._next()
        while True:
            try:
                found, end = self._scanner.raw_decode(self._text, self._at)
            except _TwiceError as error:
                raise self._malformed(f"says two things of one name: {error}") from error
            except RecursionError as error:
                raise self._malformed("not JSON: nested too deeply") from error
            except ValueError as error:  # perhaps only cut off
                if not self._more(most_chars):
                    raise self._malformed(f"not JSON ({shown(error, 60)})") from error
                continue
            # A number may go on behind the end of what has been read.
            if end == len(self._text) and self._more(most_chars):
                continue
            chars, self._at = end - self._at, end
            if chars > most_chars:
                raise self._malformed(f"an entry of more than {most_chars} characters")
            # Each level takes two characters.
            if chars > 2 * limits.JSON_DEPTH and _deeper_than(found, limits.JSON_DEPTH):
                raise self._malformed("not JSON: nested too deeply")
            return found

    def end(self) -> None:
        """Check that nothing but blanks follows.

        Raises:
            InputError: Something does.
        """
        if self._next():
            raise self._malformed("not JSON: something follows its end")

    def _next(self) -> str:
        """Return the next character that is no blank, or nothing at the end."""
        while True:
            if (sign := self._text[self._at : self._at + 1]) and sign not in BLANKS:
                return sign
            self._at = BLANK.match(self._text, self._at).end()  # type: ignore[union-attr]
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more(limits.HEADER_ENTRY_CHARS):
                return ""

    def _more(self, most_chars: int) -> bool:
        """Read on; return whether there was anything, and room for it."""
        kept = self._text[self._at :]
        if self._left == 0:
            return False
        if len(kept) > most_chars:
            raise self._malformed(f"not JSON, or an entry of more than {most_chars} characters")
        data = self._file.read(min(max(CHUNK, len(kept)), self._left))
        if not data:
            raise self._malformed("ends early")
        self._left -= len(data)
        try:
            self._text = kept + self._decoder.decode(data, final=self._left == 0)
        except UnicodeDecodeError as error:
            raise self._malformed(f"not JSON ({error.reason})") from error
        self._at = 0
        return True

    def _malformed(self, what: str) -> InputError:
        return InputError(f"{self.where}: {what}. The file is malformed; download it again.")
