"""The ONNX tier: graphs of right merges pass, in every way they can be called; wrong ones do not."""

import json

import numpy as np
import onnx
import pytest
import torch
import transformers
from torch import nn
from transformers import DynamicCache

import dora_export
from dora_export.verify.graph import check_graph
from dora_export.verify.runner import OnnxRuntime, Slot
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
