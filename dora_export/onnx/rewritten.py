"""What was written of a re-weighted graph, held against the original and against float64.

Shares no arithmetic with the engine: merged values come from ``verification.exact``. Quantised
values are quantised again from those, by onnxruntime as well.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dora_export.errors import VerifyError, listing, shown
from dora_export.onnx.encodings import Encoding, Int8, NeverZero, Plain
from dora_export.onnx.graph_file import Graph, StoredTensor, open_graph
from dora_export.onnx.layout import Copied, Layout
from dora_export.onnx.lines import glimpse
from dora_export.onnx.matching import Match
from dora_export.onnx.matching_proof import lines_at_once
from dora_export.onnx.scatter import Part, parts_of
from dora_export.pieces import Region, regions
from dora_export.plan import Plan, Settings, Step
from dora_export.tensors import BF16, F16, F32, F64, DType, FileRange
from dora_export.verification.exact import FRACTION, Exact, binade, rounded
from dora_export.verification.model import Level, TierResult
from dora_export.verification.parallel import each
from dora_export.verification.values import Floats, floats

if TYPE_CHECKING:
    import onnx

COMPARED_BYTES = 4 << 20
BLOCK_ELEMENTS = 1 << 18
GROUPS, TOGETHER = 2, 8  # at "fast": so many groups of neighbouring rows of each region
ULPS = 1.0
_PLAIN = Settings()
# Quantised from values that may differ in their last bit: of the bytes, so many may differ.
ROUNDED_ELSE = 1e-3


@dataclass(frozen=True)
class Rechecked:
    """What was compared.

    Attributes:
        tiers: The ledger and the oracle.
        worst_ulp: Largest distance of a float value from the exact one, in its own last place;
            None: all are quantised.
        worst: Where that was.
        rows: Rows compared.
        model: The written graph, its larger values left out.
    """

    tiers: tuple[TierResult, ...]
    worst_ulp: float | None
    worst: str | None
    rows: int
    model: onnx.ModelProto


def recheck(
    plan: Plan,
    graph: Graph,
    matches: Sequence[Match],
    parameters: Mapping[StoredTensor, bytes],
    layout: Layout,
    folder: Path,
    *,
    level: Level = "fast",
    threads: int | None = None,
) -> Rechecked:
    """Compare the files of a re-weighted graph with what they should hold.

    Args:
        plan: The merge.
        graph: The graph of the base.
        matches: What was written anew.
        parameters: Scales and zero points that were written anew, with their bytes.
        layout: Where it went.
        folder: Where the new files are.
        level: "fast" compares some rows of everything that changes, "full" all; both compare every
            byte that does not.
        threads: Workers; None: one per CPU.

    Raises:
        VerifyError: Something differs; all that does is listed.
        InputError: The written graph is malformed.
    """
    started = time.monotonic()
    found = open_graph(folder / layout.names[0])
    problems = list(_structure(graph, found))
    paths = [folder / name for name in layout.names]
    changed = each(lambda c: _copied(c, paths[c.file]), layout.copied, threads)
    problems += [what for what in changed if what]
    at = {id(t): i for i, t in enumerate(graph.tensors)}
    problems += [f"{t.where}: not the bytes that it should have" for t, data in parameters.items()
                 if not problems and found.tensors[at[id(t)]].read().tobytes() != data]  # fmt: skip
    kept = sum(c.nbytes for c in layout.copied)
    ledger = TierResult(
        "ledger",
        True,
        f"{len(found.tensors)} tensors in {len(paths)} files: {kept} bytes unchanged, as they were",
        time.monotonic() - started,
        {"bytes_unchanged": kept, "bytes_rewritten": layout.nbytes - kept},
    )
    _refuse(folder, problems)
    started = time.monotonic()
    written = _written(graph, found, matches)
    steps = {s.name: s for s in plan.steps}
    as_before = dict(zip(map(id, written), each(
        lambda pair: _as_before(*pair), list(zip(matches, written, strict=True)), threads
    ), strict=True))  # fmt: skip
    work = [(_step(part, name, steps), part)
            for name, held in parts_of(written).items() for part in held]  # fmt: skip
    results = each(
        lambda pair: _oracle(*pair, plan, level, as_before[id(pair[1].match)]), work, threads
    )
    problems = [what for one in results for what in one.problems]
    _refuse(folder, problems)
    worst = max((r for r in results if r.ulp is not None), key=lambda r: r.ulp or 0, default=None)
    rows = sum(r.rows for r in results)
    far = f"; worst {worst.ulp:.3g} ulp in {shown(worst.name)}" if worst is not None else ""
    quantised = sum(not isinstance(p.match.encoding, Plain | NeverZero) for _, p in work)
    again = f", {quantised} of them quantised again" if quantised else ""
    same = sum(r.as_before for r in results)
    still = f"; {same} rows are as before, which is what the merge makes of them" if same else ""
    scope = "every row" if level == "full" else f"{rows} rows"
    oracle = TierResult(
        "oracle",
        True,
        f"{len(results)} changed weights, {scope} against float64{again}{far}{still}",
        time.monotonic() - started,
        {"rows": rows, "weights": len(results), "quantised": quantised, "rows_as_before": same,
         "max_ulp": worst.ulp if worst else None, "worst_tensor": worst.name if worst else None},
    )  # fmt: skip
    return Rechecked(
        (ledger, oracle),
        worst.ulp if worst else None,
        worst.name if worst else None,
        rows,
        found.model,
    )


def _refuse(folder: Path, problems: Sequence[str]) -> None:
    if problems:
        raise VerifyError(
            f"{folder.name}: the written graph is not what was planned:{listing(problems)}\n"
            "Not published."
        )


def _structure(graph: Graph, found: Graph) -> Iterator[str]:
    """Yield what differs in the graphs themselves, values left out."""
    if len(graph.tensors) != len(found.tensors):
        yield f"{len(found.tensors)} tensors, expected {len(graph.tensors)}"
        return
    for a, b in zip(graph.tensors, found.tensors, strict=True):
        if (a.name, a.scope, a.shape, a.data_type) != (b.name, b.scope, b.shape, b.data_type):
            yield f"{a.where}: became {b.where}, {b.shape}"
    if graph.model.graph.node != found.model.graph.node and not _constants_changed(graph, found):
        yield "its nodes differ"


def _constants_changed(graph: Graph, found: Graph) -> bool:
    """Return whether nodes are the same but for the values that they hold."""

    def without(model: Any) -> list[tuple[Any, ...]]:
        return [(n.op_type, n.name, tuple(n.input), tuple(n.output)) for n in model.graph.node]

    return without(graph.model) == without(found.model)


def _copied(piece: Copied, path: Path) -> str | None:
    """Return what differs in bytes that were taken over."""
    target = FileRange(path, piece.offset, piece.nbytes)
    for start in range(0, piece.nbytes, COMPARED_BYTES):
        size = min(COMPARED_BYTES, piece.nbytes - start)
        got, expected = np.empty(size, np.uint8), np.empty(size, np.uint8)
        target.read(start, got)
        if isinstance(piece.source, bytes):
            expected = np.frombuffer(piece.source[start : start + size], np.uint8)
        else:
            piece.source.read(start, expected)
        if not np.array_equal(got, expected):
            at = piece.offset + start + int(np.flatnonzero(got != expected)[0])
            return f"{path.name}: byte {at} is not as it was"
    return None


def _written(graph: Graph, found: Graph, matches: Sequence[Match]) -> list[Match]:
    """Return the matches as they lie in the written graph."""
    at = {id(t): i for i, t in enumerate(graph.tensors)}
    return [
        replace(
            m,
            holders=tuple(
                replace(lines, tensor=found.tensors[at[id(lines.tensor)]]) for lines in m.holders
            ),
        )
        for m in matches
    ]


def _step(part: Part, name: str, steps: Mapping[str, Step]) -> Step:
    """Return what a weight becomes; one that is only written beside others stays the base's."""
    (weight,) = [w for w in part.match.weights if w.name == name]
    if weight.step is not None:
        return steps[name]
    assert weight.base is not None, "Bug: a weight without values was found in the graph"
    return replace(steps[name], source=weight.base, changes=())


