"""The forward tier: the merged model against base + adapter, run unmerged, on the same inputs.

The tolerance is measured, not chosen. The reference runs in a high precision (float32 for weights
stored in 16 bits, float64 for float32) and again in the storage precision: what lies between the
two is the noise of computing with such weights at all. The merged model, run in the high
precision, differs from the reference by its weights' rounding alone. It may differ by twice that
noise (``parity.ROOM``), in the largest and in the root mean square difference, in every changed
layer and in every output.
"""

from __future__ import annotations

import importlib.util
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dora_export.errors import shown
from dora_export.plan import Plan
from dora_export.verification.measured import (
    Layer,
    LoadFailure,
    Measured,
    Progress,
    Unsupported,
    library_of,
)
from dora_export.verification.model import Finding, TierResult
from dora_export.verification.parity import Compared, Distance, Tolerance, tolerance
from dora_export.words import count


def check_forward(
    plan: Plan,
    merged: Path,
    *,
    prompts: Sequence[str] = (),
    tokens: int = 32,
    progress: Progress | None = None,
) -> tuple[TierResult, tuple[Finding, ...]]:
    """Run a merged model beside its unmerged base and adapter, and compare what they compute.

    Each changed weight is compared on the very inputs it meets in the reference, then all outputs
    and the greedy text. Loads with transformers or diffusers; no code of the model's own is
    executed. Memory: two models in the high precision at once (8 bytes per parameter for weights
    stored in 16 bits, 16 for float32), and the outputs.

    Args:
        plan: Base, adapter and what becomes of them.
        merged: Folder of the merged model, by whatever tool.
        prompts: Texts to run on, by the merged folder's tokenizer; none: generated tokens.
        tokens: Length of the greedy texts; 0: none.
        progress: Called with stages done and stages in all.

    Returns:
        What was measured, and the findings: a "wrong" one for every layer and output that differs,
        an "unchecked" one for whatever could not be compared.
    """
    started = time.monotonic()
    findings, figures, summary = _check(plan, merged, prompts, tokens, progress)
    seconds = time.monotonic() - started
    return TierResult("forward", bool(figures), summary, seconds, figures), findings


def _check(
    plan: Plan,
    merged: Path,
    prompts: Sequence[str],
    tokens: int,
    progress: Progress | None,
) -> tuple[tuple[Finding, ...], dict[str, Any], str]:
    library = library_of(plan.base.config)
    if importlib.util.find_spec(library) is None:
        missing = Finding("forward-extra", library, "is not installed")
        return (missing,), {}, f"not run: {library} is not installed"
    from dora_export.verification import sidebyside  # noqa: PLC0415 - torch takes a second to import

    try:
        measured = sidebyside.measure(plan, merged, prompts, tokens, progress or _silent)
    except Unsupported as why:
        return (Finding("forward-unsupported", why.where, why.what),), {}, f"not run: {why}"
    except LoadFailure as why:
        failure = Finding("load-fails", shown(merged.name), str(why))
        return (failure,), {}, f"the merged model does not load: {why}"
    findings = tuple(judge(measured))
    return findings, figures(measured), _summary(measured)


def _silent(done: int, total: int) -> None:
    """Report nothing."""


# --- what the numbers mean


def judge(measured: Measured) -> Iterator[Finding]:
    """Yield what is wrong, what could not be checked, and what is worth knowing."""
    for misfit in measured.misfits:
        yield Finding("outputs-differ", measured.model, misfit)
    for layer in sorted(measured.layers, key=_excess, reverse=True):
        yield from _of_layer(layer)
    for name, found in measured.error.items():
        yield from _of_output(name, found, measured.noise[name].distance, measured.unit)
    yield from _of_text(measured)
    yield from _of_opinion(measured)
    for name in measured.idle:
        yield Finding("layer-idle", shown(name), "no input reached it")
    yield from _unseen(measured)


def _unseen(measured: Measured) -> Iterator[Finding]:
    """Yield what would look the same with no adapter at all."""
    for name, effect in measured.effect.items():
        allowed = tolerance(measured.noise[name].distance, measured.unit)
        if allowed.excess(effect.distance) <= 1:
            what = _apart(effect.distance, allowed)
            yield Finding("effect-unseen", f"output '{shown(name)}'", f"without adapter: {what}")
    unseen = [layer for layer in measured.layers if not _seen(layer)]
    if unseen:
        yield Finding(
            "effect-unseen",
            shown(unseen[0].name),
            f"{len(unseen)} of {len(measured.layers)} changed layers differ from the base's by "
            "less than the tolerance",
        )


def _tolerance(layer: Layer) -> Tolerance:
    return tolerance(layer.noise, layer.unit)


def _excess(layer: Layer) -> float:
    return _tolerance(layer).excess(layer.error)


def _seen(layer: Layer) -> bool:
    """Return whether the layer would fail if the adapter were not in it."""
    return _tolerance(layer).excess(layer.effect) > 1


