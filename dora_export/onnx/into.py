"""A graph of the base re-weighted: what the adapter changes is changed in its tensors.

No model code is run and nothing is traced. The graph's own tensors are found in the base by their
values (``matching``), which is proven before anything is written; the merge's rows then take the
place of the base's (``scatter``), and every other byte of the graph stays as it is.
"""

from __future__ import annotations

import shutil
import threading
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dora_export import inputs
from dora_export.checkpoints.folder import read_json
from dora_export.engine import Engine, Resources, check_adapter
from dora_export.errors import OutputError, listing, shown
from dora_export.onnx import files
from dora_export.onnx.assembly import TENSOR_BYTES
from dora_export.onnx.encodings import Int8
from dora_export.onnx.graph_file import Graph, StoredTensor, nodes, open_graph
from dora_export.onnx.hashing import Digests
from dora_export.onnx.layout import Layout, Place, lay_out
from dora_export.onnx.matching import Match, weights_of
from dora_export.onnx.matching_graph import Matched, match_graph
from dora_export.onnx.model import GraphError, GraphOptions, Made, Parity, Request
from dora_export.onnx.rewritten import recheck
from dora_export.onnx.scatter import OnWritten, Part, Rewriter, Scatter, parts_of, rewriting
from dora_export.plan import Plan
from dora_export.tensors import FileRange
from dora_export.verification.plausible import refuse_implausible
from dora_export.verification.runner import is_quantised
from dora_export.verification.together import opened
from dora_export.writers.files import FileSink
from dora_export.writers.side_files import TOKENIZER, WHOLE_TOKENIZER, SideFile, in_folder
from dora_export.writers.staging import MANIFEST

LEAST_BLOCK, MOST_BLOCK = 2 << 20, 16 << 20
COLUMNS = 1024  # rows of a piece that goes into columns: fewer make too many writes
# Names that the comparison with the unmerged model knows, beside those of a cache.
INPUTS = frozenset(
    """input_ids attention_mask position_ids token_type_ids inputs_embeds pixel_values
    pixel_mask input_features input_values decoder_input_ids decoder_attention_mask
    encoder_hidden_states encoder_outputs encoder_attention_mask""".split()
)
OUTPUTS = frozenset(
    """logits last_hidden_state pooler_output hidden_states start_logits end_logits
    image_embeds text_embeds logits_per_image logits_per_text encoder_last_hidden_state
    sentence_embedding token_embeddings""".split()
)
RUNS = 24  # of a tensor that are listed in the manifest; reordered ones have thousands


def make(request: Request) -> Made:
    """Write ``request.into`` with merged weights into ``request.folder``.

    Files keep their names and all their bytes but the values that the merge changes. Values are
    rounded once, to the type that the graph holds them in; quantised ones are quantised again by
    the graph's own parameters, and only where the base gives the graph's very bytes that way.

    Raises:
        GraphError: The graph does not hold all that the merge changes, or not as it can be told.
        InputError: The graph cannot be read, or is malformed.
        VerifyError: What was written is not what was planned.
    """
    assert request.into is not None, "Bug: re-weighting without a graph"
    plan, path = request.plan, request.into
    _check_options(request)
    refuse_merged(path, allow=request.allow_merged_base)
    check_adapter(plan)
    doubts = refuse_implausible(plan)
    graph = open_graph(path)
    adapters = [file for adapter in plan.adapters for file in adapter.files]
    read = [path, *graph.data_files.values(), *plan.base.sources, *adapters]
    with inputs.held(inputs.watch(read, {})):
        request.on_stage("looking for the base in the graph")
        matched = match_graph(graph, weights_of(plan), threads=request.threads)
        refuse_unmatched(plan, matched, request.allow_missing)
        proofs = _each_once(matched)
        changed, parameters = with_new_ranges(plan, matched, proofs, request.threads)
        holders = [lines.tensor for m in changed for lines in m.holders]
        layout = lay_out(graph, [*holders, *parameters])
        _check_space(request.folder, layout)
        request.on_stage("writing merged weights into the graph")
        names = [path.name, *graph.data_files]
        with (
            Digests(
                [path, *graph.data_files.values()],
                [request.folder / name for name in names],
                layout.sizes,
            ) as digests,
            FileSink(
                request.folder,
                layout.names,
                layout.sizes,
                sync=request.sync,
                read_again=True,
                on_finished=digests.finished,
            ) as sink,
        ):
            write(plan, changed, parameters, layout, request, sink, digests.keep_up)
            # While the disk is still busy with it: checking and hashing take the processor only.
            request.on_stage("checking what was written")
            found = recheck(
                plan, graph, changed, parameters, layout, request.folder, threads=request.threads
            )
            known = files.check_again(
                request.folder / path.name, found.model, graph.path, graph.model
            )
            were, are = (dict(zip(names, d, strict=True)) for d in digests.results())
    return Made(
        graphs=(graph.path.name,),
        facts=_facts(graph, matched, proofs, were),
        parity=_parity(plan, graph),
        tiers=found.tiers,
        notes=(*_notes(matched), *known),
        digests=are,
        warnings=(*doubts, *(f"not in the graph, as allowed: {shown(n)} ({w})"
                             for n, w in matched.missing.items())),
    )  # fmt: skip


