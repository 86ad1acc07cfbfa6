"""The manifest ``dora_export.json`` and the model card: what went in, and what it became."""

from __future__ import annotations

import json
import math
import platform
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from dora_export._version import __version__
from dora_export.checkpoints.folder import read_json
from dora_export.engine import Resources
from dora_export.errors import InputError, PlanError, shown
from dora_export.naming import parse_map_prefix
from dora_export.plan import Plan, Settings
from dora_export.tensors import DTYPES
from dora_export.writers.identity import base_files, known_digest
from dora_export.writers.side_files import SideFile, licence
from dora_export.writers.staging import MANIFEST

SCHEMA = 1


def refuse_merged_base(folder: Path | None, *, allow: bool) -> None:
    """Refuse a base that this tool has merged an adapter into already.

    Raises:
        PlanError: It has a manifest, and ``allow`` is false.
    """
    if folder is None or allow or not (folder / MANIFEST).is_file():
        return
    said = read_json(folder / MANIFEST).get("adapter")
    adapter = shown(said.get("path", "an adapter") if isinstance(said, dict) else "an adapter")
    raise PlanError(
        f"{folder}: has {adapter} merged into it already ({MANIFEST}). Merge into the original "
        "base, or pass --allow-merged-base if this adapter was trained on the merged model."
    )


def settings_of(
    manifest: Mapping[str, Any] | None, given: Mapping[str, Any]
) -> tuple[Settings, tuple[str, ...]]:
    """Return the settings that a merged model was, or should have been, made with.

    Args:
        manifest: What its ``dora_export.json`` says, or None where another tool made it.
        given: What the user says, by field of ``Settings``; None where nothing. The user wins.

    Returns:
        The settings, and what was taken from the manifest, for people.

    Raises:
        InputError: The manifest's options are not ones that this tool writes.
    """
    said = manifest.get("options", {}) if manifest is not None else {}
    stored = _stored_settings(said) if isinstance(said, dict) else None
    if stored is None:
        raise InputError(
            f"{MANIFEST}: its options are not those of a merge. Remove it, and pass the options."
        )
    default = asdict(Settings())
    taken = [
        f"{key} {getattr(value, 'name', value)}"
        for key, value in stored.items()
        if given.get(key) is None and value != default[key]
    ]
    chosen = {k: v if given.get(k) is None else given[k] for k, v in stored.items()}
    notes = (f"as {MANIFEST} says: {shown(', '.join(taken))}",) if taken else ()
    return Settings(**chosen), notes


def _stored_settings(said: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the settings in a manifest that decide what the result is, or None if malformed."""
    dtype, strength = said.get("dtype"), said.get("strength", 1.0)
    rule, layout = said.get("zero_norm", "refuse"), said.get("fan_in_fan_out")
    prefixes = said.get("map_prefix", [])
    sound = (
        (dtype is None or (isinstance(dtype, str) and dtype in DTYPES))
        and type(strength) in (int, float)
        and math.isfinite(strength)
        and rule in ("refuse", "zero", "keep-base")
        and (layout is None or isinstance(layout, bool))
        and isinstance(prefixes, list)
        and all(isinstance(p, str) and "=" in p for p in prefixes)
    )
    if not sound:
        return None
    return {
        "dtype": None if dtype is None else DTYPES[dtype],
        "strength": float(strength),
        "zero_norm": rule,
        "map_prefix": parse_map_prefix(prefixes),
        "fan_in_fan_out": layout,
    }


def manifest(
    plan: Plan,
    resources: Resources,
    side_files: tuple[SideFile, ...],
    digests: Mapping[Path, str],
) -> dict[str, Any]:
    """Return the manifest's content. It holds no times, so equal runs give equal bytes.

    Args:
        plan: The plan.
        resources: What the run used.
        side_files: What was taken over.
        digests: SHA-256 of the adapter's files.
    """
    settings = plan.settings
    return {
        "schema": SCHEMA,
        "tool": {"name": "dora-export", "version": __version__},
        "base": {
            "path": plan.base.model_name,
            "files": [_weight_file(f, plan.base.relative(f)) for f in base_files(plan)],
        },
        "adapter": {
            "path": plan.adapter.path.name,
            "format": plan.adapter.format,
            "files": [{**_weight_file(f, f.name), "sha256": d} for f, d in digests.items()],
            "settings": dict(plan.adapter.facts),
            "names": plan.rule,
            "ignored": dict(plan.ignored),
        },
        "options": {
            "device": "cpu" if resources.on_cpu else "cuda",
            "dtype": settings.dtype.name if settings.dtype else None,
            "precision": settings.precision,
            "strength": settings.strength,
            "zero_norm": settings.zero_norm,
            "map_prefix": [f"{old}={new}" for old, new in settings.map_prefix],
            "fan_in_fan_out": settings.fan_in_fan_out,
            "max_shard_bytes": settings.max_shard_bytes,
        },
        "arithmetic": {"numpy": np.__version__, "machine": platform.machine()},
        "tensors": dict(Counter(step.status for step in plan.steps)),
        "changed": {
            step.name: {"status": step.status, "adapter_tensors": list(step.consumes)}
            for step in plan.steps
            if step.status not in ("unchanged", "cast")
        },
        "config_edits": dict(plan.config_edits),
        "from_adapter": [f.name for f in side_files if f.owner == "adapter"],
        "notes": [*plan.notes, *plan.warnings],
    }


def as_json(content: dict[str, Any]) -> bytes:
    """Return the manifest as it is stored; file names that are no text keep JSON's escapes."""
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    return text.encode("utf-8", "backslashreplace")


def model_card(plan: Plan) -> bytes:
    """Return a short model card that keeps the base's licence and says how the model was made."""
    base, adapter = plan.base.model_name, plan.adapter.path.name
    front = [f"{key}: {value}" for key, value in licence(plan).items()]
    front += [f"base_model: {plan.adapter.base_name}"] if plan.adapter.base_name else []
    merged = sum(step.status == "merged" for step in plan.steps)
    method = plan.adapter.facts.get("method", "LoRA")
    lines = [
        "---", *front, "tags:", "- merged", f"- {str(method).lower()}", "---", "",
        f"# {base} with {adapter}", "",
        f"The weights of `{base}` with the {method} adapter `{adapter}` merged into {merged} of "
        f"{sum(1 for _ in plan.steps)} tensors by dora-export {__version__}. No adapter is needed "
        f"to run it. `{MANIFEST}` lists what went in and what changed.", "",
        "The terms of the base model and of the adapter apply.", "",
    ]  # fmt: skip
    return "\n".join(lines).encode("utf-8", "backslashreplace")


def _weight_file(path: Path, name: str) -> dict[str, Any]:
    entry: dict[str, Any] = {"name": name, "bytes": path.stat().st_size}
    if (digest := known_digest(path)) is not None:
        entry["sha256"] = digest
    return entry
