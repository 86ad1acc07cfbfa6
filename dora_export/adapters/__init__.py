"""Adapter formats. Adding one is adding a module beside this file and a row to ``FORMATS``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
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
from dora_export.adapters.config_files import CONFIG
from dora_export.adapters.model import Adapter, Reading, ReadOptions
from dora_export.errors import AdapterError, InputError, shown

__all__ = ["FORMATS", "Adapter", "AdapterFormat", "ReadOptions", "Reading", "read_adapter",
           "read_adapters"]  # fmt: skip


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


LITGPT = "lit_model.pth.lora"
# What only these formats leave open: said of others it would change nothing, without a word.
TAKEN_BY: Mapping[str, tuple[str, ...]] = {
    "torchtune_dora_fix": ("peft",),
    "magnitude_is_normalised": ("peft", "nvlabs"),
    "base_is_residual": ("peft", "diffusers"),
    "recompute_init": ("peft", "diffusers"),
    "moe_b_layout": ("peft",),
    "moe_transposed": ("peft",),
    "trained_in": ("lycoris",),
}


def read_adapter(path: Path, options: ReadOptions) -> Adapter:
    """Read the adapter at ``path`` in the format that ``options`` names, or the only that matches.

    Raises:
        InputError: Nothing there, or no format matches.
        AdapterError: The adapter is of no known format, its reader refuses it, or ``options`` say
            what its format does not leave open.
    """
    return read_adapters([path], options)[0]


def read_adapters(paths: Iterable[Path], options: ReadOptions) -> list[Adapter]:
    """Read several adapters; each option is about those whose formats take it, at least one.

    Raises:
        DoraExportError: As ``read_adapter``.
    """
    adapters = [_read(path, options) for path in paths]
    formats = {adapter.format for adapter in adapters}
    for option, takers in TAKEN_BY.items():
        if getattr(options, option) and not formats.intersection(takers):
            flag = f"--{option.replace('_', '-')}"
            raise AdapterError(
                f"{adapters[0].path}: {flag} is about adapters of {' or '.join(takers)}, this is "
                f"{', '.join(sorted(formats))}. Leave {flag} out."
            )
    return adapters


def _read(path: Path, options: ReadOptions) -> Adapter:
    name, known = options.adapter_format, ", ".join(f.name for f in FORMATS)
    if name is not None and name not in [f.name for f in FORMATS]:
        raise AdapterError(f"--adapter-format {name}: unknown. Known: {known}.")
    if not path.exists():
        raise InputError(f"{path}: no such file or folder. Check the path of the adapter.")
    found = [f for f in FORMATS if (f.matches(path, options) if name is None else f.name == name)]
    if len(found) != 1:
        seen = f"fits {[f.name for f in found]}" if found else "is of no known format"
        raise AdapterError(
            f"{path}: {seen}. {'' if found else _kin(path)}Expected a PEFT folder "
            "(adapter_config.json and adapter_model.safetensors) or a known single file; or pass "
            f"--adapter-format, one of: {known}."
        )
    return found[0].read(path, options)


def _kin(path: Path) -> str:
    """Return what is known of a path that is no adapter this tool reads, or ""."""
    litgpt = path / LITGPT if path.is_dir() else path
    if litgpt.name == LITGPT and litgpt.is_file():
        return "LitGPT fuses q, k and v in an order of its own: run litgpt merge_lora. "
    weights = next(path.glob("adapter_model.*"), path) if path.is_dir() else path
    if weights.stem == "adapter_model" and not (weights.parent / CONFIG).is_file():
        return f"Its {CONFIG} is missing: copy the whole folder that PEFT saved. "
    if inside := sorted(p.parent.name for p in path.glob(f"*/{CONFIG}")):
        return f"It holds folders of adapters, name one: {', '.join(map(shown, inside))}. "
    return ""
