"""What one adapter puts into the slots of a graph: A, B and the factors, in the graph's order.

Norms are taken in float64, block by block, from the unmerged base and the adapter; the values are
rounded once to the graph's type.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dora_export import cast
from dora_export.errors import listing, shown
from dora_export.onnx.model import GraphError
from dora_export.onnx.slots import Slot
from dora_export.plan import Plan, Step
from dora_export.row_factor import factor
from dora_export.tensors import F16, TensorRef
from dora_export.update import Change, Product

Floats = NDArray[np.float64]
BLOCK_ELEMENTS = 1 << 20
KINDS = ("lora", "dora", "magnitude")


@dataclass(frozen=True, eq=False)
class Swapped:
    """What an adapter does to one base tensor, in stored terms.

    Attributes:
        left: ``(rows, rank)``, float64, scaling and strength included.
        right: ``(rank, columns)``, float64.
        factor: On each row or column, float64; None: there is none.
        over: Which of the two.
    """

    left: Floats
    right: Floats
    factor: Floats | None = None
    over: str = "row"


@dataclass(frozen=True, eq=False)
class SlotValues:
    """What an adapter puts into one slot; K inputs, N outputs, float64.

    Attributes:
        lora_A: ``(K, rank)``.
        lora_B: ``(rank, N)``.
        output_factor: ``(N,)``, or None.
        input_factor: ``(K,)``, or None.
    """

    lora_A: Floats
    lora_B: Floats
    output_factor: Floats | None = None
    input_factor: Floats | None = None


def refuse_unswappable(plan: Plan) -> None:
    """Refuse an adapter that does more than low-rank products and magnitudes on whole weights.

    Raises:
        GraphError: It does; all that it does is listed.
    """
    problems = list(dict.fromkeys(_problems(plan)))
    if problems:
        raise GraphError(
            f"{plan.adapters[0].path}: holds what cannot be swapped at run time:"
            f"{listing(problems)}\nLeave --adapters out to merge it."
        )


def changed(plan: Plan) -> Iterator[Step]:
    """Yield the output tensors that an adapter changes."""
    return (s for s in plan.steps if s.status not in ("unchanged", "cast"))


def _problems(plan: Plan) -> Iterator[str]:
    for step in changed(plan):
        name = shown(step.name)
        if step.status == "replaced" or any(c.kind == "replace" for c in step.changes):
            yield f"{name}: the adapter brings a whole tensor of its own"
        elif step.status == "added" and not step.changes:
            yield f"{name}: a head of its own"
        elif len(step.shape) != 2:
            yield f"{name}: a weight of {len(step.shape)} dimensions"
        elif len(step.changes) != 1:
            yield f"{name}: {len(step.changes)} changes to one tensor"
        else:
            yield from (f"{name}: {why}" for why in _change_problems(step.changes[0], step))


def _change_problems(change: Change, step: Step) -> Iterator[str]:
    if change.kind not in KINDS:
        yield f"a change of kind '{change.kind}'"
    elif not isinstance(change.delta, Product | None):
        yield f"an update that is no product of two factors ({type(change.delta).__name__})"
    elif change.stop - change.start != step.source.size:
        yield "changes a part of the tensor only"


def swapped(step: Step, plan: Plan) -> Swapped:
    """Return what a merge's step comes to when nothing is merged.

    With a strength of l, ``W + l (f (W + s B A) - W) = g W + l f s B A``, ``g = 1 - l + l f``.

    Raises:
        GraphError: A row without direction has a magnitude, or a factor would be zero under a
            strength that is not one.
        InputError: A file cannot be read.
    """
    change, settings = step.changes[0], plan.settings
    shape, strength = (change.rows, change.columns), settings.strength
    left, right = np.zeros((shape[0], 0)), np.zeros((0, shape[1]))
    if isinstance(change.delta, Product):
        left = cast.operand_values(change.delta.left, np.float64) * change.scaling
        right = cast.operand_values(change.delta.right, np.float64)
    if change.magnitude is None:
        return Swapped(left * strength, right)
    by_row = change.over == "row"
    magnitude = cast.operand_values(change.magnitude, np.float64).reshape(-1)
    if change.magnitude_is_factor:
        scale, undefined = magnitude, np.zeros(magnitude.shape, bool)
    else:
        squares = _squares(step.source, left, right, by_row=by_row)
        scale, undefined = factor(np, magnitude, squares, change.eps)
    kept = undefined & (settings.zero_norm == "keep-base")
    if undefined.any() and settings.zero_norm == "refuse":
        raise GraphError(
            f"{shown(step.name)}: ||W + s B A|| is zero in {int(undefined.sum())} rows or columns "
            "whose magnitude is not. Pass --zero-norm zero or --zero-norm keep-base."
        )
    whole = np.where(kept, 1.0, 1 - strength + strength * scale)
    share = np.where(kept, 0.0, strength * scale)  # of the product, before the factor
    if strength != 1 and (whole == 0).any():
        raise GraphError(
            f"{shown(step.name)}: --strength {strength} makes a factor zero. Leave --adapters out "
            "to merge it."
        )
    inner = np.divide(share, whole, out=np.zeros_like(share), where=whole != 0)
    if strength == 1 and not kept.any():
        inner = np.ones_like(share)
    if by_row:
        return Swapped(left * inner[:, None], right, whole)
    return Swapped(left, right * inner, whole, "column")


def _squares(source: TensorRef, left: Floats, right: Floats, *, by_row: bool) -> Floats:
    """Return the sum of squares of each row or column of W + left @ right."""
    rows, columns = left.shape[0], right.shape[1]
    step = max(1, BLOCK_ELEMENTS // columns)
    total = np.zeros(rows if by_row else columns)
    for first in range(0, rows, step):
        last = min(first + step, rows)
        raw = source.raw(first * columns, last * columns)
        V = cast.widened(raw, source.dtype, np.float64).reshape(-1, columns)
        V += left[first:last] @ right
        if by_row:
            total[first:last] = np.einsum("ij,ij->i", V, V)
        else:
            total += np.einsum("ij,ij->j", V, V)
    return total


def slot_values(slot: Slot, found: Mapping[str, Swapped]) -> SlotValues | None:
    """Return what an adapter puts into a slot, or None where it does nothing there.

    Args:
        slot: The slot.
        found: What the adapter does, by base tensor.

    Raises:
        GraphError: Weights packed into one node want different factors on their common input.
    """
    here = [(i, found[w.name]) for i, w in enumerate(slot.weights) if w.name in found]
    if not here:
        return None
    if slot.rows_are_inputs:
        return _of_transposed(slot, here[0][1])
    rank = sum(s.left.shape[1] for _, s in here)
    A, B = np.zeros((slot.inputs, rank)), np.zeros((rank, slot.outputs))
    output_factor, input_factor, at = np.ones(slot.outputs), None, 0
    for position, one in here:
        lines = np.flatnonzero(slot.weight_of == position)
        rows, width = slot.row_of[lines], one.left.shape[1]
        A[:, at : at + width] = one.right.T
        B[at : at + width, lines] = one.left[rows].T
        at += width
        if one.factor is not None and one.over == "row":
            output_factor[lines] = one.factor[rows]
        elif one.factor is not None:
            input_factor = one.factor
            if (slot.weight_of != position).any():
                raise GraphError(
                    f"{shown(slot.name)}: packed weights share their input, and "
                    f"{shown(slot.weights[position].name)} has a magnitude per input. Export the "
                    "base without packing, or merge the adapter."
                )
    scaled = any(one.factor is not None and one.over == "row" for _, one in here)
    return SlotValues(A, B, output_factor if scaled else None, input_factor)


def _of_transposed(slot: Slot, one: Swapped) -> SlotValues:
    """Return the values for a weight stored (in, out): its rows are inputs."""
    rows = slot.row_of
    A = one.left[rows]
    if one.factor is None:
        return SlotValues(A, one.right)
    if one.over == "row":
        return SlotValues(A, one.right, input_factor=one.factor[rows])
    return SlotValues(A, one.right, output_factor=one.factor)


def narrowed(values: Floats, slot: Slot) -> NDArray[np.floating]:
    """Return values in the slot's type, rounded once."""
    kind = np.float16 if slot.dtype is F16 else np.float32
    rounded = values.astype(kind)
    if not np.isfinite(rounded).all():
        raise GraphError(
            f"{shown(slot.name)}: a value of the adapter is larger than {slot.dtype.name} holds. "
            "Use a graph in fp32."
        )
    return rounded


def uncovered(plan: Plan, slots: Sequence[Slot]) -> list[str]:
    """Return the tensors that an adapter changes and of which rows are in no slot."""
    missing = []
    for step in changed(plan):
        held = np.zeros(step.shape[0], bool)
        for slot in slots:
            for position, weight in enumerate(slot.weights):
                if weight.name == step.name:
                    held[slot.row_of[slot.weight_of == position]] = True
        if not held.all():
            missing.append(step.name)
    return missing
