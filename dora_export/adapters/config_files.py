"""Whose ``adapter_config.json`` a folder holds: several trainers use that one file name."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

from dora_export.checkpoints.folder import read_json
from dora_export.errors import AdapterError, shown
from dora_export.storage.paths import contained

CONFIG = "adapter_config.json"
Maker = Literal["peft", "mlx", "nvlabs"]


def config_of(path: Path, maker: Maker, weights: Collection[str]) -> Path | None:
    """Return the config at ``path`` if it is ``maker``'s, else None.

    Args:
        path: A folder, its adapter_config.json, or one of its weight files.
        maker: Whose config is wanted.
        weights: Patterns of the names of weight files that stand for their folder.

    Raises:
        InputError: The config is malformed, or in the folder as a link that leads out of it.
    """
    folder = path if path.is_dir() else path.parent
    names = (CONFIG, *weights)
    if path.is_file() and not any(fnmatchcase(path.name, name) for name in names):
        return None
    if not (folder / CONFIG).is_file():
        return None
    config = path if path.name == CONFIG else contained(folder / CONFIG, folder)
    return config if made_by(read_json(config)) == maker else None


def base_name(path: Path, config: Mapping[str, Any]) -> str | None:
    """Return the trainer's name for the base in a config of PEFT's, or None.

    Raises:
        AdapterError: It is no name.
    """
    name = config.get("base_model_name_or_path") or None
    if name is not None and not isinstance(name, str):
        raise AdapterError(
            f"{path}: base_model_name_or_path: expected a name, got {shown(name)}. Set it to null."
        )
    return name


def made_by(config: Mapping[str, Any]) -> Maker:
    """Return whose config this is; exactly one, so no folder fits two formats.

    PEFT's carry ``peft_type``, those of NVlabs' fork DORA there; MLX's carry ``fine_tune_type`` or
    ``lora_parameters``, early ones of mlx-vlm only ``rank`` and ``alpha``.
    """
    if config.get("peft_type") == "DORA":
        return "nvlabs"
    if "peft_type" in config or "lora_alpha" in config:
        return "peft"
    if "fine_tune_type" in config or "lora_parameters" in config or "rank" in config:
        return "mlx"
    return "peft"
