"""From a trainer's order of the rows of B and m to the checkpoint's.

Rows of an out-axis update may be permuted, split and joined freely: each has its own norm. What
order they have depends on the base (size of a head, number of key-value groups, model type), which
a reader does not see: it names the order (``Update.row_order``), and here the base decides.

torchtune's q and k projections hold each rotary pair in neighbouring rows, as Meta's checkpoints
do; Hugging Face's hold the first halves of all pairs of a head before the second ones. For models
of other rotary code torchtune keeps Hugging Face's order. Its export to PEFT puts the rows of B
into Hugging Face's order for every model, also where they have it already, and those of m for none.
Source: github.com/pytorch/torchtune, torchtune/models/convert_weights.py (hf_to_tune,
tune_to_peft_adapter_weights), torchtune/models/*/_convert_weights.py.

Megatron fuses q, k and v: per key-value group the rows of its query heads, of its key head, of its
value head; and gate over up in linear_fc1. Source: github.com/NVIDIA-NeMo/Megatron-Bridge,
src/megatron/bridge/models/conversion/utils.py (split_qkv_weights), param_mapping.py
(GatedMLPMapping).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dora_export.checkpoints.model import Checkpoint
from dora_export.errors import PlanError, shown
from dora_export.tensors import Arrange, Operand
from dora_export.update import Update

ROTARY_LEAVES = ("q_proj", "k_proj")
# Models that torchtune trains with neighbouring rotary pairs, and with Hugging Face's order.
PAIRED = ("llama", "mistral", "gemma", "gemma2")  # no sets: a config may say anything, a list too
HALVED = ("qwen2", "qwen3")
# Its Llama 4, whose checkpoints hold neighbouring pairs as well: rows are the checkpoint's own.
# Source: torchtune/models/llama4/_convert_weights.py (llama4_hf_to_tune), after 0.6.1.
LLAMA4 = frozenset(("llama4", "llama4_text"))
# Models whose q, k and v Megatron fuses as said above (others gate their queries, or share heads).
GROUPED = frozenset(
    """llama mistral mixtral qwen2 qwen2_moe qwen3 qwen3_moe gemma gemma2 gemma3_text""".split()
)


@dataclass(frozen=True)
class ToHalves:
    """Rotary pairs in neighbouring rows, brought into the order of Hugging Face.

    Attributes:
        head: Rows of one head.
    """

    head: int

    def __call__(self, array: NDArray[Any]) -> NDArray[Any]:
        """Return the rows in the other order."""
        pairs = array.reshape(-1, self.head // 2, 2, *array.shape[1:])
        return np.swapaxes(pairs, 1, 2).reshape(array.shape)


@dataclass(frozen=True)
class ToPairs:
    """The reverse of ``ToHalves``.

    Attributes:
        head: Rows of one head.
    """

    head: int

    def __call__(self, array: NDArray[Any]) -> NDArray[Any]:
        """Return the rows in the other order."""
        halves = array.reshape(-1, 2, self.head // 2, *array.shape[1:])
        return np.swapaxes(halves, 1, 2).reshape(array.shape)


@dataclass(frozen=True)
class OfGroups:
    """Rows ``[first, last)`` of each of several groups of rows.

    Attributes:
        groups: How many groups.
        first: First row of each.
        last: One past the last row of each.
    """

    groups: int
    first: int
    last: int

    def __call__(self, array: NDArray[Any]) -> NDArray[Any]:
        """Return those rows, group after group."""
        rest = array.shape[1:]
        return array.reshape(self.groups, -1, *rest)[:, self.first : self.last].reshape(-1, *rest)


def with_row_orders(
    updates: Sequence[Update], shapes: Mapping[str, tuple[int, ...]], base: Checkpoint
) -> tuple[Update, ...]:
    """Return the updates with the rows of B and m in the order of the checkpoint.

    Args:
        updates: Under the checkpoint's names.
        shapes: Of the base tensors.
        base: The checkpoint.

    Raises:
        PlanError: The base does not say what decides, or the adapter leaves it open.
    """
    return tuple(_resolved(u, shapes, base) if u.row_order is not None else u for u in updates)


def for_torchtune(update: Update, base: Checkpoint) -> Update:
    """Return an update of the checkpoint's row order in the order that torchtune trains in.

    Raises:
        PlanError: The base's model type or head size, which decide, are not known.
    """
    paired = _rotary_pairs(update, base.setting("model_type"))
    if not paired or update.target.split(".")[-2] not in ROTARY_LEAVES:
        return update
    arrange = ToPairs(_head_dim(update, base))
    return replace(
        update,
        up=_arranged(update.up, arrange),
        magnitude=_arranged(update.magnitude, arrange),
    )


def _resolved(update: Update, shapes: Mapping[str, tuple[int, ...]], base: Checkpoint) -> Update:
    plain = replace(update, row_order=None)
    if update.row_order == "torchtune-peft?" and update.scales_bias and (
        f"{update.target.removesuffix('weight')}bias" in base.tensors
    ):  # fmt: skip
        raise _perhaps_torchtune(update, "scales the biases of DoRA layers as well")
    if update.row_order in ("torchtune", "torchtune-peft", "torchtune-peft?"):
        module = update.target.rpartition(".")[0].rpartition(".")[2]
        return _torchtune(update, plain, base) if module in ROTARY_LEAVES else plain
    if update.row_order == "torchtune-llama4":
        return _llama4(update, plain, base)
    shape = shapes.get(update.target)
    return plain if shape is None else _megatron(update, plain, shape, base)


def _torchtune(update: Update, plain: Update, base: Checkpoint) -> Update:
    model_type = base.setting("model_type")
    if update.row_order == "torchtune-peft?" and model_type not in (None, *PAIRED, *HALVED):
        return plain  # torchtune does not train it
    paired = _rotary_pairs(update, model_type)
    if update.row_order == "torchtune":
        change_up = change_magnitude = paired
    else:  # the export has permuted B once, and m never
        change_up, change_magnitude = not paired, paired and update.magnitude is not None
    if not (change_up or change_magnitude):
        return plain
    if update.row_order == "torchtune-peft?":
        raise _perhaps_torchtune(
            update, f"leaves {'m' if paired else 'B'} of q_proj and k_proj in another row order"
        )
    head = _head_dim(update, base)
    arrange: Arrange = ToHalves(head) if paired else ToPairs(head)
    return replace(
        plain,
        up=_arranged(update.up, arrange) if change_up else update.up,
        magnitude=_arranged(update.magnitude, arrange) if change_magnitude else update.magnitude,
    )


def _llama4(update: Update, plain: Update, base: Checkpoint) -> Update:
    if LLAMA4.intersection(base.model_types):
        return plain
    raise PlanError(
        f"{shown(update.target)}: of torchtune's Llama 4, by the names in the adapter, but the "
        f"base's config.json says model_type '{shown(base.config.get('model_type'))}'. Give the "
        "base that it was trained on, as a folder with its config.json."
    )


def _perhaps_torchtune(update: Update, what: str) -> PlanError:
    return PlanError(
        f"{shown(update.target)}: the adapter's config is as bare as torchtune's export to PEFT "
        f"writes it, and torchtune {what}. Pass --torchtune-dora-fix if torchtune made the "
        "adapter, --no-torchtune-dora-fix if it did not."
    )


def _arranged(operand: Operand | None, arrange: Arrange) -> Operand | None:
    return None if operand is None else operand.with_rows(arrange, operand.shape[0])


def _rotary_pairs(update: Update, model_type: object) -> bool:
    """Return whether torchtune trains this model with rotary pairs in neighbouring rows."""
    if model_type in PAIRED or model_type in HALVED:
        return model_type in PAIRED
    raise PlanError(
        f"{shown(update.target)}: the row order that torchtune trains in depends on the model, and "
        f"config.json says model_type '{shown(model_type)}'. Known: "
        f"{', '.join(sorted((*PAIRED, *HALVED)))}. Give the base as a folder with its "
        "config.json, or merge with torchtune."
    )


def _megatron(update: Update, plain: Update, shape: tuple[int, ...], base: Checkpoint) -> Update:
    assert update.up is not None, "Bug: fused rows come with a product"
    rows, fused = shape[0], update.up.shape[0]
    part = str(update.row_order).removeprefix("megatron-")
    if part in ("gate", "up"):
        if fused != 2 * rows:
            raise _not_fused(update, f"{2 * rows} (gate and up of {rows} rows each)", fused)
        arrange = OfGroups(1, 0, rows) if part == "gate" else OfGroups(1, rows, fused)
        return _cut(plain, arrange, rows)
    model_type = base.setting("model_type")
    if model_type not in GROUPED:
        raise PlanError(
            f"{shown(update.target)}: how Megatron fuses q, k and v depends on the model, and "
            f"config.json says model_type '{shown(model_type)}'. Known: "
            f"{', '.join(sorted(GROUPED))}. Export the merged model with Megatron-Bridge."
        )
    head = _head_dim(update, base)
    keys = (fused - rows) // 2 if part == "q" else rows
    queries = fused - 2 * keys
    groups = keys // head
    if keys <= 0 or queries <= 0 or keys % head or queries % (groups * head) or (
        part == "q" and queries != rows
    ):  # fmt: skip
        raise _not_fused(update, f"heads of {head} rows, the base's part having {rows}", fused)
    each = queries // groups  # rows of the queries of one group
    first = {"q": 0, "k": each, "v": each + head}[part]
    last = {"q": each, "k": each + head, "v": each + 2 * head}[part]
    return _cut(plain, OfGroups(groups, first, last), rows)


def _cut(update: Update, arrange: OfGroups, rows: int) -> Update:
    assert update.up is not None, "Bug: fused rows come with a product"
    m = update.magnitude
    return replace(
        update,
        up=update.up.with_rows(arrange, rows),
        magnitude=None if m is None else m.with_rows(arrange, rows),
    )


def _not_fused(update: Update, expected: str, fused: int) -> PlanError:
    return PlanError(
        f"{shown(update.target)}: the adapter's fused layer has {fused} rows, expected {expected}. "
        "Check that this is the base it was trained on, and that the adapter was saved from one "
        "tensor-parallel rank."
    )


def _head_dim(update: Update, base: Checkpoint) -> int:
    """Return the rows of one attention head, by config.json."""
    head = base.setting("head_dim")
    if head is None:
        hidden, heads = base.setting("hidden_size"), base.setting("num_attention_heads")
        if isinstance(hidden, int) and isinstance(heads, int) and heads > 0:
            head = hidden // heads
    assert update.up is not None, "Bug: rows in another order come with a product"
    if not isinstance(head, int) or head <= 0 or head % 2 or update.up.shape[0] % head:
        raise PlanError(
            f"{shown(update.target)}: its rows have to be put into the base's order, for which "
            f"config.json must say the size of a head; it says '{shown(head)}' for "
            f"{update.up.shape[0]} rows. Give the base as a folder with its config.json."
        )
    return head
