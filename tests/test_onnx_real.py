"""Real models whose graphs take a trained adapter: minutes of tracing, so nightly only."""

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModel, AutoTokenizer

import dora_export
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
