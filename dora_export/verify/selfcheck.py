"""A check of a staged output before it is published: its own float64 formula, its own rounding.

"fast" reads every header, the index, the ends of every untouched tensor and sampled rows (or
columns, where norms run down columns) of every changed one. "full" reads everything.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from dora_export.errors import VerifyError, listing, shown
from dora_export.pieces import Region, regions
from dora_export.plan import Plan, Settings, Step
from dora_export.storage.safetensors import read_header
from dora_export.tensors import DType, Operand, TensorRef
from dora_export.update import Change

Level = Literal["none", "fast", "full"]
Floats = NDArray[np.float64]

SAMPLES = 2  # rows or columns per changed tensor at level "fast"
END_BYTES = 4096  # compared at both ends of an untouched tensor at level "fast"
SCAN_BYTES = 4 << 20
FULL_ELEMENTS = 1 << 18  # float64 elements of one row block at level "full"
# Stored type -> bits of fraction, exponent of the smallest step.
STEPS = {"F64": (52, -1074), "F32": (23, -149), "F16": (10, -24), "BF16": (7, -133)}


@dataclass(frozen=True)
class SelfCheck:
    """What was checked.

    Attributes:
        level: "fast" or "full".
        tensors: Output tensors whose place, dtype and shape were checked.
        elements: Merged elements compared with the float64 formula.
        worst_ulp: Largest distance from it, in units of the last place of the stored type.
        worst_tensor: Where that was, or None.
    """

    level: Level
    tensors: int
    elements: int
    worst_ulp: float
    worst_tensor: str | None


def check(plan: Plan, folder: Path, level: Level) -> SelfCheck:
    """Check a written output against its plan.

    Raises:
        VerifyError: Something differs; all findings are listed. Nothing should be published then.
    """
    problems: list[str] = []
    written: dict[str, TensorRef] = {}
    for file in plan.files:
        header = read_header(folder / file.name)
        planned = [(s.name, s.dtype.name, s.shape) for s in file.steps]
        found = [(t.name, t.dtype.name, t.shape) for t in header.tensors.values()]
        if sorted(planned) != sorted(found):
            problems.append(f"{file.name}: holds other tensors than planned")
        written |= header.tensors
    problems += _index_problems(plan, folder)
    worst, where, elements = 0.0, None, 0
    for step in plan.steps:
        if step.name not in written:
            continue
        ref = written[step.name]
        if step.copies_bytes:
            problems += _difference(step, ref, level)
            continue
        count, ulp = _worst_ulp(step, ref, plan.settings, level)
        elements += count
        if not ulp <= 1.0:
            problems.append(f"'{shown(step.name)}': {ulp:.3g} ulp from the float64 result")
        if ulp > worst or where is None:
            worst, where = ulp, step.name
    if problems:
        raise VerifyError(f"the output is not what was planned:{listing(problems)}\nNot published.")
    return SelfCheck(level, len(written), elements, worst, where)


def _index_problems(plan: Plan, folder: Path) -> list[str]:
    if plan.index is None:
        return []
    stored = json.loads((folder / plan.index_name).read_text(encoding="utf-8"))
    places = {s.name: f.name for f in plan.files for s in f.steps}
    return [] if stored["weight_map"] == places else [f"{plan.index_name}: names other places"]


def _difference(step: Step, ref: TensorRef, level: Level) -> list[str]:
    spans = [(0, ref.nbytes)]
    if level == "fast" and ref.nbytes > 2 * END_BYTES:
        spans = [(0, END_BYTES), (ref.nbytes - END_BYTES, ref.nbytes)]
    for first, last in spans:
        for start in range(first, last, SCAN_BYTES):
            size = min(SCAN_BYTES, last - start)
            ours, theirs = np.empty(size, np.uint8), np.empty(size, np.uint8)
            ref.source.read(start, ours)
            step.source.source.read(start, theirs)
            if not np.array_equal(ours, theirs):
                return [f"'{shown(step.name)}': bytes differ from the source's"]
    return []


def _worst_ulp(step: Step, ref: TensorRef, settings: Settings, level: Level) -> tuple[int, float]:
    """Return how many elements of a changed tensor were compared, and their largest distance."""
    count, worst = 0, 0.0
    for region in regions(step):
        for got, exact in _samples(step, ref, region, settings, level):
            count += got.size
            # A NaN compares as infinitely far.
            distance = np.nan_to_num(np.abs(got - exact) / _ulp(exact, ref.dtype), nan=np.inf)
            worst = max(worst, float(distance.max(initial=0.0)))
    return count, worst


def _samples(
    step: Step, ref: TensorRef, region: Region, settings: Settings, level: Level
) -> Iterator[tuple[Floats, Floats]]:
    """Yield stored and exact values of rows, or of columns where norms run down columns."""
    column = region.column_change
    # Columns that share a norm are compared together.
    group = 1 if column is None else region.changes[column].group
    length = region.rows if column is None else region.columns // group
    if level == "full":
        other = region.columns if column is None else region.rows * group
        size = max(1, FULL_ELEMENTS // max(1, other))
        picks = [np.arange(i, min(i + size, length)) for i in range(0, length, size)]
    else:
        seed = zlib.crc32(step.name.encode()) + region.start
        picks = [np.random.default_rng(seed).integers(0, length, SAMPLES)] if length else []
    read = _rows if column is None else _columns
    for numbers in picks:
        pick = (numbers[:, None] * group + np.arange(group)).ravel()
        base = read(step.source, region, pick)
        yield read(ref, region, pick), _exact(base, region, pick, column is not None, settings)


def _exact(
    base: Floats, region: Region, pick: NDArray[Any], by_column: bool, settings: Settings
) -> Floats:
    """Return W' of whole rows (rows, columns) or whole columns (rows, columns), in float64."""
    values = base.copy()
    for change in region.changes:
        if change.left is not None and change.right is not None:
            left = _operand(change.left, None if by_column else (pick,))
            right = _operand(change.right, (slice(None), pick) if by_column else None)
            values = values + change.scaling * (left @ right)
        if change.magnitude is not None:
            m = _operand(change.magnitude)
            values = _scaled(values, base, m, change, pick, settings)
        elif change.kind == "rows":
            values = _with_rows(values, change, pick)
        elif change.value is not None:
            stored = (_columns if by_column else _rows)(change.value, region, pick, 0)
            values = stored if change.kind == "replace" else values + change.scaling * stored
    result: Floats = base + settings.strength * (values - base)
    return result


