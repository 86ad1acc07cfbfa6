"""A base whose layers an adapter has repeated: the checkpoint with the layers that were trained.

PEFT's ``layer_replication`` stacks ranges of the base's layers anew, each copy with adapters of its
own. The copies share their base weights while they are trained; merged, each has its own.
Source: github.com/huggingface/peft 0.21.2, src/peft/tuners/tuners_utils.py (replicate_layers).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dora_export.checkpoints.model import Checkpoint, WeightFile
from dora_export.errors import PlanError, listing, shown
from dora_export.tensors import TensorRef

# Where PEFT looks for the list of layers: (model.)*layers, (bert.)encoder.layer, h.
LAYER = re.compile(
    r"(?P<list>(?:model\.)*layers|(?:model\.)*(?:bert\.)?encoder\.layer|(?:model\.)*h)"
    r"\.(?P<number>\d+)\.(?P<rest>.+)"
)
COUNTS = ("num_hidden_layers", "n_layer", "num_layers")  # what config.json calls their number
# Settings by which a model makes layers differ by their number. A list per layer is taken along
# with the layers; these are rules, and the copies would fall under another.
BY_NUMBER = (
    "first_k_dense_replace", "decoder_sparse_step", "mlp_only_layers", "moe_layer_freq",
    "sliding_window_pattern", "global_attn_every_n_layers", "no_rope_layer_interval",
    "interleave_moe_layer_step", "attn_layer_period", "expert_layer_period", "num_kv_shared_layers",
    "cross_attention_layers", "full_attention_interval",
)  # fmt: skip
# Lists with one value per layer.
PER_LAYER = frozenset(
    """layer_types mlp_layer_types no_rope_layers attention_types attention_layers
    layer_block_types head_dims moe_layers""".split()
)


@dataclass(frozen=True)
class Expanded:
    """A base with its layers stacked as the adapter says.

    Attributes:
        base: The checkpoint; tensors of copies have names of their own and share their bytes.
        edits: Keys of config.json that are others now, with their values.
        notes: What was done, for people.
    """

    base: Checkpoint
    edits: Mapping[str, Any]
    notes: tuple[str, ...]


def expanded(base: Checkpoint, ranges: Sequence[tuple[int, int]]) -> Expanded:
    """Return the base with layers ``start`` to ``stop - 1`` of each range, one range after another.

    Args:
        base: The base.
        ranges: ``[start, stop)`` by the base's numbers; none: nothing is changed.

    Raises:
        PlanError: The base's layers are not where PEFT looks for them, are fewer than the ranges
            ask for, or differ by their number in a way that config.json gives as a rule.
    """
    if not ranges:
        return Expanded(base, {}, ())
    count = _layer_count(base)
    beyond = [f"[{a}, {b}]" for a, b in ranges if b > count]
    if beyond:
        raise PlanError(
            f"{base.path}: has {count} layers, but the adapter's layer_replication asks for "
            f"{', '.join(beyond)}. Check that this is the base it was trained on."
        )
    order = [i for start, stop in ranges for i in range(start, stop)]
    copies: dict[int, list[int]] = defaultdict(list)
    for new, old in enumerate(order):
        copies[old].append(new)
    files = tuple(replace(f, tensors=_tensors(f, copies), data_start=0) for f in base.files)
    files = tuple(f for f in files if f.tensors)
    edits = _edits(base, count, order)
    note = f"layers replicated: {count} in the base, {len(order)} in the output"
    return Expanded(replace(base, files=files), edits, (note,))


def _layer_count(base: Checkpoint) -> int:
    found: dict[str, set[int]] = defaultdict(set)
    for name in base.tensors:
        if match := LAYER.fullmatch(name):
            found[match["list"]].add(int(match["number"]))
    if len(found) != 1:
        what = f"several lists of layers ({', '.join(sorted(found))})" if found else "no layers"
        raise PlanError(
            f"{base.path}: the adapter repeats layers (layer_replication), and the base has {what} "
            "under the names PEFT knows: model.layers, encoder.layer, h. Merge with PEFT."
        )
    numbers = next(iter(found.values()))
    if numbers != set(range(len(numbers))):
        raise PlanError(
            f"{base.path}: its layers are numbered {listing(map(str, sorted(numbers)))}\n"
            "without being consecutive from 0. Check that the base is complete."
        )
    return len(numbers)


def _tensors(file: WeightFile, copies: Mapping[int, Sequence[int]]) -> tuple[TensorRef, ...]:
    found = []
    for ref in file.tensors:
        match = LAYER.fullmatch(ref.name)
        if match is None:
            found.append(ref)
            continue
        prefix, new = match["list"], copies.get(int(match["number"]), ())
        found += [replace(ref, name=f"{prefix}.{i}.{match['rest']}") for i in new]
    return tuple(found)


def _edits(base: Checkpoint, count: int, order: Sequence[int]) -> dict[str, Any]:
    """Return what config.json has to say of the new layers; nothing where there is none."""
    if not base.config:
        return {}
    text = base.config.get("text_config")
    levels = [base.config, *([text] if isinstance(text, dict) else [])]
    rules = [k for k in BY_NUMBER for level in levels if level.get(k)]
    if rules and not any("layer_types" in level for level in levels):
        raise PlanError(
            f"{base.path}: the adapter repeats layers (layer_replication), and config.json makes "
            f"layers differ by a rule on their number ({shown(rules[0])}), which the copies would "
            "break. Merge with PEFT and save the model with code of your own."
        )
    edits: dict[str, Any] = {}
    for level in levels:
        for key, value in level.items():
            if key in COUNTS and value == count:
                edits[key] = len(order)
            elif isinstance(value, list) and len(value) == count and key in PER_LAYER:
                edits[key] = [value[i] for i in order]
    if not any(key in edits for key in COUNTS):
        raise PlanError(
            f"{base.path}: has {count} layers, but its config.json says so under none of "
            f"{', '.join(COUNTS)}, so the number of the new ones has no place. Correct it."
        )
    return edits
