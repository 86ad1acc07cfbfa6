"""Numbers and names as people write them."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dora_export import words


@pytest.mark.parametrize(
    ("value", "printed", "plain"),
    [
        (0.0, "0", "0"),
        (0.5061, "0.506", "0.506"),
        (3.1, "3.10", "3.10"),
        (0.9999, "1.00", "1.00"),
        (99.96, "100", "100"),
        (1113.0, "1,110", "1,110"),
        (123456.0, "1.23×10⁵", "1.23e5"),
        (8.94e-6, "8.94×10⁻⁶", "8.94e-6"),
        (0.00164, "0.00164", "0.00164"),
        (-2.5, "-2.50", "-2.50"),
        (math.inf, "∞", "inf"),
        (-math.inf, "-∞", "-inf"),
        (math.nan, "–", "-"),
        (None, "–", "-"),
    ],
)
def test_numbers_have_three_significant_digits(value, printed, plain):
    assert words.number(value) == printed
    assert words.number(value, ascii_only=True) == plain


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (8.9e-6, "8.9×10⁻⁶"), (0.0031, "0.31%"), (0.44, "44%"), (0.999, "99.9%"),
     (1, "100%")],
)  # fmt: skip
def test_shares_are_percentages_until_they_are_tiny(value, text):
    assert words.share(value) == text


def test_counts_know_one_from_many():
    assert [words.count(n, "tensor") for n in (0, 1, 20_000)] == [
        "0 tensors", "1 tensor", "20,000 tensors",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("names", "folded"),
    [
        ([], []),
        (["a.b"], ["a.b"]),
        (["l.7.q"], ["l.7.q"]),
        (["l.0.q", "l.1.q"], ["l.{0,1}.q"]),
        ([f"l.{i}.q" for i in (3, 0, 1, 2, 9)], ["l.{0-3,9}.q"]),
        ([f"l.{i}.e.{j}" for i in range(3) for j in range(4)], ["l.{0-2}.e.{0-3}"]),
        (["l.0.e.0", "l.0.e.1", "l.1.e.0"], ["l.0.e.{0,1}", "l.1.e.0"]),
        (["l.07.q", "l.8.q"], ["l.07.q", "l.8.q"]),
        (["a-1.b", "a-2.b"], ["a-1.b", "a-2.b"]),
        (["l.٣.q", "l.4.q"], ["l.٣.q", "l.4.q"]),
        (["l." + "9" * 5000 + ".q"], ["l." + "9" * 5000 + ".q"]),
        (["x", "x"], ["x"]),
    ],
)
def test_names_fold_where_only_numbers_differ(names, folded):
    assert words.compact(names) == folded


def unfold(name):
    """Every name that a folded one stands for."""
    parts = []
    for part in name.split("."):
        spans = part.strip("{}").split(",") if part.startswith("{") else [part]
        ends = [s.split("-") if part.startswith("{") else [s] for s in spans]
        parts.append([
            str(n) for e in ends for n in (range(int(e[0]), int(e[-1]) + 1) if len(e) > 1 else e)
        ])  # fmt: skip
    return {".".join(p) for p in itertools.product(*parts)}


@given(st.sets(st.tuples(st.integers(0, 6), st.sampled_from("qk"), st.integers(0, 6)), max_size=60))
def test_folded_names_stand_for_exactly_those_given(rows):
    names = {f"layers.{i}.{kind}.{j}.weight" for i, kind, j in rows}
    sets = [unfold(folded) for folded in words.compact(sorted(names))]
    assert set().union(*sets) == names
    assert sum(map(len, sets)) == len(names)
