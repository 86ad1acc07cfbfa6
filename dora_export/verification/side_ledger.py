"""Files beside the weights: tokenizer, settings, code, left-overs, and the manifest.

A byte-equal file needs no second look. One that differs is read for what it means: tools write
tokenizers and settings anew, and only other content is wrong.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dora_export import limits
from dora_export.checkpoints.folder import read_json
from dora_export.errors import InputError, in_line, shown
from dora_export.machine import advice
from dora_export.plan import Plan
from dora_export.storage.json_file import same
from dora_export.verification.model import Finding
from dora_export.verification.subject import ADAPTER_FILES, MANIFEST, Subject

READ_BYTES = 1 << 20
MAX_TOKENIZER_BYTES = 512 << 20
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")
# Files that hold a whole vocabulary, and those that a tokenizer.json makes superfluous.
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model",
                "sentencepiece.bpe.model", "vocab.model", "tekken.json")  # fmt: skip
SUPERFLUOUS = (*VOCABULARIES[1:], "merges.txt", "added_tokens.json", "special_tokens_map.json")
TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")
TOKENIZER_FILES = frozenset(("tokenizer_config.json", "tokenizer.json", *SUPERFLUOUS))
# Settings that decide which tokens a text becomes.
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "cls_token", "sep_token", "mask_token")
DECIDING = (*SPECIAL_TOKENS, "add_bos_token", "add_eos_token", "add_prefix_space", "do_lower_case")
# What libraries write into settings of their own accord.
LIBRARY_KEYS = ("transformers_version", "_diffusers_version", "_name_or_path",
                "_from_model_config", "processor_class")  # fmt: skip
# Configs of a pipeline's parts without weights, and its own, that decide what it computes.
PIPELINE_CONFIGS = ("model_index.json", "scheduler_config.json")

Owner = Literal["base", "adapter"]


@dataclass(frozen=True)
class Source:
    """Where a side file of the output comes from.

    Attributes:
        path: The file.
        owner: Whose it is; the adapter's tokenizer and chat template win over the base's.
    """

    path: Path
    owner: Owner


@dataclass(frozen=True)
class SideLedger:
    """What the comparison of side files gave.

    Attributes:
        findings: In no order.
        figures: Numbers and lists, JSON-ready.
    """

    findings: tuple[Finding, ...]
    figures: Mapping[str, Any]


def check_side_files(
    subject: Subject, sources: Mapping[str, Source], configs: Collection[str]
) -> SideLedger:
    """Compare every file beside the weights with its source.

    Args:
        subject: The merged model.
        configs: Paths of models' configs, which have a check of their own.
        sources: Path within the output, with "/" between folders -> where it comes from.

    Raises:
        InputError: A source cannot be read.
    """
    if subject.folder is None:
        what = f"a single file: {len(sources)} files beside the weights were not looked for"
        only = (Finding("weights-only", shown(subject.path.name), what),) if sources else ()
        return SideLedger(only, {"side_files": 0})
    findings = [
        Finding("adapter-left", name, "lies beside the merged weights")
        for name in ADAPTER_FILES
        if os.path.isfile(subject.folder / name)  # false for a path that is too long to be
    ]
    equal = 0
    template_told = False
    for name, source in sorted(sources.items()):
        path = subject.folder / name
        if name in configs:
            equal += path.is_file() and _same_bytes(path, source.path)
            continue
        if path.is_file() and _same_bytes(path, source.path):
            equal += 1
            continue
        if _holds_template(name):
            if not template_told:
                findings += _template(subject.folder, sources)
            template_told = True
            if name in TEMPLATE_FILES:
                continue
        findings += _judge(name, path, source, subject, sources)
    return SideLedger(tuple(findings), {"side_files": len(sources), "side_files_equal": equal})


def check_manifest(
    plan: Plan, subject: Subject, digests: Mapping[Path, str] | None = None
) -> tuple[Finding, ...]:
    """Compare what ``dora_export.json`` says went in with what is given now.

    Args:
        plan: What base and adapter should give.
        subject: The merged model.
        digests: SHA-256 of input files that are known already; the others are read.
    """
    digests = digests or {}
    manifest = subject.manifest
    if manifest is None:
        return ()
    planned = Counter(step.status for step in plan.steps)
    changed = {s.name: s.status for s in plan.steps if s.status not in ("unchanged", "cast")}
    told = _object(manifest.get("changed"))
    said = {n: _object(entry).get("status") for n, entry in told.items()}
    problems = [
        *_other_files(
            "base",
            manifest.get("base"),
            {plan.base.relative(p): p for p in _base_files(plan)},
            digests,
        ),
        *_other_adapters(plan, manifest, digests),
    ]
    if manifest.get("tensors") != dict(planned):
        problems.append(f"tensors: {_counts(manifest.get('tensors'))}, here {_counts(planned)}")
    if said != changed:
        other = sorted(n for n in said.keys() | changed.keys() if said.get(n) != changed.get(n))
        problems.append(f"changed: {len(other)} tensors differ, such as {shown(other[0])}")
    return tuple(Finding("manifest-differs", MANIFEST, p) for p in problems)


# --- one file


def _judge(
    name: str, path: Path, source: Source, subject: Subject, sources: Mapping[str, Source]
) -> list[Finding]:
    """Return what a file that is missing, or not its source byte for byte, amounts to."""
    where, leaf = shown(name), path.name
    of_tokenizer = leaf in TOKENIZER_FILES
    if not path.is_file():
        if of_tokenizer:
            return _missing_tokenizer_file(name, path, source)
        if leaf in PIPELINE_CONFIGS:
            return [Finding("config-missing", where, f"the {source.owner} has it")]
        code = "file-missing" if name.endswith(WEIGHTS) else "side-file-missing"
        return [Finding(code, where, f"the {source.owner} has it")]
    if name.endswith(WEIGHTS):
        return [Finding("bytes-differ", where, f"not the {source.owner}'s file")]
    try:
        if leaf == "tokenizer.json":
            return _tokenizer(where, path, source)
        if leaf == "tokenizer_config.json":
            return _tokenizer_config(where, path, source)
        if leaf in SUPERFLUOUS and not name.endswith(".json"):
            return [_tokenizer_differs(where, f"not the {source.owner}'s file")]
        if leaf in PIPELINE_CONFIGS:
            return _pipeline_config(where, path, source)
        if name.endswith(".json"):
            return _settings(name, path, source, own=subject.manifest is not None)
    except InputError as error:
        if not str(error).startswith(str(path)):
            raise  # the source's fault
        code = "tokenizer-differs" if of_tokenizer else "side-file-differs"
        code = "config-missing" if leaf in PIPELINE_CONFIGS else code
        return [Finding(code, where, "not JSON, unlike its source")]
    return [Finding("side-file-differs", where, f"not the {source.owner}'s file")]


def _missing_tokenizer_file(name: str, path: Path, source: Source) -> list[Finding]:
    """A tokenizer.json holds what older files hold; without it, or settings, there is no model."""
    if path.name in SUPERFLUOUS and path.with_name("tokenizer.json").is_file():
        return [Finding("tokenizer-rewritten", shown(name), "left out beside tokenizer.json")]
    return [Finding("tokenizer-missing", shown(name), f"the {source.owner} has it")]


def _tokenizer(where: str, path: Path, source: Source) -> list[Finding]:
    here, there = _tokenizer_parts(source.path), _tokenizer_parts(path)
    wrong = [part for part in ("vocabulary", "merges", "kind", "added tokens")
             if here[part] != there[part]]  # fmt: skip
    if wrong:
        sizes = f"{len(there['vocabulary'])} tokens, expected {len(here['vocabulary'])}"
        what = f"other {in_line(wrong)} than the {source.owner}'s ({sizes})"
        return [_tokenizer_differs(where, what)]
    other = [p for p in here["rest"].keys() | there["rest"].keys()
             if here["rest"].get(p) != there["rest"].get(p)]  # fmt: skip
    what = f"same vocabulary; other {in_line(map(shown, sorted(other)))}" if other else (
        "same content, written in another way")  # fmt: skip
    return [Finding("tokenizer-rewritten", where, what)]


def _tokenizer_parts(path: Path) -> dict[str, Any]:
    """Return what a tokenizer.json says, free of the spellings of its versions."""
    content = read_json(
        path, most_bytes=limits.TOKENIZER_BYTES, most_values=limits.TOKENIZER_VALUES
    )
    model = _object(content.get("model"))
    vocabulary = model.get("vocab")
    if isinstance(vocabulary, list):  # Unigram: (token, score) by position
        vocabulary = {f"{i} {json.dumps(entry)}": i for i, entry in enumerate(vocabulary)}
    merges = model.get("merges")
    added = content.get("added_tokens")
    return {
        "vocabulary": _object(vocabulary),
        "merges": [" ".join(map(str, m)) if isinstance(m, list) else m for m in merges]
        if isinstance(merges, list)
        else None,
        "kind": (model.get("type"), model.get("unk_token"), model.get("unk_id")),
        "added tokens": {
            json.dumps(entry.get("id")): entry.get("content")
            for entry in (added if isinstance(added, list) else ())
            if isinstance(entry, dict)
        },
        "rest": {
            **{k: v for k, v in content.items() if k not in ("model", "added_tokens")},
            **{f"model.{k}": v for k, v in model.items()
               if k not in ("vocab", "merges", "type", "unk_token", "unk_id")},
        },
    }  # fmt: skip


def _tokenizer_config(where: str, path: Path, source: Source) -> list[Finding]:
    here, there = read_json(source.path), read_json(path)
    # A template is compared wherever it stands.
    here.pop("chat_template", None)
    there.pop("chat_template", None)
    other = [k for k in here.keys() | there.keys() if not same(here.get(k), there.get(k))]
    wrong = [k for k in DECIDING if k in other and here.get(k) is not None
             and there.get(k) is not None and _token(here[k]) != _token(there[k])]  # fmt: skip
    if wrong:
        what = ", ".join(
            f"{k} {shown(_token(there[k]))}, expected {shown(_token(here[k]))}" for k in wrong
        )
        return [_tokenizer_differs(where, what)]
    what = f"other {in_line(map(shown, sorted(other)))}" if other else "written in another way"
    return [Finding("tokenizer-rewritten", where, what)]


def _token(value: Any) -> Any:
    """Return a special token's text; it is stored plain or as an object."""
    return value.get("content") if isinstance(value, dict) else value


