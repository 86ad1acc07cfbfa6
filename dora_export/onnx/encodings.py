"""How a graph stores rows of a weight: as floats, or quantised by its own parameters.

An encoding turns rows of values into the bytes of one or more stored tensors. The same function
proves that a graph holds the base (the base's rows give its very bytes) and writes merged rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from dora_export import cast
from dora_export.tensors import F16, F64, Bytes, DType

UINT8, INT8 = 2, 3  # TensorProto.DataType


class Encoding(Protocol):
    """How rows become bytes; every row by itself."""

    @property
    def source(self) -> DType:
        """The type that rows come in: merged values are rounded to it, once."""

    @property
    def name(self) -> str:
        """In words, for people and the manifest."""

    def encode(self, rows: NDArray[Any]) -> tuple[Bytes, ...]:
        """Return the bytes of rows, one array ``(rows, bytes)`` for each stored tensor.

        Args:
            rows: ``source.raw``, shape ``(rows, length)``.
        """


@dataclass(frozen=True)
class Plain:
    """Floating-point numbers, rounded to nearest.

    Attributes:
        dtype: Their type.
        inner: Axes of a line's elements, where the graph orders them in another way, with their
            sizes: ``(sizes, order)``.
    """

    dtype: DType
    inner: tuple[tuple[int, ...], tuple[int, ...]] | None = None

    @property
    def source(self) -> DType:  # noqa: D102 - as in the Protocol
        return self.dtype

    @property
    def name(self) -> str:  # noqa: D102
        return self.dtype.name

    def encode(self, rows: NDArray[Any]) -> tuple[Bytes, ...]:  # noqa: D102
        if self.inner is not None:
            sizes, order = self.inner
            axes = (0, *(axis + 1 for axis in order))
            rows = rows.reshape(-1, *sizes).transpose(axes).reshape(rows.shape)
        return (_as_bytes(rows),)

    def in_base_order(self, lines: NDArray[Any]) -> NDArray[Any]:
        """Return lines with their elements in the base's order."""
        assert self.inner is not None, "Bug: only asked for where the orders differ"
        sizes, order = self.inner
        stored = tuple(sizes[axis] for axis in order)
        axes = (0, *(1 + int(axis) for axis in np.argsort(order)))
        turned: NDArray[Any] = lines.reshape(-1, *stored).transpose(axes)
        return turned.reshape(lines.shape)


@dataclass(frozen=True)
class NeverZero:
    """float16 as onnxruntime's converter makes it: no value becomes zero or infinite.

    Source: onnxruntime.transformers.float16, convert_np_to_float16.
    """

    @property
    def source(self) -> DType:  # noqa: D102 - as in the Protocol
        return F64

    @property
    def name(self) -> str:  # noqa: D102
        return "F16, kept from zero"

    def encode(self, rows: NDArray[Any]) -> tuple[Bytes, ...]:  # noqa: D102
        values = rows.view(np.float64)
        with np.errstate(over="ignore", under="ignore"):
            raw = values.astype(np.float16).view(np.uint16)
        lost = ((raw & 0x7FFF) == 0) & (values != 0)
        large = ((raw & 0x7FFF) == F16.exponent_mask) & np.isfinite(values)
        raw[lost] |= 1
        raw[large] -= 1
        return (_as_bytes(raw),)


