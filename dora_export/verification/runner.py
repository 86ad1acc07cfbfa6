"""What runs a graph: the interface that the ONNX tier asks of it, and onnxruntime's answer."""

from __future__ import annotations

import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from dora_export.errors import shown

if TYPE_CHECKING:
    import onnx

Arrays = Mapping[str, NDArray[Any]]

# Operators that compute with rounded integers, beside those with "Quant" or "QLinear" in the name.
MOST_SEQUENCES = 4  # that a graph that fails is tried with
QUANTISED = ("MatMulNBits", "MatMulInteger", "MatMulIntegerToFloat", "ConvInteger", "QMoE")
NUMPY_TYPES = {
    "tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(double)": np.float64,
    "tensor(int64)": np.int64, "tensor(int32)": np.int32, "tensor(bool)": np.bool_,
}  # fmt: skip


@dataclass(frozen=True)
class Slot:
    """An input of a graph.

    Attributes:
        shape: A number where it is fixed, None where it is not.
        dtype: numpy type.
    """

    shape: tuple[int | None, ...]
    dtype: Any


class Runner(Protocol):
    """Something that runs a graph; an exporter may bring its own."""

    @property
    def inputs(self) -> Mapping[str, Slot]:
        """All inputs by name."""

    @property
    def outputs(self) -> Sequence[str]:
        """Names of all outputs."""

    @property
    def precision(self) -> str | None:
        """Coarsest floating-point type of its weights ("F64", "F32", "F16"); None: quantised."""

    def run(self, values: Arrays) -> dict[str, NDArray[Any]]:
        """Return all outputs by name; ``values`` has all inputs, in their types."""


class GraphUnusable(Exception):  # noqa: N818 - a finding, not an error of the program
    """A graph that is not run; becomes a finding.

    Attributes:
        code: Of the finding.
    """

    def __init__(self, code: str, what: str) -> None:
        super().__init__(what)
        self.code = code


class OnnxRuntime:
    """Runs a graph with onnxruntime on the CPU."""

    def __init__(self, path: Path, adapter: Path | None = None) -> None:
        """Open a graph.

        Args:
            path: The ``.onnx`` file; its external data must lie in its folder or below.
            adapter: An ``.onnx_adapter`` file to run it with; None: none.

        Raises:
            GraphUnusable: It names files outside its folder, is malformed, or onnxruntime does
                not take it or its adapter.
        """
        # Both take a second to import.
        import onnx  # noqa: PLC0415
        import onnxruntime  # noqa: PLC0415

        try:
            regular = stat.S_ISREG(path.stat().st_mode)  # opening a pipe waits
            model = onnx.load(str(path), load_external_data=False) if regular else None
        except Exception as error:
            # protobuf and the file system raise whatever they meet.
            raise GraphUnusable("graph-unsupported", f"cannot be read: {shown(error)}") from error
        if model is None:
            raise GraphUnusable("graph-unsupported", "not a regular file")
        _refuse_outside(model, path.parent)
        self._precision = _precision(model)
        self.swaps = adapter is not None  # its adapter is beside weights that nobody merged
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # errors are raised; printed, they would show raw names
        try:
            # Falling back, it would print what it met, names of a stranger's among that.
            self._session = onnxruntime.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"], enable_fallback=0
            )
        except Exception as error:
            # onnxruntime has a class for every one of its states and a common base for none.
            why = f"onnxruntime does not take it: {shown(error, 300)}"
            raise GraphUnusable("graph-unsupported", why) from error
        self._options = onnxruntime.RunOptions()
        if adapter is not None:
            self._adapter = onnxruntime.LoraAdapter()  # kept: the options only point to it
            try:
                self._adapter.Load(str(adapter))
            except Exception as error:
                # as above
                why = f"onnxruntime does not take {shown(adapter.name)}: {shown(error, 300)}"
                raise GraphUnusable("graph-unsupported", why) from error
            self._options.add_active_adapter(self._adapter)
        self._inputs = {i.name: _slot(i.name, i.type, i.shape) for i in self._session.get_inputs()}
        self._outputs = [o.name for o in self._session.get_outputs()]

    @property
    def inputs(self) -> Mapping[str, Slot]:
        """All inputs by name."""
        return self._inputs

    @property
    def outputs(self) -> Sequence[str]:
        """Names of all outputs."""
        return self._outputs

    @property
    def precision(self) -> str | None:
        """Coarsest floating-point type of its weights; None: it is quantised."""
        return self._precision

    def _fewer(self, values: Arrays) -> tuple[int, int] | None:
        """Return a number of sequences that the graph takes, and how many there are, or None."""
        open_ones = {n for n in values if self._inputs[n].shape[:1] == (None,)}
        counts = {values[n].shape[0] for n in open_ones}
        if len(counts) != 1:
            return None
        (count,) = counts
        for fewer in range(1, min(count, MOST_SEQUENCES + 1)):
            some = {n: v[:fewer] if n in open_ones else v for n, v in values.items()}
            try:
                self._session.run(self._outputs, some, self._options)
            except Exception as error:
                del error  # of this one: the first failure is told
                continue
            return fewer, count
        return None

    def run(self, values: Arrays) -> dict[str, NDArray[Any]]:
        """Return all outputs by name.

        Raises:
            GraphUnusable: onnxruntime fails; or only with so many sequences, although the graph
                says that it takes any number.
        """
        try:
            found = self._session.run(self._outputs, dict(values), self._options)
        except Exception as error:
            shapes = {name: v.shape for name, v in values.items()}
            why = f"onnxruntime fails on {shapes}: {shown(error, 300)}"
            if (fixed := self._fewer(values)) is not None:
                taken, of = fixed
                what = f"says that it takes any number of sequences; it takes {taken} and not {of}"
                raise GraphUnusable("graph-fixed", f"{what}: {why}") from error
            raise GraphUnusable("graph-unsupported", why) from error
        return dict(zip(self._outputs, found, strict=True))


