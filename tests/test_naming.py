"""One rule from adapter names to checkpoint names, or a refusal that says what to do."""

import re

import pytest
import torch
from transformers import AutoModel, BertModel, GPT2Model, LlamaModel

import dora_export
from dora_export import DoraExportError
from dora_export.errors import PlanError
from dora_export.naming import find_rule, parse_map_prefix
from tests.rider_models import (
    WARNINGS,
    bert_classifier,
    edit_json,
    gpt2,
    llama,
    logits,
    prepare,
    rename,
    rewrite,
    shapes,
    tensors,
)

# Reasons stand beside the entries.
pytestmark = [pytest.mark.filterwarnings(w) for w in WARNINGS]

DORA = {"target_modules": ["q_proj", "down_proj"], "use_dora": True}
PREFIX = "base_model.model."


def merged_logits(case, output, old="", new="", **options):
    """Merge, put ``new`` for ``old`` in the output's names, and run it as the trained class."""
    report = dora_export.merge(case.base, case.adapter, output, **options)
    names = set(shapes(output))
    assert names == set(shapes(case.base)), "the output's names are the base's"
    if old != new:
        rename(output, old, new)
    return logits(case.model_class.from_pretrained(output), case.tokens), report


def check(case, found):
    assert case.distance(found) < 1e-5
    assert case.distance(case.before) > 1e-2


def test_names_that_fit_are_taken_as_they_are(tmp_path):
    case = prepare(tmp_path, llama(), **DORA)
    found, report = merged_logits(case, tmp_path / "out")
    check(case, found)
    assert report.names == "as they are"


def test_a_leading_segment_is_added_where_the_adapter_lacks_it(tmp_path):
    """Trained on the headless class, merged into the checkpoint of the whole model."""
    case = prepare(tmp_path, llama(), **DORA)
    rename(case.adapter, f"{PREFIX}model.", PREFIX)
    found, report = merged_logits(case, tmp_path / "out")
    check(case, found)
    assert report.names == "'model.' added"


def test_a_text_adapter_fits_the_text_part_of_a_larger_model(tmp_path):
    case = prepare(tmp_path, llama(), **DORA)
    rename(case.base, "model.", "language_model.model.")
    found, report = merged_logits(case, tmp_path / "out", "language_model.model.", "model.")
    check(case, found)
    assert report.names == "'language_model.' added"


def test_an_adapter_trained_on_the_headless_class_gives_its_hidden_states(tmp_path):
    torch.manual_seed(0)
    case = _prepare_headless(tmp_path, llama(), LlamaModel, ["q_proj", "down_proj"])
    base, adapter, expected, before = case
    dora_export.merge(base, adapter, tmp_path / "out")
    found = _hidden(AutoModel.from_pretrained(tmp_path / "out"))
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    assert (before - expected).abs().max() > 1e-2 * expected.abs().max()


@pytest.mark.parametrize(
    ("make", "inner", "targets", "prefix"),
    [
        (llama, LlamaModel, ["q_proj", "down_proj"], "model."),
        (gpt2, GPT2Model, ["c_attn", "c_fc"], "transformer."),
        (bert_classifier, BertModel, ["query", "dense"], "bert."),
    ],
    ids=["model", "transformer", "bert"],
)
def test_a_leading_segment_is_taken_away_where_the_base_lacks_it(
    tmp_path, make, inner, targets, prefix
):
    """Hub checkpoints of GPT-2 and BERT are those of the headless class."""
    model = make()
    case = prepare(tmp_path, model, target_modules=targets, use_dora=True)
    if make is bert_classifier:  # "dense" is in the pooler, too, and the head stays out
        rewrite(
            case.base, lambda held: {k: v for k, v in held.items() if not k.startswith("class")}
        )
        outside = {"classifier.weight", "classifier.bias"}
    else:
        outside = set()
    whole = {**tensors(case.base), **{k: model.state_dict()[k] for k in outside}}
    rename(case.base, prefix, "")
    report = dora_export.merge(case.base, case.adapter, tmp_path / "out")
    assert report.names == f"'{prefix}' taken away"
    assert set(shapes(tmp_path / "out")) == set(shapes(case.base))
    loaded = case.model_class(model.config)
    merged = tensors(tmp_path / "out")
    state = {k: merged.get(k.removeprefix(prefix), v) for k, v in whole.items()}
    loaded.load_state_dict(state, strict=False)
    if hasattr(loaded, "tie_weights") and model.config.tie_word_embeddings:
        loaded.tie_weights()
    check(case, logits(loaded, case.tokens))


