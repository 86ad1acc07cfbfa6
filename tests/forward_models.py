"""Tiny models of every kind that the forward tier runs, with adapters trained in PEFT."""

from dataclasses import dataclass
from pathlib import Path

import peft
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    ConvNextConfig,
    ConvNextForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from dora_export.adapters import ReadOptions, read_adapter
from dora_export.checkpoints import open_checkpoint
from dora_export.plan import Settings, plan_merge
from tests import rider_models as text
from tests.peft_models import rekey
from tests.rider_models import VOCABULARY, train


@dataclass
class Pair:
    """A base and an adapter on disk, and PEFT's model of the two with the adapter active."""

    base: Path
    adapter: Path
    wrapped: peft.PeftModel

    def plan(self, **settings):
        """The package's plan for the two."""
        return plan_merge(
            open_checkpoint(self.base),
            read_adapter(self.adapter, ReadOptions()),
            Settings(**settings),
        )


def prepare(
    folder,
    model,
    dtype=torch.float32,
    *,
    seed=0,
    resize=0,
    names=(),
    method=peft.LoraConfig,
    **lora,
):
    """Save ``model`` as base, train a PEFT adapter on it, and save that.

    Args:
        folder: Where "base" and "adapter" are made.
        model: Of transformers.
        dtype: Storage type of the base; the adapter's is float32.
        seed: Of the adapter's values.
        resize: Tokens to add to the vocabulary before training.
        names: Pairs of (part of a name in the model, that part in its checkpoint), where
            transformers loads a parameter under another name than the file has.
        method: PEFT's config class.
        **lora: Its settings; a LoraConfig has some of its own.
    """
    model = model.to(dtype).eval()
    model.save_pretrained(folder / "base")
    if resize:
        model = type(model).from_pretrained(folder / "base")  # so that PEFT can see its old size
        torch.manual_seed(seed + 1)
        model.resize_token_embeddings(VOCABULARY + resize, mean_resizing=False)
        with torch.no_grad():
            model.get_input_embeddings().weight[VOCABULARY:].normal_(0, 0.5)
            model.get_output_embeddings().weight[VOCABULARY:].normal_(0, 0.5)
    own = {"r": 4, "lora_alpha": 10, "use_dora": True} if method is peft.LoraConfig else {}
    config = method(**{**own, **lora})
    wrapped = peft.get_peft_model(model, config).eval()
    train(wrapped, seed)
    wrapped.save_pretrained(folder / "adapter")
    for ours, theirs in names:
        rekey(folder / "adapter", lambda key, a=ours, b=theirs: key.replace(a, b))
    return Pair(folder / "base", folder / "adapter", wrapped)


def merged_by_peft(pair, folder, dtype):
    """What PEFT's own merge gives in the storage precision."""
    name = transformers.AutoConfig.from_pretrained(pair.base).architectures[0]
    base = getattr(transformers, name).from_pretrained(pair.base, dtype=dtype)
    wrapped = peft.PeftModel.from_pretrained(base, pair.adapter, autocast_adapter_dtype=False)
    wrapped.to(dtype).merge_and_unload().save_pretrained(folder)
    return folder


def change(folder, edit):
    """Let ``edit`` change the tensors of a folder in place."""
    (path,) = Path(folder).glob("*.safetensors")
    held = load_file(path)
    edit(held)
    save_file(held, path, {"format": "pt"})


def _seeded(make, config):
    torch.manual_seed(0)
    model = make(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.2)
    return model


def vit():
    config = ViTConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, image_size=16,
                       num_attention_heads=4, patch_size=4, num_labels=5,
                       initializer_range=0.2)  # fmt: skip
    return _seeded(ViTForImageClassification, config)


def resnet():
    config = ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 2], num_labels=5,
                          layer_type="basic")  # fmt: skip
    model = _seeded(ResNetForImageClassification, config)
    for name, buffer in model.named_buffers():
        if "running_var" in name:
            buffer.uniform_(0.05, 0.15)  # so that what comes out is neither all cut off nor huge
        elif "running_mean" in name:
            buffer.normal_(0, 0.1)
    return model


def convnext():
    config = ConvNextConfig(hidden_sizes=[16, 24], depths=[1, 1], num_stages=2, image_size=32,
                            num_labels=5, initializer_range=0.2,
                            layer_scale_init_value=0.5)  # fmt: skip
    return _seeded(ConvNextForImageClassification, config)


def bart():
    config = BartConfig(vocab_size=VOCABULARY, d_model=32, encoder_layers=1, decoder_layers=2,
                        encoder_ffn_dim=48, decoder_ffn_dim=48, encoder_attention_heads=4,
                        decoder_attention_heads=4, max_position_embeddings=64, init_std=0.2,
                        bos_token_id=0, pad_token_id=1, eos_token_id=2, forced_eos_token_id=2,
                        decoder_start_token_id=2)  # fmt: skip
    return _seeded(BartForConditionalGeneration, config)


# Name -> (model, LoraConfig's settings).
KINDS = {
    "llama": (text.llama, {"target_modules": "all-linear"}),
    "gpt2": (text.gpt2, {"target_modules": ["c_attn", "c_fc", "c_proj"], "fan_in_fan_out": True}),
    "bert": (
        text.bert_classifier,
        {"target_modules": ["query", "dense"], "task_type": "SEQ_CLS"},
    ),
    "vit": (
        vit,
        {
            "target_modules": ["q_proj", "fc1", "projection"],
            "names": [("vit.layers", "vit.encoder.layer"), ("mlp.fc1", "intermediate.dense"),
                      ("attention.q_proj", "attention.attention.query")],
        },
    ),
    "bart": (bart, {"target_modules": ["q_proj", "fc1", "v_proj"]}),
    "resnet": (resnet, {"target_modules": ["convolution"], "modules_to_save": ["classifier.1"]}),
    "convnext": (convnext, {"target_modules": ["pwconv1", "pwconv2", "patch_embeddings"]}),
    "tied, embedding": (
        text.tied_llama,
        {"target_modules": ["embed_tokens", "q_proj"], "use_dora": False},
    ),
    "tied, DoRA embedding": (text.tied_llama, {"target_modules": ["embed_tokens", "q_proj"]}),
    "tied, head": (text.tied_llama, {"target_modules": ["lm_head", "v_proj"]}),
    "tied, gpt2 embedding": (
        text.gpt2,
        {"target_modules": ["wte"], "use_dora": False},
    ),
    "saved modules": (
        text.llama,
        {"target_modules": ["q_proj"], "modules_to_save": ["norm", "lm_head"]},
    ),
    "biases": (text.gpt2, {"target_modules": ["c_attn"], "use_dora": False, "bias": "all",
                           "lora_bias": True, "fan_in_fan_out": True}),
    "trained tokens": (
        text.llama,
        {"target_modules": ["q_proj"], "trainable_token_indices": [3, 60, 61]},
    ),
    "rslora": (text.llama, {"target_modules": ["q_proj", "up_proj"], "use_rslora": True,
                            "use_dora": False}),
}  # fmt: skip
