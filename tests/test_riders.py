"""What rides along in a PEFT adapter beside A, B and m, against PEFT's unmerged forward."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file

import dora_export
from dora_export import DoraExportError
from tests.rider_models import (
    TOKENS,
    VOCABULARY,
    WARNINGS,
    bert_classifier,
    edit_json,
    gpt2,
    llama,
    llama_classifier,
    prepare,
    rewrite,
    shapes,
    tensors,
    tied_llama,
)

# Reasons stand beside the entries.
pytestmark = [pytest.mark.filterwarnings(w) for w in WARNINGS]

ATTENTION = ["q_proj", "v_proj"]


def test_a_classification_head_that_the_base_has_is_replaced(tmp_path):
    case = prepare(
        tmp_path, llama_classifier(), target_modules=ATTENTION, task_type="SEQ_CLS", use_dora=True
    )
    report = case.check(tmp_path / "out")
    assert report.tensors["replaced"] == 1
    assert "added" not in report.tensors


def test_a_classification_head_that_the_base_lacks_is_added(tmp_path):
    case = prepare(
        tmp_path, llama_classifier(), target_modules=ATTENTION, task_type="SEQ_CLS", use_dora=True
    )
    rewrite(case.base, lambda held: {k: v for k, v in held.items() if k != "score.weight"})
    report = case.check(tmp_path / "out")
    assert report.tensors["added"] == 1
    assert any("score.weight" in w for w in report.warnings)
    assert shapes(tmp_path / "out")["score.weight"] == (3, 32)


def test_a_head_with_weight_and_bias_is_replaced_whole(tmp_path):
    case = prepare(
        tmp_path, bert_classifier(), target_modules=["query"], task_type="SEQ_CLS", use_dora=True
    )
    report = case.check(tmp_path / "out")
    assert report.tensors["replaced"] == 2


def test_a_head_trained_in_another_dtype_is_stored_in_the_bases(tmp_path):
    case = prepare(tmp_path, bert_classifier(), target_modules=["query"], task_type="SEQ_CLS")
    rewrite(
        case.adapter,
        lambda held: {k: v.half() if "classifier" in k else v for k, v in held.items()},
    )
    dora_export.merge(case.base, case.adapter, tmp_path / "out")
    merged = tensors(tmp_path / "out")
    stored = load_file(case.adapter / "adapter_model.safetensors")
    expected = stored["base_model.model.classifier.weight"].float()
    assert merged["classifier.weight"].dtype == torch.float32
    assert torch.equal(merged["classifier.weight"], expected)


def test_modules_saved_whole_are_found_by_the_end_of_their_path(tmp_path):
    """PEFT's "norm" is every module whose path ends so, input_layernorm too."""
    case = prepare(tmp_path, llama(), target_modules=ATTENTION, modules_to_save=["norm", "lm_head"])
    report = case.check(tmp_path / "out")
    assert report.tensors["replaced"] == 2 * 2 + 1 + 1


def test_raw_names_of_saved_modules_are_read(tmp_path):
    case = prepare(tmp_path, llama_classifier(), target_modules=ATTENTION, task_type="SEQ_CLS")
    rewrite(
        case.adapter,
        lambda held: {
            k.replace("score.weight", "score.modules_to_save.default.weight"): v
            for k, v in held.items()
        },
    )
    case.check(tmp_path / "out")


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("ends", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]])
def test_adapters_on_untied_embeddings_stay_where_they_are(tmp_path, ends, use_dora):
    case = prepare(tmp_path, llama(), target_modules=[*ATTENTION, *ends], use_dora=use_dora)
    case.check(tmp_path / "out")
    assert (tmp_path / "out/config.json").read_bytes() == (case.base / "config.json").read_bytes()


def test_a_stored_base_layer_replaces_the_base_before_the_merge(tmp_path):
    """The base handed in differs from the one trained on exactly in what the adapter brings."""
    case = prepare(
        tmp_path, llama(), target_modules=["embed_tokens", "lm_head", "q_proj"], use_dora=True
    )
    assert any("base_layer.weight" in k for k in shapes(case.adapter))
    noise = torch.Generator().manual_seed(8)

    def disturbed(held):
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            held[name] = torch.randn(held[name].shape, generator=noise)
        return held

    rewrite(case.base, disturbed)
    case.check(tmp_path / "out")


def test_a_base_layer_applied_after_the_merge_would_be_seen(tmp_path):
    """The check above can fail: the stored copy alone is far from the trained forward."""
    case = prepare(tmp_path, llama(), target_modules=["lm_head"], use_dora=True)
    found, _ = case.merged(tmp_path / "out")
    merged = case.model_class.from_pretrained(tmp_path / "out")
    stored = load_file(case.adapter / "adapter_model.safetensors")
    with torch.no_grad():
        merged.lm_head.weight.copy_(stored["base_model.model.lm_head.base_layer.weight"])
        wrong = merged(input_ids=case.tokens).logits.double()
    assert case.distance(found) < 1e-5
    assert case.distance(wrong) > 1e-2


