"""What a diffusion model of diffusers is called with: noise, a time, a text's states, conditions.

Names are flat, as a graph's are; ``arguments`` puts them where the model's forward has them.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dora_export.verification.measured import Unsupported

TIMES = (10, 500, 250)
FRACTIONS = (0.01, 0.5, 0.25)  # of 1: the pipeline has divided them
GUIDANCE = (3.5, 1.0, 7.0)
ADDED = "added_cond_kwargs"  # what a forward calls the mapping of these:
CONDITIONS = ("text_embeds", "time_ids", "resolution", "aspect_ratio")
PIXELS = 512.0  # a size that such a condition may name
TIME_IDS = 6  # sizes, crops and target sizes, two numbers each
REFINER_IDS, REFINER_EMBEDDING = 5, 1280  # a score in the place of target sizes


def arguments(values: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return keywords of a model's forward for inputs by the names that a graph has.

    Source: diffusers, models/unets/unet_2d_condition.py and transformers/pixart_transformer_2d.py.
    """
    added = {n: v for n, v in values.items() if n in CONDITIONS}
    rest: dict[str, Any] = {n: v for n, v in values.items() if n not in CONDITIONS}
    return rest | ({ADDED: added} if added else {})


@dataclass(frozen=True)
class Sides:
    """Sizes that the height and width of a model's noise may have.

    Attributes:
        base: Height and width of the config's.
        step: What all are multiples of.
        most: The largest, or None.
    """

    base: tuple[int, int]
    step: int
    most: int | None = None

    @property
    def vary(self) -> bool:
        """Return whether there are enough of them to trace with."""
        return self.most is None or len(self._near(self.most)) >= 3

    def traced(self) -> tuple[int, int]:
        """Return sizes to trace at: two different ones, neither of them the base's.

        At the base's a model may read a table that other sizes are not in.
        """
        height = next(n for n in self._near(self.base[0]) if n != self.base[0])
        return height, next(n for n in self._near(self.base[1]) if n not in (self.base[1], height))

    def other(self) -> tuple[int, int]:
        """Return sizes to compare at: a step from the base's, and twice it where that is one."""
        height = next(n for n in self._near(self.base[0]) if n != self.base[0])
        sizes = self._near(self.base[1])
        double = 2 * self.base[1]
        return height, double if double in sizes else next(n for n in sizes if n != self.base[1])

    def _near(self, size: int) -> list[int]:
        """Return allowed sizes of more than one step, the nearest first, larger before smaller."""
        most = 2 * size + 3 * self.step if self.most is None else self.most
        sizes = range(2 * self.step, most + 1, self.step)
        return sorted(sizes, key=lambda n: (abs(n - size), -n))


def sides(model: Any) -> Sides | None:
    """Return the sizes of a model's noise; None: only those of its config, see ``why_fixed``.

    They vary in UNets, and in transformers of patches whose places are computed, cropped, or not
    needed. Where the config's own size is no multiple, other sizes take other paths through the
    model.
    Source: diffusers, models/unets/unet_2d_condition.py, ``forward_upsample_size``;
    models/embeddings.py, ``PatchEmbed``; transformers/auraflow_transformer_2d.py,
    ``AuraFlowPatchEmbed.pe_selection_index_based_on_dim``.
    """
    found = _sides(model)
    return found if isinstance(found, Sides) else None


def why_fixed(model: Any) -> str | None:
    """Return why height and width of a model's noise are its config's; None: they vary."""
    found = _sides(model)
    return found if isinstance(found, str) else None


def _sides(model: Any) -> Sides | str:
    side = model.config.get("sample_size")
    if side is None:
        return "its config names no sample_size"
    height, width = (side, side) if isinstance(side, int) else side
    doublings: Any = getattr(model, "num_upsamplers", None)
    patches: Any = getattr(model, "pos_embed", getattr(model, "patch_embed", None))
    kind = type(patches).__name__
    if isinstance(doublings, int):
        found = Sides((height, width), 2**doublings)
    elif kind == "PatchEmbed":
        step, most = patches.patch_size, patches.pos_embed_max_size
        found = Sides((height, width), step, most and most * step)
    elif kind == "AuraFlowPatchEmbed":  # a square of learned places, of which the middle is taken
        step, most = patches.patch_size, math.isqrt(patches.pos_embed_max_size)
        found = Sides((height, width), step, most * step)
    else:
        return f"how {type(model).__name__} places patches at other sizes is not known here"
    if any(n % found.step for n in found.base):
        return (
            f"sample_size is no multiple of {found.step}, and other sizes take another path "
            "through the model"
        )
    return found if found.vary else f"it has places for sizes up to {found.most} alone"


