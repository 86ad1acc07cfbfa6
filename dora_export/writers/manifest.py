"""The manifest ``dora_export.json`` and the model card: what went in, and what it became."""

from __future__ import annotations

import hashlib
import json
import platform
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from dora_export._version import __version__
from dora_export.checkpoints.folder import read_json
from dora_export.engine import Resources
from dora_export.errors import PlanError, shown
from dora_export.plan import Plan
from dora_export.writers.side_files import SideFile, licence
from dora_export.writers.staging import MANIFEST

SCHEMA = 1
HASH_CHUNK = 1 << 20


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


def manifest(plan: Plan, resources: Resources, side_files: tuple[SideFile, ...]) -> dict[str, Any]:
    """Return the manifest's content. It holds no times, so equal runs give equal bytes."""
    settings = plan.settings
    return {
        "schema": SCHEMA,
        "tool": {"name": "dora-export", "version": __version__},
        "base": {
            "path": plan.base.model_name,
            "files": [_weight_file(f) for f in plan.base.sources],
        },
        "adapter": {
            "path": plan.adapter.path.name,
            "format": plan.adapter.format,
            "files": [{**_weight_file(f), "sha256": sha256(f)} for f in plan.adapter.files],
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


def sha256(path: Path) -> str:
    """Return the hex digest of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(HASH_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _weight_file(path: Path) -> dict[str, Any]:
    entry: dict[str, Any] = {"name": path.name, "bytes": path.stat().st_size}
    blob = path.resolve().name
    if path.is_symlink() and len(blob) == 64:
        entry["sha256"] = blob  # the Hugging Face cache names large files by their digest
    return entry
