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

from dora_export.cast import widened
from dora_export.checkpoints.model import Checkpoint
from dora_export.errors import PlanError, shown
from dora_export.tensors import Operand, TensorRef
from dora_export.update import Update

EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings")
HEADS = ("lm_head", "embed_out")
WITH_HEAD = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
# Architectures with some head over the vocabulary, whatever its name.
WITH_VOCABULARY = (*WITH_HEAD, "ForMaskedLM", "ForPreTraining", "DoubleHeadsModel")
# Models of the above whose head is not "lm_head" or "embed_out" (_tied_weights_keys of the class).
OTHER_HEADS = ("whisper", "moonshine", "moonshine_streaming", "cohere_asr", "canary", "trocr",
               "biogpt", "git", "modernbert-decoder", "xlnet", "rwkv", "speecht5", "xlm",
               "flaubert")  # fmt: skip
# More than two tied tensors, or names of their own: the pair below would be incomplete.
SHARED_BY_MORE = ("t5", "mt5", "umt5", "bart", "mbart", "pegasus", "longt5", "led", "m2m_100")
COMPARED_ELEMENTS = 1 << 20


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
class Trained:
    """What tying has to know of one adapter.

    Attributes:
        ensured: ``Adapter.ensure_weight_tying``.
        updates: Its updates under the checkpoint's names.
        saved_embeddings: ``Adapter.saved_embeddings`` under the checkpoint's names.
    """

    ensured: bool
    updates: tuple[Update, ...]
    saved_embeddings: frozenset[str]


@dataclass(frozen=True)
class _Ends:
    embedding: str
    head: str


def head_of(checkpoint: Checkpoint, targets: Sequence[str]) -> str | None:
    """Return the name of a tied head that an adapter targets though the base does not store it."""
    ends = _tied_ends(checkpoint, targets)
    return ends.head if ends and ends.head not in checkpoint.tensors else None


def is_tied(checkpoint: Checkpoint, targets: Sequence[str]) -> bool:
    """Return whether the model may use one tensor as its embedding and its head."""
    ends = _tied_ends(checkpoint, targets)
    return ends is not None and not _stored_apart(checkpoint, ends)


def resolve(checkpoint: Checkpoint, adapters: Sequence[Trained]) -> Tying:
    """Return what becomes of the two ends of a tied model.

    Each adapter's updates are shared between the ends as that adapter says; the ends stay tied if
    all adapters together do the same to both. Reads the two ends of the base only where both are
    stored and an adapter changes one.

    Args:
        checkpoint: The base.
        adapters: What is merged, in order.

    Raises:
        PlanError: The ends are tied in a way this tool does not know, or files contradict each
            other on whether they are one.
    """
    updates = tuple(u for adapter in adapters for u in adapter.updates)
    refuse_unknown(checkpoint, updates)
    ends = _tied_ends(checkpoint, [u.target for u in updates])
    if ends is None:
        return Tying(updates, {})
    touched = any(u.target in (ends.embedding, ends.head) for u in updates)
    if not touched or _stored_apart(checkpoint, ends):
        return Tying(updates, {})
    others = [u for u in updates if u.target not in (ends.embedding, ends.head)]
    embedding: list[Update] = []
    head: list[Update] = []
    twins: tuple[str, ...] = ()
    for adapter in adapters:
        own_embedding, own_head, repeated = _share(adapter, ends)
        embedding, head = embedding + own_embedding, head + own_head
        twins += repeated
    base = checkpoint.tensors[ends.embedding]
    stored = ends.head in checkpoint.tensors
    if _signature(embedding) == _signature(head):
        both = (*others, *embedding, *(head if stored else []))
        note = f"{ends.embedding} and {ends.head} stay tied"
        return Tying(both, {ends.head: base} if stored else {}, notes=(note,), twins=twins)
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
    """Return the two ends if the config lets the model tie them, else None."""
    if _flag(checkpoint) is False:
        return None
    found = [n for n in checkpoint.tensors if _leaf(n) in EMBEDDINGS and n.endswith(".weight")]
    named = [t for t in (*checkpoint.tensors, *targets)
             if _leaf(t) in HEADS and t.endswith(".weight")]  # fmt: skip
    has_head = bool(named) or _architecture(checkpoint).endswith(WITH_HEAD)
    if len(found) != 1 or not has_head:
        return None
    return _Ends(found[0], named[0] if named else _head_name(checkpoint, found[0]))


