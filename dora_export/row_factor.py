"""What DoRA multiplies a line of ``W + s B A`` by: its magnitude over its norm."""

from __future__ import annotations

from typing import Any


def factor(xp: Any, magnitude: Any, squares: Any, eps: float) -> tuple[Any, Any]:
    """Return ``m / (sqrt(squares) + eps)`` in float64, and where it has no defined value.

    A zero norm gives factor 0; if m is zero there as well, or eps is not, the row is zero indeed.

    Args:
        xp: numpy or torch.
        magnitude: m, float64, an array of ``xp``.
        squares: Sums of squares, float64, same shape.
        eps: Added to the norm, dimensionless.

    Source: arXiv:2402.09353, eq. 5; eps as in LyCORIS, lycoris/modules/locon.py.
    """
    norm = xp.sqrt(squares)
    zero = norm == 0
    quotient = magnitude / xp.where(zero, 1.0, norm + eps)
    return xp.where(zero, 0.0, quotient), zero & (magnitude != 0) & (eps == 0)
