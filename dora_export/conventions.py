"""Names that one tensor has in checkpoints of one age, and in model classes of another.

A table, not code: each row is a renaming of whole checkpoints that transformers does while it loads
and undoes while it saves, so adapters under either names exist for the same checkpoint. Rows are
tried both ways round against the checkpoint's own names (``naming.find_rule``).

Source: github.com/huggingface/transformers 5.23, src/transformers/conversion_mapping.py (a test
holds every row against it); github.com/ml-explore/mlx-lm, mlx_lm/models/*.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

Pairs = tuple[tuple[str, str], ...]
Within = tuple[tuple[str, str, Pairs], ...]
Fused = tuple[tuple[str, tuple[str, ...]], ...]


@dataclass(frozen=True)
class Convention:
    """A renaming of whole checkpoints.

    ``*`` in a part of a name is a number; the other has as many, and the numbers keep their order.

    Attributes:
        prefixes: (checkpoint's, model class's) beginnings of names; the longest that fits counts.
        within: The same with the parts of names that are replaced behind that beginning alone.
        inside: (checkpoint's, model class's) parts of names, all of them replaced, in this order
            both ways round.
        model_types: Of config.json; empty: any model, since the names say enough.
        fused: (checkpoint's, model class's) last modules of a path, where the one holds the rows
            of the others one after the other, as many of each (``part_names``).
        grouped: The same for queries, keys and values, where several queries share a key and value:
            rows are as many as the heads that config.json counts of each.
    """

    prefixes: Pairs = ()
    within: Within = ()
    inside: Pairs = ()
    fused: Fused = ()
    grouped: Fused = ()
    model_types: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Renaming:
    """One direction of a convention.

    Attributes:
        what: For people.
        prefixes: (old, new, what is replaced behind it), the longest old first.
        inside: (old, new), applied in turn.
    """

    what: str
    prefixes: Within
    inside: Pairs

    def __call__(self, name: str) -> str:
        """Return the name under the other convention."""
        for old, new, behind in self.prefixes:
            if name.startswith(old):
                name = new + _replaced(name[len(old) :], behind)
                break
        return _replaced(name, self.inside)


def _replaced(name: str, pairs: Pairs) -> str:
    for old, new in pairs:
        if "*" in old:
            numbered = re.escape(old).replace(r"\*", r"(\d+)")
            name = re.sub(numbered, partial(_filled, new), name)
        else:
            name = name.replace(old, new)
    return name


def _filled(pattern: str, match: re.Match[str]) -> str:
    for number in match.groups():
        pattern = pattern.replace("*", number, 1)
    return pattern


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
_SWIN = (  # within other models
    *((f"blocks.*.attention.self.{old}.", f"blocks.*.attention.{new}.")
      for old, new in zip(("query", "key", "value"), _QKV, strict=True)),
    ("blocks.*.attention.output.dense.", "blocks.*.attention.o_proj."),
    ("blocks.*.intermediate.dense.", "blocks.*.mlp.fc1."),
    ("blocks.*.output.dense.", "blocks.*.mlp.fc2."),
)  # fmt: skip
# OpenAI's names in a block of a vision transformer.
_RESIDUAL_BLOCK = (
    (".mlp.c_fc.", ".mlp.fc1."),
    (".mlp.c_proj.", ".mlp.fc2."),
    (".ln_1.", ".layernorm_before."),
    (".ln_2.", ".layernorm_after."),
)
_INKLING = (
    *(
        (f".attn.{old}.", f".self_attn.{new}_proj.")
        for old, new in (
            ("wq_du", "q"), ("wk_dv", "k"), ("wv_dv", "v"), ("wr_du", "r"), ("wo_ud", "o"),
            ("gate_attn", "gate"), ("attn_sink_proj", "sink"),
        )
    ),
    (".attn_norm.", ".input_layernorm."),
    (".mlp_norm.", ".post_attention_layernorm."),
)  # fmt: skip

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
    # Saved while the language model in there was one with a head of its own.
    Convention(prefixes=(("model.language_model.model.", "model.language_model."),)),
    Convention(prefixes=(("language_model.model.model.", "model.language_model."),)),
    Convention(
        prefixes=(
            ("model.language_model.lm_head.", "lm_head."),
            ("model.vision_projector.", "model.projector."),
        ),
        model_types=frozenset({"hyperclovax_vision_v2"}),
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
        inside=(
            (".mlp.shared_mlp.", ".mlp.shared_experts."),
            (".mlp.router.gate.", ".mlp.gate."),
        ),
        model_types=frozenset({"hy_v3"}),
    ),
    Convention(
        inside=((".mlp.shared_expert.", ".mlp.shared_experts."),),
        model_types=frozenset({"laguna"}),
    ),
    Convention(
        prefixes=(("embed.", "embed_tokens."), ("head.", "lm_head.")),
        inside=(
            (".attn.indexer.wq_b.", ".self_attn.compressor.indexer.q_b_proj."),
            (".attn.indexer.weights_proj.", ".self_attn.compressor.indexer.scorer.weights_proj."),
            (".attn.indexer.compressor.wkv.", ".self_attn.compressor.indexer.kv_proj."),
            (".attn.indexer.compressor.wgate.", ".self_attn.compressor.indexer.gate_proj."),
            (".attn.compressor.wkv.", ".self_attn.compressor.kv_proj."),
            (".attn.compressor.wgate.", ".self_attn.compressor.gate_proj."),
            (".attn.indexer.compressor.norm.", ".self_attn.compressor.indexer.kv_norm."),
            (".attn.compressor.norm.", ".self_attn.compressor.kv_norm."),
            (".attn.norm.", ".self_attn.kv_norm."),
            (".attn.q_norm.", ".self_attn.q_a_norm."),
            (".attn_norm.", ".input_layernorm."),
            (".ffn_norm.", ".post_attention_layernorm."),
            (".attn.wq_a.", ".self_attn.q_a_proj."),
            (".attn.wq_b.", ".self_attn.q_b_proj."),
            (".attn.wkv.", ".self_attn.kv_proj."),
            (".attn.wo_a.", ".self_attn.o_a_proj."),
            (".attn.wo_b.", ".self_attn.o_b_proj."),
            (".ffn.shared_experts.w1.", ".mlp.shared_experts.gate_proj."),
            (".ffn.shared_experts.w2.", ".mlp.shared_experts.down_proj."),
            (".ffn.shared_experts.w3.", ".mlp.shared_experts.up_proj."),
            (".ffn.gate.", ".mlp.gate."),
            (".ffn.experts.", ".mlp.experts."),
        ),
        model_types=frozenset({"deepseek_v4"}),
    ),
    Convention(
        prefixes=(
            ("language_model.model.", "model.language_model."),
            ("language_model.lm_head.", "lm_head."),
            ("mm_projector.proj.0.", "model.mm_projector.in_proj."),
            ("mm_projector.proj.2.", "model.mm_projector.out_proj."),
        ),
        within=(
            (
                "vision_tower.encoder.",
                "model.vision_tower.",
                (
                    ("blocks.*.wo.", "layers.*.attn.proj."),
                    ("blocks.*.mlp.fc0.", "layers.*.mlp.fc1."),
                    ("blocks.*.mlp.fc1.", "layers.*.mlp.fc2."),
                    ("blocks.*.norm0.", "layers.*.norm1."),
                    ("blocks.*.norm1.", "layers.*.norm2."),
                ),
            ),
        ),
        model_types=frozenset({"kimi_k25"}),
    ),
    Convention(
        within=(
            (
                "model.transformer.blocks.",
                "model.language_model.layers.",
                (
                    (".attn_out.", ".o_proj."),
                    (".ff_out.", ".down_proj."),
                    (".attn_norm.", ".input_layernorm."),
                    (".ff_norm.", ".post_attention_layernorm."),
                ),
            ),
            (
                "model.vision_backbone.image_vit.transformer.resblocks.",
                "model.vision_tower.layers.",
                (
                    *((f".attention.w{x}.", f".self_attn.{x}_proj.") for x in "qkvo"),
                    (".feed_forward.w1.", ".mlp.fc1."),
                    (".feed_forward.w2.", ".mlp.fc2."),
                    (".attention_norm.", ".layer_norm1."),
                    (".ffn_norm.", ".layer_norm2."),
                ),
            ),
            (
                "model.vision_backbone.image_pooling_2d.",
                "model.multi_modal_projector.image_pooling_2d.",
                tuple((f"w{x}.", f"{x}_proj.") for x in "qkvo"),
            ),
            (
                "model.vision_backbone.image_projector.",
                "model.multi_modal_projector.image_projector.",
                (("w1.", "gate_proj."), ("w2.", "down_proj."), ("w3.", "up_proj.")),
            ),
        ),
        prefixes=(
            ("model.vision_backbone.image_vit.", "model.vision_tower."),
            ("model.transformer.ln_f.", "model.language_model.norm."),
        ),
        fused=(("ff_proj", ("up_proj", "gate_proj")),),
        grouped=(("att_proj", _QKV),),
        model_types=frozenset({"molmo2"}),
    ),
    Convention(
        prefixes=(
            ("tok_embeddings.", "model.language_model.embed_tokens."),
            ("norm.", "model.language_model.norm."),
            ("output.", "lm_head."),
            ("pre_mm_projector_norm.", "model.multi_modal_projector.norm."),
            ("patch_merger.", "model.multi_modal_projector.patch_merger."),
            ("vision_language_adapter.w_in.", "model.multi_modal_projector.linear_1."),
            ("vision_language_adapter.w_out.", "model.multi_modal_projector.linear_2."),
        ),
        within=(
            (
                "layers.",
                "model.language_model.layers.",
                (
                    (".attention.wkv_a_with_mqa.", ".self_attn.kv_a_proj_with_mqa."),
                    (".attention.wkv_b.", ".self_attn.kv_b_proj."),
                    (".attention.wo.", ".self_attn.o_proj."),
                    (".attention.wq.", ".self_attn.q_proj."),
                    (".attention.indexer.", ".self_attn.indexer."),
                    (".feed_forward.w1.", ".mlp.gate_proj."),
                    (".feed_forward.w2.", ".mlp.down_proj."),
                    (".feed_forward.w3.", ".mlp.up_proj."),
                    (".shared_experts.w1.", ".mlp.shared_experts.gate_proj."),
                    (".shared_experts.w2.", ".mlp.shared_experts.down_proj."),
                    (".shared_experts.w3.", ".mlp.shared_experts.up_proj."),
                    (".attention.kv_a_norm.", ".self_attn.kv_a_layernorm."),
                    (".attention_norm.", ".input_layernorm."),
                    (".ffn_norm.", ".post_attention_layernorm."),
                    (".gate.", ".mlp.gate."),
                    (".experts.", ".mlp.experts."),
                ),
            ),
            (
                "vision_encoder.",
                "model.vision_tower.",
                (
                    (".attention.wv.", ".attention.v_proj."),
                    (".attention.wo.", ".attention.o_proj."),
                    (".feed_forward.w1.", ".feed_forward.gate_proj."),
                    (".feed_forward.w2.", ".feed_forward.down_proj."),
                    (".feed_forward.w3.", ".feed_forward.up_proj."),
                ),
            ),
        ),
        model_types=frozenset({"mistral_large4"}),
    ),
    Convention(
        prefixes=(
            ("model.layers.", "model.language_model.layers."),
            ("model.embed_tokens.", "model.language_model.embed_tokens."),
            ("model.norm.", "model.language_model.norm."),
            ("model.vision_model.", "model.vision_tower."),
        ),
        inside=tuple(
            (f".{of}_linear.{number}.", f".{of}_linear.{name}.")
            for of in ("spatial", "temporal")
            for number, name in ((0, "fc1"), (2, "fc2"), (3, "ln"))
        ),
        model_types=frozenset({"ernie4_5_vl_moe"}),
    ),
    Convention(
        prefixes=(
            ("language_model.model.", "model.language_model."),
            ("language_model.lm_head.", "lm_head."),
            (
                "vision_tower.vision_model.embeddings.patch_embedding.",
                "model.vision_tower.embeddings.proj.",
            ),
            ("vision_tower.vision_model.encoder.", "model.vision_tower."),
            ("vision_tower.vision_model.pre_layrnorm.", "model.vision_tower.pre_layrnorm."),
            ("multi_modal_projector.", "model.multi_modal_projector."),
            ("patch_merge_mlp.linear_1.", "model.multi_modal_projector.merge_linear_1."),
            ("patch_merge_mlp.linear_2.", "model.multi_modal_projector.merge_linear_2."),
        ),
        inside=tuple(
            (f".block_sparse_moe.{part}.", f".mlp.{part}.")
            for part in ("experts", "gate", "shared_experts")
        ),
        model_types=frozenset({"minimax_m3_vl"}),
    ),
    Convention(
        prefixes=(
            ("model.layers.", "model.language_model.layers."),
            ("model.embed_tokens.", "model.language_model.embed_tokens."),
            ("model.norm.", "model.language_model.norm."),
            ("vit_large_projector.", "model.multi_modal_projector."),
            ("vision_model.conv1.", "model.vision_model.embeddings.patch_embedding."),
            ("vision_model.ln_pre.", "model.vision_model.pre_layernorm."),
            (
                "vision_model.positional_embedding",
                "model.vision_model.embeddings.position_embedding.weight",
            ),
            ("vision_model.vit_downsampler", "model.vision_model.downsampler"),
        ),
        within=(
            (
                "vision_model.transformer.resblocks.",
                "model.vision_model.layers.",
                (
                    (".attn.out_proj.", ".self_attn.out_proj."),
                    *_RESIDUAL_BLOCK,
                ),
            ),
        ),
        model_types=frozenset({"step3p7"}),
    ),
    Convention(
        prefixes=(
            ("embed_tokens.", "model.language_model.embed_tokens."),
            ("norm.", "model.language_model.norm."),
            *(
                (part, f"model.visual.{part}")
                for part in ("patch_embed.", "pos_embed.", "blocks.", "merger.")
            ),
            ("deepstack_merger_list.", "model.visual.deepstack_merger_list."),
        ),
        within=(
            (
                "layers.",
                "model.language_model.layers.",
                (
                    *((f".to_{x}.", f".{x}_proj.") for x in "qkv"),
                    (".to_out.", ".o_proj."),
                    (".norm_q.", ".q_norm."),
                    (".norm_k.", ".k_norm."),
                ),
            ),
        ),
        model_types=frozenset({"cosmos3_omni"}),
    ),
    Convention(
        inside=(
            (".self_attn.q_b_proj.", ".self_attn.q_gate_proj."),
            ("layernorm.W_down.", "layernorm.mlp.fc1."),
            ("layernorm.W_up.", "layernorm.mlp.fc2."),
        ),
        model_types=frozenset({"axk2"}),
    ),
    Convention(
        prefixes=tuple(
            (f"model.encoder.{part}.", f"model.encoder.text_model.{part}.")
            for part in ("embed_tokens", "layers", "norm")
        ),
        model_types=frozenset({"t5gemma2"}),
    ),
    Convention(
        prefixes=(
            ("model.llm.embed.", "model.language_model.embed_tokens."),
            ("model.llm.embed_norm.", "model.language_model.embed_tokens.embed_norm."),
            ("model.llm.norm.", "model.language_model.norm."),
            ("model.llm.unembed.", "lm_head."),
            ("model.visual.backbone.embeddings.", "model.vision_tower.embeddings."),
            (
                "model.visual.backbone.embeddings.position_embedding",
                "model.vision_tower.embeddings.position_embedding.weight",
            ),
            ("model.visual.backbone.ln_pre.", "model.vision_tower.pre_layernorm."),
            ("model.visual.proj_in.", "model.vision_tower.merger.linear_1."),
            ("model.visual.proj_out.", "model.vision_tower.merger.linear_2."),
        ),
        within=(
            ("model.llm.layers.", "model.language_model.layers.", _INKLING),
            (
                "model.visual.backbone.layers.",
                "model.vision_tower.layers.",
                _RESIDUAL_BLOCK,
            ),
        ),
        model_types=frozenset({"inkling2"}),
    ),
    Convention(
        prefixes=(
            ("model.encoder.pre_encode.conv.", "model.encoder.subsampling.layers."),
            ("model.encoder.pre_encode.out.", "model.encoder.subsampling.linear."),
            ("model.transf_decoder._embedding.token_embedding.", "model.decoder.embed_tokens."),
            ("model.transf_decoder._embedding.layer_norm.", "model.decoder.embedding_layernorm."),
            (
                "model.transf_decoder._embedding.position_embedding.pos_enc",
                "model.decoder.pos_emb.weight",
            ),
            ("model.transf_decoder._decoder.final_layer_norm.", "model.decoder.norm."),
            ("model.encoder_decoder_proj.", "model.decoder.proj."),
            ("log_softmax.mlp.layer0.", "proj_out."),
        ),
        within=(
            (
                "model.transf_decoder._decoder.layers.",
                "model.decoder.layers.",
                (
                    *(
                        (f".{layer}_sub_layer.{old}.", f".{new}.{x}_proj.")
                        for layer, new in (("first", "self_attn"), ("second", "encoder_attn"))
                        for old, x in (
                            ("query_net", "q"),
                            ("key_net", "k"),
                            ("value_net", "v"),
                            ("out_projection", "o"),
                        )
                    ),
                    (".third_sub_layer.dense_in.", ".mlp.fc1."),
                    (".third_sub_layer.dense_out.", ".mlp.fc2."),
                    (".layer_norm_1.", ".input_layernorm."),
                    (".layer_norm_2.", ".post_attention_layernorm."),
                    (".layer_norm_3.", ".final_layernorm."),
                ),
            ),
        ),
        inside=(
            *((f".self_attn.linear_{x}.", f".self_attn.{x}_proj.") for x in "qkv"),
            (".self_attn.linear_out.", ".self_attn.o_proj."),
            (".linear_pos.", ".relative_k_proj."),
            (".conv.batch_norm.", ".conv.norm."),
        ),
        model_types=frozenset({"cohere_asr"}),
    ),
    Convention(prefixes=(("layer.", "model.layer."),), model_types=frozenset({"dinov3_vit"})),
    # One checkpoint, of which classes load the part that finds and the part that follows.
    Convention(
        prefixes=(
            ("tracker_model.", ""),
            ("tracker_neck.", "vision_encoder.neck."),
            ("detector_model.vision_encoder.backbone.", "vision_encoder.backbone."),
        ),
        model_types=frozenset({"sam3_video", "sam3_tracker", "sam3_tracker_video"}),
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
        inside=(
            ("encoder.encoder.*.layers.", "encoder.aifi.*.layers."),
            (".out_proj.", ".o_proj."),
            ("layers.*.fc1.", "layers.*.mlp.fc1."),
            ("layers.*.fc2.", "layers.*.mlp.fc2."),
        ),
        model_types=frozenset({"rt_detr", "rt_detr_v2", "pp_doclayout_v2", "pp_doclayout_v3"}),
    ),
    Convention(
        inside=(
            ("encoder.encoder.*.layers.", "encoder.aifi.*.layers."),
            (".out_proj.", ".o_proj."),
            ("layers.*.fc1.", "layers.*.mlp.layers.0."),
            ("layers.*.fc2.", "layers.*.mlp.layers.1."),
        ),
        model_types=frozenset({"d_fine"}),
    ),
    Convention(
        inside=(
            ("encoder.encoder.*.layers.", "encoder.aifi.*.layers."),
            (".out_proj.", ".o_proj."),
            ("layers.*.fc1.", "layers.*.mlp.fc1."),
            ("layers.*.fc2.", "layers.*.mlp.fc2."),
            ("decoder_order_head.", "decoder.relative_order_head.proj."),
            ("decoder_global_pointer.", "decoder.relative_order_head.global_pointer."),
            ("decoder_roor_order_head.", "decoder.successor_order_head.proj."),
            ("decoder_roor_global_pointer.", "decoder.successor_order_head.global_pointer."),
        ),
        model_types=frozenset({"pp_doclayout_v4"}),
    ),
    Convention(
        prefixes=(
            ("refpoint_embed.", "model.reference_point_embed."),
            ("query_feat.", "model.query_feat."),
            ("backbone.0.projector.stages.0.1.", "model.backbone.projector.layer_norm."),
            ("transformer.decoder.norm.", "model.decoder.layernorm."),
            ("transformer.decoder.ref_point_head.", "model.decoder.ref_point_head."),
            *(
                (f"transformer.{part}.", f"model.{part}.")
                for part in (
                    "enc_output",
                    "enc_output_norm",
                    "enc_out_bbox_embed",
                    "enc_out_class_embed",
                )
            ),
        ),
        within=(
            (
                "transformer.decoder.layers.",
                "model.decoder.layers.",
                (
                    (".self_attn.out_proj.", ".self_attn.o_proj."),
                    (".norm1.", ".self_attn_layer_norm."),
                    (".norm2.", ".cross_attn_layer_norm."),
                    (".norm3.", ".layer_norm."),
                    (".linear1.", ".mlp.fc1."),
                    (".linear2.", ".mlp.fc2."),
                ),
            ),
            ("backbone.0.encoder.encoder.", "model.backbone.backbone.", _ATTENTION),
            (
                "backbone.0.projector.stages.0.0.",
                "model.backbone.projector.projector_layer.",
                (
                    ("m.", "bottlenecks."),
                    ("cv1.conv.", "conv1.conv."),
                    ("cv2.conv.", "conv2.conv."),
                    ("cv1.bn.", "conv1.norm."),
                    ("cv2.bn.", "conv2.norm."),
                ),
            ),
        ),
        model_types=frozenset({"rf_detr"}),
    ),
    Convention(
        inside=(*_ATTENTION[:3], (".attention.output.", ".attention.o_proj.")),
        model_types=frozenset({"lw_detr"}),
    ),
    Convention(
        inside=(
            ("attn.out_proj.", "attn.o_proj."),
            ("layers.*.fc1.", "layers.*.mlp.fc1."),
            ("layers.*.fc2.", "layers.*.mlp.fc2."),
        ),
        model_types=frozenset({"maskformer"}),
    ),
    Convention(
        inside=(
            ("level_module.encoder.embeddings.", "level_module.encoder.swin.embeddings."),
            ("level_module.encoder.encoder.", "level_module.encoder.swin.encoder."),
            *_SWIN,
        ),
        model_types=frozenset({"mask2former", "oneformer"}),
    ),
    Convention(
        inside=(
            ("conv_encoder.model.embeddings.", "conv_encoder.model.swin.embeddings."),
            ("conv_encoder.model.encoder.", "conv_encoder.model.swin.encoder."),
            *_SWIN,
        ),
        model_types=frozenset({"grounding-dino", "mm-grounding-dino"}),
    ),
    Convention(
        inside=(
            ("encoder.patch_embeddings.*.", "stages.*.patch_embeddings."),
            ("encoder.block.*.", "stages.*.blocks."),
            ("encoder.layer_norm.*.", "stages.*.layer_norm."),
            (".attention.self.query.", ".attention.q_proj."),
            (".attention.self.key.", ".attention.k_proj."),
            (".attention.self.value.", ".attention.v_proj."),
            (".attention.self.sr.", ".attention.sequence_reduction.sequence_reduction."),
            (".attention.self.layer_norm.", ".attention.sequence_reduction.layer_norm."),
            (".attention.output.dense.", ".attention.o_proj."),
            (".mlp.dense1.", ".mlp.fc1."),
            (".mlp.dense2.", ".mlp.fc2."),
            (".layer_norm_1.", ".layernorm_before."),
            (".layer_norm_2.", ".layernorm_after."),
            ("decode_head.linear_c.", "decode_head.linear_projections."),
        ),
        model_types=frozenset({"segformer"}),
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
    # transformers 5 renames the decoder, too, where it saves a whole one under the old names.
    Convention(
        prefixes=(("decoder.decoder_encoder.layer.", "decoder.decoder_layers."),),
        inside=(
            ("vit.encoder.layer.", "vit.layers."),
            *_ATTENTION,
            (".intermediate.dense.", ".mlp.fc1."),
            (".output.dense.", ".mlp.fc2."),
        ),
        model_types=frozenset({"vit_mae"}),
    ),
    Convention(
        inside=(*_ATTENTION, (".mlp.weights_out.", ".mlp.down_proj.")),
        fused=(("weights_in", ("gate_proj", "up_proj")),),
        model_types=frozenset(
            """dinov2 dinov2_with_registers depth_anything prompt_depth_anything""".split()
        ),
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
    """Return the modules that checkpoints of these model types fuse, as ``Convention.fused``.

    Args:
        model_types: Of config.json and its text part.
    """
    return tuple(pair for row in _rows_of(model_types) for pair in row.fused)


def grouped_modules(model_types: tuple[object, ...]) -> Fused:
    """Return the same of ``Convention.grouped``."""
    return tuple(pair for row in _rows_of(model_types) for pair in row.grouped)


def _rows_of(model_types: tuple[object, ...]) -> Iterator[Convention]:
    types = set(map(str, model_types))
    return (row for row in CONVENTIONS if types & row.model_types)


def renamings(model_types: tuple[object, ...]) -> Iterator[Renaming]:
    """Yield the renamings that may hold for a checkpoint, in the order to try them.

    Args:
        model_types: Of config.json and its text part.
    """
    for row in CONVENTIONS:
        if row.model_types and not row.model_types.intersection(map(str, model_types)):
            continue
        yield from both_ways(row)


def both_ways(row: Convention) -> tuple[Renaming, Renaming]:
    """Return a row's renamings: of the checkpoint's names, and of the model class's."""
    prefixes: Within = (*((old, new, ()) for old, new in row.prefixes), *row.within)
    to_class = _longest_first(prefixes)
    to_stored = _longest_first([(new, old, _turned(pairs)) for old, new, pairs in prefixes])
    return (
        Renaming(_what(row, False), to_class, row.inside),
        Renaming(_what(row, True), to_stored, _turned(row.inside)),
    )


def _turned(pairs: Pairs) -> Pairs:
    return tuple((new, old) for old, new in pairs)


def _longest_first(prefixes: Sequence[tuple[str, str, Pairs]]) -> Within:
    """Return the rows, with names that have their new beginning already left as they are."""
    kept: Within = tuple(
        (new, new, ()) for _, new, _ in prefixes if any(new.startswith(old) for old, *_ in prefixes)
    )
    return tuple(sorted({*prefixes, *kept}, key=lambda row: -len(row[0])))


def _what(row: Convention, back: bool) -> str:
    old, new, *_ = next(iter((*row.prefixes, *row.within, *row.inside)), ("", ""))
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