@pytest.mark.parametrize("bias", ["all", "lora_only"])
@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("make", [gpt2, bert_classifier])
def test_trained_biases_replace_the_bases(tmp_path, make, use_dora, bias):
    targets = ["c_attn", "c_fc"] if make is gpt2 else ["query", "dense"]
    case = prepare(tmp_path, make(), target_modules=targets, bias=bias, use_dora=use_dora)
    report = case.check(tmp_path / "out")
    biases = [k for k in shapes(case.adapter) if k.endswith("bias")]
    assert report.tensors["replaced"] == len(biases) > 3


def test_trained_biases_go_with_a_saved_head(tmp_path):
    case = prepare(
        tmp_path, bert_classifier(), target_modules=["query"], bias="all", task_type="SEQ_CLS"
    )
    case.check(tmp_path / "out")


def test_a_bias_of_B_is_added_with_the_scaling(tmp_path):
    case = prepare(tmp_path, gpt2(), target_modules=["c_attn", "c_proj"], lora_bias=True)
    assert any("lora_B.bias" in k for k in shapes(case.adapter))
    case.check(tmp_path / "out")


def test_a_bias_of_B_needs_a_bias_in_the_base(tmp_path):
    torch.manual_seed(0)
    model = llama(attention_bias=True)
    case = prepare(tmp_path, model, target_modules=ATTENTION, lora_bias=True)
    case.check(tmp_path / "fits")
    rewrite(case.base, lambda held: {k: v for k, v in held.items() if not k.endswith(".bias")})
    with pytest.raises(DoraExportError, match=r"q_proj\.bias"):
        dora_export.merge(case.base, case.adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "indices", [[1, 50, 7], {"embed_tokens": [1, 50, 7]}, {"model.embed_tokens": [96, 0]}]
)
def test_trained_tokens_replace_rows_of_the_embedding(tmp_path, indices):
    tokens = torch.tensor([[1, 7, 50, 3, 96, 0], [2, 50, 50, 1, 8, 96]])
    case = prepare(
        tmp_path,
        llama(),
        tokens=tokens,
        target_modules=ATTENTION,
        use_dora=True,
        trainable_token_indices=indices,
    )
    case.check(tmp_path / "out")
    before, after = tensors(case.base), tensors(tmp_path / "out")
    name = "model.embed_tokens.weight"
    changed = (before[name] != after[name]).any(dim=1).nonzero().flatten().tolist()
    rows = indices if isinstance(indices, list) else next(iter(indices.values()))
    assert changed == sorted(rows)
    assert torch.equal(before["lm_head.weight"], after["lm_head.weight"])


def test_trained_tokens_of_both_untied_ends_keep_their_own_indices(tmp_path):
    case = prepare(
        tmp_path,
        llama(),
        target_modules=ATTENTION,
        trainable_token_indices={"embed_tokens": [1, 5, 9], "lm_head": [2, 70]},
    )
    case.check(tmp_path / "out")


def test_trained_tokens_of_gpt2_are_found_under_its_own_name(tmp_path):
    case = prepare(
        tmp_path, gpt2(), target_modules=["c_attn"], trainable_token_indices={"wte": [4, 5, 6]}
    )
    case.check(tmp_path / "out")


def test_trained_tokens_without_indices_in_the_config_are_refused(tmp_path):
    case = prepare(tmp_path, llama(), target_modules=ATTENTION, trainable_token_indices=[1, 50, 7])
    edit_json(case.adapter / "adapter_config.json", trainable_token_indices=None)
    with pytest.raises(DoraExportError, match="trainable_token_indices"):
        dora_export.merge(case.base, case.adapter, tmp_path / "out")
    edit_json(case.adapter / "adapter_config.json", trainable_token_indices=[1, 50])
    with pytest.raises(DoraExportError, match="trainable_token_indices"):
        dora_export.merge(case.base, case.adapter, tmp_path / "out")
    edit_json(case.adapter / "adapter_config.json", trainable_token_indices=[1, 50, VOCABULARY])
    with pytest.raises(DoraExportError, match=f"{VOCABULARY}"):
        dora_export.merge(case.base, case.adapter, tmp_path / "out")


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("targets", [ATTENTION, [*ATTENTION, "embed_tokens", "lm_head"]])
def test_a_resized_vocabulary_is_taken_over(tmp_path, tied, targets):
    tokens = torch.cat([TOKENS, torch.tensor([[97, 98, 99] * 3 + [4, 99]])])
    case = prepare(
        tmp_path,
        llama(tie_word_embeddings=tied),
        resize=3,
        tokens=tokens,
        by_path=True,
        target_modules=targets,
        use_dora=True,
    )
    assert (VOCABULARY + 3, 32) in shapes(case.adapter).values()
    case.check(tmp_path / "out")
    after = tensors(tmp_path / "out")
    assert after["model.embed_tokens.weight"].shape == (VOCABULARY + 3, 32)
    text = (case.base / "config.json").read_bytes()
    text = text.replace(b'"vocab_size": 97', b'"vocab_size": 100')
    if tied and "lm_head" in targets:
        text = text.replace(b'"tie_word_embeddings": true', b'"tie_word_embeddings": false')
    assert (tmp_path / "out/config.json").read_bytes() == text


