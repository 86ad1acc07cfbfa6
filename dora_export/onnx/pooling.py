"""Sentence embeddings in the graph, pooled and normalised as sentence-transformers does it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from dora_export.checkpoints.folder import read_json
from dora_export.errors import shown
from dora_export.onnx.model import GraphError
from dora_export.storage.json_file import read_list
from dora_export.storage.paths import inside
from dora_export.verification.pooling import EMBEDDING, STATES, Mode

if TYPE_CHECKING:
    from torch import Tensor, nn

    from dora_export.onnx.wrappers import Part

# Key of 1_Pooling/config.json -> mode.
# Source: github.com/UKPLab/sentence-transformers, sentence_transformers/models/Pooling.py.
KEYS: Mapping[str, Mode] = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_lasttoken": "last",
}
SUM_LEAST, NORM_LEAST = 1e-9, 1e-12  # as sentence-transformers bounds its divisors


@dataclass(frozen=True)
class Pooling:
    """How the states of a text's tokens become one embedding.

    Attributes:
        mode: "mean" of all tokens, the first ("cls") or the last one's.
        normalise: Whether embeddings get length 1.
    """

    mode: Mode
    normalise: bool


def pooling_of(folder: Path, asked: str) -> Pooling:
    """Return the pooling of a folder; ``asked`` other than "config" overrides its mode.

    Raises:
        GraphError: The folder does not say, or says what cannot be put into the graph.
    """
    modules = _modules(folder)
    kinds = [str(m.get("type", "")).rpartition(".")[2] for m in modules]
    if strange := [k for k in kinds if k not in ("Transformer", "Pooling", "Normalize")]:
        raise GraphError(
            f"{folder / 'modules.json'}: has a module of type {shown(strange[0])}, which --pooling "
            "does not put into graphs. Leave the option out and run that module behind the graph."
        )
    normalise = "Normalize" in kinds
    if asked != "config":
        return Pooling(next(m for m in get_args(Mode) if m == asked), normalise)
    if "Pooling" not in kinds:
        raise GraphError(
            f"{folder}: has no modules.json of sentence-transformers with a pooling. Pass "
            "--pooling mean, cls or last."
        )
    place = modules[kinds.index("Pooling")].get("path")
    config = read_json(inside(folder, f"{place}/config.json", folder / "modules.json"))
    on = [key for key, value in config.items() if key.startswith("pooling_mode_") and value is True]
    if len(on) != 1 or on[0] not in KEYS:
        raise GraphError(
            f"{folder}: pools by {shown(', '.join(on) or 'nothing')}, which cannot be put into the "
            f"graph. Pass --pooling mean, cls or last if one of them is meant."
        )
    return Pooling(KEYS[on[0]], normalise)


def _modules(folder: Path) -> list[dict[str, Any]]:
    path = folder / "modules.json"
    if not path.is_file():
        return []
    return [m for m in read_list(path) if isinstance(m, dict)]


def pooled(part: Part, pooling: Pooling) -> Part:
    """Return an encoder's part with the embedding as one more output.

    Raises:
        GraphError: The model has no states of tokens, or takes no mask.
    """
    if STATES not in part.outputs or "attention_mask" not in part.inputs:
        raise GraphError(
            f"--pooling {pooling.mode}: the model gives no '{STATES}', or takes no attention_mask. "
            "Pass --task feature-extraction, or leave the option out."
        )
    from dora_export.onnx.wrappers import Flat  # noqa: PLC0415 - torch takes a second

    inner = part.module
    assert isinstance(inner, Flat), "Bug: a part of another module"
    run, outputs = inner.run, [*part.outputs, EMBEDDING]
    position = list(part.outputs).index(STATES)

    def with_embedding(model: nn.Module, values: dict[str, Tensor]) -> Sequence[Tensor]:
        found = list(run(model, values))
        return [*found, _embedding(found[position], values["attention_mask"], pooling)]

    module = Flat(inner.model, list(part.inputs), with_embedding, outputs)
    return replace(part, module=module, outputs=outputs, compared=outputs)


def _embedding(states: Tensor, mask: Tensor, pooling: Pooling) -> Tensor:
    import torch  # noqa: PLC0415 - as above

    if pooling.mode == "mean":
        weights = mask[..., None].to(states.dtype)
        found = (states * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=SUM_LEAST)
    elif pooling.mode == "cls":
        found = states[:, 0]
    else:
        places = torch.arange(1, states.shape[1] + 1, device=mask.device) * mask
        last = places.argmax(dim=1)[:, None, None].expand(-1, 1, states.shape[2])
        found = states.gather(1, last)[:, 0]
    if pooling.normalise:
        found = found / found.norm(dim=1, keepdim=True).clamp(min=NORM_LEAST)
    return found
