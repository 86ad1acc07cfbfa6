"""Tensors of a merged model against those of its plan: names, shapes, dtypes, untouched bytes.

Base -> merged and merged -> base, all of them. Values that the adapter changes are the oracle's.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dora_export.errors import InputError, shown
from dora_export.plan import Plan, Step
from dora_export.tensors import Bytes, DType, TensorRef
from dora_export.tying import EMBEDDINGS, HEADS
from dora_export.verification.exact import FRACTION, binade, rounded
from dora_export.verification.model import Finding
from dora_export.verification.parallel import each
from dora_export.verification.subject import Subject, clause
from dora_export.verification.values import Floats, floats
from dora_export.words import count

CHUNK_ELEMENTS = 1 << 20  # compared at once
CAST_ELEMENTS = 1 << 16  # the same where a cast takes several float64 arrays, or the first few tell
SPAN_ELEMENTS = 1 << 24  # one thread's share of a tensor
# Causal masks, rotary frequencies and positions: kept in files by older transformers, made anew by
# the model's class since. Source: transformers, ``persistent=False`` and
# ``_keys_to_ignore_on_load_unexpected`` of the classes (GPT-2, GPT-NeoX, Llama, BERT, CLIP, Swin).
BUFFERS = re.compile(
    r"(^|\.)((original_)?inv_freq|position_ids|masked_bias|relative_position_index"
    r"|relative_coords_table|embed_positions\.weights)$"
)
CAUSAL_MASK = re.compile(r"(^|\.)(attn|attention|crossattention)\.bias$")  # 4-D, unlike a real bias
# What packers store beside, or instead of, "weight". Source: bitsandbytes (absmax, quant_map,
# quant_state, SCB), GPTQ/AWQ (qweight, qzeros, scales, g_idx), compressed-tensors (weight_packed,
# weight_scale, ...), mlx (scales, biases), block fp8 (weight_scale_inv).
PACKED = re.compile(
    r"\.(qweight|qzeros|scales|biases|g_idx|SCB|weight_format|weight\.(nested_)?(absmax|quant_map)"
    r"|weight\.quant_state\.\w+|weight_(packed|shape|scale|scale_inv|zero_point|g_idx)"
    r"|(input|output)_scale|scale)$"
)
SHARED = (*EMBEDDINGS, *HEADS, "shared", "decoder", "predictions")  # leaves that models tie
# Another base shows in most tensors, and all over them; damage in few, or in few places.
ANOTHER_BASE_SHARE = 0.01


@dataclass(frozen=True)
class Difference:
    """How the values of a tensor differ from those that should have gone along.

    Attributes:
        elements: How many differ.
        far: How many differ by more than the last bit.
        nbytes: How many of their bytes differ; 0 where the type is another.
        first: Flat position of the first.
    """

    elements: int = 0
    far: int = 0
    nbytes: int = 0
    first: int = -1

    def then(self, later: Difference, offset: int) -> Difference:
        """Return this and the difference of a part that starts at element ``offset``."""
        first = self.first if self.first >= 0 or later.first < 0 else offset + later.first
        return Difference(
            self.elements + later.elements, self.far + later.far, self.nbytes + later.nbytes, first
        )


# (source, stored, first element, one past the last) -> the difference, or why it cannot be read
Compare = Callable[[TensorRef, TensorRef, int, int], Difference | str]


@dataclass(frozen=True)
class TensorLedger:
    """What the comparison of tensors gave.

    Attributes:
        findings: In no order.
        figures: Numbers and lists, JSON-ready.
        cast: The type that the whole model was cast to, or None.
        quantised: Tensors of the base that are stored packed.
    """

    findings: tuple[Finding, ...]
    figures: Mapping[str, Any]
    cast: DType | None
    quantised: tuple[str, ...]


@dataclass
class _Book:
    """The entries under way: expected steps, stored tensors, and what was found."""

    plan: Plan
    subject: Subject
    steps: Mapping[str, Step]
    quantised: frozenset[str] = frozenset()
    findings: list[Finding] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)

    def found(self, code: str, where: str, what: str) -> None:
        self.findings.append(Finding(code, shown(where), what))


def check_tensors(
    plan: Plan, subject: Subject, threads: int | None, compare: Compare
) -> TensorLedger:
    """Compare all tensors; reads every untouched one, a few MB per thread at a time.

    Args:
        plan: What the merged model should be.
        subject: The merged model under the base's names.
        threads: Workers; None: one per CPU.
        compare: What compares a span of a tensor, as ``difference`` does.

    Raises:
        InputError: The base, or the adapter, cannot be read.
    """
    book = _Book(plan, subject, {s.name: s for s in plan.steps})
    book.quantised = frozenset(_quantised(book))
    _names(book)
    same = [s for s in book.steps.values() if _comparable(book, s) and _same_shape(book, s)]
    cast = _dtypes(book, same)
    kept = [s for s in same if not s.changes]
    differences = _compare(book, kept, threads, compare)
    _report_values(book, kept, differences)
    _nothing_applied(book, same)
    _unreadable_types(book)
    return TensorLedger(tuple(book.findings), book.figures, cast, tuple(sorted(book.quantised)))


def is_buffer(name: str, shape: Sequence[int]) -> bool:
    """Return whether a tensor is one that the model's class computes itself."""
    return bool(BUFFERS.search(name)) or (len(shape) == 4 and bool(CAUSAL_MASK.search(name)))


