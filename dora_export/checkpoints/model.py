"""What every checkpoint reader returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from dora_export.tensors import TensorRef


def prefix_of(file: str) -> str:
    """Return what tensors of a weight file have before the names that stand in the file itself.

    A file in a component's folder (``unet/diffusion_pytorch_model.safetensors``) names its tensors
    as the component does; within a checkpoint of several components they are ``unet. ...``.
    """
    folder = file.rpartition("/")[0]
    return f"{folder}." if folder else ""


@dataclass(frozen=True)
class WeightFile:
    """One file of weights.

    Attributes:
        name: Path of its safetensors twin within the output: a file name, or for a component of a
            pipeline ``folder/name``.
        tensors: In the order of their bytes, under their names in the checkpoint.
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
class Index:
    """An index of shards.

    Attributes:
        name: Its path within the output, like that of the files it names.
        metadata: The index's own metadata.
    """

    name: str
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Checkpoint:
    """A base model on disk; no weight has been read.

    Attributes:
        path: What the user named.
        files: Weight files in order.
        folder: Folder whose side files (config, tokenizer) belong to the model, or None.
        indexes: One for each model that is stored in shards by index.
        config: Parsed config.json, or an empty mapping.
        components: For a pipeline of several models: folder -> its parsed config.json. Empty for
            one model.
        notes: What was chosen among its files, for people.
    """

    path: Path
    files: tuple[WeightFile, ...]
    folder: Path | None = None
    indexes: tuple[Index, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    components: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

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
    def config_files(self) -> tuple[str, ...]:
        """Paths, within the folder, of the configs that describe the weights."""
        return tuple(f"{c}/config.json" for c in self.components) or ("config.json",)

    def config_of(self, tensor: str) -> Mapping[str, Any]:
        """Return the config of the model that a tensor belongs to."""
        return self.components.get(tensor.partition(".")[0], self.config)

    def component(self, folder: str) -> Checkpoint:
        """Return one model of a pipeline, its tensors under their names in the pipeline."""
        return replace(
            self,
            files=tuple(f for f in self.files if prefix_of(f.name) == f"{folder}."),
            indexes=tuple(i for i in self.indexes if prefix_of(i.name) == f"{folder}."),
            config=self.components[folder],
            components={},
        )

    def relative(self, path: Path) -> str:
        """Return how a file of the base is called in reports: of a pipeline, with its folder."""
        if self.components and self.folder is not None and self.folder in path.parents:
            return path.relative_to(self.folder).as_posix()
        return path.name

    @property
    def sources(self) -> tuple[Path, ...]:
        """The files on disk that hold the tensors, each once, in order."""
        return tuple(dict.fromkeys(t.source.path for t in self.tensors.values()))

    @property
    def nbytes(self) -> int:
        """Bytes of tensor data."""
        return sum(file.nbytes for file in self.files)
