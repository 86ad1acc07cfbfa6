"""The page of a report as a file: whole or not at all, and never over someone else's file."""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from pathlib import Path

from dora_export.errors import OutputError, shown
from dora_export.verification.page import GENERATOR

HEAD_BYTES = 512  # within which our pages name themselves


def check_target(target: Path, *, force: bool) -> None:
    """Refuse a place where no page may be written.

    Raises:
        OutputError: Its folder is missing, or something is there that is not an earlier page of
            ours and ``force`` is not set; folders and devices are refused even then.
    """
    if not target.parent.is_dir():
        raise OutputError(f"{shown(target.parent)}: no such folder. Make it, or pass another file.")
    if not (target.exists() or target.is_symlink()):
        return
    if target.is_symlink() or not target.is_file():
        raise OutputError(f"{shown(target)}: not a regular file. Pass another file.")
    if not force and not _is_own(target):
        raise OutputError(
            f"{shown(target)}: exists already and is no report of this tool. Pass another file, "
            "or --force to replace it."
        )


def write(target: Path, page: str, *, force: bool) -> None:
    """Write a page: at any instant the file is what it was before, or whole.

    Raises:
        OutputError: As in ``check_target``, or the file system refuses.
    """
    check_target(target, force=force)
    partial: str | None = None
    try:
        prefix = f".{target.name[:100]}.dora_export-"
        handle, partial = tempfile.mkstemp(prefix=prefix, dir=target.parent)
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(page)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(partial, 0o666 & ~_umask())
        os.replace(partial, target)
    except OSError as error:
        raise OutputError(
            f"{shown(target)}: cannot be written: {error.strerror}. Pass another file."
        ) from error
    finally:
        if partial is not None:
            with suppress(OSError):  # gone by then, if all went well
                os.unlink(partial)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _is_own(target: Path) -> bool:
    try:
        with target.open("rb") as file:
            head = file.read(HEAD_BYTES)
    except OSError as error:
        raise OutputError(
            f"{shown(target)}: cannot be read: {error.strerror}. Pass another file."
        ) from error
    return head.startswith(b"<!DOCTYPE html>") and GENERATOR.encode() in head