@dataclass(frozen=True)
class NBits:
    """onnxruntime's block-wise quantisation of MatMulNBits: rounded to nearest, row by row.

    Source: onnxruntime.quantization.matmul_nbits_quantizer, DefaultWeightOnlyQuantizer.

    Attributes:
        bits: 4 or 8.
        block: Elements of a row that share a scale.
        symmetric: Whether there are no zero points.
        values: The type that was quantised.
        scales: The type of the scales.
    """

    bits: int
    block: int
    symmetric: bool
    values: DType
    scales: DType

    @property
    def source(self) -> DType:  # noqa: D102 - as in the Protocol
        return self.values

    @property
    def name(self) -> str:  # noqa: D102
        kind = "symmetric" if self.symmetric else "asymmetric"
        return f"int{self.bits}, blocks of {self.block}, {kind}"

    def encode(self, rows: NDArray[Any]) -> tuple[Bytes, ...]:
        """Return packed values, scales, and zero points unless symmetric."""
        from onnxruntime.capi import _pybind_state as ort  # noqa: PLC0415 - slow to import

        quantise = ort.quantize_matmul_8bits if self.bits == 8 else ort.quantize_matmul_4bits
        count, length = rows.shape
        blocks, packs = -(-length // self.block), 8 // self.bits
        values = np.zeros((blocks * self.block, count), f"f{self.values.itemsize}")
        values[:length] = rows.view(values.dtype).T
        packed = np.zeros((count, blocks, self.block // packs), np.uint8)
        scales = np.zeros((count, blocks), values.dtype)
        zeros = np.zeros((count, -(-blocks // packs)), np.uint8)
        quantise(packed, values, scales, zeros, self.block, count, length, self.symmetric)
        stored = (packed.reshape(count, -1), _as_bytes(_narrowed(scales, self.scales)))
        return stored if self.symmetric else (*stored, zeros)


@dataclass(frozen=True)
class GatherBlocks:
    """onnxruntime's 4-bit quantisation of GatherBlockQuantized, block by block along each row.

    Unlike ``NBits`` a symmetric block takes its sign from its largest element, and a scale may be
    negative.

    Source: onnxruntime.quantization.matmul_nbits_quantizer, DefaultWeightOnlyQuantizer,
    quant_slice_symmetric, quant_slice_asymmetric, pack_int8_to_int4.

    Attributes:
        block: Elements of a row that share a scale; rows hold whole blocks.
        symmetric: Whether there are no zero points.
        values: The type that was quantised; that of the scales.
    """

    block: int
    symmetric: bool
    values: DType

    @property
    def source(self) -> DType:  # noqa: D102 - as in the Protocol
        return self.values

    @property
    def name(self) -> str:  # noqa: D102
        kind = "symmetric" if self.symmetric else "asymmetric"
        return f"int4, looked up, blocks of {self.block}, {kind}"

    def encode(self, rows: NDArray[Any]) -> tuple[Bytes, ...]:
        """Return packed values, scales, and zero points unless symmetric."""
        kind = _float_of(self.values)
        values = rows.view(kind).reshape(rows.shape[0], -1, self.block)
        low, high = values.min(axis=2, keepdims=True), values.max(axis=2, keepdims=True)
        with np.errstate(divide="ignore", invalid="ignore"):
            if self.symmetric:
                scale = np.where(np.abs(high) > np.abs(low), high, low) / kind.type(-8)
                signed = np.where(scale == 0, 0, values / scale).round().clip(-8, 7)
                return _pairs(signed.astype(np.int8).view(np.uint8)), _as_bytes(scale[..., 0])
            low, high = np.minimum(low, kind.type(0)), np.maximum(high, kind.type(0))
            scale = (high - low) / kind.type(15)
            zero = np.where(scale == 0, 8, -low / scale).round().clip(0, 15).astype(np.uint8)
            found = np.where(scale == 0, 8, values / scale + zero).round().clip(0, 15)
        return _pairs(found.astype(np.uint8)), _as_bytes(scale[..., 0]), _pairs(zero)


def _pairs(values: NDArray[np.uint8]) -> Bytes:
    """Return the low halves of bytes, two neighbours of a row in one byte, the first one low."""
    flat = values.reshape(values.shape[0], -1) & 0xF
    high = np.left_shift(flat[:, 1::2], 4, dtype=np.uint8)
    packed: Bytes = np.bitwise_or(flat[:, ::2], high, dtype=np.uint8)
    return packed


@dataclass(frozen=True)
class Int8:
    """onnxruntime's 8-bit quantisation with one scale for a whole tensor.

    Source: onnxruntime.quantization.quant_utils, quantize_nparray, compute_scale_zp.

    Attributes:
        values: The type that was quantised; that of the scale.
        signed: int8, else uint8.
        scale: The scale.
        zero: The zero point.
        symmetric: The range was made symmetric about zero.
        reduced: Seven bits only ("reduce_range").
    """

    values: DType
    signed: bool
    scale: float
    zero: int
    symmetric: bool = True
    reduced: bool = False

    @property
    def source(self) -> DType:  # noqa: D102 - as in the Protocol
        return self.values

    @property
    def name(self) -> str:  # noqa: D102
        return f"{'int8' if self.signed else 'uint8'}, one scale"

    def encode(self, rows: NDArray[Any]) -> tuple[Bytes, ...]:  # noqa: D102
        return (_quantised(rows, self.values, np.float32(self.scale), self.zero, self.signed),)

    def of_range(self, low: float, high: float) -> Int8:
        """Return the encoding that onnxruntime chooses for values of a range."""
        from onnxruntime.quantization import quant_utils as ort  # noqa: PLC0415 - slow to import

        kind = _float_of(self.values)
        first, last = ort.get_qmin_qmax_for_qType(
            INT8 if self.signed else UINT8, self.reduced, self.symmetric
        )
        zero, scale = ort.compute_scale_zp(
            np.array(low, kind), np.array(high, kind), first, last, self.symmetric
        )
        return replace(self, scale=float(scale), zero=int(zero))


@dataclass(frozen=True)
class Int8Rows:
    """onnxruntime's 8-bit quantisation with a scale for each row ("per_channel").

    Attributes:
        values: The type that was quantised; that of the scales.
        signed: int8, else uint8.
        symmetric: The range was made symmetric about zero.
        reduced: Seven bits only.
        with_zeros: Zero points are stored that are not all zero.
    """

    values: DType
    signed: bool
    symmetric: bool = True
    reduced: bool = False
    with_zeros: bool = False

    @property
    def source(self) -> DType:  # noqa: D102 - as in the Protocol
        return self.values

    @property
    def name(self) -> str:  # noqa: D102
        return f"{'int8' if self.signed else 'uint8'}, a scale for each row"

    def encode(self, rows: NDArray[Any]) -> tuple[Bytes, ...]:
        """Return quantised values, scales, and zero points where they are stored."""
        kind = _float_of(self.values)
        values = rows.view(kind)
        low = np.minimum(values.min(axis=1), kind.type(0))
        high = np.maximum(values.max(axis=1), kind.type(0))
        if self.symmetric:
            high = np.maximum(np.abs(low), np.abs(high))
            low = -high
        first, last = _range(self.signed, self.reduced, self.symmetric)
        scale = (high.astype(np.float64) - low.astype(np.float64)) / (last - first)
        stored = scale.astype(kind)
        least = np.finfo(kind).smallest_subnormal if kind == np.float16 else np.finfo(kind).tiny
        none = (stored if kind == np.float16 else scale) < least
        with np.errstate(divide="ignore", invalid="ignore"):
            zero = np.round(first - low / scale)
        if self.symmetric:
            zero = np.full(scale.shape, np.round((first + last) / 2))
        stored, zero = np.where(none, kind.type(1), stored), np.where(none, 0, zero)
        scaled = stored[:, None]
        quantised = _quantised(rows, self.values, scaled, zero[:, None], self.signed)
        out = (quantised, _as_bytes(stored[:, None]))
        if not self.with_zeros:
            return out
        return (*out, zero.astype(np.int8 if self.signed else np.uint8)[:, None].view(np.uint8))


def _range(signed: bool, reduced: bool, symmetric: bool) -> tuple[int, int]:
    """Return the least and largest quantised value. Source: as in ``Int8``, ONNX_INT_TYPE_*."""
    if reduced:
        return (-64, 64) if signed else (0, 127)
    if signed:
        return (-127 if symmetric else -128), 127
    return 0, 255


def _quantised(rows: NDArray[Any], dtype: DType, scale: Any, zero: Any, signed: bool) -> Bytes:
    values = rows.view(_float_of(dtype)).astype(np.float32)
    values /= scale
    np.round(values, out=values)
    values += np.asarray(zero, np.float32)
    np.clip(values, -128 if signed else 0, 127 if signed else 255, out=values)
    return values.astype(np.int8 if signed else np.uint8).view(np.uint8)


def _float_of(dtype: DType) -> np.dtype[Any]:
    return np.dtype(f"f{dtype.itemsize}")


def _narrowed(values: NDArray[Any], dtype: DType) -> NDArray[Any]:
    raw = np.empty(values.shape, dtype.raw)
    work = values.copy()
    cast.narrow(work, dtype, raw, np.empty_like(work))
    return raw


def _as_bytes(rows: NDArray[Any]) -> Bytes:
    return np.ascontiguousarray(rows).view(np.uint8).reshape(rows.shape[0], -1)


def converted(raw: NDArray[Any], source: DType, target: DType) -> NDArray[Any]:
    """Return stored elements in another type, rounded once; the same array if it is the same.

    Args:
        raw: ``source.raw``.
        source: How they are stored.
        target: How they shall be.
    """
    if source is target:
        return raw
    wide = np.float64 if F64 in (source, target) else np.float32
    values = cast.widened(np.ascontiguousarray(raw), source, wide)
    if target.itemsize == values.itemsize:
        return values.view(target.raw)
    out = np.empty(raw.shape, target.raw)
    cast.narrow(values, target, out, np.empty_like(values))
    return out
