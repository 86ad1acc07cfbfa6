"""Which serving engines take an adapter as it is, and which need it merged.

Sources, as of 2026: vllm-project/vllm vllm/lora/peft_helper.py (use_dora, modules_to_save and bias
refused, rank limited by --max-lora-rank); sgl-project/sglang python/sglang/srt/lora (DoRA raises);
ggml-org/llama.cpp convert_lora_to_gguf.py (unknown tensors abort, lora_alpha only);
NVIDIA/TensorRT-LLM examples/dora (expects pre-normalised magnitudes); microsoft/Olive
olive/cli/convert_adapters.py (DoRA refused); microsoft/onnxruntime-genai
src/python/py/models/builders/base.py (magnitudes are not read).
"""

from __future__ import annotations

from dora_export.adapters import peft_methods
from dora_export.adapters.model import Adapter
from dora_export.report import Engine

DIVIDES_BY_BASE = "divides by the norm of the base's rows, not of the sum"


def _single_file_engines(adapter: Adapter) -> tuple[Engine, ...]:
    """Return who takes a file of LyCORIS, kohya or OneTrainer unmerged.

    Sources: comfyanonymous/ComfyUI, comfy/weight_adapter/base.py, weight_decompose (magnitudes of
    outputs are divided by the norm of W); huggingface/diffusers, src/diffusers/loaders/
    lora_pipeline.py, lora_state_dict (dora_scale is dropped with a warning) and
    lora_conversion_utils.py (names of LoRA alone).
    """
    axes = {u.axis for u in adapter.updates if u.normalises}
    lora = all(u.kind in ("lora", "dora") and u.rank is not None for u in adapter.updates)
    comfy = Engine("ComfyUI", "yes", "its own format")
    if "out" in axes:
        comfy = Engine("ComfyUI", "wrong", DIVIDES_BY_BASE)
    if not lora:
        return comfy, Engine("diffusers", "no", "reads LoRA alone")
    if axes:
        return comfy, Engine("diffusers", "wrong", "drops the magnitudes and applies plain LoRA")
    return comfy, Engine("diffusers", "yes", "plain LoRA")


def engines(adapter: Adapter) -> tuple[Engine, ...]:
    """Return who takes the adapter unmerged."""
    if adapter.format == "lycoris":
        return _single_file_engines(adapter)
    if adapter.format == "mlx":
        return (
            Engine("mlx-lm, mlx-vlm", "yes", "its own format"),
            Engine("all others", "no", "none reads the mlx format"),
        )
    if adapter.format == "diffusers":
        return _image_engines(adapter)
    if adapter.format == "peft" and (method := adapter.facts.get("method")) in peft_methods.METHODS:
        return (
            Engine("PEFT, transformers", "yes", "its own method"),
            Engine("all others", "no", f"none reads PEFT's {method}"),
        )
    if adapter.format != "peft":
        return (Engine("all", "no", f"none reads the {adapter.format} format"),)
    if any(u.normalises for u in adapter.updates):
        return (
            Engine("PEFT, transformers", "yes", "slow: the norm is computed in every forward"),
            Engine("vLLM", "no", "refuses DoRA"),
            Engine("SGLang", "no", "refuses DoRA"),
            Engine("TensorRT-LLM", "no", "expects magnitudes divided by the norm beforehand"),
            Engine("llama.cpp", "no", "refuses the magnitude tensors"),
            Engine("Olive", "no", "refuses DoRA"),
            Engine("onnxruntime-genai", "wrong", "ignores the magnitudes without a word"),
        )
    if any(u.orientation is not None and u.index is not None for u in adapter.updates):
        return _stacked_engines(adapter)
    whole = any(u.kind in ("replace", "rows") for u in adapter.updates)
    scaled = len(set(adapter.facts.get("scaling", ()))) > 1 or bool(adapter.facts.get("rslora"))
    replaced = "no" if whole else "yes"
    why = "refuses modules_to_save and trained tokens" if whole else "plain LoRA"
    return (
        Engine("PEFT, transformers", "yes", "plain LoRA"),
        Engine("vLLM", replaced, why),
        Engine("SGLang", replaced, why),
        Engine(
            "llama.cpp",
            "no" if whole else "wrong" if scaled else "yes",
            "refuses tensors other than A and B" if whole
            else "reads lora_alpha only, not patterns or rslora" if scaled else "plain LoRA",
        ),
    )  # fmt: skip


def _stacked_engines(adapter: Adapter) -> tuple[Engine, ...]:
    """Return who takes LoRA on stacked experts unmerged.

    Source: github.com/unslothai/unsloth-zoo, pull request 1269, which lists who reads the columns
    of lora_B in which order.
    """
    if adapter.facts.get("moe_b_layout") == ["peft"]:
        return (
            Engine("PEFT, transformers", "yes", "LoRA on stacked experts"),
            Engine("vLLM", "yes", "LoRA on stacked experts"),
            Engine("SGLang", "no", "does not read factors of stacked experts"),
        )
    why = "takes the columns of lora_B in PEFT's order, which these are not in"
    return (
        Engine("PEFT, transformers", "wrong", why),
        Engine("vLLM", "wrong", why),
        Engine("SGLang", "no", "does not read factors of stacked experts"),
    )


def ways_out(adapter: Adapter) -> tuple[str, ...]:
    """Return what to do for engines that refuse the adapter, for people."""
    if not any(u.normalises for u in adapter.updates):
        return ()
    return (
        "engines that refuse DoRA take it merged, or as the plain LoRA nearest to it: "
        "dora-export convert --to lora --rank R --base BASE says what that loses",
    )


def _image_engines(adapter: Adapter) -> tuple[Engine, ...]:
    """Return who takes diffusers' files unmerged.

    Sources: huggingface/diffusers, src/diffusers/loaders/lora_pipeline.py (lora_state_dict drops
    dora_scale with a warning); comfyanonymous/ComfyUI, comfy/lora.py (reads dora_scale only) and
    comfy/weight_adapter/base.py (divides by the norm of W for magnitudes of outputs).
    """
    axes = {u.axis for u in adapter.updates if u.normalises}
    if not axes:
        return (Engine("diffusers", "yes", "plain LoRA"), Engine("ComfyUI", "yes", "plain LoRA"))
    if not any(name.endswith(".dora_scale") for name in adapter.tensors):
        return (
            Engine("diffusers", "yes", "slow: the norm is computed in every forward"),
            Engine("ComfyUI", "wrong", "ignores the magnitudes without a word"),
        )
    drops = Engine("diffusers", "wrong", "drops dora_scale and applies plain LoRA")
    if "out" in axes:
        return drops, Engine("ComfyUI", "wrong", DIVIDES_BY_BASE)
    return drops, Engine("ComfyUI", "yes", "where the file has its names")