def _settings(name: str, path: Path, source: Source, *, own: bool) -> list[Finding]:
    """Compare settings by what they say; our own output has them byte for byte."""
    here, there = read_json(source.path), read_json(path)
    other = sorted(k for k in here.keys() | there.keys()
                   if not same(here.get(k), there.get(k)) and k not in LIBRARY_KEYS)  # fmt: skip
    if path.name in TOKENIZER_FILES:
        if other:
            what = f"other {', '.join(map(shown, other[:5]))}"
            return [_tokenizer_differs(shown(name), what)]
        return [Finding("tokenizer-rewritten", shown(name), "written in another way")]
    if not other and not own:
        return []
    what = f"other {in_line(map(shown, other))}" if other else "written in another way"
    return [Finding("side-file-differs", shown(name), what)]


def _pipeline_config(where: str, path: Path, source: Source) -> list[Finding]:
    """Compare what decides how a pipeline runs; libraries spell out defaults that were left out."""
    here, there = read_json(source.path), read_json(path)
    other = sorted(k for k in here.keys() | there.keys()
                   if not same(here.get(k), there.get(k)) and k not in LIBRARY_KEYS)  # fmt: skip
    wrong = [k for k in other if k in here]
    if wrong:
        what = ", ".join(f"{k} {shown(there.get(k))}, expected {shown(here[k])}" for k in wrong[:5])
        return [Finding("config-changed", where, what)]
    what = f"also says {in_line(map(shown, other))}" if other else "written in another way"
    return [Finding("config-rewritten", where, what)]


