"""Variants of PEFT's LoRA against PEFT's own forward: blocks, groups, pruned ranks, copied layers.

The reference is the weight that PEFT's adapted layer multiplies by in float64, asked of its forward
with unit inputs (tests/probe.py).
"""

import copy
import json

import numpy as np
import peft
import pytest
import torch
from peft.tuners.lora import variants as peft_variants
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

import dora_export
from dora_export.checkpoints import open_checkpoint
from dora_export.errors import AdapterError, PlanError
from dora_export.plan import Settings, plan_merge
from dora_export.verification.measured import Unsupported
from dora_export.verification.repeated import repeat_layers
from tests import oracle, probe, small
from tests import peft_models as models

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set"),  # Block has a Conv1D among Linears
]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TOLERANCE = 2e-6  # of float32, relative to the largest element; the others are held to one ulp
base_dtype = pytest.mark.parametrize("base", DTYPES)


class Block(nn.Module):
    """Layers whose names the variants' patterns are about; none square but one."""

    def __init__(self):
        super().__init__()
        self.q_proj = nn.Linear(24, 32)
        self.o_proj = nn.Linear(32, 24, bias=False)
        self.square = nn.Linear(24, 24)
        self.c_attn = Conv1D(36, 24)


def save(folder, wrapped):
    """Give every adapter tensor trained values and save base and adapter as PEFT does."""
    torch.manual_seed(3)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter) * 0.2
    models.save_base(folder / "base", wrapped.base_model.model)
    wrapped.save_pretrained(folder / "adapter")
    return folder / "base", folder / "adapter"


def fresh(model, dtype):
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.1)
    return model.to(dtype).eval()


def adapted(wrapped):
    """Module path -> the weight PEFT's forward multiplies by, float64, as the base stores it."""
    wrapped = wrapped.double().eval()
    layers = {
        path: module
        for path, module in wrapped.base_model.model.named_modules()
        if hasattr(module, "base_layer")
    }
    return {p: probe.weight(m, m.get_base_layer()).numpy() for p, m in layers.items()}


def assert_right(got, exact):
    """One ulp of the 16-bit types; 2e-6 of the largest element in float32."""
    if got.dtype is torch.float32:
        assert np.abs(oracle.float64(got) - exact).max() <= TOLERANCE * np.abs(exact).max()
    else:
        assert oracle.ulps(got, exact) <= 1


def is_wrong(got, other):
    """Whether the tolerance tells another formula's result from the right one."""
    unit = TOLERANCE * np.abs(other).max()
    if got.dtype is not torch.float32:
        unit = oracle.ulp(other, got.dtype)
    return (np.abs(oracle.float64(got) - other) / unit).max() > 20


def merged(base, adapter, out, **options):
    """Merge, verify apart from that, and return the tensors."""
    dora_export.merge(base, adapter, out, threads=1, verify="full", **options)
    assert dora_export.verify(base, adapter, out, **options).exit_code == 0
    return load_file(out / "model.safetensors")


# BD-LoRA


def made_bdlora(folder, dtype):
    blocks = peft.tuners.lora.config.BdLoraConfig(
        target_modules_bd_a=["o_proj"],
        target_modules_bd_b=["q_proj"],
        nblocks=2,
        match_strict=False,
    )
    config = peft.LoraConfig(
        r=6,
        lora_alpha=15,
        use_bdlora=blocks,
        target_modules=["q_proj", "o_proj", "square", "c_attn"],
    )
    return peft.get_peft_model(fresh(Block(), dtype), config)


@base_dtype
def test_block_diagonal_factors_merge_as_pefts_forward_computes(tmp_path, base):
    wrapped = made_bdlora(tmp_path, DTYPES[base])
    folders = save(tmp_path, wrapped)
    got = merged(*folders, tmp_path / "out")
    stored = load_file(folders[1] / "adapter_model.safetensors")
    assert stored[f"{models.PREFIX}o_proj.lora_A.weight"].shape == (6, 16)
    exact = adapted(wrapped)
    assert exact.keys() == {"q_proj", "o_proj", "square", "c_attn"}
    for path, weight in exact.items():
        assert_right(got[f"{path}.weight"], weight)
    A, B = (oracle.float64(stored[f"{models.PREFIX}o_proj.lora_{x}.weight"]) for x in "AB")
    W = oracle.float64(load_file(folders[0] / "model.safetensors")["o_proj.weight"])
    assert is_wrong(got["o_proj.weight"], W + 2.5 * B @ np.concatenate([A, A], axis=1))
    assert is_wrong(got["o_proj.weight"], W)


