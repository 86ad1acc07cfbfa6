"""Several adapters in one merge: PEFT's forward with all of them active, and the float64 formula.

PEFT applies active adapters in turn: ``y_i = f_i (y_(i-1) + s_i B_i A_i x)``, every ``f_i`` from
the norm of the unmerged base (0.21, tuners/lora/layer.py and dora.py, evaluation mode).
"""

import itertools
import json
import re
import shutil

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import dora_export
from dora_export import api
from dora_export.adapters import ReadOptions, read_adapter
from dora_export.adapters.model import Adapter
from dora_export.checkpoints import open_checkpoint
from dora_export.engine import Engine, Resources
from dora_export.errors import PlanError
from dora_export.plan import Settings, plan_merge
from dora_export.update import Update
from dora_export.verification.oracle import check_oracle
from dora_export.writers import identity
from tests import oracle, peft_models, small
from tests.test_peft_parity import Bench, Memory, load

KINDS = list(itertools.product([True, False], repeat=2))  # whether each adapter is DoRA
IDS = ["dora+dora", "dora+lora", "lora+dora", "lora+lora"]


# --- PEFT's forward


class Layers(nn.Module):
    """Every kind of layer that DoRA trains, one of them square."""

    def __init__(self):
        super().__init__()
        self.wide = nn.Linear(40, 28)
        self.square = nn.Linear(32, 32, bias=False)
        self.table = nn.Embedding(50, 24)
        self.conv = nn.Conv2d(6, 10, (3, 2))

    def forward(self, x):  # PEFT asks for one; the tests call the layers
        return x


def weight_of(layer):
    """The weight that a layer computes with, read off its outputs; float64, as it is stored."""
    base = layer.get_base_layer()
    if isinstance(base, nn.Embedding):
        return layer(torch.arange(base.num_embeddings)).detach()
    bias = 0 if base.bias is None else base.bias.detach()
    if isinstance(base, nn.Linear):
        return (layer(torch.eye(base.in_features, dtype=torch.float64)) - bias).T.detach()
    shape = base.weight.shape[1:]
    patches = torch.eye(shape.numel(), dtype=torch.float64).reshape(-1, *shape)
    return (layer(patches).flatten(1) - bias).T.reshape(base.weight.shape).detach()


def two_adapters(folder, kinds, seed=0):
    """A base, two adapters that PEFT saved, and PEFT's model in float64 with both active."""
    torch.manual_seed(seed)
    configs = [
        peft.LoraConfig(r=r, lora_alpha=alpha, use_dora=dora, use_rslora=rslora,
                        target_modules=["wide", "square", "table", "conv"])
        for dora, r, alpha, rslora in zip(kinds, (3, 5), (7, 4), (False, True), strict=True)
    ]  # fmt: skip
    made = peft_models.make(folder, Layers(), configs[0], torch.float32)
    model = made.model
    model.add_adapter("second", configs[1])
    for _, module in model.base_model.model.named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            train_second(module)
    model.save_pretrained(folder / "both", selected_adapters=["second"])
    shutil.move(folder / "both" / "second", folder / "second")
    model.base_model.set_adapter(["default", "second"])
    return made.base, [made.adapter, folder / "second"], model.double().eval()


def train_second(module):
    embedding = isinstance(module.get_base_layer(), nn.Embedding)
    pair = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
    for name in pair:
        factor = getattr(module, name)["second"]
        factor = factor if embedding else factor.weight
        factor.data = torch.randn(factor.shape) * 0.1
    if "second" in module.lora_magnitude_vector:
        m = module.lora_magnitude_vector["second"].weight
        m.data = m.data * torch.empty_like(m).uniform_(0.7, 1.3)


@pytest.mark.parametrize("kinds", KINDS, ids=IDS)
def test_merge_is_what_pefts_forward_computes_with_both_active(tmp_path, kinds):
    base, adapters, model = two_adapters(tmp_path, kinds)
    dora_export.merge(base, adapters, tmp_path / "out", verify="full")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    dora_export.merge(base, adapters[::-1], tmp_path / "reversed")
    other = load_file(tmp_path / "reversed" / "model.safetensors")
    for name in ("wide", "square", "table", "conv"):
        exact = weight_of(getattr(model.base_model.model, name)).numpy()
        assert oracle.ulps(merged[f"{name}.weight"], exact) <= 1, name
        if any(kinds):  # a later factor scales what came before: the order matters
            assert oracle.ulps(other[f"{name}.weight"], exact) > 1000, name


