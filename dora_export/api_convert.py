"""``convert``: an adapter in another format, exactly; or the plain LoRA nearest to it."""

from __future__ import annotations

import io
import time
import uuid
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dora_export import api, inputs, naming, nearest_lora, own_norm, row_orders
from dora_export._version import __version__
from dora_export.adapter_writers import WRITERS, Source, Written
from dora_export.adapters import Adapter, Reading, ReadOptions, read_adapter
from dora_export.checkpoints import locate, open_checkpoint
from dora_export.engine import check_adapter
from dora_export.errors import AdapterError, DoraExportError, listing, shown
from dora_export.machine import faults_told
from dora_export.plan import Plan, Settings, plan_merge
from dora_export.report import ConvertReport, LayerLoss
from dora_export.roles import roles_told
from dora_export.storage.paths import links_followed
from dora_export.tensors import BY_TORCH
from dora_export.update import Update
from dora_export.verification.plausible import refuse_implausible
from dora_export.writers import manifest, place, side_files
from dora_export.writers.files import write_small
from dora_export.writers.journal import FORMAT, FORMAT_LABEL, Job
from dora_export.writers.staging import MANIFEST, find_leftover, staged
from dora_export.writers.tensor_file import write_tensors

if TYPE_CHECKING:
    from typing_extensions import Unpack

CONFIG = "adapter_config.json"
LORA = "lora"
USAGE = "dora-export convert ADAPTER --base BASE --to FORMAT -o OUT"
TARGETS = (*(writer.name for writer in WRITERS), LORA)
SIDE_BYTES = 1 << 20  # room for configs


@faults_told()
@links_followed
def convert(
    adapter: api.PathLike | Sequence[api.PathLike],
    to: str,
    output: api.PathLike,
    *,
    base: api.PathLike | None = None,
    rank: int | None = None,
    weights: Sequence[float] = (),
    map_prefix: Iterable[str] = (),
    fan_in_fan_out: bool | None = None,
    threads: int | None = None,
    **reading: Unpack[Reading],
) -> ConvertReport:
    """Write an adapter in another format, or as the plain LoRA nearest to it.

    To a format: tensors are only rearranged, bit for bit, and the converted adapter merges to the
    same bytes; what the format cannot hold exactly is refused by name. Two things are computed for
    the base and rounded once, and the report says so: biases that the adapter's trainer scales
    along, which go to PEFT as trained ones; B and magnitudes of ai-toolkit's DoRA whose alpha is
    not the rank.

    To "lora": for every layer the product of rank ``rank`` nearest to ``W' - W`` in the Frobenius
    norm, in float32, as a PEFT folder without magnitudes; the report says what each layer loses.

    Args:
        adapter: Folder, file or hub id; for "lora" also several, as in ``merge``.
        to: One of ``TARGETS``.
        output: Folder to publish; must not exist, or be empty.
        base: The base model; needed where rows or names depend on it, and for "lora".
        rank: For "lora".
        weights: For "lora", as in ``merge``.
        map_prefix: As in ``merge``.
        fan_in_fan_out: As in ``merge``.
        threads: Workers; None: one per CPU.
        **reading: As in ``load_adapter``.

    Raises:
        DoraExportError: See ``dora_export.errors``; nothing is published then.
    """
    started = time.monotonic()
    if to not in TARGETS:
        raise DoraExportError(f"--to {to}: unknown. Expected one of {', '.join(TARGETS)}.")
    settings = Settings(
        weights=tuple(map(float, weights)),
        map_prefix=naming.parse_map_prefix(map_prefix),
        fan_in_fan_out=fan_in_fan_out,
    )
    options, target = ReadOptions(**reading), place.target_of(output)
    if to == LORA:
        report = _to_lora(adapter, target, base, rank, options, settings, threads)
    else:
        if rank is not None:
            raise DoraExportError(f"--rank {rank}: only --to {LORA} has a rank of its own.")
        report = _to_format(adapter, to, target, base, options, settings)
    return replace(report, seconds=time.monotonic() - started)