# --- names


def _names(book: _Book) -> None:
    """Report tensors that only one side has."""
    plan, subject = book.plan, book.subject
    missing = [n for n in book.steps if n not in subject.tensors and not _packed_away(book, n)]
    extra = [n for n in subject.tensors if n not in book.steps and not _packing(book, n)]
    lost = [n for n in missing if _lost_with_a_file(book.subject, n)]
    for name in missing:
        if name in lost:
            continue  # told of once, with the file
        if is_buffer(name, book.steps[name].shape):
            book.found("computed-buffer", name, "in the base, not here")
        elif twin := _stored_twin(book, name):
            book.found("head-left-out", name, f"equal to {shown(twin)}, which is here")
        else:
            step = book.steps[name]
            book.found("tensor-missing", name, f"{step.dtype.name} {_sizes(step.shape)}")
    for name in extra:
        ref = subject.tensors[name]
        if is_buffer(name, ref.shape):
            book.found("computed-buffer", name, "here, not in the base")
        elif twin := _embedding_like(book, name):
            book.found("head-stored", name, f"equal to {shown(twin)}")
        else:
            book.found("tensor-extra", name, f"{ref.dtype.name} {_sizes(ref.shape)}")
    for model in subject.parts.values() or (subject,):
        if model.prefix:
            sign = "without" if model.prefix.startswith("-") else "with"
            book.found("names-prefixed", model.path.name,
                       f"{sign} '{shown(model.prefix.lstrip('-'))}' in front")  # fmt: skip
        if model.renaming:
            others = [n for n in model.tensors if model.stored_names.get(n, n) != n]
            example = f"{shown(model.stored_names[others[0]])} is the base's {shown(others[0])}"
            what = f"{len(others)} tensors, {model.renaming}: {example}"
            book.found("names-renamed", model.path.name, what)
    book.figures |= {
        "tensors_expected": len(book.steps),
        "tensors_found": len(subject.tensors),
        "tensors_missing": sorted(shown(n) for n in missing),
        "tensors_extra": sorted(shown(n) for n in extra),
        "tensors_lost_with_files": sorted(shown(n) for n in lost),
        "adapter_tensors": len(plan.adapter_tensors),
    }