@dataclass(frozen=True)
class _Result:
    name: str
    rows: int
    ulp: float | None
    as_before: int = 0
    problems: tuple[str, ...] = ()


def _as_before(old: Match, new: Match) -> NDArray[np.bool_]:
    """Return which lines the graph still holds as it did, every byte of them.

    A line that differs anywhere is not one of them, so a few elements of each rule out nearly all;
    only the rest is read whole.
    """
    pairs = tuple(zip(old.holders, new.holders, strict=True))
    same = np.ones(old.lines.count, np.bool_)
    for before, after in pairs:
        same &= (glimpse(before) == glimpse(after)).all(axis=1)
    for first, last in _runs(np.flatnonzero(same), lines_at_once(old)):
        for before, after in pairs:
            equal = before.read(first, last) == after.read(first, last)
            same[first:last] &= equal.all(axis=1)
    return same


def _runs(lines: NDArray[np.int64], most: int) -> Iterator[tuple[int, int]]:
    """Yield ranges of neighbours among some lines, none longer than ``most``."""
    for run in np.split(lines, np.flatnonzero(np.diff(lines) != 1) + 1) if lines.size else ():
        for first in range(int(run[0]), int(run[-1]) + 1, most):
            yield first, min(first + most, int(run[-1]) + 1)


