"""One module's tensors in a file of LyCORIS, kohya, OneTrainer or ComfyUI, as updates.

Sources: as in ``lycoris``.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import numpy as np

from dora_export.adapters import lycoris_factors as factors
from dora_export.adapters import lycoris_keys as keys
from dora_export.adapters.lycoris_axis import axis_of
from dora_export.adapters.lycoris_factors import Parts
from dora_export.tensors import Operand, TensorRef
from dora_export.update import Axis, Dense, Update

ALGORITHMS = {
    "LoRA": ("up", "down", "mid"),
    "LoHa": tuple(p for p in keys.ENDINGS.values() if p.startswith("hada_")),
    "LoKr": tuple(p for p in keys.ENDINGS.values() if p.startswith("lokr_")),
    "full": ("diff",),
    "norm": ("w_norm",),
    "whole weight": ("set_weight",),
}
FACTORED = ("LoRA", "LoHa", "LoKr")
BIASES = ("diff_b", "b_norm")
# torch.finfo(dtype).eps by the dtype's name.
EPS = {"F64": 2.0**-52, "F32": 2.0**-23, "F16": 2.0**-10, "BF16": 2.0**-7}
NUMBERS = (*EPS, "I64", "I32")  # types that alpha is stored in
# Flux' fused layers: how their rows are shared by what sd-scripts trains apart with split_qkv.
SPLIT = {"attn_qkv": (1, 1, 1), "attn.qkv": (1, 1, 1), "linear1": (1, 1, 1, 4)}


@dataclass(frozen=True)
class Told:
    """What is known about a layer besides its tensors.

    Attributes:
        alpha: Scaling numerator, where the file has none.
        axis: What its magnitudes count, where their shape leaves it open.
        eps: Added to norms; None: the eps of the type that the magnitudes are stored in.
        rs_lora: Whether alpha was divided by the root of the rank; None: not said.
        split_qkv: Flux' fused layers were trained as several.
        ranks: Of the file's LoKr layers, where their factors show one.
    """

    alpha: float | None = None
    axis: Axis | None = None
    eps: float | None = None
    rs_lora: bool | None = None
    split_qkv: bool = False
    ranks: Collection[int] = ()


@dataclass(frozen=True)
class Layer:
    """One module's changes.

    Attributes:
        algorithm: A key of ALGORITHMS, or "bias".
        updates: Its changes.
        evidence: Where the axis of its magnitudes is from.
        ignored: Its tensors without effect, and why.
        alpha: As stored.
        rank: What alpha is divided by, where the tensors show it.
    """

    algorithm: str
    updates: tuple[Update, ...]
    evidence: str | None = None
    ignored: Mapping[str, str] | None = None
    alpha: float | None = None
    rank: int | None = None


def layer_of(module: str, parts: Parts, told: Told) -> Layer | str:
    """Return a module's changes, or what is wrong with them."""
    used = [a for a, names in ALGORITHMS.items() if parts.keys() & set(names)]
    if len(used) > 1:
        return f"holds {' and '.join(used)}; what both together mean is not defined"
    biases = tuple(_added_bias(module, parts[p]) for p in BIASES if p in parts)
    if len(biases) > 1:
        return "holds diff_b and b_norm; what both together mean is not defined"
    if not used:
        if not biases:
            return f"{' and '.join(sorted(parts))} without anything that it belongs to"
        unused = {parts[p].name: "nothing but a bias is changed" for p in ("alpha",) if p in parts}
        return "dora_scale without a weight" if "dora_scale" in parts else Layer(
            "bias", biases, ignored=unused
        )  # fmt: skip
    algorithm = used[0]
    if algorithm in FACTORED:
        layer = _factored(module, algorithm, parts, told)
    else:
        layer = _whole(module, algorithm, parts, told)
    return layer if isinstance(layer, str) else replace(layer, updates=(*layer.updates, *biases))