def _check_options(request: Request) -> None:
    given, default = request.options, GraphOptions()
    said = [f"--{n.replace('_', '-')}" for n in GraphOptions.__dataclass_fields__
            if getattr(given, n) != getattr(default, n)]  # fmt: skip
    if said:
        raise GraphError(
            f"{', '.join(said)}: without meaning for --into, which keeps the graph as it is. "
            "Leave it out, or leave --into out to trace."
        )
    if all(s.status in ("unchanged", "cast") for s in request.plan.steps):
        raise GraphError(
            f"--into {request.into}: no adapter given, so nothing would change. "
            "Usage: dora-export onnx BASE ADAPTER --into GRAPH -o OUT."
        )


def refuse_merged(path: Path, *, allow: bool) -> None:
    """Refuse a graph that this tool has merged an adapter into already.

    Raises:
        GraphError: A manifest beside it says so, and ``allow`` is false.
    """
    for folder in (path.parent, path.absolute().parent.parent):
        if allow or not (folder / MANIFEST).is_file():
            continue
        said = read_json(folder / MANIFEST)
        if isinstance(said.get("onnx"), dict) and said.get("adapters"):
            raise GraphError(
                f"{path}: has an adapter merged into it already ({folder / MANIFEST}). Pass the "
                "graph of the base, or --allow-merged-base if BASE is that merged model."
            )


def refuse_unmatched(plan: Plan, matched: Matched, allowed: Sequence[str]) -> None:
    """Refuse a graph that does not hold all that a merge changes, or not in a known way.

    Args:
        plan: The merge.
        matched: What was found.
        allowed: Tensors or modules that the graph may lack.

    Raises:
        GraphError: With everything that was not found or not understood.
    """
    path, base = matched.graph.path, plan.base.path
    _check_allowed(matched, allowed)
    missing = {n: w for n, w in matched.missing.items() if not _is_under(n, allowed)}
    quantised = _quantised(matched)
    if not matched.matches and (missing or matched.problems):
        raise GraphError(
            f"{path}: not a graph of {base}: none of the base's {len(matched.weights)} weights is "
            f"in it.{quantised} Pass the base that the graph was exported from, in the precision "
            "that it was exported in."
        )
    if matched.problems:
        raise GraphError(
            f"{path}: holds what the merge changes in ways that cannot be told:"
            f"{listing(matched.problems)}\nExport the base without that, or leave --into out to "
            "trace the merged model."
        )
    if not missing:
        return
    total = sum(w.changed for w in matched.weights)
    listed = listing(f"{shown(n)}: {w}" for n, w in missing.items())
    if not matched.changed:
        raise GraphError(
            f"{path}: holds other parts of {base}, but none of the {total} tensors that the "
            f"adapter changes:{listed}\nIt has an adapter merged in already, is of a fine-tuned "
            "model or of the base in another precision, or folds or quantises weights in a way of "
            f"its own.{quantised} Pass the graph of the base itself."
        )
    raise GraphError(
        f"{path}: does not hold {len(missing)} of the {total} tensors that the adapter changes:"
        f"{listed}\nNothing is merged unless all of it is.{quantised} If the graph leaves out a "
        "part of the model on purpose (a pruned pooler or head), name it with --allow-missing "
        f"{shown(next(iter(missing)))}; else leave --into out to trace the merged model."
    )


