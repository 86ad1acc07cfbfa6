"""Names of two ages: adapters of a class's names on a checkpoint's, and the reverse."""

import re

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

import dora_export
from dora_export import DoraExportError, conventions, part_names
from dora_export.checkpoints import open_checkpoint
from dora_export.diffusion_names import Place
from tests import rider_models, test_stored_names
from tests.peft_models import rekey
from tests.rider_models import VOCABULARY, WARNINGS, edit_json, rewrite, shapes, tensors
from tests.small import PREFIX, write_json

# Reasons stand beside the entries.
pytestmark = [pytest.mark.filterwarnings(w) for w in WARNINGS]

TEXT = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "max_position_embeddings": 64, "initializer_range": 0.2, "bos_token_id": 1,
        "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": False}  # fmt: skip
VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
          "num_attention_heads": 2, "image_size": 16, "patch_size": 8}  # fmt: skip
ROTARY = {
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
}


def multimodal(name, text=None, vision=None, **options):
    """A tiny model of that class, its two parts given or as the config has them."""

    def make():
        config = getattr(transformers, f"{name}Config")(
            text_config={**TEXT, **(text or {})}, vision_config={**VISION, **(vision or {})},
            tie_word_embeddings=False, **options,
        )  # fmt: skip
        return getattr(transformers, f"{name}ForConditionalGeneration")(config)

    return make


def plain(model_class, config_class, **options):
    def make():
        return getattr(transformers, model_class)(getattr(transformers, config_class)(**options))

    return make


MIXTURE = {"num_local_experts": 4, "num_experts_per_tok": 2}
IMAGE = {"image_token_index": 90}
MODELS = {
    "llava": multimodal("Llava", {"model_type": "llama"}, {"model_type": "clip_vision_model"},
                        **IMAGE),
    "llava_next": multimodal("LlavaNext", {"model_type": "llama"},
                             {"model_type": "clip_vision_model"}, **IMAGE),
    "gemma3": multimodal("Gemma3", {"sliding_window": 16, "query_pre_attn_scalar": 8},
                         image_token_index=90, mm_tokens_per_image=4),
    "paligemma": multimodal("PaliGemma", {"model_type": "gemma"},
                            {"model_type": "siglip_vision_model", "projection_dim": 32}, **IMAGE),
    "mistral3": multimodal("Mistral3", {"model_type": "mistral"}, {"model_type": "pixtral"},
                           image_token_index=90),
    "internvl": multimodal("InternVL", {"model_type": "qwen2"}, {"image_size": [16, 16],
                           "patch_size": [8, 8]}, image_token_id=90),
    "got_ocr2": multimodal("GotOcr2", {"model_type": "qwen2"},
                           {"depth": 1, "num_heads": 2, "mlp_dim": 24, "output_channels": 8,
                            "global_attn_indexes": [0], "window_size": 2}, image_token_index=90),
    "qwen2_vl": multimodal("Qwen2VL", ROTARY, {"depth": 1, "embed_dim": 16, "hidden_size": 32,
                           "num_heads": 2}, image_token_id=90, video_token_id=91,
                           vision_start_token_id=92, vision_end_token_id=93),
    "qwen2_5_vl": multimodal("Qwen2_5_VL", ROTARY, {"depth": 1, "out_hidden_size": 32,
                             "num_heads": 2}, image_token_id=90, video_token_id=91,
                             vision_start_token_id=92, vision_end_token_id=93),
    "gpt_neox": plain("GPTNeoXForCausalLM", "GPTNeoXConfig",
                      **{k: v for k, v in TEXT.items() if "head_dim" not in k}),
    "nemotron_h": plain("NemotronHForCausalLM", "NemotronHConfig", **TEXT, mamba_num_heads=4,
                        mamba_head_dim=8, ssm_state_size=8, n_groups=1, chunk_size=8,
                        layers_block_type=["mamba", "attention"]),
    "mixtral": plain("MixtralForCausalLM", "MixtralConfig", **TEXT, **MIXTURE),
    "phimoe": plain("PhimoeForCausalLM", "PhimoeConfig", **TEXT, **MIXTURE,
                    rope_parameters={"rope_type": "default", "rope_theta": 1e4}),
    "granitemoe": plain("GraniteMoeForCausalLM", "GraniteMoeConfig", **TEXT, **MIXTURE),
}  # fmt: skip
ROUTER = {"target_modules": ["q_proj"], "use_dora": False}
LORA = {
    "gpt_neox": {"target_modules": ["query_key_value", "dense_4h_to_h", "lm_head"]},
    "nemotron_h": {"target_modules": ["q_proj", "in_proj"]},
    "mixtral": {**ROUTER, "target_parameters": ["gate.weight"]},
    "phimoe": {**ROUTER, "target_parameters": ["router.weight"]},
    "granitemoe": {**ROUTER, "target_parameters": ["router.weight"]},
}


