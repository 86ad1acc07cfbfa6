"""Where an output is to go: refused before any work where it could not be published whole."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from dora_export.errors import OutputError, shown
from dora_export.machine import advice
from dora_export.writers.names import hidden_name
from dora_export.writers.staging import Leftover, check_target

SPARE_BYTES = 16 << 20  # left free on the disk beyond the output


def target_of(output: str | os.PathLike[str]) -> Path:
    """Return the output's absolute path, with a name of its own.

    Raises:
        OutputError: It has none ("/"), or a name that no file system takes.
    """
    path = Path(output)
    if "\0" in str(path):
        raise OutputError(f"{shown(path)}: holds a NUL character. Pass another -o.")
    if ".." in path.parts:
        # Not by cutting text: beyond a link to a folder, ".." is not the folder before it.
        parent, name = (path, "") if path.name == ".." else (path.parent, path.name)
        path = Path(os.path.realpath(parent), name)
    target = path.absolute()
    if not target.name:
        raise OutputError(f"{target}: not a folder that can be made. Pass -o with a new name.")
    return target


def check_place(
    target: Path, inputs: Mapping[str, Path], *, force: bool, leftover: Leftover | None
) -> None:
    """Refuse an output that cannot be published by a rename, or that holds or lies in an input.

    Args:
        target: The output.
        inputs: What each input is called, and where it is.
        force: Whether an earlier output may be replaced.
        leftover: What an interrupted run left of it.

    Raises:
        OutputError: It does, or it exists already.
    """
    if os.path.ismount(target):
        raise OutputError(
            f"{target}: a mount point cannot be replaced by a rename. Pass a folder inside it, "
            f"e.g. -o {target / 'merged'}."
        )
    if target.is_dir() and os.path.samefile(target, os.curdir):
        raise OutputError(
            f"{target}: the folder this runs in; publishing by a rename would leave you in a "
            "folder that is gone. Run from another one, or pass -o with a new name."
        )
    real = Path(os.path.realpath(target))
    for what, path in inputs.items():
        other = Path(os.path.realpath(path))
        folder = other if other.is_dir() else None
        if (
            real == other
            or (folder is not None and folder in real.parents)
            or real in other.parents
        ):
            raise OutputError(
                f"{target}: is, holds, or lies in the {what} ({path}). Pass an -o outside of it."
            )
    if leftover is None or not leftover.published:
        check_target(target, force=force)


def check_way(target: Path, names: Sequence[str]) -> None:
    """Refuse a path that is too long, or that leads over something that is no folder.

    Raises:
        OutputError: One of the files could not be made there.
    """
    broken = [p for p in target.parents if p.is_symlink() and not p.exists()]
    if broken:
        raise OutputError(f"{broken[0]}: a link to nothing. Repair it, or pass another -o.")
    longest = max(names, key=lambda name: len(os.fsencode(name)))
    for folder in (target, target.with_name(hidden_name(target.name, "partial"))):
        if folder.exists() and not folder.is_dir():
            continue  # a file in the way is told of as such
        try:
            os.lstat(folder / longest)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise OutputError(
                f"{folder / longest}: {error.strerror}. {advice(error, 'Pass another -o.')}"
            ) from error


def check_space(target: Path, nbytes: int, leftover: Leftover | None) -> None:
    """Refuse an output that its disk has no room for.

    Args:
        target: The output.
        nbytes: Bytes of it all.
        leftover: What an interrupted run left of it.

    Raises:
        OutputError: There is less free space.
    """
    if leftover is not None:  # its files are used or removed, and have their space already
        nbytes -= nbytes if leftover.published else leftover.disk_bytes
    parent = next(p for p in target.parents if p.exists())
    try:
        free = shutil.disk_usage(parent).free
    except OSError as error:
        raise OutputError(
            f"{parent}: cannot be asked for free space: {error.strerror}. {advice(error)}"
        ) from error
    if nbytes + SPARE_BYTES > free:
        raise OutputError(
            f"output needs {nbytes / 1e9:.1f} GB, {parent} has {free / 1e9:.1f} GB free (checked "
            "before any work). Free some space, or pass an -o on another disk."
        )
