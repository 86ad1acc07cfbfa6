"""What the bytes of an output depend on, in words: two runs of one identity write the same bytes.

Side files are no part of it: every run writes them anew, from what is there then. Nor are threads
and block sizes, which change no byte.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any

from dora_export._version import __version__
from dora_export.engine import Resources, arithmetic_name
from dora_export.errors import InputError
from dora_export.machine import advice
from dora_export.plan import Plan, Step
from dora_export.tensors import DType, FileRange, HeldBytes
from dora_export.writers.journal import DERIVED, FORMAT, FORMAT_LABEL, Job

HASH_CHUNK = 1 << 20
# Of a base file no digest is known before all of it is read. Its size, its time and this much of it
# tell one model from another: training changes almost every weight.
SAMPLES, SAMPLE_BYTES = 16, 4096
OPTIONS = {
    "max_shard_bytes": "--max-shard-size",
    "weights": "--weight",
}  # where option and setting differ in name


def job(plan: Plan, resources: Resources, digests: Mapping[Path, str]) -> Job:
    """Return what a plan writes, and all that the bytes depend on.

    Args:
        plan: The plan.
        resources: Its device counts, since a GPU adds in another order.
        digests: SHA-256 of the adapters' files.

    Raises:
        InputError: A base file cannot be read.
    """
    identity = {
        FORMAT_LABEL: FORMAT,
        "dora-export": __version__,
        "arithmetic": f"{arithmetic_name(resources)}, {platform.machine()}",
        **{_option(name): value for name, value in _settings(plan)},
    }
    for path in base_files(plan):
        identity[f"base {plan.base.relative(path)}"] = _base_file(path)
    for i, adapter in enumerate(plan.adapters, 1):
        number = f" {i}" if len(plan.adapters) > 1 else ""
        for path in adapter.files:
            identity[f"adapter{number} {path.name}"] = f"sha256 {digests[path]}"
        for name, value in adapter.facts.items():
            identity[f"adapter{number}'s {name}"] = str(value)
    identity[DERIVED] = _plan_digest(plan)
    return Job(identity, {file.name: file.nbytes for file in plan.files})


def base_files(plan: Plan) -> list[Path]:
    """Return the base's weight files, in order."""
    return [file.path for file in plan.base.files if file.path is not None]


def adapter_digests(plan: Plan) -> dict[Path, str]:
    """Return the SHA-256 of each of the adapters' files.

    Raises:
        InputError: A file cannot be read.
    """
    return {path: _sha256(path) for path in plan.adapter_files}


def known_digest(path: Path) -> str | None:
    """Return a file's SHA-256 if it is told without reading: the Hugging Face cache's names do."""
    blob = path.resolve().name
    return blob if path.is_symlink() and re.fullmatch("[0-9a-f]{64}", blob) else None


def _settings(plan: Plan) -> Iterator[tuple[str, str]]:
    for entry in fields(plan.settings):
        value = getattr(plan.settings, entry.name)
        if isinstance(value, DType):
            value = value.name
        yield entry.name, "not given" if value in (None, ()) else str(value)


def _option(name: str) -> str:
    return OPTIONS.get(name, f"--{name.replace('_', '-')}")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while chunk := file.read(HASH_CHUNK):
                digest.update(chunk)
    except OSError as error:
        way = advice(error, "Check the file.")
        raise InputError(f"{path}: cannot be read: {error.strerror}. {way}") from error
    return digest.hexdigest()


def _base_file(path: Path) -> str:
    """Return size, time and a digest of samples; or the whole digest, where it is known.

    No inode: network file systems give a file another one after a restart.
    """
    digest = hashlib.sha256()
    try:
        status = path.stat()
        if (known := known_digest(path)) is not None:
            return f"{status.st_size} bytes, sha256 {known}"
        with path.open("rb", buffering=0) as file:
            for i in range(SAMPLES):
                file.seek(i * max(0, status.st_size - SAMPLE_BYTES) // (SAMPLES - 1))
                digest.update(file.read(SAMPLE_BYTES))
    except OSError as error:
        way = advice(error, "Check the file.")
        raise InputError(f"{path}: cannot be read: {error.strerror}. {way}") from error
    seconds, nanoseconds = divmod(status.st_mtime_ns, 10**9)
    modified = f"{time.strftime('%Y-%m-%d %H:%M:%S', time.gmtime(seconds))}.{nanoseconds:09} UTC"
    return f"{status.st_size} bytes, modified {modified}, samples {digest.hexdigest()[:16]}"


def _plan_digest(plan: Plan) -> str:
    """Return a digest of where every output byte comes from and what is done to it."""
    digest = hashlib.sha256()
    for file in plan.files:
        digest.update(repr((file.name, file.nbytes)).encode())
        digest.update(file.header)
        for step in file.steps:
            digest.update(repr(_step(step)).encode())
    return f"{len(plan.files)} files, {plan.output_bytes} bytes, {digest.hexdigest()[:16]}"


def _step(step: Step) -> tuple[Any, ...]:
    source = step.source.source
    at = (source.path.name, source.start) if isinstance(source, FileRange) else ()
    return (step.source.name, step.source.dtype.name, at, _canonical(step.changes))


def _canonical(value: Any) -> Any:
    """Return a value as nested tuples of plain values that are the same in every process."""
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, DType):
        return value.name
    if isinstance(value, HeldBytes):
        return value.nbytes
    if isinstance(value, os.PathLike):
        return os.path.basename(value)
    if is_dataclass(value):
        parts = (_canonical(getattr(value, name)) for name in _field_names(value.__class__))
        return (type(value).__qualname__, *parts)  # rearrangements may differ in their class alone
    if isinstance(value, tuple):
        return tuple(_canonical(v) for v in value)
    return _name(value) if callable(value) else value


@cache
def _field_names(kind: Any) -> tuple[str, ...]:
    return tuple(f.name for f in fields(kind))


def _name(function: Callable[..., Any]) -> str:
    name = getattr(function, "__qualname__", "<nameless>")
    assert "<" not in name, f"Bug: {function}: two of these could not be told apart; name it"
    return f"{function.__module__}.{name}"
