"""``export_onnx``: merges, lets one of three ways make a graph, checks its parity, publishes."""

from __future__ import annotations

import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from dora_export import api, naming
from dora_export._version import __version__
from dora_export.adapters import Reading, ReadOptions
from dora_export.checkpoints import locate, open_checkpoint
from dora_export.engine import Engine, Resources
from dora_export.errors import AdapterError, DoraExportError, listing, shown
from dora_export.formula import ZeroNorm
from dora_export.machine import faults_told
from dora_export.onnx import files
from dora_export.onnx.model import (
    MERGED,
    GraphOptions,
    GraphReport,
    Made,
    ParityError,
    Request,
    Way,
    options_said,
)
from dora_export.plan import Plan, Settings, plan_unchanged
from dora_export.storage.paths import links_followed
from dora_export.tensors import OUTPUT_WORDS
from dora_export.verification.check import in_order
from dora_export.verification.model import Finding, TierResult, VerifyReport
from dora_export.writers import manifest, place, side_files
from dora_export.writers.files import FileSink, write_small
from dora_export.writers.identity import adapter_digests
from dora_export.writers.journal import FORMAT, FORMAT_LABEL, Job
from dora_export.writers.staging import MANIFEST, Stage, find_leftover, staged

if TYPE_CHECKING:
    from typing_extensions import Unpack

PathLike = api.PathLike

USAGE = "dora-export onnx BASE ADAPTER -o OUT"


