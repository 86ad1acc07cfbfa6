"""Names of modules that a checkpoint fuses and a model class keeps apart, or the reverse.

A table says which (``conventions``); a name then means rows of a tensor, or several tensors, as
with image models (``diffusion_names``, which moves the updates and says what cannot be cut). Names
stay in the checkpoint's convention but for the last module, so that the same renamings lead to
them: the first third of ``encoder.layers.0.attn.Wqkv`` is ``encoder.layers.0.attn.q_proj``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from dora_export import conventions
from dora_export.checkpoints.model import Checkpoint
from dora_export.diffusion_names import Place, Places, row_spans


def other_names(base: Checkpoint) -> Places:
    """Return the names of parts and of fused modules, with where they are in the base.

    Empty for models that the table does not have. Parts are of the sizes that transformers cuts; a
    module whose rows do not divide so has no parts.
    """
    fused = [(whole, parts, (1,) * len(parts))
             for whole, parts in conventions.fused_modules(base.model_types)]  # fmt: skip
    heads = _heads(base.config)
    fused += [(whole, parts, heads)
              for whole, parts in conventions.grouped_modules(base.model_types)]  # fmt: skip
    found = dict(_names(base, fused)) if fused else {}
    return {name: places for name, places in found.items() if name not in base.tensors}


def _heads(config: Mapping[str, Any]) -> tuple[int, ...]:
    """Return how many heads queries, keys and values have; config.json does not say: ()."""
    text = config.get("text_config")
    counted = text if isinstance(text, Mapping) else config
    queries: Any = counted.get("num_attention_heads")
    others: Any = counted.get("num_key_value_heads", queries)
    heads = (queries, others, others)
    return heads if all(isinstance(n, int) and n > 0 for n in heads) else ()


def _names(
    base: Checkpoint, fused: Iterable[tuple[str, tuple[str, ...], tuple[int, ...]]]
) -> Iterator[tuple[str, tuple[Place, ...]]]:
    tensors = base.tensors
    for name in tensors:
        module, _, leaf = name.rpartition(".")
        parent, _, last = module.rpartition(".")
        for whole, parts, shares in fused if leaf in ("weight", "bias") else ():
            here = [f"{parent}.{part}.{leaf}" for part in parts]
            if last == whole and shares and (rows := _rows(base, name)) and rows % sum(shares) == 0:
                of = row_spans(rows // sum(shares) * share for share in shares)
                yield from ((n, (Place(name, at),)) for n, at in zip(here, of, strict=True))
            elif last == parts[0] and all(n in tensors and _rows(base, n) for n in here):
                of = row_spans(_rows(base, n) for n in here)
                together = tuple(Place(n, None, own) for n, own in zip(here, of, strict=True))
                yield f"{parent}.{whole}.{leaf}", together


def _rows(base: Checkpoint, name: str) -> int:
    """Return the first dimension of a tensor, 0 for one without dimensions."""
    shape = base.tensors[name].shape
    return shape[0] if shape else 0
