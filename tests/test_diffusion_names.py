"""Single files in the layouts of the models' first code, against diffusers' own converters.

The converters, and diffusers' models with PEFT's adapters in them, are the reference: what a merged
single file becomes when diffusers loads it must compute what the unmerged model does.
"""

import copy
import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import dora_export
from dora_export import diffusion_names, flux_names, unet_names
from dora_export.checkpoints import open_checkpoint
from dora_export.errors import AdapterError
from tests import oracle, small
from tests.trainers import RELATIVE, merged, refused

dm = pytest.importorskip("tests.diffusion_models", reason="diffusers is not installed")
single_file = pytest.importorskip("diffusers.loaders.single_file_utils")
CLOSE = 1e-6
UNET = "model.diffusion_model."
CLIP = "cond_stage_model.transformer."
OPEN_CLIP = "conditioner.embedders.1.model."


def unet_config(model):
    return {k: model.config[k] for k in ("layers_per_block", "class_embed_type",
                                         "addition_embed_type", "num_class_embeds")}  # fmt: skip


def to_ldm(model):
    """A UNet's weights under LDM's names, as this package's table has them."""
    state = model.state_dict()
    names = unet_names.to_ldm({n.rpartition(".")[0] for n in state})
    return {f"{UNET}{names[n.rpartition('.')[0]]}.{n.rpartition('.')[2]}": t.clone()
            for n, t in state.items()}  # fmt: skip


@pytest.mark.parametrize("kind", ["sd", "sdxl", "deep"])
def test_unet_names_are_those_that_diffusers_converts(kind):
    model = dm.unet(kind)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()  # norms as well: no two tensors may be alike
    state, ldm = model.state_dict(), to_ldm(model)
    assert len(ldm) == len(state)
    converted = single_file.convert_ldm_unet_checkpoint(dict(ldm), unet_config(model))
    assert converted.keys() == state.keys()
    assert all(torch.equal(converted[n], t) for n, t in state.items())
    modules = {n.removeprefix(UNET).rpartition(".")[0] for n in ldm}
    back = unet_names.to_diffusers(modules)
    assert {v: k for k, v in back.items()} == unet_names.to_ldm(back.values())


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return dm.Pair(tmp_path_factory.mktemp("names"))


@pytest.fixture(scope="module")
def checkpoint(pair):
    """The pair's pipeline as one file, as Stable Diffusion 1.5 was published."""
    text = {f"{CLIP}text_model.{n}": t for n, t in pair.stored["text_encoder"].items()}
    vae = {f"first_stage_model.{n}": t.clone() for n, t in dm.vae().state_dict().items()}
    plain = dm.load(pair.base)
    tensors = to_ldm(plain.unet) | text | vae | {"model_ema.decay": torch.tensor(0.9)}
    save_file(tensors, pair.base.parent / "sd.safetensors", {"format": "pt"})
    return pair.base.parent / "sd.safetensors"


def loaded_unet(file, pair):
    """The UNet of a single file, through diffusers' converter."""
    tensors = {n: t for n, t in load_file(file).items() if n.startswith(UNET)}
    model = dm.unet()
    model.load_state_dict(single_file.convert_ldm_unet_checkpoint(tensors, unet_config(model)))
    return model


def one_file(folder):
    (file,) = folder.glob("*.safetensors")
    return file


def test_adapter_of_diffusers_merges_into_a_single_file(pair, checkpoint, tmp_path):
    merged(checkpoint, pair.adapter, tmp_path / "out")
    file = one_file(tmp_path / "out")
    assert file.name == "sd.safetensors"
    stored, before = load_file(file), load_file(checkpoint)
    assert stored.keys() == before.keys()
    assert dm.distance(pair.outputs, dm.outputs(loaded_unet(file, pair), pair.inputs)) < CLOSE
    text = copy.deepcopy(dm.load(pair.base).text_encoder)
    text.load_state_dict({n.removeprefix(f"{CLIP}text_model."): t for n, t in stored.items()
                          if n.startswith(CLIP)})  # fmt: skip
    assert dm.distance(pair.text_outputs, dm.text_outputs(text)) < CLOSE
    untouched = [n for n in stored if n.startswith("first_stage_model.")]
    assert untouched
    assert all(torch.equal(stored[n], before[n]) for n in untouched)
    assert dora_export.verify(checkpoint, pair.adapter, tmp_path / "out").exit_code == 0


