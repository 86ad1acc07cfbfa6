"""Real models, adapters really trained with PEFT: tensors against float64, logits against PEFT."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

import dora_export
from tests import oracle
from tools.make_real_models import build_all

pytestmark = [
    pytest.mark.real,
    # PEFT asks transformers whether gradients are checkpointed under a name on its way out.
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
]
MODELS = Path(__file__).parents[1] / "build" / "real"  # kept between runs: half a minute to make
PROMPT = "What is the capital of France?"
# Logits of two float32 programs that add in different orders: some hundred roundings of 2**-24,
# relative to the largest logit.
FLOAT32_NOISE = 1e-4


@pytest.fixture(scope="session")
def models():
    return build_all(MODELS)


def merge(base, adapter, out, **options):
    report = dora_export.merge(base, adapter, out, **options)
    assert report.adapter_tensors_used == report.adapter_tensors
    return report


def check_tensors(base, adapter, *merged):
    """Hold every tensor against the float64 oracle; return worst ulp and misrounded of each."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    scaling = config["lora_alpha"] / config["r"]
    stored = load_file(base / "model.safetensors")
    outputs = [load_file(folder / "model.safetensors") for folder in merged]
    parts = load_file(adapter / "adapter_model.safetensors")
    assert all(got.keys() == stored.keys() for got in outputs)
    total, changed = 0, 0
    worst, wrong = [0.0] * len(merged), [0.0] * len(merged)
    mistaken = {"adapter ignored": 0.0, "plain LoRA": 0.0}
    for name, W in stored.items():
        key = f"base_model.model.{name.removesuffix('.weight')}"
        assert all(got[name].dtype == W.dtype for got in outputs)
        if f"{key}.lora_A.weight" not in parts:
            assert all(torch.equal(got[name], W) for got in outputs)
            continue
        A, B, m = (parts[f"{key}.{p}"] for p in
                   ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector"))  # fmt: skip
        exact = oracle.dora(oracle.float64(W), A, B, m, scaling)
        for number, got in enumerate(outputs):
            worst[number] = max(worst[number], oracle.ulps(got[name], exact))
            wrong[number] += oracle.misrounded(got[name], exact) * exact.size
        total += exact.size
        changed += 1
        if min(mistaken.values()) > 3:  # one layer is enough
            continue
        lora = oracle.lora(oracle.float64(W), A, B, scaling)
        for mistake, values in (("adapter ignored", oracle.float64(W)), ("plain LoRA", lora)):
            distance = (np.abs(values - exact) / oracle.ulp(exact, W.dtype)).max()
            mistaken[mistake] = max(mistaken[mistake], distance)
    assert changed * 3 == len(parts)
    # the tolerance tells a merge from what it is mistaken for
    assert min(mistaken.values()) > 3
    return [(ulps, count / total) for ulps, count in zip(worst, wrong, strict=True)]


def test_smollm2_tensors_are_within_one_ulp_of_float64(models, tmp_path):
    precisions = ("float32", "float64")
    for precision in precisions:
        merge(models.smollm2, models.smollm2_dora, tmp_path / precision, precision=precision)
    found = check_tensors(
        models.smollm2, models.smollm2_dora, *(tmp_path / precision for precision in precisions)
    )
    for precision, (worst, wrong) in zip(precisions, found, strict=True):
        print(f"smollm2 {precision}: worst {worst:.4f} ulp, misrounded {wrong:.2e}")
    assert found[0][0] <= 1
    assert found[0][1] <= 1e-4
    assert found[1][0] <= 0.5
    assert found[1][1] == 0


def test_minilm_tensors_are_within_one_ulp_of_float64(models, tmp_path):
    merge(models.minilm, models.minilm_dora, tmp_path / "out")
    [(worst, wrong)] = check_tensors(models.minilm, models.minilm_dora, tmp_path / "out")
    print(f"minilm: worst {worst:.4f} ulp, misrounded {wrong:.2e}")
    assert worst <= 0.5
    assert wrong == 0


def test_smollm2_merged_writes_what_the_active_adapter_writes(models, tmp_path):
    merge(models.smollm2, models.smollm2_dora, tmp_path / "out", dtype="fp32")
    tokenizer = AutoTokenizer.from_pretrained(models.smollm2)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    chat = [{"role": "user", "content": PROMPT}]
    prompt = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]
    written = merged.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=32,
        min_new_tokens=32,
    )  # fmt: skip
    assert written.shape[1] == prompt.shape[1] + 32
    base = AutoModelForCausalLM.from_pretrained(models.smollm2, dtype=torch.float32)
    with torch.no_grad():
        ours = merged(written[:, :-1]).logits
        unadapted = base(written[:, :-1]).logits
        theirs = PeftModel.from_pretrained(base, models.smollm2_dora)(written[:, :-1]).logits
    scale = theirs.abs().max()
    print(
        f"smollm2 logits: merged vs active adapter {(ours - theirs).abs().max():.2e} of {scale:.1f}"
    )
    assert (ours - theirs).abs().max() <= FLOAT32_NOISE * scale
    assert (unadapted - theirs).abs().max() > 1000 * FLOAT32_NOISE * scale
    # The active adapter, given the text so far, picks each token that the merged model wrote. The
    # end token is held back above, so it is here.
    theirs[..., tokenizer.eos_token_id] = -torch.inf
    start = prompt.shape[1]
    assert theirs[0, start - 1 :].argmax(-1).tolist() == written[0, start:].tolist()


def test_minilm_merged_embeds_as_the_active_adapter_does(models, tmp_path):
    merge(models.minilm, models.minilm_dora, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    inputs = tokenizer(["The boat is in the harbour.", PROMPT], padding=True, return_tensors="pt")
    base = AutoModel.from_pretrained(models.minilm)
    with torch.no_grad():
        ours = AutoModel.from_pretrained(tmp_path / "out")(**inputs).last_hidden_state
        unadapted = base(**inputs).last_hidden_state
        theirs = PeftModel.from_pretrained(base, models.minilm_dora)(**inputs).last_hidden_state
    scale = theirs.abs().max()
    print(f"minilm hidden: {(ours - theirs).abs().max():.2e} of {scale:.1f}")
    assert (ours - theirs).abs().max() <= FLOAT32_NOISE * scale
    assert (unadapted - theirs).abs().max() > 1000 * FLOAT32_NOISE * scale


def test_minilm_output_is_a_whole_sentence_transformers_folder(models, tmp_path):
    merge(models.minilm, models.minilm_dora, tmp_path / "out")
    for name in ("config.json", "modules.json", "1_Pooling/config.json", "tokenizer.json"):
        source, copy = models.minilm / name, tmp_path / "out" / name
        assert copy.exists() == source.exists()
        assert not source.exists() or copy.read_bytes() == source.read_bytes()
