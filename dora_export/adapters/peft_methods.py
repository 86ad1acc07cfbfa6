"""PEFT's methods other than LORA: by the normal form where it says them, else by PEFT's own layers.

LoHa is a Hadamard product and LoKr a Kronecker product: those stream as LoRA does. What is another
function of the stored tensors and W goes through ``peft_layers``. What depends on anything else is
refused by name.
Source: github.com/huggingface/peft 0.21.2, src/peft/tuners/*/layer.py and model.py.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dora_export import peft_layers
from dora_export.adapters import peft_products
from dora_export.adapters.config_files import base_name
from dora_export.adapters.model import Adapter
from dora_export.adapters.peft_keys import plain_name
from dora_export.errors import AdapterError, listing, shown
from dora_export.peft_layers import PeftLayer
from dora_export.tensors import TensorRef
from dora_export.update import Layout, Update

Parts = Mapping[str, TensorRef]
# Method -> how the names of its tensors begin. Source: PEFT's PEFT_TYPE_TO_PREFIX_MAPPING.
BY_PEFT = {
    "BOFT": "boft_", "C3A": "c3a_", "DEFT": "deft_", "DELORA": "delora_", "GLORA": "glora_",
    "GRALORA": "gralora_", "HIRA": "hira_", "HRA": "hra_", "IA3": "ia3_", "MISS": "miss_",
    "OFT": "oft_", "PEANUT": "peanut_", "ROAD": "road_", "SHIRA": "shira_",
    "SUPERTUNING": "supertuning_", "VBLORA": "vblora_", "VERA": "vera_", "PVERA": "pvera_",
}  # fmt: skip
BY_FORMULA = {
    "LOHA": "hada_", "LOKR": "lokr_", "LN_TUNING": "ln_tuning_", "BEFT": "beft_",
    "TRAINABLE_TOKENS": "trainable_tokens_",
}  # fmt: skip
SHARED = {
    "VBLORA": ("vblora_vector_bank",),
    "VERA": ("vera_A", "vera_B"),
    "PVERA": ("pvera_A", "pvera_B"),
}
PROMPT = "it feeds the model vectors beside its inputs, which weights cannot do"
SEED = "its tensors are drawn from a random generator, not stored"
SVD = "it is built on a decomposition of W whose signs and rounding differ from machine to machine"
REFUSED = {
    "XLORA": "it weighs adapters anew for every token", "POLY": "it mixes skills by task",
    "LILY": "its routers choose factors by the input", "SHADOW": "it runs a second model beside",
    "CARTRIDGE": PROMPT, "ADAPTION_PROMPT": PROMPT, "PROMPT_TUNING": PROMPT, "P_TUNING": PROMPT,
    "PREFIX_TUNING": PROMPT, "MULTITASK_PROMPT_TUNING": PROMPT, "CPT": PROMPT,
    "FOURIERFT": SEED, "WAVEFT": SEED, "UNILORA": SEED,
    "RANDLORA": "its shared bases are cut to sizes that depend on all layers at once",
    "FROD": "its layers depend on a decomposition of many weights at once",
    "OSF": SVD, "PSOFT": SVD, "TINYLORA": SVD, "ADAMSS": SVD,
    "BONE": "PEFT before 0.18 had it, and has MISS in its place; its own script converts adapters",
}  # fmt: skip
# Settings of the methods merged by formula: applied, seen in the tensors, or of training alone.
KNOWN = frozenset(
    """task_type peft_type auto_mapping peft_version base_model_name_or_path revision inference_mode
    fan_in_fan_out target_modules exclude_modules layers_to_transform layers_pattern modules_to_save
    r alpha rank_pattern alpha_pattern rank_dropout module_dropout rank_dropout_scale init_weights
    use_effective_conv2d decompose_both decompose_factor token_indices runtime_config bias
    trainable_token_indices layer_replication""".split()
)
METHODS = frozenset((*BY_PEFT, *BY_FORMULA))


@dataclass
class _Sorted:
    """Tensors of a file by layer."""

    layers: dict[str, dict[str, TensorRef]] = field(default_factory=lambda: defaultdict(dict))
    shared: dict[str, TensorRef] = field(default_factory=dict)
    whole: dict[str, TensorRef] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    doubts: list[str] = field(default_factory=list)


def refuse(path: Path, method: str) -> None:
    """Refuse a method by name, with the reason.

    Raises:
        AdapterError: It is one of those that no weight can hold, or not from what is stored.
    """
    if method in REFUSED:
        raise AdapterError(
            f"{path}: peft_type {method} cannot be merged here: {REFUSED[method]}. Serve it with "
            "PEFT, or merge it there with merge_and_unload() if PEFT can."
        )


def read(
    path: Path, config_path: Path, raw: Mapping[str, Any], file: Path, tensors: Parts
) -> Adapter:
    """Return an adapter of another method in normal form; reads no tensor.

    Raises:
        AdapterError: A tensor or a setting is unknown; all are listed. Or PEFT is not installed,
            where its layers are needed.
    """
    method = str(raw["peft_type"])
    _refuse_types(config_path, raw)
    if method in BY_PEFT:
        peft_layers.refuse_without_peft(config_path, method)
    found = _sort(tensors, raw, method)
    found.problems += config_problems(raw, method)
    updates = [] if found.problems else list(_updates(config_path, raw, method, found))
    updates += [Update(t, "replace", (ref.name,), value=ref) for t, ref in found.whole.items()]
    if found.problems:
        raise AdapterError(
            f"{file}: does not add up:{listing(sorted(found.problems))}\n"
            f"Check that the folder holds one whole {method} adapter with its own config."
        )
    if not updates:
        raise AdapterError(f"{file}: holds no {method} tensors. Check how the adapter was saved.")
    return Adapter(
        path=path,
        format="peft",
        files=(file,),
        tensors=tensors,
        updates=tuple(updates),
        folder=config_path.parent,
        base_name=base_name(config_path, raw),
        square_io=bool(raw.get("fan_in_fan_out")),
        doubts=tuple(found.doubts),
        facts={
            "method": method,
            "trainer": "PEFT; " + ("merged through PEFT's own layers" if method in BY_PEFT
                                   else "merged by this tool's formula"),
        },
    )  # fmt: skip


def _refuse_types(path: Path, raw: Mapping[str, Any]) -> None:
    """Refuse fields that are read here and are not what PEFT writes."""
    kinds = {"modules_to_save": ("names", str), "token_indices": ("token ids", int)}
    for name, (what, kind) in kinds.items():
        value = raw.get(name) or []
        if not isinstance(value, list) or not all(type(v) is kind for v in value):
            raise AdapterError(
                f"{path}: {name}: expected a list of {what}, got {shown(value)}. Check how the "
                "adapter was saved."
            )


def _sort(tensors: Parts, raw: Mapping[str, Any], method: str) -> _Sorted:
    prefix, found = {**BY_PEFT, **BY_FORMULA}[method], _Sorted()
    saved = tuple(raw.get("modules_to_save") or ())
    for key, ref in tensors.items():
        segments = plain_name(key).split(".")
        at = next((i for i, s in enumerate(segments) if s.startswith(prefix)), None)
        if at is not None and segments[at] in SHARED.get(method, ()):
            found.shared[".".join(segments)] = ref
        elif at:
            found.layers[".".join(segments[:at])][".".join(segments[at:])] = ref
        elif "modules_to_save" in segments or any(s in segments[:-1] for s in saved):
            parts = [s for s in segments if s not in ("modules_to_save", "default")]
            found.whole[".".join(parts)] = ref
        else:
            found.problems.append(f"unknown tensor '{shown(key)}'")
    return found


def config_problems(raw: Mapping[str, Any], method: str) -> Iterator[str]:
    """Yield what is not supported of a method's settings."""
    if (raw.get("bias") or "none") != "none":
        yield f"bias {shown(raw['bias'])}: trained biases are supported for LORA only"
    if raw.get("trainable_token_indices"):
        yield "trainable_token_indices: supported for LORA only"
    if raw.get("layer_replication"):
        yield "layer_replication: supported for LORA only"
    if method in BY_FORMULA:
        for name in sorted(n for n, value in raw.items() if value and n not in KNOWN):
            yield (
                f"{shown(name)}: unknown field, set to {shown(raw[name], 40)}; it may change the "
                "weights. Set it to null if you know that it does not"
            )
    if method in BY_PEFT:
        if not peft_layers.knows(method):
            yield f"peft_type {method}: the installed PEFT does not have it; install a newer one"
            return
        for name in peft_layers.unknown_fields(raw):
            yield (
                f"{shown(name)}: set to {shown(raw[name], 40)}, which the installed PEFT does not "
                "know; install the version that trained it"
            )


