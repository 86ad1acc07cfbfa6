"""PEFT's LoRA on bare parameters (``target_parameters``): stacked experts, routers, any matrix.

The keys name the module that holds the parameter, not the parameter. Two on one module nest: the
one that the class registers first is the innermost, ``X.base_layer.lora_A``. For a parameter
``(E, d1, d2)`` of E experts, A is ``(E r, .)`` with the ranks of one expert together, and B is
``(., r E)`` with the experts of one rank together; Unsloth's trainer held the ranks of one expert
together in B as well, under the same keys, until it wrote into the config which it is.

Source: github.com/huggingface/peft 0.21.2, src/peft/tuners/lora/layer.py (ParamWrapper),
src/peft/tuners/tuners_utils.py (_inject_parameters); github.com/unslothai/unsloth-zoo,
unsloth_zoo/temporary_patches/moe_utils.py (pull requests 1232 and 1269: lora_B_layout),
unsloth_zoo/hf_utils.py (fix_lora_auto_mapping: unsloth_fixed).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dora_export import limits
from dora_export.adapters.config_files import CONFIG
from dora_export.adapters.model import ReadOptions
from dora_export.adapters.patterns import first_matches
from dora_export.adapters.peft_config import PeftConfig
from dora_export.errors import AdapterError, shown
from dora_export.expert_names import REGISTERED
from dora_export.storage.paths import leads_out
from dora_export.tensors import Operand, TensorRef
from dora_export.update import Orientation, Update

Parts = Mapping[str, TensorRef]
NESTED = ".base_layer"
LAYOUTS = {"rank_major": "peft", "grouped_by_expert": "unsloth"}
README = "README.md"


@dataclass(frozen=True)
class Stacked:
    """How a folder's stacked parameters are packed, as far as it tells.

    Attributes:
        layout: Order of B's columns, "peft" or "unsloth", for parameters not named in ``by_name``;
            None: not told.
        by_name: The same, by the parameter's last name.
        why: What told, or why nothing does.
        orientation: How B A lies over a parameter whose shape leaves it open.
    """

    layout: str | None
    by_name: Mapping[str, str]
    why: str
    orientation: Orientation

    def of(self, name: str) -> str | None:
        """Return the order of B's columns for a parameter."""
        return self.by_name.get(name, self.layout)


def paths(layers: Mapping[str, Parts], config: PeftConfig) -> list[str]:
    """Return the paths of all parameters that may be meant by the layers' keys."""
    roots = dict.fromkeys(_root(path) for path in layers)
    return [f"{root}.{name}" for root in roots for name in _named(root, config)]


