"""A diffusers pipeline as one checkpoint: a folder for each model, each with weights of its own.

``model_index.json`` names the folders. A folder with a ``config.json`` of its own is a model
(``unet``, ``transformer``, ``vae``, ``text_encoder``, ``text_encoder_2``, ...), the others are
schedulers, tokenizers and the like. Tensors are called as in their files with the folder's name in
front: ``unet.conv_in.weight``.

Source: github.com/huggingface/diffusers, src/diffusers/pipelines/pipeline_utils.py
(from_pretrained) and pipeline_loading_utils.py (variant_compatible_siblings).
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dora_export.checkpoints.folder import STEMS, closed, read_json, sharded, weight_file
from dora_export.checkpoints.model import Checkpoint, Index, WeightFile
from dora_export.errors import InputError, listing, shown
from dora_export.storage.paths import contained, stays_inside

MODEL_INDEX = "model_index.json"
WEIGHTS = re.compile(
    rf"({'|'.join(STEMS)})(\.(?P<variant>\w+))?\.(?P<kind>safetensors|bin)"
    rf"|({'|'.join(STEMS)})\.(?P<index>safetensors|bin)\.index(\.(?P<of>\w+))?\.json"
)
# Classes of parts without weights, though some of them have a config.json.
WITHOUT_WEIGHTS = re.compile(r".*(Tokenizer(Fast)?|Processor(Fast)?|FeatureExtractor|Scheduler)")


@dataclass(frozen=True)
class Found:
    """The weights that a model's folder has to offer.

    Attributes:
        folder: The folder.
        files: Variant (None: without) -> a weight file or the index of shards; several where it is
            not clear which one counts.
    """

    folder: Path
    files: Mapping[str | None, tuple[Path, ...]]


def is_pipeline(path: Path) -> bool:
    """Return whether a folder holds a diffusers pipeline."""
    return (path / MODEL_INDEX).is_file()


def parts(folder: Path) -> dict[str, str]:
    """Return the folders that ``model_index.json`` names, sorted, with the class of each.

    Raises:
        InputError: It is malformed, or names a folder outside of the pipeline's.
    """
    index = folder / MODEL_INDEX
    named = {name: entry[1] for name, entry in read_json(index).items() if _is_part(entry)}
    outside = [n for n in named if not stays_inside(n) or "/" in n or n.startswith(".")]
    if outside:
        raise InputError(
            f"{index}: names folders outside its own: {[shown(n) for n in outside[:3]]}. "
            "Do not use this checkpoint."
        )
    return dict(sorted(named.items()))


def is_model(part: Path, class_name: str) -> bool:
    """Return whether a part of a pipeline has weights, or should have."""
    if WITHOUT_WEIGHTS.fullmatch(class_name):
        return False
    return (part / "config.json").is_file() or bool(weights_in(part).files)


def weights_in(folder: Path) -> Found:
    """Return the weights in a model's folder; safetensors where a variant has both kinds.

    Raises:
        InputError: The folder cannot be listed.
    """
    found: dict[tuple[str | None, str], list[Path]] = defaultdict(list)
    try:
        listed = sorted(os.listdir(folder)) if folder.is_dir() else []
    except OSError as error:
        raise InputError(f"{folder}: cannot be listed: {error.strerror}. Check it.") from error
    for name in listed:
        if match := WEIGHTS.fullmatch(name):
            key = (match["variant"] or match["of"], match["kind"] or match["index"])
            found[key].append(folder / name)
    variants = dict.fromkeys(variant for variant, _ in found)
    return Found(
        folder,
        {v: tuple(found.get((v, "safetensors")) or found[v, "bin"]) for v in variants},
    )


def chosen(
    models: Mapping[str, Found], wanted: str | None = None
) -> tuple[dict[str, Path], str | None]:
    """Return each model's weight file or index, and the variant that was chosen.

    As diffusers loads them: the weights without a variant if every model has such; else the only
    variant that completes the pipeline, and for models without it those without a variant. A
    wanted variant is chosen before all.

    Raises:
        InputError: No choice, or more than one, makes the pipeline whole.
    """
    empty = [name for name, found in models.items() if not found.files]
    if empty:
        where = next(iter(models.values())).folder.parent
        raise InputError(
            f"{where}: no weights found for {', '.join(map(shown, empty))} (such as "
            "diffusion_pytorch_model.safetensors or model.safetensors). Copy the whole pipeline."
        )
    variants = {v for found in models.values() for v in found.files if v is not None}
    complete: list[str | None] = [
        v for v in sorted(variants) if all(v in f.files or None in f.files for f in models.values())
    ]
    if wanted is not None:
        complete = [v for v in complete if v == wanted]
    elif all(None in found.files for found in models.values()):
        complete = [None]
    if len(complete) != 1 and wanted is not None:
        raise InputError(_absent(models, wanted))
    if len(complete) != 1:
        raise InputError(_undecided(models, complete))
    variant = complete[0]
    paths = {n: f.files[variant if variant in f.files else None] for n, f in models.items()}
    twice = [f"{n}: {' and '.join(p.name for p in ps)}" for n, ps in paths.items() if len(ps) > 1]
    if twice:
        raise InputError(
            f"{next(iter(models.values())).folder.parent}: more than one candidate for the weights "
            f"of a model:{listing(twice)}\nLeave one of them there."
        )
    return {name: found[0] for name, found in paths.items()}, variant


def variant_of(checkpoint: Checkpoint) -> str | None:
    """Return the variant that a model's weights are, by the names of its index or files."""
    names = [i.name for i in checkpoint.indexes] or [f.name for f in checkpoint.files]
    match = WEIGHTS.fullmatch(names[0].rpartition("/")[2]) if names else None
    return (match["variant"] or match["of"]) if match else None


