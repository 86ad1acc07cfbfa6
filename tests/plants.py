"""Layers made by the dozen, what right and wrong merges make of them, and what the oracle says.

Everything lies in memory, so that thousands of merges can be judged in minutes. Values come from
the formula (``tests.oracle``), coarse ones from torch's own arithmetic.
"""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from dora_export.plan import Settings, Step
from dora_export.tensors import BY_TORCH, HeldBytes, Operand, TensorRef
from dora_export.update import Update
from dora_export.verification.oracle import check_oracle
from tests import oracle

SHAPES = [(96, 64), (64, 64), (48, 160), (256, 128), (320, 320)]
SCALINGS = [0.5, 1.0, 2.0, 4.0, 16 / 3]
RANKS = [2, 4, 8, 16]
# Of the update and of m's change, log10.
SIZES = {"trained": (-2.5, -0.5), "weak": (-3.5, -2.5), "hardly any": (-4.0, -3.8)}


@dataclass
class Layer:
    """A weight as it is stored, its adapter, and W, A, B, m (or None) of both in float64."""

    name: str
    stored: tuple  # W, A, B, m as torch tensors
    scaling: float
    rank: int

    def __post_init__(self):
        self.W, self.A, self.B, self.m = (
            None if t is None else oracle.float64(t) for t in self.stored
        )

    def merged(self, **other):
        """The exact result, or that of other terms."""
        given = {"W": self.W, "A": self.A, "B": self.B, "m": self.m, "s": self.scaling} | other
        if given["m"] is None:
            return oracle.lora(*(given[k] for k in ("W", "A", "B", "s")))
        return oracle.dora(*(given[k] for k in ("W", "A", "B", "m", "s")))

    def step(self):
        """The layer in a plan."""
        W, A, B, m = (None if t is None else ref(self.name, t) for t in self.stored)
        update = Update(
            self.name, "lora" if m is None else "dora", (), Operand.plain(A), Operand.plain(B),
            self.scaling, None if m is None else Operand.plain(m), layout="oi",
        )  # fmt: skip
        return Step(self.name, W.dtype, W, (update.change(W.shape),), (), "merged")


def ref(name, tensor):
    data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    dtype = BY_TORCH[str(tensor.dtype).removeprefix("torch.")]
    return TensorRef(name, dtype, tuple(tensor.shape), HeldBytes(Path("memory"), data))


def norm(V, axis=1):
    return np.sqrt((V * V).sum(axis=axis, keepdims=True))


def model(seed, dtype, size, *, adapter=torch.float32, dora=True, each=4):
    """Some layers of each shape; update and magnitudes are of sizes drawn for each layer."""
    random = np.random.default_rng(seed)
    layers = []
    for kind, (out, inner) in enumerate(SHAPES):
        for layer in range(each):
            rows = np.exp(0.3 * random.standard_normal((out, 1)))
            W = torch.from_numpy(0.05 * rows * random.standard_normal((out, inner))).to(dtype)
            rank, s = int(random.choice(RANKS)), float(random.choice(SCALINGS))
            A = random.standard_normal((rank, inner)) / np.sqrt(inner)
            B = random.standard_normal((out, rank))
            stored = oracle.float64(W)
            update, change = 10 ** random.uniform(*SIZES[size], 2)
            B *= update * np.linalg.norm(stored) / np.linalg.norm(s * B @ A)
            m = norm(stored)[:, 0] * (1 + change * random.standard_normal(out))
            A, B, m = (torch.from_numpy(t).to(adapter) for t in (A, B, m))
            name = f"layers.{layer}.kind{kind}.weight"
            layers.append(Layer(name, (W, A, B, m if dora else None), s, rank))
    return layers, random


# --- mistakes about whole tensors

SWAPPED = "of another layer"


