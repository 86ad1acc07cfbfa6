"""What PEFT's config and keys may say: each setting applied, without effect, or refused by name."""

import dataclasses
import json
import math

import peft
import pytest
import torch
from safetensors.torch import save_file

import dora_export
from dora_export.adapters import peft_config, peft_methods
from dora_export.errors import AdapterError, InputError, PlanError
from tests import small

IN, OUT, RANK = 12, 8, 4
PREFIX = "base_model.model."
MODULE = "model.layers.0.q_proj"
CONFIG = {"peft_type": "LORA", "r": RANK, "lora_alpha": 10, "use_dora": True, "bias": "none"}


def factors(module=MODULE, rank=RANK, prefix=PREFIX, **shapes):
    """A, B and m of a Linear layer, as PEFT names them."""
    return {
        f"{prefix}{module}.lora_A.weight": torch.randn(shapes.get("A", (rank, IN))),
        f"{prefix}{module}.lora_B.weight": torch.randn(shapes.get("B", (OUT, rank))),
        f"{prefix}{module}.lora_magnitude_vector": torch.rand(shapes.get("m", (OUT,))) + 0.5,
    }


def without(tensors, ending):
    return {name: t for name, t in tensors.items() if not name.endswith(ending)}


@pytest.fixture
def adapter(tmp_path):
    """Write an adapter folder and return its normal form."""

    def read(config=(), tensors=None, **settings):
        content = {**CONFIG, **dict(config), **settings}
        folder = tmp_path / "adapter"
        folder.mkdir(exist_ok=True)
        (folder / "adapter_config.json").write_text(json.dumps(content))
        tensors = tensors if tensors is not None else factors()
        save_file(tensors, folder / "adapter_model.safetensors")
        return dora_export.load_adapter(folder)

    return read


def plain(tensors=None):
    """The same without magnitudes."""
    return without(tensors or factors(), "lora_magnitude_vector")


# The settings

KNOWN = peft_config.APPLIED | peft_config.NO_EFFECT | peft_config.REFUSED.keys()
FIELDS = {field.name for field in dataclasses.fields(peft.LoraConfig)}
DEFAULTS = json.loads(json.dumps(peft.LoraConfig(r=RANK, lora_alpha=10).to_dict(), default=list))


@pytest.mark.parametrize("field", sorted(FIELDS))
def test_every_field_of_peft_is_applied_without_effect_or_refused(field):
    places = [
        name for name in ("APPLIED", "NO_EFFECT", "REFUSED") if field in getattr(peft_config, name)
    ]
    assert len(places) == 1, f"{field}: {places or 'new in PEFT, decide what it does'}"


def test_every_default_of_peft_is_accepted(adapter):
    found = adapter(DEFAULTS, plain(), target_modules=["q_proj"])
    assert [u.kind for u in found.updates] == ["lora"]
    assert found.updates[0].scaling == 2.5


APPLIED = {  # what each does is asserted here, in test_peft_parity.py or in test_riders.py
    "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "use_dora", "bias",
    "lora_bias", "modules_to_save", "trainable_token_indices", "ensure_weight_tying",
    "fan_in_fan_out", "init_lora_weights", "loftq_config", "layer_replication", "use_bdlora",
    "use_qalora", "qalora_group_size",
    "target_parameters", "lora_B_layout", "unsloth_fused_expert_lora",  # in test_experts.py
}  # fmt: skip


def test_list_of_applied_fields_is_the_one_the_tests_cover():
    assert peft_config.APPLIED == APPLIED


VALUES = {  # of fields without effect, as PEFT or a user may set them
    "task_type": "CAUSAL_LM",
    "peft_type": "LORA",
    "auto_mapping": {"base_model_class": "Net", "parent_library": "net"},
    "peft_version": "0.22.0.dev0@abc",
    "base_model_name_or_path": "org/base",
    "revision": "main",
    "inference_mode": True,
    "target_modules": ["q_proj"],
    "exclude_modules": ["k_proj"],
    "layers_to_transform": [0],
    "layers_pattern": "layers",
    "lora_dropout": 0.1,
    "runtime_config": {"ephemeral_gpu_offload": True},
    "megatron_core": "megatron.core",
    "eva_config": {"rho": 2.0},
    "corda_config": {"corda_method": "ipm"},
    "lora_ga_config": {"direction": "ArB2r"},
    "velora_config": {"group": 4},
    "monteclora_config": {"samples": 4},
}


