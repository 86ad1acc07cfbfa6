"""A traced graph made fit to publish: the model's own names, and nothing of the machine."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import Any

import onnx_ir as ir
from onnx_ir.passes import common

FOLDED = "pkg.onnxscript.optimizer.folded_from"
PREFIX = "model."  # the wrapper's name for the model
TRANSPOSED = ".transposed"
WEIGHT_BYTES = 1 << 10  # smaller constants keep the exporter's names


def tidy(model: ir.Model) -> None:
    """Name initializers as the model does and drop what exporters leave in a graph.

    A weight that is stored transposed has ``.transposed`` at the end of its name. Node metadata,
    doc strings and stack traces (with paths of this machine) go.
    """
    common.RemoveUnusedNodesPass()(model)
    _rename(model.graph)
    for owner in _owners(model):
        owner.metadata_props.clear()
        owner.meta.clear()
        owner.doc_string = None
    model.producer_name, model.producer_version = "dora-export", None


def _owners(model: ir.Model) -> Iterator[Any]:
    yield model
    for graph in model.graphs():
        yield graph
        yield from graph.inputs
        yield from graph.initializers.values()
        for node in graph:
            yield node
            yield from node.outputs
    for function in model.functions.values():
        yield function
        yield from function


def _rename(graph: ir.Graph) -> None:
    taken = {str(v.name) for v in _named(graph)}
    for value in list(graph.initializers.values()):
        old = str(value.name)
        if (new := _own_name(value)) is None or new == old:
            continue
        while new in taken:
            new += "_"
        taken.add(new)
        value.name = new  # the graph's own register follows
        if value.const_value is not None:
            value.const_value.name = new


def _named(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph.all_nodes():
        yield from node.outputs


def _own_name(value: ir.Value) -> str | None:
    """Return the model's name for an initializer, or None if it is the exporter's own constant."""
    name = str(value.name)
    if name.startswith(PREFIX):
        return name.removeprefix(PREFIX)
    sources = value.metadata_props.get(FOLDED)
    origin = ast.literal_eval(sources) if sources else []
    tensor = value.const_value
    if len(origin) != 1 or not origin[0].startswith(PREFIX) or tensor is None:
        return None
    if tensor.nbytes < WEIGHT_BYTES:
        return None
    return f"{origin[0].removeprefix(PREFIX)}{TRANSPOSED}"