def prepare(folder, kind, original, **lora):
    """As in ``rider_models``, and with the names of either age in the base."""
    torch.manual_seed(0)
    model = MODELS[kind]().eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 or "bias" in name:
            parameter.data.normal_(0, 0.15)
    settings = {"target_modules": ["q_proj", "down_proj", "lm_head"], "use_dora": True,
                **LORA.get(kind, {}), **lora}  # fmt: skip
    case = rider_models.prepare(folder, model, tokens=rider_models.TOKENS % 80 + 3, **settings)
    model = case.model_class.from_pretrained(case.base)
    for names in (True, False):
        model.save_pretrained(folder / f"names {names}", save_original_format=names)
    model.save_pretrained(case.base, save_original_format=original)
    return case


def check(case, output):
    report = dora_export.merge(case.base, case.adapter, output, verify="full")
    assert shapes(output) == shapes(case.base)
    found = rider_models.logits(case.model_class.from_pretrained(output), case.tokens)
    assert case.distance(found) < 1e-5
    assert case.distance(case.before) > 1e-2
    return report


# Where names of adapter and checkpoint are of one age, nothing is renamed: a few models will do.
SAME_AGE = ("llava", "gpt_neox", "mixtral")


def ages(same_age):
    """Models, and whether their checkpoint has its own names rather than those of the class."""
    return [
        pytest.param(
            kind, original, id=f"{kind}-{'checkpoint' if original else 'class'} names",
            marks=[pytest.mark.nightly] if original == same_age and kind not in SAME_AGE else [],
        )
        for kind in MODELS for original in (True, False)
    ]  # fmt: skip


@pytest.mark.parametrize(("kind", "original"), ages(same_age=False))
def test_adapters_of_the_class_fit_checkpoints_of_either_age(kind, original, tmp_path):
    case = prepare(tmp_path, kind, original)
    check(case, tmp_path / "out")


def other_names(folder):
    """Module path in the class -> in the checkpoint, by the bytes that both hold of a tensor."""
    held = {}
    for names in (True, False):
        for name, tensor in tensors(folder / f"names {names}").items():
            if tensor.ndim == 2:
                held.setdefault(tensor.numpy().tobytes(), {})[names] = name
    return {both[False].rpartition(".")[0]: both[True].rpartition(".")[0]
            for both in held.values() if len(both) == 2}  # fmt: skip


@pytest.mark.parametrize(("kind", "original"), ages(same_age=True))
def test_adapters_of_earlier_classes_fit_checkpoints_of_either_age(kind, original, tmp_path):
    """Before transformers 5 a class had the names of its checkpoint."""
    case = prepare(tmp_path, kind, original)
    modules = other_names(tmp_path)

    def earlier(key):
        module, part = re.split(r"(?=\.lora_|\.base_layer)", key.removeprefix(PREFIX), maxsplit=1)
        return PREFIX + modules[module] + part

    rekey(case.adapter, earlier)
    renamed = [m for m, old in modules.items() if m != old]
    assert renamed, "the class has the checkpoint's own names"
    if kind in ("mixtral", "phimoe", "granitemoe"):  # routers were linear layers
        edit_json(case.adapter / "adapter_config.json", target_parameters=None)
    check(case, tmp_path / "out")


@pytest.mark.parametrize("kind", ["llava", "gemma3", "qwen2_5_vl"])
def test_adapters_of_the_headless_class_fit(kind, tmp_path):
    """Trained on AutoModel's class: without "model." and without the head."""
    case = prepare(tmp_path, kind, True, target_modules=["q_proj"])
    rekey(case.adapter, lambda key: key.replace(f"{PREFIX}model.", PREFIX))
    check(case, tmp_path / "out")


# --- encoders for images and text, by PEFT's own merge

ENCODER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
           "num_attention_heads": 4, "image_size": 16, "patch_size": 4}  # fmt: skip