@pytest.mark.parametrize("field", sorted(peft_config.NO_EFFECT))
def test_field_without_effect_leaves_the_updates_alone(adapter, field):
    def terms(found):
        return [(u.target, u.kind, u.rank, u.scaling, u.layout) for u in found.updates]

    assert terms(adapter({field: VALUES[field]})) == terms(adapter())


REFUSED_VALUES = {
    "layer_replication": [[0, 2], [1, 3]],
    "target_parameters": ["experts.gate_up_proj"],
    "alora_invocation_tokens": [1, 2],
    "invocation_string": "<answer>",
    "enable_lora": [True, False, True],
}


@pytest.mark.parametrize("field", sorted(peft_config.REFUSED))
def test_field_that_changes_the_weights_is_refused_by_name(adapter, field):
    with pytest.raises(AdapterError, match=rf"adapter_config\.json: .*\n  {field}: \w+"):
        adapter({field: REFUSED_VALUES.get(field, {"some": 1})})


@pytest.mark.parametrize("field", sorted(peft_config.REFUSED))
def test_field_that_would_be_refused_is_accepted_when_off(adapter, field):
    for off in (None, False):
        assert adapter({field: off}).updates


@pytest.mark.parametrize("value", [1, True, "yes", [1], {"a": 1}, 0.5])
def test_unknown_field_with_a_value_is_refused_by_name(adapter, value):
    with pytest.raises(AdapterError, match=r"use_newlora: unknown field.*may change the weights"):
        adapter(use_newlora=value)


@pytest.mark.parametrize("value", [None, False, [], {}])
def test_unknown_field_that_is_off_is_ignored(adapter, value):
    assert adapter(use_newlora=value).updates


def test_all_refusals_of_a_config_are_listed_at_once(adapter):
    with pytest.raises(AdapterError) as refusal:
        adapter(kasa_config={"a": 1}, use_newlora=1, lora_alpha=0, init_lora_weights="pissa")
    for field in ("kasa_config", "use_newlora", "lora_alpha", "init_lora_weights"):
        assert f"\n  {field}" in str(refusal.value)


# Other methods

OTHERS = sorted({t.value for t in peft.PeftType} - {"LORA", "ADALORA"})


@pytest.mark.parametrize("method", [*OTHERS, "BONE"])
def test_every_peft_type_is_merged_or_refused_by_name(adapter, method):
    assert (method in peft_methods.METHODS) != (method in peft_methods.REFUSED)
    if method in peft_methods.REFUSED:
        with pytest.raises(AdapterError, match=rf"peft_type {method} cannot be merged here: \w+"):
            adapter(peft_type=method)


@pytest.mark.parametrize("method", sorted(peft_methods.METHODS))
def test_tensors_of_another_method_than_the_config_names_are_refused(adapter, method):
    with pytest.raises(AdapterError, match=r"unknown tensor 'base_model"):
        adapter(peft_type=method)


@pytest.mark.parametrize("method", ["NEWTYPE", "lora", None, 3, ["LORA"]])
def test_unknown_peft_type_is_refused(adapter, method):
    with pytest.raises(AdapterError, match=r"unknown peft_type .* Expected LORA"):
        adapter(peft_type=method)


def test_config_without_peft_type_is_lora_when_it_has_rank_and_alpha(tmp_path):
    config = {k: v for k, v in CONFIG.items() if k != "peft_type"}
    assert peft_config.parse(tmp_path, config).r == RANK
    with pytest.raises(AdapterError, match="unknown peft_type"):
        peft_config.parse(tmp_path, {"r": 4})


# How the adapter was begun


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_16", "olora", "corda", "lora_ga", "loftq"])
def test_init_that_changed_the_base_is_refused(adapter, init):
    with pytest.raises(
        AdapterError, match=rf"init_lora_weights {init}: .*not on the original.*PEFT"
    ):
        adapter(init_lora_weights=init)


