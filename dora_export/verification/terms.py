"""The numbers of a reference that is never merged: products, norms and stored values of a weight.

Norms are this module's own: float64, in blocks of rows, from the stored bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from torch import Tensor

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
        rows: Rows of the weight that the change is about.
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
    rows: int
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
        part = V[self.first : self.first + self.rows]
        if self.over == "row":
            norm = torch.linalg.vector_norm(part, dim=1)
            factor = _padded(self.magnitude / (norm + self.eps), self.first, len(V), 1.0)
        else:
            norm = torch.linalg.vector_norm(part.reshape(self.rows, -1, self.group), dim=(0, 2))
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
        replaces: Whether ``value`` replaces, or ``left @ right`` does.
        inside: 1 for each row of the weight that is replaced, or has a norm across its rows, and
            0 for the others; None: all are.
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
    inside: Tensor | None = None
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
            inside=None if self.inside is None else self.inside.to(dtype),
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
        return not self.replaces and (self.left is not None or self.dense is not None)

    def after(self, W: Tensor) -> Tensor:
        """Return a weight with this term put onto it, for a norm that comes later."""
        assert self.norm is None, "Bug: a norm of what another norm left"
        flat = W.reshape(len(W), -1)
        own = self.product(0, len(flat)) if self.value is None else self.value.reshape(flat.shape)
        assert own is not None, "Bug: a term of nothing"
        if not self.replaces:
            return flat + self.scaling * own
        return own if self.inside is None else torch.where(self.inside[:, None] != 0, own, flat)

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
        raise Unsupported(
            step.name, f"a part of a stack {shape} is changed that is no matrix of it"
        )
    first = change.start // columns
    if change.function is not None:
        _refuse_earlier(step, position)
        base = stored(step.source, change.start, change.stop).double().numpy()
        found = functions.exact(change.function, base.reshape(-1, columns), step.source.dtype)
        value = _padded(torch.from_numpy(found), first, rows, 0.0).reshape(shape)
        return _of(change, Term(value=value, replaces=True, inside=_inside(change, rows)))
    if change.kind == "rows":
        return _of(change, _rows(change, rows))
    if change.value is not None:
        value = _value(step, change)
        if change.kind == "add":
            return _of(change, Term(value=value))
        return _of(change, Term(value=value, replaces=True, inside=_inside(change, rows)))
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
    inside = _inside(change, rows) if norm is not None and norm.over == "column" else None
    return _of(change, replace(term, norm=norm, inside=inside))


def _inside(change: Change, rows: int) -> Tensor | None:
    """Return 1 for the rows that a change is about, 0 for the others; None: it is about all."""
    if change.rows == rows:
        return None
    ones = torch.ones(change.rows, dtype=torch.float64)
    return _padded(ones, change.start // change.columns, rows, 0.0)


def _rows(change: Change, rows: int) -> Term:
    """Return rows that are replaced one by one: a product picks them, of a weight of any size."""
    assert change.value is not None, "Bug: kind rows carries a value"
    picked = torch.tensor(change.row_indices) + change.start // change.columns
    left = torch.zeros(rows, len(picked), dtype=torch.float64)
    left[picked, torch.arange(len(picked))] = 1.0
    right = stored(change.value).double().reshape(-1, change.columns)
    return Term(left=left, right=right, replaces=True, inside=left.sum(dim=1))


def _refuse_earlier(step: Step, position: int) -> None:
    """Refuse a function of what earlier changes left of its part."""
    change = step.changes[position]
    for earlier in step.changes[:position]:
        if earlier.start < change.stop and change.start < earlier.stop:
            what = f"a weight made from all of it after a change of kind {earlier.kind}"
            raise Unsupported(step.name, what)


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
    m = _operand(change.magnitude).flatten()
    first = change.start // change.columns
    if change.magnitude_is_factor:
        factor = _padded(m, first, rows, 1.0) if change.over == "row" else m
        return Norm(change.over, m, change.eps, first, change.rows, change.group, factor, None,
                    given=True)  # fmt: skip
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
    return Norm(change.over, m, change.eps, first, change.rows, change.group, factor, kept)


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

    A bias that goes through its layer's scaling counts as well: its values are other ones.

    Args:
        step: Its changes hold no product and no norm.
        settings: For the strength.
        dtype: Precision of the result and of the sums.
    """
    base = stored(step.source).to(dtype)
    result = base.clone()
    for _, group in groupby(step.changes, key=lambda c: c.adapter):
        own = list(group)
        before = result.clone() if own[0].weight != 1.0 else result
        for change in own:
            _put(result, change, dtype, step.source)
        if own[0].weight != 1.0:
            result = before + own[0].weight * (result - before)
    if settings.strength != 1.0:
        result = base + settings.strength * (result - base)
    return result.reshape(step.shape)


def _put(result: Tensor, change: Change, dtype: torch.dtype, source: TensorRef) -> None:
    """Add the stored values of a change to a flat tensor, or put them into it."""
    part = result[change.start : change.stop].view(change.rows, change.columns)
    if change.function is not None:
        made = functions.exact(change.function, part.double().numpy(), source.dtype)
        part[:] = torch.from_numpy(made).to(dtype)
        return
    assert change.value is not None, "Bug: a product among stored values"
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

    An own norm is of the base. Any other is of what the changes before it have left.

    Raises:
        Unsupported: One of those has a norm itself, or belongs to an adapter with a weight.
    """
    change = step.changes[position]
    start, stop = (change.start + row * change.columns for row in (first, last))
    V = stored(step.source, start, stop).double().reshape(last - first, change.columns)
    for earlier in () if change.own_norm else step.changes[:position]:
        shared = slice(max(start, earlier.start), min(stop, earlier.stop))
        if shared.start >= shared.stop:
            continue
        plain = earlier.magnitude is None and earlier.function is None
        if not plain or (earlier.adapter != change.adapter and earlier.weight != 1.0):
            raise Unsupported(step.name, f"a norm after a change of kind {earlier.kind}")
        here = slice(*((at - start) // change.columns for at in (shared.start, shared.stop)))
        there = range(
            *((at - earlier.start) // change.columns for at in (shared.start, shared.stop))
        )
        V[here] = _with(earlier, V[here], there)
    return V


def _with(change: Change, V: Tensor, rows: range) -> Tensor:
    """Return some rows of a change's matrix, by their numbers in it, with the change in them."""
    if change.delta is not None:
        product = _added(change.delta, Term()).product(rows.start, rows.stop)
        assert product is not None, "Bug: a delta without values"
        return V + change.scaling * product
    assert change.value is not None, "Bug: a change of nothing"
    if change.kind != "rows":
        columns = change.columns
        value = stored(change.value, rows.start * columns, rows.stop * columns).double()
        value = value.reshape(V.shape)
        return value if change.kind == "replace" else V + change.scaling * value
    value = stored(change.value).double().reshape(-1, change.columns)
    for at, row in _found(change, rows):
        V[row] = value[at]
    return V


def _found(change: Change, rows: range) -> Iterator[tuple[int, int]]:
    """Yield which of a change's single rows are among some, and where."""
    return ((at, row - rows.start) for at, row in enumerate(change.row_indices) if row in rows)
