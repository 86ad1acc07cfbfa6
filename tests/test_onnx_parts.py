"""Models that are no plain encoder or decoder: encoder-decoders, mixtures of experts, diffusion."""

import logging
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import diffusers
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

import dora_export
from dora_export import GraphOptions
from dora_export.onnx import (
    engines,
    files,
    fuse,
    merged_decoder,
    overflow,
    quantise,
    tasks,
    unneeded,
)
from dora_export.onnx.model import GraphError
from dora_export.onnx.wrappers import Flat, Part
from dora_export.verification import inputs, noise, script, times, together
from dora_export.verification.measured import Unsupported
from dora_export.verification.runner import GraphUnusable
from tests.rider_models import WARNINGS
from tools import onnx_table

# Reasons stand beside the entries.
pytestmark = [pytest.mark.filterwarnings(w) for w in WARNINGS]


# --- encoder-decoders


def model_of(name):
    cls, config, values = onnx_table.ARCHITECTURES[name]
    torch.manual_seed(0)
    model = getattr(transformers, cls)(getattr(transformers, config)(**values)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.2)
    return model


class Overflowing(nn.Module):
    """Clamps its states where one is infinite, as BART's layers and LongT5's do in float16."""

    def __init__(self, test):
        super().__init__()
        self.test = test
        self.scale = nn.Parameter(torch.tensor(1.0, dtype=torch.float16))

    def forward(self, x):
        x = x * self.scale
        bad = not torch.isfinite(x).all() if self.test == "finite" else torch.isinf(x).any()
        if x.dtype == torch.float16 and bad:
            x = torch.clamp(x, min=-64504.0, max=64504.0)
        return x


@pytest.mark.parametrize("test", ["finite", pytest.param("infinite", marks=pytest.mark.nightly)])
def test_states_are_clamped_in_float16_where_the_model_clamps_them(test, tmp_path):
    module = Overflowing(test)
    x = torch.ones(2, 3, dtype=torch.float16)
    part = Part(Flat(module, ["x"], lambda model, values: [model(values["x"])], ["y"]), {"x": x},
                {"x": {0: "batch_size"}}, ["y"])  # fmt: skip
    files.write(engines.export(part, None, "torch"), tmp_path / "model.onnx", "data")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for row in ([1.0, -2.0, 3.0], [1.0, 65000.0, -65504.0], [1.0, np.inf, 65000.0],
                [-np.inf, 5.0, np.inf]):  # fmt: skip
        x = torch.tensor([row], dtype=torch.float16)
        (found,) = session.run(None, {"x": x.numpy()})
        assert np.array_equal(found, module(x).detach().numpy()), row
    assert found.max() == 64512  # the last one was
    module.scale.data = module.scale.data.float()
    with overflow.choices(module):  # only float16 overflows so
        assert torch.equal(module(x.float()), x.float())


def test_a_decoder_in_float16_is_traced_by_either_engine():
    """torch's asserts about sizes pass through what looks at clamped states."""
    (part,) = tasks.parts(model_of("llama").half())
    for engine in ("torch", "transformers"):
        graph = engines.export(part, None, engine).graph
        assert [v.name for v in graph.outputs] == part.outputs
        assert graph.outputs[0].dtype == ir.DataType.FLOAT16


@pytest.mark.parametrize("name", ["resnet", "vit", "whisper", "wav2vec2"])
def test_images_and_sound_are_float32_for_models_in_16_bits_too(name):
    """Some models cast them, others fail on them; a graph takes them all alike."""
    for part in tasks.parts(model_of(name).half()):
        given = {n: t for n, t in part.inputs.items() if n in tasks.MEASURED}
        assert {t.dtype for t in given.values()} <= {torch.float32}
        with torch.no_grad():
            found = part.module(*part.inputs.values())
        assert {t.dtype for t in found} == {torch.float16}


def test_a_branch_that_does_not_clamp_is_not_traced():
    module = Overflowing("finite")
    with pytest.raises(RuntimeError, match="does not clamp"), overflow.choices(module):
        bool(torch.isfinite(module.scale).all())


class InTorch:
    """A part in the place of its graph."""

    def __init__(self, part):
        self.part = part
        self.inputs = part.inputs
        self.precision = "F32"

    def run(self, values):
        given = [torch.from_numpy(values[name]) for name in self.part.inputs]
        with torch.no_grad():
            found = self.part.module(*given)
        return {n: v.numpy() for n, v in zip(self.part.outputs, found, strict=True)}


@pytest.mark.parametrize("name", ["bart", "t5", "whisper"])
def test_encoder_first_and_further_steps_are_the_whole_model(name, monkeypatch):
    model = model_of(name)
    found = tasks.parts(model)
    assert [p.graph for p in found] == [
        "encoder_model.onnx", "decoder_model.onnx", "decoder_with_past_model.onnx"]  # fmt: skip
    by_name = {part.graph: part for part in found}
    monkeypatch.setattr(together, "OnnxRuntime", lambda name: InTorch(by_name[name]))
    run = together.Together(*by_name)
    (whole,) = tasks.parts(model, whole=True)
    ids = torch.randint(3, 90, (2, 6)).numpy()
    values = {n: t.numpy() for n, t in whole.inputs.items()} | {"decoder_input_ids": ids}
    if "attention_mask" in values:
        values["attention_mask"][1, 5:] = 0
    with torch.no_grad():
        given = {n: torch.from_numpy(v) for n, v in values.items()}
        expected = model(**given, use_cache=False)
    got = run.run(values)
    assert set(got) == set(run.outputs) == set(found[0].compared)
    scale = np.abs(expected.logits.numpy()).max()
    assert np.abs(got["logits"] - expected.logits.numpy()).max() < 1e-5 * scale
    states = expected.encoder_last_hidden_state.numpy()
    assert np.abs(got["encoder_last_hidden_state"] - states).max() < 1e-5

    def forgetful(values):  # the cache does matter
        return {n: 0 * v if "decoder" in n else v for n, v in InTorch(found[2]).run(values).items()}

    run._further.run = forgetful
    assert np.abs(run.run(values)["logits"] - expected.logits.numpy()).max() > 1e-3 * scale