def _to_format(
    adapter: api.PathLike | Sequence[api.PathLike], to: str, target: Path,
    base: api.PathLike | None, options: ReadOptions, settings: Settings,
) -> ConvertReport:  # fmt: skip
    if not isinstance(adapter, str | bytes) and isinstance(adapter, Sequence):
        if len(adapter) != 1:
            raise AdapterError(
                f"{len(adapter)} adapters: only one can be converted exactly. Pass --to {LORA} "
                "--rank R for one LoRA in their place."
            )
        adapter = adapter[0]
    assert isinstance(adapter, str) or hasattr(adapter, "__fspath__"), "Bug: checked above"
    path = locate(adapter, "adapter")
    before = inputs.seen(path)
    with roles_told(None, [path], options, USAGE):
        found = read_adapter(path, options)
    writer = next(w for w in WRITERS if w.name == to)
    source, warnings = _source(found, base, options, settings, needs_paths=writer.needs_paths)
    written = writer.write(source)
    nbytes = sum(t.dtype.itemsize * _size(t.shape) for t in written.tensors)
    tokenizer = side_files.tokenizer_of(found.folder) if found.folder else {}
    stamps = inputs.watch([*found.files, *tokenizer.values()], before)
    rounded = bool(source.notes) or written.rounded
    content = {
        "schema": manifest.SCHEMA,
        "tool": {"name": "dora-export", "version": __version__},
        "converted": {
            "from": found.format,
            "path": found.path.name,
            "to": to,
            "exact": not rounded,
        },
    }
    places = {"adapter": found.path, **({"base": source.base.path} if source.base else {})}
    config = {} if written.config is None else {CONFIG: manifest.as_json(dict(written.config))}
    names = [written.weights, *config, MANIFEST]
    with _publishing(target, places, nbytes, names) as stage, inputs.held(stamps):
        _write(written, stage.folder)
        for name, file in tokenizer.items():
            side_files.copy(file, stage.folder / name)
        for name, text in config.items():
            write_small(stage.folder / name, text)
        write_small(stage.folder / MANIFEST, manifest.as_json(content))
    return ConvertReport(
        output=target,
        source_format=found.format,
        target=to,
        method=str(found.facts.get("method", "LoRA")),
        tensors=len(written.tensors),
        weights=written.weights,
        files=tuple(sorted([*names, *tokenizer])),
        nbytes=nbytes,
        rounded=rounded,
        notes=(*source.notes, *written.notes),
        warnings=warnings,
    )


def _source(
    found: Adapter, base: api.PathLike | None, options: ReadOptions, settings: Settings,
    *, needs_paths: bool,
) -> tuple[Source, tuple[str, ...]]:  # fmt: skip
    """Return the adapter with what the base decides about it, and what is left to doubt."""
    checkpoint = found.own_base
    if base is not None:
        checkpoint = open_checkpoint(
            locate(base, "base"), allow_pickle=options.allow_pickle, variant=options.variant
        )
    if checkpoint is None:
        if found.naming == "flat" and needs_paths:
            raise AdapterError(
                f"{found.path}: its names do not say where a module's name ends. Pass --base."
            )
        return Source(found, found.updates, None), found.doubts
    plan = plan_merge(checkpoint, found, settings)  # refuses an adapter of another base
    check_adapter(plan)
    warnings = (*plan.warnings, *refuse_implausible(plan))
    if found.naming == "flat":
        _refuse_parts(plan, found)
    steps = {key: step.name for step in plan.steps for key in step.consumes}
    names = {u.target: steps[key] for u in found.updates for key in u.source_keys if key in steps}
    shapes = {name: ref.shape for name, ref in checkpoint.tensors.items()}
    here = [replace(u, target=names.get(u.target, u.target)) for u in found.updates]
    ordered = row_orders.with_row_orders(here, shapes, checkpoint)
    ordered, notes = own_norm.in_terms_of_dora(ordered, checkpoint.tensors)
    if found.naming == "flat":
        whole = {u.target: u.target for u in ordered}
        return Source(found, ordered, checkpoint, whole, notes), warnings
    updates = tuple(_named(u, o.target) for u, o in zip(ordered, found.updates, strict=True))
    return Source(found, updates, checkpoint, names, notes), warnings


def _refuse_parts(plan: Plan, found: Adapter) -> None:
    """Refuse an adapter with layers that are not one layer each of this base, under its names."""
    places = Counter(c.source_keys[:1] for step in plan.steps for c in step.changes)
    whole = {
        c.source_keys[:1]
        for step in plan.steps
        for c in step.changes
        if (c.start, c.rows * c.columns) == (0, step.source.size)
    }
    keys = {u.target: u.source_keys[:1] for u in found.updates
            if u.kind in ("lora", "dora", "function")}  # fmt: skip
    parts = [t for t, key in keys.items() if places[key] > 1 or (places[key] and key not in whole)]
    if parts:
        raise AdapterError(
            f"{found.path}: {plan.base.path} has layers of the adapter in several parts, or as "
            f"parts of others:{listing(map(shown, parts))}\nPass a --base that has the layers that "
            "the adapter was trained on (a pipeline's folder), or merge the adapter instead."
        )


