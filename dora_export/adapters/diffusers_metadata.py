"""What stands in the metadata of files in diffusers' layout: PEFT's config of each component.

diffusers writes the settings of all components as one JSON object, ``"unet.r"`` and so on;
SimpleTuner's files for ComfyUI hold those of one component without its name. SimpleTuner adds
``global_step`` and entries of the model specification.

Sources: github.com/huggingface/diffusers, src/diffusers/loaders/lora_base.py (_save_lora_weights);
github.com/bghira/SimpleTuner, simpletuner/helpers/training/save_hooks.py
(_build_modelspec_metadata), simpletuner/helpers/models/common.py (save_lora_weights).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dora_export.errors import AdapterError, InputError
from dora_export.storage.json_file import parse
from dora_export.storage.safetensors import read_header

ENTRY = "lora_adapter_metadata"
ONE_COMPONENT = ""  # settings without a component's name
OTHER_METHODS = ("LOHA", "LOKR")  # of PEFT's that this layout holds, beside LORA


def of(file: Path) -> Mapping[str, str]:
    """Return a weight file's metadata; a pickled one has none."""
    return read_header(file).metadata if file.suffix == ".safetensors" else {}


def raw_configs(path: Path, metadata: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Return the config of each component, or ``{ONE_COMPONENT: config}``; none is there: {}.

    Raises:
        AdapterError: The entry is no JSON object, or beyond the limits of one.
    """
    if ENTRY not in metadata:
        return {}
    try:
        content = parse(metadata[ENTRY].encode(), f"{path}: {ENTRY}")
    except InputError as error:
        raise AdapterError(f"{error} Or save the adapter again.") from error
    if not isinstance(content, dict):
        raise AdapterError(f"{path}: {ENTRY} is not a JSON object. Save the adapter again.")
    found: dict[str, dict[str, Any]] = {}
    for name, value in content.items():
        component, dot, setting = name.partition(".")
        found.setdefault(component if dot else ONE_COMPONENT, {})[setting or component] = value
    return found


def has_other_method(file: Path) -> bool:
    """Return whether the metadata says that PEFT's LoHa or LoKr made a file.

    Its tensors have the names that LyCORIS gives them, and mean another scaling.
    """
    try:
        configs = raw_configs(file, of(file))
    except AdapterError:
        return False  # the reader that takes the file says what is wrong
    return any(config.get("peft_type") in OTHER_METHODS for config in configs.values())


def by_simpletuner(metadata: Mapping[str, str]) -> bool:
    """Return whether SimpleTuner's entries are there."""
    return "global_step" in metadata and metadata.get("modelspec.implementation") == "diffusers"
