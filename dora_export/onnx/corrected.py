"""Operators of a traced graph that do not mean what torch meant, put right.

torch's exporter writes two things for example sizes only. Both are told from the node's own
record of where it comes from, so a graph has to be corrected before ``tidy`` drops that. A third
it writes as if ONNX knew torch's rule for operands of two types.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import onnx_ir as ir

ORIGIN = "pkg.torch.onnx.fx_node"
FLOORED = "call_function[target=operator.floordiv]"
SQUEEZED = "call_function[target=torch.ops.aten.squeeze.dim]"

NO_OP = "onnxscript.rewriter.rules.common._no_op"
TOLERANCES = ("_rel_tol", "_abs_tol")


@contextmanager
def exact() -> Iterator[None]:
    """Let the exporters' optimiser leave out what changes nothing, not what changes little.

    It takes ``x + c`` for ``x`` where c is up to 1e-8, and ``x * c`` where c is within 1e-5 of 1:
    a quotient that such a c keeps from 0 / 0 (Sana's attention: 1e-15) is not a number then.
    Source: onnxscript, rewriter/_pattern_ir.py, ``Constant``. Other versions may have no such
    rules under that name; what they leave out is then found by the comparison alone.
    """
    try:
        rules: Any = importlib.import_module(NO_OP).rules.rules
    except (ImportError, AttributeError):
        rules = ()
    held = [value for rule in rules for node in getattr(rule, "_target_pattern", ())
            for value in node.inputs if hasattr(value, TOLERANCES[0])]  # fmt: skip
    before = [tuple(getattr(value, name) for name in TOLERANCES) for value in held]
    try:
        for value in held:
            for name in TOLERANCES:
                setattr(value, name, 0.0)
        yield
    finally:
        for value, given in zip(held, before, strict=True):
            for name, number in zip(TOLERANCES, given, strict=True):
                setattr(value, name, number)


def correct(model: ir.Model) -> int:
    """Replace such operators, and return how many there were.

    - A floor division of sizes becomes ``Div``, which cuts towards zero: other sizes than those
      traced give another result where the dividend is negative, as in ``2 + (-height // 2)``.
    - ``squeeze(dim)`` leaves an axis alone whose size is not 1; ``Squeeze`` fails there. torch's
      own shapes, which the values carry, say that it is left alone.
    - ``cat`` of two types gives the wider one (SDXL's sizes beside its text in float16); ``Concat``
      takes one type alone.
    """
    count = 0
    for node in list(model.graph.all_nodes()):
        origin = node.metadata_props.get(ORIGIN, "")
        if node.op_type == "Div" and FLOORED in origin:
            _floor(node)
        elif node.op_type == "Squeeze" and SQUEEZED in origin and _same_rank(node):
            _pass_over(node)
        elif node.op_type == "Concat" and _has_mixed_types(node):
            _cast(node)
        else:
            continue
        count += 1
    return count


def _floor(node: ir.Node) -> None:
    """Make ``a / b`` into ``(a - a mod b) / b``; ``Mod`` of integers has the divisor's sign."""
    dividend, divisor = node.inputs
    assert dividend is not None, "Bug: Div has two inputs"
    rest = ir.node("Mod", [dividend, divisor])
    whole = ir.node("Sub", [dividend, rest.outputs[0]])
    for made in (rest, whole):
        value = made.outputs[0]
        value.name = f"{node.outputs[0].name}_{made.op_type.lower()}"
        value.type, value.shape = dividend.type, dividend.shape
    assert node.graph is not None, "Bug: a node of a graph"
    node.graph.insert_before(node, [rest, whole])
    node.replace_input_with(0, whole.outputs[0])


def _same_rank(node: ir.Node) -> bool:
    given, found = node.inputs[0], node.outputs[0]
    return (
        given is not None
        and given.shape is not None
        and found.shape is not None
        and len(given.shape) == len(found.shape)
    )


def _pass_over(node: ir.Node) -> None:
    node.op_type = "Identity"
    node.resize_inputs(1)


def _has_mixed_types(node: ir.Node) -> bool:
    """Return whether inputs are of several types, as far as they and the output's are known."""
    known = {v.dtype for v in node.inputs if v is not None and v.dtype is not None}
    return len(known) > 1 and node.outputs[0].dtype is not None


def _cast(node: ir.Node) -> None:
    """Cast a node's inputs to the type that torch gives its output."""
    wanted = node.outputs[0].dtype
    assert wanted is not None, "Bug: as above"
    assert node.graph is not None, "Bug: a node of a graph"
    for place, value in enumerate(node.inputs):
        if value is None or value.dtype in (None, wanted):
            continue
        cast = ir.node("Cast", [value], attributes={"to": wanted})
        made = cast.outputs[0]
        made.name = f"{node.outputs[0].name}_cast_{place}"
        made.type, made.shape = ir.TensorType(wanted), value.shape
        node.graph.insert_before(node, cast)
        node.replace_input_with(place, made)
