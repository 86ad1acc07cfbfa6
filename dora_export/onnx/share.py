"""A graph whose weights are those of the published ``model.safetensors``: one copy for both."""

from __future__ import annotations

import os
import shutil
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from dora_export.checkpoints import open_checkpoint
from dora_export.onnx.files import settle
from dora_export.onnx.model import GraphError
from dora_export.onnx.tidy import TRANSPOSED, WEIGHT_BYTES
from dora_export.tensors import FileRange, TensorRef

TYPES = {"FLOAT": "F32", "FLOAT16": "F16", "BFLOAT16": "BF16"}


def share(model: ir.Model, merged: Path, folder: Path, *, copy: bool) -> list[str]:
    """Let initializers point into safetensors files, which are put beside the graph.

    A weight that the graph has transposed is turned by a node instead, which onnxruntime computes
    once, when it loads the graph. Only tensors whose bytes are the same are shared.

    Args:
        model: The graph, tidied.
        merged: Folder of the merged model.
        folder: Where the graph will be.
        copy: Copy the files instead of moving them.

    Returns:
        The names of the initializers that share.

    Raises:
        GraphError: No initializer can.
    """
    checkpoint = open_checkpoint(merged)
    stored: dict[tuple[str, tuple[int, ...]], list[TensorRef]] = defaultdict(list)
    for ref in checkpoint.tensors.values():
        stored[ref.dtype.name, ref.shape].append(ref)
    graph, shared = model.graph, []
    for value in list(graph.initializers.values()):
        tensor = value.const_value
        if tensor is None or tensor.nbytes < WEIGHT_BYTES or tensor.dtype.name not in TYPES:
            continue
        held = tensor.numpy()
        for turned in (False, True) if held.ndim == 2 else (False,):
            array = held.T if turned else held
            key = (TYPES[tensor.dtype.name], array.shape)
            found = _found(str(value.name).removesuffix(TRANSPOSED), array, stored[key])
            if found is not None:
                _point(graph, value, found, tensor.dtype, folder, turned=turned)
                shared.append(str(value.name))
                break
    if not shared:
        raise GraphError(
            "--share-weights: the graph has no weight as the merged model stores it. Leave the "
            "option out."
        )
    index = sorted(merged.glob("*.safetensors.index.json"))
    for path in (*checkpoint.sources, *index):
        if copy:
            shutil.copyfile(path, folder / path.name)
            settle(folder / path.name)
        else:
            os.rename(path, folder / path.name)
    return shared


def _found(name: str, array: NDArray[Any], refs: Sequence[TensorRef]) -> TensorRef | None:
    """Return the tensor with these very values, the one of that name first."""
    for ref in sorted(refs, key=lambda r: r.name != name):
        if isinstance(ref.source, FileRange):
            bits = array.view(f"u{ref.dtype.itemsize}") if array.dtype.itemsize > 1 else array
            mine = np.memmap(ref.source.path, bits.dtype, "r", ref.source.start, array.shape)
            if np.array_equal(mine, bits):
                return ref
    return None


def _point(
    graph: ir.Graph, value: ir.Value, ref: TensorRef, dtype: ir.DataType, folder: Path, *,
    turned: bool,
) -> None:  # fmt: skip
    """Let an initializer, or what a node turns into it, be a tensor of a safetensors file."""
    source = ref.source
    assert isinstance(source, FileRange), "Bug: a tensor that lies in no file"
    name = ref.name if ref.name not in graph.initializers else f"{ref.name}_"
    name = str(value.name) if not turned else name
    external = ir.ExternalTensor(
        source.path.name, source.start, ref.nbytes, dtype, shape=ir.Shape(ref.shape), name=name,
        base_dir=folder,
    )  # fmt: skip
    if not turned:
        value.const_value = external
        return
    weight = ir.Value(name=name, shape=ir.Shape(ref.shape), type=ir.TensorType(dtype),
                      const_value=external)  # fmt: skip
    node = ir.node("Transpose", [weight], attributes={"perm": [1, 0]})
    graph.initializers.pop(str(value.name))
    output = node.outputs[0]
    output.name, output.shape, output.dtype = value.name, value.shape, dtype
    for user, position in list(value.uses()):
        user.replace_input_with(position, output)
    graph.register_initializer(weight)
    graph.insert_before(graph[0], node)
