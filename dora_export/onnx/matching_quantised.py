"""Quantised weights: found by what the base gives when it is quantised as the graph is.

onnxruntime's own rounding to nearest is deterministic, so a quantised weight can be told by its
bytes like a float one. What calibrated tools write (GPTQ, AWQ, HQQ) is never reproduced, and hence
never taken for something that it is not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dora_export.onnx.encodings import (
    Encoding,
    GatherBlocks,
    Int8,
    Int8Rows,
    NBits,
    converted,
)
from dora_export.onnx.graph_file import Graph, StoredTensor, nodes
from dora_export.onnx.lines import Lines
from dora_export.onnx.matching import Match, Weight
from dora_export.onnx.matching_lines import (
    ByLines,
    Found,
    Keys,
    Sample,
    base_keys,
    keys_of,
    line_keys,
    look_up,
    positions,
    unknown,
    views,
)
from dora_export.onnx.matching_proof import encoded, lines_at_once, proven
from dora_export.tensors import F16, F32, Bytes, DType

if TYPE_CHECKING:
    import onnx

BLOCK_LINES = 4096
FIRST_ROWS = 8
UINT8, INT8, UINT4, INT4 = 2, 3, 21, 22  # TensorProto.DataType
# Operator -> inputs with the quantised weight, its scale and its zero point; None: found elsewhere.
INT8_INPUTS: Mapping[str, tuple[int, int | None, int]] = {
    "MatMulInteger": (1, None, 3),
    "ConvInteger": (1, None, 3),
    "DynamicQuantizeMatMul": (1, 2, 3),
    "MatMulIntegerToFloat": (1, 3, 5),
    "QAttention": (1, 4, 7),
    "DequantizeLinear": (0, 1, 2),
}
NBITS = ("MatMulNBits",)
LOOKED_UP = "GatherBlockQuantized"
THROUGH = ("Gather", "Transpose", "Reshape", "Identity")  # between a weight and DequantizeLinear


@dataclass(frozen=True, eq=False)
class Quantised:
    """A quantised weight of a graph, and how it may have been made.

    Attributes:
        node: Name of the node that takes it, for people.
        guesses: Each way to read it: a match that says nothing yet of its lines, what samples rows
            of the base, and the keys of its own lines.
        why: Why there are none, for people.
    """

    node: str
    guesses: tuple[Guess, ...] = field(repr=False)
    why: str = ""


@dataclass(frozen=True, eq=False)
class Guess:
    """One way to read a quantised weight.

    Attributes:
        like: A match that says nothing yet of its lines.
        name: Of the way in which rows are sampled: equal for equal samples.
        sample: Returns bytes that tell rows of the base apart.
        line_keys: Returns the keys of its own lines.
        zero: Sample of a row of zeros.
    """

    like: Match
    name: str
    sample: Sample
    line_keys: Callable[[], Keys]
    zero: Bytes


def quantised(graph: Graph) -> Iterator[Quantised]:
    """Yield every quantised weight of a graph, each once."""
    made = {o: n for n, _ in nodes(graph.model) for o in n.output}
    seen: set[int] = set()
    for node, scope in nodes(graph.model):
        found = None
        if node.op_type in NBITS:
            found = _nbits(graph, node, scope)
        elif node.op_type == LOOKED_UP:
            found = _looked_up(graph, node, scope)
        elif node.op_type in INT8_INPUTS:
            found = _int8(graph, node, scope, made)
        if found is None:
            continue
        data, what = found
        if id(data) not in seen:
            seen.add(id(data))
            yield what


def find(what: Quantised, by_lines: ByLines) -> list[Found]:
    """Return what a quantised weight may be: whole base tensors first, else by its lines."""
    for guess in what.guesses:
        weights = by_lines.by_length.get(guess.like.length, [])
        if not weights:
            continue
        keys = guess.line_keys()
        whole = [_whole(guess, w, keys.size) for w in weights if _is_whole(guess, w, keys)]
        if whole:
            none = np.empty(0, np.int64)
            return [Found(m, m.lines.count, none, none) for m in whole]
        index = by_lines.index(guess.like.length, guess.name, guess.sample)
        zero = keys == keys_of(guess.zero)[0]
        found = look_up(index, keys, zero, guess.like.holders, guess.like)
        if found is not None and not found.strange.size:
            return [found]
    return []


def _is_whole(guess: Guess, weight: Weight, keys: Keys) -> bool:
    """Return whether all lines seem to be a base tensor's rows in turn; most fail at the first."""
    assert weight.base is not None, "Bug: gathered by the length of its rows"
    length = guess.like.length
    if weight.base.size // length != keys.size:
        return False
    first = base_keys(weight, length, guess.sample, FIRST_ROWS)
    return np.array_equal(first, keys[:FIRST_ROWS]) and np.array_equal(
        base_keys(weight, length, guess.sample), keys
    )


