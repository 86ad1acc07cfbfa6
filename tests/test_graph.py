"""The ONNX tier: graphs of right merges pass, however they are called; wrong ones do not."""

import json
import os
import shutil
import threading
import warnings

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import transformers
from torch import nn
from transformers import DynamicCache

import dora_export
from dora_export.verification import graph as graph_tier
from dora_export.verification.graph import check_graph
from dora_export.verification.measured import GraphMeasured
from dora_export.verification.parity import Compared, Distance
from dora_export.verification.runner import GraphUnusable, OnnxRuntime, Slot
from tests import rider_models
from tests.forward_models import KINDS, change, prepare
from tests.rider_models import WARNINGS

# Reasons stand beside the entries.
pytestmark = [pytest.mark.filterwarnings(w) for w in WARNINGS]

BATCH, LENGTH = torch.export.Dim.DYNAMIC, torch.export.Dim.DYNAMIC


class Plain(nn.Module):
    """A model as a graph has it: arrays in by name, named arrays out."""

    def __init__(self, model, outputs):
        super().__init__()
        self.model, self.outputs = model, outputs

    def forward(self, input_ids, attention_mask):
        found = self.model(input_ids=input_ids, attention_mask=attention_mask)
        return tuple(found[name] for name in self.outputs)


class Cached(nn.Module):
    """A decoder whose cache comes in and goes out as arrays."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask, *past):
        cache = DynamicCache()
        for layer in range(len(past) // 2):
            cache.update(past[2 * layer], past[2 * layer + 1], layer)
        found = self.model(input_ids=input_ids, attention_mask=attention_mask,
                           past_key_values=cache, use_cache=True)  # fmt: skip
        present = [t for layer in found.past_key_values.layers for t in (layer.keys, layer.values)]
        return (found.logits, *present)


class TorchRunner:
    """A runner of another kind: the merged model in torch, under a graph's names."""

    precision = "F32"

    def __init__(self, folder, cls, dtype=torch.float32):
        self.model = cls.from_pretrained(folder, dtype=dtype).eval()
        if dtype == torch.float16:
            self.precision = "F16"
        names = ["input_ids", "attention_mask"]
        self.inputs = {n: Slot((None, None), np.int64) for n in names}
        self.outputs = ["logits"]

    def run(self, values):
        given = {n: torch.from_numpy(v) for n, v in values.items()}
        with torch.no_grad():
            found = self.model(**given)
        return {"logits": found.logits.float().numpy()}


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Models this small are slower in two threads, and far slower beside other tests."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def check(pair, graph, **options):
    """Run the tier; return its result and what it found."""
    result, findings = check_graph(pair.plan(), graph, **options)
    json.dumps(result.figures)
    return result, findings


def codes(findings):
    return sorted({f.code for f in findings})


def made(folder, kind):
    make, lora = KINDS[kind]
    pair = prepare(folder, make(), **lora)
    dora_export.merge(pair.base, pair.adapter, folder / "out")
    return pair, folder / "out"


def eager(folder, cls):
    return cls.from_pretrained(folder, attn_implementation="eager").eval()


def export(module, arguments, path, names, outputs, shapes):
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's exporter warns of itself
        torch.onnx.export(
            module, arguments, path, input_names=names, output_names=outputs, dynamo=True,
            dynamic_shapes=shapes, verbose=False,
        )  # fmt: skip


IDS = torch.arange(3, 17).reshape(2, 7)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder")
    pair, out = made(folder, "bert")
    model = Plain(eager(out, transformers.BertForSequenceClassification), ["logits"])
    export(model, (IDS, torch.ones_like(IDS)), folder / "model.onnx",
           ["input_ids", "attention_mask"], ["logits"], ({0: BATCH, 1: LENGTH},) * 2)  # fmt: skip
    return pair, out, folder / "model.onnx"


LAYERS, HEADS, DIM = 2, 2, 8
PARTS = [f"{layer}.{part}" for layer in range(LAYERS) for part in ("key", "value")]


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("decoder")
    pair, out = made(folder, "llama")
    past = tuple(torch.randn(2, HEADS, 5, DIM) for _ in PARTS)
    export(
        Cached(eager(out, transformers.LlamaForCausalLM)),
        (IDS, torch.ones(2, 12, dtype=torch.long), *past),
        folder / "model.onnx",
        ["input_ids", "attention_mask", *(f"past_key_values.{p}" for p in PARTS)],
        ["logits", *(f"present.{p}" for p in PARTS)],
        ({0: BATCH, 1: LENGTH}, {0: BATCH, 1: LENGTH}, ({0: BATCH, 2: LENGTH},) * len(PARTS)),
    )
    return pair, out, folder / "model.onnx"