def _factored(module: str, algorithm: str, parts: Parts, told: Told) -> Layer | str:
    if why := factors.misfit(parts):
        return why
    rank = _rank(algorithm, parts)
    shares = _shares(module, algorithm, told)
    if shares:
        assert rank is not None, "Bug: only LoRA is split"
        if why := _unsplit(parts, rank, shares):
            return why
        rank //= len(shares)
    whole = algorithm == "LoKr" and rank is None
    alpha = _alpha(parts.get("alpha"), told)
    scaling = _whole_scaling(alpha, told) if rank is None else alpha / rank if alpha else 1.0
    if isinstance(scaling, str):
        return scaling
    ignored = {}
    if whole and not math.isfinite(alpha or 0.0):  # a rank of 100,000 asks for whole factors
        alpha = None
        ignored[parts["alpha"].name] = "two whole factors are not scaled; it overflowed its type"
    elif not math.isfinite(alpha or 0.0):
        return f"alpha is {alpha}: it overflowed the type it is stored in. Get the file in float32"
    update = Update(
        target=f"{module}.weight",
        kind="lora",
        source_keys=tuple(
            ref.name for p, ref in parts.items() if p not in BIASES and ref.name not in ignored
        ),
        scaling=scaling,
        layout="oi",
    )
    if algorithm == "LoRA":
        product = factors.low_rank(parts["up"], parts["down"], parts.get("mid"))
        update, shape = replace(update, up=product.left, down=product.right), product.shape
    else:
        delta = factors.hadamard(parts) if algorithm == "LoHa" else factors.kronecker(parts)
        update, shape = replace(update, delta=delta), delta.shape
    layer = Layer(algorithm, (update,), ignored=ignored, alpha=alpha, rank=rank)
    return _decomposed(layer, parts, shape, _inputs(algorithm, parts), told)


def _shares(module: str, algorithm: str, told: Told) -> tuple[int, ...]:
    """Return how the rows of a fused layer are shared that was trained as several, else ()."""
    if not told.split_qkv or algorithm != "LoRA":
        return ()
    return next((shares for end, shares in SPLIT.items() if module.endswith(end)), ())


def _unsplit(parts: Parts, rank: int, shares: tuple[int, ...]) -> str | None:
    """Return why a fused layer is not several layers of one rank each, side by side, or None.

    sd-scripts saves A of all below each other, B of each on its own rows and columns with zeros
    around, and the alpha that each of them had.

    Source: github.com/kohya-ss/sd-scripts, networks/lora_flux.py, LoRANetwork.state_dict.
    """
    up, count = parts["up"], len(shares)
    rows, columns = up.shape[:2]
    if rank % count or rows % sum(shares) or {"mid", "dora_scale"} & parts.keys():
        return (
            f"its metadata says split_qkv, but lora_up {up.shape} is not that of {count} layers of "
            "one rank. Save the file without metadata if the tensors are right"
        )
    row = column = 0
    own = np.zeros((rows, columns), bool)
    for share in shares:
        height, width = rows // sum(shares) * share, rank // count
        own[row : row + height, column : column + width] = True
        row, column = row + height, column + width
    if (up.raw().reshape(rows, columns) != 0)[~own].any():
        return (
            f"its metadata says split_qkv, but lora_up mixes the {count} layers, so that it was "
            "trained on as one: whether alpha / rank is the scaling, or the same times "
            f"{count}, nothing tells. Save the file without metadata for the first, or with alpha "
            f"times {count} for the second"
        )
    return None


def _whole(module: str, algorithm: str, parts: Parts, told: Told) -> Layer | str:
    ref = parts[ALGORITHMS[algorithm][0]]
    scaled = "a whole difference is not scaled" if algorithm != "whole weight" else "it is replaced"
    ignored = {parts["alpha"].name: scaled} if "alpha" in parts else {}
    target, source = f"{module}.weight", (ref.name,)
    if "dora_scale" not in parts:
        kind = "replace" if algorithm == "whole weight" else "add"
        update = Update(target, kind, source, value=ref)  # type: ignore[arg-type]
        return Layer(algorithm, (update,), ignored=ignored)
    if algorithm != "full" or len(ref.shape) < 2:
        return f"dora_scale beside {ALGORITHMS[algorithm][0]} has no meaning"
    # V = W + diff, as for every other update of this family.
    update = Update(
        target, "lora", (*source, parts["dora_scale"].name), layout="oi",
        delta=Dense(Operand.matrix(ref)),
    )  # fmt: skip
    layer = Layer(algorithm, (update,), ignored=ignored)
    shape = ref.shape[0], math.prod(ref.shape[1:])
    return _decomposed(layer, parts, shape, ref.shape[1], told)