def _lost_with_a_file(subject: Subject, name: str) -> bool:
    """Return whether a tensor is, or must be, in a file that is missing or unreadable."""
    if subject.parts:
        part, _, own = name.partition(".")
        return part in subject.parts and _lost_with_a_file(subject.parts[part], own)
    if not subject.broken or not subject.places:
        return bool(subject.broken)
    return subject.places.get(subject.stored_names.get(name, name)) in subject.broken


def _stored_twin(book: _Book, name: str) -> str | None:
    """Return the tensor that stands for a missing one in a model that ties them, or None.

    transformers stores tied tensors once. The base may store them twice, but only equal.
    """
    if _config_unties(book.subject):
        return None
    step = book.steps[name]
    if _leaf(name) not in SHARED:
        return None
    for other in book.steps.values():
        if (
            other.name in book.subject.tensors
            and _leaf(other.name) in SHARED
            and other.shape == step.shape
            and other.dtype is step.dtype
            and other.changes == step.changes
            and equal(step.source, other.source)
        ):
            return other.name
    return None


def _embedding_like(book: _Book, name: str) -> str | None:
    """Return the embedding that a stored tensor repeats, or None."""
    ref = book.subject.tensors[name]
    if _leaf(name) not in SHARED or len(ref.shape) != 2:
        return None
    for other, stored in book.subject.tensors.items():
        if (
            other in book.steps
            and _leaf(other) in (*EMBEDDINGS, "shared")
            and stored.shape == ref.shape
            and stored.dtype is ref.dtype
            and _repeats(ref, stored)
        ):
            return other
    return None


def _repeats(ref: TensorRef, stored: TensorRef) -> bool:
    """Return whether two tensors of the merged model, which may be unreadable, are equal."""
    try:
        return equal(ref, stored)
    except InputError:
        return False


def _config_unties(subject: Subject) -> bool:
    config = subject.config or {}
    text = config.get("text_config")
    inner = text.get("tie_word_embeddings") if isinstance(text, dict) else None
    return config.get("tie_word_embeddings", inner) is False


def equal(a: TensorRef, b: TensorRef) -> bool:
    """Return whether two tensors have the same type, shape and bytes."""
    if a is b:
        return True
    if a.shape != b.shape or a.dtype is not b.dtype:
        return False
    result = difference(a, b, 0, a.size, brief=True)
    return isinstance(result, Difference) and not result.elements


def _leaf(name: str) -> str:
    """Return the module that a tensor belongs to, e.g. "lm_head"."""
    return name.rpartition(".")[0].rpartition(".")[2]


# --- packed tensors


def _quantised(book: _Book) -> Iterator[str]:
    """Yield the tensors that should be floats and are stored packed."""
    packed = {n for n in book.subject.tensors if n not in book.steps and PACKED.search(n)}
    modules = {PACKED.sub("", n) for n in packed}
    for name, step in book.steps.items():
        stored = book.subject.tensors.get(name)
        if stored is None:
            if name.endswith(".weight") and name.removesuffix(".weight") in modules:
                yield name
        elif step.dtype.mergeable and not stored.dtype.mergeable:
            yield name


def _packed_away(book: _Book, name: str) -> bool:
    return name in book.quantised


def _packing(book: _Book, name: str) -> bool:
    return bool(PACKED.search(name)) and f"{PACKED.sub('', name)}.weight" in book.quantised


def _unreadable_types(book: _Book) -> None:
    """Say which untouched tensors nothing can be said of; changed ones are the oracle's."""
    untouched = sorted(n for n in book.quantised if not book.steps[n].changes)
    book.figures["quantised"] = sorted(shown(n) for n in book.quantised)
    if untouched:
        stored = book.subject.tensors.get(untouched[0])
        kind = stored.dtype.name if stored is not None else "packed"
        book.found("not-comparable", book.subject.path.name, f"{len(untouched)} tensors that the "
                   f"adapter does not touch, such as {shown(untouched[0])} ({kind})")  # fmt: skip


# --- shapes and dtypes

ROWS_AT_ONCE = 1 << 10


