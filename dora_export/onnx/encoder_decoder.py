"""Encoder-decoders as the graphs that ORTModel classes load: encoder, first step, further steps.

``encoder_model.onnx`` gives the states of a source once; ``decoder_model.onnx`` reads the first
tokens and gives a cache for each layer: its own keys and values (``decoder``) and those of the
source (``encoder``); ``decoder_with_past_model.onnx`` takes that cache with more tokens. The
names are those of github.com/huggingface/optimum-onnx, optimum/exporters/onnx/base.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dora_export.verification.together import ENCODER, FIRST, FURTHER, MASK, OWN, STATES

if TYPE_CHECKING:
    from torch import Tensor, nn

    from dora_export.onnx.wrappers import Axes, Part


def parts(
    model: nn.Module, source: Mapping[str, Tensor], axes: Mapping[str, Axes], ids: Tensor
) -> list[Part]:
    """Return the three graphs of an encoder-decoder.

    Args:
        model: The model.
        source: Example inputs of its encoder.
        axes: As in ``Part``, of these inputs.
        ids: Example tokens of its decoder, ``(batch, length)``.
    """
    import torch  # noqa: PLC0415 - the runner below needs none
    from transformers import DynamicCache, EncoderDecoderCache  # noqa: PLC0415 - an extra
    from transformers.modeling_outputs import BaseModelOutput  # noqa: PLC0415

    from dora_export.onnx.wrappers import BATCH, SIZES, Flat, Part  # noqa: PLC0415

    wide, long = "encoder_sequence_length", "decoder_sequence_length"
    past_name = f"past_{long}"
    core: Any = model
    encode = Flat(model, list(source), lambda model, values: [_states(model, values)], [OWN])
    first_inputs: dict[str, Tensor] = {"input_ids": ids}
    first_axes: dict[str, Axes] = {"input_ids": {0: BATCH, 1: long}}
    if "attention_mask" in source:
        first_inputs[MASK], first_axes[MASK] = source["attention_mask"], {0: BATCH, 1: wide}
    with torch.no_grad():
        states = _states(core, source)
        found = core(
            encoder_outputs=BaseModelOutput(last_hidden_state=states), decoder_input_ids=ids,
            past_key_values=EncoderDecoderCache(DynamicCache(), DynamicCache()), use_cache=True,
        ).past_key_values  # fmt: skip
    cache = _held(found)
    layers = len(cache) // 4
    state_axes = {0: BATCH} if "attention_mask" not in source else {0: BATCH, 1: wide}

    def run(model: nn.Module, values: dict[str, Tensor]) -> Sequence[Tensor]:
        past = EncoderDecoderCache(DynamicCache(), DynamicCache())
        given = {"attention_mask": values[MASK]} if MASK in values else {}
        found = model(
            encoder_outputs=BaseModelOutput(last_hidden_state=values[STATES]), use_cache=True,
            decoder_input_ids=values["input_ids"], past_key_values=past, **given,
        )  # fmt: skip
        return [found.logits, *_held(found.past_key_values).values()]

    def run_on(model: nn.Module, values: dict[str, Tensor]) -> Sequence[Tensor]:
        own, other = DynamicCache(), DynamicCache()
        for layer in range(layers):
            for cache, side in ((own, "decoder"), (other, "encoder")):
                pair = (values[f"past_key_values.{layer}.{side}.{k}"] for k in ("key", "value"))
                cache.update(*pair, layer)
        keys = values["past_key_values.0.encoder.key"]
        width: Any = states.shape[-1]
        nothing = keys.new_zeros(keys.shape[0], keys.shape[2], width)  # only its shape is asked for
        given = {"attention_mask": values[MASK]} if MASK in values else {}
        found = model(
            encoder_outputs=BaseModelOutput(last_hidden_state=nothing), use_cache=True,
            decoder_input_ids=values["input_ids"], **given,
            past_key_values=EncoderDecoderCache(own, other),
        )  # fmt: skip
        held = _held(found.past_key_values)
        return [found.logits, *(t for n, t in held.items() if ".decoder." in n)]

    outputs = ["logits", *(f"present.{n}" for n in cache)]
    first_inputs[STATES], first_axes[STATES] = states, state_axes
    further_inputs = {n: t for n, t in first_inputs.items() if n != STATES}
    further_axes = {n: a for n, a in first_axes.items() if n != STATES}
    for name, tensor in cache.items():
        own = ".decoder." in name
        shape = (*tensor.shape[:2], SIZES["past_sequence_length"], tensor.shape[3])
        full = f"past_key_values.{name}"
        further_inputs[full] = torch.randn(shape, dtype=tensor.dtype) if own else tensor
        further_axes[full] = {0: BATCH, 2: past_name} if own else (
            {0: BATCH} if len(state_axes) == 1 else {0: BATCH, 2: wide})  # fmt: skip
    kept = [n for n in outputs if ".encoder." not in n]
    return [
        Part(encode, source, axes, [OWN], compared=["logits", f"encoder_{OWN}"], graph=ENCODER,
             facts={"layers": layers}),
        Part(Flat(model, list(first_inputs), run, outputs), first_inputs, first_axes, outputs,
             graph=FIRST),
        Part(Flat(model, list(further_inputs), run_on, kept), further_inputs, further_axes, kept,
             graph=FURTHER),
    ]  # fmt: skip


def _states(model: Any, source: Mapping[str, Tensor]) -> Tensor:
    found: Tensor = model.get_encoder()(**source)[OWN]
    return found


def _held(cache: Any) -> dict[str, Tensor]:
    """Return the keys and values of both caches by name."""
    found = {}
    sides = {"decoder": cache.self_attention_cache, "encoder": cache.cross_attention_cache}
    for layer in range(len(sides["decoder"].layers)):
        for side, held in sides.items():
            found[f"{layer}.{side}.key"] = held.layers[layer].keys
            found[f"{layer}.{side}.value"] = held.layers[layer].values
    return found
