"""Real models as graphs: figures against PEFT's active adapter, which is code of neither side."""

import importlib.util

import numpy as np
import onnxruntime
import pytest
import torch
from peft import PeftModel
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

import dora_export
from dora_export import GraphOptions
from tests.test_real import MODELS
from tools.make_real_models import build_all

pytestmark = [
    pytest.mark.real,
    # PEFT asks transformers whether gradients are checkpointed under a name on its way out.
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
]
TEXTS = ["The sea is calm tonight.", "Rust and moths corrupt."]
PROMPT = "What is the capital of France?"
TOKENS = 64


@pytest.fixture(scope="session")
def models():
    return build_all(MODELS)


def active(cls, base, adapter):
    """The unmerged model as users know it."""
    model = cls.from_pretrained(base, dtype=torch.float32)
    return PeftModel.from_pretrained(model, adapter).eval()


def test_minilm_as_a_graph_equals_peft(models, tmp_path):
    report = dora_export.export_onnx(
        models.minilm, models.minilm_dora, tmp_path / "out",
        options=GraphOptions(pooling="config"),
    )  # fmt: skip
    assert report.verdict == "right"
    encoded = AutoTokenizer.from_pretrained(tmp_path / "out")(
        TEXTS, padding=True, return_tensors="pt"
    )
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx")
    names = [o.name for o in session.get_outputs()]
    found = dict(zip(names, session.run(None, {i.name: encoded[i.name].numpy()
                                               for i in session.get_inputs()}),
                     strict=True))  # fmt: skip
    with torch.no_grad():
        states = active(AutoModel, models.minilm, models.minilm_dora)(**encoded).last_hidden_state
    mask = encoded["attention_mask"][..., None]
    mean = (states * mask).sum(1) / mask.sum(1)
    embedding = (mean / mean.norm(dim=1, keepdim=True)).numpy()
    kept = mask[..., 0].bool().numpy()
    error = np.abs(found["last_hidden_state"] - states.numpy())[kept].max()
    print(f"MiniLM: last_hidden_state differs by {error:.2e} of {states.abs().max():.2f}")
    assert error <= 1e-4
    assert np.abs(found["sentence_embedding"] - embedding).max() <= 1e-5


def greedy(session, ids, tokens):
    """Write on with the graph's own cache; return the tokens and the logits they were chosen by."""
    slots = {i.name: i for i in session.get_inputs()}
    outputs = [o.name for o in session.get_outputs()]
    half = {"tensor(float16)": np.float16}
    past = {n: np.zeros((1, s.shape[1], 0, s.shape[3]), half.get(s.type, np.float32))
            for n, s in slots.items() if n.startswith("past")}  # fmt: skip
    seen, new, chosen, logits = ids.shape[1], ids, [], []
    for _ in range(tokens):
        values = {"input_ids": new, "attention_mask": np.ones((1, seen), np.int64),
                  "position_ids": np.arange(seen - new.shape[1], seen)[None], **past}  # fmt: skip
        found = dict(zip(outputs, session.run(None, values), strict=True))
        logits.append(found["logits"][0, -1].astype(np.float32))
        chosen.append(int(logits[-1].argmax()))
        past = {n: found[n.replace("past_key_values", "present")] for n in past}
        new, seen = np.array([[chosen[-1]]]), seen + 1
    return chosen, np.stack(logits)


def check_smollm2(models, out):
    """Hold a published decoder against PEFT; return the largest error of a logit."""
    tokenizer = AutoTokenizer.from_pretrained(out)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPT}], add_generation_prompt=True, return_tensors="pt",
        return_dict=True,
    )["input_ids"]  # fmt: skip
    session = onnxruntime.InferenceSession(out / "model.onnx")
    ours, logits = greedy(session, ids.numpy(), TOKENS)
    model = active(AutoModelForCausalLM, models.smollm2, models.smollm2_dora)
    with torch.no_grad():
        whole = model(torch.cat([ids, torch.tensor([ours[:-1]])], dim=1)).logits[0]
    expected = whole[ids.shape[1] - 1 :].numpy()
    error = np.abs(logits - expected).max()
    equal = int((np.array(ours) == expected.argmax(-1)).sum())
    print(f"SmolLM2: logits differ by {error:.2e} of {np.abs(expected).max():.1f}, "
          f"{equal} of {TOKENS} greedy tokens equal")  # fmt: skip
    return error, equal


@pytest.mark.nightly
def test_smollm2_as_a_graph_equals_peft(models, tmp_path):
    out = tmp_path / "out"
    report = dora_export.export_onnx(models.smollm2, models.smollm2_dora, out, prompts=[PROMPT])
    assert report.verdict == "right"
    assert sorted(report.files) >= ["chat_template.jinja"]
    error, equal = check_smollm2(models, out)
    assert error <= 1e-3
    assert equal == TOKENS
    if importlib.util.find_spec("onnxruntime_genai") is None:
        return  # light machines have no second run time; the graph itself was checked
    check_genai(out)


def check_genai(out):
    """Let onnxruntime-genai write from the folder as it is; return its text."""
    import onnxruntime_genai as genai

    model = genai.Model(str(out))
    tokenizer = genai.Tokenizer(model)
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=64, do_sample=False)
    generator = genai.Generator(model, parameters)
    prompt = tokenizer.encode(f"<|im_start|>user\n{PROMPT}<|im_end|>\n<|im_start|>assistant\n")
    generator.append_tokens(prompt)
    written = []
    while not generator.is_done() and len(written) < 24:
        generator.generate_next_token()
        written.append(int(generator.get_next_tokens()[0]))
    session = onnxruntime.InferenceSession(out / "model.onnx")
    ours, _ = greedy(session, np.array([prompt], np.int64), len(written))
    assert written == ours
    return tokenizer.decode(written)