def with_weights(graph, path, before, after):
    """A copy of a graph with the tensors of one folder in place of those of another."""
    model = onnx.load(graph)
    old, new = rider_models.tensors(before), rider_models.tensors(after)
    changed = 0
    for initializer in model.graph.initializer:
        held = onnx.numpy_helper.to_array(initializer)
        for name, tensor in old.items():
            if torch.equal(tensor, new[name]):
                continue
            for turn in (lambda t: t, lambda t: t.T):
                mine = turn(tensor.numpy())
                if mine.shape == held.shape and np.array_equal(mine, held):
                    fresh = onnx.numpy_helper.from_array(
                        np.ascontiguousarray(turn(new[name].numpy())), initializer.name
                    )
                    initializer.CopyFrom(fresh)
                    held = None
                    changed += 1
                    break
            if held is None:
                break
    assert changed == sum(not torch.equal(old[n], new[n]) for n in old)
    onnx.save(model, path)
    return path


def as_plain_lora(pair, out, folder):
    """The merge with the magnitudes left out."""
    folder.mkdir()
    for file in out.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    base, stored = rider_models.tensors(pair.base), rider_models.tensors(pair.adapter)

    def edit(held):
        for name in held:
            key = f"base_model.model.{name.removesuffix('.weight')}"
            if f"{key}.lora_A.weight" in stored:
                A, B = stored[f"{key}.lora_A.weight"], stored[f"{key}.lora_B.weight"]
                held[name] = base[name] + 2.5 * B @ A

    change(folder, edit)
    return folder


def compared(largest, rms=1e-6):
    """A thousand elements, the largest of which is 20."""
    return Compared(Distance(1000, largest, 0.0, 1000 * rms**2, 20.0, 1000.0))


@pytest.mark.parametrize(("output", "error", "found"), [
    ("present.0.key", compared(15.0, rms=2.0), False),
    ("present.0.key", compared(15.0, rms=11.0), True),
    ("logits", compared(9.0, rms=2.0), False),
    ("logits", compared(15.0, rms=2.0), True),
])  # fmt: skip
def test_a_budget_is_for_what_a_model_says_and_for_a_cache_as_a_whole(output, error, found):
    measured = GraphMeasured(storage="float32", unit=2.0**-24, noise={}, error={output: error})
    assert [f.code for f in graph_tier._judge("g", measured, 0.5)] == ["graph-differs"] * found


@pytest.mark.parametrize(("error", "found"), [
    (compared(1.5e-4), False),  # five times this layer's own noise, less than twice another's
    (compared(1.7e-4), True),
    (compared(1.5e-4, rms=2.1e-6), True),  # of many elements
])  # fmt: skip
def test_single_elements_of_a_cache_are_judged_by_the_noise_of_all_layers(error, found):
    noise = {"present.0.key": compared(3e-5), "present.1.key": compared(8e-5)}
    measured = GraphMeasured(storage="float32", unit=2.0**-24, noise=noise,
                             error={"present.0.key": error})  # fmt: skip
    assert bool(list(graph_tier._judge("g", measured, None))) == found
    # what is no cache stands for itself
    noise, error = {"logits": compared(3e-5), **noise}, {"logits": compared(7e-5)}
    measured = GraphMeasured(storage="float32", unit=2.0**-24, noise=noise, error=error)
    assert [f.code for f in graph_tier._judge("g", measured, None)] == ["graph-differs"]


