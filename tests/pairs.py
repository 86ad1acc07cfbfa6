"""A base, a trained adapter on all of its linears, their right merge, and what can go wrong.

Everything is computed here with numpy from the formula; the package only makes the merge.
"""

import numpy as np
import torch
from safetensors.torch import load_file

import dora_export
from tests import oracle
from tests.small import PREFIX, RANK, edit_tensors, write_adapter, write_base, write_shards

ALPHA = 7.5
SCALING = ALPHA / RANK
LINEARS = {
    **{f"model.layers.{i}.attn.q_proj": (80, 48) for i in range(3)},
    **{f"model.layers.{i}.attn.o_proj": (48, 48) for i in range(3)},
    **{f"model.layers.{i}.mlp.experts.{j}.up": (40, 48) for i in range(2) for j in range(4)},
}
CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 48,
          "vocab_size": 60, "tie_word_embeddings": False, "rope_theta": 10000.0,
          "rms_norm_eps": 1e-6}  # fmt: skip
Q, O, EXPERT = "model.layers.1.attn.q_proj", "model.layers.1.attn.o_proj", (  # noqa: E741
    "model.layers.1.mlp.experts.2.up")  # fmt: skip
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class Pair:
    """A base, a trained adapter on all of its linears, and the right merge of both."""

    def __init__(self, folder, dtype=torch.float32, dora=True, shards=False, **fields):
        make = torch.Generator().manual_seed(3)
        self.folder, self.merged = folder, folder / "merged"
        self.base = {
            "model.norm.weight": torch.rand(48, generator=make).to(dtype),
            "model.embed_tokens.weight": torch.randn(60, 48, generator=make).to(dtype),
            "lm_head.weight": torch.randn(60, 48, generator=make).to(dtype),
        }
        self.adapter = {}
        for name, (out, inner) in LINEARS.items():
            W = (torch.randn(out, inner, generator=make) * 0.1).to(dtype)
            A = torch.randn(RANK, inner, generator=make) * 0.1
            B = torch.randn(out, RANK, generator=make) * 0.1
            self.base[f"{name}.weight"] = W
            self.adapter[f"{PREFIX}{name}.lora_A.weight"] = A
            self.adapter[f"{PREFIX}{name}.lora_B.weight"] = B
            if dora:
                m = W.float().norm(dim=1) * (0.8 + 0.4 * torch.rand(out, generator=make))
                self.adapter[f"{PREFIX}{name}.lora_magnitude_vector"] = m
        word = str(dtype).removeprefix("torch.")
        (write_shards if shards else write_base)(
            folder / "base", self.base, config={**CONFIG, "dtype": word}
        )
        write_adapter(folder / "adapter", self.adapter, use_dora=dora, lora_alpha=ALPHA,
                      target_modules=["q_proj", "o_proj", "up"], **fields)  # fmt: skip
        dora_export.merge(folder / "base", folder / "adapter", self.merged, verify="none")

    def terms(self, name):
        """W, A, B, m (or None) of a layer, float64."""
        parts = [self.adapter.get(f"{PREFIX}{name}.{p}") for p in
                 ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")]  # fmt: skip
        W, *rest = [
            None if t is None else oracle.float64(t) for t in (self.base[f"{name}.weight"], *parts)
        ]
        return (W, *rest)

    def right(self, name):
        """The layer's exact result."""
        W, A, B, m = self.terms(name)
        return oracle.lora(W, A, B, SCALING) if m is None else oracle.dora(W, A, B, m, SCALING)

    def stored(self, name):
        """A tensor of the merge, and the file that holds it."""
        for file in sorted(self.merged.glob("*.safetensors")):
            tensors = load_file(file)
            if name in tensors:
                return tensors[name], file
        raise KeyError(name)

    def plant(self, **wrong):
        """Put values, rounded as the file stores them, in the place of merged tensors."""
        for name, values in wrong.items():
            tensor, file = self.stored(name)
            planted = torch.from_numpy(np.array(values)).to(tensor.dtype)
            edit_tensors(file, lambda ts, n=name, t=planted: {**ts, n: t})


def rownorm(values):
    return np.sqrt((values * values).sum(axis=1, keepdims=True))


def scaled(V, m):
    return V * m.reshape(-1, 1) / rownorm(V)


def with_scaling(s):
    return lambda W, A, B, m: scaled(W + s * B @ A, m)


def twice(W, A, B, m):
    once = scaled(W + SCALING * B @ A, m)
    return scaled(once + SCALING * B @ A, m)


def other_axis(W, A, B, m):
    V = W + SCALING * B @ A
    return V * m / np.sqrt((V * V).sum(axis=0))


DORA_MISTAKES = {
    "not-applied": lambda W, A, B, m: W,
    "applied-twice": twice,
    "sign-flipped": with_scaling(-SCALING),
    "norm-of-base": lambda W, A, B, m: (W + SCALING * B @ A) * m.reshape(-1, 1) / rownorm(W),
    "magnitude-ignored": lambda W, A, B, m: scaled(W + SCALING * B @ A, np.ones_like(m)),
    "magnitude-initial": lambda W, A, B, m: scaled(W + SCALING * B @ A, rownorm(W)),
    "lora-for-dora": lambda W, A, B, m: W + SCALING * B @ A,
    "factors-ignored": lambda W, A, B, m: scaled(W, m),
    "strength-other": lambda W, A, B, m: 0.4 * W + 0.6 * scaled(W + SCALING * B @ A, m),
}
SCALINGS = {
    "alpha left out": 1.0,
    "alpha/sqrt(r) for alpha/r": ALPHA / RANK**0.5,
    "alpha, not divided by r": ALPHA,
    "scaling 1.8 instead of 2.5": 1.8,
}
LORA_MISTAKES = {
    "not-applied": lambda W, A, B: W,
    "applied-twice": lambda W, A, B: W + 2 * SCALING * B @ A,
    "sign-flipped": lambda W, A, B: W - SCALING * B @ A,
    "scaling-other": lambda W, A, B: W + B @ A,
}
