"""What a model is for, by its class, and the graph that users of that task expect."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dora_export.onnx import encoder_decoder
from dora_export.onnx.model import GraphError
from dora_export.onnx.wrappers import (
    BATCH,
    HEIGHT,
    LENGTH,
    PATCHES,
    SIZES,
    TOTAL,
    WIDTH,
    Axes,
    Part,
    cached,
    fixed,
    plain,
)
from dora_export.verification import noise
from dora_export.verification.inputs import vocabulary
from dora_export.verification.measured import Unsupported

# End of a class's name -> task. Names of tasks are those of the Hugging Face hub.
TASKS = {
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
    "ForMaskedLM": "fill-mask",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForImageClassification": "image-classification",
    "ForAudioClassification": "audio-classification",
    "ForSequenceToSequenceLM": "text2text-generation",
    "ForSpeechSeq2Seq": "automatic-speech-recognition",
    "ForCTC": "automatic-speech-recognition",
    "ForConditionalGeneration": "text2text-generation",
    "ModelWithProjection": "feature-extraction",
    "Model": "feature-extraction",
}
WRITING = ("text2text-generation", "automatic-speech-recognition")  # of encoder-decoders
# Task -> the library's class that loads any model for it.
CLASSES = {
    "text-generation": "AutoModelForCausalLM",
    "fill-mask": "AutoModelForMaskedLM",
    "text-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "question-answering": "AutoModelForQuestionAnswering",
    "image-classification": "AutoModelForImageClassification",
    "audio-classification": "AutoModelForAudioClassification",
    "text2text-generation": "AutoModelForSeq2SeqLM",
    "automatic-speech-recognition": "AutoModelForSpeechSeq2Seq",
    "feature-extraction": "AutoModel",
}
SIDES, FRAMES = {2: HEIGHT, 3: WIDTH}, {2: "frames"}
MEASURED = ("pixel_values", "input_features", "input_values")  # images and sound
AS_SAID = "its config names this size"
IMAGE_SIZE = 64  # pixels, where the config leaves it open
SOUND_SAMPLES = 6400


def task_of(name: str) -> str | None:
    """Return the task that a class of the library is for, or None."""
    return next((task for end, task in TASKS.items() if name.endswith(end)), None)


def parts(model: nn.Module, batch: int | None = None, *, whole: bool = False) -> list[Part]:
    """Return the graphs of a model, the first of which says what is compared.

    Args:
        model: Of transformers or diffusers, in eval mode.
        batch: Batch size to fix, or None.
        whole: Make one graph of an encoder-decoder, without a cache, in place of three.

    Raises:
        GraphError: It takes inputs that this tool cannot make up.
    """
    found = _parts(model, SIZES[BATCH] if batch is None else batch, whole=whole)
    return found if batch is None else [_fixed(part) for part in found]


def _fixed(part: Part) -> Part:
    axes = {n: {i: a for i, a in axes.items() if a != BATCH} for n, axes in part.axes.items()}
    return replace(part, axes=axes)


def _parts(model: nn.Module, rows: int, *, whole: bool) -> list[Part]:
    takes = inspect.signature(model.forward).parameters
    config: Any = model.config
    if "timestep" in takes:
        return [_diffusion(model, rows)]
    main = getattr(model, "main_input_name", "input_ids")
    if main in MEASURED:
        _take_float32(model, main)
    if getattr(config, "is_encoder_decoder", False):
        return _sequence_to_sequence(model, main, rows, whole=whole)
    if main == "input_ids" and "pixel_values" in takes and hasattr(config, "projection_dim"):
        return [_two_towers(model, rows)]
    if main == "input_ids":
        if task_of(type(model).__name__) == "text-generation":
            return [_decoder(model, takes, rows)]
        return [_encoder(model, takes, rows)]
    if main == "pixel_values":
        pixels = _pixels(config, rows)
        why = AS_SAID if getattr(config, "image_size", None) else "its config names no size"
        return [fixed(plain(model, {main: pixels}, {main: {0: BATCH}}), main, SIDES, why)]
    if main in ("input_features", "input_values"):
        sound, axes = _sound(model, main, rows)
        return [_saying_frames(plain(model, {main: sound}, {main: axes}), main)]
    raise GraphError(
        f"{type(model).__name__}: takes '{main}', for which no example input can be made up. "
        "Export it from Python with export_module() and example inputs of your own."
    )


def _take_float32(model: nn.Module, name: str) -> None:
    """Let a model of 16 bits take images or sound in float32, as those do that cast them."""

    def cast(_: nn.Module, args: Any, named: dict[str, Any]) -> Any:
        given = named.get(name)
        if isinstance(given, Tensor) and given.is_floating_point():
            named = {**named, name: given.to(dtype)}
        return args, named

    dtype = next(model.parameters()).dtype
    find_encoder: Any = getattr(model, "get_encoder", None)
    is_encoder_decoder = getattr(model.config, "is_encoder_decoder", False)
    for module in (model, *([find_encoder()] if is_encoder_decoder else ())):
        module.register_forward_pre_hook(cast, with_kwargs=True)


def _tokens(model: nn.Module, shape: tuple[int, int]) -> Tensor:
    try:
        rows = vocabulary(model)
    except Unsupported as error:
        raise GraphError(
            f"{error}. Export it from Python with export_module() and example inputs of your own."
        ) from error
    return torch.randint(min(3, rows - 1), rows, shape)


TEXT_AXES: Axes = {0: BATCH, 1: LENGTH}


def _encoder(model: nn.Module, takes: Mapping[str, Any], rows: int) -> Part:
    ids = _tokens(model, (rows, SIZES[LENGTH]))
    inputs = {"input_ids": ids}
    if "attention_mask" in takes:
        inputs["attention_mask"] = torch.ones_like(ids)
    config: Any = model.config
    if "token_type_ids" in takes and (getattr(config, "type_vocab_size", 0) or 0) > 1:
        inputs["token_type_ids"] = torch.zeros_like(ids)
    options = {"use_cache": False} if "use_cache" in takes else {}
    return plain(model, inputs, dict.fromkeys(inputs, TEXT_AXES), options=options)


def _decoder(model: nn.Module, takes: Mapping[str, Any], rows: int) -> Part:
    ids = _tokens(model, (rows, SIZES[LENGTH]))
    inputs = {"input_ids": ids, "attention_mask": torch.ones(rows, SIZES[TOTAL], dtype=torch.long)}
    axes: dict[str, Axes] = {"input_ids": TEXT_AXES, "attention_mask": {0: BATCH, 1: TOTAL}}
    if "position_ids" in takes:
        past = SIZES[TOTAL] - SIZES[LENGTH]
        inputs["position_ids"] = torch.arange(past, SIZES[TOTAL])[None].repeat(rows, 1)
        axes["position_ids"] = TEXT_AXES
    return cached(model, inputs, axes)


def _two_towers(model: nn.Module, rows: int) -> Part:
    config: Any = model.config
    ids = _tokens(model, (rows + 1, SIZES[LENGTH]))
    vocabulary = config.text_config.vocab_size
    inputs = {
        "input_ids": ids.clamp(max=vocabulary - 1),
        "pixel_values": _pixels(config.vision_config, rows),
        "attention_mask": torch.ones_like(ids),
    }
    text = {0: "text_batch_size", 1: LENGTH}
    axes = {"input_ids": text, "pixel_values": {0: "image_batch_size"}, "attention_mask": text}
    return fixed(plain(model, inputs, axes), "pixel_values", SIDES, AS_SAID)


def _pixels(config: Any, rows: int) -> Tensor:
    size = getattr(config, "image_size", None) or IMAGE_SIZE
    height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
    return torch.randn(rows, getattr(config, "num_channels", None) or 3, height, width)


def _sound(model: nn.Module, kind: str, rows: int) -> tuple[Tensor, Axes]:
    config: Any = model.config
    if kind == "input_values":
        return torch.randn(rows, SOUND_SAMPLES), {0: BATCH, 1: LENGTH}
    bins = getattr(config, "num_mel_bins", None)
    frames = getattr(config, "max_source_positions", None)
    if bins is None or frames is None:
        raise GraphError(
            f"{type(model).__name__}: takes features of sound of an unknown shape. Export it from "
            "Python with export_module() and example inputs of your own."
        )
    return torch.randn(rows, bins, 2 * frames), {0: BATCH}  # two convolutions, one of stride 2


def _sequence_to_sequence(
    model: nn.Module, main: str, rows: int, *, whole: bool
) -> list[Part]:  # fmt: skip
    """Return encoder and decoder as graphs with a cache, or as one without."""
    target = "decoder_sequence_length"
    inputs: dict[str, Tensor] = {}
    axes: dict[str, Axes] = {}
    if main == "input_ids":
        source = {0: BATCH, 1: "encoder_sequence_length"}
        ids = _tokens(model, (rows, SIZES["encoder_sequence_length"]))
        inputs = {main: ids, "attention_mask": torch.ones_like(ids)}
        axes = {main: source, "attention_mask": source}
    else:
        inputs[main], axes[main] = _sound(model, main, rows)
    ids = _tokens(model, (rows, SIZES[target]))
    if not whole and task_of(type(model).__name__) in WRITING:
        found = encoder_decoder.parts(model, inputs, axes, ids)
    else:
        inputs["decoder_input_ids"], axes["decoder_input_ids"] = ids, {0: BATCH, 1: target}
        found = [plain(model, inputs, axes, options={"use_cache": False})]
    return found if main == "input_ids" else [_saying_frames(found[0], main), *found[1:]]


def _saying_frames(part: Part, sound: str) -> Part:
    """Return a part that says so where its features of sound have one length only."""
    return part if LENGTH in part.axes[sound].values() else fixed(part, sound, FRAMES, AS_SAID)


def _diffusion(model: nn.Module, rows: int) -> Part:
    """Return a diffusers UNet or transformer: noise, a time, a text's states, conditions."""
    sizes = noise.sides(model)
    words = SIZES["encoder_sequence_length"]
    make = torch.Generator().manual_seed(0)
    try:
        inputs = noise.noise(model, rows, words, make, None if sizes is None else sizes.traced())
    except Unsupported as error:
        raise GraphError(
            f"{error}. Export it from Python with export_module() and example inputs of your own."
        ) from error
    axes: dict[str, Axes] = {n: {0: BATCH} for n in inputs}
    axes |= {n: TEXT_AXES for n in ("encoder_hidden_states", "encoder_attention_mask")
             if n in inputs}  # fmt: skip
    facts: dict[str, Any] = {}
    if "img_ids" in inputs:  # patches in a row, as Flux takes them
        axes |= {"hidden_states": {0: BATCH, 1: PATCHES}, "img_ids": {0: PATCHES},
                 "txt_ids": {0: LENGTH}}  # fmt: skip
    steps: dict[str, int] = {}
    if sizes is not None:
        axes[next(iter(inputs))] = {0: BATCH, 2: HEIGHT, 3: WIDTH}
        if sizes.step > 1:
            steps = dict.fromkeys((HEIGHT, WIDTH), sizes.step)
            facts = {"multiples": steps}
        if sizes.most is not None:
            facts["at_most"] = dict.fromkeys((HEIGHT, WIDTH), sizes.most)
    dtype = next(model.parameters()).dtype
    inputs = {n: t.to(dtype) if t.is_floating_point() else t for n, t in inputs.items()}
    found = plain(model, inputs, axes, related=True)
    found = replace(found, steps=steps, facts={**found.facts, **facts})
    why = None if "img_ids" in inputs else noise.why_fixed(model)
    return found if why is None else fixed(found, next(iter(inputs)), SIDES, why)


def names(found: Sequence[Part]) -> list[str]:
    """Return the file names of graphs."""
    return [part.graph for part in found]
