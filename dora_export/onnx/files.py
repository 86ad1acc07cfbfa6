"""The files of a graph: written with their weights beside them, hashed, measured."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

CHUNK = 1 << 20


def sizes(folder: Path) -> dict[str, int]:
    """Return the bytes of every file below a folder, by its path there, hidden ones left out."""
    found = sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith("."))
    return {p.relative_to(folder).as_posix(): p.stat().st_size for p in found}


def digests(folder: Path, graphs: Iterable[str]) -> dict[str, str]:
    """Return the SHA-256 of graphs and of the files beside them that hold their weights."""
    found = {}
    for graph in graphs:
        path = folder / graph
        for file in sorted(path.parent.glob(f"{path.name}*")):
            digest = hashlib.sha256()
            with file.open("rb") as opened:
                while chunk := opened.read(CHUNK):
                    digest.update(chunk)
            found[file.relative_to(folder).as_posix()] = digest.hexdigest()
    return found
