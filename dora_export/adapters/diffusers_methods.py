"""LoHa and LoKr of PEFT in diffusers' layout: a component's name, then the path in it.

SimpleTuner trains LoHa in the place of LoRA on ControlNets of UNets and saves it so. The tensors
are named as LyCORIS names its own, but PEFT's scaling is alpha / r for both methods, whatever
LoKr's factors, and alpha stands in the metadata.

Sources: github.com/huggingface/peft 0.21.2, src/peft/tuners/{loha,lokr}/layer.py; github.com/
bghira/SimpleTuner, simpletuner/helpers/models/common.py (add_lora_adapter).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from dora_export.adapters import diffusers_metadata, peft_methods, peft_products
from dora_export.adapters.diffusers_keys import component_of
from dora_export.adapters.model import Adapter, ReadOptions
from dora_export.errors import AdapterError, listing, shown
from dora_export.tensors import TensorRef
from dora_export.update import Update

PART = re.compile(r"(?P<module>.+)\.(?P<part>(?:hada|lokr)_\w+)")


def read(path: Path, file: Path, tensors: Mapping[str, TensorRef], options: ReadOptions) -> Adapter:
    """Read such a file.

    Raises:
        AdapterError: A tensor or a setting is unknown, or a layer is incomplete; all are listed.
    """
    if options.alpha is not None:
        raise AdapterError(f"{path}: alpha is in the file. Leave --alpha out.")
    metadata = diffusers_metadata.of(file)
    configs = diffusers_metadata.raw_configs(file, metadata)
    layers: dict[str, dict[str, dict[str, TensorRef]]] = defaultdict(lambda: defaultdict(dict))
    problems: list[str] = []
    doubts: list[str] = []
    for name, ref in tensors.items():
        match = PART.fullmatch(name)
        component = component_of(name) if match else None
        if match is None or component not in configs:
            problems.append(f"unknown tensor '{shown(name)}'")
        else:
            layers[component][match["module"].removeprefix(f"{component}.")][match["part"]] = ref
    updates = [
        update
        for component, own in layers.items()
        for update in _updates(file, component, configs[component], own, problems, doubts)
    ]
    if problems:
        raise AdapterError(f"{path}: does not add up:{listing(sorted(problems))}")
    used = [configs[component] for component in layers]
    return Adapter(
        path=path,
        format="diffusers",
        files=(file,),
        tensors=tensors,
        updates=tuple(updates),
        naming="flat",
        doubts=tuple(doubts),
        facts={
            "method": ", ".join(sorted({str(raw["peft_type"]) for raw in used})),
            "trainer": "SimpleTuner" if diffusers_metadata.by_simpletuner(metadata)
            else "diffusers, with metadata",
            "rank": sorted({raw.get("r", 8) for raw in used}),
            "alpha": sorted({raw.get("alpha", 8) for raw in used}),
            "scaling": sorted({round(u.scaling, 6) for u in updates}),
            "scaling from": "the metadata",
            "magnitude": "none",
        },
    )  # fmt: skip


def _updates(
    file: Path,
    component: str,
    raw: Mapping[str, Any],
    layers: Mapping[str, Mapping[str, TensorRef]],
    problems: list[str],
    doubts: list[str],
) -> Iterator[Update]:
    where = file.with_name(f"{file.name}, metadata of {shown(component)}")
    if raw.get("peft_type") not in diffusers_metadata.OTHER_METHODS:
        problems.append(f"{shown(component)}: LoHa or LoKr, but the metadata says "
                        f"{shown(raw.get('peft_type'))}")  # fmt: skip
        return
    problems += peft_methods.config_problems(raw, str(raw["peft_type"]))
    for update in peft_products.updates(where, raw, layers, problems, doubts):
        yield replace(update, target=f"{component}.{update.target}", layout="oi")
