"""SimpleTuner's files, every layout it saves, against the forward of the UNet that it trained.

It trains with PEFT or with LyCORIS' own network and saves through diffusers or LyCORIS, so these
make the fixtures; what SimpleTuner adds is written from its definition: github.com/bghira/
SimpleTuner, simpletuner/helpers/training/save_hooks.py (_save_lora, _save_lycoris,
_build_modelspec_metadata), training/lora_format.py (convert_diffusers_to_comfyui and ..._sd_lora),
training/trainer.py (create_lycoris), models/common.py (add_lora_adapter, save_lora_weights).
"""

import json

import numpy as np
import pytest
import torch
from lycoris import LycorisNetwork, create_lycoris
from safetensors.torch import load_file, save_file

import dora_export
from tests import lycoris_models as lycoris
from tests import oracle
from tests.trainers import RELATIVE, distance, inspected, merged, refused

dm = pytest.importorskip("tests.diffusion_models", reason="diffusers is not installed")
ADDED = {
    "modelspec.sai_model_spec": "1.0.0", "global_step": "200", "trained_words": "a cat",
    "modelspec.architecture": "stable-diffusion/lora", "modelspec.implementation": "diffusers",
    "modelspec.title": "cats", "modelspec.resolution": "512x512",
}  # fmt: skip
CLOSE = 1e-6  # of the largest output; the merge rounds once to float32
FILE = "pytorch_lora_weights.safetensors"


class Trained:
    """A UNet with a trained DoRA of PEFT, as SimpleTuner's ``--lora_type standard`` trains it."""

    def __init__(self, folder):
        self.base = folder / "base"
        self.unet = dm.unet()
        self.unet.save_pretrained(self.base)
        self.stored = load_file(self.base / "diffusion_pytorch_model.safetensors")
        self.inputs = dm.unet_inputs(self.unet)
        self.plain = dm.outputs(self.unet, self.inputs)
        dm.train(self.unet, dm.UNET_TARGETS)
        self.outputs = dm.outputs(self.unet, self.inputs)
        self.tensors = {f"unet.{n}": t for n, t in dm.layers(self.unet).items()}
        settings = dm.metadata(self.unet)
        self.settings = {k: sorted(v) if isinstance(v, set) else v for k, v in settings.items()}

    def run(self, folder):
        """What a merged UNet computes."""
        model = type(self.unet).from_pretrained(folder)
        return dm.outputs(model, self.inputs)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return Trained(tmp_path_factory.mktemp("simpletuner"))


def entry(settings):
    return {"lora_adapter_metadata": json.dumps(settings)}


def standard(made):
    """``pytorch_lora_weights`` of diffusers with its metadata, and SimpleTuner's entries added."""
    return made.tensors, entry({f"unet.{k}": v for k, v in made.settings.items()}) | ADDED


def earlier(made):
    """As before: the magnitudes' names with ".weight", which its loader still looks for."""
    tensors, metadata = standard(made)
    ends = "lora_magnitude_vector"
    return {f"{n}.weight" if n.endswith(ends) else n: t for n, t in tensors.items()}, metadata


def comfyui(made):
    """``--lora_format comfyui``: another prefix, alphas; settings without the component."""
    tensors = {n.replace("unet.", "diffusion_model.", 1): t for n, t in made.tensors.items()}
    modules = [n.removesuffix(".lora_A.weight") for n in tensors if n.endswith(".lora_A.weight")]
    alphas = {f"{m}.alpha": torch.tensor(dm.ALPHA) for m in modules}
    return tensors | alphas, entry(made.settings) | ADDED


def comfyui_of_sd(made):
    """The same for Stable Diffusion: kohya's names, but the magnitudes keep theirs."""
    tensors, words = {}, {"lora_A": "lora_down", "lora_B": "lora_up"}
    for name, tensor in made.tensors.items():
        module, _, part = name.removeprefix("unet.").partition(".lora_")
        if part == "magnitude_vector":
            tensors[name] = tensor
            continue
        key = f"lora_unet_{module.replace('.', '_')}"
        tensors[f"{key}.{words[f'lora_{part[0]}']}.weight"] = tensor
        tensors[f"{key}.alpha"] = torch.tensor(dm.ALPHA)
    return tensors, entry(made.settings) | ADDED


