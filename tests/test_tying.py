"""Tied embeddings: each end as PEFT's unmerged forward has it, tied only while they are one."""

import json

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    T5Config,
    T5ForConditionalGeneration,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

import dora_export
from dora_export import DoraExportError
from tests.rider_models import (
    TOLERANCE,
    VOCABULARY,
    WARNINGS,
    edit_json,
    gpt2,
    llama,
    logits,
    prepare,
    rewrite,
    shapes,
    tensors,
    tied_llama,
)

# Reasons stand beside the entries.
pytestmark = [pytest.mark.filterwarnings(w) for w in WARNINGS]

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# Tokens that are among the trained ones, so that both ends matter.
TOKENS = torch.tensor([[1, 5, 7, 3, 9, 2, 70, 11], [5, 5, 1, 60, 61, 3, 7, 96]])
BOTH = ["embed_tokens", "lm_head"]


def assert_untied(case, output):
    """Both ends stored and different, and config.json the base's but for the one value."""
    stored = tensors(output)
    assert not torch.equal(stored[EMBEDDING], stored[HEAD])
    text = (case.base / "config.json").read_bytes()
    edited = text.replace(b'"tie_word_embeddings": true', b'"tie_word_embeddings": false')
    assert edited != text
    assert (output / "config.json").read_bytes() == edited


def assert_tied(case, output):
    assert HEAD not in shapes(output)
    assert (output / "config.json").read_bytes() == (case.base / "config.json").read_bytes()


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("targets", [["embed_tokens"], ["lm_head"], BOTH], ids="+".join)
def test_an_adapter_on_tied_ends_changes_each_end_by_its_own(tmp_path, targets, use_dora):
    case = prepare(tmp_path, tied_llama(), target_modules=[*targets, "q_proj"], use_dora=use_dora)
    report = case.check(tmp_path / "out")
    assert_untied(case, tmp_path / "out")
    assert any("tie_word_embeddings: false" in n for n in report.notes)
    assert report.adapter_tensors_used == report.adapter_tensors


@pytest.mark.parametrize("targets", [["embed_tokens"], ["lm_head"], BOTH], ids="+".join)
def test_adapters_that_bring_no_copy_of_the_tied_tensor_are_merged_as_well(tmp_path, targets):
    case = prepare(
        tmp_path,
        tied_llama(),
        target_modules=targets,
        use_dora=True,
        save={"save_embedding_layers": False},
    )
    assert not any("base_layer" in k for k in shapes(case.adapter))
    case.check(tmp_path / "out")
    assert_untied(case, tmp_path / "out")


@pytest.mark.parametrize("target", BOTH)
def test_a_stored_copy_of_one_tied_end_stands_for_both(tmp_path, target):
    """The base handed in differs from the one trained on exactly in what the adapter brings."""
    case = prepare(tmp_path, tied_llama(), target_modules=[target, "q_proj"], use_dora=True)
    assert sum("base_layer" in k for k in shapes(case.adapter)) == 1
    noise = torch.randn(VOCABULARY, 32, generator=torch.Generator().manual_seed(8))
    rewrite(case.base, lambda held: {**held, EMBEDDING: noise})
    case.check(tmp_path / "out")
    assert_untied(case, tmp_path / "out")


def test_peft_merges_of_tied_ends_are_no_reference(tmp_path):
    """What these tests guard against: tied ends merged as one are far from the forward."""
    kept = []
    case = prepare(
        tmp_path, tied_llama(), target_modules=["lm_head"], use_dora=True, after=kept.append
    )
    with torch.no_grad():
        wrong = logits(kept[0].merge_and_unload(), case.tokens)
    assert case.distance(wrong) > 1000 * TOLERANCE


