"""LoRA and DoRA as diffusers saves them: ``pytorch_lora_weights.safetensors``, old layouts too.

Scaling is alpha / rank. The metadata entry ``lora_adapter_metadata`` holds PEFT's config of each
component; without it ``<module>.alpha`` counts; without that alpha is the rank, and the scaling 1.
``lora_magnitude_vector`` makes it DoRA with a magnitude per output, the norm over all else, no eps.
OneTrainer's diffusers saver leaves magnitudes per input under their own name, ``dora_scale``
(diffusers drops these with a warning and applies plain LoRA), and folds alpha into B. Unless its
settings say otherwise, it added float32's eps to the norms of either kind.

SimpleTuner saves through diffusers, magnitudes with ".weight" behind before PEFT took that off; or
for ComfyUI, with ``diffusion_model.`` in front (kohya's names for UNets, but for the magnitudes),
alpha beside the factors, and the settings of one component without its name in the metadata.

Sources: github.com/huggingface/diffusers, src/diffusers/loaders/lora_base.py (_save_lora_weights),
loaders/peft.py (load_lora_adapter), utils/peft_utils.py (get_peft_kwargs); github.com/Nerogar/
OneTrainer, modules/util/convert_lora_util.py; github.com/bghira/SimpleTuner.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dora_export.adapters import diffusers_keys as keys
from dora_export.adapters import (
    diffusers_metadata,
    diffusers_methods,
    lycoris_keys,
    lycoris_metadata,
    peft_config,
    peft_init,
    peft_targets,
)
from dora_export.adapters.diffusers_metadata import ENTRY, ONE_COMPONENT
from dora_export.adapters.lycoris_axis import axis_of
from dora_export.adapters.lycoris_layers import EPS, finite_number
from dora_export.adapters.lycoris_metadata import Said
from dora_export.adapters.model import Adapter, ReadOptions
from dora_export.adapters.peft_config import READ_AS_IT_IS, PeftConfig
from dora_export.adapters.state_dict import needed_alpha, tensors_of
from dora_export.errors import AdapterError, InputError, listing, shown
from dora_export.storage.paths import contained
from dora_export.tensors import Operand, TensorRef
from dora_export.update import Axis, Update

# Settings of PEFT's under which tensors of the same names mean something else.
VARIANTS = ("layer_replication", "use_bdlora", "use_qalora", "target_parameters")
NAMES = ("pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin")


def matches(path: Path, options: ReadOptions) -> bool:
    """Return whether ``path`` is such a file, or a folder with one."""
    file = _file(path)
    if file is None:
        return False
    names = list(tensors_of(file, options))
    if lycoris_keys.is_family(names):
        return diffusers_metadata.has_other_method(file)
    return keys.is_layout(names) or file.name in NAMES


def read(path: Path, options: ReadOptions) -> Adapter:
    """Read an adapter in one of diffusers' layouts.

    Raises:
        InputError: There is no such file, or it is malformed, or pickled without ``allow_pickle``.
        AdapterError: Tensors are unknown, missing or misshapen, metadata contradicts them, or the
            scaling or the axis cannot be told; all of a kind are listed.
    """
    file = _file(path)
    if file is None:
        raise InputError(f"{path}: no {NAMES[0]} here. Pass the adapter's file or its folder.")
    tensors = tensors_of(file, options)
    if diffusers_metadata.has_other_method(file):
        return diffusers_methods.read(path, file, tensors, options)
    metadata = diffusers_metadata.of(file)
    found = keys.sort(tensors)
    raw = diffusers_metadata.raw_configs(file, metadata)
    configs = _configs(file, raw, found.layers, options)
    _refuse_alpha(path, options, configs, found)
    if not configs and (options.base_is_residual or options.recompute_init):
        option = "--base-is-residual" if options.base_is_residual else "--recompute-init"
        raise AdapterError(
            f"{path}: has no metadata of an initialisation that changed the base. Leave {option} "
            "out; where the base was changed, pass the model that training began with as BASE."
        )
    by_onetrainer = lycoris_metadata.by_onetrainer(metadata)
    layers, problems = [], [shown(p, 300) for p in found.problems]
    for module, parts in found.layers.items():
        layer = _layer(module, parts, path, configs, options, found, by_onetrainer)
        if isinstance(layer, str):
            problems.append(f"{shown(module)}: {layer}")
        else:
            layers.append(layer)
    if problems:
        raise AdapterError(f"{path}: does not add up:{listing(sorted(problems))}")
    if not layers:
        raise AdapterError(f"{path}: holds no LoRA tensors. Check how the adapter was saved.")
    if by_onetrainer is not None:
        _refuse_contradictions(path, by_onetrainer, layers)
    whole_families = bool(raw) and all(
        peft_targets.names_all_layers(own, numbers=True) for own in raw.values()
    )
    return Adapter(
        path=path,
        format="diffusers",
        files=(file,),
        tensors=tensors,
        updates=tuple(u for layer in layers for u in layer.updates),
        naming="flat",
        whole_families=whole_families,
        residual_init=next(
            (c.changed_base for c in configs.values() if c.changed_base and not c.recomputed), None
        ),
        numbered_ends=tuple(
            str(t) for own in raw.values() if whole_families for t in own["target_modules"]
        ),
        doubts=tuple(_doubts(raw, configs, found.layers)),
        facts=_facts(layers, found, metadata, tensors),
    )


@dataclass(frozen=True)
class _Layer:
    """One module's changes.

    Attributes:
        updates: Of its weight, and of its bias where B has one.
        rank: Of its product.
        alpha: Scaling times rank.
        axis: What its magnitudes count, or None.
        evidence: Where that, and the scaling, are from.
    """

    updates: tuple[Update, ...]
    rank: int
    alpha: float
    axis: Axis | None
    evidence: str
    scaled_by: str


def _file(path: Path) -> Path | None:
    if path.is_file():
        return path
    found = [path / name for name in NAMES if (path / name).is_file()]
    if found and (path / "adapter_config.json").is_file():
        return None  # PEFT's folder
    return contained(found[0], path) if found else None


# --- the scaling


def _configs(
    path: Path,
    raw: Mapping[str, Mapping[str, Any]],
    layers: Mapping[str, Any],
    options: ReadOptions,
) -> dict[str, PeftConfig]:
    """Return the config of each component that the metadata names.

    Raises:
        AdapterError: It says what this tool does not reproduce.
    """
    found, changed = {}, [c for c, settings in raw.items() if peft_init.changed(settings)]
    for component, settings in raw.items():
        where = path.with_name(f"{path.name}, metadata of {shown(component or 'the adapter')}")
        variants = [name for name in VARIANTS if settings.get(name)]
        if settings.get("peft_type", "LORA") != "LORA":
            variants.append(f"peft_type {shown(settings['peft_type'])}")
        if variants:
            raise AdapterError(
                f"{where}: {', '.join(variants)}: not known in this layout. Save the adapter with "
                "PEFT (save_pretrained) and pass that folder with the component's own as BASE."
            )
        # What is said of the base is said of the components whose base the training changed.
        said = options if component in changed or not changed else READ_AS_IT_IS
        own = _own_paths(component, layers)
        found[component] = peft_config.parse(where, settings, said).for_modules(where, own)
    return found


def _own_paths(component: str, modules: Iterable[str]) -> list[str]:
    """Return the paths of a component's modules, as PEFT saw them."""
    own = [m for m in modules if component in (keys.component_of(m), ONE_COMPONENT)]
    return [_own_path(m) for m in own]


