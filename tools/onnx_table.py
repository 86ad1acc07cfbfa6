"""Trace tiny models of many architectures with random DoRA adapters; hold each graph to account.

``tools/onnx_table.py [--only NAME;...] [--json FILE] [--dtype fp32] [--engine auto] [--fuse none]
[--quantize int4] [--share-weights] [--adapters]`` makes each model at random, gives it an adapter
as after training (A, B, magnitudes), exports the two, merged or as one graph with places for the
adapter, and prints what parity found. An architecture that cannot be exported has the exporter's
reason in its row, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import importlib
import json
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

WORDS = 97
TEXT = {
    "vocab_size": WORDS, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 128, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GROUPED = {**TEXT, "num_key_value_heads": 2}
WINDOW = {**GROUPED, "sliding_window": 8}
GEMMA = {**WINDOW, "head_dim": 8, "query_pre_attn_scalar": 8}
OLD = {"vocab_size": WORDS, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4}  # fmt: skip
IMAGE = {**TOWER, "image_size": 16, "patch_size": 4}
WORDED = {**TOWER, "vocab_size": WORDS, "max_position_embeddings": 64, "bos_token_id": 1,
          "eos_token_id": 96, "pad_token_id": 0}  # fmt: skip

# Name -> (class, config's class or "" for diffusers, its values).
ARCHITECTURES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", GROUPED),
    "mistral": ("MistralForCausalLM", "MistralConfig", WINDOW),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", GROUPED),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**GROUPED, "head_dim": 8}),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", GEMMA),
    "gemma3_text": ("Gemma3ForCausalLM", "Gemma3TextConfig", GEMMA),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", GROUPED),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2Config", GROUPED),
    "granite": ("GraniteForCausalLM", "GraniteConfig", GROUPED),
    "smollm3": ("SmolLM3ForCausalLM", "SmolLM3Config", GROUPED),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config",
             {**OLD, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", TEXT),
    "opt": ("OPTForCausalLM", "OPTConfig",
            {**OLD, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2,
             "num_attention_heads": 4, "max_position_embeddings": 128, "word_embed_proj_dim": 32}),
    "falcon": ("FalconForCausalLM", "FalconConfig",
               {**OLD, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}),
    "bloom": ("BloomForCausalLM", "BloomConfig",
              {**OLD, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig",
                {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig",
                  {**GROUPED, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2,
                   "moe_intermediate_size": 24}),
    "bert": ("BertModel", "BertConfig", TEXT),
    "bert, masked": ("BertForMaskedLM", "BertConfig", TEXT),
    "roberta, texts": ("RobertaForSequenceClassification", "RobertaConfig",
                       {**TEXT, "num_labels": 3}),
    "distilbert, tokens": ("DistilBertForTokenClassification", "DistilBertConfig",
                           {"vocab_size": WORDS, "dim": 32, "hidden_dim": 48, "n_layers": 2,
                            "n_heads": 4, "max_position_embeddings": 128, "num_labels": 5,
                            "pad_token_id": 0}),
    "mpnet": ("MPNetModel", "MPNetConfig", TEXT),
    "modernbert": ("ModernBertModel", "ModernBertConfig",
                   {**TEXT, "cls_token_id": 1, "sep_token_id": 2, "local_attention": 8,
                    "global_attn_every_n_layers": 2}),
    "deberta-v2": ("DebertaV2Model", "DebertaV2Config",
                   {**TEXT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"],
                    "position_buckets": 8}),
    "vit": ("ViTForImageClassification", "ViTConfig", {**IMAGE, "num_labels": 5}),
    "resnet": ("ResNetForImageClassification", "ResNetConfig",
               {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 2], "num_labels": 5,
                "layer_type": "basic"}),
    "convnext": ("ConvNextForImageClassification", "ConvNextConfig",
                 {"hidden_sizes": [16, 24], "depths": [1, 1], "num_stages": 2, "image_size": 32,
                  "num_labels": 5}),
    "clip": ("CLIPModel", "CLIPConfig",
             {"text_config": WORDED, "vision_config": IMAGE, "projection_dim": 24}),
    "clip, text": ("CLIPTextModelWithProjection", "CLIPTextConfig",
                   {**WORDED, "projection_dim": 24}),
    "sd, text": ("CLIPTextModel", "CLIPTextConfig", WORDED),
    "sd, unet": ("UNet2DConditionModel", "",
                 {"sample_size": 8, "in_channels": 4, "out_channels": 4, "layers_per_block": 1,
                  "block_out_channels": (16, 32), "norm_num_groups": 8, "cross_attention_dim": 24,
                  "attention_head_dim": 4, "down_block_types": ("CrossAttnDownBlock2D",
                  "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}),
    "sdxl, unet": ("UNet2DConditionModel", "",
                   {"sample_size": 8, "in_channels": 4, "out_channels": 4, "layers_per_block": 1,
                    "block_out_channels": (16, 32), "norm_num_groups": 8,
                    "cross_attention_dim": 24, "attention_head_dim": (1, 2),
                    "use_linear_projection": True, "transformer_layers_per_block": (1, 1),
                    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
                    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
                    "addition_embed_type": "text_time", "addition_time_embed_dim": 4,
                    "projection_class_embeddings_input_dim": 4 * 6 + 10}),
    "sd3": ("SD3Transformer2DModel", "",
            {"sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 4,
             "num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 4,
             "joint_attention_dim": 24, "caption_projection_dim": 32,
             "pooled_projection_dim": 12, "pos_embed_max_size": 9, "qk_norm": "rms_norm",
             "dual_attention_layers": (0,)}),
    "pixart": ("PixArtTransformer2DModel", "",
               {"sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 8,
                "num_layers": 2, "attention_head_dim": 12, "num_attention_heads": 4,
                "cross_attention_dim": 48, "caption_channels": 24, "norm_num_groups": 2,
                "use_additional_conditions": True}),
    "flux": ("FluxTransformer2DModel", "",
             {"in_channels": 8, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16,
              "num_attention_heads": 2, "joint_attention_dim": 24, "pooled_projection_dim": 12,
              "axes_dims_rope": (4, 6, 6), "guidance_embeds": True}),
    "sana": ("SanaTransformer2DModel", "",
             {"in_channels": 4, "out_channels": 4, "num_attention_heads": 4,
              "attention_head_dim": 8, "num_layers": 2, "num_cross_attention_heads": 4,
              "cross_attention_head_dim": 8, "cross_attention_dim": 32, "caption_channels": 24,
              "sample_size": 8, "patch_size": 1, "mlp_ratio": 2.0}),
    "auraflow": ("AuraFlowTransformer2DModel", "",
                 {"sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 4,
                  "num_mmdit_layers": 1, "num_single_dit_layers": 1, "attention_head_dim": 8,
                  "num_attention_heads": 4, "joint_attention_dim": 24,
                  "caption_projection_dim": 32, "pos_embed_max_size": 81}),
    "siglip, vision": ("SiglipVisionModel", "SiglipVisionConfig", IMAGE),
    "whisper": ("WhisperForConditionalGeneration", "WhisperConfig",
                {**OLD, "d_model": 32, "encoder_layers": 1, "decoder_layers": 2,
                 "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48,
                 "decoder_ffn_dim": 48, "num_mel_bins": 16, "max_source_positions": 20,
                 "max_target_positions": 32, "decoder_start_token_id": 1, "suppress_tokens": None,
                 "begin_suppress_tokens": None}),
    "bart": ("BartForConditionalGeneration", "BartConfig",
             {**OLD, "d_model": 32, "encoder_layers": 1, "decoder_layers": 2,
              "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "encoder_attention_heads": 4,
              "decoder_attention_heads": 4, "max_position_embeddings": 64,
              "decoder_start_token_id": 2, "forced_eos_token_id": 2}),
    "t5": ("T5ForConditionalGeneration", "T5Config",
           {"vocab_size": WORDS, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2,
            "num_heads": 4, "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}),
    "wav2vec2": ("Wav2Vec2ForCTC", "Wav2Vec2Config",
                 {"vocab_size": WORDS, **TOWER, "conv_dim": [16, 16], "conv_stride": [5, 2],
                  "conv_kernel": [10, 3], "num_conv_pos_embeddings": 16,
                  "num_conv_pos_embedding_groups": 2, "num_feat_extract_layers": 2}),
}  # fmt: skip
HEADS = ("lm_head", "classifier", "score", "qa_outputs", "embed_out", "proj_out", "cls.")
SPREAD = 0.2  # standard deviation of random weights: enough for layers to matter


def make_pair(name: str, folder: Path) -> None:
    """Save a random model as "base" and a DoRA adapter, as after training, as "adapter"."""
    import peft  # noqa: PLC0415 - seconds
    import torch  # noqa: PLC0415

    cls, config_cls, values = ARCHITECTURES[name]
    torch.manual_seed(0)
    library: Any = importlib.import_module("transformers" if config_cls else "diffusers")
    given = [getattr(library, config_cls)(**values)] if config_cls else []
    model = getattr(library, cls)(*given, **({} if config_cls else values)).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("weight") and parameter.ndim > 1:
                parameter.normal_(0, SPREAD)
            elif key.endswith("bias"):
                parameter.normal_(0, 0.1)
    model.save_pretrained(folder / "base")
    targets = [n for n, m in model.named_modules() if _adaptable(n, m)]
    weights = {f"{n}.weight": model.get_submodule(n).weight.detach().clone() for n in targets}
    fan = any(type(model.get_submodule(n)).__name__ == "Conv1D" for n in targets)
    lora = peft.LoraConfig(r=4, lora_alpha=10, use_dora=True, target_modules=targets,
                           fan_in_fan_out=fan)  # fmt: skip
    wrapped = peft.get_peft_model(model, lora)
    with torch.no_grad():
        for key, parameter in wrapped.named_parameters():
            if "lora_magnitude_vector" in key:
                parameter.mul_(torch.empty_like(parameter).normal_(0, 0.2).exp())
            elif "lora_" in key:
                parameter.normal_(0, 0.1)
    wrapped.save_pretrained(folder / "adapter")
    _under_stored_names(folder, weights)


def _adaptable(name: str, module: Any) -> bool:
    if any(head in name for head in HEADS) or "pos_conv" in name or not name:
        return False
    kind = type(module).__name__
    return kind in ("Linear", "FalconLinear", "Conv1D") or (kind == "Conv2d" and module.groups == 1)


def _under_stored_names(folder: Path, weights: dict[str, Any]) -> None:
    """Rename the adapter's tensors where the library loads a weight under another name."""
    import torch  # noqa: PLC0415 - as above
    from safetensors.torch import load_file, save_file  # noqa: PLC0415

    stored: dict[str, Any] = {}
    for file in sorted((folder / "base").glob("*.safetensors")):
        stored |= load_file(file)
    names = {}
    for name, weight in weights.items():
        if name in stored and torch.equal(stored[name], weight):
            continue
        same = [n for n, t in stored.items() if t.shape == weight.shape and torch.equal(t, weight)]
        if len(same) == 1:
            names[name.removesuffix(".weight")] = same[0].removesuffix(".weight")
    path = folder / "adapter" / "adapter_model.safetensors"
    held = {}
    for key, tensor in load_file(path).items():
        module, _, part = key.removeprefix("base_model.model.").partition(".lora_")
        held[f"base_model.model.{names.get(module, module)}.lora_{part}"] = tensor
    save_file(held, path, {"format": "pt"})


