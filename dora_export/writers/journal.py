"""The journal of a run: what it depends on, then which bytes of its output are on the disk.

A text file that only grows. Each line is a record: 16 hex digits of the BLAKE2 digest of the rest,
a space, and a JSON object. Reading ends before the first line that is not whole, so what a kill or
a power failure cut off is as if it had never been written. In order:

``{"identity": {...}}``
    Once, first: what the bytes of the output depend on, as labels and words for people. Other words
    mean other bytes.
``{"done": {"model.safetensors": [[0, 4096], ...], ...}}``
    These ranges ``[start, stop)`` are on the disk: they were synced before the record was written.
``{"lost": ["model.safetensors", ...]}``
    What was said of these files before is not true any more.

Records name ranges of bytes, not pieces of work, so that a run can be resumed with other threads
and blocks.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

from dora_export import limits
from dora_export.errors import OutputError, shown
from dora_export.writers.files import refusal
from dora_export.writers.ranges import Ranges

DIGEST_BYTES = 8
FORMAT_LABEL, FORMAT = "journal format", "1"  # in every identity: another format, another run
OFFSETS = (1 << 63) - 1  # the largest place in a file that any system has
# What follows from the other entries of an identity; of interest only where none of them differs.
DERIVED = "plan"


@dataclass(frozen=True)
class Job:
    """What a run is to write, and all that the bytes depend on.

    Attributes:
        identity: Labels and values, in words for people, ``FORMAT_LABEL`` among them. Equal
            identities mean equal bytes.
        files: Names of the weight files, with their sizes in bytes.
    """

    identity: Mapping[str, str]
    files: Mapping[str, int]

    @property
    def nbytes(self) -> int:
        """Bytes of all weight files."""
        return sum(self.files.values())


@dataclass(frozen=True)
class Contents:
    """What a journal says.

    Attributes:
        identity: As in ``Job``.
        done: File name -> ranges that are on the disk.
        nbytes: Length of the journal's whole records.
    """

    identity: Mapping[str, str]
    done: Mapping[str, Ranges] = field(default_factory=dict)
    nbytes: int = 0

    @property
    def readable(self) -> bool:
        """Whether the records after the first are in a format that can be read."""
        return self.identity.get(FORMAT_LABEL) == FORMAT

    @property
    def done_bytes(self) -> int:
        """Bytes of the output that are on the disk."""
        return sum(ranges.nbytes for ranges in self.done.values())


def encode(record: Mapping[str, Any]) -> bytes:
    """Return a record as a line of the journal."""
    text = json.dumps(record, ensure_ascii=True, separators=(",", ":")).encode()
    return _digest(text) + b" " + text + b"\n"


def decode(data: bytes) -> Contents | None:
    """Return what a journal says, or None if not even its first record is whole."""
    lines = data.splitlines(keepends=True)
    first = _record(lines[0]) if lines else None
    if first is None or not _is_identity(first.get("identity")):
        return None
    identity, valid = first["identity"], len(lines[0])
    done: dict[str, Ranges] = {}
    for line in lines[1:] if identity.get(FORMAT_LABEL) == FORMAT else ():
        record = _record(line)
        if record is None:
            break
        said, lost = record.get("done", {}), record.get("lost", [])
        if not (_are_ranges(said) and isinstance(lost, list)):
            break
        for name, ranges in said.items():
            done.setdefault(name, Ranges()).update((start, stop) for start, stop in ranges)
        for name in lost:
            done.pop(str(name), None)
        valid += len(line)
    return Contents(identity, done, valid)


def differences(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    """Return what differs between two identities, as ``label: old → new``, in words for people."""
    labels = [k for k in dict.fromkeys((*old, *new)) if old.get(k) != new.get(k)]
    labels = [k for k in labels if k != DERIVED] or labels
    return [
        f"{shown(k)}: {shown(old.get(k, 'none'))} → {shown(new.get(k, 'none'))}" for k in labels
    ]


def stored(path: Path) -> bytes:
    """Return a journal's bytes, or none of one that is larger than any run makes it.

    Raises:
        OSError: It cannot be read.
    """
    with path.open("rb") as file:
        data = file.read(limits.JOURNAL_BYTES + 1)
    return data if len(data) <= limits.JOURNAL_BYTES else b""


class Journal:
    """An open journal. Its methods may be called from several threads.

    Args:
        path: The file, for messages.
        descriptor: It, opened for reading and appending; closed by ``close``.
    """

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self._descriptor: int | None = descriptor
        self._failure: OutputError | None = None
        self._lock = threading.Lock()

    def read(self) -> Contents | None:
        """Return what the journal says, or None if not even its first record is whole.

        Raises:
            OutputError: It cannot be read.
        """
        try:
            return decode(stored(self.path))
        except OSError as error:
            raise refusal(self.path, error) from error

    def begin(self, identity: Mapping[str, str]) -> None:
        """Write the first record; it comes to the disk with the next one.

        Raises:
            OutputError: It cannot be written.
        """
        self._write({"identity": dict(identity)}, sync=False)

    def truncate(self, nbytes: int) -> None:
        """Drop what follows the first ``nbytes`` bytes, on the disk as well.

        Raises:
            OutputError: It cannot be written.
        """
        descriptor = self._descriptor
        assert descriptor is not None, "Bug: the journal is closed"
        try:
            if os.fstat(descriptor).st_size != nbytes:
                os.ftruncate(descriptor, nbytes)
                os.fsync(descriptor)
        except OSError as error:
            raise refusal(self.path, error) from error

    def done(self, ranges: Mapping[str, Ranges]) -> None:
        """Record ranges that are on the disk; so is the record when this returns.

        Raises:
            OutputError: It cannot be written.
        """
        self._write({"done": {name: list(r) for name, r in ranges.items()}}, sync=True)

    def lost(self, names: Iterable[str]) -> None:
        """Record that nothing of these files is on the disk; so is the record when this returns.

        Raises:
            OutputError: It cannot be written.
        """
        self._write({"lost": list(names)}, sync=True)

    def _write(self, record: Mapping[str, Any], *, sync: bool) -> None:
        line = encode(record)
        with self._lock:
            if self._descriptor is None:
                return  # an interrupted run has let it go: what it still finishes is done again
            if self._failure is not None:
                raise self._failure  # the last line may be cut off: nothing after it would be read
            try:
                while line:
                    line = line[os.write(self._descriptor, line) :]
                if sync:
                    os.fsync(self._descriptor)
            except OSError as error:
                self._failure = refusal(self.path, error)
                raise self._failure from error

    def close(self) -> None:
        """Close the file, and with it let go of a lock on it."""
        with self._lock:
            if self._descriptor is not None:
                os.close(self._descriptor)
                self._descriptor = None


def _digest(text: bytes) -> bytes:
    return blake2b(text, digest_size=DIGEST_BYTES).hexdigest().encode()


def _record(line: bytes) -> dict[str, Any] | None:
    """Return a line's record, or None if the line is not whole."""
    digest, _, text = line.rstrip(b"\n").partition(b" ")
    if not line.endswith(b"\n") or digest != _digest(text):
        return None
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):  # not one that this tool has written
        return None
    return record if isinstance(record, dict) else None


def _is_identity(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(v, str) for v in value.values())


def _are_ranges(value: Any) -> bool:
    """Return whether a record's "done" is as it is written: file names with ranges of bytes."""
    return isinstance(value, dict) and all(
        isinstance(ranges, list)
        and all(
            isinstance(r, list)
            and len(r) == 2
            and all(type(n) is int and 0 <= n <= OFFSETS for n in r)
            for r in ranges
        )
        for ranges in value.values()
    )