def _of_layer(layer: Layer) -> Iterator[Finding]:
    if not layer.noise.finite:
        what = "overflows in its storage precision, unmerged as well: no noise floor"
        yield Finding("forward-unsupported", shown(layer.name), what)
    elif _excess(layer) > 1:
        yield Finding("layer-differs", shown(layer.name),
                      _apart(layer.error, _tolerance(layer)))  # fmt: skip


def _of_output(name: str, found: Compared, noise: Distance, unit: float) -> Iterator[Finding]:
    if not noise.finite:
        what = "is not finite in the storage precision, unmerged as well: no noise floor"
        yield Finding("forward-unsupported", f"output '{shown(name)}'", what)
        return
    allowed = tolerance(noise, unit)
    if allowed.excess(found.distance) > 1:
        yield Finding("outputs-differ", f"output '{shown(name)}'", apart(found, allowed))


def apart(found: Compared, allowed: Tolerance) -> str:
    """Return how far apart outputs are, and how far they may be, in words."""
    what = _apart(found.distance, allowed)
    if found.choices is None:
        return what
    chosen = found.choices.to_dict()
    return f"{what}, KL {chosen['kl_mean']:.2g}, top-1 agrees {chosen['top1_agreement']:.1%}"


def _apart(found: Distance, allowed: Tolerance) -> str:
    return (
        f"max |difference| {found.largest:.3g} of {found.scale:.3g} (allowed {allowed.largest:.2g})"
        f", rms {found.rms:.3g} (allowed {allowed.rms:.2g})"
    )


def _of_text(measured: Measured) -> Iterator[Finding]:
    text = measured.text
    if text is None or text.agree == text.positions:
        return
    allowed = _parting_allowed(measured)
    if not text.clearest_parting <= allowed:
        yield Finding(
            "text-differs",
            "greedy text",
            f"{text.positions - text.agree} of {text.positions} tokens differ; the reference "
            f"prefers its own by up to {text.clearest_parting:.3g} (allowed {allowed:.2g})",
        )


def _parting_allowed(measured: Measured) -> float:
    """Return by how much a choice may differ: both of two logits may be off by the tolerance."""
    return 2 * tolerance(measured.noise["logits"].distance, measured.unit).largest


def _of_opinion(measured: Measured) -> Iterator[Finding]:
    for name, found in measured.opinion.error.items():
        allowed = tolerance(measured.noise[name].distance, measured.unit)
        if allowed.excess(found.distance) > 1:
            yield Finding("peft-differs", f"output '{shown(name)}'",
                          _apart(found.distance, allowed))  # fmt: skip


# --- for the report


def figures(measured: Measured) -> dict[str, Any]:
    """Return everything measured as JSON-ready data; layers with the largest error first."""
    text = measured.text
    return {
        "model": measured.model,
        "precision": measured.precision,
        "storage": measured.storage,
        "inputs": list(measured.inputs),
        "found_by": dict(measured.places),
        "random": list(measured.random),
        "outputs": {n: _output_figures(n, measured) for n in measured.error},
        "layers": [
            {
                "name": layer.name,
                "excess": _excess(layer),
                "error": layer.error.to_dict(),
                "noise": layer.noise.to_dict(),
                "effect": layer.effect.to_dict(),
            }
            for layer in sorted(measured.layers, key=_excess, reverse=True)
        ],
        "text": None if text is None else {"tokens": text.positions, "equal": text.agree},
        "peft": {
            "outputs": {n: c.distance.to_dict() for n, c in measured.opinion.error.items()},
            "said": measured.opinion.said,
        },
    }


def _output_figures(name: str, measured: Measured) -> dict[str, Any]:
    found, noise = measured.error[name], measured.noise[name]
    effect = measured.effect.get(name)
    return {
        "excess": tolerance(noise.distance, measured.unit).excess(found.distance),
        "error": found.distance.to_dict(),
        "noise": noise.distance.to_dict(),
        "effect": None if effect is None else effect.distance.to_dict(),
        "choices": None if found.choices is None else found.choices.to_dict(),
        "choices_noise": None if noise.choices is None else noise.choices.to_dict(),
    }


def of_allowed(excess: float) -> str:
    """Return in words how much of what is allowed a difference is."""
    return f"at {excess:,.0%}" if math.isfinite(excess) else "not finite"


def _summary(measured: Measured) -> str:
    if measured.misfits:
        return f"{measured.model}: {measured.misfits[0]}"
    parts = []
    if measured.layers:
        worst = _excess(max(measured.layers, key=_excess))
        of = f" of what the noise of {measured.storage} allows" if math.isfinite(worst) else ""
        layers = count(len(measured.layers), "layer")
        parts.append(f"{layers}, worst {of_allowed(worst)}{of}")
    for name, found in measured.error.items():
        allowed = tolerance(measured.noise[name].distance, measured.unit)
        parts.append(f"{name} {of_allowed(allowed.excess(found.distance))}")
    if measured.text is not None:
        text = measured.text
        parts.append(f"{text.agree} of {text.positions} greedy tokens equal")
        if text.agree < text.positions and text.clearest_parting <= _parting_allowed(measured):
            parts[-1] += ", the rest within the noise"
    return f"{measured.model}: {'; '.join(parts)}"