@pytest.mark.parametrize("init", [True, False, "gaussian", "eva", "orthogonal", "mica"])
def test_init_that_left_the_base_alone_is_accepted(adapter, init):
    assert adapter(init_lora_weights=init).updates


@pytest.mark.parametrize("init", ["newinit", "Pissa", 3, {"a": 1}])
def test_unknown_init_is_refused(adapter, init):
    with pytest.raises(AdapterError, match=r"init_lora_weights .*: unknown"):
        adapter(init_lora_weights=init)


def test_loftq_config_is_refused_where_it_is_not_said_to_be_used(adapter):
    with pytest.raises(AdapterError, match="loftq_config"):
        adapter(loftq_config={"loftq_bits": 4})


# Numbers


@pytest.mark.parametrize("alpha", [0, 0.0, math.nan, math.inf, -math.inf, "10", None, True, [10]])
@pytest.mark.parametrize("field", ["lora_alpha", "alpha_pattern"])
def test_alpha_that_is_no_number_to_scale_by_is_refused(adapter, field, alpha):
    value = {"q_proj": alpha} if field == "alpha_pattern" else alpha
    with pytest.raises(AdapterError, match=rf"{field}\S*: (0, so|expected a finite number)"):
        adapter({field: value})


@pytest.mark.parametrize("alpha", [10, 10.5, -3, 1e-4])
def test_alpha_may_be_any_other_number(adapter, alpha):
    assert adapter(lora_alpha=alpha).updates[0].scaling == alpha / RANK


@pytest.mark.parametrize("rank", [0, -1, 4.0, "4", None, True])
def test_rank_that_is_no_count_is_refused(adapter, rank):
    with pytest.raises(AdapterError, match="r: expected a positive integer"):
        adapter(r=rank)
    with pytest.raises(AdapterError, match=r"rank_pattern\[q_proj\]: expected a positive"):
        adapter(rank_pattern={"q_proj": rank})


def test_rank_other_than_that_of_the_tensors_is_refused(adapter):
    for settings in ({"r": 8}, {"rank_pattern": {"q_proj": 8}}):
        with pytest.raises(AdapterError, match=rf"{MODULE}: rank 8 by the config, .*\(4, 12\)"):
            adapter(**settings)


@pytest.mark.parametrize("shapes", [{"A": (3, IN)}, {"B": (OUT, 3)}])
def test_factors_of_different_rank_are_refused(adapter, shapes):
    with pytest.raises(AdapterError, match=rf"{MODULE}: rank 4 by the config"):
        adapter(tensors=factors(**shapes))


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize("value", [["q_proj"], "q_proj", {"(q_proj": 4}])
def test_pattern_that_is_no_map_of_expressions_is_refused(adapter, field, value):
    with pytest.raises(AdapterError, match=f"{field}: .*(expected a map|regular expression)"):
        adapter({field: value})


@pytest.mark.parametrize("field", ["bias", "modules_to_save", "base_model_name_or_path"])
@pytest.mark.parametrize("value", [3, {"a": 1}])
def test_setting_of_the_wrong_type_is_refused(adapter, field, value):
    with pytest.raises(AdapterError, match=f"{field}: expected"):
        adapter({field: value})


@pytest.mark.parametrize("value", [3, "x", [-1], [1.5], ["a"], {"embed": 3}, {"embed": [True]}])
def test_token_indices_that_are_no_rows_are_refused(adapter, value):
    with pytest.raises(AdapterError, match="trainable_token_indices: expected"):
        adapter(trainable_token_indices=value)


def test_bias_of_b_is_refused_with_dora(adapter):
    with pytest.raises(AdapterError, match="lora_bias with use_dora"):
        adapter(lora_bias=True)


def test_bias_of_b_is_refused_where_the_config_denies_it(adapter):
    tensors = {**plain(), f"{PREFIX}{MODULE}.lora_B.bias": torch.randn(OUT)}
    with pytest.raises(AdapterError, match="lora_B has a bias though lora_bias is false"):
        adapter(tensors=tensors, use_dora=False)
    kinds = [u.kind for u in adapter(tensors=tensors, use_dora=False, lora_bias=True).updates]
    assert kinds == ["lora", "add"]


