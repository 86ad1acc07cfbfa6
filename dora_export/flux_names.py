"""Flux under two names: diffusers' layers, and the original ones, which fuse q, k, v (and MLP).

Source: github.com/black-forest-labs/flux, src/flux/modules/layers.py; tested against github.com/
huggingface/diffusers, src/diffusers/loaders/single_file_utils.py
(convert_flux_transformer_checkpoint_to_diffusers).
"""

from __future__ import annotations

import re

# Original name -> diffusers' of a block's modules; several for one that is fused, in row order.
DOUBLE = {
    "img_mod.lin": ("norm1.linear",), "txt_mod.lin": ("norm1_context.linear",),
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn.proj": ("attn.to_out.0",), "txt_attn.proj": ("attn.to_add_out",),
    "img_mlp.0": ("ff.net.0.proj",), "img_mlp.2": ("ff.net.2",),
    "txt_mlp.0": ("ff_context.net.0.proj",), "txt_mlp.2": ("ff_context.net.2",),
}  # fmt: skip
SINGLE = {
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",), "modulation.lin": ("norm.linear",),
}  # fmt: skip
OUTSIDE = {
    "img_in": "x_embedder", "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}  # fmt: skip
HALVES_SWAPPED = "final_layer.adaLN_modulation.1"  # shift, scale there; scale, shift in diffusers
BLOCK = re.compile(r"(?P<kind>double|single)_blocks\.(?P<number>\d+)\.(?P<module>.+)")
OF_DIFFUSERS = re.compile(
    r"(?P<single>single_)?transformer_blocks\.(?P<number>\d+)\.(?P<module>.+)"
)


def diffusers_names(original: str) -> tuple[str, ...]:
    """Return diffusers' modules for an original one, in the order of its rows; () for none."""
    match = BLOCK.fullmatch(original)
    if match is None:
        return (OUTSIDE[original],) if original in OUTSIDE else ()
    single = match["kind"] == "single"
    block = f"{'single_' if single else ''}transformer_blocks.{match['number']}"
    names = (SINGLE if single else DOUBLE).get(match["module"], ())
    return tuple(f"{block}.{name}" for name in names)


def original_name(module: str) -> str | None:
    """Return the original module that holds one of diffusers', alone or with others."""
    match = OF_DIFFUSERS.fullmatch(module)
    if match is None:
        return next((old for old, new in OUTSIDE.items() if new == module), None)
    table = SINGLE if match["single"] else DOUBLE
    found = next((old for old, new in table.items() if match["module"] in new), None)
    block = f"{'single' if match['single'] else 'double'}_blocks.{match['number']}"
    return None if found is None else f"{block}.{found}"
