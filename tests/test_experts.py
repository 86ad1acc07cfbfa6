"""LoRA on stacked expert parameters: every model, layout and order, against the definition."""

import json
import os
import re
import threading

import pytest
import torch

import dora_export
from dora_export import DoraExportError
from dora_export.adapters import ReadOptions, peft_parameters, read_adapter
from tests import moe_models
from tests.moe_models import BOTH, MODELS, prepare, relative, worst
from tests.peft_models import edit_config
from tests.rider_models import WARNINGS, edit_json, rewrite
from tests.small import run

# Reasons stand beside the entries.
pytestmark = [
    *(pytest.mark.filterwarnings(w) for w in WARNINGS),
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match"),
]
SMALL = 2e-6  # relative, of two float32 results


@pytest.mark.parametrize("original", [True, False], ids=["checkpoint names", "class names"])
@pytest.mark.parametrize("kind", MODELS)
def test_stacked_parameters_merge_as_the_unmerged_model_computes(kind, original, tmp_path):
    case = prepare(tmp_path, kind, original=original)
    dora_export.merge(case.base, case.adapter, tmp_path / "out", verify="full")
    assert worst(tmp_path / "out", case.exact) <= 1
    want = case.expected()
    assert relative(case.of_base(), want) > 1e-2, "the adapter does nothing"
    assert relative(case.merged(tmp_path / "out"), want) < 1e-5
    scrambled = moe_models.exact(tmp_path / "wrong", case.wrapped, original, b_layout="unsloth")
    assert worst(tmp_path / "out", scrambled) > 1000
    case.wrapped.merge_and_unload().save_pretrained(
        tmp_path / "peft", save_original_format=original
    )
    theirs = moe_models.tensors(tmp_path / "peft")
    for name, tensor in moe_models.tensors(tmp_path / "out").items():
        assert (tensor - theirs[name]).abs().max() <= SMALL * tensor.abs().max(), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_low_precision_is_rounded_once(kind, dtype, tmp_path):
    case = prepare(tmp_path, kind, dtype, original=False, target_modules=["q_proj"])
    dora_export.merge(case.base, case.adapter, tmp_path / "out", verify="full")
    assert worst(tmp_path / "out", case.exact) <= 1


@pytest.mark.parametrize("rslora", [False, True], ids=["lora", "rslora"])
def test_patterns_and_a_matrix_parameter_are_by_the_path_of_the_parameter(rslora, tmp_path):
    case = prepare(
        tmp_path,
        "qwen3_moe",
        use_rslora=rslora,
        target_parameters=[*BOTH, "mlp.gate.weight"],
        rank_pattern={"experts.down_proj": 2, "gate.weight": 1},
        alpha_pattern={"0.mlp.experts.gate_up_proj": 7},
    )
    dora_export.merge(case.base, case.adapter, tmp_path / "out")
    assert worst(tmp_path / "out", case.exact) <= 1
    edit_config(case.adapter, alpha_pattern={})
    dora_export.merge(case.base, case.adapter, tmp_path / "other")
    assert worst(tmp_path / "other", case.exact) > 1000


@pytest.mark.parametrize("target", BOTH)
@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_one_parameter_of_a_module_is_not_nested(kind, target, tmp_path):
    case = prepare(tmp_path, kind, target_parameters=[target])
    dora_export.merge(case.base, case.adapter, tmp_path / "out")
    assert worst(tmp_path / "out", case.exact) <= 1


def test_a_single_expert_is_a_plain_matrix(tmp_path):
    case = prepare(tmp_path, "mixtral", experts=1, num_experts_per_tok=1)
    dora_export.merge(case.base, case.adapter, tmp_path / "out")
    assert worst(tmp_path / "out", case.exact) <= 1
    assert relative(case.merged(tmp_path / "out"), case.expected()) < 1e-5


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_a_nested_pair_in_the_wrong_order_fits_nothing(kind, tmp_path):
    case = prepare(tmp_path, kind)
    moe_models.swap_nesting(case.adapter)
    with pytest.raises(DoraExportError, match="adapter has A"):
        dora_export.merge(case.base, case.adapter, tmp_path / "out")


# --- the order of B's columns


def test_order_of_b_is_told_by_peft_own_config_and_shown(tmp_path):
    case = prepare(tmp_path, "qwen3_moe")
    shown = run("inspect", case.adapter).stdout
    assert "lora_B in peft order: PEFT" in shown
    assert re.search(r"✓ vLLM +LoRA on stacked experts", shown)
    shown = run("inspect", case.adapter, "--moe-b-layout", "unsloth").stdout
    assert "lora_B in unsloth order: by --moe-b-layout" in shown
    assert re.search(r"! PEFT, transformers +takes the columns of lora_B in PEFT's order", shown)