ENCODERS = {
    "vit": (plain("ViTForImageClassification", "ViTConfig", **ENCODER), ["q_proj", "fc1", "fc2"]),
    "deit": (plain("DeiTForImageClassification", "DeiTConfig", **ENCODER), ["k_proj", "o_proj"]),
    "vit_msn": (plain("ViTMSNForImageClassification", "ViTMSNConfig", **ENCODER),
                ["q_proj", "fc1"]),
    "vivit": (plain("VivitForVideoClassification", "VivitConfig", **ENCODER, num_frames=4),
              ["q_proj", "fc2"]),
    "ast": (plain("ASTForAudioClassification", "ASTConfig", **{**ENCODER, "max_length": 32,
                  "num_mel_bins": 16}), ["v_proj", "fc2"]),
    "dinov2": (plain("Dinov2ForImageClassification", "Dinov2Config", **ENCODER, mlp_ratio=2),
               ["q_proj", "fc1"]),
    "beit": (plain("BeitModel", "BeitConfig", **ENCODER), ["q_proj", "fc2"]),  # has no head
    "swin": (plain("SwinModel", "SwinConfig", embed_dim=16, depths=[1, 1], num_heads=[2, 2],
                   image_size=16, patch_size=2, window_size=2), ["q_proj", "o_proj", "fc1"]),
    "dinov2 gated": (plain("Dinov2Model", "Dinov2Config", **ENCODER, use_swiglu_ffn=True),
                     ["q_proj", "up_proj", "down_proj"]),
    "radio": (plain("RadioModel", "RadioConfig", **ENCODER), ["k_proj", "v_proj", "o_proj"]),
    "nomic_bert": (plain("NomicBertModel", "NomicBertConfig", **ENCODER, vocab_size=60),
                   ["q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]),
    "jina v3": (plain("JinaEmbeddingsV3Model", "JinaEmbeddingsV3Config", **ENCODER, vocab_size=60),
                ["k_proj", "o_proj"]),
    "gte": (plain("GteModel", "GteConfig", **ENCODER, vocab_size=60),
            ["q_proj", "k_proj", "v_proj", "gate_proj"]),
    "hrm": (plain("HrmTextForCausalLM", "HrmTextConfig", **{**ENCODER, "num_hidden_layers": 8},
                  vocab_size=60, num_layers_per_stack=2, head_dim=8),
            ["gate_proj", "v_proj", "o_proj"]),
    "clip text": (plain("CLIPTextModel", "CLIPTextConfig", **{**ENCODER, "vocab_size": 60}),
                  ["q_proj", "fc2"]),
    "siglip text": (plain("SiglipTextModel", "SiglipTextConfig", **{**ENCODER, "vocab_size": 60}),
                    ["q_proj", "fc2"]),
}  # fmt: skip


# The same machinery with other words.
NIGHTLY = ("deit", "vit_msn", "vivit", "swin", "radio", "jina v3", "hrm")


@pytest.mark.parametrize("original", [True, False], ids=["checkpoint names", "class names"])
@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=[pytest.mark.nightly] if k in NIGHTLY else []) for k in ENCODERS]
)
def test_encoders_fit_under_the_names_of_either_age(kind, original, tmp_path):
    import peft

    make, targets = ENCODERS[kind]
    torch.manual_seed(0)
    model = make().eval()
    model.save_pretrained(tmp_path / "base", save_original_format=original)
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(r=4, lora_alpha=10, target_modules=targets, use_dora=True)
    )
    rider_models.train(wrapped)
    wrapped.save_pretrained(tmp_path / "adapter")
    dora_export.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", verify="full")
    wrapped.merge_and_unload().save_pretrained(tmp_path / "peft", save_original_format=original)
    base, found, theirs = (tensors(tmp_path / f) for f in ("base", "out", "peft"))
    assert found.keys() == theirs.keys()
    changed, by_peft = (
        {n for n in base if not torch.equal(base[n], t[n])} for t in (found, theirs)
    )
    assert changed == by_peft
    assert len(changed) >= 4
    for name, tensor in found.items():
        size = theirs[name].abs().max()
        assert (tensor - theirs[name]).abs().max() <= 2e-6 * size, name


# --- modules that one side fuses and the other keeps apart

FUSED = {
    "nomic_bert": ["Wqkv", "out_proj", "fc11", "fc2"],
    "jina v3": ["Wqkv", "fc1"],
    "gte": ["qkv_proj", "up_gate_proj", "down_proj"],
    "hrm": ["gqkv_proj", "gate_up_proj"],
}


def of_linears(held):
    """Modules under the names of a checkpoint's matrices: its author's code, as PEFT sees it."""
    root = torch.nn.Module()
    for name, weight in held.items():
        *path, last, leaf = name.split(".")
        if leaf != "weight" or weight.ndim != 2:
            continue
        module = root
        for part in path:
            if part not in module._modules:
                module.add_module(part, torch.nn.Module())
            module = module._modules[part]
        bias = held.get(name.removesuffix("weight") + "bias")
        linear = torch.nn.Linear(*weight.T.shape, bias=bias is not None)
        linear.weight.data = weight.clone()
        if bias is not None:
            linear.bias.data = bias.clone()
        module.add_module(last, linear)
    return root


