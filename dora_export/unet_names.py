"""The UNet of Stable Diffusion under two names: diffusers' blocks, and LDM's numbered ones.

LDM numbers what goes in and out: ``input_blocks.4.1`` is the second part of the fifth thing on the
way down, whichever block of diffusers that belongs to. How many resnets a block has decides, and is
read from the names themselves.

Source: github.com/CompVis/latent-diffusion, ldm/modules/diffusionmodules/openaimodel.py; tested
against github.com/huggingface/diffusers, src/diffusers/loaders/single_file_utils.py
(convert_ldm_unet_checkpoint).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

# (diffusers', LDM's) names of modules outside of the blocks, and within a resnet.
OUTSIDE = (
    ("time_embedding.linear_1", "time_embed.0"), ("time_embedding.linear_2", "time_embed.2"),
    ("add_embedding.linear_1", "label_emb.0.0"), ("add_embedding.linear_2", "label_emb.0.2"),
    ("conv_in", "input_blocks.0.0"), ("conv_norm_out", "out.0"), ("conv_out", "out.2"),
    ("mid_block.resnets.0", "middle_block.0"), ("mid_block.attentions.0", "middle_block.1"),
    ("mid_block.resnets.1", "middle_block.2"),
)  # fmt: skip
RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
BLOCK = re.compile(
    r"(?P<way>down|up)_blocks\.(?P<block>\d+)\.(?P<kind>resnets|attentions|downsamplers|upsamplers)"
    r"\.(?P<position>\d+)\.(?P<rest>.+)"
)
NUMBERED = re.compile(r"(?P<way>input|output)_blocks\.(?P<number>\d+)\.(?P<part>\d+)\.(?P<rest>.+)")


def to_ldm(modules: Iterable[str]) -> dict[str, str]:
    """Return diffusers' name of each module of a UNet -> LDM's; those without one are left out."""
    modules = list(modules)
    found = [m for name in modules if (m := BLOCK.fullmatch(name))]
    resnets = [int(m["position"]) for m in found
               if (m["way"], m["block"], m["kind"]) == ("down", "0", "resnets")]  # fmt: skip
    attending = {(m["way"], m["block"]) for m in found if m["kind"] == "attentions"}
    names: dict[str, str] = {}
    for module in modules:
        match = BLOCK.fullmatch(module)
        if match is None:
            names |= _outside(module, 0)
        elif resnets:
            names[module] = _numbered(match, max(resnets) + 1, attending)
    return names


def to_diffusers(modules: Iterable[str]) -> dict[str, str]:
    """Return LDM's name of each module of a UNet -> diffusers'; those without one are left out."""
    modules = list(modules)
    found = [m for name in modules if (m := NUMBERED.fullmatch(name))]
    inputs = [m for m in found if m["way"] == "input"]
    ends = [int(m["number"]) for m in inputs if m["rest"] == "op"]
    # The first block ends with a downsampler; where there is one block only, with the last input.
    per_block = min(ends, default=max((int(m["number"]) for m in inputs), default=0) + 1) - 1
    names: dict[str, str] = {}
    for module in modules:
        outside = _outside(module, 1)
        match = NUMBERED.fullmatch(module)
        if outside:
            names |= outside
        elif match is not None and per_block > 0:
            names[module] = _in_blocks(match, per_block)
    return names


def _outside(module: str, known: int) -> dict[str, str]:
    for pair in OUTSIDE:
        old, new = pair[known], pair[1 - known]
        if module == old or module.startswith(f"{old}."):
            rest = module[len(old) :]
            resnet = ".resnets." in pair[0]
            return {module: new + (_in_resnet(rest, to_ldm=known == 0) if resnet else rest)}
    return {}


def _in_resnet(rest: str, *, to_ldm: bool) -> str:
    table: Mapping[str, str] = RESNET if to_ldm else {new: old for old, new in RESNET.items()}
    dot = "." if rest.startswith(".") else ""
    return dot + table.get(rest.removeprefix("."), rest.removeprefix("."))


def _numbered(match: re.Match[str], resnets: int, attending: set[tuple[str, str]]) -> str:
    """Return LDM's name of a module in one of diffusers' blocks."""
    block, position, rest = int(match["block"]), int(match["position"]), match["rest"]
    down, kind = match["way"] == "down", match["kind"]
    each = resnets + 1
    if kind == "downsamplers":
        return f"input_blocks.{(block + 1) * each}.0.{rest.replace('conv', 'op', 1)}"
    if kind == "upsamplers":
        part = 2 if ("up", match["block"]) in attending else 1
        return f"output_blocks.{block * each + resnets}.{part}.{rest}"
    number = block * each + position + down
    way = "input" if down else "output"
    if kind == "attentions":
        return f"{way}_blocks.{number}.1.{rest}"
    return f"{way}_blocks.{number}.0.{_in_resnet(rest, to_ldm=True)}"


def _in_blocks(match: re.Match[str], resnets: int) -> str:
    """Return diffusers' name of a module in one of LDM's numbered blocks."""
    number, part, rest = int(match["number"]), int(match["part"]), match["rest"]
    down, each = match["way"] == "input", resnets + 1
    block, position = divmod(number - down, each)
    way = "down" if down else "up"
    if rest == "op":
        return f"down_blocks.{block}.downsamplers.0.conv"
    if part and rest == "conv":
        return f"up_blocks.{block}.upsamplers.0.conv"
    if part:
        return f"{way}_blocks.{block}.attentions.{position}.{rest}"
    return f"{way}_blocks.{block}.resnets.{position}.{_in_resnet(rest, to_ldm=False)}"