# Magnitudes


def test_use_dora_without_magnitudes_is_refused(adapter):
    with pytest.raises(AdapterError, match=rf"missing for 1 of 1 .*{MODULE}.*use_dora: true"):
        adapter(tensors=plain())


def test_use_dora_with_a_magnitude_missing_is_refused(adapter):
    other = "model.layers.1.q_proj"
    with pytest.raises(AdapterError, match=rf"missing for 1 of 2 .*{other}"):
        adapter(tensors={**factors(), **plain(factors(other))})


@pytest.mark.parametrize("setting", [False, None])
def test_magnitudes_without_use_dora_are_refused(adapter, setting):
    with pytest.raises(AdapterError, match=r"1 layers have a lora_magnitude_vector.*use_dora"):
        adapter(use_dora=setting)


MAGNITUDES = ["", ".weight", ".default", ".default.weight"]


@pytest.mark.parametrize("spelling", MAGNITUDES)
def test_magnitude_is_found_under_each_of_its_names(adapter, spelling):
    m = f"{PREFIX}{MODULE}.lora_magnitude_vector"
    tensors = {f"{n}{spelling}" if n == m else n: t for n, t in factors().items()}
    (update,) = adapter(tensors=tensors).updates
    assert update.kind == "dora"
    assert update.magnitude.ref.name == m + spelling


def test_magnitude_under_two_names_is_refused(adapter):
    m = f"{PREFIX}{MODULE}.lora_magnitude_vector"
    with pytest.raises(AdapterError, match="are the same part of one layer"):
        adapter(tensors={**factors(), f"{m}.weight": torch.rand(OUT)})


@pytest.mark.parametrize("part", ["lora_magnitude_vector", "lora_B.bias", "lora_E"])
def test_part_without_factors_is_refused(adapter, part):
    m = f"{PREFIX}model.layers.1.q_proj.{part}"
    with pytest.raises(AdapterError, match=r"layers\.1\.q_proj: .*without lora_A and lora_B"):
        adapter(tensors={**factors(), m: torch.rand(OUT)})


def test_magnitudes_of_the_wrong_number_are_refused(adapter, tmp_path):
    adapter(tensors=factors(m=(OUT + 1,)))
    save_file({f"{MODULE}.weight": torch.randn(OUT, IN)}, tmp_path / "base.safetensors")
    with pytest.raises(PlanError, match=r"magnitude has 9 elements, expected 8 \(one per output\)"):
        dora_export.merge(tmp_path / "base.safetensors", tmp_path / "adapter", tmp_path / "out")


# Keys


@pytest.mark.parametrize(
    "prefix",
    [
        "base_model.model.",
        "",
        "module.",
        "module.base_model.model.",
        "base_model.model._orig_mod.",
        "_orig_mod.base_model.model.",
        "_fsdp_wrapped_module.base_model.model.",
        "_orig_mod.module.base_model.model.",
        "base_model.model._fsdp_wrapped_module._checkpoint_wrapped_module.",
    ],
)
def test_key_is_understood_behind_what_training_wraps_around_the_model(adapter, prefix):
    assert adapter(tensors=factors(prefix=prefix)).updates[0].target == f"{MODULE}.weight"


@pytest.mark.parametrize("wrapper", ["_orig_mod", "_fsdp_wrapped_module"])
def test_key_is_understood_with_wrappers_inside_the_path(adapter, wrapper):
    wrapped = f"model.layers.0.{wrapper}.q_proj"
    assert adapter(tensors=factors(wrapped)).updates[0].target == f"{MODULE}.weight"


def test_pattern_is_held_against_the_path_without_wrappers(adapter):
    tensors = factors("model.layers._orig_mod.0.q_proj")
    found = adapter(tensors=tensors, alpha_pattern={f"^{MODULE}": 3}, peft_version="0.19.0")
    assert found.updates[0].scaling == 3 / RANK


