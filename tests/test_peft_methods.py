"""PEFT's methods other than LORA against the forward of PEFT's own model, loaded by PEFT.

For every method: a model with linear layers (a square one, one without bias) and where the method
has them Conv1D, convolutions and an embedding; every adapter tensor gets other values than it began
with; the reference is the weight and the bias that PEFT's adapted layer computes with in float64,
asked of its forward with unit inputs (tests/probe.py).
"""

import json

import numpy as np
import peft
import pytest
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

import dora_export
from dora_export.adapters import peft_methods
from dora_export.errors import AdapterError, PlanError
from tests import oracle, probe, small
from tests import peft_models as models
from tests.test_peft_variants import assert_right, fresh, is_wrong

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
LINEAR = ["wide", "tall", "square"]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.wide, self.tall = nn.Linear(48, 32), nn.Linear(24, 40, bias=False)
        self.square, self.c_attn = nn.Linear(24, 24), Conv1D(48, 24)
        self.conv, self.point = nn.Conv2d(16, 24, 3), nn.Conv2d(24, 16, 1)
        self.table, self.norm = nn.Embedding(40, 24), nn.LayerNorm(24)
        self.signal, self.untouched = nn.Conv1d(16, 24, 3), nn.Linear(24, 24)


# Method -> (settings, layers beside LINEAR)
CASES = {
    "LOHA": ({"r": 4, "alpha": 6}, ["conv", "signal", "point"]),
    "LOHA effective": ({"r": 4, "alpha": 6, "use_effective_conv2d": True}, ["conv", "signal"]),
    "LOHA patterns": ({"r": 4, "alpha": 6, "rank_pattern": {"wide": 6}, "alpha_pattern": {
        "w.de": 9}}, []),
    "LOKR": ({"r": 4, "alpha": 6}, ["conv", "signal"]),
    "LOKR whole": ({"r": 64, "alpha": 6}, ["conv"]),
    "LOKR both": ({"r": 2, "alpha": 3, "decompose_both": True, "use_effective_conv2d": True},
                  ["conv"]),
    "BOFT": ({"boft_block_size": 4, "boft_n_butterfly_factor": 2}, []),
    "BOFT conv": ({"boft_block_size": 4}, ["conv"]),
    "C3A": ({"block_size": 8}, []),
    "DEFT": ({"r": 4}, []),
    "DELORA": ({"r": 4, "delora_lambda": 9}, []),
    "GLORA": ({"r": 4}, []),
    "GRALORA": ({"r": 8, "gralora_k": 2, "alpha": 12, "hybrid_r": 4}, ["c_attn"]),
    "HIRA": ({"r": 4}, ["conv", "table"]),
    "HRA": ({"r": 4}, ["conv"]),
    "HRA orthogonal": ({"r": 4, "apply_GS": True}, []),
    "IA3": ({"feedforward_modules": ["wide", "conv"]}, ["c_attn", "conv", "point"]),
    "MISS": ({"r": 4}, []),
    "MISS bat": ({"r": 4, "init_weights": "bat"}, []),
    "MISS mini": ({"r": 8, "mini_r": 4, "init_weights": "mini"}, []),
    "OFT": ({"oft_block_size": 4, "r": 0}, ["conv"]),
    "OFT coft": ({"oft_block_size": 4, "r": 0, "coft": True, "eps": 1e-2}, []),
    "OFT shared": ({"oft_block_size": 4, "r": 0, "block_share": True}, []),
    "OFT exact": ({"oft_block_size": 4, "r": 0, "use_cayley_neumann": False}, []),
    "PEANUT": ({"r": 4}, []),
    "ROAD": ({"group_size": 8}, []),
    "ROAD 4": ({"group_size": 8, "variant": "road_4"}, []),
    "SHIRA": ({"r": 2}, []),
    "SUPERTUNING": ({}, []),
    "VBLORA": ({"vector_length": 4, "num_vectors": 32, "save_only_topk_weights": False}, []),
    "VBLORA topk": ({"vector_length": 4, "num_vectors": 32, "save_only_topk_weights": True}, []),
    "VERA": ({"r": 8, "save_projection": True}, ["c_attn"]),
    "PVERA": ({"r": 8, "save_projection": True}, []),
    "LN_TUNING": ({"target_modules": ["norm"]}, []),
    "BEFT": ({"target_modules": ["wide", "square"]}, []),
    "TRAINABLE_TOKENS": ({"token_indices": [3, 7, 1], "target_modules": ["table"]}, []),
}  # fmt: skip