def _quantised(matched: Matched) -> str:
    if not matched.quantised:
        return ""
    names = ", ".join(shown(n) for n in matched.quantised[:3])
    more = " ..." if len(matched.quantised) > 3 else ""
    return (
        f" {len(matched.quantised)} quantised weights ({names}{more}) are not what rounding the "
        "base to nearest with the graph's parameters gives (GPTQ, AWQ, HQQ, k-quant or another "
        "tool): re-weight the graph before quantisation, and quantise the result as this one was."
    )


def _check_allowed(matched: Matched, allowed: Sequence[str]) -> None:
    idle = [a for a in allowed if not any(_is_under(n, [a]) for n in matched.missing)]
    if idle:
        raise GraphError(
            f"--allow-missing {', '.join(shown(a) for a in idle)}: no such tensor or module is "
            "changed by the adapter and missing in the graph. Leave it out."
        )


def _is_under(name: str, allowed: Sequence[str]) -> bool:
    return any(name == a or name.startswith(f"{a}.") for a in allowed)


def _each_once(matched: Matched) -> list[Match]:
    """Return the matches to write: one for each range of bytes, whatever its names.

    Raises:
        GraphError: Tensors that share their bytes would have to become different.
    """
    kept: dict[tuple[Any, ...], Match] = {}
    problems = []
    for match in matched.matches:
        source = match.tensor.source
        place = (source.path, source.start) if isinstance(source, FileRange) else (id(source),)
        other = kept.setdefault(place, match)
        if other is not match and (other.changed or match.changed) and not _alike(other, match):
            problems.append(f"{other.tensor.where} and {match.tensor.where}: one copy of bytes")
    if problems:
        raise GraphError(
            f"{matched.graph.path}: tensors that the merge makes different share their bytes:"
            f"{listing(problems)}\nExport the base with a copy for each (untied weights), or leave "
            "--into out to trace."
        )
    return [m for m in kept.values() if m.changed]


def _alike(a: Match, b: Match) -> bool:
    return a.runs() == b.runs() and a.encoding == b.encoding


def _check_space(folder: Path, layout: Layout) -> None:
    free = shutil.disk_usage(folder).free
    if layout.nbytes > free:
        raise OutputError(
            f"{folder.parent}: the graph needs {layout.nbytes / 1e9:.1f} GB, {free / 1e9:.1f} GB "
            "are free. Free some space, or pass an -o on another disk."
        )


def with_new_ranges(
    plan: Plan, matched: Matched, matches: Sequence[Match], threads: int | None
) -> tuple[list[Match], dict[StoredTensor, bytes]]:
    """Return matches with the scales that merged values have, and what becomes of those.

    Where one scale holds for a whole tensor it follows from its largest value, so these tensors are
    merged twice, the first time for their ranges only.

    Returns:
        The matches, and the new bytes of stored scales and zero points that change.

    Raises:
        GraphError: A scale that changes is shared with a tensor that has another one.
    """
    ranged = [m for m in matches if isinstance(m.encoding, Int8)]
    found = _ranges(plan, ranged, threads)
    renewed = []
    wanted: dict[StoredTensor, dict[bytes, str]] = defaultdict(dict)
    for match in matched.matches:
        encoding = match.encoding
        if isinstance(encoding, Int8):
            if match in matches:
                encoding = encoding.of_range(*found[id(match)])
            for tensor, data in zip(match.parameters, _stored_parameters(encoding), strict=False):
                wanted[tensor][data] = match.tensor.where
        if match in matches:
            renewed.append(replace(match, encoding=encoding))
    problems = [f"{t.where}: of {' and '.join(users.values())}" for t, users in wanted.items()
                if len(users) > 1]  # fmt: skip
    if problems:
        raise GraphError(
            f"{matched.graph.path}: scales that the merge makes different are shared:"
            f"{listing(problems)}\nQuantise the base with a scale for each weight."
        )
    changed = {t: data for t, (data,) in ((t, tuple(u)) for t, u in wanted.items())
               if t.read().tobytes() != data}  # fmt: skip
    return renewed, changed


