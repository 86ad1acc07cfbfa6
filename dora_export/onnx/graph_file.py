"""An ONNX graph on disk: what it computes, and where each of its tensors lies.

Nothing of the weights is loaded: a tensor is a range of the graph file or of a file of external
data beside it. All of it is untrusted, and checked before it is used: names, offsets, lengths and
links, since neither onnx.checker nor onnxruntime refuses all that leads astray.
"""

from __future__ import annotations

import math
import mmap
import os
import stat
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import numpy as np

from dora_export.errors import InputError, listing, shown
from dora_export.machine import advice
from dora_export.onnx import wire
from dora_export.onnx.model import PROTOBUF_BYTES
from dora_export.tensors import DTYPES, Bytes, DType, FileRange, HeldBytes, TensorRef

if TYPE_CHECKING:
    import onnx

OLDEST_OPSET = 7  # onnxruntime runs nothing older
KEPT_BYTES = 4096  # values up to this size stay in the parsed graph (shapes, scalars)
# TensorProto.DataType -> storage type; the rest is only ever copied.
STORED = {1: "F32", 2: "U8", 3: "I8", 4: "U16", 5: "I16", 6: "I32", 7: "I64", 9: "BOOL",
          10: "F16", 11: "F64", 12: "U32", 13: "U64", 16: "BF16"}  # fmt: skip
HALF_BYTES = {21, 22}  # UINT4, INT4: two elements per byte
NAMES = {8: "STRING", 14: "COMPLEX64", 17: "FLOAT8E4M3FN", 19: "FLOAT8E5M2", 21: "UINT4",
         22: "INT4", 23: "FLOAT4E2M1"}  # fmt: skip
LFS = b"version https://git-lfs"


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """A tensor that a graph stores: an initializer, or the value of a Constant node.

    Attributes:
        name: The initializer's, or the Constant's output.
        data_type: TensorProto.DataType.
        shape: Dimensions.
        source: Where its bytes lie: row-major, little-endian. Bytes in memory cannot be replaced
            in place; None: neither (strings, sparse tensors).
        scope: Subgraph or function that it belongs to, "" for the main graph.
        span: The TensorProto within the graph file.
        is_external: Whether its bytes lie beside the graph file.
    """

    name: str
    data_type: int
    shape: tuple[int, ...]
    source: FileRange | HeldBytes | None = field(repr=False)
    scope: str
    span: wire.TensorSpan = field(repr=False)
    is_external: bool = False

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Number of bytes, 0 where that is not known."""
        if self.data_type in HALF_BYTES:
            return -(-self.size // 2)
        return self.size * self.dtype.itemsize if self.dtype else 0

    @property
    def dtype(self) -> DType | None:
        """Storage type, or None where there is no such type here."""
        name = STORED.get(self.data_type)
        return DTYPES[name] if name else None

    @property
    def is_float(self) -> bool:
        """Whether a merged weight can be written into it as it is."""
        return self.dtype is not None and self.dtype.mergeable

    @property
    def where(self) -> str:
        """Its name and place, for people."""
        inside = f" in {shown(self.scope)}" if self.scope else ""
        return f"'{shown(self.name)}'{inside}"

    @property
    def ref(self) -> TensorRef:
        """It as a stored tensor."""
        assert self.dtype is not None, f"Bug: {self.name} has no storage type"
        assert self.source is not None, f"Bug: {self.name} has no bytes"
        return TensorRef(self.name, self.dtype, self.shape, self.source)

    def read(self) -> Bytes:
        """Return all of its bytes; for small tensors."""
        assert self.source is not None, f"Bug: {self.name} has no bytes"
        out = np.empty(self.nbytes, np.uint8)
        self.source.read(0, out)
        return out


@dataclass(frozen=True)
class Use:
    """One place where a node takes a tensor.

    Attributes:
        node: The node, within ``Graph.model``.
        position: Which of its inputs.
        scope: Subgraph or function that the node belongs to, "" for the main graph.
    """

    node: onnx.NodeProto = field(repr=False)
    position: int
    scope: str


@dataclass(frozen=True, eq=False)
class Graph:
    """An ONNX model on disk; no weight has been read.

    Attributes:
        path: The ``.onnx`` file as the user named it; external data is looked for beside it.
        model: The model without its larger values (those are external data of no file).
        tensors: Every tensor that it stores.
        data_files: External data files by location, where they really are.
    """

    path: Path
    model: onnx.ModelProto = field(repr=False)
    tensors: tuple[StoredTensor, ...] = field(repr=False)
    data_files: Mapping[str, Path]

    @cached_property
    def nbytes(self) -> int:
        """Bytes of the graph file and its external data."""
        return sum(p.stat().st_size for p in (self.path, *self.data_files.values()))

    @cached_property
    def uses(self) -> Mapping[str, tuple[Use, ...]]:
        """Who takes a value, by its name; graphs inside see the names of those around them."""
        found: dict[str, list[Use]] = defaultdict(list)
        for node, scope in nodes(self.model):
            for position, name in enumerate(node.input):
                if name:
                    found[name].append(Use(node, position, scope))
        return {name: tuple(uses) for name, uses in found.items()}

    @cached_property
    def _makers(self) -> Mapping[str, onnx.NodeProto]:
        return {name: node for node in self.model.graph.node for name in node.output if name}

    def maker(self, name: str) -> onnx.NodeProto | None:
        """Return the node of the main graph that gives a value, or None."""
        return self._makers.get(name)

    @cached_property
    def by_name(self) -> Mapping[tuple[str, str], StoredTensor]:
        """Tensors by scope and name."""
        return {(t.scope, t.name): t for t in self.tensors}

    def lookup(self, name: str, scope: str) -> StoredTensor | None:
        """Return the tensor that a node sees under a name: its own graph's, or one around it."""
        while (found := self.by_name.get((scope, name))) is None and scope:
            scope = scope.rpartition("/")[0]
        return found

    @cached_property
    def origins(self) -> Mapping[str, str]:
        """What the exporter says a folded value was made from, by its name (torch's exporter)."""
        found = {}
        for info in self.model.graph.value_info:
            for entry in info.metadata_props:
                if entry.key.endswith("folded_from"):
                    found[info.name] = entry.value
        return found