@pytest.mark.parametrize("kinds", KINDS, ids=IDS)
def test_command_merges_and_verifies_them(tmp_path, kinds):
    base, adapters, _ = two_adapters(tmp_path, kinds)
    out, weights = tmp_path / "out", ("--weight", 0.75, "--weight", 0.5)
    result = small.run("merge", base, *adapters, "-o", out, *weights)
    assert result.exit_code == 0, result.output
    assert "1. " in result.output
    assert "weight 0.75" in result.output
    manifest = json.loads((out / "dora_export.json").read_text())
    assert [a["weight"] for a in manifest["adapters"]] == [0.75, 0.5]
    assert [a["path"] for a in manifest["adapters"]] == ["adapter", "second"]
    assert manifest["options"]["weights"] == [0.75, 0.5]
    card = (out / "README.md").read_text()
    assert "`adapter` at weight 0.75 and the" in card
    assert "in this order" in card
    assert small.run("verify", base, *adapters, out).exit_code == 0  # weights by the manifest
    assert small.run("verify", base, *adapters, out, *weights).exit_code == 0
    assert small.run("verify", base, *adapters, out, "--weight", 0.75, "--weight", 0.6).exit_code
    assert small.run("verify", base, adapters[0], out, "--weight", 0.75).exit_code == 1
    assert small.run("verify", base, *adapters[::-1], out).exit_code == 1


# --- the formula, at any weights, axes and precisions

S1, S2 = 1.7, 0.6


def stacked(folder, dtype, axes, shape=(24, 40), seed=4):
    """One weight with two trained updates, and their terms in float64."""
    make = torch.Generator().manual_seed(seed)
    W = (torch.randn(shape, generator=make) * 0.1).to(dtype)
    flat = (shape[0], int(np.prod(shape[1:])))
    tensors, terms, updates = {}, [], []
    for i, axis in enumerate(axes):
        A = torch.randn(3 + i, flat[1], generator=make) * 0.2
        B = torch.randn(flat[0], 3 + i, generator=make) * 0.2
        count = {"out": shape[0], "in": shape[1], None: 0}[axis]
        m = torch.rand(count, generator=make) + 0.5
        tensors |= {f"A{i}": A, f"B{i}": B} | ({f"m{i}": m} if axis else {})
        terms.append([*(oracle.float64(x) for x in (A, B, m)), (S1, S2)[i]])
    bench = Bench(folder, {"x.weight": W}, **tensors)
    for i, axis in enumerate(axes):
        keys = (f"A{i}", f"B{i}", *((f"m{i}",) if axis else ()))
        magnitude = {"magnitude": bench.vector(f"m{i}"), "axis": axis} if axis else {}
        update = Update("x.weight", "dora" if axis else "lora", keys, layout="oi",
                        down=bench.matrix(f"A{i}"), up=bench.matrix(f"B{i}"),
                        scaling=(S1, S2)[i], **magnitude)  # fmt: skip
        refs = {key: bench.refs[key] for key in keys}
        updates.append(Adapter(bench.path, "bench", (bench.path,), refs, (update,)))
    return bench, updates, oracle.float64(W), terms


def composed(W, terms, axes, weights):
    """``V_i = V_(i-1) + w_i (f_i (V_(i-1) + s_i B_i A_i) - V_(i-1))``, by plain definition."""
    V = W
    for (A, B, m, s), axis, w in zip(terms, axes, weights, strict=True):
        delta = (s * B @ A).reshape(W.shape)
        after = V + delta
        if axis is not None:
            kept = 0 if axis == "out" else 1
            norm = peft_models.over_all_but(W + delta, kept)
            after = after * m.reshape(norm.shape) / norm
        V = V + w * (after - V)
    return V


def merged(bench, adapters, **settings):
    plan = plan_merge(bench._base, adapters, Settings(**settings))
    sink = Memory(plan)
    Engine(plan, sink, Resources(threads=2)).run()
    return plan, load(sink.files[0].tobytes())["x.weight"]


AXES = list(itertools.product(["out", "in", None], repeat=2))


