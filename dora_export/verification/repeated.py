"""The base model with its layers stacked anew, as the model was that an adapter repeats layers of.

Source: github.com/huggingface/peft 0.21.2, src/peft/tuners/tuners_utils.py (replicate_layers):
which list of layers that is, and what a copy has to know of its place.
"""

from __future__ import annotations

import copy
import re
from typing import Any

from torch import nn

from dora_export import replication, several
from dora_export.plan import Plan
from dora_export.verification.measured import Unsupported

LISTS = re.compile(r"(?:.+\.)?(?:layers|encoder\.layer|h)")


def repeat_layers(model: Any, plan: Plan) -> None:
    """Put copies of a loaded base's layers in the place of its layers, where the adapter asks.

    Copies have weights of their own, so that each can be given its own changes.

    Args:
        model: Of transformers, with the base's weights; it is changed.
        plan: Base, adapter and what becomes of them.

    Raises:
        Unsupported: The model has no list of layers that PEFT would repeat, or several.
    """
    ranges = several.layer_replication(plan.adapters)
    if not ranges:
        return
    count = model.config.get_text_config().num_hidden_layers
    found = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count and LISTS.fullmatch(path)
    ]
    if len(found) != 1:
        what = f"has {len(found)} lists of {count} layers, to be repeated by the adapter"
        raise Unsupported(type(model).__name__, what)
    path, layers = found[0]
    order = [i for start, stop in ranges for i in range(start, stop)]
    stacked = nn.ModuleList(_copy(layers[old], new) for new, old in enumerate(order))
    owner, _, name = path.rpartition(".")
    setattr(model.get_submodule(owner), name, stacked)
    _tell(model.config, plan)


def _copy(layer: nn.Module, number: int) -> nn.Module:
    made = copy.deepcopy(layer)
    for module in made.modules():
        if "layer_idx" in vars(module):  # its place in a cache of keys and values
            vars(module)["layer_idx"] = number
    return made


def _tell(config: Any, plan: Plan) -> None:
    """Tell the configs how many layers there are, and what each of them is."""
    keys = {*replication.COUNTS, *replication.PER_LAYER}
    for level in (config, config.get_text_config()):
        for key, value in plan.config_edits.items():
            if key in keys and hasattr(level, key):
                setattr(level, key, value)
