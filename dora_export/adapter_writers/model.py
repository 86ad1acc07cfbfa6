"""What every adapter writer gives, and what they share: products that are only rearranged."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dora_export.adapters.model import Adapter
from dora_export.checkpoints.model import Checkpoint
from dora_export.errors import AdapterError, listing, shown
from dora_export.tensors import DType, Operand, TensorRef
from dora_export.update import Axis, Update

# Modules whose weight is looked up by token, in the formats that store them in a way of their own.
EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings", "wpe",
              "embeddings", "embedding")  # fmt: skip


@dataclass(frozen=True)
class Stored:
    """A tensor to be written.

    Attributes:
        name: Its name in the file.
        dtype: Storage type: that of the tensor it is made from.
        shape: Dimensions.
        raw: Returns its elements in ``dtype.raw``.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    raw: Callable[[], NDArray[Any]] = field(repr=False)


@dataclass(frozen=True)
class Written:
    """An adapter in another format.

    Attributes:
        weights: Name of the weight file; ``.pt`` is pickled by torch.
        tensors: What it holds, in order.
        config: Content of adapter_config.json; None: the format has none.
        notes: What the user has to know to load it.
        metadata: Of the weight file, beside its format.
    """

    weights: str
    tensors: tuple[Stored, ...]
    config: Mapping[str, Any] | None = None
    notes: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Source:
    """An adapter to be written in another format.

    Attributes:
        adapter: The adapter.
        updates: Its updates, their rows in the base's order where a base was given.
        base: The base, or None.
        names: The base's name for each of the updates' targets; empty without a base.
    """

    adapter: Adapter
    updates: tuple[Update, ...]
    base: Checkpoint | None
    names: Mapping[str, str] = field(default_factory=dict)


def stored(name: str, operand: Operand, shape: tuple[int, ...] | None = None) -> Stored:
    """Return an operand as a tensor to be written, bit for bit, under another shape if given."""

    def raw() -> NDArray[Any]:
        return operand.value(TensorRef.raw).reshape(shape or operand.shape)

    return Stored(name, operand.ref.dtype, shape or operand.shape, raw)


def copied(name: str, ref: TensorRef) -> Stored:
    """Return a stored tensor under another name."""
    return Stored(name, ref.dtype, ref.shape, lambda: ref.raw().reshape(ref.shape))


def check(
    source: Source,
    target: str,
    problems: Sequence[str],
    axes: Sequence[Axis] = ("out",),
    *,
    adds_eps: bool = False,
) -> None:
    """Refuse an adapter that the target format cannot hold.

    Args:
        source: The adapter.
        target: What the format is called.
        problems: What the writer has found itself.
        axes: What the format's magnitudes can count.
        adds_eps: The format adds something to norms; the writer has compared it.

    Raises:
        AdapterError: There are problems, those of the writer or those that all share.
    """
    shared = (p for u in source.updates for p in _problems(u, source, axes, adds_eps))
    found = [*problems, *shared]
    if found:
        raise AdapterError(
            f"{source.adapter.path}: the {target} format cannot hold this adapter exactly:"
            f"{listing(dict.fromkeys(found))}\nMerge it instead, or approximate it with "
            "--to lora --rank R --base BASE."
        )


def _problems(
    update: Update, source: Source, axes: Sequence[Axis], adds_eps: bool
) -> Iterator[str]:
    """Yield what no format but the adapter's own can say of a product."""
    name = shown(update.target)
    if update.kind not in ("lora", "dora"):
        return  # the writers' own business
    if not update.target.endswith(".weight"):
        yield f"{name}: a parameter that is no layer's weight"
    if update.delta is not None or update.down is None or update.up is None:
        yield f"{name}: its update is no low-rank product"
    if any(o.combine is not None for o in update.operands):
        yield f"{name}: its factors are computed from several tensors"
    if update.magnitude_is_factor:
        yield f"{name}: its magnitudes were divided by the norm beforehand"
    if update.index is not None or update.rows is not None:
        yield f"{name}: it changes a part of a fused weight"
    if update.axis not in axes and update.magnitude is not None:
        yield f"{name}: one magnitude per input, the format has one per output"
    if update.eps and not adds_eps:
        yield f"{name}: {update.eps:.3g} is added to the norm, the format adds nothing"
    if update.row_order is not None:
        yield f"{name}: the order of its rows depends on the base; pass --base"
    bias = f"{source.names.get(update.target, update.target).removesuffix('weight')}bias"
    if update.scales_bias and (source.base is None or bias in source.base.tensors):
        what = "the base has one" if source.base is not None else "pass --base, if it has none"
        yield f"{name}: its trainer scales the layer's bias as well; {what}"


def module_of(update: Update) -> str:
    """Return the path of the layer that an update is about."""
    return update.target.removesuffix(".weight")


def is_embedding(update: Update) -> bool:
    """Return whether an update is about a table that is looked up by token."""
    return update.layout == "io" or module_of(update).rpartition(".")[2] in EMBEDDINGS


def factors(update: Update) -> tuple[Operand, Operand]:
    """Return A, ``(rank, in)``, and B, ``(out, rank)``, of a checked update."""
    assert update.down is not None, "Bug: check() has seen to it"
    assert update.up is not None, "Bug: check() has seen to it"
    return update.down, update.up


def alpha_of(update: Update) -> float:
    """Return the alpha that gives exactly the update's scaling when divided by its rank.

    Raises:
        AdapterError: No float64 does.
    """
    rank, scaling = update.rank, update.scaling
    assert rank is not None, "Bug: check() has seen to it"
    nearest = scaling * rank
    for alpha in (nearest, np.nextafter(nearest, np.inf), np.nextafter(nearest, -np.inf)):
        if float(alpha) / rank == scaling:
            return float(alpha)
    raise AdapterError(
        f"{shown(update.target)}: no alpha gives the scaling {scaling!r} at rank {rank} exactly. "
        "Merge the adapter instead."
    )


def whole(number: float) -> float | int:
    """Return an integer for a number that is one, as configs write it."""
    return int(number) if float(number).is_integer() else float(number)
