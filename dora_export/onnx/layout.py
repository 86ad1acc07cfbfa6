"""Where the bytes of a re-weighted graph go: every file as it was, but for some tensors' values."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dora_export.errors import InputError
from dora_export.machine import advice
from dora_export.onnx import wire
from dora_export.onnx.graph_file import Graph, StoredTensor
from dora_export.tensors import FileRange, HeldBytes


@dataclass(frozen=True)
class Place:
    """Where a tensor's bytes lie in the output.

    Attributes:
        file: Position in ``Layout.names``.
        offset: Of its first byte.
        nbytes: How many.
    """

    file: int
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Copied:
    """Bytes that are taken over.

    Attributes:
        file: Position in ``Layout.names``.
        offset: Where they go.
        source: Where they come from.
    """

    file: int
    offset: int
    source: FileRange | bytes = field(repr=False)

    @property
    def nbytes(self) -> int:
        """How many."""
        return len(self.source) if isinstance(self.source, bytes) else self.source.nbytes


@dataclass(frozen=True)
class Layout:
    """The files of a re-weighted graph.

    Attributes:
        names: Of the graph, then of its external data, relative to the output.
        sizes: Their bytes.
        copied: What is taken over; with the places of the rewritten tensors it is every byte.
        places: Where each rewritten tensor goes.
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    copied: tuple[Copied, ...]
    places: Mapping[StoredTensor, Place]

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(self.sizes)


def lay_out(graph: Graph, rewritten: Iterable[StoredTensor]) -> Layout:
    """Return where everything goes when the values of some tensors are written anew.

    Values that are stored one by one in the graph file become plain bytes there; all else keeps its
    place, or moves as a whole behind those.

    Raises:
        InputError: The graph file cannot be read.
    """
    rewritten = list(dict.fromkeys(rewritten))
    names = [graph.path.name, *graph.data_files]
    at = {path: i for i, path in enumerate(graph.data_files.values(), 1)}
    sizes: list[int] = []
    copied: list[Copied] = []
    inline = [t for t in rewritten if not t.is_external]
    size, pieces, places = _graph_file(graph, inline)
    sizes.append(size)
    copied += pieces
    by_file: dict[int, list[StoredTensor]] = defaultdict(list)
    for tensor in rewritten:
        if tensor.is_external:
            assert isinstance(tensor.source, FileRange), "Bug: external data is in a file"
            by_file[at[tensor.source.path]].append(tensor)
            file = at[tensor.source.path]
            places[tensor] = Place(file, tensor.source.start, tensor.source.nbytes)
    for path, file in at.items():
        nbytes = path.stat().st_size
        sizes.append(nbytes)
        taken = [(places[t].offset, places[t].offset + places[t].nbytes) for t in by_file[file]]
        copied += [
            Copied(file, start, FileRange(path, start, stop - start))
            for start, stop in _gaps(0, nbytes, taken)
        ]
    return Layout(tuple(names), tuple(sizes), tuple(copied), places)


def _graph_file(
    graph: Graph, inline: Sequence[StoredTensor]
) -> tuple[int, list[Copied], dict[StoredTensor, Place]]:
    """Return the graph file's size, what is taken over of it, and where tensors in it go."""
    path = graph.path
    held = [t for t in inline if isinstance(t.source, HeldBytes)]
    edits, replaced = {}, {}
    for tensor in held:
        content = _as_raw(path, tensor)
        edits[tensor.span.message.start, tensor.span.message.stop] = content
        replaced[content] = tensor
    taken = {}
    for tensor in inline:
        if isinstance(tensor.source, FileRange):
            taken[tensor.source.start, tensor.source.start + tensor.source.nbytes] = tensor
    copied: list[Copied] = []
    places: dict[StoredTensor, Place] = {}
    offset = 0
    for piece in wire.spliced(path.stat().st_size, edits, [t.span for t in held]):
        if isinstance(piece, bytes):
            new = replaced.get(piece)
            tail = new.nbytes if new is not None else 0
            copied.append(Copied(0, offset, piece[: len(piece) - tail]))
            offset += len(piece)
            if new is not None:
                places[new] = Place(0, offset - tail, tail)
            continue
        start, stop = piece
        inside = {r: t for r, t in taken.items() if start <= r[0] and r[1] <= stop}
        for first, last in _gaps(start, stop, list(inside)):
            copied.append(Copied(0, offset + first - start, FileRange(path, first, last - first)))
        for (first, last), tensor in inside.items():
            places[tensor] = Place(0, offset + first - start, last - first)
        offset += stop - start
    for tensor in inline:  # two names for one range
        if tensor not in places:
            assert isinstance(tensor.source, FileRange), "Bug: the others are placed above"
            source = tensor.source
            places[tensor] = places[taken[source.start, source.start + source.nbytes]]
    return offset, copied, places


def _as_raw(path: Path, tensor: StoredTensor) -> bytes:
    """Return a TensorProto that ends in its values as plain bytes, those still to be written."""
    import onnx  # noqa: PLC0415 - loaded already

    message = tensor.span.message
    try:
        with path.open("rb") as file:
            file.seek(message.start)
            proto = onnx.TensorProto.FromString(file.read(message.stop - message.start))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}. {advice(error)}") from error
    for values in ("int32_data", "float_data", "double_data", "int64_data", "uint64_data"):
        proto.ClearField(values)
    name = proto.name.encode()
    proto.ClearField("name")
    # The name goes in front: no two of these messages are then the same.
    head = wire.varint(8 << 3 | wire.DELIMITED) + wire.varint(len(name)) + name
    raw = wire.varint(wire.RAW_DATA << 3 | wire.DELIMITED) + wire.varint(tensor.nbytes)
    rest: bytes = proto.SerializeToString()
    return b"".join((head, rest, raw, bytes(tensor.nbytes)))


def _gaps(start: int, stop: int, taken: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Yield what is left of a range of bytes; parts of the same bytes may be taken twice."""
    at = start
    for first, last in sorted(set(taken)):
        if at < first:
            yield at, first
        at = max(at, last)
    if at < stop:
        yield at, stop
