"""Graphs of tiny base models, as several exporters write them, to give merged weights to."""

import warnings

import torch
import transformers
from torch import nn
from transformers import DynamicCache

BATCH, LENGTH = torch.export.Dim.DYNAMIC, torch.export.Dim.DYNAMIC
IDS = torch.arange(3, 17).reshape(2, 7)


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


def load(folder, dtype=torch.float32):
    """The model of a folder, by the class that its config names."""
    name = transformers.AutoConfig.from_pretrained(folder).architectures[0]
    cls = getattr(transformers, name)
    return cls.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()


def export(module, arguments, path, names, outputs, shapes, **options):
    """Trace a module with torch's exporter."""
    path.parent.mkdir(parents=True, exist_ok=True)
    options = {"external_data": False, **options}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's exporter warns of itself
        torch.onnx.export(
            module, arguments, path, input_names=names, output_names=outputs, dynamo=True,
            dynamic_shapes=shapes, verbose=False, **options,
        )  # fmt: skip
    return path


def traced(folder, path, **options):
    """A text model as torch's exporter writes it: logits out, no cache."""
    model = Plain(load(folder), ["logits"])
    return export(model, (IDS, torch.ones_like(IDS)), path, ["input_ids", "attention_mask"],
                  ["logits"], ({0: BATCH, 1: LENGTH},) * 2, **options)  # fmt: skip


def traced_decoder(folder, path, **options):
    """A decoder with its cache, as torch's exporter writes it."""
    model = load(folder)
    config = model.config
    heads, dim = config.num_key_value_heads, config.head_dim
    parts = [f"{n}.{part}" for n in range(config.num_hidden_layers) for part in ("key", "value")]
    past = tuple(torch.randn(2, heads, 5, dim) for _ in parts)
    return export(
        Cached(model),
        (IDS, torch.ones(2, 12, dtype=torch.long), *past),
        path,
        ["input_ids", "attention_mask", *(f"past_key_values.{p}" for p in parts)],
        ["logits", *(f"present.{p}" for p in parts)],
        ({0: BATCH, 1: LENGTH}, {0: BATCH, 1: LENGTH}, ({0: BATCH, 2: LENGTH},) * len(parts)),
        **options,
    )
