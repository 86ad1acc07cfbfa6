"""PEFT's LoHa and LoKr in normal form: a Hadamard or a Kronecker product, added to W.

PEFT's scaling is alpha / r for both, whatever LoKr's factors.

Source: github.com/huggingface/peft 0.21.2, src/peft/tuners/{loha,lokr}/{layer,model}.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dora_export.adapters import peft_patterns
from dora_export.errors import AdapterError, shown
from dora_export.storage.json_file import is_number, is_rank
from dora_export.tensors import Operand, TensorRef
from dora_export.update import Dense, Hadamard, Kronecker, Product, Update

Parts = Mapping[str, TensorRef]
RANKED = ("hada_w1_b", "hada_w2_b", "lokr_w1_b", "lokr_w2_b")  # (rank, ...)


@dataclass(frozen=True)
class _Values:
    """Rank and alpha of each module, and doubts about them, for people."""

    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    doubts: tuple[str, ...]


def updates(
    config_path: Path,
    raw: Mapping[str, Any],
    layers: Mapping[str, Parts],
    problems: list[str],
    doubts: list[str],
) -> Iterator[Update]:
    """Yield what LoHa or LoKr, as ``raw`` says, adds to each layer.

    Args:
        config_path: For messages.
        raw: The config.
        layers: Module path -> part -> tensor.
        problems: What does not add up is put in here.
        doubts: What PEFT's versions take differently is put in here.

    Raises:
        AdapterError: A pattern is no regular expression, or gives no rank or alpha; or versions of
            PEFT would take it differently, and the config does not say which wrote it.
    """
    values = _values(config_path, raw, list(layers))
    doubts += values.doubts
    for module, parts in layers.items():
        delta = _loha(parts) if raw["peft_type"] == "LOHA" else _lokr(parts)
        if isinstance(delta, str):
            problems.append(f"{shown(module)}: {delta}")
            continue
        rank = values.ranks[module]
        if wrong := {parts[p].shape[0] for p in RANKED if p in parts} - {rank}:
            problems.append(f"{shown(module)}: rank {rank} by the config, but its factors have "
                            f"{', '.join(map(str, sorted(wrong)))}")  # fmt: skip
        keys = tuple(ref.name for ref in parts.values())
        yield Update(f"{module}.weight", "lora", keys, scaling=values.alphas[module] / rank,
                     delta=delta, layout="oi" if _is_convolution(parts) else None)  # fmt: skip


def _values(path: Path, raw: Mapping[str, Any], modules: Sequence[str]) -> _Values:
    """Return the rank and alpha of each module, by the rule of the version that trained it."""
    given, defaults = [], []
    for name, default, fits in (
        ("rank_pattern", raw.get("r", 8), is_rank),
        ("alpha_pattern", raw.get("alpha", 8), lambda v: is_number(v) and v != 0),
    ):
        pattern = raw.get(name) or {}
        if not isinstance(pattern, dict):
            raise AdapterError(f"{path}: {name}: expected a map, got {shown(pattern)}.")
        wrong = [v for v in (default, *pattern.values()) if not fits(v)]
        if wrong:
            raise AdapterError(
                f"{path}: {name} gives {shown(wrong[0])}, expected a "
                f"{'rank' if fits is is_rank else 'number other than 0'}. Check how the adapter "
                "was saved."
            )
        given.append(pattern)
        defaults.append(default)
    (ranks, alphas), rules = given, peft_patterns.rules_of(raw)
    alphas = {key: float(alpha) for key, alpha in alphas.items()}
    r, alpha = defaults[0], float(defaults[1])
    found = peft_patterns.held_against(path, ranks, alphas, modules, rules, (r, alpha))
    return _Values(
        # PEFT looks the module itself up where no pattern matches it.
        ranks={m: ranks.get(found.ranks.get(m, m), r) for m in modules},
        alphas={m: alphas.get(found.alphas.get(m, m), alpha) for m in modules},
        doubts=(
            *found.doubts,
            *(f"no layer takes its rank or alpha from {idle}" for idle in found.idle),
        ),
    )


def _is_convolution(parts: Parts) -> bool:
    return any(len(ref.shape) > 2 for ref in parts.values())


def _loha(parts: Parts) -> Hadamard | str:
    """``(w1_a w1_b) * (w2_a w2_b)``, or with Tucker cores t1, t2 in the place of the products."""
    names = {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}
    cores = {"hada_t1", "hada_t2"}
    if set(parts) not in (names, names | cores):
        return f"LoHa tensors {sorted(parts)}"
    first, second = (_loha_product(parts, i) for i in "12")
    if isinstance(first, str) or isinstance(second, str):
        return str(first if isinstance(first, str) else second)
    if first.shape != second.shape:
        return f"its two products are {first.shape} and {second.shape}"
    return Hadamard(first, second)


def _loha_product(parts: Parts, i: str) -> Product | str:
    a, b = parts[f"hada_w{i}_a"], parts[f"hada_w{i}_b"]
    core = parts.get(f"hada_t{i}")
    if core is None:
        if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[1] != b.shape[0]:
            return f"LoHa factors {a.shape} and {b.shape}"
        return Product(Operand.plain(a), Operand.plain(b))
    # a (rank, out), b (rank, in), t (rank, rank, *kernel): W[o, i, k] = a[p, o] t[p, q, k] b[q, i]
    rank, kernel = core.shape[0], core.shape[2:]
    if a.shape[0] != rank or b.shape[0] != core.shape[1]:
        return f"LoHa factors {a.shape}, {b.shape} and core {core.shape}"
    inner = (rank, b.shape[1] * int(np.prod(kernel)))
    return Product(Operand.plain(a).T, Operand.computed((core, b), inner, _core_times))


def _core_times(core: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    product: NDArray[np.float64] = np.einsum("pq...,qi->pi...", core, b)
    return product.reshape(len(core), -1)


def _lokr(parts: Parts) -> Kronecker | Dense | str:
    first, second = _lokr_factor(parts, "1"), _lokr_factor(parts, "2")
    if isinstance(first, str) or isinstance(second, str):
        return str(first if isinstance(first, str) else second)
    whole = parts.get("lokr_w2")
    if whole is not None and len(whole.shape) == 3:
        # PEFT multiplies a matrix by a Conv1d's three dimensions and then reshapes: the dimensions
        # of w1 fall on the last two of w2. Its forward does the same, so that is what was trained.
        # Source: src/peft/tuners/lokr/layer.py (make_kron).
        shape = (first.shape[0] * whole.shape[0], first.shape[1] * second.shape[1])
        return Dense(Operand.computed((*first.refs, whole), shape, _kronecker_of_conv1d))
    return Kronecker(first, second)


def _kronecker_of_conv1d(*factors: NDArray[np.float64]) -> NDArray[np.float64]:
    *first, whole = factors
    w1 = first[0] if len(first) == 1 else first[0] @ first[1]
    product = np.kron(w1[None], whole)
    return product.reshape(w1.shape[0] * len(whole), -1).astype(np.float64, copy=False)


def _lokr_factor(parts: Parts, i: str) -> Operand | str:
    """Return one factor of LoKr: whole, as a product, or with a Tucker core."""
    own = {name: ref for name, ref in parts.items() if name in (
        f"lokr_w{i}", f"lokr_w{i}_a", f"lokr_w{i}_b", f"lokr_t{i}")}  # fmt: skip
    if set(own) == {f"lokr_w{i}"}:
        return Operand.matrix(own[f"lokr_w{i}"])
    a, b, core = (own.get(f"lokr_{n}") for n in (f"w{i}_a", f"w{i}_b", f"t{i}"))
    if a is None or b is None or f"lokr_w{i}" in own:
        return f"LoKr tensors {sorted(parts)}"
    if core is None:
        if len(a.shape) != 2 or a.shape[1] != b.shape[0]:
            return f"LoKr factors {a.shape} and {b.shape}"
        inner = int(np.prod(b.shape[1:]))
        return Operand.computed((a, b), (a.shape[0], inner), _matrix_product)
    if a.shape[0] != core.shape[0] or b.shape[0] != core.shape[1]:
        return f"LoKr factors {a.shape}, {b.shape} and core {core.shape}"
    kernel = int(np.prod(core.shape[2:]))
    shape = (a.shape[1], b.shape[1] * kernel)
    return Operand.computed((a, core, b), shape, _tucker)


def _matrix_product(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    product: NDArray[np.float64] = a @ b.reshape(len(b), -1)
    return product


def _tucker(
    a: NDArray[np.float64], core: NDArray[np.float64], b: NDArray[np.float64]
) -> NDArray[np.float64]:
    product: NDArray[np.float64] = a.T @ _core_times(core, b)
    return product