def _whole(guess: Guess, weight: Weight, count: int) -> Match:
    return replace(
        guess.like,
        weights=(weight,),
        weight_of=np.zeros(count, np.int32),
        row_of=np.arange(count),
    )


def proven_quantised(match: Match) -> Match | None:
    """Return a match with its proof, or None where the base does not give the graph's bytes.

    The scale of a whole tensor must follow from the base as well, since the merged one's will.

    Raises:
        InputError: The base or the graph cannot be read.
    """
    encoding = match.encoding
    if not isinstance(encoding, Int8):
        return proven(match)
    low, high = _range_of(match)
    for symmetric in (True, False):
        for reduced in (False, True):
            tried = replace(encoding, symmetric=symmetric, reduced=reduced)
            if tried.of_range(low, high) == tried:
                return proven(replace(match, encoding=tried))
    return None


def _range_of(match: Match) -> tuple[float, float]:
    """Return the least and the largest of the base's values that a match holds."""
    low, high = 0.0, 0.0
    plain = replace(match, encoding=_Values(match.encoding.source))
    step = lines_at_once(match)
    for first in range(0, match.lines.count, step):
        (block,) = encoded(plain, first, min(first + step, match.lines.count))
        values = block.view(f"f{match.encoding.source.itemsize}")
        low, high = min(low, float(values.min())), max(high, float(values.max()))
    return low, high


@dataclass(frozen=True)
class _Values:
    """Rows as they come."""

    source: DType
    name: str = "as they come"

    def encode(self, rows: NDArray[Any]) -> tuple[Bytes, ...]:
        return (np.ascontiguousarray(rows).view(np.uint8),)


# --- MatMulNBits


def _nbits(graph: Graph, node: onnx.NodeProto, scope: str) -> tuple[StoredTensor, Quantised] | None:
    inputs = [graph.lookup(name, scope) if name else None for name in node.input]
    inputs += [None] * (6 - len(inputs))
    data, scales, zeros, order = inputs[1:5]
    if data is None or scales is None or data.source is None or scales.source is None:
        return None  # quantised weights that come from elsewhere
    ints = {a.name: a.i for a in node.attribute}
    name = node.name or data.name
    if order is not None and order.size:
        return data, Quantised(name, (), "in an order of its own (g_idx)")
    shape = (ints.get("N", 0), ints.get("K", 0))
    bits, block = ints.get("bits", 4), ints.get("block_size", 0)
    return data, _blocks(name, (data, scales, zeros), shape, bits, block)


