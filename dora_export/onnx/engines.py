"""What traces a part: torch's exporter, or that of transformers, which knows more of its models.

Both take the same module with the same names, and either says why it fails; neither is ever
replaced by another dtype or another kind of graph.
"""

from __future__ import annotations

import importlib.util
import io
import logging
import re
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from typing import Any, Literal

import onnx_ir as ir
import torch

from dora_export.errors import shown
from dora_export.onnx.corrected import correct, exact
from dora_export.onnx.model import GraphError
from dora_export.onnx.overflow import choices
from dora_export.onnx.wrappers import TOTAL, Part, word

Engine = Literal["torch", "transformers"]
# How a mixture of experts is computed: each expert multiplies the rows routed to it, which
# transformers' exporter alone can write down; or each row has its experts' weights gathered, which
# takes memory for a matrix per row.
EXPERTS: dict[Engine, str] = {"transformers": "grouped_mm", "torch": "batched_mm"}
_QUIET = threading.RLock()


class TraceFailure(Exception):  # noqa: N818 - an engine's, told together with the other's
    """An engine cannot trace a part; the message says why."""


def has_transformers_exporter() -> bool:
    """Return whether transformers brings an exporter of its own (5.14 and later, experimental)."""
    return importlib.util.find_spec("transformers.exporters") is not None


def export(part: Part, opset: int | None, engine: Engine) -> ir.Model:
    """Trace a part and return its graph, inputs, outputs and axes named as the part says.

    Weights are those of the module, not copied.

    Raises:
        TraceFailure: The engine cannot.
    """
    part.module.eval()
    inner: Any = getattr(part.module, "model", None)
    if _is_mixture(inner):
        inner.set_experts_implementation(EXPERTS[engine])
    try:
        with torch.no_grad(), quiet(), exact(), choices(part.module):
            model = _by_torch(part, opset) if engine == "torch" else _by_transformers(part, opset)
    except GraphError:
        raise
    except Exception as error:
        # Exporters raise whatever they and the model meet; all of it means: not traced.
        raise TraceFailure(_reason(error)) from error
    correct(model)
    _name(model.graph, part)
    return model


def traced(part: Part, opset: int | None, engine: str) -> tuple[ir.Model, Engine, list[str]]:
    """Trace with the engine asked for, or with the first that can.

    Returns:
        The graph, the engine, and why engines before it could not.

    Raises:
        GraphError: None can.
    """
    tried: list[Engine] = ["torch", "transformers"] if engine == "auto" else [engine]  # type: ignore[list-item]
    if _is_mixture(getattr(part.module, "model", None)):
        tried = tried[::-1]  # see EXPERTS
    if engine == "transformers" and not has_transformers_exporter():
        raise GraphError(
            "--engine transformers: this version of transformers has no exporter. Install "
            "transformers 5.23 or later, or leave the option out."
        )
    if not has_transformers_exporter():
        tried = ["torch"]
    failures: list[str] = []
    for one in tried:
        try:
            return export(part, opset, one), one, failures
        except TraceFailure as failure:
            failures.append(f"engine {one}: {failure}")
    raise GraphError(
        f"{part.graph}: cannot be traced.\n  " + "\n  ".join(failures) + "\nWhere a graph of the "
        "base exists already, give it the adapter with --into."
    )


def _is_mixture(model: Any) -> bool:
    """Return whether the library can compute a model's experts in several ways."""
    return bool(getattr(model, "_can_set_experts_implementation", lambda: False)())


def _by_torch(part: Part, opset: int | None) -> ir.Model:
    shapes = tuple(
        {axis: _multiple(label, part.steps, label) for axis, label in
         part.axes.get(name, {}).items()} for name in part.inputs
    )  # fmt: skip
    program = torch.onnx.export(
        part.module, tuple(part.inputs.values()), dynamo=True, verbose=False, opset_version=opset,
        dynamic_shapes=(shapes,), input_names=[word(n) for n in part.inputs],
    )  # fmt: skip
    assert program is not None, "Bug: dynamo=True gives a program"
    found: ir.Model = program.model
    return found


