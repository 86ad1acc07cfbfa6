"""The normal form: what an adapter does to one base tensor, whatever format it came from.

An ``Update`` is written by a reader in the adapter's own terms (A, B, m, out axis or in axis,
weight seen as ``(out, in)``). ``Update.change`` turns it into a ``Change``: the same thing in terms
of how the base tensor lies in memory, a matrix of stored rows. Fan-in-fan-out layouts, embeddings,
convolutions, expert slices and fused rows all end there, so the formula knows none of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

from numpy.typing import NDArray

from dora_export.tensors import DType, Operand, TensorRef

Kind = Literal["lora", "dora", "magnitude", "add", "replace", "rows", "function"]
Layout = Literal["oi", "io"]
Axis = Literal["out", "in"]
Over = Literal["row", "column"]
# How B A lies over a slice of a stacked parameter, where its shape leaves that open: as the class
# holds it; transposed (PEFT before 0.19); transposed if the class says is_transposed (since); or
# one of the last two, not said which.
Orientation = Literal["straight", "transposed", "by class", "by version"]
# Row orders of trainers that fuse or permute what a checkpoint stores otherwise (row_orders.py).
RowOrder = Literal[
    "torchtune", "torchtune-peft", "torchtune-peft?", "torchtune-llama4",
    "megatron-q", "megatron-k", "megatron-v", "megatron-gate", "megatron-up",
]  # fmt: skip


@dataclass(frozen=True)
class Product:
    """``left @ right``, a matrix of low rank.

    Attributes:
        left: Shape ``(rows, rank)``.
        right: Shape ``(rank, columns)``.
    """

    left: Operand
    right: Operand

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.left.shape[0], self.right.shape[1]

    @property
    def T(self) -> Product:  # noqa: N802 - the name that numpy and torch give it
        """The transpose."""
        return Product(self.right.T, self.left.T)

    @property
    def operands(self) -> tuple[Operand, ...]:
        """What has to be read."""
        return self.left, self.right


@dataclass(frozen=True)
class Hadamard:
    """The elementwise product of two low-rank products, as LoHa trains it.

    Source: Hyeon-Woo et al. 2022, arXiv:2108.06098, prop. 2.

    Attributes:
        first: One.
        second: The other, of the same shape.
    """

    first: Product
    second: Product

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.first.shape

    @property
    def T(self) -> Hadamard:  # noqa: N802
        """The transpose."""
        return Hadamard(self.first.T, self.second.T)

    @property
    def operands(self) -> tuple[Operand, ...]:
        """What has to be read."""
        return *self.first.operands, *self.second.operands


@dataclass(frozen=True)
class Kronecker:
    """The Kronecker product of two matrices, as LoKr trains it; one of them may be ``(1, 1)``.

    Element ``(i p + k, j q + l)`` is ``first[i, j] * second[k, l]``, with ``second`` of shape
    ``(p, q)``. Source: Yeh et al. 2023, arXiv:2309.14859, eq. 9; numpy.kron.

    Attributes:
        first: Shape ``(a, b)``.
        second: Shape ``(p, q)``; held whole while its tensor is merged.
    """

    first: Operand
    second: Operand

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        (a, b), (p, q) = self.first.shape, self.second.shape
        return a * p, b * q

    @property
    def T(self) -> Kronecker:  # noqa: N802
        """The transpose."""
        return Kronecker(self.first.T, self.second.T)

    @property
    def operands(self) -> tuple[Operand, ...]:
        """What has to be read."""
        return self.first, self.second


@dataclass(frozen=True)
class Dense:
    """A whole matrix, where a trainer stores the update itself beside magnitudes.

    Attributes:
        matrix: Shape ``(rows, columns)``; held whole while its tensor is merged.
    """

    matrix: Operand

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.matrix.shape[0], self.matrix.shape[1]

    @property
    def T(self) -> Dense:  # noqa: N802
        """The transpose."""
        return Dense(self.matrix.T)

    @property
    def operands(self) -> tuple[Operand, ...]:
        """What has to be read."""
        return (self.matrix,)


Delta = Product | Hadamard | Kronecker | Dense


class Function(Protocol):
    """A new weight that needs all of the old one at once: what no delta and no norm can say.

    It is computed for one whole tensor at a time, in float64; the memory it takes is asked
    beforehand. Verification computes the same by another way (``verification/functions.py``).
    Implementations are frozen dataclasses, so that two plans can be told apart by them.
    """

    @property
    def what(self) -> str:
        """One line for people: what becomes of the weight."""

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        """Adapter tensors it reads."""

    def misfit(self, shape: tuple[int, ...], layout: Layout) -> str | None:
        """Return why it cannot apply to a tensor of ``shape``, or None as far as headers tell."""

    def placed(self, shape: tuple[int, ...], layout: Layout) -> Function:
        """Return it for a tensor that is stored in ``shape`` and ``layout``."""

    def value(self, W: NDArray[Any], dtype: DType) -> NDArray[Any]:
        """Return the new weight for the old one, which is stored in ``dtype``.

        Both are float64, rows and columns as they are stored.

        Raises:
            DoraExportError: The result is not defined for this weight.
        """

    def working_bytes(self) -> int:
        """Return the bytes that ``value`` takes beside its argument and its result."""


@dataclass(frozen=True)
class Update:
    """One change to one base tensor, or to a slice of it.

    With ``W`` seen as ``(out, in * kernel)``, ``A`` = down, ``B`` = up and ``s`` = scaling (``B A``
    stands for ``delta`` where that is given instead):

    ========= ==========================================================================
    lora      ``W + s B A``
    dora      ``m (W + s B A) / (||W + s B A|| + eps)``
    magnitude ``m W / (||W|| + eps)``
    add       ``W + s value``
    replace   ``value``
    function  ``f(W)``, of all of W at once
    rows      ``W`` with the rows ``row_indices`` replaced by those of ``value``
    ========= ==========================================================================

    Attributes:
        target: The tensor to change: an adapter's name for it, after naming the checkpoint's.
        kind: Which of the formulas above.
        source_keys: Adapter tensors that this update consumes.
        down: A, shape ``(rank, in * kernel)``.
        up: B, shape ``(out, rank)``.
        scaling: Factor on ``B A`` (or on ``value`` for add), dimensionless.
        magnitude: m, 1-D; one per output row (axis "out") or per input column (axis "in").
        axis: What ``magnitude`` counts. The norm runs over all other dimensions, kernel included.
        eps: Added to the norm, as the trainer did.
        layout: How the base stores W: "oi" ``(out, in, *kernel)``, "io" ``(in, out)`` (GPT-2's
            Conv1D; also an embedding, which PEFT sees as ``(dim, vocabulary)``). None: by shape.
        index: Slice along the first of three dimensions (one expert), or None.
        rows: Rows ``[start, stop)`` of W along its first stored dimension (one part of a fused
            weight), or None. Within ``index`` if both are given.
        value: Tensor of the target's shape (add, replace), or ``(len(row_indices), columns)``.
        row_indices: For kind "rows".
        delta: What is added instead of ``B A``, shape ``(out, in * kernel)``; None: ``B A``.
        magnitude_is_factor: m is the trained magnitude divided by the norm already
            (TensorRT-LLM's preprocessed adapters), so W' is ``m (W + s B A)``.
        row_order: How the adapter orders the rows of B and m, where that is not the checkpoint's
            order and depends on the base (its heads, its model type); the plan resolves it. None:
            the checkpoint's own.
        function: For kind "function".
        orientation: How ``B A`` lies over a stacked parameter, where the adapter was trained on a
            parameter of its class and not on a module; None: on a module, ``(out, in)``.
        scales_bias: The trainer's forward multiplies the layer's bias by ``m / ||V||`` as well;
            the plan gives a base's bias that update (``layer_biases``).
        adapter: Position of its adapter among those of a plan, which sets it; and the next one.
        weight: ``V + weight (V' - V)`` of all that its adapter does, dimensionless.

    Source: Liu et al. 2024, arXiv:2402.09353, eq. 5, for kind "dora".
    """

    target: str
    kind: Kind
    source_keys: tuple[str, ...]
    down: Operand | None = None
    up: Operand | None = None
    scaling: float = 1.0
    magnitude: Operand | None = None
    axis: Axis = "out"
    eps: float = 0.0
    layout: Layout | None = None
    index: int | None = None
    rows: tuple[int, int] | None = None
    value: TensorRef | None = None
    row_indices: tuple[int, ...] = ()
    delta: Hadamard | Kronecker | Dense | None = None
    magnitude_is_factor: bool = False
    row_order: RowOrder | None = None
    orientation: Orientation | None = None
    scales_bias: bool = False
    adapter: int = 0
    weight: float = 1.0
    function: Function | None = None

    @property
    def rank(self) -> int | None:
        """Rank of ``B A``, or None where there is no such product."""
        return None if self.down is None else self.down.shape[0]

    @property
    def added(self) -> Delta | None:
        """What is added to W, without its scaling."""
        if self.down is not None and self.up is not None:
            return Product(self.up, self.down)
        return self.delta

    @property
    def operands(self) -> tuple[Operand, ...]:
        """Everything arranged for the formula."""
        factors = self.added.operands if self.added is not None else ()
        return (*factors, self.magnitude) if self.magnitude is not None else factors

    @property
    def normalises(self) -> bool:
        """Whether the update divides by a norm."""
        return self.magnitude is not None

    def taken(self, adapter: int, weight: float, label: str) -> Update:
        """Return this update as one of the adapter at a position, at a weight.

        Args:
            adapter: The position.
            weight: ``V + weight (V' - V)``, dimensionless.
            label: Put before the names of the adapter's tensors.
        """
        keys = tuple(label + key for key in self.source_keys)
        return replace(self, adapter=adapter, weight=weight, source_keys=keys)

    @property
    def additive(self) -> bool:
        """Whether it adds something that does not depend on what is there."""
        return self.kind in ("lora", "add") and not self.normalises

    def weighted_scaling(self) -> Update:
        """Return an additive update with its weight as part of its scaling."""
        assert self.additive, "Bug: only what is added can be scaled by its weight"
        return replace(self, scaling=self.scaling * self.weight, weight=1.0)

    def meets(self, other: Update) -> bool:
        """Return whether another update of the same tensor changes some of the same elements."""
        if self.index is not None and other.index is not None and self.index != other.index:
            return False
        if self.rows is None or other.rows is None:
            return True
        return self.rows[0] < other.rows[1] and other.rows[0] < self.rows[1]

    def misfit(self, shape: tuple[int, ...]) -> str | None:
        """Return why this update cannot apply to a tensor of ``shape``, or None if it can."""
        region = self._region(shape)
        if isinstance(region, str):
            return region
        if self.kind == "replace":
            return None  # a resized vocabulary replaces a tensor of another shape
        _, sliced = region
        if self.kind in ("add", "rows"):
            return self._value_misfit(sliced)
        if self.function is not None:
            return self.function.misfit(sliced, self.layout or "oi")
        if len(sliced) < 2:
            return f"is {len(sliced)}-D {shape}, expected a weight of 2 to 5 dimensions"
        layout = self.layout or self.layout_by_shape(shape)
        if layout is None:
            return self._shape_misfit(sliced)
        out, inner = _out_and_inner(sliced, layout)
        if self.added is not None and self.added.shape != (out, inner):
            return self._shape_misfit(sliced)
        expected = out if self.axis == "out" else _inputs(sliced, layout)
        if self.magnitude and self.magnitude.shape[0] != expected:
            return (
                f"magnitude has {self.magnitude.shape[0]} elements, "
                f"expected {expected} (one per {'output' if self.axis == 'out' else 'input'})"
            )
        return None

    def layout_by_shape(self, shape: tuple[int, ...]) -> Layout | None:
        """Return the only layout that A and B fit, "oi" if both do, None if none does."""
        region = self._region(shape)
        if isinstance(region, str):
            return None
        sliced = region[1]
        layouts: tuple[Layout, ...] = ("oi", "io") if len(sliced) == 2 else ("oi",)
        for layout in layouts:
            out, inner = _out_and_inner(sliced, layout)
            if self.added is None or self.added.shape == (out, inner):
                return layout
        return None

    def change(self, shape: tuple[int, ...]) -> Change:
        """Return this update in terms of how a tensor of ``shape`` is stored; it must fit."""
        assert self.misfit(shape) is None, f"Bug: {self.target}: {self.misfit(shape)}"
        region = self._region(shape)
        assert not isinstance(region, str), "Bug: misfit() has checked the region"
        start, sliced = region
        layout = self.layout or self.layout_by_shape(shape) or "oi"
        rows, columns = _matrix(sliced)
        delta, over, group = self.added, None, 1
        if layout == "io" and delta is not None:
            delta = delta.T
        if self.magnitude is not None:
            by_row = (self.axis == "out") == (layout == "oi")
            over = "row" if by_row else "column"
            group = 1 if by_row or layout == "io" else math.prod(sliced[2:])
        return Change(
            self.kind,
            start,
            rows,
            columns,
            delta,
            self.scaling,
            self.magnitude,
            self.magnitude_is_factor,
            over,  # type: ignore[arg-type]
            group,
            self.eps,
            self.value,
            self.row_indices,
            self.source_keys,
            self.adapter,
            self.weight,
            function=None if self.function is None else self.function.placed(sliced, layout),
            transposed=layout == "io",
        )

    def _region(self, shape: tuple[int, ...]) -> tuple[int, tuple[int, ...]] | str:
        """Return the first element and the shape of the slice this update is about, or why not."""
        start = 0
        if self.index is not None:
            if len(shape) != 3 or not 0 <= self.index < shape[0]:
                return f"has shape {shape}, expected a 3-D tensor with slice {self.index}"
            shape = shape[1:]
            start = self.index * math.prod(shape)
        if self.rows is not None:
            first, last = self.rows
            if not shape or not 0 <= first < last <= shape[0]:
                return f"has shape {shape}, expected rows {first} to {last}"
            start += first * math.prod(shape[1:])
            shape = (last - first, *shape[1:])
        return start, shape

    def _shape_misfit(self, shape: tuple[int, ...]) -> str:
        if self.delta is not None:
            return f"base weight is {shape}, the adapter's update {self.delta.shape}"
        a = self.down.shape if self.down else "none"
        b = self.up.shape if self.up else "none"
        return f"base weight is {shape}, adapter has A {a} and B {b}"

    def _value_misfit(self, shape: tuple[int, ...]) -> str | None:
        assert self.value is not None, "Bug: kinds add and rows carry a value"
        expected = shape if self.kind == "add" else (len(self.row_indices), *shape[1:])
        if self.value.shape != expected:
            return f"adapter tensor is {self.value.shape}, expected {expected}"
        outside = [i for i in self.row_indices if not 0 <= i < shape[0]]
        return f"rows {outside[:5]} do not exist, it has {shape[0]}" if outside else None


@dataclass(frozen=True)
class Change:
    """An update in stored terms: a matrix of ``rows`` x ``columns`` elements from ``start``.

    Attributes:
        kind: As in ``Update``.
        start: First element in the flattened base tensor.
        rows: Stored rows.
        columns: Elements per stored row.
        delta: ``(rows, columns)``; times ``scaling`` it is added to the matrix. None: nothing is.
        scaling: Factor on ``delta``, or on ``value``.
        magnitude: One per row, or one per ``group`` columns.
        magnitude_is_factor: It is the factor itself; no norm is taken.
        over: Whether magnitude and norm belong to a stored row or column; None: no magnitude.
        group: Neighbouring columns that share one norm (the kernel, for the in axis of a conv).
        eps: Added to the norm.
        value: Tensor with the elements to add, or to put into ``row_indices``.
        row_indices: Rows that ``value`` replaces.
        source_keys: Adapter tensors behind this change.
        function: For kind "function": what the whole matrix becomes.
        adapter: Position of its adapter among those of the plan.
        weight: ``V + weight (V' - V)`` of all its adapter's changes here, dimensionless.
        own_norm: The norm is that of the base with this change's delta alone, whatever other
            adapters' changes come before it.
        transposed: The matrix is stored as ``(in, out)``.
    """

    kind: Kind
    start: int
    rows: int
    columns: int
    delta: Delta | None
    scaling: float
    magnitude: Operand | None
    magnitude_is_factor: bool
    over: Over | None
    group: int
    eps: float
    value: TensorRef | None
    row_indices: tuple[int, ...]
    source_keys: tuple[str, ...]
    adapter: int = 0
    weight: float = 1.0
    own_norm: bool = False
    function: Function | None = None
    transposed: bool = False

    @property
    def stop(self) -> int:
        """One past the last element in the flattened base tensor."""
        return self.start + self.rows * self.columns


def _matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the stored rows and columns of a tensor; a vector is one row."""
    return (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, math.prod(shape))


def _out_and_inner(shape: tuple[int, ...], layout: Layout) -> tuple[int, int]:
    """Return the sizes of B's first and A's last dimension for a weight stored in ``shape``."""
    return (shape[0], math.prod(shape[1:])) if layout == "oi" else (shape[1], shape[0])


def _inputs(shape: tuple[int, ...], layout: Layout) -> int:
    return shape[1] if layout == "oi" else shape[0]