def test_block_diagonal_factors_of_another_count_are_refused(tmp_path):
    folders = save(tmp_path, made_bdlora(tmp_path, torch.float32))
    config = json.loads((folders[1] / "adapter_config.json").read_text())
    small.edit_json(
        folders[1] / "adapter_config.json", use_bdlora=config["use_bdlora"] | {"nblocks": 4}
    )
    with pytest.raises(AdapterError, match=r"q_proj: rank 6 in 4 blocks by the config"):
        dora_export.load_adapter(folders[1])
    small.edit_json(folders[1] / "adapter_config.json", use_bdlora={"nblocks": "2"})
    with pytest.raises(AdapterError, match="use_bdlora: expected nblocks and lists"):
        dora_export.load_adapter(folders[1])


# QA-LoRA: PEFT has it for GPTQ layers only; its variant computes on a plain layer as well


def made_qalora(dtype):
    config = peft.LoraConfig(r=4, lora_alpha=10, use_qalora=True, qalora_group_size=8,
                             target_modules=["q_proj", "o_proj", "square"])  # fmt: skip
    wrapped = peft.get_peft_model(fresh(Block(), dtype), config)
    for module in wrapped.modules():
        if isinstance(module, peft.tuners.lora.Linear):
            module.lora_variant["default"] = peft_variants.QALoraLinearVariant()
            module.lora_variant["default"].init(module, "default", config)
    return wrapped


@base_dtype
def test_grouped_inputs_merge_as_pefts_forward_computes(tmp_path, base):
    wrapped = made_qalora(DTYPES[base])
    folders = save(tmp_path, wrapped)
    got = merged(*folders, tmp_path / "out")
    for path, weight in adapted(wrapped).items():
        assert_right(got[f"{path}.weight"], weight)
    stored = load_file(folders[1] / "adapter_model.safetensors")
    A, B = (oracle.float64(stored[f"{models.PREFIX}q_proj.lora_{x}.weight"]) for x in "AB")
    W = oracle.float64(load_file(folders[0] / "model.safetensors")["q_proj.weight"])
    mean_only = W + 2.5 / 8 * B @ np.repeat(A, 8, axis=1)  # without the number of groups
    tiled = W + 2.5 * 3 / 8 * B @ np.tile(A, (1, 8))
    assert all(is_wrong(got["q_proj.weight"], other) for other in (mean_only, tiled, W))


def test_merge_of_grouped_inputs_says_that_the_base_was_quantised(tmp_path):
    folders = save(tmp_path, made_qalora(torch.float32))
    report = dora_export.merge(*folders, tmp_path / "out", dry_run=True)
    assert any("GPTQ" in w for w in report.warnings)


def test_variants_that_peft_does_not_combine_are_refused(tmp_path):
    folders = save(tmp_path, made_qalora(torch.float32))
    small.edit_json(folders[1] / "adapter_config.json", use_dora=True)
    with pytest.raises(AdapterError, match="use_dora with use_qalora: PEFT does not define it"):
        dora_export.load_adapter(folders[1])


# AdaLoRA; PEFT warns of what it saved itself: empty tensors, and masks that are no patterns

no_warning = pytest.mark.filterwarnings(
    "ignore:.*have invalid shape",
    "ignore:.*rank_pattern keys did not match",
    "ignore:.*alpha_pattern keys did not match",
)


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.pruned = Block(), Block(), nn.Linear(24, 20)
        self.conv = nn.Conv2d(12, 20, (3, 2))


