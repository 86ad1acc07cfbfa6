"""Adapters written as LyCORIS and diffusers have them: bit for bit, or refused by name."""

import json

import numpy as np
import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import dora_export
from dora_export.errors import AdapterError
from tests import oracle, small
from tests.small import LINEARS, PREFIX, run

UNET = {"_class_name": "UNet2DConditionModel"}


def weights(folder, name="model.safetensors"):
    return load_file(folder / name)


def same(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        assert torch.equal(tensor, other[name]), name


def merged(folder, adapter, out):
    dora_export.merge(folder / "base", adapter, folder / out, threads=1)
    return weights(folder / out)


def case(folder, *, dora, config=small.CONFIG):
    base = small.base_tensors()
    small.write_base(folder / "base", base, config=config)
    adapter = small.adapter_tensors(base, dora=dora)
    small.write_adapter(folder / "adapter", adapter, use_dora=dora)
    return base, adapter


def convert(adapter, to, out, *options):
    result = run("convert", adapter, "--to", to, "-o", out, *options)
    assert result.exit_code == 0, result.output
    return out


def refused(adapter, to, out, *options):
    result = run("convert", adapter, "--to", to, "-o", out, *options)
    assert result.exit_code == 2, result.output
    assert not out.exists()
    return result.output


@pytest.mark.parametrize("alpha", [small.ALPHA, 0.7], ids=["alpha 5", "alpha 0.7"])
def test_plain_lora_goes_to_lycoris_and_back(tmp_path, alpha):
    base, adapter = case(tmp_path, dora=False)
    small.edit_json(tmp_path / "adapter/adapter_config.json", lora_alpha=alpha)
    file = convert(tmp_path / "adapter", "lycoris", tmp_path / "flat") / "lora.safetensors"
    found = load_file(file)
    assert len(found) == 3 * len(LINEARS)
    for name in LINEARS:
        flat = f"lycoris_{name.replace('.', '_')}"
        A, B = (adapter[f"{PREFIX}{name}.lora_{x}.weight"] for x in "AB")
        assert torch.equal(found[f"{flat}.lora_down.weight"], A)
        assert torch.equal(found[f"{flat}.lora_up.weight"], B)
        assert float(found[f"{flat}.alpha"].double()) / small.RANK == alpha / small.RANK
    same(merged(tmp_path, file, "of_flat"), merged(tmp_path, tmp_path / "adapter", "of_peft"))
    exact = oracle.lora(*(oracle.float64(t) for t in (
        base["model.layers.0.attn.q_proj.weight"],
        adapter[f"{PREFIX}model.layers.0.attn.q_proj.lora_A.weight"],
        adapter[f"{PREFIX}model.layers.0.attn.q_proj.lora_B.weight"],
    )), alpha / small.RANK)  # fmt: skip
    got = weights(tmp_path / "of_flat")["model.layers.0.attn.q_proj.weight"]
    assert oracle.ulps(got, exact) <= 1
    back = convert(file, "peft", tmp_path / "back", "--base", tmp_path / "base")
    same(load_file(back / "adapter_model.safetensors"), adapter)
    assert peft.LoraConfig.from_pretrained(back).lora_alpha == alpha
    assert "Pass --base" in refused(file, "peft", tmp_path / "none")


@pytest.mark.parametrize("axis", ["out", "in"])
def test_magnitudes_of_lycoris_keep_their_axis_and_their_eps(tmp_path, axis):
    base, adapter = case(tmp_path, dora=True)
    tensors = {}
    for name, (out, inputs) in LINEARS.items():
        key = f"lycoris_{name.replace('.', '_')}"
        W = base[f"{name}.weight"].float()
        m = W.norm(dim=1 if axis == "out" else 0) * torch.linspace(0.6, 1.4, out if axis == "out"
                                                                   else inputs)  # fmt: skip
        tensors |= {
            f"{key}.lora_down.weight": adapter[f"{PREFIX}{name}.lora_A.weight"],
            f"{key}.lora_up.weight": adapter[f"{PREFIX}{name}.lora_B.weight"],
            f"{key}.alpha": torch.tensor(5.0),
            f"{key}.dora_scale": m[:, None] if axis == "out" else m[None, :],
        }
    save_file(tensors, tmp_path / "own.safetensors")
    file = convert(tmp_path / "own.safetensors", "lycoris", tmp_path / "again")
    same(load_file(file / "lora.safetensors"), tensors)
    same(merged(tmp_path, file / "lora.safetensors", "a"),
         merged(tmp_path, tmp_path / "own.safetensors", "b"))  # fmt: skip
    said = refused(tmp_path / "own.safetensors", "peft", tmp_path / "x", "--base",
                   tmp_path / "base")  # fmt: skip
    assert ("one magnitude per input" if axis == "in" else "is added to the norm") in said


def test_magnitudes_without_an_eps_are_no_dora_of_lycoris(tmp_path):
    case(tmp_path, dora=True)
    said = refused(tmp_path / "adapter", "lycoris", tmp_path / "x")
    assert "DoRA trained without an eps, as in PEFT: LyCORIS adds 1.2e-07" in said


@pytest.mark.parametrize("dora", [True, False], ids=["dora", "lora"])
def test_an_adapter_of_a_unet_goes_to_diffusers_and_back(tmp_path, dora):
    _, adapter = case(tmp_path, dora=dora, config=UNET)
    out = convert(tmp_path / "adapter", "diffusers", tmp_path / "image", "--base",
                  tmp_path / "base")  # fmt: skip
    file = out / "pytorch_lora_weights.safetensors"
    found = load_file(file)
    expected = {n.replace(PREFIX, "unet."): t for n, t in adapter.items()}
    same({n.removesuffix(".weight"): t for n, t in found.items()},
         {n.removesuffix(".weight"): t for n, t in expected.items()})  # fmt: skip
    with safe_open(file, "np") as opened:
        said = json.loads(opened.metadata()["lora_adapter_metadata"])
    config = peft.LoraConfig(**{k.removeprefix("unet."): v for k, v in said.items()
                                if v is not None})  # fmt: skip
    assert (config.r, config.lora_alpha, config.use_dora) == (small.RANK, small.ALPHA, dora)
    same(merged(tmp_path, file, "of_image"), merged(tmp_path, tmp_path / "adapter", "of_peft"))
    back = convert(file, "peft", tmp_path / "back", "--base", tmp_path / "base")
    assert {np.asarray(t).tobytes() for t in load_file(back / "adapter_model.safetensors").values()
            } == {np.asarray(t).tobytes() for t in adapter.values()}  # fmt: skip


def test_what_diffusers_cannot_say_is_refused(tmp_path):
    case(tmp_path, dora=True)
    said = refused(tmp_path / "adapter", "diffusers", tmp_path / "x")
    assert "which component of a pipeline it is in is not said" in said
    assert "--base" in said
    with pytest.raises(AdapterError, match="cannot hold this adapter exactly"):
        dora_export.convert(tmp_path / "adapter", "diffusers", tmp_path / "x",
                            base=tmp_path / "base")  # fmt: skip
