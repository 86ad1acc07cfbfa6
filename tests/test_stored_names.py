"""Rows of names that mean parts of a model: held against what transformers saves, on empty models.

``revert_weight_conversion`` hands a parameter that is only renamed through as the same object, so
every name of a class is known under its checkpoint's without a weight.
"""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import transformers
from transformers.core_model_loading import revert_weight_conversion

from dora_export import conventions, naming
from dora_export.conventions import Convention
from dora_export.errors import PlanError

pytestmark = pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")  # LW-DETR

SMALL = {"num_hidden_layers": 2, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 64,
         "n_routed_experts": 4, "num_experts": 4, "num_local_experts": 4, "moe_num_experts": 4,
         "first_k_dense_replace": 1}  # fmt: skip
# Kind -> its classes, and the settings under which it has every part that a row names.
CLASSES = {
    "hy_v3": ("HYV3ForCausalLM", {}),
    "laguna": ("LagunaForCausalLM", {}),
    "deepseek_v4": ("DeepseekV4ForCausalLM DeepseekV4Model", {"layer_types": [
        "compressed_sparse_attention", "heavily_compressed_attention"]}),
    "kimi_k25": ("Kimi_K25ForConditionalGeneration", {}),
    "molmo2": ("Molmo2ForConditionalGeneration", {}),
    "mistral_large4": ("MistralLarge4ForConditionalGeneration", {}),
    "ernie4_5_vl_moe": ("Ernie4_5_VLMoeForConditionalGeneration", {}),
    "rt_detr": ("RTDetrModel", {}),
    "rt_detr_v2": ("RTDetrV2Model", {}),
    "pp_doclayout_v2": ("PPDocLayoutV2ForObjectDetection", {}),
    "pp_doclayout_v3": ("PPDocLayoutV3Model", {}),
    "d_fine": ("DFineModel", {}),
    "segformer": ("SegformerForSemanticSegmentation", {}),
    "vit_mae": ("ViTMAEForPreTraining", {}),
    "depth_anything": ("DepthAnythingForDepthEstimation", {"use_swiglu_ffn": True}),
    "prompt_depth_anything": ("PromptDepthAnythingForDepthEstimation", {"use_swiglu_ffn": True}),
    "hyperclovax_vision_v2": ("HyperCLOVAXVisionV2ForConditionalGeneration", {}),
    "minimax_m3_vl": ("MiniMaxM3SparseForConditionalGeneration", {}),
    "step3p7": ("Step3p7ForConditionalGeneration", {}),
    "cosmos3_omni": ("Cosmos3OmniForConditionalGeneration", {}),
    "axk2": ("AXK2ForCausalLM", {}),
    "t5gemma2": ("T5Gemma2ForConditionalGeneration", {}),
    "inkling2": ("Inkling2ForConditionalGeneration", {}),
    "cohere_asr": ("CohereAsrForConditionalGeneration", {}),
    "dinov3_vit": ("DINOv3ViTModel", {}),
    "sam3_tracker": ("Sam3TrackerModel", {}),
    "sam3_tracker_video": ("Sam3TrackerVideoModel", {}),
    "pp_doclayout_v4": ("PPDocLayoutV4ForObjectDetection", {}),
    "rf_detr": ("RfDetrForObjectDetection", {}),
    "lw_detr": ("LwDetrForObjectDetection", {}),
    "maskformer": ("MaskFormerModel", {}),
    "mask2former": ("Mask2FormerModel", {}),
    "oneformer": ("OneFormerModel", {}),
    "grounding-dino": ("GroundingDinoForObjectDetection", {}),
    "mm-grounding-dino": ("MMGroundingDinoForObjectDetection", {}),
}  # fmt: skip


