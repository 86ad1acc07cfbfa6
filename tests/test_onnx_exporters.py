"""Graphs of several exporters take merged weights, and then compute what the unmerged model does.

The graphs were made by other programs (tests/fixtures/make_onnx_graphs.py), or are made here by
onnxruntime's own tools. The reference is PEFT's active adapter in torch.
"""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import peft
import pytest
import torch
from onnx import numpy_helper
from safetensors.torch import load_file

import dora_export
from dora_export import api
from dora_export.adapters import ReadOptions
from dora_export.errors import DoraExportError
from dora_export.plan import Settings
from dora_export.verification.graph import check_graph
from dora_export.verification.together import opened
from tests import onnx_graphs, oracle
from tests.rider_models import WARNINGS

pytestmark = [pytest.mark.filterwarnings(w) for w in WARNINGS]

FIXTURES = Path(__file__).parent / "fixtures" / "onnx"
KINDS = {"bert": ("torch", "fused", "slim", "optimised"),
         "llama": ("torch", "transformers", "fused", "slim", "genai-fp32")}  # fmt: skip
FLOATS = [(kind, graph) for kind, graphs in KINDS.items() for graph in graphs]
LENGTH = 9
IDS = torch.arange(5, 5 + LENGTH).reshape(1, LENGTH)
# Two layers of float32 in another order; the adapter's effect is a thousand times larger.
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def reference():
    """Logits of base and adapter, unmerged, and of the base, by kind."""
    found = {}
    for kind in KINDS:
        model = onnx_graphs.load(FIXTURES / kind / "base")
        with torch.no_grad():
            base = model(input_ids=IDS).logits.numpy()
            wrapped = peft.PeftModel.from_pretrained(model, FIXTURES / kind / "adapter").eval()
            found[kind] = (wrapped(input_ids=IDS).logits.numpy(), base)
    return found


