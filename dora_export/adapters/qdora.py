"""QDoRA adapters of fsdp_qlora, as a state dict in one file.

Per layer ``X``: ``X.dora_layer.lora_A.weight`` (r, in), ``X.dora_layer.lora_B.weight`` (out, r)
and ``X.magnitude_layer.magnitude`` (out): ``W' = m N / ||N||`` with ``N = W + B A``, a norm per
row, scaling 1, no eps. The layer's bias is scaled by ``m / ||N||`` as well (``scaled_bias``). W is
what the quantised base dequantises to.

Source: github.com/AnswerDotAI/fsdp_qlora, scripts/dora.py, classes DORA and DORALayer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from dora_export.adapters.model import Adapter, ReadOptions
from dora_export.adapters.state_dict import refuse_axis, sorted_parts, tensors_of
from dora_export.errors import AdapterError, listing, shown
from dora_export.tensors import Operand, TensorRef
from dora_export.update import Update

WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module)\.")
PART = re.compile(
    r"(?P<module>.+)\."
    r"(?P<part>dora_layer\.lora_A\.weight|dora_layer\.lora_B\.weight|magnitude_layer\.magnitude)"
)
A, B, M = "dora_layer.lora_A.weight", "dora_layer.lora_B.weight", "magnitude_layer.magnitude"


def matches(path: Path, options: ReadOptions) -> bool:
    """Return whether ``path`` is a file with QDoRA's layers."""
    names = tensors_of(path, options)
    return any(n.endswith((f".{A}", f".{M}")) for n in map(_plain, names))


def read(path: Path, options: ReadOptions) -> Adapter:
    """Read a QDoRA adapter.

    Raises:
        InputError: The file is malformed, or pickled without ``allow_pickle``.
        AdapterError: A layer is incomplete, misshapen or unknown.
    """
    refuse_axis(path, options, "out", "QDoRA")
    if options.alpha is not None:
        raise AdapterError(f"{path}: QDoRA uses no alpha. Leave --alpha out.")
    tensors = tensors_of(path, options)
    layers, others = sorted_parts({_plain(n): ref for n, ref in tensors.items()}, PART)
    problems = [f"unknown tensor '{shown(key)}'" for key in others]
    for name, parts in layers.items():
        problems += _problems(name, parts)
    if problems:
        raise AdapterError(f"{path}: does not add up:{listing(sorted(problems))}\n"
                           "Check that the file is a whole adapter.")  # fmt: skip
    updates = tuple(_update(name, parts) for name, parts in layers.items())
    return Adapter(
        path=path,
        format="qdora",
        files=(path,),
        tensors=tensors,
        updates=updates,
        doubts=("QDoRA trains on a quantised base; merge onto the weights that it dequantises to",),
        facts={
            "method": "DoRA",
            "trainer": "fsdp_qlora, QDoRA",
            "axis": "out, by the format: QDoRA takes the norm over dim 1",
            "rank": sorted({u.rank for u in updates if u.rank is not None}),
            "scaling": [1.0],
            "magnitude": "one per output",
        },
    )


def _plain(name: str) -> str:
    """Return a name without the segments of the training loop's wrappers."""
    return WRAPPERS.sub("", name)


def _problems(name: str, parts: Mapping[str, TensorRef]) -> list[str]:
    missing = [p for p in (A, B, M) if p not in parts]
    if missing:
        return [f"{shown(name)}: {', '.join(missing)} missing"]
    a, b, m = parts[A].shape, parts[B].shape, parts[M].shape
    if len(a) != 2 or len(b) != 2 or a[0] != b[1] or m != b[:1]:
        return [
            f"{shown(name)}: expected lora_A (rank, in), lora_B (out, rank) and magnitude (out,), "
            f"got {a}, {b} and {m}"
        ]
    return []


def _update(name: str, parts: Mapping[str, TensorRef]) -> Update:
    return Update(
        target=f"{name}.weight",
        kind="dora",
        source_keys=tuple(parts[p].name for p in (A, B, M)),
        down=Operand.plain(parts[A]),
        up=Operand.plain(parts[B]),
        magnitude=Operand.plain(parts[M]),
        layout="oi",
        scales_bias=True,
    )
