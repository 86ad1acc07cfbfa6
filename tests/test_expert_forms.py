"""Adapters of single experts on bases that stack them, and the reverse, DoRA included."""

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import dora_export
from dora_export import DoraExportError
from tests import moe_models, oracle
from tests.moe_models import prepare, relative, worst
from tests.peft_models import edit_config, rekey
from tests.rider_models import WARNINGS
from tests.small import PREFIX, write_json

# Reasons stand beside the entries.
pytestmark = [
    *(pytest.mark.filterwarnings(w) for w in WARNINGS),
    # PEFT writes patterns for stacked parameters, and warns that no module matches them.
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match"),
]
EXPERTS, HIDDEN, INNER, RANK, ALPHA = 3, 20, 14, 3, 7.5
SHAPES = {"gate_proj": (INNER, HIDDEN), "up_proj": (INNER, HIDDEN), "down_proj": (HIDDEN, INNER)}
MIXTRAL = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


class Expert(nn.Module):
    """One expert as classes before transformers 5 have it: a module of its own."""

    def __init__(self, names):
        super().__init__()
        for name, (out, inner) in SHAPES.items():
            setattr(self, names.get(name, name), nn.Linear(inner, out, bias=False))


def block(names):
    layers = nn.ModuleList(
        nn.ModuleDict({"mlp": nn.ModuleDict({"experts": nn.ModuleList(
            Expert(names) for _ in range(EXPERTS))})})
        for _ in range(2)
    )  # fmt: skip
    return nn.ModuleDict({"model": nn.ModuleDict({"layers": layers})})


def trained(folder, *, dora=True, targets=tuple(SHAPES), names=None, seed=0):
    """PEFT's adapter of every expert's matrices, and W and W' of each by the definition.

    Returns:
        (layer, expert, part) -> (base, exact), and PEFT's model.
    """
    names = names or {}
    torch.manual_seed(seed)
    model = block(names)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.2)
    config = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, use_dora=dora, target_modules=[names.get(t, t) for t in targets]
    )
    wrapped = peft.get_peft_model(model, config).eval()
    for name, parameter in wrapped.named_parameters():
        if "lora_magnitude" in name:
            parameter.data *= torch.empty_like(parameter).uniform_(0.6, 1.4)
        elif "lora_" in name:
            parameter.data.normal_(0, 0.3)
    wrapped.save_pretrained(folder / "adapter")
    held = load_file(folder / "adapter/adapter_model.safetensors")
    weights = {}
    for layer in range(2):
        for e in range(EXPERTS):
            for part in SHAPES:
                path = f"model.layers.{layer}.mlp.experts.{e}.{names.get(part, part)}"
                module = wrapped.base_model.model.get_submodule(path)
                W = (module.get_base_layer() if part in targets else module).weight.detach()
                weights[layer, e, part] = W.clone(), exact(held, PREFIX + path, W, dora)
    return weights, wrapped


def exact(held, key, W, dora):
    if f"{key}.lora_A.weight" not in held:
        return oracle.float64(W)
    a, b = (oracle.float64(held[f"{key}.lora_{x}.weight"]) for x in "AB")
    if not dora:
        return oracle.lora(oracle.float64(W), a, b, ALPHA / RANK)
    m = oracle.float64(held[f"{key}.lora_magnitude_vector"])
    return oracle.dora(oracle.float64(W), a, b, m, ALPHA / RANK)


# How bases hold experts: model_type, and what becomes of the matrices of one layer.


def apart(names, parent="mlp"):
    def hold(layer, get):
        return {
            f"model.layers.{layer}.{parent}.experts.{e}.{names.get(p, p)}.weight": get(e, p)
            for e in range(EXPERTS)
            for p in SHAPES
        }

    return hold


def fused(*, turned=False, alternate=False, parent="mlp", names=("gate_up_proj", "down_proj")):
    def hold(layer, get):
        gate_up, down = [], []
        for e in range(EXPERTS):
            gate, up = get(e, "gate_proj"), get(e, "up_proj")
            both = np.stack([gate, up], 1).reshape(2 * INNER, HIDDEN) if alternate else (
                np.concatenate([gate, up]))  # fmt: skip
            gate_up.append(both.T if turned else both)
            down.append(get(e, "down_proj").T if turned else get(e, "down_proj"))
        path = f"model.layers.{layer}.{parent}"
        return {f"{path}.experts.{n}": np.stack(t)
                for n, t in zip(names, (gate_up, down), strict=True)}  # fmt: skip

    return hold