# Experts are stacked while they are loaded: names of their modules, the class's and the stored.
EXPERTS = {
    "deepseek_v4": {"model.layers.1.mlp.experts.": "model.layers.1.ffn.experts."},
    "minimax_m3_vl": {"model.language_model.layers.1.mlp.experts.":
                      "language_model.model.layers.1.block_sparse_moe.experts."},
    "mistral_large4": {"model.language_model.layers.1.mlp.experts.": "layers.1.experts."},
}  # fmt: skip


# Those of a row that another one here is of as well.
SELDOM = ("rt_detr_v2", "pp_doclayout_v3", "prompt_depth_anything", "sam3_tracker_video",
          "oneformer", "mm-grounding-dino")  # fmt: skip
KINDS = [pytest.param(k, marks=[pytest.mark.nightly] if k in SELDOM else []) for k in CLASSES]


# What LoRA is put on, and norms, which are saved whole.
TRAINED = (torch.nn.Linear, torch.nn.Conv2d, torch.nn.Conv3d, torch.nn.Embedding)


def shrink(config):
    for name, most in SMALL.items():
        if isinstance(getattr(config, name, None), int):
            setattr(config, name, min(most, getattr(config, name)))
    config.tie_word_embeddings = False
    for part in vars(config).values():
        if isinstance(part, transformers.PreTrainedConfig):
            shrink(part)


@pytest.fixture(scope="module")
def names():
    """Kind -> (types in its config.json, class's name -> the checkpoint's); each made once."""
    made = {}

    def of(kind):
        if kind not in made:
            classes, settings = CLASSES[kind]
            pairs = {}
            for name in classes.split():
                model = empty_model(getattr(transformers, name), settings)
                pairs |= renamed(kind, model)
            text = getattr(model.config, "text_config", None)
            made[kind] = (kind, getattr(text, "model_type", None)), pairs
        return made[kind]

    return of


def empty_model(model_class, settings):
    config = model_class.config_class()
    shrink(config)
    for name, value in settings.items():
        setattr(config.backbone_config if name == "use_swiglu_ffn" else config, name, value)
    with torch.device("meta"):
        return model_class(config)


def renamed(kind, model):
    """Class's name -> the checkpoint's, of what is trained and is not changed otherwise."""
    own = dict(model.named_parameters(remove_duplicate=False))
    times = Counter(map(id, own.values()))  # a tied one goes by either name
    stored = {id(p): n for n, p in revert_weight_conversion(model, dict(own)).items()}
    trained = {n for n, m in model.named_modules()
               if isinstance(m, TRAINED) or re.search(r"norm|\bln$|\bgate$", n)}  # fmt: skip
    pairs = {n: published(kind, stored[id(p)]) for n, p in own.items()
             if n.rpartition(".")[0] in trained and id(p) in stored and times[id(p)] == 1
             and not n.endswith("_bias")}  # fmt: skip
    for stem, theirs in EXPERTS.get(kind, {}).items():
        if any(n.startswith(stem) for n in own):
            assert any(n.startswith(theirs) for n in stored.values())
            pairs[f"{stem}gate_up_proj"] = f"{theirs}gate_up_proj"
    return pairs


def published(kind, name):
    """What transformers loads under that name, where it would save another that nobody has."""
    if kind.startswith("sam3"):  # whose parts lie side by side
        name = re.sub(r"^tracker_model\.(?=detector_model\.|tracker_neck\.)", "", name)
    return name.replace("model.blocks.", "model.layers.") if kind == "kimi_k25" else name


@pytest.mark.parametrize("kind", KINDS)
def test_names_of_the_class_are_found_in_its_checkpoint_and_the_reverse(kind, names):
    types, pairs = names(kind)
    assert sum(n != stored for n, stored in pairs.items()) >= 2
    for targets, held in ((list(pairs), list(pairs.values())), (list(pairs.values()), list(pairs))):
        rule = naming.find_rule(targets, frozenset(held), model_types=types)
        assert [rule(t) for t in targets] == held


