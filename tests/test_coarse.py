"""Right merges in bfloat16 arithmetic pass, whatever their order; faults of its size do not."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dora_export.pieces import regions
from dora_export.plan import Settings
from dora_export.verification import small_mistakes
from dora_export.verification.exact import Exact
from dora_export.verification.samples import take
from tests.pairs import LINEARS, SCALING, Pair, Q
from tests.plants import (
    ARITHMETIC,
    in_float32,
    judge,
    mistakes,
    model,
    norm_only,
    ref,
    throughout,
)
from tests.small import PREFIX
from tests.test_oracle import run

BF16 = torch.bfloat16


class Small(Pair):
    """A pair whose update and change of magnitudes are smaller by a factor."""

    def __init__(self, folder, dtype, dora, size, adapter_dtype=torch.float32):
        super().__init__(folder, dtype, dora)
        for key, tensor in self.adapter.items():
            if key.endswith("lora_B.weight"):
                tensor *= size
            elif key.endswith("magnitude_vector"):
                name = key.removeprefix(PREFIX).removesuffix(".lora_magnitude_vector")
                norm = self.base[f"{name}.weight"].float().norm(dim=1)
                tensor += (1 - size) * (norm - tensor)
        self.adapter = {n: t.to(adapter_dtype) for n, t in self.adapter.items()}
        save_file(self.adapter, folder / "adapter" / "adapter_model.safetensors")

    def store(self, values):
        """Write merged values of all layers, rounded as the base is stored, and check them."""
        dtype = self.base[f"{Q}.weight"].dtype
        held = {f"{n}.weight": torch.as_tensor(v).to(dtype) for n, v in values.items()}
        save_file({**self.base, **held}, self.merged / "model.safetensors", {"format": "pt"})

    def tensors(self, name):
        """W, A, B, m (or None) as stored."""
        A, B, m = (self.adapter.get(f"{PREFIX}{name}.{p}") for p in
                   ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector"))  # fmt: skip
        return self.base[f"{name}.weight"], A, B, m


def rest(*cases):
    """Cases for the nightly run."""
    return [pytest.param(*case, marks=pytest.mark.nightly) for case in cases]


@pytest.mark.parametrize(
    ("adapter_dtype", "size", "dora"),
    [
        (torch.float32, 1.0, True),
        *rest(
            (BF16, 0.01, True),
            (BF16, 0.01, False),
            (BF16, 1.0, True),
            (torch.float32, 0.01, True),
            (torch.float32, 1.0, False),
        ),
    ],
)
def test_right_merges_in_bfloat16_are_right(tmp_path, dora, size, adapter_dtype):
    pair = Small(tmp_path, BF16, dora, size, adapter_dtype)
    for compute in ARITHMETIC:
        pair.store({n: compute(*pair.tensors(n), SCALING, BF16) for n in LINEARS})
        for level in ("fast", "full"):
            _, findings = run(tmp_path / "base", tmp_path / "adapter", pair.merged, level)
            wrong = [(f.code, f.where, f.what) for f in findings if f.severity == "wrong"]
            assert wrong == [], (compute.__name__, level)


@pytest.mark.parametrize("size", ["weak", "trained"])
def test_merges_in_bfloat16_that_were_cast_to_float16_are_right(size):
    """As is done for devices without bfloat16; mistakes are found there as well."""
    layers, random = model(2, BF16, size, each=2)
    layers = [x for x in layers if x.W.size < 40_000]
    for compute in (in_float32, throughout, norm_only):
        values = {x.name: compute(*x.stored, x.scaling, BF16).to(BF16) for x in layers}
        _, findings = judge(layers, values, torch.float16)
        assert {f.code for f in findings.values()} == {"coarse-rounding"}, compute.__name__
    planted = {}
    for x in layers:
        possible = mistakes(x, layers, random)
        kinds = [k for k in possible if k not in ("plain LoRA", "norm of W")]  # lengths alone
        planted[x.name] = torch.from_numpy(possible[str(random.choice(kinds))]).to(BF16)
    results, _ = judge(layers, planted, torch.float16)
    assert {t.status for t in results.values()} == {"wrong"}


def all_of(factor):
    return lambda right, _base: right * factor


def update(factor):
    return lambda right, base: base + factor * (right - base)


FAULTS = {
    **{f"all times {f}": all_of(f) for f in (1.01, 0.99, 1.03, 1.05)},
    **{f"update times {f}": update(f) for f in (1.03, 0.97, 1.05, 1.1)},
    "lines up to 2 % longer and shorter": lambda right, _base: (
        right * (1 + 0.02 * torch.cos(1.7 * torch.arange(len(right)))[:, None])
    ),
    "columns up to 3 % larger and smaller": lambda right, _base: (
        right * (1 + 0.03 * torch.cos(1.7 * torch.arange(right.shape[1])))
    ),
}


@pytest.mark.parametrize(
    ("compute", "dora", "level"),
    [
        (throughout, True, "fast"),
        *rest(
            (norm_only, True, "full"),
            (throughout, False, "full"),
            (norm_only, True, "fast"),
            (throughout, True, "full"),
            (throughout, False, "fast"),
        ),
    ],
)
def test_small_faults_of_whole_tensors_are_no_rounding(tmp_path, compute, dora, level):
    """Planted in merges computed in float32 (but for DoRA's norm) and in bfloat16."""
    pair = Small(tmp_path, BF16, dora, 1.0)
    right = {n: compute(*pair.tensors(n), SCALING, BF16).double() for n in LINEARS}
    missed = []
    for fault, wrong in FAULTS.items():
        if level == "fast" and fault in ("all times 1.01", "all times 0.99"):
            continue  # 16 lines do not always tell
        planted = {n: wrong(v, pair.base[f"{n}.weight"].double()) for n, v in right.items()}
        pair.store(planted)
        tensors, _ = run(tmp_path / "base", tmp_path / "adapter", pair.merged, level)
        missed += [(fault, n) for n, t in tensors.items() if t.status != "wrong"]
    assert missed == []


# --- mistakes as small as the rounding of bfloat16 arithmetic are named all the same

A_AND_B = "A and B of another layer"


def weak():
    """Nine layers whose updates are at most 1 in 300 of the weight."""
    layers, _ = model(7, BF16, "weak", each=3)
    return [x for x in layers if x.W.size < 10_000]


def with_mistake(kind, layer, other):
    """W, A, B, m and s of a layer as a mistake takes them."""
    W, A, B, m = layer.stored
    return {
        A_AND_B: (W, *other.stored[1:3], m, other.scaling),
        "update of another layer": (W, *other.stored[1:], other.scaling),
        "subtracted": (W, A, B, m, -layer.scaling),
        "A and B ignored": (W, A, 0 * B, m, layer.scaling),
        "twice the scaling": (W, A, B, m, 2 * layer.scaling),
        "half the scaling": (W, A, B, m, layer.scaling / 2),
    }[kind]


@pytest.mark.parametrize(
    ("kind", "named", "word", "share"),
    [
        (A_AND_B, {"update-of-another"}, "A and B of '{other}'", 0.85),
        ("update of another layer", {"update-of-another"}, "the update of '{other}'", 0.75),
        ("subtracted", {"sign-flipped"}, "m (W - s B A) / ||W - s B A||", 1.0),
        ("A and B ignored", {"factors-ignored", "not-applied"}, "m W / ||W||", 0.75),
        ("twice the scaling", {"scaling-other"}, "scaling {twice} instead of", 1.0),
        ("half the scaling", {"scaling-other"}, "scaling {half} instead of", 1.0),
    ],
)
def test_mistakes_as_small_as_rounding_are_named(kind, named, word, share):
    """And, but for few, by no other name.

    What disappears in that rounding altogether is left out: nobody can name it.
    """
    layers = weak()
    values, expected = {}, {}
    for x in layers:
        other = next(y for y in layers if y.W.shape == x.W.shape and y is not x)
        values[x.name] = throughout(*with_mistake(kind, x, other), BF16)
        right = throughout(*x.stored, x.scaling, BF16)
        none = throughout(*with_mistake("A and B ignored", x, other), BF16)
        apart = [(values[x.name] != v).double().mean() for v in (right, none)]
        if min(apart[: 1 if kind == "A and B ignored" else 2]) < 0.1:
            values[x.name] = right
            continue
        s = x.scaling
        expected[x.name] = word.format(other=other.name, twice=f"{2 * s:.4g}", half=f"{s / 2:.4g}")
    results, findings = judge(layers, values, BF16)
    found = {n: (f.code, f.what) for n, f in findings.items() if n in expected}
    assert {n for n, t in results.items() if t.status == "wrong"} == expected.keys()
    right = [n for n, (code, what) in found.items() if code in named and expected[n] in what]
    assert len(expected) >= 5
    assert not any(", or scaling" in what for _, what in found.values())  # the same twice
    assert len(right) >= share * len(expected), found


def test_a_right_merge_is_no_small_mistake():
    for x in weak():
        step = x.step()
        (region,) = regions(step)
        exact = Exact.open(step.source, region, Settings())
        lines = np.arange(region.rows)
        stored = ref(x.name, throughout(*x.stored, x.scaling, BF16))
        sample = take(exact, stored, lines, "BF16")
        tried = [*small_mistakes.formulas(sample, [(2 * x.scaling, "twice")])]
        assert small_mistakes.told(sample, tried) is None
        # nor is a mistake that nobody tried: other magnitudes, another base
        m = x.stored[3] * (1 + 0.02 * torch.cos(torch.arange(region.rows)))
        other = ref(x.name, throughout(*x.stored[:3], m, x.scaling, BF16))
        assert small_mistakes.told(take(exact, other, lines, "BF16"), tried) is None
        noise = 0.02 * x.W.std() * np.random.default_rng(1).standard_normal(x.W.shape)
        W = torch.from_numpy(x.W + noise).to(BF16)
        other = ref(x.name, throughout(W, *x.stored[1:], x.scaling, BF16))
        assert small_mistakes.told(take(exact, other, lines, "BF16"), tried) is None
        # nor another update
        B = x.stored[2].roll(1, 0)
        other = ref(x.name, throughout(*x.stored[:2], B, x.stored[3], x.scaling, BF16))
        assert small_mistakes.told(take(exact, other, lines, "BF16"), tried) is None


def test_zeros_are_no_known_mistake():
    layers, _ = model(7, BF16, "trained", each=1)
    x = replace(layers[0], stored=(8 * layers[0].stored[0], *layers[0].stored[1:3],
                                   8 * layers[0].stored[3]))  # fmt: skip
    _, findings = judge([x], {x.name: np.zeros(x.W.shape)}, BF16)
    assert {f.code for f in findings.values()} == {"wrong-values"}


def test_a_larger_mistake_that_is_nearly_another_is_not_named_by_it():
    """A small update in the place of a large one is nearly none at all."""
    layers, _ = model(3, BF16, "trained", each=3, dora=False)
    small = {x.name: x for x in layers}
    for x in layers:
        W, A, B, m = x.stored
        small[x.name] = replace(x, stored=(W, A, 0.02 * B, m))
    values, others = {}, {}
    for x in layers:
        if x.name.startswith("layers.0"):
            other = small[x.name.replace("layers.0", "layers.1")]
            values[x.name] = x.merged(A=other.A, B=other.B, s=other.scaling)
            others[x.name] = other.name
    planted = [x if x.name in values else small[x.name] for x in layers]
    right = {x.name: x.merged() for x in planted if x.name not in values}
    _, findings = judge(planted, {**right, **values}, torch.float32)
    assert {n: f.code for n, f in findings.items()} == dict.fromkeys(values, "update-of-another")
    assert all(others[n] in f.what for n, f in findings.items())