def test_a_head_saved_whole_keeps_its_name_where_a_segment_is_taken_away(tmp_path):
    case = prepare(
        tmp_path,
        bert_classifier(),
        target_modules=["query"],
        task_type="SEQ_CLS",
        use_dora=True,
    )
    rewrite(
        case.base,
        lambda held: {k: v for k, v in held.items() if k.startswith("bert.")},
    )
    rename(case.base, "bert.", "")
    dora_export.merge(case.base, case.adapter, tmp_path / "out")
    added = set(shapes(tmp_path / "out")) - set(shapes(case.base))
    assert added == {"classifier.weight", "classifier.bias"}
    found = logits(case.model_class.from_pretrained(tmp_path / "out"), case.tokens)
    check(case, found)


@pytest.mark.parametrize(
    ("in_base", "in_adapter"),
    [
        ("language_model.model.", "model.language_model."),
        ("model.language_model.", "language_model.model."),
    ],
)
def test_two_conventions_of_multimodal_models_are_one(tmp_path, in_base, in_adapter):
    case = prepare(tmp_path, llama(), **DORA)
    rename(case.base, "model.", in_base)
    rename(case.adapter, f"{PREFIX}model.", f"{PREFIX}{in_adapter}")
    found, report = merged_logits(case, tmp_path / "out", in_base, "model.")
    assert report.names == f"'{in_adapter}' as '{in_base}'"
    check(case, found)


@pytest.mark.parametrize(
    ("in_base", "in_adapter"),
    [
        ("model.language_model.", "model."),
        ("model.", "model.language_model."),
    ],
)
def test_other_prefixes_are_refused_with_the_option_that_then_works(tmp_path, in_base, in_adapter):
    case = prepare(tmp_path, llama(), **DORA)
    rename(case.base, "model.", in_base)
    rename(case.adapter, f"{PREFIX}model.", f"{PREFIX}{in_adapter}")
    with pytest.raises(DoraExportError) as refusal:
        dora_export.merge(case.base, case.adapter, tmp_path / "out")
    message = str(refusal.value)
    assert "0 of 4 adapter targets match" in message
    assert f'adapter "{in_adapter}layers.*.' in message
    assert f'base "{in_base}layers.*.' in message
    assert not (tmp_path / "out").exists()
    (option,) = re.findall(r"--map-prefix (\S+)", message)
    assert option == f"{in_adapter}={in_base}"
    found, report = merged_logits(case, tmp_path / "out", in_base, "model.", map_prefix=[option])
    check(case, found)
    assert report.names == "--map-prefix"


def test_the_suggested_prefix_is_the_one_that_fits_all_layers(tmp_path):
    """A vision tower with layers of the same names is not what the adapter was trained on."""
    case = prepare(tmp_path, llama(), **DORA)
    rename(case.base, "model.", "model.language_model.")
    first = min(k for k in shapes(case.adapter)).removeprefix(f"{PREFIX}model.")
    vision = f"vit.enc.{first.partition('.lora_')[0]}.weight"
    rewrite(case.base, lambda held: {**held, vision: torch.ones(32, 48)})
    with pytest.raises(DoraExportError, match=r"--map-prefix model\.=model\.language_model\."):
        dora_export.merge(case.base, case.adapter, tmp_path / "out")


