"""How the tensors of kohya's, LyCORIS', OneTrainer's and ComfyUI's files are named.

A name is a module (flattened or a path) and a part. Sources of the spellings: github.com/
comfyanonymous/ComfyUI, comfy/weight_adapter/*.py and comfy/lora.py (load_lora); github.com/
KohakuBlueleaf/LyCORIS, lycoris/modules/*.py (weight_list).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from dora_export.flat_names import is_flat, prefix_of
from dora_export.tensors import TensorRef

# Ending of a name -> part. Those of OWN are written by this family alone.
OWN = {
    ".lora_up.weight": "up", ".lora_down.weight": "down", ".lora_mid.weight": "mid",
    **{f".{p}": p for p in (
        "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2",
        "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2",
        "diff", "diff_b", "w_norm", "b_norm", "set_weight",
    )},
}  # fmt: skip
SHARED = {
    ".lora_B.weight": "up", ".lora_A.weight": "down",
    ".lora_B.default.weight": "up", ".lora_A.default.weight": "down",
    ".lora_B": "up", ".lora_A": "down",
    ".lora.up.weight": "up", ".lora.down.weight": "down",
    "_lora.up.weight": "up", "_lora.down.weight": "down",
    ".lora_linear_layer.up.weight": "up", ".lora_linear_layer.down.weight": "down",
    ".alpha": "alpha", ".dora_scale": "dora_scale",
}  # fmt: skip
ENDINGS = {**OWN, **SHARED}
# Ending -> algorithm that is refused by name.
REFUSED = {
    ".a1.weight": "GLoRA", ".a2.weight": "GLoRA", ".b1.weight": "GLoRA", ".b2.weight": "GLoRA",
    ".bm.weight": "GLoRA", ".on_input": "IA3", ".oft_blocks": "OFT or BOFT",
    ".oft_diag": "OFT", ".oft_R": "OFT", ".oft_R.weight": "OFT", ".oft_R.scaled_oft": "OFT",
    ".rescale": "OFT or BOFT",
    ".lambda_layer": "T-LoRA", ".q_layer.weight": "T-LoRA", ".p_layer.weight": "T-LoRA",
    ".lokr_t1": "LoKr with a core on its first factor", ".reshape_weight": "a resized layer",
    ".lora_magnitude_vector": "PEFT's magnitudes",
    ".lora_magnitude_vector.weight": "PEFT's magnitudes",
}  # fmt: skip
# Those of them that these trainers alone write, so that a file of nothing else is told by name.
TELLING = tuple(e for e in REFUSED if e.startswith((".oft_", ".lokr_", ".lambda_", ".on_input")))
WHY_REFUSED = {
    "GLoRA": "W + W a + b has W in its own update",
    "IA3": "it scales activations, of the input or the output by a flag",
    "OFT or BOFT": "W is rotated, not added to; which of the two, and its constraint, the file "
    "does not say",
    "OFT": "W is rotated, not added to, under a constraint that the file does not hold",
    "T-LoRA": "its rank changes with the time step, so there is no one weight",
    "LoKr with a core on its first factor": "no trainer is known to use it",
    "a resized layer": "the layer gets another shape than the base's config says",
    "PEFT's magnitudes": "they belong into a file of diffusers' or PEFT's layout",
}  # fmt: skip
BUNDLED = "bundle_emb."  # OneTrainer's embeddings, saved along
# Trainers of which other readers know more: PEFT, ai-toolkit, catid's DoRALayer, QDoRA.
FOREIGN_STARTS = ("base_model.model.",)
FOREIGN_ENDINGS = (
    ".magnitude", ".m", ".lora_magnitude_vector", ".lora_magnitude_vector.weight",
)  # fmt: skip
COMFY = ("diffusion_model", "text_encoders_clip_l_transformer", "text_encoders_clip_g_transformer",
         "text_encoders_t5xxl_transformer")  # fmt: skip


@dataclass(frozen=True)
class Sorted:
    """The tensors of a file by module and part.

    Attributes:
        layers: Module -> part -> tensor.
        twice: Names of tensors whose module and part another name means, too.
        refused: Algorithm that is not supported -> names of its tensors.
        bundled: Names of embeddings saved along.
        unknown: All other names.
    """

    layers: Mapping[str, Mapping[str, TensorRef]]
    twice: tuple[str, ...]
    refused: Mapping[str, tuple[str, ...]]
    bundled: tuple[str, ...]
    unknown: tuple[str, ...]


def split(name: str, endings: Iterable[str] = ENDINGS) -> tuple[str, str] | None:
    """Return (module, ending) of a tensor's name, by the longest ending; None: there is none."""
    ending = max((e for e in endings if name.endswith(e)), key=len, default="")
    return (name.removesuffix(ending), ending) if ending and name != ending else None


def sort(tensors: Mapping[str, TensorRef]) -> Sorted:
    """Sort a file's tensors by module and part."""
    layers: dict[str, dict[str, TensorRef]] = defaultdict(dict)
    refused: dict[str, list[str]] = defaultdict(list)
    twice, bundled, unknown = [], [], []
    for name, ref in tensors.items():
        if name.startswith(BUNDLED):
            bundled.append(name)
        elif (found := split(name)) is not None:
            module, part = found[0], ENDINGS[found[1]]
            if part in layers[module]:
                twice.append(name)
            layers[module][part] = ref
        elif (found := split(name, REFUSED)) is not None:
            refused[REFUSED[found[1]]].append(name)
        else:
            unknown.append(name)
    return Sorted(
        {m: dict(parts) for m, parts in layers.items()},
        tuple(twice),
        {algorithm: tuple(names) for algorithm, names in refused.items()},
        tuple(bundled),
        tuple(unknown),
    )


def is_family(names: Iterable[str]) -> bool:
    """Return whether tensors of these names are of this family, and of no other reader's.

    Told by endings that only these trainers write (refused algorithms' too), by flattened names
    behind their prefixes, by ComfyUI's prefixes, or by ``alpha`` beside ``lora_A`` on a name
    without a component of diffusers'. What diffusers itself writes (``unet.``, ``transformer.``,
    ``text_encoder.``, with its spellings of A and B) is its own format, with or without ``alpha``
    and ``dora_scale``.
    """
    names = list(names)
    if any(n.startswith(FOREIGN_STARTS) or n.endswith(FOREIGN_ENDINGS) for n in names):
        return False
    for name in names:
        found = split(name)
        module = found[0] if found else name.split(".")[0]
        if is_flat(module) or (found and found[1] in OWN) or name.endswith(TELLING):
            return True
        if found and prefix_of(module) in COMFY:
            return True
        if found and ENDINGS[found[1]] in ("alpha", "dora_scale") and not prefix_of(module):
            return True
    return False