def _comparable(book: _Book, step: Step) -> bool:
    return step.name in book.subject.tensors and step.name not in book.quantised


def _same_shape(book: _Book, step: Step) -> bool:
    shape = book.subject.tensors[step.name].shape
    if shape == step.shape:
        return True
    what = f"{_sizes(shape)}, expected {_sizes(step.shape)}"
    turned = len(shape) > 1 and shape == step.shape[::-1]
    if not turned:
        what += _of_rows(step, book.subject.tensors[step.name])
    book.found("transposed" if turned else "shape-differs", step.name, what)
    return False


def _of_rows(step: Step, stored: TensorRef) -> str:
    """Return what to say of an untouched tensor that has more or fewer rows, all else equal."""
    if step.changes or stored.dtype is not step.dtype or step.source.dtype is not step.dtype:
        return ""
    if len(step.shape) != 2 or stored.shape[1:] != step.shape[1:]:
        return ""
    rows, columns = min(stored.shape[0], step.shape[0]), step.shape[1]
    for first in range(0, rows, ROWS_AT_ONCE):
        part = slice(first * columns, min(first + ROWS_AT_ONCE, rows) * columns)
        ours, theirs = (t.raw(part.start, part.stop) for t in (stored, step.source))
        if ours.tobytes() != theirs.tobytes():
            return ""
    more = stored.shape[0] - rows
    if more:
        return f": the base's rows, and {more} more, as where a vocabulary was padded"
    return f": the base's rows but for the last {step.shape[0] - rows}"


def _dtypes(book: _Book, steps: Sequence[Step]) -> DType | None:
    """Report cast tensors; return the one type of all of them if it is not the plan's."""
    stored = book.subject.tensors
    floating = [s for s in steps if s.dtype.mergeable and not is_buffer(s.name, s.shape)]
    # What the adapter brings whole may come in the adapter's own type.
    own = {s.name for s in floating if not s.changes and s.status in ("replaced", "added")
           and stored[s.name].dtype is s.source.dtype}  # fmt: skip
    found = {stored[s.name].dtype for s in floating if s.name not in own}
    cast = found.pop() if len(found) == 1 else None
    if cast is _main_dtype(floating):
        cast = None
    for step in steps:
        dtype = stored[step.name].dtype
        if dtype is step.dtype or step.name in own:
            continue
        if not step.dtype.mergeable:
            book.found("dtype-differs", step.name, f"{dtype.name}, expected {step.dtype.name}")
        elif is_buffer(step.name, step.shape):
            book.found("computed-buffer", step.name, f"cast from {step.dtype.name} to {dtype.name}")
        elif cast is None:
            book.found("dtype-differs", step.name, f"{dtype.name}, expected {step.dtype.name}")
    if cast is not None:
        main = _main_dtype(floating)
        count = sum(stored[s.name].dtype is not s.dtype for s in floating)
        book.found("model-cast", book.subject.path.name, f"{count} of {len(floating)} "
                   f"floating-point tensors: {cast.name}, expected "
                   f"{main.name if main else '?'}")  # fmt: skip
    return cast


def _main_dtype(steps: Iterable[Step]) -> DType | None:
    """Return the type that holds most of the expected bytes."""
    nbytes: dict[DType, int] = defaultdict(int)
    for step in steps:
        nbytes[step.dtype] += step.nbytes
    return max(nbytes, key=lambda d: nbytes[d], default=None)


# --- values


