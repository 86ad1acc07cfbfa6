"""What belongs beside the weights: config, tokenizer, processor, code; and what does not."""

from __future__ import annotations

import filecmp
import json
import os
import re
from collections.abc import Collection, Generator, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dora_export import limits
from dora_export.checkpoints import pipeline
from dora_export.checkpoints.folder import read_json
from dora_export.errors import InputError, PlanError, shown
from dora_export.machine import advice
from dora_export.plan import Plan
from dora_export.storage.json_file import parse
from dora_export.storage.paths import contained, leads_out
from dora_export.words import size
from dora_export.writers.config import edited
from dora_export.writers.files import write_chunks, write_small
from dora_export.writers.staging import MANIFEST

# Weights in any format, and what frameworks leave beside them.
WEIGHT_SUFFIXES = frozenset(
    ".safetensors .bin .pt .pth .ckpt .gguf .ggml .onnx .onnx_data .data .h5 .msgpack .npz .tflite "
    ".mlmodel .mlpackage .pkl .pickle .xml .zip .tar .gz .nemo .index .engine".split()
)
# Folders that hold the same model again in another format.
OTHER_FORMATS = frozenset(
    "onnx openvino coreml original gguf metal tf flax .git .cache runs __pycache__".split()
)
ADAPTER_OWN = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
# The adapter's tokenizer wins over the base's, as one set.
TOKENIZER = frozenset(
    """tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json vocab.json
    vocab.txt merges.txt tokenizer.model spiece.model sentencepiece.bpe.model vocab.model
    chat_template.jinja chat_template.json tekken.json""".split()
)
# Any of these says that the adapter brings a whole tokenizer, not just a template.
WHOLE_TOKENIZER = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model",
                   "sentencepiece.bpe.model", "tekken.json")  # fmt: skip
TEMPLATES = "additional_chat_templates"
INDEX = re.compile(r"\.index(\.\w+)?\.json$")  # of shards; diffusers' variants have a word more
BIN_TOKENIZERS = ("sentencepiece.bpe.model",)
CHUNK = 1 << 20  # bytes copied at once


@dataclass(frozen=True)
class SideFile:
    """One file to take over.

    Attributes:
        name: Path within the output, with "/" between folders.
        source: Where it comes from.
        owner: "base" or "adapter".
    """

    name: str
    source: Path
    owner: Literal["base", "adapter"]


def collect(plan: Plan) -> tuple[SideFile, ...]:
    """Return the side files of the output, sorted by name.

    From the base: everything but weights, other formats of the same model and hidden files;
    weights in sub-folders only where modules.json (sentence-transformers) makes them part of the
    model. Of a pipeline: its own files, and those in the folders that it names. From the adapters
    of a single model: tokenizer and chat template, which win over the base's.

    Raises:
        PlanError: Two adapters bring tokenizers that differ.
    """
    found: dict[str, SideFile] = {}
    written = {file.name for file in plan.files} | plan.indexes.keys()
    if plan.base.folder is not None:
        for name, path in _walk(plan.base.folder, _parts(plan)):
            if name not in written and _belongs(name, path, plan.base.folder):
                found[name] = SideFile(name, path, "base")
    own = [] if plan.base.components else plan.adapters
    adapter = _one_tokenizer([a.folder for a in own if a.folder])
    if any(name in WHOLE_TOKENIZER for name in adapter):
        # One tokenizer, not a mix: the base's leave where the adapter has its own.
        found = {n: f for n, f in found.items() if n not in TOKENIZER or _is_template(n)}
    if any(_is_template(n) for n in adapter) or _holds_template(adapter):
        found = {n: f for n, f in found.items() if not _is_template(n)}
    found |= {name: SideFile(name, path, "adapter") for name, path in adapter.items()}
    return tuple(found[name] for name in sorted(found))


def in_folder(folder: Path, *, replaced_by: Mapping[str, SideFile]) -> tuple[SideFile, ...]:
    """Return what belongs beside a model that is not a base folder's own, e.g. a graph's.

    Args:
        folder: Its folder.
        replaced_by: The adapter's tokenizer, in whose place no part of another one is taken.
    """
    found = {name: SideFile(name, path, "base") for name, path in _walk(folder)
             if _belongs(name, path, folder)}  # fmt: skip
    if any(name in WHOLE_TOKENIZER for name in replaced_by):
        found = {n: f for n, f in found.items() if n not in TOKENIZER or _is_template(n)}
    if any(_is_template(n) for n in replaced_by):
        found = {n: f for n, f in found.items() if not _is_template(n)}
    return tuple(found[name] for name in sorted(found))