def nodes(model: onnx.ModelProto) -> Iterator[tuple[onnx.NodeProto, str]]:
    """Yield every node of a model with its scope, those of subgraphs and functions included."""
    yield from _nodes_of(model.graph.node, "")
    for function in model.functions:
        yield from _nodes_of(function.node, f"/{function.name}")


def _nodes_of(found: Iterator[onnx.NodeProto], scope: str) -> Iterator[tuple[onnx.NodeProto, str]]:
    for node in found:
        yield node, scope
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                if inner.node or inner.initializer:
                    name = (*node.output, node.op_type)[0]
                    yield from _nodes_of(inner.node, f"{scope}/{name}.{attribute.name}")


def open_graph(path: Path) -> Graph:
    """Open an ONNX graph; reads its structure, no weight.

    Raises:
        InputError: There is no such file, it is no ONNX model or too old, or its external data is
            missing, lies outside of its folder, or is not what it should be; or it is beyond a
            limit.
    """
    import onnx  # noqa: PLC0415 - most commands do without
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # noqa: PLC0415

    size = _size(path)
    if size > PROTOBUF_BYTES:
        raise InputError(
            f"{path}: {size} bytes, more than the 2 GiB that a protobuf message can hold. Save the "
            "model with external data."
        )
    try:
        with (
            path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
            memoryview(mapped) as view,
        ):
            spans = wire.tensors(view)
            skeleton = wire.without_values(view, spans, KEPT_BYTES)
            protos = [onnx.TensorProto.FromString(_tensor_bytes(view, s)) for s in spans]
        model = onnx.ModelProto.FromString(skeleton)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}. {advice(error)}") from error
    except wire.TooMuch as error:
        raise InputError(
            f"{path}: {error}. No graph is known that has as much; if this is one, save it again "
            "with external data, else do not use it."
        ) from error
    except (wire.Malformed, DecodeError) as error:
        raise InputError(
            f"{path}: not an ONNX model, or damaged ({shown(error)}). Download or export it again."
        ) from error
    _check_model(path, model)
    _check_names(path, model, protos)
    places = _Places(path)
    tensors, problems = [], []
    for span, proto in zip(spans, protos, strict=True):
        try:
            tensors.append(_stored(path, span, proto, places))
        except _Problem as problem:
            name = proto.name or (*span.outputs, "a tensor")[0]
            problems.append(f"'{shown(name)}': {problem}")
    if problems:
        raise InputError(
            f"{path}: its tensors are not where it says:{listing(dict.fromkeys(problems))}\n"
            "Keep the graph and its external data together, as they were written; do not use a "
            "graph from an unknown source that leads elsewhere."
        )
    _check_tensors(path, tensors)
    return Graph(path, model, tuple(tensors), places.files)


