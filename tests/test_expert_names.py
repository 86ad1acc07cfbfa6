"""The names of experts, one by one, and how classes hold them, against transformers' own."""

import re
from pathlib import Path

import pytest
import transformers
from transformers.models.auto.configuration_auto import model_type_to_module_name

from dora_export.expert_names import EXPERT_MODELS, REGISTERED, Address, ExpertModel, address

SINGLE = {
    "m.mlp.experts.3.gate_proj.weight": Address("m.mlp", "gate", 3),
    "m.mlp.experts.3.up_proj.weight": Address("m.mlp", "up", 3),
    "m.mlp.experts.12.down_proj.weight": Address("m.mlp", "down", 12),
    "m.moe.experts.0.w1.weight": Address("m.moe", "gate", 0),
    "m.moe.experts.0.w2.weight": Address("m.moe", "down", 0),
    "m.moe.experts.0.w3.weight": Address("m.moe", "up", 0),
    "m.mlp.experts.3.gate_proj.bias": None,
    "m.mlp.experts.x.gate_proj.weight": None,
    "m.mlp.gate_proj.weight": None,
    "m.mlp.experts.gate_up_proj": None,
    "m.mlp.switch_mlp.up_proj.weight": None,
}
STACKED = {
    "m.mlp.experts.gate_up_proj": Address("m.mlp", "gate_up"),
    "m.mlp.experts.gate_up_proj.weight": Address("m.mlp", "gate_up"),
    "m.mlp.experts.gate_proj": Address("m.mlp", "gate"),
    "m.mlp.experts.up_proj": Address("m.mlp", "up"),
    "m.mlp.experts.down_proj": Address("m.mlp", "down"),
    "m.mlp.switch_mlp.gate_proj.weight": Address("m.mlp", "gate"),
    "m.mlp.switch_mlp.up_proj.weight": Address("m.mlp", "up"),
    "m.mlp.switch_mlp.down_proj.weight": Address("m.mlp", "down"),
    "m.mlp.experts.fc1.weight": Address("m.mlp", "gate_up"),
    "m.mlp.experts.fc2.weight": Address("m.mlp", "down"),
    "m.moe.input_linear.weight": Address("m.moe", "gate_up"),
    "m.moe.output_linear.weight": Address("m.moe", "down"),
    "m.mlp.fc1.weight": None,
    "m.moe.input_linear": None,
    "m.mlp.experts.3.gate_proj.weight": None,
    "m.mlp.experts.gate_up_proj_bias": None,
}


@pytest.mark.parametrize("stacked", [False, True])
def test_every_name_means_its_matrix_and_no_other(stacked):
    for name, meant in (STACKED if stacked else SINGLE).items():
        assert address(name, stacked=stacked) == meant, name


def test_gate_and_up_in_one_are_two_matrices():
    assert Address("m", "gate_up").parts == ("gate", "up")
    assert Address("m", "down").parts == ("down",)


def declared():
    """Folder of transformers' models -> what its experts' class is declared to be."""
    found = {}
    for file in Path(transformers.__file__).parent.glob("models/*/modeling_*.py"):
        text = file.read_text()
        if "use_experts_implementation" in text:
            settings = "".join(re.findall(r"@use_experts_implementation\(([^)]*)\)", text))
            found[file.parent.name] = (
                "is_transposed=True" in settings, "is_concatenated=False" in settings)  # fmt: skip
    return found


def test_classes_hold_their_experts_as_transformers_declares_it():
    classes, compared = declared(), 0
    for model_type, model in EXPERT_MODELS.items():
        folder = model_type_to_module_name(model_type)
        if folder in classes:
            assert (model.is_transposed, model.alternate) == classes[folder], model_type
            assert model.layout == ("io" if model.is_transposed else "oi"), model_type
            compared += 1
    assert compared > 40
    special = {folder for folder, settings in classes.items() if any(settings)}
    known = {model_type_to_module_name(t) for t in EXPERT_MODELS}
    assert special <= known


def test_every_parameter_of_experts_has_its_place_among_those_of_a_module():
    found = set()
    for file in Path(transformers.__file__).parent.glob("models/*/modeling_*.py"):
        for text in file.read_text().split("\nclass "):
            names = re.findall(r"self\.(\w+) = nn\.Parameter\(", text)
            if "down_proj" in names:
                found |= {n for n in names if n.endswith(("_proj", "_proj_bias"))}
    assert found == set(REGISTERED)


def test_llama4_holds_its_experts_as_it_multiplies_with_them():
    from transformers import Llama4TextConfig
    from transformers.models.llama4.modeling_llama4 import Llama4TextExperts

    config = Llama4TextConfig(hidden_size=8, intermediate_size=6, num_local_experts=3)
    experts = Llama4TextExperts(config)
    assert tuple(experts.gate_up_proj.shape) == (3, 8, 12)  # (in, out) in each
    assert EXPERT_MODELS["llama4"] == EXPERT_MODELS["llama4_text"] == ExpertModel("io")
