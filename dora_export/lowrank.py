"""The plain LoRA nearest to a merged weight: a truncated SVD of W' - W, streamed row by row.

For engines that serve LoRA but refuse DoRA. W' - W of a DoRA adapter has full rank, so something is
lost; how much is part of the result. Large matrices are never held: a randomised range finder with
power iterations reads the base a few times instead.

Source: Halko, Martinsson and Tropp 2011, arXiv:0909.4061, algorithms 4.4 and 5.1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from dora_export.errors import ArithmeticRefusal
from dora_export.verification.exact import Exact
from dora_export.verification.values import Floats

WHOLE_SIDE = 768  # the shorter side up to which the matrix is held and decomposed whole
OVERSAMPLED = 16  # directions sought beyond the rank
POWER = 3  # power iterations: more sharpen slowly falling spectra
BLOCK_ELEMENTS = 1 << 20  # float64 elements of one block of rows


@dataclass(frozen=True)
class LowRank:
    """The nearest matrix of some rank, as a product.

    Attributes:
        left: Shape ``(rows, rank)``, float64; each column carries the root of its singular value.
        right: Shape ``(rank, columns)``, likewise.
        singular: Singular values kept, largest first.
        size: Frobenius norm of the whole update.
    """

    left: Floats
    right: Floats
    singular: Floats
    size: float

    @property
    def energy(self) -> float:
        """Share of the update's squared Frobenius norm that is kept, 0 to 1."""
        return min(1.0, float(np.square(self.singular).sum()) / self.size**2) if self.size else 1.0

    @property
    def error(self) -> float:
        """Frobenius norm of what is lost over that of the whole update, 0 to 1."""
        return math.sqrt(max(0.0, 1.0 - self.energy))


def nearest(exact: Exact, rank: int, seed: int = 0) -> LowRank:
    """Return the rank-``rank`` product nearest to ``W' - W`` of a region, in the Frobenius norm.

    Exact to float64 where the shorter side is at most ``WHOLE_SIDE``; else randomised, and within a
    small part of the best error (``seed`` makes it repeatable). Reads the base once, or
    ``2 POWER + 2`` times.

    Args:
        exact: The region.
        rank: Of the result; what exceeds the shorter side is filled with zeros.
        seed: Of the random directions.

    Raises:
        ArithmeticRefusal: The update is not finite.
    """
    rows, columns = exact.region.rows, exact.region.columns
    with np.errstate(invalid="ignore", over="ignore"):  # what is not finite is refused
        exact = exact.with_factors()
        if min(rows, columns) <= max(WHOLE_SIDE, rank + OVERSAMPLED):
            left, right, values, size = _whole(exact, rank)
        else:
            left, right, values, size = _randomised(exact, rank, np.random.default_rng(seed))
    root = np.sqrt(values)
    padded = np.zeros((rows, rank)), np.zeros((rank, columns))
    padded[0][:, : len(root)] = left * root
    padded[1][: len(root)] = root[:, None] * right
    return LowRank(*padded, values, size)


def _whole(exact: Exact, rank: int) -> tuple[Floats, Floats, Floats, float]:
    rows, columns = exact.region.rows, exact.region.columns
    update = np.empty((rows, columns))
    for block in exact.blocks(BLOCK_ELEMENTS):
        base, values = exact.rows(block)
        np.subtract(values, base, out=update[block])
    _check_finite(update)
    size = float(np.linalg.norm(update))
    left, values, right = np.linalg.svd(update, full_matrices=False)
    return left[:, :rank], right[:rank], values[:rank], size


def _check_finite(values: Floats) -> None:
    if not np.isfinite(values).all():
        raise ArithmeticRefusal(
            "W' - W holds NaN or inf, and nothing is near to that. Check the base and the adapter."
        )


def _randomised(
    exact: Exact, rank: int, random: np.random.Generator
) -> tuple[Floats, Floats, Floats, float]:
    columns = exact.region.columns
    directions = random.standard_normal((columns, rank + OVERSAMPLED))
    for _ in range(POWER):
        image, _ = _applied(exact, np.linalg.qr(directions)[0])
        _check_finite(image)
        directions = _applied_transposed(exact, np.linalg.qr(image)[0])
    image, size = _applied(exact, np.linalg.qr(directions)[0])
    basis = np.linalg.qr(image)[0]
    small = _applied_transposed(exact, basis).T  # basis^T (W' - W)
    left, values, right = np.linalg.svd(small, full_matrices=False)
    return basis @ left[:, :rank], right[:rank], values[:rank], size


def _applied(exact: Exact, directions: Floats) -> tuple[Floats, float]:
    """Return ``(W' - W) @ directions`` and the Frobenius norm of ``W' - W``."""
    image = np.empty((exact.region.rows, directions.shape[1]))
    squares = 0.0
    for block in exact.blocks(BLOCK_ELEMENTS):
        base, values = exact.rows(block)
        update = values - base
        squares += float(np.vdot(update, update))
        image[block] = update @ directions
    return image, math.sqrt(squares)


def _applied_transposed(exact: Exact, directions: Floats) -> Floats:
    """Return ``(W' - W)^T @ directions``."""
    image = np.zeros((exact.region.columns, directions.shape[1]))
    for block in exact.blocks(BLOCK_ELEMENTS):
        base, values = exact.rows(block)
        image += (values - base).T @ directions[block]
    return image