def _compare(
    book: _Book, steps: Sequence[Step], threads: int | None, compare: Compare
) -> dict[str, Difference]:
    """Return how each tensor's values differ from its source's, in parallel."""
    stored = book.subject.tensors
    parts = [
        (step, start, stop)
        for step in sorted(steps, key=lambda s: -s.source.nbytes)
        for start, stop in spans(step)
        if stored[step.name].dtype is step.source.dtype
        or (stored[step.name].dtype.mergeable and step.source.dtype.mergeable)
    ]

    def work(span: tuple[Step, int, int]) -> tuple[str, int, Difference | str]:
        step, start, stop = span
        return step.name, start, compare(step.source, stored[step.name], start, stop)

    found: dict[str, Difference] = {s.name: Difference() for s in steps}
    unreadable: dict[str, str] = {}
    for name, start, part in each(work, parts, threads):
        if isinstance(part, str):
            unreadable[name] = part
        else:
            found[name] = found[name].then(part, start)
    for name, what in unreadable.items():
        book.found("file-unreadable", stored[name].where, what)
    book.figures |= {
        "untouched": len(found),
        "untouched_equal": sum(not d.elements for d in found.values()) - len(unreadable),
        "bytes_compared": sum(stored[name].nbytes for name in found),
    }
    return found


def spans(step: Step) -> list[tuple[int, int]]:
    """Return the parts of a tensor that are compared at once: first element, one past the last."""
    size = step.source.size
    return [(start, min(start + SPAN_ELEMENTS, size)) for start in range(0, size, SPAN_ELEMENTS)]


def difference(
    source: TensorRef, stored: TensorRef, start: int, stop: int, *, brief: bool = False
) -> Difference | str:
    """Return how stored elements ``[start, stop)`` differ from the source's, cast if need be.

    Args:
        source: The base's tensor, or the adapter's.
        stored: The merged model's, of the same shape.
        start: First element (included).
        stop: Last element (not included).
        brief: Stop at the first chunk with a difference.

    Returns:
        The difference, positions relative to ``start``; or why the stored tensor cannot be read.

    Raises:
        InputError: The source cannot be read.
    """
    found = Difference()
    few = brief or source.dtype is not stored.dtype
    step = min(CAST_ELEMENTS if few else CHUNK_ELEMENTS, stop - start)
    ours = np.empty(step * source.dtype.itemsize, np.uint8)  # one pair for all chunks
    theirs = np.empty(step * stored.dtype.itemsize, np.uint8)
    for first in range(start, stop, step or 1):
        last = min(first + step, stop)
        try:
            there = _read(stored, first, last, theirs)
        except InputError as error:
            return clause(error, stored.source.path)
        here = _read(source, first, last, ours)
        found = found.then(_chunk(here, source.dtype, there, stored.dtype), first - start)
        if brief and found.elements:
            break
    return found


def _read(ref: TensorRef, first: int, last: int, buffer: Bytes) -> Bytes:
    """Return the bytes of elements ``[first, last)``, in the buffer."""
    size = ref.dtype.itemsize
    part = buffer[: (last - first) * size]
    ref.source.read(first * size, part)
    return part


def _chunk(ours: Bytes, dtype: DType, theirs: Bytes, other: DType) -> Difference:
    """Compare stored elements, given as bytes."""
    if dtype is not other:
        values = floats(ours.view(dtype.raw), dtype)
        return _cast_chunk(values, floats(theirs.view(other.raw), other), other)
    words = ours.size // 8 * 8  # eight bytes at a time: one comparison and one flag for each
    if np.array_equal(ours[:words].view("u8"), theirs[:words].view("u8")) and np.array_equal(
        ours[words:], theirs[words:]
    ):
        return Difference()
    differs = ours.view(dtype.raw) != theirs.view(dtype.raw)
    count = int(differs.sum())
    return Difference(count, count, int((ours != theirs).sum()), int(differs.argmax()))


def _cast_chunk(values: Floats, stored: Floats, dtype: DType) -> Difference:
    """Compare stored values with those of the source rounded once to ``dtype``."""
    with np.errstate(invalid="ignore", over="ignore"):
        nearest = np.where(np.isfinite(values), rounded(values, dtype), values)
        same = (nearest == stored) & (np.signbit(nearest) == np.signbit(stored))
        differs = ~same & ~(np.isnan(nearest) & np.isnan(stored))
        if not differs.any():
            return Difference()
        ulp = binade(nearest[differs], dtype) * 2.0 ** -FRACTION[dtype.name]
        near = np.abs(nearest[differs] - stored[differs]) <= ulp
    return Difference(int(differs.sum()), int((~near).sum()), 0, int(differs.argmax()))


