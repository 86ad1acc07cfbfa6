"""The reference: a base model that computes with an adapter, without ever merging a product.

A weight that the adapter changes by a product or a norm becomes a tensor that knows both parts
(``Unmerged``). Where the model multiplies by it, the result is put together from activations:
``f * (x W^T) + f * s ((x A^T) B^T)`` with ``f = m / (||W + s B A|| + eps)``. Any other use of such
a weight is an error, so no part of a model can quietly go on with the base's values. Weights that
are replaced or added to by stored values just have other values.

The norms are this module's own: float64, in blocks of rows, from the stored bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the name that everyone gives it

from dora_export.plan import Settings, Step
from dora_export.tensors import Operand, TensorRef
from dora_export.update import Change, Delta, Dense, Kronecker, Over, Product
from dora_export.verification import functions
from dora_export.verification.measured import Unsupported

BLOCK_ELEMENTS = 1 << 21  # float64 elements of one block of rows while norms are computed


# --- numbers of the adapter


def stored(ref: TensorRef, start: int = 0, stop: int | None = None) -> Tensor:
    """Return elements ``[start, stop)`` of a stored tensor, flat, in its own dtype."""
    dtype: torch.dtype = getattr(torch, ref.dtype.torch)
    return torch.from_numpy(ref.raw(start, stop)).view(dtype)


def _operand(operand: Operand) -> Tensor:
    """Return an adapter tensor, arranged, in float64."""
    values = operand.value(lambda ref: stored(ref).double().numpy())
    return torch.from_numpy(values.copy())


@dataclass(frozen=True, eq=False)
class Norm:
    """A magnitude and the norm it is divided by.

    Attributes:
        over: Whether they belong to rows or to columns.
        magnitude: m, one per row or column group of the change.
        eps: Added to the norm.
        first: Row of the weight that the change begins with.
        group: Neighbouring columns that share one norm.
        factor: ``m / (norm + eps)``, one per row of the weight (1 where the change is not), or one
            per column group; 0 where the norm is.
        kept: 1 for rows or columns that then keep the base's values, else 0; None: there are none.
        given: The adapter stores the factor itself; there is no norm.
    """

    over: Over
    magnitude: Tensor
    eps: float
    first: int
    group: int
    factor: Tensor
    kept: Tensor | None
    given: bool = False

    def to(self, dtype: torch.dtype) -> Norm:
        """Return the factors rounded to another precision."""
        kept = None if self.kept is None else self.kept.to(dtype)
        return replace(
            self, magnitude=self.magnitude.to(dtype), factor=self.factor.to(dtype), kept=kept
        )

    def measured(self, V: Tensor) -> Norm:
        """Return the factors as the precision of ``V``, rows and columns, gives them."""
        if self.given:
            return self
        if self.over == "row":
            count = len(self.magnitude)
            norm = torch.linalg.vector_norm(V[self.first : self.first + count], dim=1)
            factor = _padded(self.magnitude / (norm + self.eps), self.first, len(V), 1.0)
        else:
            norm = torch.linalg.vector_norm(V.reshape(len(V), -1, self.group), dim=(0, 2))
            factor = self.magnitude / (norm + self.eps)
        return replace(self, factor=torch.where(self.factor == 0, self.factor, factor))


@dataclass(frozen=True, eq=False)
class Term:
    """One change of a weight, as numbers: stored terms, as in ``update.Change``.

    Attributes:
        left: ``(rows, rank)``, or None.
        right: ``(rank, columns)``, or None.
        dense: What stands for ``left @ right``, of the weight's shape, or None.
        scaling: Factor on either.
        norm: What the sum is multiplied by and divided by, or None.
        value: Values of the weight's shape that are added, or that replace it, or None.
        replaces: Whether ``value`` replaces.
        adapter: Which of several adapters it belongs to.
        weight: Of all that this adapter does.
        own_norm: ``norm`` is that of the base and this product alone.
    """

    left: Tensor | None = None
    right: Tensor | None = None
    dense: Tensor | None = None
    scaling: float = 1.0
    norm: Norm | None = None
    value: Tensor | None = None
    replaces: bool = False
    adapter: int = 0
    weight: float = 1.0
    own_norm: bool = False

    def to(self, dtype: torch.dtype) -> Term:
        """Return the term rounded to another precision."""
        return replace(
            self,
            left=None if self.left is None else self.left.to(dtype),
            right=None if self.right is None else self.right.to(dtype),
            dense=None if self.dense is None else self.dense.to(dtype),
            norm=None if self.norm is None else self.norm.to(dtype),
            value=None if self.value is None else self.value.to(dtype),
        )

    def measured(self, W: Tensor) -> Term:
        """Return the term with its norms as the precision of ``W`` gives them."""
        if self.norm is None:
            return self
        V = W.reshape(W.shape[0], -1)
        if (product := self.product(0, len(V))) is not None:
            V = V + self.scaling * product
        return replace(self, norm=self.norm.measured(V))

    @property
    def adds(self) -> bool:
        """Whether there is a product, or what stands for it."""
        return self.left is not None or self.dense is not None

    def product(self, first: int, last: int) -> Tensor | None:
        """Return some rows of the product, not scaled, or None without one."""
        if self.left is not None and self.right is not None:
            return self.left[first:last] @ self.right
        return None if self.dense is None else self.dense[first:last].flatten(1)


def terms(step: Step, settings: Settings) -> tuple[Term, ...]:
    """Return a step's changes as float64 numbers, norms included.

    Raises:
        Unsupported: A change is about a part of the weight that no activation form covers.
    """
    return tuple(_term(step, position, settings) for position in range(len(step.changes)))


def _term(step: Step, position: int, settings: Settings) -> Term:
    change, shape = step.changes[position], step.shape
    rows, columns = _matrix(shape)
    if change.columns != columns:
        raise Unsupported(step.name, f"a part of a fused weight {shape} is changed")
    first = change.start // columns
    if change.function is not None:
        if change.rows != rows:
            raise Unsupported(step.name, "a part of it is made from all of that part")
        base = stored(step.source).double().numpy().reshape(rows, columns)
        whole = functions.exact(change.function, base, step.source.dtype)
        return Term(value=torch.from_numpy(whole).reshape(shape), replaces=True)
    if change.value is not None:
        value = _value(step, change)
        return _of(change, Term(value=value, replaces=change.kind != "add"))
    term = Term(scaling=change.scaling)
    if change.delta is not None:
        term = _added(change.delta, term)
    norm = None
    if change.magnitude is not None:
        norm = _norm(step, position, term, settings)
    if term.left is not None:
        term = replace(term, left=_padded(term.left, first, rows, 0.0))
    if term.dense is not None:
        term = replace(term, dense=_padded(term.dense, first, rows, 0.0).reshape(shape))
    return _of(change, replace(term, norm=norm))


def _added(delta: Delta, term: Term) -> Term:
    """Return a term with an update's operands, float64: factors where they are of low rank.

    ``(B1 A1) * (B2 A2)``, elementwise, is a product as well: its factors are all products of a
    column of B1 with one of B2, and of a row of A1 with one of A2.
    Source: Hyeon-Woo et al. 2022, arXiv:2108.06098, prop. 1 (LoHa); Horn and Johnson, Topics in
    Matrix Analysis, lemma 5.1.4.
    """
    if isinstance(delta, Product):
        return replace(term, left=_operand(delta.left), right=_operand(delta.right))
    if isinstance(delta, Kronecker):
        return replace(term, dense=torch.kron(_operand(delta.first), _operand(delta.second)))
    if isinstance(delta, Dense):
        return replace(term, dense=_operand(delta.matrix))
    left, right = _operand(delta.first.left), _operand(delta.first.right)
    other_left, other_right = _operand(delta.second.left), _operand(delta.second.right)
    if left.shape[1] * other_left.shape[1] > min(delta.shape):
        return replace(term, dense=(left @ right) * (other_left @ other_right))
    return replace(
        term,
        left=(left[:, :, None] * other_left[:, None, :]).flatten(1),
        right=(right[:, None, :] * other_right[None, :, :]).flatten(0, 1),
    )


def _of(change: Change, term: Term) -> Term:
    """Return a term as part of what one of several adapters does."""
    return replace(term, adapter=change.adapter, weight=change.weight, own_norm=change.own_norm)


def _norm(step: Step, position: int, term: Term, settings: Settings) -> Norm:
    """Return a change's magnitude and norm, float64.

    Source: arXiv:2402.09353, eq. 5.
    """
    change, rows = step.changes[position], _matrix(step.shape)[0]
    assert change.magnitude is not None, "Bug: a norm without a magnitude"
    assert change.over is not None, "Bug: a magnitude of neither rows nor columns"
    if change.over == "column" and change.rows != rows:
        raise Unsupported(step.name, "a part of it has norms across its rows")
    m = _operand(change.magnitude).flatten()
    first = change.start // change.columns
    if change.magnitude_is_factor:
        factor = _padded(m, first, rows, 1.0) if change.over == "row" else m
        return Norm(change.over, m, change.eps, first, change.group, factor, None, given=True)
    length = _squares(step, position, term).sqrt()
    zero = length == 0
    factor = torch.where(zero, 0.0, m / torch.where(zero, 1.0, length + change.eps))
    base_stays = zero & (m != 0) & (change.eps == 0)
    kept = None
    if settings.zero_norm == "keep-base" and bool(base_stays.any()):
        kept = base_stays.double()
    if change.over == "row":
        factor = _padded(factor, first, rows, 1.0)
        kept = None if kept is None else _padded(kept, first, rows, 0.0)
    return Norm(change.over, m, change.eps, first, change.group, factor, kept)


def _matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    return (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, math.prod(shape))


def _padded(part: Tensor, first: int, rows: int, fill: float) -> Tensor:
    """Return a part of the rows as all of them."""
    if len(part) == rows:
        return part
    whole = torch.full((rows, *part.shape[1:]), fill, dtype=part.dtype)
    whole[first : first + len(part)] = part
    return whole


def values(step: Step, settings: Settings, dtype: torch.dtype) -> Tensor:
    """Return a tensor that only stored values change: replaced, added to, or row by row.

    Args:
        step: Its changes hold no product and no norm.
        settings: For the strength.
        dtype: Precision of the result and of the sums.

    Raises:
        Unsupported: A change is about a part that does not begin with a whole row.
    """
    base = stored(step.source).to(dtype)
    result = base.clone()
    for _, group in groupby(step.changes, key=lambda c: c.adapter):
        own = list(group)
        before = result.clone() if own[0].weight != 1.0 else result
        for change in own:
            _put(result, change, dtype)
        if own[0].weight != 1.0:
            result = before + own[0].weight * (result - before)
    if settings.strength != 1.0:
        result = base + settings.strength * (result - base)
    return result.reshape(step.shape)


def _put(result: Tensor, change: Change, dtype: torch.dtype) -> None:
    """Add the stored values of a change to a flat tensor, or put them into it."""
    assert change.value is not None, "Bug: a product among stored values"
    part = result[change.start : change.stop].view(change.rows, change.columns)
    value = stored(change.value).to(dtype).view(-1, change.columns)
    if change.kind == "rows":
        part[list(change.row_indices)] = value
    elif change.kind == "add":
        part += change.scaling * value
    else:
        part[:] = value


def _value(step: Step, change: Change) -> Tensor:
    """Return the values that a change adds, or puts in place, beside a product; float64."""
    assert change.value is not None, "Bug: the change carries a value"
    rows, columns = _matrix(step.shape)
    if change.kind == "rows" or (change.kind == "replace" and change.rows != rows):
        raise Unsupported(step.name, "some rows are replaced and others are given a product")
    value = stored(change.value).double().reshape(-1, columns)
    factor = change.scaling if change.kind == "add" else 1.0
    return _padded(factor * value, change.start // columns, rows, 0.0).reshape(step.shape)


def _squares(step: Step, position: int, term: Term) -> Tensor:
    """Return the squares of the norms of ``W + s B A``: per row, or per column group.

    Args:
        step: The tensor.
        position: Of the change with the norm.
        term: What it adds, for the rows of the change alone.
    """
    change = step.changes[position]
    by_row = change.over == "row"
    parts: list[Tensor] = []
    block = max(1, BLOCK_ELEMENTS // change.columns)
    for first in range(0, change.rows, block):
        last = min(first + block, change.rows)
        V = _before(step, position, first, last)
        if (product := term.product(first, last)) is not None:
            V = V + change.scaling * product
        parts.append((V * V).sum(dim=1 if by_row else 0))
    if by_row:
        return torch.cat(parts)
    return torch.stack(parts).sum(dim=0).reshape(-1, change.group).sum(dim=1)


def _before(step: Step, position: int, first: int, last: int) -> Tensor:
    """Return rows of a change's matrix as a norm sees them without its own product, float64.

    Other adapters' changes do not count. Those before a norm on the same rows can only have
    replaced them: the plan allows no other.
    """
    change = step.changes[position]
    start, stop = (change.start + row * change.columns for row in (first, last))
    source = step.source
    for earlier in () if change.own_norm else step.changes[:position]:
        if earlier.kind == "replace" and earlier.value is not None:
            source = earlier.value
        elif earlier.start < stop and start < earlier.stop:
            raise Unsupported(step.name, f"a norm after a change of kind {earlier.kind}")
    return stored(source, start, stop).double().reshape(last - first, change.columns)


# --- how a weight is used, in activation form

Apply = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Use:
    """One way of multiplying by a stored matrix of rows and columns.

    Attributes:
        plain: ``(x, weight) -> y`` without a bias.
        product: ``(x, left, right) -> y``: the same with the weight ``left @ right``, which it
            never forms.
        by_row: ``(x, factor, apply) -> y``: ``apply`` with every stored row times its factor.
        by_column: The same for columns.
        bias: ``(y, bias) -> y``.
    """

    plain: Callable[[Tensor, Tensor], Tensor]
    product: Callable[[Tensor, Tensor, Tensor], Tensor]
    by_row: Callable[[Tensor, Tensor, Apply], Tensor]
    by_column: Callable[[Tensor, Tensor, Apply], Tensor]
    bias: Callable[[Tensor, Tensor], Tensor] = torch.add


# y = x W^T: rows are outputs, columns inputs.
LINEAR = Use(
    plain=F.linear,
    product=lambda x, left, right: F.linear(F.linear(x, right), left),
    by_row=lambda x, f, apply: apply(x) * f,
    by_column=lambda x, f, apply: apply(x * f),
)
# y = x W (GPT-2's Conv1D): rows are inputs, columns outputs.
FAN_IN = Use(
    plain=torch.matmul,
    product=lambda x, left, right: (x @ left) @ right,
    by_row=lambda x, f, apply: apply(x * f),
    by_column=lambda x, f, apply: apply(x) * f,
)


def lookup(**options: Any) -> Use:
    """Return the use of an embedding: rows are looked up by token, columns are outputs."""
    return Use(
        plain=lambda ids, weight: F.embedding(ids, weight, **options),
        product=lambda ids, left, right: F.embedding(ids, left) @ right,
        by_row=lambda ids, f, apply: apply(ids) * f[ids][..., None],
        by_column=lambda ids, f, apply: apply(ids) * f,
    )


def convolution(function: Callable[..., Tensor], weight: Tensor, **options: Any) -> Use:
    """Return the use of a convolution: rows are output channels, columns input channels x kernel.

    Padding is with zeros here (the layer pads otherwise beforehand), so scaling the channels of
    the input scales the padding too.
    """
    kernel = weight.shape[1:]
    channels = (-1, *(1 for _ in weight.shape[2:]))

    def product(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
        inner = function(x, right.reshape(-1, *kernel), None, **options)
        return function(inner, left.reshape(*left.shape, *channels[1:]))

    return Use(
        plain=lambda x, weight: function(x, weight, None, **options),
        product=product,
        by_row=lambda x, f, apply: apply(x) * f.reshape(channels),
        by_column=lambda x, f, apply: apply(x * f.reshape(channels)),
        bias=lambda y, bias: y + bias.reshape(channels),
    )


# --- the weight itself


@dataclass(frozen=True, eq=False)
class Parts:
    """What an ``Unmerged`` weight is made of.

    Attributes:
        name: The tensor's name in the checkpoint.
        base: Its base values, in working precision.
        terms: Its changes in working precision, in order.
        strength: ``y0 + strength (y - y0)``, dimensionless.
        index: Which slice of that tensor it is, if one of a stack.
    """

    name: str
    base: Tensor
    terms: tuple[Term, ...]
    strength: float = 1.0
    index: int | None = None

    def to(self, dtype: torch.dtype) -> Parts:
        """Return the parts rounded to another precision."""
        changes = tuple(t.to(dtype) for t in self.terms)
        return replace(self, base=self.base.to(dtype), terms=changes)

    def measured(self) -> Parts:
        """Return the parts with norms as their own precision gives them, not rounded float64."""
        changes, W = [], self.base
        for term in self.terms:
            changes.append(term.measured(self.base if term.own_norm else W))
            W = term.value if term.replaces and term.value is not None else W
        return replace(self, terms=tuple(changes))

    def compute(self, use: Use, x: Tensor) -> Tensor:
        """Return what ``use`` gives with the changed weight, put together from activations."""
        y = self._after(len(self.terms), use, x)
        if self.strength != 1.0:
            y0 = use.plain(x, self.base)
            y = y0 + self.strength * (y - y0)
        return y

    def _after(self, count: int, use: Use, x: Tensor) -> Tensor:
        """Return the result with the first ``count`` changes, weights of whole adapters included.

        A factor applies to all that came before it, so each change wraps the ones before.
        """
        if count == 0:
            return use.plain(x, self.base)
        weight, adapter = self.terms[count - 1].weight, self.terms[count - 1].adapter
        last = count == len(self.terms) or self.terms[count].adapter != adapter
        if weight == 1.0 or not last:
            return self._with(count, use, x)
        before = self._after(self._first(count), use, x)
        return before + weight * (self._with(count, use, x) - before)

    def _first(self, count: int) -> int:
        """Return where the changes of the adapter of change ``count - 1`` begin."""
        adapter = self.terms[count - 1].adapter
        return next(i for i, term in enumerate(self.terms) if term.adapter == adapter)

    def _with(self, count: int, use: Use, x: Tensor) -> Tensor:
        """Return the result with change ``count - 1`` put onto those before it."""
        term = self.terms[count - 1]
        if term.value is not None:
            y = use.plain(x, term.value)
            return y if term.replaces else self._after(count - 1, use, x) + y

        def changed(x: Tensor) -> Tensor:
            y = self._after(count - 1, use, x)
            if term.left is not None and term.right is not None:
                y = y + term.scaling * use.product(x, term.left, term.right)
            elif term.dense is not None:
                y = y + term.scaling * use.plain(x, term.dense)
            return y

        def base(x: Tensor) -> Tensor:
            first = self._first(count)  # lines without direction keep what this adapter found
            return self._after(first, use, x) if first else use.plain(x, self.base)

        if term.norm is None:
            return changed(x)
        by = use.by_row if term.norm.over == "row" else use.by_column
        y = by(x, term.norm.factor, changed)
        return y if term.norm.kept is None else y + by(x, term.norm.kept, base)


Observer = Callable[[Parts, "Call", Tensor], None]


class ActivationForm(Tensor):
    """A weight that is more than its values: its known uses are computed in activation form."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:  # the signature is torch's
        """Describe the weight as its values are, or compute a use of it."""
        kwargs = kwargs or {}
        if func in DESCRIPTIONS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        weight = next(a for a in (*args, *kwargs.values()) if isinstance(a, cls))
        return weight.used(func, args, kwargs)

    def used(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Return what a function of torch gives with this weight among its arguments.

        Each kind of weight knows uses of its own; one that says none has none.

        Raises:
            Unsupported: It is none of the known uses.
        """
        raise self.unknown(type(self).__name__, "a weight in activation form", func)

    def unknown(self, name: str, what: str, func: Any) -> Unsupported:
        """Return the refusal of a use that is not known."""
        return Unsupported(name, f"the model uses {what} in torch's "
                           f"{getattr(func, '__name__', str(func))}()")  # fmt: skip


class Unmerged(ActivationForm):
    """A weight of which base and adapter stay apart; behaves as its base towards ``shape`` etc.

    Attributes:
        parts: What it is made of.
        uses: How often a forward pass has computed with it.
        observer: Called with every such use and its result, or None.
    """

    parts: Parts
    uses: int
    observer: Observer | None

    @staticmethod
    def of(parts: Parts) -> Unmerged:
        """Return a weight that shares the memory of ``parts.base``."""
        weight: Unmerged = torch.Tensor._make_subclass(Unmerged, parts.base.detach(), False)
        weight.parts, weight.uses, weight.observer = parts, 0, None
        return weight

    def used(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Compute a known use in activation form; refuse any other."""
        if func in TRANSPOSITIONS and self.ndim == 2:
            return Transposed.of(self)
        return self.run(_call(func, self, args, kwargs))

    def run(self, call: Call) -> Tensor:
        """Return what a call gives with this weight, in activation form, and tell of it."""
        result = call.run(self.parts)
        self.uses += 1
        if self.observer is not None:
            self.observer(self.parts, call, result)
        return result


class Transposed(ActivationForm):
    """An ``Unmerged`` weight as its transpose: ``x @ W.T`` is ``linear(x, W)``.

    Attributes:
        weight: What it is the transpose of.
    """

    weight: Unmerged

    @staticmethod
    def of(weight: Unmerged) -> Transposed:
        """Return the transpose of a matrix; it shares the base's memory."""
        turned: Transposed = torch.Tensor._make_subclass(Transposed, weight.parts.base.T, False)
        turned.weight = weight
        return turned

    def used(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Compute a known use in activation form; refuse any other."""
        if func in TRANSPOSITIONS:
            return self.weight
        if func in PRODUCTS and args[1] is self:
            return self.weight.run(Call(LINEAR, args[0]))
        if func is F.linear and args[1] is self:
            bias = args[2] if len(args) > 2 else kwargs.get("bias")
            return self.weight.run(Call(FAN_IN, args[0], bias))
        raise self.unknown(self.weight.parts.name, "its transpose", func)


# What a model may ask of a weight without computing with it.
_DESCRIBED = (
    "shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_cuda", "is_meta",
    "is_sparse", "is_quantized", "itemsize", "nbytes",
)  # fmt: skip
DESCRIPTIONS = frozenset(
    [
        *(getattr(Tensor, name).__get__ for name in _DESCRIBED),
        *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.stride, Tensor.element_size),
        *(Tensor.is_floating_point, Tensor.is_complex, Tensor.is_contiguous),
    ]
)
# Without arguments, and of matrices only; others choose their axes.
TRANSPOSITIONS = frozenset(
    (Tensor.T.__get__, Tensor.mT.__get__, Tensor.t, torch.t)  # type: ignore[attr-defined]
)
PRODUCTS = frozenset((torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__))


@dataclass(frozen=True, eq=False)
class Call:
    """One multiplication by an ``Unmerged`` weight.

    Attributes:
        use: What kind.
        x: What is multiplied.
        bias: Added afterwards, or None.
    """

    use: Use
    x: Tensor
    bias: Tensor | None = None

    def run(self, parts: Parts) -> Tensor:
        """Return the result in activation form."""
        return self._with(parts.compute(self.use, self.x), self.bias)

    def plain(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return the result with an ordinary weight and another bias."""
        return self._with(self.use.plain(self.x, weight), bias)

    def _with(self, y: Tensor, bias: Tensor | None) -> Tensor:
        return y if bias is None else self.use.bias(y, bias)

    def to(self, dtype: torch.dtype) -> Call:
        """Return the same call on operands of another precision."""
        x = self.x.to(dtype) if self.x.is_floating_point() else self.x
        return Call(self.use, x, None if self.bias is None else self.bias.to(dtype))


def _call(func: Any, weight: Unmerged, args: Any, kwargs: Any) -> Call:
    """Return what a torch function does with the weight.

    Raises:
        Unsupported: It is none of the known uses.
    """
    if func in PRODUCTS and len(args) == 2 and args[1] is weight:
        return Call(FAN_IN, args[0])
    arguments = SIGNATURES.get(func)
    if arguments is None:
        raise weight.unknown(weight.parts.name, "it", func)
    given = {**dict(zip(arguments, args, strict=False)), **kwargs}
    if func is torch.addmm:
        plain = given.get("beta", 1) == 1 and given.get("alpha", 1) == 1
        if given["mat2"] is not weight or not plain:
            raise Unsupported(weight.parts.name, "the model uses it in another addmm()")
        return Call(FAN_IN, given["mat1"], given["input"])
    if given["weight"] is not weight:
        raise Unsupported(weight.parts.name, "the model multiplies another weight by it")
    bias = given.get("bias")
    if func is F.linear:
        return Call(LINEAR, given["input"], bias)
    options = {k: v for k, v in given.items() if k not in ("input", "weight", "bias")}
    if func is F.embedding:
        if options.get("max_norm") is not None:
            raise Unsupported(weight.parts.name, "an embedding with max_norm changes its weight")
        return Call(lookup(padding_idx=options.get("padding_idx")), given["input"])
    if options.get("groups", 1) != 1:
        raise Unsupported(weight.parts.name, "a convolution in groups")
    return Call(convolution(func, weight, **options), given["input"], bias)


_CONVOLUTION = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
SIGNATURES: Mapping[Any, tuple[str, ...]] = {
    F.linear: ("input", "weight", "bias"),
    F.embedding: ("input", "weight", "padding_idx", "max_norm", "norm_type",
                  "scale_grad_by_freq", "sparse"),
    torch.addmm: ("input", "mat1", "mat2"),
    torch.conv1d: _CONVOLUTION,
    torch.conv2d: _CONVOLUTION,
    torch.conv3d: _CONVOLUTION,
}  # fmt: skip