def test_names_of_an_encoder_decoder_are_those_that_ortmodel_classes_look_for():
    first, further = tasks.parts(model_of("bart"))[1:]
    assert list(first.inputs) == ["input_ids", "encoder_attention_mask", "encoder_hidden_states"]
    kinds = [f"{side}.{k}" for side in ("decoder", "encoder") for k in ("key", "value")]
    assert first.outputs == ["logits", *(f"present.{i}.{k}" for i in range(2) for k in kinds)]
    assert list(further.inputs)[2:] == [
        f"past_key_values.{i}.{k}" for i in range(2) for k in kinds]  # fmt: skip
    assert further.outputs == ["logits", *(f"present.{i}.{k}" for i in range(2) for k in kinds[:2])]
    assert further.axes["past_key_values.0.decoder.key"][2] == "past_decoder_sequence_length"


WIDE, WORDS = 16, 20  # matrices of a kilobyte and more are weights


def save_decoders(folder, suffix="", *, opset=20):
    """A decoder of one layer without and with a cache, and an encoder; all of one set of weights.

    Logits are those of a token's embedding, of the mean of its own keys, and of the source's.
    """
    make = np.random.default_rng(0)
    held = {n: make.standard_normal(shape).astype(np.float32)
            for n, shape in (("embedding", (WORDS, WIDE)), ("own", (WIDE, WIDE)),
                             ("source", (WIDE, WIDE)), ("head", (WIDE, WORDS)))}  # fmt: skip
    node, info = onnx.helper.make_node, onnx.helper.make_tensor_value_info
    states = info("encoder_hidden_states", 1, ["batch_size", "encoder_sequence_length", WIDE])
    past = [info(f"past_key_values.0.{side}.key", 1, ["batch_size", 1, f"{side}_length", WIDE])
            for side in ("decoder", "encoder")]  # fmt: skip
    own, source = "present.0.decoder.key", "present.0.encoder.key"
    start = [node("Gather", ["embedding", "input_ids"], ["x"]),
             node("MatMul", ["x", "own"], ["k"]),
             node("Unsqueeze", ["k", "one"], ["new"])]  # fmt: skip
    end = [node("ReduceMean", ["own_keys", "two"], ["own_mean"], keepdims=0),
           node("ReduceMean", ["source_keys", "two"], ["source_mean"], keepdims=0),
           node("Add", ["x", "own_mean"], ["y"]), node("Add", ["y", "source_mean"], ["z"]),
           node("MatMul", ["z", "head"], ["logits"])]  # fmt: skip
    first = [*start, node("MatMul", ["encoder_hidden_states", "source"], ["sk"]),
             node("Unsqueeze", ["sk", "one"], [source]), node("Identity", ["new"], [own]),
             node("Identity", ["new"], ["own_keys"]), node("Identity", [source], ["source_keys"]),
             *end]  # fmt: skip
    further = [*start, node("Concat", [past[0].name, "new"], [own], axis=2),
               node("Identity", [own], ["own_keys"]),
               node("Identity", [past[1].name], ["source_keys"]), *end]  # fmt: skip
    paths = []
    for name, nodes, others, outputs in (
        (together.ENCODER, [node("Gather", ["embedding", "input_ids"], ["last_hidden_state"])],
         [], ["last_hidden_state"]),
        (together.FIRST, first, [states], ["logits", own, source]),
        (together.FURTHER, further, past, ["logits", own]),
    ):  # fmt: skip
        used = {i for n in nodes for i in n.input}
        constants = {"one": np.array([1]), "two": np.array([2])}
        if nodes is further:  # as an exporter that folds the same weight in names it
            held["val_7"] = held.pop("own")
            nodes = [type(n).FromString(n.SerializeToString()) for n in nodes]
            nodes[1].input[1] = "val_7"
            used.add("val_7")
        ids = info("input_ids", 7, ["batch_size", "decoder_sequence_length"])
        graph = onnx.helper.make_graph(
            nodes, name, [ids, *others],
            [info(o, 1, ["batch_size", *((1, "n", WIDE) if "." in o else ("n", None))])
             for o in outputs],
            [onnx.numpy_helper.from_array(v, n) for n, v in {**held, **constants}.items()
             if n in used],
        )  # fmt: skip
        imports = [onnx.helper.make_opsetid("", opset if nodes is first else 20)]
        paths.append(folder / f"{name.removesuffix('.onnx')}{suffix}.onnx")
        onnx.save(onnx.helper.make_model(graph, opset_imports=imports, ir_version=10), paths[-1])
    return paths


