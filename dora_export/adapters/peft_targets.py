"""What target_modules of a PEFT config says of the layers that ought to be adapted.

Source: github.com/huggingface/peft 0.21.2, src/peft/tuners/tuners_utils.py
(check_target_module_exists): a name in the list means every module whose path ends with it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from dora_export.errors import shown


def names_all_layers(raw: Mapping[str, Any], *, numbers: bool = False) -> bool:
    """Return whether a config names layers by what they are, not by their numbers.

    Args:
        raw: Content of the config.
        numbers: Names with numbers will do as well, such as "to_out.0": those of positions.
    """
    targets = raw.get("target_modules")
    if (
        not isinstance(targets, list)
        or raw.get("exclude_modules")
        or raw.get("layers_to_transform")
    ):
        return False
    named = (*targets, *(raw.get("target_parameters") or []))
    return numbers or not any(part.isdigit() for t in named for part in str(t).split("."))


def doubts(targets: object, layers: Sequence[str], products: Collection[str]) -> Iterator[str]:
    """Yield where the names in target_modules and a file's layers differ.

    Args:
        targets: target_modules; anything but a list says nothing here.
        layers: Paths of all that the file adapts, in the wrapped model.
        products: Those of them that are modules with A and B.
    """
    if not isinstance(targets, list | tuple):
        return
    named = {t: [m for m in layers if f".{m}".endswith(f".{t}")] for t in map(str, targets)}
    if absent := [shown(t) for t, found in named.items() if not found]:
        yield (
            f"target_modules names {few(absent)}, of which the file has no tensors: the model had "
            "no such layers, or they are lost"
        )
    known = {m for found in named.values() for m in found}
    if more := [shown(m) for m in products if m not in known]:
        yield f"the file has layers that target_modules does not name: {few(more)}"


def few(names: Sequence[str]) -> str:
    """Return names as a list of at most three."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more}"
