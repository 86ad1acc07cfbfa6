"""Other names that the tensors of image models go by, and which rows of which tensor they mean.

Trainers name modules as diffusers and transformers do, or as the model's first code did; a
checkpoint may be a pipeline of the one kind or a single file of the other. For every base all names
are known here under which an adapter may ask for its tensors, with the component in front
(``unet.``, ``transformer.``, ``text_encoder.``, ...). Where one side fuses what the other keeps
apart (q, k and v), a name means rows of a tensor, or several tensors: with plain LoRA and with
magnitudes per output each row is on its own, so that is exact. Magnitudes per input over fused rows
share one norm, and are refused where the base keeps these rows apart.

Sources: ``unet_names``, ``flux_names``; for text encoders github.com/mlfoundations/open_clip,
src/open_clip/transformer.py; github.com/huggingface/diffusers, src/diffusers/loaders/
single_file_utils.py (convert_ldm_clip_checkpoint, convert_open_clip_checkpoint).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from dora_export import flux_names, unet_names
from dora_export.checkpoints.model import Checkpoint
from dora_export.errors import PlanError, listing, shown
from dora_export.experts import Every
from dora_export.tensors import Operand
from dora_export.update import Dense, Hadamard, Product, Update

IN_ONE_FILE = "model.diffusion_model."
# What stands in front of a text encoder of transformers' names in a single file -> component.
TEXT_ENCODERS = {
    "cond_stage_model.transformer.": "text_encoder.",
    "conditioner.embedders.0.transformer.": "text_encoder.",
    "text_encoders.clip_l.transformer.": "text_encoder.",
    "text_encoders.clip_g.transformer.": "text_encoder_2.",
}
T5 = "text_encoders.t5xxl.transformer."
# The same for OpenCLIP's names: the only encoder of Stable Diffusion 2, the second of SDXL.
OPEN_CLIP = {
    "cond_stage_model.model.": "text_encoder.",
    "conditioner.embedders.1.model.": "text_encoder_2.",
}
OPEN_CLIP_LAYER = {
    "ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}  # fmt: skip
RESBLOCK = re.compile(r"transformer\.resblocks\.(?P<number>\d+)\.(?P<rest>.+)")
TEXT_MODEL = re.compile(r"(?P<component>(text_encoder(_\d)?\.)?)text_model\.(?P<rest>.+)")
Rows = tuple[int, int]


@dataclass(frozen=True)
class Place:
    """Where (a part of) a tensor of another name is in the base.

    Attributes:
        tensor: The base's tensor.
        rows: Rows ``[start, stop)`` of it; None: all.
        own: Rows ``[start, stop)`` of the tensor of the other name; None: all.
        transposed: Whether the base stores it ``(in, out)``.
    """

    tensor: str
    rows: Rows | None = None
    own: Rows | None = None
    transposed: bool = False


Places = Mapping[str, tuple[Place, ...]]


def other_names(base: Checkpoint) -> Places:
    """Return every other name of a base's tensors, with where it is; empty for other models."""
    found: dict[str, tuple[Place, ...]] = {}
    for part in (_unet(base), _flux(base), _text_encoders(base), _text_model(base)):
        for name, places in part:
            found.setdefault(name, places)
    return {name: places for name, places in found.items() if name not in base.tensors}


def placed(updates: Sequence[Update], others: Places) -> list[Update]:
    """Return the updates with those of other names moved to the tensors of the base.

    Raises:
        PlanError: One cannot be cut along the base's tensors exactly.
    """
    found: list[Update] = []
    problems = []
    for update in updates:
        places = others.get(update.target)
        if places is None:
            found.append(update)
        elif why := _indivisible(update, places):
            problems.append(f"{shown(update.target)}: {why}")
        else:
            found += [_at(update, place) for place in places]
    if problems:
        raise PlanError(f"updates that the base's layout cannot take:{listing(problems)}")
    return found


# --- names


def _unet(base: Checkpoint) -> Iterator[tuple[str, tuple[Place, ...]]]:
    """Yield LDM's names of diffusers' UNet, or the reverse and LDM's without what is in front."""
    starts = {n.partition("input_blocks.")[0] for n in base.tensors if "input_blocks.0.0." in n}
    for start in starts & {IN_ONE_FILE, ""}:
        own = _modules(base, start)
        front = "unet." if start else ""
        names = unet_names.to_diffusers(own)
        yield from _renamed(start, own, {m: f"{front}{new}" for m, new in names.items()})
        if start:
            yield from _renamed(start, own, {m: f"{front}{m}" for m in own})
    starts = {n.partition("down_blocks.")[0] for n in base.tensors if "down_blocks.0.resnets." in n}
    for start in starts & {"unet.", ""}:
        own = _modules(base, start)
        names = unet_names.to_ldm(own)
        yield from _renamed(start, own, {m: f"{start}{new}" for m, new in names.items()})


