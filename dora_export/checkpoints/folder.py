"""Model folders and single weight files as checkpoints.

Looked for in this order: an index of safetensors shards, one safetensors file, an index of
pickled shards, one pickled file. Symbolic links are followed where ``storage/paths.py`` says so.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath

from dora_export.checkpoints.model import Checkpoint, Index, WeightFile
from dora_export.errors import InputError, listing, shown
from dora_export.storage import PICKLED, read_tensors
from dora_export.storage.json_file import read_index
from dora_export.storage.json_file import read_json as read_json
from dora_export.storage.paths import contained, inside
from dora_export.storage.safetensors import read_header

# Names that libraries give a model's weights: transformers (new, old) and diffusers.
STEMS = ("model", "pytorch_model", "diffusion_pytorch_model")
# Weights that lie beside the model's own in published folders, under names of their own.
NOT_THE_MODEL = ("adapter_model.safetensors", "consolidated.safetensors", "training_args.bin")


def open_model(path: Path, *, allow_pickle: bool = False) -> Checkpoint:
    """Open the folder of one model, or a single weight file.

    Args:
        path: Folder, ``.safetensors``, ``.bin``, ``.pt`` or ``.pth`` file.
        allow_pickle: Whether pickled weights may be read (through torch's restricted loader).

    Raises:
        InputError: There are no weights, or more than one candidate, or they are malformed.
    """
    if not path.is_dir():
        return closed(Checkpoint(path, (weight_file(path, allow_pickle),)))
    config = read_json(path / "config.json") if (path / "config.json").is_file() else {}
    folder = Checkpoint(path, (), folder=path, config=config)
    # Not glob(), which takes a folder that cannot be listed for an empty one.
    listed = [path / name for name in sorted(os.listdir(path))]
    for stem in ("safetensors", "bin"):
        indexes = [p for p in listed if p.name.endswith(f".{stem}.index.json")]
        if indexes:
            index = _only(path, indexes, "index")
            shards, described = sharded(index, allow_pickle)
            return closed(replace(folder, files=shards, indexes=(described,)))
        files = [p for p in listed if p.suffix == f".{stem}" and _is_model(p)]
        whole = [p for p in files if p.stem in STEMS]
        if files:
            file = contained(_only(path, whole or files, "weight file"), path)
            return closed(replace(folder, files=(weight_file(file, allow_pickle),)))
    raise InputError(
        f"{path}: no weights found (model.safetensors, *.safetensors.index.json, "
        "pytorch_model.bin). Check that this is the folder of the base model."
    )


def _is_model(path: Path) -> bool:
    return path.name not in NOT_THE_MODEL and not path.name.startswith(("optimizer", "scheduler"))


def _only(folder: Path, found: list[Path], what: str) -> Path:
    if len(found) > 1:
        preferred = [p for p in found if p.name.split(".")[0] in STEMS]
        if len(preferred) != 1:
            raise InputError(
                f"{folder}: more than one {what}: {', '.join(p.name for p in found)}. "
                "Pass the file to merge into, or leave one of them there."
            )
        return preferred[0]
    return found[0]


def weight_file(path: Path, allow_pickle: bool, name: str | None = None) -> WeightFile:
    """Return a weight file with its tensors, under their names in the file.

    Raises:
        InputError: It is missing, malformed, or pickled without ``allow_pickle``.
    """
    name = name or path.name
    if path.suffix == ".safetensors":
        header = read_header(path)
        tensors = tuple(header.tensors.values())
        return WeightFile(name, tensors, header.metadata, header.data_start, path)
    tensors = tuple(read_tensors(path, allow_pickle=allow_pickle).values())
    return WeightFile(_safetensors_name(name), tensors, path=path)


def _safetensors_name(name: str) -> str:
    stem = PurePosixPath(name).stem
    if stem.startswith("pytorch_model"):  # diffusers keeps "diffusion_pytorch_model"
        stem = stem.removeprefix("pytorch_")
    return f"{stem}.safetensors"


def sharded(index: Path, allow_pickle: bool) -> tuple[tuple[WeightFile, ...], Index]:
    """Return the shards that an index names, and what the index is in the output.

    Raises:
        InputError: The index is malformed, names files outside its folder, or does not fit them.
    """
    content = read_index(index)
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise InputError(f"{index}: no weight_map of names to files. Download it again.")
    names = sorted(set(weight_map.values()))
    _check_shards(index, names)
    files = tuple(weight_file(index.parent / n, allow_pickle, n) for n in names)
    _check_weight_map(index, weight_map, names, files)
    metadata = content.get("metadata")
    name = index.name
    if ".bin.index" in name:
        whole, _, ending = name.partition(".bin")
        name = _safetensors_name(f"{whole}.bin") + ending
    return files, Index(name, metadata if isinstance(metadata, dict) else {})


def _check_shards(index: Path, names: list[str]) -> None:
    places = {n: inside(index.parent, n, index) for n in names}
    deeper = [n for n in names if "/" in n]
    if deeper:
        raise InputError(
            f"{index}: names files in folders below its own: {[shown(n) for n in deeper[:3]]}. "
            "Put the shards beside the index."
        )
    missing = [shown(n) for n, place in places.items() if not place.is_file()]
    if missing:
        raise InputError(
            f"{index}: {len(missing)} of {len(names)} shards are missing:{listing(missing)}\n"
            "Download them again."
        )
    wrong = [n for n in names if Path(n).suffix not in (".safetensors", *PICKLED)]
    if wrong:
        raise InputError(
            f"{index}: names files that hold no weights: {[shown(n) for n in wrong[:3]]}. "
            "Download it again."
        )


def _check_weight_map(
    index: Path, weight_map: Mapping[str, str], names: list[str], files: tuple[WeightFile, ...]
) -> None:
    held = {t.name: n for n, file in zip(names, files, strict=True) for t in file.tensors}
    wrong = [
        f"'{shown(t)}' is said to be in {n}, found in {held.get(t, 'no shard')}"
        for t, n in sorted(weight_map.items())
        if held.get(t) != n
    ]
    if wrong:
        raise InputError(f"{index}: does not fit its shards:{listing(wrong)}\nDownload it again.")


def closed(checkpoint: Checkpoint) -> Checkpoint:
    """Check what holds for all checkpoints: there are tensors, and no name occurs twice."""
    seen: dict[str, str] = {}
    twice = []
    for file in checkpoint.files:
        for tensor in file.tensors:
            if tensor.name in seen:
                twice.append(f"'{shown(tensor.name)}' in {seen[tensor.name]} and {file.name}")
            seen[tensor.name] = file.name
    if twice:
        raise InputError(
            f"{checkpoint.path}: tensors stored twice:{listing(twice)}\n"
            "Which one counts is not defined; download the model again."
        )
    if not seen:
        raise InputError(f"{checkpoint.path}: holds no tensors. Check that this is the base model.")
    return checkpoint
