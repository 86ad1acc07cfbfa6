"""Which component of a pipeline each layer of an adapter is in, and its path there.

An adapter's own name may say so (``unet.``), else the base: a pipeline by its folders, a model's
folder by the class in its config.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from dora_export.adapter_writers.model import NEEDS_BASE, Source, module_of
from dora_export.adapters.diffusers_keys import COMPONENT, component_of
from dora_export.checkpoints.model import Checkpoint
from dora_export.errors import shown
from dora_export.flat_names import is_flat
from dora_export.update import Update


@dataclass(frozen=True)
class Place:
    """Where a layer is.

    Attributes:
        component: Such as "unet"; None: nothing says that it is a pipeline's.
        path: Of its module in the component, or in the model.
        flat: The adapter's own name for it, where that is flattened; else None.
    """

    component: str | None
    path: str
    flat: str | None = None


def places(source: Source) -> tuple[Place, ...]:
    """Return where each of the updates is, in their order."""
    pairs = zip(source.adapter.updates, source.updates, strict=True)
    return tuple(_place(module_of(own), u, source) for own, u in pairs)


def doubts(source: Source) -> Iterator[str]:
    """Yield names whose first part may be a component, or a module of one model."""
    if source.adapter.naming == "paths" and source.base is None:
        for update in source.updates:
            if component_of(update.target) == "transformer":
                yield (
                    f"{shown(update.target)}: whether 'transformer.' is a component of a pipeline "
                    f"or a module of the model is not said; {NEEDS_BASE}"
                )


def _place(own: str, update: Update, source: Source) -> Place:
    base, module = source.base, module_of(update)
    flat = own if source.adapter.naming == "flat" and is_flat(own) else None
    # In the base's names "transformer." is a component only where the base is a pipeline.
    is_pipeline = base is not None and bool(base.components)
    if source.adapter.naming == "flat" and flat is None and component_of(own) is not None:
        return _split(own)
    if base is None:
        return _split(module, flat)
    if is_pipeline:
        found = _split(source.names.get(update.target, update.target).removesuffix(".weight"), flat)
        keeps = source.adapter.naming == "paths" and component_of(module) != found.component
        return Place(found.component, module if keeps else found.path, flat)
    return Place(_by_class(base), module, flat)


def _split(module: str, flat: str | None = None) -> Place:
    match = COMPONENT.match(module)
    return Place(component_of(module), module[match.end() :] if match else module, flat)


def _by_class(base: Checkpoint) -> str | None:
    """Return the component that a model of diffusers' is, by the class in its config."""
    name = str(base.config.get("_class_name", ""))
    words = {"UNet": "unet", "Prior": "prior", "Transformer": "transformer"}
    return next((component for word, component in words.items() if word in name), None)
