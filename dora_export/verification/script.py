"""What a graph and its reference are asked, call by call, in the same words.

A script is a few calls of one model: one with a whole input, or a prefill and then one token after
another on the cache that the side itself gave. Numbers go in and come out by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from dora_export.verification import parity
from dora_export.verification.parity import Compared
from dora_export.verification.runner import Arrays, Slot

PAST, PRESENT = "past_key_values.", "present."
DECODED = 4  # tokens given one by one behind a prefill
MOST_PARTS = 2  # of a batch, for a graph that takes fewer sequences at once
# What a graph may ask for beside the model's main input, and models otherwise make up themselves.
DERIVED = ("attention_mask", "position_ids", "token_type_ids")

Run = Callable[[Arrays], dict[str, NDArray[Any]]]
Padding = Literal["any", "right", "none"]


def output_name(name: str, inputs: Iterable[str]) -> str:
    """Return the graph's name for a model's output: values of a graph have one name each.

    Source: github.com/huggingface/optimum-onnx, "out_sample" of diffusers' UNets.
    """
    return f"out_{name}" if name in inputs else name


@dataclass(frozen=True, eq=False)
class Ask:
    """One call.

    Attributes:
        values: Inputs by name, without a cache.
        mask: ``(batch, length)`` of this call's tokens, 0 for padding; None: no padding.
        seen: The same of all tokens so far, which a cache holds.
    """

    values: Arrays
    mask: NDArray[Any] | None = None
    seen: NDArray[Any] | None = None


@dataclass(frozen=True, eq=False)
class Script:
    """Calls of which each but the first continues the one before.

    Attributes:
        name: For people.
        asks: In order.
    """

    name: str
    asks: tuple[Ask, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return names and shapes of the first call, and the number of calls."""
        shapes = {n: list(v.shape) for n, v in self.asks[0].values.items()}
        return {"name": self.name, "shapes": shapes, "calls": len(self.asks)}


