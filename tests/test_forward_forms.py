"""Forms of a changed weight beside one product and one norm, run unmerged: each against its own
definition in numpy or the trainer's own forward, in float64.
"""

import numpy as np
import pytest
import torch
from lycoris.modules import LoConModule
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import RegNetConfig, RegNetForImageClassification

import dora_export
from dora_export.adapters import ReadOptions, read_adapter
from dora_export.checkpoints import open_checkpoint
from dora_export.plan import Settings, Step, plan_merge
from dora_export.residual import Residual
from dora_export.tensors import DTYPES, Operand
from dora_export.update import Update
from dora_export.verification import models, terms, unmerged
from dora_export.verification.forward import check_forward
from dora_export.verification.hypotheses import mistaken
from dora_export.verification.inputs import Batch
from dora_export.verification.measured import Unsupported
from dora_export.verification.reference import Reference, numbers
from tests import moe_models, rider_models, small
from tests.forward_models import change
from tests.lycoris_models import eps_of, state, train
from tests.rider_models import VOCABULARY, WARNINGS
from tests.test_forward import SHAPES, held, use_of

# Reasons stand beside the entries.
pytestmark = [pytest.mark.filterwarnings(w) for w in WARNINGS]


def arranged(kind, values):
    """A stored weight as (out, inner), or such a matrix as it is stored."""
    return values.T if kind in ("fan in", "embedding") else values.reshape(len(values), -1)


def product(kind, shape, make, rows=None):
    """An update by a product, and what it adds to a weight as stored."""
    whole = shape if rows is None else (rows[1] - rows[0], *shape[1:])
    out, inner = arranged(kind, np.empty(whole)).shape
    A, B = make.normal(size=(2, inner)), make.normal(size=(out, 2))
    update = Update("w", "lora", (), Operand.plain(held("A", A)), Operand.plain(held("B", B)),
                    scaling=0.7, layout="io" if kind in ("fan in", "embedding") else "oi",
                    rows=rows)  # fmt: skip
    added = 0.7 * B @ A
    return update, added.T.reshape(whole) if update.layout == "io" else added.reshape(whole)


