"""One graph of the base whose adapters are files that the run time swaps.

Nothing is merged: the graph gets optional inputs around every linear layer that one of the adapters
changes (``slots``), and each adapter becomes a file with values for them (``slot_values``), which
onnxruntime activates for a single run. DoRA and LoRA go side by side.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dora_export import inputs as watched
from dora_export.engine import check_adapter
from dora_export.errors import InputError, VerifyError, listing, shown
from dora_export.onnx import files, into
from dora_export.onnx.graph_file import Graph, open_graph
from dora_export.onnx.matching import Weight, weights_of
from dora_export.onnx.matching_graph import match_graph
from dora_export.onnx.model import BUDGETS, GraphError, Made, Padding, Parity, Request
from dora_export.onnx.slot_graph import Inputs, names_of, with_slots
from dora_export.onnx.slot_values import (
    SlotValues,
    Swapped,
    changed,
    narrowed,
    refuse_unswappable,
    slot_values,
    swapped,
    uncovered,
)
from dora_export.onnx.slots import Slot, find_slots
from dora_export.plan import Plan, plan_unchanged
from dora_export.storage.paths import inside
from dora_export.verification.parallel import each
from dora_export.verification.plausible import refuse_implausible
from dora_export.verification.runner import OnnxRuntime, Runner, is_quantised
from dora_export.writers.files import write_small
from dora_export.writers.staging import MANIFEST

FOLDER = "adapters"
SUFFIX = ".onnx_adapter"
VERSION = 1  # of the files' layout


@dataclass(frozen=True)
class Bundle:
    """One adapter as it is written.

    Attributes:
        name: What it is called at run time.
        plan: Its merge with the base, which is not carried out.
        values: What it puts into the slots that it touches, by the slots' names.
    """

    name: str
    plan: Plan
    values: Mapping[str, SlotValues]


def check(plans: Sequence[Plan]) -> tuple[Sequence[str], list[str]]:
    """Refuse adapters that cannot be swapped, from what they hold alone.

    Returns:
        Their names, and what is doubtful about them.

    Raises:
        GraphError: Two have one name, or one does more than can be swapped.
        DoraExportError: One is not finite, or cannot have been trained on this base.
    """
    names, doubts = adapter_names(plans), []
    for name, plan in zip(names, plans, strict=True):
        refuse_unswappable(plan)
        check_adapter(plan)
        doubts += [f"'{shown(name)}': {doubt}" for doubt in refuse_implausible(plan)]
    return names, doubts


def make(request: Request, traced: Path | None = None) -> Made:
    """Write a graph with inputs for adapters, and each adapter, into ``request.folder``.

    Args:
        request: A plan for every adapter; the graph of the base as ``into``.
        traced: The graph of the base within ``request.folder``, where it was made for this; then
            it is changed in place.

    Raises:
        GraphError: An adapter does more than can be swapped, or the graph has no place for it.
        InputError: The graph or an adapter cannot be read.
    """
    path = traced or request.into
    assert path is not None, "Bug: swapping without a graph"
    if traced is None:
        into.refuse_merged(path, allow=request.allow_merged_base)
    names, doubts = check(request.plans)
    graph = open_graph(path)
    read = [] if traced else [path, *graph.data_files.values()]  # a traced one is written anew
    for plan in request.plans:
        read += [*plan.base.sources, *(f for a in plan.adapters for f in a.files)]
    with watched.held(watched.watch(list(dict.fromkeys(read)), {})):
        request.on_stage("looking for the base in the graph")
        matched = match_graph(graph, _weights(request.plans), threads=request.threads)
        into.refuse_unmatched(request.plan, matched, request.allow_missing)
        slots = find_slots(graph, matched)
        _refuse_uncovered(graph, request, slots)
        request.on_stage("computing norms")
        bundles = [
            _bundle(name, plan, slots) for name, plan in zip(names, request.plans, strict=True)
        ]
        places = _inputs(slots, bundles)
        request.on_stage("writing the graph and the adapters")
        with_slots(graph, slots, places, request.folder)
        request.on_stage("checking what was written")
        written_graph = open_graph(request.folder / path.name)
        _refuse_changed(graph, written_graph, places)
        known = files.check_again(written_graph.path, written_graph.model, graph.path, graph.model)
        digests = _digests(graph, request, copied=traced is None)
    (request.folder / FOLDER).mkdir()
    written = {b.name: _write(b, slots, places, request.folder) for b in bundles}
    return Made(
        graphs=(path.name,),
        facts=_facts(graph, slots, places, written),
        parity=tuple(_parity(path.name, graph, bundles, request, traced is not None)),
        notes=("one adapter at a time: onnxruntime takes two at once without an error and computes "
               "something else; dora_export.AdapterSession takes one",
               *into.notes_on_parity(graph), *known),
        digests=digests,
        warnings=tuple(doubts),
    )  # fmt: skip


def _digests(graph: Graph, request: Request, *, copied: bool) -> dict[str, str]:
    """Return the SHA-256 of the written files; those that were copied are held to the originals.

    Raises:
        VerifyError: A copy is not the same.
    """
    names = [graph.path.name, *graph.data_files]
    found = each(files.sha256, [request.folder / name for name in names], request.threads)
    written = dict(zip(names, found, strict=True))
    if copied:
        own = each(files.sha256, list(graph.data_files.values()), request.threads)
        for name, digest in zip(graph.data_files, own, strict=True):
            if written[name] != digest:
                raise VerifyError(
                    f"{name}: its copy is not what it was copied from. Not published."
                )
    return written


def _refuse_changed(graph: Graph, written: Graph, places: Mapping[str, Inputs]) -> None:
    """Refuse a written graph that is more than the given one with inputs for adapters.

    Raises:
        VerifyError: A tensor, input or output is another, or an adapter's rank is not open.
    """
    problems = []
    held = {(t.scope, t.name): t for t in written.tensors}
    for tensor in graph.tensors:
        found = held.get((tensor.scope, tensor.name))
        same = found is not None and (found.shape, found.data_type, found.nbytes) == (
            tensor.shape, tensor.data_type, tensor.nbytes)  # fmt: skip
        if not same:
            problems.append(f"{tensor.where}: is not as it was")
    inner, outer = graph.model.graph, written.model.graph
    values = [*inner.input, *inner.output]
    now = {v.name: v for v in (*outer.input, *outer.output)}
    problems += [f"'{shown(v.name)}': its type or its axes are not as they were"
                 for v in values if now.get(v.name) != v]  # fmt: skip
    for one in places.values():
        for name, axis in ((one.lora_A, 1), (one.lora_B, 0)):
            dims = now[name].type.tensor_type.shape.dim if name in now else []
            if len(dims) != 2 or not dims[axis].dim_param:
                problems.append(f"'{shown(name)}': its rank is not open")
    if problems:
        raise VerifyError(
            f"{written.path.name}: the written graph is not what was planned:{listing(problems)}\n"
            "Not published."
        )


def adapter_names(plans: Sequence[Plan]) -> tuple[str, ...]:
    """Return what each adapter is called at run time: its file's or folder's name, made safe.

    Raises:
        GraphError: Two would have one name.
    """
    names = []
    for plan in plans:
        path = plan.adapters[0].path.absolute()
        stem = path.name if path.is_dir() else path.stem
        names.append(re.sub(r"[^A-Za-z0-9._-]+", "_", stem).strip("._-") or "adapter")
    twice = sorted({n for n in names if [m.lower() for m in names].count(n.lower()) > 1})
    if twice:
        raise GraphError(
            f"--adapters: two adapters would be called '{twice[0]}'. Rename the folder of one."
        )
    return tuple(names)


def adapter_files(folder: Path, facts: Mapping[str, Any]) -> dict[str, Path]:
    """Return the files that onnxruntime reads a folder's adapters from, by name.

    Args:
        folder: What ``make`` has written.
        facts: What its manifest says of it.

    Raises:
        InputError: The manifest is damaged, or names a file outside the folder.
    """
    adapters = facts.get("adapters")
    where = folder / MANIFEST
    try:
        return {str(n): inside(folder, said["file"], where) for n, said in adapters.items()}  # type: ignore[union-attr]
    except (AttributeError, KeyError, TypeError) as error:
        raise InputError(
            f"{where}: does not say where the graph's adapters are. Pass the folder as it was "
            "published."
        ) from error


def _weights(plans: Sequence[Plan]) -> tuple[Weight, ...]:
    """Return the base's tensors, those marked that any of the adapters changes."""
    found: dict[str, Weight] = {}
    for plan in plans:
        for weight in weights_of(plan):
            if weight.changed or weight.name not in found:
                found[weight.name] = weight
    return tuple(found.values())