def write(plan: Plan, files: tuple[SideFile, ...], folder: Path, *, sync: bool = True) -> None:
    """Write the side files, config.json edited and the index file made anew.

    Raises:
        InputError: A side file cannot be read.
        OutputError: The disk is full, or writing fails.
    """
    for file in files:
        if file.name in plan.base.config_files and plan.config_edits:
            text = b"".join(_chunks(file.source)).decode("utf-8")
            data = [edited(text, plan.config_edits).encode("utf-8")]
            write_chunks(folder / file.name, data, sync=sync)
        else:
            copy(file.source, folder / file.name, sync=sync)
    for name, index in plan.indexes.items():
        text = json.dumps(index, indent=2, ensure_ascii=False) + "\n"
        write_small(folder / name, text.encode(), sync=sync)


def copy(source: Path, target: Path, *, sync: bool = True) -> None:
    """Copy a side file, in little memory.

    Raises:
        InputError: It cannot be read.
        OutputError: The disk is full, or writing fails.
    """
    with closing(_chunks(source)) as chunks:  # of a file that an error would leave open
        write_chunks(target, chunks, sync=sync)


def _chunks(path: Path) -> Generator[bytes, None, None]:
    try:
        with path.open("rb") as file:
            while data := file.read(CHUNK):
                yield data
    except OSError as error:
        raise InputError(
            f"{shown(path, 400)}: cannot be read: {error.strerror}. "
            f"{advice(error, 'Check the file.')}"
        ) from error


def side_bytes(files: tuple[SideFile, ...]) -> int:
    """Return the bytes of all side files."""
    return sum(file.source.stat().st_size for file in files)


def _parts(plan: Plan) -> Collection[str] | None:
    """Return the folders that belong to a pipeline; None for a model, to which all of them do."""
    folder = plan.base.folder
    return pipeline.parts(folder) if plan.base.components and folder is not None else None


def _walk(folder: Path, parts: Collection[str] | None = None) -> Iterator[tuple[str, Path]]:
    def refuse(error: OSError) -> None:  # os.walk would leave the folder out without a word
        raise InputError(
            f"{shown(error.filename, 400)}: cannot be listed: {error.strerror}. {advice(error)}"
        ) from error

    for root, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = sorted(
            d for d in folders if d not in OTHER_FORMATS and not d.startswith((".", "checkpoint-"))
        )
        if parts is not None and Path(root) == folder:
            folders[:] = [d for d in folders if d in parts]
        for name in folders:
            _refuse_linked(Path(root) / name)
        for name in sorted(names):
            path = Path(root) / name
            yield path.relative_to(folder).as_posix(), path


def _refuse_linked(folder: Path) -> None:
    """Refuse a link to a folder: what is in there would be missing, or be anything of the user's.

    Raises:
        InputError: It is one.
    """
    if folder.is_symlink():
        raise InputError(
            f"{shown(folder, 400)}: a link to a folder. Put a copy of the folder in its place, or "
            "remove the link."
        )


def _belongs(name: str, path: Path, folder: Path) -> bool:
    if _is_weight(name, path):
        inside = name.rpartition("/")[0] in _modules(folder) and _is_module_weight(path)
        return inside and _is_file(path, folder)
    return _is_side_file(name) and _obstacle(path, folder) is None


def _is_side_file(name: str) -> bool:
    """Return whether a file that is no weight goes along with the model, by its name."""
    leaf = name.rpartition("/")[2]
    own = (*ADAPTER_OWN, MANIFEST, "README.md", "trainer_state.json")
    return not (leaf.startswith(".") or leaf in own or INDEX.search(leaf))


def _is_weight(name: str, path: Path) -> bool:
    leaf = name.rpartition("/")[2]
    return _is_side_file(name) and path.suffix in WEIGHT_SUFFIXES and leaf not in BIN_TOKENIZERS


def _obstacle(path: Path, folder: Path) -> str | None:
    """Return why a side file stays behind although its name says that it belongs, or None."""
    if not _is_file(path, folder):
        return "not a regular file"
    nbytes, most = path.stat().st_size, limits.SIDE_FILE_BYTES
    return f"{size(nbytes)}, and a side file has at most {size(most)}" if nbytes > most else None


def left_behind(plan: Plan) -> dict[str, str]:
    """Return the base's files that are not taken over although they belong, and why.

    Weights in other formats, hidden files and the model card are not among them.
    """
    if plan.base.folder is None:
        return {}
    return left_in(plan.base.folder, _parts(plan))


