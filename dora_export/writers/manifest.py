"""The manifest ``dora_export.json`` and the model card: what went in, and what it became."""

from __future__ import annotations

import json
import platform
import re
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
from dora_export.limits import FACTOR
from dora_export.naming import parse_map_prefix
from dora_export.plan import Plan, Settings
from dora_export.storage.json_file import is_number
from dora_export.tensors import DTYPES
from dora_export.writers.identity import base_files, known_digest
from dora_export.writers.side_files import SideFile, licence
from dora_export.writers.staging import MANIFEST

SCHEMA = 2
PLAIN_YAML = re.compile(r"[A-Za-z][\w.+/-]*", re.ASCII)  # licences and hub ids
YAML_WORDS = ("null", "true", "false", "yes", "no", "on", "off", "y", "n")


def refuse_merged_base(folder: Path | None, *, allow: bool) -> None:
    """Refuse a base that this tool has merged an adapter into already.

    Raises:
        PlanError: It has a manifest, and ``allow`` is false.
    """
    if folder is None or allow or not (folder / MANIFEST).is_file():
        return
    said = read_json(folder / MANIFEST).get("adapters")
    entries = [a for a in said if isinstance(a, dict)] if isinstance(said, list) else []
    names = ", ".join(str(a.get("path", "an adapter")) for a in entries) or "an adapter"
    raise PlanError(
        f"{folder}: has {shown(names)} merged into it already ({MANIFEST}). Merge into the "
        "original base, or pass --allow-merged-base if this adapter was trained on the merged "
        "model."
    )


def beside_graph(graph: Path) -> Mapping[str, Any] | None:
    """Return what the manifest of a graph's folder says, or None where there is none.

    A graph that was re-weighted holds the merged values in its own type, whatever the base's is.

    Raises:
        InputError: It is no JSON object.
    """
    folder = graph.parent.parent if graph.parent.name == "onnx" else graph.parent
    if not (folder / MANIFEST).is_file():
        return None
    content = read_json(folder / MANIFEST)
    made, options = content.get("onnx"), content.get("options")
    if isinstance(made, dict) and isinstance(options, dict) and made.get("way") == "into":
        dtype = made.get("dtype")
        if isinstance(dtype, str) and dtype in DTYPES and DTYPES[dtype].mergeable:
            return {**content, "options": {**options, "dtype": dtype}}
    return content


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
    if isinstance(stored["weights"], tuple) and set(stored["weights"]) == {1.0}:
        stored["weights"] = ()
    taken = [
        f"{key} {_words(value)}"
        for key, value in stored.items()
        if given.get(key) is None and value != default[key]
    ]
    chosen = {k: v if given.get(k) is None else given[k] for k, v in stored.items()}
    notes = (f"as {MANIFEST} says: {shown(', '.join(taken))}",) if taken else ()
    return Settings(**chosen), notes


def _words(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(f"{v:g}" if isinstance(v, float) else str(v) for v in value)
    return str(getattr(value, "name", value))


def _is_factor(value: Any) -> bool:
    return is_number(value) and abs(value) <= FACTOR


def _stored_settings(said: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the settings in a manifest that decide what the result is, or None if malformed."""
    dtype, strength = said.get("dtype"), said.get("strength", 1.0)
    rule, layout = said.get("zero_norm", "refuse"), said.get("fan_in_fan_out")
    prefixes, weights = said.get("map_prefix", []), said.get("weights", [])
    sound = (
        (dtype is None or (isinstance(dtype, str) and dtype in DTYPES))
        and _is_factor(strength)
        and rule in ("refuse", "zero", "keep-base")
        and (layout is None or isinstance(layout, bool))
        and isinstance(weights, list)
        and all(_is_factor(w) for w in weights)
        and isinstance(prefixes, list)
        and all(isinstance(p, str) and "=" in p for p in prefixes)
    )
    if not sound:
        return None
    return {
        "dtype": None if dtype is None else DTYPES[dtype],
        "strength": float(strength),
        "weights": tuple(map(float, weights)),
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
        digests: SHA-256 of the adapters' files.
    """
    settings = plan.settings
    return {
        "schema": SCHEMA,
        "tool": {"name": "dora-export", "version": __version__},
        "base": {
            "path": plan.base.model_name,
            "files": [_weight_file(f, plan.base.relative(f)) for f in base_files(plan)],
        },
        "adapters": [
            {
                "path": adapter.path.name,
                "format": adapter.format,
                "weight": weight,
                "files": [{**_weight_file(f, f.name), "sha256": digests[f]} for f in adapter.files],
                "settings": dict(adapter.facts),
                "names": rule,
                "ignored": dict(adapter.ignored),
            }
            for adapter, weight, rule in zip(plan.adapters, plan.weights, plan.rules, strict=True)
        ],
        "options": {
            "device": "cpu" if resources.on_cpu else "cuda",
            "dtype": settings.dtype.name if settings.dtype else None,
            "precision": settings.precision,
            "strength": settings.strength,
            "weights": list(plan.weights),
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
    base = _inline(plan.base.model_name)
    names = [_inline(adapter.path.name) for adapter in plan.adapters]
    trained_on = dict.fromkeys(a.base_name for a in plan.adapters if a.base_name)
    front = [f"{key}: {_yaml(value)}" for key, value in licence(plan).items()]
    front += [f"base_model: {_yaml(name)}" for name in trained_on][:1]
    merged = sum(step.status == "merged" for step in plan.steps)
    methods = [f"- {_yaml(m.lower())}" for m in plan.method.split(", ")]
    lines = [
        "---", *front, "tags:", "- merged", *methods, "---", "",
        f"# {base} with {', '.join(names)}", "",
        f"The weights of `{base}` with {_adapters(plan)} merged into {merged} of "
        f"{sum(1 for _ in plan.steps)} tensors by dora-export {__version__}. No adapter is needed "
        f"to run it. `{MANIFEST}` lists what went in and what changed.", "",
        "The terms of the base model and of every adapter apply." if len(names) > 1
        else "The terms of the base model and of the adapter apply.", "",
    ]  # fmt: skip
    return "\n".join(lines).encode("utf-8", "backslashreplace")


def _adapters(plan: Plan) -> str:
    """Return the adapters in words, with weights and order where there are several."""
    found = [
        f"the {_inline(str(adapter.facts.get('method', 'LoRA')))} adapter "
        f"`{_inline(adapter.path.name)}`" + (f" at weight {weight:g}" if weight != 1.0 else "")
        for adapter, weight in zip(plan.adapters, plan.weights, strict=True)
    ]
    if len(found) == 1:
        return found[0]
    return f"{', '.join(found[:-1])} and {found[-1]}, in this order,"


def _yaml(text: str) -> str:
    """Return text from a stranger's file as a YAML value that is this text and nothing else."""
    if PLAIN_YAML.fullmatch(text) and text.lower() not in YAML_WORDS:
        return text
    return json.dumps(text, ensure_ascii=True)


def _inline(name: str) -> str:
    """Return a name fit for a line of Markdown: no line breaks, no marks that it would obey."""
    return "".join("?" if c in "`<>[]\\" else c for c in shown(name, 200))


def _weight_file(path: Path, name: str) -> dict[str, Any]:
    entry: dict[str, Any] = {"name": name, "bytes": path.stat().st_size}
    if (digest := known_digest(path)) is not None:
        entry["sha256"] = digest
    return entry
