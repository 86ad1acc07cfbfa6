"""Flattened module names (``lora_unet_down_blocks_0_attn1_to_q``), looked up among a base's own.

kohya, LyCORIS and OneTrainer write module paths with "_" for "." behind a prefix that names the
component. That cannot be undone by rules on text: ``to_q`` keeps its underscore, ``blocks_0`` does
not. So every module path of the base is flattened, and the adapter's names are looked up. Two paths
that flatten to the same name are a refusal where an adapter asks for one of them.

A checkpoint that names its modules otherwise than the trainer did (a single-file Stable Diffusion
under the names of diffusers, or the reverse) passes ``aliases``: module path -> the base's module
path, both without ".weight" and both with the component's name in front where the base has
components (``unet.``, ``transformer.``, ``text_encoder.``, ``text_encoder_2.``, ...).

Sources of the prefixes: github.com/bmaltais/sd-scripts, networks/lora.py and lora_flux.py;
github.com/KohakuBlueleaf/LyCORIS, lycoris/kohya.py and wrapper.py; github.com/comfyanonymous/
ComfyUI, comfy/lora.py, model_lora_keys_unet and model_lora_keys_clip.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from dora_export.errors import PlanError, listing, shown

MODELS = ("unet", "transformer", "prior")
# Prefix of an adapter's names -> components of a pipeline that it can stand for, best first. T5 is
# the third text encoder of Stable Diffusion 3, the second of Flux; sd-scripts says te3 for both.
T5 = ("text_encoder_3", "text_encoder_2")
COMPONENTS: Mapping[str, tuple[str, ...]] = {
    "lora_unet": MODELS,
    "lora_transformer": ("transformer",),
    "lora_prior_unet": ("prior",),
    "lora_prior_te": ("text_encoder",),
    "lora_te": ("text_encoder",),
    "lora_te1": ("text_encoder",),
    "lora_te2": ("text_encoder_2",),
    "lora_te3": T5,
    "lycoris": MODELS,
    "diffusion_model": MODELS,
    "text_encoders_clip_l_transformer": ("text_encoder",),
    "text_encoders_clip_g_transformer": ("text_encoder_2",),
    "text_encoders_t5xxl_transformer": T5,
    "unet": ("unet",),
    "transformer": ("transformer",),
    "text_encoder": ("text_encoder",),
    "text_encoder_2": ("text_encoder_2",),
    "text_encoder_3": ("text_encoder_3",),
}
FLAT_PREFIXES = tuple(p for p in COMPONENTS if p.startswith(("lora_", "lycoris")))
NO_PREFIX = ""

Table = Mapping[str, tuple[str, ...]]


def flatten(path: str) -> str:
    """Return a module path as these trainers write it."""
    return path.replace(".", "_")


def prefix_of(module: str) -> str:
    """Return the known prefix that a module's name begins with, without its "_" or ".", or ""."""
    flat = flatten(module)
    return max((p for p in COMPONENTS if flat.startswith(f"{p}_")), key=len, default=NO_PREFIX)


def is_flat(module: str) -> bool:
    """Return whether a name is a flattened path behind a prefix of these trainers."""
    return "." not in module and prefix_of(module) in FLAT_PREFIXES


def paths_by_flat_name(
    names: Iterable[str], aliases: Mapping[str, str] | None = None
) -> dict[str, tuple[str, ...]]:
    """Return flattened module path -> the base's module paths that it can mean.

    Args:
        names: The base's tensor names; a module is what precedes ".weight" or ".bias".
        aliases: Further module paths -> the base's module path.
    """
    found: dict[str, set[str]] = defaultdict(set)
    for name in names:
        module, _, leaf = name.rpartition(".")
        if module and leaf in ("weight", "bias"):
            found[flatten(module)].add(module)
    for alias, module in (aliases or {}).items():
        found[flatten(alias)].add(module)
    return {flat: tuple(sorted(modules)) for flat, modules in found.items()}


@dataclass(frozen=True)
class FlatNames:
    """An adapter's module names resolved against one base.

    Attributes:
        paths: Adapter's module name -> the base's module path; every name has one.
        what: The rule, for people: what each prefix stands for.
    """

    paths: Mapping[str, str]
    what: str


def resolve(
    modules: Iterable[str],
    names: Iterable[str],
    aliases: Mapping[str, str] | None = None,
    mapped: Sequence[tuple[str, str]] = (),
    base_name: str | None = None,
) -> FlatNames:
    """Return the base's module path of every module that an adapter names.

    Names that share a prefix are resolved alike, all under one component. For a base without
    components (one component's folder, or a language model) the prefix stands for the whole base;
    there, one segment may be missing or too much in front, as between a model class and its base
    class.

    Args:
        modules: The adapter's module names; flattened ones, or paths.
        names: The base's tensor names.
        aliases: As in ``paths_by_flat_name``.
        mapped: Prefix replacements by the user, (adapter's, base's); the first that fits is taken.
            A base's prefix with dots also decides between paths that flatten alike.
        base_name: What the adapter says it was trained on, for the message.

    Raises:
        PlanError: Names are not in the base, fit it in more than one way, or mean one layer.
    """
    table = paths_by_flat_name(names, aliases)
    groups: dict[str, list[str]] = defaultdict(list)
    spelled: dict[str, str] = {}  # the adapter's name -> its name in the base, "_" or "." alike
    for module in dict.fromkeys(modules):
        pair = next((p for p in mapped if module.startswith(p[0])), None)
        if pair is None:
            groups[prefix_of(module)].append(module)
        else:
            spelled[module] = pair[1] + module[len(pair[0]) :]
    said = [f"'{old}' for '{new}'" for old, new in mapped]
    for prefix, group in groups.items():
        swap = _swap(prefix, group, table)
        spelled |= {module: swap(module) for module in group}
        said.append(swap.what)
    _refuse_missing(spelled, table, base_name)
    paths = _chosen(spelled, table)
    _refuse_shared(paths)
    return FlatNames(paths, f"flattened, {', '.join(said)}")