LAYOUTS = {"standard": standard, "earlier": earlier, "ComfyUI": comfyui, "SD for ComfyUI":
           comfyui_of_sd}  # fmt: skip


def save(folder, tensors, metadata):
    folder.mkdir(exist_ok=True)
    save_file({n: t.contiguous().clone() for n, t in tensors.items()}, folder / FILE, metadata)
    return folder


@pytest.mark.parametrize("layout", LAYOUTS)
def test_merged_unet_computes_what_the_trained_one_does(layout, trained, tmp_path):
    adapter = save(tmp_path / "adapter", *LAYOUTS[layout](trained))
    got = merged(trained.base, adapter, tmp_path / "out")
    assert dm.distance(trained.outputs, trained.run(tmp_path / "out")) < CLOSE
    assert dm.distance(trained.outputs, trained.plain) > 0.01
    shapes = set()
    for module in {n.partition(".lora_")[0].removeprefix("unet.") for n in trained.tensors}:
        W, A, B, m = terms(trained, module)
        weight = oracle.float64(got[f"{module}.weight"]).reshape(W.shape)
        size = np.abs(weight).max(axis=1, keepdims=True)
        right = oracle.dora(W, A, B, m, dm.ALPHA / dm.RANK)
        assert (np.abs(weight - right) / size).max() <= RELATIVE, module
        for wrong in (oracle.dora(W, A, B, m, 1.0), oracle.lora(W, A, B, dm.ALPHA / dm.RANK)):
            assert (np.abs(weight - wrong) / size).max() > 100 * RELATIVE, module
        shapes.add((W.shape[0] == W.shape[1], trained.stored[f"{module}.weight"].ndim))
    assert {(True, 2), (False, 2), (False, 4)} <= shapes
    said = inspected(adapter, "--base", trained.base)
    for words in ("trainer      SimpleTuner", "out, by the name lora_magnitude_vector", "fits",
                  "alpha        5", "scaling      1.66667, by the metadata"):  # fmt: skip
        assert words in said


def terms(made, module):
    parts = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
    found = [made.stored[f"{module}.weight"]]
    found += [made.tensors[f"unet.{module}.{part}"] for part in parts]
    W, A, B, m = (oracle.float64(t) for t in found)
    return W.reshape(len(W), -1), A.reshape(dm.RANK, -1), B.reshape(-1, dm.RANK), m.ravel()


def test_file_of_another_name_is_known_by_its_tensors(trained, tmp_path):
    for layout in ("ComfyUI", "SD for ComfyUI"):
        save(tmp_path / "adapter", *LAYOUTS[layout](trained))
        file = (tmp_path / "adapter" / FILE).rename(tmp_path / f"{layout}.safetensors")
        assert "format       diffusers" in inspected(file, "--base", trained.base)


def test_alphas_that_contradict_the_settings_are_refused(trained, tmp_path):
    tensors, metadata = comfyui(trained)
    other = {n: torch.tensor(4.0) if n.endswith(".alpha") else t for n, t in tensors.items()}
    said = refused(trained.base, save(tmp_path / "a", other, metadata), tmp_path / "out")
    assert "alpha / rank is 1.33333, but 1.66667 by the metadata" in said


def test_magnitudes_that_two_layers_could_own_are_refused(trained, tmp_path):
    tensors, metadata = comfyui_of_sd(trained)
    m = next(n for n in tensors if n.endswith(".to_out.0.lora_magnitude_vector"))
    tensors[m.replace(".to_out.0.", ".to_out_0.")] = tensors[m]
    said = refused(trained.base, save(tmp_path / "a", tensors, metadata), tmp_path / "out")
    assert "lora_A and lora_B missing" in said


# --- --lora_type lycoris: LyCORIS' network under its own prefix, the config beside it

