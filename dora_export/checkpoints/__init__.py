"""Base models as stored: which tensors there are, in which files, beside which side files."""

from __future__ import annotations

from dora_export.checkpoints.hub import locate
from dora_export.checkpoints.model import Checkpoint, WeightFile
from dora_export.checkpoints.opening import open_checkpoint

__all__ = ["Checkpoint", "WeightFile", "locate", "open_checkpoint"]