def config_of(name):
    method = name.partition(" ")[0]
    settings, more = CASES[name]
    cls = next(c for kind, c in PEFT_TYPE_TO_CONFIG_MAPPING.items() if kind.value == method)
    return cls(**{"target_modules": [*LINEAR, *more], **settings})


def made(folder, name, dtype=torch.float32):
    """Base, an adapter saved by PEFT with trained values, and PEFT's model as PEFT loads it."""
    base = fresh(Net(), dtype)
    models.save_base(folder / "base", base)
    wrapped = peft.get_peft_model(base, config_of(name))
    wrapped.save_pretrained(folder / "adapter")
    path = folder / "adapter/adapter_model.safetensors"
    torch.manual_seed(5)
    stored = load_file(path)
    for key, tensor in stored.items():
        kept = "w_norm" in key or "topk" in key  # a function of W; probabilities
        if tensor.is_floating_point() and not kept:
            scale = 0.5 if "logits" in key else 0.1
            stored[key] = tensor + scale * torch.randn_like(tensor)
    save_file(stored, path, {"format": "pt"})
    loaded = peft.PeftModel.from_pretrained(
        models.load_base(Net(), folder / "base", torch.float32), folder / "adapter"
    )
    return folder / "base", folder / "adapter", loaded.double().eval()


def adapted(loaded):
    """Parameter name -> its values in PEFT's forward, for every adapted layer."""
    found = {}
    for path, module in loaded.base_model.model.named_modules():
        if not hasattr(module, "base_layer"):
            continue
        base = module.get_base_layer()
        if isinstance(base, nn.LayerNorm):
            active = module.ln_tuning_layers["default"]
            found[f"{path}.weight"], found[f"{path}.bias"] = active.weight, active.bias
            continue
        found[f"{path}.weight"] = probe.weight(module, base)
        if getattr(base, "bias", None) is not None:
            found[f"{path}.bias"] = probe.bias(module, base).reshape(-1)
    return {name: value.detach().double().numpy() for name, value in found.items()}


@pytest.mark.parametrize(
    ("name", "dtype"),
    # computed in float64 whatever the type: a few do for rounding to 16 bits
    [*((name, "fp32") for name in CASES), *((name, "bf16") for name in ("LOHA", "LOKR", "OFT"))],
)
def test_merged_layers_compute_what_pefts_forward_does(tmp_path, name, dtype):
    base, adapter, loaded = made(tmp_path, name, DTYPES[dtype])
    dora_export.merge(base, adapter, tmp_path / "out", threads=1, verify="full")
    got, stored = (load_file(tmp_path / f / "model.safetensors") for f in ("out", "base"))
    exact = adapted(loaded)
    changed = 0
    for parameter, values in exact.items():
        assert_right(got[parameter], values)
        changed += is_wrong(got[parameter], oracle.float64(stored[parameter]))
    assert changed >= len([p for p in exact if p.endswith("weight")]) - (name == "BEFT") * 2
    untouched = [p for p in stored if p not in exact]
    assert all(torch.equal(got[p], stored[p]) for p in untouched)


def test_wrong_formulas_fail_the_tolerance(tmp_path):
    """LoKr with LyCORIS' scaling, LoHa as a sum, IA3 along the other axis."""
    for name in ("LOKR whole", "LOHA", "IA3"):
        (tmp_path / name).mkdir()
    base, adapter, _ = made(tmp_path / "LOKR whole", "LOKR whole")
    dora_export.merge(base, adapter, tmp_path / "lokr")
    got, W, t = (
        load_file(tmp_path / "lokr/model.safetensors")["square.weight"],
        oracle.float64(load_file(base / "model.safetensors")["square.weight"]),
        load_file(adapter / "adapter_model.safetensors"),
    )
    w1, w2 = (oracle.float64(t[f"{models.PREFIX}square.lokr_w{i}"]) for i in "12")
    assert_right(got, W + 6 / 64 * np.kron(w1, w2))
    assert is_wrong(got, W + np.kron(w1, w2))
    base, adapter, _ = made(tmp_path / "IA3", "IA3")
    dora_export.merge(base, adapter, tmp_path / "ia3")
    got, W = (
        oracle.float64(load_file(folder / "model.safetensors")["square.weight"])
        for folder in (tmp_path / "ia3", base)
    )
    scale = oracle.float64(load_file(adapter / "adapter_model.safetensors")[
        f"{models.PREFIX}square.ia3_l"]).reshape(-1)  # fmt: skip
    assert np.abs(got - W * scale[:, None]).max() < 1e-6
    assert np.abs(got - W * scale[None]).max() > 1e-2


