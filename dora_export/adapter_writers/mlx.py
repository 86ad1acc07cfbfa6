"""MLX folders, as mlx-lm loads them: adapter_config.json and adapters.safetensors.

The factors are transposed, the scale is the factor on the product, one for all layers. mlx-lm
gives LoRA to every layer that ``keys`` names; where the file has no tensors for one, it stays as it
is (B is zero, and the magnitude the norm).
Source: github.com/ml-explore/mlx-lm 0.32.2, mlx_lm/tuner/{lora,dora,utils}.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from dora_export import tying
from dora_export.adapter_writers.model import (
    NEEDS_BASE,
    Source,
    Stored,
    Written,
    check,
    factors,
    is_embedding,
    kind_problem,
    module_of,
    stored,
)
from dora_export.errors import shown
from dora_export.update import Update

WEIGHTS = "adapters.safetensors"
# What mlx-lm's text models call their parts; those of others are not known here.
KNOWN = re.compile(r"(model\.layers\.\d+\.(?P<part>.+)|lm_head|model\.embed_tokens)")


def write(source: Source) -> Written:
    """Return an adapter as an MLX folder.

    Raises:
        AdapterError: MLX cannot hold it exactly; all reasons are listed.
    """
    check(source, "MLX", list(_problems(source)))
    updates = source.updates
    matches = {module_of(u): KNOWN.fullmatch(module_of(u)) for u in updates}
    keys = {m["part"] or name for name, m in matches.items() if m is not None}
    config = {
        "fine_tune_type": "dora" if updates[0].magnitude is not None else "lora",
        "num_layers": -1,
        "lora_parameters": {
            "rank": updates[0].rank,
            "scale": updates[0].scaling,
            "dropout": 0.0,
            "keys": sorted(keys),
        },
    }
    if source.adapter.base_name:
        config["model"] = source.adapter.base_name
    return Written(WEIGHTS, tuple(t for u in updates for t in _tensors(u)), config)


def _problems(source: Source) -> Iterator[str]:
    products = [u for u in source.updates if u.kind in ("lora", "dora")]
    if not products:
        yield "no layer has a low-rank product"
    for values, what in (
        ({u.rank for u in products}, "rank"),
        ({u.scaling for u in products}, "scaling"),
        ({u.magnitude is not None for u in products}, "method (LoRA or DoRA)"),
    ):
        if len(values) > 1:
            yield f"layers differ in {what}, MLX has one for all"
    if source.adapter.layer_replication:
        yield "layers of the base are repeated"
    for update in source.updates:
        yield from _problems_of(update, source)


def _problems_of(update: Update, source: Source) -> Iterator[str]:
    name, module = shown(update.target), module_of(update)
    if update.kind not in ("lora", "dora"):
        yield kind_problem(update)
    elif KNOWN.fullmatch(module) is None:
        yield f"{name}: what mlx-lm calls this layer is not known (model.layers.N..., lm_head)"
    elif update.down is not None and len(update.down.ref.shape) > 2:
        yield f"{name}: a convolution"
    elif is_embedding(update):
        if update.layout == "io" and update.magnitude is not None:
            yield f"{name}: one magnitude per dimension, MLX has one per token"
        yield from _tied_problems(name, source)


def _tied_problems(name: str, source: Source) -> Iterator[str]:
    """In MLX, LoRA on a tied embedding changes the head as well; in PEFT it does not."""
    if source.adapter.format == "mlx":
        return
    if source.base is None:
        yield f"{name}: whether the base ties it to its head matters to MLX; {NEEDS_BASE}"
    elif tying.is_tied(source.base, [u.target for u in source.updates]):
        yield f"{name}: the base ties it to its head, which MLX would change as well"


def _tensors(update: Update) -> Iterator[Stored]:
    key, (down, up) = module_of(update), factors(update)
    if is_embedding(update) and update.layout != "io":
        yield stored(f"{key}.lora_a", up)
        yield stored(f"{key}.lora_b", down)
    else:
        yield stored(f"{key}.lora_a", down.T)
        yield stored(f"{key}.lora_b", up.T)
    if update.magnitude is not None:
        yield stored(f"{key}.m", update.magnitude)