def _refuse_uncovered(graph: Graph, request: Request, slots: Sequence[Slot]) -> None:
    problems = [
        f"{plan.adapters[0].path.name}: {shown(name)}"
        for plan in request.plans
        for name in uncovered(plan, slots)
        if not any(name == a or name.startswith(f"{a}.") for a in request.allow_missing)
    ]
    if problems:
        raise GraphError(
            f"{graph.path}: no linear layer for all rows of what adapters change:"
            f"{listing(problems)}\nLeave --adapters out to merge, or name on purpose missing parts "
            "with --allow-missing."
        )


def _bundle(name: str, plan: Plan, slots: Sequence[Slot]) -> Bundle:
    held = {w.name for slot in slots for w in slot.weights}
    found: dict[str, Swapped] = {
        step.name: swapped(step, plan) for step in changed(plan) if step.name in held
    }
    values = {slot.name: slot_values(slot, found) for slot in slots}
    return Bundle(name, plan, {n: v for n, v in values.items() if v is not None})


def _inputs(slots: Sequence[Slot], bundles: Sequence[Bundle]) -> dict[str, Inputs]:
    """Return the inputs that each slot needs for all of the adapters."""
    places = {}
    for slot in slots:
        here = [b.values[slot.name] for b in bundles if slot.name in b.values]
        by_output = any(v.output_factor is not None for v in here)
        by_input = any(v.input_factor is not None for v in here)
        if by_input and slot.quantises_inputs:
            raise GraphError(
                f"{shown(slot.name)}: an adapter has magnitudes per input, and the graph quantises "
                f"the input of this {slot.node.op_type} once for all who take it. Quantise the "
                "base's weights only (MatMulNBits), or leave --adapters out to merge the adapter."
            )
        places[slot.name] = Inputs(
            f"{slot.name}.lora_A",
            f"{slot.name}.lora_B",
            f"{slot.name}.output_factor" if by_output else None,
            f"{slot.name}.input_factor" if by_input else None,
        )
    return places


