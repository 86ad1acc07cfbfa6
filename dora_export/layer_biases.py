"""Biases that change along with their layer's weight, and what is said of layers PEFT computes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from dora_export.peft_layers import PeftLayer
from dora_export.scaled_bias import ScaledBias
from dora_export.tensors import TensorRef
from dora_export.update import Update

# Methods whose layers scale, rotate or add to the bias. Source: PEFT, src/peft/tuners/*/layer.py.
METHODS = frozenset(("IA3", "ROAD", "GLORA"))


def with_biases(updates: Iterable[Update], base: Mapping[str, TensorRef]) -> Iterator[Update]:
    """Yield the updates, and after a weight's that of its bias where the method has one.

    Args:
        updates: Under the checkpoint's names, layouts decided.
        base: The checkpoint's tensors.
    """
    for update in updates:
        function = update.function
        bias = bias_of(update.target)
        if update.scales_bias and bias in base:
            yield update
            if (function := scaled(update, base)) is not None:
                yield replace(update, kind="function", target=bias, function=function, layout="oi",
                              down=None, up=None, magnitude=None, scales_bias=False)  # fmt: skip
            continue
        if not isinstance(function, PeftLayer) or not update.target.endswith("weight"):
            yield update
            continue
        function = replace(function, has_bias=bias in base)
        yield replace(update, function=function)
        if function.has_bias and function.method in METHODS and update.target in base:
            along = replace(function, part="bias", beside=base[update.target],
                            layout=update.layout or "oi")  # fmt: skip
            yield replace(update, target=bias, function=along, layout=None)


def bias_of(weight: str) -> str:
    """Return what the bias beside a weight is called."""
    return f"{weight.removesuffix('weight')}bias"


def scaled(update: Update, base: Mapping[str, TensorRef]) -> ScaledBias | None:
    """Return what becomes of a bias that goes through its layer's scaling.

    None for a part of a fused layer, which shares one.
    """
    ref = base.get(update.target)
    part = update.index is not None or update.rows is not None
    if ref is None or len(ref.shape) != 2 or part or update.misfit(ref.shape) is not None:
        return None
    layout = update.layout or update.layout_by_shape(ref.shape)
    if (layout, update.axis, update.magnitude_is_factor) != ("oi", "out", False):
        return None
    assert update.magnitude is not None, "Bug: only a norm scales a bias"
    assert update.down is not None, "Bug: no trainer scales a bias without a product"
    assert update.up is not None, "Bug: as above"
    return ScaledBias(ref, update.magnitude, update.down, update.up, update.scaling, update.eps)


def notes(updates: Iterable[Update]) -> tuple[str, ...]:
    """Return what users should know of weights that PEFT's own layers make."""
    methods = [u.function.method for u in updates if isinstance(u.function, PeftLayer)]
    return tuple(
        f"{methods.count(method)} tensors are made by PEFT's own {method} layers; verification "
        "holds them against PEFT's unmerged forward, which is no independent formula"
        for method in sorted(set(methods))
    )