def test_layers_of_one_number_in_the_files_names_are_no_family(pair, checkpoint, tmp_path):
    """LDM counts what diffusers gives names of their own: time_embed.0 and .2."""
    module = "time_embedding.linear_1"
    out, into = pair.stored["unet"][f"{module}.weight"].shape
    tensors = {f"unet.{module}.lora_A.weight": torch.randn(2, into),
               f"unet.{module}.lora_B.weight": torch.randn(out, 2)}  # fmt: skip
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["linear_1"]}
    said = json.dumps({f"unet.{k}": v for k, v in config.items()})
    save_file(tensors, tmp_path / "a.safetensors", {"lora_adapter_metadata": said})
    report = dora_export.merge(checkpoint, tmp_path / "a.safetensors", tmp_path / "x", dry_run=True)
    assert report.changed == 1


def kohya(pair, names, components=("unet",)):
    """The pair's adapter as LyCORIS writes it: flattened names, magnitudes as dora_scale."""
    made = {}
    for name, tensor in pair.tensors.items():
        component, _, path = name.partition(".")
        module, _, part = path.partition(".lora_")
        if component not in components:
            continue
        flat = names(component, module).replace(".", "_")
        leaf = {"A.weight": "lora_down.weight", "B.weight": "lora_up.weight",
                "magnitude_vector": "dora_scale"}[part]  # fmt: skip
        if part == "magnitude_vector":
            wide = load_rank(pair, component, module)
            tensor = tensor.reshape(-1, *([1] * (wide - 1)))
            made[f"{flat}.alpha"] = torch.tensor(dm.ALPHA)
        made[f"{flat}.{leaf}"] = tensor.clone()
    return made


def load_rank(pair, component, module):
    return pair.stored[component][f"{module}.weight"].ndim


def of_diffusers(component, module):
    return {"unet": "lora_unet.", "text_encoder": "lora_te.text_model."}[component] + module


def of_ldm(pair):
    modules = {n.rpartition(".")[0] for n in pair.stored["unet"]}
    names = unet_names.to_ldm(modules)
    return lambda component, module: f"lora_unet.{names[module]}"


@pytest.mark.parametrize("named", ["diffusers", "LDM"])
@pytest.mark.parametrize("onto", ["pipeline", "component", "single file"])
def test_flattened_names_of_either_kind_fit_either_layout(named, onto, pair, checkpoint, tmp_path):
    names = of_diffusers if named == "diffusers" else of_ldm(pair)
    save_file(kohya(pair, names), tmp_path / "lora.safetensors")
    base = {"pipeline": pair.base, "component": pair.base / "unet", "single file": checkpoint}[onto]
    dora_export.merge(base, tmp_path / "lora.safetensors", tmp_path / "out", verify="full")
    if onto == "single file":
        unet = loaded_unet(one_file(tmp_path / "out"), pair)
    else:
        folder = tmp_path / "out" / ("unet" if onto == "pipeline" else "")
        unet = dm.UNet2DConditionModel.from_pretrained(folder)
    assert dm.distance(pair.outputs, dm.outputs(unet, pair.inputs)) < CLOSE


@pytest.mark.parametrize("onto", ["pipeline", "single file"])
def test_text_encoder_goes_by_its_name_with_text_model_too(onto, pair, checkpoint, tmp_path):
    save_file(kohya(pair, of_diffusers, ("unet", "text_encoder")), tmp_path / "lora.safetensors")
    base = pair.base if onto == "pipeline" else checkpoint
    out = tmp_path / "out"
    dora_export.merge(base, tmp_path / "lora.safetensors", out, verify="full")
    stored = load_file(pair.weights("text_encoder", out) if onto == "pipeline" else one_file(out))
    text = dm.load(pair.base).text_encoder
    front = "" if onto == "pipeline" else f"{CLIP}text_model."
    text.load_state_dict({n.removeprefix(front): t for n, t in stored.items() if front in n})
    assert dm.distance(pair.text_outputs, dm.text_outputs(text)) < CLOSE


