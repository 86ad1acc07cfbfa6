"""What the metadata of LyCORIS', kohya's, OneTrainer's and SimpleTuner's files is taken to say."""

import json

import pytest

from dora_export.adapters.lycoris_metadata import Said, contradictions, said_by


def kohya(module="lycoris.kohya", **arguments):
    """As sd-scripts writes it: all values are text."""
    return {"ss_network_module": module, "ss_network_args": json.dumps(arguments)}


def onetrainer(mark="ot_revision", **settings):
    return {mark: "x", "ot_config": json.dumps(settings)}


def simpletuner(**settings):
    return {"lycoris_config": json.dumps(settings)}


LYCORIS = {"trainer": "LyCORIS in kohya sd-scripts (lycoris.kohya)"}
FLUX = {"trainer": "kohya sd-scripts (networks.lora_flux)"}
OT = {"trainer": "OneTrainer", "half": "fp32", "rs_lora": False}  # it has none
ST = {"trainer": "SimpleTuner, LyCORIS", "as_trained": True, "algorithm": "lora"}
DECOMPOSED = {"lora_decompose": True, "lora_decompose_output_axis": True}
NO_EPS = {"lora_decompose_norm_epsilon": False}
CASES = [
    ({}, {}),
    ({"ss_network_args": "{broken"}, {}),
    ({"ss_network_args": "[1]"}, {}),
    (kohya(algo="LoHa"), {**LYCORIS, "algorithm": "loha"}),
    (kohya("networks.lora"), {"trainer": "kohya sd-scripts (networks.lora)"}),
    (kohya(dora_wd="True"), {**LYCORIS, "dora": True}),
    (kohya(weight_decompose="true"), {**LYCORIS, "dora": True}),
    (kohya(dora_wd="1"), {**LYCORIS, "dora": True}),
    (kohya(dora_wd="0"), {**LYCORIS, "dora": False}),
    (kohya(dora_wd="None"), {**LYCORIS, "dora": False}),
    (kohya(dora_wd="perhaps"), LYCORIS),
    (kohya(wd_on_output="True"), {**LYCORIS, "axis": "out"}),
    (kohya(wd_on_out="True"), {**LYCORIS, "axis": "out"}),
    (kohya(wd_on_output="False"), {**LYCORIS, "axis": "in"}),
    (kohya(rs_lora="True"), {**LYCORIS, "rs_lora": True}),
    (kohya(bypass_mode="True"), {**LYCORIS, "bypass": True}),
    (kohya("networks.lora_flux", split_qkv="True"), {**FLUX, "split_qkv": True}),
    (kohya("networks.lora_flux"), FLUX),
    (kohya(split_qkv="True"), LYCORIS),
    ({"ss_sd_model_name": "a", "modelspec.architecture": "b"}, {"base": "a"}),
    ({"modelspec.architecture": "b"}, {"base": "b"}),
    # full_bf16 goes with mixed precision in bf16 alone, and not every version writes it down
    ({"ss_full_bf16": "True"}, {"half": "bf16"}),
    ({"ss_full_fp16": "True"}, {"half": "fp16"}),
    ({"ss_full_fp16": "False"}, {}),
    ({"ss_full_bf16": "False"}, {}),
    ({"ss_full_fp16": "False", "ss_full_bf16": "False"}, {"half": "fp32"}),
    ({"ss_full_fp16": "False", "ss_mixed_precision": "no"}, {"half": "fp32"}),
    ({"ss_full_fp16": "False", "ss_mixed_precision": "bf16"}, {}),
    ({"ss_mixed_precision": "no"}, {}),
    (onetrainer(peft_type="LORA"), {**OT, "algorithm": "lora"}),
    (onetrainer("ot_branch", peft_type="LOHA"), {**OT, "algorithm": "loha"}),
    (onetrainer(peft_type="LORA", **DECOMPOSED),
     {**OT, "algorithm": "lora", "dora": True, "axis": "out"}),
    (onetrainer(peft_type="LORA", **DECOMPOSED | {"lora_decompose_output_axis": False}),
     {**OT, "algorithm": "lora", "dora": True, "axis": "in"}),
    (onetrainer(peft_type="LORA", **DECOMPOSED | {"lora_decompose": False}),
     {**OT, "algorithm": "lora", "dora": False}),
    (onetrainer(peft_type="LORA", **NO_EPS), {**OT, "algorithm": "lora", "eps": False}),
    (onetrainer(peft_type="LOKR", **DECOMPOSED, **NO_EPS), {**OT, "algorithm": "lokr"}),
    (onetrainer(peft_type="LOKR", lokr_weight_decompose=True, lokr_dora_on_output=False),
     {**OT, "algorithm": "lokr", "dora": True, "axis": "in"}),
    ({"ot_branch": "x", "modelspec.architecture": "b"}, {**OT, "base": "b"}),
    (simpletuner(), ST),
    (simpletuner(algo="LoKr"), {**ST, "algorithm": "lokr"}),
    (simpletuner(apply_preset={"module_algo_map": {"Attention": {"algo": "loha"}}}),
     {**ST, "algorithm": None}),
    (simpletuner(apply_preset={"name_algo_map": {"to_q": {"algo": "loha"}}}),
     {**ST, "algorithm": None}),
    (simpletuner(apply_preset={"name_algo_map": {"to_q": {"factor": 4}}}), ST),
    (simpletuner(dora_wd=True, wd_on_output=True), {**ST, "dora": True, "axis": "out"}),
    (simpletuner(dora_wd=False, wd_on_output=False), {**ST, "dora": False, "axis": "in"}),
    (simpletuner(rs_lora=True, bypass_mode=True), {**ST, "rs_lora": True, "bypass": True}),
    ({**simpletuner(), "format": "simpletuner-lycoris-extract", "base_model": "c"},
     {**ST, "trainer": "SimpleTuner, extracted from two models", "base": "c"}),
]  # fmt: skip


