"""Operators of a graph fused into onnxruntime's own, for one execution provider."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import onnx_ir as ir
from numpy.typing import NDArray

from dora_export.onnx.corrected import exact
from dora_export.onnx.engines import quiet
from dora_export.onnx.model import GraphError, GraphOptions
from dora_export.onnx.unneeded import leave_out
from dora_export.onnx.wrappers import BATCH, Part
from dora_export.verification.runner import GraphUnusable, OnnxRuntime
from dora_export.verification.script import PAST

GROUPED = "GroupQueryAttention"
DOMAIN = "com.microsoft"
Step = Callable[[ir.Model], None]
MODULE = "transformers.exporters.onnxruntime_fusions"


def check(options: GraphOptions) -> None:
    """Refuse fusions that the installed transformers has not.

    Raises:
        GraphError: It has not.
    """
    if options.fuse == "none":
        return
    try:
        there = importlib.util.find_spec(MODULE) is not None
    except ModuleNotFoundError:
        there = False
    if not there:
        raise GraphError(
            f"--fuse {options.fuse}: this version of transformers brings no fusions for "
            "onnxruntime. Install transformers 5.23 or later, or leave the option out."
        )


def fuse(model: ir.Model, provider: str) -> list[str]:
    """Fuse in place: norms, rotary embeddings, attention.

    On a CPU, ``GroupQueryAttention`` takes the place of a decoder's attention over its cache, with
    the mask as its bias, so that sequences of a batch may be padded on either side. It refuses
    several new tokens after a cache for more than one sequence, which is then the graph's limit.
    Operands whose batch a product would turn are turned before it, as on other providers: a CPU
    does not turn one of another rank than the other either (SigLIP's pooling head).
    Where the library's steps are not as known here, all is left to its own function, which leaves
    the attention of graphs for any batch as it is: right, and slower.

    Returns:
        What was fused less than this does otherwise, for the user to be told; mostly nothing.

    Raises:
        GraphError: The fusions fail.
    """
    from transformers.exporters import onnxruntime_fusions  # noqa: PLC0415 - an extra

    steps = _steps(onnxruntime_fusions) if provider == "cpu" else []
    caches = any(str(value.name).startswith(PAST) for value in model.graph.inputs)
    try:
        with quiet(), exact():
            for step in steps:
                step(model)
            if not steps:
                onnxruntime_fusions.fuse_for_onnxruntime(model, provider)
    except Exception as error:
        # The fusions raise whatever they meet in a graph they were not made for.
        raise GraphError(
            f"--fuse {provider}: fails with {type(error).__name__}: {error}. Leave the option out."
        ) from error
    leave_out(model)
    if provider != "cpu" or not caches or takes_one_sequence_after_a_cache(model):
        return []
    if steps:
        return [
            "--fuse cpu: transformers' fusions know no attention of this model's kind, so "
            f"{GROUPED} does not take its place: the graph is right, and slower than one in which "
            "it does"
        ]
    installed = importlib.metadata.version("transformers")
    return [
        f"--fuse cpu: transformers {installed} fuses in other steps than those known here, and its "
        f"own function left the attention as it is, where {GROUPED} would take its place: the "
        "graph is right, and slower. Install transformers 5.23, or pass --batch 1"
    ]


def refuse_unrunnable(path: Path, options: GraphOptions, part: Part, *, single: bool) -> None:
    """Refuse a graph that onnxruntime does not run: fusions, and exporters, may not fit a model.

    Graphs that no CPU runs, of bfloat16 or fused for CUDA, are left to who runs them.

    Args:
        path: The graph.
        options: What it was made by.
        part: What it was traced from, whose example inputs it is run with.
        single: Run it with the first sequence alone.

    Raises:
        GraphError: It does not load it, or fails on these inputs.
    """
    if options.fuse not in ("cpu", "none") or options.dtype == "bf16":
        return
    try:
        runner = OnnxRuntime(path)
        runner.run({name: _example(part, name, single=single) for name in runner.inputs})
    except GraphUnusable as why:
        if options.fuse == "none":
            raise GraphError(
                f"{path.name}: the exporter makes a graph of this model that cannot be run: {why}. "
                "Pass another --engine or --dtype."
            ) from why
        raise GraphError(
            f"--fuse cpu: transformers' fusions make a graph of this model that cannot be run: "
            f"{why}. Leave the option out."
        ) from why


def _example(part: Part, name: str, *, single: bool) -> NDArray[Any]:
    found = part.inputs[name]
    for axis, label in part.axes.get(name, {}).items():
        found = found.narrow(axis, 0, 1) if single and label == BATCH else found
    return found.numpy()


def operators(model: ir.Model) -> dict[str, int]:
    """Return how many nodes of onnxruntime's own operators a graph has, by operator."""
    kinds = (n.op_type for n in model.graph.all_nodes() if n.domain == DOMAIN)
    return dict(sorted(Counter(kinds).items()))


def takes_one_sequence_after_a_cache(model: ir.Model) -> bool:
    """Return whether a graph refuses several new tokens after a cache for a batch; see ``fuse``."""
    return any(node.op_type == GROUPED for node in model.graph)


def _steps(fusions: Any) -> list[Step]:
    """Return the library's steps for CPUs, its step for attention as ``_grouped``.

    The library leaves graphs of any batch out, for what ``fuse`` says that they refuse, and has no
    option for it; its steps are not public. Where they are not as known here, there are none.
    """
    own = getattr(fusions, "_fuse_group_query_attention", None)
    untransposed = getattr(fusions, "_untranspose_batch_matmuls", None)
    steps = [step for step, providers in getattr(fusions, "_STEPS", ())
             if providers is None or "cpu" in providers or step is untransposed]  # fmt: skip
    if own is None or own not in steps:
        return []
    return [partial(_grouped, own) if step is own else step for step in steps]


def _grouped(own: Callable[..., None], model: ir.Model) -> None:
    """Let the library's step see every batch as one sequence, which is all that it asks of it.

    Where there may be more, rotary embeddings stay operators of their own: the attention's, for the
    first tokens, counts positions from 0 whatever it is told.
    """
    queries = [node.inputs[0] for node in model.graph if node.op_type == "MultiHeadAttention"]
    several = {id(q): (q, q.shape) for q in queries
               if q is not None and q.shape is not None and q.shape[0] != 1}  # fmt: skip
    for query, shape in several.values():
        query.shape = ir.Shape([1, *shape[1:]])
    try:
        own(model, rotary=not several)
    finally:
        for query, shape in several.values():
            query.shape = shape
