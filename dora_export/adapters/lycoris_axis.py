"""What a ``dora_scale`` counts, by its shape.

Source: github.com/KohakuBlueleaf/LyCORIS, lycoris/modules/locon.py: ``(out, 1, ...)`` with
wd_on_out, else ``(1, in, 1, ...)``, of as many dimensions as the weight; no flag is stored.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from dora_export.update import Axis


@dataclass(frozen=True)
class Found:
    """The axis of a layer's magnitudes.

    Attributes:
        axis: What they count.
        evidence: How that is known, for people.
    """

    axis: Axis
    evidence: str


def axis_of(
    shape: tuple[int, ...], out: int, columns: int, inputs: int | None, asked: Axis | None
) -> Found | str:
    """Return the axis, or why it cannot be told.

    Args:
        shape: Of ``dora_scale``.
        out: Outputs of the layer.
        columns: Inputs times kernel.
        inputs: Inputs, where the factors show them apart from the kernel.
        asked: ``--axis``.
    """
    fitting = [axis for axis in ("out", "in") if _fits(axis, shape, out, columns, inputs)]
    of_inputs = inputs if inputs is not None else f"{columns} / kernel"
    layer = f"a layer of {out} outputs and {of_inputs} inputs"
    if not fitting:
        return (
            f"dora_scale is {shape}, but {layer} has ({out}, 1, ...) or (1, {of_inputs}, ...); "
            "the file does not belong together"
        )
    if len(fitting) == 1:
        axis: Axis = "out" if fitting[0] == "out" else "in"
        if asked not in (None, axis):
            return f"--axis {asked}: dora_scale is {shape}, so it counts {axis}puts. Leave it out"
        dimensions = "shape" if len(shape) > 1 else "length"
        return Found(axis, f"by the {dimensions} of dora_scale")
    if asked is None:
        return (
            f"dora_scale is {shape}, which for {layer} can count outputs (PEFT, LyCORIS since 3.2) "
            "or inputs (LyCORIS before, OneTrainer). Pass --axis out or --axis in"
        )
    return Found(asked, "as given with --axis")


def _fits(axis: str, shape: tuple[int, ...], out: int, columns: int, inputs: int | None) -> bool:
    count = math.prod(shape)
    if len(shape) == 1:
        counted = [True]
    else:
        place = 0 if axis == "out" else 1
        counted = [n == 1 for i, n in enumerate(shape) if i != place] or [False]
    if not shape or not all(counted):
        return False
    if axis == "out":
        return count == out
    return count == inputs if inputs is not None else columns % max(count, 1) == 0
