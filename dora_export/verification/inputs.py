"""Inputs to run a model on: given texts, or generated from what its config says it takes.

Generated tokens are ordinary ones of the model's own vocabulary, of two lengths, so that padding
and its mask are part of what is compared; those that the adapter trained are among them.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dora_export.verification import noise
from dora_export.verification.measured import Unsupported
from dora_export.verification.models import quiet

LENGTHS = (16, 11)  # tokens of generated sequences
SEQUENCES = 8  # of one batch: enough numbers for a noise floor, where a model gives but a few
IMAGE_SIZE = 64  # pixels, where the config leaves it open
SECONDS = 0.4  # of generated sound
SOUND_RATE = 16000
PROMPT_TOKENS = 512  # of a given text, at most
SEED = 20240213


@dataclass(frozen=True, eq=False)
class Batch:
    """What a model is called with.

    Attributes:
        name: For people.
        values: Arguments by name.
        mask: ``(batch, length)``, 0 where the outputs belong to padding; None: nowhere.
        grows: Argument that a text is written onto, or None.
    """

    name: str
    values: Mapping[str, Tensor]
    mask: Tensor | None = None
    grows: str | None = None

    def grown(self, tokens: Tensor) -> Batch:
        """Return the batch with one more token per sequence, ``(batch,)``."""
        assert self.grows is not None, "Bug: a batch without text"
        values = dict(self.values)
        values[self.grows] = torch.cat([values[self.grows], tokens[:, None]], dim=1)
        mask = values.get("attention_mask")
        if self.grows == "input_ids" and mask is not None:
            values["attention_mask"] = torch.cat([mask, torch.ones_like(tokens)[:, None]], dim=1)
        return Batch(self.name, values, None, self.grows)

    def to_dict(self) -> dict[str, Any]:
        """Return names and shapes as JSON-ready data."""
        return {"name": self.name, "shapes": {k: list(v.shape) for k, v in self.values.items()}}


def batches(
    model: nn.Module, folder: Path, prompts: Sequence[str], favoured: Sequence[int] = ()
) -> list[Batch]:
    """Return inputs for a model.

    Args:
        model: Of transformers or diffusers.
        folder: Where its tokenizer is, for ``prompts``.
        prompts: Texts to run it on instead of generated tokens.
        favoured: Tokens that have to be among the generated ones.

    Raises:
        Unsupported: The model takes something that cannot be made up, or has no tokenizer.
    """
    make = torch.Generator().manual_seed(SEED)
    takes = set(inspect.signature(model.forward).parameters)
    config: Any = model.config
    if "sample" in takes or "hidden_states" in takes:
        return [Batch(*one) for one in noise.batches(model, LENGTHS, make)]
    main = getattr(model, "main_input_name", "input_ids")
    if main == "input_ids":
        found = (
            _of_prompts(model, folder, prompts) if prompts else _of_tokens(model, favoured, make)
        )
        if "pixel_values" in takes and hasattr(config, "projection_dim"):  # CLIP and its kin
            found = [_with(b, pixel_values=_pixels(config.vision_config, _size(b), make))
                     for b in found]  # fmt: skip
    elif main == "pixel_values":
        found = [Batch("images", {main: _pixels(config, SEQUENCES, make)})]
    elif main in ("input_features", "input_values"):
        found = [Batch("sound", {main: _sound(config, main, make)})]
    else:
        raise Unsupported(type(model).__name__, f"takes '{main}', which cannot be made up")
    if getattr(config, "is_encoder_decoder", False):
        found = [_decoding(b, model, make) for b in found]
    return found


def _with(batch: Batch, **values: Tensor) -> Batch:
    return Batch(batch.name, {**batch.values, **values}, batch.mask, batch.grows)


def _size(batch: Batch) -> int:
    return len(next(iter(batch.values.values())))


def _writes_text(model: nn.Module) -> bool:
    can = getattr(model, "can_generate", None)
    return bool(can is not None and can())


# --- text


def _of_prompts(model: nn.Module, folder: Path, prompts: Sequence[str]) -> list[Batch]:
    from transformers import AutoTokenizer  # noqa: PLC0415 - an extra

    with quiet():
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
            encoded = [
                tokenizer(text, return_tensors="pt", truncation=True, max_length=PROMPT_TOKENS)
                for text in prompts
            ]
        except Exception as error:
            # The library raises whatever it meets; all of it means: no tokens from these texts.
            raise Unsupported(f"{folder}", f"its tokenizer does not load ({error})") from error
    takes = inspect.signature(model.forward).parameters
    grows = "input_ids" if _writes_text(model) else None
    return [
        Batch(f"prompt {i}", {k: v for k, v in e.items() if k in takes}, None, grows)
        for i, e in enumerate(encoded, 1)
    ]


def _of_tokens(model: nn.Module, favoured: Sequence[int], make: torch.Generator) -> list[Batch]:
    rows = vocabulary(model)
    special = _special_tokens(model)
    ordinary = torch.tensor([i for i in range(rows) if i not in special] or list(range(rows)))
    long, short = (min(n, _most_tokens(model)) for n in LENGTHS)

    def draw(length: int) -> Tensor:
        pick = torch.randint(len(ordinary), (SEQUENCES, length), generator=make)
        return ordinary[pick]

    padded, text = draw(long), draw(long)
    spread = [i for i in favoured if 0 <= i < rows][: short * SEQUENCES]
    for tokens in (padded, text):
        # Column by column, so that every sequence has some, before its padding.
        for position, token in enumerate(spread):
            tokens[position % SEQUENCES, position // SEQUENCES] = token
    mask = torch.ones_like(padded)
    mask[1::2, short:] = 0
    pad = getattr(model.config, "pad_token_id", None)
    padded = torch.where(mask == 1, padded, 0 if pad is None else pad)
    takes = inspect.signature(model.forward).parameters
    found = [Batch("tokens", {"input_ids": text[:2]},
                   grows="input_ids" if _writes_text(model) else None)]  # fmt: skip
    if "attention_mask" in takes and not _needs_padding_token(model):
        found.insert(0, Batch("padded tokens", {"input_ids": padded, "attention_mask": mask}, mask))
    else:
        found = [Batch(f"tokens {i}", {"input_ids": row[None]}) for i, row in enumerate(text)]
    return found


def _needs_padding_token(model: nn.Module) -> bool:
    """Return whether the model reads its output at the last token and knows no padding token."""
    return "ForSequenceClassification" in type(model).__name__ and (
        getattr(model.config, "pad_token_id", None) is None
    )


def vocabulary(model: Any) -> int:
    """Return how many tokens a model knows.

    Raises:
        Unsupported: The library does not say which of its embeddings is that of tokens.
    """
    # A class of two towers has two embeddings, so transformers' method raises for it.
    tower: Any = getattr(model, "text_model", None)
    owner = tower if hasattr(tower, "get_input_embeddings") else model
    try:
        return int(owner.get_input_embeddings().weight.shape[0])
    except (AttributeError, NotImplementedError) as error:
        what = "takes tokens of an unknown number: its class names no embedding of theirs"
        raise Unsupported(type(model).__name__, what) from error


def _special_tokens(model: Any) -> set[int]:
    configs = [model.config, getattr(model, "generation_config", None)]
    found: set[int] = set()
    for config in configs:
        for name, value in (config.to_dict() if config is not None else {}).items():
            if name.endswith("token_id"):
                found |= set(value) if isinstance(value, list) else {value}
    return {i for i in found if isinstance(i, int)}


def _most_tokens(model: nn.Module) -> int:
    """Return how many tokens fit; a few positions are offsets in some models."""
    positions = getattr(model.config, "max_position_embeddings", None)
    return max(1, positions - 4) if isinstance(positions, int) else max(LENGTHS)


def _decoding(batch: Batch, model: nn.Module, make: torch.Generator) -> Batch:
    """Return a batch for an encoder-decoder: with the beginning of what it could write."""
    start = getattr(model.config, "decoder_start_token_id", None)
    rows = vocabulary(model)
    shape = (_size(batch), LENGTHS[1] // 2)
    ids = torch.randint(rows // 2, rows, shape, generator=make)
    ids[:, 0] = 0 if start is None else start
    grows = "decoder_input_ids" if _writes_text(model) and batch.name != "padded tokens" else None
    return Batch(batch.name, {**batch.values, "decoder_input_ids": ids}, batch.mask, grows)


# --- images, sound


def _pixels(config: Any, count: int, make: torch.Generator) -> Tensor:
    size = getattr(config, "image_size", None) or IMAGE_SIZE
    height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
    channels = getattr(config, "num_channels", None) or 3
    return torch.randn(count, channels, height, width, generator=make)


def _sound(config: Any, kind: str, make: torch.Generator) -> Tensor:
    if kind == "input_values":
        return torch.randn(2, int(SECONDS * SOUND_RATE), generator=make)
    bins = getattr(config, "num_mel_bins", None)
    frames = getattr(config, "max_source_positions", None)
    if bins is None or frames is None:
        raise Unsupported(str(config.model_type), "takes features of sound of an unknown shape")
    return torch.randn(2, bins, 2 * frames, generator=make)  # two convolutions, one of stride 2