def left_in(folder: Path, parts: Collection[str] | None = None) -> dict[str, str]:
    """Return the files of a folder that are not taken over although they belong, and why."""
    named = ((n, p) for n, p in _walk(folder, parts) if _is_side_file(n) and not _is_weight(n, p))
    return {name: why for name, path in named if (why := _obstacle(path, folder)) is not None}


def _is_file(path: Path, folder: Path) -> bool:
    """Return whether there is a file; a link to nothing is one that should have been there.

    Raises:
        InputError: It is a link to nothing (a cache that was cleared in part), or to a file outside
            of ``folder``, whose content is nobody's to publish.
    """
    if path.is_symlink() and not path.exists():
        raise InputError(
            f"{shown(path, 400)}: a link to a file that is not there. Download it again, or "
            "remove the link."
        )
    return path.is_file() and contained(path, folder) is path


def _is_module_weight(path: Path) -> bool:
    """Return whether a module of sentence-transformers loads this file: safetensors, else .bin."""
    if path.name == "pytorch_model.bin":
        return not path.with_name("model.safetensors").is_file()
    return path.suffix == ".safetensors"


def _modules(folder: Path) -> set[str]:
    """Return the sub-folders that sentence-transformers loads modules from."""
    path = folder / "modules.json"
    if not path.is_file():
        return set()
    try:
        with contained(path, folder).open("rb") as file:
            modules = parse(file.read(limits.CARD_BYTES), path)
    except InputError:
        return set()  # not what sentence-transformers would load either
    paths = (
        [m.get("path") for m in modules if isinstance(m, dict)] if isinstance(modules, list) else []
    )
    return {path for path in paths if isinstance(path, str) and path}


def _one_tokenizer(folders: list[Path]) -> dict[str, Path]:
    """Return the tokenizer files of the adapters, which must agree where several have one."""
    found = [(folder, tokenizer_of(folder)) for folder in folders]
    found = [(folder, files) for folder, files in found if files]
    if not found:
        return {}
    first, chosen = found[0]
    for folder, files in found[1:]:
        other = sorted(n for n in {*chosen, *files} if not _same_file(chosen.get(n), files.get(n)))
        if other:
            raise PlanError(
                f"{shown(folder, 400)}: brings another {shown(', '.join(other[:3]))} than "
                f"{shown(first, 400)}, and the merged model has one tokenizer. Move the tokenizer "
                "files of the adapter that is not to decide out of its folder."
            )
    return chosen


def _same_file(one: Path | None, other: Path | None) -> bool:
    return one is not None and other is not None and filecmp.cmp(one, other, shallow=False)


def tokenizer_of(folder: Path) -> dict[str, Path]:
    """Return a whole tokenizer with its templates, or the templates alone.

    A tokenizer_config.json without a vocabulary belongs to a tokenizer that is not here.

    Raises:
        InputError: A file of it is larger than side files may be, or a link that leads elsewhere.
    """
    names = [n for n in TOKENIZER if _is_file(folder / n, folder)]
    templates = folder / TEMPLATES
    if templates.is_dir():
        # Not glob(), which takes a folder that cannot be listed for an empty one.
        listed = [templates / n for n in os.listdir(templates) if n.endswith(".jinja")]
        names += [f"{TEMPLATES}/{p.name}" for p in listed if _is_file(p, folder)]
    whole = any(n in WHOLE_TOKENIZER for n in names)
    found = {n: folder / n for n in sorted(names) if whole or _is_template(n)}
    for path in found.values():
        if (why := _obstacle(path, folder)) is not None:
            raise InputError(f"{shown(path, 400)}: {why}. Put the real one there, or remove it.")
    return found


def _is_template(name: str) -> bool:
    return name.startswith(("chat_template.", f"{TEMPLATES}/"))


def _holds_template(adapter: Mapping[str, Path]) -> bool:
    """Return whether the adapter's tokenizer_config.json holds a template, as it used to."""
    path = adapter.get("tokenizer_config.json")
    return path is not None and bool(read_json(path).get("chat_template"))


def licence(plan: Plan) -> dict[str, str]:
    """Return ``license``, ``license_name`` and ``license_link`` of the base's model card."""
    card = plan.base.folder / "README.md" if plan.base.folder else None
    if card is None or not (card.is_file() and not leads_out(card, card.parent)):
        return {}
    with card.open("rb") as file:
        text = file.read(limits.CARD_BYTES).decode("utf-8", "replace")
    lines = text.splitlines()
    if not lines or lines[0].strip() != "---":
        return {}
    found: dict[str, str] = {}
    for line in lines[1:]:
        key, _, value = line.partition(":")
        if line.strip() == "---":
            return found
        if key in ("license", "license_name", "license_link"):
            found[key] = value.strip().strip("'\"")
    return {}
