"""Where a serialised ONNX model keeps its tensors: byte ranges, found without loading them.

A protobuf library holds a message whole, weights and all, and writes it anew. Here the message's
wire format is walked instead: big values stay where they are and are read, or replaced, in place;
every other byte of the file can be taken over as it is. The structure itself (nodes, names, types)
is parsed by the onnx library, from the file without its big values.

Source: protobuf.dev/programming-guides/encoding; field numbers from onnx/onnx.proto.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from dora_export import limits

Buffer = bytes | memoryview
Range = tuple[int, int]

VARINT, FIXED64, DELIMITED, FIXED32 = 0, 1, 2, 5
MAX_DEPTH = 40  # of graphs within nodes within graphs; no exporter nests more than a few
# Message -> field -> message within it, as far as tensors can lie below.
NESTED = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {},
}
# Lists of numbers, of which a byte may become an object: attributes' floats and ints, dimensions.
PACKED = {"attribute": (7, 8), "tensor": (1,)}
NODE_OUTPUT, NODE_NAME, NODE_OP = 2, 3, 4
ATTRIBUTE_NAME, FUNCTION_NAME = 1, 1
DATA_TYPE, FLOAT_DATA, RAW_DATA, DOUBLE_DATA, EXTERNAL_DATA, DATA_LOCATION = 2, 4, 9, 10, 13, 14
FLOAT, DOUBLE = 1, 11  # TensorProto.DataType
# Packed values of these fields are the little-endian bytes that raw_data would have.
PACKED_AS_RAW = {FLOAT_DATA: FLOAT, DOUBLE_DATA: DOUBLE}


class Malformed(Exception):  # noqa: N818 - told as a refusal by whoever knows the file
    """The bytes are no protobuf message."""


class TooMuch(Malformed):
    """The bytes are more of a message than any model is."""


@dataclass
class _Budget:
    """What may still be walked over.

    Attributes:
        fields: Fields of messages, and numbers in lists of them.
        tensors: Tensors.
    """

    fields: int
    tensors: int

    def take(self, count: int) -> None:
        """Take fields, or numbers.

        Raises:
            TooMuch: There are no more.
        """
        self.fields -= count
        if self.fields < 0:
            raise TooMuch(f"more than {limits.GRAPH_FIELDS} fields")


@dataclass(frozen=True)
class Message:
    """A length-delimited message within the file.

    Attributes:
        kind: As in ``NESTED``.
        length_at: Where its length begins; the message itself begins right after that.
        start: Its first byte.
        stop: One past its last byte.
    """

    kind: str
    length_at: int
    start: int
    stop: int


@dataclass(frozen=True)
class TensorSpan:
    """A TensorProto within the file.

    Attributes:
        message: Where it is.
        parents: What it lies in, outermost first; the model itself is left out.
        op_type: Operator of the node whose attribute it is, "" for an initializer.
        attribute: Name of that attribute, "" for an initializer.
        outputs: That node's outputs.
        scope: Names of the nodes and functions whose bodies it lies in, "" in the main graph.
        is_sparse: It is part of a sparse tensor.
        value: Where its values lie as plain bytes, or None: elsewhere, or in another form.
        value_field: The field that holds them.
    """

    message: Message
    parents: tuple[Message, ...]
    op_type: str = ""
    attribute: str = ""
    outputs: tuple[str, ...] = ()
    scope: str = ""
    is_sparse: bool = False
    value: Range | None = None
    value_field: int = 0


def varint(value: int) -> bytes:
    """Return a number as protobuf writes it."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes((*out, value))