def row(
    name: str, options: dict[str, Any], say: Callable[[str], None], *, adapters: bool = False
) -> dict[str, Any]:
    """Export one architecture and return what was found."""
    from dora_export import DoraExportError, GraphOptions, export_onnx  # noqa: PLC0415

    folder = Path(tempfile.mkdtemp(prefix="onnx-table-"))
    started = time.monotonic()
    try:
        make_pair(name, folder)
        report = export_onnx(
            folder / "base", folder / "adapter", folder / "out", allow_mismatch=True,
            adapters=adapters, options=GraphOptions(**options), on_stage=say,
        )  # fmt: skip
    except DoraExportError as error:
        return {"name": name, "verdict": "failed", "reason": str(error),
                "seconds": time.monotonic() - started}  # fmt: skip
    finally:
        shutil.rmtree(folder)
    assert report.verified is not None, "Bug: it was asked for"
    figures = report.verified.tiers[-1].figures  # of a graph with places: with the adapter
    outputs = {n: o for n, o in figures.get("outputs", {}).items() if not n.startswith("present.")}
    worst = max(outputs.values(), key=lambda o: o["excess"], default=None)
    shares = [m["share"] for m in figures.get("mistakes", {}).values() if m["share"] is not None]
    return {
        "name": name,
        "verdict": report.verdict,
        "reason": "; ".join(f"{f.where}: {f.what}" for f in report.verified.findings),
        "engine": report.facts["engine"],
        "notes": list(report.notes),
        "nodes": report.facts["nodes"],
        "error": worst and worst["error"]["max"],
        "scale": worst and worst["error"]["scale"],
        "excess": worst and worst["excess"],
        "effect": worst and worst["effect"] and worst["effect"]["max"],
        "share": max(shares, default=None),
        "text": figures.get("text"),
        "seconds": time.monotonic() - started,
    }