def _updates(
    config_path: Path, raw: Mapping[str, Any], method: str, found: _Sorted
) -> Iterator[Update]:
    if method in BY_PEFT:
        yield from _by_peft(raw, found)
    elif method in ("LOHA", "LOKR"):
        yield from peft_products.updates(
            config_path, raw, found.layers, found.problems, found.doubts
        )
    else:
        yield from _replaced(raw, method, found)


def _by_peft(raw: Mapping[str, Any], found: _Sorted) -> Iterator[Update]:
    config, method = json.dumps(raw, sort_keys=True), str(raw["peft_type"])
    wanted = SHARED.get(method, ())
    if {name.rpartition(".")[2] for name in found.shared} != set(wanted):
        found.problems.append(
            f"{' and '.join(wanted)} not in the file: they were drawn from a random generator. "
            "Save the adapter again with save_projection=True"
        )
        return
    for module, parts in found.layers.items():
        own = {f"base_model.model.{module}.{part}": ref for part, ref in parts.items()}
        tensors = {**own, **found.shared}
        function = PeftLayer(
            config,
            module,
            tuple(tensors.items()),
            embedding=any("embedding" in part for part in parts),
        )
        keys = tuple(ref.name for ref in tensors.values())
        layout: Layout | None = "oi" if function.embedding else None
        yield Update(f"{module}.weight", "function", keys, function=function, layout=layout)


def _replaced(raw: Mapping[str, Any], method: str, found: _Sorted) -> Iterator[Update]:
    """Norms and tokens are replaced, biases added to."""
    for module, parts in found.layers.items():
        for name, ref in parts.items():
            leaf = name.rpartition(".")[2]
            if method == "LN_TUNING" and leaf in ("weight", "bias"):
                yield Update(f"{module}.{leaf}", "replace", (ref.name,), value=ref)
            elif method == "BEFT" and ref.size == ref.shape[-1]:
                value = ref.reshaped(ref.size)
                yield Update(f"{module}.bias", "add", (ref.name,), value=value)
            elif (
                method == "TRAINABLE_TOKENS" and len(raw.get("token_indices") or ()) == ref.shape[0]
            ):
                yield Update(f"{module}.weight", "rows", (ref.name,), value=ref,
                             row_indices=tuple(raw["token_indices"]))  # fmt: skip
            else:
                found.problems.append(f"'{shown(ref.name)}' {ref.shape}: not as {method} saves it")