def _tokenizer_differs(where: str, what: str) -> Finding:
    return Finding("tokenizer-differs", where, what)


# --- the chat template, which stands in one of three files


def _holds_template(name: str) -> bool:
    return name in TEMPLATE_FILES or name == "tokenizer_config.json"


def _template(folder: Path, sources: Mapping[str, Source]) -> list[Finding]:
    """Compare the chat template, wherever the two sides keep it."""
    expected = _template_of({n: s.path for n, s in sources.items()})
    found = _template_of({n: folder / n for n in (*TEMPLATE_FILES, "tokenizer_config.json")})
    if expected == found or expected is None:
        return []
    if found is None:
        return [Finding("tokenizer-missing", "chat_template", "the model has lost its template")]
    return [_tokenizer_differs("chat_template", "not the template to expect")]


def _template_of(files: Mapping[str, Path]) -> Any:
    path = files.get(TEMPLATE_FILES[0])
    if path is not None and path.is_file():
        if path.stat().st_size > limits.TEMPLATE_BYTES:
            return _digest(path, "template")  # longer than any that stands in a config
        # Bytes that are no text are not the same as other such bytes.
        return path.read_bytes().decode("utf-8", "surrogateescape")
    for name in (TEMPLATE_FILES[1], "tokenizer_config.json"):
        path = files.get(name)
        if path is not None and path.is_file():
            try:
                template = read_json(path).get("chat_template")
            except InputError:
                continue  # told where that file is compared
            if template:
                return template
    return None