def _decomposed(
    layer: Layer,
    parts: Parts,
    shape: tuple[int, int],
    inputs: int | None,
    told: Told,
) -> Layer | str:
    """Return the layer with its magnitudes, if it has some."""
    scale = parts.get("dora_scale")
    if scale is None:
        return layer
    found = axis_of(scale.shape, *shape, inputs, told.axis)
    if isinstance(found, str):
        return found
    update = replace(
        layer.updates[0],
        kind="dora",
        magnitude=Operand.vector(scale),
        axis=found.axis,
        eps=EPS.get(scale.dtype.name, 0.0) if told.eps is None else told.eps,
    )
    return replace(layer, updates=(update,), evidence=found.evidence)


def _added_bias(module: str, ref: TensorRef) -> Update:
    return Update(f"{module}.bias", "add", (ref.name,), value=ref)


def _rank(algorithm: str, parts: Parts) -> int | None:
    """Return what alpha is divided by; None: no tensor shows one."""
    if algorithm == "LoKr":
        return kronecker_rank(parts)
    return parts["down" if algorithm == "LoRA" else "hada_w1_b"].shape[0]


def kronecker_rank(parts: Parts) -> int | None:
    """Return the rank that a LoKr layer's factors show; None: they are whole, or it is not LoKr."""
    by = [p for p in ("lokr_w2_b", "lokr_w1_b") if p in parts and parts[p].shape]
    return parts[by[0]].shape[0] if by else None


def _whole_scaling(alpha: float | None, told: Told) -> float | str:
    """Return the scaling of a LoKr layer with both factors whole, or why it is not known.

    LyCORIS makes alpha the rank there, so that the scaling is 1. With rs_lora it stores alpha times
    the root of the rank and scales by that root. The metadata says so, or alpha: a rank is a whole
    number, and that of the file's other layers.
    """
    if alpha is None or not math.isfinite(alpha):
        return 1.0 if not told.rs_lora else "trained with rs_lora, but alpha was not saved"
    by_others = alpha not in told.ranks and any(_near(r**1.5, alpha) for r in told.ranks if r > 1)
    if told.rs_lora is False or not (told.rs_lora or by_others or alpha != round(alpha)):
        return 1.0
    rank = round(alpha ** (2 / 3)) if alpha > 0 else 0
    if not _near(rank**1.5, alpha):
        return (
            f"alpha is {alpha:g}, which is neither a rank nor, as with rs_lora, a rank times its "
            "root. Get the file in float32"
        )
    return math.sqrt(rank)


def _near(exact: float, stored: float) -> bool:
    return math.isclose(exact, stored, rel_tol=2.0**-8)  # stored in bfloat16 at worst


def _inputs(algorithm: str, parts: Parts) -> int | None:
    """Return the inputs of a layer where its factors show them apart from the kernel, else None."""
    if algorithm == "LoRA":
        return parts["down"].shape[1]
    if algorithm == "LoHa":
        return parts["hada_w1_b"].shape[1] if "hada_t1" in parts else None
    first, second = parts.get("lokr_w1", parts.get("lokr_w1_b")), parts.get("lokr_w2")
    right = second if second is not None else parts["lokr_w2_b"]
    assert first is not None, "Bug: misfit() has checked that both factors are there"
    # A factor of two dimensions may hold the kernel, flattened; not one whole or beside a core.
    apart = len(right.shape) > 2 or second is not None or "lokr_t2" in parts
    return first.shape[1] * right.shape[1] if apart else None


def _alpha(ref: TensorRef | None, told: Told) -> float | None:
    """Return alpha, None where it is the rank."""
    return (told.alpha if ref is None else number(ref)) or None


def finite_number(ref: TensorRef) -> float | str:
    """Return alpha as it is stored, or why that is no number to scale by."""
    if ref.size != 1 or ref.dtype.name not in NUMBERS:
        return f"alpha is {ref.shape} {ref.dtype.name}, expected one number"
    value = number(ref)
    return (
        value if math.isfinite(value) else f"alpha is {value}: it overflowed its type, or is lost"
    )


def number(ref: TensorRef) -> float:
    """Return a stored number of one of the types NUMBERS."""
    raw, name = ref.raw(), ref.dtype.name
    if name == "BF16":
        return float((raw.astype(np.uint32) << 16).view(np.float32)[0])
    return float(raw.view(f"{'f' if name.startswith('F') else 'i'}{ref.dtype.itemsize}")[0])
