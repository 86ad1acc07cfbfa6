"""Traced graphs: what is published, that it is right, and what is refused."""

import collections
import json
import os
import shutil
import stat
from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from click.testing import CliRunner
from onnxruntime.capi.onnxruntime_pybind11_state import InvalidArgument
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BertConfig, BertModel
from transformers.exporters import onnxruntime_fusions

import dora_export
from dora_export import DoraExportError, GraphOptions, api_onnx
from dora_export.cli import text_onnx
from dora_export.cli.main import cli
from dora_export.errors import InputError
from dora_export.onnx import engines, files, fuse, pooling, quantise, share, tasks, tidy, trace
from dora_export.onnx.model import GraphError, Made, Parity, ParityError
from dora_export.onnx.wrappers import Flat, Part
from dora_export.verification.graph import check_graph
from dora_export.verification.model import Finding
from dora_export.verification.pooling import embedding
from tests.forward_models import KINDS, prepare
from tests.rider_models import VOCABULARY, WARNINGS

# Reasons stand beside the entries.
pytestmark = [pytest.mark.filterwarnings(w) for w in WARNINGS]


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Models this small are slower in two threads, and far slower beside other tests."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A decoder and its adapter, exported by the command's defaults."""
    folder = tmp_path_factory.mktemp("traced")
    make, lora = KINDS["llama"]
    wide = make(head_dim=16)  # onnxruntime's attention rotates positions by 16 channels and more
    pair = prepare(folder, wide, **lora)
    (pair.base / "tokenizer.json").write_text("{}")
    (pair.base / "generation_config.json").write_text('{"eos_token_id": [2, 3]}')
    stages = []
    report = dora_export.export_onnx(
        pair.base, pair.adapter, folder / "out", on_stage=stages.append
    )
    return pair, report, folder / "out", stages


def graph_of(path):
    return onnx.load(path / "model.onnx").graph


def dims(value):
    return [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]


def test_a_decoder_is_published_and_equals_the_unmerged_model(exported):
    _, report, out, _ = exported
    assert (report.verdict, report.exit_code, report.way) == ("right", 0, "trace")
    figures = report.verified.tiers[0].figures
    assert figures["text"]["equal"] == figures["text"]["tokens"] > 40
    assert all(abs(m["share"]) < 1e-3 for m in figures["mistakes"].values())
    assert {"base", "magnitudes dropped"} < set(figures["mistakes"])
    assert sorted(p.name for p in out.iterdir()) == [
        "config.json", "dora_export.json", "genai_config.json", "generation_config.json",
        "model.onnx", "tokenizer.json"]  # fmt: skip
    assert not [p for p in out.parent.iterdir() if p.name.startswith(".")]
    assert report.files["model.onnx"] == (out / "model.onnx").stat().st_size


def test_a_decoders_graph_has_the_names_and_axes_that_run_times_expect(exported):
    graph = graph_of(exported[2])
    past = ["batch_size", 2, "past_sequence_length", 16]
    assert {v.name: dims(v) for v in graph.input} == {
        "input_ids": ["batch_size", "sequence_length"],
        "attention_mask": ["batch_size", "total_sequence_length"],
        "position_ids": ["batch_size", "sequence_length"],
        **{f"past_key_values.{i}.{k}": past for i in range(2) for k in ("key", "value")},
    }
    assert {v.name: dims(v) for v in graph.output} == {
        "logits": ["batch_size", "sequence_length", 97],
        **{f"present.{i}.{k}": ["batch_size", 2, "total_sequence_length", 16]
           for i in range(2) for k in ("key", "value")},
    }  # fmt: skip


def test_initializers_have_the_models_names_and_nothing_of_the_machine_is_left(exported):
    pair, _, out, _ = exported
    graph = graph_of(out)
    names = {t.name.removesuffix(tidy.TRANSPOSED) for t in graph.initializer
             if np.prod(t.dims) > 96}  # fmt: skip
    assert names == {n for n in pair.plan().base.tensors if "norm" not in n}
    content = (out / "model.onnx").read_bytes()
    for word in (b"/tmp", b".py", b"site-packages", str(pair.base).encode(), b"stack_trace"):
        assert word not in content
    assert not any(n.metadata_props or n.doc_string for n in graph.node)


def test_what_is_published_is_readable_by_all_as_the_umask_says(exported):
    mask = os.umask(0)
    os.umask(mask)
    for file in exported[2].iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o666 & ~mask


def test_the_manifest_says_what_was_made_and_what_was_found(exported):
    _, _, out, stages = exported
    said = json.loads((out / "dora_export.json").read_text())
    onnx_part = said["onnx"]
    assert onnx_part["files"] == {"model.onnx": files.sha256(out / "model.onnx")}
    assert (onnx_part["engine"], onnx_part["dtype"], onnx_part["padding"]) == (
        "torch", "fp32", "any")  # fmt: skip
    assert onnx_part["task"] == "text-generation"
    assert onnx_part["parity"]["verdict"] == "right"
    assert len(said["changed"]) == 14
    assert stages[0] == "merging"


