"""Every changed tensor against the float64 formula, in units of the stored type's last place.

A stored element is taken for ``round(W' + e)``: rounded once to its type, after an error ``e`` of
the arithmetic it was computed with. What is more than half a last place away tells how large ``e``
was; held against ``|f| (|W| + s ||B_i|| ||A_j||) + |W'|``, the size of the terms that were added
and multiplied, it tells the precision of that arithmetic (float32, or float16 or bfloat16
throughout). Rows that stand out from their tensor, and tensors that fit none of these, are wrong;
so is a tensor that a known mistake comes much nearer to than the right formula does.
"""

from __future__ import annotations

import itertools
import math
import time
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache, partial

import numpy as np
from numpy.typing import NDArray

from dora_export.errors import shown
from dora_export.peft_layers import PeftLayer
from dora_export.pieces import Region, regions
from dora_export.plan import Plan, Settings, Step
from dora_export.tensors import DType, TensorRef
from dora_export.verification import diagnose
from dora_export.verification.exact import (
    FRACTION,
    Exact,
    read_columns,
    read_rows,
    rounded,
)
from dora_export.verification.model import Finding, Level, Status, TensorResult, TierResult
from dora_export.verification.neighbours import KeptLines, Member, Neighbours, Patience
from dora_export.verification.parallel import each
from dora_export.verification.samples import line_count
from dora_export.verification.tally import Measurement, Tally
from dora_export.verification.values import Floats
from dora_export.words import count, number

SAMPLES = 16  # rows or columns per changed region at level "fast", at least
MOST_SAMPLED = 1 << 17  # elements of them, where a small update takes more to be told
ONE_ROUNDING = 0.21  # standard deviation over the value, in units of its type's 2**-FRACTION
SCALING_TOLD = 0.03  # standard deviation of the factor on B A that sampled rows leave open
# Unit roundoff of the arithmetic that a merge may have used; none is told finer than float32.
ROUNDOFF = {"F32": 2.0**-24, "F16": 2.0**-11, "BF16": 2.0**-8}
# Roundings of one merged element: product, scaling, sum, norm, division, two factors, storage.
ROUNDINGS = 8
FEW_ROUNDINGS = 4  # what a line's worst element usually has; float16 and bfloat16 are 8 apart
FEW_EXCESS = 2  # where most lines are exact: a sum, and the two roundings of a factor
ALIKE = 4  # lines of one tensor whose worst errors differ by less are of one kind
NEARLY_ALL = 1e-3  # share of elements of an exact merge that need not be correctly rounded
ODD_ELEMENTS = 3  # of a small tensor, likewise
CACHED = 64  # operands of regions kept while mix-ups are looked for
QUARTILES = (0.0, 0.25, 0.5, 0.75, 1.0)


TensorCheck = Callable[[Step, TensorRef], tuple[TensorResult, tuple[Finding, ...]]]


def tensor_check(plan: Plan, level: Level) -> TensorCheck:
    """Return what compares one changed tensor with the exact result; it may run in many threads.

    Args:
        plan: What should have been merged.
        level: As in ``check_oracle``.
    """
    families = _Families([s for s in plan.steps if s.changes], plan.settings)

    def one(step: Step, ref: TensorRef) -> tuple[TensorResult, tuple[Finding, ...]]:
        return _check_tensor(step, ref, plan.settings, level, families)

    return one


