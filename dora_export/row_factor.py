"""What DoRA multiplies a line of ``W + s B A`` by: its magnitude over its norm."""

from __future__ import annotations

from typing import Any

# A float32 square loses bits below 2**-126, at most 2**-150 of its value, and a factor as well.
LEAST, LEAST_SQUARE = 2.0**-126, 2.0**-129
MOST = 1e300  # below infinity, which a float32 square above 3.4e38 is


def coarse(xp: Any, scale: Any, squares: Any, count: int) -> Any:
    """Return which lines float32 has not the range for, in their squares or their factor.

    Between the bounds a norm is off by at most 2**-20 of itself for this reason.

    Args:
        xp: numpy or torch.
        scale: Factor on each line, float64, an array of ``xp``.
        squares: Sums of float32 squares, float64, same shape; a zero is for the caller to judge.
        count: How many were summed.
    """
    size = xp.abs(scale)
    wrong = (squares > MOST) | (squares < count * LEAST_SQUARE) | ((size > 0) & (size < LEAST))
    return wrong & (squares != 0)


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
