"""``genai_config.json``: what onnxruntime-genai has to know to run a decoder's folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

# Model types that onnxruntime-genai 0.18 runs as decoders under their own name; any other goes by
# its word for one that follows the usual names of inputs and outputs.
# Source: github.com/microsoft/onnxruntime-genai, src/models/model_type.h.
KNOWN = frozenset(
    "chatglm ernie4_5 gemma gemma2 gemma3_text gptoss granite internlm2 llama mistral nemotron "
    "olmo phi phimoe phi3 phi3small qwen2 qwen3 smollm3".split()
)
GENERAL = "decoder"


def genai_config(
    config: Any, generation: Mapping[str, Any], filename: str, inputs: Sequence[str],
    facts: Mapping[str, Any],
) -> bytes:  # fmt: skip
    """Return the file's content for a traced decoder.

    Args:
        config: The model's, of transformers.
        generation: Its generation_config.json; empty without one.
        filename: The graph's.
        inputs: Names of the graph's inputs.
        facts: Layers, key-value heads and head size of the cache.
    """
    named = {name: name for name in ("input_ids", "attention_mask", "position_ids")
             if name in inputs}  # fmt: skip
    length = getattr(config, "max_position_embeddings", None) or 2048
    end = generation.get("eos_token_id", config.eos_token_id)
    pad = generation.get("pad_token_id", config.pad_token_id)
    first_end = end[0] if isinstance(end, list) and end else end
    kind = str(config.model_type)
    model = {
        "type": kind if kind in KNOWN else GENERAL,
        "context_length": length,
        "vocab_size": config.vocab_size,
        "bos_token_id": _token(generation.get("bos_token_id", config.bos_token_id), first_end),
        "eos_token_id": end if end is not None else 0,
        "pad_token_id": _token(pad, first_end),
        "decoder": {
            "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
            "filename": filename,
            "head_size": facts["head_size"],
            "hidden_size": config.hidden_size,
            "num_attention_heads": config.num_attention_heads,
            "num_hidden_layers": facts["layers"],
            "num_key_value_heads": facts["kv_heads"],
            "inputs": {
                **named,
                "past_key_names": "past_key_values.%d.key",
                "past_value_names": "past_key_values.%d.value",
            },
            "outputs": {
                "logits": "logits",
                "present_key_names": "present.%d.key",
                "present_value_names": "present.%d.value",
            },
        },
    }
    search = {
        "max_length": length,
        "do_sample": bool(generation.get("do_sample", False)),
        "temperature": generation.get("temperature") or 1.0,
        "top_k": generation.get("top_k") or 50,
        "top_p": generation.get("top_p") or 1.0,
        "num_beams": 1,
        "past_present_share_buffer": False,  # the cache grows: it is no buffer of full length
    }
    return (json.dumps({"model": model, "search": search}, indent=2) + "\n").encode()


def _token(value: Any, otherwise: Any) -> int:
    found = value if value is not None else otherwise
    return int(found) if isinstance(found, int) else 0