def bases(folder, kind):
    """The same model under the names of its checkpoint, fused, and of its class, apart."""
    torch.manual_seed(0)
    model = ENCODERS[kind][0]().eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(0, 0.2)
    model.save_pretrained(folder / "fused", save_original_format=True)
    model.save_pretrained(folder / "apart", save_original_format=False)
    return folder / "fused", folder / "apart"


def of_fused(folder, fused, targets, **settings):
    """PEFT's adapter of the checkpoint's own modules, and what PEFT merges it to."""
    import peft

    wrapped = peft.get_peft_model(
        of_linears(tensors(fused)),
        peft.LoraConfig(r=4, lora_alpha=10, target_modules=targets, **settings),
    )
    rider_models.train(wrapped)
    wrapped.save_pretrained(folder / "adapter")
    merged = wrapped.merge_and_unload().state_dict()
    return folder / "adapter", {**tensors(fused), **merged}


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=[pytest.mark.nightly] if k in NIGHTLY else []) for k in FUSED]
)
def test_adapters_of_fused_modules_fit_checkpoints_that_fuse_and_that_do_not(kind, tmp_path):
    fused, apart = bases(tmp_path, kind)
    adapter, theirs = of_fused(tmp_path, fused, FUSED[kind], use_dora=True)
    dora_export.merge(fused, adapter, tmp_path / "one", verify="full")
    dora_export.merge(apart, adapter, tmp_path / "two", verify="full")
    model = ENCODERS[kind][0]()
    model.load_state_dict(tensors(tmp_path / "two"), strict=False)  # but for what is tied
    model.save_pretrained(tmp_path / "two fused", save_original_format=True)
    base = tensors(fused)
    for found in (tensors(tmp_path / "one"), tensors(tmp_path / "two fused")):
        assert found.keys() == base.keys()
        for name, tensor in found.items():
            size = theirs[name].abs().max()
            assert (tensor - theirs[name]).abs().max() <= 2e-6 * size, name
            if name.removesuffix(".weight").endswith(tuple(FUSED[kind])):
                assert (tensor - base[name]).abs().max() > 0.1 * size, name


def test_biases_of_fused_modules_are_added_and_replaced_part_by_part(tmp_path):
    fused, apart = bases(tmp_path, "gte")
    adapter, theirs = of_fused(tmp_path, fused, ["qkv_proj"], lora_bias=True)
    dora_export.merge(apart, adapter, tmp_path / "added", verify="full")
    adapter, replaced = of_fused(tmp_path / "b", fused, ["qkv_proj"], bias="lora_only")
    dora_export.merge(apart, adapter, tmp_path / "replaced", verify="full")
    for out, whole in (("added", theirs), ("replaced", replaced)):
        found = tensors(tmp_path / out)
        for leaf in ("weight", "bias"):
            want = whole[f"encoder.layer.0.attention.qkv_proj.{leaf}"].chunk(3)
            for part, rows in zip("qkv", want, strict=True):
                got = found[f"layers.0.self_attn.{part}_proj.{leaf}"]
                assert (got - rows).abs().max() <= 2e-6 * rows.abs().max()
        assert not torch.equal(want[0], tensors(fused)["encoder.layer.0.attention.qkv_proj.bias"])


def test_a_part_of_a_fused_bias_is_not_replaced(tmp_path):
    import peft

    fused, _ = bases(tmp_path, "gte")
    model = ENCODERS["gte"][0]()
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], bias="lora_only")
    wrapped = peft.get_peft_model(model, config)
    rider_models.train(wrapped)
    wrapped.save_pretrained(tmp_path / "adapter")
    with pytest.raises(
        DoraExportError, match=r"q_proj.bias: the adapter replaces it.*Save the base"
    ):
        dora_export.merge(fused, tmp_path / "adapter", tmp_path / "out")


def test_a_fused_module_of_another_size_is_refused_and_not_cut_short(tmp_path):
    fused, apart = bases(tmp_path, "nomic_bert")
    adapter, _ = of_fused(tmp_path, fused, ["Wqkv"], use_dora=True)

    def taller(held):
        return {n: torch.cat([t, t[:3]]) if "lora_A" not in n else t for n, t in held.items()}

    rewrite(adapter, taller)
    for base in (apart, fused):
        with pytest.raises(DoraExportError, match=r"Wqkv.*(99 outputs, but .* have 96|\(99, 4\))"):
            dora_export.merge(base, adapter, tmp_path / "out")


