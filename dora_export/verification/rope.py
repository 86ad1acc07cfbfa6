"""What a config says of rotary positions, in one spelling.

Up to version 4 transformers keeps ``rope_theta`` beside ``rope_scaling`` and older families have
names of their own; version 5 writes ``rope_parameters``, one for the model or one per layer type.
Source: transformers, modeling_rope_utils.py (RotaryEmbeddingConfigMixin).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dora_export.storage.json_file import same

# Old names of the base of the frequencies and of the rotated share of a head.
THETAS = ("rope_theta", "rotary_emb_base", "global_rope_theta")
LOCAL_THETAS = ("rope_local_base_freq", "local_rope_theta")
SHARES = ("partial_rotary_factor", "rotary_pct", "rope_pct")
LENGTH = "original_max_position_embeddings"
ROPE_KEYS = frozenset((*THETAS, *LOCAL_THETAS, *SHARES, LENGTH, "rope_scaling", "rope_parameters"))
SCALED = ("llama3", "yarn", "longrope")  # kinds that need the length of pre-training
# Old names, and layouts that are a class's own ("axial" in vision towers).
RENAMED = {"mrope": "default", "axial": "default", "su": "longrope"}
# What most classes take where a config is silent.
DEFAULTS = {"rope_theta": 10_000.0, "partial_rotary_factor": 1.0, "rope_type": "default"}

Parameters = dict[str, Any]


def rope_of(config: Mapping[str, Any]) -> dict[str, Parameters]:
    """Return the rotary parameters per layer type, under "" where all layers share them.

    Keys are those of transformers 5; what the config leaves to its class is absent.
    """
    stored = config.get("rope_parameters") or config.get("rope_scaling") or {}
    stored = stored if isinstance(stored, Mapping) else {"rope_type": stored}
    nested = {k: v for k, v in stored.items() if isinstance(v, Mapping)}
    if nested:
        return {kind: _parameters(config, p, THETAS) for kind, p in nested.items()}
    whole = _parameters(config, stored, THETAS)
    if any(config.get(key) is not None for key in LOCAL_THETAS):
        # The windowed layers have a base of their own, and no scaling.
        return {"full_attention": whole, "sliding_attention": _parameters(config, {}, LOCAL_THETAS)}
    return {"": whole}


def rope_changes(base: Mapping[str, Any], merged: Mapping[str, Any]) -> list[str]:
    """Return what the merged model's rotary positions are that the base's are not.

    Each entry reads like ``rope_theta: 5000.0, expected 10000.0``. A value that one config spells
    out and the other leaves to its class counts only if it is not what most classes take.
    """
    expected, found = rope_of(base), rope_of(merged)
    kinds = [k for k in dict.fromkeys((*expected, *found)) if k] or [""]
    changes = []
    for kind in kinds:
        here = expected.get(kind, expected.get(""))
        there = found.get(kind, found.get(""))
        if here is None or there is None:
            changes.append(f"rope_parameters: {'no' if there is None else 'extra'} '{kind}' layers")
            continue
        label = f"{kind}." if kind else ""
        changes += [f"{label}{c}" for c in _differences(here, there)]
    return list(dict.fromkeys(changes))


def _parameters(
    config: Mapping[str, Any], stored: Mapping[str, Any], thetas: tuple[str, ...]
) -> Parameters:
    found = {k: v for k, v in stored.items() if v is not None and k != "type"}
    kind = found.get("rope_type", stored.get("type")) or "default"
    found["rope_type"] = RENAMED.get(kind, kind) if isinstance(kind, str) else kind
    for key, names in (("rope_theta", thetas), ("partial_rotary_factor", SHARES)):
        said = [config[n] for n in names if config.get(n) is not None]
        if said:
            found.setdefault(key, said[0])
    if found["rope_type"] in SCALED:
        length = config.get(LENGTH) or found.get(LENGTH) or config.get("max_position_embeddings")
        found[LENGTH] = length
    else:
        found.pop(LENGTH, None)  # read by the kinds above only
    return found


def _differences(expected: Parameters, found: Parameters) -> list[str]:
    changes = []
    for key in sorted(expected.keys() | found.keys()):
        here, there = expected.get(key), found.get(key)
        if same(here, there):
            continue
        if here is None and key in ("rope_theta", "partial_rotary_factor"):
            continue  # the class's own value, spelled out
        if there is None and here == DEFAULTS.get(key):
            continue
        said = "missing" if there is None else there
        changes.append(f"{key}: {said}, expected {'none' if here is None else here}")
    return changes