def logits(path):
    """What a graph gives for one sequence, with an empty cache where it has one."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    known = {
        "input_ids": IDS.numpy(),
        "attention_mask": np.ones((1, LENGTH), np.int64),
        "position_ids": np.arange(LENGTH)[None],
    }
    given = {}
    for slot in session.get_inputs():
        given[slot.name] = known.get(slot.name, np.zeros((1, 1, 0, 16), np.float32))  # a cache
    names = [o.name for o in session.get_outputs()]
    return session.run(names, given)[names.index("logits")]


def export(kind, graph, out, **options):
    base, adapter = FIXTURES / kind / "base", FIXTURES / kind / "adapter"
    options = {"verify": False, **options}
    return dora_export.export_onnx(base, adapter, out, into=graph, **options)


def distance(a, b):
    assert a.shape == b.shape
    return float(np.abs(a - b).max() / np.abs(b).max())


@pytest.mark.parametrize(("kind", "name"), FLOATS)
def test_a_graph_of_each_exporter_computes_what_the_unmerged_model_does(
    kind, name, reference, tmp_path
):
    graph = FIXTURES / kind / "graphs" / name / "model.onnx"
    expected, base = reference[kind]
    assert distance(logits(graph), base) < TOLERANCE
    report = export(kind, graph, tmp_path / "out")
    assert report.facts["rewritten"] >= 8  # packed ones count once
    assert distance(logits(tmp_path / "out/model.onnx"), expected) < TOLERANCE
    assert distance(base, expected) > 1000 * TOLERANCE


def test_the_parity_check_runs_on_a_re_weighted_graph(tmp_path):
    graph = FIXTURES / "llama/graphs/torch/model.onnx"
    report = export("llama", graph, tmp_path / "out", verify=True)
    assert report.verdict == "right"
    assert [t.tier for t in report.verified.tiers] == ["ledger", "oracle", "onnx"]
    assert all(t.ran for t in report.verified.tiers)


def test_a_graph_that_counts_tokens_is_compared_without_padding(tmp_path):
    graph = FIXTURES / "llama/graphs/genai-fp32/model.onnx"
    report = export("llama", graph, tmp_path / "out", verify=True)
    assert report.verdict == "right"
    assert report.verified.tiers[-1].tier == "onnx"
    assert any("padding on the right only" in n for n in report.notes)


def test_an_axis_that_is_open_in_name_only_is_found(tmp_path):
    model = onnx.load(FIXTURES / "llama/graphs/slim/model.onnx")
    for node in model.graph.node:
        for i, name in enumerate(node.input):
            node.input[i] = "two_at_once" if name == "input_ids" else name
    model.graph.initializer.append(numpy_helper.from_array(np.array([2, -1]), "two"))
    inputs = ["input_ids", "two"]
    model.graph.node.insert(0, onnx.helper.make_node("Reshape", inputs, ["two_at_once"]))
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(DoraExportError, match="takes any number of sequences; it takes 2 and not"):
        export("llama", tmp_path / "model.onnx", tmp_path / "out", verify=True)
    assert not (tmp_path / "out").exists()


def test_a_graph_with_names_of_its_own_is_not_run_and_says_so(tmp_path):
    graph = FIXTURES / "llama/graphs/transformers/model.onnx"
    report = export("llama", graph, tmp_path / "out", verify=True)
    assert report.verdict == "right"
    assert [t.tier for t in report.verified.tiers] == ["ledger", "oracle"]
    assert any("input.past_key_values.layers.0.keys" in n for n in report.notes)


def merged_weights(kind):
    """Every merged weight in float64, by the oracle."""
    base = load_file(FIXTURES / kind / "base/model.safetensors")
    adapter = load_file(FIXTURES / kind / "adapter/adapter_model.safetensors")
    merged = {}
    for name, tensor in base.items():
        key = f"base_model.model.{name.removesuffix('.weight')}"
        parts = (f"{key}.lora_A.weight", f"{key}.lora_B.weight", f"{key}.lora_magnitude_vector")
        if parts[0] in adapter:
            A, B, m = (oracle.float64(adapter[p]) for p in parts)
            merged[name] = oracle.dora(oracle.float64(tensor), A, B, m, 10 / 4)
    return base, merged


def stored(path):
    return {t.name: t for t in onnx.load(path).graph.initializer}


@pytest.mark.parametrize("bits", [4, 8])
def test_graphs_of_onnxruntime_genai_are_quantised_from_the_exact_weights(bits, tmp_path):
    from onnxruntime.quantization import matmul_nbits_quantizer as ort

    graph = FIXTURES / f"llama/graphs/genai-int{bits}/model.onnx"
    export("llama", graph, tmp_path / "out")
    _, merged = merged_weights("llama")
    before, after = stored(graph), stored(tmp_path / "out/model.onnx")
    quantise = ort.quantize_matmul_4bits if bits == 4 else ort.quantize_matmul_8bits
    compared = 0
    for node in onnx.load(graph, load_external_data=False).graph.node:
        if node.op_type != "MatMulNBits" or "lm_head" in node.input[1]:
            continue
        module = node.input[1].split(".MatMul.")[0].replace(".attn.", ".self_attn.")
        parts = ["q_proj", "k_proj", "v_proj"] if "qkv" in module else [module.split(".")[-1]]
        stem = module.rpartition(".")[0]
        W = np.concatenate([merged[f"{stem}.{p}.weight"] for p in parts]).astype(np.float32)
        rows, columns = W.shape
        blocks = -(-columns // 32)
        padded = np.zeros((blocks * 32, rows), np.float32)
        padded[:columns] = W.T
        packed = np.zeros((rows, blocks, 32 * bits // 8), np.uint8)
        scales = np.zeros((rows, blocks), np.float32)
        zeros = np.zeros((rows, -(-blocks * bits // 8)), np.uint8)
        symmetric = len(node.input) < 4 or not node.input[3]
        quantise(packed, padded, scales, zeros, 32, rows, columns, symmetric)
        assert np.array_equal(numpy_helper.to_array(after[node.input[1]]), packed)
        assert np.array_equal(numpy_helper.to_array(after[node.input[2]]), scales)
        assert not np.array_equal(numpy_helper.to_array(before[node.input[1]]), packed)
        compared += 1
    assert compared == 10
    assert after["model.embed_tokens.weight"] == before["model.embed_tokens.weight"]


def nbits(source, target, bits, block, symmetric):
    from onnxruntime.quantization.matmul_nbits_quantizer import (
        DefaultWeightOnlyQuantConfig,
        MatMulNBitsQuantizer,
    )

    config = DefaultWeightOnlyQuantConfig(block_size=block, is_symmetric=symmetric, bits=bits)
    quantizer = MatMulNBitsQuantizer(onnx.load(source), algo_config=config)
    quantizer.process()
    quantizer.model.save_model_to_file(str(target), False)


def dynamic(source, target, **options):
    from onnxruntime.quantization import QuantType, quantize_dynamic

    if options.pop("unsigned", False):
        options["weight_type"] = QuantType.QUInt8
    quantize_dynamic(source, target, **options)


def optimised(source, target, **options):
    """As onnxruntime writes down what it runs: its operators in the place of three or four."""
    plain = target.with_name(f"plain-{target.name}")
    dynamic(source, plain, **options)
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3  # it warns that the graph is for this machine
    settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    settings.optimized_model_filepath = str(target)
    onnxruntime.InferenceSession(plain, settings, providers=["CPUExecutionProvider"])
    kinds = {n.op_type for n in onnx.load(target).graph.node}
    assert {"MatMulIntegerToFloat", "DynamicQuantizeMatMul"} <= kinds
    assert "MatMulInteger" not in kinds


def half(source, target):
    from onnxruntime.transformers.float16 import convert_float_to_float16

    onnx.save(convert_float_to_float16(onnx.load(source), keep_io_types=True), target)


WAYS = {
    "int4": (nbits, {"bits": 4, "block": 16, "symmetric": True}),
    "int4, zero points": (nbits, {"bits": 4, "block": 32, "symmetric": False}),
    "int8 blocks": (nbits, {"bits": 8, "block": 32, "symmetric": True}),
    "int8 blocks, zero points": (nbits, {"bits": 8, "block": 16, "symmetric": False}),
    "int8": (dynamic, {}),
    "uint8": (dynamic, {"unsigned": True}),
    "int8 per channel": (dynamic, {"per_channel": True}),
    "uint8 per channel": (dynamic, {"per_channel": True, "unsigned": True, "reduce_range": True}),
    "float16": (half, {}),
    "int8, optimised": (optimised, {}),
    "uint8 per channel, optimised": (optimised, {"per_channel": True, "unsigned": True}),
}


@pytest.fixture(scope="module")
def float_merge(tmp_path_factory):
    """Float graphs with merged weights, which other tests hold against the unmerged model."""
    found = {}
    for kind, graph in (("bert", "fused"), ("llama", "slim")):
        path = FIXTURES / kind / "graphs" / graph / "model.onnx"
        out = tmp_path_factory.mktemp(kind) / "out"
        export(kind, path, out)
        found[kind] = (path, out / "model.onnx")
    return found


@pytest.mark.parametrize(("way", "kind"), [
    *((way, ("bert", "llama")[i % 2]) for i, way in enumerate(WAYS)),
    ("int8", "bert"), ("uint8 per channel", "bert"),
])  # fmt: skip
@pytest.mark.filterwarnings("ignore::UserWarning")  # of float16's smallest values
def test_quantising_and_re_weighting_can_change_places(way, kind, float_merge, tmp_path):
    convert, options = WAYS[way]
    base, merged = float_merge[kind]
    convert(base, tmp_path / "base.onnx", **options)
    convert(merged, tmp_path / "merged.onnx", **options)
    export(kind, tmp_path / "base.onnx", tmp_path / "out")
    expected, got = stored(tmp_path / "merged.onnx"), stored(tmp_path / "out/base.onnx")
    assert expected.keys() == got.keys()
    before = stored(tmp_path / "base.onnx")
    changed = 0
    for name, tensor in expected.items():
        mine, theirs = numpy_helper.to_array(got[name]), numpy_helper.to_array(tensor)
        if way == "float16":  # rounded twice there, once here
            assert np.allclose(mine, theirs, rtol=2**-10, atol=2**-24), name
        else:
            assert mine.dtype == theirs.dtype
            assert np.array_equal(mine, theirs), name
        changed += not np.array_equal(mine, numpy_helper.to_array(before[name]))
    assert changed >= 7


def test_a_quantised_graph_is_held_to_what_quantising_did_to_the_base(tmp_path):
    graph = FIXTURES / "llama/graphs/genai-int8/model.onnx"
    report = export("llama", graph, tmp_path / "out", verify=True)
    assert report.verdict == "right"
    assert [t.tier for t in report.verified.tiers] == ["ledger", "oracle", "onnx"]
    assert any("--budget" in n for n in report.notes)
    figures = report.verified.tiers[-1].figures
    assert figures["noise_of_base"]
    found = figures["outputs"]["logits"]
    # the noise is the base's, and not of the wrong model: about as large as the merged graph's
    assert 0.5 < found["error"]["rms"] / found["noise"]["rms"] < 2
    # and the adapter changes far more, so that leaving it out is not taken for rounding
    assert found["effect"]["rms"] > 10 * found["noise"]["rms"]


@pytest.mark.parametrize("wrong", [{}, {"strength": 0.8}, {"strength": 1.2}], ids=str)
def test_a_wrong_quantised_graph_is_not_taken_for_rounding(wrong, tmp_path):
    """The graph of the base itself, and merges with less and with more of the adapter."""
    graph = FIXTURES / "llama/graphs/genai-int8/model.onnx"
    merged = graph
    if wrong:
        export("llama", graph, tmp_path / "out", **wrong)
        merged = tmp_path / "out/model.onnx"
    plan = api._plan(FIXTURES / "llama/base", FIXTURES / "llama/adapter", ReadOptions(),
                     Settings())[0]  # fmt: skip
    _, findings = check_graph(
        plan, merged, padding="none", tokens=4, unmerged=lambda: opened(graph)
    )
    assert "graph-differs" in {f.code for f in findings}


@pytest.mark.parametrize(("way", "operator"), [
    ("genai-fp32", "MatMul"), ("genai-int8", "MatMulNBits"),
])  # fmt: skip
def test_adapters_swap_on_packed_and_quantised_graphs(way, operator, tmp_path):
    """Each tier compares with an unmerged model and with its mistakes."""
    graph = FIXTURES / f"llama/graphs/{way}/model.onnx"
    report = export("llama", graph, tmp_path / "out", adapters=True, verify=True)
    assert report.verdict == "right"
    assert [t.tier for t in report.verified.tiers] == ["onnx", "onnx"]  # the base, the adapter
    alike = operator == "MatMulNBits"
    assert [t.figures["noise_of_base"] for t in report.verified.tiers] == [alike, alike]
    slots = report.facts["slots"].values()
    assert {slot["operator"] for slot in slots} == {operator}
    assert sum(len(slot["weights"]) == 3 for slot in slots) == 2  # q, k and v of two layers
    assert any("padding on the right only" in n for n in report.notes)


def test_adapters_on_a_graph_with_names_of_its_own_are_not_run_and_that_is_said(tmp_path):
    graph = FIXTURES / "llama/graphs/transformers/model.onnx"
    report = export("llama", graph, tmp_path / "out", adapters=True, verify=True)
    assert any("not run beside the unmerged model" in n for n in report.notes)
    assert not [t for t in report.verified.tiers if t.tier == "onnx"]


def test_weights_that_rounding_to_nearest_does_not_give_are_refused(tmp_path):
    path = FIXTURES / "llama/graphs/genai-int4"
    model = onnx.load(path / "model.onnx")
    for tensor in model.graph.initializer:
        if tensor.name.endswith("_Q4") and "layers.1" in tensor.name:
            data = bytearray(tensor.raw_data)
            data[5] ^= 0x01  # as a calibrated method would: a neighbouring value
            tensor.raw_data = bytes(data)
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(DoraExportError, match="quantise the result as this one was") as error:
        export("llama", tmp_path / "model.onnx", tmp_path / "out")
    assert "GPTQ, AWQ, HQQ, k-quant" in str(error.value)
    assert "does not hold 7 of the 14 tensors" in str(error.value)
    assert not (tmp_path / "out").exists()


def test_the_base_in_another_precision_is_refused(tmp_path):
    base = tmp_path / "base"
    onnx_graphs.load(FIXTURES / "llama/base").to(torch.bfloat16).save_pretrained(base)
    graph = FIXTURES / "llama/graphs/torch/model.onnx"
    with pytest.raises(DoraExportError, match="or of the base in another precision"):
        dora_export.export_onnx(base, FIXTURES / "llama/adapter", tmp_path / "out", into=graph)


def test_adapters_of_fewer_layers_change_fewer_tensors(tmp_path):
    """Of a packed weight only some rows change; the rest of it stays the base's."""
    from safetensors.torch import save_file

    adapter = tmp_path / "adapter"
    adapter.mkdir()
    held = load_file(FIXTURES / "llama/adapter/adapter_model.safetensors")
    save_file(
        {n: t for n, t in held.items() if "k_proj" in n}, adapter / "adapter_model.safetensors"
    )
    config = (FIXTURES / "llama/adapter/adapter_config.json").read_text()
    (adapter / "adapter_config.json").write_text(config)
    base, merged = merged_weights("llama")
    graph = FIXTURES / "llama/graphs/genai-fp32/model.onnx"
    dora_export.export_onnx(
        FIXTURES / "llama/base", adapter, tmp_path / "out", into=graph, verify=False
    )
    before, after = stored(graph), stored(tmp_path / "out/model.onnx")
    differing = [n for n in before if before[n] != after[n]]
    assert sorted(differing) == [f"model.layers.{i}.attn.qkv_proj.MatMul.weight" for i in (0, 1)]
    for i, name in enumerate(sorted(differing)):
        rows = numpy_helper.to_array(after[name]).T
        stem = f"model.layers.{i}.self_attn"
        q, v = (base[f"{stem}.{p}.weight"].numpy() for p in ("q_proj", "v_proj"))
        assert np.array_equal(rows[: len(q)], q)
        assert np.array_equal(rows[-len(v) :], v)
        k = torch.from_numpy(rows[len(q) : -len(v)].copy())
        assert oracle.ulps(k, merged[f"{stem}.k_proj.weight"]) <= 1
