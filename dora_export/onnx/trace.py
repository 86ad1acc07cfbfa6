"""A model class traced to a graph: load the merged model, trace, tidy, write."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dora_export.checkpoints.folder import read_json
from dora_export.errors import shown
from dora_export.onnx.model import (
    BUDGETS,
    GRAPH,
    GraphError,
    GraphOptions,
    Made,
    Parity,
    Request,
)
from dora_export.verification.measured import LoadFailure, Unsupported, library_of
from dora_export.verification.pooling import embedding
from dora_export.verification.together import FIRST, FURTHER, MERGED
from dora_export.writers.files import write_small

if TYPE_CHECKING:
    from dora_export.onnx.wrappers import Part

OPSETS = range(18, 26)  # what torch's exporter writes
NEEDED = ("onnxscript", "onnx_ir")


def check(request: Request) -> None:
    """Refuse what cannot be traced, from the config and the options alone.

    Raises:
        GraphError: It cannot.
    """
    options, config = request.options, request.plan.base.config
    missing = [n for n in (library_of(config), *NEEDED) if importlib.util.find_spec(n) is None]
    if missing:
        raise GraphError(
            f"{', '.join(missing)}: not installed, and tracing needs it. Install "
            "dora-export[transformers], or give an existing graph the adapter with --into."
        )
    if options.opset is not None and options.opset not in OPSETS:
        raise GraphError(
            f"--opset {options.opset}: the exporter writes {OPSETS.start} to {OPSETS.stop - 1}."
        )
    if options.batch is not None and options.batch < 1:
        raise GraphError(f"--batch {options.batch}: must be at least 1.")
    if request.plan.base.folder is None:
        raise GraphError(
            f"{request.plan.base.path}: a weight file without config.json, so its class is not "
            "known. Pass the model's folder."
        )
    from dora_export.onnx import fuse, quantise  # noqa: PLC0415 - imports onnx_ir

    quantise.check(options)
    fuse.check(options)
    if options.share_weights and options.layout != "hf":
        raise GraphError(
            "--share-weights --layout transformers-js: a graph reads no file outside its folder. "
            "Leave one of them out."
        )
    try:
        _class(request.plan, options)
    except Unsupported as why:
        raise GraphError(
            f"{why}. It cannot be traced; give an existing graph the adapter with --into."
        ) from why


def make(request: Request, folder: Path, *, whole: bool = False) -> Made:
    """Trace the model in ``folder``, merged, and write its graphs into ``request.folder``.

    Memory: the weights are mapped from the files, and go from there into the graphs'.

    Args:
        request: What is asked for.
        folder: The merged model.
        whole: Make one graph of an encoder-decoder, without a cache, in place of three.

    Raises:
        GraphError: It cannot be traced.
    """
    import torch  # noqa: PLC0415 - as below: seconds to import

    from dora_export.onnx import genai, pooling, tasks  # noqa: PLC0415
    from dora_export.verification import models  # noqa: PLC0415

    options = request.options
    cls = _class(request.plan, options)
    request.on_stage(f"loading {cls.name}")
    torch.manual_seed(0)  # example inputs
    try:
        loaded = models.load(folder, cls, getattr(torch, TORCH[options.dtype]))
    except LoadFailure as why:
        raise GraphError(f"{cls.name}: the merged model does not load: {shown(why, 400)}.") from why
    if lacking := sorted(loaded.problems["missing_keys"]):
        raise GraphError(
            f"{cls.name}: the model stores no '{shown(lacking[0])}' ({len(lacking)} such weights), "
            "which would start at random values. Pass the --task it was trained for."
        )
    try:
        parts = tasks.parts(loaded.model, options.batch, whole=whole)
    except (RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError) as why:
        # What a model's forward raises on inputs that it was not made for.
        raise GraphError(
            f"{cls.name}: cannot be run on inputs made up for it: {type(why).__name__}: "
            f"{shown(why, 300)}. Pass another --task, or give an existing graph the adapter with "
            "--into."
        ) from why
    task = options.task or tasks.task_of(cls.name)
    derive, pooled = None, None
    if options.pooling is not None:
        pooled = pooling.pooling_of(folder, options.pooling)
        parts[0] = pooling.pooled(parts[0], pooled)
        derive = embedding(pooled.mode, normalise=pooled.normalise)
    if options.share_weights and len(parts) > 1:
        raise GraphError(
            f"--share-weights: {cls.name} becomes {len(parts)} graphs, and weights are shared with "
            "one. Leave the option out."
        )
    main = parts[0]
    said: dict[str, Mapping[str, Any]] = {}
    failures: list[str] = []
    doubts: list[str] = []
    for part in parts:
        name, data = graph_name(options, part.graph)
        request.on_stage(f"tracing {name} of {cls.name}, the longest part")
        said[name] = _written(request, folder, part, name, data, failures, doubts)
    if options.layout == "transformers-js" and len(said) > 1:
        request.on_stage("joining the decoders")
        _join(request, said)
    name = next(iter(said))
    facts = {"task": task, "class": cls.name, "dtype": options.dtype, **said[name],
             "padding": "any", "fused": options.fuse,
             "pooling": pooled and asdict(pooled)}  # fmt: skip
    if len(said) > 1:
        facts["graphs"] = said
    if task == "text-generation":
        written = genai.genai_config(
            loaded.model.config, _generation(folder), name, list(main.inputs), main.facts
        )
        write_small(request.folder / "genai_config.json", written)

    budget = BUDGETS.get(options.quantize or "")
    return Made(
        graphs=tuple(said),
        facts=facts,
        parity=(Parity(name, request.plan, outputs=main.compared, budget=budget,
                       cls=None if options.task is None else cls, derive=derive),),
        notes=tuple(dict.fromkeys((*failures, *(n for part in parts for n in part.notes)))),
        warnings=tuple(dict.fromkeys(doubts)),
    )  # fmt: skip


def _join(request: Request, said: dict[str, Mapping[str, Any]]) -> None:
    """Put the two decoders of an encoder-decoder into one graph, as transformers.js asks for it.

    Args:
        request: What is asked for.
        said: What the manifest says of each graph; the two's are replaced.

    Raises:
        GraphError: They do not go together.
    """
    from dora_export.onnx import files, merged_decoder  # noqa: PLC0415

    first, further = (graph_name(request.options, name)[0] for name in (FIRST, FURTHER))
    name, data = graph_name(request.options, MERGED)
    paths = [request.folder / one for one in (first, further)]
    model = merged_decoder.merged(*paths)
    files.write(model, request.folder / name, data)
    for path in paths:
        for file in path.parent.glob(f"{path.name}*"):
            file.unlink()
    facts, other = said.pop(first), said.pop(further)
    said[name] = {**facts, **_graph_facts(model), "nodes": facts["nodes"] + other["nodes"]}


def _written(
    request: Request,
    folder: Path,
    part: Part,
    name: str,
    data: str,
    failures: list[str],
    doubts: list[str],
) -> dict[str, Any]:
    """Trace a part, write its graph as the options say, and return what the manifest says of it.

    Args:
        request: What is asked for.
        folder: The merged model.
        part: What to trace.
        name: Of the graph, within the request's folder.
        data: Of the file with its weights, beside it.
        failures: Gets why an engine could not.
        doubts: Gets what was fused less than asked for.

    Raises:
        GraphError: It cannot be traced, fused or quantised.
    """
    from dora_export.onnx import engines, files, fuse, quantise, share, tidy  # noqa: PLC0415

    options, path = request.options, request.folder / name
    model, engine, failed = engines.traced(part, options.opset, options.engine)
    failures += failed
    tidy.tidy(model)
    if options.fuse != "none":
        request.on_stage(f"fusing operators for {options.fuse}")
        doubts += fuse.fuse(model, options.fuse)
    shared: list[str] = []
    if options.share_weights:
        shared = share.share(model, folder, request.folder, copy=folder.parent != request.folder)
    request.on_stage(f"writing {name}")
    facts = {"engine": engine, **_facts(model, part), "shared_weights": len(shared)}
    if options.fuse != "none":
        facts["fused_operators"] = fuse.operators(model)
    single = fuse.takes_one_sequence_after_a_cache(model)
    if single:
        facts["several_tokens_after_a_cache"] = "of one sequence only"
    runs = request.runs or options.fuse != "none"
    if options.quantize is None:
        files.write(model, path, data)
        if runs:
            fuse.refuse_unrunnable(path, options, part, single=single)
        return facts
    quantise.reachable(model)
    plain = path.with_name("float.onnx")
    files.write(model, plain, f"{plain.name}.data")
    if runs:
        fuse.refuse_unrunnable(plain, options, part, single=single)
    request.on_stage(f"quantising to {options.quantize}")
    facts["quantized"] = quantise.quantise(plain, path, data, options)
    for file in (plain, plain.with_name(f"{plain.name}.data")):
        file.unlink(missing_ok=True)
    files.settle_all(path, data)
    files.check(path)
    return facts


def graph_name(options: GraphOptions, graph: str = GRAPH) -> tuple[str, str]:
    """Return the names of a graph, within the folder, and of the data file beside it.

    transformers.js finds a graph by its type's suffix in the sub-folder "onnx", and the data by
    "_data" behind the graph's name.
    """
    if options.layout == "hf":
        return graph, f"{graph}.data"
    suffix = {"int8": "_int8", "int4": "_q4"}.get(options.quantize or "", "")
    suffix = suffix or {"fp16": "_fp16", "bf16": "_bf16"}.get(options.dtype, "")
    stem = graph.removesuffix(".onnx")
    return f"onnx/{stem}{suffix}.onnx", f"{stem}{suffix}.onnx_data"


def _generation(folder: Path) -> Mapping[str, Any]:
    path = folder / "generation_config.json"
    return read_json(path) if path.is_file() else {}


TORCH = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def _class(plan: Any, options: GraphOptions) -> Any:
    """Return the class to trace.

    Raises:
        Unsupported: The library has none.
        GraphError: The task is not one of those known.
    """
    from dora_export.onnx import tasks  # noqa: PLC0415 - imports torch
    from dora_export.verification import models  # noqa: PLC0415

    if options.task is None:
        return models.class_of(plan)
    if options.task not in tasks.CLASSES:
        raise GraphError(f"--task {options.task}: expected one of {', '.join(tasks.CLASSES)}.")
    return models.ModelClass("transformers", tasks.CLASSES[options.task])


def _facts(model: Any, part: Any) -> Mapping[str, Any]:
    """Return what the manifest says of a part's graph."""
    return {**_graph_facts(model), **part.facts}


def _graph_facts(model: Any) -> dict[str, Any]:
    graph = model.graph

    def described(values: Any) -> dict[str, Any]:
        return {str(v.name): {"dtype": str(v.dtype), "shape": [
            d if isinstance(d, int) else d.value for d in v.shape]} for v in values}  # fmt: skip

    return {
        "opset": model.opset_imports.get("", 0),
        "ir": model.ir_version,
        "operators": sorted({n.domain for n in graph.all_nodes() if n.domain}),
        "nodes": len(graph),
        "inputs": described(graph.inputs),
        "outputs": described(graph.outputs),
    }
