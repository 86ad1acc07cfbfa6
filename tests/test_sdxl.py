"""Stable Diffusion XL whole: a UNet and two text encoders, DoRA as kohya's scripts train it.

Network, names and file are LyCORIS' own; the base is a pipeline that diffusers saved, or the same
weights in one file as SDXL was published (LDM's UNet, transformers' first and OpenCLIP's second
text encoder). The reference is the forward of the three models with the network on them, float64.
"""

import re

import pytest
import torch
from lycoris import kohya
from safetensors.torch import load_file, save_file

from tests import lycoris_models as models
from tests.test_diffusion_names import OPEN_CLIP, UNET, open_clip, to_ldm
from tests.test_lycoris_pipeline import PRESET
from tests.trainers import inspected, merged

dm = pytest.importorskip("tests.diffusion_models", reason="diffusers is not installed")
diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
single_file = pytest.importorskip("diffusers.loaders.single_file_utils")
FIRST = "conditioner.embedders.0.transformer."
CLOSE = 1e-5


def parts():
    """The three models, with the same weights every time."""
    return {"unet": dm.unet("sdxl"), "text_encoder": dm.text_encoder(12),
            "text_encoder_2": dm.text_encoder(12, projection=12, seed=9)}  # fmt: skip


def write_pipeline(folder):
    """A pipeline in diffusers' layout, without tokenizers."""
    own = parts()
    diffusers.StableDiffusionXLPipeline(
        vae=dm.vae(), tokenizer=None, tokenizer_2=None, scheduler=dm.EulerDiscreteScheduler(), **own
    ).save_pretrained(folder)
    return folder


def write_single_file(folder):
    """The same models as Stable Diffusion XL was published."""
    own = parts()
    state = own["text_encoder"].state_dict()
    first = {f"{FIRST}{n if n.startswith('text_model.') else f'text_model.{n}'}": t.clone()
             for n, t in state.items()}  # fmt: skip
    vae = {f"first_stage_model.{n}": t.clone() for n, t in dm.vae().state_dict().items()}
    folder.mkdir()
    save_file(to_ldm(own["unet"]) | first | open_clip(own["text_encoder_2"]) | vae,
              folder / "sdxl.safetensors")  # fmt: skip
    return folder / "sdxl.safetensors"


def load_pipeline(folder):
    return {
        "unet": dm.UNet2DConditionModel.from_pretrained(folder / "unet"),
        "text_encoder": dm.CLIPTextModel.from_pretrained(folder / "text_encoder"),
        "text_encoder_2": dm.CLIPTextModelWithProjection.from_pretrained(
            folder / "text_encoder_2"),
    }  # fmt: skip


def load_single_file(folder):
    """The models of a single file, by diffusers' own converters."""
    (file,) = folder.glob("*.safetensors")
    stored, own = load_file(file), parts()
    unet = own["unet"]
    config = {k: unet.config[k] for k in ("layers_per_block", "class_embed_type",
                                          "addition_embed_type", "num_class_embeds")}  # fmt: skip
    ldm = {n: t for n, t in stored.items() if n.startswith(UNET)}
    unet.load_state_dict(single_file.convert_ldm_unet_checkpoint(ldm, config))
    for name, found in (
        ("text_encoder", {n.removeprefix(FIRST): t for n, t in stored.items()
                          if n.startswith(FIRST)}),
        ("text_encoder_2", single_file.convert_open_clip_checkpoint(
            own["text_encoder_2"], stored, OPEN_CLIP)),
    ):  # fmt: skip
        names = own[name].state_dict().keys()
        found = {n if n in names else n.removeprefix("text_model."): t for n, t in found.items()}
        own[name].load_state_dict({n: t for n, t in found.items() if n in names})
        assert names <= found.keys()
    return own


def outputs(own):
    return {name: dm.outputs(model, dm.unet_inputs(model)) if name == "unet"
            else dm.text_outputs(model) for name, model in own.items()}  # fmt: skip


def train(own, file, on_output):
    """Train LyCORIS' DoRA on all three, as kohya's scripts set it up; returns their outputs."""
    encoders = [own["text_encoder"], own["text_encoder_2"]]
    preset = file.with_name("preset.toml")
    preset.write_text(PRESET)
    network = kohya.create_network(
        1.0, 2, 3.0, None, encoders, own["unet"], preset=str(preset), algo="locon", conv_dim=2,
        conv_alpha=1.0, dora_wd=True, wd_on_output=on_output,
    )  # fmt: skip
    network.apply_to(encoders, own["unet"], True, True)
    torch.manual_seed(5)
    for lora in network.loras:
        models.train(lora)
    network.save_weights(str(file), None, {"ss_network_module": "lycoris.kohya"})
    # As with the transformers that kohya's scripts pin, whose text encoders have one more name.
    tensors = {re.sub(r"^(lora_te\d)_encoder_", r"\1_text_model_encoder_", name): tensor
               for name, tensor in load_file(file).items()}  # fmt: skip
    save_file(tensors, file, {"ss_network_module": "lycoris.kohya"})
    for model in (*own.values(), network):
        model.double().eval()
    inputs = {k: v.double() if v.is_floating_point() else v
              for k, v in flat(dm.unet_inputs(own["unet"])).items()}  # fmt: skip
    ids = torch.arange(14).reshape(2, 7) % 40
    with torch.no_grad(), models.eps_of(torch.float32):
        found = {name: model(input_ids=ids)[0] for name, model in own.items() if name != "unet"}
        found["unet"] = own["unet"](**nested(inputs))[0]
    return found, len(network.loras)


def flat(inputs):
    return {k: v for k, v in inputs.items() if k != "added_cond_kwargs"} | inputs.get(
        "added_cond_kwargs", {})  # fmt: skip


def nested(inputs):
    extra = {k: inputs.pop(k) for k in ("text_embeds", "time_ids") if k in inputs}
    return {**inputs, "added_cond_kwargs": extra}


LAYOUTS = {"pipeline": (write_pipeline, load_pipeline),
           "single file": (write_single_file, load_single_file)}  # fmt: skip
CASES = [("in", "single file"), *(
    pytest.param(*case, marks=pytest.mark.nightly)
    for case in (("in", "pipeline"), ("out", "single file"), ("out", "pipeline"))
)]  # fmt: skip


@pytest.mark.parametrize(("axis", "layout"), CASES)
def test_merged_sdxl_computes_what_the_trained_one_does(axis, layout, tmp_path):
    adapter, (write, load) = tmp_path / "adapter.safetensors", LAYOUTS[layout]
    wanted, count = train(parts(), adapter, axis == "out")
    modules = {name.partition(".")[0] for name in load_file(adapter)}
    assert len(modules) == count
    for prefix in ("lora_unet_", "lora_te1_text_model_", "lora_te2_text_model_"):
        assert any(m.startswith(prefix) for m in modules), prefix
    base = write(tmp_path / "base")
    merged(base, adapter, tmp_path / "out")
    got, plain = outputs(load(tmp_path / "out")), outputs(parts())
    for name, want in wanted.items():
        assert dm.distance(want, got[name]) <= CLOSE, name
        assert dm.distance(want, plain[name]) > 0.01, name
    shown = inspected(adapter, "--base", base)
    for words in (f"{axis}, by the shape of dora_scale", "LyCORIS in kohya sd-scripts", "fits"):
        assert words in shown
