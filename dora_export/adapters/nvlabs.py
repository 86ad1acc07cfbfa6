"""Adapters of NVlabs/DoRA, the paper's own code: two forks of PEFT with peft_type DORA.

Per layer ``X``: ``X.lora_A.weight`` (r, in), ``X.lora_B.weight`` (out, r) and
``X.weight_m_wdecomp.weight`` (out, 1): ``W' = m N / ||N||`` with ``N = W + lora_alpha / r * B A``,
a norm per row, no eps; the bias is not scaled. Modules of ``Wdecompose_target_modules`` have m
only: ``W' = m W / ||W||``. The fork for visual instruction tuning, whose config spells that field
``wdecompose_target_modules``, returns early for such modules, in forward and in merge: there they
have no effect. With fan_in_fan_out both forks normalise the wrong dimension; that is refused.

Source: github.com/NVlabs/DoRA, commonsense_reasoning/peft/src/peft/tuners/dora.py and
visual_instruction_tuning/peft/src/peft/tuners/dora.py (class Linear), utils/save_and_load.py.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dora_export.adapters.config_files import CONFIG, base_name, config_of
from dora_export.adapters.model import Adapter, ReadOptions
from dora_export.checkpoints.folder import read_json
from dora_export.errors import AdapterError, InputError, listing, shown
from dora_export.storage import read_tensors
from dora_export.storage.json_file import is_number
from dora_export.storage.paths import contained
from dora_export.tensors import Operand, TensorRef
from dora_export.update import Update

WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
PREFIX = "base_model.model."
PART = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A|lora_B|weight_m_wdecomp)(\.(?P<name>[^.]+))?\.weight"
)
KNOWN = frozenset(
    """peft_type auto_mapping base_model_name_or_path revision task_type inference_mode r
    target_modules lora_alpha lora_dropout dora_simple merge_weights bias layers_to_transform
    layers_pattern Wdecompose_target_modules wdecompose_target_modules""".split()
)
REFUSED = {
    "fan_in_fan_out": "the norm was taken over the wrong dimension",
    "enable_lora": "fused layers with LoRA on some parts are not supported",
    "modules_to_save": "modules trained whole are not supported in this format",
}


def matches(path: Path, options: ReadOptions) -> bool:
    """Return whether ``path`` is a folder of NVlabs' fork, its config, or its weight file."""
    return config_of(path, "nvlabs", WEIGHTS) is not None


def read(path: Path, options: ReadOptions) -> Adapter:
    """Read an adapter folder of NVlabs' fork.

    Raises:
        InputError: The config or the weights are missing or malformed.
        AdapterError: A setting or tensor that contradicts the others, or is not known.
    """
    config_path = config_of(path, "nvlabs", WEIGHTS)
    if config_path is None:
        raise InputError(f"{path}: no {CONFIG} with peft_type DORA. Check the adapter's folder.")
    config = read_json(config_path)
    scaling = _scaling(config_path, config, options)
    found = [config_path.parent / n for n in WEIGHTS if (config_path.parent / n).is_file()]
    if not found:
        raise InputError(
            f"{config_path.parent}: has {CONFIG} but no {' or '.join(WEIGHTS)}. "
            "Copy the whole adapter folder."
        )
    tensors = read_tensors(
        contained(found[0], config_path.parent), allow_pickle=options.allow_pickle
    )
    problems: list[str] = []
    ignored: dict[str, str] = {}
    normalised = bool(options.magnitude_is_normalised)
    updates = tuple(_updates(tensors, config, scaling, normalised, ignored, problems))
    if problems:
        raise AdapterError(
            f"{found[0]}: does not add up:{listing(sorted(problems))}\n"
            f"Check that the folder holds one whole adapter with the {CONFIG} of its training."
        )
    return Adapter(
        path=path,
        format="nvlabs",
        files=(found[0],),
        tensors=tensors,
        updates=updates,
        ignored=ignored,
        folder=config_path.parent,
        base_name=base_name(config_path, config),
        doubtful_magnitudes=options.magnitude_is_normalised is None,
        facts={
            "method": "DoRA",
            "trainer": "NVlabs/DoRA",
            "axis": "out, by the format: NVlabs' code takes the norm over dim 1",
            "rank": [config["r"]],
            "alpha": [config["lora_alpha"]],
            "scaling": [round(scaling, 6)],
            "magnitude": "one per output" + (", divided by its norm already" if normalised else ""),
        },
    )


