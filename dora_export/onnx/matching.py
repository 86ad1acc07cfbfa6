"""Which base tensors a graph's tensors hold, found by content.

Names are an exporter's own business, and no proof; values are. In turn:

1. Whole tensors: a few dozen elements of each base tensor, in the graph's type, against the same
   elements of each stored tensor of that size, as it is and transposed (this module).
2. Lines: what is left is looked up row by row and column by column (``matching_lines``), which
   finds packed, sliced, padded and reordered weights.
3. Quantised weights: by what the base gives when it is quantised with the graph's own parameters
   (``matching_nbits``, ``matching_int8``).

What an adapter changes is then proven: every element, byte for byte (``proof``). Names only decide
between base tensors of the same values.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from dora_export import tying
from dora_export.errors import shown
from dora_export.onnx.encodings import Encoding, NeverZero, Plain, converted
from dora_export.onnx.graph_file import Graph, StoredTensor, Use
from dora_export.onnx.lines import Lines, gather
from dora_export.plan import Plan, Step
from dora_export.tensors import F16, Bytes, DType, TensorRef

SAMPLES = 64  # elements that tell one tensor from another
SMALL = 1 << 16  # bytes of a tensor that is read whole for that
KEPT = -1  # a line that holds no base row and stays as it is (padding)
MAX_AXES = 5  # dimensions whose orders are tried


@dataclass(frozen=True, eq=False)
class Weight:
    """A base tensor as a graph may hold it, and what becomes of it.

    Attributes:
        name: Its name in the merged model.
        base: The base's values; None: the base has none (a head that the adapter brings).
        step: What becomes of it; None: nothing.
    """

    name: str
    base: TensorRef | None
    step: Step | None = None

    @property
    def changed(self) -> bool:
        """Whether the merge changes it."""
        return self.step is not None


@dataclass(frozen=True)
class Run:
    """Consecutive lines of a graph's tensor that hold consecutive rows of one base tensor.

    Attributes:
        weight: Name of the base tensor, None for lines that hold none of it.
        first_row: First of the rows, each ``Match.length`` elements.
        first_line: First of the lines.
        count: How many.
    """

    weight: str | None
    first_row: int
    first_line: int
    count: int


@dataclass(frozen=True, eq=False)
class Match:
    """Where a graph holds rows of base tensors.

    Attributes:
        holders: Stored tensors that hold them together, the values first; where they are quantised,
            then scales and zero points.
        encoding: How rows become the bytes of a line of each holder.
        length: Elements of a row.
        weights: Base tensors that occur.
        weight_of: For each line the position in ``weights``, ``KEPT`` where it holds none.
        row_of: For each line the row.
        evidence: "sampled": elements were compared; "bytes": all of them.
        uses: Nodes that take the values.
        parameters: Stored tensors with what the whole tensor shares: one scale, one zero point.
    """

    holders: tuple[Lines, ...]
    encoding: Encoding
    length: int
    weights: tuple[Weight, ...]
    weight_of: NDArray[np.int32] = field(repr=False)
    row_of: NDArray[np.int64] = field(repr=False)
    evidence: Literal["sampled", "bytes"] = "sampled"
    uses: tuple[Use, ...] = field(default=(), repr=False)
    parameters: tuple[StoredTensor, ...] = ()

    @property
    def tensor(self) -> StoredTensor:
        """The stored tensor with the values."""
        return self.holders[0].tensor

    @property
    def lines(self) -> Lines:
        """It as lines."""
        return self.holders[0]

    @property
    def changed(self) -> bool:
        """Whether a merge changes any of it."""
        return any(w.changed for w in self.weights)

    def runs(self) -> tuple[Run, ...]:
        """Return what the lines hold, in order, neighbours taken together."""
        weight, row = self.weight_of, self.row_of
        kept = weight == KEPT
        step = np.where(kept[1:], 0, 1)
        breaks = (weight[1:] != weight[:-1]) | (~kept[1:] & (row[1:] != row[:-1] + step))
        starts: list[int] = [0, *(np.flatnonzero(breaks) + 1).tolist()] if weight.size else []
        stops = [*starts[1:], weight.size]
        return tuple(
            Run(None if kept[a] else self.weights[weight[a]].name,
                0 if kept[a] else int(row[a]), a, b - a)
            for a, b in zip(starts, stops, strict=True)
        )  # fmt: skip


def weights_of(plan: Plan) -> tuple[Weight, ...]:
    """Return every floating-point tensor of a merged model with the values that the base has."""
    base, sources = plan.base.tensors, set(plan.base.sources)
    found = []
    for step in plan.steps:
        ref = base.get(step.name)
        if ref is None and step.source.source.path in sources:
            ref = step.source  # a head that was tied: it has the embedding's values
        elif ref is None:
            ref = _tied_values(step, base)
        if ref is not None and not ref.dtype.mergeable:
            continue
        changed = step.status not in ("unchanged", "cast")
        found.append(Weight(step.name, ref, step if changed else None))
    return tuple(found)


def _tied_values(step: Step, base: Mapping[str, TensorRef]) -> TensorRef | None:
    """Return the embedding whose values a head has that the base does not store."""
    if _leaf(step.name) not in tying.HEADS:
        return None
    like = [r for n, r in base.items() if _leaf(n) in tying.EMBEDDINGS and r.shape == step.shape]
    return like[0] if len(like) == 1 else None


def _leaf(name: str) -> str:
    return name.split(".")[-2] if "." in name else ""


# --- whole tensors


@dataclass(frozen=True)
class Arrangement:
    """One way in which a stored tensor can hold all of a base tensor.

    Attributes:
        axes: The stored tensor is the base tensor with its axes in this order.
        shape: Shape of the base tensor.
    """

    shape: tuple[int, ...]
    axes: tuple[int, ...]

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape of the stored tensor."""
        return tuple(self.shape[a] for a in self.axes)

    def offsets(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return where elements of the base tensor lie in the stored one."""
        index = np.unravel_index(positions, self.shape)
        return np.ravel_multi_index(tuple(index[a] for a in self.axes), self.stored_shape)


def arrangements(base: tuple[int, ...], stored: tuple[int, ...]) -> Iterator[Arrangement]:
    """Yield the ways in which a stored tensor of a shape can hold a base tensor, plain first."""
    if math.prod(base) != math.prod(stored):
        return
    yield Arrangement(base, tuple(range(len(base))))
    plain = tuple(d for d in stored if d != 1)
    squeezed = tuple(d for d in base if d != 1)
    flat = (math.prod(squeezed[1:]), *squeezed[:1])
    if len(squeezed) > 2 and plain == flat:
        yield Arrangement(flat[::-1], (1, 0))
    if len(squeezed) < 2 or len(squeezed) > MAX_AXES:
        return
    for axes in itertools.permutations(range(len(squeezed))):
        order = Arrangement(squeezed, axes)
        if axes != tuple(range(len(squeezed))) and order.stored_shape == plain:
            yield order


def as_lines(arranged: Arrangement, tensor: StoredTensor, dtype: DType) -> Lines | None:
    """Return a stored tensor as lines that are the base tensor's rows, or None where it has none.

    A row is what one index of the first axis holds; in an expert weight (three axes), of the first
    two.
    """
    shape, axes, item = arranged.shape, arranged.axes, dtype.itemsize
    if len(shape) < 2 or axes == tuple(range(len(shape))):
        rows = shape[0] if len(shape) > 1 else 1
        return Lines(tensor, item, 1, rows, tensor.size // max(1, rows))
    if axes == (1, 0):
        return Lines(tensor, item, 1, shape[1], shape[0], by_column=True)
    if axes == (0, 2, 1):
        return Lines(tensor, item, shape[0], shape[2], shape[1], by_column=True)
    if axes[0] == 0:
        return Lines(tensor, item, 1, shape[0], tensor.size // shape[0])
    if axes[-1] == 0:
        return Lines(tensor, item, 1, tensor.size // shape[0], shape[0], by_column=True)
    return None


def _inner(arranged: Arrangement) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Return the order of a line's elements, where it is not the base's."""
    rest = tuple(a - 1 for a in arranged.axes if a != 0)
    if arranged.axes == (0, 2, 1) or rest == tuple(range(len(rest))):
        return None
    return arranged.shape[1:], rest


def samples_at(size: int) -> NDArray[np.int64]:
    """Return positions of elements to compare: first, last, and spread over all between."""
    if size <= SAMPLES:
        return np.arange(size)
    spread = np.random.default_rng(size).random(SAMPLES)
    inner = ((np.arange(SAMPLES) + spread) * (size / SAMPLES)).astype(np.int64)
    inner[0], inner[-1] = 0, size - 1
    return np.minimum(inner, size - 1)


def elements(ref: TensorRef, positions: NDArray[np.int64]) -> NDArray[Any]:
    """Return single elements of a stored tensor, as ``dtype.raw``."""
    if ref.nbytes <= SMALL:
        return ref.raw()[positions]
    out = np.empty((positions.size, ref.dtype.itemsize), np.uint8)
    gather(ref.source, positions * ref.dtype.itemsize, out)
    return out.view(ref.dtype.raw).reshape(-1)


class Whole:
    """Finds stored tensors that hold whole base tensors, by samples."""

    def __init__(self, weights: Sequence[Weight]) -> None:
        self._by_size: dict[int, list[Weight]] = defaultdict(list)
        for weight in weights:
            if weight.base is not None and weight.base.size:
                self._by_size[weight.base.size].append(weight)
        self._samples: dict[tuple[str, str], Bytes] = {}

    def find(self, tensor: StoredTensor) -> list[Match]:
        """Return the base tensors that a stored tensor can be, one match for each."""
        dtype = tensor.dtype
        assert dtype is not None, "Bug: only floating-point tensors are looked up"
        found: list[Match] = []
        read: dict[tuple[int, ...], Bytes] = {}
        at = samples_at(tensor.size)
        for weight in self._by_size.get(tensor.size, ()):
            assert weight.base is not None, "Bug: gathered above"
            for arranged in arrangements(weight.base.shape, tensor.shape):
                key = arranged.axes if len(arranged.axes) > 1 else (0,)
                shaped = (*arranged.shape, *key)
                if shaped not in read:
                    read[shaped] = elements(tensor.ref, arranged.offsets(at)).view(np.uint8)
                for encoding in (Plain(dtype, _inner(arranged)), *_variants(dtype, arranged)):
                    if np.array_equal(self._encoded(weight, at, encoding), read[shaped]):
                        match = _whole(weight, arranged, tensor, encoding)
                        found += [match] if match is not None else []
                        break
        return found

    def _encoded(self, weight: Weight, at: NDArray[np.int64], encoding: Encoding) -> Bytes:
        key = (weight.name, type(encoding).__name__ + encoding.source.name)
        if key not in self._samples:
            assert weight.base is not None, "Bug: only weights with values are looked up"
            raw = converted(elements(weight.base, at), weight.base.dtype, encoding.source)
            plain = replace(encoding, inner=None) if isinstance(encoding, Plain) else encoding
            self._samples[key] = plain.encode(raw.reshape(1, -1))[0].reshape(-1)
        return self._samples[key]


def _variants(dtype: DType, arranged: Arrangement) -> tuple[Encoding, ...]:
    return (NeverZero(),) if dtype is F16 and _inner(arranged) is None else ()


def _whole(
    weight: Weight, arranged: Arrangement, tensor: StoredTensor, encoding: Encoding
) -> Match | None:
    lines = as_lines(arranged, tensor, tensor.dtype or encoding.source)
    if lines is None:
        return None
    return Match(
        (lines,),
        encoding,
        lines.length,
        (weight,),
        np.zeros(lines.count, np.int32),
        np.arange(lines.count),
    )


# --- one among several with the same values


def narrowed(graph: Graph, candidates: Sequence[Match]) -> tuple[Match, ...]:
    """Return those of several matches of one stored tensor that its use and its names allow.

    Base tensors may have the same values: an embedding and its head, biases that are all zero. If
    none of them changes, any will do.
    """
    changed = [m for m in candidates if m.changed]
    if not changed:
        return (candidates[0],)
    if len(candidates) == 1:
        return tuple(candidates)
    roles = ends(graph, candidates[0].tensor)
    if len(roles) == 1:
        of_role = [m for m in candidates if _end(m.weights[0].name) in roles]
        candidates = of_role or candidates
    hints = _hints(graph, candidates[0].tensor)
    named = [m for m in candidates if any(_is_named(m.weights[0].name, h) for h in hints)]
    longest = max((len(_path(m.weights[0].name)) for m in named), default=0)
    exact = [m for m in named if len(_path(m.weights[0].name)) == longest]
    return tuple(exact if len(exact) == 1 else candidates)


def _end(name: str) -> str | None:
    if _leaf(name) in tying.HEADS:
        return "head"
    return "embedding" if _leaf(name) in tying.EMBEDDINGS else None


PASSING = ("Transpose", "Cast", "Identity", "Reshape", "DequantizeLinear", "Unsqueeze", "Squeeze")
LOOKUPS = ("Gather", "EmbedLayerNormalization", "GatherBlockQuantized")


def ends(graph: Graph, tensor: StoredTensor) -> set[str]:
    """Return what a stored tensor is used as: "embedding" where it is looked up, else "head"."""
    found: set[str] = set()
    names, seen = [tensor.name], set[str]()
    while names:
        name = names.pop()
        if name in seen:
            continue
        seen.add(name)
        for use in graph.uses.get(name, ()):
            if use.node.op_type in PASSING:
                names += use.node.output
            elif use.node.op_type in LOOKUPS:
                found.add("embedding")
            else:
                found.add("head")
    return found


def _hints(graph: Graph, tensor: StoredTensor) -> list[list[str]]:
    """Return names that may say what a stored tensor is, as lists of words."""
    words = [tensor.name, graph.origins.get(tensor.name, "")]
    words += [use.node.name for use in graph.uses.get(tensor.name, ())]
    return [w.replace("/", ".").replace("::", ".").strip(".").split(".") for w in words if w]


def _path(name: str) -> list[str]:
    return name.removesuffix(".weight").split(".")


def _is_named(name: str, hint: list[str]) -> bool:
    """Return whether the words of a hint hold those of a name one after the other."""
    path = _path(name)
    return any(hint[i : i + len(path)] == path for i in range(len(hint) - len(path) + 1))


def places(matches: Iterable[Match]) -> Mapping[str, tuple[Match, ...]]:
    """Return where each base tensor is held, by its name."""
    found: dict[str, list[Match]] = defaultdict(list)
    for match in matches:
        for weight in match.weights:
            found[weight.name].append(match)
    return {name: tuple(held) for name, held in found.items()}


def described(match: Match) -> str:
    """Return what a stored tensor holds, for people."""
    runs = match.runs()
    names = list(dict.fromkeys(r.weight for r in runs if r.weight))
    how = ", transposed" if match.lines.by_column else ""
    many = " + ".join(shown(n) for n in names[:4]) + (" ..." if len(names) > 4 else "")
    return f"{match.tensor.where}: {many}{how}"


Prove = Callable[[Match], "Match | None"]
