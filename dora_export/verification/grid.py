"""Tensors by their place in the model, read off their names: layers across, kinds down.

``model.layers.12.self_attn.q_proj.weight`` is layer 12 of the stack ``model.layers`` and of kind
``self_attn.q_proj``. Numbers behind the first (experts, blocks within blocks) are starred, so such
tensors share a cell.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dora_export.verification.model import TensorResult
from dora_export.words import index

MAX_CELLS = 2400  # a page with three charts of them stays below two megabytes
MAX_COLUMNS = 200
MAX_KINDS = 30


@dataclass(frozen=True)
class Column:
    """Neighbouring layers, mostly a single one.

    Attributes:
        stack: Name of the first layer's stack, "" outside of any.
        first: Number of the first layer, or None outside of any stack.
        label: What to write under the column.
    """

    stack: str
    first: int | None
    label: str


@dataclass(frozen=True)
class Cell:
    """The tensors of one kind in one column."""

    row: int
    column: int
    tensors: tuple[TensorResult, ...]


@dataclass(frozen=True)
class Grid:
    """Where the tensors stand.

    Attributes:
        columns: Layers, in order.
        kinds: Rows, in order of their first tensor.
        cells: Those that hold tensors.
        left_out: Kinds without a row, for there are too many.
    """

    columns: tuple[Column, ...]
    kinds: tuple[str, ...]
    cells: tuple[Cell, ...]
    left_out: int

    @property
    def shared(self) -> int:
        """Most tensors in one cell."""
        return max((len(c.tensors) for c in self.cells), default=0)


def place(name: str) -> tuple[str, int | None, str]:
    """Return stack, layer and kind of a tensor."""
    parts = name.removesuffix(".weight").split(".")
    first = next((i for i, p in enumerate(parts) if index(p) is not None), None)
    if first is None:
        return "", None, ".".join(parts)
    stack = ".".join(parts[:first])
    kind = ".".join(p if index(p) is None else "*" for p in parts[first + 1 :])
    return stack, index(parts[first]), kind or stack or name


def arrange(tensors: Sequence[TensorResult]) -> Grid:
    """Return the grid of some tensors, at most ``MAX_CELLS`` cells."""
    places = [(t, *place(t.name)) for t in tensors]
    ranks: dict[str, float] = {}
    for tensor, _, _, kind in places:
        grave = 1e300 if tensor.status == "wrong" else tensor.max_ulp
        ranks[kind] = max(ranks.get(kind, 0.0), grave)
    kept = set(sorted(ranks, key=lambda k: -ranks[k])[:MAX_KINDS])
    kinds = [k for k in ranks if k in kept]
    stacks = {stack: i for i, stack in enumerate(dict.fromkeys(p[1] for p in places))}
    stacks[""] = -1  # what stands in no layer comes first
    layers = sorted(
        {(stack, layer) for _, stack, layer, kind in places if kind in kept},
        key=lambda c: (stacks[c[0]], -1 if c[1] is None else c[1]),
    )
    columns, where = _columns(layers, min(MAX_COLUMNS, max(20, MAX_CELLS // max(1, len(kinds)))))
    rows = {kind: i for i, kind in enumerate(kinds)}
    cells: dict[tuple[int, int], list[TensorResult]] = {}
    for tensor, stack, layer, kind in places:
        if kind in kept:
            cells.setdefault((rows[kind], where[stack, layer]), []).append(tensor)
    return Grid(
        columns,
        tuple(kinds),
        tuple(Cell(row, column, tuple(ts)) for (row, column), ts in sorted(cells.items())),
        len(ranks) - len(kinds),
    )


def _columns(
    layers: Sequence[tuple[str, int | None]], most: int
) -> tuple[tuple[Column, ...], dict[tuple[str, int | None], int]]:
    """Join neighbouring layers, of one stack if possible, until there are few enough columns."""
    stacks = len({stack for stack, _ in layers})
    room = most - stacks  # every stack may end in a column that is not full
    across = room <= 0
    width = -(-len(layers) // (most if across else room)) if len(layers) > most else 1
    joined: list[list[tuple[str, int | None]]] = []
    where: dict[tuple[str, int | None], int] = {}
    for layer in layers:
        same = joined and (across or joined[-1][-1][0] == layer[0])
        if same and len(joined[-1]) < width:
            joined[-1].append(layer)
        else:
            joined.append([layer])
        where[layer] = len(joined) - 1
    return tuple(Column(*some[0], _label(some)) for some in joined), where


def _label(layers: Sequence[tuple[str, int | None]]) -> str:
    first, last = layers[0][1], layers[-1][1]
    if first is None:
        return "–"
    return f"{first}" if len(layers) == 1 else f"{first}–{last}"