MARKS = {
    "unsloth's mark": {"auto_mapping": {"base_model_class": "X", "unsloth_fixed": True}},
    "unsloth's base": {"base_model_name_or_path": "unsloth/Qwen3-30B-A3B"},
    "no version": {"peft_version": None},
    "another writer": {"auto_mapping": None},  # the key is taken away; PEFT writes it
}


@pytest.mark.parametrize("mark", MARKS)
def test_order_of_b_is_asked_where_files_do_not_tell_and_taken_either_way(mark, tmp_path):
    case = prepare(tmp_path, "qwen3_moe")
    edit_config(case.adapter, **MARKS[mark])
    with pytest.raises(DoraExportError) as refusal:
        dora_export.merge(case.base, case.adapter, tmp_path / "out")
    assert "--moe-b-layout peft or --moe-b-layout unsloth" in str(refusal.value)
    assert not (tmp_path / "out").exists()
    for layout in ("peft", "unsloth"):
        out = tmp_path / layout
        result = run("merge", case.base, case.adapter, "-o", out, "--moe-b-layout", layout)
        assert result.exit_code == 0, result.output
        exact = moe_models.exact(tmp_path / f"{layout} exact", case.wrapped, b_layout=layout)
        assert worst(out, exact) <= 1
        other = {"peft": "unsloth", "unsloth": "peft"}[layout]
        wrong = moe_models.exact(tmp_path / f"{layout} wrong", case.wrapped, b_layout=other)
        assert worst(out, wrong) > 1000


def test_a_model_card_that_is_none_is_not_opened(tmp_path):
    """Opening a pipe waits for who writes into it; a link may lead to a file of the user's."""
    card, elsewhere = tmp_path / "adapter" / peft_parameters.README, tmp_path / "mine"
    card.parent.mkdir()
    elsewhere.write_text("unsloth")
    card.symlink_to(elsewhere)
    assert not peft_parameters._card(card.parent)
    card.unlink()
    os.mkfifo(card)
    found = []
    waiting = threading.Thread(
        target=lambda: found.append(peft_parameters._card(card.parent)), daemon=True
    )
    waiting.start()
    waiting.join(5)
    assert found == [False]


def test_a_model_card_that_names_unsloth_asks_as_well(tmp_path):
    case = prepare(tmp_path, "qwen3_moe")
    (case.adapter / "README.md").write_text("---\nlibrary_name: peft\ntags:\n- unsloth\n---\n")
    with pytest.raises(DoraExportError, match="--moe-b-layout"):
        dora_export.merge(case.base, case.adapter, tmp_path / "out")


def test_rank_one_needs_no_order(tmp_path):
    case = prepare(tmp_path, "qwen3_moe", r=1)
    edit_config(case.adapter, **MARKS["unsloth's mark"])
    dora_export.merge(case.base, case.adapter, tmp_path / "out")
    assert worst(tmp_path / "out", case.exact) <= 1


RECORDS = {
    "for all": {"lora_B_layout": "grouped_by_expert"},
    "by name": {
        "lora_B_layout": None,
        "unsloth_fused_expert_lora": {
            "lora_A_layout": "grouped_by_expert",
            "parameters": {
                "gate_up_proj": {"lora_B_layout": "grouped_by_expert", "num_experts": 4},
                "down_proj": {"lora_B_layout": "grouped_by_expert", "num_experts": 4},
            },
        },
    },
}


@pytest.mark.parametrize("record", RECORDS)
def test_order_that_unsloth_recorded_counts(record, tmp_path):
    case = prepare(tmp_path, "qwen3_moe")
    edit_config(case.adapter, **MARKS["unsloth's mark"], **RECORDS[record])
    dora_export.merge(case.base, case.adapter, tmp_path / "out")
    exact = moe_models.exact(tmp_path / "other", case.wrapped, b_layout="unsloth")
    assert worst(tmp_path / "out", exact) <= 1
    with pytest.raises(DoraExportError, match="Leave --moe-b-layout out"):
        dora_export.merge(case.base, case.adapter, tmp_path / "no", moe_b_layout="peft")