def check_oracle(
    plan: Plan,
    merged: Mapping[str, TensorRef],
    level: Level,
    *,
    work: TensorCheck | None = None,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[TierResult, tuple[TensorResult, ...], tuple[Finding, ...]]:
    """Compare every changed tensor with the exact result.

    Tensors that are missing or have another shape are the ledger's to report, and left out.

    Args:
        plan: What should have been merged.
        merged: The merged model's tensors by name; dtypes may differ from the plan's.
        level: "full" compares every element; "fast" some rows of every changed region (columns,
            where norms run down columns), enough to fail whatever is wrong with a whole tensor.
        work: What compares one tensor; None: ``tensor_check``.
        threads: Workers; None: one per CPU.
        progress: Called with elements done and in all.

    Returns:
        The tier's summary, a result per changed tensor in the plan's order, and findings.
    """
    started = time.monotonic()
    changed = [s for s in plan.steps if s.changes]
    steps = [s for s in changed if s.name in merged and merged[s.name].shape == s.shape]
    total = sum(s.source.size for s in steps)
    done = [0]
    work = work or tensor_check(plan, level)

    def one(step: Step) -> tuple[TensorResult, tuple[Finding, ...]]:
        found = work(step, merged[step.name])
        done[0] += step.source.size
        if progress is not None:
            progress(done[0], total)
        return found

    largest_first = sorted(steps, key=lambda s: -s.source.size)
    by_name = dict(
        zip((s.name for s in largest_first), each(one, largest_first, threads), strict=True)
    )
    results = [by_name[s.name] for s in steps]
    tensors = tuple(r for r, _ in results)
    findings = tuple(f for _, fs in results for f in fs)
    seconds = time.monotonic() - started
    by_peft = sum(any(isinstance(c.function, PeftLayer) for c in s.changes) for s in steps)
    if changed and not steps:
        what = f"none of {count(len(changed), 'changed tensor')} is there to compare"
        return TierResult("oracle", False, what, seconds), tensors, findings
    return _tier(tensors, level, seconds, by_peft), tensors, findings


def _tier(
    tensors: Sequence[TensorResult], level: Level, seconds: float, by_peft: int
) -> TierResult:
    counts: dict[Status, int] = defaultdict(int)
    for tensor in tensors:
        counts[tensor.status] += 1
    compared = sum(t.elements for t in tensors)
    wrong = sum(t.misrounded * t.elements for t in tensors)
    worst = max(tensors, key=lambda t: t.max_ulp, default=None)
    if worst is None:
        return TierResult("oracle", True, "no tensor is changed by arithmetic", seconds)
    scope = "every element" if level == "full" else "sampled rows"
    words = ", ".join(f"{counts[s]} {s}" for s in ("exact", "rounded", "wrong", "unchecked")
                      if counts[s])  # fmt: skip
    if counts["rounded"]:
        # not in ulps: an element that all but cancels counts millions of them
        ratio = max(t.error_ratio for t in tensors if t.status == "rounded")
        far = f"error at most {ratio:.2g} times that of rounding once"
    else:
        far = f"worst {number(worst.max_ulp, ascii_only=True)} ulp in {shown(worst.name)}"
        if math.isinf(worst.max_ulp):
            far = f"values that are not finite in {shown(worst.name)}"
    summary = f"{count(len(tensors), 'changed tensor')}, {scope}: {words}; {far}"
    if by_peft:
        summary += f"; {by_peft} against PEFT's own unmerged forward, not an independent formula"
    figures = {
        "tensors": dict(counts),
        "elements": compared,
        "max_ulp": worst.max_ulp,
        "worst_tensor": worst.name,
        "misrounded": wrong / compared if compared else 0.0,
    }
    return TierResult("oracle", True, summary, seconds, figures)


class _Families:
    """Regions of the same shape and kind, where mix-ups are looked for."""

    def __init__(self, steps: Iterable[Step], settings: Settings) -> None:
        self._families: dict[tuple[object, ...], list[Member]] = defaultdict(list)
        self._places: dict[tuple[str, int], int] = {}  # of a region in its family
        self._kept, self._patience = KeptLines(), Patience()
        opened = lru_cache(CACHED)(Exact.open)
        count = itertools.count()
        for step in steps:
            for region in regions(step):
                family = self._families[_family(step, region)]
                self._places[step.name, region.start] = len(family)
                family.append(
                    Member(
                        next(count),
                        _place(step, region),
                        partial(opened, step.source, region, settings),
                    )
                )

    def others(self, step: Step, exact: Exact) -> Neighbours:
        """Return the other members of a region's family, the nearest in order first."""
        members = self._families[_family(step, exact.region)]
        own = self._places[step.name, exact.region.start]
        nearest = sorted(range(len(members)), key=lambda i: abs(i - own))[1:]
        line = line_count(exact) // 2
        return Neighbours([members[i] for i in nearest], self._kept, line, self._patience)


def _family(step: Step, region: Region) -> tuple[object, ...]:
    kinds = tuple((c.kind, c.over) for c in region.changes)
    # whole tensors are computed for themselves alone: too much work, and memory, to try others
    own = step.name if any(c.function is not None for c in region.changes) else None
    return (region.rows, region.columns, kinds, own)


def _place(step: Step, region: Region) -> str:
    """Return the name of a region: the tensor's, with the slice where there are several."""
    size = region.rows * region.columns
    if size == step.source.size:
        return step.name
    first = region.start // region.columns
    if len(step.shape) == 3 and region.rows == step.shape[1]:
        return f"{step.name}[{region.start // size}]"
    return f"{step.name}[rows {first} to {first + region.rows}]"


def _check_tensor(
    step: Step, ref: TensorRef, settings: Settings, level: Level, families: _Families
) -> tuple[TensorResult, tuple[Finding, ...]]:
    if not ref.dtype.mergeable:
        what = f"stored as {ref.dtype.name}"
        result = TensorResult(
            name=step.name,
            status="unchecked",
            dtype=ref.dtype.name,
            shape=ref.shape,
            elements=0,
            max_ulp=math.nan,
            misrounded=math.nan,
            relative_error=math.nan,
            error_ratio=math.nan,
            update_size=math.nan,
            diagnosis="quantised",
        )
        return result, (Finding("quantised", step.name, what),)
    measured, findings, arithmetics = [], [], []
    # A hostile config can make terms overflow: what is not finite then counts as wrong.
    with np.errstate(over="ignore", invalid="ignore"):
        for region in regions(step):
            if not region.changes:
                continue  # between the changed parts of a tensor: _untouched() below
            exact = Exact.open(step.source, region, settings)
            measurement, exact = _measure(exact, ref, level, step.name)
            arithmetic, found = _judge(
                exact, ref, measurement, _place(step, region), families.others(step, exact)
            )
            measured.append(measurement)
            arithmetics.append(arithmetic)
            findings += found
    findings += _untouched(step, ref)
    return _result(step, ref, measured, arithmetics, findings), tuple(findings)


def _untouched(step: Step, ref: TensorRef) -> list[Finding]:
    """Compare the parts of a changed tensor that no change touches."""
    for region in regions(step):
        if region.changes:
            continue
        exact = Exact(step.source, region, Settings(), ())
        for rows in exact.blocks():
            base, stored = exact.base(rows), read_rows(ref, region, rows)
            nearest = base if ref.dtype is step.source.dtype else rounded(base, ref.dtype)
            if not np.array_equal(nearest, stored, equal_nan=True):
                return [Finding("rows-wrong", _place(step, region), "not the base's values, though "
                                "the adapter does not touch them")]  # fmt: skip
    return []


def _measure(exact: Exact, ref: TensorRef, level: Level, name: str) -> tuple[Measurement, Exact]:
    """Return a region's figures, and its exact result with whatever had to be computed for it."""
    region = exact.region
    if level == "full":
        exact = exact.with_factors()
        tally = Tally(exact, ref.dtype, np.arange(region.rows))
        for rows in exact.blocks():
            tally.read(ref, rows, rows)
        return tally.measurement(), exact
    seed = zlib.crc32(name.encode()) + region.start
    if not exact.by_column:
        exact = exact.with_factors()  # only where other norms run along rows: all of it is read
        lines = _sampled(region.rows, seed)
        more = _enough(exact.base(lines), exact.product(lines, slice(None)), ref.dtype)
        if more > len(lines):
            lines = _sampled(region.rows, seed, more)
        tally = Tally(exact, ref.dtype, lines)
        tally.read(ref, slice(None), lines)
        return tally.measurement(), exact
    group = region.changes[region.column_changes[0]].group
    lines = _sampled(region.columns // group, seed)
    columns = (lines[:, None] * group + np.arange(group)).ravel()
    base, values = exact.columns(columns)
    merged = read_columns(ref, region, columns)
    tally = Tally(exact, ref.dtype, np.arange(region.rows), columns)
    tally.add(tally.rows, base, values, merged)
    return tally.measurement(), exact


def _sampled(count: int, seed: int, samples: int = SAMPLES) -> NDArray[np.int64]:
    """Return some of ``count`` lines, each once, sorted; the same for the same seed."""
    if count <= samples:
        return np.arange(count)
    return np.sort(np.random.default_rng(seed).choice(count, samples, replace=False))


def _enough(base: Floats, product: Floats | None, dtype: DType) -> int:
    """Return how many lines tell the scaling of a small product in spite of rounding.

    Rounding each element once leaves, of the product's factor, a standard deviation of
    ``rounding / (size sqrt(elements))``.
    """
    size = 0.0 if product is None else float(np.linalg.norm(product))
    if not size:
        return len(base)
    error = ONE_ROUNDING * 2.0 ** -FRACTION[dtype.name] * float(np.linalg.norm(base)) / size
    elements: float = min((error / SCALING_TOLD) ** 2, MOST_SAMPLED)
    return math.ceil(elements / max(1.0, float(base.shape[1])))


def _judge(
    exact: Exact,
    ref: TensorRef,
    measured: Measurement,
    place: str,
    others: Neighbours,
) -> tuple[str | None, list[Finding]]:
    """Return the arithmetic that a region's rounding tells of, and what is wrong with it.

    The arithmetic is None where the region is wrong, and "" where it is exact.
    """
    if measured.not_finite:
        are = "is" if measured.not_finite == 1 else "are"
        how_many = count(measured.not_finite, "element")
        what = f"{how_many} {are} NaN or infinite where the exact ones are finite"
        return None, [Finding("not-finite", place, what)]
    limit = ROUNDINGS + 2 * math.sqrt(exact.rank)
    usual = float(np.median(measured.excess)) if len(measured.excess) else 0.0
    arithmetic = _arithmetic(usual, limit, ref.dtype)
    if arithmetic is None:
        found = diagnose.diagnose(exact, ref, measured.lines, others)
        return None, [Finding(found.code, place, found.what)]
    if arithmetic != "F32":
        # Within rounding on the whole, but a small mistake could hide in it.
        arithmetic, hidden = _hidden(exact, ref, measured.lines, others, arithmetic)
        if hidden is not None:
            return None, [Finding(hidden.code, place, hidden.what)]
    elif _is_coarse(exact, ref, measured, others):
        arithmetic = ref.dtype.name
    odd = measured.lines[measured.excess > max(limit * ROUNDOFF[arithmetic], ALIKE * usual)]
    if len(odd):
        return None, [_odd_lines(exact, ref, measured, place, odd, others)]
    return ("" if _is_exact(measured) else arithmetic), []


def _hidden(
    exact: Exact,
    ref: TensorRef,
    lines: NDArray[np.int64],
    others: Neighbours,
    arithmetic: str,
) -> tuple[str, diagnose.Diagnosis | None]:
    """Return the arithmetic that lines may come from, and what is wrong if from none.

    Few roundings to bfloat16, such as of W alone, look like many to float16. What is stored in a
    wider type may have been merged in bfloat16, and cast then: all of it is bfloat16.
    """
    if arithmetic == "F16" and diagnose.holds(exact, ref, lines, "BF16"):
        arithmetic = "BF16"
    first = diagnose.hidden_mistake(exact, ref, lines, others, arithmetic)
    if first is None or not first.leans or arithmetic != "F16" or ref.dtype.name == "F16":
        return arithmetic, first
    if diagnose.hidden_mistake(exact, ref, lines, others, "BF16") is None:
        return "BF16", None
    return arithmetic, first


def _is_coarse(exact: Exact, ref: TensorRef, measured: Measurement, others: Neighbours) -> bool:
    """Whether lines that stand out from exact ones do so as 16-bit arithmetic lets them.

    Where an update is small, few elements tell what it was added in.
    """
    name = ref.dtype.name
    odd = measured.lines[
        measured.excess > (ROUNDINGS + 2 * math.sqrt(exact.rank)) * ROUNDOFF["F32"]
    ]
    return bool(
        len(odd)
        and name in ("F16", "BF16")
        and measured.excess.max() <= FEW_EXCESS * ROUNDOFF[name]
        and diagnose.in_coarse_arithmetic(exact, ref, odd)
        and diagnose.hidden_mistake(exact, ref, odd, others.without_line(), name) is None
        and diagnose.hidden_mistake(exact, ref, measured.lines, others, name) is None
    )


def _arithmetic(usual: float, limit: float, stored: DType) -> str | None:
    """Return the precision in which a tensor with this usual error was computed, or None."""
    if usual <= limit * ROUNDOFF["F32"]:
        return "F32"
    if usual <= FEW_ROUNDINGS * ROUNDOFF["F16"] and stored.name != "BF16":
        return "F16"
    return "BF16" if usual <= limit * ROUNDOFF["BF16"] else None


def _odd_lines(
    exact: Exact,
    ref: TensorRef,
    measured: Measurement,
    place: str,
    odd: NDArray[np.int64],
    others: Neighbours,
) -> Finding:
    """Return what is wrong with lines that stand out; all of a tensor's, or some."""
    found = diagnose.diagnose(exact, ref, odd, others)
    share = len(odd) / len(measured.lines)
    if share > 0.5:
        return Finding(found.code, place, found.what)
    kind = "columns" if exact.by_column else "rows"
    listed = ", ".join(map(str, odd[:8])) + (" ..." if len(odd) > 8 else "")
    because = "" if found.code == "wrong-values" else f", {found.code}"
    what = f"{len(odd)} of {len(measured.lines)} {kind} ({listed}){because}: {found.what}"
    return Finding("rows-wrong", place, what)


def _is_exact(measured: Measurement) -> bool:
    tolerated = max(ODD_ELEMENTS, NEARLY_ALL * measured.elements)
    return measured.max_ulp <= 1.0 and measured.misrounded <= tolerated


def _result(
    step: Step,
    ref: TensorRef,
    measured: Sequence[Measurement],
    arithmetics: Sequence[str | None],
    findings: list[Finding],
) -> TensorResult:
    """Return a tensor's result from its regions'; adds the finding on its rounding, if any."""
    elements = sum(m.elements for m in measured)
    max_ulp = max((m.max_ulp for m in measured), default=0.0)
    misrounded = sum(m.misrounded for m in measured) / elements if elements else 0.0
    status: Status = "wrong" if findings else "exact"
    arithmetic = None
    rounded = [a for a in arithmetics if a]
    if status != "wrong" and rounded:
        status, arithmetic = "rounded", max(rounded, key=lambda a: ROUNDOFF[a])
        coarse = ROUNDOFF[arithmetic] > 2.0 ** -(FRACTION[ref.dtype.name] + 1)
        error = _ratio(sum(m.error for m in measured), sum(m.one_rounding for m in measured))
        what = (
            f"as computed in {arithmetic}: {misrounded:.2%} not correctly rounded, error "
            f"{error:.2g} times that of rounding once"
        )
        findings.append(Finding("coarse-rounding" if coarse else "rounded", step.name, what))
    ratios = [m.ratios for m in measured if m.ratios is not None and len(m.ratios)]
    quantiles = np.quantile(np.concatenate(ratios), QUARTILES) if ratios else None
    return TensorResult(
        name=step.name,
        status=status,
        dtype=ref.dtype.name,
        shape=ref.shape,
        elements=elements,
        max_ulp=max_ulp,
        misrounded=misrounded,
        relative_error=_ratio(sum(m.error for m in measured), sum(m.exact for m in measured)),
        error_ratio=_ratio(sum(m.error for m in measured), sum(m.one_rounding for m in measured)),
        update_size=_ratio(sum(m.update for m in measured), sum(m.base for m in measured)),
        magnitude_ratio=None if quantiles is None else tuple(map(float, quantiles)),  # type: ignore[arg-type]
        arithmetic=arithmetic,
        diagnosis=findings[0].code if findings else None,
    )


def _ratio(above: float, below: float) -> float:
    return math.sqrt(above / below) if below else (0.0 if not above else math.inf)
