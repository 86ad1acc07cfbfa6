"""Tiny pipelines of diffusers with random weights, and adapters that PEFT trains on them.

Everything is made and saved by diffusers, transformers and PEFT; the unmerged models' own forward
is the reference.
"""

import copy
import json

import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    FluxTransformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

RANK, ALPHA = 3, 5.0
UNET_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "conv1", "conv_shortcut",
                "proj_in", "time_emb_proj"]  # fmt: skip
TEXT_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1"]


def unet(kind="sd", seed=0):
    """A UNet of Stable Diffusion 1.5's build (three levels), or of SDXL's (text time ids)."""
    torch.manual_seed(seed)
    common = {
        "sample_size": 8, "in_channels": 4, "out_channels": 4, "layers_per_block": 2,
        "norm_num_groups": 2, "cross_attention_dim": 12,
    }  # fmt: skip
    if kind == "sd":
        return UNet2DConditionModel(
            block_out_channels=(4, 8, 8), attention_head_dim=2,
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            **common,
        )  # fmt: skip
    return UNet2DConditionModel(
        block_out_channels=(4, 8), attention_head_dim=(1, 2), use_linear_projection=True,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), transformer_layers_per_block=(1, 2),
        addition_embed_type="text_time", addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=4 * 6 + 10, **common,
    )  # fmt: skip


def text_encoder(width=12, projection=None, seed=1):
    torch.manual_seed(seed)
    config = CLIPTextConfig(
        vocab_size=40, hidden_size=width, intermediate_size=20, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=9, projection_dim=projection or width,
        bos_token_id=0, eos_token_id=2, pad_token_id=1,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)


def vae():
    torch.manual_seed(2)
    return AutoencoderKL(
        block_out_channels=(4, 4), latent_channels=4, norm_num_groups=2, sample_size=8,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip


def flux(seed=3):
    torch.manual_seed(seed)
    return FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=12, pooled_projection_dim=10,
        guidance_embeds=True, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip


def write_pipeline(folder):
    """A Stable Diffusion pipeline, saved by diffusers; without a tokenizer."""
    pipe = StableDiffusionPipeline(
        vae=vae(), text_encoder=text_encoder(), tokenizer=None, unet=unet(),
        scheduler=EulerDiscreteScheduler(), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    pipe.save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    assert index["unet"] == ["diffusers", "UNet2DConditionModel"]
    return folder


def train(model, targets, seed=4, *, dora=True, alpha=ALPHA):
    """Give a model an adapter whose values are those of a trained one."""
    model.add_adapter(
        LoraConfig(r=RANK, lora_alpha=alpha, target_modules=targets, use_dora=dora), "default"
    )
    make = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_magnitude_vector" in name:
            factor = 0.6 + 0.8 * torch.rand(parameter.shape, generator=make)
            parameter.data.mul_(factor)
        elif "lora_" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=make) * 0.3)
    return model


def layers(model):
    """The adapter's tensors as PEFT gives them."""
    return {k: v.contiguous() for k, v in get_peft_model_state_dict(model).items()}


def metadata(model):
    return model.peft_config["default"].to_dict()


def unet_inputs(model):
    make = torch.Generator().manual_seed(9)
    values = {
        "sample": torch.randn(2, 4, 8, 8, generator=make),
        "timestep": torch.tensor([3, 500]),
        "encoder_hidden_states": torch.randn(2, 5, 12, generator=make),
    }
    if model.config.addition_embed_type:
        values["added_cond_kwargs"] = {
            "text_embeds": torch.randn(2, 10, generator=make).double(),
            "time_ids": torch.rand(2, 6, generator=make),
        }
    return values


def flux_inputs():
    make = torch.Generator().manual_seed(9)
    return {
        "hidden_states": torch.randn(1, 4, 4, generator=make),
        "encoder_hidden_states": torch.randn(1, 5, 12, generator=make),
        "pooled_projections": torch.randn(1, 10, generator=make),
        "timestep": torch.tensor([0.3]), "guidance": torch.tensor([2.0]),
        "img_ids": torch.rand(4, 3, generator=make).round(), "txt_ids": torch.zeros(5, 3),
    }  # fmt: skip


def outputs(model, inputs):
    """What a model computes in float64."""
    model = copy.deepcopy(model).double().eval()
    cast = {k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v
            for k, v in inputs.items()}  # fmt: skip
    with torch.no_grad():
        return model(**cast)[0]


def text_outputs(model):
    ids = torch.arange(14).reshape(2, 7) % 40
    model = copy.deepcopy(model).double().eval()
    with torch.no_grad():
        return model(input_ids=ids)[0]


def distance(a, b):
    """Largest difference, relative to the largest value."""
    return float((a - b).abs().max() / a.abs().max())
