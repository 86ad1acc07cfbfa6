"""Real models with trained adapters as graphs, by every option: minutes of tracing, so nightly."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from click.testing import CliRunner
from peft import PeftModel
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

import dora_export
from dora_export.cli.main import cli
from dora_export.onnx import engines
from tests.onnx_graphs import BATCH, LENGTH, export
from tools.make_real_models import build_all

pytestmark = [
    pytest.mark.nightly,
    pytest.mark.real,
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
]
MODELS = Path(__file__).parents[1] / "build" / "real"
TEXTS = ["A man is eating food.", "The girl is carrying a baby through the old town."]


class Hidden(nn.Module):
    """An encoder's last hidden states, as a graph has them."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask, token_type_ids):
        return self.model(input_ids, attention_mask, token_type_ids).last_hidden_state


def test_minilm_takes_its_adapter_without_tracing_it_again(tmp_path):
    build_all(MODELS)
    base, adapter = MODELS / "minilm", MODELS / "minilm-dora"
    model = AutoModel.from_pretrained(base, dtype=torch.float32, attn_implementation="eager").eval()
    tokens = dict(AutoTokenizer.from_pretrained(base)(TEXTS, padding=True, return_tensors="pt"))
    names = ["input_ids", "attention_mask", "token_type_ids"]
    graph = tmp_path / "graph" / "model.onnx"
    export(
        Hidden(model), tuple(tokens[n] for n in names), graph, names, ["last_hidden_state"],
        ({0: BATCH, 1: LENGTH},) * 3, external_data=True,
    )  # fmt: skip
    # the exporter leaves the pooler out, since no output needs it
    report = dora_export.export_onnx(
        base, adapter, tmp_path / "out", into=graph, verify=False, allow_missing=["pooler"]
    )
    assert report.facts["rewritten"] >= 36
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx")
    (got,) = session.run(None, {n: tokens[n].numpy() for n in names})
    with torch.no_grad():
        before = model(**tokens).last_hidden_state.numpy()
        active = PeftModel.from_pretrained(model, adapter).eval()
        expected = active(**tokens).last_hidden_state.numpy()
    mask = tokens["attention_mask"].numpy()[..., None]
    error = np.abs((got - expected) * mask).max()
    print(f"largest error {error:.2g}, the adapter's effect {np.abs(before - expected).max():.2g}")
    assert error <= 1e-4
    assert np.abs((before - expected) * mask).max() > 1000 * error


# --- traced


@pytest.fixture(scope="module")
def trace_once():
    """Options that change nothing about a trace get the one that is there: each takes minutes."""
    kept = {}
    real = engines.traced

    def traced(part, opset, engine):
        key = (type(part.module.model), *((n, t.shape, t.dtype) for n, t in part.inputs.items()),
               *part.outputs)  # fmt: skip
        if key not in kept:
            kept[key] = real(part, opset, engine)
        model, used, failures = kept[key]
        return model.clone(), used, failures

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engines, "traced", traced)
        yield


def exported(model, out, *options):
    """The command's report on one of the real models, as a user reads it."""
    build_all(MODELS)
    base, adapter = MODELS / model, MODELS / f"{model}-dora"
    run = CliRunner().invoke(
        cli, ["onnx", str(base), str(adapter), "-o", str(out), "--json", *options]
    )
    loose = "--allow-mismatch" in options
    assert run.exit_code in ((0, 1) if loose else (0,)), run.output
    report = json.loads(run.stdout)
    figures = report["verified"]["tiers"][0]["figures"]
    if not loose:
        assert report["verdict"] == "right"
        assert all(m["share"] < 0.01 for m in figures["mistakes"].values())
    for name, one in figures["outputs"].items():
        if not name.startswith("present."):
            print(f"{model} {' '.join(options)}: {name} off by {one['error']['max']:.2g} (rms "
                  f"{one['error']['rms']:.2g}) of {one['error']['scale']:.3g}, an effect of "
                  f"{one['effect']['max']:.3g}, choices {one['choices']}, text {figures['text']}, "
                  f"files {report['files']}")  # fmt: skip
    return figures