def test_the_config_is_the_bases_and_not_one_that_a_library_rewrote(exported):
    pair, _, out, _ = exported
    assert (out / "config.json").read_bytes() == (pair.base / "config.json").read_bytes()


def test_the_config_names_the_graphs_dtype_and_not_the_bases(exported, tmp_path, monkeypatch):
    """onnxruntime-genai's builder and others round weights to what config.json says."""
    pair = exported[0]
    shutil.copytree(pair.base, tmp_path / "base")
    config = json.loads((pair.base / "config.json").read_text())
    weights = {n: t.bfloat16() for n, t in load_file(pair.base / "model.safetensors").items()}
    save_file(weights, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    (tmp_path / "base" / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    seen = {}

    def make(request, folder):
        seen.update(load_file(folder / "model.safetensors"))
        shutil.copyfile(exported[2] / "model.onnx", request.folder / "model.onnx")
        return Made(("model.onnx",), {}, ())

    monkeypatch.setattr(trace, "make", make)
    dora_export.export_onnx(tmp_path / "base", pair.adapter, tmp_path / "out", verify=False)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"
    assert {t.dtype for t in seen.values()} == {torch.float32}
    changed = seen["model.layers.0.mlp.up_proj.weight"]  # merged in float32, rounded to it alone
    assert not torch.equal(changed, changed.bfloat16().float())


def test_genai_config_names_what_the_graph_has(exported):
    out = exported[2]
    said = json.loads((out / "genai_config.json").read_text())["model"]
    names = {v.name for v in graph_of(out).input}
    decoder = said["decoder"]
    assert decoder["inputs"]["past_key_names"] % 1 in names
    assert set(decoder["inputs"].values()) - {"past_key_values.%d.key", "past_key_values.%d.value"}
    assert (decoder["num_key_value_heads"], decoder["head_size"]) == (2, 16)
    assert (said["type"], said["eos_token_id"]) == ("llama", [2, 3])


# --- weights


def test_quantised_graphs_are_held_against_the_unmerged_model_too(exported, tmp_path):
    pair, _, out, _ = exported
    for method, most in (("int8", 0.2), ("int4", 0.2)):
        options = GraphOptions(quantize=method, block_size=16)
        target = tmp_path / f"{method}.onnx"
        facts = quantise.quantise(out / "model.onnx", target, f"{method}.data", options)
        assert facts["nodes"] == 15  # seven layers twice, and the head
        tier, findings = check_graph(pair.plan(), target, budget=0.9)
        # A single logit of dynamic int8 may well be off by all of its size.
        assert {f.code for f in findings} <= ({"graph-differs"} if method == "int8" else set())
        errors = tier.figures["outputs"]["logits"]["error"]
        assert 1e-3 < errors["rms"] / errors["scale"] < most
        assert all(abs(m["share"]) < 0.2 for m in tier.figures["mistakes"].values())
        assert {f.code for f in check_graph(pair.plan(), target, budget=1e-4)[1]} == {
            "graph-differs"}  # fmt: skip
    verified = dora_export.verify(pair.base, pair.adapter, target)
    assert verified.verdict == "unchecked"
    assert "give a budget" in verified.findings[0].what
    assert dora_export.verify(pair.base, pair.adapter, target, budget=0.9).verdict == "right"
    for wrong, merged in ((-1.0, target), (float("nan"), target), (0.5, pair.base)):
        with pytest.raises(DoraExportError, match="expected a positive number"):
            dora_export.verify(pair.base, pair.adapter, merged, budget=wrong)


def test_int4_keeps_eight_bits_for_the_head_unless_asked_otherwise(exported, tmp_path):
    out = exported[2]
    for bits, expected in ((8, [4] * 14 + [8]), (4, [4] * 15)):
        options = GraphOptions(quantize="int4", block_size=16, head_bits=bits, symmetric=False)
        quantise.quantise(out / "model.onnx", tmp_path / f"{bits}.onnx", "data", options)
        nodes = [n for n in onnx.load(tmp_path / f"{bits}.onnx").graph.node
                 if n.op_type == "MatMulNBits"]  # fmt: skip
        said = [{a.name: a.i for a in n.attribute} for n in nodes]
        assert sorted(a["bits"] for a in said) == expected
        assert {a["block_size"] for a in said} == {16}
        assert all(len(n.input) > 3 and n.input[3] for n in nodes)  # zero points


def test_a_tied_head_is_within_reach_of_quantisers(tmp_path):
    """Where exporters leave Transpose(embedding) in front of the last product."""
    weight = np.random.default_rng(0).standard_normal((64, 32)).astype(np.float32)
    x = ir.Value(name="x", shape=ir.Shape([1, 32]), type=ir.TensorType(ir.DataType.FLOAT))
    tied = ir.Value(name="embed.weight", const_value=ir.tensor(weight, name="embed.weight"))
    tied.shape, tied.dtype = ir.Shape([64, 32]), ir.DataType.FLOAT
    turn = ir.node("Transpose", [tied], attributes={"perm": [1, 0]})
    product = ir.node("MatMul", [x, turn.outputs[0]], name="head")
    product.outputs[0].name = "y"
    graph = ir.Graph([x], product.outputs, nodes=[turn, product], initializers=[tied],
                     opset_imports={"": 20})  # fmt: skip
    model = ir.Model(graph, ir_version=10)
    quantise.reachable(model)
    assert [n.op_type for n in graph] == ["MatMul"]
    ir.save(model, tmp_path / "m.onnx")
    held = onnx.numpy_helper.to_array(onnx.load(tmp_path / "m.onnx").graph.initializer[0])
    assert np.array_equal(held, weight.T)


def test_one_copy_of_the_weights_serves_graph_and_folder(exported, tmp_path):
    pair, _, out, _ = exported
    dora_export.merge(pair.base, pair.adapter, tmp_path / "merged")
    model = ir.load(out / "model.onnx")
    folder = tmp_path / "shared"
    folder.mkdir()
    shared = share.share(model, tmp_path / "merged", folder, copy=True)
    files.write(model, folder / "model.onnx", "model.onnx.data")
    assert len(shared) == 16  # all but the norms, which are below the threshold
    assert (folder / "model.onnx").stat().st_size < 50_000
    assert not (folder / "model.onnx.data").exists()
    assert check_graph(pair.plan(), folder / "model.onnx")[1] == ()
    held = {t.name: t for t in onnx.load(folder / "model.onnx", load_external_data=False)
            .graph.initializer}  # fmt: skip
    entry = {e.key: e.value for e in held["model.layers.0.mlp.up_proj.weight"].external_data}
    assert entry["location"] == "model.safetensors"


def test_weights_above_the_threshold_go_into_a_file_of_their_own(exported, tmp_path, monkeypatch):
    pair, _, out, _ = exported
    monkeypatch.setattr(files, "DATA_BYTES", 1000)
    files.write(ir.load(out / "model.onnx"), tmp_path / "model.onnx", "model.onnx.data")
    assert (tmp_path / "model.onnx.data").stat().st_size > 80_000
    assert stat.S_IMODE((tmp_path / "model.onnx.data").stat().st_mode) & 0o444
    onnx.checker.check_model(str(tmp_path / "model.onnx"))
    assert check_graph(pair.plan(), tmp_path / "model.onnx")[1] == ()


def test_what_the_checker_refuses_is_not_written_off_as_right(exported, tmp_path):
    model = ir.load(exported[2] / "model.onnx")
    model.graph[0].op_type = "NoSuchOperator"
    with pytest.raises(GraphError, match="another --engine or --opset"):
        files.write(model, tmp_path / "model.onnx", "model.onnx.data")


# --- publishing


@pytest.fixture
def traced_already(exported, monkeypatch):
    """The tracer stands still: what it makes is the graph that is there."""
    _, report, out, _ = exported

    def make(request, folder):
        assert (folder / "model.safetensors").is_file()
        shutil.copyfile(out / "model.onnx", request.folder / "model.onnx")
        parity = Parity("model.onnx", request.plan, outputs=["logits"])
        return Made(("model.onnx",), dict(report.facts), (parity,))

    monkeypatch.setattr(trace, "make", make)


def other_alpha(pair, folder):
    shutil.copytree(pair.adapter, folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 5}))
    return folder


