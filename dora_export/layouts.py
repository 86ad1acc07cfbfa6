"""Which square weights are stored ``(in, out)``: the one thing shapes cannot tell."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from dora_export.adapters.model import Adapter
from dora_export.checkpoints.model import Checkpoint
from dora_export.update import Layout, Update

# Models whose weights are transformers' Conv1D, and the modules that are. Other models use the
# same names for Linear layers (GPT-Neo, GPT-BigCode) or hold one of these (encoder-decoders).
# Source: github.com/huggingface/transformers, src/transformers/models/*/modeling_*.py.
CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp")
CONV1D_MODULES = ("c_attn", "c_proj", "c_fc", "q_attn")


@dataclass(frozen=True)
class _Evidence:
    """What decides about square weights.

    Attributes:
        model_type: Of the model's config.json, by tensor; None where there is none.
        biases: Module name -> layouts that the biases of its weights that are not square show.
        factors: Module name -> layouts that the adapter's A and B show for such weights.
        square_io: What the adapter says of its layers, one word for all of them.
    """

    model_type: Callable[[str], str | None]
    biases: Mapping[str, set[Layout]]
    factors: Mapping[str, set[Layout]]
    square_io: bool


def with_layouts(
    updates: Sequence[Update],
    shapes: Mapping[str, tuple[int, ...]],
    checkpoint: Checkpoint,
    adapter: Adapter,
    fan_in_fan_out: bool | None,
) -> tuple[Update, ...]:
    """Return the updates with the layout of every square weight decided.

    Evidence, strongest first: what the user says; the model's type in config.json, for the names
    of Conv1D layers; weights of the same name that are not square, by their biases or by the
    adapter's factors; the same of all Conv1D names, or of all others; what the adapter says.

    What a function makes of a weight is laid as the product beside it, else by the same evidence.

    Args:
        updates: Under the checkpoint's names.
        shapes: Of the base tensors.
        checkpoint: The base.
        adapter: Where the updates come from.
        fan_in_fan_out: What the user says, or None.
    """
    open_ = [u for u in updates if u.layout is None and u.added is not None]
    square = {u.target for u in open_ if _square(shapes.get(u.target, ()))}
    if not square and all(u.function is None for u in updates):
        return tuple(updates)
    told = [u for u in open_ if u.target in shapes and u.target not in square]
    evidence = _Evidence(
        lambda tensor: checkpoint.config_of(tensor).get("model_type"),
        _by_biases(checkpoint),
        _by_module((u.target, u.layout_by_shape(shapes[u.target])) for u in told),
        bool(adapter.square_io),
    )

    def decided(update: Update) -> Layout:
        if fan_in_fan_out is not None:
            return "io" if fan_in_fan_out else "oi"
        model_type = evidence.model_type(update.target)
        return _square_layout(_module(update.target), model_type, evidence)

    laid = [
        replace(u, layout=decided(u)) if u.target in square and u.layout is None else u
        for u in updates
    ]
    known = {u.target: u.layout or u.layout_by_shape(shapes[u.target])
             for u in laid if u.added is not None and u.target in shapes}  # fmt: skip
    return tuple(
        replace(u, layout=known.get(u.target) or decided(u))
        if u.function is not None and u.layout is None and len(shapes.get(u.target, ())) == 2
        else u
        for u in laid
    )


def _square(shape: tuple[int, ...]) -> bool:
    return len(shape) == 2 and shape[0] == shape[1]


def _square_layout(module: str, model_type: str | None, evidence: _Evidence) -> Layout:
    conv1d_name = module in CONV1D_MODULES
    if model_type in CONV1D_MODELS:
        return "io" if conv1d_name else "oi"
    if model_type is not None and not conv1d_name:
        return "oi"
    kin = {m for m in (*evidence.biases, *evidence.factors) if (m in CONV1D_MODULES) == conv1d_name}
    for names in ({module}, kin):
        for layouts in (evidence.biases, evidence.factors):
            found = {layout for name in names for layout in layouts.get(name, ())}
            if len(found) == 1:
                return found.pop()
    # One word for a whole adapter: where it has Conv1D layers as well, the word is about those.
    others = not conv1d_name and any(m in CONV1D_MODULES for m in evidence.factors)
    return "io" if evidence.square_io and not others else "oi"


def _by_biases(checkpoint: Checkpoint) -> Mapping[str, set[Layout]]:
    """Return the layouts of weights that are not square: a bias has as many elements as outputs."""
    found: list[tuple[str, Layout | None]] = []
    for name, ref in checkpoint.tensors.items():
        bias = checkpoint.tensors.get(f"{name.removesuffix('weight')}bias")
        if name.endswith(".weight") and bias is not None and len(ref.shape) == 2:
            rows, columns = ref.shape
            if rows != columns and bias.shape in ((rows,), (columns,)):
                found.append((name, "oi" if bias.shape == (rows,) else "io"))
    return _by_module(found)


def _by_module(found: Iterable[tuple[str, Layout | None]]) -> Mapping[str, set[Layout]]:
    layouts: dict[str, set[Layout]] = defaultdict(set)
    for name, layout in found:
        if layout is not None:
            layouts[_module(name)].add(layout)
    return layouts


def _module(tensor: str) -> str:
    """Return the name of the module that a weight belongs to."""
    return tensor.split(".")[-2] if tensor.count(".") else ""
