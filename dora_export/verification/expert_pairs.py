"""Experts of a merged model as the base stores them, where one side stacks them and the other not.

transformers 5 holds the experts of a mixture in one tensor per layer, gate and up in one, and saves
either that or a tensor per matrix of an expert. Each of the one is a range of bytes of the other,
so nothing is converted: the base's tensors are found in the bytes that are there, and ledger and
oracle compare every one of them. What is not whole, or of another shape, stays missing and extra.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import NamedTuple

from dora_export.expert_names import Address, address
from dora_export.plan import Plan
from dora_export.tensors import JoinedBytes, TensorRef
from dora_export.verification.base_names import under_base_names
from dora_export.verification.subject import Subject

NUMBERS = re.compile(r"(?<=\.)\d+(?=\.|$)")
Place = tuple[tuple[str, ...], str]  # numbers in the block's path, which tell layers apart; part


class Named(NamedTuple):
    """A tensor of experts.

    Attributes:
        name: Its name.
        shape: Its shape.
        address: What it is about.
    """

    name: str
    shape: tuple[int, ...]
    address: Address


class Pair(NamedTuple):
    """A tensor of the base, found.

    Attributes:
        name: The base's name.
        ref: Its bytes in the merged model.
        stored: Whose bytes they are, by the model's own names.
    """

    name: str
    ref: TensorRef
    stored: tuple[str, ...]


def as_the_base(subject: Subject, plan: Plan) -> Subject:
    """Return a merged model with its tensors as the base has them: names, and experts.

    Args:
        subject: The merged model.
        plan: What it should be.
    """
    names, model_types = [s.name for s in plan.steps], plan.base.model_types
    if subject.parts:
        return under_base_names(subject, names, model_types)
    found = list(_found(subject, plan))
    if not found:
        return under_base_names(subject, names, model_types)
    taken = {n for pair in found for n in pair.stored}
    kept = {n: t for n, t in subject.tensors.items() if n not in taken}
    whole = replace(subject, tensors={**kept, **{pair.name: pair.ref for pair in found}})
    named = under_base_names(whole, names, model_types)
    what = f"experts {'apart' if len(taken) > len(found) else 'stacked'}"
    return replace(
        named,
        renaming=f"{named.renaming}; {what}" if named.renaming else what,
        stored_names={**named.stored_names, **{pair.name: pair.stored[0] for pair in found}},
    )


def _found(subject: Subject, plan: Plan) -> Iterator[Pair]:
    expected = {s.name: s.shape for s in plan.steps}
    theirs = {n: t.shape for n, t in subject.tensors.items() if n not in expected}
    ours = {n: shape for n, shape in expected.items() if n not in subject.tensors}
    yield from _apart(ours, theirs, subject)
    yield from _stacked(ours, theirs, subject)


def _addresses(shapes: Mapping[str, tuple[int, ...]], *, stacked: bool) -> Iterator[Named]:
    for name, shape in shapes.items():
        if len(shape) == (3 if stacked else 2):
            found = address(name, stacked=stacked)
            if found is not None:
                yield Named(name, shape, found)


def _layers(found: Iterator[Named]) -> dict[Place, list[Named]]:
    """Return the tensors of each layer and part, where no two blocks share a layer."""
    blocks: dict[tuple[str, ...], set[str]] = defaultdict(set)
    layers: dict[Place, list[Named]] = defaultdict(list)
    for one in found:
        numbers = tuple(NUMBERS.findall(one.address.block))
        blocks[numbers].add(one.address.block)
        layers[numbers, one.address.part].append(one)
    return {place: ones for place, ones in layers.items() if len(blocks[place[0]]) == 1}


def _complete(ones: list[Named], count: int, shape: tuple[int, ...]) -> list[Named] | None:
    """Return the tensors of all experts in order, or None where one is missing or misshapen."""
    ordered = sorted(ones, key=lambda one: one.address.expert or 0)
    whole = [one.address.expert for one in ordered] == list(range(count))
    return ordered if whole and all(one.shape == shape for one in ordered) else None


def _matches(
    singles: Mapping[Place, list[Named]], stack: Named, place: Place
) -> list[list[Named]] | None:
    """Return the matrices that make up each part of a stack, expert by expert, or None.

    Gate and up share a slice: all rows of gate come before those of up.
    """
    count, rows, columns = stack.shape
    parts = stack.address.parts
    shape = (rows // len(parts), columns)
    found = [_complete(singles.get((place[0], part), []), count, shape) for part in parts]
    if rows % len(parts) or any(one is None for one in found):
        return None
    return [one for one in found if one is not None]


def _apart(
    ours: Mapping[str, tuple[int, ...]], theirs: Mapping[str, tuple[int, ...]], subject: Subject
) -> Iterator[Pair]:
    """Yield a base's single matrices, found in stacks."""
    singles = _layers(_addresses(ours, stacked=False))
    for place, stacks in _layers(_addresses(theirs, stacked=True)).items():
        parts = _matches(singles, stacks[0], place) if len(stacks) == 1 else None
        for at, experts in enumerate(parts or ()):
            for expert, one in enumerate(experts):
                ref = subject.tensors[stacks[0].name].rows(expert, expert + 1)
                matrix = ref.reshaped(*ref.shape[1:])
                rows = one.shape[0]
                part = matrix.rows(at * rows, (at + 1) * rows)
                yield Pair(one.name, part, (stacks[0].name,))


def _stacked(
    ours: Mapping[str, tuple[int, ...]], theirs: Mapping[str, tuple[int, ...]], subject: Subject
) -> Iterator[Pair]:
    """Yield a base's stacks, put together from single matrices."""
    singles = _layers(_addresses(theirs, stacked=False))
    for place, stacks in _layers(_addresses(ours, stacked=True)).items():
        parts = _matches(singles, stacks[0], place) if len(stacks) == 1 else None
        if parts is None:
            continue
        names = tuple(one.name for experts in zip(*parts, strict=True) for one in experts)
        refs = [subject.tensors[name] for name in names]
        if len({ref.dtype for ref in refs}) == 1:
            source = JoinedBytes(tuple(ref.source for ref in refs))
            name, shape = stacks[0].name, stacks[0].shape
            yield Pair(name, TensorRef(name, refs[0].dtype, shape, source), names)