def _oracle(
    step: Step, part: Part, plan: Plan, level: Level, as_before: NDArray[np.bool_]
) -> _Result:
    """Compare the rows of one weight in one stored tensor with the exact ones.

    Those that are as before are all among them: what the merge changes must not be.
    """
    same = part.rows[as_before[part.lines]] if step.changes else part.rows[:0]
    rows, worst, problems, differing, total = 0, None, [], 0, 0
    where = f"{shown(step.name)} in {part.match.tensor.where}"
    encoding = part.match.encoding
    for region in regions(step):
        exact = Exact.open(step.source, region, plan.settings if region.changes else _PLAIN)
        exact = exact.with_factors()
        for first, last in (*_chosen(region, part, level), *_around(region, part, same)):
            _, expected = exact.rows(slice(first, last))
            start = region.start + first * region.columns
            flat = expected.reshape(-1)
            for at, values, lines in _whole_rows(part, start, flat):
                rows += len(lines)
                if isinstance(encoding, Plain | NeverZero):
                    distance = _ulps(part, lines, values)
                    worst = distance if worst is None else max(worst, distance)
                    if not distance <= ULPS:
                        row = at // part.match.length
                        problems.append(f"{where}: row {row} is {distance:.3g} ulp off")
                else:
                    wrong, count = _requantised(part, lines, values)
                    differing, total = differing + wrong, total + count
    if differing > ROUNDED_ELSE * total:
        problems.append(f"{where}: {differing} of {total} quantised bytes are others")
    return _Result(step.name, rows, worst, same.size, tuple(problems[:2]))


