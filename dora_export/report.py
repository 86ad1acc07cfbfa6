"""What a merge and an inspection return: plain data, with the words for people beside it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class MergeReport:
    """What ``merge`` did, or, for a dry run, would do.

    Attributes:
        output: The folder.
        dry_run: Nothing was written.
        adapters: The adapters, in order.
        weights: Weight of each.
        adapter_format: Name of the adapter's format; of several, each once.
        method: "DoRA" or "LoRA"; of several adapters, each once.
        magnitude: What one magnitude belongs to.
        tensors: Output tensors by status: unchanged, cast, merged, replaced, added.
        adapter_tensors: Adapter tensors there are.
        adapter_tensors_used: Adapter tensors that went into the output; the rest is in ``ignored``.
        ignored: Adapter tensors without effect on weights, and why.
        files: Names of the weight files.
        side_files: Names of the other files.
        left_behind: Files of the base that are not taken over although they belong, and why.
        output_bytes: Bytes of all files.
        memory_bytes: Bound on buffers and loaded adapter tensors, beyond what the process held.
        peak_rss_bytes: Most memory the process has held so far, or None where unknown.
        seconds: Wall time.
        precision: Working precision.
        dtypes: Storage types of the base's and of the output's changed tensors, e.g. "BF16".
        names: How adapter names became the base's.
        verified: "none", "fast" or "full".
        worst_ulp: Largest distance from the float64 result found by the check, or None.
        worst_tensor: Where that was.
        resumed_bytes: Bytes of weight files that an interrupted run had written already.
        weight_bytes: Bytes of all weight files.
        notes: Decisions worth knowing.
        warnings: Doubts worth knowing.
    """

    output: Path
    dry_run: bool
    adapters: tuple[Path, ...]
    weights: tuple[float, ...]
    adapter_format: str
    method: str
    magnitude: str
    tensors: dict[str, int]
    adapter_tensors: int
    adapter_tensors_used: int
    ignored: dict[str, str]
    files: tuple[str, ...]
    side_files: tuple[str, ...]
    output_bytes: int
    memory_bytes: int
    peak_rss_bytes: int | None
    seconds: float
    precision: str
    dtypes: tuple[str, str]
    names: str
    verified: str = "none"
    worst_ulp: float | None = None
    worst_tensor: str | None = None
    resumed_bytes: int = 0
    weight_bytes: int = 0
    left_behind: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def changed(self) -> int:
        """Tensors that are not the base's very values."""
        return sum(n for status, n in self.tensors.items() if status not in ("unchanged", "cast"))

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-ready data."""
        adapters = [str(path) for path in self.adapters]
        return {**asdict(self), "output": str(self.output), "adapters": adapters}


@dataclass(frozen=True)
class Engine:
    """Whether a serving engine takes this adapter unmerged.

    Attributes:
        name: The engine.
        takes: "yes", "no", or "wrong": it takes it and computes something else.
        why: One clause.
    """

    name: str
    takes: str
    why: str


@dataclass(frozen=True)
class InspectReport:
    """What ``inspect`` found.

    Attributes:
        path: The adapter.
        format: Its format.
        facts: Its settings in the format's own words.
        kinds: Updates by kind of layer, e.g. {"dora (64 x 96)": 8}.
        parameters: Adapter parameters.
        nbytes: Bytes of its tensors.
        base_name: The base that it names, or None.
        modules: Adapted modules by their last name, with counts.
        engines: Who takes it unmerged.
        base: The base it was held against, or None.
        fits: Whether it fits that base, or None.
        misfit: Why not, or None.
        merged: Base tensors that a merge would change, or None.
        output_bytes: Size after a merge, or None.
        notes: Decisions worth knowing.
        warnings: Doubts worth knowing.
    """

    path: Path
    format: str
    facts: dict[str, Any]
    kinds: dict[str, int]
    parameters: int
    nbytes: int
    base_name: str | None
    modules: dict[str, int]
    engines: tuple[Engine, ...]
    base: Path | None = None
    fits: bool | None = None
    misfit: str | None = None
    merged: int | None = None
    output_bytes: int | None = None
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-ready data."""
        base = str(self.base) if self.base else None
        return {**asdict(self), "path": str(self.path), "base": base}


@dataclass(frozen=True)
class LayerLoss:
    """How much of a layer's update a plain LoRA of some rank keeps.

    Attributes:
        name: The base's tensor.
        shape: Its shape.
        size: Frobenius norm of ``W' - W``.
        energy: Share of its square that is kept, 0 to 1.
        error: Frobenius norm of what is lost over ``size``, 0 to 1.
    """

    name: str
    shape: tuple[int, ...]
    size: float
    energy: float
    error: float


@dataclass(frozen=True)
class ConvertReport:
    """What ``convert`` did.

    Attributes:
        output: The folder.
        source_format: The adapter's format; of several, each once.
        target: What it was converted to.
        method: What it was, "DoRA" or "LoRA".
        tensors: Tensors written.
        weights: Name of the file that holds them.
        files: Names of all files.
        nbytes: Bytes of the weight file.
        rank: Rank of a plain LoRA that approximates it; None: the conversion is exact.
        rounded: Some tensors are computed for the base and rounded once; all others are copied.
        layers: What each layer of that LoRA keeps, the worst first.
        energy: Share of the squared norm of all updates together that is kept; None: exact.
        seconds: Wall time.
        notes: Decisions worth knowing.
        warnings: Doubts worth knowing.
    """

    output: Path
    source_format: str
    target: str
    method: str
    tensors: int
    weights: str
    files: tuple[str, ...]
    nbytes: int
    rank: int | None = None
    rounded: bool = False
    layers: tuple[LayerLoss, ...] = ()
    energy: float | None = None
    seconds: float = 0.0
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def worst(self) -> LayerLoss | None:
        """The layer of which least is kept, or None."""
        return self.layers[0] if self.layers else None

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-ready data."""
        return {**asdict(self), "output": str(self.output)}
