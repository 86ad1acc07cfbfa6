"""Adapters made by PEFT itself on small models, trained values included, and how they are stored.

What the tests need to know of a layer (where its base weight lies, which way round it is stored,
its scaling) is asked of PEFT's own objects, never of the package under test.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import peft
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from tests import oracle

PREFIX = "base_model.model."


@dataclass(frozen=True)
class Layer:
    """One adapted layer, in PEFT's words.

    Attributes:
        module: Path in the model that PEFT wrapped.
        transposed: The base stores ``(in, out)``: GPT-2's Conv1D, and an embedding.
        embedding: Its factors are called lora_embedding_A and lora_embedding_B.
        scaling: The factor on B A that PEFT uses.
    """

    module: str
    transposed: bool
    embedding: bool
    scaling: float

    @property
    def tensor(self):
        """Name of its weight."""
        return f"{self.module}.weight"


@dataclass(frozen=True)
class Made:
    """A base folder, PEFT's model on it and the folder PEFT saved its adapter to."""

    base: Path
    adapter: Path
    model: peft.PeftModel
    layers: tuple[Layer, ...]

    def layer(self, module):
        """Return one adapted layer."""
        return next(layer for layer in self.layers if layer.module == module)


class Zoo(nn.Module):
    """Every kind of layer that PEFT's LoRA wraps with a weight of its own."""

    def __init__(self):
        super().__init__()
        self.wide = nn.Linear(1536, 700)
        self.square = nn.Linear(192, 192)
        self.cancelled = nn.Linear(512, 384)
        self.untouched = nn.Linear(24, 24)
        self.table = nn.Embedding(600, 160)
        self.conv1 = nn.Conv1d(128, 192, 3)
        self.conv2 = nn.Conv2d(96, 128, (3, 2))
        self.conv3 = nn.Conv3d(48, 64, (2, 3, 2))


ZOO = ("wide", "square", "cancelled", "table", "conv1", "conv2", "conv3")


class Stack(nn.Module):
    """Twelve numbered blocks whose names tempt patterns to match too much."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    "q_proj": nn.Linear(20, 12),
                    "k_proj": nn.Linear(20, 12),
                    "my_q_proj": nn.Linear(20, 12),
                    "o_proj": nn.Linear(12, 12),
                }
            )
            for _ in range(12)
        )


def make(folder, model, config, base_dtype=torch.float32, adapter_dtype=torch.float32, seed=0):
    """Wrap a model with PEFT, give the adapter trained values, and save base and adapter."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.05)
    model = model.to(base_dtype).eval()
    wrapped = peft.get_peft_model(model, config).eval()
    layers = []
    for path, module in wrapped.base_model.model.named_modules():
        if isinstance(module, LoraLayer):
            layers.append(_describe(path, module))
            _train(path, module, adapter_dtype)
    save_base(folder / "base", wrapped.base_model.model)
    wrapped.save_pretrained(folder / "adapter")
    return Made(folder / "base", folder / "adapter", wrapped, tuple(layers))


def _describe(path, module):
    base = module.get_base_layer()
    embedding = isinstance(base, nn.Embedding)
    return Layer(path, embedding or isinstance(base, Conv1D), embedding, module.scaling["default"])


def _train(path, module, dtype):
    """Give A and B values of the weight's size, and m values off the norms by up to 30 %."""
    embedding = isinstance(module.get_base_layer(), nn.Embedding)
    pair = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
    a, b = (getattr(module, name)["default"] for name in pair)
    a, b = (a, b) if embedding else (a.weight, b.weight)
    rank = a.shape[0]
    scaling = module.scaling["default"]
    for factor in (a, b):
        # s B A gets three quarters of the size of W: 0.75 * 0.05
        factor.data = torch.randn(factor.shape).mul_((0.0375 / scaling / rank**0.5) ** 0.5)
        factor.data = factor.data.to(dtype)
    weight = module.get_base_layer().weight
    delta = scaling * b.data.double().reshape(-1, rank) @ a.data.double().reshape(rank, -1)
    if path == "cancelled":
        # What is left is the rounding error, which in float32 would be too small even for the
        # oracle's float64: there it is the 512th part.
        more = 2**-9 if weight.dtype is torch.float32 else 0
        weight.data = (-delta * (1 + more)).to(weight.dtype)
    if "default" in module.lora_magnitude_vector:
        transposed = embedding or isinstance(module.get_base_layer(), Conv1D)
        W = weight.data.double()
        norm = ((W.T if transposed else W.flatten(1)) + delta).norm(dim=1)
        m = module.lora_magnitude_vector["default"].weight
        m.data = (norm * torch.empty_like(norm).uniform_(0.7, 1.3)).reshape(m.shape).to(dtype)


