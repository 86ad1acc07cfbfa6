"""A graph of the base with inputs for adapters: around each slot, the adapter's part of the layer.

The inputs are optional: initializers of the same names give an adapter of rank 0 and factors of
one, with which the graph computes what the base does. onnxruntime fills them from an
``.onnx_adapter`` file (RunOptions.add_active_adapter).
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dora_export.errors import shown
from dora_export.onnx.files import settle
from dora_export.onnx.graph_file import Graph
from dora_export.onnx.model import PROTOBUF_BYTES, GraphError
from dora_export.onnx.slots import Slot
from dora_export.tensors import F16
from dora_export.writers.files import refusal, write_small

if TYPE_CHECKING:
    import onnx

LEAST_IR = 4  # from here on, an initializer need not be an input, and one that is has a default
SUFFIXES = ("lora_A", "lora_B", "output_factor", "input_factor")


@dataclass(frozen=True)
class Inputs:
    """Names of the inputs that one slot has.

    Attributes:
        lora_A: ``(K, rank)``.
        lora_B: ``(rank, N)``, scaling included.
        output_factor: ``(N,)``; None: no adapter has one here.
        input_factor: ``(K,)``; None: no adapter has one here.
    """

    lora_A: str
    lora_B: str
    output_factor: str | None = None
    input_factor: str | None = None


def with_slots(
    graph: Graph, slots: Sequence[Slot], inputs: Mapping[str, Inputs], folder: Path
) -> None:
    """Write a graph with inputs for adapters into ``folder``, its external data beside it.

    External data is copied byte for byte; weights within the graph file stay there.

    Args:
        graph: The graph of the base.
        slots: Where adapters go.
        inputs: The inputs of each slot, by its name.
        folder: Where to write; may be the folder of the graph itself.

    Raises:
        GraphError: Names are taken, or the graph would be larger than a protobuf message can be.
        OutputError: The disk is full, or writing fails.
    """
    import onnx  # noqa: PLC0415 - most commands do without

    model = onnx.load(str(graph.path), load_external_data=False)
    if model.ir_version < LEAST_IR:
        raise GraphError(
            f"{graph.path}: IR version {model.ir_version}, in which every initializer is an input. "
            "Convert it with onnx.version_converter, or export it again."
        )
    nodes = {tuple(n.output): n for n in model.graph.node}
    _check_names(graph, model, inputs)
    added: dict[tuple[str, ...], list[onnx.NodeProto]] = {}
    before: dict[tuple[str, ...], list[onnx.NodeProto]] = {}
    for slot in slots:
        key, last = tuple(slot.node.output), tuple(slot.result.output)
        model.graph.initializer.extend(_defaults(slot, inputs[slot.name]))
        model.graph.input.extend(_declared(slot, inputs[slot.name]))
        before[key], added[last] = _around(slot, inputs[slot.name], nodes[key], nodes[last])
    ordered: list[onnx.NodeProto] = []
    for key, node in nodes.items():
        ordered += [*before.get(key, ()), node, *added.get(key, ())]
    del model.graph.node[:]
    model.graph.node.extend(ordered)
    _forget_shapes(model, {f"{slot.result.output[0]}" for slot in slots})
    size = model.ByteSize()
    if size > PROTOBUF_BYTES:
        raise GraphError(
            f"{graph.path}: with adapters {size} bytes, more than the 2 GiB that a protobuf "
            "message can hold. Save the graph with external data first."
        )
    for location, path in graph.data_files.items():
        target = folder / location
        if not target.exists():
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)
                settle(target)
            except OSError as error:
                raise refusal(target, error) from error
    target = folder / graph.path.name
    target.unlink(missing_ok=True)  # one that was made for this
    write_small(target, model.SerializeToString())


def _check_names(graph: Graph, model: onnx.ModelProto, inputs: Mapping[str, Inputs]) -> None:
    taken = {t.name for t in model.graph.initializer} | {i.name for i in model.graph.input}
    wanted = {n for one in inputs.values() for n in names_of(one)}
    if both := sorted(taken & wanted):
        raise GraphError(
            f"{graph.path}: has an input '{shown(both[0])}' already: it was given slots before. "
            "Pass the graph of the base."
        )


def names_of(inputs: Inputs) -> tuple[str, ...]:
    """Return the names of a slot's inputs."""
    named = (inputs.lora_A, inputs.lora_B, inputs.output_factor, inputs.input_factor)
    return tuple(n for n in named if n is not None)