def stacked(layer, get):
    return {f"model.layers.{layer}.mlp.switch_mlp.{p}.weight":
            np.stack([get(e, p) for e in range(EXPERTS)]) for p in SHAPES}  # fmt: skip


BASES = {
    "a tensor each": ("qwen3_moe", apart({})),
    "a tensor each, Mixtral's names": ("mixtral", apart(MIXTRAL)),
    "another block": ("mixtral", apart(MIXTRAL, "block_sparse_moe")),
    "gate over up": ("qwen3_moe", fused()),
    "gate over up, another block": ("mixtral", fused()),
    "gate beside up": ("llama4_text", fused(turned=True)),
    "alternating columns": ("gpt_oss", fused(turned=True, alternate=True)),
    "Aria's names": ("aria", fused(turned=True, names=("fc1.weight", "fc2.weight"))),
    "Qwen3-VL's": ("qwen3_vl_moe", fused(turned=True)),
    "MLX's": ("qwen3_moe", stacked),
}


def write(folder, weights, kind, which):
    model_type, hold = BASES[kind]
    tensors = {}
    for layer in range(2):

        def get(e, part, layer=layer):
            return np.asarray(weights[layer, e, part][which], np.float64)

        tensors |= hold(layer, get)
    dtype = torch.float32 if which == 0 else torch.float64
    tensors = {n: torch.from_numpy(np.ascontiguousarray(t)).to(dtype) for n, t in tensors.items()}
    if which == 1:
        return tensors
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    write_json(folder / "config.json", {"model_type": model_type, "hidden_size": HIDDEN})
    return folder


@pytest.mark.parametrize("dora", [True, False], ids=["DoRA", "LoRA"])
@pytest.mark.parametrize("kind", BASES)
def test_adapters_of_single_experts_fit_every_base(kind, dora, tmp_path):
    names = MIXTRAL if BASES[kind][0] == "mixtral" else {}
    weights, wrapped = trained(tmp_path, dora=dora, names=names)
    base = write(tmp_path / "base", weights, kind, 0)
    if kind == "another block":  # the class's name of the block, and the checkpoint's
        assert any(".block_sparse_moe." in n for n in load_file(base / "model.safetensors"))
    report = dora_export.merge(base, tmp_path / "adapter", tmp_path / "out", verify="full")
    assert worst(tmp_path / "out", write(None, weights, kind, 1)) <= 1
    assert report.adapter_tensors == len(load_file(tmp_path / "adapter/adapter_model.safetensors"))
    merged = wrapped.merge_and_unload()
    for (layer, e, part), (_, value) in weights.items():
        path = f"model.layers.{layer}.mlp.experts.{e}.{names.get(part, part)}"
        theirs = oracle.float64(merged.get_submodule(path).weight)
        assert np.abs(theirs - value).max() <= 2e-6 * np.abs(value).max()


@pytest.mark.parametrize("kind", [k for k in BASES if k not in ("alternating columns",)])
def test_experts_mixed_up_fail_the_tolerance(kind, tmp_path):
    """What this test's own reference can tell apart: experts, halves and magnitudes exchanged."""
    weights, _ = trained(tmp_path)
    right = write(None, weights, kind, 1)
    rolled = {(layer, e, p): weights[layer, (e + 1) % EXPERTS, p] for layer, e, p in weights}
    halves = {"gate_proj": "up_proj", "up_proj": "gate_proj", "down_proj": "down_proj"}
    swapped = {(layer, e, p): weights[layer, e, halves[p]] for layer, e, p in weights}
    for wrong in (rolled, swapped):
        found = write(None, wrong, kind, 1)
        assert max(relative(found[n], right[n]) for n in right) > 0.1


