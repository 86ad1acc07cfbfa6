"""Inputs held to what they were when a run began: one that changes meanwhile is never published.

A file's size and times are noted before anything of it is read and compared after the last byte.
That costs two calls per file whatever its size, and is sound: the time of the last status change
moves with every write, truncation and replacement, and no program can set it. It moves with a
``chmod`` or a new hard link too; to refuse then is to err on the safe side. Inode numbers are left
out: some network file systems make new ones up while a file rests.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from dora_export.errors import InputError, listing, shown
from dora_export.machine import advice

PIPELINE = "model_index.json"  # the file that makes sub-folders part of a base


@dataclass(frozen=True)
class Stamp:
    """What tells whether a file is still the same.

    Attributes:
        size: Bytes.
        modified_ns: Time of the last change to its bytes, nanoseconds.
        changed_ns: Time of the last change to its status; on Windows, of its creation.
    """

    size: int
    modified_ns: int
    changed_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> Stamp:
        """Return the stamp in what ``os.stat`` returned."""
        return cls(status.st_size, status.st_mtime_ns, status.st_ctime_ns)


Stamps = Mapping[Path, Stamp]


def seen(path: Path) -> Stamps:
    """Return the stamps of a file, or of all that lies directly in a folder.

    Of a pipeline also of what lies in its parts' folders.

    Raises:
        OSError: The folder cannot be listed.
    """
    paths = _listed(path) if path.is_dir() else [path]
    if path / PIPELINE in paths:
        paths += [inner for part in paths if part.is_dir() for inner in _listed(part)]
    found = {}
    for each in paths:
        try:
            found[each] = Stamp.of(each.stat())
        except OSError:  # a link to nothing, or gone again: watch() tells if it is needed
            continue
    return found


def _listed(folder: Path) -> list[Path]:
    return [folder / name for name in os.listdir(folder)]


def watch(paths: Iterable[Path], before: Stamps) -> Stamps:
    """Return the stamps to hold files to; each is opened, so that one that cannot be is refused.

    Args:
        paths: Files that the run reads.
        before: Stamps from before anything was read; files not in it count from now.

    Raises:
        InputError: A file cannot be read, or was there before and is gone; all are listed.
    """
    stamps: dict[Path, Stamp] = {}
    # One that is gone may have been planned with (a config), and would be missing in the output.
    problems = [f"{shown(path, 400)}: was there and is gone" for path in before
                if not os.path.lexists(path)]  # fmt: skip
    for path in dict.fromkeys(paths):
        try:
            with path.open("rb") as file:
                now = Stamp.of(os.fstat(file.fileno()))
        except OSError as error:
            problems.append(f"{shown(path, 400)}: {error.strerror}. {advice(error)}")
            continue
        stamps[path] = before.get(path, now)
    if problems:
        raise InputError(f"inputs that cannot be read:{listing(problems)}\nNothing was published.")
    return stamps


@contextmanager
def held(stamps: Stamps) -> Iterator[None]:
    """Refuse, after the block, inputs that are not what they were.

    A failure of the block is told as it is, unless a changed input explains it.

    Raises:
        InputError: Inputs changed; all are listed.
    """
    try:
        yield
    except Exception as error:
        _refuse_changed(stamps, error)
        raise
    _refuse_changed(stamps)


def _refuse_changed(stamps: Stamps, cause: Exception | None = None) -> None:
    problems = [f"{shown(path, 400)}: {how}" for path, was in stamps.items()
                if (how := _change(path, was))]  # fmt: skip
    if problems:
        raise InputError(
            f"inputs changed while they were read:{listing(problems)}\n"
            "Nothing was published; run the same command again when nothing writes to them."
        ) from cause


def _change(path: Path, was: Stamp) -> str | None:
    try:
        now = Stamp.of(path.stat())
    except OSError as error:
        return f"cannot be found any more: {error.strerror}"
    if now.size != was.size:
        return f"had {was.size} bytes, has {now.size}"
    return None if now == was else "was written to or replaced"