def _shapes(slot: Slot, inputs: Inputs) -> Iterator[tuple[str, tuple[int | str, ...]]]:
    rank = f"rank of {slot.name}"
    yield inputs.lora_A, (slot.inputs, rank)
    yield inputs.lora_B, (rank, slot.outputs)
    if inputs.output_factor is not None:
        yield inputs.output_factor, (slot.outputs,)
    if inputs.input_factor is not None:
        yield inputs.input_factor, (slot.inputs,)


def _defaults(slot: Slot, inputs: Inputs) -> Iterator[onnx.TensorProto]:
    import onnx  # noqa: PLC0415 - as above

    kind = np.float16 if slot.dtype is F16 else np.float32
    for name, shape in _shapes(slot, inputs):
        dims = [0 if isinstance(d, str) else d for d in shape]
        yield onnx.numpy_helper.from_array(np.ones(dims, kind), name)


def _declared(slot: Slot, inputs: Inputs) -> Iterator[onnx.ValueInfoProto]:
    import onnx  # noqa: PLC0415 - as above

    kind = onnx.TensorProto.FLOAT16 if slot.dtype is F16 else onnx.TensorProto.FLOAT
    for name, shape in _shapes(slot, inputs):
        yield onnx.helper.make_tensor_value_info(name, kind, shape)


def _around(
    slot: Slot, inputs: Inputs, node: onnx.NodeProto, result: onnx.NodeProto
) -> tuple[list[onnx.NodeProto], list[onnx.NodeProto]]:
    """Return the nodes before a slot's node and after its result; both change to go between."""
    import onnx  # noqa: PLC0415 - as above

    make, name, out, value = onnx.helper.make_node, slot.name, result.output[0], slot.value
    before, after = [], []
    if inputs.input_factor is not None:
        assert not slot.quantises_inputs, "Bug: refused before"
        scaled = f"{name}.scaled_input"
        before = [make("Mul", [node.input[0], inputs.input_factor], [scaled], f"{name}/scale_in")]
        node.input[0] = value = scaled
    bias = None if slot.bias is None else node.input[slot.bias]
    if slot.bias is not None:  # the trainers' forward adds it after the factor
        node.input[slot.bias] = ""
        while node.input and not node.input[-1]:
            del node.input[-1]
    result.output[0] = f"{name}.base_output"
    steps = [
        ("MatMul", [value, inputs.lora_A], "down"),
        ("MatMul", [f"{name}.down", inputs.lora_B], "up"),
        ("Add", [result.output[0], f"{name}.up"], "sum"),
    ]
    if inputs.output_factor is not None:
        steps.append(("Mul", [f"{name}.{steps[-1][2]}", inputs.output_factor], "scaled"))
    if bias is not None:
        steps.append(("Add", [f"{name}.{steps[-1][2]}", bias], "with_bias"))
    for position, (kind, values, step) in enumerate(steps):
        last = position == len(steps) - 1
        after.append(make(kind, values, [out if last else f"{name}.{step}"], f"{name}/{step}"))
    return before, after


def _forget_shapes(model: onnx.ModelProto, names: set[str]) -> None:
    """Leave shapes of changed values to inference; they are the same, but held for other nodes."""
    kept = [v for v in model.graph.value_info if v.name not in names]
    del model.graph.value_info[:]
    model.graph.value_info.extend(kept)