@pytest.mark.parametrize("name", ["default", "my-adapter", "0"])
def test_adapter_name_in_keys_is_left_out(adapter, name):
    tensors = {
        f"{PREFIX}{MODULE}.lora_A.{name}.weight": torch.randn(RANK, IN),
        f"{PREFIX}{MODULE}.lora_B.{name}.weight": torch.randn(OUT, RANK),
        f"{PREFIX}{MODULE}.lora_magnitude_vector.{name}.weight": torch.rand(OUT),
    }
    (update,) = adapter(tensors=tensors).updates
    assert (update.target, update.kind, update.rank) == (f"{MODULE}.weight", "dora", RANK)


def test_adapter_name_in_keys_of_an_embedding_is_left_out(adapter):
    tensors = {
        f"{PREFIX}model.embed_tokens.lora_embedding_A.default": torch.randn(RANK, 30),
        f"{PREFIX}model.embed_tokens.lora_embedding_B.default": torch.randn(OUT, RANK),
        f"{PREFIX}model.embed_tokens.lora_magnitude_vector.default.weight": torch.rand(OUT),
    }
    (update,) = adapter(tensors=tensors).updates
    assert (update.target, update.layout) == ("model.embed_tokens.weight", "io")


EMBEDDING = "model.embed_tokens"


@pytest.mark.parametrize(
    ("tensors", "settings", "kinds"),
    [
        ({f"{MODULE}.lora_A.other.weight": (RANK, IN), f"{MODULE}.lora_B.other.weight": (OUT, RANK),
          f"{MODULE}.lora_B.other.bias": (OUT,)}, {"lora_bias": True},
         {f"{MODULE}.weight": "lora", f"{MODULE}.bias": "add"}),
        ({f"{MODULE}.lora_A.other": (RANK, IN), f"{MODULE}.lora_B.other": (OUT, RANK),
          f"{MODULE}.lora_E.other": (RANK, 1)},
         {"peft_type": "ADALORA", "init_r": 12,
          "rank_pattern": {f"{PREFIX}{MODULE}.lora_E": [True] * RANK + [False] * (12 - RANK)}},
         {f"{MODULE}.weight": "lora"}),
        ({f"{EMBEDDING}.token_adapter.trainable_tokens_delta.other": (2, IN)},
         {"trainable_token_indices": [3, 5]}, {f"{EMBEDDING}.weight": "rows"}),
        ({"score.modules_to_save.other.weight": (2, IN), "score.modules_to_save.other.bias": (2,)},
         {"modules_to_save": ["score"]}, {"score.weight": "replace", "score.bias": "replace"}),
    ],
    ids=["bias of B", "AdaLoRA", "tokens", "saved module"],
)  # fmt: skip
def test_adapter_name_in_any_key_is_left_out(adapter, tensors, settings, kinds):
    held = {f"{PREFIX}{name}": torch.randn(shape) for name, shape in tensors.items()}
    found = adapter(tensors=held, use_dora=False, **settings)
    assert {u.target: u.kind for u in found.updates} == kinds
    second = next(iter(held)).replace(".other", ".second").replace(MODULE, "model.layers.1.q_proj")
    second = second.replace("score", "model.score").replace(EMBEDDING, "model.wte")
    if "score" not in second:  # names of saved modules are not compared
        with pytest.raises(AdapterError, match="several adapters"):
            adapter(tensors={**held, second: torch.randn(2, IN)}, use_dora=False, **settings)


# Of transformers' models, and what PEFT takes for embeddings where a vocabulary was resized.
@pytest.mark.parametrize("name", ["model.embed_tokens", "lm_head", "transformer.wte",
                                  "transformer.word_embeddings", "gpt_neox.embed_in", "embed_out",
                                  "shared", "model.tok_embeddings"])  # fmt: skip
def test_embedding_stored_whole_replaces_the_bases(adapter, name):
    found = adapter(tensors={**factors(), f"{PREFIX}{name}.weight": torch.randn(9, IN)})
    assert {u.target: u.kind for u in found.updates}[f"{name}.weight"] == "replace"
    assert found.saved_embeddings == {f"{name}.weight"}


