"""ai-toolkit's layers whose norm leaves the scaling out, as DoRA that other formats can hold.

The same weights, said with another B and another magnitude (``UnscaledNorm.as_dora``). Both belong
to one base, are computed in float64 and are rounded once, to float32.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import numpy as np

from dora_export import cast
from dora_export.errors import ArithmeticRefusal, shown
from dora_export.tensors import F32, HeldBytes, Operand, TensorRef
from dora_export.unscaled_norm import Floats, UnscaledNorm
from dora_export.update import Update
from dora_export.words import count


def in_terms_of_dora(
    updates: Iterable[Update], base: Mapping[str, TensorRef]
) -> tuple[tuple[Update, ...], tuple[str, ...]]:
    """Return the updates, those of such layers as kind "dora", and what to tell of that.

    Reads the weights of these layers, one after another.

    Args:
        updates: Under the base's names, each fitting its tensor.
        base: The base's tensors.

    Raises:
        ArithmeticRefusal: A row cannot be said so.
    """
    found, computed = [], 0
    for update in updates:
        function = update.function
        if isinstance(function, UnscaledNorm):
            computed += 1
            found.append(_as_dora(update, function, base[update.target]))
        else:
            found.append(update)
    notes = (
        "ai-toolkit's norm leaves the scaling out, this format's does not: B and the magnitudes of "
        f"{count(computed, 'layer')} are computed for this base, rounded once to float32",
    )
    return tuple(found), notes if computed else ()


def _as_dora(update: Update, function: UnscaledNorm, weight: TensorRef) -> Update:
    W = cast.widened(weight.raw(), weight.dtype, np.float64).reshape(weight.shape)
    try:
        up, magnitude = function.as_dora(W)
    except ArithmeticRefusal as refusal:
        raise ArithmeticRefusal(f"{shown(update.target)}: {refusal}") from refusal
    return replace(
        update,
        kind="dora",
        function=None,
        down=function.down,
        up=Operand.plain(_held(function.up.ref, up)),
        magnitude=Operand.plain(_held(function.magnitude.ref, magnitude)),
    )


def _held(of: TensorRef, values: Floats) -> TensorRef:
    """Return values in float32 as a tensor in the place of a stored one."""
    data = np.ascontiguousarray(values, np.float32).view(np.uint8).reshape(-1)
    return TensorRef(of.name, F32, values.shape, HeldBytes(of.source.path, data))
