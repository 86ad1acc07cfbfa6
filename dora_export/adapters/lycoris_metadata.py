"""What the metadata of these trainers' files says, for checks only: tensors decide.

Sources: github.com/kohya-ss/sd-scripts, train_network.py (``ss_*``; ``ss_network_args`` is JSON of
the trainer's strings); github.com/KohakuBlueleaf/LyCORIS, lycoris/kohya.py, create_network;
github.com/Nerogar/OneTrainer, modules/modelSaver/mixin/DtypeModelSaverMixin.py (``ot_*``);
github.com/bghira/SimpleTuner, simpletuner/helpers/training/save_hooks.py, _save_lycoris
(``lycoris_config``), and scripts/extract_lycoris_adapter.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dora_export.errors import InputError, shown
from dora_export.storage.json_file import parse
from dora_export.update import Axis

WORDS = {
    "lora": "LoRA", "locon": "LoRA", "loha": "LoHa", "lokr": "LoKr", "full": "full",
    "norm": "norm",
}  # fmt: skip

# OneTrainer's settings of each algorithm: whether it decomposes, on outputs, with an eps. LoKr's
# always adds one, and LoHa decomposes nothing.
ONETRAINER = {
    "lora": ("lora_decompose", "lora_decompose_output_axis", "lora_decompose_norm_epsilon"),
    "lokr": ("lokr_weight_decompose", "lokr_dora_on_output", ""),
}


@dataclass(frozen=True)
class Said:
    """What metadata says; None where it says nothing.

    Attributes:
        trainer: Who wrote the file.
        algorithm: LyCORIS' word for it, lower case.
        dora: Whether weights are decomposed.
        axis: What the magnitudes count.
        rs_lora: Whether alpha was divided by the root of the rank.
        bypass: Trained without decomposing, whatever ``dora`` says.
        split_qkv: sd-scripts trained Flux' fused layers as several, each with its own rank.
        half: Type that all parameters were held in while training, "bf16" or "fp16"; "fp32": none.
        eps: Whether OneTrainer added an epsilon to the norm.
        as_trained: The file's types are those of training.
        base: The base model, in the trainer's words.
    """

    trainer: str | None = None
    algorithm: str | None = None
    dora: bool | None = None
    axis: Axis | None = None
    rs_lora: bool | None = None
    bypass: bool = False
    split_qkv: bool = False
    half: str | None = None
    eps: bool | None = None
    as_trained: bool = False
    base: str | None = None


def said_by(metadata: Mapping[str, str]) -> Said:
    """Return what a file's metadata says; what cannot be read says nothing."""
    if (onetrainers := by_onetrainer(metadata)) is not None:
        return onetrainers
    if "lycoris_config" in metadata:
        return _by_simpletuner(metadata)
    arguments = _object(metadata.get("ss_network_args"))
    module = metadata.get("ss_network_module")
    trainer = None
    if module is not None:
        by_lycoris = module.startswith("lycoris")
        trainer = f"{'LyCORIS in ' if by_lycoris else ''}kohya sd-scripts ({module})"
    on_output = _flag(arguments, "wd_on_output", "wd_on_out")
    full = {word: _flag(metadata, f"ss_full_{word}") for word in ("bf16", "fp16")}
    half = next((word for word, on in full.items() if on), None)
    # full_bf16 goes with mixed_precision bf16 only, and not every version writes it down.
    mixed = metadata.get("ss_mixed_precision", "bf16")
    if half is None and full["fp16"] is False and (full["bf16"] is False or mixed != "bf16"):
        half = "fp32"
    algorithm = arguments.get("algo")
    return Said(
        trainer=trainer,
        algorithm=str(algorithm).lower() if algorithm is not None else None,
        dora=_flag(arguments, "dora_wd", "weight_decompose"),
        axis=None if on_output is None else "out" if on_output else "in",
        rs_lora=_flag(arguments, "rs_lora"),
        bypass=bool(_flag(arguments, "bypass_mode")),
        split_qkv=module == "networks.lora_flux" and bool(_flag(arguments, "split_qkv")),
        half=half,
        base=metadata.get("ss_sd_model_name") or metadata.get("modelspec.architecture"),
    )