@pytest.mark.parametrize("shape", [(40, 40), (12, 10, 3, 2), (1500, 300)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("axes", AXES, ids=str)
def test_merge_is_the_composition_rounded_once(tmp_path, axes, dtype, shape):
    bench, adapters, W, terms = stacked(tmp_path, dtype, axes, shape)
    for weights in ((1.0, 1.0), (0.75, -0.5)):
        plan, got = merged(bench, adapters, weights=weights)
        exact = composed(W, terms, axes, weights)
        assert oracle.ulps(got, exact) <= 0.5 + 1e-4
        for level in ("fast", "full"):
            stored = bench.stored(tmp_path, {"x.weight": got})
            _, (result,), findings = check_oracle(plan, stored, level)
            assert (result.status, findings) == ("exact", ())


@pytest.mark.parametrize("axes", [("out", "out"), ("in", "out"), ("out", None)], ids=str)
def test_other_readings_are_told_apart(tmp_path, axes):
    bench, adapters, W, terms = stacked(tmp_path, torch.float32, axes)
    plan, got = merged(bench, adapters)
    one, two = ([[t], [a], [1]] for t, a in zip(terms, axes, strict=True))
    ways = {
        "the first alone": composed(W, *one),
        "the other order": composed(W, terms[::-1], axes[::-1], (1, 1)),
        "norms of what was merged before": composed(composed(W, *one), *two),
        "sum of differences": composed(W, *one) + composed(W, *two) - W,
    }
    if axes[1] is None:  # LoRA after DoRA: these two are the same
        del ways["norms of what was merged before"], ways["sum of differences"]
    codes = {"the first alone": "adapter-left-out", "the other order": "adapters-reordered",
             "norms of what was merged before": "norms-of-merged",
             "sum of differences": "wrong-values"}  # fmt: skip
    for way, wrong in ways.items():
        assert oracle.ulps(got, wrong) > 1000, way
        stored = bench.stored(tmp_path, {"x.weight": torch.from_numpy(wrong).float()})
        for level in ("full", "fast"):
            _, (result,), (finding,) = check_oracle(plan, stored, level)
            assert (result.status, finding.code) == ("wrong", codes[way]), way


@pytest.mark.parametrize("axes", AXES, ids=str)
def test_strength_is_of_the_whole(tmp_path, axes):
    bench, adapters, W, terms = stacked(tmp_path, torch.float32, axes)
    _, got = merged(bench, adapters, weights=(0.5, 2.0), strength=0.3)
    exact = W + 0.3 * (composed(W, terms, axes, (0.5, 2.0)) - W)
    assert oracle.ulps(got, exact) <= 0.5 + 1e-4


def test_bytes_do_not_depend_on_threads_and_blocks(tmp_path):
    bench, adapters, _, _ = stacked(tmp_path, torch.bfloat16, ("in", "out"), (3000, 300))
    plan = plan_merge(bench._base, adapters, Settings(weights=(0.9, 1.1)))
    found = set()
    for threads, block in ((1, None), (2, 4096), (3, 1 << 20)):
        sink = Memory(plan)
        Engine(plan, sink, Resources(threads=threads, block_bytes=block)).run()
        found.add(sink.files[0].tobytes())
    assert len(found) == 1


@pytest.mark.parametrize("zero_norm", ["zero", "keep-base"])
def test_row_without_direction_keeps_what_was_there_or_is_zero(tmp_path, zero_norm):
    bench, adapters, W, terms = stacked(tmp_path, torch.float32, ("out", "out"))
    terms[1][1][:] = 0  # the second changes magnitudes alone, and row 5 of the base is zero
    base = torch.from_numpy(W).float()
    base[5] = 0
    A, B, m = (torch.from_numpy(t).float() for t in terms[0][:3])
    tensors = {"A0": A, "B0": B, "m0": m, "A1": torch.from_numpy(terms[1][0]).float(),
               "B1": torch.zeros(24, 4), "m1": torch.from_numpy(terms[1][2]).float()}  # fmt: skip
    save_file(base_tensors := {"x.weight": base}, tmp_path / "model.safetensors")
    bench = Bench(tmp_path, base_tensors, **tensors)
    with pytest.raises(dora_export.DoraExportError, match=r"zero in 1 rows \(5\).*--zero-norm"):
        merged(bench, adapters)
    plan, got = merged(bench, adapters, zero_norm=zero_norm)
    first = composed(oracle.float64(base), terms[:1], ("out",), (1.0,))
    assert oracle.ulps(got[5:6], first[5:6] * (zero_norm == "keep-base")) <= 0.5 + 1e-4
    stored = bench.stored(tmp_path, {"x.weight": got})
    assert check_oracle(plan, stored, "full")[1][0].status == "exact"


# --- adapters that go together, and those that do not


def pair(folder, **second):
    """A base of small.py with two DoRA adapters."""
    tensors = small.base_tensors(dtype=torch.float32)
    base = small.write_base(folder / "base", tensors)
    first = small.write_adapter(folder / "first", small.adapter_tensors(tensors))
    other = small.write_adapter(folder / "second", small.adapter_tensors(tensors, 2), **second)
    return base, first, other


def keep_tensors(folder, wanted):
    """Take away the tensors of an adapter that are not wanted."""
    path = folder / "adapter_model.safetensors"
    small.edit_tensors(path, lambda ts: {n: t for n, t in ts.items() if wanted(n)})


def add_tensors(folder, more):
    """Add tensors to an adapter."""
    path = folder / "adapter_model.safetensors"
    named = {small.PREFIX + name: tensor for name, tensor in more.items()}
    small.edit_tensors(path, lambda ts: {**ts, **named})


def test_adapters_on_different_tensors_are_as_each_alone(tmp_path):
    base, first, other = pair(tmp_path)
    for folder, module in ((first, "q_proj"), (other, "down_proj")):
        keep_tensors(folder, lambda name, m=module: m in name)
        small.edit_json(folder / "adapter_config.json", target_modules=[module])
    dora_export.merge(base, [first, other], tmp_path / "both")
    dora_export.merge(base, [other, first], tmp_path / "reversed")
    dora_export.merge(base, first, tmp_path / "one")
    dora_export.merge(base, other, tmp_path / "two")
    both, turned, one, two = (
        load_file(tmp_path / n / "model.safetensors") for n in ("both", "reversed", "one", "two")
    )
    for name, tensor in both.items():
        alone = one if "q_proj" in name else two
        assert torch.equal(tensor, alone[name])
        assert torch.equal(tensor, turned[name])


def test_one_adapter_with_a_weight_is_that_strength(tmp_path):
    base, first, _ = pair(tmp_path)
    dora_export.merge(base, first, tmp_path / "weight", weights=[0.4], verify="full")
    dora_export.merge(base, first, tmp_path / "strength", strength=0.4)
    one, other = (load_file(tmp_path / n / "model.safetensors") for n in ("weight", "strength"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert api.verify(base, first, tmp_path / "weight").verdict == "right"


def test_names_are_resolved_for_each_adapter(tmp_path):
    base, first, other = pair(tmp_path)
    dora_export.merge(base, [first, other], tmp_path / "out")
    small.edit_tensors(other / "adapter_model.safetensors", lambda ts: {
        n.replace("model.model.layers", "model.layers"): t for n, t in ts.items()})  # fmt: skip
    report = dora_export.merge(base, [first, other], tmp_path / "renamed")
    assert "added" in report.names
    one, two = (load_file(tmp_path / n / "model.safetensors") for n in ("out", "renamed"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_identity_covers_order_and_weights(tmp_path):
    base, first, other = pair(tmp_path)

    def of(adapters, **settings):
        read = [read_adapter(path, ReadOptions()) for path in adapters]
        plan = plan_merge(open_checkpoint(base), read, Settings(**settings))
        return identity.job(plan, Resources(threads=1), identity.adapter_digests(plan)).identity

    plain = of([first, other])
    assert plain == of([first, other])
    assert plain["adapter 1 adapter_model.safetensors"] != plain[
        "adapter 2 adapter_model.safetensors"]  # fmt: skip
    for changed in (of([other, first]), of([first, other], weights=(0.5, 1.0)),
                    of([first, other], weights=(1.0, 0.5))):  # fmt: skip
        assert changed != plain


def whole_copies(folder, scale):
    """Give both adapters a whole copy of the norm, the second one's times ``scale``."""
    copy = torch.linspace(1, 2, 12)
    for name, factor in (("first", 1.0), ("second", scale)):
        add_tensors(folder / name, {"model.norm.weight": copy * factor})
        small.edit_json(folder / name / "adapter_config.json", modules_to_save=["norm"])
    return copy


@pytest.mark.parametrize("weights", [(), (1.0, 1.0), (0.7, 0.3), (1.5, -0.5)], ids=str)
def test_the_same_whole_copy_in_both_is_that_copy(tmp_path, weights):
    base, first, other = pair(tmp_path)
    copy = whole_copies(tmp_path, 1.0)
    dora_export.merge(base, [first, other], tmp_path / "out", weights=weights, verify="full")
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["model.norm.weight"], copy)


def test_the_same_whole_copy_at_open_weights_is_refused(tmp_path):
    base, first, other = pair(tmp_path)
    whole_copies(tmp_path, 1.0)
    with pytest.raises(PlanError, match=r"model\.norm.*0\.7, 0\.7.*add up to 1, or 1 for each"):
        dora_export.merge(base, [first, other], tmp_path / "out", weights=[0.7, 0.7])
    assert not (tmp_path / "out").exists()


def test_two_whole_copies_are_refused(tmp_path):
    base, first, other = pair(tmp_path)
    whole_copies(tmp_path, 2.0)
    remedy = r"model\.norm.*own whole copy of it \(adapters 1 and 2\)[\s\S]*Leave one of them out"
    with pytest.raises(PlanError, match=remedy):
        dora_export.merge(base, [first, other], tmp_path / "out")


def test_a_whole_copy_of_one_is_weighted_like_the_rest(tmp_path):
    base, first, other = pair(tmp_path)
    copy = whole_copies(tmp_path, 1.0)
    keep_tensors(other, lambda name: "norm" not in name)
    small.edit_json(other / "adapter_config.json", modules_to_save=None)
    options = {"weights": [0.25, 1.0], "verify": "full"}
    dora_export.merge(base, [first, other], tmp_path / "out", **options)
    W = oracle.float64(load_file(base / "model.safetensors")["model.norm.weight"])
    exact = W + 0.25 * (oracle.float64(copy) - W)
    got = load_file(tmp_path / "out" / "model.safetensors")["model.norm.weight"]
    assert oracle.ulps(got, exact) <= 0.5 + 1e-6
    assert api.verify(base, [first, other], tmp_path / "out").verdict == "right"


def on_embedding(folder, name, tensors, **fields):
    """Add tensors about the embedding to an adapter."""
    named = {f"model.embed_tokens.{n}": t for n, t in tensors.items()}
    add_tensors(folder / name, named)
    small.edit_json(folder / name / "adapter_config.json", **fields)


LORA = {"lora_embedding_A": torch.ones(3, 40) * 0.1, "lora_embedding_B": torch.ones(12, 3) * 0.1}
TARGETS = ["q_proj", "down_proj", "embed_tokens"]


def tokens(rows):
    return {"token_adapter.trainable_tokens_delta": torch.ones(len(rows), 12)}


def indices(rows):
    return {"trainable_token_indices": {"embed_tokens": rows}}


TOGETHER = {
    "a whole copy and LoRA": (
        ({"weight": torch.ones(40, 12)}, {"modules_to_save": ["embed_tokens"]}),
        (LORA, {"target_modules": TARGETS, "use_dora": False}),
        "one replaces it, the other changes it",
    ),
    "the same tokens": (
        (tokens([3, 4]), indices([3, 4])), (tokens([4, 5]), indices([4, 5])),
        r"each trained its own rows \[4\]",
    ),
    "tokens and LoRA": (
        (tokens([3]), indices([3])), (LORA, {"target_modules": TARGETS, "use_dora": False}),
        "trained tokens and LoRA on one tensor have no defined order",
    ),
    "vocabularies of two sizes": (
        ({"weight": torch.ones(42, 12)}, {}), ({"weight": torch.ones(44, 12)}, {}),
        "each brings its own whole copy",
    ),
}  # fmt: skip


def test_adapters_of_other_stacks_of_layers_are_refused(tmp_path):
    base, adapter = small.write_pair(tmp_path)
    shutil.copytree(adapter, tmp_path / "other")
    small.edit_json(tmp_path / "other/adapter_config.json", layer_replication=[[0, 2], [1, 2]])
    with pytest.raises(PlanError, match=r"other stacks of the base's layers .*Merge them apart"):
        dora_export.merge(base, [adapter, tmp_path / "other"], tmp_path / "out")


def test_an_adapter_given_twice_is_refused_by_whatever_path(tmp_path):
    base, adapter = small.write_pair(tmp_path)
    (tmp_path / "link").symlink_to(adapter)
    for again in (adapter, tmp_path / "link", tmp_path / "base/../adapter"):
        with pytest.raises(PlanError, match=r"given twice\. Leave it out once; .* pass --weight"):
            dora_export.merge(base, [adapter, again], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("case", TOGETHER)
def test_what_has_no_defined_meaning_is_refused(tmp_path, case):
    one, two, remedy = TOGETHER[case]
    tensors = small.base_tensors(dtype=torch.float32)
    config = {**small.CONFIG, "tie_word_embeddings": False, "vocab_size": 40}
    base = small.write_base(tmp_path / "base", tensors, config=config)
    for name, (more, fields), seed in (("first", one, 1), ("second", two, 2)):
        small.write_adapter(tmp_path / name, small.adapter_tensors(tensors, seed, dora=False),
                            use_dora=False)  # fmt: skip
        on_embedding(tmp_path, name, more, **fields)
    result = small.run("merge", base, tmp_path / "first", tmp_path / "second", "-o",
                       tmp_path / "out")  # fmt: skip
    assert result.exit_code == 2, result.output
    assert "cannot be merged together" in result.stderr
    assert re.search(remedy, result.stderr)
    assert not (tmp_path / "out").exists()


def test_tokens_of_each_adapter_are_both_there(tmp_path):
    tensors = small.base_tensors(dtype=torch.float32)
    config = {**small.CONFIG, "tie_word_embeddings": False}
    base = small.write_base(tmp_path / "base", tensors, config=config)
    for name, rows, seed in (("first", [3, 4], 1), ("second", [7], 2)):
        small.write_adapter(tmp_path / name, small.adapter_tensors(tensors, seed))
        on_embedding(tmp_path, name, tokens(rows), **indices(rows))
    adapters = [tmp_path / "first", tmp_path / "second"]
    dora_export.merge(base, adapters, tmp_path / "out", weights=[1, 0.5], verify="full")
    got = load_file(tmp_path / "out" / "model.safetensors")["model.embed_tokens.weight"]
    exact = tensors["model.embed_tokens.weight"].double()
    exact[[3, 4]] = 1
    exact[7] += 0.5 * (1 - exact[7])
    assert oracle.ulps(got, exact.numpy()) <= 0.5 + 1e-6


def test_divided_magnitudes_do_not_mix(tmp_path):
    base, first, other = pair(tmp_path)
    with pytest.raises(PlanError, match="divided by the norm beforehand do not mix"):
        dora_export.merge(base, [first, other], tmp_path / "out", magnitude_is_normalised=True)


@pytest.mark.parametrize("weights", [[1.0], [1.0, 2.0, 3.0]])
def test_weights_are_one_per_adapter(tmp_path, weights):
    base, first, other = pair(tmp_path)
    with pytest.raises(PlanError, match="--weight once per adapter"):
        dora_export.merge(base, [first, other], tmp_path / "out", weights=weights)


def test_tokenizers_that_differ_are_refused_and_equal_ones_taken(tmp_path):
    base, first, other = pair(tmp_path)
    for folder in (first, other):
        (folder / "tokenizer.json").write_text('{"version": "2.0"}\n')
    dora_export.merge(base, [first, other], tmp_path / "out")
    assert "2.0" in (tmp_path / "out" / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text('{"version": "3.0"}\n')
    with pytest.raises(PlanError, match=r"another tokenizer\.json.*Move the tokenizer files"):
        dora_export.merge(base, [first, other], tmp_path / "again")


def test_merged_base_is_refused_with_the_names_of_what_is_in_it(tmp_path):
    base, first, other = pair(tmp_path)
    dora_export.merge(base, [first, other], tmp_path / "out")
    with pytest.raises(PlanError, match="has first, second merged into it already"):
        dora_export.merge(tmp_path / "out", first, tmp_path / "again")
