"""Two decoder graphs, without and with a cache, as one that ``use_cache_branch`` switches.

Both become branches of an ``If``, and the weights, stored once, lie outside of them. The names, and
that constants stay in the branches, which onnxruntime's optimiser needs, are those of
github.com/huggingface/optimum-onnx, optimum/onnx/graph_transformations.py (``merge_decoders``).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from dora_export.onnx.model import GraphError
from dora_export.onnx.tidy import WEIGHT_BYTES
from dora_export.verification.together import PAST, SOURCES, SWITCH

GIVEN, GROWN = "encoder_sequence_length_out", "present_decoder_sequence_length"


def merged(first: Path, further: Path) -> ir.Model:
    """Return the two graphs as one, whose weights are read from their files when it is written.

    With ``use_cache_branch`` it takes further tokens and the whole cache, and gives nothing for the
    source's keys and values (of a batch of 0 sequences), which are as they were; without it, the
    first tokens, and what is given for the cache is not looked at.

    Args:
        first: Decodes the first tokens.
        further: Decodes further ones.

    Raises:
        GraphError: They are not of one model.
    """
    models = [ir.load(path) for path in (first, further)]
    versions = models[0].opset_imports | models[1].opset_imports
    if any(not model.opset_imports.items() <= versions.items() for model in models):
        raise GraphError(
            f"{first.name}, {further.name}: are of different operator sets, so that no one graph "
            "can hold both. Pass one --opset, or leave --layout transformers-js out."
        )
    graphs = [model.graph for model in models]
    outer = _inputs(*graphs)
    weights: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}
    names = [str(v.name) for v in graphs[0].outputs]
    branches = [
        _branch(graph, name, outer, weights, names)
        for graph, name in zip(graphs, ("first", "further"), strict=True)
    ]
    switch = ir.Value(name=SWITCH, shape=ir.Shape([1]), type=ir.TensorType(ir.DataType.BOOL))
    outputs = [_output(value) for value in branches[0].outputs]
    node = ir.node(
        "If", [switch], outputs=outputs, name="use_cache_branch_or_not",
        attributes={"then_branch": branches[1], "else_branch": branches[0]},
    )  # fmt: skip
    graph = ir.Graph(
        [*outer.values(), switch], outputs, nodes=[node], initializers=list(weights.values()),
        opset_imports=versions, name="merged",
    )  # fmt: skip
    for branch in branches:
        for value in branch.outputs:
            value.name = f"{branch.name}/{value.name}"
    model = ir.Model(graph, ir_version=max(one.ir_version for one in models),
                     producer_name="dora-export")  # fmt: skip
    for one in models:
        if both := model.functions.keys() & one.functions.keys():
            raise GraphError(
                f"{further.name}: has a function of its own '{next(iter(both))[1]}', as the other "
                "decoder. Pass another --engine, or leave --layout transformers-js out."
            )
        model.functions.update(one.functions)
    return model


def _inputs(first: ir.Graph, further: ir.Graph) -> dict[str, ir.Value]:
    """Return the inputs of both graphs by name; one that both have is the first's."""
    found = {}
    for value in (*first.inputs, *further.inputs):
        name = str(value.name)
        shape: list[Any] = list(value.shape or ())
        if name.startswith(PAST) and SOURCES in name and not isinstance(shape[2], int):
            shape[2] = GIVEN  # 0 where it is not looked at, whatever the source's length
        if name not in found:
            found[name] = ir.Value(name=name, shape=ir.Shape(shape), type=value.type)
    return found


def _output(value: ir.Value) -> ir.Value:
    shape: list[Any] = list(value.shape or ())
    if value.name != "logits":
        shape[2] = GIVEN if SOURCES in str(value.name) else GROWN
    return ir.Value(name=value.name, shape=ir.Shape(shape), type=value.type)


def _branch(
    graph: ir.Graph,
    name: str,
    outer: dict[str, ir.Value],
    weights: dict[tuple[str, tuple[int, ...], bytes], ir.Value],
    outputs: list[str],
) -> ir.Graph:
    """Return a graph's nodes as a branch, all its names its own.

    Args:
        graph: The graph; has none of its nodes afterwards.
        name: Of the branch.
        outer: The inputs, by name.
        weights: All weights of both branches; get this one's.
        outputs: Of both branches, in order. One that the graph has not is nothing.
    """
    for value in list(graph.inputs):
        value.replace_all_uses_with(outer[str(value.name)])
    kept = []
    for value in list(graph.initializers.values()):
        assert value.const_value is not None, "Bug: an initializer without a value"
        graph.initializers.pop(str(value.name))
        if value.const_value.nbytes < WEIGHT_BYTES:
            value.name = f"{name}/{value.name}"
            kept.append(value)
            continue
        key = _content(value.const_value)
        if key in weights:
            value.replace_all_uses_with(weights[key])
            continue
        taken = {str(one.name) for one in (*weights.values(), *outer.values())}
        while value.name in taken:
            value.name = f"{value.name}_"
        value.const_value = _read_late(value.const_value, str(value.name))
        weights[key] = value
    own = {str(v.name): v for v in graph.outputs}
    nodes = list(graph)
    graph.outputs.clear()
    graph.remove(nodes)
    for value in _values(nodes):
        if value.name not in own:
            value.name = f"{name}/{value.name}"
    for node in nodes:
        node.name = f"{name}/{node.name}" if node.name else None
    found = []
    for output in outputs:
        if output in own:
            found.append(own[output])
            continue
        like = outer[output.replace("present.", PAST)]
        nodes.append(_nothing(output, like))
        found.append(nodes[-1].outputs[0])
    return ir.Graph([], found, nodes=nodes, initializers=kept, name=name)


def _values(nodes: list[ir.Node]) -> Iterator[ir.Value]:
    """Yield what nodes compute, those of graphs in their attributes too."""
    for node in nodes:
        yield from node.outputs
        for attribute in node.attributes.values():
            inner = (
                [attribute.as_graph()] if attribute.type == ir.AttributeType.GRAPH
                else attribute.as_graphs() if attribute.type == ir.AttributeType.GRAPHS else []
            )  # fmt: skip
            for graph in inner:
                yield from graph.inputs
                yield from graph.initializers.values()
                yield from _values(list(graph))


def _nothing(name: str, like: ir.Value) -> ir.Node:
    """Return a constant of no sequences; what takes it for keys or values fails."""
    shape = list(like.shape or ())
    assert isinstance(like.type, ir.TensorType), "Bug: a cache is of tensors"
    sizes = [0, *(d if isinstance(d, int) else 1 for d in shape[1:])]
    empty = ir.tensor(np.zeros(sizes, like.type.dtype.numpy()), name=name)
    node = ir.node("Constant", [], attributes={"value": empty}, name=f"no {name}")
    value = node.outputs[0]
    value.name, value.type, value.shape = name, like.type, ir.Shape(sizes)
    return node


def _content(tensor: ir.TensorProtocol) -> tuple[str, tuple[int, ...], bytes]:
    """Return what tells a tensor from others: type, shape and SHA-256 of its bytes."""
    shape = tuple(int(n) for n in tensor.shape.numpy())
    return tensor.dtype.name, shape, hashlib.sha256(tensor.tobytes()).digest()


def _read_late(tensor: ir.TensorProtocol, name: str) -> ir.LazyTensor:
    """Return a tensor of another file as one of this graph's, read when it is written."""
    shape = ir.Shape(tensor.shape.numpy())
    return ir.LazyTensor(lambda: tensor, dtype=tensor.dtype, shape=shape, name=name)
