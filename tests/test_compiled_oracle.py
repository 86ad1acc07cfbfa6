"""The oracle's compiled loop finds in every row what numpy does, and leaves it what is special."""

from dataclasses import fields, replace

import numpy as np
import pytest

from dora_export import extensions
from dora_export.pieces import Region
from dora_export.plan import Settings
from dora_export.tensors import DTYPES, HeldBytes, Operand, TensorRef
from dora_export.update import Change, Product
from dora_export.verification import compiled
from dora_export.verification.exact import Exact, rounded
from dora_export.verification.tally import Tally

pytestmark = pytest.mark.skipif(not compiled.available(), reason="built without a C compiler")

TYPES = ("BF16", "F16", "F32")
# Whole strips of 8 columns and groups of 6 rows, less, and more.
SHAPES = [(1, 1), (5, 3), (6, 8), (7, 13), (20, 41)]
RULES = ("lora", "row", "row-eps", "factor", "magnitude", "column", "column-group", "column-eps")


def stored(values, dtype, name="t"):
    """A tensor in memory of the values nearest to some."""
    nearest = rounded(np.ascontiguousarray(values, np.float64), DTYPES[dtype])
    if dtype == "BF16":
        raw = (nearest.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    else:
        raw = nearest.astype({"F16": np.float16, "F32": np.float32, "F64": np.float64}[dtype])
    data = np.frombuffer(raw.tobytes(), np.uint8)
    return TensorRef(name, DTYPES[dtype], nearest.shape, HeldBytes(None, data))


def values(ref):
    raw = ref.raw()
    if ref.dtype.name == "BF16":
        return (raw.astype(np.uint32) << 16).view(np.float32).astype(float).reshape(ref.shape)
    return raw.view({"F16": "f2", "F32": "f4"}[ref.dtype.name]).astype(float).reshape(ref.shape)


class Case:
    """A trained region: A, B not zero, m not the norm, scaling not 1."""

    def __init__(self, shape, rule, base="BF16", rank=3, size=1.0, settings=None):
        rng = np.random.default_rng(7)
        rows, columns = shape if rule != "column-group" else (shape[0], shape[1] * 3)
        self.source = stored(rng.standard_normal((rows, columns)) * 0.1 * size, base)
        B, A = rng.standard_normal((rows, rank)) * 0.3, rng.standard_normal((rank, columns)) * 0.2
        over = None if rule == "lora" else "column" if rule.startswith("column") else "row"
        group = 3 if rule == "column-group" else 1
        m = rng.uniform(0.5, 2.0, columns // group if over == "column" else rows) * size
        delta = None
        if rule != "magnitude":
            left, right = stored(B * size, "F32", "B"), stored(A, "F32", "A")
            delta = Product(Operand.plain(left), Operand.plain(right))
        self.change = Change(
            kind={"lora": "lora", "magnitude": "magnitude"}.get(rule, "dora"),
            start=0,
            rows=rows,
            columns=columns,
            delta=delta,
            scaling=1.75,
            magnitude=Operand.plain(stored(m, "F32", "m")) if over else None,
            magnitude_is_factor=rule == "factor",
            over=over,
            group=group,
            eps=0.01 if rule.endswith("eps") else 0.0,
            value=None,
            row_indices=(),
            source_keys=(),
        )
        self.settings = settings or Settings()

    def open(self, **changed):
        change = replace(self.change, **changed)
        region = Region(0, change.rows, change.columns, (change,))
        return Exact.open(self.source, region, self.settings).with_factors()

    def exact(self):
        exact = self.open()
        return exact.values(exact.base(slice(None)), slice(None))


def measured(exact, merged, lines=None, block=64):
    """All figures, some rows at a time."""
    rows = exact.region.rows
    tally = Tally(exact, merged.dtype, np.arange(rows) if lines is None else lines)
    if lines is not None:
        tally.read(merged, slice(None), lines)
    else:
        for rows in exact.blocks(block):
            tally.read(merged, rows, rows)
    return tally.measurement()


def both(case, merged, monkeypatch, lines=None, block=64):
    """The figures of the compiled loop, which must have been used, and those of numpy alone."""
    exact = case.open()
    assert exact.rule is not None
    compiled_one = measured(exact, merged, lines, block)
    with monkeypatch.context() as patch:
        patch.setenv(extensions.SWITCH, "numpy")
        exact = case.open()
        assert exact.rule is None
        return compiled_one, measured(exact, merged, lines, block)


def assert_same(one, other):
    # distances from float32 are 2**-25 of the values at most: float64 knows 28 bits of them
    for field in fields(one):
        a, b = (getattr(m, field.name) for m in (one, other))
        if a is None or b is None or isinstance(a, int):
            assert a is b or a == b, field.name
        else:
            np.testing.assert_allclose(a, b, rtol=2.0**-25, atol=0, err_msg=field.name)


def mistreated(case, dtype, kind):
    """What a merge stored: right, in coarse arithmetic, wrong in places, or wrong throughout."""
    exact, rng = case.exact(), np.random.default_rng(3)
    if kind == "coarse":
        exact = exact * (1 + rng.standard_normal(exact.shape) * 2.0**-9)
    if kind == "wrong in places":
        exact.flat[:: max(1, exact.size // 5)] *= 1.1
    if kind == "wrong":
        exact = case.open().base(slice(None))
    return stored(exact, dtype)


@pytest.mark.parametrize("kind", ["right", "coarse", "wrong in places", "wrong"])
@pytest.mark.parametrize("rule", RULES)
def test_both_find_the_same(rule, kind, monkeypatch):
    for shape in SHAPES:
        case = Case(shape, rule)
        merged = mistreated(case, "BF16", kind)
        one, other = both(case, merged, monkeypatch)
        assert_same(one, other)
        wrong = one.misrounded / one.elements
        assert wrong == 0 if kind == "right" else shape == (1, 1) or wrong > 0


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("base", TYPES)
@pytest.mark.parametrize("rule", ["row", "column"])
def test_both_find_the_same_in_every_pair_of_types(rule, base, dtype, monkeypatch):
    case = Case((20, 41), rule, base)
    for kind in ("right", "wrong in places"):
        one, other = both(case, mistreated(case, dtype, kind), monkeypatch)
        assert_same(one, other)
        assert (one.misrounded > 0) == (kind != "right")


def test_what_is_counted_is_what_float64_counts():
    """Not numpy's tally: the formula written out, and the neighbours of each stored value."""
    case = Case((20, 41), "row")
    W, B, A, m = (values(r) for r in (case.source, *(o.ref for o in case.change.delta.operands),
                                      case.change.magnitude.ref))  # fmt: skip
    V = W + 1.75 * B @ A
    right = (m / np.linalg.norm(V, axis=1))[:, None] * V
    merged = mistreated(case, "BF16", "wrong in places")
    got = values(merged)
    found = measured(case.open(), merged)
    assert found.misrounded == (got != rounded(right, DTYPES["BF16"])).sum() > 0
    ulp = 2.0 ** (np.floor(np.log2(np.abs(right))) - 7)
    assert found.max_ulp == pytest.approx(np.max(np.abs(got - right) / ulp), rel=1e-12)
    assert found.error == pytest.approx(np.sum((got - right) ** 2), rel=1e-12)
    assert found.one_rounding == pytest.approx(np.sum(ulp**2) / 12, rel=1e-12)
    assert found.exact == pytest.approx(np.sum(right**2), rel=1e-12)
    assert found.update == pytest.approx(np.sum((right - W) ** 2), rel=1e-12)
    assert found.base == pytest.approx(np.sum(W**2), rel=1e-12)


def test_every_stored_value_of_two_bytes_is_read_as_it_is(monkeypatch):
    """All of float16 and bfloat16 as base and as merged value, but what is not finite."""
    for dtype in ("F16", "BF16"):
        bits = np.arange(1 << 16, dtype=np.uint16)
        top = 0x7C00 if dtype == "F16" else 0x7F80
        bits = bits[(bits & top) != top]
        if dtype == "BF16":  # squares beyond 1e308 are for numpy
            bits = bits[(bits & 0x7FFF) < 0x7F00]
        width = len(bits) // 32
        data = np.frombuffer(bits.tobytes(), np.uint8)
        case = Case((32, width), "lora", rank=1, size=0.0)
        case.source = TensorRef("t", DTYPES[dtype], (32, width), HeldBytes(None, data))
        one, other = both(case, case.source, monkeypatch)
        assert_same(one, other)
        assert (one.error, one.update, one.misrounded) == (0.0, 0.0, 0)
        # as some other tensor's: every gap is the value itself
        zero = stored(np.zeros((32, width)), dtype)
        assert_same(*both(case, zero, monkeypatch))


# Of the others columns are sampled.
@pytest.mark.parametrize("rule", [rule for rule in RULES if not rule.startswith("column")])
def test_sampled_rows_are_found_the_same(rule, monkeypatch):
    lines = np.array([2, 3, 11, 19])
    case = Case((20, 41), rule)
    one, other = both(case, mistreated(case, "BF16", "wrong in places"), monkeypatch, lines)
    assert_same(one, other)
    assert (one.elements, list(one.lines)) == (4 * 41, list(lines))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", TYPES)
def test_what_is_not_finite_is_found(rule, value, dtype, monkeypatch):
    case = Case((20, 41), rule)
    exact = case.exact()
    exact[3, 40] = exact[12, 0] = value
    with np.errstate(invalid="ignore", over="ignore"):
        merged = stored(exact, dtype)
        one, other = both(case, merged, monkeypatch)
    assert_same(one, other)
    assert (one.not_finite, one.max_ulp) == (2, np.inf)


@pytest.mark.parametrize("rule", ["row", "row-eps", "magnitude", "column", "column-eps"])
@pytest.mark.parametrize("keep", [True, False])
def test_lines_without_direction_are_found_the_same(rule, keep, monkeypatch):
    case = Case((20, 41), rule, settings=Settings(zero_norm="keep-base" if keep else "error"))
    W, (left, right) = values(case.source), case.change.delta.operands if case.change.delta else (
        None, None)  # fmt: skip
    W[4], W[:, 7] = 0, 0
    case.source = stored(W, "BF16")
    if left is not None:
        B, A = values(left.ref), values(right.ref)
        B[4], A[:, 7] = 0, 0
        delta = Product(Operand.plain(stored(B, "F32")), Operand.plain(stored(A, "F32")))
        case.change = replace(case.change, delta=delta)
    merged = mistreated(case, "BF16", "right")
    exact = case.open()
    one = measured(exact, merged)
    with monkeypatch.context() as patch:
        patch.setenv(extensions.SWITCH, "numpy")
        assert_same(one, measured(case.open(), merged))
    assert one.misrounded == 0


@pytest.mark.parametrize("rule", ["lora", "row", "column"])
@pytest.mark.parametrize("size", [1e-30, 1e-44, 1e30, 3e36])
def test_the_ends_of_the_range_are_found_the_same(rule, size, monkeypatch):
    case = Case((20, 41), rule, "F32", size=size)
    for dtype in TYPES:
        with np.errstate(over="ignore", invalid="ignore"):
            for kind in ("right", "wrong in places"):
                assert_same(*both(case, mistreated(case, dtype, kind), monkeypatch))


def test_factors_beyond_float64_are_left_to_numpy():
    case = Case((6, 8), "row")
    assert case.open().rule is not None
    assert case.open(scaling=1e200).rule is None
    assert case.open(scaling=float("nan")).rule is None


def test_terms_beyond_float64_are_left_to_numpy(monkeypatch):
    """B at right angles to A: their product is 0, the size of its terms is not finite."""
    case = Case((6, 8), "row", rank=2)
    B, A = np.tile([1e38, 0.0], (6, 1)), np.tile([[0.0], [1e38]], (1, 8))
    delta = Product(Operand.plain(stored(B, "F32")), Operand.plain(stored(A, "F32")))
    m = Operand.plain(stored(np.full(6, 1e90), "F64"))
    case.change = replace(case.change, delta=delta, magnitude=m, scaling=1e111)
    case.source = stored(np.full((6, 8), 1e-38), "F32")
    merged = stored(np.full((6, 8), 1e30), "F32")
    with np.errstate(over="ignore"):
        one, other = both(case, merged, monkeypatch)
    assert_same(one, other)
    assert (one.excess > 1e300).all()


def test_other_rules_are_left_to_numpy():
    """Each of these would be computed wrongly by the loop, were it taken."""
    case = Case((6, 8), "row")
    assert case.open(weight=0.5).rule is None
    case.settings = Settings(strength=0.5)
    assert case.open().rule is None
    case = Case((6, 8), "column")
    assert case.open(magnitude_is_factor=True).rule is None
    region = Region(0, 6, 8, (case.change,))
    assert Exact.open(case.source, region, Settings()).rule is None  # no factor computed
    one = Case((6, 8), "row").change
    region = Region(0, 6, 8, (one, replace(one, adapter=1)))
    assert Exact.open(case.source, region, Settings()).rule is None
    case.source = replace(stored(np.ones((6, 8)), "F32"), dtype=DTYPES["F64"], shape=(6, 4))
    assert Exact.open(case.source, Region(0, 6, 4, ()), Settings()).rule is None


def test_buffers_of_another_size_are_refused():
    """The loop trusts what it is given, so nothing that does not fit may reach it."""
    scalars, types = (0.0, 1e-38, 0.004, 0.004, 1e-38), (0, 0)
    base = np.zeros((6, 10), np.uint16)
    left, right, sizes = np.zeros((6, 2)), np.zeros((2, 2, 8)), np.zeros(16)
    m, none, found, column = np.zeros(6), np.empty(0), np.empty((6, 9)), np.zeros(16)
    module = compiled._module()
    good = [base, base, left, right, sizes, m, column, found, column.copy(), column.copy()]
    module.compare(types, 1, 10, 2, scalars, *good)
    for position in range(len(good)):
        bad = list(good)
        bad[position] = np.zeros(bad[position].size + 1, bad[position].dtype)
        with pytest.raises(ValueError, match="buffers do not fit"):
            module.compare(types, 1, 10, 2, scalars, *bad)
    for types_, rule, columns, rank in (
        ((3, 0), 1, 10, 2), ((0, -1), 1, 10, 2), (types, 3, 10, 2), (types, 1, 0, 2),
        (types, 1, 10, -1),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="buffers do not fit"):
            module.compare(types_, rule, columns, rank, scalars, *good)
    with pytest.raises(ValueError, match="buffers do not fit"):
        module.compare(types, 0, 10, 2, scalars, *good)  # no magnitude is asked for
    module.compare(types, 0, 10, 2, scalars, *good[:5], none, none, found, none, none)
    good = [base, left, right, column]
    module.add_column_squares(0, 10, 2, *good)
    for position in range(len(good)):
        bad = list(good)
        bad[position] = np.zeros(bad[position].size + 1, bad[position].dtype)
        with pytest.raises(ValueError, match="buffers do not fit"):
            module.add_column_squares(0, 10, 2, *bad)
    with pytest.raises(ValueError, match="buffers do not fit"):
        module.add_column_squares(3, 10, 2, *good)