def test_records_of_another_kind_are_refused(tmp_path):
    case = prepare(tmp_path, "qwen3_moe")
    edit_config(case.adapter, lora_B_layout="by_row")
    with pytest.raises(DoraExportError, match="Expected one of rank_major, grouped_by_expert"):
        dora_export.merge(case.base, case.adapter, tmp_path / "out")
    edit_config(case.adapter, lora_B_layout="rank_major",
                unsloth_fused_expert_lora={"lora_A_layout": "by_row"})  # fmt: skip
    with pytest.raises(DoraExportError, match="lora_A_layout 'by_row' is not known"):
        dora_export.merge(case.base, case.adapter, tmp_path / "out")


# --- which way B A lies


SQUARE = {"inner": moe_models.HIDDEN, "target_parameters": ["experts.down_proj"]}


@pytest.mark.parametrize("original", [True, False], ids=["checkpoint names", "class names"])
@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss", "llama4", "qwen3_vl_moe"])
def test_square_slices_are_laid_by_version_and_class(kind, original, tmp_path):
    """down_proj is 32 x 32: both ways fit, and is_transposed decides."""
    case = prepare(tmp_path, kind, original=original, **SQUARE)
    dora_export.merge(case.base, case.adapter, tmp_path / "out")
    assert worst(tmp_path / "out", case.exact) <= 1
    turned = moe_models.exact(tmp_path / "turned", case.wrapped, original, turn=True)
    assert worst(tmp_path / "out", turned) > 1000
    # PEFT before 0.19 took the first dimension for the inputs, whatever the class.
    edit_config(case.adapter, peft_version="0.18.1")
    dora_export.merge(case.base, case.adapter, tmp_path / "old")
    first = case.exact if kind == "gpt_oss" else turned
    assert worst(tmp_path / "old", first) <= 1


@pytest.mark.parametrize("version", [None, "0.19.0.dev0", "0.18.1.dev0@1234567"])
def test_square_slices_are_asked_where_the_version_does_not_tell(version, tmp_path):
    case = prepare(tmp_path, "qwen3_moe", **SQUARE)
    edit_config(case.adapter, peft_version=version, lora_B_layout="rank_major")
    with pytest.raises(DoraExportError, match="--moe-transposed for the former") as refusal:
        dora_export.merge(case.base, case.adapter, tmp_path / "out")
    assert "--no-moe-transposed for the latter" in str(refusal.value)
    straight = run("merge", case.base, case.adapter, "-o", tmp_path / "a", "--no-moe-transposed")
    assert straight.exit_code == 0, straight.output
    assert worst(tmp_path / "a", case.exact) <= 1
    dora_export.merge(case.base, case.adapter, tmp_path / "b", moe_transposed=True)
    turned = moe_models.exact(tmp_path / "turned", case.wrapped, turn=True)
    assert worst(tmp_path / "b", turned) <= 1


def test_stacks_that_checkpoints_hold_either_way_are_told_by_their_shapes(tmp_path):
    """Qwen3-VL's own checkpoints hold (in, out); transformers 5 loads both, and saves (out, in)."""
    case = prepare(tmp_path, "qwen3_vl_moe")
    stacks = ("gate_up_proj", "down_proj")
    rewrite(
        case.base,
        lambda held: {n: t.mT.contiguous() if n.endswith(stacks) else t for n, t in held.items()},
    )
    dora_export.merge(case.base, case.adapter, tmp_path / "out", verify="full")
    turned = {n: t.mT if n.endswith(stacks) else t for n, t in case.exact.items()}
    assert worst(tmp_path / "out", turned) <= 1
    assert relative(case.merged(tmp_path / "out"), case.expected()) < 1e-5


def test_square_slices_beside_others_are_held_as_those_are(tmp_path):
    case = prepare(tmp_path, "qwen3_vl_moe", **SQUARE)
    stacks = ("gate_up_proj", "down_proj")
    rewrite(
        case.base,
        lambda held: {n: t.mT.contiguous() if n.endswith(stacks) else t for n, t in held.items()},
    )
    dora_export.merge(case.base, case.adapter, tmp_path / "out")
    turned = {n: t.mT if n.endswith(stacks) else t for n, t in case.exact.items()}
    assert worst(tmp_path / "out", turned) <= 1
    edit_json(case.base / "config.json", text_config={"model_type": "qwen3_vl_moe_text"})
    with pytest.raises(DoraExportError, match=r"as \(out, in\) or as \(in, out\)"):
        dora_export.merge(case.base, case.adapter, tmp_path / "no")