def _flag(checkpoint: Checkpoint) -> object:
    """Return ``tie_word_embeddings``, None where the config leaves it to the model's class."""
    config = checkpoint.config
    text = config.get("text_config")
    inner = text.get("tie_word_embeddings") if isinstance(text, dict) else None
    return config.get("tie_word_embeddings", inner)


def _stored_apart(checkpoint: Checkpoint, ends: _Ends) -> bool:
    """Return whether the base holds the two ends as two tensors that are not one."""
    head = checkpoint.tensors.get(ends.head)
    if head is None or _equal_tensors(checkpoint.tensors[ends.embedding], head):
        return False
    if _flag(checkpoint) is None:
        return True
    raise PlanError(
        f"{shown(ends.embedding)} and {shown(ends.head)} differ in the base, though its "
        "config.json says tie_word_embeddings: true; the adapter changes them, and loaders "
        "disagree on which one is the head. Set it to false if both are used, or remove the head "
        "if it is not."
    )


def refuse_unknown(checkpoint: Checkpoint, updates: Sequence[Update]) -> None:
    """Refuse updates of embeddings that the model may share with tensors unknown here.

    Args:
        checkpoint: The base.
        updates: Updates under the adapter's or the checkpoint's names.

    Raises:
        PlanError: An update is for such an embedding.
    """
    if checkpoint.components:
        for part in checkpoint.components:
            own = [u for u in updates if u.target.startswith(f"{part}.")]
            refuse_unknown(checkpoint.component(part), own)
        return
    model_type, tied = checkpoint.config.get("model_type"), _flag(checkpoint) is not False
    embeddings = [u.target for u in updates if _is_token_embedding(checkpoint, u.target)]
    heads = [u.target for u in updates if tied and _leaf(u.target) in HEADS]
    if model_type in SHARED_BY_MORE and (embeddings or heads):
        raise PlanError(
            f"{shown((embeddings or heads)[0])}: the adapter changes embeddings that {model_type} "
            "shares between more than two tensors, which is not supported. Merge with PEFT."
        )
    unknown = [t for t in embeddings if _has_other_head(checkpoint, t)]
    if tied and unknown and _architecture(checkpoint).endswith(WITH_VOCABULARY):
        raise PlanError(
            f"{shown(unknown[0])}: the adapter changes an embedding that {shown(model_type)} may "
            "tie to an output head of another name. If the head is not used, or is stored apart, "
            "set tie_word_embeddings to false in the base's config.json."
        )


def _is_token_embedding(checkpoint: Checkpoint, target: str) -> bool:
    leaf, ref = _leaf(target), checkpoint.tensors.get(target)
    if leaf in HEADS:
        return False
    rows = checkpoint.config.get("vocab_size")
    by_shape = ref is not None and len(ref.shape) == 2 and ref.shape[0] == rows
    return leaf in EMBEDDINGS or leaf == "shared" or ("embed" in leaf and by_shape)


def _has_other_head(checkpoint: Checkpoint, embedding: str) -> bool:
    encoder = f".{embedding}".endswith(".embeddings.word_embeddings.weight")
    known = _leaf(embedding) in EMBEDDINGS and not encoder
    return not known or checkpoint.config.get("model_type") in OTHER_HEADS