@pytest.mark.parametrize(("code", "method", "said"), [
    ("graph-differs", None, "--budget allows larger differences"),
    ("graph-mistaken", None, "No --budget allows that; a graph that is not quantised"),
    ("graph-mistaken", "int8", "rounding to int8 costs this model more than the adapter changes. "
                               "Try --quantize int4"),
    ("graph-mistaken", "int4", "Try no --quantize; --allow-mismatch"),
])  # fmt: skip
def test_a_refusal_names_the_way_out_that_there_is(code, method, said, exported):
    """A budget has no say in which mistake a graph is nearest to."""
    report = exported[1]
    facts = dict(report.facts) | ({"quantized": {"method": method}} if method else {})
    wrong = replace(report.verified, findings=(Finding(code, "model.onnx", "..."),))
    error = api_onnx._mismatch(replace(report, facts=facts, verified=wrong))
    assert said in str(error)
    assert str(error).endswith("--allow-mismatch publishes it all the same.")


@pytest.mark.usefixtures("traced_already")
def test_a_graph_that_computes_something_else_is_not_published(exported, tmp_path):
    pair = exported[0]
    other = other_alpha(pair, tmp_path / "other")
    with pytest.raises(ParityError, match="--allow-mismatch") as raised:
        dora_export.export_onnx(pair.base, other, tmp_path / "out")
    assert raised.value.exit_code == 1
    assert raised.value.report.verdict == "wrong"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other"]
    report = dora_export.export_onnx(pair.base, other, tmp_path / "out", allow_mismatch=True)
    assert (report.verdict, report.exit_code) == ("wrong", 1)
    said = json.loads((tmp_path / "out" / "dora_export.json").read_text())
    assert said["onnx"]["parity"]["verdict"] == "wrong"


