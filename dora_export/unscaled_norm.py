"""ai-toolkit's DoRA where alpha is not the rank: the norm is that of the unscaled ``W + B A``.

Its forward adds the scaled low-rank output to the base's, and the magnitude's share of the unscaled
sum: ``y = W x + s B A x + (m / ||W + B A|| - 1) (W + B A) x``. With s = 1 that is DoRA; else the
weight it amounts to is ``m (W + B A) / ||W + B A|| + (s - 1) B A``.

Source: github.com/ostris/ai-toolkit, toolkit/network_mixins.py (ToolkitModuleMixin.forward),
toolkit/models/DoRA.py (apply_dora).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dora_export import cast
from dora_export.errors import ArithmeticRefusal, shown
from dora_export.row_factor import factor
from dora_export.tensors import DType, Operand, TensorRef
from dora_export.update import Layout

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class UnscaledNorm:
    """``m (W + B A) / ||W + B A|| + (s - 1) B A``, one norm per output row.

    Attributes:
        magnitude: m, ``(out,)``.
        down: A, ``(rank, in)``.
        up: B, ``(out, rank)``.
        scaling: s, dimensionless.
    """

    magnitude: Operand
    down: Operand
    up: Operand
    scaling: float

    @property
    def what(self) -> str:
        """One line for people."""
        return (
            "ai-toolkit's norm leaves the scaling out where alpha is not the rank, which no other "
            "format's does"
        )

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        """Adapter tensors it reads."""
        return (*self.magnitude.refs, *self.down.refs, *self.up.refs)

    def misfit(self, shape: tuple[int, ...], layout: Layout) -> str | None:
        """Return why it cannot apply to a tensor of ``shape``."""
        if odd := [ref for ref in self.refs if not ref.dtype.mergeable]:
            return f"'{shown(odd[0].name)}' is stored as {odd[0].dtype.name}, not a float"
        expected = (self.up.shape[0], self.down.shape[1])
        if shape == expected and layout == "oi":
            return None
        return f"base weight is {shape}, adapter has A {self.down.shape} and B {self.up.shape}"

    def placed(self, shape: tuple[int, ...], layout: Layout) -> UnscaledNorm:
        """Return it as it is: a linear layer has one layout."""
        return self

    def value(self, W: Floats, dtype: DType) -> Floats:
        """Return the new weight.

        Raises:
            ArithmeticRefusal: A row of ``W + B A`` is zero although its magnitude is not.
        """
        up, down = (cast.operand_values(o, np.float64) for o in (self.up, self.down))
        product: Floats = up @ down
        V = W + product
        V *= self._factors(V)[:, None]
        V += (self.scaling - 1) * product
        return V

    def as_dora(self, W: Floats) -> tuple[Floats, Floats]:
        """Return B' and m' of the DoRA that gives the new weight: ``m' (W + B' A) / ||W + B' A||``.

        With ``f = m / ||W + B A||`` the new weight is ``f (W + B' A)``, where
        ``B' = (1 + (s - 1) / f) B`` and ``m' = f ||W + B' A||``; A stays.

        Args:
            W: ``(out, in)``.

        Raises:
            ArithmeticRefusal: A magnitude is zero: what is left of its row has no share of W.
        """
        up, down = (cast.operand_values(o, np.float64) for o in (self.up, self.down))
        f = self._factors(W + up @ down)
        if (zero := np.flatnonzero(f == 0)).size:
            raise ArithmeticRefusal(
                f"the magnitude is zero in {zero.size} rows (first: {zero[0]}), which leaves of "
                "them what DoRA cannot say. Merge it instead"
            )
        scaled = up * (1 + (self.scaling - 1) / f)[:, None]
        return scaled, f * np.linalg.norm(W + scaled @ down, axis=1)

    def _factors(self, V: Floats) -> Floats:
        """Return ``m / ||V||`` of every row.

        Raises:
            ArithmeticRefusal: A row is zero although its magnitude is not.
        """
        m = cast.operand_values(self.magnitude, np.float64).ravel()
        f, without = factor(np, m, np.einsum("ij,ij->i", V, V), eps=0.0)
        if (undefined := np.flatnonzero(without)).size:
            raise ArithmeticRefusal(
                f"||W + B A|| is zero in {undefined.size} rows (first: {undefined[0]}) whose "
                "magnitude is not zero, so they have no direction to scale. Merge with ai-toolkit."
            )
        found: Floats = f
        return found

    def working_bytes(self) -> int:
        """Return the bytes of the product, of V, and of A and B."""
        rows, columns = self.up.shape[0], self.down.shape[1]
        return 8 * (4 * rows * columns + 2 * self.down.shape[0] * (rows + columns) + 4 * rows)