def mistakes(layer, layers, random):
    """Name -> what a layer becomes by each mistake that can happen to it."""
    W, A, B, m, s = layer.W, layer.A, layer.B, layer.m, layer.scaling
    alike = [x for x in layers if x.W.shape == W.shape and x is not layer]
    other = alike[int(random.integers(len(alike)))]
    P = s * B @ A
    V = W + P
    halves = layer.merged().reshape(2, -1, W.shape[1]).swapaxes(0, 1).reshape(W.shape)
    found = {
        "not applied": W,
        "applied twice": W + 2 * P if m is None else layer.merged(W=layer.merged()),
        "subtracted": layer.merged(s=-s),
        "alpha/sqrt(r) for alpha/r": layer.merged(s=s * layer.rank**0.5),
        "half the scaling": layer.merged(s=s / 2),
        "rows permuted": layer.merged()[random.permutation(len(W))],
        "rows in rotary order": halves,
        "expert swapped": other.merged(),
        f"update {SWAPPED}": layer.merged(A=other.A, B=other.B, m=other.m, s=other.scaling),
        "another base": layer.merged(W=W + 0.02 * W.std() * random.standard_normal(W.shape)),
        f"base {SWAPPED}": layer.merged(W=other.W),
    }
    if s != 1:
        found["alpha left out"] = layer.merged(s=1.0)
    if m is not None:
        column = m.reshape(-1, 1)
        found |= {
            "norm of W": V * column / norm(W),
            "magnitude ignored": V / norm(V),
            "magnitude before training": V * norm(W) / norm(V),
            "plain LoRA": V,
            "A and B ignored": W * column / norm(W),
            f"magnitude {SWAPPED}": layer.merged(m=other.m),
        }
        if W.shape[0] == W.shape[1]:
            found["norm over the other axis"] = V * m / norm(V, axis=0)
    return found


# --- right merges in the arithmetic of other tools


def in_float32(W, A, B, m, s, coarse):
    V = W.float() + s * (B.float() @ A.float())
    return V if m is None else V * (m.float() / V.norm(dim=1))[:, None]


def throughout(W, A, B, m, s, coarse):
    """As PEFT merges a model and an adapter in a coarse type."""
    W, A, B = W.to(coarse), A.to(coarse), B.to(coarse)
    V = W + (B @ A) * s
    if m is None:
        return V
    return (m.to(coarse) / torch.linalg.norm(V, dim=1)).view(-1, 1) * V


def factor_last(W, A, B, m, s, coarse):
    """The base and the update scaled apart, then added."""
    W, A, B = W.to(coarse), A.to(coarse), B.to(coarse)
    P = s * (B @ A)
    if m is None:
        return W + P
    f = (m.to(coarse) / (W + P).norm(dim=1))[:, None]
    return f * W + f * P


def by_hand(W, A, B, m, s, coarse):
    """The norm from coarse squares; multiplied before it is divided."""
    V = W.to(coarse) + s * (B.to(coarse) @ A.to(coarse))
    if m is None:
        return V
    return m.to(coarse)[:, None] * V / (V * V).sum(dim=1, keepdim=True).sqrt()


def norm_only(W, A, B, m, s, coarse):
    """float32 but for the norm."""
    V = W.float() + s * (B.float() @ A.float())
    return V if m is None else V * (m.float() / V.norm(dim=1).to(coarse).float())[:, None]


def norm_and_magnitude(W, A, B, m, s, coarse):
    V = W.float() + s * (B.float() @ A.float())
    return V if m is None else V * (m.to(coarse) / V.norm(dim=1).to(coarse)).float()[:, None]


def product_only(W, A, B, m, s, coarse):
    """float32 but for B A, as where the adapter is run in a coarse type."""
    V = W.float() + s * (B.to(coarse) @ A.to(coarse)).float()
    return V if m is None else V * (m.float() / V.norm(dim=1))[:, None]


ARITHMETIC = [in_float32, throughout, factor_last, by_hand, norm_only, norm_and_magnitude,
              product_only]  # fmt: skip


def judge(layers, values, dtype, level="fast"):
    """What the oracle says of each layer's merged values: name -> its result, and findings."""
    merged = {
        name: ref(name, torch.as_tensor(np.ascontiguousarray(v) if isinstance(v, np.ndarray) else v)
                  .to(dtype))
        for name, v in values.items()
    }  # fmt: skip
    plan = SimpleNamespace(steps=[layer.step() for layer in layers], settings=Settings())
    _, tensors, findings = check_oracle(plan, merged, level, threads=1)
    return {t.name: t for t in tensors}, {f.where: f for f in findings}
