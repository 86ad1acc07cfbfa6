"""torchtune's own ``adapter_model.pt``, with the adapter_config.json that it writes beside.

Source: github.com/pytorch/torchtune 0.6.1, torchtune/modules/peft/{lora,dora}.py,
torchtune/models/convert_weights.py, torchtune/training/checkpointing/_checkpointer.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from dora_export import row_orders
from dora_export.adapter_writers.model import (
    Source,
    Stored,
    Written,
    alpha_of,
    check,
    factors,
    kind_problem,
    module_of,
    stored,
    whole,
)
from dora_export.adapters.torchtune import MODULES
from dora_export.errors import AdapterError, shown
from dora_export.update import Update

WEIGHTS = "adapter_model.pt"
LAYER = re.compile(r"model\.layers\.(?P<number>\d+)\.(?P<module>.+)")
NAMES = {ours: theirs for theirs, ours in MODULES.items()}


def write(source: Source) -> Written:
    """Return an adapter as torchtune's own file, rows in the order that it trains the base in.

    Raises:
        AdapterError: torchtune cannot hold it exactly; all reasons are listed.
        PlanError: torchtune's row order for the base's model type is not known.
    """
    if source.base is None:
        raise AdapterError(
            f"{source.adapter.path}: the order in which torchtune keeps the rows of q and k "
            "depends on the base. Pass --base."
        )
    check(source, "torchtune", list(_problems(source)), biases="scaled")
    updates = [row_orders.for_torchtune(u, source.base) for u in source.updates]
    rank, alpha = updates[0].rank, whole(alpha_of(updates[0]))
    config = {
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted({module_of(u).rpartition(".")[2] for u in updates}),
        "peft_type": "LORA",
        "base_model_name_or_path": source.adapter.base_name or source.base.model_name,
    }
    note = f"the recipe has to say lora_rank {rank}, lora_alpha {alpha}" + (
        ", use_dora True" if updates[0].magnitude is not None else ""
    )
    tensors = tuple(t for u in updates for t in _tensors(u))
    return Written(WEIGHTS, tensors, config, (note,))


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
            yield f"layers differ in {what}, torchtune has one for all"
    if source.adapter.layer_replication:
        yield "layers of the base are repeated"
    for update in source.updates:
        if update.kind not in ("lora", "dora"):
            yield kind_problem(update)
        elif _name(module_of(update)) is None:
            yield f"{shown(update.target)}: torchtune's text models have no such layer"


def _name(module: str) -> str | None:
    if module == "lm_head":
        return "output"
    match = LAYER.fullmatch(module)
    if match is None or match["module"] not in NAMES:
        return None
    return f"layers.{match['number']}.{NAMES[match['module']]}"


def _tensors(update: Update) -> Iterator[Stored]:
    key, (down, up) = _name(module_of(update)), factors(update)
    yield stored(f"{key}.lora_a.weight", down)
    yield stored(f"{key}.lora_b.weight", up)
    if update.magnitude is not None:
        yield stored(f"{key}.magnitude", update.magnitude)
