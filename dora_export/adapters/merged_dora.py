"""State dicts of ``LinearWithDoRAMerged``: base weights and in-axis DoRA in one file.

Per layer ``X``: ``X.linear.weight`` (out, in), ``X.linear.bias``, ``X.lora.A`` (in, rank),
``X.lora.B`` (rank, out), ``X.m`` (1, in). The layer computes ``W' = m * N / ||N||`` with
``N = W + alpha * (A @ B).T`` and one norm per input column (``dim=0``); alpha is used as it is, not
divided by the rank, and is not stored. The output holds plain ``X.weight`` and ``X.bias``.

Source: github.com/rasbt/dora-from-scratch, Using-LinearDoRAMerged.ipynb, class
LinearWithDoRAMerged. The sibling class LinearWithDoRA has the same names but ``m`` of (1, out): it
normalises activations, which no weight can reproduce, and is refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from dora_export.adapters.model import Adapter, ReadOptions
from dora_export.checkpoints.model import Checkpoint, WeightFile
from dora_export.errors import AdapterError, listing, shown
from dora_export.storage import PICKLED, read_tensors
from dora_export.storage.safetensors import read_header
from dora_export.tensors import Operand, TensorRef
from dora_export.update import Axis, Update

PARTS = ("linear.weight", "lora.A", "lora.B", "m")


def matches(path: Path, options: ReadOptions) -> bool:
    """Return whether ``path`` is a file with at least one LinearWithDoRAMerged layer."""
    if not path.is_file() or path.suffix not in (".safetensors", *PICKLED):
        return False
    return bool(_layers(read_tensors(path, allow_pickle=options.allow_pickle)))


def read(path: Path, options: ReadOptions) -> Adapter:
    """Read a state dict of LinearWithDoRAMerged modules.

    Raises:
        AdapterError: alpha is not given, a layer is incomplete, or a magnitude's axis is open.
    """
    tensors = read_tensors(path, allow_pickle=options.allow_pickle)
    layers = _layers(tensors)
    problems = [p for layer in layers for p in _problems(layer, tensors)]
    if problems:
        raise AdapterError(f"{path}: incomplete or misshapen layers:{listing(problems)}")
    if options.alpha is None:
        raise AdapterError(
            f"{path}: this format does not store alpha, the factor on A @ B. "
            "Pass --alpha with the value used in training."
        )
    if options.alpha == 0:
        raise AdapterError(f"{path}: alpha is 0, so A and B would have no effect. Check --alpha.")
    if not math.isfinite(options.alpha):
        raise AdapterError(f"--alpha {options.alpha}: expected a finite number.")
    updates = tuple(_update(path, layer, tensors, options) for layer in layers)
    own = {key for update in updates for key in update.source_keys}
    ranks = sorted({u.rank for u in updates if u.rank is not None})
    return Adapter(
        path=path,
        format="linear-with-dora-merged",
        files=(path,),
        tensors={name: tensors[name] for name in own},
        updates=updates,
        own_base=_base(path, tensors, own, layers),
        doubts=_doubts(layers, tensors, options),
        facts={
            "method": "DoRA",
            "trainer": "code with LinearWithDoRAMerged layers",
            "rank": ranks,
            "alpha": [options.alpha],
            "scaling": [options.alpha],
            "axis": f"{updates[0].axis}, by "
            + ("--axis" if options.axis else "the shape of m, and the format"),
            "magnitude": f"one per {'output' if updates[0].axis == 'out' else 'input'}",
        },
    )


def _doubts(
    layers: list[str], tensors: Mapping[str, TensorRef], options: ReadOptions
) -> tuple[str, ...]:
    """Return a warning where no layer's shape tells this class from its sibling."""
    shapes = [tensors[_key(layer, "linear.weight")].shape for layer in layers]
    if options.axis is not None or any(out != inputs for out, inputs in shapes):
        return ()
    return (
        "all layers are square, so m of (1, n) is taken as LinearWithDoRAMerged's, one per input; "
        "LinearWithDoRA, which cannot be merged, stores the same shapes (--axis in confirms)",
    )


def _layers(tensors: Mapping[str, TensorRef]) -> list[str]:
    """Return the layers that have any part of their own; ``X.linear.weight`` alone is no sign."""
    own = [(n, part) for n in tensors for part in ("lora.A", "lora.B", "m")
           if n == part or n.endswith(f".{part}")]  # fmt: skip
    found = {(n[: -len(part) - 1], part) for n, part in own}
    return sorted({layer for layer, part in found
                   if part != "m" or _key(layer, "linear.weight") in tensors})  # fmt: skip