@pytest.mark.parametrize(("metadata", "said"), CASES, ids=str)
def test_metadata_says_what_its_trainer_wrote_and_nothing_else(metadata, said):
    assert said_by(metadata) == Said(**said)


OF_ALGORITHMS = {"lora": "LoRA", "locon": "LoRA", "loha": "LoHa", "lokr": "LoKr", "full": "full",
                 "norm": "norm"}  # fmt: skip


@pytest.mark.parametrize("word", OF_ALGORITHMS)
def test_algorithm_is_held_against_the_tensors(word):
    """Other layers may have other algorithms; that of the metadata has to be among them."""
    assert contradictions(Said(algorithm=word), {OF_ALGORITHMS[word]: 1, "bias": 2}, {}) == []
    others = {a: 1 for a in OF_ALGORITHMS.values() if a != OF_ALGORITHMS[word]}
    (found,) = contradictions(Said(algorithm=word), others, {})
    assert f"says algo={word}, the tensors are" in found


@pytest.mark.parametrize(
    ("said", "axes", "found"),
    [({}, {"out": 3}, None),
     ({"algorithm": "dylora"}, {}, "another scaling for every rank"),
     ({"algorithm": "ia3"}, {}, "algo=ia3, which is not supported"),
     ({"dora": True}, {}, "there is no dora_scale"),
     ({"dora": True, "bypass": True}, {}, None),
     ({"dora": True}, {"in": 1}, None),
     ({"dora": False}, {"in": 1}, "there is dora_scale"),
     ({"dora": False}, {}, None),
     ({"axis": "out"}, {"out": 2}, None),
     ({"axis": "out"}, {}, None),
     ({"axis": "out"}, {"in": 2}, "count outputs, their shapes say inputs"),
     ({"axis": "in"}, {"in": 2, "out": 1}, "count inputs, their shapes say outputs")],
    ids=str,
)  # fmt: skip
def test_magnitudes_are_held_against_the_metadata(said, axes, found):
    got = contradictions(Said(**said), {"LoRA": 3}, axes)
    assert len(got) == (found is not None)
    assert found is None or found in got[0]