def _blocks(
    name: str,
    held: tuple[StoredTensor, StoredTensor, StoredTensor | None],
    shape: tuple[int, int],
    bits: int,
    block: int,
) -> Quantised:
    """Return how rows of blocks as MatMulNBits has them may have been made."""
    (data, scales, zeros), (count, columns) = held, shape
    if bits not in (4, 8):
        return Quantised(name, (), f"{bits} bits")
    packs = 8 // bits
    blocks = -(-columns // block) if block else 0
    sizes = (count * blocks * (block // packs), count * blocks)
    if not count or not blocks or (data.nbytes, scales.size) != sizes or scales.dtype is None:
        return Quantised(name, (), "of a shape of its own")
    stored = [_byte_rows(data, count), _byte_rows(scales, count)]
    ways = [(False, 3)] if zeros is not None else [(True, 2)]
    if zeros is not None:
        if zeros.nbytes != count * -(-blocks // packs) or zeros.data_type != UINT8:
            return Quantised(name, (), "with zero points that are no integers")
        stored.append(_byte_rows(zeros, count))
        if (zeros.read() == (0x88 if bits == 4 else 0x80)).all():
            ways.append((True, 2))  # symmetric, with zero points written out
    values = (F16, F32) if scales.dtype is F16 else (F32,)
    guesses = [
        _blocks_guess(NBits(bits, block, symmetric, kind, scales.dtype), stored[:holders], columns)
        for symmetric, holders in ways
        for kind in values
    ]
    return Quantised(name, tuple(guesses))


def _looked_up(
    graph: Graph, node: onnx.NodeProto, scope: str
) -> tuple[StoredTensor, Quantised] | None:
    """Return an embedding that is quantised by itself.

    Source: onnxruntime's contrib operator GatherBlockQuantized: int4 or uint4 as its own quantiser
    writes it; uint8 in the layout of MatMulNBits.
    """
    inputs = [graph.lookup(name, scope) if name else None for name in node.input]
    inputs += [None] * (4 - len(inputs))
    data, scales, zeros = inputs[0], inputs[2], inputs[3]
    if data is None or scales is None or data.source is None or scales.source is None:
        return None
    ints = {a.name: a.i for a in node.attribute}
    name, block = node.name or data.name, ints.get("block_size", 128)
    axes = (ints.get("gather_axis", 0), ints.get("quantize_axis", 1) % max(1, len(data.shape)))
    if len(data.shape) != 2 or axes != (0, 1) or block < 1:
        return data, Quantised(name, (), "looked up along other axes")
    count, columns = data.shape
    if data.data_type == UINT8:
        bits = ints.get("bits", 4)
        shape = (count, columns * 8 // max(1, bits))
        return data, _blocks(name, (data, scales, zeros), shape, bits, block)
    symmetric = zeros is None
    kinds = (INT4, None) if symmetric else (UINT4, UINT4)
    if (data.data_type, zeros.data_type if zeros else None) != kinds:
        return data, Quantised(name, (), "of a type of its own")
    blocks = columns // block
    whole = columns % block == 0 and columns % 2 == 0 and (symmetric or blocks % 2 == 0)
    if not whole or not count or scales.size != count * blocks or scales.dtype not in (F16, F32):
        return data, Quantised(name, (), "of a shape of its own")
    held = [_byte_rows(t, count) for t in (data, scales, zeros) if t is not None]
    encoding = GatherBlocks(block, symmetric, scales.dtype)
    return data, Quantised(name, (_blocks_guess(encoding, held, columns),))


def _byte_rows(tensor: StoredTensor, count: int) -> Lines:
    return Lines(tensor, 1, 1, count, tensor.nbytes // count)


def _blocks_guess(encoding: NBits | GatherBlocks, stored: Sequence[Lines], length: int) -> Guess:
    blocks, block = -(-length // encoding.block), encoding.block
    blob = stored[0].columns // blocks
    whole = length // block  # of which all elements are the row's own
    some = sorted({0, whole // 2}) if whole else [0]
    at = np.concatenate([np.arange(b * block, min((b + 1) * block, length)) for b in some])
    packed = np.concatenate([np.arange(b * blob, (b + 1) * blob) for b in some])

    def sample(rows: NDArray[Any], dtype: DType) -> Bytes:
        picked = np.ascontiguousarray(converted(rows[:, at], dtype, encoding.source))
        return encoding.encode(picked)[0]

    def keys() -> Keys:
        return line_keys(stored[0], packed)

    like = replace(unknown(stored[0], encoding, length), holders=tuple(stored))
    zero = sample(np.zeros((1, length), encoding.source.raw), encoding.source)
    return Guess(like, encoding.name + encoding.source.name, sample, keys, zero)


# --- eight bits with a scale for a tensor or a row


def _int8(
    graph: Graph, node: onnx.NodeProto, scope: str, made: Mapping[str, onnx.NodeProto]
) -> tuple[StoredTensor, Quantised] | None:
    at = INT8_INPUTS[node.op_type]
    data = _weight(graph, node, at[0], scope, made)
    if data is None or data.data_type not in (UINT8, INT8) or data.source is None:
        return None
    scale = (_scale_of(graph, node, scope) if at[1] is None
             else graph.lookup(node.input[at[1]], scope))  # fmt: skip
    named = node.input[at[2]] if len(node.input) > at[2] else ""
    zero = graph.lookup(named, scope) if named else None
    name = node.name or data.name
    if scale is None or scale.source is None or scale.dtype not in (F32, F16):
        return data, Quantised(name, (), "without a scale that is stored")
    zeros = np.zeros(1, np.int64)
    if zero is not None and zero.source is not None:
        signed = zero.data_type == INT8
        zeros = zero.read().view(np.int8 if signed else np.uint8).astype(np.int64)
    elif named:
        return data, Quantised(name, (), "without a zero point that is stored")
    if scale.size == 1 and zeros.size == 1:
        return data, Quantised(name, tuple(_one_scale(data, scale, zero, int(zeros[0]))))
    return data, Quantised(name, tuple(_row_scales(data, scale, zero, zeros)))


def _weight(
    graph: Graph, node: onnx.NodeProto, at: int, scope: str, made: Mapping[str, onnx.NodeProto]
) -> StoredTensor | None:
    """Return the stored tensor behind an input, through what only moves values."""
    name = node.input[at] if len(node.input) > at else ""
    for _ in range(4):
        if (found := graph.lookup(name, scope)) is not None or name not in made:
            return found
        before = made[name]
        if node.op_type != "DequantizeLinear" or before.op_type not in THROUGH:
            return None
        name = before.input[0]
    return None


def _scale_of(graph: Graph, node: onnx.NodeProto, scope: str) -> StoredTensor | None:
    """Return the scale of an integer product's weight: it is multiplied with the input's.

    The product is cast, and multiplied by the product of the two scales.
    """
    for cast in graph.uses.get(node.output[0], ()):
        for scaled in graph.uses.get(cast.node.output[0], ()):
            for name in scaled.node.input:
                if (direct := graph.lookup(name, scope)) is not None and direct.is_float:
                    return direct
                for before, inside in nodes(graph.model):
                    if name in before.output and before.op_type == "Mul":
                        held = [graph.lookup(n, inside) for n in before.input]
                        stored = [t for t in held if t is not None and t.is_float]
                        if stored:
                            return stored[0]
    return None


def _one_scale(
    data: StoredTensor, scale: StoredTensor, zero: StoredTensor | None, zero_point: int
) -> Iterator[Guess]:
    assert scale.dtype is not None, "Bug: checked by the caller"
    value = float(scale.read().view(f"f{scale.dtype.itemsize}")[0])
    encoding = Int8(scale.dtype, data.data_type == INT8, value, zero_point)
    for lines in views(data, 1):
        guess = _elements_guess(lines, encoding, f"{encoding}")
        held = (scale,) if zero is None else (scale, zero)
        yield replace(guess, like=replace(guess.like, parameters=held))


def _elements_guess(lines: Lines, encoding: Encoding, name: str) -> Guess:
    at = positions(lines.length)

    def sample(rows: NDArray[Any], dtype: DType) -> Bytes:
        picked = np.ascontiguousarray(converted(rows[:, at], dtype, encoding.source))
        return encoding.encode(picked)[0]

    def keys() -> Keys:
        return line_keys(lines, at)

    zero = sample(np.zeros((1, lines.length), encoding.source.raw), encoding.source)
    return Guess(unknown(lines, encoding), name, sample, keys, zero)


def _row_scales(
    data: StoredTensor, scale: StoredTensor, zero: StoredTensor | None, zeros: NDArray[np.int64]
) -> Iterator[Guess]:
    assert scale.dtype is not None, "Bug: checked by the caller"
    for lines in views(data, 1):
        if lines.count != scale.size or (zero is not None and zeros.size not in (1, scale.size)):
            continue
        held = [lines, Lines(scale, scale.dtype.itemsize, 1, scale.size, 1)]
        with_zeros = bool(zeros.any())
        if with_zeros and zero is not None and zeros.size == scale.size:
            held.append(Lines(zero, 1, 1, scale.size, 1))
        elif with_zeros:
            continue
        for symmetric in (not with_zeros, with_zeros):
            for reduced in (False, True):
                encoding = Int8Rows(
                    scale.dtype, data.data_type == INT8, symmetric, reduced, with_zeros
                )
                yield _row_guess(held, encoding)


def _row_guess(held: Sequence[Lines], encoding: Int8Rows) -> Guess:
    """Rows are known by their scales, which take all of their elements, and by some of those."""
    lines = held[0]
    at = positions(lines.length)

    def sample(rows: NDArray[Any], dtype: DType) -> Bytes:
        values, scales, *_ = encoding.encode(
            np.ascontiguousarray(converted(rows, dtype, encoding.source))
        )
        return np.concatenate([values[:, at], scales], axis=1)

    def keys() -> Keys:
        parts = []
        for first in range(0, lines.count, BLOCK_LINES):
            last = min(first + BLOCK_LINES, lines.count)
            block = lines.read(first, last)[:, at]
            parts.append(keys_of(np.concatenate([block, held[1].read(first, last)], axis=1)))
        return np.concatenate(parts)

    like = replace(unknown(lines, encoding), holders=tuple(held))
    zero = sample(np.zeros((1, lines.length), encoding.source.raw), encoding.source)
    return Guess(like, f"{encoding}", sample, keys, zero)
