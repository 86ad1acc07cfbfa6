"""A bias that a trainer's forward scales along with the layer's rows: ``b m / ||W + s B A||``.

QDoRA, torchtune and Megatron (in linear_qkv) multiply the whole output of the base layer by
``m / ||V||``, so the bias goes through it too: ``y = m / ||V|| * (W x + s B A x + b)``. The merged
layer computes the same with a bias of its own.

Sources: github.com/AnswerDotAI/fsdp_qlora, scripts/dora.py (class DORA); github.com/pytorch/
torchtune 0.6.1, torchtune/modules/peft/dora.py (DoRALinear); github.com/NVIDIA-NeMo/
Megatron-Bridge, src/megatron/bridge/peft/dora_layers.py (DoRALinear).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dora_export import cast
from dora_export.errors import ArithmeticRefusal
from dora_export.row_factor import factor
from dora_export.tensors import DType, Operand, TensorRef
from dora_export.update import Layout

Floats = NDArray[np.float64]
BLOCK_ELEMENTS = 1 << 20  # of the weight, widened at once while norms are computed


@dataclass(frozen=True)
class ScaledBias:
    """``b m / ||W + s B A||``, one norm per output row.

    Attributes:
        weight: W as the base stores it, ``(out, in)``.
        magnitude: m, ``(out,)``.
        down: A, ``(rank, in)``.
        up: B, ``(out, rank)``.
        scaling: s, dimensionless.
        eps: Added to the norm.
    """

    weight: TensorRef
    magnitude: Operand
    down: Operand
    up: Operand
    scaling: float
    eps: float = 0.0

    @property
    def what(self) -> str:
        """One line for people."""
        return "the bias is scaled by m / ||V||, as its trainer does"

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        """Adapter tensors it reads."""
        return (*self.magnitude.refs, *self.down.refs, *self.up.refs)

    def misfit(self, shape: tuple[int, ...], layout: Layout) -> str | None:
        """Return why such a bias does not belong to this layer."""
        rows = self.weight.shape[0]
        return None if shape == (rows,) else f"is {shape}, expected a bias of {rows} elements"

    def placed(self, shape: tuple[int, ...], layout: Layout) -> ScaledBias:
        """Return it as it is: a bias has one layout."""
        return self

    def value(self, W: Floats, dtype: DType) -> Floats:
        """Return the scaled bias for the base's, ``(1, out)`` both.

        Raises:
            ArithmeticRefusal: A row of V is zero although its magnitude is not.
        """
        up, down = (cast.operand_values(o, np.float64) for o in (self.up, self.down))
        scaled = self.scaling * up
        squares = np.concatenate([self._squares(at, scaled, down) for at in self._blocks()])
        m = cast.operand_values(self.magnitude, np.float64).ravel()
        scale, without = factor(np, m, squares, self.eps)
        if (undefined := np.flatnonzero(without)).size:
            raise ArithmeticRefusal(
                f"||W + s B A|| is zero in {undefined.size} rows (first: {undefined[0]}) whose "
                "magnitude is not zero, so their bias has no defined value. Merge with the "
                "trainer's own tool."
            )
        scaled_bias: Floats = W * scale
        return scaled_bias

    def working_bytes(self) -> int:
        """Return the bytes of one block of the weight, of A and of B."""
        rows, columns = self.weight.shape
        block = max(BLOCK_ELEMENTS, columns)
        factors = 2 * (self.down.shape[0] * (rows + columns))
        return 8 * (3 * block + factors + 4 * rows)

    def _blocks(self) -> Iterator[slice]:
        rows, columns = self.weight.shape
        step = max(1, BLOCK_ELEMENTS // columns)
        return (slice(first, min(first + step, rows)) for first in range(0, rows, step))

    def _squares(self, rows: slice, up: Floats, down: Floats) -> Floats:
        columns = self.weight.shape[1]
        raw = self.weight.raw(rows.start * columns, rows.stop * columns)
        V: Floats = cast.widened(raw, self.weight.dtype, np.float64).reshape(-1, columns)
        V = V + up[rows] @ down
        squares: Floats = np.einsum("ij,ij->i", V, V)
        return squares
