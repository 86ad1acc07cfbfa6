"""Embeddings that are quantised by themselves take merged values, quantised as the base's were."""

import json

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import dora_export
from dora_export.errors import DoraExportError
from tests import oracle, small

TABLE, ROWS, WIDTH = "model.embed_tokens.weight", 50, 64


@pytest.fixture
def pair(tmp_path):
    """A base whose embedding is adapted; what becomes of it, in float64."""
    make = torch.Generator().manual_seed(0)
    W = torch.randn(ROWS, WIDTH, generator=make) * 0.1
    W[7] = 0  # a row without a scale
    config = {**small.CONFIG, "hidden_size": WIDTH, "tie_word_embeddings": False}
    small.write_base(tmp_path / "base", {TABLE: W}, config=config)
    A, B = torch.randn(3, ROWS, generator=make) * 0.3, torch.randn(WIDTH, 3, generator=make) * 0.2
    A[:, 7] = 0
    key = f"{small.PREFIX}model.embed_tokens.lora_embedding_"
    small.write_adapter(tmp_path / "adapter", {f"{key}A": A, f"{key}B": B}, use_dora=False,
                        target_modules=["embed_tokens"])  # fmt: skip
    scaling = small.ALPHA / small.RANK
    merged = oracle.float64(W) + scaling * (oracle.float64(B) @ oracle.float64(A)).T
    return tmp_path, W.numpy(), merged


def save_float(path, W):
    graph = helper.make_graph(
        [helper.make_node("Gather", ["table", "ids"], ["y"])], "g",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, ["n"])],
        [helper.make_tensor_value_info("y", 1, ["n", WIDTH])],
        [numpy_helper.from_array(W.astype(np.float32), "table")],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return path


def looked_up(path, W, symmetric, block=16):
    """The graph as onnxruntime's own tool quantises it."""
    from onnxruntime.quantization import matmul_nbits_quantizer as ort

    config = ort.DefaultWeightOnlyQuantConfig(
        block_size=block, is_symmetric=symmetric, op_types_to_quantize=("Gather",),
        quant_axes=(("Gather", 1),),
    )  # fmt: skip
    made = ort.MatMulNBitsQuantizer(onnx.load(save_float(path, W)), algo_config=config)
    with np.errstate(invalid="ignore"):  # of a row that is zero
        made.process()
    made.model.save_model_to_file(str(path), False)
    return path


def packed(path, W, bits, block=32):
    """The graph as onnxruntime-genai has it: uint8, as MatMulNBits stores a head."""
    from onnxruntime.capi import _pybind_state as ort

    quantise = ort.quantize_matmul_8bits if bits == 8 else ort.quantize_matmul_4bits
    blocks = WIDTH // block
    data = np.zeros((ROWS, blocks, block * bits // 8), np.uint8)
    scales = np.zeros((ROWS, blocks), np.float32)
    zeros = np.zeros((ROWS, blocks * bits // 8), np.uint8)
    quantise(data, W.T.astype(np.float32).copy(), scales, zeros, block, ROWS, WIDTH, False)
    model = onnx.load(save_float(path, W))
    (node,) = model.graph.node
    node.op_type, node.domain = "GatherBlockQuantized", "com.microsoft"
    node.input.extend(["scales", "zeros"])
    node.attribute.extend(
        helper.make_attribute(n, v) for n, v in (("bits", bits), ("block_size", block),
                                                 ("quantize_axis", 1)))  # fmt: skip
    del model.graph.initializer[:]
    flat = data.reshape(ROWS, -1)
    model.graph.initializer.extend(
        numpy_helper.from_array(a, n)
        for n, a in (("table", flat), ("scales", scales), ("zeros", zeros)))  # fmt: skip
    onnx.save(model, path)
    return path


WAYS = {
    "int4": lambda path, W: looked_up(path, W, True),
    "uint4": lambda path, W: looked_up(path, W, False),
    "uint8 of 4 bits": lambda path, W: packed(path, W, 4),
    "uint8 of 8 bits": lambda path, W: packed(path, W, 8),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_quantised_embedding_becomes_what_the_merged_one_quantises_to(pair, way):
    folder, W, merged = pair
    graph = WAYS[way](folder / "graph/model.onnx", W)
    done = dora_export.export_onnx(folder / "base", folder / "adapter", folder / "out", into=graph)
    assert done.verdict == "right"
    expected = WAYS[way](folder / "expected/model.onnx", merged)
    before, wanted, got = (
        {t.name: t for t in onnx.load(p).graph.initializer}
        for p in (graph, expected, folder / "out/model.onnx")
    )
    changed = 0
    for name, tensor in wanted.items():
        assert got[name].raw_data == tensor.raw_data, name
        changed += before[name].raw_data != tensor.raw_data
    assert changed >= 2
    assert done.verified.tiers[1].figures["rows_as_before"] == 1  # the row that is zero
    ids = np.arange(ROWS)
    session = onnxruntime.InferenceSession(folder / "out/model.onnx")
    found = session.run(None, {"ids": ids})[0]
    bits = 4 if "8 bits" not in way else 8
    step = np.abs(merged).max() / 2 ** (bits - 1)
    assert np.abs(found - merged).max() <= step
    assert np.abs(found - W).max() > 3 * step


def test_an_embedding_that_is_quantised_otherwise_is_refused_and_nothing_is_left(pair):
    folder, W, _ = pair
    graph = looked_up(folder / "graph/model.onnx", W, True)
    model = onnx.load(graph)
    (node,) = [n for n in model.graph.node if n.op_type == "GatherBlockQuantized"]
    table = next(t for t in model.graph.initializer if t.name == node.input[0])
    data = bytearray(table.raw_data)
    data[5] ^= 1  # as a calibrated method would: a neighbouring value
    table.raw_data = bytes(data)
    onnx.save(model, graph)
    before = small.entries(folder)
    with pytest.raises(DoraExportError, match="quantise the result as this one was") as error:
        dora_export.export_onnx(folder / "base", folder / "adapter", folder / "out", into=graph)
    assert "1 quantised weights" in str(error.value)
    assert small.entries(folder) == before
    for attribute in node.attribute:
        if attribute.name == "gather_axis":
            attribute.i = 1
    onnx.save(model, graph)
    before = small.entries(folder)
    done = small.run("onnx", folder / "base", folder / "adapter", "--into", graph,
                     "-o", folder / "out", "--json")  # fmt: skip
    assert done.exit_code == 2
    assert "looked up along other axes" in done.output
    assert small.entries(folder) == before


def test_what_the_manifest_says_of_a_quantised_embedding(pair):
    folder, W, _ = pair
    graph = WAYS["uint4"](folder / "graph/model.onnx", W)
    dora_export.export_onnx(folder / "base", folder / "adapter", folder / "out", into=graph,
                            verify=False)  # fmt: skip
    said = json.loads((folder / "out/dora_export.json").read_text())["onnx"]
    assert said["dtype"] == "int4, looked up, blocks of 16, asymmetric"
    assert said["proof"]["initializers"][0]["base"] == [f"{TABLE}[0:{ROWS}]"]
