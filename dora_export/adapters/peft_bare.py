"""PEFT's tensors without their adapter_config.json: the file tells all but alpha.

Ranks stand in the shapes of A, magnitudes say that it is DoRA; alpha, and whether it is divided by
the rank or by its root, stand in the config alone. ``--alpha`` gives what is divided by the rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from dora_export.adapters.model import ReadOptions
from dora_export.adapters.peft_config import PeftConfig
from dora_export.adapters.state_dict import tensors_of
from dora_export.errors import AdapterError
from dora_export.storage.paths import contained
from dora_export.tensors import TensorRef

PREFIX = "base_model.model."
DOUBT = (
    "adapter_config.json is missing, which would say whether the base was changed before training "
    "(PiSSA and its like), and whether alpha belongs to all layers alike"
)


def weights_of(path: Path, config: str, names: Iterable[str], options: ReadOptions) -> Path | None:
    """Return the weight file at ``path`` if it is PEFT's and no config lies beside it.

    Args:
        path: A folder or a file.
        config: What the config is called.
        names: What weight files in a folder are called.
        options: Whether pickled files may be read.

    Raises:
        InputError: The file in a folder is a link that leads out of it, or malformed.
    """
    found = [path / name for name in names if (path / name).is_file()] if path.is_dir() else [path]
    if not found or (found[0].parent / config).exists():
        return None
    file = contained(found[0], path) if path.is_dir() else path
    keys = list(tensors_of(file, options))
    pairs = any(".lora_A." in key or ".lora_embedding_A" in key for key in keys)
    return file if pairs and all(key.startswith(PREFIX) for key in keys) else None


def settings(
    file: Path, tensors: Mapping[str, TensorRef], config: str, options: ReadOptions
) -> dict[str, Any]:
    """Return a config that says what the tensors and ``--alpha`` do.

    Raises:
        AdapterError: alpha is not given.
    """
    if options.alpha is None:
        raise AdapterError(
            f"{file}: no {config} lies beside it, so alpha is not known. Put the config of its "
            "training there, or pass --alpha: the factor on B A is alpha / rank (of an adapter "
            "with rslora, pass lora_alpha times the root of the rank)."
        )
    dora = any("lora_magnitude_vector" in key for key in tensors)
    return {"peft_type": "LORA", "r": 1, "lora_alpha": options.alpha, "use_dora": dora}


def with_ranks(config: PeftConfig, layers: Mapping[str, Mapping[str, TensorRef]]) -> PeftConfig:
    """Return the config with the rank of each layer as its A has it."""
    ranks = {
        module: parts[name].shape[0]
        for module, parts in layers.items()
        for name in ("A", "embedding_A")
        if name in parts and parts[name].shape
    }
    return replace(config, ranks={**(config.ranks or {}), **ranks})
