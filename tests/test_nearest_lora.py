"""What a plain LoRA can stand for, how its factors are stored, and what is said of the rest."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from dora_export import lowrank, nearest_lora
from dora_export.errors import AdapterError, ArithmeticRefusal
from dora_export.lowrank import LowRank
from dora_export.pieces import regions
from dora_export.report import LayerLoss
from dora_export.update import Update
from dora_export.verification.exact import Exact
from tests.test_peft_parity import Bench, case


def bench_of(folder, name, shape, rows):
    tensors = {name: torch.randn(shape) * 0.1, "other.weight": torch.randn(6, 4)}
    return Bench(folder, tensors, A=torch.randn(2, shape[-1]), B=torch.randn(rows, 2))


def product(bench, target, **fields):
    fields = {"down": bench.matrix("A"), "up": bench.matrix("B")} | fields
    return Update(target, "lora", ("A", "B"), **fields)


@pytest.mark.parametrize(
    ("target", "shape", "fields", "why"),
    [
        ("x.weight", (8, 6), {"rows": (0, 8)}, None),
        ("x.weight", (3, 8, 6), {"index": 1}, "changed in parts"),
        ("x.weight", (8, 6), {"rows": (0, 4), "rows_of_b": 4}, "changed in parts"),
        ("x.kernel", (8, 6), {}, "not the weight of a layer"),
    ],
    ids=str,
)
def test_layers_are_whole_weights(target, shape, fields, why, tmp_path):
    rows = fields.pop("rows_of_b", shape[-2])
    bench = bench_of(tmp_path, target, shape, rows)
    update = product(bench, target, **fields)
    if why is None:
        (layer,) = nearest_lora.layers(bench.plan(update))
        assert (layer.module, layer.embedding, layer.transposed) == ("x", False, False)
        return
    with pytest.raises(AdapterError, match=why):
        nearest_lora.layers(bench.plan(update))


def test_all_that_a_plain_lora_cannot_hold_is_listed(tmp_path):
    base = {"x.weight": torch.ones(8, 6), "other.weight": torch.ones(6, 4)}
    bench = Bench(tmp_path, base, V=torch.ones(8, 6))
    whole = Update("x.weight", "add", ("V",), value=bench.refs["V"])
    with pytest.raises(AdapterError) as refusal:
        nearest_lora.layers(bench.plan(whole))
    assert "x.weight: trained whole, or values of its own" in str(refusal.value)
    assert "other.weight" not in str(refusal.value)  # unchanged
    assert "Merge it instead" in str(refusal.value)
    both = Bench(tmp_path, {"x.bias": torch.ones(6)}, V=torch.ones(6))
    vector = Update("x.bias", "add", ("V",), value=both.refs["V"])
    with pytest.raises(AdapterError, match=r"x\.bias: trained whole"):
        nearest_lora.layers(both.plan(vector))


@pytest.mark.parametrize(
    ("shape", "kind", "a", "b"),
    [((8, 6), "linear", (3, 6), (8, 3)), ((6, 8), "Conv1D", (3, 6), (8, 3)),
     ((8, 6, 3, 2), "kernel", (3, 6, 3, 2), (8, 3, 1, 1)),
     ((6, 8), "embedding", (3, 6), (8, 3))],
    ids=str,
)  # fmt: skip
def test_factors_are_stored_as_peft_does(shape, kind, a, b, tmp_path):
    layout = "io" if kind in ("Conv1D", "embedding") else "oi"
    bench, update, _ = case(tmp_path, shape, layout=layout, dtype=torch.float32)
    if kind == "Conv1D":  # only an embedding is known to be stored so; the shape tells of others
        update = replace(update, layout=None)
    plan = bench.plan(update)
    (layer,) = nearest_lora.layers(plan)
    assert [(name, entry) for name, _, entry in layer.entries(3)] == [
        (f"base_model.model.x.{name}", size) for name, size in zip(
            ("lora_embedding_A", "lora_embedding_B") if kind == "embedding" else
            ("lora_A.weight", "lora_B.weight"), (a, b), strict=True)]  # fmt: skip
    (region,) = regions(layer.step)
    found = lowrank.nearest(Exact.open(layer.step.source, region, plan.settings), 3)
    A, B = (raw.view(np.float32) for raw in layer.factors(found, 3))
    assert (A.shape, B.shape) == (a, b)
    stored = (B.reshape(len(B), -1) @ A.reshape(len(A), -1)).astype(np.float64)
    want = found.left @ found.right
    assert (stored.T if layout == "io" else stored) == pytest.approx(want, rel=1e-5, abs=1e-7)
    config = nearest_lora.config(plan, [layer], 3)
    assert (config["fan_in_fan_out"], config["r"], config["lora_alpha"]) == (kind == "Conv1D", 3, 3)
    assert config["layer_replication"] is None
    losses = []
    values = list(nearest_lora.approximate(plan, [layer], 3, losses, threads=None))
    assert [v.shape for v in values] == [a, b]
    assert [(loss.name, loss.energy) for loss in losses] == [("x.weight", found.energy)]


def test_table_of_tokens_is_an_embedding_whatever_its_adapters_layout(tmp_path):
    bench = bench_of(tmp_path, "embed_tokens.weight", (8, 6), 8)
    plan = bench.plan(product(bench, "embed_tokens.weight", layout="oi"))
    (layer,) = nearest_lora.layers(plan)
    assert layer.embedding
    found = lowrank.nearest(Exact.open(layer.step.source, layer.region, plan.settings), 3)
    A, B = (raw.view(np.float32) for raw in layer.factors(found, 3))
    assert (A.shape, B.shape) == ((3, 8), (6, 3))
    assert pytest.approx(found.left @ found.right, rel=1e-5, abs=1e-6) == (B @ A).T


def test_layers_are_called_as_the_adapter_does_and_flattened_ones_as_the_base(tmp_path):
    bench = bench_of(tmp_path, "model.x.weight", (8, 6), 8)
    plan = bench.plan(product(bench, "x.weight"))
    (adapter,) = plan.adapters
    adapter = replace(adapter, base_name="some/base", layer_replication=((0, 2), (1, 2)))
    for naming, module in (("paths", "x"), ("flat", "model.x")):
        plan = replace(plan, adapters=(replace(adapter, naming=naming),))
        (layer,) = nearest_lora.layers(plan)
        assert layer.module == module
        config = nearest_lora.config(plan, [layer], 3)
        assert config["base_model_name_or_path"] == "some/base"
        assert config["layer_replication"] == [[0, 2], [1, 2]]


def test_share_of_the_whole_weighs_layers_by_their_size():
    losses = [LayerLoss("a", (2, 2), 3.0, 0.5, 0.7), LayerLoss("b", (2, 2), 1.0, 1.0, 0.0)]
    assert nearest_lora.energy(losses) == pytest.approx((0.5 * 9 + 1) / 10)
    assert nearest_lora.energy([LayerLoss("a", (2, 2), 0.0, 1.0, 0.0)]) == 1.0


def test_update_of_nothing_is_kept_whole():
    zero = np.zeros((3, 2)), np.zeros((2, 3))
    none = LowRank(*zero, singular=np.zeros(2), size=0.0)
    assert (none.energy, none.error) == (1.0, 0.0)
    rounded = LowRank(*zero, singular=np.array([1.0, 1e-8]), size=1 - 1e-12)
    assert (rounded.energy, rounded.error) == (1.0, 0.0)


@pytest.mark.parametrize("side", [lowrank.WHOLE_SIDE, 1], ids=["whole", "randomised"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
def test_base_that_holds_no_number_is_refused(side, value, tmp_path, monkeypatch):
    monkeypatch.setattr(lowrank, "WHOLE_SIDE", side)
    monkeypatch.setattr(lowrank, "OVERSAMPLED", 2)
    bench, update, _ = case(tmp_path, (30, 20), dtype=torch.float32)
    tensors = {"x.weight": torch.randn(30, 20)}
    tensors["x.weight"][7, 3] = value
    bad = Bench(tmp_path, tensors, **{n: torch.from_numpy(ref.raw().view(np.float32).reshape(
        ref.shape)) for n, ref in bench.refs.items()})  # fmt: skip
    plan = bad.plan(update)
    (step,) = [s for s in plan.steps if s.changes]
    (region,) = regions(step)
    with pytest.raises(ArithmeticRefusal, match="holds NaN or inf"):
        lowrank.nearest(Exact.open(step.source, region, plan.settings), 3)


@pytest.mark.parametrize(("rank", "whole"), [(3, False), (18, True)])
def test_ranks_near_the_shorter_side_are_decomposed_whole(rank, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(lowrank, "WHOLE_SIDE", 10)
    monkeypatch.setattr(lowrank, "OVERSAMPLED", 2)
    called = []
    own = lowrank._whole
    monkeypatch.setattr(lowrank, "_whole", lambda *a: called.append(1) or own(*a))
    bench, update, _ = case(tmp_path, (30, 20), dtype=torch.float32)
    plan = bench.plan(update)
    (step,) = [s for s in plan.steps if s.changes]
    found = lowrank.nearest(Exact.open(step.source, regions(step)[0], plan.settings), rank)
    assert found.left.shape == (30, rank)
    assert bool(called) is whole