def _scaled(
    values: Floats, base: Floats, m: Floats, change: Change, pick: NDArray[Any], settings: Settings
) -> Floats:
    """Return ``m V / (||V|| + eps)``; ``values`` are whole rows, or whole columns in groups."""
    if change.over == "row":
        norm, m = np.sqrt((values * values).sum(axis=1))[:, None], m[pick][:, None]
    else:
        squares = (values * values).sum(axis=0).reshape(-1, change.group).sum(axis=1)
        norm = np.repeat(np.sqrt(squares), change.group)[None]
        m = m[pick // change.group][None]
    zero = norm == 0
    result = np.where(zero, 0.0, values * m / np.where(zero, 1.0, norm + change.eps))
    kept = zero & (m != 0) & (settings.zero_norm == "keep-base")
    return np.where(kept, base, result)


def _with_rows(values: Floats, change: Change, pick: NDArray[Any]) -> Floats:
    assert change.value is not None, "Bug: kind rows carries a value"
    rows = _operand(Operand.matrix(change.value))
    for position, row in enumerate(change.row_indices):
        values[pick == row] = rows[position]
    return values


def _rows(ref: TensorRef, region: Region, pick: NDArray[Any], start: int | None = None) -> Floats:
    first = region.start if start is None else start
    spans = [(first + int(r) * region.columns, first + (int(r) + 1) * region.columns) for r in pick]
    if len(pick) and np.array_equal(pick, np.arange(pick[0], pick[0] + len(pick))):
        spans = [(spans[0][0], spans[-1][1])]  # neighbours: one read
    parts = [_floats(ref.raw(a, b), ref.dtype) for a, b in spans]
    return np.concatenate(parts).reshape(len(pick), region.columns)


def _columns(
    ref: TensorRef, region: Region, pick: NDArray[Any], start: int | None = None
) -> Floats:
    first = region.start if start is None else start
    step = max(1, SCAN_BYTES // (region.columns * ref.dtype.itemsize))
    parts = []
    for row in range(0, region.rows, step):
        last = min(row + step, region.rows)
        raw = ref.raw(first + row * region.columns, first + last * region.columns)
        parts.append(_floats(raw.reshape(-1, region.columns)[:, pick], ref.dtype))
    return np.concatenate(parts)


def _operand(operand: Operand, part: tuple[Any, ...] | None = None) -> Floats:
    """Return an adapter tensor, or a part of it, arranged."""
    stored = operand.arranged(operand.ref.raw())
    return _floats(stored if part is None else stored[part], operand.ref.dtype)


def _floats(raw: NDArray[Any], dtype: DType) -> Floats:
    """Return stored elements as float64; bfloat16 is the upper half of a float32."""
    if dtype.name == "BF16":
        bits = np.zeros((*raw.shape, 2), np.uint16)
        bits[..., 1] = raw
        return bits.view(np.float32)[..., 0].astype(np.float64)
    floats = {"F16": np.float16, "F32": np.float32, "F64": np.float64}[dtype.name]
    return np.ascontiguousarray(raw).view(floats).astype(np.float64)


def _ulp(exact: Floats, dtype: DType) -> Floats:
    """Return the distance of neighbouring stored values around each exact value."""
    fraction, smallest = STEPS[dtype.name]
    _, exponent = np.frexp(exact)  # exact = f * 2**exponent with 0.5 <= |f| < 1
    unit: Floats = np.ldexp(1.0, np.maximum(exponent - 1 - fraction, smallest))
    if dtype.name == "F64":
        # The exact values are float64 sums themselves: no nearer than this to the real ones.
        unit = np.maximum(unit, np.abs(exact).max(initial=0.0) * 2.0**-44)
    return unit
