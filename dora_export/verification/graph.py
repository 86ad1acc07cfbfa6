"""The ONNX tier: an exported graph against base + adapter, run unmerged, by names.

Both sides take and give arrays by name, so one script drives them: whole inputs of several batch
sizes, lengths and paddings; and where the graph keeps a cache, a prefill and then token after
token, each side on its own cache. The tolerance is the forward tier's: twice the noise of running
unmerged in the graph's precision; for a quantised graph twice what quantising did to the graph of
the base, where there is one; or what the caller allows.
"""

from __future__ import annotations

import importlib.util
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dora_export.errors import shown
from dora_export.plan import Plan
from dora_export.tensors import DTYPES
from dora_export.verification.forward import apart, of_allowed
from dora_export.verification.graph_weights import merged_in
from dora_export.verification.measured import GraphMeasured, Progress, Unsupported, library_of
from dora_export.verification.model import Finding, TierResult
from dora_export.verification.parity import Compared, Distance, Tolerance, peak_of, tolerance
from dora_export.verification.runner import GraphUnusable, OnnxRuntime, Runner
from dora_export.verification.script import PRESENT, Padding
from dora_export.verification.stale import stale
from dora_export.verification.together import graphs_of, opened

if TYPE_CHECKING:
    from dora_export.verification.models import ModelClass
    from dora_export.verification.pooling import Derive

GREEDY = 64  # tokens of greedy text
NO_FLOOR = (
    "is quantised, and rounding has no noise floor that could be measured here, so give a budget: "
    "--budget R allows differences up to R times the largest expected value (--json tells how "
    "large they are)"
)


def check_graph(
    plan: Plan,
    graph: Path,
    *,
    runner: Runner | None = None,
    adapter: Path | None = None,
    outputs: Sequence[str] | None = None,
    budget: float | None = None,
    prompts: Sequence[str] = (),
    padding: Padding = "any",
    tokens: int = GREEDY,
    cls: ModelClass | None = None,
    derive: Derive | None = None,
    unmerged: Callable[[], Runner] | None = None,
    progress: Progress | None = None,
) -> tuple[TierResult, tuple[Finding, ...]]:
    """Run an ONNX graph beside the unmerged base and adapter, and compare all outputs.

    Memory: one model in the high precision (4 bytes per parameter for 16-bit weights, 8 for
    float32) and the graph.

    Args:
        plan: Base, adapter and what becomes of them.
        graph: The ``.onnx`` file of the merged model; any of an encoder-decoder's, which lie
            beside each other.
        runner: Runs it; None: onnxruntime on the CPU.
        adapter: The file that onnxruntime runs a graph of the base with; None: what it runs is
            merged.
        outputs: Outputs that the graph is meant to have, beside a cache's; None: all the model's.
        budget: Largest difference allowed, relative to the largest expected value, in place of
            the measured noise; a quantised graph needs it or ``unmerged``.
        prompts: Texts to run on, by the tokenizer in the graph's folder; none: generated tokens.
        padding: Where the graph takes padding.
        tokens: Tokens that the reference writes, one by one, for the graph to agree with, if it
            keeps a cache.
        cls: Class to run the reference with; None: the base's.
        derive: Gives outputs that the graph has beside the model's, from inputs and outputs.
        unmerged: Opens the graph of the base that a quantised one was made from, quantised alike:
            how far it is from the base, on the same inputs, is the noise.
        progress: Called with stages done and stages in all.

    Returns:
        What was measured, and the findings.
    """
    started = time.monotonic()
    name = shown(graph.name)
    found: tuple[Finding, ...]
    figures: dict[str, Any] = {}
    merged = runner is None and adapter is None
    try:
        if adapter is not None:
            runner = OnnxRuntime(graph, adapter)
        measured = _measure(
            plan, graph, runner, outputs, budget, prompts, progress, padding, tokens, cls, derive,
            unmerged,
        )  # fmt: skip
        held = [f for one in graphs_of(graph) for f in stale(plan, one)] if merged else []
        found = (*_judge(name, measured, budget), *held)
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
    padding: Padding,
    tokens: int,
    cls: ModelClass | None,
    derive: Derive | None,
    unmerged: Callable[[], Runner] | None,
) -> GraphMeasured:
    library = library_of(plan.base.config)
    if importlib.util.find_spec(library) is None:
        raise Unsupported(library, "is not installed")
    by_graph = runner is None and budget is None
    runner = runner or opened(graph)
    twin = None
    if runner.precision is None and budget is None:
        if unmerged is None:
            raise GraphUnusable("graph-unsupported", NO_FLOOR)
        twin = unmerged()
    merged = merged_in(plan, graphs_of(graph)) if by_graph else None
    if budget is None and getattr(runner, "swaps", False) and runner.precision is not None:
        merged = DTYPES[runner.precision]  # nothing was merged, so nothing was rounded
    from dora_export.verification import named  # noqa: PLC0415 - torch takes a second to import

    return named.measure(
        plan,
        graph,
        runner,
        outputs,
        budget is None,
        prompts,
        progress,
        padding,
        tokens,
        cls,
        derive,
        merged,
        twin,
    )


