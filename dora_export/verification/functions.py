"""What a function of a whole weight gives, computed by another way than the merge's.

A PiSSA residual is W less its projection onto the leading eigenvectors of its Gram matrix; an OLoRA
residual is W less what its first columns explain of it by least squares. A bias that goes through a
layer's scaling is taken times that, with this module's own norms; ai-toolkit's weight is put
together from the base's part and the product's.
What PEFT's own merge made is held against PEFT's own forward of the unmerged layer: another code
path, but the same author's, and no independent formula.
Source: as ``dora_export/residual.py``; the formulas are other ones with the same result.
"""

from __future__ import annotations

import numpy as np

from dora_export.peft_layers import PeftLayer
from dora_export.residual import Residual
from dora_export.scaled_bias import ScaledBias
from dora_export.tensors import DType, Operand
from dora_export.unscaled_norm import UnscaledNorm
from dora_export.update import Function
from dora_export.verification.values import Floats, operand_values

BLOCK_ELEMENTS = 1 << 20  # of a weight, while the norms of its rows are taken
FRACTION = {"F16": (10, -24), "BF16": (7, -133)}  # bits of fraction, exponent of the smallest step


def exact(function: Function, W: Floats, dtype: DType) -> Floats:
    """Return the new weight for the old one, both float64 and as they are stored.

    Args:
        function: The plan's.
        W: The base's values, rows and columns.
        dtype: How they are stored.
    """
    if isinstance(function, PeftLayer):
        return function.unmerged(W)
    if isinstance(function, ScaledBias):
        return _scaled(function, W)
    if isinstance(function, UnscaledNorm):
        return _unscaled_norm(function, W)
    assert isinstance(function, Residual), f"Bug: {type(function).__name__} has no second way"
    return _residual(function, W, dtype)


def _residual(function: Residual, W: Floats, dtype: DType) -> Floats:
    if function.init == "pissa":
        left = _without_leading(W, function.rank)
    else:
        columns = W[:, : function.rank]
        shares = np.linalg.lstsq(columns, W, rcond=None)[0]
        left = W - function.scaling * (columns @ shares)
    return _stored(left, dtype)


def _scaled(function: ScaledBias, bias: Floats) -> Floats:
    """Return the bias as the layer adds it: times what each row's V is scaled by."""
    A, B, m = (operand_values(o) for o in (function.down, function.up, function.magnitude))
    out, inputs = function.weight.shape
    step = max(1, BLOCK_ELEMENTS // inputs)
    factors = []
    for first in range(0, out, step):
        rows = function.weight.rows(first, min(first + step, out))
        V = operand_values(Operand.plain(rows)) + function.scaling * B[first : first + step] @ A
        lengths = np.linalg.norm(V, axis=1) + function.eps
        magnitudes = m.ravel()[first : first + step]
        factors.append(np.divide(magnitudes, lengths, out=np.zeros_like(lengths),
                                 where=lengths != 0))  # fmt: skip
    scaled: Floats = bias * np.concatenate(factors)
    return scaled


def _unscaled_norm(function: UnscaledNorm, W: Floats) -> Floats:
    """Return what multiplies an input: the base's part and the product's, each times its factor."""
    product = operand_values(function.up) @ operand_values(function.down)
    lengths = np.linalg.norm(W + product, axis=1)
    m = operand_values(function.magnitude).ravel()
    factor = np.divide(m, lengths, out=np.zeros_like(lengths), where=lengths != 0)
    parts: Floats = factor[:, None] * W + (factor + function.scaling - 1)[:, None] * product
    return parts


def _without_leading(W: Floats, rank: int) -> Floats:
    """Return W less its best approximation of a rank."""
    if W.shape[0] > W.shape[1]:
        left: Floats = _without_leading(W.T, rank).T
        return left
    _, vectors = np.linalg.eigh(W @ W.T)
    leading = vectors[:, -rank:]
    difference: Floats = W - leading @ (leading.T @ W)
    return difference


def _stored(values: Floats, dtype: DType) -> Floats:
    """Return the values as PEFT stores its residual: rounded, where the type has 16 bits."""
    if dtype.name not in FRACTION:
        return values
    fraction, smallest = FRACTION[dtype.name]
    _, exponent = np.frexp(values)
    step = np.ldexp(1.0, np.maximum(exponent - 1 - fraction, smallest))
    nearest: Floats = np.rint(values / step) * step
    return nearest
