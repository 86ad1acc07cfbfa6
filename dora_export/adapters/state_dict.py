"""What readers of single files share: parts of layers, and the options that such files need."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

from dora_export.adapters.model import ReadOptions
from dora_export.errors import AdapterError
from dora_export.storage import PICKLED, read_tensors
from dora_export.tensors import TensorRef

Layers = Mapping[str, Mapping[str, TensorRef]]


def tensors_of(path: Path, options: ReadOptions) -> dict[str, TensorRef]:
    """Return the tensors of a weight file, or none if ``path`` is not one."""
    if not path.is_file() or path.suffix not in (".safetensors", *PICKLED):
        return {}
    return read_tensors(path, allow_pickle=options.allow_pickle)


def sorted_parts(
    tensors: Mapping[str, TensorRef], pattern: re.Pattern[str]
) -> tuple[dict[str, dict[str, TensorRef]], list[str]]:
    """Return module -> part -> tensor, by ``pattern``'s groups of these names, and all others."""
    layers: dict[str, dict[str, TensorRef]] = defaultdict(dict)
    others = []
    for key, ref in tensors.items():
        match = pattern.fullmatch(key)
        if match is None:
            others.append(key)
        else:
            layers[match["module"]][match["part"]] = ref
    return dict(layers), others


def needed_alpha(path: Path, options: ReadOptions) -> float:
    """Return ``--alpha``.

    Raises:
        AdapterError: It is not given, or no factor.
    """
    if options.alpha is None:
        raise AdapterError(
            f"{path}: this format does not store alpha. Pass --alpha with the value used in "
            "training; the factor on B A is alpha / rank."
        )
    if not math.isfinite(options.alpha) or options.alpha == 0:
        raise AdapterError(f"--alpha {options.alpha}: expected a finite number other than 0.")
    return options.alpha


def refuse_axis(path: Path, options: ReadOptions, axis: str, trainer: str) -> None:
    """Refuse ``--axis`` where it contradicts a format that fixes the axis.

    Raises:
        AdapterError: It does.
    """
    if options.axis not in (None, axis):
        raise AdapterError(f"{path}: {trainer} has one magnitude per {axis}put. Leave --axis out.")