def _slot(name: str, kind: str, shape: Sequence[Any]) -> Slot:
    if kind not in NUMPY_TYPES:
        raise GraphUnusable("graph-unsupported", f"input '{shown(name)}' is a {shown(kind)}")
    dims = tuple(d if isinstance(d, int) and d >= 0 else None for d in shape)
    return Slot(dims, NUMPY_TYPES[kind])


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """Yield a graph and the graphs in its nodes' attributes."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                if inner.node:
                    yield from _graphs(inner)


def _tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Yield every stored tensor: initializers, sparse ones, and those in attributes."""
    for graph in _graphs(model.graph):
        yield from graph.initializer
        for sparse in graph.sparse_initializer:
            yield from (sparse.values, sparse.indices)
    bodies = [*(g.node for g in _graphs(model.graph)), *(f.node for f in model.functions)]
    for node in (n for nodes in bodies for n in nodes):
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)


def _refuse_outside(model: onnx.ModelProto, folder: Path) -> None:
    """Refuse external data outside the graph's folder, links that lead there included."""
    real = folder.resolve()
    for tensor in _tensors(model):
        for entry in tensor.external_data:
            if entry.key != "location":
                continue
            path = (real / entry.value).resolve()
            if Path(entry.value).is_absolute() or not path.is_relative_to(real):
                raise GraphUnusable(
                    "graph-outside", f"'{shown(tensor.name)}' is in '{shown(entry.value)}'"
                )
            if path.exists() and not path.is_file():
                what = f"'{shown(tensor.name)}' is in '{shown(entry.value)}', no regular file"
                raise GraphUnusable("graph-unsupported", what)


def is_quantised(model: onnx.ModelProto) -> bool:
    """Return whether any operator of a graph works on quantised values."""
    nodes = [n for g in _graphs(model.graph) for n in g.node]
    nodes += [n for f in model.functions for n in f.node]
    return any("Quant" in n.op_type or "QLinear" in n.op_type or n.op_type in QUANTISED
               for n in nodes)  # fmt: skip


def _precision(model: onnx.ModelProto) -> str | None:
    import onnx  # noqa: PLC0415 - as above

    if is_quantised(model):
        return None
    types = {t.data_type for t in _tensors(model)}
    types |= {o.type.tensor_type.elem_type for o in model.graph.output}
    if onnx.TensorProto.BFLOAT16 in types:
        return "BF16"
    if onnx.TensorProto.FLOAT16 in types:
        return "F16"
    return "F64" if onnx.TensorProto.FLOAT not in types else "F32"
