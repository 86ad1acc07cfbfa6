"""The reference: a base model that computes with an adapter, without ever merging a product.

A weight that the adapter changes by a product or a norm becomes a tensor that knows both parts
(``Unmerged``). Where the model multiplies by it, the result is put together from activations:
``f * (x W^T) + f * s ((x A^T) B^T)`` with ``f = m / (||W + s B A|| + eps)``. Any other use of such
a weight is an error, so no part of a model can quietly go on with the base's values. Weights that
are replaced or added to by stored values just have other values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the name that everyone gives it

from dora_export.verification.measured import Unsupported
from dora_export.verification.terms import Term

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

    In groups, the columns are the input channels of one of them, and of every one.
    Padding is with zeros here (the layer pads otherwise beforehand), so scaling the channels of
    the input scales the padding too.
    """
    kernel = weight.shape[1:]
    channels = (-1, *(1 for _ in weight.shape[2:]))
    groups = options.get("groups", 1)

    def product(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
        # Each group has its own inputs and its own rows of ``left``; all share ``right``.
        down = right.reshape(-1, *kernel).repeat(groups, *(1 for _ in kernel))
        inner = function(x, down, None, **options)
        return function(inner, left.reshape(*left.shape, *channels[1:]), groups=groups)

    return Use(
        plain=lambda x, weight: function(x, weight, None, **options),
        product=product,
        by_row=lambda x, f, apply: apply(x) * f.reshape(channels),
        by_column=lambda x, f, apply: apply(x * f.repeat(groups).reshape(channels)),
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
        for term, later in ((t, self.terms[i:]) for i, t in enumerate(self.terms, 1)):
            changes.append(term.measured(self.base if term.own_norm else W))
            if any(t.norm is not None and not t.own_norm for t in later) and term.norm is None:
                W = term.after(W)
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

        def before(x: Tensor) -> Tensor:
            return self._after(count - 1, use, x)

        term = self.terms[count - 1]
        own = _own(term, use, x)
        if term.replaces:
            assert own is not None, "Bug: nothing in the place of something"
            return own if term.inside is None else own + _outside(term, use, x, before)
        if term.norm is None:
            return before(x) if own is None else before(x) + own

        def changed(x: Tensor) -> Tensor:
            own = _own(term, use, x)
            return before(x) if own is None else before(x) + own

        def base(x: Tensor) -> Tensor:
            first = self._first(count)  # lines without direction keep what this adapter found
            return self._after(first, use, x) if first else use.plain(x, self.base)

        def normed(x: Tensor) -> Tensor:
            assert term.norm is not None, "Bug: checked above"
            by = use.by_row if term.norm.over == "row" else use.by_column
            y = by(x, term.norm.factor, changed)
            return y if term.norm.kept is None else y + by(x, term.norm.kept, base)

        if term.inside is None:
            return normed(x)
        return use.by_row(x, term.inside, normed) + _outside(term, use, x, before)


def _own(term: Term, use: Use, x: Tensor) -> Tensor | None:
    """Return what a term adds to the result, or puts in its place; None: nothing."""
    if term.value is not None:
        return use.plain(x, term.value)
    if term.left is not None and term.right is not None:
        return term.scaling * use.product(x, term.left, term.right)
    return None if term.dense is None else term.scaling * use.plain(x, term.dense)


def _outside(term: Term, use: Use, x: Tensor, before: Apply) -> Tensor:
    """Return what the rows give that a term is not about."""
    assert term.inside is not None, "Bug: it is about all"
    return use.by_row(x, 1 - term.inside, before)


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