def made_adalora(folder, dtype, prune=True):
    config = peft.AdaLoraConfig(
        init_r=6,
        target_r=3,
        lora_alpha=15,
        total_step=100,
        target_modules=["q_proj", "o_proj", "square", "c_attn", "pruned", "conv"],
    )
    wrapped = peft.get_peft_model(fresh(Blocks(), dtype), config)
    if prune:  # as RankAllocator leaves it: masks in the config, and modules resized to them
        masks = {
            name: [True, False, True, True, False, "square" not in name]
            if "pruned" not in name
            else [False] * 6
            for name, _ in wrapped.base_model.model.named_parameters()
            if "lora_E" in name
        }
        wrapped.peft_config["default"].rank_pattern = masks
    base, adapter = save(folder, wrapped)
    # in float32: beside a 16-bit base, PEFT's load rounds the pruned factors to the base's type
    model = models.load_base(Blocks(), base, torch.float32)
    return base, adapter, peft.PeftModel.from_pretrained(model, adapter)


@no_warning
@base_dtype
@pytest.mark.parametrize("prune", [True, False], ids=["pruned", "whole"])
def test_adalora_merges_as_pefts_forward_computes_after_its_own_load(tmp_path, base, prune):
    base_folder, adapter, wrapped = made_adalora(tmp_path, DTYPES[base], prune)
    got = merged(base_folder, adapter, tmp_path / "out")
    ranks = {}
    for path, weight in adapted(wrapped).items():
        ranks[path] = wrapped.base_model.model.get_submodule(path).r["default"]
        assert_right(got[f"{path}.weight"], weight)
    assert set(ranks.values()) == ({0, 3, 4} if prune else {6})
    stored = load_file(adapter / "adapter_model.safetensors")
    A, B, E = (oracle.float64(stored[f"{models.PREFIX}first.q_proj.lora_{x}"]) for x in "ABE")
    W = oracle.float64(load_file(base_folder / "model.safetensors")["first.q_proj.weight"])
    wrong = [W + 15 / len(A) * B @ A, W + 15 * B @ (A * E), W + 15 / 3 * B @ (A * E)]
    wrong += [] if not prune else [W + 15 / len(A) * B @ (A * E)]
    assert all(is_wrong(got["first.q_proj.weight"], other) for other in wrong)


@no_warning
def test_adalora_tensors_of_another_rank_than_their_mask_are_refused(tmp_path):
    _, adapter, _ = made_adalora(tmp_path, torch.float32)
    small.edit_json(adapter / "adapter_config.json", rank_pattern=None)
    with pytest.raises(
        AdapterError, match=r"first.q_proj: rank 6 by the config, but lora_A is \(4"
    ):
        dora_export.load_adapter(adapter)
    small.edit_json(adapter / "adapter_config.json", rank_pattern={"first.q_proj.lora_E": 4})
    with pytest.raises(AdapterError, match="rank_pattern: expected a list of true and false"):
        dora_export.load_adapter(adapter)
    small.edit_json(adapter / "adapter_config.json", rank_pattern=None, lora_alpha=-2)
    with pytest.raises(AdapterError, match=r"lora_alpha: -2, .* takes one rank .* Set it to"):
        dora_export.load_adapter(adapter)


def test_adalora_tensors_under_the_name_of_lora_are_refused(tmp_path):
    _, adapter, _ = made_adalora(tmp_path, torch.float32, prune=False)
    small.edit_json(adapter / "adapter_config.json", peft_type="LORA", r=6, rank_pattern=None,
                    **dict.fromkeys(["init_r", "target_r", "total_step", "beta1", "beta2", "deltaT",
                                     "orth_reg_weight", "tinit", "tfinal"]))  # fmt: skip
    with pytest.raises(AdapterError, match="lora_E belongs to peft_type ADALORA"):
        dora_export.load_adapter(adapter)


# layer_replication: nested ranges, so that copies share their base weights in training


SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "vocab_size": 64}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}
RANGES = [[0, 3], [1, 4], [2, 3]]


def made_replicated(folder, dtype=torch.float32, dora=False, ranges=RANGES, **config):
    model = fresh(LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS, **config)), dtype)
    model.save_pretrained(folder / "base")
    lora = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        use_dora=dora,
        layer_replication=ranges,
        target_modules=["q_proj", "down_proj"],
        task_type="CAUSAL_LM",
    )
    wrapped = peft.get_peft_model(model, lora).eval()
    torch.manual_seed(3)
    for name, parameter in wrapped.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            parameter.data = torch.randn_like(parameter) * 0.2
        elif "magnitude" in name:
            parameter.data = parameter.data * torch.empty_like(parameter).uniform_(0.7, 1.3)
    wrapped.save_pretrained(folder / "adapter")
    return folder / "base", folder / "adapter", wrapped


