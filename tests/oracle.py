"""The formula in float64 with numpy alone; shares no code with the package.

Weights are seen as (out, in); the callers transpose or flatten what is stored otherwise.
"""

import numpy as np
import torch

FRACTION_BITS = {torch.float32: 23, torch.float16: 10, torch.bfloat16: 7}
SMALLEST = {torch.float32: -149, torch.float16: -24, torch.bfloat16: -133}


def dora(W, A, B, m, s, axis=1, eps=0.0):
    """m * N / ||N|| with N = W + s B A, the norm over ``axis``, by plain definition."""
    W, A, B, m = (np.asarray(x, np.float64) for x in (W, A, B, m))
    N = W + s * (B @ A)
    norm = np.sqrt((N * N).sum(axis=axis, keepdims=True)) + eps
    return N * (m.reshape(-1, 1) if axis == 1 else m.reshape(1, -1)) / norm


def lora(W, A, B, s):
    """W + s B A."""
    W, A, B = (np.asarray(x, np.float64) for x in (W, A, B))
    return W + s * (B @ A)


def float64(tensor):
    """A tensor's values as a float64 array."""
    return tensor.detach().to(torch.float64).numpy()


def rounded(exact, dtype):
    """The nearest values of ``dtype``, through exact decimal-free rounding in float64."""
    step = ulp(exact, dtype)
    return np.rint(exact / step) * step  # both divisions by powers of two are exact


def ulp(exact, dtype):
    """Distance of neighbouring ``dtype`` values around each exact value."""
    _, exponent = np.frexp(np.asarray(exact, np.float64))
    return np.ldexp(1.0, np.maximum(exponent - 1 - FRACTION_BITS[dtype], SMALLEST[dtype]))


def ulps(got, exact):
    """Largest distance of a stored tensor from exact values, in units of the last place."""
    assert tuple(got.shape) == tuple(exact.shape), (got.shape, exact.shape)
    distance = np.abs(float64(got) - exact) / ulp(exact, got.dtype)
    assert np.isfinite(distance).all(), "NaN or inf"
    return float(distance.max())


def misrounded(got, exact):
    """Share of elements that are not the correctly rounded exact ones."""
    return float((float64(got) != rounded(exact, got.dtype)).mean())
