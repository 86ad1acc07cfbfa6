"""Experts of the unmerged reference: a stacked parameter whose slices keep base and adapter apart.

A class of a mixture holds all experts in one parameter and multiplies by one slice at a time; a
checkpoint may hold a tensor per matrix of an expert. Each tensor that the adapter changes is a
``Cell``: a slice, or some of its outputs. A slice puts its result together from its cells, each in
activation form, and from the base for what no cell is about.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the name that everyone gives it

from dora_export.plan import Settings, Step
from dora_export.verification.measured import Unsupported
from dora_export.verification.terms import Term, terms
from dora_export.verification.unmerged import (
    FAN_IN,
    LINEAR,
    PRODUCTS,
    ActivationForm,
    Call,
    Observer,
    Parts,
    Use,
)


def is_stack(step: Step) -> bool:
    """Return whether a step's changes are about slices of a stack of matrices."""
    if len(step.shape) != 3 or not step.changes:
        return False
    each = step.shape[1] * step.shape[2]
    return all(
        c.columns == step.shape[2] and c.start // each == (c.stop - 1) // each
        for c in step.changes
    )  # fmt: skip


def slice_terms(step: Step, settings: Settings) -> dict[int, tuple[Term, ...]]:
    """Return the changes of each slice of a stack as numbers, as ``terms`` does for a matrix.

    Raises:
        Unsupported: A change has no activation form.
    """
    each = step.shape[1] * step.shape[2]
    found = {}
    for index in sorted({c.start // each for c in step.changes}):
        source = step.source.rows(index, index + 1).reshaped(*step.shape[1:])
        changes = tuple(
            replace(c, start=c.start - index * each)
            for c in step.changes
            if c.start // each == index
        )
        found[index] = terms(replace(step, source=source, changes=changes), settings)
    return found


@dataclass(eq=False)
class Cell:
    """One changed matrix of one expert.

    Attributes:
        parts: What it is made of, as the checkpoint holds it.
        index: Its slice of the parameter.
        turned: The checkpoint's matrix is the transpose of the class's slice, or of its part.
        outputs: Which of the slice's outputs it has; None: all.
        uses: How often a forward pass has computed with it.
        observer: Called with every such use and its result, or None.
    """

    parts: Parts
    index: int
    turned: bool = False
    outputs: slice | None = None
    uses: int = 0
    observer: Observer | None = None

    def run(self, use: Use, x: Tensor) -> Tensor:
        """Return its outputs, for a class that uses the slice so."""
        if self.turned:
            use = FAN_IN if use is LINEAR else LINEAR
        result = self.parts.compute(use, x)
        self.uses += 1
        if self.observer is not None:
            self.observer(self.parts, Call(use, x), result)
        return result


@dataclass(eq=False)
class Cells:
    """The cells of one tensor of the checkpoint, watched as one."""

    cells: list[Cell]

    @property
    def uses(self) -> int:
        """How often the least used of them was."""
        return min(cell.uses for cell in self.cells)

    @property
    def observer(self) -> Observer | None:
        """Who watches them."""
        return self.cells[0].observer

    @observer.setter
    def observer(self, observer: Observer | None) -> None:
        for cell in self.cells:
            cell.observer = observer


@dataclass(eq=False)
class _Memory:
    """What a stack was last multiplied with, for experts that nothing was routed to."""

    last: tuple[Use, Tensor] | None = None


class UnmergedStack(ActivationForm):
    """A stack of experts' matrices; behaves as its base towards ``shape`` etc.

    Attributes:
        cells: Slice -> its cells.
    """

    cells: dict[int, list[Cell]]
    memory: _Memory

    @staticmethod
    def of(base: Tensor) -> UnmergedStack:
        """Return a stack without changes that shares the memory of ``base``."""
        stack: UnmergedStack = torch.Tensor._make_subclass(UnmergedStack, base.detach(), False)
        stack.cells, stack.memory = {}, _Memory()
        return stack

    def add_cell(self, cell: Cell) -> None:
        """Add a cell."""
        self.cells.setdefault(cell.index, []).append(cell)

    def reach(self) -> None:
        """Compute with the cells that no input was routed to, as with the last one that was."""
        if self.memory.last is None:
            return
        use, x = self.memory.last
        for cells in self.cells.values():
            for cell in cells:
                if not cell.uses:
                    cell.run(use, x)

    def used(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Return one slice, or compute with all; refuse any other use."""
        if func is Tensor.__getitem__ and _is_index(args[1]):
            return _slice(self, int(args[1]))
        if func is torch.bmm and args[1] is self:
            return torch.stack([_slice(self, i).run(FAN_IN, x) for i, x in enumerate(args[0])])
        raise self.unknown(_name(self), "a stack of experts", func)


def _is_index(index: Any) -> bool:
    if isinstance(index, Tensor):
        return index.numel() == 1 and index.ndim == 0 and not index.is_floating_point()
    return isinstance(index, int) and not isinstance(index, bool)


def _name(stack: UnmergedStack) -> str:
    return next(iter(stack.cells.values()))[0].parts.name


def _slice(stack: UnmergedStack, index: int) -> UnmergedSlice:
    with torch._C.DisableTorchFunctionSubclass():
        base = Tensor.__getitem__(stack, index).as_subclass(Tensor)
    found: UnmergedSlice = torch.Tensor._make_subclass(UnmergedSlice, base, False)
    found.base, found.stack = base, stack
    found.cells = stack.cells.get(index % stack.shape[0], [])
    return found


class UnmergedSlice(ActivationForm):
    """One slice of an ``UnmergedStack``.

    Attributes:
        base: Its base values.
        stack: Where it comes from.
        cells: What is changed of it.
    """

    base: Tensor
    stack: UnmergedStack
    cells: list[Cell]

    def run(self, use: Use, x: Tensor) -> Tensor:
        """Return what ``use`` gives with the changed slice."""
        self.stack.memory.last = (use, x)
        if len(self.cells) == 1 and self.cells[0].outputs is None:
            return self.cells[0].run(use, x)
        y = use.plain(x, self.base)
        for cell in self.cells:
            if cell.outputs is None:
                raise Unsupported(cell.parts.name, "is changed twice in the model's own parameter")
            y[..., cell.outputs] = cell.run(use, x)
        return y

    def used(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Compute a known use in activation form; refuse any other."""
        given = {**dict(zip(("input", "weight", "bias"), args, strict=False)), **kwargs}
        if func is F.linear and given["weight"] is self:
            y, bias = self.run(LINEAR, given["input"]), given.get("bias")
            return y if bias is None else y + bias
        if func in PRODUCTS and given["weight"] is self:
            return self.run(FAN_IN, given["input"])
        raise self.unknown(_name(self.stack), "an expert", func)


@dataclass
class Stacks:
    """The stacked parameters of a model that the adapter changes, by path."""

    by_path: dict[str, UnmergedStack] = field(default_factory=dict)

    def at(self, path: str, parameter: Tensor) -> UnmergedStack:
        """Return the stack in a parameter's place, a new one the first time."""
        if path not in self.by_path:
            self.by_path[path] = UnmergedStack.of(parameter)
        return self.by_path[path]

    def reach(self) -> None:
        """Compute with all experts that nothing was routed to."""
        for stack in self.by_path.values():
            stack.reach()

    def cells(self) -> Iterator[Cell]:
        """Yield every cell."""
        for stack in self.by_path.values():
            for cells in stack.cells.values():
                yield from cells
