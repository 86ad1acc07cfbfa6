"""From the adapter's names to the checkpoint's: one rule for a whole adapter, never a mix.

An adapter names modules as the class it was trained on does; a checkpoint names tensors as the
class it was saved from did. The two differ by one leading segment at most (transformers'
``base_model_prefix``: "model", "transformer", "bert", ...), or by what the user says.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace

from dora_export import conventions, flat_names
from dora_export.errors import PlanError, shown


@dataclass(frozen=True)
class Rule:
    """A renaming of every name of an adapter.

    Attributes:
        what: For people, e.g. "model. added".
        strip: Prefix taken away from the names that have it.
        add: Prefix put before every name.
        mapped: Prefixes replaced first, (old, new), the first that fits.
        modules: Whole module names, looked up before all else (flattened names).
        first: What becomes of the name beforehand: another convention's.
        then: The same, afterwards.
    """

    what: str
    strip: str = ""
    add: str = ""
    mapped: tuple[tuple[str, str], ...] = ()
    modules: Mapping[str, str] = field(default_factory=dict)
    first: Callable[[str], str] = str
    then: Callable[[str], str] = str

    def __call__(self, name: str) -> str:
        """Return the checkpoint's name for an adapter's name."""
        module, dot, leaf = name.rpartition(".")
        if module in self.modules:
            return self.modules[module] + dot + leaf
        name = self.first(name)
        for old, new in self.mapped:
            if name.startswith(old):
                return new + name[len(old) :]
        return self.then(self.add + name.removeprefix(self.strip))


def parse_map_prefix(options: Iterable[str]) -> tuple[tuple[str, str], ...]:
    """Return (old, new) pairs of ``--map-prefix OLD=NEW`` options.

    Raises:
        PlanError: An option has no "=".
    """
    pairs = []
    for option in options:
        old, equals, new = option.partition("=")
        if not equals:
            raise PlanError(f"--map-prefix {shown(option)}: expected OLD=NEW, e.g. model.=.")
        pairs.append((old, new))
    return tuple(pairs)


def find_rule(
    targets: Sequence[str],
    names: Collection[str],
    mapped: tuple[tuple[str, str], ...] = (),
    base_name: str | None = None,
    model_types: tuple[object, ...] = (),
) -> Rule:
    """Return the rule that turns every target into a tensor name of the checkpoint.

    Tried in this order: names as they are; one segment added; the first segment taken away; the
    names of another convention (``conventions``); those with a segment added, or taken away.
    With ``mapped`` only that mapping is tried.

    Args:
        targets: Tensor names in the adapter's terms.
        names: Tensor names of the checkpoint, or a set that knows by which others they go.
        mapped: Prefix replacements by the user.
        base_name: What the adapter says it was trained on, for the message.
        model_types: Of the checkpoint's config.json and its text part.

    Raises:
        PlanError: No rule resolves all targets, or two of the same kind do, in different ways.
    """
    known: AbstractSet[str] = names if isinstance(names, AbstractSet) else frozenset(names)
    if mapped:
        groups: list[list[Rule]] = [[Rule("--map-prefix", mapped=mapped)]]
    else:
        groups = _groups(targets, known, model_types)
    for group in groups:
        fitting = _distinct([r for r in group if all(r(t) in known for t in targets)], targets)
        if len(fitting) > 1:
            raise PlanError(
                f"the adapter's names fit this base in more than one way: "
                f"{' or '.join(rule.what for rule in fitting)}. Decide with --map-prefix, e.g. "
                f"--map-prefix {_first(targets)}={fitting[0](_first(targets))}"
            )
        if fitting:
            return fitting[0]
    tried = [rule for group in groups for rule in group]
    raise PlanError(_no_rule(targets, known, tried, base_name, model_types))


def find_flat_rule(
    targets: Sequence[str],
    names: Collection[str],
    mapped: tuple[tuple[str, str], ...] = (),
    base_name: str | None = None,
    aliases: Mapping[str, str] | None = None,
) -> Rule:
    """Return the rule for an adapter whose module names are flattened (``flat_names``).

    Args:
        targets: Tensor names in the adapter's terms, e.g. ``lora_unet_conv_in.weight``.
        names: Tensor names of the checkpoint.
        mapped: Prefix replacements by the user.
        base_name: What the adapter says it was trained on, for the message.
        aliases: Other module paths -> the checkpoint's, as in ``flat_names``.

    Raises:
        PlanError: Names are not in the base, or fit it in more than one way.
    """
    modules = [target.rpartition(".")[0] for target in targets]
    found = flat_names.resolve(modules, names, aliases, mapped, base_name)
    return Rule(found.what, modules=found.paths)


def _groups(
    targets: Sequence[str], known: AbstractSet[str], model_types: tuple[object, ...]
) -> list[list[Rule]]:
    adding, stripping = _adding(known), _stripping(targets)
    others = tuple(conventions.renamings(model_types))
    # A class of transformers may lack the segment of both conventions, or the checkpoint may.
    prefixes = [*_adding({*known, "model."}), *stripping]
    return [
        [Rule("as they are")],
        adding,
        stripping,
        [Rule(other.what, then=other) for other in others],
        [replace(r, what=f"{r.what}, {o.what}", then=o) for r in prefixes for o in others],
        [replace(r, what=f"{o.what}, {r.what}", first=o) for r in prefixes for o in others],
    ]


def _distinct(rules: list[Rule], targets: Sequence[str]) -> list[Rule]:
    """Return the first of the rules that rename the targets alike."""
    by_result: dict[tuple[str, ...], Rule] = {}
    for rule in rules:
        by_result.setdefault(tuple(rule(t) for t in targets), rule)
    return list(by_result.values())


def _adding(known: AbstractSet[str]) -> list[Rule]:
    prefixes = sorted({f"{n.partition('.')[0]}." for n in known})
    return [Rule(f"'{p}' added", add=p) for p in prefixes]


def _stripping(targets: Sequence[str]) -> list[Rule]:
    first = sorted({f"{t.partition('.')[0]}." for t in targets if t.count(".") > 1})
    return [Rule(f"'{p}' taken away", strip=p) for p in first]


def _no_rule(
    targets: Sequence[str],
    known: AbstractSet[str],
    tried: list[Rule],
    base_name: str | None,
    model_types: tuple[object, ...],
) -> str:
    best = max(tried, key=lambda rule: sum(rule(t) in known for t in targets))
    missing = [t for t in targets if best(t) not in known]
    hit = len(targets) - len(missing)
    trained = f" The adapter says it was trained on '{shown(base_name)}'." if base_name else ""
    message = f"{hit} of {len(targets)} adapter targets match this base"
    if hit:
        return (
            f"{message} (names {best.what}); not in the base: "
            f"{', '.join(shown(m) for m in missing[:6])}{' ...' if len(missing) > 6 else ''}."
            f"{trained} Check that this is the base it was trained on."
            f"{_as_the_class(missing[0], known, model_types)}"
        )
    patterns = f'adapter "{_pattern(targets[0])}", base "{_nearest_pattern(targets[0], known)}"'
    return f"{message}: {patterns}.{trained} {_hint(targets, known)}"


def _as_the_class(target: str, known: AbstractSet[str], model_types: tuple[object, ...]) -> str:
    """Return the way out for a module that the base has nowhere, as transformers' class may."""
    leaf = ".".join(target.split(".")[-2:])
    if not any(isinstance(t, str) for t in model_types) or any(n.endswith(leaf) for n in known):
        return ""
    return (
        " If it is, and transformers renames, cuts or joins these tensors while it loads them, "
        "save the base as its class names them (save_pretrained(..., save_original_format=False)) "
        "and merge into that."
    )