def _key(layer: str, part: str) -> str:
    """Return a tensor's name; a layer saved alone, ``""``, has no path before its parts."""
    return f"{layer}.{part}" if layer else part


def _problems(layer: str, tensors: Mapping[str, TensorRef]) -> list[str]:
    named = shown(layer or "the layer")
    missing = [part for part in PARTS if _key(layer, part) not in tensors]
    if missing:
        return [f"{named}: {', '.join(missing)} missing"]
    weight, a, b, _ = (tensors[_key(layer, part)] for part in PARTS)
    problems = []
    if len(weight.shape) != 2:
        problems.append(f"{shown(weight.name)}: expected 2 dimensions, got {weight.shape}")
    elif (
        a.shape[:1] != weight.shape[1:]
        or b.shape[1:] != weight.shape[:1]
        or (len(a.shape) != 2 or a.shape[1:] != b.shape[:1])
    ):
        problems.append(
            f"{named}: W {weight.shape} needs A (in, rank) and B (rank, out), "
            f"got {a.shape} and {b.shape}"
        )
    taken = [n for n in ("weight", "bias") if _key(layer, n) in tensors]
    if taken:
        problems.append(f"{named}: has {taken} beside linear.weight")
    return problems


def _update(
    path: Path, layer: str, tensors: Mapping[str, TensorRef], options: ReadOptions
) -> Update:
    weight, a, b, m = (tensors[_key(layer, part)] for part in PARTS)
    assert options.alpha is not None, "Bug: read() has checked alpha"
    return Update(
        target=_key(layer, "weight"),
        kind="dora",
        source_keys=(a.name, b.name, m.name),
        down=Operand.plain(a).T,
        up=Operand.plain(b).T,
        scaling=options.alpha,
        magnitude=Operand.vector(m),
        axis=_axis(path, m, weight, options.axis),
        layout="oi",
    )


def _axis(path: Path, m: TensorRef, weight: TensorRef, said: Axis | None) -> Axis:
    """Return what the magnitude counts: by its shape, or as the user says where that is open."""
    out, inputs = weight.shape
    if m.shape == (1, out) and out != inputs:
        raise AdapterError(
            f"{path}: '{shown(m.name)}' is {m.shape} for a weight of {weight.shape}: one magnitude "
            "per output in a row vector, as LinearWithDoRA has, which normalises activations. "
            "Such a layer cannot be merged into a weight."
        )
    by_shape: dict[tuple[int, ...], Axis] = {(1, inputs): "in", (out, 1): "out"}
    if out != inputs:
        by_shape |= {(inputs,): "in", (out,): "out"}
    if (axis := by_shape.get(m.shape)) is not None:
        if said not in (None, axis):
            raise AdapterError(
                f"{path}: --axis {said} contradicts the shape {m.shape} of '{shown(m.name)}' for a "
                f"weight of {weight.shape}, which is one magnitude per {axis}put. Leave --axis out."
            )
        return axis
    if m.shape == (out,):
        if said is None:
            raise AdapterError(
                f"{path}: '{shown(m.name)}' has {out} elements for a square weight "
                f"{weight.shape}: one per input (norm over dim 0) or per output (norm over dim 1)? "
                "Pass --axis in or --axis out."
            )
        return said
    raise AdapterError(
        f"{path}: '{shown(m.name)}' is {m.shape}, expected (1, {inputs}) for a weight of "
        f"{weight.shape}. Check that the file is whole and of this format."
    )


def _base(
    path: Path, tensors: Mapping[str, TensorRef], own: set[str], layers: list[str]
) -> Checkpoint:
    """Return the base that the file carries, its layers under their plain names."""
    plain = {
        _key(layer, f"linear.{p}"): _key(layer, p) for layer in layers for p in ("weight", "bias")
    }
    kept = tuple(
        replace(ref, name=plain.get(name, name)) for name, ref in tensors.items() if name not in own
    )
    metadata = {"format": "pt"}
    if path.suffix == ".safetensors":
        metadata = dict(read_header(path).metadata) or metadata
    return Checkpoint(path, (WeightFile("model.safetensors", kept, metadata, path=path),))
