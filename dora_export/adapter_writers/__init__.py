"""Adapter formats to convert to. Adding one is adding a module beside this file and a row."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from dora_export.adapter_writers import diffusers, lycoris, mlx, peft, torchtune
from dora_export.adapter_writers.model import Source, Written

__all__ = ["WRITERS", "AdapterWriter", "Source", "Written"]


class AdapterWriter(NamedTuple):
    """One way of storing an adapter.

    Attributes:
        name: What ``--to`` calls it.
        write: Returns the adapter in that format, or refuses it by name; reads no tensor.
        needs_paths: Whether a base has to say which layers flattened names, and names with a
            component of a pipeline in front, are about.
    """

    name: str
    write: Callable[[Source], Written]
    needs_paths: bool = True


WRITERS = (
    AdapterWriter("peft", peft.write),
    AdapterWriter("mlx", mlx.write),
    AdapterWriter("torchtune", torchtune.write),
    AdapterWriter("lycoris", lycoris.write, needs_paths=False),
    AdapterWriter("diffusers", diffusers.write, needs_paths=False),
)
