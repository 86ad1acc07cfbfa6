"""Names of the tensors in a PEFT adapter file, without what wrappers of the training loop add."""

from __future__ import annotations

# Segments that wrappers of the training loop leave in names.
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def plain_name(key: str) -> str:
    """Return the module path and parameter in the model that PEFT wrapped."""
    segments = _unwrapped([s for s in key.split(".") if s not in WRAPPERS])
    if segments[:2] == ["base_model", "model"]:
        segments = _unwrapped(segments[2:])
    return ".".join(segments)


def _unwrapped(segments: list[str]) -> list[str]:
    """Return a path without DistributedDataParallel's leading "module"."""
    return segments[1:] if segments[:1] == ["module"] else segments
