"""The ledger tier: what is in a merged model against what should be, base -> merged and back.

Everything but the values that the adapter changes: files, index, names, shapes, dtypes, the bytes
of all untouched tensors, config.json, tokenizer and other side files, the manifest.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from dora_export.errors import shown
from dora_export.plan import Plan
from dora_export.verification.catalog import FINDINGS
from dora_export.verification.config_ledger import check_config
from dora_export.verification.expert_pairs import as_the_base
from dora_export.verification.model import Finding, TierResult
from dora_export.verification.side_ledger import Source, check_manifest, check_side_files
from dora_export.verification.subject import Subject
from dora_export.verification.tensor_ledger import Compare, check_tensors, difference
from dora_export.words import count

__all__ = ["Source", "check_ledger"]

ORDER = {m.code: i for i, m in enumerate(FINDINGS)}


def check_ledger(
    plan: Plan,
    subject: Subject,
    sources: Mapping[str, Source],
    *,
    threads: int | None = None,
    compare: Compare = difference,
    digests: Mapping[Path, str] | None = None,
) -> tuple[TierResult, tuple[Finding, ...]]:
    """Compare a merged model with its plan, all but the values of changed tensors.

    Reads every untouched tensor of both sides, a few MB per thread at a time.

    Args:
        plan: What base and adapter should give.
        subject: The merged model.
        sources: Side files that belong in the output: path within it, with "/" between folders ->
            where it comes from.
        threads: Workers; None: one per CPU.
        compare: What compares a span of an untouched tensor.
        digests: SHA-256 of input files that are known already.

    Returns:
        What was done, and all findings: those of opening the model too, sorted.

    Raises:
        InputError: The base or the adapter cannot be read.
    """
    started = time.monotonic()
    subject = as_the_base(subject, plan)
    tensors = check_tensors(plan, subject, threads, compare)
    config = check_config(plan, subject, quantised=bool(tensors.quantised))
    beside = check_side_files(subject, sources, plan.base.config_files)
    findings = [
        *subject.problems,
        *_indexes(subject),
        *tensors.findings,
        *config.findings,
        *beside.findings,
        *check_manifest(plan, subject, digests),
    ]
    figures: dict[str, Any] = {
        **tensors.figures,
        **beside.figures,
        "files": sorted(shown(n) for n in subject.files),
        "cast": tensors.cast.name if tensors.cast else None,
        "config_checked": config.checked,
        "config_rewritten": list(config.rewritten),
    }
    findings.sort(key=lambda f: (ORDER[f.code], f.where, f.what))
    seconds = time.monotonic() - started
    return TierResult("ledger", True, _summary(subject, figures), seconds, figures), tuple(findings)


def _summary(subject: Subject, figures: Mapping[str, Any]) -> str:
    files = len(subject.files) + figures["side_files"]
    cast = f" after the cast to {figures['cast']}" if figures["cast"] else " byte for byte"
    return (
        f"{count(figures['tensors_found'], 'tensor')} and {count(files, 'file')}: "
        f"{figures['untouched_equal']} of "
        f"{figures['untouched']} untouched tensors equal{cast}"
    )


def _indexes(subject: Subject) -> Iterator[Finding]:
    yield from _index(subject)
    for part, model in subject.parts.items():
        for found in _index(model):
            yield replace(found, where=f"{part}: {found.where}")


def _index(subject: Subject) -> Iterator[Finding]:
    """Hold the index against the headers of the files, both ways; findings in no order."""
    if not subject.places:
        return  # none, or not one: told on opening
    name, places = shown(subject.index_name), subject.places
    held = {tensor: file for file, stored in subject.files.items() for tensor in stored.names}
    for tensor, file in places.items():
        if file in subject.broken:
            continue  # told with the file
        if (found := held.get(tensor)) != file:
            there = f"found in {shown(found)}" if found else "which does not hold it"
            yield Finding(
                "index-wrong", shown(tensor), f"{name} places it in {shown(file)}, {there}"
            )
    for tensor, file in held.items():
        if tensor not in places:
            yield Finding("index-wrong", shown(tensor), f"in {shown(file)}, not in {name}")
    yield from _total_size(subject, name)


def _total_size(subject: Subject, name: str) -> Iterator[Finding]:
    metadata = subject.index.get("metadata") if subject.index is not None else None
    said = metadata.get("total_size") if isinstance(metadata, dict) else None
    total = sum(file.nbytes for file in subject.files.values())
    if said is not None and said != total and not subject.broken:
        yield Finding("total-size", name, f"{shown(said)}, the tensors have {total} bytes")