def open_pipeline(
    folder: Path, *, allow_pickle: bool = False, variant: str | None = None
) -> Checkpoint:
    """Open a pipeline; reads headers, configs and indexes only.

    Args:
        folder: With ``model_index.json``.
        allow_pickle: Whether pickled weights may be read (through torch's restricted loader).
        variant: Which weights to read; None: as ``chosen`` says.

    Raises:
        InputError: A part is missing, or its weights are missing, ambiguous or malformed.
    """
    named = parts(folder)
    missing = [name for name in named if not (folder / name).is_dir()]
    if missing:
        raise InputError(
            f"{folder / MODEL_INDEX}: names folders that are not there: "
            f"{', '.join(map(shown, missing))}. Copy the whole pipeline."
        )
    models = {n: weights_in(folder / n) for n, cls in named.items() if is_model(folder / n, cls)}
    if not models:
        raise InputError(f"{folder}: a pipeline without models. Copy the whole pipeline.")
    paths, variant = chosen(models, variant)
    files: list[WeightFile] = []
    indexes: list[Index] = []
    for name, path in paths.items():
        own, index = _opened(contained(path, folder), allow_pickle)
        files += [_within(name, file) for file in own]
        indexes += [replace(index, name=f"{name}/{index.name}")] if index else []
    configs = {name: _config(folder / name) for name in models}
    notes = tuple(_notes(models, variant))
    return closed(Checkpoint(folder, tuple(files), folder, tuple(indexes), {}, configs, notes))


def open_variant(folder: Path, variant: str, *, allow_pickle: bool = False) -> Checkpoint:
    """Open one variant of a model's weights; reads headers, config and index only.

    Args:
        folder: Of one model, such as ``unet``.
        variant: Such as "fp16".
        allow_pickle: Whether pickled weights may be read (through torch's restricted loader).

    Raises:
        InputError: There is no such variant, or it is ambiguous or malformed.
    """
    found = {folder.name: weights_in(folder)}
    if variant not in found[folder.name].files:
        raise InputError(_absent(found, variant))
    paths, _ = chosen(found, variant)
    files, index = _opened(contained(paths[folder.name], folder), allow_pickle)
    indexes = (index,) if index else ()
    notes = tuple(_notes(found, variant))
    return closed(Checkpoint(folder, files, folder, indexes, _config(folder), notes=notes))


def _opened(path: Path, allow_pickle: bool) -> tuple[tuple[WeightFile, ...], Index | None]:
    if path.suffix == ".json":
        return sharded(path, allow_pickle)
    return (weight_file(path, allow_pickle),), None


def _within(part: str, file: WeightFile) -> WeightFile:
    """Return a part's weight file as one of the pipeline."""
    tensors = tuple(replace(t, name=f"{part}.{t.name}") for t in file.tensors)
    return replace(file, name=f"{part}/{file.name}", tensors=tensors)


def _is_part(entry: Any) -> bool:
    """Return whether an entry is a library and a class; null stands for a part left out."""
    return isinstance(entry, list) and len(entry) == 2 and all(isinstance(e, str) for e in entry)


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    return read_json(path) if path.is_file() else {}


def _held(models: Mapping[str, Found]) -> list[str]:
    return [
        f"{name}: {', '.join(shown(v) if v else 'without a variant' for v in found.files)}"
        for name, found in models.items()
    ]


def _absent(models: Mapping[str, Found], variant: str) -> str:
    where = next(iter(models.values())).folder
    return (
        f"{where if len(models) == 1 else where.parent}: no variant '{shown(variant)}' of the "
        f"weights is whole:{listing(_held(models))}\nPass another --variant, or none."
    )


def _undecided(models: Mapping[str, Found], complete: list[str | None]) -> str:
    held = _held(models)
    if complete:
        what = f"the variants {' and '.join(shown(v) for v in complete)} are both whole"
    else:
        what = "no variant of the weights is whole"
    way_out = (
        f"Pass --variant {shown(complete[0])}, or another of them."
        if complete
        else "Copy what is missing."
    )
    return f"{next(iter(models.values())).folder.parent}: {what}:{listing(held)}\n{way_out}"


def _notes(models: Mapping[str, Found], variant: str | None) -> Iterator[str]:
    left = sorted({v or "" for f in models.values() for v in f.files if v != variant})
    named = [f"'{shown(v)}'" if v else "no variant" for v in left]
    if variant is not None:
        yield f"the weights of variant '{shown(variant)}' are merged, and keep that name"
    elif named:
        yield f"the weights without a variant are merged; those of {', '.join(named)} are left out"