def batches(
    model: nn.Module, lengths: tuple[int, int], make: torch.Generator
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield names and inputs of a model, of several sizes.

    Args:
        model: A UNet or a transformer of diffusers.
        lengths: Tokens of a long text and of a short one.
        make: Makes them.

    Raises:
        Unsupported: It takes noise of an unknown shape.
    """
    long, short = lengths
    yield "noise", noise(model, 3, short, make)
    yield "noise for one image", noise(model, 1, long, make)
    if (sizes := sides(model)) is not None:
        yield "noise of another size", noise(model, 2, short, make, sizes.other())


def noise(
    model: nn.Module,
    rows: int,
    words: int,
    make: torch.Generator,
    size: tuple[int, int] | None = None,
) -> dict[str, Tensor]:
    """Return inputs by a graph's names.

    Args:
        model: As in ``batches``.
        rows: Batch size.
        words: Tokens of the text.
        make: Makes them.
        size: Height and width; None: the config's.

    Raises:
        Unsupported: As in ``batches``.
    """
    takes = inspect.signature(model.forward).parameters
    config: Any = model.config
    if "encoder_hidden_states_t5" in takes:  # HunyuanDiT
        raise Unsupported(
            type(model).__name__, "takes states of two texts (encoder_hidden_states_t5), places "
            "(image_rotary_emb), sizes and a style, for which no inputs can be made up"
        )  # fmt: skip
    channels = config.get("in_channels")
    if channels is not None and "img_ids" in takes:
        values = _packed(rows, channels, words, make)
    else:
        main = "sample" if "sample" in takes else "hidden_states"
        side = config.get("sample_size")
        if channels is None or side is None:
            raise Unsupported(
                type(model).__name__, "takes noise of a shape that its config leaves open"
            )
        height, width = size or ((side, side) if isinstance(side, int) else side)
        values = {main: torch.randn(rows, channels, height, width, generator=make),
                  "timestep": _cycled(TIMES, rows)}  # fmt: skip
    states = config.get("cross_attention_dim") or config.get("joint_attention_dim")
    captions = config.get("caption_channels")
    states = captions or states
    if "encoder_hidden_states" in takes and isinstance(states, int):
        values["encoder_hidden_states"] = torch.randn(rows, words, states, generator=make)
        if captions and "encoder_attention_mask" in takes:
            # the text's padding, which pipelines with captions pass on
            mask = torch.ones(rows, words, dtype=torch.long)
            mask[1:, words // 2 :] = 0
            values["encoder_attention_mask"] = mask
    pooled = config.get("pooled_projection_dim")
    if "pooled_projections" in takes and isinstance(pooled, int):
        values["pooled_projections"] = torch.randn(rows, pooled, generator=make)
    if "guidance" in takes and config.get("guidance_embeds"):
        values["guidance"] = _cycled(GUIDANCE, rows)
    return values | _conditions(model, rows, make)


def _conditions(model: Any, rows: int, make: torch.Generator) -> dict[str, Tensor]:
    """Return what else SDXL's UNet and PixArt's transformer are told: a pooled text, and sizes."""
    config = model.config

    def sizes(count: int) -> Tensor:
        return PIXELS * (1 + torch.randint(3, (rows, count), generator=make)).float()

    if config.get("addition_embed_type") == "text_time":
        total = config["projection_class_embeddings_input_dim"]
        each, ids = config["addition_time_embed_dim"], TIME_IDS
        if total - REFINER_IDS * each == REFINER_EMBEDDING:
            ids = REFINER_IDS
        text = torch.randn(rows, total - ids * each, generator=make)
        return {"text_embeds": text, "time_ids": sizes(ids)}
    if getattr(model, "use_additional_conditions", False):
        return {"resolution": sizes(2), "aspect_ratio": sizes(1) / PIXELS}
    return {}


def _cycled(values: Sequence[float], rows: int) -> Tensor:
    return torch.tensor([values[i % len(values)] for i in range(rows)])


def _packed(rows: int, channels: int, words: int, make: torch.Generator) -> dict[str, Tensor]:
    """Return patches of noise with their places, and the places of a text, as Flux takes them."""
    height, width = 3 + rows, 5
    places = torch.zeros(height, width, 3)
    places[..., 1], places[..., 2] = torch.arange(height)[:, None], torch.arange(width)
    return {
        "hidden_states": torch.randn(rows, height * width, channels, generator=make),
        "timestep": _cycled(FRACTIONS, rows),
        "img_ids": places.reshape(-1, 3),
        "txt_ids": torch.zeros(words, 3),
    }
