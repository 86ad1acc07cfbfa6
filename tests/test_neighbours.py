"""Which tensors could be mixed up with one: told on a line, and never the one that is."""

from functools import partial

import numpy as np
import pytest
import torch

from dora_export.pieces import regions
from dora_export.plan import Settings
from dora_export.verification import coarse, diagnose, neighbours
from dora_export.verification import oracle as oracle_tier
from dora_export.verification.exact import Exact
from dora_export.verification.neighbours import KeptLines, Line
from dora_export.verification.oracle import _Families
from dora_export.verification.samples import take
from tests import oracle
from tests.plants import judge, model, ref

BF16 = torch.bfloat16


def family(seed, dora):
    """Twelve layers of one shape with weak updates, and the first one's neighbours."""
    layers, random = model(seed, BF16, "weak", dora=dora, each=12)
    layers = [x for x in layers if x.W.shape == (96, 64)]
    steps = [x.step() for x in layers]
    (region,) = regions(steps[0])
    exact = Exact.open(steps[0].source, region, Settings())
    return layers, random, exact, _Families(steps, Settings()).others(steps[0], exact)


def mixes(own, other):
    """What a layer becomes with another's values, update, factors or magnitudes."""
    theirs = {"A": other.A, "B": other.B, "s": other.scaling}
    found = {"tensor-of-another": other.merged(),
             "update-of-another": own.merged(**theirs, m=other.m)}  # fmt: skip
    if own.m is not None:
        found |= {"magnitude-of-another": own.merged(m=other.m), "factors": own.merged(**theirs)}
    return found


@pytest.mark.parametrize("dora", [True, False])
def test_no_neighbour_that_explains_the_lines_is_left_aside(dora):
    yielded = 0
    for seed in range(8):
        layers, random, exact, others = family(seed, dora)
        own, stranger = layers[0], layers[1 + int(random.integers(11))]
        kinds = mixes(own, stranger)
        planted = kinds[str(random.choice(list(kinds)))]
        lines = np.unique([others.line, *random.choice(96, 3, replace=False)])
        sample = take(exact, ref("w", torch.from_numpy(planted).to(BF16)), lines)
        stored = oracle.rounded(planted, BF16)[lines]
        distances = {
            x.name: min(((stored - oracle.rounded(v, BF16)[lines]) ** 2).sum()
                        for v in mixes(own, x).values())
            for x in layers[1:]
        }  # fmt: skip
        # From what the right one alone explains, over half of them, to all.
        for limit in (0.0, 1e-12, float(np.median(list(distances.values()))), np.inf):
            near = {name for name, _ in others.near(sample, others.line, limit)}
            assert near >= {n for n, d in distances.items() if d <= limit}
            yielded += len(near) if limit < 1e-9 else 0
        assert distances[stranger.name] == 0.0
    assert yielded == 2 * 8  # nobody else


@pytest.mark.parametrize("kept_bytes", [0, neighbours.KEPT_BYTES])
@pytest.mark.parametrize("kind", ["magnitude-of-another", "factors"])
def test_a_mix_of_the_size_of_rounding_is_named(kind, kept_bytes, monkeypatch):
    """In lines that could pass for bfloat16 arithmetic, however few lines are kept."""
    monkeypatch.setattr(oracle_tier, "KeptLines", partial(KeptLines, kept_bytes))
    layers, *_ = family(3, True)
    own, other = layers[0], layers[7]
    held = {x.name: x.merged() for x in layers} | {own.name: mixes(own, other)[kind]}
    results, findings = judge(layers, held, BF16)
    assert results[own.name].status == "wrong"
    assert other.name in findings[own.name].what
    assert {t.status for n, t in results.items() if n != own.name} == {"exact"}


def test_lines_are_computed_once_and_take_no_more_than_their_room():
    made = []

    def line(key):
        def make():
            made.append(key)
            return Line(None, 1.0, np.zeros(100), True)

        return make

    kept = KeptLines(nbytes=2500)
    for key in (1, 2, 3, 2, 3, 4, 3, 1):
        kept.get(key, 0, line(key))
    assert made == [1, 2, 3, 4, 1]  # 800 bytes each: three of them, the last used ones
    assert kept._used == sum(x.nbytes for x in kept._held.values()) <= 2500
    kept.get(1, 5, line("another line"))
    assert made[-1] == "another line"


def test_every_tensor_of_a_right_merge_is_told_by_few_lines_and_ways_of_rounding(monkeypatch):
    """In bfloat16 arithmetic, where each could hide a mix-up."""
    layers, *_ = family(5, True)
    opened = []
    take_all = diagnose.take
    monkeypatch.setattr(diagnose, "take", lambda *a: opened.append(a[0]) or take_all(*a))
    cooked, lines = [], coarse._Kitchen.lines
    monkeypatch.setattr(coarse._Kitchen, "lines", lambda *a: cooked.append(a[1]) or lines(*a))

    def rough(x):
        W, A, B, m = (t.to(BF16) for t in x.stored)
        V = W + (B @ A) * x.scaling
        return (m / torch.linalg.norm(V, dim=1)).view(-1, 1) * V

    results, _ = judge(layers, {x.name: oracle.float64(rough(x)) for x in layers}, BF16)
    assert {t.status for t in results.values()} <= {"rounded", "exact"}
    assert [t.status for t in results.values()].count("rounded") >= 10
    assert len(opened) <= 3 * len(layers)  # its own lines; of all pairs: 12 * 11 more
    assert len(cooked) <= 20 * len(layers)  # most take the first that is tried, not a hundred


def test_patience_with_what_nothing_explains_ends(monkeypatch):
    """Then formulas are still tried, and everything wrong is still found to be so."""
    layers, random = model(3, torch.float32, "trained", each=2)
    values = {x.name: x.merged() * (1 + 0.1 * random.standard_normal(x.W.shape)) for x in layers}
    known = min(layers, key=lambda x: x.W.size)  # the last one to be looked at
    values[known.name] = known.merged(m=np.ones(len(known.W)))
    looked = []
    rearranged = diagnose._rearranged
    monkeypatch.setattr(diagnose, "_rearranged", lambda *a: looked.append(1) or rearranged(*a))
    monkeypatch.setattr(oracle_tier, "Patience", lambda: neighbours.Patience(3))
    results, findings = judge(layers, values, torch.float32, "full")
    assert {t.status for t in results.values()} == {"wrong"}
    assert findings[known.name].code == "magnitude-ignored"
    rest = [f for n, f in findings.items() if n != known.name]
    assert {f.code for f in rest} == {"wrong-values"}
    assert len(looked) == 3
    assert sum("only formulas were tried" in f.what for f in rest) == len(rest) - 3 > 2
