"""Opening a base, whatever it is: a pipeline of several models, one model, one file."""

from __future__ import annotations

from pathlib import Path

from dora_export.checkpoints.folder import open_model
from dora_export.checkpoints.model import Checkpoint
from dora_export.checkpoints.pipeline import is_pipeline, open_pipeline, open_variant
from dora_export.errors import InputError


def open_checkpoint(
    path: Path, *, allow_pickle: bool = False, variant: str | None = None
) -> Checkpoint:
    """Open a pipeline, a model folder or a weight file; reads headers, configs and indexes only.

    Args:
        path: Folder, ``.safetensors``, ``.bin``, ``.pt`` or ``.pth`` file.
        allow_pickle: Whether pickled weights may be read (through torch's restricted loader).
        variant: Which weights to read of a folder that has several, such as "fp16".

    Raises:
        InputError: There are no weights, or more than one candidate, or they are malformed, or
            there is no such variant.
    """
    if variant is not None and not path.is_dir():
        raise InputError(f"{path}: is one file, which has no variants. Leave --variant out.")
    if is_pipeline(path):
        return open_pipeline(path, allow_pickle=allow_pickle, variant=variant)
    if variant is not None:
        return open_variant(path, variant, allow_pickle=allow_pickle)
    return open_model(path, allow_pickle=allow_pickle)
