"""``pytorch_lora_weights.safetensors`` as diffusers writes it: PEFT's names behind the component.

The metadata entry ``lora_adapter_metadata`` holds PEFT's config of every component, which diffusers
makes its LoraConfig of.
Source: github.com/huggingface/diffusers 0.42.1, src/diffusers/loaders/lora_base.py
(_save_lora_weights, write_lora_layers), utils/peft_utils.py (_create_lora_config).
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dora_export.adapter_writers import peft
from dora_export.adapter_writers.components import Place, doubts, places
from dora_export.adapter_writers.lycoris import stored_transposed
from dora_export.adapter_writers.model import (
    NEEDS_BASE,
    Source,
    Written,
    alpha_of,
    check,
    is_embedding,
    kind_problem,
    whole,
)
from dora_export.errors import shown
from dora_export.update import Update

WEIGHTS = "pytorch_lora_weights.safetensors"
METADATA = "lora_adapter_metadata"
Layers = Mapping[str, Mapping[str, Update]]


def write(source: Source) -> Written:
    """Return an adapter as diffusers' weight file.

    Raises:
        AdapterError: diffusers cannot hold it exactly; all reasons are listed.
    """
    found = places(source)
    layers: dict[str, dict[str, Update]] = defaultdict(dict)
    for place, update in zip(found, source.updates, strict=True):
        layers[place.component or ""][place.path] = update
    problems = [*doubts(source), *_problems(source, found, layers)]
    check(source, "diffusers", problems)
    tensors = [
        tensor
        for component, own in layers.items()
        for path, update in own.items()
        for tensor in peft.tensors_of(f"{component}.{path}", update)
    ]
    settings = {
        f"{component}.{key}": value
        for component, own in layers.items()
        for key, value in _config(own).items()
    }
    metadata = {METADATA: json.dumps(settings, indent=2, sort_keys=True)}
    return Written(WEIGHTS, tuple(tensors), metadata=metadata)


def _problems(source: Source, found: Sequence[Place], layers: Layers) -> Iterator[str]:
    if source.adapter.layer_replication:
        yield "layers of the base are repeated"
    if sum(map(len, layers.values())) < len(found):
        yield "several of its layers are the same one of the base"
    for place, update in zip(found, source.updates, strict=True):
        name = shown(update.target)
        if update.kind not in ("lora", "dora"):
            yield kind_problem(update)
        elif is_embedding(update):
            yield f"{name}: an embedding"
        elif place.component is None:
            yield (
                f"{name}: which component of a pipeline it is in is not said; {NEEDS_BASE}, the "
                "pipeline's folder"
            )
        elif stored_transposed(update, source):
            yield f"{name}: the base stores it (in, out), as GPT-2 does"
    for component, own in layers.items():
        if component and len({u.magnitude is not None for u in own.values()}) > 1:
            yield (
                f"{component}: some layers have magnitudes and some have not; use_dora is one for "
                "all of a component"
            )


def _config(own: Mapping[str, Update]) -> dict[str, Any]:
    """Return PEFT's config of one component, by the paths of its modules."""
    ranks = {path: u.rank for path, u in own.items()}
    alphas = {path: whole(alpha_of(u)) for path, u in own.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return peft.config(
        rank, alpha, sorted(own),
        use_dora=any(u.magnitude is not None for u in own.values()),
        rank_pattern=peft.pattern(ranks, rank),
        alpha_pattern=peft.pattern(alphas, alpha),
    )  # fmt: skip
