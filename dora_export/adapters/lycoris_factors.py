"""What LyCORIS' algorithms add to a weight, from their factors: LoCon, LoHa and LoKr.

Every function takes stored factors and returns the normal form, unscaled: ``(out, in * kernel)``.
Shapes are checked beforehand (``misfit``), so that a broken file is told of, not computed with.

Sources: github.com/KohakuBlueleaf/LyCORIS, lycoris/functional/{locon,loha,lokr,general}.py
(``_diff_weight``, ``_kron_weight``, ``rebuild_tucker``); Yeh et al. 2023, arXiv:2309.14859.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from dora_export.tensors import Operand, TensorRef
from dora_export.update import Hadamard, Kronecker, Product

Parts = Mapping[str, TensorRef]
Floats = NDArray[np.float64]


def low_rank(up: TensorRef, down: TensorRef, mid: TensorRef | None = None) -> Product:
    """Return ``up @ down``, or with a Tucker core ``sum_ij up[o, i] mid[i, j, k] down[j, c]``.

    Args:
        up: Shape ``(out, rank, 1, ...)``.
        down: Shape ``(rank, in, *kernel)``; ``(rank, in, 1, ...)`` with a core.
        mid: The core, shape ``(rank, rank, *kernel)``, or None.
    """
    if mid is None:
        return Product(Operand.matrix(up), Operand.matrix(down))
    return Product(Operand.matrix(up), _through_core(mid, down))


def hadamard(parts: Parts) -> Hadamard:
    """Return ``(w1_a @ w1_b) * (w2_a @ w2_b)``, each through its Tucker core where there is one.

    Args:
        parts: ``hada_w1_a`` ``(out, rank)``, ``hada_w1_b`` ``(rank, in * kernel)``, and the same
            for w2; with cores ``hada_t1``, ``hada_t2`` ``(rank, rank, *kernel)``: ``w*_a`` is
            ``(rank, out)``, ``w*_b`` ``(rank, in)``.
    """
    halves = []
    for n in (1, 2):
        a, b, core = parts[f"hada_w{n}_a"], parts[f"hada_w{n}_b"], parts.get(f"hada_t{n}")
        if core is None:
            halves.append(Product(Operand.matrix(a), Operand.matrix(b)))
        else:
            halves.append(Product(Operand.plain(a).T, _through_core(core, b)))
    return Hadamard(*halves)


def kronecker(parts: Parts) -> Kronecker:
    """Return ``w1 (x) w2``, each whole or a product of its factors.

    A kernel belongs to w2, whose last dimensions are flattened: ``(b, d * kernel)``.

    Args:
        parts: ``lokr_w1`` ``(a, c)``, or ``lokr_w1_a`` ``(a, rank)`` and ``lokr_w1_b``
            ``(rank, c)``; ``lokr_w2`` ``(b, d, *kernel)``, or ``lokr_w2_a`` ``(b, rank)`` and
            ``lokr_w2_b`` ``(rank, d * kernel)``, or with the core ``lokr_t2``
            ``(rank, rank, *kernel)``: ``lokr_w2_a`` ``(rank, b)`` and ``lokr_w2_b`` ``(rank, d)``.
    """
    return Kronecker(_half(parts, "1"), _half(parts, "2"))


def _half(parts: Parts, n: str) -> Operand:
    if (whole := parts.get(f"lokr_w{n}")) is not None:
        return Operand.matrix(whole)
    a, b, core = parts[f"lokr_w{n}_a"], parts[f"lokr_w{n}_b"], parts.get(f"lokr_t{n}")
    if core is None:
        shape = a.shape[0], math.prod(b.shape[1:])
        return Operand.computed((a, b), shape, _product)
    shape = a.shape[1], b.shape[1] * math.prod(core.shape[2:])
    return Operand.computed((core, a, b), shape, _tucker)


def _through_core(core: TensorRef, right: TensorRef) -> Operand:
    """Return ``sum_j core[i, j, k] right[j, c]`` as ``(rank, in * kernel)``."""
    shape = core.shape[0], right.shape[1] * math.prod(core.shape[2:])
    return Operand.computed((core, right), shape, _core_times)


def _core_times(core: Floats, right: Floats) -> Floats:
    flat = core.reshape(*core.shape[:2], -1)
    product: Floats = np.einsum("ijk,jc->ick", flat, right.reshape(right.shape[0], -1))
    return product.reshape(core.shape[0], -1)


def _product(left: Floats, right: Floats) -> Floats:
    product: Floats = left.reshape(left.shape[0], -1) @ right.reshape(right.shape[0], -1)
    return product


def _tucker(core: Floats, left: Floats, right: Floats) -> Floats:
    return _product(left.T, _core_times(core, right))


def misfit(parts: Parts) -> str | None:
    """Return what is wrong with the factors of one layer, or None.

    Args:
        parts: The layer's tensors: "up", "down", "mid", or by LyCORIS' names.
    """
    empty = [f"{p} {ref.shape}" for p, ref in parts.items() if not ref.size]
    if empty:
        return f"{', '.join(empty)}: empty"
    if "up" in parts or "down" in parts:
        return _low_rank_misfit(parts)
    if any(p.startswith("hada_") for p in parts):
        return _hadamard_misfit(parts)
    return _kronecker_misfit(parts)


def _low_rank_misfit(parts: Parts) -> str | None:
    missing = [p for p in ("up", "down") if p not in parts]
    if missing:
        return f"lora_{missing[0]} missing"
    up, down = parts["up"].shape, parts["down"].shape
    mid = parts["mid"].shape if "mid" in parts else None
    inner, outer = (down[:1], down[:1]) if mid is None else (mid[1:2], mid[:1])
    fits = len(up) >= 2 and len(down) >= 2 and up[1:2] == outer and down[:1] == inner
    if not fits or any(n != 1 for n in up[2:]) or (mid and any(n != 1 for n in down[2:])):
        core = f", lora_mid {mid}" if mid else ""
        return (
            "expected lora_up (out, rank), lora_down (rank, in, kernel) and, with it, lora_mid "
            f"(rank, rank, kernel), got {up}, {down}{core}"
        )
    return None


def _hadamard_misfit(parts: Parts) -> str | None:
    wanted = [f"hada_w{n}_{x}" for n in (1, 2) for x in "ab"]
    wanted += ["hada_t1", "hada_t2"] if {"hada_t1", "hada_t2"} & parts.keys() else []
    if missing := [p for p in wanted if p not in parts]:
        return f"{', '.join(missing)} missing"
    sizes, ranks = [], []
    for n in ("1", "2"):
        a, b = parts[f"hada_w{n}_a"].shape, parts[f"hada_w{n}_b"].shape
        core = parts[f"hada_t{n}"].shape if f"hada_t{n}" in parts else None
        size = _pair_size(a, b, core)
        if size is None:
            with_core = f", hada_t{n} {core}" if core else ""
            return f"hada_w{n}_a {a} and hada_w{n}_b {b}{with_core} are no product"
        sizes.append(size)
        ranks.append(b[0])
    if sizes[0] != sizes[1]:
        return f"its two products are {sizes[0]} and {sizes[1]}"
    return (
        None if ranks[0] == ranks[1] else f"its two products have ranks {ranks[0]} and {ranks[1]}"
    )


def _kronecker_misfit(parts: Parts) -> str | None:
    for n in ("1", "2"):
        whole, pair = f"lokr_w{n}" in parts, {f"lokr_w{n}_a", f"lokr_w{n}_b"}
        core = f"lokr_t{n}" in parts
        if whole and (pair & parts.keys() or core):
            return f"lokr_w{n} is there whole and in factors"
        if not whole and not pair <= parts.keys():
            return f"{', '.join(sorted(pair - parts.keys()))} missing"
        shapes = [parts[p].shape for p in ([f"lokr_w{n}"] if whole else sorted(pair))]
        t = parts[f"lokr_t{n}"].shape if core else None
        flat = any(len(s) < 2 for s in shapes) or (n == "1" and any(len(s) > 2 for s in shapes))
        if flat or (not whole and _pair_size(shapes[0], shapes[1], t) is None):
            with_core = f", lokr_t{n} {t}" if t else ""
            return f"lokr_w{n}: {' and '.join(map(str, shapes))}{with_core} are no product"
    return None


def _pair_size(
    a: tuple[int, ...], b: tuple[int, ...], core: tuple[int, ...] | None
) -> tuple[int, int] | None:
    """Return the rows and columns of a product of factors, or None if they do not fit."""
    if len(a) != 2 or len(b) < 2:
        return None
    if core is None:
        return (a[0], math.prod(b[1:])) if a[1] == b[0] else None
    if len(b) != 2 or len(core) < 3 or core[:2] != (a[0], b[0]):
        return None
    return a[1], b[1] * math.prod(core[2:])
