"""The forward tier on mixtures of experts: every expert is watched, whoever stores it how."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import dora_export
from dora_export.verification.measured import Unsupported
from dora_export.verification.mixture import Cell, UnmergedStack
from dora_export.verification.unmerged import Parts
from tests import moe_models
from tests.moe_models import prepare
from tests.peft_models import edit_config
from tests.rider_models import WARNINGS, rewrite
from tests.small import PREFIX

# Reasons stand beside the entries.
pytestmark = [
    *(pytest.mark.filterwarnings(w) for w in WARNINGS),
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match"),
]


def verified(case, merged):
    return dora_export.verify(case.base, case.adapter, merged, level="fast", forward=True)


def figures(report):
    (tier,) = [t for t in report.tiers if t.tier == "forward"]
    return tier.figures


def change(folder, edit):
    def changed(held):
        edit(held)
        return held

    rewrite(folder, changed)


NIGHTLY = pytest.mark.nightly
RIGHT = [("mixtral", True), pytest.param("mixtral", False, marks=NIGHTLY), ("deepseek_v3", True),
         pytest.param("gpt_oss", False, marks=NIGHTLY), ("llama4", False),
         pytest.param("qwen3_vl_moe", False, marks=NIGHTLY)]  # fmt: skip


@pytest.mark.parametrize(("kind", "original"), RIGHT)
def test_a_right_merge_passes_with_every_expert_seen(kind, original, tmp_path):
    case = prepare(tmp_path, kind, original=original)
    report = dora_export.merge(case.base, case.adapter, tmp_path / "out")
    found = verified(case, tmp_path / "out")
    assert (found.exit_code, found.findings) == (0, ())
    measured = figures(found)
    assert len(measured["layers"]) == report.tensors["merged"]
    assert all(layer["effect"]["rms"] > 10 * layer["error"]["rms"] for layer in measured["layers"])
    assert measured["peft"]["outputs"], measured["peft"]["said"]


APART = "model.layers.1.mlp.experts.{}.{}.weight"
FUSED = "model.layers.1.mlp.experts.{}"


def exchange(held, one, other):
    held[one], held[other] = held[other].clone(), held[one].clone()


def base_expert(held, base):
    name = APART.format(2, "up_proj")
    held[name] = base[name]


MISTAKES = {
    "two experts exchanged": lambda h, b: exchange(
        h, APART.format(0, "down_proj"), APART.format(1, "down_proj")
    ),
    "gate and up exchanged": lambda h, b: exchange(
        h, APART.format(3, "gate_proj"), APART.format(3, "up_proj")
    ),
    "one expert left out": base_expert,
}


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """Qwen3-MoE with an adapter on its experts, and its right merge."""
    folder = tmp_path_factory.mktemp("qwen")
    case = prepare(folder, "qwen3_moe")
    dora_export.merge(case.base, case.adapter, folder / "out")
    return case, folder / "out"


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_one_expert_is_a_layer_that_differs(mistake, qwen, tmp_path):
    case, right = qwen
    shutil.copytree(right, tmp_path / "out")
    base = moe_models.tensors(case.base)
    change(tmp_path / "out", lambda held: MISTAKES[mistake](held, base))
    found = verified(case, tmp_path / "out")
    assert found.exit_code == 1
    assert any(f.code == "layer-differs" and ".experts." in f.where for f in found.findings)


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_a_mistake_in_one_slice_is_a_layer_that_differs(kind, tmp_path):
    case = prepare(tmp_path, kind, original=False)
    dora_export.merge(case.base, case.adapter, tmp_path / "out")
    (name,) = [n for n in moe_models.tensors(case.base) if n.endswith("1.mlp.experts.down_proj")
               or ".1.feed_forward.experts.down_proj" in n]  # fmt: skip

    def roll(held):
        held[name] = held[name].roll(1, 0)

    change(tmp_path / "out", roll)
    found = verified(case, tmp_path / "out")
    assert found.exit_code == 1
    assert ("layer-differs", name) in [(f.code, f.where) for f in found.findings]


@pytest.mark.parametrize(
    "original",
    [True, pytest.param(False, marks=NIGHTLY)],
    ids=["checkpoint names", "class names"],
)
def test_an_expert_that_no_token_is_routed_to_is_checked_all_the_same(original, tmp_path):
    case = prepare(tmp_path, "qwen3_moe", original=original)
    for layer in range(2):
        change(case.base, lambda h, i=layer: h[f"model.layers.{i}.mlp.gate.weight"].zero_())
    dora_export.merge(case.base, case.adapter, tmp_path / "out")
    right = verified(case, tmp_path / "out")
    assert (right.exit_code, right.findings) == (0, ())

    idle = sorted({0, 1, 2, 3} - {*torch.zeros(4).topk(2).indices.tolist()})  # of equal logits

    def one_as_the_other(held):
        if original:
            held[APART.format(idle[0], "down_proj")] = held[APART.format(idle[1], "down_proj")] * 1
        else:
            held[FUSED.format("down_proj")][idle[0]] = held[FUSED.format("down_proj")][idle[1]]

    change(tmp_path / "out", one_as_the_other)
    found = verified(case, tmp_path / "out")
    assert any(f.code == "layer-differs" for f in found.findings)
    assert not any(f.code == "outputs-differ" for f in found.findings)


@pytest.mark.parametrize(
    ("kind", "original"), [("mixtral", False), pytest.param("qwen3_moe", True, marks=NIGHTLY)]
)
def test_dora_on_single_experts_passes_on_either_base(kind, original, tmp_path):
    """Stacked classes have no DoRA in PEFT, but the weights of earlier adapters do."""
    case = prepare(tmp_path, kind, original=original)
    names = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"} if kind == "mixtral" else {}
    stacks = case.wrapped.get_base_model().state_dict()
    make = torch.Generator().manual_seed(3)
    held = {}
    for layer in range(2):
        path = f"model.layers.{layer}.mlp.experts"
        both = next(t for n, t in stacks.items() if path in n and "gate_up_proj" in n)
        down = next(t for n, t in stacks.items() if path in n and "down_proj" in n)
        for e in range(moe_models.EXPERTS):
            gate, up = both[e].chunk(2)
            for part, W in {"gate_proj": gate, "up_proj": up, "down_proj": down[e]}.items():
                key = f"{PREFIX}{path}.{e}.{names.get(part, part)}"
                out, inner = W.shape
                held[f"{key}.lora_A.weight"] = torch.randn(3, inner, generator=make) * 0.2
                held[f"{key}.lora_B.weight"] = torch.randn(out, 3, generator=make) * 0.2
                m = W.norm(dim=1) * (0.7 + 0.6 * torch.rand(out, generator=make))
                held[f"{key}.lora_magnitude_vector"] = m
    save_file(held, case.adapter / "adapter_model.safetensors", {"format": "pt"})
    edit_config(case.adapter, target_parameters=None, use_dora=True,
                target_modules=list(names.values()) or list(moe_models.PARTS))  # fmt: skip
    dora_export.merge(case.base, case.adapter, tmp_path / "out", verify="full")
    found = verified(case, tmp_path / "out")
    assert [f.code for f in found.findings if f.code != "peft-differs"] == []
    assert found.exit_code == 0
    before = load_file(case.base / "model.safetensors")
    change(
        tmp_path / "out", lambda h: h.update({n: t for n, t in before.items() if "layers.1" in n})
    )
    assert verified(case, tmp_path / "out").exit_code == 1


# --- what a stack lets itself be used for


def stack(experts=2):
    base = torch.randn(experts, 3, 4)
    found = UnmergedStack.of(base)
    found.add_cell(Cell(Parts("experts.down_proj", base[1], (), index=1), 1))
    return base, found


def test_a_stack_computes_by_slices_and_all_at_once():
    base, found = stack()
    x = torch.randn(2, 5, 3)
    assert torch.equal(torch.bmm(x, found), torch.bmm(x, base))
    assert torch.equal(x[0] @ found[1], x[0] @ base[1])
    assert torch.equal(nn.functional.linear(torch.ones(4), found[torch.tensor(0)]), base[0].sum(1))
    assert found.shape == base.shape


@pytest.mark.parametrize(
    "use",
    [
        lambda s: s + 1,
        lambda s: s[torch.tensor([0, 1])],
        lambda s: s[1].sum(),
        lambda s: torch.bmm(s, torch.ones(2, 4, 3)),
        lambda s: torch.matmul(torch.ones(3), torch.ones(3, 2)) @ s[1][:2],
    ],
    ids=["plus", "gathered", "sum", "on the left", "sliced"],
)
def test_any_other_use_of_a_stack_is_told_and_not_the_base_values(use):
    with pytest.raises(Unsupported, match="the model uses"):
        use(stack()[1])