# --- what the numbers mean


def _allowed(name: str, measured: GraphMeasured, budget: float | None) -> Tolerance:
    if budget is not None:
        bound = budget * measured.error[name].distance.scale
        # A cache is on the way to what a model says: rounding weights to four bits moves single
        # elements far, and what comes of them is in the outputs of the steps that read it.
        return Tolerance(math.inf if name.startswith(PRESENT) else bound, bound)
    peak = 0.0
    # Single elements of another draw of roundings say little: all outputs are asked.
    if name.startswith(PRESENT) or measured.noise_of_base:
        peak = peak_of(n.distance for o, n in measured.noise.items()
                       if o.startswith(PRESENT) or measured.noise_of_base)  # fmt: skip
    return tolerance(measured.noise[name].distance, measured.unit, peak)


def _is_coarse(measured: GraphMeasured) -> bool:
    """Return whether the noise of a coarser type than the graph's own is allowed."""
    narrow = ("float16", "bfloat16")
    return measured.storage in narrow and measured.graph not in (None, *narrow)


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
    if budget is None and measured.merged_in is None and _is_coarse(measured):
        what = f"its weights are {measured.graph}, {measured.storage}'s noise is allowed"
        yield Finding("graph-coarse", name, what)
    nearer = {mistake: one for mistake, one in measured.leanings.items() if one.nearer}
    if nearer:
        mistake, one = max(nearer.items(), key=lambda pair: pair[1].ratio)
        what = (f"its outputs are nearer to those of '{mistake}' ({one.share:.0%} of the way) than "
                "to those of base and adapter")  # fmt: skip
        yield Finding("graph-mistaken", name, what)
    yield from _of_text(name, measured, budget)
    effects = measured.effect.items()
    if effects and all(
        _allowed(output, measured, budget).excess(effect.distance) <= 1
        for output, effect in effects
    ):
        what = "more is allowed than the adapter changes in any output"
        yield Finding("graph-blind", name, what)


def _of_text(name: str, measured: GraphMeasured, budget: float | None) -> Iterator[Finding]:
    text = measured.text
    if text is None or text.agree == text.positions or "logits" not in measured.error:
        return
    # Both of two logits may be off by what is allowed.
    room = 2 * _allowed("logits", measured, budget).largest
    if not text.clearest_parting <= room:
        what = (f"{text.positions - text.agree} of {text.positions} greedy tokens differ; the "
                f"reference prefers its own by up to {text.clearest_parting:.3g} (allowed "
                f"{room:.2g})")  # fmt: skip
        yield Finding("graph-differs", name, what)


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
        "merged_in": measured.merged_in,
        "noise_of_base": measured.noise_of_base,
        "calls": list(measured.calls),
        "mistakes": {name: one.to_dict() for name, one in measured.leanings.items()},
        "text": None
        if measured.text is None
        else {"tokens": measured.text.positions, "equal": measured.text.agree},
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
    parts = [f"{name} {of_allowed(one['excess'])}" for name, one in figures["outputs"].items()
             if not name.startswith("present.") or one["excess"] > 1]  # fmt: skip
    if figures["text"]:
        parts.append(
            f"{figures['text']['equal']} of {figures['text']['tokens']} greedy tokens equal"
        )
    noise = f"the noise of {figures['storage']}"
    noise = "quantising the base" if figures["noise_of_base"] else noise
    allowed = "the stated budget" if figures["budget"] else noise
    worst = max(((one["share"], mistake) for mistake, one in figures["mistakes"].items()
                 if one["share"] is not None), default=None)  # fmt: skip
    if worst is not None:
        parts.append(f"at most {max(0.0, worst[0]):.1%} of the way to a known mistake ({worst[1]})")
    return f"{count} calls; of what {allowed} allows: {', '.join(parts)}"
