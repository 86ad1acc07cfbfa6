"""Models that are no plain encoder or decoder: encoder-decoders, mixtures of experts, diffusion."""

from types import SimpleNamespace

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
import transformers
from torch import nn

from dora_export import GraphOptions
from dora_export.onnx import encoder_decoder, engines, files, quantise, tasks
from dora_export.onnx.model import GraphError
from dora_export.onnx.wrappers import Flat, Part
from dora_export.verification import inputs, script, times
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
    monkeypatch.setattr(encoder_decoder, "OnnxRuntime", lambda name: InTorch(by_name[name]))
    together = encoder_decoder.Together(*by_name)
    (whole,) = tasks.parts(model, whole=True)
    ids = torch.randint(3, 90, (2, 6)).numpy()
    values = {n: t.numpy() for n, t in whole.inputs.items()} | {"decoder_input_ids": ids}
    if "attention_mask" in values:
        values["attention_mask"][1, 5:] = 0
    with torch.no_grad():
        given = {n: torch.from_numpy(v) for n, v in values.items()}
        expected = model(**given, use_cache=False)
    got = together.run(values)
    assert set(got) == set(together.outputs) == set(found[0].compared)
    scale = np.abs(expected.logits.numpy()).max()
    assert np.abs(got["logits"] - expected.logits.numpy()).max() < 1e-5 * scale
    states = expected.encoder_last_hidden_state.numpy()
    assert np.abs(got["encoder_last_hidden_state"] - states).max() < 1e-5

    def forgetful(values):  # the cache does matter
        return {n: 0 * v if "decoder" in n else v for n, v in InTorch(found[2]).run(values).items()}

    together._further.run = forgetful
    assert np.abs(together.run(values)["logits"] - expected.logits.numpy()).max() > 1e-3 * scale


def test_names_of_an_encoder_decoder_are_those_that_ortmodel_classes_look_for():
    first, further = tasks.parts(model_of("bart"))[1:]
    assert list(first.inputs) == ["input_ids", "encoder_attention_mask", "encoder_hidden_states"]
    kinds = [f"{side}.{k}" for side in ("decoder", "encoder") for k in ("key", "value")]
    assert first.outputs == ["logits", *(f"present.{i}.{k}" for i in range(2) for k in kinds)]
    assert list(further.inputs)[2:] == [
        f"past_key_values.{i}.{k}" for i in range(2) for k in kinds]  # fmt: skip
    assert further.outputs == ["logits", *(f"present.{i}.{k}" for i in range(2) for k in kinds[:2])]
    assert further.axes["past_key_values.0.decoder.key"][2] == "past_decoder_sequence_length"


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


def test_int8_weights_are_unsigned_since_signed_ones_overflow_without_vnni(tmp_path):
    """Large activations and weights of one sign: with signed weights AVX2 gives half of it."""
    make = np.random.default_rng(0)
    weight = make.uniform(0.8, 1, size=(64, 32)).astype(np.float32)
    x = ir.Value(name="x", shape=ir.Shape(["n", 64]), type=ir.TensorType(ir.DataType.FLOAT))
    held = ir.Value(name="w", const_value=ir.tensor(weight, name="w"))
    held.shape, held.dtype = ir.Shape([64, 32]), ir.DataType.FLOAT
    node = ir.node("MatMul", [x, held], name="product")
    node.outputs[0].name = "y"
    node.outputs[0].dtype, node.outputs[0].shape = ir.DataType.FLOAT, ir.Shape(["n", 32])
    graph = ir.Graph([x], node.outputs, nodes=[node], initializers=[held],
                     opset_imports={"": 20})  # fmt: skip
    ir.save(ir.Model(graph, ir_version=10), tmp_path / "m.onnx")
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


def test_noise_is_made_up_for_unets_and_for_transformers_of_patches():
    import diffusers

    for name, main in (("sd, unet", "sample"), ("flux", "hidden_states")):
        cls, _, values = onnx_table.ARCHITECTURES[name]
        model = getattr(diffusers, cls)(**values).eval()
        batches = inputs.batches(model, None, [])
        assert [len(b.values["timestep"]) for b in batches] == [3, 1]
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
