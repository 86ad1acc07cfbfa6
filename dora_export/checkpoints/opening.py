"""Opening a base, whatever it is: a pipeline of several models, one model, one file."""

from __future__ import annotations

from pathlib import Path

from dora_export.checkpoints.folder import open_model
from dora_export.checkpoints.model import Checkpoint
from dora_export.checkpoints.pipeline import is_pipeline, open_pipeline


def open_checkpoint(path: Path, *, allow_pickle: bool = False) -> Checkpoint:
    """Open a pipeline, a model folder or a weight file; reads headers, configs and indexes only.

    Args:
        path: Folder, ``.safetensors``, ``.bin``, ``.pt`` or ``.pth`` file.
        allow_pickle: Whether pickled weights may be read (through torch's restricted loader).

    Raises:
        InputError: There are no weights, or more than one candidate, or they are malformed.
    """
    if is_pipeline(path):
        return open_pipeline(path, allow_pickle=allow_pickle)
    return open_model(path, allow_pickle=allow_pickle)