@pytest.mark.parametrize("kind", KINDS)
def test_no_part_of_a_row_is_idle(kind, names):
    """A row without any one of its pairs names some layer wrongly."""
    _, pairs = names(kind)
    rows = [r for r in conventions.CONVENTIONS if kind in r.model_types]
    print(*unlike(rows[-1], pairs), sep="\n")
    (row,) = [r for r in rows if fits(r, pairs)]
    for less, lost in lessened(row):
        assert not fits(less, pairs), lost


def fits(row, pairs):
    return not unlike(row, pairs)


def unlike(row, pairs):
    """Return the names that a row renames otherwise than transformers."""
    to_class, to_stored = conventions.both_ways(row)
    return [f"{n} {stored}: {to_class(stored)} {to_stored(n)}" for n, stored in pairs.items()
            if to_class(stored) != n or to_stored(n) != stored]  # fmt: skip


def lessened(row: Convention) -> Iterator[tuple[Convention, object]]:
    """Yield the row without each of its parts that linear layers can show, and the part."""
    for pair in row.prefixes:
        yield replace(row, prefixes=tuple(p for p in row.prefixes if p != pair)), pair
    for at in row.within:
        others = tuple(w for w in row.within if w != at)
        yield replace(row, within=others), at
        for pair in at[2]:
            kept = (*at[:2], tuple(p for p in at[2] if p != pair))
            yield replace(row, within=(*others, kept)), pair
    for pair in row.inside:
        yield replace(row, inside=tuple(p for p in row.inside if p != pair)), pair


def test_numbers_in_a_part_keep_their_order():
    row = Convention(inside=(("b.*.x.*.", "x.*.y.*.b."),), model_types=frozenset({"t"}))
    to_class, to_stored = conventions.both_ways(row)
    assert to_class("a.b.3.x.12.weight") == "a.x.3.y.12.b.weight"
    assert to_stored("a.x.3.y.12.b.weight") == "a.b.3.x.12.weight"
    assert to_class("a.b.c.x.12.weight") == "a.b.c.x.12.weight"


def test_parts_renamed_behind_a_beginning_are_renamed_nowhere_else():
    row = Convention(within=(("text.", "model.text.", ((".wo.", ".o_proj."),)),))
    to_class, to_stored = conventions.both_ways(row)
    assert to_class("text.0.wo.weight") == "model.text.0.o_proj.weight"
    assert to_stored("model.text.0.o_proj.weight") == "text.0.wo.weight"
    assert to_class("vision.0.wo.weight") == "vision.0.wo.weight"
    assert to_stored("model.vision.0.o_proj.weight") == "model.vision.0.o_proj.weight"
    assert re.fullmatch(r"'text\.' as 'model\.text\.'", to_class.what)


# What transformers does to tensors beyond their names: (class's part, stored), and the model.
CUT = {
    "kimi_k25": ("model.vision_tower.layers.0.attn.q_proj.weight",
                 "vision_tower.encoder.blocks.0.wqkv.weight"),  # and rows in another order
    "rf_detr": ("model.decoder.layers.0.self_attn.q_proj.weight",
                "transformer.decoder.layers.0.self_attn.in_proj_weight"),
}  # fmt: skip


@pytest.mark.parametrize("kind", CUT)
def test_what_no_row_can_say_is_refused_with_the_way_out(kind, names):
    part, stored = CUT[kind]
    types, pairs = names(kind)
    targets, held = [part, *list(pairs)[:3]], {stored, *pairs.values()}
    way = r"not in the base: \S+\. .*save_pretrained\(\.\.\., save_original_format=False\)"
    with pytest.raises(PlanError, match=way) as refused:
        naming.find_rule(targets, held, model_types=types)
    assert part in str(refused.value)
    # A layer that is missing altogether is no matter of names.
    lost = [n for n in pairs if n.endswith(".mlp.fc1.weight")][-1]
    with pytest.raises(PlanError) as refused:
        naming.find_rule([lost, *pairs], held - {pairs[lost]}, model_types=types)
    assert "save_original_format" not in str(refused.value)