def _ranges(
    plan: Plan, matches: Sequence[Match], threads: int | None
) -> dict[int, tuple[float, float]]:
    """Return the least and the largest merged value of each match, zero included."""
    found = {id(m): (0.0, 0.0) for m in matches}
    lock = threading.Lock()

    def widen(part: Part, start: int, rows: NDArray[Any]) -> None:
        values = rows.view(f"f{rows.dtype.itemsize}")
        with lock:
            low, high = found[id(part.match)]
            found[id(part.match)] = (
                min(low, float(values.min())),
                max(high, float(values.max())),
            )

    parts = parts_of(matches)
    for dtype in dict.fromkeys(m.encoding.source for m in matches):
        merged = rewriting(plan, matches, dtype)
        Engine(merged, Scatter(merged, parts, widen), Resources("cpu", threads)).run()
    return found


def _stored_parameters(encoding: Int8) -> tuple[bytes, bytes]:
    scale = np.array([encoding.scale], f"f{encoding.values.itemsize}")
    zero = np.array([encoding.zero], np.int8 if encoding.signed else np.uint8)
    return scale.tobytes(), zero.tobytes()


def write(
    plan: Plan,
    matches: Sequence[Match],
    parameters: Mapping[StoredTensor, bytes],
    layout: Layout,
    request: Request,
    sink: FileSink,
    on_written: OnWritten = lambda _: None,
) -> None:
    """Write all files of a re-weighted graph, merged values in the place of the base's.

    Args:
        plan: The merge.
        matches: What is written anew.
        parameters: Scales and zero points that are written anew, with their bytes.
        layout: Where everything goes.
        request: What was asked for.
        sink: The files, open.
        on_written: As of ``Rewriter``.

    Peak memory: a few blocks per worker, and ``assembly.HELD_BYTES`` of tensors whose rows lie
    in columns.

    Raises:
        OutputError: The disk is full, or writing fails.
    """
    # In the order of the files, as far as it goes: hashing follows.
    matches = sorted(matches, key=lambda m: _file_and_offset(layout.places[m.tensor]))
    parts = parts_of(matches)
    sources = dict.fromkeys(m.encoding.source for m in matches)
    plans = [rewriting(plan, matches, dtype) for dtype in sources]
    total = sum(p.output_bytes for p in plans) + sum(c.nbytes for c in layout.copied)
    done, counting = 0, threading.Lock()

    def on_bytes(count: int) -> None:
        nonlocal done
        with counting:  # workers report side by side
            done += count
            if request.progress is not None:
                request.progress(done, total)

    writer = Rewriter(layout, sink, matches, on_written)
    writer.copy()
    on_bytes(sum(c.nbytes for c in layout.copied))
    writer.replace(parameters)
    for match in matches:
        writer.keep(match)
    resources = Resources("cpu", request.threads, _block_bytes(matches, layout))
    for part in plans:
        Engine(part, Scatter(part, parts, writer.emit), resources, on_bytes).run()


def _file_and_offset(place: Place) -> tuple[int, int]:
    return place.file, place.offset


def _block_bytes(matches: Sequence[Match], layout: Layout) -> int:
    sizes = [w.base.dtype.itemsize * m.length * COLUMNS for m in matches if m.lines.by_column
             and layout.places[m.tensor].nbytes > TENSOR_BYTES
             for w in m.weights if w.base is not None]  # fmt: skip
    return max(LEAST_BLOCK, min(MOST_BLOCK, max(sizes, default=0)))


def _parity(plan: Plan, graph: Graph) -> tuple[Parity, ...]:
    if own_names(graph):
        return ()
    outputs = [o.name for o in graph.model.graph.output if not o.name.startswith("present")]
    return (
        Parity(
            graph.path.name,
            plan,
            outputs=outputs,
            padding="none" if counts_tokens(graph) else "any",
            unmerged=lambda _: opened(graph.path),
        ),
    )


