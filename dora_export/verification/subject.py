"""The merged model as it lies there, whoever wrote it: what is wrong with it is a finding.

``open_checkpoint`` refuses a folder that is not in order; here the same faults are what is looked
for, so everything that can be read is read and the rest is told.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dora_export.checkpoints import pipeline
from dora_export.checkpoints.folder import NOT_THE_MODEL, STEMS, read_json
from dora_export.errors import InputError, shown
from dora_export.storage import PICKLED
from dora_export.storage.paths import contained, stays_inside
from dora_export.storage.pickled import read_pickled
from dora_export.storage.safetensors import Header, read_header
from dora_export.tensors import TensorRef
from dora_export.verification.model import Finding

MANIFEST = "dora_export.json"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
INDEX = "model.safetensors.index.json"
# Loaders take these before they look for an index.
WHOLE = ("model.safetensors", "pytorch_model.bin", "diffusion_pytorch_model.safetensors",
         "diffusion_pytorch_model.bin")  # fmt: skip
NUMBERED = re.compile(r"-\d{5}-of-\d{5}\.")


@dataclass(frozen=True)
class StoredFile:
    """A weight file of the merged model.

    Attributes:
        names: Its tensors, in the order of their bytes.
        nbytes: Bytes of tensor data.
        metadata: safetensors ``__metadata__``.
    """

    names: tuple[str, ...]
    nbytes: int
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Subject:
    """A merged model, as far as it can be read.

    Attributes:
        path: What the user named.
        folder: Folder whose side files belong to the model, or None for a single file.
        tensors: By name; what loaders would read, the first one where a name occurs twice.
        files: The weight files that hold them, by name.
        broken: Weight files that are missing or cannot be read.
        index: Content of the index file, or None.
        index_name: Its name, or None.
        config: Parsed config.json, or None.
        manifest: Parsed ``dora_export.json``, or None.
        maker: Who wrote it, as far as its files say, e.g. "dora-export 0.1.0".
        prefix: What was taken off (or, with a leading "-", put in front of) its tensor names to get
            the base's; empty: nothing.
        renaming: How its tensor names became the base's by a convention, for people; empty: they
            did not.
        stored_names: Base's name -> the model's own, where they differ.
        problems: What was found wrong on opening it.
        parts: For a pipeline: folder -> the model in it, its tensors under their own names. All
            other fields are about the pipeline, whose tensors and files have the folder in front.
    """

    path: Path
    folder: Path | None
    tensors: Mapping[str, TensorRef]
    files: Mapping[str, StoredFile]
    broken: frozenset[str] = frozenset()
    index: Mapping[str, Any] | None = None
    index_name: str | None = None
    config: Mapping[str, Any] | None = None
    manifest: Mapping[str, Any] | None = None
    maker: str = "another tool"
    prefix: str = ""
    renaming: str = ""
    stored_names: Mapping[str, str] = field(default_factory=dict)
    problems: tuple[Finding, ...] = ()
    parts: Mapping[str, Subject] = field(default_factory=dict)

    @property
    def places(self) -> dict[str, str]:
        """The index's weight_map, as far as it is one: tensor name -> file name."""
        found = self.index.get("weight_map") if self.index is not None else None
        entries = found.items() if isinstance(found, dict) else ()
        return {name: file for name, file in entries if isinstance(file, str)}


def open_subject(path: Path, *, allow_pickle: bool = False) -> Subject:
    """Open a merged model; reads headers, configs and indexes only.

    Args:
        path: Folder, ``.safetensors``, ``.bin``, ``.pt`` or ``.pth`` file.
        allow_pickle: Whether pickled weights may be read (through torch's restricted loader).

    Raises:
        InputError: There is no such path, or its only weights are pickled and may not be read.
    """
    if not path.exists():
        raise InputError(f"{path}: no such file or folder. Check the path of the merged model.")
    if pipeline.is_pipeline(path):
        return _open_pipeline(path, allow_pickle)
    return _open_model(path, allow_pickle, is_folder=path.is_dir())


def _open_model(path: Path, allow_pickle: bool, *, is_folder: bool) -> Subject:
    opening = _Opening(path, allow_pickle, path if is_folder else None)
    if is_folder:
        opening.read_folder()
    else:
        opening.read_file(path)
    return opening.subject()


