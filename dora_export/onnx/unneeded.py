"""What a fused graph computes for nobody, left out: on a CPU, a node costs whatever it does."""

from __future__ import annotations

import math
from collections.abc import Sequence

import onnx_ir as ir
from onnx_ir.passes import common

Dims = tuple[int | str, ...]
# Operator -> outputs that training alone reads: means, and reciprocals of deviations.
FOR_TRAINING = {"SkipSimplifiedLayerNormalization": (1, 2), "SkipLayerNormalization": (1, 2)}


def leave_out(model: ir.Model) -> None:
    """Leave out reshapes that change nothing between them, and outputs that nothing reads.

    Fusions split a hidden state into heads for one operator and join them for the next: two nodes
    to the same shape. Whether it is the same is told from the graph's own sizes: numbers, and names
    that stand for one size each. onnxruntime makes room for each output that has a name.
    """
    for node in list(model.graph):
        if _is_reshape(node) and not node.outputs[0].is_graph_output():
            if (origin := _unchanged(node)) is not None:
                node.outputs[0].replace_all_uses_with(origin)
        elif node.domain == "com.microsoft":
            for place in FOR_TRAINING.get(node.op_type, ()):
                _leave_unnamed(node, place)
    common.RemoveUnusedNodesPass()(model)


def _leave_unnamed(node: ir.Node, place: int) -> None:
    if place < len(node.outputs):
        output = node.outputs[place]
        if not output.uses() and not output.is_graph_output():
            output.name = ""


def _unchanged(node: ir.Node) -> ir.Value | None:
    """Return a value some reshapes before, of the shape that the last of them gives; or None."""
    wanted = _shape_after(node)
    if wanted is None:
        return None
    step: ir.Node | None = node
    while step is not None and _is_reshape(step):
        value = step.inputs[0]
        if value is None:
            return None
        step = value.producer()
        if _known(value) == wanted:
            return value
    return None


def _is_reshape(node: ir.Node) -> bool:
    return node.op_type == "Reshape" and node.domain == ""


def _dims(shape: ir.Shape | Sequence[int | ir.SymbolicDim] | None) -> Dims | None:
    """Return sizes and names of sizes; None where one is neither."""
    if shape is None:
        return None
    found = tuple(d if isinstance(d, int) else d.value for d in shape)
    return None if None in found else found  # type: ignore[return-value]


def _known(value: ir.Value) -> Dims | None:
    """Return a value's shape, from its own record or from what makes it."""
    maker = value.producer()
    if (known := _dims(value.shape)) is not None or maker is None:
        return known
    if _is_reshape(maker):
        return _shape_after(maker)
    if maker.op_type == "GroupQueryAttention" and value is maker.outputs[0]:
        return _attended(maker)
    return None


def _attended(node: ir.Node) -> Dims | None:
    """Return the shape of what heads give: that of the queries, without keys and values."""
    query, key = node.inputs[:2]
    shape = None if query is None else _known(query)
    if shape is None or key is not None:
        return shape
    heads, shared = (node.attributes.get_int(n) for n in ("num_heads", "kv_num_heads"))
    packed = shape[-1]
    if not isinstance(packed, int):
        return None
    return (*shape[:-1], packed // (heads + 2 * shared) * heads)


def _shape_after(node: ir.Node) -> Dims | None:
    """Return the shape that a reshape gives, from its own record or from its constant target."""
    if (known := _dims(node.outputs[0].shape)) is not None:
        return known
    given, target = node.inputs
    before = None if given is None else _known(given)
    held = None if target is None else target.const_value
    literal = node.attributes.get_int("allowzero", 0)  # a 0 is a size, not the size before
    if before is None or held is None or literal:
        return None
    sizes = [int(n) for n in held.numpy()]
    kept = [i for i, n in enumerate(sizes) if n == 0]
    if any(i >= len(before) for i in kept):
        return None
    found: list[int | str] = [before[i] if n == 0 else n for i, n in enumerate(sizes)]
    if -1 in sizes:
        rest = [d for i, d in enumerate(before) if i not in kept]
        if not all(isinstance(d, int) for d in rest):
            return None
        total = math.prod(d for d in rest if isinstance(d, int))
        others = math.prod(n for n in sizes if n > 0)
        found[sizes.index(-1)] = total // others
    return tuple(found)