def test_gpt2_tied_by_default_is_untied_in_a_config_without_the_key(tmp_path):
    case = prepare(tmp_path, gpt2(), target_modules=["wte", "c_attn"], use_dora=True)
    case.edit_config(tie_word_embeddings=None)
    case.check(tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config.pop("tie_word_embeddings") is False
    assert config == case.config()


def test_ends_stored_twice_without_the_key_are_tied_when_they_are_equal(tmp_path):
    case = prepare(tmp_path, gpt2(), target_modules=["wte", "c_attn"], use_dora=True)
    case.edit_config(tie_word_embeddings=None)
    rewrite(case.base, lambda h: {**h, HEAD: h["transformer.wte.weight"].clone()})
    case.check(tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is False


def test_ends_stored_twice_without_the_key_are_apart_when_they_differ(tmp_path):
    case = prepare(tmp_path, llama(), target_modules=["embed_tokens"], use_dora=True)
    case.edit_config(tie_word_embeddings=None)
    report = dora_export.merge(case.base, case.adapter, tmp_path / "out")
    assert report.notes == ()
    assert (tmp_path / "out/config.json").read_bytes() == (case.base / "config.json").read_bytes()
    assert torch.equal(tensors(tmp_path / "out")[HEAD], tensors(case.base)[HEAD])


def test_ends_that_differ_though_the_config_ties_them_are_refused_where_it_matters(tmp_path):
    case = prepare(tmp_path, tied_llama(), target_modules=["lm_head"], use_dora=True)
    other = prepare(tmp_path, tied_llama(), target_modules=["q_proj"], prefix="q-")
    drifted = torch.randn(VOCABULARY, 32, generator=torch.Generator().manual_seed(0))
    rewrite(case.base, lambda held: {**held, HEAD: drifted})
    with pytest.raises(DoraExportError, match="tie_word_embeddings"):
        dora_export.merge(case.base, case.adapter, tmp_path / "out")
    dora_export.merge(case.base, other.adapter, tmp_path / "fine")
    assert torch.equal(tensors(tmp_path / "fine")[HEAD], drifted)


@pytest.mark.parametrize("targets", [["embed_tokens"], ["lm_head"], BOTH], ids="+".join)
def test_a_tied_base_that_stores_both_ends_is_untied_in_both(tmp_path, targets):
    case = prepare(tmp_path, tied_llama(), target_modules=targets, use_dora=True)
    rewrite(case.base, lambda held: {**held, HEAD: held[EMBEDDING].clone()})
    case.check(tmp_path / "out")
    assert_untied(case, tmp_path / "out")


def test_ends_kept_tied_in_training_are_changed_once_and_stay_tied(tmp_path):
    case = prepare(
        tmp_path, tied_llama(), target_modules=[*BOTH, "q_proj"], ensure_weight_tying=True
    )
    keys = shapes(case.adapter)
    assert sum("embed_tokens" in k or "lm_head" in k for k in keys) == 6
    report = case.check(tmp_path / "out")
    assert_tied(case, tmp_path / "out")
    assert report.adapter_tensors_used == report.adapter_tensors


def test_ends_kept_tied_in_training_change_in_both_places_where_both_are_stored(tmp_path):
    case = prepare(tmp_path, tied_llama(), target_modules=BOTH, ensure_weight_tying=True)
    rewrite(case.base, lambda held: {**held, HEAD: held[EMBEDDING].clone()})
    case.check(tmp_path / "out")
    stored = tensors(tmp_path / "out")
    assert torch.equal(stored[HEAD], stored[EMBEDDING])


def test_ends_said_to_be_tied_that_drifted_apart_are_refused_with_the_way_out(tmp_path):
    def drift(wrapped):  # moving or casting a model gives each end a storage of its own
        with torch.no_grad():
            for name, parameter in wrapped.named_parameters():
                if "lm_head" in name and "lora_A" in name:
                    parameter.data = parameter.data.clone() * 1.5

    case = prepare(
        tmp_path, tied_llama(), target_modules=BOTH, ensure_weight_tying=True, after=drift
    )
    with pytest.raises(DoraExportError, match=r"Set it to false in adapter_config\.json"):
        dora_export.merge(case.base, case.adapter, tmp_path / "out")
    edit_json(case.adapter / "adapter_config.json", ensure_weight_tying=False)
    case.check(tmp_path / "out")
    assert_untied(case, tmp_path / "out")


def test_dora_with_ensured_tying_is_refused(tmp_path):
    case = prepare(
        tmp_path, tied_llama(), target_modules=BOTH, ensure_weight_tying=True, use_dora=True
    )
    with pytest.raises(DoraExportError, match="Train without ensure_weight_tying"):
        dora_export.merge(case.base, case.adapter, tmp_path / "out")


@pytest.mark.parametrize("saved", [["embed_tokens"], ["lm_head"], BOTH], ids="+".join)
def test_a_tied_end_saved_whole_parts_from_the_other(tmp_path, saved):
    case = prepare(
        tmp_path, tied_llama(), target_modules=["q_proj"], modules_to_save=saved, use_dora=True
    )
    case.check(tmp_path / "out")
    assert_untied(case, tmp_path / "out")


def test_tied_ends_saved_whole_and_equal_stay_tied(tmp_path):
    case = prepare(
        tmp_path,
        tied_llama(),
        target_modules=["q_proj"],
        modules_to_save=["embed_tokens"],
        ensure_weight_tying=True,
    )
    assert sum("embed_tokens" in k or "lm_head" in k for k in shapes(case.adapter)) == 2
    case.check(tmp_path / "out")
    assert_tied(case, tmp_path / "out")


def test_equal_copies_of_both_ends_stay_tied_without_being_told(tmp_path):
    case = prepare(
        tmp_path,
        tied_llama(),
        target_modules=["q_proj"],
        modules_to_save=["embed_tokens"],
        ensure_weight_tying=True,
    )
    edit_json(case.adapter / "adapter_config.json", ensure_weight_tying=False, modules_to_save=BOTH)
    case.check(tmp_path / "out")
    assert_tied(case, tmp_path / "out")


@pytest.mark.parametrize(("saved", "adapted"), [BOTH, BOTH[::-1]])
def test_one_end_saved_whole_and_one_adapted(tmp_path, saved, adapted):
    case = prepare(
        tmp_path, tied_llama(), target_modules=[adapted], modules_to_save=[saved], use_dora=True
    )
    case.check(tmp_path / "out")
    assert_untied(case, tmp_path / "out")


@pytest.mark.parametrize(
    ("indices", "tied"),
    [
        ([1, 5], True),
        ({"embed_tokens": [1, 5]}, True),
        ({"embed_tokens": [1, 5], "lm_head": [1, 5]}, True),
        ({"lm_head": [1, 5]}, False),
        ({"embed_tokens": [7, 3, 96], "lm_head": [1, 5]}, False),
    ],
    ids=["list", "embedding", "both alike", "head", "both differ"],
)
def test_trained_tokens_of_tied_ends(tmp_path, indices, tied):
    case = prepare(
        tmp_path,
        tied_llama(),
        tokens=TOKENS,
        target_modules=["q_proj"],
        use_dora=True,
        trainable_token_indices=indices,
    )
    case.check(tmp_path / "out")
    (assert_tied if tied else assert_untied)(case, tmp_path / "out")


def test_an_untied_head_keeps_the_embeddings_dtype(tmp_path):
    case = prepare(
        tmp_path,
        tied_llama(),
        target_modules=["embed_tokens", "q_proj"],
        save={"save_embedding_layers": False},
    )
    rewrite(
        case.base,
        lambda held: {k: v if k == EMBEDDING else v.bfloat16() for k, v in held.items()},
    )
    dora_export.merge(case.base, case.adapter, tmp_path / "out")
    assert torch.equal(tensors(tmp_path / "out")[HEAD], tensors(case.base)[EMBEDDING])


def test_layers_of_a_tied_model_leave_its_ends_alone(tmp_path):
    case = prepare(tmp_path, tied_llama(), target_modules=["q_proj"], use_dora=True)
    report = case.check(tmp_path / "out")
    assert report.notes == ()
    assert_tied(case, tmp_path / "out")
    assert torch.equal(tensors(tmp_path / "out")[EMBEDDING], tensors(case.base)[EMBEDDING])


def test_tied_ends_are_found_in_a_nested_text_config(tmp_path):
    case = prepare(tmp_path, tied_llama(), target_modules=["lm_head"], use_dora=True)
    config = case.config()
    nested = {"architectures": ["LlamaForCausalLM"], "model_type": "x", "text_config": config}
    (case.base / "config.json").write_text(json.dumps(nested))
    dora_export.merge(case.base, case.adapter, tmp_path / "out")
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert written["text_config"]["tie_word_embeddings"] is False
    assert {**written["text_config"], "tie_word_embeddings": True} == config


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("target", ["shared", "embed_tokens", "lm_head"])
def test_models_that_share_an_embedding_more_widely_are_refused_by_name(tmp_path, target, tied):
    torch.manual_seed(0)
    config = T5Config(vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
    config.tie_word_embeddings = True
    case = _prepare_encoder_decoder(tmp_path, T5ForConditionalGeneration(config), [target])
    if not tied and target == "lm_head":
        return  # stored apart: an ordinary layer
    case_config = json.loads((case[0] / "config.json").read_text())
    (case[0] / "config.json").write_text(json.dumps({**case_config, "tie_word_embeddings": tied}))
    with pytest.raises(DoraExportError, match="t5 shares"):
        dora_export.merge(*case, tmp_path / "out")


def test_layers_of_a_model_that_shares_its_embedding_more_widely_are_merged(tmp_path):
    torch.manual_seed(0)
    config = T5Config(vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
    base, adapter = _prepare_encoder_decoder(tmp_path, T5ForConditionalGeneration(config), ["q"])
    report = dora_export.merge(base, adapter, tmp_path / "out")
    assert report.tensors["merged"] == 3


def test_embeddings_tied_to_a_head_of_another_name_are_refused(tmp_path):
    sizes = {"vocab_size": VOCABULARY, "pad_token_id": 0}
    bert = BertConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, **sizes
    )
    whisper = WhisperConfig(
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_source_positions=16,
        max_target_positions=16,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        **sizes,
    )
    for name, model, target in (
        ("bert", BertForMaskedLM(bert), "word_embeddings"),
        ("whisper", WhisperForConditionalGeneration(whisper), "embed_tokens"),
    ):
        base, adapter = _prepare_encoder_decoder(tmp_path / name, model, [target])
        with pytest.raises(DoraExportError, match="head of another name"):
            dora_export.merge(base, adapter, tmp_path / "out")
        edit_json(base / "config.json", tie_word_embeddings=False)
        dora_export.merge(base, adapter, tmp_path / name / "out")


def _prepare_encoder_decoder(folder, model, targets):
    from peft import LoraConfig, get_peft_model

    from tests.rider_models import train

    model.save_pretrained(folder / "base")
    wrapped = get_peft_model(model, LoraConfig(r=4, lora_alpha=10, target_modules=targets))
    train(wrapped)
    wrapped.save_pretrained(folder / "adapter", save_embedding_layers=False)
    return folder / "base", folder / "adapter"