def _hint(targets: Sequence[str], known: AbstractSet[str]) -> str:
    old, new = _differing_prefixes(targets, known)
    if old is None:
        return "Check that this is the base it was trained on, or pass --map-prefix OLD=NEW."
    return f"If they are the same layers, pass --map-prefix {old}={new}"


def _differing_prefixes(targets: Sequence[str], known: AbstractSet[str]) -> tuple[str | None, str]:
    """Return what precedes the longest common ending of the first target and any tensor name.

    Of several such names, that whose prefix fits most targets: towers have layers of equal names.
    """
    target = targets[0]
    segments = target.split(".")

    def fitting(old: str, new: str) -> int:
        return sum(new + t.removeprefix(old) in known for t in targets if t.startswith(old))

    for kept in range(len(segments) - 1, 2, -1):
        ending = ".".join(segments[-kept:])
        old = target.removesuffix(ending)
        prefixes = [n.removesuffix(ending) for n in known if n.endswith(f".{ending}")]
        if prefixes:
            return old, min(prefixes, key=lambda new: (-fitting(old, new), len(new), new))
    return None, ""


def _nearest_pattern(target: str, known: AbstractSet[str]) -> str:
    leaf = ".".join(target.split(".")[-2:])
    alike = sorted(n for n in known if n.endswith(leaf))
    numbered = sorted(n for n in known if re.search(r"\.\d+\.", n))
    return _pattern((alike or numbered or sorted(known))[0])


def _pattern(name: str) -> str:
    return shown(re.sub(r"(?<=\.)\d+(?=\.)", "*", name))


def _first(targets: Sequence[str]) -> str:
    return f"{targets[0].partition('.')[0]}."