def test_a_vocabulary_resized_on_one_untied_end_only_is_refused(tmp_path):
    case = prepare(
        tmp_path, llama(), resize=3, by_path=True, target_modules=ATTENTION, use_dora=True
    )
    rewrite(case.adapter, lambda held: {k: v for k, v in held.items() if "lm_head" not in k})
    with pytest.raises(DoraExportError, match="save_embedding_layers=True"):
        dora_export.merge(case.base, case.adapter, tmp_path / "out")


def test_two_vocabulary_sizes_are_refused(tmp_path):
    case = prepare(
        tmp_path, llama(), resize=3, by_path=True, target_modules=ATTENTION, use_dora=True
    )

    def shortened(held):
        held["base_model.model.lm_head.weight"] = held["base_model.model.lm_head.weight"][:98]
        return {k: v.contiguous() for k, v in held.items()}

    rewrite(case.adapter, shortened)
    with pytest.raises(DoraExportError, match="98"):
        dora_export.merge(case.base, case.adapter, tmp_path / "out")


def test_resized_embeddings_saved_as_trained_modules(tmp_path):
    tokens = torch.tensor([[97, 98, 1, 4, 99, 99]])
    case = prepare(
        tmp_path,
        llama(),
        resize=3,
        tokens=tokens,
        target_modules=ATTENTION,
        modules_to_save=["embed_tokens", "lm_head"],
    )
    case.check(tmp_path / "out")


def test_trained_tokens_of_a_resized_vocabulary(tmp_path):
    tokens = torch.tensor([[97, 98, 1, 4, 99, 99]])
    case = prepare(
        tmp_path,
        tied_llama(),
        resize=3,
        tokens=tokens,
        by_path=True,
        target_modules=ATTENTION,
        trainable_token_indices=[97, 98, 99],
        save={"save_embedding_layers": True},
    )
    case.check(tmp_path / "out")


def test_training_only_tensors_are_ignored_by_name_and_listed(tmp_path):
    case = prepare(tmp_path, llama(), target_modules=ATTENTION, use_dora=True)
    q = "base_model.model.model.layers.0.self_attn.q_proj"
    extra = {
        f"{q}.lora_velora_embed": torch.ones(4, 32),
        f"{q}.lora_monteclora_sampler.std": torch.ones(4),
    }
    rewrite(case.adapter, lambda held: held | extra)
    report = case.check(tmp_path / "out")
    assert set(report.ignored) == set(extra)
    assert report.adapter_tensors_used + len(report.ignored) == report.adapter_tensors


@pytest.mark.parametrize("name", ["lora_diag", "lora_unheard_of.weight", "rotary.inv_freq"])
def test_tensors_of_no_known_meaning_are_refused(tmp_path, name):
    case = prepare(tmp_path, llama(), target_modules=ATTENTION, use_dora=True)
    key = f"base_model.model.model.layers.0.self_attn.q_proj.{name}"
    rewrite(case.adapter, lambda held: held | {key: torch.ones(4)})
    with pytest.raises(DoraExportError, match="q_proj"):
        dora_export.merge(case.base, case.adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_strength_moves_replaced_tensors_as_well(tmp_path):
    case = prepare(
        tmp_path, bert_classifier(), target_modules=["query"], task_type="SEQ_CLS", use_dora=True
    )
    dora_export.merge(case.base, case.adapter, tmp_path / "out", strength=0.25)
    base, half = tensors(case.base), tensors(tmp_path / "out")
    stored = load_file(case.adapter / "adapter_model.safetensors")
    for name in ("classifier.weight", "classifier.bias"):
        exact = base[name].double() + 0.25 * (
            stored[f"base_model.model.{name}"].double() - base[name].double()
        )
        assert torch.allclose(half[name].double(), exact, rtol=2e-7, atol=1e-9)


def test_riders_of_a_sharded_base_go_into_the_right_files(tmp_path):
    model = llama()
    case = prepare(
        tmp_path, model, target_modules=[*ATTENTION, "lm_head"], trainable_token_indices=None
    )
    sharded = copy.copy(case)
    sharded.base = tmp_path / "sharded"
    model_class = case.model_class
    model_class.from_pretrained(case.base).save_pretrained(sharded.base, max_shard_size="8KB")
    assert len(list(sharded.base.glob("*.safetensors"))) > 3
    sharded.check(tmp_path / "out")


def test_a_half_precision_copy_of_an_embedding_is_replaced_exactly(tmp_path):
    case = prepare(tmp_path, llama(), target_modules=["lm_head"], use_dora=True)
    path = case.adapter / "adapter_model.safetensors"
    held = load_file(path)
    key = "base_model.model.lm_head.base_layer.weight"
    held[key] = held[key].bfloat16()
    save_file(held, path, metadata={"format": "pt"})
    rewrite(case.base, lambda base: {k: v.bfloat16() for k, v in base.items()})
    dora_export.merge(case.base, case.adapter, tmp_path / "out")
    assert tensors(tmp_path / "out")["lm_head.weight"].dtype == torch.bfloat16
