"""What a report says, in words: verdict, proof, and findings in groups; for text and page alike."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from dora_export.errors import shown
from dora_export.verification.catalog import FINDINGS, Meaning, Severity, Tier
from dora_export.verification.model import Finding, TensorResult, TierResult, VerifyReport
from dora_export.words import count, number, share

State = Literal["right", "wrong", "unchecked", "warning", "skipped"]
SEVERITIES: tuple[Severity, ...] = ("wrong", "unchecked", "warning", "note")


@dataclass(frozen=True)
class Group:
    """All findings of one kind.

    Attributes:
        meaning: What they mean.
        findings: In the report's order.
    """

    meaning: Meaning
    findings: tuple[Finding, ...]


@dataclass(frozen=True)
class Precision:
    """How near some tensors are to the exact result.

    Attributes:
        tensors: How many.
        elements: Elements compared in all of them.
        worst: The tensor with the largest distance.
        misrounded: Share of all elements compared that are not correctly rounded.
        dtypes: Their storage types, joined by "/".
    """

    tensors: int
    elements: int
    worst: TensorResult
    misrounded: float
    dtypes: str


def groups(findings: Iterable[Finding]) -> list[Group]:
    """Return findings by kind: the gravest first, then in the catalogue's order."""
    by_code: dict[str, list[Finding]] = defaultdict(list)
    for finding in findings:
        by_code[finding.code].append(finding)
    found = [Group(m, tuple(by_code[m.code])) for m in FINDINGS if m.code in by_code]
    return sorted(found, key=lambda g: SEVERITIES.index(g.meaning.severity))


def precision(tensors: Sequence[TensorResult]) -> Precision | None:
    """Sum up tensors that were compared; None if there are none."""
    compared = [t for t in tensors if t.status != "unchecked"]
    if not compared:
        return None
    elements = sum(t.elements for t in compared)
    off = sum(t.misrounded * t.elements for t in compared)
    return Precision(
        len(compared),
        elements,
        max(compared, key=lambda t: t.max_ulp),
        off / elements if elements else 0.0,
        "/".join(dict.fromkeys(t.dtype for t in compared)),
    )


def tier_state(report: VerifyReport, tier: TierResult) -> State:
    """Return how a tier ended."""
    found = {f.severity for f in report.findings if f.tier == tier.tier}
    if "wrong" in found:
        return "wrong"
    if "unchecked" in found:
        return "unchecked"
    if not tier.ran:
        return "skipped"
    return "warning" if "warning" in found else "right"


def headline(report: VerifyReport) -> str:
    """Return the verdict in one sentence."""
    if report.verdict == "wrong":
        return "The merged model is wrong"
    if report.verdict == "unchecked":
        return "The merged model could not be checked"
    statuses = {t.status for t in report.tensors}
    if "rounded" in statuses:
        return "The merged model is right, with more rounding than necessary"
    return "The merged model is right and exact" if "exact" in statuses else "The merge is right"


def proof(report: VerifyReport) -> list[str]:
    """Return what the verdict rests on: what was proven, how precisely, and what was not."""
    sentences = []
    if report.verdict == "wrong":
        wrong = [g for g in groups(report.findings) if g.meaning.severity == "wrong"]
        sentences += [f"{g.meaning.title} ({len(g.findings):,})" for g in wrong]
    if report.verdict == "unchecked":
        sentences.append(_unchecked(report))
    which = "every element" if report.level == "full" else "sampled rows"
    for kind, found in accuracy(report):
        sentence = (
            f"{which} of {count(found.tensors, 'changed tensor')} ({found.elements:,} values, "
            f"{found.dtypes}) compared with the float64 result: {kind}, "
            f"worst {number(found.worst.max_ulp)} ulp, {misrounded(found.misrounded)}"
        )
        sentences.append(sentence + ("" if kind == "exact" else "; best would be ½ ulp and none"))
    skipped: list[Tier] = [t.tier for t in report.tiers if not t.ran]
    if skipped and report.verdict == "right":
        sentences.append(f"Not part of this verdict: {' and '.join(skipped)}")
    return sentences


def _unchecked(report: VerifyReport) -> str:
    if not any(t.ran for t in report.tiers):
        return "Nothing was checked. This is no proof of anything"
    open_ = [g.meaning.title for g in groups(report.findings) if g.meaning.severity == "unchecked"]
    tensors = sum(t.status == "unchecked" for t in report.tensors)
    why = "; ".join(open_) or f"{count(tensors, 'tensor')} could not be compared"
    return f"Nothing wrong was found, but not everything was looked at: {why}"


def accuracy(report: VerifyReport) -> list[tuple[str, Precision]]:
    """Return how near the right tensors are to the exact result, by how they were computed."""
    kinds: dict[str, list[TensorResult]] = defaultdict(list)
    for tensor in report.tensors:
        if tensor.status == "exact":
            kinds["exact"].append(tensor)
        elif tensor.status == "rounded":
            by = f"as computed in {shown(tensor.arithmetic)}" if tensor.arithmetic else "rounded"
            kinds[by].append(tensor)
    return [(kind, found) for kind, ts in kinds.items() if (found := precision(ts)) is not None]


def misrounded(value: float, *, ascii_only: bool = False) -> str:
    """Return in words how many elements are not the correctly rounded ones."""
    some = "none" if value == 0 else share(value, ascii_only=ascii_only)
    return f"{some} not correctly rounded"