def _share(adapter: Trained, ends: _Ends) -> tuple[list[Update], list[Update], tuple[str, ...]]:
    """Return both ends' updates with what belongs to the pair given to both, and the repeats.

    Stored for both ends: each has its own, equal ones are one. Stored for one end: the other has
    it too where PEFT keeps the ends alike (ensure_weight_tying, token rows of the embedding) or
    saved a tied tensor along once; else it keeps the base's.
    """
    embedding = [u for u in adapter.updates if u.target == ends.embedding]
    head = [u for u in adapter.updates if u.target == ends.head]
    tied = adapter.ensured
    _refuse_ensured(tied, ends, embedding, head)
    same = {h.source_keys: e for h in head for e in embedding
            if (tied or h.kind in ("replace", "rows")) and _same(e, h)}  # fmt: skip
    apart = [h for h in head if h.source_keys not in same]
    if tied and any(h.kind == e.kind for h in apart for e in embedding):
        raise PlanError(
            f"{shown(ends.embedding)}: the adapter says ensure_weight_tying: true, but its tensors "
            f"for {shown(ends.head)} are others than those for the embedding. Set it to false in "
            "adapter_config.json to apply each to its own end, as the trained model did."
        )

    def for_the_pair(update: Update, others: Sequence[Update]) -> bool:
        saved_along = update.kind == "replace" and update.target in adapter.saved_embeddings
        rows = update.kind == "rows" and update.target == ends.embedding
        return (tied or saved_along or rows) and all(o.kind != update.kind for o in others)

    to_head = [e for e in embedding if for_the_pair(e, head)]
    to_embedding = [h for h in head if for_the_pair(h, embedding)]
    return (
        [*embedding, *(_on(h, ends.embedding) for h in to_embedding)],
        [_on(u, ends.head) for u in (*same.values(), *apart, *to_head)],
        tuple(key for keys in same for key in keys),
    )


def _refuse_ensured(
    tied: bool, ends: _Ends, embedding: Sequence[Update], head: Sequence[Update]
) -> None:
    per_row = all(u.layout == "oi" for u in embedding) and not head  # one matrix for both ends
    if tied and not per_row and any(u.normalises for u in (*embedding, *head)):
        raise PlanError(
            f"{shown(ends.embedding)}: DoRA on tied ends with ensure_weight_tying has no defined "
            "meaning (one magnitude per embedding dimension here, per token there). "
            "Train without ensure_weight_tying."
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
        return _equal_tensors(a.value, b.value)
    if a.down is None or b.down is None or a.up is None or b.up is None:
        return False
    if a.layout == b.layout:
        return _equal_values(a.down, b.down) and _equal_values(a.up, b.up)
    return _equal_values(a.down, b.up.T) and _equal_values(a.up, b.down.T)


def _equal_values(a: Operand, b: Operand) -> bool:
    if a.shape != b.shape:
        return False
    one, other = (o.value(lambda ref: widened(ref.raw(), ref.dtype, np.float64)) for o in (a, b))
    return bool(np.array_equal(one, other))


def _equal_tensors(a: TensorRef, b: TensorRef) -> bool:
    """Return whether two stored tensors hold the same; a block at a time, for whole embeddings."""
    if a.shape != b.shape:
        return False
    if not (a.dtype.mergeable and b.dtype.mergeable) and a.dtype is not b.dtype:
        return False
    for start in range(0, a.size, COMPARED_ELEMENTS):
        stop = min(start + COMPARED_ELEMENTS, a.size)
        one, other = a.raw(start, stop), b.raw(start, stop)
        if a.dtype is not b.dtype:
            one, other = (widened(one, a.dtype, np.float64), widened(other, b.dtype, np.float64))
        if not np.array_equal(one, other):
            return False
    return True


def _leaf(tensor: str) -> str:
    return tensor.split(".")[-2] if tensor.count(".") else ""


def _architecture(checkpoint: Checkpoint) -> str:
    architectures = checkpoint.config.get("architectures")
    return str(architectures[0]) if isinstance(architectures, list) and architectures else ""


def _head_name(checkpoint: Checkpoint, embedding: str) -> str:
    if str(checkpoint.config.get("model_type")).startswith("gpt_neox"):
        return "embed_out.weight"
    prefix = "language_model." if embedding.startswith("language_model.model.") else ""
    return f"{prefix}lm_head.weight"
