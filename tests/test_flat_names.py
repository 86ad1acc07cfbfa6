"""Flattened names are looked up among the base's own; what fits twice or nowhere is refused."""

import pytest

from dora_export.errors import PlanError
from dora_export.flat_names import is_flat, prefix_of, resolve

PIPELINE = [
    "unet.down_blocks.0.attentions.0.to_q.weight",
    "unet.down_blocks.0.attentions.0.to_out.0.weight",
    "unet.down_blocks.0.attentions.0.to_out.0.bias",
    "unet.conv_in.weight",
    "text_encoder.text_model.encoder.layers.0.mlp.fc1.weight",
    "text_encoder_2.text_model.encoder.layers.0.mlp.fc1.weight",
    "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q.weight",
]
LLAMA = ["model.layers.0.self_attn.q_proj.weight", "model.norm.weight", "lm_head.weight"]


def test_prefix_is_the_longest_known_one():
    assert prefix_of("lora_te1_text_model_x") == "lora_te1"
    assert prefix_of("lora_te_text_model_x") == "lora_te"
    assert prefix_of("text_encoder_2.text_model.x") == "text_encoder_2"
    assert prefix_of("model.layers.0") == ""
    assert is_flat("lora_unet_conv_in")
    assert not is_flat("unet.conv_in")
    assert not is_flat("lora_unet.conv_in")


def test_every_prefix_stands_for_its_component():
    found = resolve(
        [
            "lora_unet_down_blocks_0_attentions_0_to_q",
            "lora_unet_down_blocks_0_attentions_0_to_out_0",
            "lora_te1_text_model_encoder_layers_0_mlp_fc1",
            "lora_te2_text_model_encoder_layers_0_mlp_fc1",
        ],
        PIPELINE,
    )
    assert list(found.paths.values()) == [
        "unet.down_blocks.0.attentions.0.to_q",
        "unet.down_blocks.0.attentions.0.to_out.0",
        "text_encoder.text_model.encoder.layers.0.mlp.fc1",
        "text_encoder_2.text_model.encoder.layers.0.mlp.fc1",
    ]
    assert "'lora_te2' for 'text_encoder_2'" in found.what


def test_t5_is_the_third_text_encoder_or_the_second():
    name = "lora_te3_encoder_block_0_layer_0_SelfAttention_q"
    assert resolve([name], PIPELINE).paths[name].startswith("text_encoder_2.")
    third = [n.replace("text_encoder_2.encoder", "text_encoder_3.encoder") for n in PIPELINE]
    assert resolve([name], third).paths[name].startswith("text_encoder_3.")


@pytest.mark.parametrize("prefix", ["lora_unet_", "unet.", "diffusion_model.", "lycoris_"])
def test_a_component_alone_needs_no_prefix(prefix):
    bare = [n.removeprefix("unet.") for n in PIPELINE if n.startswith("unet.")]
    name = f"{prefix}conv_in"
    assert resolve([name], bare).paths == {name: "conv_in"}
    assert resolve([name], PIPELINE).paths == {name: "unet.conv_in"}


@pytest.mark.parametrize(
    ("module", "names"),
    [
        ("lycoris_model_layers_0_self_attn_q_proj", LLAMA),
        ("lycoris_layers_0_self_attn_q_proj", LLAMA),  # trained on the base class
        ("lycoris_model_layers_0_self_attn_q_proj", [n.removeprefix("model.") for n in LLAMA]),
        ("model.layers.0.self_attn.q_proj", LLAMA),
    ],
)
def test_one_segment_may_be_missing_or_too_much(module, names):
    assert resolve([module], names).paths[module].endswith("layers.0.self_attn.q_proj")


def test_aliases_are_names_as_well():
    aliases = {"unet.input_blocks.1.1.to_q": "unet.down_blocks.0.attentions.0.to_q"}
    name = "lora_unet_input_blocks_1_1_to_q"
    assert resolve([name], PIPELINE, aliases).paths == {
        name: "unet.down_blocks.0.attentions.0.to_q"
    }


COLLIDING = ["unet.a.b_c.weight", "unet.a_b.c.weight"]


def test_paths_that_flatten_alike_are_refused_with_both():
    with pytest.raises(PlanError, match=r"unet\.a\.b_c or unet\.a_b\.c") as caught:
        resolve(["lora_unet_a_b_c"], COLLIDING)
    remedy = str(caught.value).rpartition("--map-prefix ")[2]
    assert remedy == "lora_unet_a_b_c=unet.a.b_c"
    pair = tuple(remedy.split("="))
    assert resolve(["lora_unet_a_b_c"], COLLIDING, mapped=[pair]).paths == {pair[0]: pair[1]}
    other = [("lora_unet_a_b_c", "unet.a_b.c")]
    assert resolve(["lora_unet_a_b_c"], COLLIDING, mapped=other).paths[pair[0]] == "unet.a_b.c"


def test_dots_decide_between_paths_that_flatten_alike():
    assert resolve(["unet.a_b.c"], COLLIDING).paths == {"unet.a_b.c": "unet.a_b.c"}
    assert resolve(["lora_unet_x"], [*COLLIDING, "unet.x.weight"]).paths  # nobody asks for them


def test_missing_layers_are_listed_with_what_the_prefix_means():
    bare = [n.removeprefix("unet.") for n in PIPELINE if n.startswith("unet.")]
    names = ["lora_unet_conv_in", "lora_te_text_model_encoder_layers_0_mlp_fc1"]
    with pytest.raises(PlanError, match="1 of 2 adapter layers match") as caught:
        resolve(names, bare, base_name="sd15")
    for words in ("'lora_te_' is the text_encoder", "--map-prefix lora_te_=", "'sd15'"):
        assert words in str(caught.value)


def test_names_of_two_components_that_mean_one_layer_are_refused():
    """Both text encoders' names on a folder that holds one of them."""
    clip = ["text_model.layers.0.fc1.weight"]
    names = ["lora_te1_text_model_layers_0_fc1", "lora_te2_text_model_layers_0_fc1"]
    assert resolve(names[:1], clip).paths
    with pytest.raises(PlanError, match="several of the adapter's names mean one layer") as caught:
        resolve(names, clip)
    assert f"text_model.layers.0.fc1: {', '.join(names)}" in str(caught.value)
    assert "pass the folder or file that holds all of them" in str(caught.value)


def test_names_that_fit_two_components_are_refused():
    names = ["unet.x.weight", "transformer.x.weight"]
    with pytest.raises(PlanError, match="more than one way") as caught:
        resolve(["lora_unet_x"], names)
    assert "--map-prefix lora_unet_=unet." in str(caught.value)
    mapped = [("lora_unet_", "transformer.")]
    assert resolve(["lora_unet_x"], names, mapped=mapped).paths == {"lora_unet_x": "transformer.x"}
