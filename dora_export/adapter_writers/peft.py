"""PEFT folders: adapter_config.json and adapter_model.safetensors, method LORA.

Source: github.com/huggingface/peft 0.21.2, src/peft/utils/save_and_load.py,
src/peft/tuners/lora/{config,layer,dora}.py, src/peft/utils/other.py (get_pattern_key).
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dora_export import tying
from dora_export.adapter_writers.model import (
    NEEDS_BASE,
    Source,
    Stored,
    Written,
    alpha_of,
    check,
    copied,
    factors,
    is_embedding,
    kind_problem,
    module_of,
    own_bias,
    scaled_bias,
    stored,
    whole,
)
from dora_export.checkpoints.model import Checkpoint
from dora_export.errors import shown
from dora_export.update import Update
from dora_export.words import count

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."


def write(source: Source) -> Written:
    """Return an adapter as a PEFT folder.

    Raises:
        AdapterError: PEFT cannot hold it exactly; all reasons are listed.
    """
    check(source, "PEFT", list(_problems(source)), biases="own")
    products = [u for u in source.updates if u.kind != "replace"]
    copies = [u for u in source.updates if u.kind == "replace"]
    tensors = [t for u in products for t in tensors_of(PREFIX + module_of(u), u)]
    tensors += [copied(PREFIX + u.target, u.value) for u in copies if u.value is not None]
    biases = [own_bias(f"{PREFIX}{module_of(u)}.base_layer.bias", u, source)
              for u in products if scaled_bias(u, source) is not None]  # fmt: skip
    config = _config(source, products, copies) | ({"bias": "lora_only"} if biases else {})
    notes = tuple(_notes(len(biases)))
    return Written(WEIGHTS, (*tensors, *biases), config, notes, rounded=bool(biases))


def _notes(biases: int) -> Iterator[str]:
    if biases:
        yield (
            "the adapter's trainer scales biases by m / ||W + s B A|| as well, PEFT does not: "
            f"those of {count(biases, 'layer')} go along scaled, as trained ones of this base"
        )


def _problems(source: Source) -> Iterator[str]:
    dora = {u.magnitude is not None for u in source.updates if u.kind in ("lora", "dora")}
    if not dora:
        yield "no layer has a low-rank product"
    if len(dora) > 1:
        yield "some layers have magnitudes and some have not; use_dora is one for all"
    adapted = {module_of(u) for u in source.updates if u.kind in ("lora", "dora")}
    for update in source.updates:
        name = shown(update.target)
        if update.kind not in ("lora", "dora", "replace"):
            yield kind_problem(update)
        if update.kind == "replace" and update.target.rpartition(".")[0] in adapted:
            yield f"{name}: a whole copy beside a low-rank product of the same layer"
        if update.layout == "oi" and is_embedding(update) and update.magnitude is not None:
            yield f"{name}: one magnitude per token, PEFT has one per dimension"
        if source.adapter.format == "mlx" and update.layout == "oi" and is_embedding(update):
            yield from _tied_problems(name, source)


def _tied_problems(name: str, source: Source) -> Iterator[str]:
    """In MLX, LoRA on a tied embedding changes the head as well; in PEFT it does not."""
    if source.base is None:
        yield f"{name}: whether the base ties it to its head matters; {NEEDS_BASE}"
    elif tying.is_tied(source.base, [u.target for u in source.updates]):
        yield f"{name}: the base ties it to its head, which PEFT would leave as it is"


def tensors_of(key: str, update: Update) -> Iterator[Stored]:
    """Yield a checked product's tensors, as PEFT shapes them, named ``key`` in front."""
    down, up = factors(update)
    kernel = down.ref.shape[2:]
    out, rank = up.shape
    if is_embedding(update):
        # PEFT sees the table as (dim, tokens), MLX as (tokens, dim).
        a, b = (down, up) if update.layout == "io" else (up.T, down.T)
        yield stored(f"{key}.lora_embedding_A", a)
        yield stored(f"{key}.lora_embedding_B", b)
    elif kernel:
        yield stored(f"{key}.lora_A.weight", down, (rank, down.ref.shape[1], *kernel))
        yield stored(f"{key}.lora_B.weight", up, (out, rank, *(1 for _ in kernel)))
    else:
        yield stored(f"{key}.lora_A.weight", down)
        yield stored(f"{key}.lora_B.weight", up)
    if update.magnitude is not None:
        shape = (1, out, *(1 for _ in kernel)) if kernel else None
        yield stored(f"{key}.lora_magnitude_vector", update.magnitude, shape)


def _config(source: Source, products: Sequence[Update], copies: Sequence[Update]) -> dict[str, Any]:
    adapter = source.adapter
    modules = [module_of(u) for u in products]
    ranks = {module_of(u): u.rank for u in products}
    alphas = {module_of(u): whole(alpha_of(u)) for u in products}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    saved = [u for u in copies if u.target not in adapter.saved_embeddings]
    return config(
        rank, alpha, target_modules(modules, source.base),
        use_dora=any(u.magnitude is not None for u in products),
        rank_pattern=pattern(ranks, rank),
        alpha_pattern=pattern(alphas, alpha),
        modules_to_save=sorted({u.target.rpartition(".")[0] for u in saved}) or None,
        base_model_name_or_path=adapter.base_name,
        fan_in_fan_out=bool(adapter.square_io),
        ensure_weight_tying=adapter.format == "peft" and adapter.ensure_weight_tying,
        layer_replication=[list(r) for r in adapter.layer_replication] or None,
    )  # fmt: skip


def config(rank: Any, alpha: Any, targets: Sequence[str], **fields: Any) -> dict[str, Any]:
    """Return adapter_config.json; what is left out has PEFT's default."""
    if fields.get("rank_pattern") or fields.get("alpha_pattern"):
        # PEFT has had it since it reads patterns as these are meant.
        fields["trainable_token_indices"] = None
    return {
        "peft_type": "LORA",
        "task_type": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "target_modules": list(targets),
        "bias": "none",
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        **fields,
    }


def target_modules(modules: Sequence[str], base: Checkpoint | None) -> list[str]:
    """Return the last names of the modules where all of the base's of that name are adapted.

    Otherwise, and without a base, their whole paths: PEFT would adapt the others as well.
    """
    last = Counter(m.rpartition(".")[2] for m in modules)
    there: Counter[str] = Counter()
    for name, ref in base.tensors.items() if base is not None else ():
        if name.endswith(".weight") and len(ref.shape) > 1:
            there[name.split(".")[-2]] += 1
    if base is not None and all(there[leaf] == n for leaf, n in last.items()):
        return sorted(last)
    return sorted(modules)


def pattern(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """Return rank_pattern or alpha_pattern: what the modules with another value are called.

    A key is the last name where all modules of that name have the value, else a whole path.
    """
    by_leaf: dict[str, set[Any]] = defaultdict(set)
    for module, value in values.items():
        by_leaf[module.rpartition(".")[2]].add(value)
    found: dict[str, Any] = {}
    for module, value in values.items():
        leaf = module.rpartition(".")[2]
        if value != default:
            alone = by_leaf[leaf] == {value}
            found[re.escape(leaf) if alone else f"^{re.escape(module)}"] = value
    return found
