"""Which square weights are stored ``(in, out)``: the one thing shapes cannot tell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from dora_export.adapters.model import Adapter
from dora_export.checkpoints.model import Checkpoint
from dora_export.update import Layout, Update

# Models whose weights are transformers' Conv1D, and the modules that are.
# Source: github.com/huggingface/transformers, src/transformers/models/*/modeling_*.py.
CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp")
CONV1D_MODULES = ("c_attn", "c_proj", "c_fc", "q_attn")


def with_layouts(
    updates: Sequence[Update],
    shapes: Mapping[str, tuple[int, ...]],
    checkpoint: Checkpoint,
    adapter: Adapter,
    fan_in_fan_out: bool | None,
) -> tuple[Update, ...]:
    """Return the updates with the layout of every square weight decided.

    Evidence, strongest first: what the user says; the model's type in config.json; the other
    layers of the same adapter, where they all agree; what the adapter says.

    Args:
        updates: Under the checkpoint's names.
        shapes: Of the base tensors.
        checkpoint: The base.
        adapter: Where the updates come from.
        fan_in_fan_out: What the user says, or None.
    """
    open_ = [u for u in updates if u.layout is None and u.down is not None]
    square = {u.target for u in open_ if _square(shapes.get(u.target, ()))}
    seen = {u.layout_by_shape(shapes[u.target]) for u in open_
            if u.target in shapes and u.target not in square}  # fmt: skip
    return tuple(
        replace(u, layout=_square_layout(u, checkpoint, adapter, seen, fan_in_fan_out))
        if u.target in square and u.layout is None
        else u
        for u in updates
    )


def _square(shape: tuple[int, ...]) -> bool:
    return len(shape) == 2 and shape[0] == shape[1]


def _square_layout(
    update: Update,
    checkpoint: Checkpoint,
    adapter: Adapter,
    seen: set[Layout | None],
    fan_in_fan_out: bool | None,
) -> Layout:
    if fan_in_fan_out is not None:
        return "io" if fan_in_fan_out else "oi"
    model_type = checkpoint.config.get("model_type")
    if model_type is not None:
        module = update.target.split(".")[-2:-1]
        return "io" if model_type in CONV1D_MODELS and module[0] in CONV1D_MODULES else "oi"
    if len(seen) == 1 and (layout := next(iter(seen))) is not None:
        return layout
    return "io" if adapter.square_io else "oi"
