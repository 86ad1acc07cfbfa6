"""Tied embeddings: what an adapter on one end, or on both, does to a tensor with two roles.

In a tied model the input embedding and the output head are one tensor, often stored once. An
adapter that changes one role must not change the other: then both are written and
``tie_word_embeddings`` becomes false. Where both roles change alike, they stay tied.

Source: PEFT's unmerged forward, not its merge (which changes both ends, or adds an update twice);
which tensors it stores: github.com/huggingface/peft, src/peft/utils/save_and_load.py,
src/peft/tuners/lora/model.py (ensure_weight_tying).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from dora_export.adapters.model import Adapter
from dora_export.cast import widened
from dora_export.checkpoints.model import Checkpoint
from dora_export.errors import PlanError, shown
from dora_export.tensors import Operand, TensorRef
from dora_export.update import Update

EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings")
HEADS = ("lm_head", "embed_out")
WITH_HEAD = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
# More than two tied tensors, or names of their own: the pair below would be incomplete.
SHARED_BY_MORE = ("t5", "mt5", "umt5", "bart", "mbart", "pegasus", "longt5", "led", "m2m_100")


@dataclass(frozen=True)
class Tying:
    """What tying asks of a plan.

    Attributes:
        updates: All updates, those of the two ends as they should be applied.
        sources: Tensors whose base values come from another one (head -> embedding).
        new_head: Name of a head that the base does not store and the output must, or None.
        untie: Whether ``tie_word_embeddings`` becomes false.
        notes: What was decided, for people.
        twins: Adapter tensors that repeat what another one says, and were checked to.
    """

    updates: tuple[Update, ...]
    sources: Mapping[str, TensorRef]
    new_head: str | None = None
    untie: bool = False
    notes: tuple[str, ...] = ()
    twins: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Ends:
    embedding: str
    head: str


def head_of(checkpoint: Checkpoint, targets: Sequence[str]) -> str | None:
    """Return the name of a tied head that an adapter targets though the base does not store it."""
    ends = _tied_ends(checkpoint, targets)
    return ends.head if ends and ends.head not in checkpoint.tensors else None


def resolve(checkpoint: Checkpoint, adapter: Adapter, updates: Sequence[Update],
            saved_embeddings: frozenset[str]) -> Tying:  # fmt: skip
    """Return what becomes of the two ends of a tied model.

    Args:
        checkpoint: The base.
        adapter: Where the updates come from.
        updates: Updates under the checkpoint's names.
        saved_embeddings: ``adapter.saved_embeddings`` under the checkpoint's names.

    Raises:
        PlanError: The ends are tied in a way this tool does not know.
    """
    ends = _tied_ends(checkpoint, [u.target for u in updates])
    if ends is None:
        return Tying(tuple(updates), {})
    embedding = [u for u in updates if u.target == ends.embedding]
    head = [u for u in updates if u.target == ends.head]
    if not embedding and not head:
        return Tying(tuple(updates), {})
    _refuse_unknown(checkpoint, adapter, ends, embedding, head)
    others = [u for u in updates if u.target not in (ends.embedding, ends.head)]
    embedding, head, twins = _share(adapter, ends, embedding, head, saved_embeddings)
    base = checkpoint.tensors[ends.embedding]
    stored = ends.head in checkpoint.tensors
    if _signature(embedding) == _signature(head):
        updates = [*others, *embedding, *(head if stored else [])]
        note = f"{ends.embedding} and {ends.head} stay tied"
        return Tying(tuple(updates), {ends.head: base} if stored else {}, notes=(note,),
                     twins=twins)  # fmt: skip
    note = f"{ends.head} written apart from {ends.embedding}, tie_word_embeddings: false"
    return Tying(
        (*others, *embedding, *head),
        {ends.head: base},
        new_head=None if stored else ends.head,
        untie=True,
        notes=(note,),
        twins=twins,
    )


def _tied_ends(checkpoint: Checkpoint, targets: Sequence[str]) -> _Ends | None:
    """Return the two ends if the model ties them, else None."""
    config = checkpoint.config
    text = config.get("text_config") if isinstance(config.get("text_config"), dict) else {}
    flag = config.get("tie_word_embeddings", text.get("tie_word_embeddings"))  # type: ignore[union-attr]
    if flag is False:
        return None
    found = [n for n in checkpoint.tensors if _leaf(n) in EMBEDDINGS and n.endswith(".weight")]
    named = [t for t in (*checkpoint.tensors, *targets)
             if _leaf(t) in HEADS and t.endswith(".weight")]  # fmt: skip
    has_head = bool(named) or _architecture(checkpoint).endswith(WITH_HEAD)
    if len(found) != 1 or not has_head:
        return None
    head = named[0] if named else _head_name(checkpoint, found[0])
    if flag is None and head in checkpoint.tensors:
        return None  # stored apart, and nothing says that they are one
    return _Ends(found[0], head)


def _refuse_unknown(
    checkpoint: Checkpoint,
    adapter: Adapter,
    ends: _Ends,
    embedding: Sequence[Update],
    head: Sequence[Update],
) -> None:
    model_type = checkpoint.config.get("model_type")
    if model_type in SHARED_BY_MORE:
        raise PlanError(
            f"{shown(ends.embedding)}: the adapter changes embeddings that {model_type} shares "
            "between more than two tensors, which is not supported. Merge with PEFT."
        )
    both = [u for u in (*embedding, *head) if u.normalises]
    if adapter.ensure_weight_tying and both:
        raise PlanError(
            f"{shown(ends.embedding)}: DoRA on tied ends with ensure_weight_tying has no defined "
            "meaning (one magnitude per embedding dimension here, per token there). "
            "Train without ensure_weight_tying."
        )


def _share(
    adapter: Adapter,
    ends: _Ends,
    embedding: list[Update],
    head: list[Update],
    saved_embeddings: frozenset[str],
) -> tuple[list[Update], list[Update], tuple[str, ...]]:
    """Return both ends' updates with what belongs to the pair given to both, and the repeats."""
    twins: list[str] = []
    pair_wide = [u for u in (*embedding, *head) if adapter.ensure_weight_tying or u.kind == "rows"
                 or (u.target in saved_embeddings and u.kind == "replace")]  # fmt: skip
    shared: list[Update] = []
    for update in pair_wide:
        if any(_same(update, other) for other in shared):
            twins += update.source_keys
        else:
            shared.append(update)
    own_e = [u for u in embedding if u not in pair_wide]
    own_h = [u for u in head if u not in pair_wide]
    own_h_kept = [u for u in own_h if not any(u.kind == "replace" and _same(u, e) for e in own_e)]
    if len(own_h_kept) < len(own_h):
        # Two equal copies of one trained tensor: one update for both.
        same = [u for u in own_h if u not in own_h_kept]
        twins += [key for u in same for key in u.source_keys]
        own_h_kept += [replace(e, target=ends.head) for e in own_e if e.kind == "replace"]
    return (
        [*(_on(u, ends.embedding) for u in shared), *own_e],
        [*(_on(u, ends.head) for u in shared), *own_h_kept],
        tuple(twins),
    )


