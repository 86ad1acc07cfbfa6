"""What a verification found: plain data, the same for text, JSON and HTML."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from dora_export.verification.catalog import MEANINGS, Severity, Tier

Level = Literal["fast", "full"]
Verdict = Literal["right", "wrong", "unchecked"]
Status = Literal["exact", "rounded", "wrong", "unchecked"]
EXIT_CODES: dict[Verdict, int] = {"right": 0, "wrong": 1, "unchecked": 3}


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, could not be checked, or is worth knowing.

    Attributes:
        code: Key of ``catalog.MEANINGS``; says its tier and how grave it is.
        where: Tensor, file or key that it is about.
        what: What was found there, with numbers: a clause without a full stop.
    """

    code: str
    where: str
    what: str

    @property
    def tier(self) -> Tier:
        """The tier that found it."""
        return MEANINGS[self.code].tier

    @property
    def severity(self) -> Severity:
        """How grave it is."""
        return MEANINGS[self.code].severity

    def to_dict(self) -> dict[str, Any]:
        """Return the finding as JSON-ready data."""
        return {"tier": self.tier, "severity": self.severity, **asdict(self)}


@dataclass(frozen=True)
class TensorResult:
    """A changed tensor against the float64 formula.

    Distances count in units of the last place (ulp) of the stored type at the exact value.

    Attributes:
        name: Its name in the merged model.
        status: "exact" (within 1 ulp, nearly all correctly rounded), "rounded" (right, with the
            rounding of ``arithmetic``), "wrong", or "unchecked".
        dtype: Its storage type, e.g. "BF16".
        shape: Its shape.
        elements: How many elements were compared.
        max_ulp: Largest distance.
        misrounded: Share of elements that are not the correctly rounded exact ones.
        relative_error: ``||M - W'|| / ||W'||`` over the elements compared, Frobenius.
        error_ratio: ``||M - W'||`` over what rounding once to ``dtype`` would leave; 1 is best.
        update_size: ``||W' - W|| / ||W||`` over the elements compared, Frobenius.
        magnitude_ratio: Least, lower quartile, median, upper quartile, largest of ``m / ||W||``
            over the rows (out axis) or columns (in axis) compared, or None without magnitudes.
        arithmetic: Storage type in whose precision the values seem to have been computed, for
            status "rounded".
        diagnosis: Code of the finding about it, or None.
    """

    name: str
    status: Status
    dtype: str
    shape: tuple[int, ...]
    elements: int
    max_ulp: float
    misrounded: float
    relative_error: float
    error_ratio: float
    update_size: float
    magnitude_ratio: tuple[float, float, float, float, float] | None = None
    arithmetic: str | None = None
    diagnosis: str | None = None


@dataclass(frozen=True)
class TierResult:
    """What one tier did.

    Attributes:
        tier: Which.
        ran: Whether it checked anything; if not, ``summary`` says why.
        summary: One line for people.
        seconds: Wall time.
        figures: Its numbers, JSON-ready.
    """

    tier: Tier
    ran: bool
    summary: str
    seconds: float = 0.0
    figures: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class VerifyReport:
    """What ``verify`` found.

    Attributes:
        base: The base model.
        adapters: The adapters, as the user named them.
        merged: The merged model.
        level: "fast" or "full".
        maker: Who wrote the merged model, as far as its files say, e.g. "dora-export 0.1.0".
        method: "DoRA" or "LoRA".
        tiers: What each tier did, in order.
        findings: Everything found, sorted by gravity, tier and place.
        tensors: Every changed tensor, in the model's order.
        notes: Decisions worth knowing, e.g. settings taken from the manifest.
        seconds: Wall time.
        peak_rss_bytes: Most memory the process has held so far, or None where unknown.
    """

    base: Path
    adapters: tuple[Path, ...]
    merged: Path
    level: Level
    maker: str
    method: str
    tiers: tuple[TierResult, ...]
    findings: tuple[Finding, ...]
    tensors: tuple[TensorResult, ...]
    notes: tuple[str, ...] = ()
    seconds: float = 0.0
    peak_rss_bytes: int | None = None

    @property
    def verdict(self) -> Verdict:
        """Wrong if anything is; unchecked if something, or everything, was left open; else right.

        A tensor's own status counts as well as the findings, so that none can be forgotten.
        """
        found = {f.severity for f in self.findings} | {t.status for t in self.tensors}
        if "wrong" in found:
            return "wrong"
        ran = any(t.ran for t in self.tiers)
        return "right" if ran and "unchecked" not in found else "unchecked"

    @property
    def exit_code(self) -> int:
        """0 right, 1 wrong, 3 could not check."""
        return EXIT_CODES[self.verdict]

    @property
    def worst(self) -> TensorResult | None:
        """The tensor with the largest distance from the exact result, or None."""
        known = (t for t in self.tensors if t.status != "unchecked")
        return max(known, key=lambda t: t.max_ulp, default=None)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-ready data; numbers that are not finite become None."""
        content: dict[str, Any] = _finite(asdict(self))
        return {
            **content,
            "base": str(self.base),
            "adapters": [str(path) for path in self.adapters],
            "merged": str(self.merged),
            "verdict": self.verdict,
            "findings": [f.to_dict() for f in self.findings],
        }


def _finite(value: Any) -> Any:
    """Return JSON-ready data without NaN and infinity, which JSON has not."""
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