# --- the manifest


def _other_adapters(
    plan: Plan, manifest: Mapping[str, Any], digests: Mapping[Path, str]
) -> list[str]:
    """Return how the adapters that went in differ from those given, in their order."""
    told = manifest.get("adapters")
    entries = told if isinstance(told, list) else []
    if len(entries) != len(plan.adapters):
        return [f"adapters: {len(entries)} went in, here are {len(plan.adapters)}"]
    alone = len(entries) == 1
    return [
        problem
        for i, (entry, adapter) in enumerate(zip(entries, plan.adapters, strict=True), 1)
        for problem in _other_files(
            "adapter" if alone else f"adapter {i}",
            entry,
            {p.name: p for p in adapter.files},
            digests,
        )
    ]


def _other_files(
    what: str, told_of: Any, paths: Mapping[str, Path], digests: Mapping[Path, str]
) -> list[str]:
    """Return how the files that went in differ from those given, by name, size and digest."""
    entries = _object(told_of).get("files")
    told = {e.get("name"): e for e in (entries if isinstance(entries, list) else ())
            if isinstance(e, dict) and isinstance(e.get("name"), str)}  # fmt: skip
    problems = []
    for name, path in paths.items():
        entry = told.pop(name, None)
        if entry is None:
            problems.append(f"{what}: does not name {shown(name)}")
        elif entry.get("bytes") != path.stat().st_size:
            problems.append(f"{what}: {shown(name)} had {shown(entry.get('bytes'))} bytes, "
                            f"here {path.stat().st_size}")  # fmt: skip
        elif isinstance(entry.get("sha256"), str) and entry["sha256"] != (
            digests.get(path) or _digest(path, what)
        ):
            problems.append(f"{what}: {shown(name)} had another SHA-256")
    return problems + [f"{what}: names {shown(name)}, which is not here" for name in told]


def _digest(path: Path, what: str) -> str:
    blob = path.resolve().name
    if what == "base" and path.is_symlink() and len(blob) == 64:
        return blob  # the Hugging Face cache names large files by their digest
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(READ_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _base_files(plan: Plan) -> tuple[Path, ...]:
    return plan.base.sources or (plan.base.path,)


def _counts(found: Any) -> str:
    if not isinstance(found, Mapping):
        return "none"
    return in_line(f"{shown(n)} {shown(k)}" for k, n in sorted(found.items()))


# --- reading


def _object(value: Any) -> Mapping[Any, Any]:
    return value if isinstance(value, Mapping) else {}


def _same_bytes(a: Path, b: Path) -> bool:
    try:
        if a.stat().st_size != b.stat().st_size:
            return False
        with a.open("rb") as one, b.open("rb") as other:
            while chunk := one.read(READ_BYTES):
                if chunk != other.read(READ_BYTES):
                    return False
    except OSError as error:
        way = advice(error, "Check the file.")
        raise InputError(f"{error.filename}: cannot be read: {error.strerror}. {way}") from error
    return True