@dataclass(frozen=True)
class _Swap:
    """Replaces what stands in front of names: an adapter's prefix by the base's."""

    old: str
    new: str

    def __call__(self, module: str) -> str:
        return self.new + module[len(self.old) :]

    def hits(self, group: Sequence[str], table: Table) -> int:
        return sum(flatten(self(module)) in table for module in group)

    @property
    def what(self) -> str:
        new = f"'{self.new.rstrip('._')}'" if self.new else "the base itself"
        return f"'{self.old.rstrip('._')}' for {new}" if self.old else f"in {new}"


def _swap(prefix: str, group: Sequence[str], table: Table) -> _Swap:
    """Return the one replacement that fits all names of a prefix, else the one that fits most."""
    old = group[0][: len(prefix) + 1] if prefix else ""  # with its "_" or "."
    components = [_Swap(old, f"{c}.") for c in COMPONENTS.get(prefix, ())] + [_Swap(old, "")]
    outer = sorted({p.partition(".")[0] for paths in table.values() for p in paths})
    missing = [_Swap(old, f"{segment}.") for segment in outer]
    segments = {re.split(r"[._]", m[len(old) :], maxsplit=1)[0] for m in group}
    too_much = [_Swap(old + group[0][len(old) :][: len(s) + 1], "") for s in segments]
    for candidates in (components, missing, too_much if len(segments) == 1 else []):
        fitting = [s for s in candidates if s.hits(group, table) == len(group)]
        if len(fitting) > 1:
            raise PlanError(
                f"the adapter's names fit this base in more than one way: "
                f"{' or '.join(shown(s.what) for s in fitting)}. Decide with --map-prefix, e.g. "
                f"--map-prefix {old}={fitting[0].new}"
            )
        if fitting:
            return fitting[0]
    return max(components, key=lambda s: s.hits(group, table))


def _chosen(spelled: Mapping[str, str], table: Table) -> dict[str, str]:
    """Return the path of every name; dots in a name decide between paths that flatten alike."""
    found, doubtful = {}, []
    for module, name in spelled.items():
        paths = table[flatten(name)]
        if len(paths) > 1:
            dots = [i for i, c in enumerate(name) if c == "."]
            paths = tuple(p for p in paths if all(p[i] == "." for i in dots)) if dots else paths
        if len(paths) == 1:
            found[module] = paths[0]
        else:
            doubtful.append((module, table[flatten(name)]))
    if doubtful:
        lines = [f"{shown(m)}: {' or '.join(map(shown, paths))}" for m, paths in doubtful]
        module, paths = doubtful[0]
        raise PlanError(
            f"names that mean more than one layer of this base once '.' is '_':{listing(lines)}\n"
            f"Say which is meant, e.g. --map-prefix {shown(module)}={shown(paths[0])}"
        )
    return found


def _refuse_shared(paths: Mapping[str, str]) -> None:
    """Refuse two names for one layer, such as both text encoders' on a folder of one of them."""
    by_path: dict[str, list[str]] = defaultdict(list)
    for module, path in paths.items():
        by_path[path].append(module)
    shared = [f"{shown(p)}: {', '.join(map(shown, ms))}" for p, ms in by_path.items() if ms[1:]]
    if shared:
        raise PlanError(
            f"several of the adapter's names mean one layer of this base:{listing(shared)}\n"
            "Each is about another component of a pipeline: pass the folder or file that holds all "
            "of them, or say with --map-prefix OLD=NEW where each belongs."
        )


def _refuse_missing(spelled: Mapping[str, str], table: Table, base_name: str | None) -> None:
    missing = sorted(m for m, name in spelled.items() if flatten(name) not in table)
    if not missing:
        return
    message = (
        f"{len(spelled) - len(missing)} of {len(spelled)} adapter layers match this base; not in "
        f"the base:{listing(map(shown, missing))}\n"
    )
    if base_name:
        message += f"The adapter says it was trained on '{shown(base_name)}'. "
    parts = {p: COMPONENTS[p][0] for p in sorted(map(prefix_of, missing)) if p}
    if parts:
        meant = ", ".join(f"'{p}_' is the {part}" for p, part in parts.items())
        message += (
            f"In a pipeline {meant}: pass the folder or file that holds all components that the "
            "adapter changes. "
        )
    old = missing[0][: len(prefix_of(missing[0])) + 1] if prefix_of(missing[0]) else "OLD"
    raise PlanError(
        f"{message}Check that this is the base it was trained on, or pass --map-prefix OLD=NEW, "
        f"e.g. --map-prefix {shown(old)}=model."
    )
