"""Settings of PEFT's LoRA variants: blocks, groups, pruned ranks and replicated layers.

Source: github.com/huggingface/peft 0.21.2, src/peft/tuners/lora/config.py (BdLoraConfig,
LoraConfig.layer_replication), src/peft/tuners/lora/variants.py (BdLoraLinearVariant),
src/peft/tuners/adalora/model.py (resize_modules_by_rank_pattern).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from dora_export.errors import shown
from dora_export.storage.json_file import is_number

MAX_LAYERS = 10_000  # more is a damaged file, not a model


@dataclass(frozen=True)
class Blocks:
    """BD-LoRA: factors stored as the blocks of a block-diagonal matrix.

    Attributes:
        count: Blocks of a factor.
        in_a: Parts of module paths whose A is in blocks.
        in_b: Parts of module paths whose B is in blocks.
    """

    count: int
    in_a: tuple[str, ...]
    in_b: tuple[str, ...]


def problems(raw: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is wrong with the settings of variants in an adapter_config.json."""
    if raw.get("use_bdlora") and not _is_blocks(raw["use_bdlora"]):
        yield (
            "use_bdlora: expected nblocks and lists target_modules_bd_a and target_modules_bd_b, "
            f"got {shown(raw['use_bdlora'])}"
        )
    if raw.get("use_qalora") and not _is_count(raw.get("qalora_group_size", 16)):
        yield f"qalora_group_size: expected a count, got {shown(raw['qalora_group_size'])}"
    replicated = raw.get("layer_replication")
    if replicated and not _are_ranges(replicated):
        yield f"layer_replication: expected pairs of layer numbers, got {shown(replicated)}"


def blocks(raw: Mapping[str, Any]) -> Blocks | None:
    """Return BD-LoRA's settings, or None where they are not set."""
    value = raw.get("use_bdlora")
    if not value:
        return None
    lists = (value.get(f"target_modules_bd_{part}") or () for part in "ab")
    return Blocks(value.get("nblocks", 1), *(tuple(names) for names in lists))


def ranges(raw: Mapping[str, Any]) -> tuple[tuple[int, int], ...]:
    """Return the ranges of layers that the model is made of; empty: the base's own layers."""
    return tuple((start, stop) for start, stop in raw.get("layer_replication") or ())


def adalora_problems(masks: Any, alpha: object) -> list[str]:
    """Return what is wrong with AdaLoRA's rank_pattern (names with masks) and lora_alpha.

    In the place of an alpha that is not positive, PEFT takes the rank: in training the one it began
    with, after loading the one it has pruned to.
    """
    right = isinstance(masks, dict) and all(
        isinstance(mask, list) and all(isinstance(kept, bool) for kept in mask)
        for mask in masks.values()
    )
    problems = [] if right else ["rank_pattern: expected a list of true and false per layer"]
    if is_number(alpha) and alpha < 0:
        problems.append(
            f"lora_alpha: {alpha}, for which PEFT's AdaLoRA takes one rank in training and another "
            "after loading. Set it to the rank that counts"
        )
    return problems


def kept_ranks(masks: Mapping[str, list[bool]]) -> dict[str, int]:
    """Return the rank that AdaLoRA has left to each module, by its path."""
    paths = (name.removeprefix("base_model.model.").partition(".lora_E")[0] for name in masks)
    return {path: sum(mask) for path, mask in zip(paths, masks.values(), strict=True)}


def _is_blocks(value: Any) -> bool:
    if not isinstance(value, dict) or not _is_count(value.get("nblocks", 1)):
        return False
    lists = [value.get(f"target_modules_bd_{part}") or [] for part in "ab"]
    return all(isinstance(n, list) and all(isinstance(p, str) for p in n) for n in lists)


def _are_ranges(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(pair, list)
        and len(pair) == 2
        and all(type(n) is int for n in pair)
        and 0 <= pair[0] < pair[1] <= MAX_LAYERS
        for pair in value
    )


def _is_count(value: Any) -> bool:
    return type(value) is int and value > 0