def per_input(folder, modules, base):
    """A LyCORIS file with one magnitude per input, and the weights of its modules in float64."""
    generator = torch.Generator().manual_seed(3)
    held, want = {}, {}
    for module in modules:
        W = base[f"{module}.weight"].double()
        down, up = (torch.randn(s, generator=generator).mul(0.3) for s in
                    ((4, W.shape[1]), (W.shape[0], 4)))  # fmt: skip
        V = W + 2.5 * up.double() @ down.double()
        m = (W.norm(dim=0) * (1 + torch.rand(W.shape[1], generator=generator))).float()
        want[module] = m.double() * V / (V.norm(dim=0) + torch.finfo(torch.float32).eps)
        start = f"lycoris_{module.replace('.', '_')}"
        held |= {f"{start}.lora_down.weight": down, f"{start}.lora_up.weight": up,
                 f"{start}.alpha": torch.tensor(10.0), f"{start}.dora_scale": m[None]}  # fmt: skip
    folder.mkdir()
    save_file(held, folder / "lora.safetensors")
    return folder / "lora.safetensors", want


def test_magnitudes_per_input_are_of_the_rows_they_were_trained_on(tmp_path):
    fused, apart = bases(tmp_path, "nomic_bert")
    whole = tensors(fused)
    thirds = {}
    for i in range(2):
        rows = whole[f"encoder.layers.{i}.attn.Wqkv.weight"].chunk(3)
        for part, third in zip("qkv", rows, strict=True):
            thirds[f"encoder.layers.{i}.attn.{part}_proj.weight"] = third
    parts = [n.removesuffix(".weight") for n in thirds if "k_proj" not in n]
    adapter, want = per_input(tmp_path / "parts", parts, thirds)
    dora_export.merge(fused, adapter, tmp_path / "out", verify="full")
    for i in range(2):
        q, k, v = tensors(tmp_path / "out")[f"encoder.layers.{i}.attn.Wqkv.weight"].chunk(3)
        own = f"encoder.layers.{i}.attn"
        assert torch.equal(k, thirds[f"{own}.k_proj.weight"])
        for got, part in ((q, "q"), (v, "v")):
            exact = want[f"{own}.{part}_proj"]
            assert (got - exact).abs().max() <= 2e-6 * exact.abs().max()
    adapter, _ = per_input(tmp_path / "whole", ["layers.0.self_attn.Wqkv"],
                           {"layers.0.self_attn.Wqkv.weight":
                            whole["encoder.layers.0.attn.Wqkv.weight"]})  # fmt: skip
    with pytest.raises(DoraExportError, match=r"norm over all outputs at once.*stores them fused"):
        dora_export.merge(apart, adapter, tmp_path / "no")


def test_only_what_divides_and_is_complete_goes_by_other_names(tmp_path):
    held = {"odd.Wqkv.weight": (7, 2), "none.Wqkv.weight": (), "other.Wqkv.scale": (6,),
            "own.Wqkv.weight": (6, 2), "own.q_proj.weight": (2, 2), "gap.q_proj.weight": (2, 2),
            "gap.v_proj.weight": (2, 2), "flat.q_proj.weight": (2, 2), "flat.k_proj.weight": (),
            "flat.v_proj.weight": (2, 2)}  # fmt: skip
    save_file({n: torch.ones(s) for n, s in held.items()}, tmp_path / "model.safetensors")
    write_json(tmp_path / "config.json", {"model_type": "nomic_bert"})
    found = part_names.other_names(open_checkpoint(tmp_path))
    assert found == {
        "own.k_proj.weight": (Place("own.Wqkv.weight", (2, 4)),),
        "own.v_proj.weight": (Place("own.Wqkv.weight", (4, 6)),),
    }


def test_other_models_keep_what_they_fuse(tmp_path):
    """ModernBERT and others have a Wqkv of their own, and no class that keeps it apart."""
    fused, _ = bases(tmp_path, "nomic_bert")
    edit_json(fused / "config.json", model_type="modernbert")
    adapter, _ = of_fused(tmp_path, fused, ["Wqkv"], use_dora=True)
    dora_export.merge(fused, adapter, tmp_path / "out")
    rekey(adapter, lambda key: key.replace("Wqkv", "q_proj"))
    with pytest.raises(DoraExportError, match="0 of 2 adapter targets match"):
        dora_export.merge(fused, adapter, tmp_path / "no")


