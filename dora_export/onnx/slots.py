"""Where adapters go in a graph of the base: the linear layers, found by the weights they hold.

An adapted layer computes ``f_out * ((f_in * x) W^T + ((f_in * x) A^T) (s B)^T)``, with the factors
``f = m / (||W + s B A|| + eps)`` known beforehand: linear in all that an adapter brings, so that
none of it has to be part of the graph. A ``Slot`` is one node that multiplies by base weights, and
which outputs of it belong to which rows of which of them.

Source: Liu et al. 2024, arXiv:2402.09353, eq. 5, with the norm taken as the constant it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dora_export.errors import listing, shown
from dora_export.onnx.graph_file import Graph, StoredTensor, Use
from dora_export.onnx.matching import KEPT, Match, Weight
from dora_export.onnx.matching_graph import Matched
from dora_export.onnx.model import GraphError
from dora_export.tensors import F16, F32, DType

if TYPE_CHECKING:
    import onnx

# Operator -> where its weight and its bias are among the inputs (None: it has no bias).
LINEAR: Mapping[str, tuple[int, int | None]] = {
    "MatMul": (1, None),
    "Gemm": (1, 2),
    "FusedMatMul": (1, None),
    "MatMulNBits": (1, 5),
    "DynamicQuantizeMatMul": (1, 4),
    "MatMulInteger": (1, None),
    "MatMulIntegerToFloat": (1, 6),
}
INTEGER = ("MatMulInteger", "MatMulIntegerToFloat")  # these take inputs that are quantised before
LOOKUPS = ("Gather", "GatherBlockQuantized", "EmbedLayerNormalization")
TURNED = (1, 0)


@dataclass(frozen=True, eq=False)
class Slot:
    """A node that multiplies by base weights, and what each of its outputs belongs to.

    Attributes:
        name: What its inputs are called after: the module, or the modules that are packed in it.
        node: The node, within ``Graph.model``.
        result: The node that gives the product as floats: mostly the same.
        value: Name of the floats that it multiplies, before any quantisation.
        inputs: K, elements of its input.
        outputs: N, elements of its output.
        dtype: Type of what it computes.
        weights: Base tensors that it holds.
        weight_of: For each output, or for each input, the position in ``weights``; ``KEPT``: none.
        row_of: For each output, or for each input, the base tensor's row.
        rows_are_inputs: The base stores it ``(in, out)``, so that its rows belong to inputs.
    """

    name: str
    node: onnx.NodeProto = field(repr=False)
    result: onnx.NodeProto = field(repr=False)
    value: str
    inputs: int
    outputs: int
    dtype: DType
    weights: tuple[Weight, ...]
    weight_of: NDArray[np.int32] = field(repr=False)
    row_of: NDArray[np.int64] = field(repr=False)
    rows_are_inputs: bool = False

    @property
    def bias(self) -> int | None:
        """Which of the node's inputs is a bias, if it has one."""
        position = LINEAR[self.node.op_type][1]
        if position is None or len(self.node.input) <= position:
            return None
        return position if self.node.input[position] else None

    @property
    def quantises_inputs(self) -> bool:
        """Whether its input goes through a quantisation, maybe shared with other layers."""
        return str(self.node.input[0]) != self.value


def find_slots(graph: Graph, matched: Matched) -> tuple[Slot, ...]:
    """Return a slot for every node that multiplies by a weight that an adapter changes.

    Raises:
        GraphError: Such a weight is used otherwise (looked up, convolved, within a fused operator),
            or in a way that is not understood; all are listed.
    """
    slots: list[Slot] = []
    problems: list[str] = []
    for match in matched.matches:
        if not match.changed:
            continue
        uses = list(_reached(graph, match.tensor))
        if not uses:
            problems.append(f"{match.tensor.where}: no node takes it")
        for use, turned in uses:
            found = _slot(graph, match, use, turned)
            if isinstance(found, str):
                problems.append(f"{match.tensor.where}: {found}")
            else:
                slots.append(found)
    if problems:
        raise GraphError(
            f"{graph.path}: adapters cannot be swapped in it:{listing(dict.fromkeys(problems))}\n"
            "Leave --adapters out to merge one adapter, or give --into a graph without these "
            "operators (exported without fusion)."
        )
    return tuple(_named(slots))


def _reached(graph: Graph, tensor: StoredTensor) -> Iterator[tuple[Use, bool]]:
    """Yield the nodes that a stored tensor gets to, and whether it is transposed on its way."""
    names, seen = [(tensor.name, False)], set[str]()
    while names:
        name, turned = names.pop()
        if name in seen:
            continue
        seen.add(name)
        for use in graph.uses.get(name, ()):
            node = use.node
            if node.op_type == "Transpose":
                axes = tuple(_attribute(node, "perm", TURNED))
                if axes == TURNED:
                    names.append((node.output[0], not turned))
                else:
                    yield use, turned
            elif node.op_type in ("Identity", "Cast") or (
                node.op_type == "DequantizeLinear" and use.position == 0
            ):
                names.append((node.output[0], turned))
            else:
                yield use, turned