def test_two_decoders_in_one_graph_compute_what_each_does_with_one_copy_of_the_weights(tmp_path):
    encoder, first, further = save_decoders(tmp_path)
    path = tmp_path / together.MERGED
    files.write(merged_decoder.merged(first, further), path, "model.onnx_data")  # and checks it
    graph = onnx.load(path).graph
    assert [i.name for i in graph.input] == [
        "input_ids", "encoder_hidden_states", "past_key_values.0.decoder.key",
        "past_key_values.0.encoder.key", "use_cache_branch"]  # fmt: skip
    assert [o.name for o in graph.output] == [
        "logits", "present.0.decoder.key", "present.0.encoder.key"]  # fmt: skip
    assert sorted(t.name for t in graph.initializer) == ["embedding", "head", "own", "source"]
    assert path.stat().st_size < first.stat().st_size + 4096
    make = np.random.default_rng(1)
    states = make.standard_normal((2, 5, WIDE)).astype(np.float32)
    ids = make.integers(0, WORDS, (2, 7))
    one, other, both = (onnxruntime.InferenceSession(p) for p in (first, further, path))
    start = one.run(None, {"input_ids": ids[:, :4], "encoder_hidden_states": states})
    none = np.zeros((2, 1, 0, WIDE), np.float32)
    feeds = {"encoder_hidden_states": states, "past_key_values.0.decoder.key": none,
             "past_key_values.0.encoder.key": none}  # fmt: skip
    found = both.run(None, {**feeds, "input_ids": ids[:, :4], "use_cache_branch": [False]})
    for a, b in zip(found, start, strict=True):
        np.testing.assert_array_equal(a, b)
    cache = {"past_key_values.0.decoder.key": start[1], "past_key_values.0.encoder.key": start[2]}
    rest = other.run(None, {"input_ids": ids[:, 4:], **cache})
    found = both.run(None, {**feeds, **cache, "input_ids": ids[:, 4:], "use_cache_branch": [True]})
    for a, b in zip(found[:2], rest, strict=True):
        np.testing.assert_array_equal(a, b)
    assert found[2].shape[0] == 0  # the source's keys are as they were, and not given again
    assert np.abs(found[0]).max() > 1
    # run together, one graph and two are the same model
    values = {"input_ids": ids, "decoder_input_ids": ids[:, ::-1]}
    expected, got = (together.Together(encoder, *p).run(values)
                     for p in ((first, further), (path,)))  # fmt: skip
    np.testing.assert_array_equal(got["logits"], expected["logits"])
    assert set(together.opened(path).outputs) == set(got)


def test_decoders_that_do_not_go_together_are_refused(tmp_path):
    _, first, further = save_decoders(tmp_path, opset=21)
    with pytest.raises(GraphError, match=r"different operator sets.*Pass one --opset"):
        merged_decoder.merged(first, further)


def test_graphs_of_an_encoder_decoder_are_found_by_their_names(tmp_path):
    found = save_decoders(tmp_path, "_fp16")
    for path in found:
        assert together.graphs_of(path) == tuple(found)
    both = tmp_path / "decoder_model_merged_fp16.onnx"
    both.write_bytes(found[1].read_bytes())
    assert together.graphs_of(both) == (found[0], both)
    with pytest.raises(GraphUnusable, match="has no input 'use_cache_branch'"):
        together.opened(both)
    found[1].unlink()
    assert together.graphs_of(found[0]) == (found[0], both)
    with pytest.raises(GraphUnusable, match=r"run together with 'decoder_model_fp16\.onnx'"):
        together.graphs_of(found[2])
    found[0].unlink()
    with pytest.raises(GraphUnusable, match=r"run together with 'encoder_model_fp16\.onnx'"):
        together.graphs_of(found[2])
    alone = tmp_path / "model.onnx"
    assert together.graphs_of(alone) == (alone,)


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["bart", "t5", "whisper"])
def test_decoders_in_one_graph_are_published_and_verified_by_any_of_the_graphs(name, tmp_path):
    onnx_table.make_pair(name, tmp_path)
    report = dora_export.export_onnx(
        tmp_path / "base", tmp_path / "adapter", tmp_path / "out",
        options=GraphOptions(layout="transformers-js"),
    )  # fmt: skip
    assert report.verdict == "right"
    names = ("onnx/encoder_model.onnx", "onnx/decoder_model_merged.onnx")
    assert report.graphs == names
    assert {n for n in report.files if n.startswith("onnx/")} == set(names)
    for graph in names:
        assert dora_export.verify(tmp_path / "base", tmp_path / "adapter",
                                  tmp_path / "out" / graph).verdict == "right"  # fmt: skip
    make = torch.Generator().manual_seed(5)
    path = tmp_path / "adapter/adapter_model.safetensors"
    other = {n: t * (1 + torch.rand(t.shape, generator=make)) for n, t in load_file(path).items()}
    save_file(other, path, {"format": "pt"})
    report = dora_export.verify(tmp_path / "base", tmp_path / "adapter",
                                tmp_path / "out" / names[1])  # fmt: skip
    assert report.verdict == "wrong"


def test_a_graph_of_one_sequence_takes_its_mask_all_the_same():
    """A library that makes its own mask of ones for a single sequence leaves the input out."""
    (part,) = tasks.parts(model_of("llama"), 1)
    assert part.inputs["attention_mask"].shape == (1, 9)
    assert part.axes["attention_mask"] == {1: "total_sequence_length"}
    assert "batch_size" not in {a for axes in part.axes.values() for a in axes.values()}


# --- mixtures of experts


def test_experts_are_computed_as_each_engine_can_write_them_down(monkeypatch):
    class Mixture(nn.Module):
        asked = ()

        def _can_set_experts_implementation(self):
            return True

        def set_experts_implementation(self, name):
            self.asked += (name,)

    def fail(part, opset):
        raise RuntimeError("cannot")

    model = Mixture()
    part = Part(Flat(model, ["x"], lambda m, v: [v["x"]], ["y"]), {"x": torch.ones(2)}, {}, ["y"])
    monkeypatch.setattr(engines, "_by_torch", fail)
    monkeypatch.setattr(engines, "_by_transformers", fail)
    with pytest.raises(engines.GraphError) as raised:
        engines.traced(part, None, "auto")
    assert model.asked == ("grouped_mm", "batched_mm")
    reasons = str(raised.value)
    assert reasons.index("engine transformers") < reasons.index("engine torch")


