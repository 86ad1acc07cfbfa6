"""Base models as stored: which tensors there are, in which files, beside which side files."""

from __future__ import annotations

from dora_export.checkpoints.folder import open_checkpoint
from dora_export.checkpoints.hub import locate
from dora_export.checkpoints.model import Checkpoint, WeightFile

__all__ = ["Checkpoint", "WeightFile", "locate", "open_checkpoint"]