def test_square_slices_of_an_unknown_class_are_asked(tmp_path):
    case = prepare(tmp_path, "qwen3_moe", original=False, **SQUARE)
    edit_json(case.base / "config.json", model_type="mixture_of_ours")
    with pytest.raises(DoraExportError, match="is_transposed is not known"):
        dora_export.merge(case.base, case.adapter, tmp_path / "out")
    dora_export.merge(case.base, case.adapter, tmp_path / "out", moe_transposed=False)
    assert worst(tmp_path / "out", case.exact) <= 1


@pytest.mark.parametrize("original", [True, False], ids=["checkpoint names", "class names"])
def test_factors_of_peft_before_0_19_fit_the_other_way_round(original, tmp_path):
    """Not square: A of old versions runs over the first dimension, which its shape tells."""
    case = prepare(tmp_path, "qwen3_moe", original=original)
    exact = moe_models.as_old_peft(case, original)
    dora_export.merge(case.base, case.adapter, tmp_path / "out", verify="full")
    assert worst(tmp_path / "out", exact) <= 1


# --- what does not add up


def test_a_rank_that_gives_other_experts_is_refused(tmp_path):
    case = prepare(tmp_path, "qwen3_moe", r=4)
    edit_config(case.adapter, r=2)
    with pytest.raises(DoraExportError, match=r"the adapter has 8 experts, the base 4.*rank"):
        dora_export.merge(case.base, case.adapter, tmp_path / "out")


def test_a_rank_that_does_not_divide_is_refused(tmp_path):
    case = prepare(tmp_path, "qwen3_moe")
    edit_config(case.adapter, r=5)
    with pytest.raises(DoraExportError, match="rank 5 by the config"):
        dora_export.merge(case.base, case.adapter, tmp_path / "out")


def test_more_names_than_factors_are_refused(tmp_path):
    case = prepare(tmp_path, "qwen3_moe")
    edit_config(case.adapter, target_parameters=[*BOTH, "experts.up_proj"])
    with pytest.raises(DoraExportError, match="Take out those that the model does not have"):
        dora_export.merge(case.base, case.adapter, tmp_path / "out")


def test_names_of_an_unknown_order_are_refused(tmp_path):
    case = prepare(tmp_path, "qwen3_moe")
    edit_config(case.adapter, target_parameters=["experts.w12", "experts.w3"])
    with pytest.raises(DoraExportError, match="registers them, which is not known"):
        dora_export.merge(case.base, case.adapter, tmp_path / "out")


def test_experts_replaced_whole_on_a_base_that_holds_them_otherwise_are_refused(tmp_path):
    """Else they would be written beside the old ones, which the model would go on with."""
    case = prepare(tmp_path, "qwen3_moe", target_modules=["q_proj"], target_parameters=None,
                   modules_to_save=["experts"])  # fmt: skip
    with pytest.raises(DoraExportError, match="replaces whole experts"):
        dora_export.merge(case.base, case.adapter, tmp_path / "out")


def test_layers_inside_multihead_attention_are_refused_by_name(tmp_path):
    import peft
    from torch import nn

    from tests.peft_models import save_base

    model = nn.ModuleDict({"attn": nn.MultiheadAttention(16, 2), "fc": nn.Linear(16, 8)})
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["attn", "fc"]))
    save_base(tmp_path / "base", nn.ModuleDict({"fc": nn.Linear(16, 8)}))
    wrapped.save_pretrained(tmp_path / "adapter")
    with pytest.raises(DoraExportError, match=r"nn\.MultiheadAttention, whose out_proj PEFT adds"):
        dora_export.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")


def test_every_class_of_transformers_registers_its_parameters_in_the_known_order():
    from pathlib import Path

    import transformers

    from dora_export.expert_names import REGISTERED

    found = 0
    for file in Path(transformers.__file__).parent.glob("models/*/modeling_*.py"):
        for text in file.read_text().split("\nclass "):
            names = re.findall(r"self\.(\w+) = nn\.Parameter\(", text)
            if "down_proj" in names:
                order = [REGISTERED.index(n) for n in names if n in REGISTERED]
                assert order == sorted(order), (file.name, names)
                found += 1
    assert found > 40


def test_experts_are_one_update_each_and_read_no_tensor(tmp_path):
    case = prepare(tmp_path, "qwen3_moe")
    adapter = read_adapter(case.adapter, ReadOptions())
    assert len(adapter.updates) == 2 * 2 * moe_models.EXPERTS
    assert json.loads((case.adapter / "adapter_config.json").read_text())["r"] == 3
