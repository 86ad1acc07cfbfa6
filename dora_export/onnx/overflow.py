"""Branches of models in float16 that values decide, written so that they can be traced.

BART, its kin and LongT5 look at a layer's states and clamp them where one is infinite:
``if not torch.isfinite(x).all(): x = torch.clamp(x, -c, c)``. A graph holds no such branch; what it
computes is a choice between both, ``where(isfinite(x).all(), x, clamp(x, -c, c))``.
Source: transformers, models/bart/modeling_bart.py, ``BartEncoderLayer.forward``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

# Test of a tensor -> its reduction, and whether states are to be clamped where that is true.
TESTS: dict[Any, tuple[Any, bool]] = {
    torch.isfinite: (torch.Tensor.all, False),
    torch.isinf: (torch.Tensor.any, True),
}
TESTED, DECIDES = "_overflow_tested", "_overflow_decides"


class _Choices(TorchFunctionMode):
    """Takes the clamping branch, and makes what is clamped in it a choice."""

    def __init__(self) -> None:
        super().__init__()
        self.pending: tuple[Tensor, Tensor] | None = None  # the states, whether to clamp them

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[Any],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        named = kwargs or {}
        # A stand-in of the tracer's for a size would have any attribute.
        first = args[0] if args and isinstance(args[0], Tensor) else None
        if func is torch.Tensor.__bool__ and hasattr(first, DECIDES):
            assert self.pending is None, "Bug: a branch that clamps nothing"
            states, needed, clamps = getattr(first, DECIDES)
            self.pending = (states, needed)
            return clamps
        if func is torch.clamp and self.pending is not None and first is self.pending[0]:
            states, needed = self.pending
            self.pending = None
            return torch.where(needed, func(*args, **named), states)
        found = func(*args, **named)
        if func in TESTS:
            setattr(found, TESTED, (func, first))
        elif hasattr(first, TESTED):
            test, states = getattr(first, TESTED)
            reduction, clamps = TESTS[test]
            if func is reduction:
                setattr(found, DECIDES, (states, found if clamps else ~found, clamps))
        return found


@contextmanager
def choices(module: torch.nn.Module) -> Iterator[None]:
    """Make such branches of a module in float16 choices while it is traced.

    Raises:
        RuntimeError: A branch does something else than to clamp the states.
    """
    if not any(p.dtype == torch.float16 for p in module.parameters()):
        yield
        return
    with _Choices() as mode:
        yield
    if mode.pending is not None:
        raise RuntimeError("a branch that infinite states decide does not clamp them")