def parameters(
    bundle: Bundle, slots: Sequence[Slot], places: Mapping[str, Inputs]
) -> Iterator[tuple[str, NDArray[Any]]]:
    """Yield the values of every input that a bundle does not leave at its default."""
    for slot in slots:
        if slot.name not in bundle.values:
            continue
        values, names = bundle.values[slot.name], places[slot.name]
        yield names.lora_A, narrowed(values.lora_A, slot)
        yield names.lora_B, narrowed(values.lora_B, slot)
        ones = (np.ones(slot.outputs), np.ones(slot.inputs))
        if names.output_factor is not None:
            given = values.output_factor
            yield names.output_factor, narrowed(ones[0] if given is None else given, slot)
        if names.input_factor is not None:
            given = values.input_factor
            yield names.input_factor, narrowed(ones[1] if given is None else given, slot)


def _write(
    bundle: Bundle, slots: Sequence[Slot], places: Mapping[str, Inputs], folder: Path
) -> dict[str, Any]:
    """Write an adapter as onnxruntime and as numpy read it; return what the manifest says."""
    import onnxruntime as ort  # noqa: PLC0415 - a second to import

    arrays = dict(parameters(bundle, slots, places))
    path = folder / FOLDER / f"{bundle.name}{SUFFIX}"
    file = ort.AdapterFormat()
    file.set_adapter_version(VERSION)
    file.set_model_version(VERSION)
    file.set_parameters({n: ort.OrtValue.ortvalue_from_numpy(a) for n, a in arrays.items()})
    file.export_adapter(str(path))
    _settle(path)
    table = folder / FOLDER / f"{bundle.name}.npz"
    # mypy only: numpy's annotations take what ** gives for options of savez itself
    np.savez(str(table), **arrays)  # type: ignore[arg-type]
    _settle(table)
    stored = ort.AdapterFormat.read_adapter(str(path))  # up to 1.23 its parameters die with it
    back = stored.get_parameters()
    lost = [n for n, a in arrays.items() if n not in back or not np.array_equal(back[n].numpy(), a)]
    if lost or len(back) != len(arrays):
        raise VerifyError(f"{path.name}: onnxruntime wrote {shown((lost or ['more'])[0])} wrong.")
    adapter = bundle.plan.adapters[0]
    return {
        "file": f"{FOLDER}/{path.name}",
        "bytes": path.stat().st_size,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "npz": f"{FOLDER}/{table.name}",
        "format": adapter.format,
        "method": bundle.plan.method,
        "slots": sorted(bundle.values),
        "inputs": sorted(arrays),
    }


def _settle(path: Path) -> None:
    """Put a file that a library has written on the disk, with the mode of a new file."""
    data = path.read_bytes()
    path.unlink()
    write_small(path, data)


def _facts(
    graph: Graph,
    slots: Sequence[Slot],
    places: Mapping[str, Inputs],
    written: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    return {
        "graph": graph.path.name,
        "slots": {
            slot.name: {
                "weights": [w.name for w in slot.weights],
                "operator": slot.node.op_type,
                "shape": [slot.inputs, slot.outputs],
                "dtype": slot.dtype.name,
                "inputs": list(names_of(places[slot.name])),
            }
            for slot in slots
        },
        "adapters": dict(written),
    }


def _parity(
    name: str, graph: Graph, bundles: Sequence[Bundle], request: Request, traced: bool
) -> Iterator[Parity]:
    """Yield what to compare: the base without an adapter, and every adapter with its own model.

    What quantising costs is measured on the graph of the base; one that was traced and quantised
    for this is, without an adapter, that graph, and is itself held to the budget of a traced one.
    """
    if into.own_names(graph):
        return
    padding: Padding = "none" if into.counts_tokens(graph) else "any"
    outputs = [o.name for o in graph.model.graph.output if not o.name.startswith("present")]
    unmerged: Callable[[Path], Runner] | None = None
    if is_quantised(graph.model):
        unmerged = OnnxRuntime if traced else lambda _: OnnxRuntime(graph.path)
    bare = plan_unchanged(request.plan.base, request.plan.settings)
    budget = BUDGETS.get(request.options.quantize or "") if traced else None
    yield Parity(name, bare, outputs=outputs, padding=padding, unmerged=unmerged, budget=budget)
    for bundle in bundles:
        file = f"{FOLDER}/{bundle.name}{SUFFIX}"

        def runner(path: Path, file: str = file) -> OnnxRuntime:
            return OnnxRuntime(path, adapter=path.parent / file)

        yield Parity(
            name, bundle.plan, runner=runner, outputs=outputs, padding=padding,
            unmerged=unmerged,
        )  # fmt: skip