def _doubts(
    raw: Mapping[str, Mapping[str, Any]], configs: Mapping[str, PeftConfig], layers: Iterable[str]
) -> Iterator[str]:
    """Yield what metadata and tensors say differently, without a contradiction."""
    for component, config in configs.items():
        of = f"of {shown(component or 'the metadata')}"
        own = _own_paths(component, layers)
        yield from (f"{doubt} ({of})" for doubt in config.doubts)
        if config.idle_patterns:
            yield f"no layer takes its rank or alpha from {', '.join(config.idle_patterns)} {of}"
        for doubt in peft_targets.doubts(raw[component].get("target_modules"), own, own):
            yield f"{doubt} ({of})"


def _refuse_alpha(
    path: Path, options: ReadOptions, configs: Mapping[str, Any], found: keys.Sorted
) -> None:
    stored = any("alpha" in parts for parts in found.layers.values())
    if options.alpha is not None and (configs or stored):
        raise AdapterError(f"{path}: alpha is in the file. Leave --alpha out.")
    if stored and configs.keys() - {ONE_COMPONENT}:
        raise AdapterError(
            f"{path}: alpha is in the file twice, in {ENTRY} and beside the factors, and which "
            "one counts is not defined. Save it again with diffusers."
        )


def _scaling(
    module: str,
    rank: int,
    parts: Mapping[str, TensorRef],
    path: Path,
    configs: Mapping[str, PeftConfig],
    options: ReadOptions,
    found: keys.Sorted,
) -> tuple[float, str] | str:
    """Return the factor on B A and where it is from, or why there is none."""
    component = keys.component_of(module)
    if configs:
        config = _config_of(module, configs)
        if config is None:
            return f"the metadata says nothing of {shown(component or 'its component')}"
        own = _own_path(module)
        if config.rank(own) != rank:
            return f"rank {config.rank(own)} by the metadata, but its factors have {rank}"
        return _agreed(config.scaling(own), rank, parts)
    if options.alpha is not None:
        return needed_alpha(path, options) / rank, "--alpha"
    if "alpha" in parts:
        alpha = _stored_alpha(parts["alpha"])
        return alpha if isinstance(alpha, str) else (alpha / rank, "alpha in the file")
    if any("alpha" in other for other in found.layers.values()):
        return "has no alpha, though other layers have"
    return 1.0, "diffusers' rule: without metadata or alpha, alpha is the rank"


