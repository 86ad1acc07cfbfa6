"""The tiers in turn: what a merge checks before it publishes, and what ``verify`` starts with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from dora_export.errors import VerifyError, listing, shown
from dora_export.plan import Plan
from dora_export.verification.ahead import Ahead
from dora_export.verification.catalog import FINDINGS
from dora_export.verification.expert_pairs import as_the_base
from dora_export.verification.ledger import Source, check_ledger
from dora_export.verification.model import Finding, Level, TensorResult, TierResult
from dora_export.verification.oracle import check_oracle
from dora_export.verification.subject import Subject
from dora_export.verification.tensor_ledger import difference

SEVERITIES = ("wrong", "unchecked", "warning", "note")
ORDER = {m.code: i for i, m in enumerate(FINDINGS)}


@dataclass(frozen=True)
class Checked:
    """What ledger and oracle found.

    Attributes:
        level: How deep the oracle went.
        tiers: What each tier did.
        tensors: Every changed tensor.
        findings: Sorted by gravity, tier and place.
    """

    level: Level
    tiers: tuple[TierResult, ...]
    tensors: tuple[TensorResult, ...]
    findings: tuple[Finding, ...]

    @property
    def worst(self) -> TensorResult | None:
        """The tensor with the largest distance from the exact result, or None."""
        return max(self.tensors, key=lambda t: t.max_ulp, default=None)


def check(
    plan: Plan,
    subject: Subject,
    sources: Mapping[str, Source],
    level: Level,
    *,
    ahead: Ahead | None = None,
    digests: Mapping[Path, str] | None = None,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Checked:
    """Run the ledger and the oracle on a merged model.

    Args:
        plan: What base and adapter should give.
        subject: The merged model.
        sources: Side files that belong in it.
        level: "fast" samples rows of changed tensors, "full" compares every element; both compare
            every byte of the tensors that do not change.
        ahead: What has begun to check it while it was written, if anything has.
        digests: SHA-256 of input files that are known already.
        threads: Workers; None: one per CPU.
        progress: Called with elements done and in all.
    """
    compare = difference if ahead is None else ahead.compare
    ledger, found = check_ledger(
        plan, subject, sources, threads=threads, compare=compare, digests=digests
    )
    named = as_the_base(subject, plan)
    work = None if ahead is None else ahead.check
    oracle, tensors, more = check_oracle(
        plan, named.tensors, level, work=work, threads=threads, progress=progress
    )
    if tensors and all(t.status in ("exact", "rounded") for t in tensors):
        # An adapter that changes nothing (B = 0, an update below rounding) gives the base's bytes.
        found = tuple(f for f in found if f.code != "nothing-applied")
    return Checked(level, (ledger, oracle), tensors, in_order((*found, *more)))


def in_order(findings: tuple[Finding, ...]) -> tuple[Finding, ...]:
    """Return findings by gravity, then as the catalog has them, then by place."""
    key = [(SEVERITIES.index(f.severity), ORDER[f.code], f.where, f.what) for f in findings]
    return tuple(f for _, f in sorted(zip(key, findings, strict=True), key=lambda pair: pair[0]))


def refuse_wrong(checked: Checked) -> None:
    """Raise if a merge's own output is not what was planned.

    Raises:
        VerifyError: With everything that is wrong or could not be checked.
    """
    problems = [
        f"{shown(f.where)}: {f.what} ({f.code})"
        for f in checked.findings
        if f.severity in ("wrong", "unchecked")
    ]
    if problems:
        raise VerifyError(f"the output is not what was planned:{listing(problems)}\nNot published.")
