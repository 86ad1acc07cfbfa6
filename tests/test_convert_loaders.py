"""Converted adapters in the hands of their new owners: each loads them with its own loader.

diffusers and LyCORIS are here and load what is converted now. What mlx-lm and torchtune made of
the same files is kept (``tests/fixtures/make_converted.py``), and the files are compared.
The reference is the forward of the trainer's unmerged model.
"""

import copy

import peft
import pytest
import torch
from lycoris import kohya, wrapper
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from dora_export import convert
from tests import lycoris_models as lycoris
from tests import oracle
from tests.fixtures import CONVERTED
from tests.fixtures.make_converted import CASES, TOKENS
from tests.trainers import RELATIVE, distance

dm = pytest.importorskip("tests.diffusion_models", reason="diffusers is not installed")
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
OWNERS = [(case, owner) for case, (_, _, owners) in CASES.items() for owner in owners]


# --- mlx-lm, torchtune


def unmerged(case):
    """PEFT's model with its adapter active, in float64."""
    model = LlamaForCausalLM.from_pretrained(CONVERTED / "base", dtype=torch.float32)
    return peft.PeftModel.from_pretrained(model, CONVERTED / case / "adapter").double().eval()


def weights_used(model):
    """The weight that each adapted layer computes with, by its output for the identity."""
    found = {}
    for name, layer in model.base_model.model.named_modules():
        if isinstance(layer, LoraLayer):
            base = layer.get_base_layer()
            embedding = isinstance(base, torch.nn.Embedding)
            ones = torch.arange(base.num_embeddings) if embedding else torch.eye(
                base.in_features, dtype=torch.float64)  # fmt: skip
            found[f"{name}.weight"] = layer(ones) if embedding else layer(ones).T
    return found


@pytest.mark.parametrize(("case", "owner"), OWNERS, ids=str)
def test_files_are_those_that_mlx_lm_and_torchtune_loaded(case, owner, tmp_path):
    convert(CONVERTED / case / "adapter", owner, tmp_path / "out", base=CONVERTED / "base")
    kept = CONVERTED / case / owner
    config = "adapter_config.json"
    assert (tmp_path / "out" / config).read_text() == (kept / config).read_text()
    names = sorted(p.name for p in kept.iterdir())
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == names
    for name in ("adapters.safetensors",) if owner == "mlx" else ("adapter_model.pt",):
        read = load_file if owner == "mlx" else lambda p: torch.load(p, weights_only=True)
        one, two = read(tmp_path / "out" / name), read(kept / name)
        assert one.keys() == two.keys()
        assert all(torch.equal(one[k], t) and one[k].dtype == t.dtype for k, t in two.items())


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_mlx_lm_and_torchtune_compute_what_peft_computes(case):
    model, owners = unmerged(case), CASES[case][2]
    wanted, base = weights_used(model), load_file(CONVERTED / "base/model.safetensors")
    logits = model(torch.tensor(TOKENS)).logits
    with model.disable_adapter():
        plain = model(torch.tensor(TOKENS)).logits
    assert dm.distance(logits, plain) > 1e-2
    for owner in owners:
        found = load_file(CONVERTED / case / f"{owner}-forward.safetensors")
        for name, want in wanted.items():
            assert distance(found[name], oracle.float64(want)) <= RELATIVE, (owner, name)
            assert distance(found[name], oracle.float64(base[name])) > 0.1, (owner, name)
        assert dm.distance(logits, found["logits"].double()) <= 1e-5, owner


# --- diffusers


def peft_on(model, folder, *, dora):
    """PEFT's own folder for an adapter on a model of diffusers, as if trained."""
    config = peft.LoraConfig(
        r=3, lora_alpha=5, use_dora=dora, target_modules=dm.UNET_TARGETS,
        rank_pattern={"to_q": 2}, alpha_pattern={"conv1": 7, "to_k": 1},
    )  # fmt: skip
    wrapped = peft.get_peft_model(copy.deepcopy(model), config)
    make = torch.Generator().manual_seed(4)
    for name, parameter in wrapped.named_parameters():
        if "lora_magnitude_vector" in name:
            parameter.data.mul_(0.6 + 0.8 * torch.rand(parameter.shape, generator=make))
        elif "lora_" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=make) * 0.3)
    wrapped.save_pretrained(folder)
    return wrapped


def complaints(records):
    """What diffusers warns of, but for the text encoder that has no adapter."""
    said = [r.getMessage() for r in records if r.name.startswith("diffusers")]
    return [m for m in said if "tokenizer" not in m and "CLIPTextModel found with" not in m]


@pytest.mark.nightly
def test_pipeline_of_diffusers_loads_what_is_written_for_it(tmp_path, caplog):
    base = dm.write_pipeline(tmp_path / "base")
    pipe = dm.load(base)
    wrapped = peft_on(pipe.unet, tmp_path / "peft", dora=True)
    inputs = dm.unet_inputs(pipe.unet)
    wanted, plain = dm.outputs(wrapped, inputs), dm.outputs(pipe.unet, inputs)
    convert(tmp_path / "peft", "diffusers", tmp_path / "out", base=base)
    pipe.load_lora_weights(tmp_path / "out")
    assert not complaints(caplog.records)
    assert dm.distance(wanted, dm.outputs(pipe.unet, inputs)) <= 1e-12
    assert dm.distance(wanted, plain) > 0.01