@faults_told()
@links_followed
def export_onnx(
    base: PathLike,
    adapter: PathLike | Sequence[PathLike] | None,
    output: PathLike,
    *,
    into: PathLike | None = None,
    adapters: bool = False,
    options: GraphOptions = GraphOptions(),  # noqa: B008 - frozen
    verify: bool = True,
    budget: float | None = None,
    prompts: Sequence[str] = (),
    allow_mismatch: bool = False,
    allow_merged_base: bool = False,
    allow_missing: Iterable[str] = (),
    strength: float = 1.0,
    weights: Sequence[float] = (),
    zero_norm: ZeroNorm = "refuse",
    map_prefix: Iterable[str] = (),
    fan_in_fan_out: bool | None = None,
    threads: int | None = None,
    force: bool = False,
    sync: bool = True,
    on_stage: Callable[[str], None] = lambda _: None,
    progress: api.Progress | None = None,
    **reading: Unpack[Reading],
) -> GraphReport:
    """Publish base + adapter as a folder with an ONNX graph that onnxruntime runs.

    Every graph is run beside the *unmerged* base + adapter before it is published, and is not
    published if it computes something else. ``output`` is absent or whole at any instant.

    Args:
        base: As in ``merge``.
        adapter: As in ``merge``; several with ``adapters``. None: ``base`` is merged already, and
            the graph is held against it as it is stored.
        output: Folder to publish; must not exist, be empty, or with ``force`` be an earlier output.
        into: An ``.onnx`` graph of the base to give the merged weights (with ``adapters``: places
            for adapters), instead of tracing.
        adapters: Make one graph of the base whose adapters are swapped at run time, see
            ``AdapterSession``; nothing is merged.
        options: What kind of graph.
        verify: Hold the graph against the unmerged model.
        budget: Largest difference allowed, relative to the largest expected value, in place of the
            measured noise of the graph's dtype. Of a cache its root mean square is held to it, not
            single elements.
        prompts: Texts to run both on; none: generated inputs.
        allow_mismatch: Publish a graph that fails the comparison all the same.
        allow_merged_base: As in ``merge``; for ``into`` as well.
        allow_missing: Names of tensors or modules that the adapter changes and that ``into`` may
            lack, since its exporter left them out.
        strength: As in ``merge``.
        weights: As in ``merge``.
        zero_norm: As in ``merge``.
        map_prefix: As in ``merge``.
        fan_in_fan_out: As in ``merge``.
        threads: Workers of the merge; None: one per CPU.
        force: Replace an earlier output of this tool.
        sync: As in ``merge``; without it for ``into`` alone.
        on_stage: Called with the name of each stage when it begins.
        progress: Called with bytes merged and bytes in all.
        **reading: As in ``load_adapter``.

    Returns:
        What was made; its ``exit_code`` is 0 for right, 1 for wrong, 3 for could not check.

    Raises:
        ParityError: The graph computes something else; the error carries the report.
        DoraExportError: See ``dora_export.errors``; nothing is published then.
    """
    started = time.monotonic()
    _check_options(options)
    way: Way = "adapters" if adapters else "into" if into is not None else "trace"
    if way != "into" and not sync:
        raise DoraExportError(
            "--no-sync: for a graph that is re-weighted (--into, without --adapters). Leave it out."
        )
    if adapters and options.layout != "hf":
        raise DoraExportError(
            f"--layout {options.layout} --adapters: transformers.js loads no adapters that swap. "
            "Leave one of them out."
        )
    target = place.target_of(output)
    settings = Settings(
        dtype=OUTPUT_WORDS[options.dtype] if way == "trace" else None,
        strength=strength,
        weights=tuple(weights),
        zero_norm=zero_norm,
        map_prefix=naming.parse_map_prefix(map_prefix),
        fan_in_fan_out=fan_in_fan_out,
    )
    plans = _plans(base, adapter, ReadOptions(**reading), settings, each=adapters)
    if adapter is not None:
        manifest.refuse_merged_base(plans[0].base.folder, allow=allow_merged_base)
    beside = _side_files(plans[0], into)
    leftover = find_leftover(target)
    place.check_way(target, [*(f.name for f in beside), MANIFEST, f"{MERGED}/model.safetensors"])
    inputs = {"base": plans[0].base.path}
    inputs |= {f"adapter {a.path.name}": a.path for p in plans for a in p.adapters}
    inputs |= {} if into is None else {"graph": Path(into)}
    place.check_place(target, inputs, force=force, leftover=leftover)
    if into is None:  # re-weighting checks for itself what the graph needs
        place.check_space(target, 2 * plans[0].output_bytes, leftover)  # merged weights, the graph
    # Two exports need not give the same bytes, so none goes on with another's.
    job = Job({FORMAT_LABEL: FORMAT, "dora-export": __version__, "run": uuid.uuid4().hex}, {})
    with staged(target, job, force=force, sync=sync) as stage:
        request = Request(
            plans, stage.folder, options, Path(into) if into is not None else None, threads,
            progress, on_stage, tuple(allow_missing), allow_merged_base, sync, runs=verify,
        )  # fmt: skip
        made = _make(way, request, base, adapter, settings, reading, allow_merged_base)
        on_stage("writing side files")
        plan = replace(plans[0], indexes={}, config_edits=dict(plans[0].config_edits))
        side_files.write(plan, beside, stage.folder, sync=sync)
        report = None
        if verify:
            on_stage("comparing with the unmerged model")
            report = _verified(made, stage, target, plans[0], prompts, budget, started)
        _write_manifest(stage, plan, made, way, options, beside, report)
        sizes = files.sizes(stage.folder)
        found = GraphReport(
            output=target,
            way=way,
            graphs=made.graphs,
            files=sizes,
            facts=made.facts,
            verified=report,
            seconds=time.monotonic() - started,
            peak_rss_bytes=api.peak_rss(),
            notes=(*plans[0].notes, *made.notes, *_left_behind(plans[0], into, sizes)),
            warnings=tuple(
                dict.fromkeys((*(w for plan in plans for w in plan.warnings), *made.warnings))
            ),
        )
        if found.verdict == "wrong" and not allow_mismatch:
            raise _mismatch(found)
    return found


def _check_options(options: GraphOptions) -> None:
    hints = {"dtype": ("fp32", "fp16", "bf16"), "fuse": ("none", "cpu", "cuda"),
             "quantize": (None, "int8", "int4"), "head_bits": (4, 8),
             "layout": ("hf", "transformers-js"), "engine": ("auto", "torch", "transformers"),
             "pooling": (None, "config", "mean", "cls", "last")}  # fmt: skip
    for name, allowed in hints.items():
        if (value := getattr(options, name)) not in allowed:
            words = ", ".join(str(a) for a in allowed if a is not None)
            raise DoraExportError(f"--{name.replace('_', '-')} {value}: expected {words}.")