@pytest.mark.parametrize("kind", ["gate beside up", "alternating columns"])
def test_dora_on_gate_alone_is_refused_where_rows_are_mixed_and_lora_is_not(kind, tmp_path):
    weights, _ = trained(tmp_path, targets=("gate_proj", "down_proj"))
    base = write(tmp_path / "base", weights, kind, 0)
    with pytest.raises(DoraExportError, match="a tensor per expert"):
        dora_export.merge(base, tmp_path / "adapter", tmp_path / "out")
    (tmp_path / "plain").mkdir()
    weights, _ = trained(tmp_path / "plain", targets=("gate_proj", "down_proj"), dora=False)
    base = write(tmp_path / "plain/base", weights, kind, 0)
    dora_export.merge(base, tmp_path / "plain/adapter", tmp_path / "out", verify="full")
    assert worst(tmp_path / "out", write(None, weights, kind, 1)) <= 1


def test_dora_on_gate_alone_keeps_its_rows_apart_where_they_are(tmp_path):
    weights, _ = trained(tmp_path, targets=("gate_proj",))
    base = write(tmp_path / "base", weights, "gate over up", 0)
    dora_export.merge(base, tmp_path / "adapter", tmp_path / "out", verify="full")
    assert worst(tmp_path / "out", write(None, weights, "gate over up", 1)) <= 1


@pytest.mark.parametrize("kind", ["a tensor each", "gate over up", "alternating columns"])
def test_an_adapter_that_lacks_an_expert_is_refused(kind, tmp_path):
    weights, _ = trained(tmp_path)
    base = write(tmp_path / "base", weights, kind, 0)
    rekey(tmp_path / "adapter", lambda key: None if ".1.mlp.experts.2." in key else key)
    with pytest.raises(DoraExportError, match=r"adapter has 2 experts, the base 3|have no adapter"):
        dora_export.merge(base, tmp_path / "adapter", tmp_path / "out")


def test_an_adapter_of_more_experts_is_refused(tmp_path):
    weights, _ = trained(tmp_path)
    base = write(tmp_path / "base", weights, "gate over up", 0)
    rekey(tmp_path / "adapter", lambda key: key.replace(".experts.2.", ".experts.7."))
    edit_config(tmp_path / "adapter", layers_to_transform=[0, 1])  # no family has to be whole
    with pytest.raises(DoraExportError, match="the adapter has 3 experts, the base 3"):
        dora_export.merge(base, tmp_path / "adapter", tmp_path / "out")


# --- against PEFT's own conversion of old adapters


@pytest.mark.parametrize("original", [True, False], ids=["checkpoint names", "class names"])
@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_old_adapters_merge_as_peft_converts_them(kind, original, tmp_path):
    """transformers 5 and PEFT load an adapter of single experts onto the stacked class."""
    names = MIXTRAL if kind == "mixtral" else {}
    case = prepare(tmp_path, kind, original=original)
    generator = torch.Generator().manual_seed(4)
    held = {}
    parent = "block_sparse_moe" if kind == "mixtral" else "mlp"
    inner, hidden = moe_models.INNER, moe_models.HIDDEN
    shapes = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden),
              "down_proj": (hidden, inner)}  # fmt: skip
    for layer in range(2):
        for e in range(moe_models.EXPERTS):
            for part, (out, into) in shapes.items():
                key = f"{PREFIX}model.layers.{layer}.{parent}.experts.{e}.{names.get(part, part)}"
                held[f"{key}.lora_A.weight"] = torch.randn(3, into, generator=generator) * 0.2
                held[f"{key}.lora_B.weight"] = torch.randn(out, 3, generator=generator) * 0.2
    save_file(held, case.adapter / "adapter_model.safetensors", {"format": "pt"})
    edit_config(
        case.adapter, target_parameters=None, target_modules=[names.get(p, p) for p in shapes]
    )
    model = case.model_class.from_pretrained(case.base)
    loaded = peft.PeftModel.from_pretrained(model, case.adapter).eval()
    want = moe_models.logits(loaded)
    assert relative(case.of_base(), want) > 1e-2
    dora_export.merge(case.base, case.adapter, tmp_path / "out", verify="full")
    assert relative(case.merged(tmp_path / "out"), want) < 1e-5
    # What PEFT saves of it holds gate and up in one factor of twice the rank.
    loaded.save_pretrained(tmp_path / "converted")
    ranks = load_file(tmp_path / "converted/adapter_model.safetensors")
    assert {t.shape[0] for n, t in ranks.items() if "base_layer.lora_A" in n} == {24}
    dora_export.merge(case.base, tmp_path / "converted", tmp_path / "again", verify="full")
    assert relative(case.merged(tmp_path / "again"), want) < 1e-5