def test_stacked_experts_are_within_reach_of_quantisers(tmp_path):
    stack = np.random.default_rng(0).standard_normal((3, 32, 16)).astype(np.float32)
    x = ir.Value(name="x", shape=ir.Shape([1, 32]), type=ir.TensorType(ir.DataType.FLOAT))
    held = ir.Value(name="experts", const_value=ir.tensor(stack, name="experts"))
    held.shape, held.dtype = ir.Shape([3, 32, 16]), ir.DataType.FLOAT
    axes = ir.Value(name="axes", const_value=ir.tensor([0], name="axes"))
    split = ir.node("Split", [held], attributes={"axis": 0, "num_outputs": 3}, num_outputs=3)
    nodes = [split]
    for output in split.outputs:
        nodes.append(ir.node("Squeeze", [output, axes]))
        nodes.append(ir.node("MatMul", [x, nodes[-1].outputs[0]]))
    outputs = [n.outputs[0] for n in nodes if n.op_type == "MatMul"]
    graph = ir.Graph([x], outputs, nodes=nodes, initializers=[held, axes],
                     opset_imports={"": 20})  # fmt: skip
    quantise.reachable(ir.Model(graph, ir_version=10))
    assert [n.op_type for n in graph] == ["MatMul"] * 3
    for index, node in enumerate(graph):
        assert node.inputs[1].name == f"experts.{index}"
        assert np.array_equal(node.inputs[1].const_value.numpy(), stack[index])
    assert set(graph.initializers) == {"experts.0", "experts.1", "experts.2"}


@pytest.mark.parametrize(("scaled", "reached"), [({}, True), ({"alpha": 2.0}, False)], ids=str)
def test_a_tied_head_that_was_fused_is_within_reach_of_quantisers(scaled, reached):
    """``--fuse`` leaves FusedMatMul where an exporter turned the embedding."""
    weight = np.random.default_rng(0).standard_normal((64, 32)).astype(np.float32)
    x = ir.Value(name="x", shape=ir.Shape([1, 32]), type=ir.TensorType(ir.DataType.FLOAT))
    tied = ir.Value(name="lm_head.weight", const_value=ir.tensor(weight, name="lm_head.weight"))
    tied.shape, tied.dtype = ir.Shape([64, 32]), ir.DataType.FLOAT
    product = ir.node("FusedMatMul", [x, tied], attributes={"transB": 1, **scaled},
                      domain="com.microsoft")  # fmt: skip
    graph = ir.Graph([x], product.outputs, nodes=[product], initializers=[tied],
                     opset_imports={"": 20, "com.microsoft": 1})  # fmt: skip
    quantise.reachable(ir.Model(graph, ir_version=10))
    (node,) = graph
    assert (node.op_type, node.domain) == (
        ("MatMul", "") if reached else ("FusedMatMul", "com.microsoft")
    )
    held = node.inputs[1].const_value.numpy()
    assert np.array_equal(held, weight.T if reached else weight)
    assert not node.attributes or not reached


def save_product(weight, path):
    """A graph of one matrix product."""
    x = ir.Value(name="x", shape=ir.Shape(["n", 64]), type=ir.TensorType(ir.DataType.FLOAT))
    held = ir.Value(name="w", const_value=ir.tensor(weight, name="w"))
    held.shape, held.dtype = ir.Shape([64, 32]), ir.DataType.FLOAT
    node = ir.node("MatMul", [x, held], name="product")
    node.outputs[0].name = "y"
    node.outputs[0].dtype, node.outputs[0].shape = ir.DataType.FLOAT, ir.Shape(["n", 32])
    graph = ir.Graph([x], node.outputs, nodes=[node], initializers=[held],
                     opset_imports={"": 20})  # fmt: skip
    ir.save(ir.Model(graph, ir_version=10), path)


@pytest.mark.parametrize("method", ["int8", "int4"])
def test_quantising_writes_beside_the_graph_and_nowhere_else(method, tmp_path, monkeypatch):
    """The system's folder for temporary files may have no room for a model, and is no output."""
    save_product(np.ones((64, 32), np.float32), tmp_path / "m.onnx")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "not there"))
    options = GraphOptions(quantize=method)
    quantise.quantise(tmp_path / "m.onnx", tmp_path / "q.onnx", "q.data", options)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", "q.onnx"]


def test_threads_quantise_each_in_its_own_folder_and_leave_others_theirs(tmp_path, monkeypatch):
    """Two exports in one process: what onnxruntime keeps, and logging's levels, are everybody's."""
    from onnxruntime.quantization import quant_utils

    real = quantise._dynamic
    inside, beside = threading.Event(), tmp_path / "system"
    beside.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(beside))
    made, before = {}, (quant_utils.tempfile, logging.root.manager.disable)
    folders = [tmp_path / name for name in ("one", "two")]

    def slow(source, target, data):
        first = not inside.is_set()
        inside.set()
        if first:  # another thread, not of this program, quantises; the second export has begun
            with ThreadPoolExecutor(1) as pool:
                pool.submit(note, "outside").result()
            begun.wait(0.2)
        else:
            ended.wait(1)
        note(target.parent.name)
        return real(source, target, data)

    def note(who):
        with quant_utils.tempfile.TemporaryDirectory(prefix="ort.quant.") as made_here:
            made[who] = Path(made_here).parent

    def export(folder):
        if folder is folders[1]:
            inside.wait(10)
            threading.Timer(0.05, begun.set).start()
        folder.mkdir()
        save_product(np.ones((64, 32), np.float32), folder / "m.onnx")
        options = GraphOptions(quantize="int8")
        found = quantise.quantise(folder / "m.onnx", folder / "q.onnx", "q.data", options)
        ended.set()
        return found

    begun, ended = threading.Event(), threading.Event()
    monkeypatch.setattr(quantise, "_dynamic", slow)
    with ThreadPoolExecutor(2) as pool:
        assert [found["nodes"] for found in pool.map(export, folders)] == [1, 1]
    assert made == {"one": folders[0], "two": folders[1], "outside": beside}
    assert (quant_utils.tempfile, logging.root.manager.disable) == before


