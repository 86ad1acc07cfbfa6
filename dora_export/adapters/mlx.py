"""MLX adapters: folders of mlx-lm and mlx-vlm, LoRA, DoRA, and layers trained whole.

A folder holds ``adapter_config.json`` and ``adapters.safetensors``. With ``s`` the config's
``scale``, used as it is (not divided by the rank):

========================= ============================== ======================================
linear layer              ``lora_a`` (in, r)             ``N = W + s (lora_a lora_b).T``
                          ``lora_b`` (r, out)            ``W' = m N / ||N||``, norm per row, no eps
embedding                 ``lora_a`` (tokens, r)         ``N = W + s lora_a lora_b``
                          ``lora_b`` (r, dim)            m and norm per token, not per dimension
experts (switch layer)    ``lora_a`` (experts, r, in)    ``N[e] = W[e] + s lora_b[e] lora_a[e]``
                          ``lora_b`` (experts, out, r)   no DoRA
fine_tune_type "full"     the parameters themselves
========================= ============================== ======================================

Earlier versions: mlx-lm multiplied ``scale`` by ``alpha / rank`` where the config has an alpha;
switch layers kept ``lora_a`` as (experts * r, in); mlx-vlm stored ``A`` (in, r) and ``B`` (r, out)
with a config of ``rank`` and ``alpha`` and used alpha first as it is, later divided by the rank.

Source: github.com/ml-explore/mlx-lm 0.32.2, mlx_lm/tuner/{lora,dora,utils}.py and mlx_lm/lora.py;
github.com/Blaizzy/mlx-vlm, mlx_vlm/trainer/{utils,lora,adapter_utils}.py.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dora_export.adapters.config_files import CONFIG, config_of
from dora_export.adapters.model import Adapter, ReadOptions
from dora_export.checkpoints.folder import read_json
from dora_export.errors import AdapterError, InputError, listing, shown
from dora_export.storage import read_tensors
from dora_export.storage.json_file import is_number, is_rank
from dora_export.storage.paths import contained
from dora_export.tensors import Operand, TensorRef
from dora_export.update import Update

WEIGHTS = "adapters.safetensors"
PART = re.compile(r"(?P<module>.+)\.(?P<part>lora_a|lora_b|m|A|B)")
NAMES = {"A": "lora_a", "B": "lora_b"}  # early mlx-vlm's, and today's
SETTINGS = {"rank", "scale", "alpha", "dropout", "keys"}
EMBEDDINGS = frozenset(
    """embed_tokens wte word_embeddings tok_embeddings embed_in embeddings embedding
    wpe""".split()
)
# Models whose norm weights mlx-lm stores with one added: mlx_lm/models/*.py, sanitize().
SHIFTED_NORMS = ("qwen3_next", "qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text",
                 "step3p5")  # fmt: skip


@dataclass(frozen=True)
class _Config:
    """What the config says of the numbers.

    Attributes:
        kind: "lora", "dora" or "full".
        rank: Rank of every layer, or None.
        scaling: Factor on the product, or None.
        trainer: For people.
        base_name: The model it was trained on, or None.
    """

    kind: str
    rank: int | None
    scaling: float | None
    trainer: str
    base_name: str | None


def matches(path: Path, options: ReadOptions) -> bool:
    """Return whether ``path`` is an MLX adapter folder, its config, or a weight file in one."""
    return config_of(path, "mlx", (f"*{WEIGHTS}",)) is not None


def read(path: Path, options: ReadOptions) -> Adapter:
    """Read an MLX adapter folder; with a weight file as ``path``, that checkpoint of the training.

    Raises:
        InputError: The config or the weights are missing or malformed.
        AdapterError: A setting or a tensor that contradicts the others, or is not known; all are
            listed.
    """
    config_path = config_of(path, "mlx", (f"*{WEIGHTS}",))
    if config_path is None:
        raise InputError(f"{path}: no {CONFIG} of MLX. Check that this is the adapter's folder.")
    if options.axis == "in":
        raise AdapterError(
            f"{config_path}: MLX has one magnitude per output row (per token for an embedding). "
            "Leave --axis out."
        )
    config = _parse(config_path, read_json(config_path), options)
    weights = path if path.name.endswith(WEIGHTS) else config_path.parent / WEIGHTS
    if not weights.is_file():
        raise InputError(
            f"{weights.parent}: has {CONFIG} but no {WEIGHTS}. Copy the whole adapter folder; "
            "an adapters.npz of an early mlx-lm has to be saved again as safetensors."
        )
    tensors = read_tensors(contained(weights, weights.parent), allow_pickle=options.allow_pickle)
    problems: list[str] = []
    updates = tuple(_updates(tensors, config, problems))
    if problems:
        raise AdapterError(
            f"{weights}: does not add up:{listing(sorted(problems))}\n"
            f"Check that the folder holds one whole adapter with the {CONFIG} of its training."
        )
    if not updates:
        raise AdapterError(f"{weights}: holds no tensors. Check how the adapter was saved.")
    return Adapter(
        path=path,
        format="mlx",
        files=(weights,),
        tensors=tensors,
        updates=updates,
        folder=config_path.parent,
        base_name=config.base_name,
        # A tied embedding is the head as well, through the same adapted weight (as_linear).
        ensure_weight_tying=config.kind != "full",
        not_for=dict.fromkeys(
            SHIFTED_NORMS, "mlx-lm keeps this model's norm weights with one added"
        )
        if any(len(u.value.shape) == 1 for u in updates if u.value)
        else {},
        facts=_facts(config, updates),
    )


def _parse(path: Path, raw: Mapping[str, Any], options: ReadOptions) -> _Config:
    early_vlm = "rank" in raw and "lora_parameters" not in raw
    kind = raw.get("fine_tune_type", "lora")
    if kind not in ("lora", "dora", "full"):
        raise AdapterError(f"{path}: fine_tune_type '{shown(kind)}'. Expected lora, dora or full.")
    base = raw.get("model")
    base_name = base if isinstance(base, str) else None
    if kind == "full":
        if options.alpha is not None:
            raise AdapterError(f"{path}: layers trained whole have no scaling. Leave --alpha out.")
        return _Config(kind, None, None, "MLX, layers trained whole", base_name)
    settings = raw if early_vlm else raw.get("lora_parameters")
    if not isinstance(settings, Mapping):
        raise AdapterError(f"{path}: lora_parameters is missing. Check that the file is whole.")
    unknown = [] if early_vlm else sorted(set(settings) - SETTINGS)
    if unknown:
        raise AdapterError(
            f"{path}: unknown lora_parameters {', '.join(map(shown, unknown))}, which may change "
            "the weights. Take them out if they do not."
        )
    rank = settings.get("rank")
    if not is_rank(rank):
        raise AdapterError(f"{path}: rank '{shown(rank)}'. Expected a positive whole number.")
    trainer = "mlx-vlm, early" if early_vlm else "mlx-lm or mlx-vlm"
    return _Config(kind, rank, _scaling(path, settings, rank, options), trainer, base_name)


def _scaling(path: Path, settings: Mapping[str, Any], rank: int, options: ReadOptions) -> float:
    """Return the factor on the product; with ``--alpha``, alpha / rank."""
    for name in ("scale", "alpha"):
        value = settings.get(name, 1.0)
        if not is_number(value) or value == 0:
            raise AdapterError(f"{path}: {name} '{shown(value)}'. Expected a number other than 0.")
    scale, alpha = settings.get("scale"), settings.get("alpha")
    if scale is not None and alpha in (None, rank):
        if options.alpha is not None:
            raise AdapterError(f"{path}: scale is in this file. Leave --alpha out.")
        return float(scale)
    if options.alpha is not None:
        if not math.isfinite(options.alpha) or options.alpha == 0:
            raise AdapterError(f"--alpha {options.alpha}: expected a finite number other than 0.")
        return options.alpha / rank
    if alpha is None:
        raise AdapterError(
            f"{path}: neither scale nor alpha is in this file. Pass --alpha with the numerator of "
            f"the scaling: its factor on the product is alpha / {rank}."
        )
    if scale is None:
        raise AdapterError(
            f"{path}: alpha {alpha:g} and no scale: early versions of mlx-vlm used alpha as it is, "
            f"later ones alpha / rank. Pass --alpha {alpha * rank:g} for the former, "
            f"--alpha {alpha:g} for the latter."
        )
    raise AdapterError(
        f"{path}: both scale {scale:g} and alpha {alpha:g}: early versions of mlx-lm used "
        f"scale * alpha / rank, later ones scale alone. Pass --alpha {scale * alpha:g} for the "
        f"former, --alpha {scale * rank:g} for the latter."
    )


def _updates(
    tensors: Mapping[str, TensorRef], config: _Config, problems: list[str]
) -> Iterator[Update]:
    if config.kind == "full":
        yield from _whole(tensors, problems)
        return
    layers: dict[str, dict[str, TensorRef]] = defaultdict(dict)
    for key, ref in tensors.items():
        match = PART.fullmatch(key)
        if match is None:
            problems.append(
                f"'{shown(key)}' is no part of a LoRA layer; modules trained whole beside LoRA "
                "(mlx-vlm's train_vision) are not supported"
            )
            continue
        layers[match["module"]][NAMES.get(match["part"], match["part"])] = ref
    for module, parts in layers.items():
        yield from _layer(module, parts, config, problems)


def _layer(
    module: str, parts: Mapping[str, TensorRef], config: _Config, problems: list[str]
) -> Iterator[Update]:
    missing = [p for p in ("lora_a", "lora_b") if p not in parts]
    if missing:
        problems.append(f"{shown(module)}: {', '.join(missing)} missing")
        return
    a, b, m = parts["lora_a"], parts["lora_b"], parts.get("m")
    if (m is not None) != (config.kind == "dora"):
        problems.append(
            f"{shown(module)}: {'has' if m else 'no'} m, but fine_tune_type is {config.kind}; "
            + ("refusing to drop it" if m else "refusing to merge it as plain LoRA")
        )
        return
    if len(b.shape) == 3:
        yield from _experts(module, a, b, m, config, problems)
        return
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[1] != config.rank or (
        b.shape[0] != config.rank
    ):  # fmt: skip
        problems.append(
            f"{shown(module)}: rank {config.rank} by the config needs lora_a (in, rank) and "
            f"lora_b (rank, out), got {a.shape} and {b.shape}"
        )
        return
    embedding = module.rpartition(".")[2] in EMBEDDINGS
    rows = a.shape[0] if embedding else b.shape[1]
    if m is not None and m.shape != (rows,):
        what = "token" if embedding else "output"
        problems.append(f"{shown(module)}: m is {m.shape}, expected ({rows},), one per {what}")
        return
    first, second = Operand.plain(a), Operand.plain(b)
    yield Update(
        target=f"{module}.weight",
        kind="lora" if m is None else "dora",
        source_keys=tuple(ref.name for ref in (a, b, m) if ref is not None),
        down=second if embedding else first.T,
        up=first if embedding else second.T,
        scaling=_known(config),
        magnitude=None if m is None else Operand.vector(m),
        layout="oi",
    )


def _known(config: _Config) -> float:
    assert config.scaling is not None, "Bug: only layers trained whole have no scaling"
    return config.scaling


def _experts(
    module: str,
    a: TensorRef,
    b: TensorRef,
    m: TensorRef | None,
    config: _Config,
    problems: list[str],
) -> Iterator[Update]:
    count, _, rank = b.shape
    if len(a.shape) == 2 and count * rank == a.shape[0]:
        a = a.reshaped(count, rank, a.shape[1])
    if m is not None or rank != config.rank or a.shape[:2] != (count, rank) or len(a.shape) != 3:
        problems.append(
            f"{shown(module)}: rank {config.rank} by the config needs lora_a (experts, rank, in), "
            f"lora_b (experts, out, rank) and no m, got {a.shape} and {b.shape}"
        )
        return
    for expert in range(count):
        yield Update(
            target=f"{module}.weight",
            kind="lora",
            source_keys=(a.name, b.name),
            down=Operand.plain(a.rows(expert, expert + 1).reshaped(*a.shape[1:])),
            up=Operand.plain(b.rows(expert, expert + 1).reshaped(*b.shape[1:])),
            scaling=_known(config),
            layout="oi",
            index=expert,
        )


def _whole(tensors: Mapping[str, TensorRef], problems: list[str]) -> Iterator[Update]:
    for key, ref in tensors.items():
        if key.endswith((".scales", ".biases")):
            problems.append(f"'{shown(key)}': of a quantised layer; save the model dequantised")
        elif len(ref.shape) > 2:
            problems.append(
                f"'{shown(key)}' {ref.shape}: MLX stores convolutions and stacked experts in an "
                "order of its own; merge with mlx_lm.fuse"
            )
        else:
            yield Update(target=key, kind="replace", source_keys=(key,), value=ref)


def _facts(config: _Config, updates: tuple[Update, ...]) -> dict[str, object]:
    facts: dict[str, object] = {
        "method": {"dora": "DoRA", "lora": "LoRA", "full": "full fine-tune"}[config.kind],
        "trainer": config.trainer,
        "magnitude": "none",
    }
    if config.kind == "full":
        return facts | {"modules_to_save": sorted(u.target for u in updates)}
    facts |= {"rank": [config.rank], "scaling": [config.scaling]}
    if config.kind == "dora":
        facts["magnitude"] = "one per output"
        facts["axis"] = "out, by the format: MLX takes the norm over axis 1 of (out, in)"
    return facts