@pytest.mark.parametrize("dora", [True, False], ids=["dora", "lora"])
@base_dtype
def test_replicated_layers_each_get_weights_of_their_own(tmp_path, base, dora):
    base_folder, adapter, wrapped = made_replicated(tmp_path, DTYPES[base], dora)
    got = merged(base_folder, adapter, tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["num_hidden_layers"] == 7
    stored = load_file(base_folder / "model.safetensors")
    sources = [0, 1, 2, 1, 2, 3, 2]
    for new, old in enumerate(sources):
        for rest in ("input_layernorm.weight", "self_attn.v_proj.weight", "mlp.up_proj.weight"):
            name = f"model.layers.{new}.{rest}"
            assert torch.equal(got[name], stored[f"model.layers.{old}.{rest}"])
    names = {n for n in got if n.startswith("model.layers.")}
    assert len(names) == 7 * len({n for n in stored if n.startswith("model.layers.0.")})
    exact = adapted(wrapped)
    assert len(exact) == 14
    for path, weight in exact.items():
        assert_right(got[f"{path}.weight"], weight)
    name = "model.layers.{}.self_attn.q_proj.weight"
    assert is_wrong(got[name.format(3)], oracle.float64(got[name.format(1)]))
    assert is_wrong(got[name.format(3)], oracle.float64(stored[name.format(3)]))


def test_replicated_model_computes_what_the_adapted_one_does_where_pefts_merge_does_not(tmp_path):
    """PEFT's merge adds the updates of all copies to the weight they share: it is no reference."""
    base_folder, adapter, wrapped = made_replicated(tmp_path, dora=True)
    merged(base_folder, adapter, tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval().double()
    tokens = torch.randint(64, (2, 9), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        theirs = wrapped.double()(tokens).logits
        ours = plain(tokens).logits
        unloaded = wrapped.merge_and_unload()(tokens).logits
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    assert (unloaded - theirs).abs().max() > 1e-2 * theirs.abs().max()


def test_replicated_model_is_verified_beside_the_unmerged_one(tmp_path):
    base_folder, adapter, _ = made_replicated(tmp_path, dora=True)
    dora_export.merge(base_folder, adapter, tmp_path / "out")
    report = dora_export.verify(base_folder, adapter, tmp_path / "out", forward=True)
    assert (report.exit_code, report.findings) == (0, ())
    forward = report.tiers[2]
    assert len(forward.figures["layers"]) == 14
    # PEFT repeats the layers itself.
    opinion = forward.figures["peft"]
    assert opinion["outputs"]["logits"]["max"] <= 1e-9 * opinion["outputs"]["logits"]["scale"]
    # Two copies of one layer, each with the other's weight.
    names = [f"model.layers.{i}.self_attn.q_proj.weight" for i in (1, 3)]
    small.edit_tensors(tmp_path / "out/model.safetensors", lambda ts: {
        **ts, names[0]: ts[names[1]], names[1]: ts[names[0]]})  # fmt: skip
    report = dora_export.verify(base_folder, adapter, tmp_path / "out", forward=True)
    wrong = {f.where for f in report.findings if f.code == "layer-differs"}
    assert set(names) <= wrong
    assert report.exit_code == 1


def test_layers_that_cannot_be_repeated_are_left_unchecked_by_name(tmp_path):
    base_folder, adapter, _ = made_replicated(tmp_path)
    plan = plan_merge(open_checkpoint(base_folder), dora_export.load_adapter(adapter), Settings())
    model = LlamaForCausalLM.from_pretrained(base_folder)
    model.other = torch.nn.ModuleDict({"layers": copy.deepcopy(model.model.layers)})
    with pytest.raises(Unsupported, match="has 2 lists of 4 layers, to be repeated by the adapter"):
        repeat_layers(model, plan)


def test_lists_per_layer_in_the_config_go_with_the_layers(tmp_path):
    base_folder, adapter, _ = made_replicated(tmp_path)
    kinds = ["full_attention", "sliding_attention", "full_attention", "full_attention"]
    small.edit_json(base_folder / "config.json", layer_types=kinds)
    dora_export.merge(base_folder, adapter, tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["layer_types"] == [kinds[i] for i in (0, 1, 2, 1, 2, 3, 2)]


REPLICATION_REFUSED = {
    "fewer layers": (
        lambda b, a: small.edit_json(a / "adapter_config.json", layer_replication=[[0, 9]]),
        "has 4 layers.*base it was trained on"),
    "a rule": (lambda b, a: small.edit_json(b / "config.json", first_k_dense_replace=1),
               "by a rule on their number.*Merge with PEFT"),
    "no count": (lambda b, a: small.edit_json(b / "config.json", num_hidden_layers=None),
                 "under none of num_hidden_layers"),
    "no layers": (lambda b, a: small.edit_tensors(b / "model.safetensors", lambda tensors: {
        name.replace("layers", "blocks"): tensor for name, tensor in tensors.items()}),
        "the base has no layers under the names PEFT knows"),
}  # fmt: skip


@pytest.mark.parametrize("case", REPLICATION_REFUSED)
def test_replication_that_the_base_does_not_carry_is_refused(tmp_path, case):
    change, message = REPLICATION_REFUSED[case]
    base_folder, adapter, _ = made_replicated(tmp_path)
    change(base_folder, adapter)
    with pytest.raises(PlanError, match=message):
        dora_export.merge(base_folder, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [[0, 2], [[2, 1]], [[0, "1"]], [[-1, 1]], "0-2"])
def test_replication_that_is_no_list_of_ranges_is_refused(tmp_path, value):
    _, adapter, _ = made_replicated(tmp_path, ranges=[[0, 1]])
    small.edit_json(adapter / "adapter_config.json", layer_replication=value)
    with pytest.raises(AdapterError, match="layer_replication: expected pairs of layer numbers"):
        dora_export.load_adapter(adapter)


# Variants that change the training alone: the saved factors are plain LoRA's

TRAINING_ALONE = {
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "mica": {"init_lora_weights": "mica"},
    "no init": {"init_lora_weights": False},
    "velora": {"velora_config": peft.tuners.lora.config.VeloraConfig()},
    "monteclora": {"monteclora_config": peft.tuners.lora.config.MontecloraConfig()},
}


@pytest.mark.parametrize("name", TRAINING_ALONE)
def test_variants_of_training_merge_as_pefts_forward_computes(tmp_path, name):
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["q_proj", "square"], **TRAINING_ALONE[name]
    )
    wrapped = peft.get_peft_model(fresh(Block(), torch.bfloat16), config)
    folders = save(tmp_path, wrapped)
    got = merged(*folders, tmp_path / "out")
    stored = load_file(folders[0] / "model.safetensors")
    for path, weight in adapted(wrapped).items():
        assert_right(got[f"{path}.weight"], weight)
        assert is_wrong(got[f"{path}.weight"], oracle.float64(stored[f"{path}.weight"]))


# Every setting that decides weights, over every kind of layer at once


class Kinds(nn.Module):
    """Each kind of layer that LoRA wraps, square and not, and a small MLP."""

    def __init__(self):
        super().__init__()
        self.wide, self.square = nn.Linear(40, 24), nn.Linear(24, 24)
        self.c_attn, self.c_proj = Conv1D(36, 24), Conv1D(24, 24)
        self.table, self.conv1 = nn.Embedding(30, 16), nn.Conv1d(6, 8, 3)
        self.conv2, self.conv3 = nn.Conv2d(8, 8, (3, 2)), nn.Conv3d(4, 6, 2)
        self.mlp = nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 24, bias=False))


MATRICES = ["wide", "square", "c_attn", "c_proj", "mlp.0", "mlp.2"]
CONVOLUTIONS = ["conv1", "conv2", "conv3"]
EVERY = [*MATRICES, *CONVOLUTIONS, "table"]
BY_LAYER = {"rank_pattern": {"conv2": 2, "table": 6, "mlp.0": 3, "c_proj": 5},
            "alpha_pattern": {"conv3": 9, "table": 2, "c_attn": 11}}  # fmt: skip
WITH_BIAS = [n for n in (*MATRICES, *CONVOLUTIONS) if n != "mlp.2"]
# Name -> (LoraConfig's settings, layers).
SETTINGS = {
    "plain": ({}, EVERY),
    "dora": ({"use_dora": True}, EVERY),
    "rslora": ({"use_rslora": True}, EVERY),
    "rslora, dora": ({"use_rslora": True, "use_dora": True}, EVERY),
    "patterns": (BY_LAYER, EVERY),
    "patterns, dora, rslora": ({**BY_LAYER, "use_dora": True, "use_rslora": True}, EVERY),
    "bias of B": ({"lora_bias": True}, WITH_BIAS),
    "bias of B, rslora, patterns": ({"lora_bias": True, "use_rslora": True, **BY_LAYER}, WITH_BIAS),
    "all biases": ({"bias": "all"}, EVERY),
    "all biases, dora": ({"bias": "all", "use_dora": True}, EVERY),
    "LoRA's biases, dora": ({"bias": "lora_only", "use_dora": True}, EVERY),
    "gaussian, dora": ({"init_lora_weights": "gaussian", "use_dora": True}, EVERY),
    "no init": ({"init_lora_weights": False}, EVERY),
    "mica": ({"init_lora_weights": "mica"}, ["wide", "square", "mlp.0", "table"]),
    "negative alpha": ({"lora_alpha": -5}, EVERY),
}


def made_of_kinds(folder, settings, layers):
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": layers, **settings})
    wrapped = peft.get_peft_model(fresh(Kinds(), torch.float32), config)
    models.save_base(folder / "base", wrapped.base_model.model)
    torch.manual_seed(3)
    for name, parameter in wrapped.named_parameters():
        if "magnitude" in name:
            parameter.data *= torch.empty_like(parameter).uniform_(0.6, 1.4)
        elif "lora_" in name or (name.endswith("bias") and parameter.requires_grad):
            parameter.data = torch.randn_like(parameter) * 0.2
    wrapped.save_pretrained(folder / "adapter")
    return folder / "base", folder / "adapter", wrapped.double().eval()


# Those that other tests have for each kind of layer, and that others here include.
SELDOM = ("plain", "dora", "rslora", "rslora, dora", "patterns", "bias of B", "all biases",
          "gaussian, dora", "no init")  # fmt: skip


@no_warning
@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.nightly] if n in SELDOM else []) for n in SETTINGS],
)
def test_every_setting_over_every_kind_of_layer(name, tmp_path):
    """What PEFT's forward multiplies by and adds, and what its merge_and_unload leaves."""
    settings, layers = SETTINGS[name]
    base, adapter, wrapped = made_of_kinds(tmp_path, settings, layers)
    dora_export.merge(base, adapter, tmp_path / "out", threads=1)
    got, stored = (load_file(tmp_path / f / "model.safetensors") for f in ("out", "base"))
    exact = adapted(wrapped)
    biases = {
        f"{path}.bias": probe.bias(module, module.get_base_layer()).reshape(-1).detach()
        for path, module in wrapped.base_model.model.named_modules()
        if hasattr(module, "base_layer")
        and getattr(module.get_base_layer(), "bias", None) is not None
    }
    unloaded = dict(wrapped.merge_and_unload().named_parameters())
    assert exact.keys() == set(layers)
    for path, weight in exact.items():
        assert_right(got[f"{path}.weight"], weight)
        assert_right(got[f"{path}.weight"], unloaded[f"{path}.weight"].detach().numpy())
        assert is_wrong(got[f"{path}.weight"], oracle.float64(stored[f"{path}.weight"]))
    changed = "bias" in settings or "lora_bias" in settings
    for bias, value in biases.items():
        assert_right(got[bias], value.numpy())
        assert_right(got[bias], unloaded[bias].detach().numpy())
        assert changed == is_wrong(got[bias], oracle.float64(stored[bias]))
    rest = {n for n in stored if n not in biases and n.removesuffix(".weight") not in exact}
    assert all(torch.equal(got[n], unloaded[n].float()) for n in rest)