@pytest.mark.nightly
def test_pipeline_of_diffusers_loads_kohyas_unet_and_text_encoder(tmp_path, caplog):
    base = dm.write_pipeline(tmp_path / "base")
    pipe = dm.load(base)
    dm.train(pipe.unet, dm.UNET_TARGETS, dora=False)
    dm.train(pipe.text_encoder, dm.TEXT_TARGETS, 5, dora=False)
    made = {}
    for prefix, model in (("lora_unet", pipe.unet), ("lora_te_text_model", pipe.text_encoder)):
        for name, tensor in dm.layers(model).items():
            module, _, part = name.removeprefix("text_model.").partition(".lora_")
            key = f"{prefix}_{module.replace('.', '_')}"
            made[f"{key}.lora_{'down' if part == 'A.weight' else 'up'}.weight"] = tensor
            made[f"{key}.alpha"] = torch.tensor(dm.ALPHA)
    save_file(made, tmp_path / "kohya.safetensors")
    convert(tmp_path / "kohya.safetensors", "diffusers", tmp_path / "out", base=base)
    loaded = dm.load(base)
    plain = dm.text_outputs(loaded.text_encoder)
    caplog.clear()
    loaded.load_lora_weights(tmp_path / "out")
    assert not complaints(caplog.records)
    inputs = dm.unet_inputs(pipe.unet)
    wanted = dm.outputs(pipe.unet, inputs)
    assert dm.distance(wanted, dm.outputs(loaded.unet, inputs)) <= 1e-12
    wanted = dm.text_outputs(pipe.text_encoder)
    assert dm.distance(wanted, dm.text_outputs(loaded.text_encoder)) <= 1e-12
    assert dm.distance(wanted, plain) > 0.01


@pytest.mark.parametrize("dora", [True, pytest.param(False, marks=pytest.mark.nightly)])
def test_model_of_diffusers_loads_what_is_written_for_it(dora, tmp_path, caplog):
    model = dm.unet("xl")
    model.save_pretrained(tmp_path / "base")
    wrapped = peft_on(model, tmp_path / "peft", dora=dora)
    inputs = dm.unet_inputs(model)
    wanted, plain = dm.outputs(wrapped, inputs), dm.outputs(model, inputs)
    convert(tmp_path / "peft", "diffusers", tmp_path / "out", base=tmp_path / "base")
    name = "pytorch_lora_weights.safetensors"
    model.load_lora_adapter(tmp_path / "out", prefix="unet", weight_name=name)
    assert not complaints(caplog.records)
    assert dm.distance(wanted, dm.outputs(model, inputs)) <= 1e-12
    assert dm.distance(wanted, plain) > 0.01


# --- LyCORIS


def test_lycoris_loads_pefts_plain_lora(tmp_path):
    model = lycoris.net()
    targets = [name for name in lycoris.LAYERS if not name.endswith("grouped")]
    config = peft.LoraConfig(r=3, lora_alpha=5, rank_pattern={"conv_3": 2}, target_modules=targets)
    wrapped = peft.get_peft_model(copy.deepcopy(model), config).eval()
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.3)
    wrapped.save_pretrained(tmp_path / "peft")
    convert(tmp_path / "peft", "lycoris", tmp_path / "out")
    file = tmp_path / "out/lora.safetensors"
    network, _ = wrapper.create_lycoris_from_weights(1.0, str(file), model)
    loaded = {lora.lora_name: lora for lora in network.loras}
    assert loaded.keys() == {f"lycoris_{name.replace('.', '_')}" for name in targets}
    wrapped.double()
    for name in targets:
        layer = wrapped.base_model.model.get_submodule(name)
        W = layer.get_base_layer().weight
        want = oracle.float64(W + layer.get_delta_weight("default"))
        got = lycoris.used_weight(loaded[f"lycoris_{name.replace('.', '_')}"])
        assert distance(got, want) <= 1e-12, name
        assert distance(W, want) > 1e-2, name


@pytest.mark.parametrize("axis", ["out", "in"])
def test_lycoris_loads_dora_with_magnitudes_of_outputs_only(axis, tmp_path):
    model = lycoris.net()
    trained = lycoris.attach(model, "locon", axis)
    save_file(lycoris.state(trained), tmp_path / "own.safetensors")
    report = convert(tmp_path / "own.safetensors", "lycoris", tmp_path / "out")
    file = str(tmp_path / "out/lora.safetensors")
    if axis == "in":
        assert "LyCORIS' own loader takes magnitudes of outputs only" in " ".join(report.notes)
        with pytest.raises(RuntimeError, match="broadcast shape"):
            kohya.create_network_from_weights(1.0, file, None, None, model)
        return
    network, _ = kohya.create_network_from_weights(1.0, file, None, None, model)
    loaded = {lora.lora_name: lora for lora in network.unet_loras}
    assert len(loaded) == len(trained)
    for name, module in trained.items():
        again = loaded[f"lora_unet_{name.replace('.', '_')}"]
        want = lycoris.used_weight(module)
        assert torch.equal(lycoris.used_weight(again), want), name
        assert not torch.allclose(want, module.org_module[0].weight.double(), rtol=1e-2), name
