"""Paths that strangers name, and links that they plant: nothing leads out of the folder.

A model folder may come from anyone. What its files name (shards, external data) and what lies in it
(links) could lead to any file of the user's, whose content would then go into the output. So names
must stay in the folder, and links may lead out of it only where the Hugging Face cache put them:
from ``models--org--name/snapshots/revision`` to ``models--org--name/blobs``, and from a folder that
older versions of huggingface_hub filled with links to such blobs. Any other place (shards on
another disk) is one that the user names, for one call: ``links_followed``.
Source: github.com/huggingface/huggingface_hub, src/huggingface_hub/file_download.py.
"""

from __future__ import annotations

import functools
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, ParamSpec, TypeVar

from dora_export.errors import InputError, shown

NAME_BYTES = 255  # the longest name that common file systems take
BLOB = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")  # git's SHA-1 or SHA-256 of a cached file

# Folders without links that links may lead into, by the user's word. A variable of the context and
# not an argument: what reads a config deep in a reader must not have to know of it.
_named: ContextVar[tuple[str, ...]] = ContextVar("folders that links may lead into", default=())
P = ParamSpec("P")
R = TypeVar("R")


def links_followed(function: Callable[P, R]) -> Callable[P, R]:
    """Let a function's keyword ``links_into``, folders, say where links may lead while it runs."""

    @functools.wraps(function)
    def call(*args: P.args, **named: P.kwargs) -> R:
        folders: Any = named.get("links_into", ())
        with _links_into([folders] if isinstance(folders, str | os.PathLike) else folders):
            return function(*args, **named)

    return call


@contextmanager
def _links_into(folders: Iterable[str | os.PathLike[str]]) -> Iterator[None]:
    """Follow links into these folders until the block ends.

    Raises:
        InputError: There is no such folder.
    """
    for folder in folders:
        if not os.path.isdir(folder):
            raise InputError(
                f"--links-into {shown(folder, 400)}: no such folder. Name the folder that the "
                "linked files are in."
            )
    places = tuple(os.path.realpath(folder) for folder in folders)
    before = _named.set(_named.get() + places)
    try:
        yield
    finally:
        _named.reset(before)


def inside(folder: Path, name: object, named_by: object) -> Path:
    """Return the path of a file that another file names, e.g. a shard by an index.

    The name is relative to ``folder``, with "/" between folders, and may be one of a file that is
    not there. If it is there, it is a regular file in the folder, or one of a Hugging Face cache.

    Args:
        folder: Folder that it must lie in, at any depth.
        name: The name, as the file says it.
        named_by: Who names it, for messages.

    Raises:
        InputError: The name leads out of the folder, on any system, or a link on the way does.
    """
    if not isinstance(name, str) or not stays_inside(name):
        raise InputError(
            f"{shown(named_by, 400)}: names a file outside its folder: '{shown(name)}'. "
            "Do not use this model."
        )
    path = folder.joinpath(*PurePosixPath(name).parts)
    if path.exists():
        return contained(path, folder)
    _refuse_leading_out(path, folder)
    return path


def stays_inside(name: str) -> bool:
    """Return whether a name means a file below the folder it is relative to, on any system."""
    parts = re.split(r"[/\\]", name)
    try:
        longest = max(len(part.encode()) for part in parts)
    except UnicodeEncodeError:  # half a character
        return False
    return (
        0 < longest <= NAME_BYTES
        and "\\" not in name
        and "\0" not in name
        and not any(part in ("", ".", "..") for part in parts)
        and not PurePosixPath(name).is_absolute()
        and not (PureWindowsPath(name).drive or PureWindowsPath(name).root)
    )


def contained(path: Path, folder: Path) -> Path:
    """Return ``path``, a file in ``folder``, if reading it reads nothing outside.

    Raises:
        InputError: It is neither a regular file nor a link to one in the folder or in a cache.
    """
    _refuse_leading_out(path, folder)
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise InputError(
            f"{shown(path, 400)}: cannot be read: {error.strerror}. Check the path."
        ) from error
    if not stat.S_ISREG(mode):
        raise InputError(f"{shown(path, 400)}: not a regular file. Remove it, or copy one there.")
    return path


def _refuse_leading_out(path: Path, folder: Path) -> None:
    if leads_out(path, folder):
        raise InputError(
            f"{shown(path, 400)}: a link that leads out of its folder, to "
            f"{shown(os.path.realpath(path), 400)}. If that file is meant, pass --links-into with "
            "its folder, or put a copy of it in place of the link."
        )


def leads_out(path: Path, folder: Path) -> bool:
    """Return whether a path leads out of a folder by a link, other than to a cache's blob.

    And other than into a folder that the user has named.
    """
    home, place = os.path.realpath(folder), os.path.realpath(path)
    if place == os.path.join(home, os.path.relpath(path, folder)):
        return False  # no link on the way
    if any(os.path.commonpath([root, place]) == root for root in (home, *_named.get())):
        return False
    return not _is_blob(Path(place))


def _is_blob(place: Path) -> bool:
    """Return whether a path without links is that of a blob in a Hugging Face cache."""
    return (
        place.parent.name == "blobs"
        and place.parent.parent.name.startswith(("models--", "datasets--", "spaces--"))
        and BLOB.fullmatch(place.name) is not None
    )
