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
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
)

import dora_export

RANK, ALPHA = 3, 5.0
UNET_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "proj_in", "time_emb_proj"]
TEXT_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1"]


def unet(kind="sd", seed=0):
    """A UNet of Stable Diffusion 1.5's build, or of SDXL's (sizes and times as inputs)."""
    torch.manual_seed(seed)
    common = {
        "sample_size": 8, "in_channels": 4, "out_channels": 4, "layers_per_block": 2,
        "norm_num_groups": 2, "cross_attention_dim": 12,
    }  # fmt: skip
    if kind == "deep":  # as many levels as Stable Diffusion 1.5 has
        cross = "CrossAttn{}Block2D"
        return UNet2DConditionModel(
            block_out_channels=(4, 4, 8, 8), attention_head_dim=2,
            down_block_types=(*(cross.format("Down"),) * 3, "DownBlock2D"),
            up_block_types=("UpBlock2D", *(cross.format("Up"),) * 3), **common,
        )  # fmt: skip
    if kind == "sd":
        return UNet2DConditionModel(
            block_out_channels=(4, 8), attention_head_dim=2,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
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
        scheduler=EulerDiscreteScheduler(steps_offset=1), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
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


def t5(seed=6):
    torch.manual_seed(seed)
    return T5EncoderModel(T5Config(
        vocab_size=40, d_model=12, d_kv=4, d_ff=20, num_layers=2, num_heads=2,
        feed_forward_proj="gated-gelu",
    ))  # fmt: skip


def text_outputs(model):
    ids = torch.arange(14).reshape(2, 7) % 40
    model = copy.deepcopy(model).double().eval()
    with torch.no_grad():
        return model(input_ids=ids)[0]


def distance(a, b):
    """Largest difference, relative to the largest value."""
    return float((a - b).abs().max() / a.abs().max())


def load(folder):
    """A Stable Diffusion pipeline, loaded by diffusers."""
    return StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, tokenizer=None)


class Pair:
    """A pipeline, a trained DoRA on its UNet and text encoder, and their merge.

    Attributes:
        base: The pipeline's folder.
        adapter: The adapter's folder.
        merged: The merged pipeline's folder.
        tensors: The adapter's tensors.
        metadata: The adapter file's metadata.
        stored: The base's tensors, by component.
        outputs: Of the unmerged UNet for ``inputs``, float64.
        text_outputs: Of the unmerged text encoder.
    """

    def __init__(self, folder):
        self.base, self.adapter = write_pipeline(folder / "base"), folder / "adapter"
        self.merged = folder / "merged"
        pipe = load(self.base)
        self.unet = train(pipe.unet, UNET_TARGETS)
        self.text_encoder = train(pipe.text_encoder, TEXT_TARGETS, 5)
        StableDiffusionPipeline.save_lora_weights(
            self.adapter,
            unet_lora_layers=layers(self.unet),
            text_encoder_lora_layers=layers(self.text_encoder),
            unet_lora_adapter_metadata=metadata(self.unet),
            text_encoder_lora_adapter_metadata=metadata(self.text_encoder),
        )
        file = self.adapter / "pytorch_lora_weights.safetensors"
        self.tensors = load_file(file)
        with safe_open(file, "pt") as opened:
            self.metadata = opened.metadata()
        self.stored = {c: load_file(self.weights(c)) for c in ("unet", "text_encoder")}
        self.inputs = unet_inputs(self.unet)
        self.outputs = outputs(self.unet, self.inputs)
        self.text_outputs = text_outputs(self.text_encoder)
        dora_export.merge(self.base, self.adapter, self.merged, verify="full")

    def weights(self, component, folder=None):
        """The weight file of a component of the base, or of another pipeline."""
        stem = "model" if component.startswith("text") else "diffusion_pytorch_model"
        return (folder or self.base) / component / f"{stem}.safetensors"
