"""A plain LoRA in the place of any adapter: the nearest one of some rank, layer by layer.

For engines that serve LoRA and refuse DoRA. What is lost is measured, not estimated.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dora_export.adapter_writers import peft
from dora_export.adapter_writers.model import is_embedding, module_of
from dora_export.errors import AdapterError, ArithmeticRefusal, listing, shown
from dora_export.lowrank import LowRank, nearest
from dora_export.pieces import Region, regions
from dora_export.plan import Plan, Step
from dora_export.report import LayerLoss
from dora_export.tensors import F32, DType
from dora_export.verification.exact import Exact
from dora_export.verification.parallel import each

Entry = tuple[str, DType, tuple[int, ...]]


@dataclass(frozen=True)
class Layer:
    """One layer to approximate.

    Attributes:
        step: The base's tensor and its changes.
        region: All of it.
        module: What the adapter calls the layer.
        embedding: PEFT stores it as an embedding's factors.
    """

    step: Step
    region: Region
    module: str
    embedding: bool

    @property
    def transposed(self) -> bool:
        """Whether the base stores ``(in, out)``; PEFT sees an embedding so."""
        return self.embedding or self.region.changes[0].transposed

    def entries(self, rank: int) -> tuple[Entry, Entry]:
        """Return name, dtype and shape of A and B as PEFT stores them."""
        key, shape = f"{peft.PREFIX}{self.module}", self.step.shape
        if self.embedding:
            return ((f"{key}.lora_embedding_A", F32, (rank, shape[0])),
                    (f"{key}.lora_embedding_B", F32, (shape[1], rank)))  # fmt: skip
        out, inner = (shape[1], shape[:1]) if self.transposed else (shape[0], shape[1:])
        kernel = tuple(1 for _ in inner[1:])
        return ((f"{key}.lora_A.weight", F32, (rank, *inner)),
                (f"{key}.lora_B.weight", F32, (out, rank, *kernel)))  # fmt: skip

    def factors(self, found: LowRank, rank: int) -> Iterator[NDArray[Any]]:
        """Yield A and B as they are stored, in the raw type of float32."""
        a, b = (found.left.T, found.right.T) if self.transposed else (found.right, found.left)
        for values, (_, dtype, shape) in zip((a, b), self.entries(rank), strict=True):
            yield np.ascontiguousarray(values, np.float32).reshape(shape).view(dtype.raw)


def layers(plan: Plan) -> list[Layer]:
    """Return what a plan changes as layers that LoRA can hold.

    Raises:
        AdapterError: It changes something else as well; all of it is listed.
    """
    updates = {key: u for a in plan.adapters for u in a.updates for key in u.source_keys}
    flat = any(adapter.naming == "flat" for adapter in plan.adapters)
    found, problems = [], []
    for step in plan.steps:
        if step.status in ("unchanged", "cast"):
            continue
        if why := _problem(step):
            problems.append(f"{shown(step.name)}: {why}")
            continue
        update = updates[step.consumes[0]]
        module = step.name.removesuffix(".weight") if flat else module_of(update)
        found.append(Layer(step, regions(step)[0], module, is_embedding(update)))
    if problems:
        raise AdapterError(
            f"{plan.adapters[0].path}: a plain LoRA cannot hold all of this adapter:"
            f"{listing(problems)}\nMerge it instead."
        )
    return found


def _problem(step: Step) -> str | None:
    if not step.changes or any(c.value is not None for c in step.changes):
        return "trained whole, or values of its own"
    if len(step.shape) < 2 or not step.name.endswith(".weight"):
        return "not the weight of a layer"
    return "changed in parts" if len(regions(step)) > 1 else None


def approximate(
    plan: Plan, chosen: Sequence[Layer], rank: int, losses: list[LayerLoss], threads: int | None
) -> Iterator[NDArray[Any]]:
    """Yield A and B of every layer, in order; note what each one loses.

    Holds the factors of as many layers as there are workers.

    Args:
        plan: Where the layers come from.
        chosen: The layers.
        rank: Of every product; its alpha is the rank, so that the scaling is 1.
        losses: Gets an entry per layer.
        threads: Workers; None: one per CPU.
    """

    def one(layer: Layer) -> LowRank:
        try:
            return nearest(Exact.open(layer.step.source, layer.region, plan.settings), rank)
        except ArithmeticRefusal as refusal:
            raise ArithmeticRefusal(f"{shown(layer.step.name)}: {refusal}") from refusal

    rest = iter(chosen)
    while batch := list(islice(rest, threads or 4)):
        for layer, found in zip(batch, each(one, batch, threads), strict=True):
            loss = LayerLoss(layer.step.name, layer.step.shape, found.size, found.energy,
                             found.error)  # fmt: skip
            losses.append(loss)
            yield from layer.factors(found, rank)


def energy(losses: Sequence[LayerLoss]) -> float:
    """Return the share of the squared norm of all updates that is kept, 0 to 1."""
    whole = math.fsum(loss.size**2 for loss in losses)
    return math.fsum(loss.energy * loss.size**2 for loss in losses) / whole if whole else 1.0


def config(plan: Plan, chosen: Sequence[Layer], rank: int) -> dict[str, Any]:
    """Return the adapter_config.json of the approximation."""
    names = [adapter.base_name for adapter in plan.adapters if adapter.base_name]
    return peft.config(
        rank, rank, peft.target_modules([layer.module for layer in chosen], plan.base),
        base_model_name_or_path=names[0] if names else plan.base.model_name,
        fan_in_fan_out=any(layer.region.changes[0].transposed for layer in chosen
                           if not layer.embedding),
        layer_replication=[list(r) for r in plan.adapters[0].layer_replication] or None,
    )  # fmt: skip
