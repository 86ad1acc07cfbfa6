"""PEFT adapter folders, method LORA, with or without DoRA, and everything that rides along.

Source: github.com/huggingface/peft 0.21.2, src/peft/utils/save_and_load.py (what is saved),
src/peft/tuners/lora/layer.py and variants.py (what it means), src/peft/tuners/lora/dora.py.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dora_export.adapters import (
    peft_bare,
    peft_config,
    peft_init,
    peft_methods,
    peft_parameters,
    peft_targets,
    torchtune,
)
from dora_export.adapters.config_files import CONFIG, config_of
from dora_export.adapters.model import Adapter, ReadOptions
from dora_export.adapters.peft_config import PeftConfig
from dora_export.adapters.peft_factors import factors
from dora_export.adapters.peft_keys import plain_name
from dora_export.checkpoints.folder import read_json
from dora_export.errors import AdapterError, InputError, listing, shown
from dora_export.storage import read_tensors
from dora_export.storage.paths import contained
from dora_export.tensors import Operand, TensorRef
from dora_export.update import Kind, RowOrder, Update

WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
EMBEDDING_LEAVES = frozenset(
    ("embed_tokens", "lm_head", "wte", "word_embeddings", "embed_in", "embed_out", "shared",
     "tok_embeddings")
)  # fmt: skip
TRAINING_ONLY = ("lora_velora_embed", "lora_monteclora_sampler")

NORMALISED = "one per output, divided by its norm already"
# What the files of LoRA leave open, and those of PEFT's other methods do not.
LORA_OPTIONS = ("torchtune_dora_fix", "magnitude_is_normalised", "base_is_residual",
                "recompute_init", "moe_b_layout", "moe_transposed")  # fmt: skip

# Part of a layer -> how its key ends. The adapter's name may stand before the last ".weight".
LAYER_PARTS = {
    part: re.compile(rf"(?P<module>.+?)\.{pattern}")
    for part, pattern in {
        "A": r"lora_A(\.(?P<name>(?!weight$)[^.]+))?(\.weight)?",  # AdaLoRA: no ".weight"
        "B": r"lora_B(\.(?P<name>(?!(weight|bias)$)[^.]+))?(\.weight)?",
        "B.bias": r"lora_B(\.(?P<name>[^.]+))?\.bias",
        "embedding_A": r"lora_embedding_A(\.(?P<name>[^.]+))?",
        "embedding_B": r"lora_embedding_B(\.(?P<name>[^.]+))?",
        "E": r"lora_E(\.(?P<name>[^.]+))?",
        "m": r"lora_magnitude_vector(\.(?P<name>(?!weight$)[^.]+))?(\.weight)?",
        "base.weight": r"(token_adapter\.)?base_layer\.(?P<name>)weight",
        "base.bias": r"base_layer\.(?P<name>)bias",
        "tokens": r"token_adapter\.trainable_tokens_delta(\.(?P<name>[^.]+))?",
    }.items()
}
SAVED_MODULE = re.compile(
    r"(?P<module>.+)\.modules_to_save(\.(?P<name>[^.]+))?\.(?P<leaf>weight|bias)"
)


@dataclass
class _Layer:
    """Keys of one module, by part."""

    parts: dict[str, TensorRef] = field(default_factory=dict)


@dataclass
class _Sorted:
    """Adapter tensors by what they are."""

    layers: dict[str, _Layer] = field(default_factory=lambda: defaultdict(_Layer))
    whole: dict[str, TensorRef] = field(default_factory=dict)  # target tensor -> stored copy
    ignored: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    names: set[str] = field(default_factory=set)


def matches(path: Path, options: ReadOptions) -> bool:
    """Return whether ``path`` is a PEFT folder, the weight file in one, or one without a config."""
    return _config_path(path) is not None or _bare(path, options) is not None


def read(path: Path, options: ReadOptions) -> Adapter:
    """Read a PEFT adapter folder.

    Raises:
        InputError: The config or the weights are missing or malformed.
        AdapterError: A setting or a tensor that this tool does not reproduce; all are listed.
    """
    config_path, bare = _config_path(path), _bare(path, options)
    if config_path is None and bare is None:
        raise InputError(f"{path}: no {CONFIG}. Check that this is the adapter's folder.")
    if bare is not None:
        config_path = bare.with_name(CONFIG)  # for messages: it is not there
    assert config_path is not None, "Bug: one of the two is there"
    _refuse_options(config_path, options, bare=bare is not None)
    if bare is None:
        raw = read_json(config_path)
    else:
        stored = read_tensors(bare, allow_pickle=options.allow_pickle)
        raw = peft_bare.settings(bare, stored, CONFIG, options)
    if str(method := raw.get("peft_type")) in peft_methods.METHODS:
        _refuse_lora_options(config_path, str(method), options)
        file = _weights(config_path.parent, options)
        stored = read_tensors(file, allow_pickle=options.allow_pickle)
        return peft_methods.read(path, config_path, raw, file, stored)
    peft_methods.refuse(config_path, str(method))
    config = peft_config.parse(config_path, raw, options)
    weights = bare or _weights(config_path.parent, options)
    tensors = read_tensors(weights, allow_pickle=options.allow_pickle)
    sorted_ = _sort(tensors, config)
    if "use_dora" not in raw and torchtune.is_export(raw):  # torchtune does not write it
        with_m = any("m" in layer.parts for layer in sorted_.layers.values())
        config = replace(config, dora=with_m)
    pruned = _set_pruned_apart(sorted_)
    layers = {path: layer.parts for path, layer in sorted_.layers.items()}
    config = config.for_modules(config_path, [*layers, *peft_parameters.paths(layers, config)])
    if bare is not None:
        config = peft_bare.with_ranks(config, layers)
    modules, parameters = peft_parameters.split(config_path, layers, config, sorted_.problems)
    packed = peft_parameters.packing(config_path.parent, raw, options)
    updates = [u for module, parts in modules.items()
               for u in _layer_updates(module, parts, config, sorted_.problems)]  # fmt: skip
    for name, parts in parameters.items():
        updates += peft_parameters.updates(name, parts, config, packed, sorted_.problems)
    order = torchtune.export_order(config_path.parent, raw, options)
    updates = [_as_said(u, order, options) for u in updates]
    updates += [_replacement(target, ref) for target, ref in sorted_.whole.items()]
    _check_magnitudes(config, sorted_)
    if sorted_.problems:
        raise AdapterError(
            f"{weights}: does not add up:{listing(sorted(sorted_.problems))}\n"
            f"Check that the folder holds one whole adapter with the {CONFIG} of its training."
        )
    if not updates:
        raise AdapterError(f"{weights}: holds no LoRA tensors. Check how the adapter was saved.")
    return Adapter(
        path=path,
        format="peft",
        files=(weights,),
        tensors=tensors,
        updates=tuple(updates),
        ignored=sorted_.ignored,
        folder=config_path.parent,
        base_name=config.base_name,
        ensure_weight_tying=config.ensure_weight_tying,
        saved_embeddings=_saved_embeddings(sorted_, config),
        whole_families=peft_targets.names_all_layers(raw) and not pruned,
        layer_replication=config.layer_replication,
        residual_init=None if config.recomputed else config.changed_base,
        doubtful_magnitudes=config.dora and options.magnitude_is_normalised is None,
        doubts=tuple(_doubts(config, raw, modules, parameters, bare=bare is not None)),
        square_io=None if bare is not None else config.fan_in_fan_out,
        square_experts_transposed=options.moe_transposed,
        facts=_facts(config, updates, order, normalised=bool(options.magnitude_is_normalised))
        | _experts_facts(parameters, packed)
        | ({"trainer": f"PEFT; its {CONFIG} is missing"} if bare is not None else {}),
    )


def _as_said(update: Update, order: RowOrder | None, options: ReadOptions) -> Update:
    """Return the update with what config and options say of all products."""
    if update.kind == "dora" and options.magnitude_is_normalised:
        update = replace(update, magnitude_is_factor=True)
    if order is None or update.kind not in ("lora", "dora"):
        return update
    return replace(update, row_order=order, scales_bias=update.kind == "dora")


def _config_path(path: Path) -> Path | None:
    return config_of(path, "peft", WEIGHTS)


def _bare(path: Path, options: ReadOptions) -> Path | None:
    return peft_bare.weights_of(path, CONFIG, WEIGHTS, options)


def _refuse_options(config_path: Path, options: ReadOptions, *, bare: bool) -> None:
    if options.alpha is not None and not bare:
        raise AdapterError(f"{config_path}: lora_alpha is in this file. Leave --alpha out.")
    if options.axis == "in":
        raise AdapterError(
            f"{config_path}: PEFT has one magnitude per output row. Leave --axis out."
        )


def _refuse_lora_options(config_path: Path, method: str, options: ReadOptions) -> None:
    said = [name for name in LORA_OPTIONS if getattr(options, name)]
    if said:
        flag = f"--{said[0].replace('_', '-')}"
        raise AdapterError(f"{config_path}: {flag} is about LoRA, this is {shown(method)}. "
                           f"Leave {flag} out.")  # fmt: skip


def _weights(folder: Path, options: ReadOptions) -> Path:
    found = [folder / name for name in WEIGHTS if (folder / name).is_file()]
    if not found:
        raise InputError(
            f"{folder}: has {CONFIG} but no {' or '.join(WEIGHTS)}. Copy the whole adapter folder."
        )
    return contained(found[0], folder)


def _sort(tensors: Mapping[str, TensorRef], config: PeftConfig) -> _Sorted:
    found = _Sorted()
    for key, ref in tensors.items():
        _sort_one(key, ref, config, found)
    if len(found.names) > 1:
        found.problems.append(f"tensors of several adapters: {sorted(found.names)}; save one alone")
    return found


def _sort_one(key: str, ref: TensorRef, config: PeftConfig, found: _Sorted) -> None:
    name = plain_name(key)
    if any(f".{part}" in name for part in TRAINING_ONLY):
        found.ignored[key] = "used in training only"
        return
    if ".original_module." in f".{name}":
        found.ignored[key] = "the base's own copy beside a module saved whole"
        return
    for part, pattern in LAYER_PARTS.items():
        if match := pattern.fullmatch(name):
            if match["name"]:
                found.names.add(match["name"])
            layer = found.layers[match["module"]]
            if part in layer.parts:
                found.problems.append(f"'{shown(key)}' and '{shown(layer.parts[part].name)}' "
                                      "are the same part of one layer")  # fmt: skip
            layer.parts[part] = ref
            return
    match = SAVED_MODULE.fullmatch(name)
    target = f"{match['module']}.{match['leaf']}" if match else name
    if match is None and not _may_be_whole(name, config):
        found.problems.append(f"unknown tensor '{shown(key)}'")
    elif (twin := found.whole.setdefault(target, ref)) is ref:
        return
    elif (twin.dtype, twin.shape) == (ref.dtype, ref.shape) and (twin.raw() == ref.raw()).all():
        found.ignored[key] = f"repeats '{twin.name}'"  # bias="all" stores a saved module's twice
    else:
        found.problems.append(f"'{shown(key)}' and '{shown(twin.name)}' are two copies of one "
                              "tensor and differ")  # fmt: skip


def _set_pruned_apart(found: _Sorted) -> bool:
    """Take out the layers that AdaLoRA has pruned to rank 0; return whether there are any."""
    pruned = [n for n, lay in found.layers.items() if "E" in lay.parts and not lay.parts["E"].size]
    for name in pruned:
        for ref in found.layers.pop(name).parts.values():
            found.ignored[ref.name] = "AdaLoRA has pruned this layer's rank to 0"
    return bool(pruned)


def _may_be_whole(name: str, config: PeftConfig) -> bool:
    """Return whether a tensor without LoRA parts can be a stored copy of a base tensor."""
    module, _, leaf = name.rpartition(".")
    if leaf == "bias" and config.bias != "none":
        return True
    if ".lora_" in name or ".base_layer." in name:
        return False
    return _is_saved_module(module, config) or module.rpartition(".")[2] in EMBEDDING_LEAVES


def _is_saved_module(module: str, config: PeftConfig) -> bool:
    """Return whether PEFT saved a module, or one that holds it: by the end of its path."""
    parents = [module, *(module[: m.start()] for m in re.finditer(r"\.", module))]
    return any(parent.endswith(saved) for parent in parents for saved in config.saved_modules)


def _saved_embeddings(found: _Sorted, config: PeftConfig) -> frozenset[str]:
    """Return the targets stored because PEFT saves targeted or resized embeddings along."""
    targets = [t for t in found.whole if not _is_saved_module(t.rpartition(".")[0], config)]
    targets += [f"{m}.weight" for m, layer in found.layers.items() if "base.weight" in layer.parts]
    return frozenset(t for t in targets if t.split(".")[-2] in EMBEDDING_LEAVES)


def _layer_updates(
    module: str, parts: Mapping[str, TensorRef], config: PeftConfig, problems: list[str]
) -> Iterator[Update]:
    if ".base_layer." in module:
        problems.append(f"{shown(module)}: LoRA inside nn.MultiheadAttention, whose out_proj PEFT "
                        "adds twice, is not supported")  # fmt: skip
        return
    for bias in ("weight", "bias"):
        if (ref := parts.get(f"base.{bias}")) is not None:
            yield _replacement(f"{module}.{bias}", ref)
    if (ref := parts.get("tokens")) is not None:
        yield from _token_rows(module, ref, config, problems)
    pairs = [p for p in (("A", "B"), ("embedding_A", "embedding_B")) if set(p) & parts.keys()]
    if len(pairs) > 1:
        problems.append(f"{shown(module)}: both linear and embedding factors")
    elif pairs:
        yield from _product_updates(module, parts, pairs[0], config, problems)
    elif parts.keys() & {"m", "B.bias", "E"}:
        problems.append(f"{shown(module)}: {sorted(parts.keys())} without lora_A and lora_B")


def _product_updates(
    module: str,
    parts: Mapping[str, TensorRef],
    pair: tuple[str, str],
    config: PeftConfig,
    problems: list[str],
) -> Iterator[Update]:
    if missing := [p for p in pair if p not in parts]:
        problems.append(f"{shown(module)}: lora_{missing[0]} missing")
        return
    found = factors(module, parts, pair, config)
    if isinstance(found, str):
        problems.append(found)
        return
    if config.recomputed and pair[0] == "A":  # PEFT begins embeddings as plain LoRA's
        rank = found.down.shape[0]
        yield peft_init.residual(module, config.changed_base, rank, found.scaling)
    m = parts.get("m")
    kind: Kind = "lora" if m is None else "dora"
    keys = [*found.keys] + ([m.name] if m else [])
    yield Update(
        target=f"{module}.weight",
        kind=kind,
        source_keys=tuple(keys),
        down=found.down,
        up=found.up,
        scaling=found.scaling,
        magnitude=Operand.vector(m) if m else None,
        # PEFT sees an embedding as (dim, vocabulary): the transpose of how it is stored.
        layout="io"
        if pair[0] == "embedding_A"
        else "oi"
        if len(parts[pair[0]].shape) > 2
        else None,
    )
    if (bias := parts.get("B.bias")) is not None:
        if not config.lora_bias:
            problems.append(f"{shown(module)}: lora_B has a bias though lora_bias is false")
        yield Update(
            target=f"{module}.bias",
            kind="add",
            source_keys=(bias.name,),
            scaling=config.scaling(module),
            value=bias,
        )


def _token_rows(
    module: str, ref: TensorRef, config: PeftConfig, problems: list[str]
) -> Iterator[Update]:
    indices = [
        rows
        for name, rows in config.token_indices.items()
        if name is None or module == name or module.endswith(f".{name}")
    ]
    if len(indices) != 1 or len(ref.shape) != 2 or len(indices[0]) != ref.shape[0]:
        problems.append(f"'{shown(ref.name)}' {ref.shape}: trainable_token_indices in the config "
                        "do not say which rows these are")  # fmt: skip
        return
    yield Update(
        target=f"{module}.weight",
        kind="rows",
        source_keys=(ref.name,),
        value=ref,
        row_indices=indices[0],
    )


def _replacement(target: str, ref: TensorRef) -> Update:
    return Update(target=target, kind="replace", source_keys=(ref.name,), value=ref)


def _check_magnitudes(config: PeftConfig, found: _Sorted) -> None:
    adapted = {
        n: lay.parts for n, lay in found.layers.items() if {"A", "embedding_A"} & set(lay.parts)
    }
    without = [n for n, parts in adapted.items() if "m" not in parts]
    if config.dora and without:
        found.problems.append(
            f"lora_magnitude_vector is missing for {len(without)} of {len(adapted)} layers "
            f"(first: {shown(without[0])}), but {CONFIG} says use_dora: true; refusing to merge "
            "them as plain LoRA. Save the adapter again with its magnitudes"
        )
    if not config.dora and len(without) < len(adapted):
        found.problems.append(
            f"{len(adapted) - len(without)} layers have a lora_magnitude_vector, but {CONFIG} says "
            "use_dora: false; refusing to drop them. Set use_dora to true if the adapter was "
            "trained with DoRA"
        )


def _doubts(
    config: PeftConfig,
    raw: Mapping[str, Any],
    modules: Mapping[str, peft_parameters.Parts],
    parameters: Collection[str],
    *,
    bare: bool,
) -> Iterator[str]:
    """Yield what config and tensors leave open or say differently, without a contradiction."""
    if bare:
        yield peft_bare.DOUBT
    if config.group_size is not None:
        yield ("QA-LoRA trains beside a base quantised by GPTQ: on this one, the merged model "
               "differs from the trained one by that quantisation's error")  # fmt: skip
    yield from config.doubts
    if config.idle_patterns:
        yield (
            f"no layer takes its rank or alpha from {peft_targets.few(config.idle_patterns)}; the "
            "layers meant are merged with the values that the others have"
        )
    layers = [*modules, *(path.rpartition(".")[0] for path in parameters)]
    products = [m for m, parts in modules.items() if parts.keys() & {"A", "embedding_A"}]
    yield from peft_targets.doubts(raw.get("target_modules"), layers, products)


def _facts(
    config: PeftConfig, updates: list[Update], order: RowOrder | None, *, normalised: bool
) -> dict[str, object]:
    modules = [u.target if u.orientation else u.target.removesuffix(".weight")
               for u in updates if u.kind in ("lora", "dora")]  # fmt: skip
    facts: dict[str, object] = {
        "method": config.method,
        "rank": sorted({config.rank(m) for m in modules}),
        "alpha": sorted({config.module_alpha(m) for m in modules}),
        "scaling": sorted({round(config.scaling(m), 6) for m in modules}),
        "rslora": config.rslora,
        "magnitude": (NORMALISED if normalised else "one per output") if config.dora else "none",
        "modules_to_save": sorted(u.target for u in updates if u.kind == "replace"),
        "trainer": {
            None: "PEFT",
            "torchtune-peft": "torchtune, exported to PEFT: rows of q and k are put in order",
            "torchtune-peft?": "not said; the config is as bare as torchtune's export",
        }[order],
    }
    if config.changed_base is not None:
        how = "computed from the base" if config.recomputed else "the base is its residual"
        facts["begun with"] = f"{config.changed_base}; {how}"
    if config.dora:
        facts["axis"] = "out, by the format: PEFT takes the norm over dim 1"
    return facts


def _experts_facts(
    parameters: Mapping[str, object], packed: peft_parameters.Stacked
) -> dict[str, object]:
    """Return what ``inspect`` shows of bare parameters."""
    if not parameters:
        return {}
    orders = {packed.of(path.rpartition(".")[2]) for path in parameters}
    told = " and ".join(sorted(str(order) for order in orders if order is not None))
    return {
        "experts": f"lora_B in {told or 'either'} order: {packed.why}",
        "moe_b_layout": sorted(order for order in orders if order is not None) or ["peft"],
    }