def test_threads_that_trace_leave_logging_as_it_was():
    one, levels = logging.getLogger("torch.onnx"), []
    before = one.level
    within = threading.Event()

    def first():
        with engines.quiet():
            within.set()
            left.wait(0.2)

    def second():
        within.wait(10)
        with engines.quiet():
            left.set()
            time.sleep(0.05)
            levels.append(one.level)

    left = threading.Event()
    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(first), pool.submit(second)]:
            done.result()
    assert levels == [logging.ERROR]
    assert one.level == before


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("attributes", "split"), [
    ({}, True), ({"transB": 1}, True), ({"alpha": 2.0}, False), ({"transA": 1}, False),
])  # fmt: skip
def test_a_gemm_that_only_multiplies_and_adds_is_quantised_too(attributes, split, bias, tmp_path):
    """GPT-2's layers are such; int4's quantiser sees ``MatMul`` alone."""
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    make = np.random.default_rng(0)
    weight = make.normal(size=(32, 64)).astype(np.float32)
    stored = {"w": weight.T if attributes.get("transB") else weight}
    if bias:
        stored["b"] = make.normal(size=64).astype(np.float32)
    shape = (32, 5) if attributes.get("transA") else (5, 32)
    node = helper.make_node("Gemm", ["x", *stored], ["y"], name="gemm", **attributes)
    graph = helper.make_graph(
        [node], "g", [helper.make_tensor_value_info("x", kind, shape)],
        [helper.make_tensor_value_info("y", kind, (5, 64))],
        [onnx.numpy_helper.from_array(np.ascontiguousarray(v), n) for n, v in stored.items()],
    )  # fmt: skip
    opset = helper.make_opsetid("", 20)
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=10), tmp_path / "a.onnx")
    model = ir.load(tmp_path / "a.onnx")
    quantise.reachable(model)
    ir.save(model, tmp_path / "b.onnx")
    assert ("Gemm" not in {n.op_type for n in model.graph}) == split
    x = {"x": make.normal(size=shape).astype(np.float32)}
    before, after = (onnxruntime.InferenceSession(tmp_path / n).run(None, x)[0]
                     for n in ("a.onnx", "b.onnx"))  # fmt: skip
    assert np.abs(before - after).max() < 1e-5
    options = GraphOptions(quantize="int4", symmetric=False)
    if not split:
        with pytest.raises(GraphError, match="no matrix product"):
            quantise.quantise(tmp_path / "b.onnx", tmp_path / "c.onnx", "c.data", options)
        return
    assert (
        quantise.quantise(tmp_path / "b.onnx", tmp_path / "c.onnx", "c.data", options)["nodes"] == 1
    )
    (few,) = onnxruntime.InferenceSession(tmp_path / "c.onnx").run(None, x)
    assert 1e-3 < np.abs(few - before).max() < 0.2 * np.abs(before).max()


def test_int8_weights_are_unsigned_since_signed_ones_overflow_without_vnni(tmp_path):
    """Large activations and weights of one sign: with signed weights AVX2 gives half of it."""
    make = np.random.default_rng(0)
    weight = make.uniform(0.8, 1, size=(64, 32)).astype(np.float32)
    save_product(weight, tmp_path / "m.onnx")
    quantise.quantise(
        tmp_path / "m.onnx", tmp_path / "q.onnx", "q.data", GraphOptions(quantize="int8")
    )
    stored = {t.name: t.data_type for t in onnx.load(tmp_path / "q.onnx").graph.initializer}
    assert stored["w_quantized"] == onnx.TensorProto.UINT8
    given = make.uniform(0.9, 1, size=(3, 64)).astype(np.float32)
    (found,) = onnxruntime.InferenceSession(tmp_path / "q.onnx").run(None, {"x": given})
    expected = given @ weight
    assert np.abs(found - expected).max() < 0.02 * expected.max()


def test_an_operator_of_onnxruntimes_own_passes_the_checker_and_a_wrong_one_does_not(tmp_path):
    """Fused graphs hold RMS norms under ONNX's own domain, where only onnxruntime knows them."""
    for name in ("SimplifiedLayerNormalization", "NoSuchNormalization"):
        x = ir.Value(name="x", shape=ir.Shape(["n", 8]), type=ir.TensorType(ir.DataType.FLOAT))
        held = ir.Value(name="w", const_value=ir.tensor(np.ones(8, np.float32), name="w"))
        held.shape, held.dtype = ir.Shape([8]), ir.DataType.FLOAT
        node = ir.node(name, [x, held], attributes={"axis": -1, "epsilon": 1e-6})
        node.outputs[0].name, node.outputs[0].dtype = "y", ir.DataType.FLOAT
        node.outputs[0].shape = ir.Shape(["n", 8])
        graph = ir.Graph([x], node.outputs, nodes=[node], initializers=[held],
                         name="g", opset_imports={"": 20})  # fmt: skip
        path = tmp_path / f"{name}.onnx"
        if name == "NoSuchNormalization":
            with pytest.raises(GraphError, match="NoSuchNormalization"):
                files.write(ir.Model(graph, ir_version=10), path, "data")
            continue
        files.write(ir.Model(graph, ir_version=10), path, "data")
        assert [p.name for p in tmp_path.iterdir()] == [path.name]
        given = np.arange(8, dtype=np.float32)[None]
        (found,) = onnxruntime.InferenceSession(path).run(None, {"x": given})
        assert np.abs(found - given / np.sqrt((given**2).mean())).max() < 1e-5