def _flux(base: Checkpoint) -> Iterator[tuple[str, tuple[Place, ...]]]:
    starts = {n.partition("double_blocks.")[0] for n in base.tensors if "double_blocks.0." in n}
    for start in starts & {IN_ONE_FILE, ""}:
        own = _modules(base, start)
        if start:
            yield from _renamed(start, own, {m: f"transformer.{m}" for m in own})
        for module, leaves in own.items():
            yield from _apart(base, start, module, leaves)
    start_of = re.compile(r"(transformer\.)?single_transformer_blocks\.0\.proj_mlp\.weight")
    for match in [m for n in base.tensors if (m := start_of.fullmatch(n))]:
        start = match[1] or ""
        own = _modules(base, start)
        for original in {flux_names.original_name(m) for m in own} - {None}:
            assert original is not None, "Bug: None has been taken out"
            yield from _together(base, start, original)


def _apart(
    base: Checkpoint, start: str, module: str, leaves: Iterable[str]
) -> Iterator[tuple[str, tuple[Place, ...]]]:
    """Yield diffusers' names for the rows of an original module of Flux."""
    names = flux_names.diffusers_names(module)
    weight = base.tensors.get(f"{start}{module}.weight")
    if not names or weight is None or len(weight.shape) != 2:
        return
    rows, columns = weight.shape
    if module == flux_names.HALVES_SWAPPED:
        sizes, halves = [rows // 2] * 2, True
    else:
        sizes, halves = [rows // 3] * 3, False
        if len(names) == 4:
            sizes = [columns] * 3 + [rows - 3 * columns]
        elif len(names) == 1:
            sizes = [rows]
    for leaf in leaves:
        tensor = f"{start}{module}.{leaf}"
        spans = row_spans(sizes)
        if halves:
            places = tuple(Place(tensor, at, of) for at, of in zip(spans, spans[::-1], strict=True))
            yield f"transformer.{names[0]}.{leaf}", places
            continue
        for name, span in zip(names, spans, strict=True):
            whole = len(names) == 1
            yield f"transformer.{name}.{leaf}", (Place(tensor, None if whole else span),)


def _together(
    base: Checkpoint, start: str, original: str
) -> Iterator[tuple[str, tuple[Place, ...]]]:
    """Yield the name of an original module of Flux, which diffusers keeps as one or several."""
    names = [f"{start}{name}" for name in flux_names.diffusers_names(original)]
    for leaf in ("weight", "bias"):
        refs = [base.tensors.get(f"{name}.{leaf}") for name in names]
        if any(ref is None for ref in refs):
            continue
        tensors = [f"{name}.{leaf}" for name in names]
        spans = row_spans([ref.shape[0] for ref in refs if ref is not None])
        if original == flux_names.HALVES_SWAPPED:
            halves = row_spans([spans[0][1] // 2] * 2)
            places = tuple(
                Place(tensors[0], at, of) for at, of in zip(halves, halves[::-1], strict=True)
            )
        elif len(names) == 1:
            places = (Place(tensors[0]),)
        else:
            places = tuple(Place(t, None, of) for t, of in zip(tensors, spans, strict=True))
        yield f"{start}{original}.{leaf}", places


def _text_encoders(base: Checkpoint) -> Iterator[tuple[str, tuple[Place, ...]]]:
    """Yield the names that text encoders in a single file have in a pipeline."""
    with_g = any(n.startswith("text_encoders.clip_g.") for n in base.tensors)
    fronts = {**TEXT_ENCODERS, T5: "text_encoder_3." if with_g else "text_encoder_2."}
    for start, component in fronts.items():
        own = _modules(base, start)
        yield from _renamed(start, own, {m: f"{component}{m}" for m in own})
        short = {m: f"{component}{m.removeprefix('text_model.')}" for m in own}
        yield from _renamed(start, own, {m: n for m, n in short.items() if "text_model." in m})
    for start, component in OPEN_CLIP.items():
        for name in base.tensors:
            if name.startswith(start):
                for path, place in _open_clip(base, name, name.removeprefix(start)):
                    yield f"{component}{path}", (place,)
                    yield f"{component}{path.removeprefix('text_model.')}", (place,)


def _open_clip(base: Checkpoint, name: str, own: str) -> Iterator[tuple[str, Place]]:
    """Yield transformers' names for a tensor of an OpenCLIP text encoder."""
    shape = base.tensors[name].shape
    outside = {
        "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
        "positional_embedding": "text_model.embeddings.position_embedding.weight",
        "ln_final.weight": "text_model.final_layer_norm.weight",
        "ln_final.bias": "text_model.final_layer_norm.bias",
    }
    match = RESBLOCK.fullmatch(own)
    if own in outside:
        yield outside[own], Place(name)
    elif own == "text_projection" and len(shape) == 2:
        yield "text_projection.weight", Place(name, transposed=True)
    elif match is not None:
        layer = f"text_model.encoder.layers.{match['number']}"
        module, _, leaf = match["rest"].rpartition(".")
        if leaf in ("in_proj_weight", "in_proj_bias") and shape:
            for word, span in zip("qkv", row_spans([shape[0] // 3] * 3), strict=True):
                path = f"{layer}.self_attn.{word}_proj.{leaf.removeprefix('in_proj_')}"
                yield path, Place(name, span)
        elif module in OPEN_CLIP_LAYER:
            yield f"{layer}.{OPEN_CLIP_LAYER[module]}.{leaf}", Place(name)


def _text_model(base: Checkpoint) -> Iterator[tuple[str, tuple[Place, ...]]]:
    """Yield CLIP's names with and without "text_model.", which transformers 5 leaves out."""
    if any(n.startswith("vision_model.") for n in base.tensors):
        return
    for name in base.tensors:
        component, dot, rest = name.partition(".")
        is_clip = str(base.config_of(name).get("model_type", "")).startswith("clip")
        if match := TEXT_MODEL.fullmatch(name):
            yield f"{match['component']}{match['rest']}", (Place(name),)
        elif is_clip and component.startswith("text_encoder"):
            yield f"{component}{dot}text_model.{rest}", (Place(name),)
        elif is_clip and not base.components:
            yield f"text_model.{name}", (Place(name),)


def _modules(base: Checkpoint, start: str) -> dict[str, list[str]]:
    """Return module -> "weight", "bias", of the tensors behind ``start``."""
    found: dict[str, list[str]] = {}
    for name in base.tensors:
        module, _, leaf = name.removeprefix(start).rpartition(".")
        if name.startswith(start) and module and leaf in ("weight", "bias"):
            found.setdefault(module, []).append(leaf)
    return found


def _renamed(
    start: str, own: Mapping[str, Sequence[str]], names: Mapping[str, str]
) -> Iterator[tuple[str, tuple[Place, ...]]]:
    for module, name in names.items():
        for leaf in own[module]:
            yield f"{name}.{leaf}", (Place(f"{start}{module}.{leaf}"),)


def row_spans(sizes: Iterable[int]) -> list[Rows]:
    """Return the rows ``[start, stop)`` of parts of these sizes, one after the other."""
    ends = [0]
    for size in sizes:
        ends.append(ends[-1] + size)
    return list(pairwise(ends))


# --- updates


def _indivisible(update: Update, places: Sequence[Place]) -> str | None:
    """Return why an update cannot go to several places, or to rows of one."""
    if all(place.rows is None and place.own is None for place in places):
        return None
    tensors = " and ".join(dict.fromkeys(shown(place.tensor) for place in places))
    in_part = any(place.rows is not None for place in places)
    if update.kind == "rows" or (update.kind == "replace" and in_part):
        return (
            f"the adapter replaces {'it' if update.kind == 'replace' else 'rows of it'}, and the "
            f"base has it in parts or as a part of {tensors}. Save the base under the names that "
            "the adapter was trained on"
        )
    if len(places) == 1 and places[0].own is None:
        return None
    if (rows := _rows(update)) is not None and rows != (held := _own_rows(places)):
        return f"{rows} outputs, but {tensors} have {held} together"
    if update.normalises and update.axis == "in":
        return (
            f"one magnitude per input, with a norm over all outputs at once, but the base keeps "
            f"these in {tensors}. Merge into a checkpoint that stores them fused, or train with "
            "magnitudes per output"
        )
    if update.delta is not None and not isinstance(update.delta, Dense | Hadamard):
        return f"a Kronecker product (LoKr) cannot be cut along {tensors}"
    return None


def _rows(update: Update) -> int | None:
    """Return the outputs that an update has, as far as its shapes say."""
    if update.added is not None:
        return update.added.shape[0]
    if update.value is not None:
        return update.value.shape[0]
    return update.magnitude.shape[0] if update.magnitude and update.axis == "out" else None


def _own_rows(places: Sequence[Place]) -> int:
    return max(place.own[1] for place in places if place.own is not None)


def _at(update: Update, place: Place) -> Update:
    """Return what of an update goes to a place."""
    update = replace(update, target=place.tensor, rows=place.rows or update.rows)
    if place.transposed and update.added is not None:
        update = replace(update, layout="io")
    if place.own is None:
        return update
    first, last = place.own
    pick = Every(first, 1, last - first)

    def cut(operand: Operand) -> Operand:
        return operand.with_rows(pick, last - first)

    delta = update.delta
    if isinstance(delta, Dense):
        delta = Dense(cut(delta.matrix))
    elif isinstance(delta, Hadamard):
        delta = Hadamard(*(Product(cut(p.left), p.right) for p in (delta.first, delta.second)))
    return replace(
        update,
        up=cut(update.up) if update.up is not None else None,
        delta=delta,
        magnitude=cut(update.magnitude) if update.magnitude is not None else None,
        value=update.value.rows(first, last) if update.value is not None else None,
    )
