"""The Python interface: the only module that knows every stage."""

from __future__ import annotations

import math
import os
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dora_export import inputs, naming, several
from dora_export.adapters import Adapter, Reading, ReadOptions, read_adapter, read_adapters
from dora_export.checkpoints import Checkpoint, locate, open_checkpoint
from dora_export.engine import (
    Engine,
    Resources,
    arithmetic_factory,
    check_adapter,
    memory_bound,
)
from dora_export.errors import AdapterError, DoraExportError, PlanError, shown
from dora_export.flat_names import is_flat, prefix_of
from dora_export.formula import ZeroNorm
from dora_export.limits import FACTOR
from dora_export.machine import faults_told, memory_told, require_space
from dora_export.plan import Plan, Precision, Settings, plan_merge
from dora_export.report import InspectReport, MergeReport
from dora_export.roles import roles_told
from dora_export.serving import engines, ways_out
from dora_export.storage.paths import links_followed
from dora_export.tensors import OUTPUT_WORDS, DType
from dora_export.update import Update
from dora_export.verification.ahead import Ahead, bytes_beside
from dora_export.verification.check import Checked, check, in_order, refuse_wrong
from dora_export.verification.ledger import Source
from dora_export.verification.model import (
    Finding,
    Level,
    TensorResult,
    TierResult,
    VerifyReport,
)
from dora_export.verification.plausible import doubts, refuse_implausible
from dora_export.verification.subject import open_subject
from dora_export.writers import direct, identity, manifest, place, side_files
from dora_export.writers.files import FileSink, write_small
from dora_export.writers.identity import adapter_digests
from dora_export.writers.ranges import Ranges
from dora_export.writers.staging import (
    MANIFEST,
    Stage,
    find_leftover,
    preview,
    staged,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack

PathLike = str | os.PathLike[str]
Progress = Callable[[int, int], None]
SIZES = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
         "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40}  # fmt: skip
# Address space of a thread: its stack, its part of the heap, and what OpenBLAS maps for it.
THREAD_BYTES = (8 + 64 + 32) << 20

MERGE = "dora-export merge BASE ADAPTER -o OUT"
VERIFY = "dora-export verify BASE ADAPTER MERGED"
INSPECT = "dora-export inspect ADAPTER --base BASE"


@faults_told()
@links_followed
def load_adapter(adapter: PathLike, **reading: Unpack[Reading]) -> Adapter:
    """Return an adapter in normal form; reads its config and headers, no tensor.

    Args:
        adapter: Folder, file, or hub id.
        **reading: What the adapter's files do not say, see ``Reading``.

    Raises:
        InputError: The adapter is missing or malformed.
        AdapterError: It is of no known format, contradicts itself, or is refused by name.
    """
    return read_adapter(locate(adapter, "adapter"), ReadOptions(**reading))


@faults_told()
@links_followed
def merge(
    base: PathLike,
    adapter: PathLike | Sequence[PathLike] | None,
    output: PathLike,
    *,
    device: str = "cpu",
    dtype: str | None = None,
    precision: Precision = "float32",
    strength: float = 1.0,
    weights: Sequence[float] = (),
    zero_norm: ZeroNorm = "refuse",
    map_prefix: Iterable[str] = (),
    fan_in_fan_out: bool | None = None,
    max_shard_size: int | str | None = None,
    threads: int | None = None,
    block_bytes: int | None = None,
    verify: Level | Literal["none"] = "fast",
    force: bool = False,
    allow_merged_base: bool = False,
    restart: bool = False,
    sync: bool = True,
    dry_run: bool = False,
    progress: Progress | None = None,
    **reading: Unpack[Reading],
) -> MergeReport:
    """Merge adapters into a base model and publish the result as a folder of safetensors.

    Every adapter tensor is used or the call fails before a byte is written; untouched tensors keep
    their bytes; each changed element is within one unit in the last place of the float64 result
    and rounded once. The same inputs and options give the same bytes for any number of threads
    and any block size. ``output`` is absent or whole at any instant.

    A merge that did not end is gone on with by the next call with the same inputs and options,
    whatever its threads and blocks, and gives the same bytes as one that nothing disturbed. Its
    work is kept, in a hidden folder beside ``output``, when the process or the machine goes down,
    when ``KeyboardInterrupt`` or any error but a refusal ends it, and when a disk is full or fails;
    the latter raise an ``OutputError`` or ``InputError`` that names the folder. It is removed when
    something is wrong with the inputs or the result. Of two calls on one output at a time the
    second is refused.

    Args:
        base: Folder, weight file, or hub id of the base model. With ``adapter`` None: a file that
            holds base and adapter in one.
        adapter: Folder, file or hub id of the adapter, or a sequence of them, which are applied in
            this order with every norm that of the unmerged base (see ``plan.plan_merge``).
        output: Folder to publish; must not exist, be empty, or with ``force`` be an earlier output.
        device: "cpu", "cuda" or "cuda:N".
        dtype: "fp32", "fp16" or "bf16" for all floating-point tensors; None keeps each one's own.
        precision: Working precision; "float64" gives the correctly rounded result.
        strength: ``W + strength * (W' - W)``, dimensionless.
        weights: Of the adapters, in their order: each does ``V + weight * (V' - V)``; none given:
            1 each. Dimensionless.
        zero_norm: Rows with ``||W + s B A|| = 0`` and a magnitude other than zero: refuse, make
            them zero, or keep the base's.
        map_prefix: ``OLD=NEW`` replacements at the start of tensor names.
        fan_in_fan_out: Whether square weights are stored ``(in, out)``; None: by model type.
        max_shard_size: Re-shard, e.g. "5GB" or bytes; None keeps the base's files.
        threads: Workers; None: one per CPU, and two more where each waits for its own writes.
        block_bytes: About how many bytes a worker reads and writes at once.
        verify: Check of the written files before they are published: "none", "fast", "full".
        force: Replace an earlier output of this tool.
        allow_merged_base: Accept a base that this tool has merged an adapter into.
        restart: Drop what an interrupted merge into ``output`` left. Without it, one that was
            started from other inputs or with other options is an error, which names them.
        sync: Wait until the output is on the disk. Without it, as with ``cp``, the system writes it
            out later: a kill still finds ``output`` absent or whole, but a power failure within
            the next minute may leave a folder with damaged files, and a merge that was killed is
            not gone on with.
        dry_run: Plan and check only, as far as that goes without writing: the adapter's values and
            some lines of the base are read.
        progress: Called with bytes done and bytes in all, from worker threads.
        **reading: As in ``load_adapter``.

    Raises:
        DoraExportError: See ``dora_export.errors``; nothing is published then.
    """
    started = time.monotonic()
    resources = Resources(device, _positive("threads", threads), _positive("block", block_bytes))
    settings = Settings(
        dtype=_output_dtype(dtype),
        precision=_one_of("precision", precision, ("float32", "float64")),
        strength=_factor("strength", strength),
        weights=tuple(_factor("weight", weight) for weight in weights),
        zero_norm=_one_of("zero_norm", zero_norm, ("refuse", "zero", "keep-base")),
        map_prefix=naming.parse_map_prefix(map_prefix),
        fan_in_fan_out=fan_in_fan_out,
        max_shard_bytes=_size(max_shard_size),
    )
    _one_of("verify", verify, ("none", "fast", "full"))
    tile_elements = arithmetic_factory(resources)(settings.precision).tile_elements
    options = ReadOptions(**reading)
    target = place.target_of(output)
    plan, before = _plan(base, adapter, options, settings)
    manifest.refuse_merged_base(plan.base.folder, allow=allow_merged_base)
    beside = side_files.collect(plan)
    files = [*plan.base.sources, *plan.adapter_files, *(file.source for file in beside)]
    stamps = inputs.watch(files, before)
    place.check_way(target, [*(f.name for f in plan.files), *(f.name for f in beside), MANIFEST])
    leftover = find_leftover(target)
    place.check_place(
        target,
        plan.inputs,
        force=force,
        leftover=leftover,
    )
    total = plan.output_bytes + side_files.side_bytes(beside)
    place.check_space(target, total, leftover)
    # The disk is what a merge waits for: checks go on beside the writing.
    checkers = 0 if verify == "none" or resources.workers == 1 else min(4, resources.workers)
    if resources.on_cpu and sync and direct.pays(target):
        resources = replace(
            resources,
            threads=threads or resources.workers + direct.WAITING,
            block_bytes=block_bytes or direct.BLOCK_BYTES,
        )
    memory = memory_bound(plan, resources, tile_elements) + bytes_beside(plan, checkers)
    if not dry_run:
        # the workers, those that check, the thread that syncs, and this one
        running = resources.workers + checkers + 2
        require_space(memory + running * THREAD_BYTES, "this merge")
    with memory_told(memory), inputs.held(stamps):
        check_adapter(plan)
        plan = replace(plan, warnings=(*plan.warnings, *refuse_implausible(plan)))
    checked, resumed = None, 0
    if not dry_run:
        card = manifest.model_card(plan)
        with memory_told(memory), inputs.held(stamps):
            digests = adapter_digests(plan)
        job = identity.job(plan, resources, digests)
        with (
            memory_told(memory),
            staged(target, job, force=force, restart=restart, sync=sync) as stage,
            inputs.held(stamps),
            Ahead(plan, stage.folder, "full" if verify == "full" else "fast", checkers) as ahead,
        ):
            resumed = stage.held_bytes
            # The disk takes the last of the weights while they are checked.
            with _written(plan, stage, resources, progress, ahead, sync=sync):
                if not stage.published:
                    side_files.write(plan, beside, stage.folder, sync=sync)
                    content = manifest.manifest(plan, resources, beside, digests)
                    write_small(stage.folder / "README.md", card, sync=sync)
                    write_small(stage.folder / MANIFEST, manifest.as_json(content), sync=sync)
                if verify != "none":
                    subject, sources = open_subject(stage.folder), _sources(beside)
                    checked = check(
                        plan,
                        subject,
                        sources,
                        verify,
                        ahead=ahead,
                        digests=digests,
                        threads=threads,
                    )
                    refuse_wrong(checked)
    elif leftover is not None:
        job = identity.job(plan, resources, adapter_digests(plan))
        resumed = preview(target, job, force=force, restart=restart)
    seconds = time.monotonic() - started
    return _report(plan, target, dry_run, beside, total, memory, seconds, checked, resumed)


@faults_told()
@links_followed
def verify(
    base: PathLike,
    adapter: PathLike | Sequence[PathLike] | None,
    merged: PathLike,
    *,
    level: Level = "full",
    forward: bool = False,
    prompts: Sequence[str] = (),
    budget: float | None = None,
    dtype: str | None = None,
    strength: float | None = None,
    weights: Sequence[float] = (),
    zero_norm: ZeroNorm | None = None,
    map_prefix: Iterable[str] = (),
    fan_in_fan_out: bool | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
    **reading: Unpack[Reading],
) -> VerifyReport:
    """Prove that a merged model is base + adapter, whichever tool wrote it.

    The ledger compares files, names, shapes, dtypes, config, tokenizer and every byte that the
    adapter does not touch; the oracle holds every changed tensor against the float64 formula and
    tells rounding from mistakes; on request the forward tier runs the merged model against the
    unmerged one. What could not be checked is never reported as right.

    Args:
        base: As in ``merge``.
        adapter: As in ``merge``.
        merged: Folder or weight file of the merged model, or an ``.onnx`` graph of it, which is run
            beside the unmerged model instead (needs transformers); of an encoder-decoder's graphs
            any one, the others beside it. A graph that swaps adapters is run with the one that is
            called as ``adapter`` is.
        level: "full" compares every element, "fast" sampled rows of every changed tensor.
        forward: Run the model too, merged and unmerged (needs transformers).
        prompts: Texts for that; none: generated inputs.
        budget: Largest difference that a graph may have, relative to the largest expected value,
            in place of the measured noise; quantised graphs need one. Of a cache its root mean
            square is held to it, not single elements.
        dtype: Type that all floating-point tensors should have; None: as the manifest says, else
            the base's. So for the next ones.
        strength: As in ``merge``.
        weights: As in ``merge``.
        zero_norm: As in ``merge``.
        map_prefix: As in ``merge``.
        fan_in_fan_out: As in ``merge``.
        threads: Workers; None: one per CPU.
        progress: Called with elements done and in all, from worker threads.
        **reading: As in ``load_adapter``; ``allow_pickle`` for the merged model as well.

    Returns:
        The report; its ``exit_code`` is 0 for right, 1 for wrong, 3 for could not check.

    Raises:
        DoraExportError: Base, adapter or options are refused, so that there is nothing to hold the
            merged model against.
    """
    started = time.monotonic()
    _one_of("level", level, ("fast", "full"))
    options = ReadOptions(**reading)
    merged_path = locate(merged, "merged model")
    graph = merged_path.suffix == ".onnx"
    if budget is not None and not (graph and budget > 0 and math.isfinite(budget)):
        raise DoraExportError(
            f"--budget {budget}: expected a positive number and an ONNX graph to hold to it. Leave "
            "the option out to allow the measured noise."
        )
    subject = None if graph else open_subject(merged_path, allow_pickle=options.allow_pickle)
    given = {
        "dtype": _output_dtype(dtype),
        "strength": None if strength is None else _factor("strength", strength),
        "weights": tuple(_factor("weight", weight) for weight in weights) or None,
        "zero_norm": zero_norm and _one_of("zero_norm", zero_norm, ("refuse", "zero", "keep-base")),
        "map_prefix": naming.parse_map_prefix(map_prefix) or None,
        "fan_in_fan_out": fan_in_fan_out,
    }
    said = subject.manifest if subject else manifest.beside_graph(merged_path)
    settings, notes = manifest.settings_of(said, given)
    plan, _ = _plan(base, adapter, options, settings, VERIFY)
    tiers: list[TierResult] = []
    findings: list[Finding] = []
    tensors: tuple[TensorResult, ...] = ()
    if subject is not None:
        sources, workers = _sources(side_files.collect(plan)), _positive("threads", threads)
        checked = check(plan, subject, sources, level, threads=workers, progress=progress)
        tiers, findings, tensors = [*checked.tiers], [*checked.findings], checked.tensors
    else:
        from dora_export.verification.graph import check_graph  # noqa: PLC0415 - loads torch

        swapped = _swapped(plan, merged_path, said)
        tier, found = check_graph(
            plan, merged_path, adapter=swapped, prompts=prompts, budget=budget
        )
        notes = (*notes, f"run with {shown(swapped.name)}") if swapped else notes
        tiers, findings = [tier], [*found]
    if forward and subject is not None:
        from dora_export.verification.forward import check_forward  # noqa: PLC0415 - loads torch

        tier, found = check_forward(plan, subject.path, prompts=prompts)
        tiers.append(tier)
        findings += found
    return VerifyReport(
        base=plan.base.path,
        adapters=tuple(a.path for a in plan.adapters),
        merged=merged_path,
        level=level,
        maker=subject.maker if subject is not None else "an ONNX exporter",
        method=plan.method,
        tiers=tuple(tiers),
        findings=in_order(tuple(findings)),
        tensors=tensors,
        notes=(*notes, *plan.notes, *plan.warnings, *doubts(plan)),
        seconds=time.monotonic() - started,
        peak_rss_bytes=peak_rss(),
    )


def _swapped(plan: Plan, graph: Path, said: Mapping[str, Any] | None) -> Path | None:
    """Return the file that holds a plan's adapter for a graph that swaps them, by its name.

    None where the manifest beside the graph, if any, does not say that it swaps adapters.

    Raises:
        DoraExportError: It has no adapter of that name.
    """
    made = said.get("onnx") if said is not None else None
    if not isinstance(made, dict) or made.get("way") != "adapters":
        return None
    from dora_export.onnx.swappable import adapter_files, adapter_names  # noqa: PLC0415 - as above

    files = adapter_files(graph.parent, made)
    if len(plan.adapters) != 1:
        raise DoraExportError(
            f"{graph}: runs one adapter at a time, of {', '.join(files)}. Pass one."
        )
    (name,) = adapter_names((plan,))
    if name not in files:
        raise DoraExportError(
            f"{graph}: its adapters are {', '.join(files)}; none is called '{name}'. Pass one of "
            "them, in a folder or file of that name."
        )
    return files[name]


def _sources(beside: Iterable[side_files.SideFile]) -> dict[str, Source]:
    return {file.name: Source(file.source, file.owner) for file in beside}


@faults_told()
@links_followed
def inspect(
    adapter: PathLike,
    base: PathLike | None = None,
    *,
    map_prefix: Iterable[str] = (),
    **reading: Unpack[Reading],
) -> InspectReport:
    """Return what an adapter is and, with a base, whether and how it fits.

    Reads no tensor; with a base, some lines of those that DoRA changes.

    Args:
        adapter: Folder, file or hub id.
        base: Base model to hold it against, or None.
        map_prefix: As in ``merge``.
        **reading: As in ``load_adapter``.

    Raises:
        InputError: Something is missing or malformed.
        AdapterError: The adapter is refused by name. A base that does not fit is no error: the
            report says why.
    """
    options = ReadOptions(**reading)
    path, base_path = locate(adapter, "adapter"), None if base is None else locate(base, "base")
    with roles_told(base_path, [path], options, INSPECT):
        found, checkpoint = read_adapter(path, options), None
        if base_path is not None:
            checkpoint = open_checkpoint(
                base_path, allow_pickle=options.allow_pickle, variant=options.variant
            )
    report = InspectReport(
        path=found.path,
        format=found.format,
        facts=dict(found.facts),
        kinds=dict(Counter(u.kind for u in found.updates)),
        parameters=sum(t.size for t in found.tensors.values()),
        nbytes=sum(t.nbytes for t in found.tensors.values()),
        base_name=found.base_name,
        modules=dict(Counter(_module(u) for u in found.updates)),
        engines=engines(found),
        notes=(
            *(f"'{k}' ignored: {why}" for k, why in found.ignored.items()),
            *ways_out(found),
        ),
        warnings=found.doubts,
    )
    checkpoint = checkpoint or found.own_base
    if checkpoint is None:
        return report
    return _held_against(report, found, checkpoint, map_prefix)


def _held_against(
    report: InspectReport, found: Adapter, checkpoint: Checkpoint, map_prefix: Iterable[str]
) -> InspectReport:
    try:
        settings = Settings(map_prefix=naming.parse_map_prefix(map_prefix))
        plan = plan_merge(checkpoint, found, settings)
        doubted = refuse_implausible(plan)
    except PlanError as error:
        return replace(report, base=checkpoint.path, fits=False, misfit=str(error))
    return replace(
        report,
        base=checkpoint.path,
        fits=True,
        merged=sum(s.status not in ("unchanged", "cast") for s in plan.steps),
        output_bytes=plan.output_bytes,
        notes=(*report.notes, *plan.notes),
        warnings=(*plan.warnings, *doubted),
    )


def _module(update: Update) -> str:
    module = update.target.rpartition(".")[0]
    if is_flat(module):
        return prefix_of(module)  # a flattened path has no last segment
    parent, _, last = module.rpartition(".")
    # "to_out.0" rather than "0"
    named = [part for part in (parent.rpartition(".")[2], last) if part]
    return ".".join(named) if last.isdigit() else last or update.target


def _plan(
    base: PathLike,
    adapter: PathLike | Sequence[PathLike] | None,
    options: ReadOptions,
    settings: Settings,
    usage: str = MERGE,
) -> tuple[Plan, inputs.Stamps]:
    """Return the plan, and how the inputs were before anything of them was read."""
    if adapter is None:
        path = locate(base, "base")
        before = inputs.seen(path)
        found = _with_own_base(path, options, usage)
        assert found.own_base is not None, "Bug: _with_own_base() has checked it"
        return plan_merge(found.own_base, found, settings), before
    adapters = [adapter] if isinstance(adapter, str | os.PathLike) else list(adapter)
    if not adapters:
        raise AdapterError(f"no adapter given. Usage: {usage}.")
    base_path = locate(base, "base")
    paths = [locate(one, "adapter") for one in adapters]
    several.refuse_repeated(paths)
    before = {k: v for path in (base_path, *paths) for k, v in inputs.seen(path).items()}
    with roles_told(base_path, paths, options, usage):
        checkpoint = open_checkpoint(
            base_path, allow_pickle=options.allow_pickle, variant=options.variant
        )
        read = read_adapters(paths, options)
    return plan_merge(checkpoint, read, settings), before


def _with_own_base(path: Path, options: ReadOptions, usage: str) -> Adapter:
    """Read a file that holds base and adapter in one."""
    try:
        found = read_adapter(path, options)
    except AdapterError as error:
        if path.is_dir() or "known format" in str(error):
            raise AdapterError(
                f"{path}: no adapter given, and this holds none of its own. Usage: {usage}."
            ) from error
        raise
    if found.own_base is None:
        raise AdapterError(f"{path}: an adapter without its base. Usage: {usage}.")
    return found


@contextmanager
def _written(
    plan: Plan,
    stage: Stage,
    resources: Resources,
    progress: Progress | None,
    ahead: Ahead,
    *,
    sync: bool,
) -> Iterator[None]:
    """Write the weights, run the block, and wait until they are on the disk, with ``sync``."""
    if stage.published:
        yield
        return
    total, done, counting = plan.output_bytes, 0, threading.Lock()

    def on_bytes(count: int) -> None:
        nonlocal done
        with counting:  # workers report side by side
            done += count
            if progress is not None:
                progress(done, total)

    def on_finished(file: int, start: int, stop: int) -> None:
        ahead.written(file, start, stop, sink.has)

    names = [file.name for file in plan.files]
    held = [stage.held.get(file.name, Ranges()) for file in plan.files]
    sizes = [file.nbytes for file in plan.files]
    sink = FileSink(
        stage.folder, names, sizes, held, stage.record, sync=sync, on_finished=on_finished
    )
    with sink:
        for position, ranges in enumerate(held):
            for start, stop in ranges:
                on_finished(position, start, stop)
        for position, file in enumerate(plan.files):
            sink.write_header(position, file.header)
            on_bytes(len(file.header))
        Engine(plan, sink, resources, on_bytes).run()
        sink.flush()
        yield


def _report(
    plan: Plan,
    target: Path,
    dry_run: bool,
    beside: tuple[side_files.SideFile, ...],
    total: int,
    memory: int,
    seconds: float,
    checked: Checked | None,
    resumed: int,
) -> MergeReport:
    changed = [s for s in plan.steps if s.status not in ("unchanged", "cast")]
    used = {key for s in changed for key in s.consumes}
    tensors = plan.adapter_tensors
    repeats = set(tensors) - used - set(plan.ignored)
    magnitudes = [str(a.facts.get("magnitude", "none")) for a in plan.adapters]
    worst = checked.worst if checked else None
    return MergeReport(
        output=target,
        dry_run=dry_run,
        adapters=tuple(a.path for a in plan.adapters),
        weights=plan.weights,
        adapter_format=", ".join(dict.fromkeys(a.format for a in plan.adapters)),
        method=plan.method,
        magnitude=", ".join(dict.fromkeys(magnitudes)),
        tensors=dict(Counter(s.status for s in plan.steps)),
        adapter_tensors=len(tensors),
        adapter_tensors_used=len(used) + len(repeats),
        ignored=dict(plan.ignored),
        files=tuple(f.name for f in plan.files),
        side_files=tuple(f.name for f in beside),
        output_bytes=total,
        memory_bytes=memory,
        peak_rss_bytes=peak_rss(),
        seconds=seconds,
        precision=plan.settings.precision,
        dtypes=(_dtype_names(s.source.dtype if s.name not in plan.base.tensors
                             else plan.base.tensors[s.name].dtype for s in changed),
                _dtype_names(s.dtype for s in changed)),
        names="; ".join(dict.fromkeys(plan.rules)),
        verified=checked.level if checked else "none",
        worst_ulp=worst.max_ulp if worst else None,
        worst_tensor=worst.name if worst else None,
        resumed_bytes=resumed,
        weight_bytes=plan.output_bytes,
        left_behind=side_files.left_behind(plan),
        notes=plan.notes,
        warnings=plan.warnings,
    )  # fmt: skip


def _dtype_names(dtypes: Iterable[DType]) -> str:
    return "+".join(sorted({d.name for d in dtypes}))


def peak_rss() -> int | None:
    """Return the most memory this process has held, in bytes, or None where unknown."""
    status = Path("/proc/self/status")
    if status.is_file():
        # Not ru_maxrss: on Linux that starts at the size of whatever process started this one.
        found = re.search(r"^VmHWM:\s*(\d+) kB", status.read_text(), re.MULTILINE)
        return int(found[1]) * 1024 if found else None
    if sys.platform == "darwin":
        import resource  # noqa: PLC0415 - not on Windows

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return None


def _output_dtype(word: str | None) -> DType | None:
    if word is None:
        return None
    if word.lower() not in OUTPUT_WORDS:
        raise DoraExportError(
            f"--dtype {word}: unknown. Expected one of {', '.join(OUTPUT_WORDS)}."
        )
    return OUTPUT_WORDS[word.lower()]


def _size(size: int | str | None) -> int | None:
    if size is None:
        return None
    match = re.fullmatch(r"\s*([\d.]+)\s*([A-Za-z]*)\s*", str(size))
    if match is None or match[2].lower() not in SIZES or match[1].count(".") > 1:
        raise DoraExportError(f"--max-shard-size {size}: expected a size, e.g. 5GB or 500MB.")
    nbytes = int(float(match[1]) * SIZES[match[2].lower()])
    if nbytes < 1:
        raise DoraExportError(f"--max-shard-size {size}: must be at least one byte.")
    return nbytes


def _positive(name: str, value: int | None) -> int | None:
    if value is not None and value < 1:
        raise DoraExportError(f"--{name} {value}: must be at least 1.")
    return value


def _factor(name: str, value: float) -> float:
    if not (isinstance(value, int | float) and abs(value) <= FACTOR):
        raise DoraExportError(f"--{name} {value}: expected a finite number, at most {FACTOR:,.0f}.")
    return float(value)


def _one_of(name: str, value: Any, allowed: Sequence[str]) -> Any:
    if value not in allowed:
        raise DoraExportError(f"--{name.replace('_', '-')} {value}: expected {', '.join(allowed)}.")
    return value
