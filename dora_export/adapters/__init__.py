"""Adapter formats. Adding one is adding a module beside this file and a row to ``FORMATS``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from dora_export.adapters import (
    aitoolkit,
    catid,
    diffusers,
    lycoris,
    megatron,
    merged_dora,
    mlx,
    nvlabs,
    peft,
    qdora,
    torchtune,
)
from dora_export.adapters.model import Adapter, Reading, ReadOptions
from dora_export.errors import AdapterError, InputError

__all__ = ["FORMATS", "Adapter", "AdapterFormat", "ReadOptions", "Reading", "read_adapter"]


class AdapterFormat(NamedTuple):
    """One way adapters are stored.

    Attributes:
        name: What ``--adapter-format`` calls it.
        what: One line for people.
        matches: Whether a file or folder is of this format; reads names and configs only.
        read: Returns the adapter in normal form; reads no tensor.
    """

    name: str
    what: str
    matches: Callable[[Path, ReadOptions], bool]
    read: Callable[[Path, ReadOptions], Adapter]


FORMATS = (
    AdapterFormat("peft", "PEFT folder: adapter_config.json and weights", peft.matches, peft.read),
    AdapterFormat(
        "mlx", "MLX folder: adapter_config.json and adapters.safetensors", mlx.matches, mlx.read
    ),
    AdapterFormat("torchtune", "torchtune's adapter_model.pt", torchtune.matches, torchtune.read),
    AdapterFormat("nvlabs", "folder of NVlabs/DoRA's PEFT fork", nvlabs.matches, nvlabs.read),
    AdapterFormat(
        "megatron",
        "state dict of Megatron-Bridge or NeMo adapters",
        megatron.matches,
        megatron.read,
    ),
    AdapterFormat(
        "lycoris",
        "single file of LyCORIS, kohya, OneTrainer or ComfyUI",
        lycoris.matches,
        lycoris.read,
    ),
    AdapterFormat(
        "diffusers",
        "pytorch_lora_weights of diffusers or SimpleTuner, or its folder",
        diffusers.matches,
        diffusers.read,
    ),
    AdapterFormat(
        "ai-toolkit", "DoRA file of ai-toolkit (.magnitude)", aitoolkit.matches, aitoolkit.read
    ),
    AdapterFormat("qdora", "state dict of fsdp_qlora's QDoRA", qdora.matches, qdora.read),
    AdapterFormat("catid", "state dict of catid's DoRALayer modules", catid.matches, catid.read),
    AdapterFormat(
        "linear-with-dora-merged",
        "state dict of LinearWithDoRAMerged modules, base weights included",
        merged_dora.matches,
        merged_dora.read,
    ),
)


def read_adapter(path: Path, options: ReadOptions) -> Adapter:
    """Read the adapter at ``path`` in the format that ``options`` names, or the only that matches.

    Raises:
        InputError: Nothing there, or no format matches.
        AdapterError: The adapter is of no known format, or its reader refuses it.
    """
    name, known = options.adapter_format, ", ".join(f.name for f in FORMATS)
    if name is not None and name not in [f.name for f in FORMATS]:
        raise AdapterError(f"--adapter-format {name}: unknown. Known: {known}.")
    if not path.exists():
        raise InputError(f"{path}: no such file or folder. Check the path of the adapter.")
    found = [f for f in FORMATS if (f.matches(path, options) if name is None else f.name == name)]
    if len(found) != 1:
        seen = f"fits {[f.name for f in found]}" if found else "is of no known format"
        raise AdapterError(
            f"{path}: {seen}. Expected a PEFT folder (adapter_config.json and "
            f"adapter_model.safetensors) or a known single file; or pass --adapter-format, one of: "
            f"{known}."
        )
    return found[0].read(path, options)
