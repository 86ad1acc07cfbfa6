"""State dicts of catid's ``DoRALayer``: base weights and in-axis DoRA in one file.

Per layer ``X``: ``X.weight`` (out, in), ``X.bias``, ``X.m`` (1, in), ``X.lora_A`` (out, r) and
``X.lora_B`` (r, in), so that A and B are named the other way round than elsewhere:
``W' = m N / ||N||`` with ``N = W + lora_A lora_B``, one norm per input column, scaling 1, no eps.

Source: github.com/catid/dora, dora.py, class DoRALayer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from dora_export.adapters.model import Adapter, ReadOptions
from dora_export.adapters.state_dict import refuse_axis, sorted_parts, tensors_of
from dora_export.checkpoints.model import Checkpoint, WeightFile
from dora_export.errors import AdapterError, listing, shown
from dora_export.storage.safetensors import read_header
from dora_export.tensors import Operand, TensorRef
from dora_export.update import Update

PART = re.compile(r"(?:(?P<module>.+)\.)?(?P<part>lora_A|lora_B|m)")


def matches(path: Path, options: ReadOptions) -> bool:
    """Return whether ``path`` is a file with a ``lora_A`` beside an ``m`` in one module."""
    layers, _ = sorted_parts(tensors_of(path, options), PART)
    return any({"lora_A", "m"} <= parts.keys() for parts in layers.values())


def read(path: Path, options: ReadOptions) -> Adapter:
    """Read a state dict of DoRALayer modules.

    Raises:
        InputError: The file is malformed, or pickled without ``allow_pickle``.
        AdapterError: A layer is incomplete or misshapen.
    """
    refuse_axis(path, options, "in", "DoRALayer")
    if options.alpha is not None:
        raise AdapterError(f"{path}: DoRALayer has no scaling. Leave --alpha out.")
    tensors = tensors_of(path, options)
    layers, _ = sorted_parts(tensors, PART)
    problems = [p for name, parts in layers.items() for p in _problems(name, parts, tensors)]
    if problems:
        raise AdapterError(f"{path}: incomplete or misshapen layers:{listing(sorted(problems))}")
    updates = tuple(_update(name, parts) for name, parts in layers.items())
    own = {key for update in updates for key in update.source_keys}
    metadata = {"format": "pt"}
    if path.suffix == ".safetensors":
        metadata = dict(read_header(path).metadata) or metadata
    kept = tuple(ref for name, ref in tensors.items() if name not in own)
    return Adapter(
        path=path,
        format="catid",
        files=(path,),
        tensors={name: tensors[name] for name in own},
        updates=updates,
        own_base=Checkpoint(path, (WeightFile("model.safetensors", kept, metadata, path=path),)),
        facts={
            "method": "DoRA",
            "trainer": "catid/dora, DoRALayer",
            "axis": "in, by the format: m is (1, in), the norm is over dim 0",
            "rank": sorted({u.rank for u in updates if u.rank is not None}),
            "scaling": [1.0],
            "magnitude": "one per input",
        },
    )


def _key(layer: str | None, part: str) -> str:
    return f"{layer}.{part}" if layer else part


def _problems(
    layer: str | None, parts: Mapping[str, TensorRef], tensors: Mapping[str, TensorRef]
) -> list[str]:
    named = shown(layer or "the layer")
    weight = tensors.get(_key(layer, "weight"))
    missing = [p for p in ("lora_A", "lora_B", "m") if p not in parts]
    if missing or weight is None:
        return [f"{named}: {', '.join([*missing, *([] if weight else ['weight'])])} missing"]
    a, b, m = parts["lora_A"], parts["lora_B"], parts["m"]
    if len(weight.shape) != 2:
        return [f"{named}: weight is {weight.shape}, expected 2 dimensions"]
    out, inputs = weight.shape
    ranks = a.shape[-1:] == b.shape[:1]
    if a.shape[:-1] != (out,) or b.shape[1:] != (inputs,) or not ranks:
        return [
            f"{named}: weight {weight.shape} needs lora_A (out, rank) and lora_B (rank, in), got "
            f"{a.shape} and {b.shape}"
        ]
    if m.shape != (1, inputs):
        return [f"{named}: m is {m.shape}, expected (1, {inputs})"]
    return []


def _update(layer: str | None, parts: Mapping[str, TensorRef]) -> Update:
    a, b, m = parts["lora_A"], parts["lora_B"], parts["m"]
    return Update(
        target=_key(layer, "weight"),
        kind="dora",
        source_keys=(a.name, b.name, m.name),
        down=Operand.plain(b),
        up=Operand.plain(a),
        magnitude=Operand.vector(m),
        axis="in",
        layout="oi",
    )