def _config_of(module: str, configs: Mapping[str, PeftConfig]) -> PeftConfig | None:
    return configs.get(keys.component_of(module) or "", configs.get(ONE_COMPONENT))


def _own_path(module: str) -> str:
    """Return a module's path within its component, which is what PEFT wrapped."""
    return module.removeprefix(f"{keys.component_of(module)}.")


def _agreed(scaling: float, rank: int, parts: Mapping[str, TensorRef]) -> tuple[float, str] | str:
    """Return the metadata's scaling, if an alpha beside the factors says the same."""
    if "alpha" not in parts:
        return scaling, "the metadata"
    alpha = _stored_alpha(parts["alpha"])
    if isinstance(alpha, str):
        return alpha
    if not math.isclose(alpha / rank, scaling, rel_tol=2.0**-8):  # stored in bfloat16 at worst
        return f"alpha / rank is {alpha / rank:g}, but {scaling:g} by the metadata"
    return scaling, "the metadata and alpha in the file"


def _stored_alpha(ref: TensorRef) -> float | str:
    alpha = finite_number(ref)
    return "alpha is 0, so it would have no effect" if alpha == 0 else alpha


def _refuse_contradictions(path: Path, said: Said, layers: Sequence[_Layer]) -> None:
    axes: Counter[str] = Counter(layer.axis for layer in layers if layer.axis is not None)
    if problems := lycoris_metadata.contradictions(said, {"LoRA": len(layers)}, axes):
        raise AdapterError(
            f"{path}: its metadata contradicts its tensors:{listing(problems)}\nGet the file as it "
            "was trained. If the tensors are right, save them without metadata."
        )


# --- one layer


def _layer(
    module: str,
    parts: Mapping[str, TensorRef],
    path: Path,
    configs: Mapping[str, PeftConfig],
    options: ReadOptions,
    found: keys.Sorted,
    by_onetrainer: Said | None,
) -> _Layer | str:
    if missing := [p for p in ("A", "B") if p not in parts]:
        return f"{' and '.join(f'lora_{p}' for p in missing)} missing"
    a, b = parts["A"], parts["B"]
    if len(a.shape) < 2 or len(b.shape) < 2 or a.shape[0] != b.shape[1]:
        return f"lora_A is {a.shape} and lora_B {b.shape}; their ranks differ"
    if any(n != 1 for n in b.shape[2:]):
        return f"lora_B is {b.shape}, expected a kernel of 1"
    rank = a.shape[0]
    scaled = _scaling(module, rank, parts, path, configs, options, found)
    if isinstance(scaled, str):
        return scaled
    scaling, scaled_by = scaled
    axis = _axis(parts, a, b, options)
    if isinstance(axis, str):
        return axis
    config = _config_of(module, configs)
    if config is not None and (dora := config.dora) != (axis is not None):
        said = "says use_dora" if dora else "says that use_dora is false"
        return f"{'no' if dora else 'a'} magnitude, but the metadata {said}; refusing to guess"
    magnitude = parts.get("m") or parts.get("dora_scale")
    names = [parts[p].name for p in ("A", "B", "m", "dora_scale", "alpha") if p in parts]
    update = Update(
        target=f"{module}.weight",
        kind="lora" if axis is None else "dora",
        source_keys=tuple(names),
        down=Operand.matrix(a),
        up=Operand.matrix(b),
        scaling=scaling,
        magnitude=Operand.vector(magnitude) if magnitude is not None else None,
        axis=axis.axis if axis is not None else "out",
        eps=_eps(parts, by_onetrainer),
        layout="oi",
    )
    updates = [update]
    if config is not None and config.recomputed:
        updates.insert(0, peft_init.residual(module, config.changed_base, rank, scaling))
    if config is not None and config.lora_bias != ("B.bias" in parts):
        return f"lora_bias is {str(config.lora_bias).lower()} by the metadata, but its B has " + (
            "none" if config.lora_bias else "one")  # fmt: skip
    if "B.bias" in parts:
        bias = parts["B.bias"]
        updates.append(Update(f"{module}.bias", "add", (bias.name,), scaling=scaling, value=bias))
    return _Layer(
        tuple(updates),
        rank,
        scaling * rank,
        axis.axis if axis is not None else None,
        axis.evidence if axis is not None else "",
        scaled_by,
    )