def _open_pipeline(path: Path, allow_pickle: bool) -> Subject:
    opening = _Opening(path, allow_pickle, path)
    index = opening.json_file(pipeline.MODEL_INDEX, "config-missing") or {}
    try:
        named = pipeline.parts(path) if index else {}
    except InputError as error:
        opening.found("config-changed", pipeline.MODEL_INDEX, clause(error, path / "model_index"))
        named = {}
    parts: dict[str, Subject] = {}
    for name, class_name in named.items():
        weightless = pipeline.WITHOUT_WEIGHTS.fullmatch(class_name)
        absent = not weightless and not (path / name).exists()
        if absent or pipeline.is_model(path / name, class_name):
            parts[name] = _open_model(path / name, allow_pickle, is_folder=True)
    for part, own in parts.items():
        for found in own.problems:
            at = "." if found.where in own.tensors else "/"
            where = part if found.where == part else f"{part}{at}{found.where}"
            opening.found(found.code, where, found.what)
    subject = joined(opening.subject(), parts)
    return replace(subject, maker=_maker(subject.manifest, index, subject.files))


def joined(subject: Subject, parts: Mapping[str, Subject]) -> Subject:
    """Return a pipeline with the tensors and files of its models."""
    return replace(
        subject,
        tensors={f"{part}.{n}": t for part, own in parts.items() for n, t in own.tensors.items()},
        files={
            f"{part}/{name}": replace(file, names=tuple(f"{part}.{n}" for n in file.names))
            for part, own in parts.items()
            for name, file in own.files.items()
        },
        broken=frozenset(f"{part}/{n}" for part, own in parts.items() for n in own.broken),
        parts=parts,
    )


def clause(error: InputError, path: Path) -> str:
    """Return what an error says is wrong, without the place and the advice."""
    text = str(error).removeprefix(f"{path}: ")
    return re.split(r"\.\s+(?=[A-Z])", text)[0].rstrip(".")