def _by_transformers(part: Part, opset: int | None) -> ir.Model:
    from transformers.exporters import OnnxConfig, OnnxExporter  # noqa: PLC0415 - an extra

    dynamic = torch.export.Dim.DYNAMIC
    shapes = {
        word(n): {axis: _multiple(label, part.steps, dynamic) for axis, label in
                  part.axes.get(n, {}).items()} for n in part.inputs
    }  # fmt: skip
    config = OnnxConfig(dynamic_shapes=shapes, opset_version=opset)
    inputs = {word(n): tensor for n, tensor in part.inputs.items()}
    part.module.by_name = True  # type: ignore[assignment]
    try:
        model, _ = OnnxExporter().export_program(part.module, inputs, config)
    finally:
        part.module.by_name = False  # type: ignore[assignment]
    found: ir.Model = model
    return found


def _multiple(label: str, steps: Mapping[str, int], otherwise: Any) -> Any:
    """Return what an exporter is told of an axis whose sizes are multiples of a number."""
    step = steps.get(label, 1)
    return otherwise if step == 1 else step * torch.export.Dim(f"{label}_steps")


@contextmanager
def quiet() -> Iterator[None]:
    """Keep exporters' warnings about themselves off the terminal, in one thread at a time.

    What they write to, and how much they write, is the process's: put back by one thread while
    another is within, it would not be as it was.
    """
    with _QUIET:
        yield from _quiet()


def _quiet() -> Iterator[None]:
    loggers = [logging.getLogger(n) for n in ("torch.onnx", "torch.export", "transformers",
                                              "onnxscript", "onnx_ir", "torch")]  # fmt: skip
    levels = [one.level for one in loggers]
    for one in loggers:
        one.setLevel(logging.ERROR)
    try:
        # transformers lets torch print its progress.
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for one, level in zip(loggers, levels, strict=True):
            one.setLevel(level)


def _reason(error: Exception) -> str:
    """Return what an exporter says, without its pages of advice."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return f"{type(cause).__name__}: {shown(' '.join(lines), 300)}"


# --- names


def _name(graph: ir.Graph, part: Part) -> None:
    """Give inputs, outputs and their axes the part's names."""
    inputs = {value.name: value for value in graph.inputs}
    symbols: dict[str, str] = {}
    for name in part.inputs:
        value = inputs.pop(word(name), None)
        if value is None:
            raise GraphError(
                f"{part.graph}: the model does not use '{name}', so the graph has no such input. "
                "Pass another --task, or report the model's class."
            )
        for axis, label in part.axes.get(name, {}).items():
            dim = value.shape[axis] if value.shape is not None else None
            if isinstance(dim, ir.SymbolicDim) and dim.value is not None:
                symbols[dim.value] = label
        value.name = name
    assert not inputs, f"Bug: the graph has inputs beside the part's: {sorted(map(str, inputs))}"
    for value, name in zip(list(graph.outputs), part.outputs, strict=True):
        value.name = name
    ordered = {value.name: value for value in graph.inputs}
    graph.inputs[:] = [ordered[name] for name in part.inputs]
    for value in _values(graph):
        if value.shape is not None:
            value.shape = ir.Shape([_dim(d, symbols) for d in value.shape])
    _refuse_fixed(graph, part)


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    for node in graph.all_nodes():
        yield from node.outputs


def _dim(dim: Any, symbols: dict[str, str]) -> int | str | None:
    if not isinstance(dim, ir.SymbolicDim):
        return int(dim)
    if dim.value is None:
        return None
    if dim.value in symbols:  # a multiple of a symbol, as a whole
        return symbols[dim.value]
    text = re.sub(r"\b[A-Za-z_]\w*\b", lambda m: symbols.get(m[0], m[0]), dim.value)
    sums = ("sequence_length + past_sequence_length", "past_sequence_length + sequence_length")
    return TOTAL if text in sums else text


def _refuse_fixed(graph: ir.Graph, part: Part) -> None:
    """Refuse a graph in which an axis that should vary does not.

    Raises:
        GraphError: The exporter has fixed it.
    """
    for value in graph.inputs:
        for axis, label in part.axes.get(str(value.name), {}).items():
            dim = value.shape[axis] if value.shape is not None else None
            if isinstance(dim, int):
                raise GraphError(
                    f"{part.graph}: the exporter has fixed '{label}' of input '{value.name}' to "
                    f"{dim}. Pass another --engine, or --batch if it is the batch size."
                )