def read_varint(buffer: Buffer, at: int, stop: int) -> tuple[int, int]:
    """Return the number at a position, and the position behind it.

    Raises:
        Malformed: It does not end before ``stop``, or has more than 64 bits.
    """
    value = 0
    for shift in range(0, 70, 7):
        if at >= stop:
            break
        byte = buffer[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            if value >> 64:
                break
            return value, at
    raise Malformed(f"a number that does not end, at byte {at}")


def fields(buffer: Buffer, start: int, stop: int) -> Iterator[tuple[int, int, int, int, int]]:
    """Yield field number, wire type, start of the field, start and stop of its value.

    Raises:
        Malformed: A field is of no known kind, or reaches beyond ``stop``.
    """
    at = start
    while at < stop:
        first = at
        key, at = read_varint(buffer, at, stop)
        number, kind = key >> 3, key & 7
        if number == 0:
            raise Malformed(f"field 0, at byte {first}")
        if kind == VARINT:
            _, end = read_varint(buffer, at, stop)
        elif kind == FIXED64:
            end = at + 8
        elif kind == FIXED32:
            end = at + 4
        elif kind == DELIMITED:
            length, at = read_varint(buffer, at, stop)
            end = at + length
        else:
            raise Malformed(f"wire type {kind}, at byte {first}")
        if end > stop:
            raise Malformed(f"a field that reaches to byte {end} of {stop}, at byte {first}")
        yield number, kind, first, at, end
        at = end


def tensors(buffer: Buffer) -> list[TensorSpan]:
    """Return every tensor of a model, those in attributes, subgraphs and functions included.

    Raises:
        Malformed: The bytes are no model.
        TooMuch: There is more of it than any model has.
    """
    found: list[TensorSpan] = []
    budget = _Budget(limits.GRAPH_FIELDS, limits.GRAPH_TENSORS)
    whole = Message("model", 0, 0, len(buffer))
    _walk(buffer, whole, (), TensorSpan(_NOWHERE, ()), found, budget)
    return found


_NOWHERE = Message("", 0, 0, 0)


def _walk(
    buffer: Buffer,
    message: Message,
    parents: tuple[Message, ...],
    context: TensorSpan,
    found: list[TensorSpan],
    budget: _Budget,
) -> None:
    if len(parents) > MAX_DEPTH:
        raise Malformed(f"graphs nested {MAX_DEPTH} deep")
    # Before any of it is looked at twice, or becomes objects.
    packed = PACKED.get(message.kind, ())
    for number, kind, _, start, stop in fields(buffer, message.start, message.stop):
        budget.take(stop - start if kind == DELIMITED and number in packed else 1)
    if message.kind == "tensor":
        if len(found) >= budget.tensors:
            raise TooMuch(f"more than {budget.tensors} tensors")
        found.append(_tensor(buffer, message, parents, context))
        return
    context = _within(buffer, message, context)
    nested = NESTED[message.kind]
    inside = parents if message.kind == "model" else (*parents, message)
    for number, kind, first, start, stop in fields(buffer, message.start, message.stop):
        if kind == DELIMITED and number in nested:
            key_stop = read_varint(buffer, first, stop)[1]
            part = Message(nested[number], key_stop, start, stop)
            _walk(buffer, part, inside, context, found, budget)


def _within(buffer: Buffer, message: Message, context: TensorSpan) -> TensorSpan:
    """Return what is known of the tensors in a message."""
    if message.kind == "node":
        outputs = tuple(_strings(buffer, message, NODE_OUTPUT))
        op_type = "".join(_strings(buffer, message, NODE_OP))
        return replace(context, op_type=op_type, outputs=outputs)
    if message.kind == "attribute":
        name = "".join(_strings(buffer, message, ATTRIBUTE_NAME))
        return replace(context, attribute=name)
    if message.kind == "graph" and context.op_type:
        inner = f"{context.scope}/{(*context.outputs, context.op_type)[0]}.{context.attribute}"
        return replace(context, op_type="", attribute="", outputs=(), scope=inner)
    if message.kind == "function":
        return replace(context, scope="/" + "".join(_strings(buffer, message, FUNCTION_NAME)))
    if message.kind == "sparse":
        return replace(context, is_sparse=True)
    return context


def _strings(buffer: Buffer, message: Message, field: int) -> Iterator[str]:
    for number, kind, _, start, stop in fields(buffer, message.start, message.stop):
        if number == field and kind == DELIMITED:
            yield bytes(buffer[start:stop]).decode("utf-8", "replace")


def _tensor(
    buffer: Buffer, message: Message, parents: tuple[Message, ...], context: TensorSpan
) -> TensorSpan:
    data_type, values = 0, []
    for number, kind, _, start, stop in fields(buffer, message.start, message.stop):
        if number == DATA_TYPE and kind == VARINT:
            data_type = read_varint(buffer, start, stop)[0]
        elif number in (RAW_DATA, FLOAT_DATA, DOUBLE_DATA):
            values.append((number, kind, start, stop))
    span = replace(context, message=message, parents=parents)
    if len(values) == 1:  # more are one list in parts
        number, kind, start, stop = values[0]
        plain = number == RAW_DATA or PACKED_AS_RAW[number] == data_type
        if kind == DELIMITED and plain:
            return replace(span, value=(start, stop), value_field=number)
    return span


def without_values(buffer: Buffer, spans: Sequence[TensorSpan], larger_than: int) -> bytes:
    """Return the model with its larger values left out, as external data of no file.

    Args:
        buffer: The model.
        spans: Its tensors.
        larger_than: Bytes; values of at most this size stay.

    Raises:
        TooMuch: What is left is more than any model has.
    """
    edits: dict[Range, bytes] = {}
    touched = []
    for span in spans:
        if span.value is None or span.value[1] - span.value[0] <= larger_than:
            continue
        start, stop = span.value
        entries = b"".join(
            _delimited(EXTERNAL_DATA, _delimited(1, key) + _delimited(2, value))
            for key, value in ((b"location", b""), (b"offset", b"%d" % start),
                               (b"length", b"%d" % (stop - start)))
        )  # fmt: skip
        pointer = entries + varint(DATA_LOCATION << 3 | VARINT) + varint(1)
        edits[_field_of(buffer, span)] = pointer
        touched.append(span)
    pieces = spliced(len(buffer), edits, touched)
    nbytes = sum(len(p) if isinstance(p, bytes) else p[1] - p[0] for p in pieces)
    if nbytes > limits.GRAPH_BYTES:
        raise TooMuch(f"{nbytes} bytes without the weights that are stored as plain bytes")
    return b"".join(p if isinstance(p, bytes) else bytes(buffer[p[0] : p[1]]) for p in pieces)


def _field_of(buffer: Buffer, span: TensorSpan) -> Range:
    for _, _, first, start, stop in fields(buffer, span.message.start, span.message.stop):
        if (start, stop) == span.value:
            return first, stop
    raise AssertionError("Bug: a tensor without the value that was found in it")


def _delimited(number: int, value: bytes) -> bytes:
    return varint(number << 3 | DELIMITED) + varint(len(value)) + value


def spliced(
    nbytes: int, edits: Mapping[Range, bytes], touched: Sequence[TensorSpan]
) -> list[Range | bytes]:
    """Return a file's new content: ranges of the old one, and new bytes between them.

    Args:
        nbytes: Size of the file.
        edits: Ranges to replace, each within one of ``touched``.
        touched: The tensors that they lie in; lengths of messages are put right.
    """
    edits = dict(edits)
    ordered = sorted(edits)
    grown: dict[Message, int] = defaultdict(int)
    parent: dict[Message, Message] = {}
    for span in touched:
        chain = (*span.parents, span.message)
        parent.update(zip(chain[1:], chain, strict=False))
        first = bisect_left(ordered, (span.message.start, 0))
        last = bisect_left(ordered, (span.message.stop, 0))
        grown[span.message] = sum(len(edits[r]) - (r[1] - r[0]) for r in ordered[first:last])
    # Innermost first: a length may itself take another number of bytes.
    for message in sorted({*parent, *parent.values(), *grown}, key=lambda m: m.stop - m.start):
        if delta := grown[message]:
            length = varint(message.stop - message.start + delta)
            edits[message.length_at, message.start] = length
            if message in parent:
                grown[parent[message]] += delta + len(length) - (message.start - message.length_at)
    pieces: list[Range | bytes] = []
    at = 0
    for start, stop in sorted(edits):
        if at < start:
            pieces.append((at, start))
        pieces.append(edits[start, stop])
        at = stop
    if at < nbytes:
        pieces.append((at, nbytes))
    return pieces
