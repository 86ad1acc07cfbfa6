"""What every adapter reader returns, and what it may be told."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypedDict

from dora_export.checkpoints.model import Checkpoint
from dora_export.tensors import TensorRef
from dora_export.update import Axis, Update


@dataclass(frozen=True)
class ReadOptions:
    """What a user can say about an adapter whose files do not say it; as in ``Reading``."""

    adapter_format: str | None = None
    alpha: float | None = None
    axis: Axis | None = None
    allow_pickle: bool = False
    torchtune_dora_fix: bool | None = None
    magnitude_is_normalised: bool | None = None
    base_is_residual: bool = False
    recompute_init: bool = False
    moe_b_layout: Literal["peft", "unsloth"] | None = None
    moe_transposed: bool | None = None
    trained_in: str | None = None
    links_into: Sequence[str | os.PathLike[str]] = ()
    variant: str | None = None


class Reading(TypedDict, total=False):
    """``ReadOptions`` as keyword arguments: every function that reads an adapter takes them.

    Attributes:
        adapter_format: Name of a format; None: the only one that matches.
        alpha: Scaling numerator, for formats that do not store it.
        axis: What the magnitudes count, for formats that leave it open.
        allow_pickle: Read ``.bin``/``.pt`` files through torch's restricted loader, those of the
            base as well.
        torchtune_dora_fix: Whether torchtune exported this PEFT adapter, with the rows of B or m
            of q and k in another order than the base's; None: where that shows, else ask.
        magnitude_is_normalised: Whether the magnitudes of this PEFT or NVlabs adapter were divided
            by the norms already, as TensorRT-LLM wants them; None: refuse what looks like it.
        base_is_residual: The base is the residual model that this PEFT adapter was trained on,
            where its initialisation changed the base (PiSSA, OLoRA, CorDA, LoRA-GA, LoftQ).
        recompute_init: The base is the original one; compute from it what PiSSA or OLoRA left.
        moe_b_layout: In what order B holds the columns of stacked experts: all experts' of the
            first rank, then of the next ("peft"), or all ranks of the first expert, then of the
            next ("unsloth"); None: as the files tell, else refuse.
        moe_transposed: Whether ``B A`` lies transposed over stacked experts whose matrices are
            square, where the shape cannot tell; None: by PEFT's version and the model's class,
            else refuse.
        trained_in: "fp32", "bf16" or "fp16": type of LyCORIS' parameters while training, whose eps
            its forward adds to norms; None: as the metadata says, else float32 where they are
            stored in it, else refuse.
        links_into: Folders that links in base and adapter may lead into (shards on another disk);
            any other link out of its folder is refused, but for those of a Hugging Face cache.
        variant: Which of a base's weights to read, where it has several beside each other: "fp16"
            for ``model.fp16.safetensors``; models without such are read without a variant. None:
            those without a variant, or the only variant.
    """

    adapter_format: str | None
    alpha: float | None
    axis: Axis | None
    allow_pickle: bool
    torchtune_dora_fix: bool | None
    magnitude_is_normalised: bool | None
    base_is_residual: bool
    recompute_init: bool
    moe_b_layout: Literal["peft", "unsloth"] | None
    moe_transposed: bool | None
    trained_in: str | None
    links_into: Sequence[str | os.PathLike[str]]
    variant: str | None


@dataclass(frozen=True)
class Adapter:
    """An adapter in normal form; no tensor has been read.

    Attributes:
        path: What the user named.
        format: Name of the format, e.g. "peft".
        files: Files that hold its tensors.
        tensors: Every tensor of those files that belongs to the adapter, by name.
        updates: What it does, in its own names.
        ignored: Tensors that have no effect on the merged weights, and why.
        folder: Folder whose tokenizer files go with the adapter, or None.
        own_base: The base model, where the file carries it.
        base_name: The base model that the adapter says it was trained on, or None.
        ensure_weight_tying: The trainer kept tied ends tied (PEFT's option of that name).
        saved_embeddings: Targets replaced because the trainer saved its (resized) embeddings along,
            not because they were trained apart: both tied ends share them.
        whole_families: Layers that differ in their number only are adapted all or none, so a gap
            means that tensors are missing.
        numbered_ends: Ends of module paths whose numbers are part of what a layer is, such as
            "to_out.0"; all other numbers tell layers of one family apart.
        square_io: Whether square weights are stored ``(in, out)``, as far as the adapter says.
        square_experts_transposed: What the user says of square slices of stacked parameters.
        not_for: Model types (config.json) whose checkpoints store what the adapter replaces in
            another way than its trainer did, and how.
        doubtful_magnitudes: Tools divide magnitudes of this format by the norms beforehand without
            saying so, and the user has not said.
        naming: How updates name their targets: by module paths, or flattened (``flat_names``).
        doubts: What the files leave open and the reader had to take on trust.
        residual_init: Initialisation whose residual the user says the base is, or None.
        layer_replication: Ranges ``[start, stop)`` of the base's layers that the trained model
            stacks, one after another; updates name layers by their place there. Empty: as they are.
        facts: What ``inspect`` shows: settings in the format's own words.
    """

    path: Path
    format: str
    files: tuple[Path, ...]
    tensors: Mapping[str, TensorRef]
    updates: tuple[Update, ...]
    ignored: Mapping[str, str] = field(default_factory=dict)
    folder: Path | None = None
    own_base: Checkpoint | None = None
    base_name: str | None = None
    ensure_weight_tying: bool = False
    saved_embeddings: frozenset[str] = frozenset()
    whole_families: bool = False
    numbered_ends: tuple[str, ...] = ()
    square_io: bool | None = None
    square_experts_transposed: bool | None = None
    not_for: Mapping[str, str] = field(default_factory=dict)
    doubtful_magnitudes: bool = False
    naming: Literal["paths", "flat"] = "paths"
    doubts: tuple[str, ...] = ()
    residual_init: str | None = None
    layer_replication: tuple[tuple[int, int], ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