def molmo2():
    """A tiny Molmo 2 whose queries have more heads than its keys and values."""
    config = transformers.Molmo2Config(
        text_config={"hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 1,
                     "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
                     "vocab_size": 60, "additional_vocab_size": 4},
        vision_config={"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
                       "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8,
                       "image_size": [28, 28], "num_position_embeddings": 4},
        adapter_config={"vision_feature_layer": [0], "hidden_size": 16, "head_dim": 8,
                        "num_attention_heads": 2, "num_key_value_heads": 2,
                        "intermediate_size": 24, "text_hidden_size": 32},
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.Molmo2ForConditionalGeneration(config).eval()


@pytest.fixture(scope="module")
def molmo2_bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("molmo2")
    model = molmo2()
    for names, own in (("fused", True), ("apart", False)):
        model.save_pretrained(folder / names, save_original_format=own)
    return folder / "fused", folder / "apart"


QUERIES = r".*language_model.*\.(q_proj|v_proj|gate_proj|o_proj)"


@pytest.mark.parametrize("names", ["fused", "apart"])
def test_queries_that_share_keys_are_found_in_what_is_fused(names, molmo2_bases, tmp_path):
    import peft

    fused, apart = molmo2_bases
    wrapped = peft.get_peft_model(
        molmo2(), peft.LoraConfig(r=4, lora_alpha=10, target_modules=QUERIES, use_dora=True)
    )
    rider_models.train(wrapped)
    wrapped.save_pretrained(tmp_path / "adapter")
    base = fused if names == "fused" else apart
    dora_export.merge(base, tmp_path / "adapter", tmp_path / "out", verify="full")
    wrapped.merge_and_unload().save_pretrained(tmp_path / "peft",
                                               save_original_format=names == "fused")  # fmt: skip
    before, found, theirs = (tensors(f) for f in (base, tmp_path / "out", tmp_path / "peft"))
    assert found.keys() == theirs.keys()
    changed = [n for n in found if not torch.equal(found[n], before[n])]
    assert len(changed) == (3 if names == "fused" else 4)
    for name, tensor in found.items():
        assert (tensor - theirs[name]).abs().max() <= 2e-6 * theirs[name].abs().max(), name


def test_fused_queries_fit_a_checkpoint_that_keeps_them_apart(molmo2_bases, tmp_path):
    fused, apart = molmo2_bases
    adapter, theirs = of_fused(tmp_path, fused, ["att_proj", "ff_proj"], use_dora=True)
    dora_export.merge(apart, adapter, tmp_path / "out", verify="full")
    found = tensors(tmp_path / "out")
    own, layer = "model.transformer.blocks.0", "model.language_model.layers.0"
    for whole, parts in (
        (f"{own}.self_attn.att_proj", "self_attn.q_proj self_attn.k_proj self_attn.v_proj"),
        (f"{own}.mlp.ff_proj", "mlp.up_proj mlp.gate_proj"),
    ):
        got = torch.cat([found[f"{layer}.{part}.weight"] for part in parts.split()])
        want = theirs[f"{whole}.weight"]
        assert (got - want).abs().max() <= 2e-6 * want.abs().max()
        assert (got - tensors(fused)[f"{whole}.weight"]).abs().max() > 0.1 * want.abs().max()


@pytest.mark.parametrize(
    "heads",
    [{"num_attention_heads": None}, {"num_attention_heads": 5}, {"num_key_value_heads": 0}],
    ids=str,
)
def test_queries_in_what_is_fused_are_not_guessed(heads, tmp_path):
    save_file({"a.att_proj.weight": torch.ones(64, 8)}, tmp_path / "model.safetensors")
    text = {"num_attention_heads": 4, "num_key_value_heads": 2}
    for said, spans in ((text, [(0, 32), (32, 48), (48, 64)]), (text | heads, None)):
        write_json(tmp_path / "config.json", {"model_type": "molmo2", "text_config": said})
        found = part_names.other_names(open_checkpoint(tmp_path))
        places = [(Place("a.att_proj.weight", span),) for span in spans or ()]
        assert list(found.values()) == places


# --- the table, row by row


def converters(row):
    """transformers' conversions of the modules that a row calls fused: (source, targets)."""
    for model_type in row.model_types:
        for key in TEXT_CLASSES.get(model_type, CLASSES.get(model_type, [model_type])):
            for c in get_checkpoint_conversion_mapping(key) or ():
                if isinstance(c, WeightConverter):
                    yield c.source_patterns, c.target_patterns, c.operations


def around_fused(row):
    """Parts of names that a row renames because transformers' conversions do."""
    for sources, targets, _ in converters(row):
        source, target = (n.removesuffix(".weight").rpartition(".")[0].rpartition(".")[2]
                          for n in (sources[0], targets[0]))  # fmt: skip
        yield f".{source}.", f".{target}."


def samples(row):
    """Checkpoint names that a row is about."""
    apart = set(around_fused(row))
    tail = "layers.0.mlp.weight"
    yield from (old + (tail[len("layers."):] if old.endswith(".layer.") else
                       tail if old.endswith(".") else "") for old, _ in row.prefixes
                if not old.endswith("lm_head."))  # fmt: skip
    yield from (old + "weight" for old, _ in row.prefixes if old.endswith("lm_head."))
    has_layers = any("encoder.layer" in old for old, _ in row.inside)
    start = "vit" if has_layers else "model.layers.0"
    yield from (
        f"{start}{old if old.startswith('.') else '.' + old}weight"
        for old, new in row.inside if (old, new) not in apart
    )  # fmt: skip


def renamed_by_transformers(name, keys):
    mappings = [m for key in keys if (m := get_checkpoint_conversion_mapping(key)) is not None]
    assert mappings, keys
    found = set()
    for mapping in mappings:
        renamings = [m for m in mapping if isinstance(m, WeightRenaming)]
        outer = rename_source_key(name, renamings, [])[0]
        found.add(outer)
        if outer.startswith("model."):  # the class inside has a mapping of its own
            nested = get_checkpoint_conversion_mapping(NESTED.get(keys[0], "LlavaModel"))
            inner = rename_source_key(outer.removeprefix("model."), nested, [])[0]
            found.add(f"model.{inner}")
    return found


# Rows without model types, or whose type has its mapping under the name of a class.
CLASSES = {
    "qwen2_vl": ["Qwen2VLForConditionalGeneration"],
    "qwen2_5_vl": ["Qwen2_5_VLForConditionalGeneration"],
    "qwen3_5": ["qwen3_5_text"],
    "qwen3_5_moe": ["qwen3_5_moe_text"],
    "gemma3n": ["gemma3n_text"],
    "vit": ["ViTModel"],
    "deit": ["DeiTModel"],
    "audio-spectrogram-transformer": ["ASTModel"],
    "beit": ["BeitModel"],
    "ijepa": ["IJepaModel"],
    "detr": ["DetrModel"],
    "qwen2_5_omni": ["Qwen2_5OmniThinkerForConditionalGeneration"],
    "qwen3_omni_moe": ["Qwen3OmniMoeThinkerForConditionalGeneration"],
    "vit_mae": ["ViTMAEModel"],
    "vit_msn": ["ViTMSNModel"],
    "vivit": ["VivitModel"],
    "dinov2": ["Dinov2Model"],
    "dinov2_with_registers": ["Dinov2WithRegistersModel"],
    "sam3_video": ["sam3_tracker"],  # whose checkpoint it is
}
LEGACY = ("model.language_model.model.", "language_model.model.model.")  # of any model
TEXT_CLASSES = {"molmo2": ["Molmo2TextModel"]}  # that fuse
NESTED = {"emu3": "Emu3Model"}
ANY_TYPE = ("llava", "gemma3", "paligemma", "mistral3", "internvl", "aria", "got_ocr2",
            "aya_vision", "vipllava", "llava_next", "llava_onevision", "qwen2_audio", "voxtral",
            "granite_speech", "video_llava", "fuyu", "mllama", "vibevoice_asr")  # fmt: skip


@pytest.mark.parametrize("number", range(len(conventions.CONVENTIONS)))
def test_every_row_is_what_transformers_does_while_it_loads(number):
    row = conventions.CONVENTIONS[number]
    earlier = not row.model_types and row.prefixes[0][0] in LEGACY
    elsewhere = test_stored_names.CLASSES.keys() - CLASSES  # on empty models
    types = sorted(row.model_types - elsewhere) if row.model_types else ANY_TYPE
    seen = set()
    for model_type in types:
        forward, back = conventions.both_ways(row)
        for name in samples(row):
            keys = ["legacy"] if earlier else CLASSES.get(model_type, [model_type])
            theirs = renamed_by_transformers(name, keys)
            if name in theirs and not row.model_types:
                continue  # this model has no such part
            assert forward(name) in theirs, (model_type, name, theirs)
            assert back(forward(name)) == name
            seen.add(name)
    assert not types or seen == set(samples(row))


@pytest.mark.parametrize(
    "number", [n for n, r in enumerate(conventions.CONVENTIONS) if r.fused or r.grouped]
)
def test_fused_modules_are_those_that_transformers_cuts(number):
    """In equal parts, or in parts of the rows that the class's own have."""
    row = conventions.CONVENTIONS[number]
    theirs = {}
    for sources, targets, operations in converters(row):
        (how,) = (type(o).__name__ for o in operations)
        if how == "Concatenate":  # of two embeddings into one: stays refused
            continue
        assert how in ("Chunk", "Split")
        assert operations[0].dim == 0
        path, *rest = (
            n.removesuffix(".bias").removesuffix(".weight") for n in (*sources, *targets)
        )
        parents = {n.rpartition(".")[0] for n in rest}
        whole = path.rpartition(".")[2]
        theirs[whole] = how, tuple(n.rpartition(".")[2] for n in rest)
        forward, _ = conventions.both_ways(row)
        renamed = forward(f"layers.0.{path}.weight").removesuffix(f".{whole}.weight")
        assert {renamed} == {f"layers.0.{p}" for p in parents}
    ours = [("Chunk", pair) for pair in row.fused] + [("Split", pair) for pair in row.grouped]
    assert theirs == {whole: (how, parts) for how, (whole, parts) in ours}


def test_ends_of_names_are_those_of_transformers():
    legacy = get_checkpoint_conversion_mapping("legacy")
    assert len(conventions.LEAVES) == sum("model" not in str(m.source_patterns) for m in legacy)
    for old, new in conventions.LEAVES:
        for theirs in renamed_by_transformers(f"bert{old}", ["legacy"]):
            assert theirs == f"bert{new}"
    ((old, new),) = conventions.HEADS["gpt_neox"]
    assert renamed_by_transformers(old, ["GPTNeoXForCausalLM"]) == {new}


def test_ends_of_names_go_both_ways_where_the_other_is_there():
    rows = [(f"a{old}", f"a{new}", "bert") for old, new in conventions.LEAVES]
    rows += [(*pair, kind) for kind, pairs in conventions.HEADS.items() for pair in pairs]
    for old, new, kind in rows:
        for one, other in ((old, new), (new, old)):
            assert conventions.alias(one, frozenset({other}), kind) == other
            assert conventions.alias(one, frozenset({"b"}), kind) is None
            assert conventions.alias("b", frozenset({other}), kind) is None
    assert conventions.alias("lm_head.weight", frozenset({"embed_out.weight"}), "llama") is None


def test_norms_under_their_earlier_names_are_replaced_and_not_written_beside(tmp_path):
    """BERT's first checkpoints call the two parameters of a LayerNorm gamma and beta."""
    case = rider_models.prepare(
        tmp_path, rider_models.bert_classifier(), target_modules=["query"],
        modules_to_save=["LayerNorm"], use_dora=True,
    )  # fmt: skip
    ends = {".LayerNorm.weight": ".LayerNorm.gamma", ".LayerNorm.bias": ".LayerNorm.beta"}

    def earlier(name):
        for new, old in ends.items():
            name = name.replace(new, old)
        return name

    rewrite(case.base, lambda held: {earlier(n): t for n, t in held.items()})
    case.check(tmp_path / "out")
    assert shapes(tmp_path / "out").keys() == shapes(case.base).keys()


def test_a_head_saved_whole_goes_under_the_name_of_the_checkpoint(tmp_path):
    case = prepare(tmp_path, "gpt_neox", True, target_modules=["query_key_value"],
                   modules_to_save=["lm_head"])  # fmt: skip
    assert "embed_out.weight" in shapes(case.base)
    report = check(case, tmp_path / "out")
    assert report.tensors.get("replaced") == 1


def test_rows_of_other_models_are_not_tried(tmp_path):
    """A text adapter on a checkpoint whose model is not known to name its parts so."""
    case = prepare(tmp_path, "qwen2_vl", False, target_modules=["q_proj"])
    rekey(case.adapter, lambda key: key.replace("model.language_model.", "model."))
    check(case, tmp_path / "out")
    edit_json(case.base / "config.json", model_type="model_of_ours", text_config=None)
    with pytest.raises(DoraExportError, match=r"--map-prefix model\.=model\.language_model\."):
        dora_export.merge(case.base, case.adapter, tmp_path / "no")


def test_names_that_two_conventions_explain_alike_are_no_question(tmp_path):
    case = prepare(tmp_path, "qwen2_vl", True, target_modules=["q_proj"])
    assert any(n.startswith("visual.") for n in shapes(case.base))
    assert any(".visual." not in n for n in load_file(case.adapter / "adapter_model.safetensors"))
    report = check(case, tmp_path / "out")
    assert report.names == "'model.language_model.' as 'model.'"