def _on(update: Update, target: str) -> Update:
    """Return the update for the other end; a product seen transposed there stays the same one."""
    return replace(update, target=target)


def _signature(updates: Sequence[Update]) -> list[Update]:
    return [replace(u, target="") for u in sorted(updates, key=lambda u: u.source_keys)]


def _same(a: Update, b: Update) -> bool:
    """Return whether two updates of tied ends say the same, by their values."""
    if a.kind != b.kind or a.scaling != b.scaling or a.row_indices != b.row_indices:
        return False
    if a.value is not None and b.value is not None:
        return _equal_values(Operand.plain(a.value), Operand.plain(b.value))
    if a.down is None or b.down is None or a.up is None or b.up is None:
        return False
    if a.layout == b.layout:
        return _equal_values(a.down, b.down) and _equal_values(a.up, b.up)
    return _equal_values(a.down, b.up.T) and _equal_values(a.up, b.down.T)


def _equal_values(a: Operand, b: Operand) -> bool:
    if a.shape != b.shape:
        return False
    one, other = (o.arranged(widened(o.ref.raw(), o.ref.dtype, np.float64)) for o in (a, b))
    return bool(np.array_equal(one, other))


def _leaf(tensor: str) -> str:
    return tensor.split(".")[-2] if tensor.count(".") else ""


def _architecture(checkpoint: Checkpoint) -> str:
    architectures = checkpoint.config.get("architectures")
    return str(architectures[0]) if isinstance(architectures, list) and architectures else ""


def _head_name(checkpoint: Checkpoint, embedding: str) -> str:
    if checkpoint.config.get("model_type") == "gpt_neox":
        return "embed_out.weight"
    prefix = "language_model." if embedding.startswith("language_model.model.") else ""
    return f"{prefix}lm_head.weight"