@pytest.mark.parametrize("ending", ["weight", "bias"])
def test_base_layer_of_an_embedding_is_replaced_and_said_to_be_saved(adapter, ending):
    key = f"{PREFIX}lm_head.base_layer.{ending}"
    found = adapter(tensors={**factors(), **factors("lm_head"), key: torch.randn(OUT)})
    assert {u.target: u.kind for u in found.updates}[f"lm_head.{ending}"] in ("replace", "dora")
    assert any(u.kind == "replace" and u.target == f"lm_head.{ending}" for u in found.updates)
    assert found.saved_embeddings == ({"lm_head.weight"} if ending == "weight" else set())


COPIES = f"{PREFIX}score.modules_to_save.weight", f"{PREFIX}score.weight"


def test_module_stored_twice_is_taken_once(adapter):
    values = torch.randn(2, IN)
    found = adapter(tensors={**factors(), COPIES[0]: values, COPIES[1]: values.clone()},
                    modules_to_save=["score"])  # fmt: skip
    assert [u.kind for u in found.updates] == ["dora", "replace"]
    assert found.ignored == {COPIES[1]: f"repeats '{COPIES[0]}'"}


@pytest.mark.parametrize("other", [torch.zeros(2, IN), torch.ones(2, IN, dtype=torch.int32),
                                   torch.ones(IN, 2), torch.ones(3, IN)], ids=str)  # fmt: skip
def test_two_copies_of_a_module_that_differ_are_refused(adapter, other):
    with pytest.raises(AdapterError, match=r"are two copies of one tensor and differ"):
        adapter(tensors={**factors(), COPIES[0]: torch.ones(2, IN), COPIES[1]: other},
                modules_to_save=["score"])  # fmt: skip


def test_bases_own_copy_of_a_saved_module_is_left_out(adapter):
    own = f"{PREFIX}score.original_module.weight"
    held = {COPIES[0]: torch.ones(2, IN), own: torch.zeros(2, IN)}
    found = adapter(tensors={**factors(), **held}, modules_to_save=["score"])
    assert set(found.ignored) == {own}
    (saved,) = (u for u in found.updates if u.kind == "replace")
    assert (saved.target, saved.value.name) == ("score.weight", COPIES[0])


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_stray_bias_is_taken_where_biases_were_trained_only(adapter, bias):
    held = {**factors(), f"{PREFIX}{MODULE}.bias": torch.randn(OUT)}
    assert [u.kind for u in adapter(tensors=held, bias=bias).updates] == ["dora", "replace"]
    with pytest.raises(AdapterError, match=r"unknown tensor '.*q_proj.bias'"):
        adapter(tensors=held, bias="none")


# torchtune's export, which does not write use_dora
BARE = {"r": RANK, "lora_alpha": 10, "target_modules": ["q_proj"]}


def test_use_dora_of_a_bare_config_counts(adapter, tmp_path):
    (tmp_path / "adapter").mkdir()
    small.write_json(tmp_path / "adapter/adapter_config.json", {**BARE, "use_dora": True})
    save_file(plain(), tmp_path / "adapter/adapter_model.safetensors")
    with pytest.raises(AdapterError, match=r"missing for 1 of 1 .*use_dora: true"):
        dora_export.load_adapter(tmp_path / "adapter")


def test_magnitudes_beside_a_config_of_peft_without_use_dora_are_refused(adapter, tmp_path):
    (tmp_path / "adapter").mkdir()
    small.write_json(tmp_path / "adapter/adapter_config.json",
                     {**BARE, "peft_type": "LORA", "bias": "none"})  # fmt: skip
    save_file(factors(), tmp_path / "adapter/adapter_model.safetensors")
    with pytest.raises(AdapterError, match=r"1 layers have a lora_magnitude_vector.*use_dora"):
        dora_export.load_adapter(tmp_path / "adapter")


def test_two_adapter_names_in_one_file_are_refused(adapter):
    def named(name, module):
        return {key.replace(".weight", f".{name}.weight"): t for key, t in factors(module).items()}

    tensors = named("first", "model.layers.0.q_proj") | named("second", "model.layers.1.q_proj")
    with pytest.raises(AdapterError, match=r"several adapters: \['first', 'second'\].*save one"):
        adapter(tensors=tensors)


