"""Names that one tensor has in checkpoints of one age, and in model classes of another.

A table, not code: each row is a renaming of whole checkpoints that transformers does while it loads
and undoes while it saves, so adapters under either names exist for the same checkpoint. Rows are
tried both ways round against the checkpoint's own names (``naming.find_rule``).

Source: github.com/huggingface/transformers 5.23, src/transformers/conversion_mapping.py (a test
holds every row against it); github.com/ml-explore/mlx-lm, mlx_lm/models/*.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

Pairs = tuple[tuple[str, str], ...]
Fused = tuple[tuple[str, tuple[str, ...]], ...]


@dataclass(frozen=True)
class Convention:
    """A renaming of whole checkpoints.

    Attributes:
        prefixes: (checkpoint's, model class's) beginnings of names; the longest that fits counts.
        inside: (checkpoint's, model class's) parts of names, all of them replaced, in this order
            both ways round.
        model_types: Of config.json; empty: any model, since the names say enough.
        fused: (checkpoint's, model class's) last modules of a path, where the one holds the rows
            of the others one after the other, as many of each (``part_names``).
    """

    prefixes: Pairs = ()
    inside: Pairs = ()
    fused: Fused = ()
    model_types: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Renaming:
    """One direction of a convention.

    Attributes:
        what: For people.
        prefixes: (old, new), the longest old first.
        inside: (old, new), applied in turn.
    """

    what: str
    prefixes: Pairs
    inside: Pairs

    def __call__(self, name: str) -> str:
        """Return the name under the other convention."""
        for old, new in self.prefixes:
            if name.startswith(old):
                name = new + name[len(old) :]
                break
        for old, new in self.inside:
            name = name.replace(old, new)
        return name


_TOWERS = ("vision_tower.", "multi_modal_projector.", "audio_tower.", "vision_model.",
           "image_newline", "image_tower.", "video_tower.", "vision_embed_tokens.", "projector.",
           "encoder.", "acoustic_tokenizer_encoder.", "semantic_tokenizer_encoder.")  # fmt: skip
_ATTENTION = (
    ("attention.attention.query.", "attention.q_proj."),
    ("attention.attention.key.", "attention.k_proj."),
    ("attention.attention.value.", "attention.v_proj."),
    ("attention.output.dense.", "attention.o_proj."),
)
_QKV = ("q_proj", "k_proj", "v_proj")

CONVENTIONS = (
    # Multimodal models around a language model: Llava, Gemma 3, PaliGemma, Mistral 3, InternVL,
    # Aria, GOT-OCR 2, Aya Vision, Qwen2-Audio, Granite Speech, Mllama, Fuyu, ...
    Convention(
        prefixes=(
            ("language_model.model.", "model.language_model."),
            ("language_model.lm_head.", "lm_head."),
            *((tower, f"model.{tower}") for tower in _TOWERS),
        )
    ),
    Convention(
        prefixes=(
            ("text_model.model.", "model.text_model."),
            ("text_model.lm_head.", "lm_head."),
            ("vqmodel.", "model.vqmodel."),
        ),
        model_types=frozenset({"emu3"}),
    ),
    Convention(
        prefixes=(("model.", "model.language_model."), ("visual.", "model.visual.")),
        model_types=frozenset({"qwen2_vl", "qwen2_5_vl"}),
    ),
    Convention(
        prefixes=(
            ("model.", "model.language_model."),
            ("visual.", "model.visual."),
            ("mlp_AR.", "model.projector."),
        ),
        model_types=frozenset({"paddleocr_vl"}),
    ),
    # Of the thinker alone; the whole model has its checkpoint's names.
    Convention(
        prefixes=(
            ("thinker.model.", "model.language_model."),
            ("thinker.visual.", "model.visual."),
            ("thinker.audio_tower.", "model.audio_tower."),
            ("thinker.lm_head.", "lm_head."),
        ),
        model_types=frozenset({"qwen2_5_omni", "qwen3_omni_moe"}),
    ),
    # The text part of a multimodal checkpoint, loaded as a language model of its own.
    Convention(
        prefixes=(("model.language_model.", "model."),),
        model_types=frozenset({"qwen3_5", "qwen3_5_moe", "gemma3n"}),
    ),
    Convention(
        inside=((".block_sparse_moe.", ".mlp."),),
        model_types=frozenset({"mixtral", "minimax", "minimax_m2"}),
    ),
    Convention(
        inside=((".block_sparse_moe.gate.", ".mlp.router."), (".block_sparse_moe.", ".mlp.")),
        model_types=frozenset({"phimoe"}),
    ),
    Convention(
        inside=((".block_sparse_moe.router.layer.", ".block_sparse_moe.router."),),
        model_types=frozenset({"granitemoe", "granitemoeshared", "granitemoehybrid"}),
    ),
    Convention(prefixes=(("backbone.", "model."),), model_types=frozenset({"nemotron_h"})),
    Convention(
        prefixes=(("model.word_embeddings.", "model.embed_tokens."),),
        inside=((".attention.dense.", ".self_attn.o_proj."), (".attention.", ".self_attn.")),
        model_types=frozenset({"bailing_hybrid"}),
    ),
    Convention(
        inside=((".self_attn.gate_proj.", ".self_attn.g_proj."),),
        model_types=frozenset({"lfm3"}),
    ),
    Convention(
        inside=((".ff0.", ".fc1."), (".ff1.", ".fc2.")), model_types=frozenset({"timesfm2_5"})
    ),
    Convention(
        inside=(
            (".out_proj.", ".o_proj."),
            (".fc1.", ".mlp.fc1."),
            (".fc2.", ".mlp.fc2."),
        ),
        model_types=frozenset({"detr"}),
    ),
    Convention(
        prefixes=(("encoder.layer.", "layers."),),  # of the class without a head
        inside=(
            (".encoder.layer.", ".layers."),
            *_ATTENTION,
            (".intermediate.dense.", ".mlp.fc1."),
            (".output.dense.", ".mlp.fc2."),
        ),
        model_types=frozenset(
            """vit deit audio-spectrogram-transformer beit ijepa vit_mae vit_msn vivit""".split()
        ),
    ),
    Convention(
        inside=(*_ATTENTION, (".mlp.weights_out.", ".mlp.down_proj.")),
        fused=(("weights_in", ("gate_proj", "up_proj")),),
        model_types=frozenset({"dinov2", "dinov2_with_registers"}),
    ),
    Convention(
        inside=(
            (".attention.self.query.", ".attention.q_proj."),
            (".attention.self.key.", ".attention.k_proj."),
            (".attention.self.value.", ".attention.v_proj."),
            (".attention.output.dense.", ".attention.o_proj."),
            (".intermediate.dense.", ".mlp.fc1."),
            (".output.dense.", ".mlp.fc2."),
        ),
        model_types=frozenset({"swin"}),
    ),
    Convention(
        prefixes=(("radio_model.model.blocks.", "encoder.layer."),),
        inside=((".attn.proj.", ".attention.o_proj."), (".attn.", ".attention.")),
        fused=(("qkv", _QKV),),
        model_types=frozenset({"radio"}),
    ),
    # Text encoders that fuse q, k and v, as their authors' code has them.
    Convention(
        inside=(
            ("encoder.layers.", "layers."),
            ("emb_ln.", "embeddings.LayerNorm."),
            (".attn.out_proj.", ".self_attn.o_proj."),
            (".attn.", ".self_attn."),
            (".fc11.", ".up_proj."),
            (".fc12.", ".gate_proj."),
            (".fc2.", ".down_proj."),
            (".norm1.", ".post_attention_layernorm."),
            (".norm2.", ".post_mlp_layernorm."),
        ),
        fused=(("Wqkv", _QKV),),
        model_types=frozenset({"nomic_bert"}),
    ),
    Convention(
        inside=(
            ("encoder.layers.", "layers."),
            ("emb_ln.", "embeddings.LayerNorm."),
            (".mixer.out_proj.", ".self_attn.o_proj."),
            (".mixer.", ".self_attn."),
            (".norm1.", ".post_attention_layernorm."),
            (".norm2.", ".post_mlp_layernorm."),
        ),
        fused=(("Wqkv", _QKV),),
        model_types=frozenset({"jina_embeddings_v3"}),
    ),
    Convention(
        inside=(
            ("encoder.layer.", "layers."),
            (".attention.o_proj.", ".self_attn.o_proj."),
            (".attention.", ".self_attn."),
            (".attn_ln.", ".post_attention_layernorm."),
            (".mlp_ln.", ".post_mlp_layernorm."),
            ("lm_head.norm.", "lm_head.layer_norm."),
        ),
        fused=(("qkv_proj", _QKV), ("up_gate_proj", ("up_proj", "gate_proj"))),
        model_types=frozenset({"gte"}),
    ),
    Convention(
        inside=((".attn.o_proj.", ".self_attn.o_proj."), (".attn.", ".self_attn.")),
        fused=(
            ("gqkv_proj", ("gate_proj", *_QKV)),
            ("gate_up_proj", ("gate_proj", "up_proj")),
        ),
        model_types=frozenset({"hrm_text"}),
    ),
)

# Ends of names: (checkpoint's, model class's). Source: as above, "legacy".
LEAVES: Pairs = (
    (".LayerNorm.gamma", ".LayerNorm.weight"),
    (".LayerNorm.beta", ".LayerNorm.bias"),
    (".weight_g", ".parametrizations.weight.original0"),
    (".weight_v", ".parametrizations.weight.original1"),
)
HEADS: Mapping[str, Pairs] = {"gpt_neox": (("embed_out.weight", "lm_head.weight"),)}


def fused_modules(model_types: tuple[object, ...]) -> Fused:
    """Return the modules that checkpoints of these model types fuse, as in ``Convention``.

    Args:
        model_types: Of config.json and its text part.
    """
    types = set(map(str, model_types))
    return tuple(pair for row in CONVENTIONS if types & row.model_types for pair in row.fused)


def renamings(model_types: tuple[object, ...]) -> Iterator[Renaming]:
    """Yield the renamings that may hold for a checkpoint, in the order to try them.

    Args:
        model_types: Of config.json and its text part.
    """
    for row in CONVENTIONS:
        if row.model_types and not row.model_types.intersection(map(str, model_types)):
            continue
        to_class = _longest_first(row.prefixes)
        to_stored = _longest_first(tuple((new, old) for old, new in row.prefixes))
        inside_back = tuple((new, old) for old, new in row.inside)
        yield Renaming(_what(row, False), to_class, row.inside)
        yield Renaming(_what(row, True), to_stored, inside_back)


def _longest_first(pairs: Pairs) -> Pairs:
    """Return the pairs, with names that have their new beginning already left as they are."""
    kept = tuple((new, new) for _, new in pairs if any(new.startswith(old) for old, _ in pairs))
    return tuple(sorted({*pairs, *kept}, key=lambda pair: -len(pair[0])))


def _what(row: Convention, back: bool) -> str:
    old, new = (row.prefixes or row.inside)[0]
    return f"'{new}' as '{old}'" if back else f"'{old}' as '{new}'"


def alias(name: str, known: frozenset[str], model_type: object) -> str | None:
    """Return the checkpoint's name of a tensor whose name ends in another convention, or None."""
    heads = HEADS.get(str(model_type), ())
    for old, new in (*LEAVES, *((new, old) for old, new in LEAVES)):
        if name.endswith(new) and (found := name.removesuffix(new) + old) in known:
            return found
    for old, new in (*heads, *((new, old) for old, new in heads)):
        if name == new and old in known:
            return old
    return None