def line(found: dict[str, Any]) -> str:
    """Return a row of the table."""
    if found["verdict"] == "failed" or found.get("error") is None:
        return f"{found['name']:<20} {found['verdict']:<10} {found['reason']}"
    text = found["text"]
    words = f"{text['equal']}/{text['tokens']}" if text else "-"
    share = "-" if found["share"] is None else f"{found['share']:.1e}"
    return (
        f"{found['name']:<20} {found['verdict']:<10} {found['engine']:<13} {found['nodes']:>5} "
        f"{found['error']:>9.1e} of {found['scale']:<8.3g} {found['excess']:>6.0%} "
        f"{found['effect']:>9.3g} {share:>9} {words:>7} {found['seconds']:>6.0f} s"
    )


def main() -> int:
    """Print the table; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="names, joined by semicolons")
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--fuse", default="none")
    parser.add_argument("--quantize")
    parser.add_argument("--share-weights", action="store_true")
    parser.add_argument("--adapters", action="store_true", help="places for adapters, unmerged")
    given = parser.parse_args()
    chosen = given.only.split(";") if given.only else list(ARCHITECTURES)
    warnings.simplefilter("ignore")
    asked = ("dtype", "engine", "fuse", "quantize", "share_weights")
    options = {name: getattr(given, name) for name in asked}
    print(f"{'architecture':<20} {'verdict':<10} {'engine':<13} {'nodes':>5} "
          f"{'error':>9}    {'scale':<8} {'allows':>6} {'adapter':>9} {'mistake':>9} {'text':>7} "
          f"{'time':>8}")  # fmt: skip
    rows = []
    for name in chosen:
        rows.append(row(name, options, lambda _: None, adapters=given.adapters))
        print(line(rows[-1]), flush=True)
        if given.json:
            given.json.write_text(json.dumps(rows, indent=2))
    right = sum(r["verdict"] == "right" for r in rows)
    print(f"{right} of {len(rows)} right")
    return 0 if right == len(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
