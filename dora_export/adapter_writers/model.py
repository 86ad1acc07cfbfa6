"""What every adapter writer gives, and what they share: products that are only rearranged."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from dora_export import cast, layer_biases
from dora_export.adapters.model import Adapter
from dora_export.checkpoints.model import Checkpoint
from dora_export.errors import AdapterError, listing, shown
from dora_export.tensors import DType, Operand, TensorRef
from dora_export.unscaled_norm import UnscaledNorm
from dora_export.update import Axis, Update

NEEDS_BASE = "pass --base"  # in every problem that a base would solve, or show to be none
Biases = Literal["plain", "scaled", "own"]
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
        rounded: Some tensors are computed for the base and rounded once; all others are copied.
    """

    weights: str
    tensors: tuple[Stored, ...]
    config: Mapping[str, Any] | None = None
    notes: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)
    rounded: bool = False


@dataclass(frozen=True)
class Source:
    """An adapter to be written in another format.

    Attributes:
        adapter: The adapter.
        updates: Its updates, their rows in the base's order where a base was given.
        base: The base, or None.
        names: The base's name for each of the updates' targets; empty without a base.
        notes: What has been computed for the base, for people.
    """

    adapter: Adapter
    updates: tuple[Update, ...]
    base: Checkpoint | None
    names: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


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
    biases: Biases = "plain",
) -> None:
    """Refuse an adapter that the target format cannot hold.

    Args:
        source: The adapter.
        target: What the format is called.
        problems: What the writer has found itself.
        axes: What the format's magnitudes can count.
        adds_eps: The format adds something to norms; the writer has compared it.
        biases: What the format's DoRA makes of a layer's bias: adds it as it is ("plain"), or
            scales it by ``m / ||W + s B A||`` ("scaled"), or brings its own value ("own").

    Raises:
        AdapterError: There are problems, those of the writer or those that all share.
    """
    shared = (p for u in source.updates for p in _problems(u, source, axes, adds_eps))
    of_biases = (p for u in source.updates if (p := _bias_problem(u, source, target, biases)))
    found = [*problems, *shared, *of_biases]
    if found and source.base is None and all(NEEDS_BASE in problem for problem in found):
        raise AdapterError(
            f"{source.adapter.path}: the adapter alone does not tell whether the {target} format "
            f"can hold it:{listing(_gathered(found))}\nPass --base."
        )
    if found:
        raise AdapterError(
            f"{source.adapter.path}: the {target} format cannot hold this adapter exactly:"
            f"{listing(_gathered(found))}\n{_way_out(source)}"
        )


def _gathered(problems: Sequence[str]) -> Iterator[str]:
    """Yield every reason once, with the first layer of which it holds and how many more."""
    layers: dict[str, list[str]] = {}
    for problem in dict.fromkeys(problems):
        name, colon, reason = problem.partition(": ")
        layers.setdefault(reason if colon else "", []).append(name)
    for reason, names in layers.items():
        if not reason:
            yield from names
            continue
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        yield f"{names[0]}{more}: {reason}"


def _way_out(source: Source) -> str:
    """Return what else can be done with an adapter."""
    values = [u for u in source.updates if u.kind in ("replace", "add", "rows")]
    if values or any(scaled_bias(u, source) for u in source.updates):
        return "Merge it instead."  # a plain LoRA would refuse them as well
    return "Merge it instead, or approximate it with --to lora --rank R --base BASE."


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
        yield f"{name}: the order of its rows depends on the base; {NEEDS_BASE}"


def _bias_problem(update: Update, source: Source, target: str, biases: Biases) -> str | None:
    """Return what keeps a layer's bias from being what the adapter's trainer made of it."""
    name, base = shown(update.target), source.base
    if update.kind != "dora" or update.scales_bias == (biases == "scaled"):
        return None
    bias = layer_biases.bias_of(source.names.get(update.target, update.target))
    if base is not None and (bias not in base.tensors or biases == "own"):
        return None
    if base is None:
        return (
            f"{name}: its trainer scales the layer's bias by m / ||W + s B A|| as well, if there "
            f"is one; {NEEDS_BASE}"
        )
    if biases == "scaled":
        return (
            f"{name}: {target} scales the layer's bias by m / ||W + s B A|| as well, the adapter's "
            "trainer does not, and the base has one"
        )
    return (
        f"{name}: its trainer scales the layer's bias by m / ||W + s B A|| as well, the base has "
        f"one, and the {target} format holds none; PEFT's does (--to peft)"
    )


def scaled_bias(update: Update, source: Source) -> TensorRef | None:
    """Return the base's bias that the adapter's trainer scales along, or None."""
    if not update.scales_bias or update.kind != "dora" or source.base is None:
        return None
    bias = layer_biases.bias_of(source.names.get(update.target, update.target))
    return source.base.tensors.get(bias)


def own_bias(name: str, update: Update, source: Source) -> Stored:
    """Return a bias scaled as the adapter's trainer does, rounded once to the base's type.

    Args:
        name: What to call it.
        update: One for which ``scaled_bias`` is not None.
        source: Where it is from.
    """
    ref = scaled_bias(update, source)
    assert ref is not None, "Bug: the caller has asked"
    assert source.base is not None, "Bug: as above"
    here = replace(update, target=source.names.get(update.target, update.target))
    function = layer_biases.scaled(here, source.base.tensors)
    assert function is not None, "Bug: the plan refuses what cannot be scaled"

    def raw() -> NDArray[Any]:
        values = function.value(cast.widened(ref.raw(), ref.dtype, np.float64)[None], ref.dtype)[0]
        out = np.empty(ref.shape, ref.dtype.raw)
        cast.narrow(values, ref.dtype, out, np.empty_like(values))
        return out

    return Stored(name, ref.dtype, ref.shape, raw)


def kind_problem(update: Update) -> str:
    """Return what else than a low-rank product an update is."""
    words = {
        "replace": "a whole copy of it",
        "add": "a whole difference, not factors",
        "rows": "rows of its own (trained tokens)",
        "magnitude": "magnitudes without factors",
    }
    what = words.get(update.kind, update.kind)
    if update.function is not None:
        what = update.function.what
    if isinstance(update.function, UnscaledNorm):  # with a base it has become kind "dora"
        what += f"; in another's terms it can be said for one base, {NEEDS_BASE}"
    return f"{shown(update.target)}: {what}"


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
    # Where the nearest alpha does not give it, no neighbour does: they are coarser than scalings.
    alpha = scaling * rank
    if alpha / rank == scaling:
        return alpha
    raise AdapterError(
        f"{shown(update.target)}: no alpha gives the scaling {scaling!r} at rank {rank} exactly. "
        "Merge the adapter instead."
    )


def whole(number: float) -> float | int:
    """Return an integer for a number that is one, as configs write it."""
    return int(number) if float(number).is_integer() else float(number)