def by_onetrainer(metadata: Mapping[str, str]) -> Said | None:
    """Return what OneTrainer says; None: it is not its file."""
    if not metadata.keys() & {"ot_revision", "ot_branch"}:
        return None
    config = _object(metadata.get("ot_config"))
    kind = {"LORA": "lora", "LOHA": "loha", "LOKR": "lokr"}.get(str(config.get("peft_type")))
    dora, axis, eps = (config.get(name) for name in ONETRAINER.get(kind or "", ("", "", "")))
    return Said(
        trainer="OneTrainer",
        algorithm=kind,
        dora=dora if isinstance(dora, bool) else None,
        axis=("out" if axis else "in") if isinstance(axis, bool) and dora is True else None,
        rs_lora=False,  # alpha / rank in all its modules
        half="fp32",  # it normalises in float32 whatever the parameters' type
        eps=eps if isinstance(eps, bool) else None,
        base=metadata.get("modelspec.architecture"),
    )


def _by_simpletuner(metadata: Mapping[str, str]) -> Said:
    """Return what SimpleTuner says: it passes its config to LyCORIS as it is."""
    config = _object(metadata["lycoris_config"])
    on_output = _flag(config, "wd_on_output")
    algorithm: Any = config.get("algo") or "lora"
    if _has_algorithms_by_layer(config.get("apply_preset")):
        algorithm = None
    extracted = metadata.get("format") == "simpletuner-lycoris-extract"
    return Said(
        trainer="SimpleTuner, extracted from two models" if extracted else "SimpleTuner, LyCORIS",
        algorithm=None if algorithm is None else str(algorithm).lower(),
        dora=_flag(config, "dora_wd"),
        axis=None if on_output is None else "out" if on_output else "in",
        rs_lora=_flag(config, "rs_lora"),
        bypass=bool(_flag(config, "bypass_mode")),
        as_trained=True,  # it saves in the type of its first parameter
        base=metadata.get("modelspec.architecture") or metadata.get("base_model"),
    )


def _has_algorithms_by_layer(preset: object) -> bool:
    maps = [preset.get(f"{by}_algo_map") for by in ("module", "name")] if isinstance(
        preset, dict) else []  # fmt: skip
    settings = [value for m in maps if isinstance(m, dict) for value in m.values()]
    return any(isinstance(value, dict) and "algo" in value for value in settings)


def _object(text: str | None) -> Mapping[str, Any]:
    try:
        found = parse((text or "{}").encode(), "metadata")
    except InputError:
        return {}
    return found if isinstance(found, dict) else {}


def _flag(values: Mapping[str, Any], *names: str) -> bool | None:
    words = {"true": True, "1": True, "false": False, "0": False, "none": False}
    found = [words.get(str(values[n]).lower()) for n in names if n in values]
    return found[0] if found else None


def contradictions(said: Said, algorithms: Mapping[str, int], axes: Mapping[str, int]) -> list[str]:
    """Return where the metadata contradicts the tensors.

    Args:
        said: By ``said_by``.
        algorithms: How many layers each algorithm has ("LoRA", "LoHa", "LoKr", "full", "norm").
        axes: How many layers have magnitudes of each axis.
    """
    found = []
    word = WORDS.get(said.algorithm or "")
    if said.algorithm == "dylora":
        found.append(
            "it says algo=dylora, whose tensors look like LoRA's but were trained with another "
            "scaling for every rank"
        )
    elif said.algorithm is not None and word is None:
        found.append(f"it says algo={shown(said.algorithm)}, which is not supported")
    elif word is not None and word not in algorithms:
        found.append(f"it says algo={said.algorithm}, the tensors are {', '.join(algorithms)}")
    if said.dora and not axes and not said.bypass:
        found.append(
            "it says that weights were decomposed (DoRA), but there is no dora_scale: it was lost, "
            "or trained in bypass mode, as on quantised weights"
        )
    if said.dora is False and axes:
        found.append("it says that weights were not decomposed, but there is dora_scale")
    if said.axis is not None and axes and set(axes) != {said.axis}:
        other = "out" if said.axis == "in" else "in"
        found.append(f"it says magnitudes count {said.axis}puts, their shapes say {other}puts")
    return found