def _report_values(
    book: _Book, steps: Sequence[Step], differences: Mapping[str, Difference]
) -> None:
    """Report tensors that should have gone along unchanged and did not."""
    by_name = {s.name: s for s in steps}
    different = {n: d for n, d in differences.items() if d.elements}
    book.figures["different"] = {
        shown(n): {"elements": d.elements, "bytes": d.nbytes, "first": d.first}
        for n, d in sorted(different.items())
    }
    strange = _of_another_base(book, by_name, differences)
    if strange:
        book.found("another-base", book.subject.path.name, f"{len(strange)} of {len(differences)} "
                   "tensors that the adapter does not touch differ all over, such as "
                   f"{shown(min(strange))}")  # fmt: skip
    for name, diff in different.items():
        step, stored = by_name[name], book.subject.tensors[name]
        if name in strange:
            continue
        if is_buffer(name, step.shape) and stored.dtype is not step.source.dtype:
            continue  # told as cast
        place = [int(i) for i in np.unravel_index(diff.first, step.shape)]
        how = (f" ({count(diff.nbytes, 'byte')})" if stored.dtype is step.source.dtype
               else f" after the cast to {stored.dtype.name}")  # fmt: skip
        book.found("bytes-differ", name, f"{diff.elements} of {step.source.size} elements{how}, "
                   f"the first at {place}")  # fmt: skip


def _of_another_base(
    book: _Book, steps: Mapping[str, Step], differences: Mapping[str, Difference]
) -> set[str]:
    """Return the tensors that are another model's, empty if this is the base.

    Two models share their constants (norms of ones, zero biases, buffers) and differ everywhere
    else; damage, or one retrained layer, touches few tensors. So: more than half of the matrices,
    and at least two, differ in more than one in a hundred elements, not counting the last bit of a
    cast. A model with fewer than two untouched matrices is judged by all its floats.
    """
    floating = {n: d for n, d in differences.items() if steps[n].source.dtype.mergeable
                and steps[n].status in ("unchanged", "cast")}  # fmt: skip
    matrices = {n: d for n, d in floating.items() if len(steps[n].shape) > 1}
    pool = matrices if len(matrices) > 1 else floating
    other = {n for n, d in pool.items() if d.far > ANOTHER_BASE_SHARE * steps[n].source.size}
    if len(other) < 2 or 2 * len(other) <= len(pool):
        return set()
    return {n for n, d in floating.items() if d.far > ANOTHER_BASE_SHARE * steps[n].source.size}


def _nothing_applied(book: _Book, steps: Sequence[Step]) -> None:
    """Report a merged model in which every tensor that should change has the base's bytes."""
    base, stored = book.plan.base.tensors, book.subject.tensors
    touched = {s.name for s in book.steps.values() if s.status not in ("unchanged", "cast")}
    present = [s for s in steps if s.name in base and s.name in touched]
    if stored.keys() & touched != {s.name for s in present}:
        return  # packed, of another shape, or new: not the base's in any case
    for step in present:
        source, found = base[step.name], stored[step.name]
        if source.shape != found.shape or not found.dtype.mergeable:
            return
        result = difference(source, found, 0, source.size, brief=True)
        if isinstance(result, str) or result.elements:
            return
    if present:
        many, whole = len(present) > 1, len(present) == len(touched)
        what = f"all {len(present)} tensors" if many else "the one tensor"
        here = "" if whole else f" and that {'are' if many else 'is'} here"
        have = "have" if many else "has"
        book.found("nothing-applied", book.subject.path.name,
                   f"{what} that the adapter changes{here} {have} the base's bytes")  # fmt: skip


def _sizes(shape: Sequence[int]) -> str:
    return f"({', '.join(map(str, shape))})"