def test_a_graph_of_an_encoder_passes_and_wrong_ones_do_not(encoder, tmp_path):
    pair, out, graph = encoder
    result, findings = check(pair, graph)
    assert findings == ()
    assert [c["shapes"]["input_ids"] for c in result.figures["calls"]] == [
        [8, 16], [2, 16], [1, 8]]  # fmt: skip
    logits = result.figures["outputs"]["logits"]
    assert logits["excess"] < 1 < logits["effect"]["rms"] / logits["noise"]["rms"] / 1000
    assert all(abs(m["share"]) < 0.01 for m in result.figures["mistakes"].values())
    base = with_weights(graph, tmp_path / "base.onnx", out, pair.base)
    findings = check(pair, base)[1]
    assert codes(findings) == ["graph-differs", "graph-mistaken", "graph-stale"]
    assert sum(f.code == "graph-stale" for f in findings) == len(changed_names(pair))
    lora = as_plain_lora(pair, out, tmp_path / "lora")
    lora = with_weights(graph, tmp_path / "lora.onnx", out, lora)
    findings = check(pair, lora)[1]
    assert codes(findings) == ["graph-differs", "graph-mistaken"]
    assert ["magnitudes dropped" in f.what for f in findings if f.code == "graph-mistaken"] == [
        True
    ]


def changed_names(pair):
    return [step.name for step in pair.plan().steps if step.changes]


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_a_graph_with_another_scaling_is_told_from_a_right_one(encoder, factor, tmp_path):
    """With a tolerance so wide that the difference itself is allowed."""
    pair, out, graph = encoder
    wrong = rescaled(pair, tmp_path, factor)
    graph = with_weights(graph, tmp_path / "wrong.onnx", out, wrong)
    result, findings = check(pair, graph, budget=10.0)
    assert "graph-mistaken" in codes(findings)
    word = "half" if factor < 1 else "twice"
    assert f"{word} the scaling" in next(f.what for f in findings if f.code == "graph-mistaken")
    assert result.figures["mistakes"][f"{word} the scaling"]["share"] > 0.99


def rescaled(pair, folder, factor):
    """The merge of the same adapter with another alpha."""
    shutil.copytree(pair.adapter, folder / "adapter")
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    config["lora_alpha"] *= factor
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    dora_export.merge(pair.base, folder / "adapter", folder / "rescaled")
    return folder / "rescaled"


def test_verify_takes_a_graph_in_the_place_of_a_folder(encoder):
    pair, _, graph = encoder
    report = dora_export.verify(pair.base, pair.adapter, graph)
    assert (report.verdict, [t.tier for t in report.tiers]) == ("right", ["onnx"])


def test_a_graph_of_a_decoder_passes_whole_and_token_by_token(decoder, tmp_path):
    pair, out, graph = decoder
    result, findings = check(pair, graph)
    assert findings == ()
    calls = {c["name"]: c["calls"] for c in result.figures["calls"]}
    assert calls["tokens, step by step"] == calls["padded tokens, step by step"] == 5
    assert calls["padded tokens, on the left"] == 1
    assert (
        result.figures["text"]["equal"] == result.figures["text"]["tokens"] == calls["greedy text"]
    )
    assert set(result.figures["outputs"]) == {"logits", *(f"present.{p}" for p in PARTS)}
    lora = as_plain_lora(pair, out, tmp_path / "lora")
    lora = with_weights(graph, tmp_path / "lora.onnx", out, lora)
    findings = check(pair, lora)[1]
    assert "output 'logits'" in {f.where for f in findings}
    assert "output 'present.1.value'" in {f.where for f in findings}


def test_a_cache_that_is_not_read_is_found(decoder):
    """Prefill is right then, and every token after it is not."""
    pair, _, graph = decoder

    class Forgetful(OnnxRuntime):
        def run(self, values):
            past = {n: v * 0 for n, v in values.items() if n.startswith("past_key_values")}
            return super().run({**values, **past})

    _, findings = check(pair, graph, runner=Forgetful(graph))
    assert "output 'logits'" in {f.where for f in findings}


@pytest.mark.nightly  # an export; a runner without a cache is there by default, below
def test_a_decoder_without_a_cache_passes(decoder, tmp_path):
    pair, out, _ = decoder
    model = Plain(eager(out, transformers.LlamaForCausalLM), ["logits"])
    export(model, (IDS, torch.ones_like(IDS)), tmp_path / "model.onnx",
           ["input_ids", "attention_mask"], ["logits"], ({0: BATCH, 1: LENGTH},) * 2)  # fmt: skip
    result, findings = check(pair, tmp_path / "model.onnx")
    assert findings == ()
    assert all(c["calls"] == 1 for c in result.figures["calls"])


