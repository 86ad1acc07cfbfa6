"""Which rank and alpha of its patterns PEFT gave each module, by the version that trained.

From 0.15 on a key is looked for at the end of a path, or as the whole path. In 0.14 there had to be
a dot before it, so that a path of one name, or a key that begins with ``^``, matched nothing (a
path that is itself the key counts all the same). Until 0.13 ranks and alphas were looked up under
one key, the first of both maps that matched: an alpha under another key than the rank was lost.
LoHa and LoKr did the latter until 0.14, with keys at the end of a path or as the whole path.

A config tells its version by ``peft_version`` (since 0.18), or LoRA's by the fields it has: PEFT
writes all of them. Those of LoHa and LoKr got none in 0.15.

Source: github.com/huggingface/peft 0.13.2, 0.14.0 and 0.15.0, src/peft/tuners/{lora,loha,lokr}/
model.py (_create_and_replace), src/peft/utils/other.py (get_pattern_key), and the configs beside.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dora_export.adapters.patterns import BEFORE_0_15, UNGROUPED, WHOLE, first_matches
from dora_export.errors import AdapterError, shown

# Each the first version with its rule; the one of now comes first.
RULES = ("0.15", "0.14", "0.5")
RULES_OF_PRODUCTS = ("0.15", "0.6")  # LoHa's and LoKr's
SINCE_0_15 = ("trainable_token_indices", "corda_config")
SINCE_0_14 = ("exclude_modules", "eva_config", "lora_bias")
EVER_SINCE = ("layers_pattern", "layers_to_transform", "loftq_config")  # that others do not write


@dataclass(frozen=True)
class Found:
    """Which key gives a module its rank and alpha.

    Attributes:
        ranks: Module path -> key, for those modules that one matches.
        alphas: The same for alpha.
        doubts: Where the rule is not that of PEFT now, for people.
        idle: Keys that give no module its rank or alpha, for people.
    """

    ranks: Mapping[str, str]
    alphas: Mapping[str, str]
    doubts: tuple[str, ...] = ()
    idle: tuple[str, ...] = ()


def rules_of(raw: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the rules that may have been those of the version that wrote a config."""
    lora = raw.get("peft_type") not in ("LOHA", "LOKR")
    rules = RULES if lora else RULES_OF_PRODUCTS
    said = raw.get("peft_version")
    version = re.match(r"(\d+)\.(\d+)", said) if isinstance(said, str) else None
    if version is not None:
        written = int(version[1]), int(version[2])
        since = [tuple(map(int, rule.split("."))) for rule in rules]
        return (next((r for r, s in zip(rules, since, strict=True) if s <= written), rules[-1]),)
    if not lora:
        return rules
    if any(field in raw for field in SINCE_0_15):
        return ("0.15",)
    if any(field in raw for field in SINCE_0_14):
        return ("0.14",)
    return ("0.5",) if all(field in raw for field in EVER_SINCE) else RULES


def held_against(
    path: Path,
    ranks: Mapping[str, int],
    alphas: Mapping[str, float],
    modules: Collection[str],
    rules: Sequence[str],
    defaults: tuple[int, float],
) -> Found:
    """Return the keys of these modules, by the only rule there is or all of them alike.

    Args:
        path: The config, for messages.
        ranks: rank_pattern.
        alphas: alpha_pattern.
        modules: Module paths in the wrapped model.
        rules: Of RULES, or of RULES_OF_PRODUCTS.
        defaults: Rank and alpha where no pattern matches.

    Raises:
        AdapterError: As ``first_matches``; or the rules give a module different values.
    """

    def of(rule: str) -> tuple[Found, dict[str, tuple[int, float]]]:
        found = _by(rule, path, ranks, alphas, modules)
        return found, {
            m: (
                ranks.get(found.ranks.get(m, m), defaults[0]),
                alphas.get(found.alphas.get(m, m), defaults[1]),
            )
            for m in modules
        }

    found, values = of(rules[0])
    found = replace(found, idle=tuple(_idle(found, ranks, alphas, modules)))
    if not ranks and not alphas:
        return found
    for rule in rules[1:]:
        _, others = of(rule)
        for module in (m for m in modules if values[m] != others[m]):
            raise AdapterError(
                f"{path}: rank_pattern and alpha_pattern give {shown(module)} "
                f"{_said(values[module])} as PEFT reads them since {rules[0]}, and "
                f"{_said(others[module])} as it did since {rule}; which version trained the "
                f'adapter, the file does not say. Write "peft_version": "{rules[0]}.0" or '
                f'"{rule}.0" into it.'
            )
    if rules[0] == RULES[0]:
        return found
    _, now = of(RULES[0])
    changed = [m for m in modules if values[m] != now[m]]
    if not changed:
        return found
    doubt = (
        f"PEFT now gives {shown(changed[0])} {_said(now[changed[0]])}, but trained it with "
        f"{_said(values[changed[0]])}, by its rule since {rules[0]}, which is merged; "
        f"{len(changed)} of {len(modules)} layers"
    )
    return replace(found, doubts=(doubt,))


def _by(
    rule: str,
    path: Path,
    ranks: Mapping[str, int],
    alphas: Mapping[str, float],
    modules: Collection[str],
) -> Found:
    if rule in ("0.5", "0.6"):
        both, around = dict.fromkeys([*ranks, *alphas]), BEFORE_0_15 if rule == "0.5" else UNGROUPED
        keys = first_matches(path, "rank_pattern and alpha_pattern", both, modules, around)
        return Found(keys, keys)
    around = WHOLE if rule == "0.15" else BEFORE_0_15
    return Found(
        first_matches(path, "rank_pattern", ranks, modules, around),
        first_matches(path, "alpha_pattern", alphas, modules, around),
    )


def _idle(
    found: Found,
    ranks: Mapping[str, int],
    alphas: Mapping[str, float],
    modules: Collection[str],
) -> Iterator[str]:
    for field, pattern, used in (
        ("rank_pattern", ranks, found.ranks),
        ("alpha_pattern", alphas, found.alphas),
    ):
        taken = {*used.values(), *modules}
        yield from (f"{field} '{shown(key)}'" for key in pattern if key not in taken)


def _said(values: tuple[int, float]) -> str:
    return f"rank {values[0]}, alpha {values[1]:g}"
