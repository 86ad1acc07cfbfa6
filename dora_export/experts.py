"""Where a checkpoint keeps the experts that an adapter sees as one stack.

A trainer that stacks experts names an update after the stack (``....switch_mlp.gate_proj.weight``,
slice 3). A checkpoint may hold that very stack, or a tensor per expert
(``....experts.3.gate_proj.weight``, Mixtral's ``....experts.3.w1.weight``), or gate and up fused
into one tensor of all experts (``....experts.gate_up_proj``).

Source: github.com/ml-explore/mlx-lm, mlx_lm/models/*.py (sanitize); github.com/huggingface/
transformers, src/transformers/conversion_mapping.py and modeling_*.py of the models named here.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dora_export.checkpoints.model import Checkpoint
from dora_export.errors import PlanError, shown
from dora_export.tensors import Operand, TensorRef
from dora_export.update import Layout, Update

STACKS = ("switch_mlp", "experts")  # what the stacked module is called
PER_EXPERT = re.compile(r"(?P<parent>.+)\.experts\.(?P<index>\d+)\.(?P<leaf>[^.]+)\.weight")
FUSED = re.compile(r"(?P<parent>.+)\.experts\.(?P<leaf>gate_up_proj|down_proj)")
LEAVES = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}  # Mixtral's names and the others'
# model_type -> layout of the fused tensors, and whether rows of gate and up alternate.
FUSED_MODELS: Mapping[str, tuple[Layout, bool]] = {
    "gpt_oss": ("io", True),
    "llama4": ("io", False),
    "llama4_text": ("io", False),
    "qwen3_vl_moe": ("io", False),
    "qwen3_vl_moe_text": ("io", False),
    "qwen3_5_moe": ("oi", False),
    "qwen3_5_moe_text": ("oi", False),
}


@dataclass(frozen=True)
class Spread:
    """Rows put into a taller matrix of zeros, a fixed step apart.

    Attributes:
        total: Rows of the result.
        first: Where the first row goes.
        step: Distance from one to the next.
    """

    total: int
    first: int
    step: int

    def __call__(self, array: NDArray[Any]) -> NDArray[Any]:
        """Return the taller matrix."""
        out = np.zeros((self.total, *array.shape[1:]), array.dtype)
        out[self.first : self.first + self.step * array.shape[0] : self.step] = array
        return out


@dataclass(frozen=True)
class Stack:
    """The tensors that together are one stack of experts.

    Attributes:
        single: Expert -> its tensor, where each has its own.
        fused: The tensor of all experts, where gate and up may be fused.
        leaf: The part of it: "gate_proj", "up_proj" or "down_proj".
    """

    single: Mapping[int, TensorRef]
    fused: TensorRef | None = None
    leaf: str = ""

    @property
    def count(self) -> int:
        """Number of experts."""
        return self.fused.shape[0] if self.fused is not None else len(self.single)


def stacks(base: Checkpoint) -> dict[str, Stack]:
    """Return the stacks that a base stores in another way, by the name a trainer gives each."""
    singles: dict[str, dict[int, TensorRef]] = defaultdict(dict)
    found: dict[str, Stack] = {}
    for name, ref in base.tensors.items():
        if match := PER_EXPERT.fullmatch(name):
            leaf = LEAVES.get(match["leaf"], match["leaf"])
            for stack in STACKS:
                singles[f"{match['parent']}.{stack}.{leaf}.weight"][int(match["index"])] = ref
        elif (match := FUSED.fullmatch(name)) and len(ref.shape) == 3:
            gate_up = match["leaf"] == "gate_up_proj"
            for leaf in ("gate_proj", "up_proj") if gate_up else ("down_proj",):
                for stack in STACKS:
                    found[f"{match['parent']}.{stack}.{leaf}.weight"] = Stack({}, ref, leaf)
    found |= {name: Stack(experts) for name, experts in singles.items()}
    return {name: stack for name, stack in found.items() if name not in base.tensors}


def placed(
    updates: Sequence[Update], stacked: Mapping[str, Stack], base: Checkpoint
) -> tuple[Update, ...]:
    """Return the updates of stacks as updates of the tensors that the base has.

    Args:
        updates: Under the checkpoint's names or those of stacks.
        stacked: What ``stacks`` found.
        base: The checkpoint.

    Raises:
        PlanError: An adapter has other experts than the base, or the base fuses gate and up in a
            way that is not known.
    """
    for name, group in _by_stack(updates, stacked).items():
        indices = sorted({u.index for u in group if u.index is not None})
        if indices != list(range(stacked[name].count)):
            raise PlanError(
                f"{shown(name)}: the adapter has {len(indices)} experts, the base "
                f"{stacked[name].count}. Check that this is the base it was trained on."
            )
    return tuple(
        _placed(u, stacked[u.target], base) if u.index is not None and u.target in stacked else u
        for u in updates
    )


def _by_stack(
    updates: Iterable[Update], stacked: Mapping[str, Stack]
) -> Mapping[str, list[Update]]:
    groups: dict[str, list[Update]] = defaultdict(list)
    for update in updates:
        if update.target in stacked:
            groups[update.target].append(update)
    return groups


def _placed(update: Update, stack: Stack, base: Checkpoint) -> Update:
    assert update.index is not None, "Bug: only slices of stacks are placed"
    if stack.fused is None:
        return replace(update, target=stack.single[update.index].name, index=None)
    layout, alternate = _fused_layout(stack.fused, base)
    update = replace(update, target=stack.fused.name, layout=layout)
    if stack.leaf == "down_proj" or update.up is None:
        return update
    rows, position = update.up.shape[0], ("gate_proj", "up_proj").index(stack.leaf)
    if layout == "oi" and not alternate:
        return replace(update, rows=(position * rows, (position + 1) * rows))
    step = Spread(2 * rows, position if alternate else position * rows, 2 if alternate else 1)
    return replace(update, up=_spread(update.up, step))


def _spread(up: Operand, step: Spread) -> Operand:
    return up.with_rows(step, step.total)


def _fused_layout(ref: TensorRef, base: Checkpoint) -> tuple[Layout, bool]:
    text = base.config.get("text_config")
    inner = text.get("model_type") if isinstance(text, dict) else None
    for model_type in map(str, (base.config.get("model_type"), inner)):
        if model_type in FUSED_MODELS:
            return FUSED_MODELS[model_type]
    known = ", ".join(FUSED_MODELS)
    raise PlanError(
        f"{shown(ref.name)}: holds all experts in an order that depends on the model, and "
        f"'{shown(base.config.get('model_type'))}' is not among those known ({known}). "
        "Save the base with a tensor per expert, or merge with the trainer's own tool."
    )