@pytest.mark.usefixtures("traced_already")
def test_the_command_ends_with_1_and_writes_the_page_all_the_same(exported, tmp_path):
    pair = exported[0]
    other = other_alpha(pair, tmp_path / "other")
    arguments = ["onnx", str(pair.base), str(other), "-o", str(tmp_path / "out")]
    result = CliRunner().invoke(cli, [*arguments, "--html", str(tmp_path / "page.html")])
    assert result.exit_code == 1
    assert "graph-mistaken" in result.stderr
    assert "graph-mistaken" in (tmp_path / "page.html").read_text()
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("traced_already")
def test_without_verification_the_report_says_so(exported, tmp_path):
    pair = exported[0]
    result = CliRunner().invoke(
        cli, ["onnx", str(pair.base), str(pair.adapter), "-o", str(tmp_path / "o"), "--no-verify"]
    )
    assert result.exit_code == 0, result.stderr
    assert "not compared with the unmerged model" in result.stdout
    assert json.loads((tmp_path / "o" / "dora_export.json").read_text())["onnx"]["parity"] is None


@pytest.mark.usefixtures("traced_already")
def test_a_merged_folder_is_exported_as_it_is_stored(exported, tmp_path):
    """Cast where its dtype is another than the graph's, its own files left alone."""
    pair = exported[0]
    dora_export.merge(pair.base, pair.adapter, tmp_path / "merged")
    report = dora_export.export_onnx(tmp_path / "merged", None, tmp_path / "out")
    assert report.verdict == "right"
    assert report.verified.tiers[0].figures["mistakes"] == {}
    said = json.loads((tmp_path / "out" / "dora_export.json").read_text())
    assert said["adapters"] == []
    dora_export.merge(pair.base, pair.adapter, tmp_path / "half", dtype="bf16")
    before = sorted(p.name for p in (tmp_path / "half").iterdir())
    with pytest.raises(ParityError):  # bfloat16 weights are not the graph's
        dora_export.export_onnx(tmp_path / "half", None, tmp_path / "out2")
    assert sorted(p.name for p in (tmp_path / "half").iterdir()) == before


def test_what_onnxruntime_cannot_run_is_published_unchecked(exported, tmp_path, monkeypatch):
    """As a bfloat16 graph on the CPU: exit code 3, and the manifest says so."""
    pair, report, out, _ = exported

    def make(request, folder):
        model = onnx.load(out / "model.onnx")
        model.graph.node[0].op_type = "NoSuchOperator"
        onnx.save(model, request.folder / "model.onnx")
        parity = Parity("model.onnx", request.plan, outputs=["logits"])
        return Made(("model.onnx",), dict(report.facts), (parity,))

    monkeypatch.setattr(trace, "make", make)
    found = dora_export.export_onnx(pair.base, pair.adapter, tmp_path / "out")
    assert (found.verdict, found.exit_code) == ("unchecked", 3)
    assert [f.code for f in found.verified.findings] == ["graph-unsupported"]
    said = json.loads((tmp_path / "out" / "dora_export.json").read_text())
    assert said["onnx"]["parity"]["verdict"] == "unchecked"


