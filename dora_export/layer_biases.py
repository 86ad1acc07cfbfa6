"""Layers that PEFT computes: biases that change along with weights, and what is said of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from dora_export.peft_layers import PeftLayer
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
        bias = f"{update.target.removesuffix('weight')}bias"
        if not isinstance(function, PeftLayer) or not update.target.endswith("weight"):
            yield update
            continue
        function = replace(function, has_bias=bias in base)
        yield replace(update, function=function)
        if function.has_bias and function.method in METHODS and update.target in base:
            along = replace(function, part="bias", beside=base[update.target],
                            layout=update.layout or "oi")  # fmt: skip
            yield replace(update, target=bias, function=along, layout=None)


def notes(updates: Iterable[Update]) -> tuple[str, ...]:
    """Return what users should know of weights that PEFT's own layers make."""
    methods = [u.function.method for u in updates if isinstance(u.function, PeftLayer)]
    return tuple(
        f"{methods.count(method)} tensors are made by PEFT's own {method} layers; verification "
        "holds them against PEFT's unmerged forward, which is no independent formula"
        for method in sorted(set(methods))
    )