SMOL = "smollm2-135m"
PROMPT = "<|im_start|>user\nTell me of the sea.<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.usefixtures("trace_once")
@pytest.mark.parametrize(
    "options", [(), ("--share-weights",), ("--fuse", "cpu"), ("--fuse", "cpu", "--batch", "1")]
)
def test_smollm2_in_float32_is_the_unmerged_model(options, tmp_path):
    figures = exported(SMOL, tmp_path / "out", *options)
    assert figures["outputs"]["logits"]["error"]["max"] <= 1e-3
    assert figures["text"] == {"tokens": 64, "equal": 64}
    held = onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False).graph
    files = {e.value for t in held.initializer for e in t.external_data if e.key == "location"}
    expected = "model.safetensors" if "--share-weights" in options else "model.onnx.data"
    assert expected in files
    if "--share-weights" in options:
        sizes = [f.stat().st_size for f in (tmp_path / "out").glob("model*")]
        assert sum(sizes) < 1.01 * max(sizes)  # one copy of the weights
    fused = {n.op_type for n in held.node if n.domain == "com.microsoft"}
    assert ("GroupQueryAttention" in fused) == bool(fused) == ("--fuse" in options)
    assert ("RotaryEmbedding" in fused) == ("--fuse" in options and "--batch" not in options)


@pytest.mark.usefixtures("trace_once")
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_smollm2_in_few_bits_is_far_smaller_and_not_far_off(kind, tmp_path):
    """Its figures are printed; the command publishes by its own budget, which is not asked here."""
    out = tmp_path / "out"
    figures = exported(
        SMOL, out, "--quantize", kind, "--layout", "transformers-js", "--allow-mismatch"
    )
    errors = figures["outputs"]["logits"]["error"]
    # 3.4 and 2.7 on random tokens, whose largest logits are about 45; 18.6 where int8 overflows
    assert errors["rms"] < 0.15 * errors["scale"]
    name = {"int8": "model_int8.onnx", "int4": "model_q4.onnx"}[kind]
    assert sorted(p.name for p in (out / "onnx").iterdir()) == [name, f"{name}_data"]
    assert sum(p.stat().st_size for p in (out / "onnx").iterdir()) < 0.45 * 538e6
    assert (out / "tokenizer.json").is_file()


def test_smollm2_in_float16_chooses_what_the_unmerged_model_does(tmp_path):
    figures = exported(SMOL, tmp_path / "out", "--dtype", "fp16")
    assert figures["outputs"]["logits"]["choices"]["top1_agreement"] >= 0.99
    assert figures["text"]["equal"] >= 0.99 * 64


@pytest.mark.usefixtures("trace_once")
@pytest.mark.skipif(
    importlib.util.find_spec("onnxruntime_genai") is None,
    reason="onnxruntime-genai is not installed: pip install onnxruntime-genai",
)
def test_onnxruntime_genai_writes_what_the_unmerged_model_does(tmp_path):
    import onnxruntime_genai as genai

    exported(SMOL, tmp_path / "out")
    base, adapter = MODELS / SMOL, MODELS / f"{SMOL}-dora"
    ids = AutoTokenizer.from_pretrained(base)(PROMPT)["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    active = PeftModel.from_pretrained(model, adapter).eval()
    with torch.no_grad():
        expected = active.generate(input_ids=torch.tensor([ids]), max_length=len(ids) + 32,
                                   do_sample=False)[0].tolist()  # fmt: skip
    ours = genai.Model(str(tmp_path / "out"))
    assert genai.Tokenizer(ours).encode(PROMPT).tolist() == ids
    params = genai.GeneratorParams(ours)
    params.set_search_options(max_length=len(ids) + 32, do_sample=False)
    generator = genai.Generator(ours, params)
    generator.append_tokens(ids)
    while not generator.is_done():
        generator.generate_next_token()
    found = [int(token) for token in generator.get_sequence(0)]
    end = active.generation_config.eos_token_id  # which genai leaves out
    assert found == (expected[:-1] if expected[-1] == end else expected)
    assert len(found) > len(ids) + 8


@pytest.mark.usefixtures("trace_once")
@pytest.mark.parametrize(
    "options", [(), ("--pooling", "config"), ("--batch", "1", "--pooling", "config")]
)
def test_minilm_is_the_unmerged_model_pooled_or_not(options, tmp_path):
    figures = exported("minilm", tmp_path / "out", *options)
    assert figures["outputs"]["last_hidden_state"]["error"]["max"] <= 1e-4
    if options:
        assert figures["outputs"]["sentence_embedding"]["error"]["max"] <= 1e-5
