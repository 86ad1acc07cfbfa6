"""Several adapters in one merge: which of them go together, and what each one's tensors are called.

Adapters on different tensors know nothing of each other. On one tensor they are applied in turn
(see ``plan.plan_merge``). What has no defined meaning is refused here by name.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np

from dora_export.adapters.model import Adapter
from dora_export.errors import PlanError, shown
from dora_export.tensors import TensorRef
from dora_export.update import Update

COMPARED_ELEMENTS = 1 << 20


def check_weights(weights: Sequence[float], count: int) -> None:
    """Refuse weights that are not one per adapter.

    Raises:
        PlanError: There are more or fewer, or one is not finite.
    """
    if weights and len(weights) != count:
        raise PlanError(
            f"{len(weights)} weights for {count} adapters. Pass --weight once per adapter, in "
            "their order, or not at all (1 each)."
        )
    if not all(math.isfinite(w) for w in weights):
        raise PlanError(f"--weight {weights}: expected finite numbers.")


def refuse_repeated(paths: Sequence[Path]) -> None:
    """Refuse an adapter that is given twice.

    Raises:
        PlanError: One is.
    """
    seen: set[str] = set()
    for path in paths:
        if (real := os.path.realpath(path)) in seen:
            raise PlanError(
                f"{shown(path, 400)}: given twice. Leave it out once; to apply it more strongly, "
                "pass --weight."
            )
        seen.add(real)


def labelled(adapters: Sequence[Adapter]) -> list[Adapter]:
    """Return the adapters with tensor names of their own: "1:..." where there are several."""
    if len(adapters) == 1:
        return list(adapters)
    return [_labelled(adapter, f"{i}:") for i, adapter in enumerate(adapters, 1)]


def _labelled(adapter: Adapter, label: str) -> Adapter:
    return replace(
        adapter,
        tensors={label + name: ref for name, ref in adapter.tensors.items()},
        ignored={label + name: why for name, why in adapter.ignored.items()},
        updates=tuple(u.taken(0, 1.0, label) for u in adapter.updates),
    )


def layer_replication(adapters: Sequence[Adapter]) -> tuple[tuple[int, int], ...]:
    """Return the ranges of layers that the adapters were trained on: the same for all; none: ().

    Raises:
        PlanError: They differ.
    """
    found = {adapter.layer_replication for adapter in adapters}
    if len(found) > 1:
        raise PlanError(
            "the adapters were trained on other stacks of the base's layers (layer_replication of "
            "adapter_config.json), so they change different models. Merge them apart."
        )
    return found.pop() if found else ()


def once(updates: Iterable[Update]) -> list[Update]:
    """Return the updates with replacements by the same bytes as one.

    Adapters of one training setup often save the same embeddings along. Where their weights add up
    to one, or each is one, the result is that copy; other weights leave open how much of it.

    Raises:
        PlanError: They do.
    """
    found: list[list[Update]] = []
    replacing: list[list[Update]] = []  # few, beside the many products of a mixture of experts
    for update in updates:
        same = next((group for group in replacing if _repeats(update, group[0])), None)
        if same is not None:
            same.append(update)
            continue
        found.append([update])
        if update.kind == "replace":
            replacing.append(found[-1])
    return [group[0] if len(group) == 1 else _one(group) for group in found]


def _repeats(update: Update, other: Update) -> bool:
    return (
        update.kind == other.kind == "replace"
        and update.adapter != other.adapter
        and update.target == other.target
        and (update.index, update.rows) == (other.index, other.rows)
        and update.value is not None
        and other.value is not None
        and _equal(update.value, other.value)
    )


def _one(group: Sequence[Update]) -> Update:
    weights = [u.weight for u in group]
    if set(weights) != {1.0} and not math.isclose(sum(weights), 1.0, rel_tol=1e-12):
        raise PlanError(
            f"{shown(group[0].target)}: {len(group)} adapters hold the same whole copy of it, at "
            f"weights {', '.join(f'{w:g}' for w in weights)}, which leave open how much of it to "
            "take. Pass weights that add up to 1, or 1 for each."
        )
    keys = tuple(key for u in group for key in u.source_keys)
    return replace(group[0], source_keys=keys, weight=1.0)


def _equal(a: TensorRef, b: TensorRef) -> bool:
    if a.shape != b.shape or a.dtype is not b.dtype:
        return False
    for start in range(0, a.size, COMPARED_ELEMENTS):
        stop = min(start + COMPARED_ELEMENTS, a.size)
        if not np.array_equal(a.raw(start, stop), b.raw(start, stop)):
            return False
    return True


def weighted(updates: Sequence[Update]) -> Sequence[Update]:
    """Return one adapter's updates of a tensor, weights in the scalings where all are added."""
    if all(u.additive for u in updates):
        return [u.weighted_scaling() for u in updates]
    return updates


def conflicts(name: str, group: Sequence[Update]) -> Iterator[str]:
    """Yield what keeps the updates of several adapters from having a meaning on one tensor.

    Args:
        name: The tensor.
        group: Its updates, each fit to be applied alone.
    """
    for a, b in combinations(group, 2):
        if a.adapter != b.adapter and (why := _conflict(a, b)):
            yield f"{shown(name)}: {why} (adapters {a.adapter + 1} and {b.adapter + 1})"


def _conflict(a: Update, b: Update) -> str | None:
    kinds = {a.kind, b.kind}
    if kinds == {"replace"}:
        return "each brings its own whole copy of it" if a.meets(b) else None
    if "replace" in kinds:
        return "one replaces it, the other changes it"
    if kinds == {"rows"}:
        shared = sorted(set(a.row_indices) & set(b.row_indices))
        return f"each trained its own rows {shared[:5]}" if shared else None
    if "rows" in kinds:
        return "trained tokens and LoRA on one tensor have no defined order"
    if not a.meets(b):
        return None
    if a.magnitude_is_factor or b.magnitude_is_factor:
        return "magnitudes that were divided by the norm beforehand do not mix with other changes"
    if (a.index, a.rows) != (b.index, b.rows):
        return "one changes all of it, the other a part"
    return None