# --- diffusion


def diffusion_model(name, **changed):
    cls, _, values = onnx_table.ARCHITECTURES[name]
    return getattr(diffusers, cls)(**{**values, **changed}).eval()


@pytest.mark.parametrize(
    ("name", "main", "compared"),
    [("sd, unet", "sample", (10, 16)), ("sdxl, unet", "sample", (10, 16)),
     ("sd3", "hidden_states", (10, 16)), ("pixart", "hidden_states", (10, 16)),
     ("auraflow", "hidden_states", (10, 16)), ("sana", "hidden_states", (9, 16))],
)  # fmt: skip
def test_height_and_width_vary_in_steps_of_halvings_or_patches(name, main, compared):
    model = diffusion_model(name)
    (part,) = tasks.parts(model)
    assert part.axes[main] == {0: "batch_size", 2: "height", 3: "width"}
    step = 1 if name == "sana" else 2
    assert part.steps == ({} if step == 1 else {"height": 2, "width": 2})
    assert part.facts.get("multiples", {}) == part.steps
    most = {"height": 18, "width": 18} if name in ("sd3", "auraflow") else None
    assert part.facts.get("at_most") == most
    assert (part.facts.get("fixed_axes"), part.notes) == (None, ())
    # Equal sizes are taken for the same, and at the config's a table may be read.
    assert part.inputs[main].shape[2:] == (8 + step, 8 - step)
    batches = inputs.batches(model, None, ())
    assert {b.values[main].shape[2:] for b in batches} == {(8, 8), compared}


@pytest.mark.parametrize(("name", "changed", "why"), [
    ("sd, unet", {"sample_size": 9}, "sample_size is no multiple of 2"),  # of whole steps
    ("sd3", {"sample_size": 4, "pos_embed_max_size": 2}, "places for sizes up to 4 alone"),
    ("auraflow", {"sample_size": 4, "pos_embed_max_size": 4}, "places for sizes up to 4 alone"),
    ("pixart", {}, "places patches at other sizes is not known"),
])  # fmt: skip
def test_sizes_that_a_model_forbids_are_fixed_and_named(name, changed, why):
    model = diffusion_model(name, **changed)
    if name == "pixart":  # patches that another library places
        model.pos_embed = type("Patches", (type(model.pos_embed),), {})(4, 4, 2, 4, 48)
    (part,) = tasks.parts(model)
    main = next(iter(part.inputs))
    assert set(part.axes[main]) == {0}
    assert part.steps == {}
    side = part.inputs[main].shape[2]
    assert part.facts == {"fixed_axes": {main: {"height": side, "width": side}}}
    assert part.notes[0].startswith(f"the graph takes '{main}' of height {side} and width {side} ")
    assert why in part.notes[0]
    assert len(inputs.batches(model, None, ())) == 2


def test_sizes_of_images_and_sound_that_are_fixed_are_named():
    for name, axes in (
        ("vit", {"pixel_values": {"height": 16, "width": 16}}),
        ("siglip, vision", {"pixel_values": {"height": 16, "width": 16}}),
    ):
        (part,) = tasks.parts(model_of(name))
        assert part.facts["fixed_axes"] == axes
        assert len(part.notes) == 1


@pytest.mark.parametrize("whole", [False, True])
def test_frames_of_sound_that_an_encoder_takes_are_named(whole):
    model = model_of("whisper")
    frames = 2 * model.config.max_source_positions
    first, *others = tasks.parts(model, whole=whole)
    assert first.inputs["input_features"].shape[2] == frames
    assert first.facts["fixed_axes"] == {"input_features": {"frames": frames}}
    assert f"of frames {frames} alone" in first.notes[0]
    assert len(others) == (0 if whole else 2)
    assert not any("fixed_axes" in p.facts for p in (*others, *tasks.parts(model_of("t5"))))


@pytest.mark.parametrize(
    ("name", "words"), [("clip", 97), ("bert", 97), ("whisper", 97), ("t5", 97)]
)
def test_tokens_are_counted_by_the_embedding_of_the_text(name, words):
    model = model_of(name)
    model.config.vocab_size = 5  # what says less than the weights do
    assert inputs.vocabulary(model) == words


def test_a_model_that_names_no_embedding_of_tokens_is_refused_by_name():
    model = model_of("clip")
    del model.text_model
    with pytest.raises(Unsupported, match="unknown number"):
        inputs.vocabulary(model)
    with pytest.raises(GraphError, match=r"CLIPModel.*unknown number.*export_module\(\)"):
        tasks.parts(model)


def test_a_model_whose_conditions_cannot_be_made_up_is_refused_by_name():
    model = diffusers.HunyuanDiT2DModel(
        num_attention_heads=4, attention_head_dim=8, in_channels=4, patch_size=2, sample_size=8,
        hidden_size=32, num_layers=2, cross_attention_dim=24, cross_attention_dim_t5=16,
        pooled_projection_dim=20, text_len=7, text_len_t5=5,
    )  # fmt: skip
    with pytest.raises(GraphError, match=r"HunyuanDiT2DModel.*_t5.*export_module\(\)"):
        tasks.parts(model)