class _Opening:
    """Gathers what can be read of a model, and what cannot."""

    def __init__(self, path: Path, allow_pickle: bool, folder: Path | None) -> None:
        self.path, self.allow_pickle, self.folder = path, allow_pickle, folder
        self.tensors: dict[str, TensorRef] = {}
        self.files: dict[str, StoredFile] = {}
        self.broken: set[str] = set()
        self.index: Mapping[str, Any] | None = None
        self.index_name: str | None = None
        self.problems: list[Finding] = []

    def subject(self) -> Subject:
        config, manifest = self.json_file("config.json", "config-missing"), None
        if self.folder is not None and (self.folder / MANIFEST).is_file():
            manifest = self.json_file(MANIFEST, "manifest-differs")
        return Subject(
            path=self.path,
            folder=self.folder,
            tensors=self.tensors,
            files=self.files,
            broken=frozenset(self.broken),
            index=self.index,
            index_name=self.index_name,
            config=config,
            manifest=manifest,
            maker=_maker(manifest, config or {}, self.files),
            problems=tuple(self.problems),
        )

    def found(self, code: str, where: object, what: str) -> None:
        self.problems.append(Finding(code, shown(where), what))

    def json_file(self, name: str, code: str) -> Mapping[str, Any] | None:
        """Return a JSON object of the folder, None where there is none."""
        path = self.folder / name if self.folder is not None else None
        if path is None or not path.is_file():
            return None
        try:
            return read_json(path)
        except InputError as error:
            self.found(code, name, clause(error, path))
            return None

    def read_folder(self) -> None:
        for suffix, kind in ((".safetensors", "safetensors"), (".bin", "bin")):
            present = [p.name for p in sorted(self.path.glob(f"*{suffix}")) if _is_model(p)]
            indexes = sorted(p.name for p in self.path.glob(f"*.{kind}.index*.json"))
            if present or indexes:
                self.read_weights(present, self.choose_index(indexes))
                return
        self.broken.add("")
        graphs = sorted((*self.path.glob("*.onnx"), *self.path.glob("onnx/*.onnx")))
        hint = f", but a graph: pass {shown(graphs[0], 400)} to verify that" if graphs else ""
        self.found("file-missing", self.path.name, f"the folder holds no weights{hint}")

    def choose_index(self, indexes: list[str]) -> str | None:
        preferred = [n for n in indexes if n.partition(".")[0] in STEMS]
        chosen = next(iter(preferred or indexes), None)
        for name in indexes:
            if name != chosen:
                self.found("file-extra", name, f"a second index beside {shown(chosen)}")
        return chosen

    def read_weights(self, present: list[str], index_name: str | None) -> None:
        """Read the files that the index names, or those that loaders find without one."""
        named = self.read_index(index_name) if index_name is not None else None
        if named is None:
            whole = [n for n in present if n in WHOLE]
            model = whole or present
            shards = [n for n in model if NUMBERED.search(n)]
            if shards and index_name is None:
                what = f"missing, though there are {len(shards)} numbered shards"
                self.found("index-wrong", INDEX, what)
        else:
            model = named
        for name in model:
            if name not in present and not (self.path / name).is_file():
                self.broken.add(name)
                count = sum(place == name for place in self.named_places().values())
                self.found("file-missing", name, f"the index places {count} tensors in it")
            else:
                self.read_file(self.path / name)
        for name in present:
            if name not in model:
                self.read_extra(name)

    def named_places(self) -> dict[str, str]:
        return Subject(self.path, None, {}, {}, index=self.index).places

    def read_index(self, name: str) -> list[str] | None:
        """Return the files that an index names, None if it names none."""
        content = self.json_file(name, "index-wrong")
        self.index_name = name
        if content is None:
            return None
        self.index = content
        places = content.get("weight_map")
        if (
            not isinstance(places, dict)
            or not places
            or not all(isinstance(v, str) for v in places.values())
        ):
            self.found("index-wrong", name, "holds no weight_map of names to files")
            return None
        files = sorted(set(places.values()))
        outside = [f for f in files if not stays_inside(f) or "/" in f]
        for file in outside:
            self.broken.add(file)
            self.found("index-wrong", name, f"names '{shown(file)}', outside the folder")
        return [f for f in files if f not in outside]

    def read_file(self, path: Path) -> None:
        try:
            header = self.header(path if self.folder is None else contained(path, self.folder))
        except InputError as error:
            if path.suffix in PICKLED and not self.allow_pickle:
                raise
            self.broken.add(path.name)
            self.found("file-unreadable", path.name, clause(error, path))
            return
        for name in header.tensors:
            if name in self.tensors:
                first = next(f for f, held in self.files.items() if name in held.names)
                self.found("tensor-twice", name, f"in {shown(first)} and {shown(path.name)}")
        self.tensors = {**header.tensors, **self.tensors}
        nbytes = sum(t.nbytes for t in header.tensors.values())
        self.files[path.name] = StoredFile(tuple(header.tensors), nbytes, header.metadata)

    def read_extra(self, name: str) -> None:
        """Tell of a weight file that is not part of the model."""
        try:
            held = self.header(contained(self.path / name, self.path)).tensors
        except InputError as error:
            self.found("file-extra", name, clause(error, self.path / name))
            return
        again = sum(n in self.tensors for n in held)
        if name in WHOLE and again:
            self.found("tensor-twice", name, f"holds {again} tensors that the index places in "
                       "other files; loaders take this file instead")  # fmt: skip
        else:
            self.found("file-extra", name, f"{len(held)} tensors, {again} of them also elsewhere")

    def header(self, path: Path) -> Header:
        if path.suffix not in PICKLED:
            return read_header(path)
        return Header(path, read_pickled(path, allow_pickle=self.allow_pickle), {}, 0)


def _is_model(path: Path) -> bool:
    return path.name not in (*NOT_THE_MODEL, *ADAPTER_FILES) and not path.name.startswith(
        ("optimizer", "scheduler")
    )


def _maker(
    manifest: Mapping[str, Any] | None,
    config: Mapping[str, Any],
    files: Mapping[str, StoredFile],
) -> str:
    """Return who wrote a model: its manifest says so, else its config and headers hint at it."""
    tool = manifest.get("tool") if manifest is not None else None
    if isinstance(tool, dict):
        return shown(f"{tool.get('name')} {tool.get('version')}")
    if any(key.startswith("unsloth") for key in config):
        return "unsloth"
    if any(file.metadata.get("format") == "mlx" for file in files.values()):
        return "mlx"
    for library in ("transformers", "diffusers"):
        if version := config.get(f"{library}_version", config.get(f"_{library}_version")):
            return f"another tool ({library} {shown(version)})"
    return "another tool"