@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
def test_factor_without_its_partner_is_refused(adapter, part):
    with pytest.raises(AdapterError, match=rf"{MODULE}: {part} missing"):
        adapter(tensors=without(factors(), f"{part}.weight"))


@pytest.mark.parametrize(
    "name",
    [
        f"{MODULE}.lora_C.weight",
        f"{MODULE}.lora_diag",
        f"{MODULE}.weight",
        "model.norm.weight",
        f"{MODULE}.hada_w1_a",
        "lora_A.weight",
        "stray",
        "",
    ],
)
def test_unknown_tensor_is_refused_by_name(adapter, name):
    key = f"{PREFIX}{name}"
    with pytest.raises(AdapterError, match="unknown tensor") as refusal:
        adapter(tensors={**factors(), key: torch.randn(3, 3)})
    assert f"'{key}'" in str(refusal.value)


@pytest.mark.parametrize("name", ["lora_velora_embed", "lora_monteclora_sampler.default.z"])
def test_tensor_used_in_training_only_is_ignored_by_name(adapter, name):
    key = f"{PREFIX}{MODULE}.{name}"
    found = adapter(tensors={**factors(), key: torch.randn(3)})
    assert found.ignored == {key: "used in training only"}


def test_factors_inside_a_wrapped_layer_are_refused(adapter):
    tensors = factors("model.attn.base_layer.out_proj")
    with pytest.raises(
        AdapterError, match=r"inside nn\.MultiheadAttention, whose out_proj PEFT adds twice"
    ):
        adapter(tensors=tensors)


def test_factors_of_two_kinds_on_one_layer_are_refused(adapter):
    tensors = {**factors(), f"{PREFIX}{MODULE}.lora_embedding_A": torch.randn(RANK, IN)}
    with pytest.raises(AdapterError, match="both linear and embedding factors"):
        adapter(tensors=tensors)


def test_grouped_convolution_is_refused(adapter):
    tensors = {
        f"{PREFIX}{MODULE}.lora_A.weight": torch.randn(RANK, IN, 3),
        f"{PREFIX}{MODULE}.lora_B.weight": torch.randn(OUT, RANK // 2, 1),
        f"{PREFIX}{MODULE}.lora_magnitude_vector": torch.rand(1, OUT, 1),
    }
    with pytest.raises(AdapterError, match="a convolution with 2 groups"):
        adapter(tensors=tensors)


# Which layers are meant


def three_layers(folder):
    tensors = {f"model.layers.{i}.q_proj.weight": torch.randn(OUT, IN) for i in range(3)}
    save_file(tensors, folder / "base.safetensors")
    return folder / "base.safetensors"


def on_layers(*numbers):
    return {k: t for i in numbers for k, t in factors(f"model.layers.{i}.q_proj").items()}


def test_adapter_that_lacks_a_layer_it_means_is_refused(adapter, tmp_path):
    adapter(tensors=on_layers(0, 2), target_modules=["q_proj"])
    with pytest.raises(PlanError, match=r"layers\.1\.q_proj(.|\n)*adapter is incomplete"):
        dora_export.merge(three_layers(tmp_path), tmp_path / "adapter", tmp_path / "out")


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["layers.0.q_proj", "model.layers.2.q_proj"]},
        {"target_modules": r".*\.[02]\.q_proj"},
        {"target_modules": ["q_proj"], "layers_to_transform": [0, 2]},
        {"target_modules": ["q_proj"], "exclude_modules": ["layers.1.q_proj"]},
    ],
    ids=["full names", "expression", "layers_to_transform", "exclude_modules"],
)
def test_adapter_on_some_layers_only_is_merged(adapter, tmp_path, settings):
    adapter(tensors=on_layers(0, 2), **settings)
    base = three_layers(tmp_path)
    report = dora_export.merge(
        base, tmp_path / "adapter", tmp_path / "out", threads=1, magnitude_is_normalised=False
    )
    assert report.tensors == {"merged": 2, "unchanged": 1}


# Files