@pytest.mark.parametrize(
    ("old", "new", "what"),
    [
        ("logits", "output_0", "has no output 'logits'"),
        ("present.1.key", "present.1.keys", "has no output 'present.1.key'"),
        ("attention_mask", "mask", "its input 'mask' is not the model's"),
        ("input_ids", "ids", "has no input 'input_ids'"),
        ("past_key_values.0.key", "past.0.key", "has no input 'past_key_values.0.key'"),
    ],
)
def test_renamed_inputs_and_outputs_are_found(decoder, old, new, what, tmp_path):
    pair, _, graph = decoder
    model = onnx.load(graph)
    for value in (*model.graph.input, *model.graph.output):
        if value.name == old:
            value.name = new
    for node in model.graph.node:
        node.input[:] = [new if n == old else n for n in node.input]
        node.output[:] = [new if n == old else n for n in node.output]
    onnx.save(model, tmp_path / "model.onnx")
    result, findings = check(pair, tmp_path / "model.onnx")
    assert codes(findings) == ["graph-inputs"]
    assert what in {f.what for f in findings}
    assert not result.ran


# --- a base in 16 bits, a graph in 32


@pytest.fixture(scope="module")
def narrow(encoder, tmp_path_factory):
    """A base in bfloat16, and a graph in float32 of each of some merges: before and after it was
    widened, and before with a small mistake.
    """
    _, out, graph = encoder
    folder = tmp_path_factory.mktemp("narrow")
    make, lora = KINDS["bert"]
    pair = prepare(folder, make(), torch.bfloat16, **lora)
    graphs = {}
    for name, options in {"float32": {"dtype": "fp32"}, "bfloat16": {},
                          "mistaken": {"dtype": "fp32", "strength": 0.999}}.items():  # fmt: skip
        dora_export.merge(pair.base, pair.adapter, folder / name, **options)
        change(folder / name, lambda held: held.update({n: t.float() for n, t in held.items()}))
        graphs[name] = with_weights(graph, folder / f"{name}.onnx", out, folder / name)
    return pair, graphs


def test_what_is_allowed_follows_from_the_type_that_a_graph_was_merged_in(narrow, tmp_path):
    pair, graphs = narrow
    noise = {}
    for name in ("float32", "bfloat16"):
        result, findings = check(pair, graphs[name])
        assert findings == ()
        assert (result.figures["merged_in"], result.figures["storage"]) == (name, name)
        noise[name] = result.figures["outputs"]["logits"]["noise"]["rms"]
    assert noise["bfloat16"] > 1000 * noise["float32"]
    result, findings = check(pair, graphs["mistaken"])
    assert codes(findings) == ["graph-differs"]
    error = result.figures["outputs"]["logits"]["error"]["rms"]
    assert 100 * noise["float32"] < error < noise["bfloat16"]  # it passed where that was allowed
    hidden = renamed_and_padded(graphs["mistaken"], tmp_path / "hidden.onnx")
    result, findings = check(pair, hidden)
    assert (codes(findings), result.figures["merged_in"]) == (["graph-coarse"], None)
    assert result.figures["storage"] == "bfloat16"  # as the base is: nothing says otherwise


def renamed_and_padded(graph, path):
    """The graph with its matrices where none of the checkpoint's shapes is found."""
    model = onnx.load(graph)
    for initializer in list(model.graph.initializer):
        held = onnx.numpy_helper.to_array(initializer)
        if held.ndim == 2 and min(held.shape) > 8:
            name = f"padded.{initializer.name}"
            padded = onnx.numpy_helper.from_array(np.stack([held, held]), name)
            at = onnx.numpy_helper.from_array(np.array(1), f"at.{name}")
            node = onnx.helper.make_node("Gather", [name, at.name], [initializer.name])
            model.graph.initializer.remove(initializer)
            model.graph.initializer.extend([padded, at])
            model.graph.node.insert(0, node)
    onnx.save(model, path)
    return path