CONFIGS = {
    "lokr": {"algo": "lokr", "multiplier": 1.0, "linear_dim": 2, "linear_alpha": 3,
             "dora_wd": True, "factor": 4, "apply_preset": {
                 "target_module": ["Attention", "FeedForward", "ResnetBlock2D"],
                 "module_algo_map": {"Attention": {"factor": 2}, "FeedForward": {"factor": 2}}}},
    "loha, per input": {"algo": "loha", "linear_dim": 2, "linear_alpha": 3, "dora_wd": True,
                        "wd_on_output": False, "apply_preset": {
                            "target_module": ["Attention", "ResnetBlock2D"]}},
    "locon": {"algo": "lora", "linear_dim": 2, "linear_alpha": 3, "dora_wd": True,
              "apply_preset": {"target_module": ["Attention", "ResnetBlock2D"]}},
    "mixed": {"algo": "lokr", "linear_dim": 2, "linear_alpha": 3, "apply_preset": {
        "target_module": ["Attention"], "module_algo_map": {"Attention": {"algo": "loha"}}}},
}  # fmt: skip
PRESET = ("ENABLE_CONV", "TARGET_REPLACE_MODULE", "TARGET_REPLACE_NAME", "MODULE_ALGO_MAP",
          "NAME_ALGO_MAP", "LORA_PREFIX")  # fmt: skip


def lycoris_folder(folder, unet, config, dtype, monkeypatch):
    """Train LyCORIS' network as SimpleTuner makes it, and save what it saves."""
    for name in PRESET:  # a preset is put into the class
        monkeypatch.setattr(LycorisNetwork, name, getattr(LycorisNetwork, name))
    LycorisNetwork.apply_preset(config["apply_preset"])
    kept = {
        k: v for k, v in config.items() if k not in ("multiplier", "linear_dim", "linear_alpha")
    }
    network = create_lycoris(unet, 1, config["linear_dim"], config["linear_alpha"], **kept)
    network.apply_to()
    torch.manual_seed(5)
    for lora in network.loras:
        lycoris.train(lora, dtype)
    network.to(dtype)
    folder.mkdir()
    metadata = {"lycoris_config": json.dumps(config)} | ADDED
    network.save_weights(str(folder / FILE), next(network.parameters()).dtype, metadata)
    (folder / "lycoris_config.json").write_text(json.dumps(config))
    return network


OFTEN = [("lokr", torch.float32), ("loha, per input", torch.bfloat16)]


@pytest.mark.parametrize(
    ("case", "dtype"),
    [pytest.param(case, dtype, id=f"{case}-{dtype}",
                  marks=[] if (case, dtype) in OFTEN else [pytest.mark.nightly])
     for case in CONFIGS for dtype in (torch.float32, torch.bfloat16)],
)  # fmt: skip
def test_merged_unet_computes_what_lycoris_trained(case, dtype, trained, tmp_path, monkeypatch):
    unet = type(trained.unet).from_pretrained(trained.base)
    network = lycoris_folder(tmp_path / "adapter", unet, CONFIGS[case], dtype, monkeypatch)
    got = merged(trained.base, tmp_path / "adapter", tmp_path / "out")
    for model in (unet, network):
        model.double().eval()
    with torch.no_grad(), lycoris.eps_of(dtype):
        inputs = {k: v.double() if v.is_floating_point() else v for k, v in trained.inputs.items()}
        wanted = unet(**inputs)[0]
    assert dm.distance(wanted, trained.run(tmp_path / "out")) <= 1e-5
    assert dm.distance(wanted, trained.plain) > 0.05
    paths = {id(m): n for n, m in unet.named_modules()}
    kinds = set()
    for lora in network.loras:
        layer = lora.org_module[0]
        name = paths[id(layer)]
        lora.org_forward = type(layer).forward.__get__(layer)
        if layer.weight.ndim == 4:  # the weight is read off one kernel's output
            layer.padding, layer.stride = (0, 0), (1, 1)
            lora.kw_dict |= {"padding": (0, 0), "stride": (1, 1)}
        used = oracle.float64(lycoris.used_weight(lora, eps=dtype))
        weight = got[f"{name}.weight"].flatten(1)
        assert distance(weight, used.reshape(len(used), -1)) <= RELATIVE, name
        kinds.add((layer.weight.ndim, layer.weight.shape[0] == layer.weight.shape[1]))
    assert (2, True) in kinds
    assert (4, False) in kinds or "ResnetBlock2D" not in str(CONFIGS[case])
    said = inspected(tmp_path / "adapter", "--base", trained.base)
    assert "trainer      SimpleTuner, LyCORIS" in said
    assert "fits" in said
    if "dora_wd" in CONFIGS[case]:
        axis = "in" if "per input" in case else "out"
        assert f"{axis}, by the shape of dora_scale" in said
        assert f"one per {axis}put" in said