def test_folder_without_weights_is_refused(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(InputError, match=r"no adapter_model\.safetensors or adapter_model\.bin"):
        dora_export.load_adapter(tmp_path)


def test_adapter_without_lora_tensors_is_refused(adapter):
    with pytest.raises(AdapterError, match="holds no LoRA tensors"):
        adapter(tensors={}, use_dora=False)


@pytest.mark.parametrize("option", [{"alpha": 8.0}, {"axis": "in"}])
def test_option_that_contradicts_the_format_is_refused(adapter, tmp_path, option):
    adapter()
    with pytest.raises(AdapterError, match=f"Leave --{next(iter(option))} out"):
        dora_export.load_adapter(tmp_path / "adapter", **option)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_file_of_the_folder_may_be_named_in_its_place(adapter, tmp_path, name):
    expected = adapter()
    found = dora_export.load_adapter(tmp_path / "adapter" / name)
    assert found.updates == expected.updates


def test_trained_tokens_beside_dora_need_no_magnitudes(adapter):
    rows = {f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta": torch.ones(2, IN)}
    found = adapter(tensors=factors() | rows, trainable_token_indices=[3, 5])
    assert {u.target: u.kind for u in found.updates} == {
        f"{MODULE}.weight": "dora", "model.embed_tokens.weight": "rows",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("module", "shape", "indices"),
    [("model.my_embed_tokens", (2, IN), {"embed_tokens": [3, 5]}),
     ("model.embed_tokens", (2, IN), {"embed_tokens": [3, 5], "model.embed_tokens": [3, 5]}),
     ("model.embed_tokens", (2, IN, 1), [3, 5]), ("model.embed_tokens", (3, IN), [3, 5])],
    ids=["another name", "two names", "dimensions", "number"],
)  # fmt: skip
def test_rows_of_which_the_config_does_not_say_the_tokens_are_refused(
    adapter, module, shape, indices
):
    rows = {f"{PREFIX}{module}.token_adapter.trainable_tokens_delta": torch.ones(shape)}
    with pytest.raises(AdapterError, match=r"trainable_token_indices .* do not say which rows"):
        adapter(tensors=factors() | rows, trainable_token_indices=indices)


def test_use_dora_with_the_magnitude_of_an_embedding_missing_is_refused(adapter):
    table = {f"{PREFIX}{EMBEDDING}.lora_embedding_A": torch.randn(RANK, 30),
             f"{PREFIX}{EMBEDDING}.lora_embedding_B": torch.randn(OUT, RANK)}  # fmt: skip
    with pytest.raises(AdapterError, match=rf"missing for 1 of 2 .*{EMBEDDING}"):
        adapter(tensors={**factors(), **table})


def test_plain_lora_is_merged_without_a_question(adapter):
    (update,) = adapter(tensors=plain(), use_dora=False).updates
    assert (update.kind, update.magnitude, update.scaling) == ("lora", None, 10 / RANK)


# --- what config and tensors say differently, without a contradiction


@pytest.mark.parametrize(
    ("fields", "doubt"),
    [
        ({"alpha_pattern": {"attn.q_proy": 3}}, "no layer takes its rank or alpha from "
         "alpha_pattern 'attn.q_proy'"),
        ({"rank_pattern": {"nothing": 3}}, "no layer takes its rank or alpha from rank_pattern"),
        ({"alpha_pattern": {"q_proj": 5, "attn.q_proj": 5}}, "from alpha_pattern 'attn.q_proj'"),
        ({"target_modules": ["q_proj", "down_proj", "gate_proj"]},
         "target_modules names gate_proj, of which the file has no tensors"),
        ({"target_modules": ["q_proj"]}, "layers that target_modules does not name: "
         "model.layers.0.mlp.down_proj"),
    ],
)  # fmt: skip
def test_doubt_is_told(tmp_path, fields, doubt):
    base, folder = small.write_pair(tmp_path)
    plain = dora_export.merge(base, folder, tmp_path / "out", dry_run=True).warnings
    small.edit_json(folder / "adapter_config.json", **fields)
    told = dora_export.merge(base, folder, tmp_path / "out", dry_run=True).warnings
    assert len(told) == len(plain) + 1
    assert doubt in " ".join(set(told) - set(plain))