class _Problem(Exception):  # noqa: N818 - gathered, then told together
    """Why a tensor cannot be read."""


def _size(path: Path) -> int:
    try:
        status = path.stat()
        if path.is_dir():
            found = sorted(p.name for p in path.glob("*.onnx"))
            which = f" It holds {', '.join(shown(n) for n in found[:4])}." if found else ""
            raise InputError(f"{path}: a folder. Pass the .onnx file.{which}")
        if not stat.S_ISREG(status.st_mode):  # a pipe: opening it waits
            raise InputError(f"{path}: not a regular file. Pass the .onnx file.")
        with path.open("rb") as file:
            start = file.read(len(LFS))
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read: {error.strerror}. Check the path of the graph."
        ) from error
    if start == LFS:
        raise InputError(
            f"{path}: a pointer of Git LFS, not the file itself. Fetch it with 'git lfs pull'."
        )
    if not status.st_size:
        raise InputError(f"{path}: empty. Download or export it again.")
    return status.st_size


def _tensor_bytes(view: memoryview, span: wire.TensorSpan) -> bytes:
    """Return a TensorProto without its values, if those are left where they are."""
    if span.value is None:
        return bytes(view[span.message.start : span.message.stop])
    parts = [
        view[first:stop]
        for number, _, first, _, stop in wire.fields(view, span.message.start, span.message.stop)
        if number != span.value_field
    ]
    return b"".join(parts)


def _check_model(path: Path, model: onnx.ModelProto) -> None:
    if not model.graph.node or not model.opset_import:
        raise InputError(
            f"{path}: not an ONNX model: no {'nodes' if model.opset_import else 'opset'} in it. "
            "Check the path."
        )
    opset = max((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), default=0)
    if 0 < opset < OLDEST_OPSET:
        raise InputError(
            f"{path}: opset {opset}, expected {OLDEST_OPSET} or later, which onnxruntime runs. "
            "Convert it with onnx.version_converter, or export it again."
        )


def _check_names(path: Path, model: onnx.ModelProto, tensors: list[onnx.TensorProto]) -> None:
    """Refuse names that are not UTF-8, which protobuf gives as bytes, as no other name is."""
    names: list[object] = [t.name for t in tensors]
    names += [value.name for value in (*model.graph.input, *model.graph.output)]
    for node, _ in nodes(model):
        names += [node.name, node.op_type, node.domain, *node.input, *node.output]
    wrong = next((name for name in names if not isinstance(name, str)), None)
    if wrong is not None:
        raise InputError(
            f"{path}: damaged: the name {shown(wrong)} is no text in UTF-8. Download or export it "
            "again."
        )


class _Places:
    """The files beside a graph, each looked at once."""

    def __init__(self, path: Path) -> None:
        self.folder = path.parent
        self.real = Path(os.path.realpath(self.folder))
        self.files: dict[str, Path] = {}
        self.sizes: dict[str, int] = {}

    def look(self, location: str) -> None:
        """Find out where a file of external data is.

        Raises:
            _Problem: It is missing, is no file of its own, or lies outside of the folder.
        """
        if location in self.files:
            return
        if not isinstance(location, str):  # protobuf gives text that is not UTF-8 as bytes
            raise _Problem(f"its data is in {shown(location)}, which is no name of a file")
        pure = PurePosixPath(location)
        if (
            not location
            or pure.is_absolute()
            or ".." in pure.parts
            or any(c in location for c in "\\\0:*")
        ):
            raise _Problem(f"its data is in '{shown(location)}', outside of the graph's folder")
        path = self.folder / location
        real = Path(os.path.realpath(path))
        if not real.is_relative_to(self.real) and not self._is_cached(real):
            raise _Problem(f"its data is in '{shown(location)}', a link that leads outside")
        try:
            status = real.stat()
        except OSError as error:
            raise _Problem(f"its data file '{shown(location)}' is missing") from error
        if not real.is_file():
            raise _Problem(f"its data is in '{shown(location)}', which is no file")
        if status.st_nlink > 1:
            raise _Problem(
                f"its data is in '{shown(location)}', a file with {status.st_nlink} names (hard "
                "links), which may be another's; copy it"
            )
        self.files[location], self.sizes[location] = real, status.st_size

    def _is_cached(self, real: Path) -> bool:
        """Return whether a file is a blob of the Hugging Face cache that the graph is in.

        There, ``models--org--name/snapshots/REVISION/...`` are links into
        ``models--org--name/blobs``. Source: huggingface_hub, file_download.py.
        """
        for parent in (self.folder.absolute(), *self.folder.absolute().parents):
            if parent.name == "snapshots" and parent.parent.name.startswith("models--"):
                return real.parent == Path(os.path.realpath(parent.parent / "blobs"))
        return False


