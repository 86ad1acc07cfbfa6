"""Stored tensors: the one dtype table, and references to bytes that are read only on request."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dora_export.errors import InputError, shown
from dora_export.machine import advice

Bytes = NDArray[np.uint8]
PICKED_BYTES = 1 << 20  # of whole rows read at once where columns are picked


@dataclass(frozen=True)
class DType:
    """One storage type, named as safetensors names it.

    Attributes:
        name: Name in a safetensors header, e.g. ``BF16``.
        itemsize: Bytes per element.
        raw: numpy type with the same bytes (an unsigned integer where numpy has no such float).
        torch: Attribute of the torch module, e.g. ``bfloat16``; also the word in config.json.
        mergeable: Whether a weight stored in it can be merged; others are only copied.
        exponent_mask: Bits that are all set in inf and NaN; 0 if not mergeable.
        largest: Largest finite value; 0.0 if not mergeable.
    """

    name: str
    itemsize: int
    raw: str
    torch: str
    mergeable: bool = False
    exponent_mask: int = 0
    largest: float = 0.0


# Source: safetensors/src/tensor.rs, enum Dtype (the byte-sized members and larger).
DTYPES = {
    d.name: d
    for d in (
        DType("F64", 8, "u8", "float64", True, 0x7FF0000000000000, 1.7976931348623157e308),
        DType("F32", 4, "u4", "float32", True, 0x7F800000, 3.4028234663852886e38),
        DType("F16", 2, "u2", "float16", True, 0x7C00, 65504.0),
        DType("BF16", 2, "u2", "bfloat16", True, 0x7F80, 3.3895313892515355e38),
        DType("F8_E4M3", 1, "u1", "float8_e4m3fn"),
        DType("F8_E5M2", 1, "u1", "float8_e5m2"),
        DType("F8_E4M3FNUZ", 1, "u1", "float8_e4m3fnuz"),
        DType("F8_E5M2FNUZ", 1, "u1", "float8_e5m2fnuz"),
        DType("F8_E8M0", 1, "u1", "float8_e8m0fnu"),
        DType("I64", 8, "u8", "int64"),
        DType("I32", 4, "u4", "int32"),
        DType("I16", 2, "u2", "int16"),
        DType("I8", 1, "u1", "int8"),
        DType("U64", 8, "u8", "uint64"),
        DType("U32", 4, "u4", "uint32"),
        DType("U16", 2, "u2", "uint16"),
        DType("U8", 1, "u1", "uint8"),
        DType("BOOL", 1, "u1", "bool"),
        DType("C64", 8, "u8", "complex64"),
    )
}
F64, F32, F16, BF16 = (DTYPES[n] for n in ("F64", "F32", "F16", "BF16"))
BY_TORCH = {d.torch: d for d in DTYPES.values()}
OUTPUT_WORDS = {"fp32": F32, "float32": F32, "fp16": F16, "float16": F16, "bf16": BF16,
                "bfloat16": BF16}  # fmt: skip


@dataclass(frozen=True, slots=True)
class FileRange:
    """Bytes ``[start, start + nbytes)`` of a file."""

    path: Path
    start: int
    nbytes: int

    def read(self, start: int, out: Bytes) -> None:
        """Fill ``out`` with the bytes from ``start`` (relative to this range).

        Raises:
            InputError: The file ends too early or cannot be read.
        """
        self.read_each([start], out.reshape(1, -1))

    def read_each(self, starts: Iterable[int], out: Bytes) -> None:
        """Fill each row of ``out`` with the bytes from its start (relative to this range).

        Raises:
            InputError: The file ends too early or cannot be read.
        """
        done, offset = 0, self.start
        try:
            # A handle per call: no shared state, and hundreds of shards need no open-file limit.
            with open(self.path, "rb", buffering=0) as file:
                starts = list(starts)
                _ask_for(file.fileno(), [self.start + start for start in starts], out.shape[1])
                for start, row in zip(starts, out, strict=True):
                    view, done, offset = row.data, 0, self.start + start
                    file.seek(offset)
                    while done < len(view) and (got := file.readinto(view[done:])):
                        done += got
                    if done < len(view):
                        raise InputError(
                            f"{self.path}: ends at byte {offset + done}, expected "
                            f"{offset + len(view)}. The file is truncated or changed while it was "
                            "read; copy it again."
                        )
        except OSError as error:
            raise InputError(
                f"{self.path}: cannot be read at byte {offset + done}: {error.strerror}. "
                f"{advice(error, 'Check the disk or copy the file again.')}"
            ) from error


def _ask_for(descriptor: int, offsets: Sequence[int], nbytes: int) -> None:
    """Let the system fetch several places of a file at once: one by one, each waits for the disk.

    A disk that is written to meanwhile takes milliseconds for each.
    """
    if len(offsets) < 2 or not hasattr(os, "posix_fadvise"):
        return
    with suppress(OSError):  # advice, which file systems may decline: what follows reads as well
        for offset in offsets:
            os.posix_fadvise(descriptor, offset, nbytes, os.POSIX_FADV_WILLNEED)


@dataclass(frozen=True, eq=False)
class HeldBytes:
    """Bytes of a file that lie in memory or are mapped (torch's ``.bin``/``.pt`` tensors)."""

    path: Path
    data: Bytes = field(repr=False)

    @property
    def nbytes(self) -> int:
        """Number of bytes."""
        return int(self.data.nbytes)

    def read(self, start: int, out: Bytes) -> None:
        """Fill ``out`` with the bytes from ``start``."""
        np.copyto(out.reshape(-1), self.data[start : start + out.size])


@dataclass(frozen=True, slots=True)
class PickedColumns:
    """Every ``step``-th column of a stored matrix, from ``first`` on: ``count`` of them.

    Whole rows are read, a few at a time; only the picked columns stay.

    Attributes:
        source: The matrix, row-major.
        itemsize: Bytes per element.
        columns: Its columns.
        first: First column picked.
        step: Distance from one to the next.
        count: How many.
    """

    source: FileRange | HeldBytes
    itemsize: int
    columns: int
    first: int
    step: int
    count: int

    @property
    def path(self) -> Path:
        """File that holds the matrix."""
        return self.source.path

    @property
    def nbytes(self) -> int:
        """Number of bytes picked."""
        return self.source.nbytes // self.columns * self.count

    def read(self, start: int, out: Bytes) -> None:
        """Fill ``out`` with the bytes from ``start`` of the picked matrix."""
        wide, narrow = self.columns * self.itemsize, self.count * self.itemsize
        flat, done = out.reshape(-1), 0
        at_once = max(1, PICKED_BYTES // max(1, wide))
        buffer = np.empty(0, np.uint8)
        while done < flat.size:
            row, skipped = divmod(start + done, narrow)
            rows = min(at_once, -(-(skipped + flat.size - done) // narrow))
            if not buffer.size:  # the first reading is the largest
                buffer = np.empty(rows * wide, np.uint8)
            whole = buffer[: rows * wide]
            self.source.read(row * wide, whole)
            stop = self.first + self.step * self.count
            cells = whole.reshape(rows, self.columns, self.itemsize)
            picked = cells[:, self.first : stop : self.step].reshape(-1)[skipped:]
            taken = min(picked.size, flat.size - done)
            flat[done : done + taken] = picked[:taken]
            done += taken


@dataclass(frozen=True, eq=False)
class JoinedBytes:
    """Several stored tensors one after another, as if they were one."""

    parts: tuple[FileRange | HeldBytes | PickedColumns | JoinedBytes, ...]

    @property
    def path(self) -> Path:
        """File that holds the first of them."""
        return self.parts[0].path

    @property
    def nbytes(self) -> int:
        """Number of bytes of all."""
        return sum(part.nbytes for part in self.parts)

    def read(self, start: int, out: Bytes) -> None:
        """Fill ``out`` with the bytes from ``start`` of all of them.

        Raises:
            InputError: A file ends too early or cannot be read.
        """
        flat, done = out.reshape(-1), 0
        for part in self.parts:
            if start < part.nbytes and done < flat.size:
                taken = min(part.nbytes - start, flat.size - done)
                part.read(start, flat[done : done + taken])
                done += taken
            start = max(0, start - part.nbytes)


Source = FileRange | HeldBytes | PickedColumns | JoinedBytes


@dataclass(frozen=True, slots=True)
class TensorRef:
    """A stored tensor: name, dtype and shape cost nothing; bytes are read on request.

    Elements are row-major and little-endian, without gaps.

    Attributes:
        name: Name in its file.
        dtype: Storage type.
        shape: Dimensions, outermost first.
        source: Where the bytes are.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    source: Source

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Number of bytes."""
        return self.size * self.dtype.itemsize

    @property
    def where(self) -> str:
        """File and tensor name, for error messages."""
        return f"{self.source.path.name}: tensor '{shown(self.name)}'"

    def rows(self, first: int, last: int) -> TensorRef:
        """Return the rows ``[first, last)`` along the first dimension as a tensor of its own."""
        assert 0 <= first <= last <= self.shape[0], f"Bug: rows {first}:{last} of {self.shape}"
        each = self.nbytes // max(1, self.shape[0])
        source: FileRange | HeldBytes
        if isinstance(self.source, FileRange):
            start = self.source.start + first * each
            source = FileRange(self.source.path, start, (last - first) * each)
        else:
            assert isinstance(self.source, HeldBytes), "Bug: rows of picked columns"
            source = HeldBytes(self.source.path, self.source.data[first * each : last * each])
        return TensorRef(self.name, self.dtype, (last - first, *self.shape[1:]), source)

    def columns(self, first: int, step: int, count: int) -> TensorRef:
        """Return ``count`` columns of a matrix, from ``first`` on, ``step`` apart, as a tensor."""
        rows, columns = self.shape
        last = first + step * (count - 1)
        assert 0 <= first <= last < columns, f"Bug: column {last} of {self.shape}"
        assert isinstance(self.source, FileRange | HeldBytes), "Bug: columns of picked columns"
        picked = PickedColumns(self.source, self.dtype.itemsize, columns, first, step, count)
        return TensorRef(self.name, self.dtype, (rows, count), picked)

    def reshaped(self, *shape: int) -> TensorRef:
        """Return the same elements under another shape."""
        assert math.prod(shape) == self.size, f"Bug: {self.shape} reshaped to {shape}"
        return replace(self, shape=shape)

    def raw(self, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """Return elements ``[start, stop)``, flattened, as a new array of ``dtype.raw``."""
        stop = self.size if stop is None else stop
        out = np.empty((stop - start) * self.dtype.itemsize, np.uint8)
        self.source.read(start * self.dtype.itemsize, out)
        return out.view(self.dtype.raw)

    def raw_each(self, starts: Sequence[int], count: int) -> NDArray[Any]:
        """Return ``count`` elements from each start, as a new matrix of ``dtype.raw``."""
        itemsize = self.dtype.itemsize
        out = np.empty((len(starts), count * itemsize), np.uint8)
        if isinstance(self.source, FileRange):
            self.source.read_each((start * itemsize for start in starts), out)
        else:
            for start, row in zip(starts, out, strict=True):
                self.source.read(start * itemsize, row)
        return out.view(self.dtype.raw)


Arrange = Callable[[NDArray[Any]], NDArray[Any]]
Read = Callable[["TensorRef"], NDArray[Any]]


@dataclass(frozen=True)
class Operand:
    """A tensor of the adapter, arranged as the formula needs it; read on request.

    Attributes:
        ref: The stored tensor.
        shape: Shape after all of ``steps``.
        steps: Rearrangements applied in turn to an array of ``ref.shape``; none does arithmetic.
        others: Further stored tensors, for ``combine``.
        combine: Makes one array of all stored ones, in float64, before ``steps``; None: there is
            only one. For factors that a trainer stores in parts, such as a Tucker core.
    """

    ref: TensorRef
    shape: tuple[int, ...]
    steps: tuple[Arrange, ...] = ()
    others: tuple[TensorRef, ...] = ()
    combine: Callable[..., NDArray[np.float64]] | None = None

    @classmethod
    def computed(
        cls,
        refs: tuple[TensorRef, ...],
        shape: tuple[int, ...],
        combine: Callable[..., NDArray[np.float64]],
    ) -> Operand:
        """Return what ``combine`` makes of some tensors, each given in its shape as float64."""
        return cls(refs[0], shape, (), refs[1:], combine)

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        """All stored tensors behind it."""
        return (self.ref, *self.others)

    def value(self, read: Read) -> NDArray[Any]:
        """Return it, given what reads a stored tensor (flat or shaped; float64 to combine)."""
        arrays = [read(ref).reshape(ref.shape) for ref in self.refs]
        array = arrays[0] if self.combine is None else self.combine(*arrays)
        for step in self.steps:
            array = step(array)
        return array

    @classmethod
    def plain(cls, ref: TensorRef) -> Operand:
        """Return the tensor as it is stored."""
        return cls(ref, ref.shape)

    @classmethod
    def matrix(cls, ref: TensorRef) -> Operand:
        """Return the tensor with all dimensions but the first flattened."""
        return cls(ref, (ref.shape[0], math.prod(ref.shape[1:])), (_flatten_rows,))

    @classmethod
    def vector(cls, ref: TensorRef) -> Operand:
        """Return the tensor flattened."""
        return cls(ref, (ref.size,), (np.ravel,))

    @property
    def T(self) -> Operand:  # noqa: N802 - the name that numpy and torch give it
        """The transpose of a 2-D operand."""
        return replace(self, shape=self.shape[::-1], steps=(*self.steps, np.transpose))

    def with_rows(self, arrange: Arrange, count: int) -> Operand:
        """Return it with its rows picked, reordered or spread by ``arrange``: ``count`` rows."""
        return replace(self, shape=(count, *self.shape[1:]), steps=(*self.steps, arrange))


def _flatten_rows(a: NDArray[Any]) -> NDArray[Any]:
    return a.reshape(a.shape[0], -1)
