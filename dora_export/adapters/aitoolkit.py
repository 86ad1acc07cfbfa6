"""DoRA of ostris' ai-toolkit: kohya's or PEFT's names for A and B, ``.magnitude`` beside them.

Per layer ``.lora_down.weight`` (r, in), ``.lora_up.weight`` (out, r), ``.magnitude`` (out). With
alpha the rank ``W' = m V / ||V||``, ``V = W + B A``, a norm per row, no eps. Its norm leaves the
scaling out, so with another alpha ``W' = m V / ||V|| + (alpha / r - 1) B A`` (``unscaled_norm``).

Models whose files have PEFT's names (``.lora_A.weight``; all transformers) are trained with alpha
the rank. For the others the trainer does not save alpha with DoRA (its
``register_buffer("alpha")`` is commented out), so ``--alpha`` says it.

Source: github.com/ostris/ai-toolkit, toolkit/models/DoRA.py (DoRAModule.apply_dora),
toolkit/network_mixins.py (forward; get_state_dict for the names: "$$" stands for "."),
toolkit/lora_special.py (peft_format).
"""

from __future__ import annotations

from pathlib import Path

from dora_export.adapters.lycoris_layers import finite_number
from dora_export.adapters.model import Adapter, ReadOptions
from dora_export.adapters.state_dict import needed_alpha, refuse_axis, tensors_of
from dora_export.errors import AdapterError, listing, shown
from dora_export.tensors import Operand, TensorRef
from dora_export.unscaled_norm import UnscaledNorm
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
    alphas = _alphas(path, layers, options)
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
            "scaling": sorted(
                {round(alphas[m] / parts["down"].shape[0], 6) for m, parts in layers.items()}
            ),
            "magnitude": "one per output",
        },
    )


def _alphas(
    path: Path, layers: dict[str, dict[str, TensorRef]], options: ReadOptions
) -> dict[str, float]:
    """Return alpha of every layer: stored, the rank by PEFT's names, or as given."""
    # 0 stands for the rank, as for the trainer; _problem() has seen to it that these are numbers.
    stored = {m: float(finite_number(parts["alpha"])) or parts["down"].shape[0]
              for m, parts in layers.items() if "alpha" in parts}  # fmt: skip
    by_names = {m: float(parts["down"].shape[0]) for m, parts in layers.items()
                if parts["down"].name.endswith(".lora_A.weight")}  # fmt: skip
    if options.alpha is not None and (stored or len(by_names) == len(layers)):
        known = "in the file" if stored else "the rank in ai-toolkit's files of these names"
        raise AdapterError(f"{path}: alpha is {known}. Leave --alpha out.")
    known_ones = {**by_names, **stored}
    return {m: known_ones[m] if m in known_ones else needed_alpha(path, options) for m in layers}


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
    if "alpha" in parts and isinstance(why := finite_number(parts["alpha"]), str):
        return f"{shown(module)}: {why}"
    return None


def _update(module: str, parts: dict[str, TensorRef], alpha: float) -> Update:
    a, b, m = parts["down"], parts["up"], parts["m"]
    keys = [parts[p].name for p in ("down", "up", "m", "alpha") if p in parts]
    target, scaling = f"{module}.weight", alpha / a.shape[0]
    if scaling != 1.0:
        made = UnscaledNorm(Operand.vector(m), Operand.plain(a), Operand.plain(b), scaling)
        return Update(target, "function", tuple(keys), function=made, layout="oi")
    return Update(
        target=target,
        kind="dora",
        source_keys=tuple(keys),
        down=Operand.plain(a),
        up=Operand.plain(b),
        magnitude=Operand.vector(m),
        layout="oi",
    )