def _eps(parts: Mapping[str, TensorRef], by_onetrainer: Said | None) -> float:
    """Return what the trainer added to norms: PEFT nothing, OneTrainer float32's eps or nothing."""
    if by_onetrainer is not None:
        return 0.0 if by_onetrainer.eps is False else EPS["F32"]
    return EPS["F32"] if "dora_scale" in parts else 0.0


@dataclass(frozen=True)
class _Axis:
    axis: Axis
    evidence: str


def _axis(
    parts: Mapping[str, TensorRef], a: TensorRef, b: TensorRef, options: ReadOptions
) -> _Axis | str | None:
    """Return what a layer's magnitudes count, None without any, or why that cannot be told."""
    if "m" in parts and "dora_scale" in parts:
        return "lora_magnitude_vector and dora_scale both; one layer has one magnitude"
    if "m" in parts:
        m = parts["m"]
        if m.size != b.shape[0]:
            return f"lora_magnitude_vector is {m.shape}, expected one for each of {b.shape[0]} rows"
        if options.axis == "in":
            return "lora_magnitude_vector counts outputs. Leave --axis out"
        return _Axis("out", "by the name lora_magnitude_vector: PEFT takes the norm over dim 1")
    if "dora_scale" not in parts:
        return None
    columns = Operand.matrix(a).shape[1]
    found = axis_of(parts["dora_scale"].shape, b.shape[0], columns, a.shape[1], options.axis)
    return found if isinstance(found, str) else _Axis(found.axis, found.evidence)


# --- for people


def _facts(
    layers: Sequence[_Layer],
    found: keys.Sorted,
    metadata: Mapping[str, str],
    tensors: Mapping[str, TensorRef],
) -> dict[str, object]:
    axes = sorted({layer.axis for layer in layers if layer.axis is not None})
    facts: dict[str, object] = {
        "method": "DoRA" if axes else "LoRA",
        "trainer": _trainer(found, metadata, tensors),
        "rank": sorted({layer.rank for layer in layers}),
        "alpha": sorted({round(layer.alpha, 6) for layer in layers}),
        "scaling": sorted({round(layer.alpha / layer.rank, 6) for layer in layers}),
        "scaling from": ", ".join(sorted({layer.scaled_by for layer in layers})),
        "magnitude": ", ".join(f"one per {axis}put" for axis in axes) or "none",
    }
    if axes:
        evidence = sorted({f"{la.axis}, {la.evidence}" for la in layers if la.axis is not None})
        facts["axis"] = "; ".join(evidence)
    return facts


def _trainer(
    found: keys.Sorted, metadata: Mapping[str, str], tensors: Mapping[str, TensorRef]
) -> str:
    if lycoris_metadata.by_onetrainer(metadata) is not None:
        return "OneTrainer"
    if diffusers_metadata.by_simpletuner(metadata):
        return "SimpleTuner"
    if ENTRY in metadata:
        return "diffusers, with metadata"
    if found.old:
        return "diffusers, an old layout"
    if any(name.endswith(".lora_magnitude_vector.weight") for name in tensors):
        return "SimpleTuner or OneTrainer: the names of magnitudes end in '.weight'"
    return "not said; diffusers' layout"