@pytest.mark.parametrize("most", [None, 8, 10, 16, 40])
@pytest.mark.parametrize("base", [(2, 2), (4, 4), (8, 8), (8, 6)])
def test_sizes_to_trace_and_to_compare_are_allowed_ones(base, most):
    sizes = noise.Sides(base, 2, most)
    assert sizes.vary == (most is None or most >= 8)
    traced, other = sizes.traced(), sizes.other()
    assert traced[0] != traced[1]
    for found in (traced, other):
        assert all(a != b for a, b in zip(found, base, strict=True))
    assert all(n % 2 == 0 and 4 <= n <= (most or n) for n in (*traced, *other))


def test_conditions_are_where_the_models_have_them():
    """The reference for their widths is the model, which runs on no others."""
    sdxl, pixart = diffusion_model("sdxl, unet"), diffusion_model("pixart")
    for model, names in ((sdxl, {"text_embeds", "time_ids"}),
                         (pixart, {"resolution", "aspect_ratio"})):  # fmt: skip
        (part,) = tasks.parts(model)
        assert names <= set(part.inputs)
        (added,) = (noise.arguments(part.inputs)[noise.ADDED],)
        assert set(added) == names
        given = {n: t for n, t in part.inputs.items() if n not in names}
        with torch.no_grad():
            expected = model(**given, added_cond_kwargs=added).sample
            changed = {n: t * 1.5 for n, t in added.items()}
            other = model(**given, added_cond_kwargs=changed).sample
            (found,) = part.module(*part.inputs.values())
        assert torch.equal(found, expected)
        assert not torch.allclose(found, other)
    (part,) = tasks.parts(pixart)
    assert 0 < part.inputs["encoder_attention_mask"].sum() < 14
    refiner = diffusion_model(
        "sdxl, unet", addition_time_embed_dim=256, projection_class_embeddings_input_dim=2560
    )
    (part,) = tasks.parts(refiner)
    assert [part.inputs[n].shape[1] for n in ("text_embeds", "time_ids")] == [1280, 5]


class Cropped(nn.Module):
    """Crops a table to the size of what it is given, as transformers of images do."""

    def __init__(self, rows):
        super().__init__()
        self.register_buffer("table", torch.randn(1, rows, 3))

    def forward(self, x):
        high = x.shape[2] // 2
        top = self.table.shape[1] // 2 + -high // 2  # as torch writes (rows - high) // 2
        return (x[:, 0, ::2] + self.table[:, top : top + high]).squeeze(1)


def test_crops_and_squeezes_are_torchs_at_every_size(tmp_path):
    rows = 8
    module = Cropped(rows)
    x = torch.randn(2, 1, 8, 3)
    part = Part(Flat(module, ["x"], lambda model, values: [model(values["x"])], ["y"]), {"x": x},
                {"x": {0: "batch_size", 2: "height"}}, ["y"], steps={"height": 2})  # fmt: skip
    model = engines.export(part, None, "torch")
    files.write(model, tmp_path / "model.onnx", "data")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for high in range(2, 2 * rows + 1, 2):
        x = torch.randn(2, 1, high, 3)
        (found,) = session.run(None, {"x": x.numpy()})
        assert np.array_equal(found.reshape(-1), module(x).numpy().reshape(-1)), high


class Guarded(nn.Module):
    """Numbers that change little and matter: one keeps 0 / 0 away, one scales by 1 + 5e-6."""

    def forward(self, x):
        return x * 1.000005, x / (x.abs() + 1e-15)


@pytest.mark.parametrize("fused", [False, True])
def test_numbers_that_change_little_stay_in_the_graph(fused, tmp_path):
    """onnxscript's optimiser, which fusing runs once more, takes them for 1 and 0."""
    part = Part(
        Flat(Guarded(), ["x"], lambda m, v: m(v["x"]), ["a", "b"]), {"x": torch.ones(3)},
        {"x": {0: "n"}}, ["a", "b"],
    )  # fmt: skip
    model = engines.export(part, None, "torch")
    if fused:
        fuse.fuse(model, "cpu")
    ir.save(model, tmp_path / "m.onnx")
    given = np.array([0, 0, 1, 4], np.float32)
    scaled, divided = onnxruntime.InferenceSession(tmp_path / "m.onnx").run(None, {"x": given})
    assert np.array_equal(scaled, given * np.float32(1.000005))
    assert scaled[2] > 1.000004
    assert np.array_equal(divided, [0, 0, 1, 1])


class Mixed(nn.Module):
    """Joins a text in half precision with sizes in float32, as SDXL's UNet does."""

    def forward(self, text, sizes):
        return torch.cat([text, sizes], -1).to(text.dtype)


