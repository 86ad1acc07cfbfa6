"""How surely level "fast" tells wrong from right: thousands of merges, each judged.

With no miss among n independent plants, the probability of a miss is below 3 / n at 95 %.
"""

from collections import Counter

import numpy as np
import pytest
import torch

from dora_export.verification.oracle import SAMPLES
from tests import oracle
from tests.plants import ARITHMETIC, judge, mistakes, model

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# A right merge in 16 bits may round a row's factor by this much (half a unit roundoff, at least):
# a mistake that changes the lengths of rows by less may give the very bytes of a right merge.
FACTOR = {F32: 2.0**-9, BF16: 2.0**-9, F16: 2.0**-12}
SEEDS = {BF16: 0, F32: 10_000, F16: 20_000}
LENGTHS_ONLY = ("plain LoRA", "magnitude before training", "norm of W")
NORMS = ("norm_only", "norm_and_magnitude")
# What an exact merge may have that is not correctly rounded (0.1 %, of sampled elements), twice.
AS_GOOD_AS_EXACT = 2e-3
# The same where float32 has as many bits as its arithmetic: relative size of a change.
FLOAT32 = 4e-6


def no_fault(kind, planted, right, dtype):
    """Whether a mistake changes less than rounding may."""
    size = np.linalg.norm(planted - right) / np.linalg.norm(right)
    if kind in LENGTHS_ONLY and size < FACTOR[dtype]:
        return True
    if dtype is F32:
        return size < FLOAT32
    changed = oracle.rounded(planted, dtype) != oracle.rounded(right, dtype)
    return changed.mean() < AS_GOOD_AS_EXACT


def models(dtype, count):
    """Models of every size; one in four plain LoRA, every other adapter in 16 bits."""
    coarse = F16 if dtype is F16 else BF16
    for seed in range(SEEDS[dtype], SEEDS[dtype] + count):
        adapter = coarse if seed // 2 % 2 else F32
        size = ("trained", "weak")[seed % 2]
        yield model(seed, dtype, size, adapter=adapter, dora=seed % 4 != 3)


def amounts(few, many):
    """Models for the default run, and for the nightly one."""
    return [(d, few) for d in (BF16, F32, F16)] + [
        pytest.param(d, many, marks=pytest.mark.nightly, id=f"{d}-many") for d in (BF16, F32, F16)
    ]


@pytest.mark.parametrize(("dtype", "count"), amounts(2, 160))
def test_no_mistake_about_a_whole_tensor_is_missed(dtype, count):
    planted, missed, nothing = Counter(), [], Counter()
    for layers, random in models(dtype, count):
        values, kinds = {}, {}
        for layer in layers:
            possible = mistakes(layer, layers, random)
            kind = str(random.choice(list(possible)))
            if no_fault(kind, possible[kind], layer.merged(), dtype):
                nothing[kind] += 1
                continue
            values[layer.name], kinds[layer.name] = possible[kind], kind
        results, _ = judge([x for x in layers if x.name in values], values, dtype)
        planted.update(kinds.values())
        missed += [(kinds[n], t.status) for n, t in results.items() if t.status != "wrong"]
    print(f"{dtype}: {sum(planted.values())} planted, {dict(planted)}; missed {missed}; "
          f"below rounding {dict(nothing)}")  # fmt: skip
    assert missed == []
    assert sum(planted.values()) >= 18 * count
    assert sum(nothing.values()) <= 2 * count


@pytest.mark.parametrize(("dtype", "count"), amounts(2, 160))
def test_no_right_merge_is_called_wrong(dtype, count):
    coarse = F16 if dtype is F16 else BF16
    merged, alarms = Counter(), []
    for layers, random in models(dtype, count):
        values, kinds = {}, {}
        for layer in layers:
            # weights in float32 and only norms in 16 bits: nobody's, and at times a plain LoRA's
            possible = [c for c in ARITHMETIC if dtype is not F32 or c.__name__ not in NORMS]
            compute = possible[int(random.integers(len(possible)))]
            kinds[layer.name] = compute.__name__
            values[layer.name] = compute(*layer.stored, layer.scaling, coarse)
        results, findings = judge(layers, values, dtype)
        merged.update(kinds.values())
        alarms += [(kinds[n], findings[n].what)
                   for n, t in results.items() if t.status == "wrong"]  # fmt: skip
    print(f"{dtype}: {sum(merged.values())} right merges, {dict(merged)}; called wrong {alarms}")
    assert alarms == []
    assert sum(merged.values()) >= 20 * count


def test_more_rows_are_sampled_where_an_update_is_small():
    """Half the scaling of an update that is 1 in 10,000 of the weight, in bfloat16."""
    found, elements = [], []
    for size in ("hardly any", "trained"):
        layers, _ = model(1, BF16, size)
        layers = [x for x in layers if x.W.shape[0] >= 256]
        values = {x.name: x.merged(s=x.scaling / 2) for x in layers}
        results, _ = judge(layers, values, BF16)
        found += [t.status for t in results.values()]
        elements.append([t.elements / t.shape[1] for t in results.values()])
    assert set(found) == {"wrong"}
    assert set(elements[1]) == {SAMPLES}
    assert min(elements[0]) > 2 * SAMPLES