def _plans(
    base: PathLike,
    adapter: PathLike | Sequence[PathLike] | None,
    options: ReadOptions,
    settings: Settings,
    *,
    each: bool,
) -> tuple[Plan, ...]:
    """Return the merge to export, or with ``each`` one for every adapter."""
    if adapter is None:
        checkpoint = open_checkpoint(
            locate(base, "base"), allow_pickle=options.allow_pickle, variant=options.variant
        )
        return (plan_unchanged(checkpoint, settings),)
    if each and not isinstance(adapter, str | os.PathLike):
        if not adapter:
            raise AdapterError("--adapters: no adapter given. Name at least one.")
        return tuple(api._plan(base, one, options, settings, USAGE)[0] for one in adapter)
    return (api._plan(base, adapter, options, settings, USAGE)[0],)


def _side_files(plan: Plan, into: PathLike | None) -> tuple[side_files.SideFile, ...]:
    """Return what goes along with a graph: tokenizer, config and their like."""
    found = side_files.collect(plan)
    if into is None:
        return found
    from dora_export.onnx import into as re_weighted  # noqa: PLC0415 - as in _make()

    return re_weighted.beside(Path(into), found)


def _left_behind(plan: Plan, into: PathLike | None, there: Iterable[str]) -> Iterator[str]:
    """Yield which side files of the base or of a graph are not in the output, and why."""
    found = side_files.left_behind(plan)
    found |= {} if into is None else side_files.left_in(Path(into).parent)
    for name, why in found.items():
        if name not in there:
            yield f"{shown(name)} is left behind: {why}; copy it if the model needs it"


def _make(
    way: Way,
    request: Request,
    base: PathLike,
    adapter: PathLike | Sequence[PathLike] | None,
    settings: Settings,
    reading: Reading,
    allow_merged_base: bool,
) -> Made:
    if way == "into":
        from dora_export.onnx import into  # noqa: PLC0415 - what another way needs is not imported

        return into.make(request)
    if way == "adapters":
        return _swappable(request)
    from dora_export.onnx import trace  # noqa: PLC0415

    trace.check(request)  # before minutes of work
    merged = request.folder / MERGED
    doubts: tuple[str, ...] = ()
    if adapter is None:
        folder = _as_stored(request, merged)
    else:
        request.on_stage("merging")
        report = api.merge(
            base, adapter, merged, dtype=request.options.dtype, strength=settings.strength,
            weights=settings.weights, zero_norm=settings.zero_norm,
            fan_in_fan_out=settings.fan_in_fan_out,
            map_prefix=[f"{old}={new}" for old, new in settings.map_prefix],
            allow_merged_base=allow_merged_base, threads=request.threads,
            progress=request.progress, **reading,
        )  # fmt: skip
        folder = merged
        doubts = tuple(w for w in report.warnings if w not in request.plan.warnings)
    try:
        made = trace.make(request, folder)
        return replace(made, warnings=(*made.warnings, *doubts))
    finally:
        shutil.rmtree(merged, ignore_errors=True)


def _swappable(request: Request) -> Made:
    """Make a graph with places for adapters: of a graph of the base, or of the base traced."""
    from dora_export.onnx import swappable, trace  # noqa: PLC0415 - as above

    if request.into is not None:
        return swappable.make(request)
    settings = replace(request.plan.settings, dtype=OUTPUT_WORDS[request.options.dtype])
    bare = replace(request, plans=(plan_unchanged(request.plan.base, settings),))
    trace.check(bare)
    swappable.check(request.plans)  # before minutes of work
    made = trace.make(bare, _as_stored(bare, request.folder / MERGED), whole=True)
    shutil.rmtree(request.folder / MERGED, ignore_errors=True)
    slotted = swappable.make(request, request.folder / made.graphs[0])
    return replace(
        slotted,
        facts={**made.facts, **slotted.facts},
        notes=(*made.notes, *slotted.notes),
        warnings=(*made.warnings, *slotted.warnings),
    )


