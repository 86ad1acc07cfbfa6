"""DoRA of ostris' ai-toolkit: kohya's names for A and B, ``.magnitude`` beside them.

Per layer ``.lora_down.weight`` (r, in), ``.lora_up.weight`` (out, r), ``.magnitude`` (out):
``W' = m V / ||V||`` with ``V = W + alpha / r * B A``, a norm per row, no eps. The trainer does not
save alpha with DoRA (its ``register_buffer("alpha")`` is commented out), so ``--alpha`` says it.

Source: github.com/ostris/ai-toolkit, toolkit/models/DoRA.py (DoRAModule.apply_dora),
toolkit/network_mixins.py (names on saving: "$$" stands for ".").
"""

from __future__ import annotations

from pathlib import Path

from dora_export.adapters.lycoris_layers import number
from dora_export.adapters.model import Adapter, ReadOptions
from dora_export.adapters.state_dict import needed_alpha, refuse_axis, tensors_of
from dora_export.errors import AdapterError, listing, shown
from dora_export.tensors import Operand, TensorRef
from dora_export.update import Update

PARTS = {
    ".lora_down.weight": "down", ".lora_A.weight": "down",
    ".lora_up.weight": "up", ".lora_B.weight": "up",
    ".magnitude": "m", ".alpha": "alpha",
}  # fmt: skip


def matches(path: Path, options: ReadOptions) -> bool:
    """Return whether ``path`` is a file with such layers, by the names of its tensors."""
    names = tensors_of(path, options)
    modules = {n.removesuffix(".magnitude") for n in names if n.endswith(".magnitude")}
    return any(f"{m}{end}" in names for m in modules for end, part in PARTS.items() if part == "up")


def read(path: Path, options: ReadOptions) -> Adapter:
    """Read a DoRA file of ai-toolkit.

    Raises:
        InputError: The file is malformed.
        AdapterError: alpha is not known, a layer is incomplete, or a tensor is unknown; all of a
            kind are listed.
    """
    tensors = tensors_of(path, options)
    layers: dict[str, dict[str, TensorRef]] = {}
    problems = []
    for name, ref in tensors.items():
        ending = next((e for e in PARTS if name.endswith(e)), None)
        if ending is None:
            problems.append(f"unknown tensor '{shown(name)}'")
        elif PARTS[ending] in (parts := layers.setdefault(name.removesuffix(ending), {})):
            problems.append(f"'{shown(name)}': its tensor is there twice")
        else:
            parts[PARTS[ending]] = ref
    problems += [p for module, parts in layers.items() if (p := _problem(module, parts))]
    if problems:
        raise AdapterError(f"{path}: does not add up:{listing(sorted(problems))}")
    refuse_axis(path, options, "out", "ai-toolkit's DoRA")
    stored = {m: number(parts["alpha"]) for m, parts in layers.items() if "alpha" in parts}
    if stored and options.alpha is not None:
        raise AdapterError(f"{path}: alpha is in the file. Leave --alpha out.")
    alphas = {m: stored[m] if m in stored else needed_alpha(path, options) for m in layers}
    updates = tuple(_update(m, parts, alphas[m]) for m, parts in layers.items())
    return Adapter(
        path=path,
        format="ai-toolkit",
        files=(path,),
        tensors=tensors,
        updates=updates,
        naming="flat",
        facts={
            "method": "DoRA",
            "trainer": "ai-toolkit",
            "axis": "out, by the format: ai-toolkit takes the norm over dim 1",
            "rank": sorted({parts["down"].shape[0] for parts in layers.values()}),
            "alpha": sorted(set(alphas.values())),
            "scaling": sorted({round(u.scaling, 6) for u in updates}),
            "magnitude": "one per output",
        },
    )


def _problem(module: str, parts: dict[str, TensorRef]) -> str | None:
    if missing := [p for p in ("down", "up", "m") if p not in parts]:
        words = {"down": "lora_down", "up": "lora_up", "m": "magnitude"}
        return (
            f"{shown(module)}: {', '.join(words[p] for p in missing)} missing; refusing to merge a "
            "part of a layer"
        )
    a, b, m = parts["down"], parts["up"], parts["m"]
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1]:
        return f"{shown(module)}: lora_down is {a.shape} and lora_up {b.shape}, expected two ranks"
    if m.size != b.shape[0]:
        return f"{shown(module)}: magnitude is {m.shape}, expected one for each of {b.shape[0]}"
    if "alpha" in parts and parts["alpha"].size != 1:
        return f"{shown(module)}: alpha is {parts['alpha'].shape}, expected one number"
    return None


def _update(module: str, parts: dict[str, TensorRef], alpha: float) -> Update:
    a, b, m = parts["down"], parts["up"], parts["m"]
    keys = [parts[p].name for p in ("down", "up", "m", "alpha") if p in parts]
    return Update(
        target=f"{module}.weight",
        kind="dora",
        source_keys=tuple(keys),
        down=Operand.plain(a),
        up=Operand.plain(b),
        scaling=alpha / a.shape[0],
        magnitude=Operand.vector(m),
        layout="oi",
    )
