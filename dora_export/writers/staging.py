"""Publish whole or not at all: write into a hidden folder beside the output, then rename it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dora_export.errors import OutputError
from dora_export.writers.files import sync_folder

MARK = ".dora_export-staging"
MANIFEST = "dora_export.json"


@contextmanager
def staged(target: Path, *, force: bool = False) -> Iterator[Path]:
    """Yield an empty folder; rename it to ``target`` if the block succeeds, else remove it.

    At any instant ``target`` is absent, what it was before, or whole.

    Args:
        target: Folder to publish.
        force: Replace ``target`` if it is an earlier output of this tool.

    Raises:
        OutputError: ``target`` exists and may not be replaced, another run is writing it, or the
            folder cannot be made.
    """
    check_target(target, force=force)
    partial = target.with_name(f".{target.name}.dora_export-partial")
    lock = _claim(partial)
    try:
        yield partial
        (partial / MARK).unlink()
        sync_folder(partial)
        _publish(partial, target)
    except BaseException:  # Ctrl-C too: half a model must never look like a whole one
        shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        os.close(lock)


def check_target(target: Path, *, force: bool) -> None:
    """Refuse a target that exists, unless it is this tool's and ``force`` is set.

    Raises:
        OutputError: It exists and may not be replaced.
    """
    if not (target.exists() or target.is_symlink()):
        return
    own = target.is_dir() and not target.is_symlink() and (target / MANIFEST).is_file()
    if own and force:
        return
    if target.is_dir() and not target.is_symlink() and not any(target.iterdir()):
        return
    way = "pass --force to replace it, or another -o" if own else "pass another -o"
    kind = "an earlier output of this tool" if own else "not this tool's output"
    raise OutputError(f"{target}: exists already ({kind}). Remove it, or {way}.")


def _claim(partial: Path) -> int:
    """Make the staging folder, removing what a killed run left, and lock it; return the lock."""
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir(exist_ok=True)
        if any(partial.iterdir()) and not (partial / MARK).exists():
            raise OutputError(f"{partial}: in the way, and not this tool's. Remove it.")
        lock = os.open(partial / MARK, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise OutputError(
            f"{partial.parent}: cannot make a folder there: {error.strerror}. Pass another -o."
        ) from error
    if not _lock(lock):
        os.close(lock)
        raise OutputError(
            f"{partial}: another run is writing this output. Wait, or pass another -o."
        )
    for leftover in partial.iterdir():
        if leftover.name != MARK:
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    return lock


def _lock(descriptor: int) -> bool:
    try:
        import fcntl  # noqa: PLC0415 - absent on Windows, where two runs are not kept apart
    except ImportError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _publish(partial: Path, target: Path) -> None:
    """Rename the staged folder into place, and put the rename on the disk."""
    replaced = target.with_name(f".{target.name}.dora_export-replaced")
    old = target.exists() and any(target.iterdir())
    if old:
        shutil.rmtree(replaced, ignore_errors=True)
        target.rename(replaced)
    elif target.exists():
        target.rmdir()
    try:
        partial.rename(target)
    except OSError as error:
        if old:
            replaced.rename(target)
        raise OutputError(f"{target}: cannot be put in place: {error.strerror}.") from error
    sync_folder(target.parent)
    if old:
        shutil.rmtree(replaced)
