"""Single files of LyCORIS, kohya's sd-scripts, OneTrainer and ComfyUI.

Per module one algorithm: LoRA/LoCon, LoHa or LoKr (with or without Tucker cores), a whole
difference (``diff``, ``diff_b``; ``w_norm``, ``b_norm`` for norms), or a whole weight
(``set_weight``). Their factors are in ``lycoris_factors``, their names in ``lycoris_keys``.

Scaling is alpha / rank. A missing alpha, or 0, is the rank; rs_lora is folded into alpha on saving,
``scalar`` into the factors. The rank of LoKr is that of w2's factors, else of w1's; with both whole
the scaling is 1, whatever alpha says. What sd-scripts trained with split_qkv has the rank of one
of the layers that a fused one was trained as, not of all of them together.

``dora_scale`` makes it DoRA: ``W' = m V / (||V|| + eps)`` with ``V = W + scaling * delta``. Its
shape says what it counts: ``(out, 1, ...)`` outputs, with the norm over all else, ``(1, in, ...)``
inputs, with the norm over outputs and kernel. eps is that of the type the trainer normalised in:
LyCORIS that of its parameters, OneTrainer float32. Merging copies none of what differs from these
forwards elsewhere: LyCORIS' merge_to casts everything to the base's type and applies LoHa's and
LoKr's scaling twice, ComfyUI divides by ``||W||`` for magnitudes of outputs.

Sources: github.com/KohakuBlueleaf/LyCORIS, lycoris/modules/{locon,loha,lokr,full,norms}.py
(``forward``) and functional/general.py, weight_decompose; github.com/kohya-ss/sd-scripts,
networks/lora.py; github.com/Nerogar/OneTrainer, modules/module/LoRAModule.py;
github.com/comfyanonymous/ComfyUI, comfy/lora.py and comfy/weight_adapter.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from dora_export.adapters import diffusers_metadata
from dora_export.adapters import lycoris_keys as keys
from dora_export.adapters.lycoris_layers import (
    EPS,
    FACTORED,
    NUMBERS,
    Layer,
    Told,
    kronecker_rank,
    layer_of,
)
from dora_export.adapters.lycoris_metadata import Said, contradictions, said_by
from dora_export.adapters.model import Adapter, ReadOptions
from dora_export.adapters.state_dict import tensors_of
from dora_export.errors import AdapterError, listing, shown
from dora_export.flat_names import FLAT_PREFIXES, prefix_of
from dora_export.storage.paths import contained
from dora_export.storage.safetensors import read_header
from dora_export.update import Update

FUSED_BY_ONETRAINER = ("qkv", "linear1")
WORDS = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}  # of --trained-in


def matches(path: Path, options: ReadOptions) -> bool:
    """Return whether ``path`` is such a file, or a folder with one and no config."""
    file = _file(path)
    if file is None or not keys.is_family(tensors_of(file, options)):
        return False
    return not diffusers_metadata.has_other_method(file)  # PEFT's, under the same names


def read(path: Path, options: ReadOptions) -> Adapter:
    """Read an adapter of this family.

    Raises:
        InputError: The file is malformed, or pickled without ``allow_pickle``.
        AdapterError: An algorithm is not supported, a layer is incomplete, misshapen or ambiguous,
            or the metadata contradicts the tensors.
    """
    file = _file(path)
    if file is None:
        raise AdapterError(f"{path}: not a weight file. Pass the .safetensors file itself.")
    tensors = tensors_of(file, options)
    metadata = read_header(file).metadata if file.suffix == ".safetensors" else {}
    said, found = said_by(metadata), keys.sort(tensors)
    _refuse_unknown(path, found)
    _check_alpha(path, found, options)
    doubts: list[str] = []
    ranks = {r for parts in found.layers.values() if (r := kronecker_rank(parts)) is not None}
    eps = _eps(path, found, said, options)
    told = Told(options.alpha, options.axis, eps, said.rs_lora, said.split_qkv, ranks)
    layers, problems = [], [f"'{shown(name)}': its tensor is there twice" for name in found.twice]
    for module, parts in found.layers.items():
        layer = layer_of(module, parts, told)
        if isinstance(layer, str):
            problems.append(f"{shown(module)}: {layer}")
        else:
            layers.append(layer)
    if problems:
        raise AdapterError(f"{path}: does not add up:{listing(sorted(problems))}")
    _refuse_contradictions(path, said, layers)
    doubts += _gaps(layers)
    doubts += _perhaps_untrained(said, layers)
    if found.bundled:
        doubts.append(f"{len(found.bundled)} embeddings are saved along; they are not merged")
    return Adapter(
        path=path,
        format="lycoris",
        files=(file,),
        tensors=tensors,
        updates=tuple(u for layer in layers for u in layer.updates),
        ignored={
            **dict.fromkeys(found.bundled, "an embedding for prompts, not a change of weights"),
            **{k: why for layer in layers for k, why in (layer.ignored or {}).items()},
        },
        naming="flat",
        doubts=tuple(doubts),
        facts=_facts(said, layers, found.layers),
    )


def _file(path: Path) -> Path | None:
    """Return the weight file that ``path`` is, or that is alone in the folder it is."""
    if path.is_file():
        return path
    found = sorted(path.glob("*.safetensors")) if path.is_dir() else []
    configs = any((path / name).exists() for name in ("adapter_config.json", "config.json"))
    return contained(found[0], path) if len(found) == 1 and not configs else None


def _refuse_unknown(path: Path, found: keys.Sorted) -> None:
    if found.refused:
        lines = [
            f"{algorithm}: {keys.WHY_REFUSED[algorithm]} ({len(names)} tensors, e.g. "
            f"'{shown(names[0])}')"
            for algorithm, names in found.refused.items()
        ]
        raise AdapterError(
            f"{path}: not supported:{listing(lines)}\nMerge with the trainer's own tool."
        )
    if found.unknown:
        raise AdapterError(
            f"{path}: {len(found.unknown)} tensors of unknown meaning:"
            f"{listing(map(shown, sorted(found.unknown)))}\nNothing is merged unless all of it is. "
            "Check that the file is an adapter of LyCORIS, kohya, OneTrainer or ComfyUI."
        )


def _check_alpha(path: Path, found: keys.Sorted, options: ReadOptions) -> None:
    alphas = [p["alpha"] for p in found.layers.values() if "alpha" in p]
    if options.alpha is not None and alphas:
        raise AdapterError(f"{path}: alpha is in the file. Leave --alpha out.")
    if options.alpha is not None and (not math.isfinite(options.alpha) or options.alpha == 0):
        raise AdapterError(f"--alpha {options.alpha}: expected a finite number other than 0.")
    if wrong := [a for a in alphas if a.size != 1 or a.dtype.name not in NUMBERS]:
        raise AdapterError(
            f"{path}: '{shown(wrong[0].name)}' is {wrong[0].shape} {wrong[0].dtype.name}, expected "
            "one number. The file is malformed."
        )


def _eps(path: Path, found: keys.Sorted, said: Said, options: ReadOptions) -> float | None:
    """Return what the trainer added to norms, None: the eps of each magnitude's type.

    A magnitude in a type of 16 bits was trained in it, or in float32 and rounded on saving.

    Raises:
        AdapterError: Which of the two, neither metadata nor user say.
    """
    if options.trained_in is not None:
        if options.trained_in not in WORDS:
            raise AdapterError(
                f"--trained-in {options.trained_in}: unknown. Expected {', '.join(WORDS)}."
            )
        return EPS[WORDS[options.trained_in]]
    if said.eps is False:
        return 0.0
    if said.as_trained:
        return None
    if said.half is not None:
        return EPS[WORDS[said.half]]
    short = {
        parts["dora_scale"].dtype.name
        for parts in found.layers.values()
        if "dora_scale" in parts and parts["dora_scale"].dtype.itemsize == 2
    }
    for name in sorted(short):
        word = next(w for w, n in WORDS.items() if n == name)
        raise AdapterError(
            f"{path}: dora_scale is stored as {name}, and the trainer added the eps of the type it "
            f"trained in to norms: {EPS[name]:.2g} if that was {name}, {EPS['F32']:.2g} if it was "
            "F32 and the file was rounded on saving. Its metadata does not say. Pass "
            f"--trained-in {word} (kohya: --full_{word}) or --trained-in fp32."
        )
    return None


def _refuse_contradictions(path: Path, said: Said, layers: Iterable[Layer]) -> None:
    layers = list(layers)
    found = contradictions(
        said,
        Counter(layer.algorithm for layer in layers),
        Counter(u.axis for u in _decomposed_updates(layers)),
    )
    if found:
        raise AdapterError(
            f"{path}: its metadata contradicts its tensors:{listing(found)}\nGet the file as it "
            "was trained. If the tensors are right, save them without metadata."
        )


def _gaps(layers: Iterable[Layer]) -> Iterator[str]:
    """Yield what some layers lack and others like them have: trained so, or lost."""
    factored = [layer for layer in layers if layer.algorithm in FACTORED]
    for what, count, then in (
        (
            "dora_scale",
            sum(layer.evidence is None for layer in factored),
            "merged as plain updates",
        ),
        ("alpha", sum(layer.alpha is None for layer in factored), "their rank is taken for it"),
    ):
        if 0 < count < len(factored):
            yield f"{count} of {len(factored)} layers have no {what}, {then}; others have one"


def _perhaps_untrained(said: Said, layers: Iterable[Layer]) -> Iterator[str]:
    """Yield which magnitudes OneTrainer may have left out of its forward.

    Source: github.com/Nerogar/OneTrainer, modules/module/FusedModule.py, _leaf_output, and commit
    a56c299f, since when DoRAModule.delta_forward is None.
    """
    fused = [
        layer.updates[0].target.removesuffix(".weight")
        for layer in layers
        if layer.algorithm == "LoRA" and layer.evidence is not None
    ]
    fused = [module for module in fused if module.endswith(FUSED_BY_ONETRAINER)]
    if said.trainer == "OneTrainer" and fused:
        yield (
            f"OneTrainer of July 2026 trained DoRA of layers that it fuses ({len(fused)} here, "
            f"first {shown(fused[0])}) as plain LoRA and left their dora_scale as it began. It is "
            "applied; if the file is from then, take these layers' dora_scale out of it"
        )


def _decomposed_updates(layers: Iterable[Layer]) -> Iterator[Update]:
    return (u for layer in layers for u in layer.updates if u.normalises)


def _facts(said: Said, layers: list[Layer], modules: Iterable[str]) -> dict[str, Any]:
    magnitudes = list(_decomposed_updates(layers))
    algorithms = Counter(layer.algorithm for layer in layers)
    main = next((a for a in FACTORED if a in algorithms), next(iter(algorithms)))
    products = [u for layer in layers for u in layer.updates if u.kind in ("lora", "dora")]
    prefixes = sorted({prefix_of(m) for m in modules})
    return {
        "method": "DoRA" if magnitudes else main,
        "algorithm": ", ".join(f"{name} ({n})" for name, n in algorithms.items()),
        "trainer": said.trainer or _trainer_by_names(prefixes),
        **({"axis": _axis(layers)} if magnitudes else {}),
        "rank": sorted({r for layer in layers if (r := layer.rank) is not None}),
        "alpha": sorted({a for layer in layers if (a := layer.alpha) is not None}),
        "scaling": sorted({u.scaling for u in products}),
        "rslora": bool(said.rs_lora),
        "magnitude": " and ".join(f"one per {axis}put" for axis in sorted(
            {u.axis for u in magnitudes}, reverse=True)) or "none",
        **({"eps": sorted({u.eps for u in magnitudes})} if magnitudes else {}),
        "prefixes": prefixes,
        **({"base": said.base} if said.base else {}),
    }  # fmt: skip


def _axis(layers: Iterable[Layer]) -> str:
    """Return the axis and its evidence, e.g. "in, by the shape of dora_scale (12 layers)"."""
    found = Counter(
        (u.axis, layer.evidence) for layer in layers for u in layer.updates if u.normalises
    )
    return "; ".join(f"{axis}, {why} ({n} layers)" for (axis, why), n in found.items())


def _trainer_by_names(prefixes: Iterable[str]) -> str:
    flat = [p for p in prefixes if p in FLAT_PREFIXES]
    if flat == ["lycoris"]:
        return "LyCORIS, by the prefix of its names"
    return "kohya, LyCORIS or OneTrainer" if flat else "a file for ComfyUI"