def test_a_head_beside_a_renamed_model_must_be_mapped_as_well(tmp_path):
    """Else it would be written under a name that nothing loads."""
    case = prepare(tmp_path, llama(), **DORA, modules_to_save=["lm_head"])
    for old in ("model.", "lm_head."):
        rename(case.base, old, f"language_model.{old}")
    rename(case.adapter, f"{PREFIX}model.", f"{PREFIX}model.language_model.")
    option = "model.language_model.=language_model.model."
    with pytest.raises(DoraExportError, match=r"language_model\.lm_head\.weight"):
        dora_export.merge(case.base, case.adapter, tmp_path / "out", map_prefix=[option])
    options = [option, "lm_head.=language_model.lm_head."]
    found, _ = merged_logits(case, tmp_path / "out", "language_model.", "", map_prefix=options)
    check(case, found)


def test_a_second_option_for_the_head_makes_a_targeted_one_fit(tmp_path):
    case = prepare(tmp_path, llama(), target_modules=["q_proj", "lm_head"], use_dora=True)
    for old in ("model.", "lm_head."):
        rename(case.base, old, f"language_model.{old}")
    rename(case.adapter, f"{PREFIX}model.", f"{PREFIX}model.language_model.")
    option = "model.language_model.=language_model.model."
    with pytest.raises(DoraExportError, match=r"not in the base: lm_head\.weight"):
        dora_export.merge(case.base, case.adapter, tmp_path / "out", map_prefix=[option])
    options = [option, "lm_head.=language_model.lm_head."]
    found, _ = merged_logits(case, tmp_path / "out", "language_model.", "", map_prefix=options)
    check(case, found)


def test_an_option_without_an_equals_sign_is_refused():
    with pytest.raises(PlanError, match="OLD=NEW"):
        parse_map_prefix(["model."])


def test_names_that_fit_in_two_ways_are_refused_with_the_option_that_decides(tmp_path):
    case = prepare(tmp_path, llama(), **DORA)
    rename(case.adapter, f"{PREFIX}model.", PREFIX)
    rewrite(
        case.base,
        lambda held: {**held, **{k.replace("model.", "draft.", 1): v.clone()
                                 for k, v in held.items() if k.startswith("model.")}},
    )  # fmt: skip
    with pytest.raises(DoraExportError, match="more than one way") as refusal:
        dora_export.merge(case.base, case.adapter, tmp_path / "out")
    assert "'draft.' added" in str(refusal.value)
    assert "'model.' added" in str(refusal.value)
    assert re.search(r"--map-prefix layers\.=(draft|model)\.layers\.", str(refusal.value))
    report = dora_export.merge(
        case.base, case.adapter, tmp_path / "out", map_prefix=["layers.=model.layers."]
    )
    assert report.tensors["merged"] == 4
    before, after = tensors(case.base), tensors(tmp_path / "out")
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    assert changed
    assert all(k.startswith("model.") for k in changed)


def test_rules_are_never_mixed():
    targets = ["layers.0.q.weight", "layers.1.q.weight"]
    with pytest.raises(PlanError, match="1 of 2 adapter targets match"):
        find_rule(targets, ["layers.0.q.weight", "model.layers.1.q.weight"])
    with pytest.raises(PlanError, match="1 of 2 adapter targets match"):
        find_rule(
            ["model.layers.0.q.weight", "model.layers.1.q.weight"],
            ["layers.0.q.weight", "model.layers.1.q.weight"],
        )


@pytest.mark.parametrize(
    ("targets", "known", "hint"),
    [
        (["foo.mlp.fc.weight"], ["bar.mlp.fc.weight"], "pass --map-prefix foo.=bar."),
        (["foo.mlp.fc.weight"], ["bar.mlp.fd.weight"], "or pass --map-prefix OLD=NEW."),
        # What fits most targets; of equals the shortest, else the first.
        (["x.a.0.q.weight", "x.a.1.q.weight"], ["v.a.0.q.weight", "l.t.a.0.q.weight",
         "l.t.a.1.q.weight"], "pass --map-prefix x.=l.t."),
        (["x.a.0.q.weight"], ["long.a.0.q.weight", "b.a.0.q.weight"], "--map-prefix x.=b."),
        (["x.a.0.q.weight"], ["c.a.0.q.weight", "b.a.0.q.weight"], "--map-prefix x.=b."),
    ],
    ids=str,
)  # fmt: skip
def test_the_hint_is_the_prefix_that_differs(targets, known, hint):
    with pytest.raises(PlanError) as refusal:
        find_rule(targets, known)
    assert hint in str(refusal.value)
    assert "None" not in str(refusal.value)


