"""Updates that are not one low-rank product: Hadamard, Kronecker, a whole matrix, a Tucker core.

The reference is numpy in float64 (numpy.kron, einsum), on trained values, alpha != r, m != ||V||.
"""

import numpy as np
import pytest
import torch

from dora_export.errors import PlanError
from dora_export.tensors import Operand
from dora_export.update import Dense, Hadamard, Kronecker, Product, Update
from dora_export.verification.oracle import check_oracle
from tests import oracle
from tests.test_peft_parity import Bench

SCALING = 1.7
SHAPES = [(24, 40), (40, 40), (1200, 300), (300, 1200)]  # the large ones take several tiles
SIDES = {24: (4, 6), 40: (5, 8), 300: (3, 100), 1200: (8, 150)}
KINDS = ["hadamard", "kronecker", "kronecker of a product", "dense", "tucker"]
AXES = [None, "out", "in", "factor"]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def tucker(core, left, right):
    return np.einsum("pq,op,qi->oi", core, left, right)


def build(kind, out, inner, make):
    """Random tensors of a delta, how the normal form says it, and its values in float64."""

    def random(*shape):
        return torch.randn(*shape, generator=make) * 0.3

    t = {}
    if kind == "hadamard":
        t = {"a": random(out, 3), "b": random(3, inner), "c": random(out, 5), "d": random(5, inner)}
    elif kind == "dense":
        t = {"a": random(out, inner) * 0.1}
    elif kind == "tucker":
        t = {"core": random(4, 3), "a": random(out, 4), "b": random(3, inner)}
    else:
        (i, k), (j, n) = SIDES[out], SIDES[inner]
        t = {"a": random(i, j), "b": random(k, n)}
        if kind == "kronecker of a product":
            t = {"a": random(i, j), "b": random(k, 2), "c": random(2, n)}
    f = {name: oracle.float64(tensor) for name, tensor in t.items()}
    values = {
        "hadamard": lambda: (f["a"] @ f["b"]) * (f["c"] @ f["d"]),
        "dense": lambda: f["a"],
        "tucker": lambda: f["a"] @ f["core"] @ f["b"],
        "kronecker": lambda: np.kron(f["a"], f["b"]),
        "kronecker of a product": lambda: np.kron(f["a"], f["b"] @ f["c"]),
    }[kind]()

    def delta(refs):
        plain = {name: Operand.plain(ref) for name, ref in refs.items() if name != "m"}
        if kind == "hadamard":
            return Hadamard(Product(plain["a"], plain["b"]), Product(plain["c"], plain["d"]))
        if kind == "dense":
            return Dense(plain["a"])
        if kind == "kronecker":
            return Kronecker(plain["a"], plain["b"])
        second = Operand.computed((refs["b"], refs["c"]), (k, n), np.matmul)
        return Kronecker(plain["a"], second)

    return t, delta, values


def case(folder, kind, axis, shape, dtype, layout="oi", seed=5):
    """A base with one weight, its update, and the exact result; rows and columns as stored."""
    make = torch.Generator().manual_seed(seed)
    W = (torch.randn(shape, generator=make) * 0.1).to(dtype)
    out, inner = shape if layout == "oi" else shape[::-1]
    tensors, delta, values = build(kind, out, inner, make)
    seen = oracle.float64(W) if layout == "oi" else oracle.float64(W).T
    V = exact = seen + SCALING * values
    options = {}
    if axis is not None:
        count = inner if axis == "in" else out
        tensors["m"] = torch.rand(count, generator=make) + 0.5
        m = oracle.float64(tensors["m"])
        if axis == "factor":
            exact = V * m[:, None]
        else:
            exact = oracle.dora(V, np.zeros((1, inner)), np.zeros((out, 1)), m, 0.0,
                                axis=1 if axis == "out" else 0)  # fmt: skip
    bench = Bench(folder, {"x.weight": W}, **tensors)
    if axis is not None:
        options = {"magnitude": bench.vector("m"), "axis": "in" if axis == "in" else "out",
                   "magnitude_is_factor": axis == "factor"}  # fmt: skip
    if kind == "tucker":
        core = Operand.computed((bench.refs["core"], bench.refs["a"]), (out, 3),
                                lambda c, a: a @ c)  # fmt: skip
        options |= {"up": core, "down": Operand.plain(bench.refs["b"])}
    else:
        options["delta"] = delta(bench.refs)
    update = Update("x.weight", "lora" if axis is None else "dora", tuple(tensors),
                    scaling=SCALING, layout=layout, **options)  # fmt: skip
    return bench, update, exact if layout == "oi" else exact.T


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("kind", KINDS)
def test_merge_is_the_float64_result_rounded(tmp_path, kind, axis, shape, dtype):
    bench, update, exact = case(tmp_path, kind, axis, shape, dtype)
    got = bench.merge(update)["x.weight"]
    assert oracle.ulps(got, exact) <= (1 if kind == "tucker" and dtype is DTYPES[0] else 0.5 + 1e-6)
    plain = bench.merge(Update("x.weight", "lora", tuple(update.source_keys),
                               scaling=0.0, down=update.down, up=update.up, delta=update.delta,
                               layout="oi"))["x.weight"]  # fmt: skip
    assert oracle.ulps(plain, exact) > 3  # the tolerance tells the update from none


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("kind", KINDS)
def test_stored_the_other_way_round(tmp_path, kind, axis):
    bench, update, exact = case(tmp_path, kind, axis, (300, 24), torch.float32, "io")
    assert oracle.ulps(bench.merge(update)["x.weight"], exact) <= 0.5 + 1e-6


@pytest.mark.parametrize(
    ("layout", "level"),
    [
        ("oi", "full"),
        ("io", "fast"),
        pytest.param("oi", "fast", marks=pytest.mark.nightly),
        pytest.param("io", "full", marks=pytest.mark.nightly),
    ],
)
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("kind", KINDS)
def test_oracle_knows_them_by_its_own_formula(tmp_path, kind, axis, layout, level):
    bench, update, exact = case(tmp_path, kind, axis, (1200, 300), torch.float32, layout)
    plan = bench.plan(update)
    stored = {"x.weight": torch.from_numpy(np.ascontiguousarray(exact)).float()}
    _, (result,), findings = check_oracle(plan, bench.stored(tmp_path, stored), level)
    assert (result.status, findings) == ("exact", ())
    assert result.max_ulp <= 0.5 + 1e-6
    # Of factors that lie across what is stored, all the roundings may lean alike (coarse.py).
    stored["x.weight"] *= 1.03 if (axis, layout) == ("factor", "io") else 1.01
    _, (result,), findings = check_oracle(plan, bench.stored(tmp_path, stored), level)
    assert (result.status, len(findings)) == ("wrong", 1)


def test_shape_that_does_not_fit_is_refused(tmp_path):
    bench, update, _ = case(tmp_path, "kronecker", None, (24, 40), torch.float32)
    wrong = Update("x.weight", "lora", ("a", "b"), delta=update.delta.T, layout="oi")
    with pytest.raises(PlanError, match=r"\(24, 40\), the adapter's update \(40, 24\)"):
        bench.merge(wrong)
