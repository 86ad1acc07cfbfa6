"""The plan: every output tensor with its source and changes, every adapter tensor accounted for.

Made from headers and configs alone. It is the two-way ledger (nothing of the adapter is left over,
nothing of the base is missing) and the bill (bytes to write, bytes of memory).
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from dora_export import (
    diffusion_names,
    experts,
    layer_biases,
    layouts,
    naming,
    part_names,
    replication,
    row_orders,
    several,
    tying,
)
from dora_export.adapters.model import Adapter
from dora_export.checkpoints.model import Checkpoint, WeightFile, prefix_of
from dora_export.errors import PlanError, listing, shown
from dora_export.formula import ZeroNorm
from dora_export.limits import FACTOR
from dora_export.storage.safetensors import header_bytes
from dora_export.tensors import DType, TensorRef
from dora_export.update import Change, Update

Precision = Literal["float32", "float64"]


@dataclass(frozen=True)
class Settings:
    """What the user decides about the numbers.

    Attributes:
        dtype: Storage type of all floating-point tensors of the output; None keeps each one's own.
        precision: Working precision.
        strength: ``W + strength * (W' - W)``, dimensionless.
        weights: Of the adapters, in their order: each does ``V + weight (V' - V)``, dimensionless;
            none given: 1 each.
        zero_norm: What becomes of rows with ``||V|| = 0`` and ``m != 0``.
        map_prefix: (old, new) prefixes of tensor names.
        fan_in_fan_out: Layout of square weights where the user knows it.
        max_shard_bytes: Re-shard into files of at most this size; None keeps the base's files.
    """

    dtype: DType | None = None
    precision: Precision = "float32"
    strength: float = 1.0
    weights: tuple[float, ...] = ()
    zero_norm: ZeroNorm = "refuse"
    map_prefix: tuple[tuple[str, str], ...] = ()
    fan_in_fan_out: bool | None = None
    max_shard_bytes: int | None = None


@dataclass(frozen=True)
class Step:
    """One output tensor.

    Attributes:
        name: Its name in the output.
        dtype: Its storage type in the output.
        source: Where its base values come from; has the output's shape.
        changes: What happens to them, in order; empty: nothing.
        consumes: Adapter tensors that go into it.
        status: "unchanged", "cast" (another dtype only), "merged", "replaced" or "added".
    """

    name: str
    dtype: DType
    source: TensorRef
    changes: tuple[Change, ...] = ()
    consumes: tuple[str, ...] = ()
    status: Literal["unchanged", "cast", "merged", "replaced", "added"] = "unchanged"

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the output tensor."""
        return self.source.shape

    @property
    def nbytes(self) -> int:
        """Bytes of the output tensor."""
        return self.source.size * self.dtype.itemsize

    @property
    def copies_bytes(self) -> bool:
        """Whether the output has the source's very bytes."""
        return not self.changes and self.dtype is self.source.dtype


@dataclass(frozen=True)
class OutputFile:
    """One weight file of the output.

    Attributes:
        name: File name; for a component of a pipeline its path within the output.
        header: Its first bytes, up to the data.
        steps: Its tensors, in the order of their bytes.
    """

    name: str
    header: bytes = field(repr=False)
    steps: tuple[Step, ...]

    @property
    def nbytes(self) -> int:
        """Size of the file."""
        return len(self.header) + sum(s.nbytes for s in self.steps)

    def offsets(self) -> Iterator[tuple[Step, int]]:
        """Yield every step with the file offset of its first byte."""
        offset = len(self.header)
        for step in self.steps:
            yield step, offset
            offset += step.nbytes


@dataclass(frozen=True)
class Plan:
    """A merge, ready to run.

    Attributes:
        base: The base.
        adapters: What is merged, in order. Where there are several, the names of their tensors
            begin with their number: "1:...".
        settings: The user's.
        files: Weight files to write.
        indexes: Content of each index file, by its path within the output.
        config_edits: Keys of config.json (of every component's) that the merge makes untrue, with
            their true values.
        rules: How each adapter's names became the base's, for people.
        notes: Decisions worth telling.
        warnings: Doubts worth telling.
    """

    base: Checkpoint
    adapters: tuple[Adapter, ...]
    settings: Settings
    files: tuple[OutputFile, ...]
    indexes: Mapping[str, Mapping[str, Any]]
    config_edits: Mapping[str, Any]
    rules: tuple[str, ...]
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def steps(self) -> Iterator[Step]:
        """All output tensors."""
        return (step for file in self.files for step in file.steps)

    @property
    def weights(self) -> tuple[float, ...]:
        """Weight of each adapter."""
        return self.settings.weights or (1.0,) * len(self.adapters)

    @property
    def adapter_tensors(self) -> dict[str, TensorRef]:
        """All tensors of all adapters, by the names that the steps use."""
        return {name: ref for adapter in self.adapters for name, ref in adapter.tensors.items()}

    @property
    def ignored(self) -> dict[str, str]:
        """Adapter tensors without effect on weights, and why."""
        return {name: why for adapter in self.adapters for name, why in adapter.ignored.items()}

    @property
    def adapter_files(self) -> tuple[Path, ...]:
        """The files of all adapters."""
        return tuple(path for adapter in self.adapters for path in adapter.files)

    @property
    def inputs(self) -> dict[str, Path]:
        """Where base and adapters are, by what each is called in messages."""
        several_ = len(self.adapters) > 1
        names = [
            f"adapter {i}" if several_ else "adapter" for i in range(1, len(self.adapters) + 1)
        ]
        paths = (adapter.path for adapter in self.adapters)
        return {"base": self.base.path, **dict(zip(names, paths, strict=True))}

    @property
    def method(self) -> str:
        """What the adapters are, e.g. "DoRA" or "LoRA, DoRA"."""
        methods = [str(adapter.facts.get("method", "LoRA")) for adapter in self.adapters]
        return ", ".join(dict.fromkeys(methods))

    @property
    def output_bytes(self) -> int:
        """Bytes of all weight files."""
        return sum(file.nbytes for file in self.files)


def plan_merge(base: Checkpoint, adapters: Adapter | Sequence[Adapter], settings: Settings) -> Plan:
    """Pair every base tensor with its updates; reads no weight.

    Several adapters are applied in turn, each to what the ones before it left, with every norm
    that of the unmerged base: ``V_i = f_i (V_(i-1) + s_i B_i A_i)`` with
    ``f_i = m_i / ||W + s_i B_i A_i||``, and without ``f_i`` for LoRA. That is what PEFT's forward
    computes with several active adapters.

    Args:
        base: The base.
        adapters: One, or several in order.
        settings: The user's.

    Raises:
        PlanError: Names do not resolve, shapes do not fit, updates contradict each other, targets
            are quantised, or layers that should be adapted are not; all of a kind are listed.

    Source: github.com/huggingface/peft (0.21), src/peft/tuners/lora/layer.py (Linear.forward),
    dora.py (DoraLinearLayer.forward).
    """
    adapters = several.labelled([adapters] if isinstance(adapters, Adapter) else adapters)
    several.check_weights(settings.weights, len(adapters))
    weights = settings.weights or (1.0,) * len(adapters)
    stacked_anew = replication.expanded(base, several.layer_replication(adapters))
    base = stacked_anew.base
    placed = [
        _placed(base, adapter, settings, position, weights[position])
        for position, adapter in enumerate(adapters)
    ]
    tied = tying.resolve(base, [p.tied for p in placed])
    shapes = _shapes(base, tied)
    ordered = row_orders.with_row_orders(tied.updates, shapes, base)
    decided = [
        update
        for position, adapter in enumerate(adapters)
        for update in layouts.with_layouts(
            [u for u in ordered if u.adapter == position],
            shapes, base, adapter, settings.fan_in_fan_out,
        )
    ]  # fmt: skip
    by_target = _by_target(several.once(layer_biases.with_biases(decided, base.tensors)))
    problems = [p for name, group in by_target.items()
                for p in _problems(name, group, base, tied, settings)]  # fmt: skip
    if problems:
        trained = list(dict.fromkeys(shown(a.base_name) for a in adapters if a.base_name))
        names = f" (the adapter names '{', '.join(trained)}')" if trained else ""
        raise PlanError(
            f"the adapter does not fit this base:{listing(problems)}\n"
            f"Check that {base.path} is the base it was trained on{names}."
        )
    if conflicts := [
        c for name, group in by_target.items() for c in several.conflicts(name, group)
    ]:
        raise PlanError(
            f"these adapters cannot be merged together:{listing(conflicts)}\nLeave one of them out."
        )
    for adapter, one in zip(adapters, placed, strict=True):
        targets = {u.target for u in one.tied.updates if u.kind != "replace"}
        # A base that names its layers otherwise has other families than the trained model.
        moved = adapter.naming == "flat" and any(one.rule(u.target) not in base.tensors
                                                 for u in adapter.updates)  # fmt: skip
        if adapter.whole_families and not moved:
            _check_families(base, adapter, targets)
    files = _files(base, by_target, tied, settings)
    for adapter in adapters:
        _check_ledger(adapter, files, tied)
    return Plan(
        base=base,
        adapters=tuple(adapters),
        settings=settings,
        files=files,
        indexes=_indexes(base, files, settings),
        config_edits={**stacked_anew.edits, **_config_edits(base, files, tied, settings)},
        rules=tuple(one.rule.what for one in placed),
        notes=(*base.notes, *stacked_anew.notes, *tied.notes, *layer_biases.notes(decided)),
        warnings=tuple(dict.fromkeys(_warnings(base, adapters, files))),
    )


@dataclass(frozen=True)
class _Placed:
    """One adapter under the base's names."""

    rule: naming.Rule
    tied: tying.Trained


def _placed(
    base: Checkpoint, adapter: Adapter, settings: Settings, position: int, weight: float
) -> _Placed:
    _check_model_type(base, adapter)
    tying.refuse_unknown(base, adapter.updates)  # before names are: such heads are never stored
    targets = [u.target for u in adapter.updates if u.kind != "replace"]
    targets = targets or [u.target for u in adapter.updates]
    absent_head = tying.head_of(base, targets)
    others = {**diffusion_names.other_names(base), **part_names.other_names(base)}
    known = experts.KnownNames(base, [*others, *([absent_head] if absent_head else [])])
    required = [t for t in targets if t != absent_head] or targets
    rule = _rule(base, adapter, settings, known, required)
    updates = [_renamed(u, rule, known).taken(position, weight, "") for u in adapter.updates]
    saved = frozenset(known.own(rule(t)) for t in adapter.saved_embeddings)
    updates = diffusion_names.placed(updates, others)
    placed = experts.placed(updates, known, base, whole=adapter.whole_families,
                            transposed=adapter.square_experts_transposed)  # fmt: skip
    return _Placed(rule, tying.Trained(adapter.ensure_weight_tying, placed, saved))


def plan_unchanged(base: Checkpoint, settings: Settings) -> Plan:
    """Return a plan without an adapter: every tensor as it is, or in another dtype.

    Raises:
        PlanError: The base holds no floating-point tensors.
    """
    tied = tying.Tying(updates=(), sources={})
    files = _files(base, {}, tied, settings)
    return Plan(
        base=base,
        adapters=(),
        settings=settings,
        files=files,
        indexes=_indexes(base, files, settings),
        config_edits=_config_edits(base, files, tied, settings),
        rules=(),
    )


def _rule(
    base: Checkpoint,
    adapter: Adapter,
    settings: Settings,
    known: experts.KnownNames,
    required: Sequence[str],
) -> naming.Rule:
    if adapter.naming == "flat":
        every = [u.target for u in adapter.updates]
        return naming.find_flat_rule(every, list(known), settings.map_prefix, adapter.base_name)
    return naming.find_rule(
        list(dict.fromkeys(required)),
        known,
        settings.map_prefix,
        adapter.base_name,
        base.model_types,
    )


def _renamed(update: Update, rule: naming.Rule, known: experts.KnownNames) -> Update:
    return replace(update, target=known.own(rule(update.target)))


def _check_model_type(base: Checkpoint, adapter: Adapter) -> None:
    model_type = str(base.config.get("model_type"))
    if model_type in adapter.not_for:
        raise PlanError(
            f"{adapter.path}: {adapter.not_for[model_type]}, so its tensors are not those of "
            f"{base.path} ({shown(model_type)}). Merge with the trainer's own tool."
        )


def _shapes(base: Checkpoint, tied: tying.Tying) -> dict[str, tuple[int, ...]]:
    """Return the shape each target has when its products are applied: after a replacement."""
    shapes = {name: ref.shape for name, ref in base.tensors.items()}
    shapes |= {name: ref.shape for name, ref in tied.sources.items()}
    shapes |= {u.target: u.value.shape for u in tied.updates if u.kind == "replace" and u.value}
    return shapes


def _by_target(updates: Iterable[Update]) -> dict[str, list[Update]]:
    order = {"replace": 0, "rows": 1, "function": 2, "lora": 3, "dora": 3, "magnitude": 3, "add": 4}
    groups: dict[str, list[Update]] = defaultdict(list)
    for update in updates:
        groups[update.target].append(update)
    return {n: sorted(g, key=lambda u: (u.adapter, order[u.kind])) for n, g in groups.items()}


def _problems(
    name: str, group: Sequence[Update], base: Checkpoint, tied: tying.Tying, settings: Settings
) -> Iterator[str]:
    """Yield what keeps a tensor's updates from being applied."""
    ref = tied.sources.get(name, base.tensors.get(name))
    replaced = [u.value for u in group if u.kind == "replace"]
    for adapter in dict.fromkeys(u.adapter for u in group):
        yield from _contradictions(name, [u for u in group if u.adapter == adapter])
    beyond = [u.scaling for u in group if not abs(u.scaling) <= FACTOR]
    if beyond:
        # Whatever is compared with terms of that size is as good as equal.
        yield f"{shown(name)}: scaling {beyond[0]:g}; at most {FACTOR:,.0f} is taken, check alpha"
    whole = [u.function.what for u in group if u.function is not None]
    if whole and len({u.adapter for u in group}) > 1:
        yield f"{shown(name)}: {whole[0]}, which has no meaning beside another adapter's update"
    effective = replaced[0] if replaced else ref
    if ref is None and (like := _longer_names(name, base)):
        yield (
            f"{shown(name)}: not in the base, which has '{shown(like[0])}'; if they are the same, "
            f"pass --map-prefix {shown(name)}={shown(like[0])}"
        )
        return
    if effective is None or (ref is None and base.components):
        yield f"{shown(name)}: not in the base" + (
            "; the layer has no bias to add to" if name.endswith(".bias") else ""
        )
        return
    if ref is not None and not ref.dtype.mergeable:
        yield (
            f"{shown(name)}: stored as {ref.dtype.name}; merging into quantised weights is not "
            "supported, dequantise the base first"
        )
    bias = layer_biases.bias_of(name)
    if bias in base.tensors and any(
        u.scales_bias and layer_biases.scaled(u, base.tensors) is None for u in group
    ):
        yield (
            f"{shown(name)}: this trainer scales the layer's bias by m / ||V|| as well, and the "
            f"base has '{shown(bias)}' for more than this part of the layer; merge with the "
            "trainer's own tool, or leave the layer out"
        )
    for update in group:
        if why := update.misfit(effective.shape):
            yield f"{shown(name)}: {why}"
        for stored in [ref for o in update.operands for ref in o.refs]:
            if not stored.dtype.mergeable:
                yield f"'{shown(stored.name)}': stored as {stored.dtype.name}, not a float"
        if (
            update.value is not None
            and not update.value.dtype.mergeable
            and (ref is None or ref.dtype is not update.value.dtype)
        ):
            yield f"'{shown(update.value.name)}': stored as {update.value.dtype.name}, not a float"
    if replaced and ref is not None and replaced[0] is not None:
        weight = next(u.weight for u in group if u.kind == "replace")
        yield from _resize_problems(name, ref, replaced[0], settings.strength * weight)


def _contradictions(name: str, group: Sequence[Update]) -> Iterator[str]:
    """Yield what keeps one adapter's updates of a tensor from having a meaning."""
    replaced = [u for u in group if u.kind == "replace"]
    products = [u for u in group if u.kind in ("lora", "dora", "magnitude")]
    if len(replaced) > 1:
        yield f"{shown(name)}: replaced {len(replaced)} times"
    if products and any(u.kind == "rows" for u in group):
        yield f"{shown(name)}: trained tokens and LoRA on one tensor have no defined order"
    whole = [u.function.what for u in group if u.function is not None]
    if len(whole) > 1 or (whole and any(u.kind in ("replace", "rows") for u in group)):
        yield f"{shown(name)}: {whole[0]}, and something else changes all of it"
    for i, update in enumerate(products):
        clash = [o for o in products[:i] if update.meets(o) and (update.normalises or o.normalises)]
        if clash:
            yield f"{shown(name)}: more than one update of which one normalises"


def _longer_names(name: str, base: Checkpoint) -> list[str]:
    """Return the base's tensors of a name with a prefix: a new tensor beside one goes unread."""
    return sorted(n for n in base.tensors if n.endswith(f".{name}"))


def _resize_problems(name: str, ref: TensorRef, value: TensorRef, strength: float) -> Iterator[str]:
    if value.shape == ref.shape:
        return
    if value.shape[1:] != ref.shape[1:] or len(value.shape) != 2:
        yield f"{shown(name)}: the base has {ref.shape}, the adapter's copy {value.shape}"
    elif _module_name(name) not in (*tying.EMBEDDINGS, *tying.HEADS):
        yield f"{shown(name)}: {ref.shape[0]} rows in the base, {value.shape[0]} in the adapter"
    elif strength != 1.0:
        yield (
            f"{shown(name)}: resized vocabulary; --strength or --weight other than 1 is not "
            "defined for it"
        )


def _check_families(base: Checkpoint, adapter: Adapter, targets: set[str]) -> None:
    """Refuse an adapter with gaps: layers alike but for their numbers are adapted all or none."""
    ends = adapter.numbered_ends
    families = {target: _family(target, ends) for target in targets}
    adapted = {family for target, family in families.items() if family != target}
    gaps = [n for n, ref in base.tensors.items()
            if n not in targets and len(ref.shape) > 1 and _family(n, ends) in adapted]  # fmt: skip
    if gaps:
        where = "adapter_config.json" if adapter.format == "peft" else "its settings"
        raise PlanError(
            f"{adapter.path}: {len(gaps)} layers like those adapted have no adapter tensors:"
            f"{listing(shown(n) for n in gaps)}\nThe adapter is incomplete. If it was trained on "
            f"some layers only, say which in layers_to_transform of {where}."
        )


def _family(name: str, ends: Iterable[str]) -> str:
    """Return what layers that differ in their number only have in common."""
    module, dot, leaf = name.rpartition(".")
    end = max((e for e in ends if f".{module}".endswith(f".{e}")), key=len, default="")
    front = module.removesuffix(end)
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", front if end else name) + (
        f"{end}{dot}{leaf}" if end else "")  # fmt: skip


def _files(
    base: Checkpoint,
    by_target: Mapping[str, Sequence[Update]],
    tied: tying.Tying,
    settings: Settings,
) -> tuple[OutputFile, ...]:
    dtype = _main_dtype(base)
    groups = [
        (file, [_step(ref.name, ref, by_target, tied, settings) for ref in file.tensors])
        for file in base.files
    ]
    new_head = [tied.new_head] if tied.new_head else []  # written even where nothing changes it
    added = [n for n in dict.fromkeys((*by_target, *new_head)) if n not in base.tensors]
    extra = [_added(name, by_target.get(name, ()), tied, dtype, settings) for name in added]
    groups[-1][1].extend(extra)
    if settings.max_shard_bytes is not None:
        return tuple(_resharded(groups, settings.max_shard_bytes))
    return tuple(_output_file(file.name, steps, file) for file, steps in groups)


def _step(
    name: str,
    ref: TensorRef,
    by_target: Mapping[str, Sequence[Update]],
    tied: tying.Tying,
    settings: Settings,
) -> Step:
    group = by_target.get(name, ())
    dtype = settings.dtype if settings.dtype and ref.dtype.mergeable else ref.dtype
    if not group:
        return Step(name, dtype, ref, status="unchanged" if dtype is ref.dtype else "cast")
    return _changed(name, dtype, tied.sources.get(name, ref), group, settings)


def _added(
    name: str, group: Sequence[Update], tied: tying.Tying, dtype: DType, settings: Settings
) -> Step:
    """Return the step for a tensor that the base does not store: an untied or a trained head."""
    source = tied.sources.get(name)
    if source is not None:
        dtype = source.dtype  # the embedding's own, which need not be that of the other tensors
    else:
        source = group[0].value
        assert source is not None, "Bug: _problems() lets only replacements be new"
    if source.dtype.mergeable:
        dtype = settings.dtype or dtype
    if not group:
        return Step(name, dtype, source, status="added")
    step = _changed(name, dtype, source, group, settings)
    return replace(step, status="added")


def _changed(
    name: str, dtype: DType, source: TensorRef, group: Sequence[Update], settings: Settings
) -> Step:
    consumes = tuple(key for update in group for key in update.source_keys)
    value = group[0].value if group[0].kind == "replace" else None
    whole = settings.strength * group[0].weight == 1.0
    if value is not None and (whole or value.shape != source.shape):
        source, group = value, group[1:]
        status: Literal["merged", "replaced"] = "merged" if group else "replaced"
    else:
        status = "merged"
    together = len({update.adapter for update in group}) > 1
    changes = tuple(
        replace(update.change(source.shape), own_norm=together and update.normalises)
        for _, own in groupby(group, key=lambda u: u.adapter)
        for update in several.weighted(list(own))
    )
    return Step(name, dtype, source, changes, consumes, status)


def _main_dtype(base: Checkpoint) -> DType:
    """Return the floating-point type that holds most of the base's bytes."""
    nbytes: dict[DType, int] = defaultdict(int)
    for ref in base.tensors.values():
        if ref.dtype.mergeable:
            nbytes[ref.dtype] += ref.nbytes
    if not nbytes:
        raise PlanError(
            f"{base.path}: holds no floating-point tensors (F64, F32, F16, BF16). "
            "Merging into quantised weights is not supported; dequantise the base first."
        )
    return max(nbytes, key=lambda d: nbytes[d])


def _output_file(name: str, steps: Sequence[Step], like: WeightFile | None = None) -> OutputFile:
    metadata = dict(like.metadata) if like else {"format": "pt"}
    # Where tensors keep their places, data keeps its offset: file systems can share the extents.
    data_start = like.data_start if like else 0
    prefix = prefix_of(name)
    entries = [(s.name.removeprefix(prefix), s.dtype, s.shape) for s in steps]
    return OutputFile(name, header_bytes(entries, metadata, data_start), tuple(steps))


def _resharded(
    groups: Sequence[tuple[WeightFile, Sequence[Step]]], max_bytes: int
) -> Iterator[OutputFile]:
    """Yield the files of each model anew, cut at ``max_bytes``."""
    for prefix in dict.fromkeys(prefix_of(file.name) for file, _ in groups):
        own = [(file, steps) for file, steps in groups if prefix_of(file.name) == prefix]
        first = own[0][0]
        shards: list[list[Step]] = [[]]
        for step in (s for _, steps in own for s in steps):
            if shards[-1] and sum(s.nbytes for s in shards[-1]) + step.nbytes > max_bytes:
                shards.append([])
            shards[-1].append(step)
        like = WeightFile("", (), first.metadata)
        for i, steps in enumerate(shards):
            yield _output_file(_shard_name(first.name, i, len(shards)), steps, like)


def _shard_name(like: str, position: int, count: int) -> str:
    """Return what a shard is called: as the base's libraries expect, variants included."""
    folder, slash, leaf = like.rpartition("/")
    known = re.match(r"(diffusion_pytorch_model|model)(\.(?!safetensors$)\w+)?(?=[-.])", leaf)
    stem = known[0] if known and (slash or known[1] != "model") else "model"
    number = f"-{position + 1:05}-of-{count:05}" if count > 1 else ""
    return f"{folder}{slash}{stem}{number}.safetensors"


def _indexes(
    base: Checkpoint, files: Sequence[OutputFile], settings: Settings
) -> dict[str, dict[str, Any]]:
    """Return the index files of all models that have shards, or had an index before."""
    found = {}
    for prefix in dict.fromkeys(prefix_of(file.name) for file in files):
        own = [file for file in files if prefix_of(file.name) == prefix]
        before = next((i for i in base.indexes if prefix_of(i.name) == prefix), None)
        if len(own) > 1 or (before is not None and settings.max_shard_bytes is None):
            name = before.name if before is not None else _index_name(own[0].name)
            found[name] = _index(before.metadata if before is not None else {}, prefix, own)
    return found


def _index_name(shard: str) -> str:
    """Return what the index of a model is called that had none."""
    folder, slash, leaf = shard.rpartition("/")
    stem, *variant = re.sub(r"-\d{5}-of-\d{5}", "", leaf).removesuffix(".safetensors").split(".")
    return f"{folder}{slash}{'.'.join([f'{stem}.safetensors.index', *variant])}.json"


def _index(metadata: Mapping[str, Any], prefix: str, files: Sequence[OutputFile]) -> dict[str, Any]:
    """Return the index file's content; ``total_size`` counts the tensors' bytes."""
    metadata = dict(metadata)
    metadata["total_size"] = sum(s.nbytes for f in files for s in f.steps)
    if "total_parameters" in metadata:
        metadata["total_parameters"] = sum(math.prod(s.shape) for f in files for s in f.steps)
    places = {
        s.name.removeprefix(prefix): f.name.rpartition("/")[2] for f in files for s in f.steps
    }
    return {"metadata": metadata, "weight_map": dict(sorted(places.items()))}


def _config_edits(
    base: Checkpoint, files: Sequence[OutputFile], tied: tying.Tying, settings: Settings
) -> dict[str, Any]:
    """Return the keys of config.json that the merge makes untrue."""
    edits: dict[str, Any] = {}
    if tied.untie:
        edits["tie_word_embeddings"] = False
    rows = {
        s.shape[0]
        for f in files
        for s in f.steps
        if s.name in base.tensors and s.shape != base.tensors[s.name].shape
    }
    if rows and base.components:
        raise PlanError(
            "the adapter resizes a vocabulary of the pipeline, which is not supported. Save the "
            "adapter without its embeddings."
        )
    if len(rows) > 1:
        raise PlanError(
            f"embedding and head would have different vocabularies: {sorted(rows)} rows. "
            "The adapter holds resized copies that do not belong together."
        )
    if rows:
        edits["vocab_size"] = rows.pop()
        ends = (*tying.HEADS, *tying.EMBEDDINGS)
        heads = [
            s
            for f in files
            for s in f.steps
            if _module_name(s.name) in ends
            and len(s.shape) == 2
            and s.shape[0] != edits["vocab_size"]
        ]
        if heads:
            raise PlanError(
                f"{shown(heads[0].name)}: has {heads[0].shape[0]} rows, but the adapter resizes "
                f"the vocabulary to {edits['vocab_size']} and brings no copy of it. Save the "
                "adapter with save_embedding_layers=True."
            )
    if settings.dtype is not None:
        edits["dtype"] = settings.dtype.torch
    return edits


def _check_ledger(adapter: Adapter, files: Sequence[OutputFile], tied: tying.Tying) -> None:
    """Every adapter tensor goes into a step, repeats one that does, or is ignored by name."""
    used = {key for file in files for step in file.steps for key in step.consumes}
    left = sorted(adapter.tensors.keys() - used - set(tied.twins) - adapter.ignored.keys())
    if left:
        raise PlanError(
            f"{adapter.path}: {len(left)} adapter tensors go nowhere:"
            f"{listing(shown(k) for k in left)}\nNothing is merged unless all of it is."
        )


def _warnings(
    base: Checkpoint, adapters: Sequence[Adapter], files: Sequence[OutputFile]
) -> Iterator[str]:
    for adapter in adapters:
        yield from adapter.doubts
        if adapter.base_name and not _same_model(adapter.base_name, base):
            said, here = shown(adapter.base_name), shown(base.model_name)
            which = "the adapter" if len(adapters) == 1 else f"'{shown(adapter.path.name)}'"
            yield f"{which} says its base is '{said}', this is '{here}'"
    added = [
        s.name
        for f in files
        for s in f.steps
        if s.status == "added" and _module_name(s.name) not in tying.HEADS
    ]
    if added:
        yield (
            f"tensors that the base has not: {', '.join(shown(n) for n in added)}; config.json "
            "still names the base's class, load the model with the class the adapter was trained on"
        )


def _same_model(said: str, base: Checkpoint) -> bool:
    """Return whether a model's name, as an adapter gives it, can be this base's."""
    names = (base.model_name, str(base.path.resolve()), str(base.config.get("_name_or_path")))
    return said.rstrip("/").split("/")[-1].lower() in (
        name.rstrip("/").split("/")[-1].lower() for name in names
    )


def _module_name(tensor: str) -> str:
    """Return the last name of the module that a tensor belongs to, e.g. "lm_head"."""
    return tensor.rpartition(".")[0].rpartition(".")[2]