def test_config_that_contradicts_the_tensors_is_refused(trained, tmp_path, monkeypatch):
    unet = type(trained.unet).from_pretrained(trained.base)
    lycoris_folder(tmp_path / "a", unet, CONFIGS["loha, per input"], torch.float32, monkeypatch)
    tensors = load_file(tmp_path / "a" / FILE)
    said = {**CONFIGS["loha, per input"], "wd_on_output": True}
    save(tmp_path / "a", tensors, {"lycoris_config": json.dumps(said)} | ADDED)
    message = refused(trained.base, tmp_path / "a", tmp_path / "out")
    assert "says magnitudes count outputs, their shapes say inputs" in message
    plain = {n: t for n, t in tensors.items() if not n.endswith("dora_scale")}
    save(tmp_path / "a", plain, {"lycoris_config": json.dumps(CONFIGS["locon"])} | ADDED)
    message = refused(trained.base, tmp_path / "a", tmp_path / "out")
    assert "says algo=lora, the tensors are LoHa" in message
    assert "decomposed (DoRA), but there is no dora_scale" in message


# --- a ControlNet, which it trains with PEFT's LoHa; LoKr for its other scaling


@pytest.mark.parametrize("method", ["LoHa", "LoKr"])
def test_pefts_other_methods_take_alpha_from_the_settings(method, trained, tmp_path):
    import peft
    from peft.utils import get_peft_model_state_dict

    unet = type(trained.unet).from_pretrained(trained.base)
    config = getattr(peft, f"{method}Config")(
        r=2, alpha=5, use_effective_conv2d=True, rank_dropout=0.0, module_dropout=0.0,
        target_modules=["to_q", "to_k", "conv1"], rank_pattern={"conv1": 1},
    )  # fmt: skip
    unet.add_adapter(config)
    torch.manual_seed(3)
    for name, parameter in unet.named_parameters():
        if "hada_" in name or "lokr_" in name:
            parameter.data.normal_(0, 0.3)
    tensors = {f"controlnet.{n}": t for n, t in get_peft_model_state_dict(unet).items()}
    settings = {f"controlnet.{k}": sorted(v) if isinstance(v, set) else v
                for k, v in unet.peft_config["default"].to_dict().items()}  # fmt: skip
    adapter = save(tmp_path / "adapter", tensors, entry(settings) | ADDED)
    report = dora_export.merge(trained.base, adapter, tmp_path / "out", verify="full")
    assert report.adapter_tensors_used == report.adapter_tensors == len(tensors)
    expected = dm.outputs(unet, trained.inputs)
    assert dm.distance(expected, trained.run(tmp_path / "out")) < CLOSE
    assert dm.distance(expected, trained.plain) > 0.01
    said = inspected(adapter, "--base", trained.base)
    for words in (f"method       {method.upper()}", "trainer      SimpleTuner", "scaling      2.5",
                  "fits"):  # fmt: skip
        assert words in said
    # LyCORIS' rule, and what is left without the settings: alpha is the rank, the scaling 1.
    save(tmp_path / "without", tensors, ADDED)
    dora_export.merge(trained.base, tmp_path / "without", tmp_path / "other")
    assert dm.distance(expected, trained.run(tmp_path / "other")) > 1e-3


def test_settings_of_another_component_or_method_are_refused(trained, tmp_path):
    tensors = {"unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.hada_w1_a":
               torch.ones(4, 2)}  # fmt: skip
    settings = {"unet.peft_type": "LOHA", "unet.r": 2, "unet.alpha": 4}
    adapter = save(tmp_path / "a", tensors, entry(settings))
    said = refused(trained.base, adapter, tmp_path / "out")
    assert "LoHa tensors ['hada_w1_a']" in said
    assert "Leave --alpha out" in refused(trained.base, adapter, tmp_path / "out", "--alpha", "2")
    other = {n.replace("unet.", "prior."): t for n, t in tensors.items()}
    said = refused(trained.base, save(tmp_path / "a", other, entry(settings)), tmp_path / "out")
    assert "unknown tensor 'prior." in said
    both = tensors | {"text_encoder.x.hada_w1_a": torch.ones(4, 2)}
    settings |= {"text_encoder.peft_type": "LORA", "text_encoder.r": 2}
    said = refused(trained.base, save(tmp_path / "a", both, entry(settings)), tmp_path / "out")
    assert "text_encoder: LoHa or LoKr, but the metadata says LORA" in said
