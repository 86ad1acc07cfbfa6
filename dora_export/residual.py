"""The residual base that PEFT's PiSSA and OLoRA leave: W less the product their factors begin with.

Both initialisations are functions of W alone, so the base that an adapter was trained on can be
computed from the original one. Whatever is left after training is ``W_res + s B A``.
Source: github.com/huggingface/peft 0.21.2, src/peft/tuners/lora/layer.py (pissa_init, olora_init);
Meng et al. 2024, arXiv:2404.02948, eq. 2-4; Büyükakyüz 2024, arXiv:2406.01775, alg. 1.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from dora_export import cast
from dora_export.errors import ArithmeticRefusal
from dora_export.tensors import DType, TensorRef
from dora_export.update import Layout

Init = Literal["pissa", "olora"]
INITS: tuple[Init, ...] = ("pissa", "olora")
# PEFT decomposes in float32. Where this many of its roundings move a subspace by more than a part
# in a thousand, its residual is not the exact one, nor the same on any two machines.
FLOAT32, MOVED = 2.0**-24, 1e-3


@dataclass(frozen=True)
class Residual:
    """``W - s B0 A0``, with the B0 and A0 that PEFT begins with; rounded as PEFT stores it.

    PiSSA: ``s B0 A0`` is the best approximation of W of this rank. OLoRA: ``B0 A0`` is the product
    of the first columns of Q and the first rows of R.

    Attributes:
        init: Which.
        rank: Of ``B0 A0``.
        scaling: s, dimensionless; it drops out of PiSSA's product.
        shape: Of W as stored, once placed.
    """

    init: Init
    rank: int
    scaling: float
    shape: tuple[int, ...] = ()

    @property
    def what(self) -> str:
        """One line for people."""
        return f"the base is made {self.init}'s residual"

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        """None: it depends on W alone."""
        return ()

    def misfit(self, shape: tuple[int, ...], layout: Layout) -> str | None:
        """Return why W has no such residual."""
        if len(shape) != 2:
            return f"is {len(shape)}-D {shape}; {self.init} is defined for linear layers only"
        if self.rank > min(shape):
            return f"is {shape}, too small for {self.init} of rank {self.rank}"
        return None

    def placed(self, shape: tuple[int, ...], layout: Layout) -> Residual:
        """Return it for a tensor of that shape; both products are the same either way round.

        PEFT takes OLoRA's QR of the weight as it is stored.
        """
        return replace(self, shape=shape)

    def value(self, W: NDArray[np.float64], dtype: DType) -> NDArray[np.float64]:
        """Return the residual of W; rounded to a 16-bit ``dtype``, as PEFT's own is.

        Raises:
            ArithmeticRefusal: PEFT's float32 decomposition of W is not determined well enough.
        """
        if self.init == "pissa":
            outputs, sizes, inputs = np.linalg.svd(W, full_matrices=False)
            self._refuse_close(sizes)
            left = (outputs[:, self.rank :] * sizes[self.rank :]) @ inputs[self.rank :]
        else:
            orthonormal, triangular = np.linalg.qr(W)
            diagonal = np.abs(np.diagonal(triangular)[: self.rank])
            self._refuse_if(float(diagonal.min()), float(diagonal.max()), "its first columns")
            product = orthonormal[:, : self.rank] @ triangular[: self.rank]
            left = W - self.scaling * product
        return stored_as(left, dtype)

    def working_bytes(self) -> int:
        """Return the bytes of the decomposition beside W and the result."""
        rows, columns = self.shape
        small = min(rows, columns)
        return 8 * (3 * rows * columns + 3 * small * (rows + columns) + 8 * small * small)

    def _refuse_close(self, sizes: NDArray[np.float64]) -> None:
        if self.rank < len(sizes):
            gap = float(sizes[self.rank - 1] - sizes[self.rank])
            self._refuse_if(gap, float(sizes[0]), f"its singular values {self.rank} and the next")

    def _refuse_if(self, gap: float, size: float, what: str) -> None:
        if gap * MOVED < size * FLOAT32:
            raise ArithmeticRefusal(
                f"{what} leave {self.init} of rank {self.rank} undetermined in float32 (the "
                f"difference is {gap:.2g} of {size:.2g}), so the base it was trained on cannot be "
                "computed. Merge onto the residual base that was saved, with --base-is-residual."
            )


def stored_as(values: NDArray[np.float64], dtype: DType) -> NDArray[np.float64]:
    """Return values rounded to a 16-bit type, or as they are for a wider one."""
    if dtype.itemsize > 2:
        return values
    raw = np.empty(values.shape, dtype.raw)
    cast.narrow(values, dtype, raw, np.empty_like(values))
    return cast.widened(raw, dtype, np.float64)