def _slot(graph: Graph, match: Match, use: Use, turned: bool) -> Slot | str:
    """Return the slot of a node that takes a weight, or why there is none."""
    node, lines = use.node, match.lines
    kind = shown(node.op_type)
    if node.op_type in LOOKUPS:
        return "is an embedding, which is looked up and not multiplied by"
    if node.op_type not in LINEAR or use.position != LINEAR[node.op_type][0]:
        return f"is input {use.position} of a {kind} node '{shown(node.name)}'"
    if use.scope:
        return f"is used in {shown(use.scope)}, a graph within the graph"
    if lines.panels != 1:
        return f"holds {lines.panels} experts in one {kind}"
    if problem := _unusual(node):
        return f"{problem} of the {kind} node '{shown(node.name)}'"
    quantised = node.op_type == "MatMulNBits"
    if not quantised and len(match.tensor.shape) != 2:
        return f"has shape {match.tensor.shape} in a {kind}"
    transposed = turned != bool(_attribute(node, "transB", 0))
    # lines are the rows of what is stored, or its columns; x @ W has outputs along its columns
    along_outputs = quantised or (lines.by_column != transposed)
    count, length = lines.count, match.length
    if not along_outputs and len({int(w) for w in match.weight_of}) != 1:
        return f"packs several weights along the inputs of a {kind}"
    dtype = _computed_in(match)
    if dtype is None:
        return f"is computed in {match.encoding.source.name}; swapping needs F32 or F16"
    found = _floats(graph, node)
    if isinstance(found, str):
        return found
    return Slot(
        name="",
        node=node,
        value=found[0],
        result=found[1],
        inputs=length if along_outputs else count,
        outputs=count if along_outputs else length,
        dtype=dtype,
        weights=match.weights,
        weight_of=match.weight_of,
        row_of=match.row_of,
        rows_are_inputs=not along_outputs,
    )


def _floats(graph: Graph, node: onnx.NodeProto) -> tuple[str, onnx.NodeProto] | str:
    """Return the floats that a node multiplies and the node that gives the product, or why not.

    Source: onnxruntime.quantization.operators.matmul, MatMulInteger: the input comes from
    DynamicQuantizeLinear, the product goes through Cast and is multiplied by the scales.
    """
    if node.op_type not in INTEGER:
        return node.input[0], node
    made = graph.maker(node.input[0])
    if made is None or made.op_type != "DynamicQuantizeLinear":
        return f"is in the {node.op_type} node '{shown(node.name)}', whose input comes quantised"
    if node.op_type != "MatMulInteger":
        return made.input[0], node
    result = node
    for kind in ("Cast", "Mul"):
        users = graph.uses.get(result.output[0], ())
        if len(users) != 1 or users[0].node.op_type != kind:
            return f"is in the MatMulInteger node '{shown(node.name)}', not followed by one {kind}"
        result = users[0].node
    return made.input[0], result


def _unusual(node: onnx.NodeProto) -> str | None:
    """Return a setting under which a node is no plain product, or None."""
    plain = {"alpha": 1.0, "beta": 1.0, "transA": 0, "transBatchA": 0, "transBatchB": 0}
    for name, value in plain.items():
        if (found := _attribute(node, name, value)) != value:
            return f"{name} is {found}"
    return None


def _computed_in(match: Match) -> DType | None:
    """Return the floating-point type of a product's output."""
    dtype = getattr(match.encoding, "scales", match.encoding.source)
    name = match.encoding.name
    if name.startswith("F16"):
        return F16
    return dtype if dtype in (F16, F32) else None


def _attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    import onnx  # noqa: PLC0415 - most commands do without

    for attribute in node.attribute:
        if attribute.name == name:
            return onnx.helper.get_attribute_value(attribute)
    return default


def _named(slots: Sequence[Slot]) -> Iterator[Slot]:
    """Yield the slots under names of their own, made of their modules' names."""
    taken: dict[str, int] = {}
    for slot in slots:
        used = sorted({int(w) for w in slot.weight_of if w != KEPT})
        modules = [slot.weights[w].name.removesuffix(".weight") for w in used]
        parents = {m.rpartition(".")[0] for m in modules}
        name = modules[0]
        if len(modules) > 1:
            leaves = [m.rpartition(".")[2] for m in modules]
            name = f"{modules[0]}+{'+'.join(leaves[1:] if len(parents) == 1 else modules[1:])}"
        count = taken[name] = taken.get(name, 0) + 1
        yield Slot(**{**slot.__dict__, "name": name if count == 1 else f"{name}#{count}"})