def _stored(
    path: Path, span: wire.TensorSpan, proto: onnx.TensorProto, places: _Places
) -> StoredTensor:
    name = proto.name
    if span.op_type:
        constant = span.op_type == "Constant" and span.attribute == "value"
        name = (*span.outputs, "")[0] if constant else f"{span.op_type}.{span.attribute}"
    shape = tuple(proto.dims)
    if any(d < 0 for d in shape):
        raise _Problem(f"has shape {shape}")
    scope = span.scope
    tensor = StoredTensor(name, proto.data_type, shape, None, scope, span)
    source: FileRange | HeldBytes | None = None
    external = proto.data_location == 1
    if span.is_sparse:
        return tensor
    if external:
        source = _external(proto, tensor, places)
    elif span.value is not None:
        start, stop = span.value
        if tensor.nbytes and stop - start != tensor.nbytes:
            raise _Problem(f"holds {stop - start} bytes, expected {tensor.nbytes} for {shape}")
        source = FileRange(path, start, stop - start)
    elif tensor.nbytes:
        source = HeldBytes(path, _decoded(proto, tensor))
    return StoredTensor(name, proto.data_type, shape, source, scope, span, external)


def _external(proto: onnx.TensorProto, tensor: StoredTensor, places: _Places) -> FileRange:
    said = {entry.key: entry.value for entry in proto.external_data}
    location = said.get("location", "")
    places.look(location)
    try:
        offset = int(said.get("offset", "0"))
        length = int(said.get("length", tensor.nbytes))
    except ValueError as error:
        raise _Problem("its offset or length is no number") from error
    size, place = places.sizes[location], shown(location)
    if offset < 0 or length < 0 or offset + length > size:
        raise _Problem(
            f"its data is said to be bytes {offset} to {offset + length} of '{place}', which has "
            f"{size}"
        )
    if tensor.nbytes and length != tensor.nbytes:
        raise _Problem(
            f"its data is said to have {length} bytes, expected {tensor.nbytes} for {tensor.shape}"
        )
    if "checksum" in said:
        raise _Problem("its data has a checksum, which new weights would belie; save it without")
    return FileRange(places.files[location], offset, length)


def _decoded(proto: onnx.TensorProto, tensor: StoredTensor) -> Bytes:
    """Return the bytes of values that are stored one by one."""
    import onnx  # noqa: PLC0415 - loaded already

    try:
        array = np.ascontiguousarray(onnx.numpy_helper.to_array(proto))
    except Exception as error:
        # onnx raises what it meets: ValueError, TypeError, its own classes.
        raise _Problem(f"cannot be decoded ({shown(error)})") from error
    found = array.reshape(-1).view(np.uint8)
    if tensor.data_type in HALF_BYTES:
        raise _Problem("4-bit values stored one by one; save it with raw data")
    if found.nbytes != tensor.nbytes:
        raise _Problem(f"holds {array.size} elements, expected {tensor.size} for {tensor.shape}")
    return found


def _check_tensors(path: Path, tensors: list[StoredTensor]) -> None:
    """Refuse names that occur twice, and tensors that share some of their bytes but not all."""
    seen: set[tuple[str, str]] = set()
    problems = []
    for tensor in tensors:
        key = (tensor.scope, tensor.name)
        if key in seen and tensor.name and not tensor.span.op_type:
            problems.append(f"{tensor.where}: stored twice")
        seen.add(key)
    ranges = sorted(
        {(str(t.source.path), t.source.start, t.source.start + t.source.nbytes): t.where
         for t in tensors if isinstance(t.source, FileRange) and t.source.nbytes}.items()
    )  # fmt: skip
    for ((file, _, stop), name), ((other, start, _), next_name) in pairwise(ranges):
        if file == other and start < stop:
            problems.append(f"{name} and {next_name}: share some of their bytes")
    if problems:
        raise InputError(f"{path}: malformed:{listing(problems)}\nExport it again.")