def _named(update: Update, target: str) -> Update:
    return replace(update, target=target)


def _to_lora(
    adapter: api.PathLike | Sequence[api.PathLike], target: Path, base: api.PathLike | None,
    rank: int | None, options: ReadOptions, settings: Settings, threads: int | None,
) -> ConvertReport:  # fmt: skip
    if rank is None or rank < 1:
        raise DoraExportError(f"--to {LORA}: needs --rank, at least 1, e.g. --rank 32.")
    if base is None:
        raise DoraExportError(f"--to {LORA}: needs --base, which magnitudes and norms belong to.")
    plan, before = api._plan(base, adapter, options, settings, USAGE)
    chosen = nearest_lora.layers(plan)
    entries = [entry for layer in chosen for entry in layer.entries(rank)]
    nbytes = sum(dtype.itemsize * _size(shape) for _, dtype, shape in entries)
    stamps = inputs.watch([*plan.base.sources, *plan.adapter_files], before)
    check_adapter(plan)
    doubts = refuse_implausible(plan)
    losses: list[LayerLoss] = []
    weights = "adapter_model.safetensors"
    names = [weights, CONFIG, MANIFEST]
    with _publishing(target, plan.inputs, nbytes, names) as stage, inputs.held(stamps):
        values = nearest_lora.approximate(plan, chosen, rank, losses, threads)
        write_tensors(stage.folder / weights, entries, values)
        config = nearest_lora.config(plan, chosen, rank)
        write_small(stage.folder / CONFIG, manifest.as_json(config))
        content = _lora_manifest(plan, rank, losses)
        write_small(stage.folder / MANIFEST, manifest.as_json(content))
    return ConvertReport(
        output=target,
        source_format=", ".join(dict.fromkeys(a.format for a in plan.adapters)),
        target=LORA,
        method=plan.method,
        tensors=len(entries),
        weights=weights,
        files=tuple(sorted(names)),
        nbytes=nbytes,
        rank=rank,
        layers=tuple(sorted(losses, key=lambda loss: loss.energy)),
        energy=nearest_lora.energy(losses),
        notes=plan.notes,
        warnings=(*plan.warnings, *doubts),
    )


def _lora_manifest(plan: Plan, rank: int, losses: Sequence[LayerLoss]) -> dict[str, Any]:
    return {
        "schema": manifest.SCHEMA,
        "tool": {"name": "dora-export", "version": __version__},
        "converted": {
            "from": [a.format for a in plan.adapters],
            "path": [a.path.name for a in plan.adapters],
            "weights": list(plan.weights),
            "base": plan.base.model_name,
            "to": LORA,
            "exact": False,
            "rank": rank,
            "energy": nearest_lora.energy(losses),
            "layers": [asdict(loss) for loss in losses],
        },
    }


def _publishing(target: Path, places: Mapping[str, Path], nbytes: int, names: Sequence[str]) -> Any:
    """Return the stage of a new folder, once nothing speaks against it."""
    leftover = find_leftover(target)
    place.check_way(target, names)
    place.check_place(target, places, force=False, leftover=leftover)
    place.check_space(target, nbytes + SIDE_BYTES, leftover)
    # Quick to make anew, so no run goes on with another's.
    job = Job({FORMAT_LABEL: FORMAT, "dora-export": __version__, "run": uuid.uuid4().hex}, {})
    return staged(target, job)


def _write(written: Written, folder: Path) -> None:
    path = folder / written.weights
    if path.suffix == ".safetensors":
        entries = [(t.name, t.dtype, t.shape) for t in written.tensors]
        write_tensors(path, entries, (t.raw() for t in written.tensors), written.metadata)
        return
    import torch  # noqa: PLC0415 - more than a second of import that other formats do without

    known = {dtype.name: name for name, dtype in BY_TORCH.items()}
    state = {
        t.name: torch.from_numpy(t.raw().copy()).view(getattr(torch, known[t.dtype.name]))
        for t in written.tensors
    }
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_small(path, buffer.getvalue())


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for n in shape:
        size *= n
    return size