@pytest.fixture(scope="module")
def rotated(tmp_path_factory):
    folder = tmp_path_factory.mktemp("oft")
    base, adapter, _ = made(folder, "OFT", torch.bfloat16)
    return base, adapter


def test_bytes_do_not_depend_on_threads_and_the_bound_counts_whole_tensors(rotated, tmp_path):
    one = dora_export.merge(*rotated, tmp_path / "one", threads=1, verify="none")
    dora_export.merge(*rotated, tmp_path / "four", threads=4, block_bytes=256, verify="none")
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "four")]
    assert files[0] == files[1]
    assert one.memory_bytes > 10 * 8 * 32 * 48


def test_verification_finds_a_wrong_tensor_and_claims_no_independent_formula(rotated, tmp_path):
    dora_export.merge(*rotated, tmp_path / "out")
    report = dora_export.verify(*rotated, tmp_path / "out")
    assert report.exit_code == 0
    oracle_tier = next(t for t in report.tiers if t.tier == "oracle")
    assert "against PEFT's own unmerged forward, not an independent formula" in oracle_tier.summary
    assert any("no independent formula" in note for note in report.notes)
    original = load_file(rotated[0] / "model.safetensors")["square.weight"]
    small.edit_tensors(
        tmp_path / "out/model.safetensors", lambda t: {**t, "square.weight": original}
    )
    wrong = dora_export.verify(*rotated, tmp_path / "out")
    assert wrong.exit_code == 1
    assert [(f.code, f.where) for f in wrong.findings] == [("not-applied", "square.weight")]


# Refusals


def test_tensors_that_are_not_the_layers_are_refused_before_anything_is_written(rotated, tmp_path):
    base, _ = rotated
    adapter = tmp_path / "adapter"
    config = json.loads((rotated[1] / "adapter_config.json").read_text())
    adapter.mkdir()
    stored = load_file(rotated[1] / "adapter_model.safetensors")
    key = f"{models.PREFIX}square.oft_R.weight"
    save_file({**stored, key: stored[key][:4].clone()}, adapter / "adapter_model.safetensors")
    small.write_json(adapter / "adapter_config.json", config)
    with pytest.raises(PlanError, match=r"square.weight: .*PEFT does not take it for this layer"):
        dora_export.merge(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_field_that_the_installed_peft_does_not_know_is_refused(rotated, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_file(load_file(rotated[1] / "adapter_model.safetensors"),
              adapter / "adapter_model.safetensors")  # fmt: skip
    config = json.loads((rotated[1] / "adapter_config.json").read_text())
    small.write_json(adapter / "adapter_config.json", {**config, "oft_twist": 3})
    with pytest.raises(AdapterError, match=r"oft_twist: set to 3.*version that trained"):
        dora_export.load_adapter(adapter)


def test_field_that_is_unknown_to_a_formula_is_refused(tmp_path):
    _, adapter, _ = made(tmp_path, "LOKR whole")
    small.edit_json(adapter / "adapter_config.json", full_matrix=True)
    with pytest.raises(AdapterError, match=r"full_matrix: unknown field.*may change the weights"):
        dora_export.load_adapter(adapter)


def test_shared_tensors_that_were_not_saved_are_refused(tmp_path):
    base = fresh(Net(), torch.float32)
    config = peft.VeraConfig(r=8, save_projection=False, target_modules=LINEAR)
    peft.get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(AdapterError, match=r"vera_A and vera_B not in the file.*save_projection"):
        dora_export.load_adapter(tmp_path / "adapter")


def test_method_without_peft_names_what_to_install(rotated, monkeypatch):
    monkeypatch.setattr("dora_export.peft_layers.find_spec", lambda name: None)
    with pytest.raises(AdapterError, match=r"PEFT is not installed.*dora-export\[transformers\]"):
        dora_export.load_adapter(rotated[1])


def test_inspect_names_the_method_and_that_no_engine_reads_it(rotated):
    shown = small.run("inspect", rotated[1], "--base", rotated[0])
    assert shown.exit_code == 0
    assert "OFT" in shown.output
    assert "none reads PEFT's OFT" in shown.output


def test_every_method_of_the_table_has_a_case():
    assert {name.partition(" ")[0] for name in CASES} == peft_methods.METHODS