def scripts(
    name: str, values: Arrays, slots: Mapping[str, Slot], padding: Padding = "any"
) -> list[Script]:
    """Return the ways to ask a graph for one batch; none if it cannot take it.

    Args:
        name: Of the batch.
        values: Its inputs by name.
        slots: The graph's inputs.
        padding: Where the graph takes padding.
    """
    fixed = _fixed_rows(values, slots)
    rows = len(next(iter(values.values())))
    if fixed is not None and rows > fixed:  # a graph for so many sequences and no others
        return [
            found
            for start in range(0, min(rows - fixed + 1, MOST_PARTS * fixed), fixed)
            for found in scripts(
                f"{name} {start + 1}" + (f" to {start + fixed}" if fixed > 1 else ""),
                {n: v[start : start + fixed] for n, v in values.items()}, slots, padding,
            )
        ]  # fmt: skip
    if "input_ids" not in values:
        whole = _fitted(values, slots)
        return [] if whole is None else [Script(name, (Ask(whole),))]
    ids = values["input_ids"]
    mask = values.get("attention_mask", np.ones_like(ids))
    padded = bool((mask == 0).any())
    if padded and ("attention_mask" not in slots or padding == "none"):
        return []
    rest = {n: v for n, v in values.items() if n not in ("input_ids", *DERIVED)}
    found = [_whole(name, ids, mask, rest, slots)]
    if not padded:
        found.append(_whole(f"{name}, one short", ids[:1, : max(1, ids.shape[1] // 2)],
                            mask[:1, : max(1, ids.shape[1] // 2)],
                            {n: v[:1] for n, v in rest.items()}, slots))  # fmt: skip
    if any(n.startswith(PAST) for n in slots):
        # Backwards, padding comes first, as it does for models that write on.
        left = padded and padding == "any"
        direction = -1 if left else 1
        if left:
            found.append(_whole(f"{name}, on the left", ids[:, ::-1], mask[:, ::-1], rest, slots))
        found.append(_stepwise(f"{name}, step by step", ids[:, ::direction],
                               mask[:, ::direction], rest, slots))  # fmt: skip
    return [script for script in found if script is not None]


def _fixed_rows(values: Arrays, slots: Mapping[str, Slot]) -> int | None:
    """Return the batch size that a graph is fixed to, if it is one and the values share theirs."""
    found = {slots[n].shape[0] for n in values if n in slots and slots[n].shape}
    rows = {len(v) for v in values.values() if v.ndim}
    return found.pop() if len(found) == 1 and len(rows) == 1 else None


def _whole(
    name: str, ids: NDArray[Any], mask: NDArray[Any], rest: Arrays, slots: Mapping[str, Slot]
) -> Script | None:
    ask = _ask(ids, mask, mask, rest, slots)
    return None if ask is None else Script(name, (ask,))


def _stepwise(
    name: str, ids: NDArray[Any], mask: NDArray[Any], rest: Arrays, slots: Mapping[str, Slot]
) -> Script | None:
    first = max(1, ids.shape[1] - DECODED)
    cuts = [(0, first), *((i, i + 1) for i in range(first, ids.shape[1]))]
    asks = [_ask(ids[:, a:b], mask[:, a:b], mask[:, :b], rest, slots) for a, b in cuts]
    whole = tuple(ask for ask in asks if ask is not None)
    return Script(name, whole) if len(whole) == len(asks) else None


def _ask(
    ids: NDArray[Any],
    mask: NDArray[Any],
    seen: NDArray[Any],
    rest: Arrays,
    slots: Mapping[str, Slot],
) -> Ask | None:
    values = {"input_ids": ids, **rest}
    positions = (np.cumsum(seen, axis=1) - 1).clip(min=0)[:, -ids.shape[1] :]
    derived = {"attention_mask": seen, "position_ids": positions,
               "token_type_ids": np.zeros_like(ids)}  # fmt: skip
    values |= {n: derived[n] for n in DERIVED if n in slots}
    fitted = _fitted(values, slots)
    return None if fitted is None else Ask(fitted, mask, seen)


def _fitted(values: Arrays, slots: Mapping[str, Slot]) -> dict[str, NDArray[Any]] | None:
    """Return the values in the graph's types, None where a fixed dimension is another."""
    for name, value in values.items():
        shape = slots[name].shape
        if len(shape) != value.ndim or any(
            d not in (None, n) for d, n in zip(shape, value.shape, strict=True)
        ):
            return None
    return {n: np.ascontiguousarray(v.astype(slots[n].dtype)) for n, v in values.items()}


def play(script: Script, run: Run, slots: Mapping[str, Slot], like: Arrays | None = None
         ) -> list[dict[str, NDArray[Any]]]:  # fmt: skip
    """Run a script; return each call's outputs.

    Args:
        script: What to ask.
        run: Of one side.
        slots: The graph's inputs.
        like: Outputs of the other side with a cache, whose shape an empty cache is given; None:
            a side that needs none.
    """
    results: list[dict[str, NDArray[Any]]] = []
    for ask in script.asks:
        past = {n: _past(n, results[-1] if results else None, like, slots[n])
                for n in slots if n.startswith(PAST) and (results or like is not None)}  # fmt: skip
        results.append(run({**ask.values, **past}))
    return results


def written(
    name: str, ids: NDArray[Any], count: int, run: Run, slots: Mapping[str, Slot]
) -> tuple[Script, list[dict[str, NDArray[Any]]]] | None:
    """Let a side write on, each token the one with its largest logit.

    Args:
        name: For people.
        ids: ``(batch, length)``, the beginning.
        count: Tokens to write.
        run: Of the side that writes.
        slots: The graph's inputs, those of a cache among them.

    Returns:
        The calls, and what came out; None where the graph does not take such calls.
    """
    asks: list[Ask] = []
    results: list[dict[str, NDArray[Any]]] = []
    new = ids
    for _ in range(count):
        seen = np.ones((len(ids), ids.shape[1] + len(asks)), np.int64)
        ask = _ask(new, np.ones_like(new), seen, {}, slots)
        if ask is None:
            return None
        past = {n: _past(n, results[-1], None, slots[n])
                for n in slots if n.startswith(PAST) and results}  # fmt: skip
        asks.append(ask)
        results.append(run({**ask.values, **past}))
        new = results[-1]["logits"][:, -1:].argmax(axis=-1).astype(ids.dtype)
    return Script(name, tuple(asks)), results


def _past(name: str, last: Arrays | None, like: Arrays | None, slot: Slot) -> NDArray[Any]:
    twin = f"{PRESENT}{name.removeprefix(PAST)}"
    if last is not None:
        return last[twin].astype(slot.dtype)
    assert like is not None, "Bug: an empty cache of unknown shape"
    batch, heads, _, dim = like[twin].shape
    return np.zeros((batch, heads, 0, dim), slot.dtype)


def compared(
    asked: Sequence[Script],
    found: Sequence[Sequence[Arrays]],
    expected: Sequence[Sequence[Arrays]],
    names: Sequence[str],
) -> dict[str, Compared]:
    """Compare the named outputs of all calls; padding is left out, in caches as well."""
    parts = [
        {n: parity.compare({n: _lined(n, one[n])}, {n: _lined(n, other[n])},
                           ask.seen if n.startswith(PRESENT) else ask.mask)[n] for n in names}
        for script, ours, theirs in zip(asked, found, expected, strict=True)
        for ask, one, other in zip(script.asks, ours, theirs, strict=True)
    ]  # fmt: skip
    return parity.added(parts)


def finite(script: Script, results: Sequence[Arrays], names: Sequence[str]) -> bool:
    """Return whether the named outputs are finite, but for padding."""
    found = pieces([script], [results], names)
    return all(bool(np.isfinite(array).all()) for array in found)


def pieces(
    asked: Sequence[Script], found: Sequence[Sequence[Arrays]], names: Sequence[str]
) -> list[NDArray[Any]]:
    """Return the named outputs of all calls one after another, but for padding and caches."""
    kept = [n for n in names if not n.startswith(PRESENT)]
    return [
        _tokens(one[name], ask)
        for script, ours in zip(asked, found, strict=True)
        for ask, one in zip(script.asks, ours, strict=True)
        for name in kept
    ]  # fmt: skip


def _tokens(array: NDArray[Any], ask: Ask) -> NDArray[Any]:
    """Return an output without what belongs to padding."""
    if ask.mask is None or array.shape[:2] != ask.mask.shape:
        return array
    kept: NDArray[Any] = array[ask.mask.astype(bool)]
    return kept


def _lined(name: str, array: NDArray[Any]) -> NDArray[Any]:
    """Return a cache as ``(batch, length, heads, dim)``, like other outputs."""
    return array.swapaxes(1, 2) if name.startswith(PRESENT) else array


def misfits(
    found: Sequence[Sequence[Arrays]], expected: Sequence[Sequence[Arrays]], names: Sequence[str]
) -> Iterator[str]:
    """Yield how the shapes of the named outputs differ."""
    for ours, theirs in zip(found, expected, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            yield from parity.misfits(*({n: side[n] for n in names} for side in (one, other)))
