"""Tensors of a merged model under the base's names, where a class has saved them under its own.

Classes save under the names they load into: with their own prefix, or by the names of another age
of transformers (``conventions``), which it reads as well as the base's. One renaming for a whole
model; what it does not explain is missing, or too much.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace

from dora_export import conventions
from dora_export.verification.subject import Subject, joined

# Wrappers whose names no loader strips.
WRAPPERS = ("base_model", "module", "_orig_mod", "_fsdp_wrapped_module", "_forward_module")
HEAD_LEAVES = ("lm_head", "embed_out", "score", "classifier", "qa_outputs", "cls")


@dataclass(frozen=True)
class _Renaming:
    """A way to the base's names.

    Attributes:
        what: For people; empty for a prefix.
        rename: From a stored name to the base's.
        prefix: As in ``Subject``.
    """

    what: str
    rename: Callable[[str], str]
    prefix: str = ""


def under_base_names(
    subject: Subject, names: Collection[str], model_types: tuple[str, ...] = ()
) -> Subject:
    """Return the model with its tensors under the base's names, if one renaming is the difference.

    Either a prefix: model classes save "transformer.h.0..." where the base's file says "h.0...", or
    the reverse, and loaders take both. It is one name, no wrapper's, and all tensors but heads have
    it. Or a convention, alone or with such a prefix: no two tensors come by the same name, none
    loses the base's name that it has, and most have one in the end.

    Args:
        subject: The merged model.
        names: Names that the merged model should have.
        model_types: Of the base's config.json and its text part.
    """
    if subject.parts:
        own = {
            part: under_base_names(
                found,
                [n.removeprefix(f"{part}.") for n in names if n.startswith(f"{part}.")],
                _model_types(found),
            )
            for part, found in subject.parts.items()
        }
        return joined(subject, own)
    expected = set(names)
    if subject.prefix or subject.renaming or not subject.tensors.keys() - expected:
        return subject
    prefixes = list(_prefixes(subject, expected))
    ways = [w for w in prefixes if _whole(subject, w.prefix)]
    ways += [w for w in _conventions(prefixes, model_types, expected)
             if _keeps(subject, w, expected)]  # fmt: skip
    fitting = [w for w in ways if _fits(subject, w, expected)]
    best = max(fitting, key=lambda w: _hits(subject, w, expected), default=None)
    if best is None or _hits(subject, best, expected) <= len(expected & subject.tensors.keys()):
        return subject
    return _renamed(subject, best)


def _model_types(subject: Subject) -> tuple[str, ...]:
    found = (subject.config or {}).get("model_type")
    return (str(found),) if found is not None else ()


def _prefixes(subject: Subject, expected: set[str]) -> Iterator[_Renaming]:
    """Yield the beginnings that strange names have, or that names of the base lack."""
    found = {n.partition(".")[0] + "." for n in subject.tensors if n not in expected}
    found |= {"-" + n.partition(".")[0] + "." for n in expected - subject.tensors.keys()}
    for prefix in sorted(found):
        if prefix.strip("-.") not in WRAPPERS:
            yield _Renaming("", _stripping(prefix), prefix)


def _stripping(prefix: str) -> Callable[[str], str]:
    return lambda name: _without(name, prefix)


def _conventions(
    prefixes: Sequence[_Renaming], model_types: tuple[str, ...], expected: set[str]
) -> Iterator[_Renaming]:
    """Yield conventions, alone and before or after a prefix, and names that end by another."""
    known = frozenset(expected)
    model_type = model_types[0] if model_types else None

    def ending(name: str) -> str:
        return name if name in known else conventions.alias(name, known, model_type) or name

    yield _Renaming("ends of names", ending)
    for other in conventions.renamings(model_types):
        yield _Renaming(other.what, _then(other, ending))
        for one in prefixes:
            put = one.prefix.startswith("-")
            what = f"{other.what}, '{one.prefix.lstrip('-')}' {'added' if put else 'taken away'}"
            yield _Renaming(what, _then(other, one.rename, ending))
            yield _Renaming(what, _then(one.rename, other, ending))


def _then(*renames: Callable[[str], str]) -> Callable[[str], str]:
    def rename(name: str) -> str:
        for one in renames:
            name = one(name)
        return name

    return rename


def _hits(subject: Subject, way: _Renaming, expected: set[str]) -> int:
    return sum(way.rename(n) in expected for n in subject.tensors)


def _fits(subject: Subject, way: _Renaming, expected: set[str]) -> bool:
    """Whether a renaming is one to one and gives most tensors a name of the base."""
    renamed = {way.rename(n) for n in subject.tensors}
    return len(renamed) == len(subject.tensors) and 2 * len(renamed & expected) > len(renamed)


def _keeps(subject: Subject, way: _Renaming, expected: set[str]) -> bool:
    return all(way.rename(n) in expected for n in subject.tensors if n in expected)


def _whole(subject: Subject, prefix: str) -> bool:
    """Whether all tensors but heads have a prefix."""
    return all(_without(n, prefix) != n for n in subject.tensors if not _is_head(n))


def _renamed(subject: Subject, way: _Renaming) -> Subject:
    places = {way.rename(n): n for n in subject.places}
    return replace(
        subject,
        tensors={way.rename(n): ref for n, ref in subject.tensors.items()},
        prefix=way.prefix,
        renaming=way.what,
        stored_names={
            **places, **{way.rename(n): n for n in subject.tensors if way.rename(n) != n}
        },
    )  # fmt: skip


def _without(name: str, prefix: str) -> str:
    if _is_head(name):
        return name
    return prefix[1:] + name if prefix.startswith("-") else name.removeprefix(prefix)


def _is_head(name: str) -> bool:
    return name.partition(".")[0] in HEAD_LEAVES
