"""What every checkpoint reader returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from dora_export.tensors import TensorRef


@dataclass(frozen=True)
class WeightFile:
    """One file of weights.

    Attributes:
        name: File name of its safetensors twin in the output.
        tensors: In the order of their bytes.
        metadata: safetensors ``__metadata__``.
        data_start: Offset of the first data byte, 0 if unknown.
        path: Where the tensors lie; None for a file that is only planned.
    """

    name: str
    tensors: tuple[TensorRef, ...]
    metadata: Mapping[str, str] = field(default_factory=lambda: {"format": "pt"})
    data_start: int = 0
    path: Path | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of tensor data."""
        return sum(t.nbytes for t in self.tensors)


@dataclass(frozen=True)
class Checkpoint:
    """A base model on disk; no weight has been read.

    Attributes:
        path: What the user named.
        files: Weight files in order.
        folder: Folder whose side files (config, tokenizer) belong to the model, or None.
        index_name: Name of the index file if there are shards by index, else None.
        index_metadata: The index's own metadata.
        config: Parsed config.json, or an empty mapping.
    """

    path: Path
    files: tuple[WeightFile, ...]
    folder: Path | None = None
    index_name: str | None = None
    index_metadata: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def model_name(self) -> str:
        """The model's name: org/name in the Hugging Face cache, else that of the folder or file."""
        for part in self.path.absolute().parts:
            if part.startswith("models--"):
                return part.removeprefix("models--").replace("--", "/")
        return self.path.absolute().name

    @property
    def model_types(self) -> tuple[str, ...]:
        """``model_type`` of config.json and of its text part, as far as they say."""
        text = self.config.get("text_config")
        inner = text.get("model_type") if isinstance(text, dict) else None
        return tuple(str(t) for t in (self.config.get("model_type"), inner) if t is not None)

    def setting(self, name: str) -> Any:
        """Return a value of config.json's text part, else of config.json itself, else None."""
        text = self.config.get("text_config")
        inner = text.get(name) if isinstance(text, dict) else None
        return inner if inner is not None else self.config.get(name)

    @cached_property
    def tensors(self) -> dict[str, TensorRef]:
        """All tensors by name."""
        return {t.name: t for file in self.files for t in file.tensors}

    @property
    def sources(self) -> tuple[Path, ...]:
        """The files on disk that hold the tensors, each once, in order."""
        return tuple(dict.fromkeys(t.source.path for t in self.tensors.values()))

    @property
    def nbytes(self) -> int:
        """Bytes of tensor data."""
        return sum(file.nbytes for file in self.files)
