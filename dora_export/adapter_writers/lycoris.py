"""One file as LyCORIS and kohya's sd-scripts write it: flattened names, alpha beside the factors.

``lycoris_`` is in front of a plain model's layers; of a pipeline's, what sd-scripts and OneTrainer
call their component. LyCORIS adds the eps of ``dora_scale``'s type to the norm, so magnitudes
trained without one (PEFT) mean another weight there.
Source: github.com/KohakuBlueleaf/LyCORIS 4.1.3, lycoris/{wrapper,kohya}.py and modules/locon.py
(custom_state_dict, make_module_from_state_dict, apply_weight_decompose).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from dora_export.adapter_writers.components import Place, doubts, places
from dora_export.adapter_writers.model import (
    Source,
    Stored,
    Written,
    alpha_of,
    check,
    copied,
    factors,
    is_embedding,
    kind_problem,
    stored,
)
from dora_export.adapters.lycoris_layers import EPS, number
from dora_export.errors import shown
from dora_export.flat_names import flatten
from dora_export.tensors import F32, F64, TensorRef
from dora_export.update import Update

WEIGHTS = "lora.safetensors"
PLAIN = "lycoris"
# sd-scripts calls T5 te3, be it the second text encoder (Flux) or the third.
PREFIXES = {
    "unet": "lora_unet", "transformer": "lora_transformer", "prior": "lora_prior_unet",
    "text_encoder": "lora_te", "text_encoder_2": "lora_te2", "text_encoder_3": "lora_te3",
}  # fmt: skip
OF_T5 = "encoder.block."


def write(source: Source) -> Written:
    """Return an adapter as one file of LyCORIS'.

    Raises:
        AdapterError: LyCORIS cannot hold it exactly; all reasons are listed.
    """
    found = places(source)
    modules = [_module(place, found, source) for place in found]
    problems = [*doubts(source), *_problems(source, modules)]
    check(source, "LyCORIS", problems, ("out", "in"), adds_eps=True)
    alphas = [
        _alpha(m, u, source.adapter.tensors) for m, u in zip(modules, source.updates, strict=True)
    ]
    tensors = [
        tensor
        for module, update, alpha in zip(modules, source.updates, alphas, strict=True)
        for tensor in (*_tensors(module, update), alpha)
    ]
    return Written(WEIGHTS, tuple(tensors), notes=tuple(_notes(source, alphas)))


def _module(place: Place, found: Sequence[Place], source: Source) -> str | None:
    """Return what the file calls a layer; None: its component has no prefix."""
    if place.flat is not None:
        return place.flat
    component = place.component
    if component is None:
        return f"{PLAIN}_{flatten(place.path)}"
    there = {p.component for p in found} | set(source.base.components if source.base else ())
    prefix = PREFIXES.get(component)
    if component == "text_encoder" and "prior" in there:
        prefix = "lora_prior_te"
    elif component == "text_encoder" and there & {"text_encoder_2", "transformer"}:
        prefix = "lora_te1"
    elif component == "text_encoder_2" and place.path.startswith(OF_T5):
        prefix = "lora_te3"
    return prefix and f"{prefix}_{flatten(place.path)}"


def _problems(source: Source, modules: Sequence[str | None]) -> Iterator[str]:
    by_name: dict[str, list[str]] = defaultdict(list)
    if source.adapter.layer_replication:
        yield "layers of the base are repeated"
    for module, update in zip(modules, source.updates, strict=True):
        name = shown(update.target)
        if update.kind not in ("lora", "dora"):
            yield kind_problem(update)
            continue
        if module is None:
            yield f"{name}: how LyCORIS calls this component of a pipeline is not known"
        else:
            by_name[module].append(name)
        if is_embedding(update):
            yield f"{name}: an embedding"
        elif stored_transposed(update, source):
            yield f"{name}: the base stores it (in, out), as GPT-2 does"
        if update.magnitude is not None:
            yield from _eps_problems(name, update)
    for module, names in by_name.items():
        if len(names) > 1:
            yield f"{' and '.join(names)}: both are {shown(module)} once '.' is '_'"


def _eps_problems(name: str, update: Update) -> Iterator[str]:
    assert update.magnitude is not None, "Bug: the caller has checked"
    dtype = update.magnitude.ref.dtype.name
    eps = EPS.get(dtype)
    if eps is None:
        yield f"{name}: its magnitudes are of type {dtype}, LyCORIS has floats of 16 bits or more"
    elif not update.eps:
        yield (
            f"DoRA trained without an eps, as in PEFT: LyCORIS adds {eps:.2g} (the eps of {dtype}, "
            "in which the magnitudes are) to the norm, which gives another weight"
        )
    elif update.eps != eps:
        yield (
            f"{name}: {update.eps:.2g} was added to the norm while training, LyCORIS adds "
            f"{eps:.2g}, the eps of {dtype}, in which the magnitudes are"
        )


def stored_transposed(update: Update, source: Source) -> bool:
    """Return whether the base's weight is ``(in, out)``, as far as base or adapter tell."""
    if update.layout is not None:
        return update.layout == "io"
    if source.adapter.square_io:
        return True
    name = source.names.get(update.target, update.target)
    ref = source.base.tensors.get(name) if source.base is not None else None
    return ref is not None and update.layout_by_shape(ref.shape) == "io"


def _tensors(module: str | None, update: Update) -> Iterator[Stored]:
    down, up = factors(update)
    kernel = down.ref.shape[2:]
    out, rank = up.shape
    ones = tuple(1 for _ in kernel)
    inputs = down.ref.shape[1] if kernel else down.shape[1]
    yield stored(f"{module}.lora_down.weight", down, (rank, inputs, *kernel))
    yield stored(f"{module}.lora_up.weight", up, (out, rank, *ones))
    if update.magnitude is not None:
        shape = (out, 1, *ones) if update.axis == "out" else (1, inputs, *ones)
        yield stored(f"{module}.dora_scale", update.magnitude, shape)


def _alpha(module: str | None, update: Update, tensors: Mapping[str, TensorRef]) -> Stored:
    """Return alpha as a tensor: the adapter's own, else in float32 if that is exact, or float64."""
    name = f"{module}.alpha"
    own = next((tensors[k] for k in update.source_keys if k.endswith(".alpha")), None)
    if own is not None and update.rank and number(own) / update.rank == update.scaling:
        return copied(name, own)
    alpha = alpha_of(update)
    short = np.float32(alpha)
    if update.rank and float(short) / update.rank == update.scaling:
        return Stored(name, F32, (), lambda: np.array(short).view(F32.raw))
    return Stored(name, F64, (), lambda: np.array(alpha, np.float64).view(F64.raw))


def _notes(source: Source, alphas: Sequence[Stored]) -> Iterator[str]:
    long = [a for a in alphas if a.dtype == F64]
    if long:
        yield (
            f"alpha is in float64 in {len(long)} of {len(alphas)} layers, which float32 cannot "
            "hold exactly: LyCORIS and ComfyUI read it so, sd-scripts rounds it"
        )
    axes = {u.axis for u in source.updates if u.magnitude is not None}
    if "in" in axes:
        yield (
            "LyCORIS' own loader takes magnitudes of outputs only, and these count inputs; ComfyUI "
            "and OneTrainer load them"
        )
    if "out" in axes:
        yield "ComfyUI divides magnitudes of outputs by the norm of W alone; LyCORIS loads it right"
