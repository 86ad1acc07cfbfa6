"""The ONNX tier: an exported graph against base + adapter, run unmerged, by names.

Both sides take and give arrays by name, so one script drives them: whole inputs of several batch
sizes, lengths and paddings; and where the graph keeps a cache, a prefill and then token after
token, each side on its own cache. The tolerance is the forward tier's: twice the noise of running
unmerged in the graph's precision, or what the caller allows (for quantised graphs).
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dora_export.errors import shown
from dora_export.plan import Plan
from dora_export.verification.forward import apart
from dora_export.verification.measured import GraphMeasured, Progress, Unsupported, library_of
from dora_export.verification.model import Finding, TierResult
from dora_export.verification.parity import Compared, Distance, Tolerance, tolerance
from dora_export.verification.runner import GraphUnusable, OnnxRuntime, Runner


def check_graph(
    plan: Plan,
    graph: Path,
    *,
    runner: Runner | None = None,
    outputs: Sequence[str] | None = None,
    budget: float | None = None,
    prompts: Sequence[str] = (),
    progress: Progress | None = None,
) -> tuple[TierResult, tuple[Finding, ...]]:
    """Run an ONNX graph beside the unmerged base and adapter, and compare all outputs.

    Memory: one model in the high precision (4 bytes per parameter for 16-bit weights, 8 for
    float32) and the graph.

    Args:
        plan: Base, adapter and what becomes of them.
        graph: The ``.onnx`` file of the merged model.
        runner: Runs it; None: onnxruntime on the CPU.
        outputs: Outputs that the graph is meant to have, beside a cache's; None: all the model's.
        budget: Largest difference allowed, relative to the largest expected value, in place of
            the measured noise; needed for quantised graphs.
        prompts: Texts to run on, by the tokenizer in the graph's folder; none: generated tokens.
        progress: Called with stages done and stages in all.

    Returns:
        What was measured, and the findings.
    """
    started = time.monotonic()
    name = shown(graph.name)
    found: tuple[Finding, ...]
    figures: dict[str, Any] = {}
    try:
        measured = _measure(plan, graph, runner, outputs, budget, prompts, progress)
        found = tuple(_judge(name, measured, budget))
        figures = _figures(measured, budget) if measured.error else {}
    except GraphUnusable as why:
        found = (Finding(why.code, name, str(why)),)
    except Unsupported as why:
        found = (Finding("graph-unsupported", why.where, why.what),)
    seconds = time.monotonic() - started
    return TierResult("onnx", bool(figures), _summary(found, figures), seconds, figures), found


def _measure(
    plan: Plan,
    graph: Path,
    runner: Runner | None,
    outputs: Sequence[str] | None,
    budget: float | None,
    prompts: Sequence[str],
    progress: Progress | None,
) -> GraphMeasured:
    library = library_of(plan.base.config)
    if importlib.util.find_spec(library) is None:
        raise Unsupported(library, "is not installed")
    runner = runner or OnnxRuntime(graph)
    if runner.precision is None and budget is None:
        raise GraphUnusable("graph-unsupported", "is quantised: no noise floor, so give a budget")
    from dora_export.verification import named  # noqa: PLC0415 - torch takes a second to import

    return named.measure(plan, graph, runner, outputs, budget is None, prompts, progress)


# --- what the numbers mean


def _allowed(name: str, measured: GraphMeasured, budget: float | None) -> Tolerance:
    if budget is not None:
        bound = budget * measured.error[name].distance.scale
        return Tolerance(bound, bound)
    return tolerance(measured.noise[name].distance, measured.unit)


def _judge(name: str, measured: GraphMeasured, budget: float | None) -> Iterator[Finding]:
    yield from (Finding("graph-inputs", name, what) for what in measured.misnamed)
    yield from (Finding("graph-differs", name, what) for what in measured.misfits)
    for output, error in measured.error.items():
        where = f"output '{shown(output)}'"
        noise = measured.noise[output].distance if budget is None else Distance()
        bound = _allowed(output, measured, budget)
        if not noise.finite:
            what = "is not finite in the graph's precision, unmerged as well: no noise floor"
            yield Finding("graph-unsupported", where, what)
        elif bound.excess(error.distance) > 1:
            yield Finding("graph-differs", where, apart(error, bound))
    effects = measured.effect.items()
    if effects and all(
        _allowed(output, measured, budget).excess(effect.distance) <= 1
        for output, effect in effects
    ):
        what = "more is allowed than the adapter changes in any output"
        yield Finding("graph-blind", name, what)


def _figures(measured: GraphMeasured, budget: float | None) -> dict[str, Any]:
    def numbers(found: Mapping[str, Compared], name: str) -> dict[str, float] | None:
        return found[name].distance.to_dict() if name in found else None

    def choices(found: Mapping[str, Compared], name: str) -> dict[str, float] | None:
        chosen = found[name].choices if name in found else None
        return None if chosen is None else chosen.to_dict()

    return {
        "precision": measured.precision,
        "storage": measured.storage,
        "budget": budget,
        "calls": list(measured.calls),
        "outputs": {
            name: {
                "excess": _allowed(name, measured, budget).excess(error.distance),
                "error": error.distance.to_dict(),
                "noise": numbers(measured.noise, name),
                "effect": numbers(measured.effect, name),
                "choices": choices(measured.error, name),
                "choices_noise": choices(measured.noise, name),
            }
            for name, error in measured.error.items()
        },
    }


def _summary(found: Sequence[Finding], figures: Mapping[str, Any]) -> str:
    if not figures:
        return "; ".join(f"{f.where}: {f.what}" for f in found)
    count = sum(script["calls"] for script in figures["calls"])
    parts = [f"{name} at {one['excess']:.0%}" for name, one in figures["outputs"].items()
             if not name.startswith("present.") or one["excess"] > 1]  # fmt: skip
    allowed = "the stated budget" if figures["budget"] else f"the noise of {figures['storage']}"
    return f"{count} calls; of what {allowed} allows: {', '.join(parts)}"