@pytest.mark.parametrize(
    ("known", "pattern"),
    [
        (["a.0.x.weight", "z.9.other.q.weight"], "z.*.other.q.weight"),  # the same last two
        (["a.weight", "h.0.x.weight"], "h.*.x.weight"),  # numbered, like most layers
        (["b.weight", "a.weight"], "a.weight"),
    ],
    ids=str,
)
def test_the_message_shows_the_name_of_the_base_that_is_most_alike(known, pattern):
    with pytest.raises(
        PlanError, match=re.escape(f'adapter "x.layers.*.q.weight", base "{pattern}"')
    ):
        find_rule(["x.layers.0.q.weight"], known)


def test_the_one_segment_of_a_name_is_not_taken_away():
    assert find_rule(["transformer.wte.weight"], ["wte.weight"]).strip == "transformer."
    with pytest.raises(PlanError, match="0 of 1"):
        find_rule(["head.weight"], ["weight"])


def test_a_base_that_has_some_of_the_layers_is_refused_with_those_it_lacks(tmp_path):
    case = prepare(tmp_path, llama(), **DORA)
    lacking = "model.layers.1.mlp.down_proj.weight"
    rewrite(case.base, lambda held: {k: v for k, v in held.items() if k != lacking})
    with pytest.raises(DoraExportError, match=f"3 of 4 adapter targets.*{re.escape(lacking)}"):
        dora_export.merge(case.base, case.adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_base_that_the_adapter_names_is_in_the_message(tmp_path):
    case = prepare(tmp_path, llama(), **DORA)
    edit_json(case.adapter / "adapter_config.json", base_model_name_or_path="some/other-model")
    rename(case.base, "model.", "network.trunk.")
    with pytest.raises(DoraExportError, match="some/other-model"):
        dora_export.merge(case.base, case.adapter, tmp_path / "out")


def test_an_adapter_with_a_gap_is_refused(tmp_path):
    case = prepare(tmp_path, llama(num_hidden_layers=3), **DORA)
    rewrite(case.adapter, lambda held: {k: v for k, v in held.items() if "layers.1.mlp" not in k})
    with pytest.raises(DoraExportError, match=r"model\.layers\.1\.mlp\.down_proj\.weight"):
        dora_export.merge(case.base, case.adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_adapter_meant_for_some_layers_has_no_gap(tmp_path):
    case = prepare(tmp_path, llama(num_hidden_layers=3), **DORA, layers_to_transform=[0, 2])
    found, report = merged_logits(case, tmp_path / "out")
    check(case, found)
    assert report.tensors["merged"] == 4


@pytest.mark.parametrize("part", ["lora_A.weight", "lora_B.weight", "lora_magnitude_vector"])
def test_an_adapter_that_lacks_a_part_of_one_layer_is_refused(tmp_path, part):
    case = prepare(tmp_path, llama(), **DORA)
    key = f"{PREFIX}model.layers.1.self_attn.q_proj.{part}"
    assert key in shapes(case.adapter)
    rewrite(case.adapter, lambda held: {k: v for k, v in held.items() if k != key})
    with pytest.raises(DoraExportError, match=r"layers\.1\.self_attn\.q_proj"):
        dora_export.merge(case.base, case.adapter, tmp_path / "out")


@pytest.mark.parametrize("wrapper", ["_orig_mod.", "_fsdp_wrapped_module.", "module."])
def test_segments_of_training_wrappers_are_no_part_of_names(tmp_path, wrapper):
    case = prepare(tmp_path, llama(), **DORA)
    rename(case.adapter, PREFIX, f"{PREFIX}{wrapper}")
    found, _ = merged_logits(case, tmp_path / "out")
    check(case, found)


def _prepare_headless(folder, whole, inner_class, targets):
    from peft import LoraConfig, get_peft_model

    from tests.rider_models import train

    whole.eval().save_pretrained(folder / "base")
    inner = inner_class.from_pretrained(folder / "base").eval()
    before = _hidden(inner)
    config = LoraConfig(r=4, lora_alpha=10, target_modules=targets, use_dora=True)
    wrapped = get_peft_model(inner, config).eval()
    train(wrapped)
    wrapped.save_pretrained(folder / "adapter")
    return folder / "base", folder / "adapter", _hidden(wrapped), before


def _hidden(model):
    from tests.rider_models import TOKENS

    with torch.no_grad():
        return model.eval()(input_ids=TOKENS).last_hidden_state.double()


# What checkpoints and classes of transformers call the same tensors, by model type.
TWO_NAMES = {
    "llava": {"language_model.model.layers.0.q.weight": "model.language_model.layers.0.q.weight",
              "vision_tower.layers.0.q.weight": "model.vision_tower.layers.0.q.weight",
              "language_model.lm_head.weight": "lm_head.weight"},
    "emu3": {"text_model.model.layers.0.q.weight": "model.text_model.layers.0.q.weight",
             "text_model.lm_head.weight": "lm_head.weight",
             "vqmodel.encoder.conv.weight": "model.vqmodel.encoder.conv.weight"},
    "qwen2_5_vl": {"model.layers.0.q.weight": "model.language_model.layers.0.q.weight",
                   "visual.blocks.0.q.weight": "model.visual.blocks.0.q.weight"},
    "qwen3_5": {"model.language_model.layers.0.q.weight": "model.layers.0.q.weight",
                "model.language_model.layers.1.q.weight": "model.layers.1.q.weight"},
    "mixtral": {"model.layers.0.block_sparse_moe.gate.weight": "model.layers.0.mlp.gate.weight",
                "model.layers.0.self_attn.q.weight": "model.layers.0.self_attn.q.weight"},
    "phimoe": {"model.layers.0.block_sparse_moe.gate.weight": "model.layers.0.mlp.router.weight",
               "model.layers.0.self_attn.q.weight": "model.layers.0.self_attn.q.weight"},
    "granitemoe": {"model.layers.0.block_sparse_moe.router.layer.weight":
                   "model.layers.0.block_sparse_moe.router.weight"},
    "nemotron_h": {"backbone.layers.0.mixer.in_proj.weight": "model.layers.0.mixer.in_proj.weight",
                   "lm_head.weight": "lm_head.weight"},
    "vit": {f"vit.encoder.layer.0.{old}.weight": f"vit.layers.0.{new}.weight" for old, new in (
        ("attention.attention.query", "attention.q_proj"),
        ("attention.output.dense", "attention.o_proj"), ("intermediate.dense", "mlp.fc1"),
        ("output.dense", "mlp.fc2"))},
    "dinov2": {f"encoder.layer.0.{old}.weight": f"encoder.layer.0.{new}.weight" for old, new in (
        ("attention.attention.key", "attention.k_proj"),
        ("attention.attention.value", "attention.v_proj"))},
}  # fmt: skip


@pytest.mark.parametrize("model_type", TWO_NAMES)
def test_either_name_fits_the_other(model_type):
    pairs = TWO_NAMES[model_type]
    for names in (pairs, {new: old for old, new in pairs.items()}):
        rule = find_rule(list(names), list(names.values()), model_types=(model_type,))
        assert {name: rule(name) for name in names} == names
    if model_type != "llava":  # whose names are those of many
        with pytest.raises(PlanError, match="adapter targets match this base"):
            find_rule(list(pairs), list(pairs.values()), model_types=("llama",))