def test_a_graph_is_what_the_manifest_beside_it_says(narrow, tmp_path):
    """The way of its weights where they are hidden, and the strength; the user wins."""
    pair, graphs = narrow
    renamed_and_padded(graphs["mistaken"], tmp_path / "model.onnx")

    def verified(options, onnx_said, **given):
        content = {"options": options, "onnx": onnx_said}
        (tmp_path / "dora_export.json").write_text(json.dumps(content))
        report = dora_export.verify(pair.base, pair.adapter, tmp_path / "model.onnx", **given)
        return report.verdict, report.tiers[0].figures["storage"]

    said = {"way": "into", "dtype": "F32"}
    assert verified({"dtype": None}, said) == ("wrong", "float32")
    assert verified({"dtype": "F32"}, {"way": "trace"}) == ("wrong", "float32")
    assert verified({"dtype": None, "strength": 0.999}, said) == ("right", "float32")
    assert verified({"dtype": None, "strength": 0.999}, said, strength=1.0)[0] == "wrong"
    assert verified({"dtype": None}, {"way": "into", "dtype": "int8"}) == ("right", "bfloat16")


# --- another runner


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return made(tmp_path_factory.mktemp("llama"), "llama")


def test_a_runner_in_half_precision_is_allowed_its_noise(llama):
    pair, out = llama
    half = TorchRunner(out, transformers.LlamaForCausalLM, torch.float16)
    result, findings = check(pair, out / "model.onnx", runner=half)
    assert findings == ()
    assert result.figures["storage"] == "float16"
    half.precision = "F32"  # what would be right in half precision is not in float32
    assert codes(check(pair, out / "model.onnx", runner=half)[1]) == ["graph-differs"]


def test_a_budget_is_needed_where_nothing_can_be_measured_and_may_not_hide_the_adapter(llama):
    pair, out = llama
    runner = TorchRunner(out, transformers.LlamaForCausalLM)
    runner.precision = None
    _, findings = check(pair, out / "model.onnx", runner=runner)
    assert codes(findings) == ["graph-unsupported"]
    assert "give a budget" in findings[0].what
    assert check(pair, out / "model.onnx", runner=runner, budget=1e-4)[1] == ()
    base = TorchRunner(pair.base, transformers.LlamaForCausalLM)
    findings = check(pair, out / "m.onnx", runner=base, budget=1e-4)[1]
    assert codes(findings) == ["graph-differs", "graph-mistaken"]
    _, findings = check(pair, out / "model.onnx", runner=base, budget=5.0)
    assert [(f.code, f.severity) for f in findings] == [
        ("graph-mistaken", "wrong"), ("graph-blind", "unchecked")]  # fmt: skip


def test_fixed_shapes_are_asked_only_what_they_take(llama):
    pair, out = llama
    runner = TorchRunner(out, transformers.LlamaForCausalLM)
    runner.inputs = {n: Slot((2, 16), np.int64) for n in runner.inputs}
    result, findings = check(pair, out / "model.onnx", runner=runner)
    assert findings == ()
    assert [c["name"] for c in result.figures["calls"]] == [
        "padded tokens 1 to 2", "padded tokens 3 to 4", "tokens"]  # fmt: skip
    runner.inputs = {n: Slot((3, 5), np.int64) for n in runner.inputs}
    _, findings = check(pair, out / "model.onnx", runner=runner)
    assert codes(findings) == ["graph-unsupported"]
    assert "shapes" in findings[0].what


def test_the_exporter_says_which_outputs_there_are(tmp_path):
    make, lora = KINDS["bart"]
    pair = prepare(tmp_path, make(), **lora)
    dora_export.merge(pair.base, pair.adapter, tmp_path / "out")
    runner = TorchRunner(tmp_path / "out", transformers.BartForConditionalGeneration)
    runner.inputs["decoder_input_ids"] = Slot((None, None), np.int64)
    _, findings = check(pair, tmp_path / "m.onnx", runner=runner)
    assert [f.what for f in findings] == ["has no output 'encoder_last_hidden_state'"]
    assert check(pair, tmp_path / "m.onnx", runner=runner, outputs=["logits"])[1] == ()


# --- files


