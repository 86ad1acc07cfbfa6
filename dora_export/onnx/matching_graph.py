"""A whole graph matched with its base: what every tensor holds, and what was not found."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from dora_export.errors import shown
from dora_export.onnx.encodings import Plain, converted
from dora_export.onnx.graph_file import Graph, StoredTensor
from dora_export.onnx.lines import Lines
from dora_export.onnx.matching import KEPT, Match, Weight, Whole, described, ends, narrowed
from dora_export.onnx.matching_lines import ByLines, Found
from dora_export.onnx.matching_proof import memory, proven, values_of
from dora_export.onnx.matching_quantised import Quantised, find, proven_quantised, quantised
from dora_export.verification.parallel import each
from dora_export.writers.ranges import Ranges

LEAST = 2  # elements of a tensor that can be told from others


@dataclass(frozen=True, eq=False)
class Matched:
    """A graph's tensors, and what became of looking for the base in them.

    Attributes:
        graph: The graph.
        weights: The base's floating-point tensors.
        matches: What was found; proven wherever a merge changes it.
        problems: Tensors that hold what a merge changes in a way that is not understood.
        missing: Base tensors that a merge changes and that the graph does not hold whole: name ->
            what is missing.
        absent: Base tensors that no merge changes and that were not found.
        strange: Larger floating-point tensors of the graph that hold nothing of the base.
        quantised: Quantised tensors of the graph that hold nothing of the base, by node.
    """

    graph: Graph
    weights: tuple[Weight, ...]
    matches: tuple[Match, ...]
    problems: tuple[str, ...]
    missing: Mapping[str, str]
    absent: tuple[str, ...]
    strange: tuple[StoredTensor, ...]
    quantised: tuple[str, ...] = ()

    @property
    def changed(self) -> tuple[Match, ...]:
        """The matches that a merge changes."""
        return tuple(m for m in self.matches if m.changed)


def match_graph(graph: Graph, weights: Sequence[Weight], *, threads: int | None = None) -> Matched:
    """Find the base's tensors in a graph, and prove what a merge changes.

    Reads a few elements of every tensor, and all of what changes, on both sides; a few MB at a time
    per thread.

    Args:
        graph: The graph.
        weights: The base's floating-point tensors, and which of them change.
        threads: Workers; None: one per CPU.

    Raises:
        InputError: The base or the graph cannot be read.
    """
    looking = _Looking(graph, tuple(weights), threads)
    looking.whole_tensors()
    by_lines = ByLines(looking.weights)
    looking.lines(by_lines)
    looking.vectors()
    looking.quantised_weights(by_lines)
    return looking.matched()


class _Looking:
    """Gathers matches, and what is wrong."""

    def __init__(self, graph: Graph, weights: tuple[Weight, ...], threads: int | None) -> None:
        self.graph, self.weights, self.threads = graph, weights, threads
        self.memory = memory()
        self.matches: list[Match] = []
        self.problems: list[str] = []
        self.quantised: list[str] = []
        self.alike: set[str] = set()
        self.left = [t for t in graph.tensors
                     if t.is_float and t.source is not None and t.size >= LEAST]  # fmt: skip

    def whole_tensors(self) -> None:
        whole = Whole(self.weights)
        looked = [(t, whole.find(t)) for t in _large_first(self.left)]
        found = each(lambda pair: self._proven(*pair), looked, self.threads)
        kept = []
        for tensor, candidates in found:
            self.alike |= {m.weights[0].name for m in candidates}
            if not candidates:
                kept.append(tensor)
            elif len(chosen := narrowed(self.graph, candidates)) == 1:
                self.matches.append(chosen[0])
            else:
                self.problems.append(self._ambiguous(tensor, chosen))
        self.left = kept

    def _proven(
        self, tensor: StoredTensor, candidates: list[Match]
    ) -> tuple[StoredTensor, list[Match]]:
        """Keep those candidates of a tensor whose every byte is right, if it matters."""
        if not any(m.changed for m in candidates):
            return tensor, candidates
        kept: dict[tuple[str, bool], Match] = {}
        for candidate in candidates:
            key = (candidate.weights[0].name, candidate.lines.by_column)
            if key not in kept and (proof := proven(candidate, self.memory)) is not None:
                kept[key] = proof
        # A symmetric matrix is its own transpose: either way is right until it changes.
        return tensor, list(kept.values())

    def _ambiguous(self, tensor: StoredTensor, candidates: Sequence[Match]) -> str:
        names = list(dict.fromkeys(m.weights[0].name for m in candidates))
        if len(names) == 1:
            return f"{tensor.where}: {shown(names[0])}, as it is or transposed: its values fit both"
        said = " and ".join(shown(n) for n in names[:3]) + (" ..." if len(names) > 3 else "")
        if ends(self.graph, tensor) == {"embedding", "head"}:
            return (
                f"{tensor.where}: one copy for both {said}, which the merge makes different; give "
                "the graph a copy for each"
            )
        return f"{tensor.where}: has the values of {said}, of which not all change alike"

    def quantised_weights(self, by_lines: ByLines) -> None:
        looked = each(lambda q: (q, find(q, by_lines)), list(quantised(self.graph)), 1)
        for (what, _), (match, problem) in zip(
            looked, each(lambda pair: self._quantised(*pair), looked, self.threads), strict=True
        ):
            if match is not None:
                self.matches.append(match)
            elif problem:
                self.problems.append(problem)
            else:
                self.quantised.append(f"{what.node}{': ' if what.why else ''}{what.why}")

    def _quantised(
        self, what: Quantised, found: Sequence[Found]
    ) -> tuple[Match | None, str | None]:
        """Return what a quantised weight is, proven if it changes, or what is wrong."""
        del what
        self.alike |= {f.match.weights[0].name for f in found if len(f.match.weights) == 1}
        if not any(f.match.changed or f.unclear.size for f in found):
            return (found[0].match, None) if found else (None, None)
        if found[0].unclear.size:
            count = found[0].unclear.size
            where = described(found[0].match)
            return None, f"{where}: {count} lines could be rows of several tensors"
        held = [m for f in found if (m := proven_quantised(f.match)) is not None]
        if not held:
            return None, None
        chosen = narrowed(self.graph, held)
        if len(chosen) == 1:
            return chosen[0], None
        return None, self._ambiguous(held[0].tensor, chosen)

    def lines(self, by_lines: ByLines) -> None:
        kept = []
        for tensor in self.left:
            found = by_lines.find(tensor)
            match = None if found is None else self._by_lines(tensor, found)
            if match is None:
                kept.append(tensor)
            else:
                self.matches.append(match)
        self.left = kept

    def _by_lines(self, tensor: StoredTensor, found: Found) -> Match | None:
        match, count = found.match, found.match.lines.count
        if not match.changed and not found.unclear.size:
            return None if found.strange.size else match
        what = described(match)
        if found.unclear.size:
            self.problems.append(
                f"{what}: {found.unclear.size} of {count} lines could be rows of several tensors"
            )
        elif found.strange.size:
            self.problems.append(f"{what}: {found.strange.size} of {count} lines are of no tensor")
        elif (proof := proven(match, self.memory)) is not None:
            return proof
        else:
            self.problems.append(f"{what}: alike, but not the same values")
        return None

    def vectors(self) -> None:
        """Find one-dimensional tensors that change within longer ones, joined end to end."""
        found = {w.name for m in self.matches for w in m.weights}
        wanted = [w for w in self.weights if w.changed and w.base is not None
                  and len(w.base.shape) == 1 and w.name not in found]  # fmt: skip
        kept = []
        for tensor in self.left:
            match = self._joined(tensor, wanted) if wanted and _is_vector(tensor) else None
            if match is None:
                kept.append(tensor)
            else:
                self.matches.append(match)
        self.left = kept

    def _joined(self, tensor: StoredTensor, wanted: Sequence[Weight]) -> Match | None:
        dtype = tensor.dtype
        assert dtype is not None, "Bug: only floating-point tensors are looked up"
        which = np.full(tensor.size, KEPT, np.int32)
        row = np.zeros(tensor.size, np.int64)
        stored = tensor.read().tobytes()
        used: list[Weight] = []
        for weight in wanted:
            base = values_of(weight)
            needle = converted(base.raw(), base.dtype, dtype).tobytes()
            at = _occurrences(stored, needle, dtype.itemsize)
            if len(at) > 1:
                said = f"{tensor.where}: holds the values of {shown(weight.name)} {len(at)} times"
                self.problems.append(said)
            elif at:
                here = slice(at[0], at[0] + base.size)
                which[here], row[here] = len(used), np.arange(base.size)
                used.append(weight)
        if not used:
            return None
        lines = Lines(tensor, dtype.itemsize, 1, tensor.size, 1)
        return proven(Match((lines,), Plain(dtype), 1, tuple(used), which, row))

    def matched(self) -> Matched:
        uses = self.graph.uses
        matches = tuple(replace(m, uses=uses.get(m.tensor.name, ())) for m in self.matches)
        found = self.alike | {w.name for m in matches for w in m.weights}
        return Matched(
            graph=self.graph,
            weights=self.weights,
            matches=matches,
            problems=tuple(self.problems),
            missing=dict(_missing(self.weights, matches)),
            absent=tuple(w.name for w in self.weights if not w.changed and w.name not in found),
            strange=tuple(t for t in self.left if sum(d > 1 for d in t.shape) > 1),
            quantised=tuple(self.quantised),
        )


def _large_first(tensors: Sequence[StoredTensor]) -> list[StoredTensor]:
    return sorted(tensors, key=lambda t: -t.size)


def _is_vector(tensor: StoredTensor) -> bool:
    return sum(d > 1 for d in tensor.shape) == 1


def _occurrences(stored: bytes, needle: bytes, itemsize: int) -> list[int]:
    """Return the elements at which some bytes begin."""
    found, at = [], stored.find(needle)
    while at >= 0:
        if at % itemsize == 0:
            found.append(at // itemsize)
        at = stored.find(needle, at + 1)
    return found


def _missing(weights: Sequence[Weight], matches: Sequence[Match]) -> Iterator[tuple[str, str]]:
    """Yield what changes and is not in the graph whole."""
    held: dict[str, Ranges] = {w.name: Ranges() for w in weights if w.changed}
    for match in matches:
        for position, weight in enumerate(match.weights):
            if weight.changed:
                _add_rows(
                    held[weight.name], match.row_of[match.weight_of == position], match.length
                )
    for weight in weights:
        if not weight.changed:
            continue
        if weight.base is None:
            yield weight.name, "the base has no such tensor, so no graph of it has"
        elif not (found := held[weight.name]):
            yield weight.name, f"{weight.base.shape}, nothing of it"
        elif not found.covers(0, weight.base.size):
            rows = found.nbytes * weight.base.shape[0] // weight.base.size
            yield weight.name, f"{rows} of its {weight.base.shape[0]} rows only"


def _add_rows(held: Ranges, rows: NDArray[np.int64], length: int) -> None:
    """Put rows into the elements that are held, neighbours together."""
    ordered = np.unique(rows)
    if not ordered.size:
        return
    breaks = np.flatnonzero(np.diff(ordered) != 1) + 1
    for run in np.split(ordered, breaks):
        held.add(int(run[0]) * length, (int(run[-1]) + 1) * length)