def test_tensors_of_two_types_are_joined_in_the_wider_one(tmp_path):
    module = Mixed()
    text, sizes = torch.randn(2, 3).half(), 1000 * torch.rand(2, 4)
    axes = {"text": {0: "batch_size"}, "sizes": {0: "batch_size"}}
    part = Part(
        Flat(module, ["text", "sizes"], lambda m, v: [m(v["text"], v["sizes"])], ["y"]),
        {"text": text, "sizes": sizes}, axes, ["y"],
    )  # fmt: skip
    ir.save(engines.export(part, None, "torch"), tmp_path / "m.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    (found,) = session.run(None, {"text": text.numpy(), "sizes": sizes.numpy()})
    assert np.array_equal(found, module(text, sizes).numpy())


class Sideways(nn.Module):
    """A product of states whose batch comes second, as in ``nn.MultiheadAttention``."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 5))

    def forward(self, x):
        queries, keys = self.weight.split([2, 4])
        return torch.cat([x.transpose(0, 1) @ queries.T, x.exp().transpose(0, 1) @ keys.T], -1)


def test_a_batch_that_comes_second_is_turned_before_a_fused_product(tmp_path):
    """onnxruntime fails where FusedMatMul is to turn the batch of one operand of two ranks."""
    module = Sideways().eval()
    part = Part(
        Flat(module, ["x"], lambda m, v: [m(v["x"])], ["y"]), {"x": torch.randn(2, 4, 5)},
        {"x": {0: "batch_size"}}, ["y"],
    )  # fmt: skip
    model = engines.export(part, None, "torch")
    fuse.fuse(model, "cpu")
    assert "FusedMatMul" in {node.op_type for node in model.graph}
    ir.save(model, tmp_path / "m.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    x = torch.randn(3, 4, 5)
    (found,) = session.run(None, {"x": x.numpy()})
    assert np.abs(found - module(x).detach().numpy()).max() < 1e-5


def test_an_axis_of_multiples_keeps_its_name_in_the_graph():
    """Both exporters write it as a product; what is half as high keeps their symbol."""
    x, y = (ir.Value(name=n, type=ir.TensorType(ir.DataType.FLOAT)) for n in "xy")
    x.shape = ir.Shape(["s1", "2*s29"])
    half, full = (ir.node("Identity", [v]) for v in (x, y))
    half.outputs[0].shape, full.outputs[0].shape = ir.Shape(["s1", "s29"]), x.shape
    full.replace_input_with(0, half.outputs[0])
    graph = ir.Graph([x], [full.outputs[0]], nodes=[half, full], opset_imports={"": 20})
    part = Part(nn.Identity(), {"x": torch.ones(2, 8)}, {"x": {0: "batch_size", 1: "height"}},
                ["y"], steps={"height": 2})  # fmt: skip
    engines._name(graph, part)
    shapes = [[d if isinstance(d, int) else d.value for d in v.shape]
              for v in (graph.inputs[0], half.outputs[0], graph.outputs[0])]  # fmt: skip
    assert shapes == [["batch_size", "height"], ["batch_size", "s29"], ["batch_size", "height"]]
    told = [engines._multiple(n, part.steps, n) for n in ("height", "batch_size")]
    assert (str(told[0]), told[1]) == ("2*height_steps", "batch_size") or "Derived" in str(told[0])


def test_noise_is_made_up_for_unets_and_for_transformers_of_patches():
    for name, main in (("sd, unet", "sample"), ("flux", "hidden_states")):
        cls, _, values = onnx_table.ARCHITECTURES[name]
        model = getattr(diffusers, cls)(**values).eval()
        batches = inputs.batches(model, None, [])
        assert [len(b.values["timestep"]) for b in batches] == [3, 1, 2][: 3 if main == "sample"
                                                                         else 2]  # fmt: skip
        (part,) = tasks.parts(model)
        assert set(part.inputs) == set(batches[0].values)
        assert part.axes[main][0] == "batch_size"
        assert part.outputs == ["out_sample" if main == "sample" else "sample"]
        for batch in batches:  # other sizes than those that are traced
            with torch.no_grad():
                given = [batch.values[n] for n in part.inputs]
                assert len(part.module(*given)[0]) == len(batch.values[main])
    assert script.output_name("logits", ["sample"]) == "logits"


def test_times_are_rounded_as_another_implementation_may_round_them():
    class Timesteps(nn.Module):
        def forward(self, time):
            return time * 1

    model = nn.Sequential(Timesteps())
    time = torch.tensor([500, 250])
    assert torch.equal(model(time), time)
    times.round_up(model)
    apart = model(time) - time
    assert torch.equal(apart, torch.tensor([2.0**-15, 2.0**-16]))


def test_model_of_unknown_vocabulary_is_refused_by_name():
    class Towers(nn.Module):
        config = SimpleNamespace()

        def get_input_embeddings(self):
            raise NotImplementedError

    with pytest.raises(GraphError, match=r"Towers: takes tokens of an unknown.*export_module\(\)"):
        tasks._tokens(Towers(), (2, 3))


def floats(name, shape):
    return ir.Value(name=name, shape=None if shape is None else ir.Shape(shape),
                    type=ir.TensorType(ir.DataType.FLOAT))  # fmt: skip


@pytest.mark.parametrize(
    ("middle", "last", "kept"),
    [
        ([0, 0, 4, -1], ["b", "s", 32], 0),
        ([0, 0, 4, -1], ["s", "b", 32], 2),  # other names: another shape
        ([0, 0, 4, -1], ["b", "s", None], 2),  # of no known size
        ([-1, 8], ["b", "s", 32], 0),  # back, whatever lies between
    ],
    ids=str,
)
def test_reshapes_go_only_where_the_shape_is_the_same(middle, last, kept):
    x = floats("x", ["b", "s", 32])
    sizes = [ir.Value(name=n, const_value=ir.tensor(np.array(v), name=n))
             for n, v in (("middle", middle), ("last", [3, 2, 32]))]  # fmt: skip
    first = ir.node("Reshape", [x, sizes[0]])
    second = ir.node("Reshape", [first.outputs[0], sizes[1]])
    second.outputs[0].shape = ir.Shape(last)
    end = ir.node("Neg", [second.outputs[0]])
    end.outputs[0].name = "y"
    graph = ir.Graph([x], end.outputs, nodes=[first, second, end], initializers=sizes,
                     opset_imports={"": 20})  # fmt: skip
    unneeded.leave_out(ir.Model(graph, ir_version=10))
    assert [n.op_type for n in graph] == ["Reshape"] * kept + ["Neg"]
