"""Quantised graphs, by onnxruntime's own quantisers.

int8 is dynamic: weights of eight bits, activations rounded on the way. int4 is of weights only
(``MatMulNBits``): blocks along the inputs share a scale, and a zero point where asymmetric; the
output head, to which logits are most sensitive, has eight bits unless asked otherwise.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from dora_export.onnx.model import DATA_BYTES, GraphError, GraphOptions
from dora_export.onnx.tidy import TRANSPOSED

if TYPE_CHECKING:
    import onnx

BLOCK_SIZES = (16, 32, 64, 128, 256)  # what MatMulNBits takes
# The activations of int4 are rounded to int8 on the way, as in onnxruntime-genai's graphs: twice as
# fast on CPUs as float32, and the error is that of the weights.
ACCURACY_LEVEL = 4
FUSED = "FusedMatMul"
HEADS = ("lm_head", "embed_out", "output_projection")
# One thread at a time: what keeps onnxruntime in its place is the process's, see _temporary_in and
# _quiet, and two models beside each other take twice the memory and no less time.
_QUANTISING = threading.Lock()


def reachable(model: ir.Model) -> None:
    """Store weights as the second operands of ``MatMul`` that quantisers see.

    Exporters leave ``MatMul(x, Transpose(W))`` where W is used elsewhere as well (a tied output
    head), fusions make ``FusedMatMul`` of it, a stack of experts' matrices that lie in one tensor
    is split, and ``Gemm`` (GPT-2's layers, heads of towers) is one that int4's does not see.
    """
    graph = model.graph
    _unstack(graph)
    for node in list(graph):
        _split_gemm(node)
    for node in list(graph):
        weight = _turned_operand(node)
        tensor = None if weight is None else weight.const_value
        if weight is None or tensor is None or len(tensor.shape) != 2:
            continue
        name = f"{weight.name}{TRANSPOSED}"
        if name not in graph.initializers:
            value = ir.Value(name=name, const_value=_turned(tensor, name))
            value.shape, value.dtype = _shape(tensor), tensor.dtype
            graph.register_initializer(value)
        node.replace_input_with(1, graph.initializers[name])
        if node.op_type == FUSED:
            node.op_type, node.domain = "MatMul", ""
            node.attributes.clear()
    ir.passes.common.RemoveUnusedNodesPass()(model)


def _split_gemm(node: ir.Node) -> None:
    """Make ``Gemm`` by a stored weight into ``MatMul`` and ``Add``, where that is all it does."""
    given = node.attributes
    if not _is(node, "Gemm") or given.get_int("transA", 0) != 0:
        return
    if any(given.get_float(name, 1.0) != 1.0 for name in ("alpha", "beta")):
        return
    x, weight, *rest = node.inputs
    if x is None or weight is None or weight.const_value is None or node.graph is None:
        return
    output = node.outputs[0]
    if given.get_int("transB", 0) != 0:
        turn = ir.node("Transpose", [weight], attributes={"perm": [1, 0]})
        turn.outputs[0].name = f"{output.name}_turned"
        node.graph.insert_before(node, turn)
        weight = turn.outputs[0]
    product = ir.node("MatMul", [x, weight])
    product.name = f"{node.name}_product" if node.name else None
    found = product.outputs[0]
    found.name, found.type, found.shape = f"{output.name}_product", output.type, output.shape
    node.graph.insert_before(node, product)
    bias = rest[0] if rest else None
    node.op_type = "Identity" if bias is None else "Add"
    given.clear()
    node.resize_inputs(1 if bias is None else 2)
    node.replace_input_with(0, found)
    if bias is not None:
        node.replace_input_with(1, bias)


def _turned_operand(node: ir.Node) -> ir.Value | None:
    """Return what a product turns before it multiplies by it, if that is all it does."""
    if node.op_type == "MatMul" and node.domain == "" and node.inputs[1] is not None:
        turn = node.inputs[1].producer()
        return turn.inputs[0] if turn is not None and _is(turn, "Transpose") else None
    given = node.attributes
    plain = given.get_float("alpha", 1.0) == 1.0 and not any(
        given.get_int(name, 0) for name in ("transA", "transBatchA", "transBatchB")
    )
    if node.op_type == FUSED and node.domain == "com.microsoft" and plain:
        return node.inputs[1] if given.get_int("transB", 0) else None
    return None


def _is(node: ir.Node, op_type: str) -> bool:
    return node.op_type == op_type and node.domain == ""


def _unstack(graph: ir.Graph) -> None:
    """Give each matrix of a stack that the graph splits an initializer of its own."""
    for node in list(graph):
        stack = node.inputs[0] if node.op_type == "Split" else None
        tensor = None if stack is None else stack.const_value
        if stack is None or tensor is None or len(tensor.shape) != 3:
            continue
        if node.attributes.get_int("axis", 0) != 0 or len(node.outputs) != tensor.shape[0]:
            continue
        for index, output in enumerate(node.outputs):
            for user in [u for u, _ in output.uses() if u.op_type == "Squeeze"]:
                name = f"{stack.name}.{index}"
                if name not in graph.initializers:
                    value = ir.Value(name=name, const_value=_one_of(tensor, index, name))
                    value.shape, value.dtype = ir.Shape(tensor.shape.numpy()[1:]), tensor.dtype
                    graph.register_initializer(value)
                for product, place in list(user.outputs[0].uses()):
                    product.replace_input_with(place, graph.initializers[name])


def _one_of(tensor: ir.TensorProtocol, index: int, name: str) -> ir.LazyTensor:
    shape = ir.Shape([int(n) for n in tensor.shape.numpy()[1:]])

    def take() -> ir.TensorProtocol:
        return ir.Tensor(tensor.numpy()[index], dtype=tensor.dtype, shape=shape, name=name)

    return ir.LazyTensor(take, dtype=tensor.dtype, shape=shape, name=name)


def _turned(tensor: ir.TensorProtocol, name: str) -> ir.LazyTensor:
    shape = _shape(tensor)

    def turn() -> ir.TensorProtocol:
        return ir.Tensor(tensor.numpy().T, dtype=tensor.dtype, shape=shape, name=name)

    return ir.LazyTensor(turn, dtype=tensor.dtype, shape=shape, name=name)


def _shape(tensor: ir.TensorProtocol) -> ir.Shape:
    return ir.Shape([int(n) for n in reversed(tensor.shape.numpy())])


def quantise(source: Path, target: Path, data: str, options: GraphOptions) -> dict[str, Any]:
    """Quantise a graph; its weights are held in memory, and the quantised ones beside them.

    Args:
        source: The float graph.
        target: The quantised one.
        data: Name of the file for its weights, where they are large.
        options: How.

    Returns:
        What the manifest says of it.

    Raises:
        GraphError: Nothing in the graph can be quantised so.
    """
    with _QUANTISING, _quiet(), _temporary_in(target.parent):
        if options.quantize == "int8":
            return _dynamic(source, target, data)
        return _blocks(source, target, data, options)


def check(options: GraphOptions) -> None:
    """Refuse options that do not go together.

    Raises:
        GraphError: They do not.
    """
    if options.quantize is None:
        return
    if options.dtype == "bf16" or (options.quantize == "int8" and options.dtype != "fp32"):
        raise GraphError(
            f"--quantize {options.quantize} --dtype {options.dtype}: onnxruntime's quantiser does "
            "not take it. Use fp32" + (" or fp16." if options.quantize == "int4" else ".")
        )
    if options.block_size not in BLOCK_SIZES:
        known = ", ".join(map(str, BLOCK_SIZES))
        raise GraphError(f"--block-size {options.block_size}: expected one of {known}.")
    if options.share_weights:
        raise GraphError("--share-weights --quantize: quantised weights are no one else's.")


def _dynamic(source: Path, target: Path, data: str) -> dict[str, Any]:
    from onnxruntime.quantization import QuantType, quantize_dynamic  # noqa: PLC0415 - seconds

    # Signed weights overflow on x86 without VNNI: products of activations (unsigned) are added in
    # pairs that 16 bits cannot hold, and what comes out is cut off without a word.
    quantize_dynamic(source, target, weight_type=QuantType.QUInt8, per_channel=True,
                     use_external_data_format=_is_large(source))  # fmt: skip
    if _is_large(target):  # under the name that onnxruntime has chosen
        model = ir.load(target)
        ir.external_data.load_to_model(model)
        target.with_name(f"{target.name}.data").unlink()
        ir.save(model, target, external_data=data)
    count = _count(target, ("MatMulInteger", "ConvInteger", "DynamicQuantizeMatMul"))
    return _facts(source, count, {"method": "int8", "weights": "per output, unsigned"})


def _blocks(source: Path, target: Path, data: str, options: GraphOptions) -> dict[str, Any]:
    import onnx  # noqa: PLC0415 - takes a second
    from onnxruntime.quantization.matmul_nbits_quantizer import (  # noqa: PLC0415
        MatMulNBitsQuantizer,
    )

    model = onnx.load(str(source))
    matmuls = _named_matmuls(model)
    heads = [n for n, weight in matmuls.items() if weight.split(".")[0] in HEADS
             or ".lm_head." in weight]  # fmt: skip
    passes = [(4, [])] if options.head_bits == 4 else [
        (8, [n for n in matmuls if n not in heads]), (4, [])]  # fmt: skip
    for bits, left in passes:
        quantizer = MatMulNBitsQuantizer(
            model, bits=bits, block_size=options.block_size, is_symmetric=options.symmetric,
            accuracy_level=ACCURACY_LEVEL, nodes_to_exclude=left,
        )  # fmt: skip
        quantizer.process()
        model = quantizer.model.model
    large = sum(len(t.raw_data) for t in model.graph.initializer) > DATA_BYTES
    onnx.save(model, str(target), save_as_external_data=large, location=data)
    count = sum(n.op_type == "MatMulNBits" for n in model.graph.node)
    said = {"method": "int4", "block_size": options.block_size, "symmetric": options.symmetric,
            "head_bits": options.head_bits if heads else 4,
            "accuracy_level": ACCURACY_LEVEL}  # fmt: skip
    return _facts(source, count, said)


def _named_matmuls(model: onnx.ModelProto) -> dict[str, str]:
    """Give every MatMul with a stored weight a name; return their weights' names by it."""
    stored = {t.name for t in model.graph.initializer if len(t.dims) == 2}
    found = {}
    for position, node in enumerate(model.graph.node):
        if node.op_type == "MatMul" and node.input[1] in stored:
            node.name = node.name or f"matmul_{position}"
            found[node.name] = node.input[1]
    return found


def _is_large(path: Path) -> bool:
    return path.with_name(f"{path.name}.data").exists()


def _count(path: Path, kinds: tuple[str, ...]) -> int:
    import onnx  # noqa: PLC0415 - as above

    model = onnx.load(str(path), load_external_data=False)
    return sum(node.op_type in kinds for node in model.graph.node)


def _facts(source: Path, count: int, said: dict[str, Any]) -> dict[str, Any]:
    if not count:
        raise GraphError(
            f"{source.name}: holds no matrix product that --quantize {said['method']} could take. "
            "Leave the option out."
        )
    return {**said, "nodes": count}


@contextmanager
def _temporary_in(folder: Path) -> Iterator[None]:
    """Let onnxruntime keep its copies of the model in a folder, not where the system has others.

    There may be no room for a model, and nothing is to be written outside of an output. The
    quantiser takes no folder, and Python's own choice of one is everybody's: only its module is
    given another, and only for this thread, since a caller's other threads may quantise as well.
    """
    from onnxruntime.quantization import quant_utils  # noqa: PLC0415 - seconds

    own, before = threading.get_ident(), quant_utils.tempfile

    def temporary(**options: Any) -> Any:
        here = {"dir": folder} if threading.get_ident() == own else {}
        return before.TemporaryDirectory(**here, **options)

    quant_utils.tempfile = SimpleNamespace(TemporaryDirectory=temporary)
    try:
        yield
    finally:
        quant_utils.tempfile = before


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep onnxruntime's advice off the terminal, and the log as it was before its imports."""
    root = logging.getLogger()
    disabled, level, handlers = root.manager.disable, root.level, list(root.handlers)
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(disabled)
        root.setLevel(level)
        root.handlers[:] = handlers
