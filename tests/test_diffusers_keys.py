"""How names of diffusers' LoRA files are read, layout by layout.

Source: github.com/huggingface/diffusers, src/diffusers/utils/state_dict_utils.py; for kohya's names
beside diffusers' magnitudes github.com/bghira/SimpleTuner, simpletuner/helpers/training/
lora_format.py.
"""

from types import SimpleNamespace

import pytest

from dora_export.adapters.diffusers_keys import Key, component_of, is_layout, parsed, sort

TEXT = "text_encoder.text_model.encoder.layers.0.self_attn"
NAMES = {
    "unet.a.lora_A.weight": Key("unet.a", "A"),
    "unet.a.lora_A": Key("unet.a", "A"),
    "unet.a.lora_B.default.weight": Key("unet.a", "B"),
    "unet.a.lora_B.bias": Key("unet.a", "B.bias"),
    "unet.a.lora_B.default.bias": Key("unet.a", "B.bias"),
    "unet.a.lora_magnitude_vector": Key("unet.a", "m"),
    "unet.a.lora_magnitude_vector.weight": Key("unet.a", "m"),
    "unet.a.lora_magnitude_vector.default": Key("unet.a", "m"),
    "unet.a.lora_magnitude_vector.default.weight": Key("unet.a", "m"),
    "unet.a.dora_scale": Key("unet.a", "dora_scale"),
    "unet.a.alpha": Key("unet.a", "alpha"),
    "unet.a.lora.down.weight": Key("unet.a", "A", old=True),
    "unet.a.lora.up.weight": Key("unet.a", "B", old=True),
    "text_encoder.a.lora_linear_layer.down.weight": Key("text_encoder.a", "A", old=True),
    "text_encoder.a.lora_linear_layer.up.weight": Key("text_encoder.a", "B", old=True),
    **{f"mid.attn1.processor.to_{to}_lora.down.weight": Key(f"mid.attn1.{leaf}", "A", old=True)
       for to, leaf in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("out", "to_out.0"))},
    **{f"{TEXT}.to_{to}_lora.up.weight": Key(f"{TEXT}.{leaf}", "B", old=True)
       for to, leaf in (("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj"), ("out", "out_proj"))},
    "unet.a.weight": None,
    "unet.a.lora_C.weight": None,
    ".lora_A.weight": None,
    "unet.a.lora_A.weight.more.of.it": None,
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_name_says_module_and_part(name):
    assert parsed(name) == NAMES[name]


COMPONENTS = ["unet", "transformer", "transformer_2", "prior", "text_encoder", "text_encoder_2",
              "text_encoder_3", "text_encoder_4", "image_encoder", "controlnet",
              "diffusion_model"]  # fmt: skip


@pytest.mark.parametrize("component", COMPONENTS)
def test_component_stands_in_front(component):
    assert component_of(f"{component}.blocks.0.to_q") == component
    assert component_of(f"{component}s.blocks.0.to_q") is None
    assert component_of(f"x.{component}.blocks.0.to_q") is None
    assert is_layout([f"{component}.blocks.0.to_q.lora_{side}.weight" for side in "AB"])


@pytest.mark.parametrize(
    ("names", "diffusers"),
    [(["mid.attn1.processor.to_q_lora.down.weight"], True),
     (["blocks.0.to_q.lora_A.weight"], False),
     (["unet.a.lora_A.weight", "base_model.model.b.lora_A.weight"], False),
     (["unet.a.lora_A.weight", "unet.a.what"], False),
     (["unet.a.alpha", "unet.a.lora_magnitude_vector"], False),
     ([], False)],
    ids=str,
)  # fmt: skip
def test_layout_is_told_by_a_component_or_a_processor(names, diffusers):
    assert is_layout(names) is diffusers


def sorted_(*names):
    return sort({name: SimpleNamespace(name=name) for name in names})


def parts(*names):
    return {module: set(of) for module, of in sorted_(*names).layers.items()}


KOHYA = {"lora_unet": "unet", "lora_te": "text_encoder", "lora_te1": "text_encoder",
         "lora_te2": "text_encoder_2"}  # fmt: skip


@pytest.mark.parametrize("prefix", KOHYA)
def test_kohyas_names_are_those_of_the_layers_with_magnitudes(prefix):
    module = f"{KOHYA[prefix]}.down_blocks.0.to_q"
    flat = [f"{prefix}_down_blocks_0_to_q.{end}"
            for end in ("lora_down.weight", "lora_up.weight", "alpha")]  # fmt: skip
    m = f"{module}.lora_magnitude_vector"
    found = sorted_(*flat, m)
    assert {p: ref.name for p, ref in found.layers[module].items()} == dict(
        zip(("A", "B", "alpha", "m"), (*flat, m), strict=True)
    )
    assert not found.problems
    # of no layer, or of one that two names with a dot could mean
    assert sorted_(f"{prefix}_other.lora_up.weight", m).problems
    twin = f"{KOHYA[prefix]}.down.blocks_0.to_q.lora_magnitude_vector"
    assert sorted_(*flat[:2], m, twin).problems


def test_magnitudes_of_to_out_go_with_the_factors_of_its_first_layer():
    """PEFT's names end in to_out.0, and a part of what diffusers wrote for magnitudes in to_out."""
    m = "unet.a.to_out.lora_magnitude_vector"
    factors = [f"unet.a.to_out.0.lora_{side}.weight" for side in "AB"]
    assert parts(*factors, m) == {"unet.a.to_out.0": {"A", "B", "m"}}
    own = [name.replace("to_out.0", "to_out") for name in factors]
    assert parts(*factors, *own, m) == {"unet.a.to_out.0": {"A", "B"},
                                        "unet.a.to_out": {"A", "B", "m"}}  # fmt: skip
    assert parts(m) == {"unet.a.to_out": {"m"}}


def test_old_names_are_told_and_two_names_of_one_part_are_a_problem():
    assert sorted_("unet.a.lora.down.weight").old
    assert not sorted_("unet.a.lora_A.weight").old
    (problem,) = sorted_("unet.a.lora.down.weight", "unet.a.lora_A.weight").problems
    assert "are the same part of one layer" in problem