def test_older_text_encoder_takes_names_without_text_model(pair, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(pair.base, base)
    file = base / "text_encoder/model.safetensors"
    save_file({f"text_model.{n}": t for n, t in load_file(file).items()}, file, {"format": "pt"})
    assert "text_encoder.encoder.layers.0.mlp.fc1.lora_A.weight" in pair.tensors
    dora_export.merge(base, pair.adapter, tmp_path / "out", verify="full")
    stored = load_file(tmp_path / "out/text_encoder/model.safetensors")
    exact = load_file(pair.weights("text_encoder", pair.merged))
    assert stored.keys() == {f"text_model.{n}" for n in exact}
    assert all(torch.equal(stored[f"text_model.{n}"], t) for n, t in exact.items())
    # A library of today saves it without: the same model, and verification says so.
    save_file(exact, tmp_path / "out/text_encoder/model.safetensors", {"format": "pt"})
    report = dora_export.verify(base, pair.adapter, tmp_path / "out")
    assert report.exit_code == 0
    assert [(f.code, f.where) for f in report.findings] == [("names-prefixed", "text_encoder")]


@pytest.mark.parametrize("onto", ["pipeline", "single file"])
def test_third_text_encoder_is_t5(onto, tmp_path):
    model, base, out = dm.t5(), tmp_path / "base", tmp_path / "out"
    front = "text_encoders.t5xxl.transformer."
    if onto == "pipeline":
        model.save_pretrained(base / "text_encoder_3")
        small.write_json(base / "model_index.json", {
            "_class_name": "StableDiffusion3Pipeline",
            "text_encoder_3": ["transformers", "T5EncoderModel"],
        })  # fmt: skip
    else:
        state = {f"{front}{n}": t.clone() for n, t in model.state_dict().items()}
        state["text_encoders.clip_g.transformer.text_projection.weight"] = torch.ones(2, 2)
        base.mkdir()
        save_file(state, base / "sd3.safetensors")
    dm.train(model, ["q", "k", "v", "o", "wi_0", "wo"], 13, dora=False)
    made = {}
    for name, tensor in dm.layers(model).items():
        module, _, part = name.partition(".lora_")
        key = f"lora_te3_{module.replace('.', '_')}"
        made[f"{key}.lora_{'down' if part == 'A.weight' else 'up'}.weight"] = tensor
        made[f"{key}.alpha"] = torch.tensor(dm.ALPHA)
    assert "lora_te3_encoder_block_0_layer_0_SelfAttention_q.lora_up.weight" in made
    save_file(made, tmp_path / "lora.safetensors")
    dora_export.merge(base, tmp_path / "lora.safetensors", out, verify="full")
    plain = dm.t5(seed=77)
    if onto == "pipeline":
        plain = dm.T5EncoderModel.from_pretrained(out / "text_encoder_3")
    else:
        stored = {n.removeprefix(front): t for n, t in load_file(out / "sd3.safetensors").items()
                  if n.startswith(front)}  # fmt: skip
        plain.load_state_dict(stored)
    assert dm.distance(dm.text_outputs(model), dm.text_outputs(plain)) < CLOSE
    assert dm.distance(dm.text_outputs(model), dm.text_outputs(dm.t5())) > 0.01


# --- OpenCLIP's text encoder, q, k and v in one tensor


def open_clip(model):
    """A text encoder of transformers in OpenCLIP's layout."""
    made, state = {}, model.state_dict()
    for name, tensor in state.items():
        own = name.removeprefix("text_model.")
        if own.startswith("encoder.layers."):
            _, _, number, rest = own.split(".", 3)
            if ".q_proj." in rest:
                leaf = rest.rpartition(".")[2]
                parts = [state[name.replace("q_proj", f"{w}_proj")] for w in "qkv"]
                made[f"transformer.resblocks.{number}.attn.in_proj_{leaf}"] = torch.cat(parts)
            for ours, theirs in (
                ("layer_norm1", "ln_1"), ("layer_norm2", "ln_2"), ("mlp.fc1", "mlp.c_fc"),
                ("mlp.fc2", "mlp.c_proj"), ("self_attn.out_proj", "attn.out_proj"),
            ):  # fmt: skip
                if rest.startswith(ours):
                    made[f"transformer.resblocks.{number}.{rest.replace(ours, theirs)}"] = tensor
        elif own == "embeddings.token_embedding.weight":
            made["token_embedding.weight"] = tensor
        elif own == "embeddings.position_embedding.weight":
            made["positional_embedding"] = tensor
        elif own.startswith("final_layer_norm"):
            made[own.replace("final_layer_norm", "ln_final")] = tensor
        elif own == "text_projection.weight":
            made["text_projection"] = tensor.T.contiguous()
    return {f"{OPEN_CLIP}{n}": t.clone() for n, t in made.items()}


def test_open_clip_takes_adapters_of_transformers_names(tmp_path):
    model = dm.text_encoder(12, projection=12)
    base = open_clip(model) | to_ldm(dm.unet("sdxl"))
    save_file(base, tmp_path / "sdxl.safetensors")
    dm.train(model, [*dm.TEXT_TARGETS, "fc2", "text_projection"], 7)
    tensors = {f"text_encoder_2.{n}": t for n, t in dm.layers(model).items()}
    assert any("text_projection" in n for n in tensors)
    alphas = {n.replace("lora_A.weight", "alpha"): torch.tensor(dm.ALPHA)
              for n in tensors if "lora_A" in n}  # fmt: skip
    save_file(tensors | alphas, tmp_path / "lora.safetensors")
    stored = merged(tmp_path / "sdxl.safetensors", tmp_path / "lora.safetensors", tmp_path / "out")
    plain = dm.text_encoder(12, projection=12)
    converted = single_file.convert_open_clip_checkpoint(plain, stored, OPEN_CLIP)
    own = plain.state_dict()
    renamed = {n if n in own else n.removeprefix("text_model."): t for n, t in converted.items()}
    plain.load_state_dict({n: t for n, t in renamed.items() if n in own})
    assert own.keys() <= renamed.keys()
    expected = dm.text_outputs(model)
    assert dm.distance(expected, dm.text_outputs(plain)) < CLOSE
    assert dm.distance(expected, dm.text_outputs(dm.text_encoder(12, projection=12))) > 0.01


def test_magnitudes_per_input_of_a_part_have_their_own_norm(tmp_path):
    base = open_clip(dm.text_encoder(12, projection=12)) | to_ldm(dm.unet("sdxl"))
    save_file(base, tmp_path / "sdxl.safetensors")
    make = torch.Generator().manual_seed(3)
    A, B = torch.randn(3, 12, generator=make), torch.randn(12, 3, generator=make)
    fused = f"{OPEN_CLIP}transformer.resblocks.0.attn.in_proj_weight"
    W = base[fused][12:24]
    m = W.norm(dim=0, keepdim=True) * (0.6 + 0.8 * torch.rand(1, 12, generator=make))
    key = "lora_te2_text_model_encoder_layers_0_self_attn_k_proj"
    save_file({f"{key}.lora_down.weight": A, f"{key}.lora_up.weight": B, f"{key}.dora_scale": m,
               f"{key}.alpha": torch.tensor(2.0)}, tmp_path / "lora.safetensors")  # fmt: skip
    stored = merged(tmp_path / "sdxl.safetensors", tmp_path / "lora.safetensors", tmp_path / "out")
    W, A, B, m = (oracle.float64(t) for t in (W, A, B, m))
    exact = oracle.dora(W, A, B, m.ravel(), 2 / 3, axis=0)
    got = oracle.float64(stored[fused])
    assert np.abs(got[12:24] - exact).max() / np.abs(exact).max() < RELATIVE
    assert np.array_equal(got[:12], oracle.float64(base[fused][:12]))
    assert np.array_equal(got[24:], oracle.float64(base[fused][24:]))


# --- Flux, which fuses q, k, v and the MLP


def original_flux(model):
    """A Flux transformer of diffusers in the original layout, by definition."""
    state, made = model.state_dict(), {}
    for module in {n.rpartition(".")[0] for n in state}:
        original = flux_names.original_name(module)
        if original is None:
            continue
        for leaf in ("weight", "bias"):
            parts = [state[f"{n}.{leaf}"] for n in flux_names.diffusers_names(original)]
            if original == flux_names.HALVES_SWAPPED:
                parts = list(parts[0].chunk(2))[::-1]
            made[f"{original}.{leaf}"] = torch.cat(parts)
    return made


def from_original(tensors, model):
    """A model with the weights of the original layout: the reverse, by slices."""
    state = {n: t.clone() for n, t in model.state_dict().items()}
    for name, tensor in tensors.items():
        original, _, leaf = name.rpartition(".")
        names = flux_names.diffusers_names(original)
        if original == flux_names.HALVES_SWAPPED:
            tensor = torch.cat(list(tensor.chunk(2))[::-1])
        for part, rows in zip(
            names, tensor.split([len(state[f"{n}.{leaf}"]) for n in names]), strict=True
        ):
            state[f"{part}.{leaf}"] = rows
    model.load_state_dict(state)
    return model


def test_flux_names_are_those_that_diffusers_converts():
    """Values tell which row of which original tensor each of diffusers' tensors is made of."""
    inner, mlp = 3072, 4 * 3072  # the converter knows this size only
    rows = {"qkv": 3 * inner, "linear1": 3 * inner + mlp, "adaLN_modulation.1": 2 * inner}
    names = [f"double_blocks.0.{n}" for n in flux_names.DOUBLE]
    names += [f"single_blocks.0.{n}" for n in flux_names.SINGLE] + list(flux_names.OUTSIDE)
    made = {}
    for number, name in enumerate(names):
        count = next((r for end, r in rows.items() if name.endswith(end)), 4)
        for leaf, offset in (("weight", 0.0), ("bias", 0.5)):
            values = number * 100_000 + torch.arange(count, dtype=torch.float64) + offset
            made[f"{name}.{leaf}"] = values[:, None] if leaf == "weight" else values
    norms = {f"double_blocks.0.{s}_attn.norm.{q}_norm.scale": torch.ones(1)
             for s in ("img", "txt") for q in ("query", "key")}  # fmt: skip
    norms |= {f"single_blocks.0.norm.{q}_norm.scale": torch.ones(1) for q in ("query", "key")}
    converted = single_file.convert_flux_transformer_checkpoint_to_diffusers({**made, **norms})
    seen = set()
    for name in names:
        parts = flux_names.diffusers_names(name)
        assert all(flux_names.original_name(p) == name for p in parts)
        for leaf in ("weight", "bias"):
            found = torch.cat([converted[f"{p}.{leaf}"] for p in parts])
            source = made[f"{name}.{leaf}"]
            if name == flux_names.HALVES_SWAPPED:
                source = torch.cat(list(source.chunk(2))[::-1])
            assert torch.equal(found, source), name
            seen |= {f"{p}.{leaf}" for p in parts}
    assert seen == {n for n in converted if "attn.norm_" not in n}


FLUX_TARGETS = ["to_q", "to_k", "to_v", "add_k_proj", "to_out.0", "proj_mlp", "ff.net.2",
                "norm_out.linear", "proj_out", "x_embedder"]  # fmt: skip


def write_flux(folder, layout):
    """A transformer's folder in diffusers' layout, or the original single file."""
    model = dm.flux()
    if layout == "diffusers":
        model.save_pretrained(folder / "transformer")
        return folder / "transformer"
    front = UNET if layout == "in one file" else ""
    save_file({f"{front}{n}": t for n, t in original_flux(model).items()}, folder / "flux.st")
    (folder / "flux.st").rename(folder / "flux.safetensors")
    return folder / "flux.safetensors"


@pytest.mark.parametrize("layout", ["diffusers", "original", "in one file"])
def test_adapter_of_diffusers_merges_into_either_flux(layout, tmp_path):
    base = write_flux(tmp_path, layout)
    model = dm.train(dm.flux(), FLUX_TARGETS, 8)
    tensors = {f"transformer.{n}": t for n, t in dm.layers(model).items()}
    alphas = {n.replace("lora_A.weight", "alpha"): torch.tensor(dm.ALPHA)
              for n in tensors if "lora_A" in n}  # fmt: skip
    save_file(tensors | alphas, tmp_path / "lora.safetensors")
    stored = merged(base, tmp_path / "lora.safetensors", tmp_path / "out")
    if layout == "diffusers":
        plain = dm.FluxTransformer2DModel.from_pretrained(tmp_path / "out")
    else:
        front = UNET if layout == "in one file" else ""
        plain = from_original({n.removeprefix(front): t for n, t in stored.items()}, dm.flux())
    expected = dm.outputs(model, dm.flux_inputs())
    assert dm.distance(expected, dm.outputs(plain, dm.flux_inputs())) < CLOSE
    assert dm.distance(expected, dm.outputs(dm.flux(), dm.flux_inputs())) > 0.01


def fused_adapter(model, axis="out"):
    """LoRA with magnitudes on the fused layers, as trained on the original model."""
    made, exact, make = {}, {}, torch.Generator().manual_seed(12)
    for name, W in original_flux(model).items():
        module = name.removesuffix(".weight")
        if not name.endswith((".qkv.weight", "linear1.weight", "adaLN_modulation.1.weight")):
            continue
        A = torch.randn(3, W.shape[1], generator=make) * 0.3
        B = torch.randn(W.shape[0], 3, generator=make) * 0.3
        over = 1 if axis == "out" else 0
        norm = W.norm(dim=over, keepdim=True)
        m = norm * (0.6 + 0.8 * torch.rand(norm.shape, generator=make))
        key = f"lora_unet_{module.replace('.', '_')}"
        made |= {f"{key}.lora_down.weight": A, f"{key}.lora_up.weight": B, f"{key}.dora_scale": m,
                 f"{key}.alpha": torch.tensor(2.0)}  # fmt: skip
        values = [oracle.float64(t) for t in (W, A, B, m.ravel())]
        exact[name] = oracle.dora(*values, 2 / 3, axis=over)
    return made, exact


@pytest.mark.parametrize("layout", ["diffusers", "original", "in one file"])
def test_fused_adapter_merges_into_either_flux(layout, tmp_path):
    base, model = write_flux(tmp_path, layout), dm.flux()
    made, exact = fused_adapter(model)
    assert len(exact) == 4
    save_file(made, tmp_path / "lora.safetensors")
    stored = merged(base, tmp_path / "lora.safetensors", tmp_path / "out")
    if layout == "diffusers":
        stored = original_flux(dm.FluxTransformer2DModel.from_pretrained(tmp_path / "out"))
    for name, values in exact.items():
        got = stored[f"{UNET}{name}" if layout == "in one file" else name]
        assert np.abs(oracle.float64(got) - values).max() / np.abs(values).max() < RELATIVE, name


def test_fused_magnitudes_per_input_stay_fused_or_are_refused(tmp_path):
    made, exact = fused_adapter(dm.flux(), "in")
    save_file(made, tmp_path / "lora.safetensors")
    whole = write_flux(tmp_path, "original")
    stored = merged(whole, tmp_path / "lora.safetensors", tmp_path / "out")
    for name, values in exact.items():
        got = oracle.float64(stored[name])
        assert np.abs(got - values).max() / np.abs(values).max() < RELATIVE
    apart = write_flux(tmp_path, "diffusers")
    said = refused(apart, tmp_path / "lora.safetensors", tmp_path / "apart")
    assert "one magnitude per input, with a norm over all outputs at once" in said
    assert "Merge into a checkpoint that stores them fused" in said


def test_models_of_other_kinds_have_no_other_names(tmp_path):
    save_file({"model.layers.0.q_proj.weight": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    assert diffusion_names.other_names(open_checkpoint(tmp_path)) == {}


def test_fused_layers_are_not_converted_onto_a_base_that_holds_them_apart(tmp_path):
    made, _ = fused_adapter(dm.flux())
    plain = {n: t for n, t in made.items() if not n.endswith("dora_scale")}
    save_file(plain, tmp_path / "lora.safetensors")
    apart = write_flux(tmp_path, "diffusers")
    with pytest.raises(AdapterError, match=r"(?s)layers of the adapter in several parts.*--base"):
        dora_export.convert(tmp_path / "lora.safetensors", "peft", tmp_path / "no", base=apart)
    whole = write_flux(tmp_path, "original")
    dora_export.convert(tmp_path / "lora.safetensors", "peft", tmp_path / "peft", base=whole)
    for name, adapter in (("one", "lora.safetensors"), ("two", "peft")):
        dora_export.merge(whole, tmp_path / adapter, tmp_path / name)
    one, two = (next((tmp_path / n).glob("*.safetensors")).read_bytes() for n in ("one", "two"))
    assert one == two