def _scaling(path: Path, config: Mapping[str, Any], options: ReadOptions) -> float:
    if options.alpha is not None:
        raise AdapterError(f"{path}: lora_alpha is in this file. Leave --alpha out.")
    if options.axis == "in":
        raise AdapterError(f"{path}: this code has one magnitude per output. Leave --axis out.")
    problems = [f"{name}: {why}" for name, why in REFUSED.items() if config.get(name)]
    known = KNOWN | REFUSED.keys() | {"init_lora_weights"}
    problems += [
        f"{shown(name)}: a setting of unknown effect"
        for name in config
        if name not in known and config[name] is not None
    ]
    if config.get("init_lora_weights") not in (None, True):
        problems.append("init_lora_weights: an initialisation of unknown effect")
    if config.get("bias") not in (None, "none", "all"):
        problems.append(f"bias '{shown(config['bias'])}': its code does not save the magnitudes")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    for name, value in (("r", rank), ("lora_alpha", alpha)):
        if not is_number(value) or value <= 0:
            problems.append(f"{name} '{shown(value)}': expected a positive number")
    if problems:
        raise AdapterError(f"{path}: cannot be merged:{listing(problems)}")
    return float(alpha / rank)  # type: ignore[operator]


def _updates(
    tensors: Mapping[str, TensorRef],
    config: Mapping[str, Any],
    scaling: float,
    normalised: bool,
    ignored: dict[str, str],
    problems: list[str],
) -> Iterator[Update]:
    layers: dict[str, dict[str, TensorRef]] = defaultdict(dict)
    names = set()
    for key, ref in tensors.items():
        plain = key.removeprefix(PREFIX)
        if match := PART.fullmatch(plain):
            names.add(match["name"])
            layers[match["module"]][match["part"]] = ref
        elif plain.endswith(".bias") and config.get("bias") == "all":
            yield Update(target=plain, kind="replace", source_keys=(key,), value=ref)
        else:
            problems.append(f"unknown tensor '{shown(key)}'")
    if len(names) > 1:
        problems.append(f"tensors of several adapters: {sorted(map(str, names))}")
    for module, parts in layers.items():
        a, b, m = (parts.get(p) for p in ("lora_A", "lora_B", "weight_m_wdecomp"))
        if m is None or (a is None) != (b is None):
            missing = {"lora_A", "lora_B", "weight_m_wdecomp"} - parts.keys()
            problems.append(f"{shown(module)}: {', '.join(sorted(missing))} missing")
        elif a is None or b is None:
            yield from _magnitude_only(module, m, config, normalised, ignored, problems)
        elif (a.shape[:1], b.shape[1:], m.shape) != (
            (config["r"],),
            (config["r"],),
            (b.shape[0], 1),
        ):
            problems.append(
                f"{shown(module)}: r is {config['r']}, but lora_A is {a.shape}, lora_B {b.shape} "
                f"and weight_m_wdecomp {m.shape}"
            )
        else:
            yield Update(
                target=f"{module}.weight",
                kind="dora",
                source_keys=(a.name, b.name, m.name),
                down=Operand.plain(a),
                up=Operand.plain(b),
                scaling=scaling,
                magnitude=Operand.vector(m),
                magnitude_is_factor=normalised,
                layout="oi",
            )


def _magnitude_only(
    module: str,
    m: TensorRef,
    config: Mapping[str, Any],
    normalised: bool,
    ignored: dict[str, str],
    problems: list[str],
) -> Iterator[Update]:
    """Yield the update of a module without A and B, by the fork that the config's words show."""
    spelled = {
        n
        for n in ("Wdecompose_target_modules", "wdecompose_target_modules")
        if config.get(n) is not None
    }
    if spelled == {"wdecompose_target_modules"}:
        ignored[m.name] = "this fork does not apply modules with magnitudes only"
    elif spelled != {"Wdecompose_target_modules"}:
        problems.append(
            f"{shown(module)}: lora_A and lora_B missing, and the config names no "
            "Wdecompose_target_modules"
        )
    elif len(m.shape) != 2 or m.shape[1] != 1:
        problems.append(f"{shown(module)}: weight_m_wdecomp is {m.shape}, expected (out, 1)")
    else:
        yield Update(
            target=f"{module}.weight",
            kind="magnitude",
            source_keys=(m.name,),
            magnitude=Operand.vector(m),
            magnitude_is_factor=normalised,
            layout="oi",
        )