def split(
    config_path: Path, layers: Mapping[str, Parts], config: PeftConfig, problems: list[str]
) -> tuple[dict[str, Parts], dict[str, Parts]]:
    """Return the layers of modules by path, and those of parameters by theirs.

    Args:
        config_path: For messages.
        layers: Parts of each layer, by the path that their keys give.
        config: The adapter's, which knows the ranks of ``paths``.
        problems: What does not add up is put in here.

    Raises:
        AdapterError: target_modules is no regular expression, or takes too much time.
    """
    chains: dict[str, dict[int, Parts]] = defaultdict(dict)
    for path, parts in layers.items():
        root = _root(path)
        chains[root][(len(path) - len(root)) // len(NESTED)] = parts
    targeted = _targeted(config_path, config, chains)
    modules: dict[str, Parts] = {}
    parameters: dict[str, Parts] = {}
    for root, chain in chains.items():
        names = [] if root in targeted else _names(root, chain.get(0, {}), config)
        if not names and set(chain) == {0}:
            modules[root] = chain[0]
        elif (why := _misfit(root, names, chain)) is not None:
            problems.append(why)
        else:
            # the last of them to be wrapped is the outermost
            ordered = sorted(names, key=_position, reverse=True)
            parameters |= {f"{root}.{name}": chain[depth] for depth, name in enumerate(ordered)}
    return modules, parameters


def _root(path: str) -> str:
    """Return the path of the module that holds a parameter, without the wrappers around it."""
    while path.endswith(NESTED):
        path = path.removesuffix(NESTED)
    return path


def _named(root: str, config: PeftConfig) -> dict[str, str]:
    """Return the parameters of a module that the config may target: last name -> entry."""
    return {
        target.rpartition(".")[2]: target
        for target in config.target_parameters
        if f".{root}.{target.rpartition('.')[2]}".endswith(f".{target}")
    }


def _names(root: str, parts: Parts, config: PeftConfig) -> list[str]:
    """Return the parameters of a module that the config targets, by their last names."""
    found = _named(root, config)
    if found and config.all_linear:  # shapes or longer paths tell a parameter from a linear layer
        rank = {config.rank(f"{root}.{leaf}") for leaf in found}
        stacked = "A" in parts and parts["A"].shape[0] not in rank
        return [leaf for leaf, target in found.items() if stacked or "." in target]
    return list(found)


def _targeted(config_path: Path, config: PeftConfig, modules: Iterable[str]) -> Collection[str]:
    """Return the modules that the config names; PEFT gives their parameters no LoRA of their own.

    Source: src/peft/tuners/tuners_utils.py (check_target_module_exists).
    """
    targets = config.target_modules
    if not config.target_parameters or targets is None or config.all_linear:
        return ()
    if isinstance(targets, str):
        return first_matches(config_path, "target_modules", [f"^(?:{targets})"], modules)
    return [m for m in modules if any(f".{m}".endswith(f".{target}") for target in targets)]


def _misfit(root: str, names: list[str], chain: Mapping[int, Parts]) -> str | None:
    if not names:
        return (
            f"{shown(root)}: LoRA inside a wrapped layer that {CONFIG} names no parameter of; "
            "nn.MultiheadAttention, whose out_proj PEFT adds twice, is not supported"
        )
    if sorted(chain) != list(range(len(names))):
        return (
            f"{shown(root)}: {len(chain)} nested factors, but target_parameters name "
            f"{', '.join(map(shown, sorted(names)))}. Take out those that the model does not have"
        )
    unknown = [n for n in names if n not in REGISTERED]
    if unknown and len(names) > 1:
        return (
            f"{shown(root)}: factors of {', '.join(map(shown, sorted(names)))} nest in the order "
            "in which the model's class registers them, which is not known. Merge with PEFT"
        )
    return None


def _position(name: str) -> int:
    return REGISTERED.index(name) if name in REGISTERED else 0


# --- how they are packed


def packing(folder: Path, raw: Mapping[str, Any], options: ReadOptions) -> Stacked:
    """Return how a folder's stacked parameters are packed.

    The order of B's columns does not show in its shape. Unsloth's records count; a config of PEFT's
    own without Unsloth's mark in it, or in the model card beside it, means PEFT's own order.

    Raises:
        AdapterError: The option contradicts the config, or a record is of an unknown kind.
    """
    layout, by_name, why = _recorded(folder, raw)
    if layout is None and not by_name:
        layout, why = _by_marks(folder, raw)
    said = options.moe_b_layout
    if said is not None:
        recorded = {*by_name.values(), *([layout] if layout and "recorded" in why else [])}
        if recorded - {said}:
            raise AdapterError(
                f"{folder / CONFIG}: lora_B_layout is in this file, for {', '.join(recorded)}. "
                "Leave --moe-b-layout out."
            )
        layout, by_name, why = said, {}, "by --moe-b-layout"
    return Stacked(layout, by_name, why, _orientation(raw.get("peft_version")))


def _recorded(folder: Path, raw: Mapping[str, Any]) -> tuple[str | None, dict[str, str], str]:
    """Return what Unsloth recorded: for all parameters, and for each."""
    detail = raw.get("unsloth_fused_expert_lora")
    parameters = detail.get("parameters") if isinstance(detail, Mapping) else None
    entries = parameters if isinstance(parameters, Mapping) else {}
    found = {
        str(name): entry["lora_B_layout"]
        for name, entry in entries.items()
        if isinstance(entry, Mapping) and "lora_B_layout" in entry
    }
    whole = raw.get("lora_B_layout")
    for value in (*found.values(), *([] if whole is None else [whole])):
        if not isinstance(value, str) or value not in LAYOUTS:
            raise AdapterError(
                f"{folder / CONFIG}: lora_B_layout '{shown(value)}'. Expected one of "
                f"{', '.join(LAYOUTS)}."
            )
    if isinstance(detail, Mapping) and detail.get("lora_A_layout") not in (
        None, "grouped_by_expert",
    ):  # fmt: skip
        raise AdapterError(
            f"{folder / CONFIG}: lora_A_layout '{shown(detail.get('lora_A_layout'))}' is not "
            "known. Merge with Unsloth."
        )
    by_name = {name.rpartition(".")[2]: LAYOUTS[value] for name, value in found.items()}
    return LAYOUTS.get(str(whole)), by_name, "recorded by Unsloth as lora_B_layout"


def _by_marks(folder: Path, raw: Mapping[str, Any]) -> tuple[str | None, str]:
    mapping = raw.get("auto_mapping")
    marked = isinstance(mapping, Mapping) and mapping.get("unsloth_fixed")
    named = "unsloth" in str(raw.get("base_model_name_or_path")).lower()
    if marked or named or any("unsloth" in key.lower() for key in raw) or _card(folder):
        return None, "Unsloth made it, and packed B both ways without saying so"
    if raw.get("peft_version") and "auto_mapping" in raw:
        return "peft", f"PEFT {shown(raw['peft_version'])} wrote the config, without Unsloth"
    return None, f"{CONFIG} does not say who wrote it"


def _card(folder: Path) -> bool:
    """Return whether the model card names Unsloth; its tags do, where that loaded the model."""
    card = folder / README
    if not card.is_file() or leads_out(card, folder):
        return False  # no card, nothing said
    with card.open("rb") as file:
        return b"unsloth" in file.read(limits.CARD_BYTES).lower()


def _orientation(version: object) -> Orientation:
    """Return how B A lies over a parameter, by the version of PEFT that trained it."""
    match = re.match(r"(\d+)\.(\d+)\.(\d+)(\.dev)?", str(version))
    if match is None:
        return "by version"
    number = (int(match[1]), int(match[2]))
    if match[4] and (0, 18) <= number <= (0, 19):
        return "by version"  # between the two
    return "transposed" if number < (0, 19) else "by class"


# --- their updates


def updates(
    path: str, parts: Parts, config: PeftConfig, packed: Stacked, problems: list[str]
) -> Iterator[Update]:
    """Yield what the factors of one parameter do: an update per expert.

    Args:
        path: Of the parameter.
        parts: Its A and B.
        config: The adapter's.
        packed: As ``packing`` returns it.
        problems: What does not add up is put in here.

    Raises:
        AdapterError: The order of B's columns is not told.
    """
    if set(parts) != {"A", "B"}:
        problems.append(f"{shown(path)}: {sorted(parts)}; a parameter has lora_A and lora_B, and "
                        "neither DoRA nor biases")  # fmt: skip
        return
    a, b, rank = parts["A"], parts["B"], config.rank(path)
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1] or a.shape[0] % rank:
        problems.append(f"{shown(path)}: rank {rank} by the config, "
                        f"but lora_A is {a.shape} and lora_B {b.shape}")  # fmt: skip
        return
    experts, layout = a.shape[0] // rank, packed.of(path.rpartition(".")[2])
    if layout is None and experts > 1 and rank > 1:
        raise AdapterError(
            f"{shown(path)}: whether lora_B of stacked experts holds the experts of one rank "
            f"together (PEFT) or the ranks of one expert (Unsloth) is not told: {packed.why}. Pass "
            "--moe-b-layout peft or --moe-b-layout unsloth."
        )
    for expert in range(experts):
        first, step = (expert, experts) if layout == "peft" else (expert * rank, 1)
        yield Update(
            target=path,
            kind="lora",
            source_keys=(a.name, b.name),
            down=Operand.plain(a.rows(expert * rank, (expert + 1) * rank)),
            up=Operand.plain(b if experts == 1 else b.columns(first, step, rank)),
            scaling=config.scaling(path),
            orientation=packed.orientation,
            index=expert if experts > 1 else None,
        )