@pytest.mark.usefixtures("traced_already")
def test_an_interrupted_export_leaves_nothing(exported, tmp_path, monkeypatch):
    pair = exported[0]

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(api_onnx, "_verified", interrupt)
    with pytest.raises(KeyboardInterrupt):
        dora_export.export_onnx(pair.base, pair.adapter, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# --- engines


class Scaled(nn.Module):
    """As small as a model can be."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x):
        return self.layer(x) * 2


def small_part(run=lambda model, values: [model(values["x"])], axes=None):
    module = Scaled()
    axes = {"x": {0: "batch_size"}} if axes is None else axes
    return Part(Flat(module, ["x"], run, ["y"]), {"x": torch.randn(3, 8)}, axes, ["y"])


@pytest.mark.parametrize("engine", ["torch", "transformers"])
def test_both_engines_give_the_same_names_and_values(engine, tmp_path, capfd):
    part = small_part()
    model = engines.export(part, None, engine)
    assert capfd.readouterr() == ("", "")  # exporters speak of their progress
    tidy.tidy(model)
    assert [v.name for v in model.graph.inputs] == ["x"]
    assert [v.name for v in model.graph.outputs] == ["y"]
    assert str(model.graph.inputs[0].shape[0]) == "batch_size"
    ir.save(model, tmp_path / "m.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    x = torch.randn(5, 8)
    expected = part.module(x)[0].detach().numpy()
    assert np.abs(session.run(None, {"x": x.numpy()})[0] - expected).max() < 1e-5


def test_the_next_engine_is_asked_where_one_fails_and_the_reason_is_kept(monkeypatch):
    def fail(part, opset):
        raise RuntimeError("no such operator: aten.frobnicate")

    monkeypatch.setattr(engines, "_by_torch", fail)
    _, engine, why = engines.traced(small_part(), None, "auto")
    assert engine == "transformers"
    assert why == ["engine torch: RuntimeError: no such operator: aten.frobnicate"]
    monkeypatch.setattr(engines, "_by_transformers", fail)
    with pytest.raises(GraphError, match="--into") as raised:
        engines.traced(small_part(), None, "auto")
    assert str(raised.value).count("aten.frobnicate") == 2


def test_an_axis_that_the_exporter_fixes_is_refused():
    def run(model, values):
        return [model(values["x"][:3])[:3] + values["x"].reshape(3, 8)]

    with pytest.raises((GraphError, engines.TraceFailure), match=r"batch_size|3"):
        engines.export(small_part(run), None, "torch")


def test_an_input_that_the_model_does_not_use_is_told():
    part = small_part()
    inputs = {**part.inputs, "unused": torch.randn(3, 8)}
    module = Flat(Scaled(), list(inputs), lambda m, v: [m(v["x"])], ["y"])
    model = engines.export(Part(module, inputs, part.axes, ["y"]), None, "torch")
    assert [v.name for v in model.graph.inputs] == ["x", "unused"]  # torch keeps it


# --- modules from Python


def test_a_module_from_python_is_published_and_held_against_itself(tmp_path):
    report = dora_export.export_module(
        Scaled(), {"x": torch.randn(3, 8)}, tmp_path / "out", axes={"x": {0: "rows"}},
        outputs=["y"],
    )  # fmt: skip
    assert report.verdict == "right"
    assert set(report.verified.tiers[0].figures) == {"y, the example inputs", "y, longer ones"}
    graph = graph_of(tmp_path / "out")
    assert (dims(graph.input[0]), dims(graph.output[0])) == (["rows", 8], ["rows", 8])
    said = json.loads((tmp_path / "out" / "dora_export.json").read_text())
    assert said["onnx"]["parity"] == "right"


def test_a_module_whose_graph_is_another_is_not_published(tmp_path, monkeypatch):
    whole = tidy.tidy

    def spoil(model):
        whole(model)
        for value in model.graph.initializers.values():
            if len(value.const_value.shape) == 2:
                value.const_value = ir.tensor(value.const_value.numpy() * 1.001, name=value.name)

    monkeypatch.setattr(tidy, "tidy", spoil)
    with pytest.raises(ParityError, match=r"of .* on the example inputs"):
        dora_export.export_module(Scaled(), {"x": torch.randn(3, 8)}, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("size", "axes", "outputs", "remedy"),
    [
        (1, {"x": {0: "rows"}}, None, "2 or more"),
        (3, {"z": {0: "rows"}}, None, "Inputs are x"),
        (3, {}, ["a", "b"], "2 names for 1 outputs"),
    ],
)
def test_examples_that_say_too_little_are_refused(size, axes, outputs, remedy, tmp_path):
    with pytest.raises(GraphError, match=remedy):
        dora_export.export_module(
            Scaled(), {"x": torch.randn(size, 8)}, tmp_path / "out", axes=axes, outputs=outputs
        )
    assert list(tmp_path.iterdir()) == []


# --- pooling


def sentence_folder(tmp_path, modules=("Transformer", "Pooling", "Normalize"), **pooling):
    (tmp_path / "1_Pooling").mkdir(parents=True)
    pooling = pooling or {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    entries = [{"type": f"sentence_transformers.models.{m}",
                "path": "1_Pooling" if m == "Pooling" else ""} for m in modules]  # fmt: skip
    (tmp_path / "modules.json").write_text(json.dumps(entries))
    return tmp_path


def test_pooling_is_as_the_folder_says(tmp_path):
    folder = sentence_folder(tmp_path)
    assert pooling.pooling_of(folder, "config") == pooling.Pooling("mean", True)
    assert pooling.pooling_of(folder, "last") == pooling.Pooling("last", True)


@pytest.mark.parametrize(
    ("modules", "config", "remedy"),
    [
        (("Transformer",), {}, "Pass --pooling mean, cls or last"),
        (("Transformer", "Pooling", "Dense"), {}, "Leave the option out"),
        (("Transformer", "Pooling"), {"pooling_mode_max_tokens": True}, "if one of them is meant"),
        (("Transformer", "Pooling"), {"pooling_mode_mean_tokens": True,
                                      "pooling_mode_cls_token": True}, "if one of them is meant"),
    ],
)  # fmt: skip
def test_pooling_that_cannot_be_in_the_graph_is_refused(tmp_path, modules, config, remedy):
    folder = sentence_folder(tmp_path, modules, **config)
    with pytest.raises(GraphError, match=remedy):
        pooling.pooling_of(folder, "config")


NESTED = "[" * 50_000


@pytest.mark.parametrize(
    ("entries", "why"),
    [
        ('[{"type": "x.Pooling", "path": "../outside"}]', "names a file outside its folder"),
        ('[{"type": "x.Pooling", "path": "/etc"}]', "names a file outside its folder"),
        ('[{"type": "x.Pooling"}]', "cannot be read"),
        (NESTED, "not JSON"),
        ('{"type": "x.Pooling"}', "expected a JSON list"),
        ("[" + "0," * 1_000_000 + "0]", "more than 1000000 values"),
    ],
    ids=["above", "absolute", "no path", "nested", "no list", "large"],
)
def test_hostile_lists_of_modules_are_refused(tmp_path, entries, why):
    folder = sentence_folder(tmp_path / "model")
    sentence_folder(tmp_path / "outside")
    shutil.copy(tmp_path / "outside/1_Pooling/config.json", tmp_path / "outside")
    (folder / "modules.json").write_text(entries)
    with pytest.raises(InputError, match=why):
        pooling.pooling_of(folder, "config")


@pytest.mark.parametrize("mode", ["mean", "cls", "last"])
@pytest.mark.parametrize("normalise", [True, False])
def test_embeddings_in_the_graph_and_in_the_reference_are_of_one_definition(mode, normalise):
    """Each written on its own, and both from the definition: padding on either side counts not."""
    states = torch.randn(3, 5, 8)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 1, 1, 1]])
    ours = pooling._embedding(states, mask, pooling.Pooling(mode, normalise)).numpy()
    values, outputs = {"attention_mask": mask.numpy()}, {"last_hidden_state": states.numpy()}
    theirs = embedding(mode, normalise=normalise)(values, outputs)["sentence_embedding"]
    assert np.abs(ours - theirs).max() < 1e-6
    row = {"mean": states[2, 2:].mean(0), "cls": states[2, 0], "last": states[2, 4]}[mode]
    row = row / row.norm() if normalise else row
    assert np.abs(ours[2] - row.numpy()).max() < 1e-6


def test_a_sentence_encoder_is_published_with_its_pooling(tmp_path):
    torch.manual_seed(0)
    config = BertConfig(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
                        num_attention_heads=4, max_position_embeddings=64,
                        initializer_range=0.2)  # fmt: skip
    pair = prepare(tmp_path, BertModel(config), target_modules=["query", "dense"])
    sentence_folder(pair.base)
    # Old checkpoints store what the library makes by itself now, and no longer writes.
    stored = load_file(pair.base / "model.safetensors")
    places = {"embeddings.position_ids": torch.arange(64)[None]}
    save_file(stored | places, pair.base / "model.safetensors", {"format": "pt"})
    report = dora_export.export_onnx(
        pair.base, pair.adapter, tmp_path / "out", options=GraphOptions(pooling="config")
    )
    assert report.verdict == "right"
    figures = report.verified.tiers[0].figures["outputs"]
    assert {"last_hidden_state", "sentence_embedding"} < set(figures)
    assert figures["sentence_embedding"]["effect"]["max"] > 0.01
    assert figures["sentence_embedding"]["error"]["max"] < 1e-5
    assert report.facts["pooling"] == {"mode": "mean", "normalise": True}
    (output,) = [v for v in graph_of(tmp_path / "out").output if v.name == "sentence_embedding"]
    assert dims(output) == ["batch_size", 32]
    dora_export.merge(pair.base, pair.adapter, tmp_path / "merged")
    kept = load_file(tmp_path / "merged" / "model.safetensors")["embeddings.position_ids"]
    assert torch.equal(kept, places["embeddings.position_ids"])


# --- refusals


@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        ({"opset": 9}, "the exporter writes 18 to"),
        ({"task": "divination"}, "expected one of"),
        ({"batch": 0}, "at least 1"),
        ({"dtype": "int3"}, "expected fp32, fp16, bf16"),
        ({"quantize": "int4", "block_size": 17}, "expected one of 16"),
        ({"quantize": "int8", "dtype": "fp16"}, "Use fp32"),
        ({"quantize": "int4", "dtype": "bf16"}, "Use fp32 or fp16"),
        ({"quantize": "int8", "share_weights": True}, "quantised weights"),
        ({"layout": "transformers-js", "share_weights": True}, "Leave one of them out"),
        ({"layout": "transformers-js", "adapters": True}, "--adapters: transformers.js loads no"),
    ],
)
def test_options_that_do_not_go_are_refused_before_any_work(exported, options, remedy, tmp_path):
    pair = exported[0]
    adapters = options.get("adapters", False)
    options = GraphOptions(**{n: o for n, o in options.items() if n != "adapters"})
    with pytest.raises(DoraExportError, match=remedy):
        dora_export.export_onnx(
            pair.base, pair.adapter, tmp_path / "out", adapters=adapters, options=options
        )
    assert list(tmp_path.iterdir()) == []


def test_code_of_the_models_own_is_not_run(exported, tmp_path):
    pair = exported[0]
    shutil.copytree(pair.base, tmp_path / "base")
    config = json.loads((pair.base / "config.json").read_text())
    config["architectures"] = ["LlamaWithSurprise"]
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    with pytest.raises(GraphError, match=r"never executed.*--into"):
        dora_export.export_onnx(tmp_path / "base", pair.adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_task_whose_head_the_model_does_not_store_is_refused(exported, tmp_path):
    pair = exported[0]
    with pytest.raises(GraphError, match=r"random values.*--task"):
        dora_export.export_onnx(
            pair.base, pair.adapter, tmp_path / "out",
            options=GraphOptions(task="text-classification"),
        )  # fmt: skip
    assert list(tmp_path.iterdir()) == []


def test_graph_names_are_those_that_transformers_js_looks_for():
    names = {
        (): "onnx/model.onnx",
        (("dtype", "fp16"),): "onnx/model_fp16.onnx",
        (("quantize", "int8"),): "onnx/model_int8.onnx",
        (("quantize", "int4"),): "onnx/model_q4.onnx",
    }
    for options, name in names.items():
        graph, data = trace.graph_name(GraphOptions(layout="transformers-js", **dict(options)))
        assert (graph, data) == (name, f"{name.removeprefix('onnx/')}_data")
    assert trace.graph_name(GraphOptions()) == ("model.onnx", "model.onnx.data")


def test_every_class_of_the_list_has_its_task():
    assert tasks.task_of("GPT2LMHeadModel") == "text-generation"
    assert tasks.task_of("BertModel") == "feature-extraction"
    assert tasks.task_of("CLIPTextModelWithProjection") == "feature-extraction"
    assert tasks.task_of("Frobnicator") is None


# --- fused


LENGTHS, STEPS = (3, 7, 12), 3
NOISE = 2e-5  # of logits of about 4


@pytest.fixture(scope="module")
def fused(exported, tmp_path_factory):
    """The decoder's graph, fused, and a session of it."""
    graph = ir.load(exported[2] / "model.onnx")
    fuse.fuse(graph, "cpu")
    path = tmp_path_factory.mktemp("fused") / "model.onnx"
    ir.save(graph, path)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what is refused below is told as an error
    return graph, onnxruntime.InferenceSession(path, options)


class Decoding:
    """A batch that goes through the graph, its cache fed back."""

    def __init__(self, session):
        self.session = session
        self.outputs = [one.name for one in session.get_outputs()]
        self.past = {
            one.name: np.zeros((len(LENGTHS), one.shape[1], 0, one.shape[3]), np.float32)
            for one in session.get_inputs() if one.name.startswith("past")
        }  # fmt: skip

    def __call__(self, ids, mask, positions):
        given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, **self.past}
        found = dict(zip(self.outputs, self.session.run(None, given), strict=True))
        self.past = {n: found[n.replace("past_key_values", "present")] for n in self.past}
        return found["logits"]