def own_names(graph: Graph) -> list[str]:
    """Return the inputs and outputs whose names say nothing to the comparison."""
    inner = graph.model.graph
    stored = {t.name for t in inner.initializer}
    given = [i.name for i in inner.input if i.name not in stored]
    made = [o.name for o in inner.output]
    return [n for n in given if n not in INPUTS and not n.startswith("past_key_values.")] + [
        n for n in made if n not in OUTPUTS and not n.startswith("present.")
    ]


def counts_tokens(graph: Graph) -> bool:
    """Return whether a graph takes lengths from the mask's sums, so padding on the right only.

    Its cache then leaves padding out, so that it has no counterpart in the unmerged model's.

    Source: onnxruntime's contrib operator GroupQueryAttention, input ``seqlens_k``.
    """
    return any(node.op_type == "GroupQueryAttention" for node, _ in nodes(graph.model))


def beside(path: Path, files: Sequence[SideFile]) -> tuple[SideFile, ...]:
    """Return the side files of a re-weighted graph, sorted by name.

    What lies beside the graph goes along with it (``genai_config.json``) and is preferred to the
    base's; the adapter's tokenizer is preferred to both.

    Args:
        path: The graph.
        files: The side files of a merge.
    """
    from_adapter = {f.name: f for f in files if f.owner == "adapter"}
    own = {f.name: f for f in in_folder(path.parent, replaced_by=from_adapter)}
    whole = any(name in WHOLE_TOKENIZER for name in own)  # one tokenizer, not a mix of two
    found = {f.name: f for f in files
             if f.owner == "base" and not (whole and f.name in TOKENIZER)}  # fmt: skip
    found |= own
    found |= from_adapter
    return tuple(found[name] for name in sorted(found))


def notes_on_parity(graph: Graph) -> Iterator[str]:
    """Yield what a comparison with the unmerged model leaves out, and why."""
    if counts_tokens(graph):
        yield "as before, the graph takes padding on the right only; it is compared without any"
    if own := own_names(graph):
        said = ", ".join(shown(n) for n in own[:3]) + (" ..." if len(own) > 3 else "")
        yield f"not run beside the unmerged model: {said} are names of the exporter's own"
    elif is_quantised(graph.model):
        yield (
            "quantised: it may be as far from the unmerged model as twice what the graph of the "
            "base is from the base (--budget states another limit)"
        )


def _notes(matched: Matched) -> Iterator[str]:
    yield from notes_on_parity(matched.graph)
    if matched.absent:
        names = ", ".join(shown(n) for n in matched.absent[:4])
        more = " ..." if len(matched.absent) > 4 else ""
        yield (
            f"{len(matched.absent)} tensors of the base that do not change are not in the graph as "
            f"they are (folded, pruned or quantised): {names}{more}"
        )


def _facts(
    graph: Graph, matched: Matched, changed: Sequence[Match], digests: Mapping[str, str]
) -> Mapping[str, Any]:
    """Return what the manifest says: the proof that every tensor written anew held the base."""
    types = sorted({m.encoding.name for m in changed})
    opsets = {o.domain or "ai.onnx": o.version for o in graph.model.opset_import}
    return {
        "graph": graph.path.name,
        "dtype": ", ".join(types),
        "opset": opsets.get("ai.onnx"),
        "producer": graph.model.producer_name,
        "tensors": len(graph.tensors),
        "rewritten": len(changed),
        "base_tensors_not_found": list(matched.absent),
        "allowed_missing": dict(matched.missing),
        "proof": {
            "what": "in a graph whose files have these digests (sha256), each tensor below held "
            "exactly these rows of the base, line after line, in this encoding; every byte was "
            "compared",
            "graph_files": dict(digests),
            "initializers": [_proof(m) for m in changed],
        },
    }


def _proof(match: Match) -> dict[str, Any]:
    runs = match.runs()
    held = [f"{r.weight or 'nothing of it'}[{r.first_row}:{r.first_row + r.count}]" for r in runs]
    entry: dict[str, Any] = {
        "name": match.tensor.name,
        "shape": list(match.tensor.shape),
        "encoding": match.encoding.name,
        "lines_are": "columns" if match.lines.by_column else "rows",
        "base": held[:RUNS],
    }
    if match.tensor.scope:
        entry["scope"] = match.tensor.scope
    if len(runs) > RUNS:
        entry["more"] = len(runs) - RUNS
    return entry
