"""LyCORIS trained as kohya's scripts train it, on a pipeline of diffusers: names, file and forward.

Network, names and file are LyCORIS' own (``lycoris.kohya``); the reference is the outputs of the
pipeline's models with the network on them, in float64.
"""

import json

import pytest
import torch
from lycoris import kohya

from tests import diffusion_models as diffusion
from tests import lycoris_models as models
from tests.trainers import inspected, merged

CASES = {
    "locon": {"algo": "locon", "dora_wd": True, "wd_on_output": False, "use_tucker": True},
    "loha": {"algo": "loha", "dora_wd": True},
    "lokr": {"algo": "lokr", "dora_wd": True, "wd_on_output": False, "decompose_both": True},
    "plain": {"algo": "lora", "train_norm": True, "rs_lora": True},
}


# LyCORIS' own choice of modules names one of diffusers' twice.
PRESET = """
enable_conv = true
unet_target_module = ["Transformer2DModel", "ResnetBlock2D", "Downsample2D"]
unet_target_name = ["conv_in"]
text_encoder_target_module = ["CLIPAttention", "CLIPMLP"]
"""


def trained(pipe, arguments, folder):
    """A network of LyCORIS on a pipeline's models, as if trained."""
    (folder / "preset.toml").write_text(PRESET)
    network = kohya.create_network(
        1.0, 2, 3.0, pipe.vae, pipe.text_encoder, pipe.unet, conv_dim=2, conv_alpha=1.0,
        preset=str(folder / "preset.toml"), **arguments
    )  # fmt: skip
    network.apply_to(pipe.text_encoder, pipe.unet, True, True)
    torch.manual_seed(5)
    for lora in network.loras:
        models.train(lora)
    return network


@pytest.mark.parametrize("case", CASES)
def test_merged_pipeline_computes_what_the_trained_one_does(case, tmp_path):
    base = diffusion.write_pipeline(tmp_path / "base")
    pipe = diffusion.load(base)
    plain = diffusion.outputs(pipe.unet, diffusion.unet_inputs(pipe.unet))
    network = trained(pipe, CASES[case], tmp_path)
    said = {"ss_network_module": "lycoris.kohya", "ss_network_dim": "2",
            "ss_network_args": json.dumps({k: str(v) for k, v in CASES[case].items()})}  # fmt: skip
    adapter = tmp_path / "adapter.safetensors"
    network.save_weights(str(adapter), None, said)
    merged(base, adapter, tmp_path / "out")
    got = diffusion.load(tmp_path / "out")
    for model in (pipe.unet, pipe.text_encoder, network):
        model.double().eval()
    with torch.no_grad(), models.eps_of(torch.float32):
        inputs = {k: v.double() if v.is_floating_point() else v
                  for k, v in diffusion.unet_inputs(pipe.unet).items()}  # fmt: skip
        wanted = pipe.unet(**inputs)[0]
        ids = torch.arange(14).reshape(2, 7) % 40
        wanted_text = pipe.text_encoder(input_ids=ids)[0]
    made = diffusion.outputs(got.unet, diffusion.unet_inputs(got.unet))
    assert diffusion.distance(wanted, made) <= 1e-5
    assert diffusion.distance(wanted, plain) > 0.05
    assert diffusion.distance(wanted_text, diffusion.text_outputs(got.text_encoder)) <= 1e-5
    shown = inspected(adapter, "--base", base)
    assert "LyCORIS in kohya sd-scripts" in shown
    norms = [lora for lora in network.loras if lora.name == "norm"]  # weight and bias each
    assert f"fits, {len(network.loras) + len(norms)} tensors would change" in shown
    assert (case == "plain") == bool(norms)