def _around(region: Region, part: Part, rows: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Yield the rows of a region in which rows of a match lie."""
    length, columns = part.match.length, region.columns
    start, stop = region.start, region.start + region.rows * columns
    inside = rows[(rows * length < stop) & ((rows + 1) * length > start)]
    if not inside.size:
        return
    step = max(1, BLOCK_ELEMENTS // length)
    for run in np.split(inside, np.flatnonzero(np.diff(inside) != 1) + 1):
        for at in range(int(run[0]), int(run[-1]) + 1, step):
            end = min(at + step, int(run[-1]) + 1)
            first = max(0, (at * length - start) // columns)
            yield first, min(region.rows, -(-(end * length - start) // columns))


def _chosen(region: Region, part: Part, level: Level) -> Iterator[tuple[int, int]]:
    """Yield rows of a region to compare."""
    step = max(1, BLOCK_ELEMENTS // max(1, region.columns))
    together = max(TOGETHER, -(-part.match.length // region.columns))
    if level == "full" or region.rows <= GROUPS * together:
        for first in range(0, region.rows, step):
            yield first, min(first + step, region.rows)
        return
    last = region.rows - together
    for group in range(GROUPS):
        # not always the same ones: a mistake in a block shows in some tensor
        first = (group * last + (region.start + part.lines.size) % 7) // max(1, GROUPS - 1)
        first = min(first, last)
        yield first, first + together


def _whole_rows(
    part: Part, start: int, values: Floats
) -> Iterator[tuple[int, Floats, NDArray[np.int64]]]:
    """Yield what of some elements is held here: first element, rows of values, their lines."""
    length = part.match.length
    first, last = -(-start // length), (start + values.size) // length
    if last <= first:
        return
    block = values[first * length - start : last * length - start].reshape(-1, length)
    low, high = np.searchsorted(part.rows, [first, last])
    if low < high:
        picked = part.rows[low:high] - first
        yield first * length, block[picked], part.lines[low:high]


def _read(part: Part, lines: NDArray[np.int64], holder: int) -> NDArray[np.uint8]:
    """Return lines of a written tensor, in the order asked for."""
    held = part.match.holders[holder]
    order = np.argsort(lines, kind="stable")
    ordered = lines[order]
    runs = np.split(ordered, np.flatnonzero(np.diff(ordered) != 1) + 1)
    joined = np.concatenate([held.read(int(run[0]), int(run[-1]) + 1) for run in runs])
    out = np.empty_like(joined)
    out[order] = joined
    return out


def _ulps(part: Part, lines: NDArray[np.int64], values: Floats) -> float:
    encoding = part.match.encoding
    dtype = encoding.dtype if isinstance(encoding, Plain) else F16
    raw = _read(part, lines, 0).view(dtype.raw)
    if isinstance(encoding, Plain) and encoding.inner is not None:
        raw = encoding.in_base_order(raw)
    got = floats(raw.reshape(-1), dtype).reshape(values.shape)
    step = binade(np.ascontiguousarray(values), dtype) * 2.0 ** -FRACTION[dtype.name]
    same = (got == values) | (np.isnan(got) & np.isnan(values))
    if isinstance(encoding, NeverZero):
        values = np.clip(values, -65504.0, 65504.0)
    with np.errstate(invalid="ignore"):
        distance = np.where(same, 0.0, np.abs(got - values) / step)
    return float(np.nan_to_num(distance, nan=np.inf).max(initial=0.0))


def _requantised(part: Part, lines: NDArray[np.int64], values: Floats) -> tuple[int, int]:
    encoding: Encoding = part.match.encoding
    expected = encoding.encode(_narrowed(values, encoding.source))
    wrong = count = 0
    if isinstance(encoding, Int8):  # a scale too small for its values would cut them off
        limit = encoding.scale * (0.5 + ROUNDED_ELSE)
        quantised = expected[0].view(np.int8 if encoding.signed else np.uint8)
        wrong += int((np.abs((quantised - float(encoding.zero)) * encoding.scale - values)
                      > limit).sum())  # fmt: skip
    for holder, mine in enumerate(expected):
        stored = _read(part, lines, holder)
        wrong += int((stored != mine).sum())
        count += stored.size
    return wrong, count


def _narrowed(values: Floats, dtype: DType) -> NDArray[Any]:
    """Return the nearest values of a type as it stores them."""
    nearest = rounded(values, dtype)
    if dtype is BF16:
        return (nearest.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    kind = {F16: np.float16, F32: np.float32, F64: np.float64}[dtype]
    return np.ascontiguousarray(nearest.astype(kind)).view(dtype.raw)