def save_base(folder, model):
    """Save the weights under PEFT's wrappers as a checkpoint folder, with its config if any."""
    folder.mkdir(parents=True)
    state = {
        name.replace("base_layer.", ""): tensor.detach().contiguous().clone()
        for name, tensor in model.state_dict().items()
        if "lora_" not in name and ".ranknum." not in name
    }
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    if hasattr(model, "config"):
        model.config.save_pretrained(folder)


def base_weight(made, layer, name=None):
    """The stored base weight, float64."""
    return oracle.float64(load_file(made.base / "model.safetensors")[name or layer.tensor])


def trained(made, layer):
    """A, B and m (or None) as PEFT saved them: float64, ``(rank, inner)``, ``(out, rank)``, 1-D."""
    stored = load_file(made.adapter / "adapter_model.safetensors")
    names = ("lora_embedding_A", "lora_embedding_B") if layer.embedding else (
        "lora_A.weight", "lora_B.weight")  # fmt: skip
    a, b = (oracle.float64(stored[f"{PREFIX}{layer.module}.{name}"]) for name in names)
    m = stored.get(f"{PREFIX}{layer.module}.lora_magnitude_vector")
    a, b = a.reshape(a.shape[0], -1), b.reshape(b.shape[0], -1)
    return a, b, None if m is None else oracle.float64(m).reshape(-1)


def merged_weight(made, layer, formula=None, name=None):
    """What the layer's weight becomes by ``formula(W, A, B, m, s)``, in the base's own shape.

    The formula sees the weight as ``(out, in * kernel)``; by default it is the oracle's.
    """
    W = base_weight(made, layer, name)
    A, B, m = trained(made, layer)
    formula = formula or (
        oracle.dora if m is not None else lambda W, A, B, m, s: oracle.lora(W, A, B, s)
    )
    seen = W.T if layer.transposed else W.reshape(W.shape[0], -1)
    result = formula(seen, A, B, m, layer.scaling)
    return result.T if layer.transposed else result.reshape(W.shape)


def forget_prefix(made, prefix, drop=()):
    """Store the base as the Hub does: without the name of the inner model and without repeats."""
    path = made.base / "model.safetensors"
    kept = {n: t for n, t in load_file(path).items() if n not in drop}
    save_file({n.removeprefix(prefix): t for n, t in kept.items()}, path, {"format": "pt"})


def edit_json(path, **changes):
    """Change entries of a JSON object in a file; None takes one away."""
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def edit_config(folder, **changes):
    """Change settings in an adapter's config."""
    edit_json(Path(folder) / "adapter_config.json", **changes)


def rekey(folder, rename):
    """Rename (or with None: drop) the tensors of an adapter."""
    path = Path(folder) / "adapter_model.safetensors"
    stored = {rename(name): tensor for name, tensor in load_file(path).items()}
    save_file({n: t for n, t in stored.items() if n is not None}, path)


def pickle_weights(folder):
    """Store an adapter's tensors as torch did before safetensors."""
    path = Path(folder) / "adapter_model.safetensors"
    torch.save(load_file(path), path.with_suffix(".bin"))
    path.unlink()


def over_all_but(values, axis):
    """The root of the sum of squares over every dimension but one, by plain definition."""
    others = tuple(i for i in range(values.ndim) if i != axis)
    return np.sqrt((values * values).sum(axis=others, keepdims=True))


def load_base(model, folder, dtype):
    """Load a saved base into a fresh model of its class, as a user would before PEFT's load."""
    model.load_state_dict(load_file(Path(folder) / "model.safetensors"))
    return model.to(dtype).eval()
