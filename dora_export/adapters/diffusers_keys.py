"""How diffusers has named the tensors of LoRA files: component, module path, part.

The layout of today is PEFT's behind the component (``unet.<path>.lora_A.weight``). Before, UNets
had attention processors (``<path>.processor.to_q_lora.down.weight``), then ``.lora.down``, and text
encoders ``.to_q_lora.down`` with the UNet's names for their projections, then
``.lora_linear_layer.down``. Weights of A are called "down", those of B "up".

Source: github.com/huggingface/diffusers, src/diffusers/utils/state_dict_utils.py
(convert_state_dict_to_peft, convert_unet_state_dict_to_peft); github.com/bghira/SimpleTuner,
simpletuner/helpers/training/lora_format.py (convert_diffusers_to_comfyui and ..._sd_lora).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from dora_export.tensors import TensorRef

# "diffusion_model": the denoiser's, in SimpleTuner's files for ComfyUI.
COMPONENT = re.compile(
    r"(unet|transformer(_2)?|prior|text_encoder(_[234])?|image_encoder|controlnet|diffusion_model)\."
)
PROCESSOR = ".processor."
_SIDE = r"\.(?P<side>down|up)(\.weight)?"
_NAME = r"(\.(?!weight$|bias$)[^.]+)?"  # the adapter's name, which PEFT takes off on saving
# Part -> how a name ends, after the module. Tried in turn.
ENDINGS = {
    "A": re.compile(rf"\.lora_A{_NAME}(\.weight)?"),
    "B": re.compile(rf"\.lora_B{_NAME}(\.weight)?"),
    "B.bias": re.compile(rf"\.lora_B{_NAME}\.bias"),
    "m": re.compile(rf"\.lora_magnitude_vector{_NAME}(\.weight)?"),
    "dora_scale": re.compile(r"\.dora_scale"),
    "alpha": re.compile(r"\.alpha"),
    "linear layer": re.compile(rf"\.lora_linear_layer{_SIDE}"),
    "lora": re.compile(rf"\.lora{_SIDE}"),
    "processor": re.compile(rf"\.to_(?P<to>q|k|v|out)_lora{_SIDE}"),
}
# SimpleTuner's files of UNets for ComfyUI: kohya's names, the magnitudes under diffusers'.
KOHYA = re.compile(
    r"(?P<prefix>lora_unet|lora_te[12]?)_(?P<flat>[^.]+)\.(?P<part>lora_(down|up)\.weight|alpha)"
)
KOHYA_COMPONENTS = {"lora_unet": "unet", "lora_te": "text_encoder", "lora_te1": "text_encoder",
                    "lora_te2": "text_encoder_2"}  # fmt: skip
KOHYA_PARTS = {"lora_down.weight": "A", "lora_up.weight": "B", "alpha": "alpha"}
LEAVES = {"q": "to_q", "k": "to_k", "v": "to_v", "out": "to_out.0"}
TEXT_LEAVES = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "out": "out_proj"}


@dataclass(frozen=True)
class Key:
    """What a tensor's name says.

    Attributes:
        module: Path of the module, the component in front.
        part: "A", "B", "B.bias", "m", "dora_scale" or "alpha".
        old: It is of a layout before PEFT's.
    """

    module: str
    part: str
    old: bool = False


@dataclass(frozen=True)
class Sorted:
    """The tensors of a file.

    Attributes:
        layers: Module -> part -> tensor.
        old: Whether any name is of a layout before PEFT's.
        problems: Names that two tensors share, or that mean nothing here.
    """

    layers: Mapping[str, Mapping[str, TensorRef]]
    old: bool
    problems: tuple[str, ...]


def parsed(name: str) -> Key | None:
    """Return what a name says, or None if it is none of diffusers'."""
    plain = name.replace(PROCESSOR, ".")
    for part, pattern in ENDINGS.items():
        for match in pattern.finditer(plain):
            if match.end() == len(plain) and match.start():
                return _key(plain[: match.start()], part, match)
    return None


def component_of(module: str) -> str | None:
    """Return the component that a module's path begins with, or None."""
    match = COMPONENT.match(module)
    return match[0].rstrip(".") if match else None


def is_layout(names: Iterable[str]) -> bool:
    """Return whether all names are of diffusers' layouts, and one of them shows whose.

    A component in front shows it, or an attention processor; ``base_model.model.`` shows PEFT.
    """
    names = list(names)
    flat = _with_magnitudes(names)
    keys = [(name, _of_kohya(name, flat) or parsed(name)) for name in names]
    if not keys or any(key is None or name.startswith("base_model.") for name, key in keys):
        return False
    factors = [key for _, key in keys if key is not None and key.part in ("A", "B")]
    shown = [name for name, _ in keys if COMPONENT.match(name) or PROCESSOR in name]
    return bool(factors) and bool(shown)


def sort(tensors: Mapping[str, TensorRef]) -> Sorted:
    """Return the tensors of a file by module and part."""
    layers: dict[str, dict[str, TensorRef]] = defaultdict(dict)
    problems, old = [], False
    flat = _with_magnitudes(tensors)
    for name, ref in tensors.items():
        key = _of_kohya(name, flat) or parsed(name)
        if key is None:
            problems.append(f"unknown tensor '{name}'")
            continue
        old |= key.old
        parts = layers[key.module]
        if key.part in parts:
            problems.append(f"'{name}' and '{parts[key.part].name}' are the same part of one layer")
        parts[key.part] = ref
    return Sorted(_with_moved_magnitudes(layers), old, tuple(problems))


def _with_magnitudes(names: Iterable[str]) -> dict[str, str]:
    """Return the modules with magnitudes by their flattened paths, those that are no other's."""
    modules = [k.module for name in names if (k := parsed(name)) is not None and k.part == "m"]
    found = {module.replace(".", "_"): module for module in modules}
    return found if len(found) == len(modules) else {}


def _of_kohya(name: str, modules: Mapping[str, str]) -> Key | None:
    """Return what a name of kohya's says of one of these modules."""
    match = KOHYA.fullmatch(name)
    if match is None:
        return None
    module = modules.get(f"{KOHYA_COMPONENTS[match['prefix']]}_{match['flat']}")
    return None if module is None else Key(module, KOHYA_PARTS[match["part"]])


def _key(module: str, part: str, match: re.Match[str]) -> Key:
    if part not in ("linear layer", "lora", "processor"):
        return Key(module, part)
    side = "A" if match["side"] == "down" else "B"
    if part == "processor":
        in_text = (component_of(module) or "").startswith("text_encoder")
        leaves = TEXT_LEAVES if in_text else LEAVES
        module = f"{module}.{leaves[match['to']]}"
    return Key(module, side, old=True)


def _with_moved_magnitudes(
    layers: Mapping[str, dict[str, TensorRef]],
) -> dict[str, dict[str, TensorRef]]:
    """Return the layers, those of "to_out" with the "to_out.0" whose magnitudes they hold."""
    found: dict[str, dict[str, TensorRef]] = {}
    for module, parts in layers.items():
        lone = not parts.keys() & {"A", "B"} and f"{module}.0" in layers
        target = f"{module}.0" if lone else module
        found[target] = {**found.get(target, {}), **parts}
    return found
