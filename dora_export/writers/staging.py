"""Publish whole or not at all: write into a hidden folder beside the output, then rename it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dora_export.errors import OutputError
from dora_export.writers.files import sync_folder
from dora_export.writers.names import hidden_name

MARK = ".dora_export-staging"
MANIFEST = "dora_export.json"


@contextmanager
def staged(target: Path, *, force: bool = False) -> Iterator[Path]:
    """Yield an empty folder; rename it to ``target`` if the block succeeds, else remove it.

    At any instant ``target`` is absent, what it was before, or whole. What a killed run left
    behind is removed by the next one.

    Args:
        target: Folder to publish.
        force: Replace ``target`` if it is an earlier output of this tool.

    Raises:
        OutputError: ``target`` exists and may not be replaced, another run is writing it, or the
            folder cannot be made.
    """
    check_target(target, force=force)
    partial = target.with_name(hidden_name(target.name, "partial"))
    made = [parent for parent in target.parents if not parent.exists()]
    lock = _claim(partial)
    try:
        _empty(partial)
        yield partial
        for folder, _, _ in os.walk(partial, onerror=_refuse_unlisted):
            sync_folder(Path(folder))
        _publish(partial, target, force=force)
    except BaseException:  # Ctrl-C too: half a model must never look like a whole one
        shutil.rmtree(partial, ignore_errors=True)
        with suppress(OSError):  # someone else's by now
            for parent in made:
                parent.rmdir()
        raise
    finally:
        if lock is not None:
            os.close(lock)


def check_target(target: Path, *, force: bool) -> None:
    """Refuse a target that exists, unless it is this tool's and ``force`` is set.

    Raises:
        OutputError: It exists and may not be replaced.
    """
    if not (target.exists() or target.is_symlink()):
        return
    own = _is_own(target)
    if own and force:
        return
    if target.is_dir() and not target.is_symlink() and not any(target.iterdir()):
        return
    way = "pass --force to replace it, or another -o" if own else "pass another -o"
    kind = "an earlier output of this tool" if own else "not this tool's output"
    raise OutputError(f"{target}: exists already ({kind}). Remove it, or {way}.")


def _is_own(folder: Path) -> bool:
    return folder.is_dir() and not folder.is_symlink() and (folder / MANIFEST).is_file()


def _claim(partial: Path) -> int | None:
    """Make the staging folder or take over what a killed run left; return its lock, if any.

    The lock is on the mark, which stays in the folder until it has its final name: whoever finds
    the folder under this name finds the mark, locked if a run is at work.
    """
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir(exist_ok=True)
        foreign = any(partial.iterdir()) and not (partial / MARK).exists()
        if foreign or partial.is_symlink():
            raise OutputError(f"{partial}: in the way, and not this tool's. Remove it.")
        lock = os.open(partial / MARK, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise OutputError(
            f"{partial.parent}: cannot make a folder there: {error.strerror}. Pass another -o."
        ) from error
    if not (_lock(lock) and _is_at(lock, partial / MARK)):
        os.close(lock)
        raise OutputError(
            f"{partial}: another run is writing this output. Wait, or pass another -o."
        )
    if os.name == "nt":  # where open files keep their folder from being renamed
        os.close(lock)
        return None
    return lock


def _lock(descriptor: int) -> bool:
    """Return whether no other run holds the lock."""
    try:
        import fcntl  # noqa: PLC0415 - absent on Windows, where two runs are not kept apart
    except ImportError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True  # a file system without locks
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    """Return whether an open file is still the one of that name."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except OSError:
        return False


def _empty(partial: Path) -> None:
    """Remove what a killed run left in the folder."""
    try:
        for leftover in partial.iterdir():
            if leftover.is_dir() and not leftover.is_symlink():
                shutil.rmtree(leftover)
            elif leftover.name != MARK:
                leftover.unlink()
    except OSError as error:
        raise OutputError(
            f"{partial}: what a killed run left there cannot be removed: {error.strerror}. "
            "Remove it, or pass another -o."
        ) from error


def _refuse_unlisted(error: OSError) -> None:
    """Stop a walk that would leave a folder out, and so out of what is synced."""
    raise OutputError(
        f"{error.filename}: cannot be listed: {error.strerror}. Nothing was published; check the "
        "disk."
    ) from error


def _publish(partial: Path, target: Path, *, force: bool) -> None:
    """Rename the staged folder into place, and put the rename on the disk."""
    check_target(target, force=force)  # again: a merge takes long enough for a folder to appear
    replaced = target.with_name(hidden_name(target.name, "replaced"))
    if _is_own(replaced):
        shutil.rmtree(replaced, ignore_errors=True)  # left by a run killed while it replaced
    old = _is_own(target)
    try:
        if old:
            target.rename(replaced)
        elif target.exists():
            target.rmdir()
        partial.rename(target)
    except BaseException as error:
        if old and not target.exists():
            replaced.rename(target)
        if isinstance(error, OSError):
            raise OutputError(
                f"{target}: cannot be put in place: {error.strerror}. Pass another -o."
            ) from error
        raise
    try:
        (target / MARK).unlink()
        sync_folder(target)
        sync_folder(target.parent)
    except (OSError, OutputError) as error:
        cause = error.__cause__ or error
        raise OutputError(
            f"{target}: whole and in place, but the disk does not confirm it: "
            f"{getattr(cause, 'strerror', cause)}. Check the disk, then run again with --force."
        ) from error
    if old:
        shutil.rmtree(replaced, ignore_errors=True)
