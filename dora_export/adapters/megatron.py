"""Adapters of Megatron-Bridge and NeMo, as a state dict in one file: LoRA and DoRA.

Per wrapped layer ``X``: ``X.adapter.linear_in.weight`` (r, in), ``X.adapter.linear_out.weight``
(out, r) and with DoRA ``X.adapter.weight_magnitude`` (out): ``W' = m N / ||N||`` with
``N = W + alpha / r * B A``, a norm per row, no eps. Layers are Megatron's: ``linear_qkv`` and
``linear_fc1`` are fused, and are split here onto the base's names (``row_orders.py`` splits their
rows). The bias of linear_qkv is added before the scaling and goes through it (``scaled_bias``); the
other layers' biases come after it. alpha is not in the file.

With tensor parallelism the trainer took the norms of linear_proj and linear_fc2 over each rank's
columns alone, which no single magnitude can reproduce; the file does not say, so it is a doubt.

Source: github.com/NVIDIA-NeMo/Megatron-Bridge, src/megatron/bridge/peft/dora_layers.py (DoRALinear)
and adapter_wrapper.py; src/megatron/bridge/models/llama/llama_bridge.py for the names.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from dora_export.adapters.model import Adapter, ReadOptions
from dora_export.adapters.state_dict import (
    needed_alpha,
    refuse_axis,
    sorted_parts,
    tensors_of,
)
from dora_export.errors import AdapterError, listing, shown
from dora_export.tensors import Operand, TensorRef
from dora_export.update import RowOrder, Update

PART = re.compile(
    r"(?P<module>.+)\.adapter\.(?P<part>linear_in\.weight|linear_out\.weight|weight_magnitude)"
)
LAYER = re.compile(r"(?:(?:model|module)\.)*decoder\.layers\.(?P<number>\d+)\.(?P<module>.+)")
# Megatron's layer -> Hugging Face's, with the part of the fused rows that each takes.
MODULES: Mapping[str, tuple[tuple[str, RowOrder | None], ...]] = {
    "self_attention.linear_qkv": (
        ("self_attn.q_proj", "megatron-q"),
        ("self_attn.k_proj", "megatron-k"),
        ("self_attn.v_proj", "megatron-v"),
    ),
    "self_attention.linear_proj": (("self_attn.o_proj", None),),
    "mlp.linear_fc1": (("mlp.gate_proj", "megatron-gate"), ("mlp.up_proj", "megatron-up")),
    "mlp.linear_fc2": (("mlp.down_proj", None),),
}
ROW_PARALLEL = ("self_attention.linear_proj", "mlp.linear_fc2")


def matches(path: Path, options: ReadOptions) -> bool:
    """Return whether ``path`` is a file with Megatron's adapters, or a sharded checkpoint."""
    if path.is_dir():
        return any(path.glob("*.distcp"))
    return any(".adapter.linear_" in name for name in tensors_of(path, options))


def read(path: Path, options: ReadOptions) -> Adapter:
    """Read a Megatron-Bridge or NeMo adapter.

    Raises:
        InputError: The file is malformed, or pickled without ``allow_pickle``.
        AdapterError: A sharded checkpoint; layers that are incomplete or unknown; alpha not given.
    """
    if path.is_dir():
        raise AdapterError(
            f"{path}: a sharded checkpoint (.distcp). Gather it into one file first: "
            f"python -m torch.distributed.checkpoint.format_utils dcp_to_torch {path} adapter.pt"
        )
    refuse_axis(path, options, "out", "Megatron")
    tensors = tensors_of(path, options)
    layers, others = sorted_parts(tensors, PART)
    problems = [f"unknown tensor '{shown(key)}'" for key in others]
    ranks = {_problem_or_rank(n, parts, problems) for n, parts in layers.items()} - {None}
    with_m = [n for n, parts in layers.items() if "weight_magnitude" in parts]
    if with_m and len(with_m) < len(layers):
        plain = next(n for n in layers if n not in with_m)
        problems.append(
            f"weight_magnitude is missing for {len(layers) - len(with_m)} of {len(layers)} layers "
            f"(first: {shown(plain)}); refusing to merge them as plain LoRA"
        )
    if problems:
        raise AdapterError(
            f"{path}: does not add up:{listing(sorted(problems))}\n"
            "Check that the file is a whole adapter of a text model, gathered from all ranks."
        )
    alpha = needed_alpha(path, options)
    updates = tuple(u for n, parts in layers.items() for u in _updates(n, parts, alpha))
    return Adapter(
        path=path,
        format="megatron",
        files=(path,),
        tensors=tensors,
        updates=updates,
        doubts=_doubts(with_m),
        facts={
            "method": "DoRA" if with_m else "LoRA",
            "trainer": "Megatron-Bridge or NeMo",
            "rank": sorted(r for r in ranks if r is not None),
            "alpha": [alpha],
            "scaling": sorted({round(u.scaling, 6) for u in updates}),
            "magnitude": "one per output" if with_m else "none",
        }
        | ({"axis": "out, by the format: Megatron takes the norm over dim 1"} if with_m else {}),
    )


def _problem_or_rank(name: str, parts: Mapping[str, TensorRef], problems: list[str]) -> int | None:
    """Return a layer's rank, or note what is wrong with it and return None."""
    match = LAYER.fullmatch(name)
    if match is None or match["module"] not in MODULES:
        problems.append(f"{shown(name)}: of a layer that is not known ({', '.join(MODULES)} are)")
        return None
    a, b = parts.get("linear_in.weight"), parts.get("linear_out.weight")
    if a is None or b is None:
        problems.append(f"{shown(name)}: linear_{'in' if a is None else 'out'}.weight missing")
        return None
    m = parts.get("weight_magnitude")
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1] or (
        m is not None and m.shape != b.shape[:1]
    ):  # fmt: skip
        problems.append(
            f"{shown(name)}: expected linear_in (rank, in), linear_out (out, rank) and "
            f"weight_magnitude (out,), got {a.shape}, {b.shape} and {m.shape if m else 'none'}"
        )
        return None
    return a.shape[0]


def _updates(name: str, parts: Mapping[str, TensorRef], alpha: float) -> Iterator[Update]:
    match = LAYER.fullmatch(name)
    assert match is not None, "Bug: _problem_or_rank() has checked the name"
    a, b, m = parts["linear_in.weight"], parts["linear_out.weight"], parts.get("weight_magnitude")
    for module, order in MODULES[match["module"]]:
        yield Update(
            target=f"model.layers.{match['number']}.{module}.weight",
            kind="lora" if m is None else "dora",
            source_keys=tuple(ref.name for ref in (a, b, m) if ref is not None),
            down=Operand.plain(a),
            up=Operand.plain(b),
            scaling=alpha / a.shape[0],
            magnitude=None if m is None else Operand.plain(m),
            layout="oi",
            row_order=order,
            scales_bias=m is not None and match["module"].endswith("linear_qkv"),
        )


def _doubts(with_m: list[str]) -> tuple[str, ...]:
    if not any(name.endswith(ROW_PARALLEL) for name in with_m):
        return ()
    return (
        "if the training used tensor parallelism, Megatron took the norms of linear_proj and "
        "linear_fc2 over each rank's columns alone, which merged weights cannot reproduce",
    )