@pytest.mark.parametrize("name", ["model.onnx", "weights"])
def test_pipes_are_not_waited_for(name, tmp_path):
    values = onnx.TensorProto(name="w", data_type=1, dims=[2], data_location=1)
    for key, value in (("location", "weights"), ("offset", "0"), ("length", "8")):
        values.external_data.add(key=key, value=value)
    nodes = [onnx.helper.make_node("Identity", ["w"], ["y"])]
    outputs = [onnx.helper.make_tensor_value_info("y", 1, [2])]
    graph = onnx.helper.make_graph(nodes, "g", [], outputs, [values])
    opset = onnx.helper.make_opsetid("", 18)
    path, pipe = tmp_path / "model.onnx", tmp_path / name
    path.write_bytes(onnx.helper.make_model(graph, opset_imports=[opset]).SerializeToString())
    pipe.unlink(missing_ok=True)
    os.mkfifo(pipe)
    writer = os.open(pipe, os.O_RDWR)
    os.write(writer, b"\xff")  # no graph: who reads this does not open the pipe again, for ever
    ends = threading.Timer(5, os.close, [writer])  # for a reader, which would wait for ever
    ends.start()
    with pytest.raises(GraphUnusable, match="regular file"):
        OnnxRuntime(path)
    assert ends.is_alive()
    ends.cancel()
    os.close(writer)


def test_nothing_of_a_graph_is_printed(tmp_path, capsys, monkeypatch):
    """onnxruntime prints what it met before it tries again, as it is, for a terminal to obey."""

    def refuse(*_):
        raise ValueError("\x1b]0;owned\x07")

    monkeypatch.setattr(onnxruntime.InferenceSession, "_create_inference_session", refuse)
    path = tmp_path / "model.onnx"
    path.write_bytes(
        onnx.helper.make_model(onnx.helper.make_graph([], "g", [], [])).SerializeToString()
    )
    with pytest.raises(GraphUnusable, match=r"does not take it: \\x1b"):
        OnnxRuntime(path)
    assert capsys.readouterr() == ("", "")


def test_external_data_outside_the_graphs_folder_is_not_opened(encoder, tmp_path):
    pair, _, graph = encoder
    folder = tmp_path / "graph"
    folder.mkdir()
    outside = tmp_path / "outside.bin"
    outside.write_bytes(b"\0" * 1_000_000)
    (folder / "link.bin").symlink_to(outside)
    model = onnx.load(graph)
    onnx.external_data_helper.convert_model_to_external_data(model, location="data.bin",
                                                             size_threshold=64)  # fmt: skip
    onnx.save(model, folder / "good.onnx")
    assert check(pair, folder / "good.onnx")[1] == ()
    for place in ("../outside.bin", "link.bin", str(outside)):
        wrong = onnx.load(folder / "good.onnx", load_external_data=False)
        data = [e for t in wrong.graph.initializer for e in t.external_data if e.key == "location"]
        data[-1].value = place
        onnx.save(wrong, folder / "bad.onnx")
        _, findings = check(pair, folder / "bad.onnx")
        assert [(f.code, f.severity) for f in findings] == [("graph-outside", "wrong")], place


def test_what_is_no_graph_was_not_checked(encoder, tmp_path):
    pair, _, graph = encoder
    (tmp_path / "broken.onnx").write_bytes(b"no graph" * 100)
    assert codes(check(pair, tmp_path / "broken.onnx")[1]) == ["graph-unsupported"]
    assert codes(check(pair, tmp_path / "absent.onnx")[1]) == ["graph-unsupported"]
    model = onnx.load(graph)
    model.graph.node[0].op_type = "NoSuchOperator"
    onnx.save(model, tmp_path / "unknown.onnx")
    assert codes(check(pair, tmp_path / "unknown.onnx")[1]) == ["graph-unsupported"]


def test_what_onnxruntime_fails_on_is_raised_and_not_printed(tmp_path, capfd):
    """It prints what a graph calls its nodes as it stands there."""
    helper = onnx.helper
    x, y = (helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, ["n"]) for n in "xy")
    shape = helper.make_tensor("shape", onnx.TensorProto.INT64, [1], [3])
    node = helper.make_node("Reshape", ["x", "shape"], ["y"], name="\x1b[31mred")
    graph = helper.make_graph([node], "g", [x], [y], [shape])
    opset = helper.make_opsetid("", 20)
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=10), tmp_path / "m.onnx")
    runner = OnnxRuntime(tmp_path / "m.onnx")
    assert runner.run({"x": np.ones(3, np.float32)})["y"].shape == (3,)
    with pytest.raises(GraphUnusable, match="fails on") as raised:
        runner.run({"x": np.ones(4, np.float32)})
    assert "\x1b" not in str(raised.value)
    assert capfd.readouterr() == ("", "")
