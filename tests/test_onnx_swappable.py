"""Adapters that swap in a graph of the base: each computes what its own merged weights do."""

import hashlib
import json
import re
import shutil
import threading
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import load_file, save_file

import dora_export
from dora_export.errors import DoraExportError, InputError
from dora_export.onnx import swappable, trace
from dora_export.onnx.model import BUDGETS, GraphError, GraphOptions, ParityError
from dora_export.tensors import DTYPES
from dora_export.verification import graph, named, reference
from tests import onnx_graphs, oracle, rider_models, small
from tests.forward_models import prepare
from tests.small import LINEARS, run

# PEFT 0.21 asks transformers for an attribute that transformers 5 has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

Q0, Q1 = "model.layers.0.attn.q_proj", "model.layers.1.attn.q_proj"
D0, D1 = "model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"
KINDS = {np.float32: 1, np.float16: 10}
# float32: products of up to 28 terms and two factors; float16: of its own last place
CLOSE = {np.float32: 2.0**-19, np.float16: 2.0**-7}


def values(base, dtype):
    return {n: t.float().numpy().astype(dtype) for n, t in base.items() if t.is_floating_point()}


def save_graph(path, base, dtype=np.float32, nodes=None, stored=None, data=None):
    """Every kind of linear layer that exporters write, one input for each."""
    W = values(base, dtype)
    stored = stored or {
        "val_0": np.ascontiguousarray(W[f"{Q0}.weight"].T),
        "gemm.weight": W[f"{D0}.weight"],
        "gemm.bias": np.linspace(-1, 1, 12).astype(dtype),
        "turned": W[f"{Q1}.weight"],
        "val_1": np.ascontiguousarray(W[f"{D1}.weight"].T),
    }
    nodes = nodes or [
        helper.make_node("MatMul", ["x0", "val_0"], ["y0"], "q0"),
        helper.make_node("Gemm", ["x1", "gemm.weight", "gemm.bias"], ["y1"], "d0", transB=1),
        helper.make_node("Transpose", ["turned"], ["turned_T"], perm=[1, 0]),
        helper.make_node("MatMul", ["x2", "turned_T"], ["y2"], "q1"),
        helper.make_node("MatMul", ["x3", "val_1"], ["inner"], "d1"),
        helper.make_node("Relu", ["inner"], ["y3"]),
    ]
    kind = KINDS[dtype]
    wide = {"x0": 12, "x1": 28, "x2": 12, "x3": 28}
    used = {i for n in nodes for i in n.input}
    graph = helper.make_graph(
        nodes, "g",
        [helper.make_tensor_value_info(n, kind, ["batch", k]) for n, k in wide.items()
         if n in used],
        [helper.make_tensor_value_info(o, kind, ["batch", f"wide_{o}"])
         for n in nodes for o in n.output if o.startswith("y")],
        [numpy_helper.from_array(v, n) for n, v in stored.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    external = {} if data is None else {
        "save_as_external_data": True, "location": data, "size_threshold": 64}  # fmt: skip
    onnx.save(model, path, **external)
    return path


def write_in_axis(path, base, seed=7):
    """A file as LyCORIS writes it with magnitudes per input: alpha 5, rank 3."""
    make, tensors, merged = torch.Generator().manual_seed(seed), {}, {}
    for name, (out, inputs) in LINEARS.items():
        A = torch.randn(3, inputs, generator=make) * 0.3
        B = torch.randn(out, 3, generator=make) * 0.2
        W = base[f"{name}.weight"]
        m = W.float().norm(dim=0) * (0.6 + 0.8 * torch.rand(inputs, generator=make))
        key = f"lycoris_{name.replace('.', '_')}"
        tensors |= {f"{key}.lora_down.weight": A, f"{key}.lora_up.weight": B,
                    f"{key}.alpha": torch.tensor(5.0), f"{key}.dora_scale": m[None, :]}  # fmt: skip
        merged[f"{name}.weight"] = oracle.dora(
            oracle.float64(W), oracle.float64(A), oracle.float64(B), oracle.float64(m), 5 / 3,
            axis=0, eps=np.finfo(np.float32).eps,
        )  # fmt: skip
    save_file(tensors, path)
    return merged


def expected_weights(base, adapter, scaling=small.ALPHA / small.RANK):
    """What an adapter makes of the weights that it changes, in float64."""
    found = {}
    for name in LINEARS:
        A, B, m = (
            adapter.get(f"{small.PREFIX}{name}.{part}")
            for part in ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
        )
        if A is not None:
            W, A, B = (oracle.float64(t) for t in (base[f"{name}.weight"], A, B))
            found[f"{name}.weight"] = (
                oracle.lora(W, A, B, scaling)
                if m is None
                else oracle.dora(W, A, B, oracle.float64(m), scaling)
            )
    return found


class Models:
    """One base, three adapters, and what each of them makes of the weights, in float64."""

    def __init__(self, folder):
        self.folder, self.base = folder, small.base_tensors()
        small.write_base(folder / "base", self.base)
        self.merged = {None: {f"{n}.weight": oracle.float64(self.base[f"{n}.weight"])
                              for n in LINEARS}}  # fmt: skip
        dora = small.adapter_tensors(self.base)
        small.write_adapter(folder / "pirate", dora)
        self.merged["pirate"] = expected_weights(self.base, dora)
        lora = small.adapter_tensors(self.base, seed=4, dora=False)
        lora = {n: t for n, t in lora.items() if "q_proj" in n}
        small.write_adapter(folder / "formal", lora, use_dora=False, target_modules=["q_proj"])
        self.merged["formal"] = self.merged[None] | expected_weights(self.base, lora)
        self.merged["inner"] = write_in_axis(folder / "inner.safetensors", self.base)

    @property
    def adapters(self):
        return [self.folder / "pirate", self.folder / "formal", self.folder / "inner.safetensors"]

    def export(self, graph, adapters=None, out="out", **options):
        options = {"verify": False, "adapters": True, "into": graph} | options
        return dora_export.export_onnx(
            self.folder / "base", adapters or self.adapters, self.folder / out, **options
        )

    def inputs(self, dtype, seed=0):
        make = np.random.default_rng(seed)
        wide = {"x0": 12, "x1": 28, "x2": 12, "x3": 28}
        return {n: make.standard_normal((5, k)).astype(dtype) for n, k in wide.items()}

    def expected(self, adapter, x, dtype=np.float32):
        W = {n: w.astype(dtype).astype(np.float64) if adapter is None else w
             for n, w in self.merged[adapter].items()}  # fmt: skip
        x = {n: v.astype(np.float64) for n, v in x.items()}
        bias = np.linspace(-1, 1, 12).astype(dtype)
        return {
            "y0": x["x0"] @ W[f"{Q0}.weight"].T,
            "y1": x["x1"] @ W[f"{D0}.weight"].T + bias,
            "y2": x["x2"] @ W[f"{Q1}.weight"].T,
            "y3": np.maximum(x["x3"] @ W[f"{D1}.weight"].T, 0),
        }


def distance(found, expected):
    return max(np.abs(found[n] - e).max() / np.abs(e).max() for n, e in expected.items())


@pytest.fixture
def models(tmp_path):
    return Models(tmp_path)


@pytest.mark.parametrize("dtype", KINDS, ids=["fp32", "fp16"])
@pytest.mark.parametrize("data", [None, "w.bin"], ids=["inline", "external"])
def test_each_adapter_computes_what_its_merged_weights_do(models, dtype, data):
    graph = save_graph(models.folder / "graph/model.onnx", models.base, dtype, data=data)
    models.export(graph)
    session = dora_export.AdapterSession(models.folder / "out")
    assert session.adapters == ("pirate", "formal", "inner")
    x = models.inputs(dtype)
    for active in (None, "pirate", "formal", "inner", "pirate", None):
        found = session.run(x, active)
        for other in (None, "pirate", "formal", "inner"):
            apart = distance(found, models.expected(other, x, dtype))
            if other == active:
                assert apart < CLOSE[dtype], active
            else:
                assert apart > 8 * CLOSE[dtype], (active, other)
    if data:
        assert (models.folder / "out" / data).read_bytes() == (graph.parent / data).read_bytes()


def test_wrong_formulas_are_far_from_what_the_graph_computes(models):
    models.export(save_graph(models.folder / "graph/model.onnx", models.base))
    x = models.inputs(np.float32)
    found = dora_export.AdapterSession(models.folder / "out").run(x, "pirate")
    dora = small.adapter_tensors(models.base)
    plain = {n: t for n, t in dora.items() if "magnitude" not in n}
    for wrong in (
        expected_weights(models.base, plain),  # magnitudes dropped
        expected_weights(models.base, dora, scaling=small.ALPHA),
        expected_weights(models.base, dora, scaling=1.0),
    ):
        models.merged["wrong"] = wrong
        assert distance(found, models.expected("wrong", x)) > 1e-2


def test_without_an_adapter_the_graph_is_the_base_to_the_last_bit(models):
    graph = save_graph(models.folder / "graph/model.onnx", models.base)
    models.export(graph)
    x = models.inputs(np.float32)
    before = onnxruntime.InferenceSession(graph).run(None, x)
    after = dora_export.AdapterSession(models.folder / "out").run(x)
    for a, b in zip(before, after.values(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_packed_weights_share_a_node_and_keep_their_own_adapters(models):
    W = values(models.base, np.float32)
    joined = np.concatenate([W[f"{Q0}.weight"], W[f"{Q1}.weight"]])[::-1]  # reordered rows as well
    graph = save_graph(
        models.folder / "graph/model.onnx", models.base,
        nodes=[helper.make_node("MatMul", ["x0", "packed"], ["y0"])],
        stored={"packed": np.ascontiguousarray(joined.T)},
    )  # fmt: skip
    adapters = models.adapters[:2]
    models.export(graph, adapters, allow_missing=[D0, D1])
    session = dora_export.AdapterSession(models.folder / "out")
    x = {"x0": models.inputs(np.float32)["x0"]}
    for name in ("pirate", "formal"):
        merged = models.merged[name]
        exact = np.concatenate([merged[f"{Q0}.weight"], merged[f"{Q1}.weight"]])[::-1]
        found = session.run(x, name)["y0"]
        assert distance({"y": found}, {"y": x["x0"].astype(np.float64) @ exact.T}) < 2.0**-19
    manifest = json.loads((models.folder / "out/dora_export.json").read_text())
    assert list(manifest["onnx"]["slots"]) == [f"{Q0}+{Q1}"]
    with pytest.raises(GraphError, match=r"share their input.*Export the base without packing"):
        models.export(graph, [models.adapters[2]], "other", allow_missing=[D0, D1])


@pytest.mark.parametrize("strength", [0.4, -0.5])
def test_strength_goes_that_far_from_the_base_to_the_result(models, strength):
    models.export(save_graph(models.folder / "graph/model.onnx", models.base), strength=strength)
    session, x = dora_export.AdapterSession(models.folder / "out"), models.inputs(np.float32)
    for name in ("pirate", "formal", "inner"):
        W = models.merged[None]
        models.merged["part"] = {n: W[n] + strength * (w - W[n])
                                 for n, w in models.merged[name].items()}  # fmt: skip
        assert distance(session.run(x, name), models.expected("part", x)) < 2.0**-18


def test_a_weight_stored_in_times_out_takes_its_factor_on_the_other_side(tmp_path):
    """GPT-2's Conv1D: the base's rows are inputs, PEFT's magnitudes count outputs."""
    make = torch.Generator().manual_seed(0)
    W = torch.randn(12, 20, generator=make) * 0.1  # (in, out)
    small.write_base(tmp_path / "base", {"h.0.attn.c_attn.weight": W},
                     config={"model_type": "gpt2"})  # fmt: skip
    A, B = torch.randn(3, 12, generator=make) * 0.3, torch.randn(20, 3, generator=make) * 0.2
    m = W.norm(dim=0) * (0.6 + 0.8 * torch.rand(20, generator=make))
    key = "base_model.model.h.0.attn.c_attn"
    small.write_adapter(tmp_path / "conv", {f"{key}.lora_A.weight": A, f"{key}.lora_B.weight": B,
                        f"{key}.lora_magnitude_vector": m}, target_modules=["c_attn"],
                        fan_in_fan_out=True)  # fmt: skip
    graph = save_graph(
        tmp_path / "graph/model.onnx", {},
        nodes=[helper.make_node("MatMul", ["x0", "w"], ["y0"])], stored={"w": W.numpy()},
    )  # fmt: skip
    dora_export.export_onnx(tmp_path / "base", tmp_path / "conv", tmp_path / "out", into=graph,
                            adapters=True, verify=False)  # fmt: skip
    x = np.random.default_rng(0).standard_normal((4, 12)).astype(np.float32)
    merged = oracle.dora(W.T, A, B, m, small.ALPHA / small.RANK)
    found = dora_export.AdapterSession(tmp_path / "out").run({"x0": x}, "conv")
    exact = {"y0": x.astype(np.float64) @ merged.T}
    assert distance(found, exact) < 2.0**-19


def quantised(path, way):
    """The graph of ``save_graph`` as onnxruntime's own tools quantise it."""
    from onnxruntime.quantization import QuantType, matmul_nbits_quantizer, quantize_dynamic

    target = path.with_name("quantised.onnx")
    if way.startswith("int4") or way.endswith("blocks"):
        config = matmul_nbits_quantizer.DefaultWeightOnlyQuantConfig(
            block_size=16, is_symmetric="asymmetric" not in way, bits=4 if "int4" in way else 8
        )
        made = matmul_nbits_quantizer.MatMulNBitsQuantizer(onnx.load(path), algo_config=config)
        made.process()
        made.model.save_model_to_file(str(target), False)
    elif way == "QDQ":
        model = onnx.load(path)
        for node in [n for n in model.graph.node if n.op_type == "MatMul"]:
            dequantised(model.graph, node)
        onnx.save(model, target)
    else:
        kind = QuantType.QUInt8 if way.startswith("u") else QuantType.QInt8
        quantize_dynamic(path, target, weight_type=kind, per_channel="per channel" in way)
    return target


def dequantised(graph, node):
    """Let a product take its weight as int8, by way of DequantizeLinear."""
    from onnxruntime.quantization import quant_utils

    (weight,) = [t for t in graph.initializer if t.name == node.input[1]]
    values = numpy_helper.to_array(weight)
    zero, scale = quant_utils.compute_scale_zp(
        values.min(), values.max(), np.int8(-127), np.int8(127), True)  # fmt: skip
    stored = quant_utils.quantize_nparray(TensorProto.INT8, values, scale, zero)
    name = f"{weight.name}_int8"
    graph.initializer.extend([
        numpy_helper.from_array(stored, name),
        numpy_helper.from_array(np.array(scale, np.float32), f"{name}_scale"),
        numpy_helper.from_array(np.array(zero, np.int8), f"{name}_zero"),
    ])  # fmt: skip
    names = [name, f"{name}_scale", f"{name}_zero"]
    at = list(graph.node).index(node)
    graph.node.insert(at, helper.make_node("DequantizeLinear", names, [f"{name}_floats"]))
    graph.initializer.remove(weight)
    node.input[1] = f"{name}_floats"


LAYERS = {"y0": ("x0", Q0), "y3": ("x3", D1)}
PRODUCTS = [helper.make_node("MatMul", ["x0", "val_0"], ["y0"], "q0"),
            helper.make_node("MatMul", ["x3", "val_1"], ["y3"], "d1")]  # fmt: skip
ADAPTED = {"pirate": ("pirate", small.ALPHA / small.RANK), "inner": ("inner.safetensors", 5 / 3)}


def swapped_onto(models, graph, x, adapter):
    """What an adapter makes of a quantised graph's own products, in float64.

    ``f (q(x) + s (x A^T) B^T)``, the product ``q`` being what the graph itself computes; with
    magnitudes per input the factor goes onto x.
    """
    session = onnxruntime.InferenceSession(graph)
    file, scaling = ADAPTED[adapter]
    tensors = load_file(
        models.folder / file / "adapter_model.safetensors" if adapter == "pirate"
        else models.folder / file)  # fmt: skip
    found = {}
    for y, (name, module) in LAYERS.items():
        W = oracle.float64(models.base[f"{module}.weight"])
        key = (small.PREFIX + module if adapter == "pirate"
               else f"lycoris_{module.replace('.', '_')}")  # fmt: skip
        parts = (
            ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
            if adapter == "pirate"
            else ("lora_down.weight", "lora_up.weight", "dora_scale")
        )
        A, B, m = (oracle.float64(tensors[f"{key}.{p}"]) for p in parts)
        f = m.reshape(-1) / np.linalg.norm(
            W + scaling * B @ A, axis=1 if adapter == "pirate" else 0
        )
        scaled = x[name] if adapter == "pirate" else (x[name] * f).astype(np.float32)
        own = session.run([y], {**x, name: scaled})[0].astype(np.float64)
        whole = own + scaling * (scaled.astype(np.float64) @ A.T) @ B.T
        found[y] = whole * f if adapter == "pirate" else whole
    return found


QUANTISED = ("int4", "int4 asymmetric", "int8 blocks", "int8", "uint8", "int8 per channel", "QDQ")


@pytest.mark.parametrize("way", QUANTISED)
def test_adapters_swap_on_a_quantised_graph(models, way):
    stored = {f"val_{i}": np.ascontiguousarray(values(models.base, np.float32)[f"{m}.weight"].T)
              for i, m in enumerate((Q0, D1))}  # fmt: skip
    path = save_graph(
        models.folder / "graph/model.onnx", models.base, nodes=PRODUCTS, stored=stored
    )
    graph = quantised(path, way)
    integer = way in ("int8", "uint8", "int8 per channel")
    names = ("pirate",) if integer else ("pirate", "inner")
    models.export(graph, [models.folder / ADAPTED[n][0] for n in names], allow_missing=[D0, Q1])
    x = {n: v for n, v in models.inputs(np.float32).items() if n in ("x0", "x3")}
    session = dora_export.AdapterSession(models.folder / "out")
    own = onnxruntime.InferenceSession(graph).run(["y0", "y3"], x)
    for got, expected in zip(session.run(x, outputs=["y0", "y3"]).values(), own, strict=True):
        np.testing.assert_array_equal(got, expected)  # without an adapter: to the last bit
    for name in names:
        expected = swapped_onto(models, graph, x, name)
        found = session.run(x, name)
        assert distance(found, expected) < 2.0**-17, name
        assert distance(found, dict(zip(("y0", "y3"), own, strict=True))) > 0.1
    if integer:
        with pytest.raises(GraphError, match=r"magnitudes per input.*weights only \(MatMulNBits\)"):
            models.export(graph, [models.adapters[2]], "other", allow_missing=[D0, Q1])


FUSED = {"y0": ("x0", Q0, True), "y2": ("x0", Q1, False), "y1": ("x1", D0, True),
         "y3": ("x3", D1, False)}  # fmt: skip
BIAS = np.linspace(-1, 1, 20).astype(np.float32)


@pytest.mark.parametrize("way", ["int8", "uint8 per channel"])
def test_adapters_swap_on_products_that_onnxruntime_has_fused(models, way):
    """As it writes down an int8 graph that it has optimised: with and without a bias."""
    W = values(models.base, np.float32)
    nodes, stored = [], {"x_bias": BIAS[: W[f"{Q0}.weight"].shape[0]], "d_bias": BIAS[:12]}
    for y, (x, module, bias) in FUSED.items():
        stored[f"w_{y}"] = np.ascontiguousarray(W[f"{module}.weight"].T)
        nodes.append(helper.make_node("MatMul", [x, f"w_{y}"], [f"p_{y}" if bias else y], y))
        if bias:
            name = "x_bias" if x == "x0" else "d_bias"
            nodes.append(helper.make_node("Add", [f"p_{y}", name], [y]))
    plain = quantised(save_graph(models.folder / "graph/model.onnx", models.base, nodes=nodes,
                                 stored=stored), way)  # fmt: skip
    graph = plain.with_name("optimised.onnx")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(graph)
    onnxruntime.InferenceSession(plain, options)
    kinds = [n.op_type for n in onnx.load(graph).graph.node]
    assert kinds.count("MatMulIntegerToFloat") == kinds.count("DynamicQuantizeMatMul") == 2
    models.export(graph, models.adapters[:1])
    x = {n: v for n, v in models.inputs(np.float32).items() if n != "x2"}
    own = onnxruntime.InferenceSession(graph)
    before = dict(zip(FUSED, own.run(list(FUSED), x), strict=True))
    session = dora_export.AdapterSession(models.folder / "out")
    for name, got in session.run(x).items():
        np.testing.assert_array_equal(got, before[name])  # without an adapter: to the last bit
    tensors = load_file(models.folder / "pirate/adapter_model.safetensors")
    expected = {}
    for y, (name, module, bias) in FUSED.items():
        parts = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
        A, B, m = (oracle.float64(tensors[f"{small.PREFIX}{module}.{part}"]) for part in parts)
        scaling = small.ALPHA / small.RANK
        f = m / np.linalg.norm(oracle.float64(models.base[f"{module}.weight"]) + scaling * B @ A,
                               axis=1)  # fmt: skip
        b = (BIAS[: len(m)] if bias else 0 * BIAS[: len(m)]).astype(np.float64)
        product = before[y].astype(np.float64) - b
        expected[y] = f * (product + scaling * (x[name].astype(np.float64) @ A.T) @ B.T) + b
    found = session.run(x, "pirate")
    assert distance(found, expected) < 2.0**-17
    assert distance(found, before) > 0.1
    with pytest.raises(GraphError, match=r"magnitudes per input.*MatMulIntegerToFloat"):
        models.export(graph, [models.adapters[2]], "other")


def test_an_integer_product_that_is_not_as_onnxruntime_writes_it_is_refused(models):
    stored = {"val_0": np.ascontiguousarray(values(models.base, np.float32)[f"{Q0}.weight"].T)}
    path = save_graph(
        models.folder / "graph/model.onnx", models.base, nodes=PRODUCTS[:1], stored=stored
    )
    graph = quantised(path, "int8")
    model = onnx.load(graph)
    (cast,) = [n for n in model.graph.node if n.op_type == "Cast"]
    model.graph.node.append(helper.make_node("Identity", [cast.output[0]], ["second"]))
    onnx.save(model, graph)
    rest = {"allow_missing": [D0, D1, Q1]}
    refused(models, graph, "not followed by one Mul", [models.adapters[0]], **rest)
    (quantise,) = [n for n in model.graph.node if n.op_type == "DynamicQuantizeLinear"]
    quantise.op_type = "Elsewhere"
    onnx.save(model, graph)
    refused(models, graph, "whose input comes quantised", [models.adapters[0]], **rest)


def test_weights_packed_into_a_fused_attention_have_no_place_and_a_way_out(models):
    W = values(models.base, np.float32)
    packed = np.concatenate([W[f"{Q0}.weight"], W[f"{Q1}.weight"]])
    node = helper.make_node("Attention", ["x0", "packed"], ["y0"], "attn", num_heads=1,
                            domain="com.microsoft")  # fmt: skip
    graph = save_graph(models.folder / "g/a.onnx", models.base, nodes=[node],
                       stored={"packed": np.ascontiguousarray(packed.T)})  # fmt: skip
    said = refused(models, graph, "is input 1 of a Attention node 'attn'", [models.adapters[0]],
                   allow_missing=[D0, D1])  # fmt: skip
    assert "a graph without these operators (exported without fusion)" in said


def test_every_thread_may_run_an_adapter_of_its_own(models):
    models.export(save_graph(models.folder / "graph/model.onnx", models.base))
    session, x = dora_export.AdapterSession(models.folder / "out"), models.inputs(np.float32)
    alone = {name: session.run(x, name) for name in (None, *session.adapters)}
    wrong = []

    def work(name):
        for _ in range(50):
            found = session.run(x, name)
            if any((found[n] != v).any() for n, v in alone[name].items()):
                wrong.append(name)

    threads = [threading.Thread(target=work, args=(name,)) for name in alone]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_names_are_pinned_and_the_tables_hold_the_same_values(models):
    models.export(save_graph(models.folder / "graph/model.onnx", models.base))
    out = models.folder / "out"
    facts = json.loads((out / "dora_export.json").read_text())["onnx"]
    assert set(facts["slots"]) == set(LINEARS)
    pinned = {n for slot in facts["slots"].values() for n in slot["inputs"]}
    inputs = {i.name for i in onnx.load(out / "model.onnx").graph.input}
    assert pinned == {n for n in inputs if not n.startswith("x")}
    for name, said in facts["adapters"].items():
        stored = onnxruntime.AdapterFormat.read_adapter(str(out / said["file"]))
        file = stored.get_parameters()
        table = np.load(out / said["npz"])
        assert set(file) == set(table.files) == set(said["inputs"])
        assert all((file[n].numpy() == table[n]).all() for n in file), name
    assert facts["adapters"]["formal"]["slots"] == [Q0, Q1]
    onnx.checker.check_model(str(out / "model.onnx"))


def test_files_of_any_name_are_pinned_and_a_graph_that_became_another_is_refused(
    models, monkeypatch
):
    graph = save_graph(models.folder / "graph/model.onnx", models.base, data="weights.bin")
    models.export(graph)
    out = models.folder / "out"
    facts = json.loads((out / "dora_export.json").read_text())["onnx"]
    assert facts["files"] == {n: hashlib.sha256((out / n).read_bytes()).hexdigest()
                              for n in ("model.onnx", "weights.bin")}  # fmt: skip
    assert facts["bytes"] == {n: (out / n).stat().st_size for n in facts["files"]}
    shutil.rmtree(out)
    real = swappable.with_slots

    def spoilt(change):
        def written(graph, slots, inputs, folder):
            real(graph, slots, inputs, folder)
            path = folder / "model.onnx"
            model = onnx.load(path, load_external_data=False)
            change(model.graph, folder)
            path.write_bytes(model.SerializeToString())

        return written

    def fix_rank(graph, _):
        (value,) = [i for i in graph.input if i.name == f"{Q0}.lora_A"]
        value.type.tensor_type.shape.dim[1].dim_value = 3

    for change, said in (
        (lambda g, _: g.output[0].type.tensor_type.shape.dim[0].ClearField("dim_param"),
         "'y0': its type or its axes"),
        (lambda g, _: g.initializer.remove(g.initializer[0]), "'val_0': is not as it was"),
        (fix_rank, "lora_A': its rank is not open"),
        (lambda _, f: (f / "weights.bin").write_bytes(bytes((f / "weights.bin").stat().st_size)),
         "its copy is not what it was copied from"),
        (lambda g, _: setattr(g.node[0], "op_type", "Nope"), "checker refuses the written graph"),
    ):  # fmt: skip
        monkeypatch.setattr(swappable, "with_slots", spoilt(change))
        refused(models, graph, said)


def edit_manifest(out, change):
    path = out / "dora_export.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_the_session_takes_nothing_but_what_was_published(models):
    models.export(save_graph(models.folder / "graph/model.onnx", models.base))
    out = models.folder / "out"
    session = dora_export.AdapterSession(out)
    with pytest.raises(DoraExportError, match=r"'poet': not in this folder. It has: pirate, form"):
        session.run(models.inputs(np.float32), "poet")
    whole = (out / "adapters/formal.onnx_adapter").read_bytes()
    (out / "adapters/formal.onnx_adapter").write_bytes(
        (out / "adapters/pirate.onnx_adapter").read_bytes())  # fmt: skip
    with pytest.raises(InputError, match=r"formal\.onnx_adapter: not the file that was published"):
        dora_export.AdapterSession(out)
    (out / "adapters/formal.onnx_adapter").write_bytes(whole)
    edit_manifest(out, lambda c: c["onnx"]["adapters"]["formal"].update(file="../base/x"))
    with pytest.raises(InputError, match="outside its folder"):
        dora_export.AdapterSession(out)
    edit_manifest(out, lambda c: c["onnx"].pop("slots"))
    with pytest.raises(InputError):
        dora_export.AdapterSession(out)
    with pytest.raises(InputError, match=r"dora_export\.json"):
        dora_export.AdapterSession(models.folder / "base")


@pytest.mark.parametrize("harm", ["swapped", "one bit", "cut off", "missing"])
def test_the_session_takes_no_weights_but_those_that_were_published(models, harm):
    """onnxruntime itself runs with any data file that is long enough."""
    graph = save_graph(models.folder / "graph/model.onnx", models.base, data="model.onnx.data")
    models.export(graph, models.adapters[:1])
    data = models.folder / "out/model.onnx.data"
    dora_export.AdapterSession(models.folder / "out")
    held = bytearray(data.read_bytes())
    if harm == "swapped":
        held = bytearray(np.flip(np.frombuffer(held, np.float32)).tobytes())
    elif harm == "one bit":
        held[len(held) // 2] ^= 1
    data.write_bytes(held[:-4] if harm == "cut off" else held)
    if harm == "missing":
        data.unlink()
    said = "cannot be read" if harm == "missing" else "not the file that was published"
    with pytest.raises(InputError, match=rf"model\.onnx\.data: {said}"):
        dora_export.AdapterSession(models.folder / "out")
    if harm in ("swapped", "one bit"):
        onnxruntime.InferenceSession(models.folder / "out/model.onnx")


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data", "adapter"])
def test_files_of_another_size_are_refused_unread(models, name):
    """A hole of a terabyte takes no space on the disk, and an hour to hash."""
    graph = save_graph(models.folder / "graph/model.onnx", models.base, data="model.onnx.data")
    models.export(graph, models.adapters[:1])
    (adapter,) = (models.folder / "out/adapters").glob("*.onnx_adapter")
    at = adapter if name == "adapter" else models.folder / "out" / name
    with at.open("r+b") as file:
        file.truncate(1 << 40)
    with pytest.raises(InputError, match=rf"{re.escape(at.name)}: not the file that was published"):
        dora_export.AdapterSession(models.folder / "out")


def refused(models, graph, match, adapters=None, **options):
    with pytest.raises(DoraExportError, match=match) as error:
        models.export(graph, adapters, **options)
    assert not (models.folder / "out").exists()
    return str(error.value)


def test_what_cannot_be_swapped_is_refused_by_name(models, monkeypatch):
    folder, base = models.folder, models.base
    graph = save_graph(folder / "graph/model.onnx", base)
    dora = small.adapter_tensors(base)
    saved = dora | {"base_model.model.lm_head.weight": torch.ones(40, 12)}
    small.write_adapter(folder / "whole", saved, modules_to_save=["lm_head"])
    text = refused(models, graph, "cannot be swapped at run time", [folder / "whole"])
    assert "lm_head.weight: a head of its own" in text
    assert "Leave --adapters out to merge it" in text
    with monkeypatch.context() as patched:  # and before a graph is traced for it
        patched.setattr(trace, "make", lambda *_, **__: pytest.fail("traced first"))
        refused(models, None, "cannot be swapped at run time", [folder / "whole"])
    small.write_adapter(folder / "sub/pirate", dora)
    refused(models, graph, "two adapters would be called 'pirate'",
            [folder / "pirate", folder / "sub/pirate"])  # fmt: skip
    refused(models, folder / "nothing.onnx", "cannot be read")


def test_a_weight_that_is_looked_up_or_fused_has_no_place_for_an_adapter(models):
    W = values(models.base, np.float32)
    stored = {"table": W[f"{Q0}.weight"]}
    look = [helper.make_node("Cast", ["x0"], ["ids"], to=TensorProto.INT64),
            helper.make_node("Gather", ["table", "ids"], ["y0"])]  # fmt: skip
    rest = {"allow_missing": [D0, D1, Q1]}
    graph = save_graph(models.folder / "g/a.onnx", models.base, nodes=look, stored=stored)
    refused(models, graph, "is an embedding, which is looked up", [models.adapters[0]], **rest)
    odd = [helper.make_node("Gemm", ["x0", "table"], ["y0"], transB=1, alpha=0.5)]
    graph = save_graph(models.folder / "g/b.onnx", models.base, nodes=odd, stored=stored)
    refused(models, graph, "alpha is 0.5 of the Gemm node", [models.adapters[0]], **rest)
    other = [helper.make_node("Transpose", ["x0"], ["xt"]),
             helper.make_node("MatMul", ["table", "xt"], ["y0"])]  # fmt: skip
    graph = save_graph(models.folder / "g/c.onnx", models.base, nodes=other, stored=stored)
    refused(models, graph, "is input 0 of a MatMul node", [models.adapters[0]], **rest)


def test_a_graph_that_lacks_a_layer_or_has_slots_already_is_refused(models):
    W = values(models.base, np.float32)
    part = save_graph(
        models.folder / "g/part.onnx", models.base,
        nodes=[helper.make_node("MatMul", ["x0", "w"], ["y0"])],
        stored={"w": np.ascontiguousarray(W[f"{Q0}.weight"].T)},
    )  # fmt: skip
    refused(models, part, "does not hold 3 of the 4 tensors", [models.adapters[0]])
    graph = save_graph(models.folder / "graph/model.onnx", models.base)
    models.export(graph, [models.adapters[0]])
    with pytest.raises(GraphError, match="was given slots before"):
        models.export(models.folder / "out/model.onnx", [models.adapters[0]], "again")
    assert not (models.folder / "again").exists()


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A tiny llama with two DoRA adapters made by PEFT, and its graph as torch exports it."""
    folder = tmp_path_factory.mktemp("llama")
    for seed, name in enumerate(["one", "two"]):
        pair = prepare(folder / name, rider_models.llama(), seed=seed, target_modules="all-linear")
        pair.adapter.rename(folder / "new")
        pair.base.rename(folder / "base") if seed == 0 else None
        shutil.rmtree(folder / name)
        (folder / "new").rename(folder / name)
    onnx_graphs.traced(folder / "base", folder / "graph/model.onnx")
    return folder


def test_adapters_of_a_real_model_are_held_against_its_unmerged_forward(llama, tmp_path):
    report = dora_export.export_onnx(
        llama / "base", [llama / "one", llama / "two"], tmp_path / "out",
        into=llama / "graph/model.onnx", adapters=True,
    )  # fmt: skip
    assert (report.verdict, report.exit_code) == ("right", 0)
    assert len([t for t in report.verified.tiers if t.tier == "onnx"]) == 3  # base, one, two


@pytest.mark.parametrize(("swaps", "expected"), [(True, "F32"), (False, None)])
def test_an_adapter_beside_the_weights_is_held_to_the_noise_of_the_graph(
    swaps, expected, monkeypatch
):
    """Not to the base's: a merge into bfloat16 is rounded, and here nothing is merged."""
    asked = []
    monkeypatch.setattr(named, "measure", lambda *args: asked.append(args[-2]))
    plan = SimpleNamespace(base=SimpleNamespace(config={"model_type": "llama"}))
    runner = SimpleNamespace(precision="F32", swaps=swaps)
    graph._measure(plan, None, runner, None, None, (), None, "any", 0, None, None, None)
    assert [t and t.name for t in asked] == [expected]
    coarse = SimpleNamespace(steps=[SimpleNamespace(dtype=DTYPES["BF16"], copies_bytes=False)])
    rounded = reference.precisions(coarse, DTYPES["F32"], asked[0])[1]
    assert rounded.name == ("F32" if swaps else "BF16")


@pytest.fixture(scope="module")
def swapping(llama, tmp_path_factory):
    out = tmp_path_factory.mktemp("swapping") / "out"
    dora_export.export_onnx(
        llama / "base", [llama / "one", llama / "two"], out, into=llama / "graph/model.onnx",
        adapters=True, verify=False,
    )  # fmt: skip
    return out


def test_verify_runs_a_graph_with_the_adapter_that_it_is_given(llama, swapping, tmp_path):
    """Its weights are the base's, as they should be, and nothing was rounded: float32's noise."""
    right = run("verify", llama / "base", llama / "two", swapping / "model.onnx")
    assert right.exit_code == 0, right.output
    assert "note: run with two.onnx_adapter" in right.output
    assert "of what the noise of float32 allows" in right.output
    out = shutil.copytree(swapping, tmp_path / "out")
    shutil.copy(out / "adapters/one.onnx_adapter", out / "adapters/two.onnx_adapter")
    wrong = dora_export.verify(llama / "base", llama / "two", out / "model.onnx")
    assert wrong.exit_code == 1
    assert "graph-differs" in (codes := {f.code for f in wrong.findings})
    assert "graph-stale" not in codes
    folder = run("verify", llama / "base", llama / "two", swapping)
    assert (folder.exit_code, f"pass {swapping / 'model.onnx'}" in folder.output) == (1, True)


def test_verify_says_which_adapters_a_graph_has(llama, swapping, tmp_path):
    graph = swapping / "model.onnx"
    third = shutil.copytree(llama / "one", tmp_path / "third")
    with pytest.raises(DoraExportError, match=r"one, two; none is called 'third'\. Pass one of"):
        dora_export.verify(llama / "base", third, graph)
    with pytest.raises(DoraExportError, match=r"one adapter at a time, of one, two\. Pass one"):
        dora_export.verify(llama / "base", [llama / "one", llama / "two"], graph)
    out = shutil.copytree(swapping, tmp_path / "out")
    (out / "adapters/one.onnx_adapter").write_bytes(b"none")
    unusable = dora_export.verify(llama / "base", llama / "one", out / "model.onnx")
    assert (unusable.verdict, unusable.exit_code) == ("unchecked", 3)
    (finding,) = unusable.findings
    assert (finding.code, "does not take one.onnx_adapter" in finding.what) == (
        "graph-unsupported", True)  # fmt: skip
    said = json.loads((out / "dora_export.json").read_text())
    for harm, match in (
        ({"one": {"file": "../one.onnx_adapter"}}, "outside its folder"),
        ({"one": {}}, "does not say where the graph's adapters are"),
        (None, "does not say where the graph's adapters are"),
    ):
        said["onnx"]["adapters"] = harm
        (out / "dora_export.json").write_text(json.dumps(said))
        with pytest.raises(InputError, match=match):
            dora_export.verify(llama / "base", llama / "one", out / "model.onnx")


@pytest.mark.nightly
def test_the_base_is_traced_where_no_graph_is_given(llama, tmp_path):
    report = dora_export.export_onnx(llama / "base", llama / "two", tmp_path / "out",
                                     adapters=True)  # fmt: skip
    assert report.verdict == "right"
    facts = json.loads((tmp_path / "out/dora_export.json").read_text())["onnx"]
    assert (facts["way"], facts["task"]) == ("adapters", "text-generation")
    assert dora_export.AdapterSession(tmp_path / "out").adapters == ("two",)


@pytest.mark.nightly
def test_a_base_traced_and_quantised_is_the_noise_of_its_adapters(llama, tmp_path):
    """Alone it is held to a traced graph's budget, with an adapter to what it is alone."""
    options = GraphOptions(quantize="int4", block_size=16)
    report = dora_export.export_onnx(llama / "base", llama / "two", tmp_path / "out",
                                     adapters=True, options=options)  # fmt: skip
    assert (report.verdict, report.exit_code) == ("right", 0)
    bare, active = (t.figures for t in report.verified.tiers if t.tier == "onnx")
    assert (bare["budget"], bare["noise_of_base"]) == (BUDGETS["int4"], False)
    assert (active["budget"], active["noise_of_base"]) == (None, True)
    noise = active["outputs"]["logits"]["noise"]["rms"]
    assert 0.5 < noise / bare["outputs"]["logits"]["error"]["rms"] < 2


def test_a_forgotten_factor_is_found_before_anything_is_published(llama, tmp_path, monkeypatch):
    real = swappable.swapped

    def forgetful(step, plan):
        found = real(step, plan)
        return type(found)(found.left, found.right)

    monkeypatch.setattr(swappable, "swapped", forgetful)
    with pytest.raises(ParityError):
        dora_export.export_onnx(llama / "base", [llama / "one"], tmp_path / "out",
                                into=llama / "graph/model.onnx", adapters=True)  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_command_writes_the_folder_and_says_what_is_in_it(llama, tmp_path):
    result = run("onnx", llama / "base", llama / "one", llama / "two", "--adapters",
                 "--into", llama / "graph/model.onnx", "-o", tmp_path / "out",
                 "--no-verify")  # fmt: skip
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out/adapters/one.onnx_adapter").is_file()
    assert result.stdout.splitlines()[0] == "exported by adding inputs for adapters"
    assert "one" in result.output
    assert "two" in result.output