def lengths(kind, V, axis, channels):
    """The norm of each element's line, broadcast to the weight as stored."""
    seen = arranged(kind, V)
    if axis == "out":
        norms = np.sqrt((seen * seen).sum(axis=1, keepdims=True))
    else:
        split = seen.reshape(len(seen), channels, -1)
        norms = np.sqrt((split * split).sum(axis=(0, 2)))
        norms = np.repeat(norms, seen.shape[1] // channels)
    full = np.broadcast_to(norms, seen.shape)
    return full.T if kind in ("fan in", "embedding") else full.reshape(V.shape)


def spread(kind, m, axis, shape):
    """A magnitude for each element of a weight as stored."""
    seen = arranged(kind, np.empty(shape)).shape
    full = np.broadcast_to(m[:, None] if axis == "out" else np.repeat(m, seen[1] // len(m)), seen)
    return full.T if kind in ("fan in", "embedding") else full.reshape(shape)


def case(name, kind, shape, make):
    """Updates of a weight, in order, and the values that they make of it."""
    W = make.normal(size=shape)
    expected = W.copy()
    tail = (0, *shape[1:])
    if name in ("rows, then product", "product, then rows", "rows, then norm"):
        values = make.normal(size=(2, *shape[1:]))
        rows = Update("w", "rows", (), value=held("v", values), row_indices=(3, 1))
        if name == "rows, then norm":
            expected[[3, 1]] = values
            return W, [rows, *normed(kind, expected, make)]
        lora, added = product(kind, shape, make)
        if name.startswith("rows"):
            expected[[3, 1]] = values
            expected += added
            return W, [rows, lora], expected
        expected += added
        expected[[3, 1]] = values
        return W, [lora, rows], expected
    if name in ("part replaced, then product", "part added, then norm", "part with product, norm"):
        values = make.normal(size=(2, *tail[1:]))
        kinds = {"part replaced, then product": "replace", "part added, then norm": "add"}
        if name in kinds:
            part = Update("w", kinds[name], (), value=held("v", values), rows=(1, 3), scaling=1.0)
            expected[1:3] = values + (expected[1:3] if kinds[name] == "add" else 0.0)
        else:
            part, added = product(kind, shape, make, rows=(1, 3))
            expected[1:3] += added
        if not name.endswith("norm"):
            lora, added = product(kind, shape, make)
            return W, [part, lora], expected + added
        return W, [part, *normed(kind, expected, make)]
    raise AssertionError(name)


def normed(kind, V, make):
    """A norm of what is there, by rows as stored, and the values it makes."""
    axis = "in" if kind in ("fan in", "embedding") else "out"
    m = make.uniform(0.5, 2, size=len(V))
    lora, added = product(kind, V.shape, make)
    update = Update("w", "dora", (), lora.down, lora.up, 0.7, Operand.plain(held("m", m)), axis,
                    layout=lora.layout)  # fmt: skip
    sum_ = V + added
    return update, sum_ * spread(kind, m, axis, V.shape) / lengths(kind, sum_, axis, len(m))


CASES = [
    "rows, then product",
    "product, then rows",
    "rows, then norm",
    "part replaced, then product",
    "part added, then norm",
    "part with product, norm",
]


def parts_of(W, updates, strength=1.0):
    step = Step("w", DTYPES["F64"], held("w", W), tuple(u.change(W.shape) for u in updates),
                status="merged")  # fmt: skip
    return unmerged.Parts("w", torch.from_numpy(W), terms.terms(step, Settings()), strength)


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("name", CASES)
def test_stored_values_beside_a_product_give_what_the_merged_weight_would(name, kind):
    torch.manual_seed(1)
    made = case(name, kind, SHAPES[kind], np.random.default_rng(4))
    if len(made) == 2:
        W, (first, update, expected) = made
        updates = [first, update]
    else:
        W, updates, expected = made
    use, x = use_of(kind, torch.from_numpy(W))
    for strength in (1.0, 0.4):
        parts = parts_of(W, updates, strength)
        exact = use.plain(x, torch.from_numpy(W + strength * (expected - W)))
        for same in (parts, parts.measured()):  # float64's own norms are the float64 norms
            assert torch.allclose(same.compute(use, x), exact, rtol=0, atol=1e-12)
    for some in ([updates[0]], [updates[1]], updates[::-1]):
        if "norm" in name and some[0] is updates[1]:
            continue  # a norm that something comes after
        other = parts_of(W, some).compute(use, x)
        assert (other - use.plain(x, torch.from_numpy(expected))).abs().max() > 0.1


@pytest.mark.parametrize("given", [False, True], ids=["norm", "factor"])
def test_a_norm_across_the_rows_of_a_part_leaves_the_others_alone(given):
    """As magnitudes per input have it, in one of the projections that a checkpoint fuses."""
    make = np.random.default_rng(2)
    W, A, B, m = (make.normal(size=s) for s in ((9, 8), (2, 8), (3, 2), 8))
    update = Update("w", "dora", (), Operand.plain(held("A", A)), Operand.plain(held("B", B)), 0.7,
                    Operand.plain(held("m", m)), "in", rows=(3, 6), eps=0.0 if given else 0.01,
                    magnitude_is_factor=given)  # fmt: skip
    V = W[3:6] + 0.7 * B @ A
    expected = W.copy()
    expected[3:6] = V * m if given else V * m / (np.sqrt((V * V).sum(axis=0)) + 0.01)
    parts = parts_of(W, [update])
    x = torch.from_numpy(make.normal(size=(5, 8)))
    exact = x @ torch.from_numpy(expected).T
    for same in (parts, parts.measured(), parts.to(torch.float64)):
        assert torch.allclose(same.compute(unmerged.LINEAR, x), exact, rtol=0, atol=1e-12)
    whole = W + np.pad(0.7 * B @ A, ((3, 3), (0, 0)))
    wrong = whole * m if given else whole * m / np.sqrt((whole * whole).sum(axis=0))
    assert (x @ torch.from_numpy(wrong).T - exact).abs().max() > 0.1
    dropped = mistaken(parts, "magnitudes dropped").compute(unmerged.LINEAR, x)
    assert torch.allclose(dropped, x @ torch.from_numpy(whole).T, rtol=0, atol=1e-12)


def test_a_part_that_is_made_from_all_of_it_leaves_the_others_alone():
    """A PiSSA residual of one projection of three."""
    make = np.random.default_rng(2)
    W = make.normal(size=(18, 8))
    parts = parts_of(W, [Update("w", "function", (), rows=(6, 12), layout="oi",
                                function=Residual("pissa", 2, 1.0))])  # fmt: skip
    u, s, v = np.linalg.svd(W[6:12], full_matrices=False)
    expected = W.copy()
    expected[6:12] -= (u[:, :2] * s[:2]) @ v[:2]
    x = torch.from_numpy(make.normal(size=(5, 8)))
    exact = x @ torch.from_numpy(expected).T
    assert torch.allclose(parts.compute(unmerged.LINEAR, x), exact, rtol=0, atol=1e-12)
    assert (exact - x @ torch.from_numpy(W).T).abs().max() > 0.1


def test_a_norm_of_what_another_norm_left_is_refused_by_name():
    make = np.random.default_rng(2)
    W = make.normal(size=(6, 8))
    first, V = normed("linear", W, make)
    with pytest.raises(Unsupported, match=r"^w: a norm after a change of kind dora"):
        parts_of(W, [first, normed("linear", V, make)[0]])


@pytest.mark.parametrize("axis", ["out", "in", None])
@pytest.mark.parametrize("groups", [2, 4])
def test_convolutions_in_groups_give_what_the_merged_weight_would(axis, groups):
    """Columns of the weight are the inputs of each group; 4 is a group per input channel."""
    torch.manual_seed(1)
    make = np.random.default_rng(4)
    shape = (8, 4 // groups, 3, 2)
    W = make.normal(size=shape)
    update, added = product("conv", shape, make)
    expected = W + added
    if axis:
        m = make.uniform(0.5, 2, size=8 if axis == "out" else shape[1])
        update = Update("w", "dora", (), update.down, update.up, 0.7, Operand.plain(held("m", m)),
                        axis, layout="oi")  # fmt: skip
        norms = lengths("conv", expected, axis, shape[1])
        expected = expected * spread("conv", m, axis, shape) / norms
    parts = parts_of(W, [update])
    x = torch.randn(2, 4, 7, 6, dtype=torch.float64)
    weight = unmerged.Unmerged.of(parts)
    found = torch.conv2d(x, weight, torch.ones(8).double(), stride=2, padding=1, groups=groups)
    exact = torch.conv2d(x, torch.from_numpy(expected), torch.ones(8).double(), stride=2,
                         padding=1, groups=groups)  # fmt: skip
    assert torch.allclose(found, exact, rtol=0, atol=1e-12)
    base = torch.conv2d(x, torch.from_numpy(W), stride=2, padding=1, groups=groups)
    assert (base + 1 - exact).abs().max() > 0.1


# --- whole models


def plan_of(base, *adapters):
    return plan_merge(open_checkpoint(base), [read_adapter(a, ReadOptions()) for a in adapters],
                      Settings())  # fmt: skip


def in_float64(plan):
    return Reference(plan, DTYPES["F64"], numbers(plan), models.class_of(plan))


def codes(plan, merged):
    return sorted({f.code for f in check_forward(plan, merged, tokens=0)[1]})


IDS = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(3))


def qdora(folder, model, layers):
    """A QDoRA file for some linear layers, and the model with the trainer's forward in them."""
    make = torch.Generator().manual_seed(5)
    stored = {}
    for name in layers:
        linear = model.get_submodule(name)
        W = linear.weight.detach()
        A = torch.randn(3, W.shape[1], generator=make) * 0.2
        B = torch.randn(len(W), 3, generator=make) * 0.2
        m = W.norm(dim=1) * (0.6 + 0.8 * torch.rand(len(W), generator=make))
        stored |= {f"{name}.dora_layer.lora_A.weight": A, f"{name}.dora_layer.lora_B.weight": B,
                   f"{name}.magnitude_layer.magnitude": m}  # fmt: skip
        linear.forward = forward_of(linear, A.double(), B.double(), m.double())
    save_file(stored, folder / "qdora.safetensors")
    return folder / "qdora.safetensors"


def forward_of(linear, A, B, m):
    """github.com/AnswerDotAI/fsdp_qlora, scripts/dora.py, DORALayer: the bias is scaled along."""

    def forward(x):
        y = nn.functional.linear(x, linear.weight, linear.bias)
        norm = (linear.weight + B @ A).norm(p=2, dim=1)
        return (y + x @ A.T @ B.T) * (m / norm)

    return forward


def test_biases_that_go_through_the_scaling_do_so_unmerged(tmp_path):
    model = rider_models.bert_classifier().eval()
    model.save_pretrained(tmp_path / "base")
    layers = ["bert.encoder.layer.0.attention.self.query", "bert.encoder.layer.1.output.dense"]
    adapter = qdora(tmp_path, model, layers)
    plan = plan_of(tmp_path / "base", adapter)
    biases = [s.name for s in plan.steps if s.changes and len(s.shape) == 1]
    assert biases == [f"{n}.bias" for n in layers]
    ours = in_float64(plan).outputs(Batch("test", {"input_ids": IDS}))["logits"]
    theirs = model.double()(input_ids=IDS).logits.detach().numpy()
    assert np.abs(ours - theirs).max() < 1e-12 * np.abs(theirs).max()

    dora_export.merge(tmp_path / "base", adapter, tmp_path / "out")
    assert codes(plan, tmp_path / "out") == []
    before = load_file(tmp_path / "base" / "model.safetensors")
    change(tmp_path / "out", lambda held: held.update({biases[0]: before[biases[0]]}))
    assert codes(plan, tmp_path / "out") == ["layer-differs", "outputs-differ"]


def test_experts_that_were_trained_whole_run_unmerged(tmp_path):
    """By MLX, a tensor per expert, in a class that stacks them."""
    torch.manual_seed(0)
    model = moe_models.qwen3_moe().eval()
    model.save_pretrained(tmp_path / "base", save_original_format=True)
    stored = moe_models.tensors(tmp_path / "base")
    trained = {n: t + 0.1 * torch.randn(t.shape, generator=torch.Generator().manual_seed(len(n)))
               for n, t in stored.items() if "layers.1." in n}  # fmt: skip
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_file(trained, adapter / "adapters.safetensors")
    small.write_json(adapter / "adapter_config.json",
                     {"fine_tune_type": "full", "num_layers": 1})  # fmt: skip
    plan = plan_of(tmp_path / "base", adapter)
    ours = in_float64(plan).outputs(Batch("test", {"input_ids": IDS}))["logits"]
    right = tmp_path / "right"
    model.save_pretrained(right, save_original_format=True)
    change(right, lambda held: held.update(trained))
    theirs = type(model).from_pretrained(right, dtype=torch.float64).eval()
    theirs.set_experts_implementation("eager")
    theirs = theirs(input_ids=IDS).logits.detach().numpy()
    assert np.abs(ours - theirs).max() < 1e-12 * np.abs(theirs).max()

    dora_export.merge(tmp_path / "base", adapter, tmp_path / "out")
    assert codes(plan, tmp_path / "out") == []
    name = next(n for n in trained if ".experts." in n and "down_proj" in n)
    change(tmp_path / "out", lambda held: held.update({name: stored[name]}))
    result, findings = check_forward(plan, tmp_path / "out", tokens=0)
    assert [f.where for f in findings if f.code == "layer-differs"] == [name]
    watched = [layer["name"] for layer in result.figures["layers"]]
    assert sorted(watched) == sorted(n for n in trained if ".experts." in n)


def test_convolutions_in_groups_run_unmerged_as_lycoris_computes_them(tmp_path):
    torch.manual_seed(0)
    config = RegNetConfig(embedding_size=8, hidden_sizes=[16, 24], depths=[1, 1], groups_width=8,
                          layer_type="x", num_labels=5)  # fmt: skip
    model = RegNetForImageClassification(config).eval()
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if "running_var" in name:
                buffer.uniform_(0.05, 0.15)
    model.save_pretrained(tmp_path / "base")
    paths = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.groups > 1]
    assert [model.get_submodule(p).groups for p in paths] == [2, 3]
    modules = {}
    for wd, path in zip((True, False), paths, strict=True):
        made = LoConModule("m", model.get_submodule(path), 1.0, 2, 3.0, weight_decompose=wd,
                           wd_on_out=True)  # fmt: skip
        modules[path] = train(made)
    adapter = tmp_path / "lycoris.safetensors"
    save_file(state(modules, prefix="lycoris"), adapter)
    plan = plan_of(tmp_path / "base", adapter)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    ours = in_float64(plan).outputs(Batch("test", {"pixel_values": images}))["logits"]
    model.double()
    for path, module in modules.items():
        module.double()
        module.apply_to()
        assert model.get_submodule(path).forward == module.forward
    with torch.no_grad(), eps_of(torch.float32):
        theirs = model(pixel_values=images.double()).logits.numpy()
    assert np.abs(ours - theirs).max() < 1e-12 * np.abs(theirs).max()

    dora_export.merge(tmp_path / "base", adapter, tmp_path / "out")
    assert codes(plan, tmp_path / "out") == []
    assert codes(plan, tmp_path / "base") == ["layer-differs", "outputs-differ"]