def padded(texts, side):
    """Tokens, mask and positions of texts of different lengths."""
    longest = max(LENGTHS)
    ids, mask = np.zeros((2, len(texts), longest), np.int64)
    for row, text in enumerate(texts):
        place = slice(longest - len(text), None) if side == "left" else slice(len(text))
        ids[row, place], mask[row, place] = text, 1
    return ids, mask, np.maximum(mask.cumsum(1) - 1, 0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_fused_decoder_gives_a_padded_batch_what_each_text_gives_alone(side, exported, fused):
    pair, session = exported[0], fused[1]
    make = np.random.default_rng(3)
    texts = [make.integers(3, VOCABULARY, size=n) for n in LENGTHS]
    more = make.integers(3, VOCABULARY, size=(len(texts), STEPS))
    with torch.no_grad():  # unmerged, one text at a time, without padding or cache
        expected = [
            pair.wrapped(torch.tensor(np.concatenate([text, rest]))[None]).logits[0].numpy()
            for text, rest in zip(texts, more, strict=True)
        ]
    decoding = Decoding(session)
    ids, mask, positions = padded(texts, side)
    found = [one[m == 1] for one, m in zip(decoding(ids, mask, positions), mask, strict=True)]
    positions = np.array(LENGTHS)[:, None]
    for step in range(STEPS):
        mask = np.concatenate([mask, np.ones_like(mask[:, :1])], axis=1)
        logits = decoding(more[:, step : step + 1], mask, positions + step)
        found = [np.concatenate(pair) for pair in zip(found, logits, strict=True)]
    scale = max(np.abs(one).max() for one in expected)
    for one, other in zip(found, expected, strict=True):
        assert np.abs(one - other).max() < NOISE
    assert scale > 2
    # Padding seen, or positions counted from the padding: off by far more.
    wrong = Decoding(session)(ids, np.ones_like(ids), np.arange(ids.shape[1])[None] + 0 * ids)
    at = (0, -1) if side == "left" else (0, LENGTHS[0])
    assert np.abs(wrong[at] - expected[0][LENGTHS[0] - 1]).max() > 1000 * NOISE


def test_several_new_tokens_after_a_cache_are_refused_for_a_batch_and_never_wrong(fused):
    """onnxruntime's kernel takes one sequence then; it says so."""
    decoding = Decoding(fused[1])
    ids = np.full((len(LENGTHS), 4), 5)
    positions = np.arange(4)[None] + 0 * ids
    decoding(ids, np.ones_like(ids), positions)
    with pytest.raises(InvalidArgument, match="batch_size must be 1"):
        decoding(ids, np.ones((len(LENGTHS), 8), np.int64), positions + 4)


def test_attention_is_grouped_and_nothing_is_reshaped_around_it(fused):
    kinds = collections.Counter(node.op_type for node in fused[0].graph)
    assert kinds["GroupQueryAttention"] == 2
    assert fuse.takes_one_sequence_after_a_cache(fused[0])
    assert kinds["RotaryEmbedding"] == 4
    assert "Softmax" not in kinds
    ends = ("GroupQueryAttention", "RotaryEmbedding")
    reshaped = [n.inputs[0].producer() for n in fused[0].graph if n.op_type == "Reshape"]
    assert not [n for n in reshaped if n.op_type in ends]
    assert kinds["Reshape"] <= 4  # of masks and positions, once
    skips = [n for n in fused[0].graph if n.op_type == "SkipSimplifiedLayerNormalization"]
    assert [[o.name != "" for o in n.outputs] for n in skips] == [[True, False, False, True]] * 4


@pytest.mark.parametrize(
    ("known", "said"),
    [(True, None), (False, "other steps than those known here"), (None, "know no attention")],
    ids=["known", "other steps", "other attention"],
)
def test_a_slower_graph_than_fusing_gives_otherwise_is_told(
    known, said, exported, tmp_path, monkeypatch
):
    """In the summary, the report and the manifest: such a graph is right, so nothing else would."""
    pair, _, out, _ = exported
    graph = ir.load(out / "model.onnx")
    if known is None:  # a pattern that the library's steps do not know
        for node in [n for n in graph.graph if n.op_type == "Softmax"]:
            node.attributes["axis"] = ir.AttrInt64("axis", 3)
    monkeypatch.setattr(engines, "traced", lambda *_: (graph.clone(), "torch", []))
    if known is False:
        monkeypatch.delattr(onnxruntime_fusions, "_fuse_group_query_attention")
    reports = []
    real = text_onnx.summary
    monkeypatch.setattr(
        text_onnx, "summary", lambda report, path: reports.append(report) or real(report, path)
    )
    arguments = ["onnx", str(pair.base), str(pair.adapter), "--fuse", "cpu", "--no-verify", "-o"]
    printed = CliRunner().invoke(cli, [*arguments, str(tmp_path / "out")])
    assert printed.exit_code == 0, printed.output
    report = reports[0].to_dict()  # what --json prints
    made = json.loads((tmp_path / "out" / "dora_export.json").read_text())["onnx"]
    assert made["fused_operators"].get("GroupQueryAttention", 0) == (2 if known else 0)
    assert made["fused_operators"]["SkipSimplifiedLayerNormalization"] == 4
    if said is None:
        assert (list(report["warnings"]), made["warnings"]) == ([], [])
        assert "--fuse" not in printed.stderr
    else:
        (warning,) = made["warnings"]
        assert said in warning
        assert list(report["warnings"]) == [warning]
        assert said in " ".join(printed.stderr.split())


@pytest.mark.parametrize("fails", ["on loading", "on its inputs"])
@pytest.mark.parametrize(("made_by", "quantize", "said"), [
    ("cpu", None, r"--fuse cpu: .*cannot be run.*Leave the option out"),
    ("cpu", "int4", r"--fuse cpu: .*cannot be run.*Leave the option out"),
    ("none", None, r"the exporter makes .*cannot be run.*Pass another --engine"),
])  # fmt: skip
def test_a_graph_that_onnxruntime_does_not_run_is_refused(
    fails, made_by, quantize, said, exported, tmp_path, monkeypatch
):
    """As GPT-2's, where fusions take a norm's rows, reshaped, for its states; or in a product."""
    pair, _, out, _ = exported
    graph = ir.load(out / "model.onnx")

    def spoil(model, *_):
        if fails == "on loading":
            model.graph[-1].op_type = "NoSuchOperator"
        else:  # no word is among these
            words = next(v for n, v in model.graph.initializers.items() if "embed" in n)
            words.const_value = ir.tensor(words.const_value.numpy()[:2], name=words.name)
        return []

    monkeypatch.setattr(engines, "traced", lambda *_: (graph, "torch", []))
    if made_by == "none":
        spoil(graph)
    monkeypatch.setattr(fuse, "fuse", spoil)
    monkeypatch.setattr(files, "check", lambda path: None)
    with pytest.raises(GraphError, match=said):
        dora_export.export_onnx(
            pair.base, pair.adapter, tmp_path / "out", verify=made_by == "none",
            options=GraphOptions(fuse=made_by, quantize=quantize),
        )  # fmt: skip
    assert list(tmp_path.iterdir()) == []