def _as_stored(request: Request, merged: Path) -> Path:
    """Return a folder with a merged model's weights in the graph's dtype: its own, or a copy."""
    plan = request.plan
    assert plan.base.folder is not None, "Bug: trace.check() wants a folder"
    held = all(name.name.endswith(".safetensors") for name in plan.base.sources)
    if held and all(step.copies_bytes for step in plan.steps):
        return plan.base.folder
    request.on_stage(f"casting to {request.options.dtype}")
    resources = Resources("cpu", request.threads, None)
    merged.mkdir()
    sizes = [file.nbytes for file in plan.files]
    done = 0

    def on_bytes(count: int) -> None:
        nonlocal done
        done += count
        if request.progress is not None:
            request.progress(done, plan.output_bytes)

    # Tracing reads all of it right after.
    with FileSink(merged, [f.name for f in plan.files], sizes, read_again=True) as sink:
        for position, file in enumerate(plan.files):
            sink.write_header(position, file.header)
        Engine(plan, sink, resources, on_bytes).run()
    side_files.write(plan, side_files.collect(plan), merged)
    return merged


def _verified(
    made: Made,
    stage: Stage,
    target: Path,
    plan: Plan,
    prompts: Sequence[str],
    budget: float | None,
    started: float,
) -> VerifyReport:
    from dora_export.verification.graph import check_graph  # noqa: PLC0415 - loads torch

    tiers: list[TierResult] = [*made.tiers]
    findings: list[Finding] = []
    for one in made.parity:
        graph = stage.folder / one.graph
        tier, found = check_graph(
            one.plan, graph, runner=one.runner(graph) if one.runner else None,
            outputs=one.outputs, budget=one.budget if budget is None else budget, prompts=prompts,
            padding=one.padding, cls=one.cls, derive=one.derive,
            unmerged=partial(one.unmerged, graph) if one.unmerged else None,
        )  # fmt: skip
        tiers.append(tier)
        findings += found
    return VerifyReport(
        base=plan.base.path,
        adapters=tuple(a.path for a in plan.adapters),
        merged=target,
        level="full",
        maker=f"dora-export {__version__}",
        method=plan.method,
        tiers=tuple(tiers),
        findings=in_order(tuple(findings)),
        tensors=(),
        notes=(*plan.notes, *plan.warnings),
        seconds=time.monotonic() - started,
        peak_rss_bytes=api.peak_rss(),
    )


def _mismatch(found: GraphReport) -> ParityError:
    assert found.verified is not None, "Bug: a mismatch that nothing found"
    problems = [f"{shown(f.where)}: {f.what} ({f.code})" for f in found.verified.findings
                if f.severity == "wrong"]  # fmt: skip
    error = ParityError(
        f"the graph does not compute what base and adapter do:{listing(problems)}\n"
        f"Not published. {_ways_out(found, found.verified)}"
    )
    error.report = found
    return error


def _ways_out(found: GraphReport, verified: VerifyReport) -> str:
    """Return what to do about a graph that computes something else."""
    anyway = "--allow-mismatch publishes it all the same."
    if {f.code for f in verified.findings if f.severity == "wrong"} != {"graph-mistaken"}:
        return f"--budget allows larger differences, {anyway}"
    # It is within what is allowed, so a budget changes nothing.
    method = found.facts.get("quantized", {}).get("method")
    if method is None:
        return f"No --budget allows that; a graph that is not quantised loses nothing; {anyway}"
    finer = " --quantize int4 (it rounds weights only) or" if method == "int8" else ""
    return (
        f"No --budget allows that: rounding to {method} costs this model more than the adapter "
        f"changes. Try{finer} no --quantize; {anyway}"
    )


def _write_manifest(
    stage: Stage,
    plan: Plan,
    made: Made,
    way: Way,
    options: GraphOptions,
    beside: tuple[side_files.SideFile, ...],
    report: VerifyReport | None,
) -> None:
    if way == "adapters":
        plan = plan_unchanged(plan.base, plan.settings)  # nothing is merged
    content = manifest.manifest(plan, Resources("cpu", None, None), beside, adapter_digests(plan))
    digests = dict(made.digests) or files.digests(stage.folder, made.graphs)
    content["onnx"] = {
        "way": way,
        "options": {} if way == "into" else options_said(options),
        **made.facts,
        "notes": list(made.notes),
        "warnings": list(made.warnings),
        "files": digests,
        "bytes": {name: (stage.folder / name).stat().st_size for name in digests},
        "parity": None if report is None else {
            "verdict": report.verdict,
            "tiers": [{"summary": t.summary, "figures": t.figures} for t in report.tiers],
        },
    }  # fmt: skip
    write_small(stage.folder / MANIFEST, manifest.as_json(content))
