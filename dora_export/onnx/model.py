"""What is asked of a way to a graph, and what it made: plain data, shared by all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dora_export.errors import DoraExportError, VerifyError
from dora_export.plan import Plan
from dora_export.verification.model import TierResult, Verdict, VerifyReport

if TYPE_CHECKING:
    from dora_export.verification.models import ModelClass
    from dora_export.verification.pooling import Derive
    from dora_export.verification.runner import Runner

Way = Literal["trace", "into", "adapters"]
Padding = Literal["any", "right", "none"]

GRAPH = "model.onnx"
DATA = f"{GRAPH}.data"
DATA_BYTES = 100_000_000  # weights above this go into a file of their own
MERGED = "merged"  # sub-folder of the staged one, removed before publishing
# Largest difference, relative to the largest expected value, that a graph traced and quantised may
# have unless the user says otherwise; the mistakes that it is held against as well allow less.
BUDGETS = {"int8": 0.5, "int4": 0.5}
PROTOBUF_BYTES = (1 << 31) - 1  # the most that one protobuf message can hold


class GraphError(DoraExportError):
    """A graph cannot be made, or not as asked: exporter, options or given graph."""


class ParityError(VerifyError):
    """A graph computes something else than base and adapter do.

    Attributes:
        report: What was made and found; None: not known.
    """

    report: GraphReport | None = None


@dataclass(frozen=True)
class GraphOptions:
    """What a user can say about a graph.

    Attributes:
        task: What the model is for, None: as its config says.
        dtype: "fp32", "fp16" or "bf16": of weights and activations.
        opset: Version of ONNX's operators; None: the exporter's own.
        fuse: Execution provider whose fused operators to use, or "none".
        batch: Batch size that the graph is fixed to; None: any.
        pooling: "mean", "cls", "last" or "config": pool and, as the folder says, normalise.
        quantize: "int8" (dynamic) or "int4" (weights only), or None.
        block_size: Weights that share one scale, for "int4".
        symmetric: Whether "int4" has no zero points.
        head_bits: Bits of the output head's weights with "int4": 4 or 8.
        layout: "hf": beside config and tokenizer; "transformers-js": in the sub-folder "onnx".
        share_weights: Whether the graph reads the published ``model.safetensors``.
        engine: "auto", "torch" or "transformers": what traces.
    """

    task: str | None = None
    dtype: Literal["fp32", "fp16", "bf16"] = "fp32"
    opset: int | None = None
    fuse: Literal["none", "cpu", "cuda"] = "none"
    batch: int | None = None
    pooling: str | None = None
    quantize: Literal["int8", "int4"] | None = None
    block_size: int = 32
    symmetric: bool = True
    head_bits: int = 8
    layout: Literal["hf", "transformers-js"] = "hf"
    share_weights: bool = False
    engine: Literal["auto", "torch", "transformers"] = "auto"


@dataclass(frozen=True)
class Request:
    """What a way is asked to make.

    Attributes:
        plans: One merge; with swappable adapters, one for each adapter.
        folder: Empty; what is written into it is published.
        options: The user's.
        into: The graph to re-weight, or None.
        threads: Workers; None: one per CPU.
        progress: Called with bytes done and bytes in all.
        on_stage: Called with the name of each stage when it begins.
        allow_missing: Tensors or modules that ``into`` may lack although the merge changes them.
        allow_merged_base: Whether base and graph may have had an adapter merged in before.
        sync: Whether to wait until a re-weighted graph is on the disk.
        runs: Whether graphs will be run, so that onnxruntime may hold their weights now, too.
    """

    plans: Sequence[Plan]
    folder: Path
    options: GraphOptions
    into: Path | None = None
    threads: int | None = None
    progress: Callable[[int, int], None] | None = None
    on_stage: Callable[[str], None] = lambda _: None
    allow_missing: Sequence[str] = ()
    allow_merged_base: bool = False
    sync: bool = True
    runs: bool = True

    @property
    def plan(self) -> Plan:
        """The first merge."""
        return self.plans[0]


@dataclass(frozen=True)
class Parity:
    """One comparison with the unmerged model that a way asks for.

    Attributes:
        graph: Name of the graph within the folder.
        plan: Whose unmerged model it must be.
        runner: Makes what runs it; None: onnxruntime on the CPU.
        outputs: Outputs that the graph is meant to have, beside a cache's; None: all the model's.
        budget: Largest difference allowed, relative; None: the measured noise.
        padding: Where padding may be.
        cls: Class to run the unmerged model with; None: the base's.
        derive: Gives outputs that the graph has beside the model's, from inputs and outputs.
        unmerged: Opens the graph of the base where the graph is quantised, given the path of the
            new one: how far that is from the base is the noise.
    """

    graph: str
    plan: Plan
    runner: Callable[[Path], Runner] | None = None
    outputs: Sequence[str] | None = None
    budget: float | None = None
    padding: Padding = "any"
    cls: ModelClass | None = None
    derive: Derive | None = None
    unmerged: Callable[[Path], Runner] | None = None


@dataclass(frozen=True)
class Made:
    """What a way made.

    Attributes:
        graphs: Names of the graphs within the folder, the main one first.
        facts: What the manifest says of them, JSON-ready.
        parity: What to check.
        config_edits: Keys of config.json that are other than the base's.
        notes: Decisions worth telling.
        warnings: Doubts worth telling.
        tiers: What the way has checked itself.
        digests: SHA-256 of the graphs and of the files with their weights, where it is known.
    """

    graphs: tuple[str, ...]
    facts: Mapping[str, Any]
    parity: tuple[Parity, ...]
    config_edits: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    tiers: tuple[TierResult, ...] = ()
    digests: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class GraphReport:
    """What ``export_onnx`` did.

    Attributes:
        output: The folder.
        way: How the graph came about.
        graphs: Names of the graphs.
        files: Names of all files with their bytes.
        facts: As in the manifest.
        verified: Parity with the unmerged model, or None if it was not asked for.
        seconds: Wall time.
        peak_rss_bytes: Most memory the process has held so far, or None where unknown.
        notes: Decisions worth telling.
        warnings: Doubts worth telling.
    """

    output: Path
    way: Way
    graphs: tuple[str, ...]
    files: Mapping[str, int]
    facts: Mapping[str, Any]
    verified: VerifyReport | None
    seconds: float
    peak_rss_bytes: int | None
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def verdict(self) -> Verdict | None:
        """What parity found; None if it was not asked for."""
        return None if self.verified is None else self.verified.verdict

    @property
    def exit_code(self) -> int:
        """0 right or not asked for, 1 wrong, 3 could not check."""
        return 0 if self.verified is None else self.verified.exit_code

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-ready data."""
        content = {k: v for k, v in self.__dict__.items() if k != "verified"}
        return {
            **content,
            "output": str(self.output),
            "files": dict(self.files),
            "facts": dict(self.facts),
            "verdict": self.verdict,
            "verified": None if self.verified is None else self.verified.to_dict(),
        }


def options_said(options: GraphOptions) -> dict[str, Any]:
    """Return the options as JSON-ready data."""
    return asdict(options)
