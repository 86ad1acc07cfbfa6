"""Tiny mixtures of experts of transformers, with LoRA on their stacked parameters trained in PEFT.

The reference is written here from the definition: A is expert-major, B rank-major, and the update
of a slice is B A (or its transpose) in float64. transformers itself puts the result into the names
and layouts of a checkpoint.
"""

from dataclasses import dataclass
from pathlib import Path

import peft
import torch
import transformers
from peft.tuners.lora.layer import Linear, ParamWrapper
from safetensors.torch import load_file, save_file

from tests import oracle
from tests.rider_models import VOCABULARY, train

EXPERTS = 4
# Not square, and gate_up neither: 2 * 20 is not 32. (gpt_oss's own are: hidden == intermediate.)
HIDDEN, INNER = 32, 20
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
    "num_experts_per_tok": 2,
}
PARTS = ("gate_proj", "up_proj", "down_proj")
BOTH = ["experts.gate_up_proj", "experts.down_proj"]


def mixtral(inner=INNER, experts=EXPERTS, **options):
    return transformers.MixtralForCausalLM(
        transformers.MixtralConfig(
            **{**COMMON, "intermediate_size": inner, "num_local_experts": experts, **options}
        )
    )


def qwen3_moe(inner=INNER, experts=EXPERTS, **options):
    return transformers.Qwen3MoeForCausalLM(
        transformers.Qwen3MoeConfig(
            **{**COMMON, "intermediate_size": 48, "moe_intermediate_size": inner,
               "num_experts": experts, "decoder_sparse_step": 1, "mlp_only_layers": [], **options}
        )
    )  # fmt: skip


def qwen2_moe(inner=INNER, experts=EXPERTS, **options):
    return transformers.Qwen2MoeForCausalLM(
        transformers.Qwen2MoeConfig(
            **{**COMMON, "intermediate_size": 48, "moe_intermediate_size": inner,
               "shared_expert_intermediate_size": 24, "num_experts": experts, **options}
        )
    )  # fmt: skip


def gpt_oss(inner=INNER, experts=EXPERTS, **options):
    return transformers.GptOssForCausalLM(
        transformers.GptOssConfig(
            **{**COMMON, "intermediate_size": inner, "num_local_experts": experts,
               "sliding_window": 16, "rope_parameters": {"rope_type": "default",
               "rope_theta": 10000.0}, **options}
        )
    )  # fmt: skip


def llama4(inner=INNER, experts=EXPERTS, **options):
    return transformers.Llama4ForCausalLM(
        transformers.Llama4TextConfig(
            **{**COMMON, "intermediate_size": inner, "intermediate_size_mlp": 40,
               "num_local_experts": experts, "interleave_moe_layer_step": 1, **options}
        )
    )  # fmt: skip


def deepseek_v3(inner=INNER, experts=EXPERTS, **options):
    return transformers.DeepseekV3ForCausalLM(
        transformers.DeepseekV3Config(
            **{**COMMON, "intermediate_size": 48, "moe_intermediate_size": inner,
               "n_routed_experts": experts, "n_shared_experts": 1, "first_k_dense_replace": 1,
               "q_lora_rank": 12, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8,
               "v_head_dim": 8, "n_group": 2, "topk_group": 1, "num_key_value_heads": 4,
               "head_dim": 4, **options}
        )
    )  # fmt: skip


def granitemoe(inner=INNER, experts=EXPERTS, **options):
    return transformers.GraniteMoeForCausalLM(
        transformers.GraniteMoeConfig(
            **{**COMMON, "intermediate_size": inner, "num_local_experts": experts, **options}
        )
    )


def qwen3_vl_moe(inner=INNER, experts=EXPERTS, **options):
    text = {**COMMON, "intermediate_size": 48, "moe_intermediate_size": inner,
            "num_experts": experts, "decoder_sparse_step": 1, "mlp_only_layers": [],
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0,
                                "mrope_section": [2, 1, 1]}, **options}  # fmt: skip
    vision = {"hidden_size": 16, "out_hidden_size": HIDDEN, "intermediate_size": 24, "depth": 1,
              "num_heads": 2, "patch_size": 4, "deepstack_visual_indexes": [],
              "num_position_embeddings": 16}  # fmt: skip
    return transformers.Qwen3VLMoeForConditionalGeneration(
        transformers.Qwen3VLMoeConfig(
            text_config=text, vision_config=vision, image_token_id=90, video_token_id=91,
            vision_start_token_id=92, vision_end_token_id=93, tie_word_embeddings=False,
        )
    )  # fmt: skip


MODELS = {
    "mixtral": mixtral,
    "qwen2_moe": qwen2_moe,
    "qwen3_moe": qwen3_moe,
    "qwen3_vl_moe": qwen3_vl_moe,
    "deepseek_v3": deepseek_v3,
    "granitemoe": granitemoe,
    "gpt_oss": gpt_oss,
    "llama4": llama4,
}
TOKENS = torch.randint(3, 80, (2, 11), generator=torch.Generator().manual_seed(5))


@dataclass
class Case:
    """A base and an adapter on disk, PEFT's model of the two, and the right merge by definition."""

    base: Path
    adapter: Path
    wrapped: peft.PeftModel
    exact: dict
    model_class: type

    def expected(self):
        """The unmerged model's logits."""
        return logits(self.wrapped)

    def of_base(self):
        """The base's logits."""
        return logits(self.model_class.from_pretrained(self.base))

    def merged(self, folder):
        """A merged folder's logits, as transformers loads it."""
        return logits(self.model_class.from_pretrained(folder))


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS, use_cache=False).logits.double()


SIZES = ("inner", "experts", "num_experts_per_tok")


def prepare(folder, kind, dtype=torch.float32, *, original=True, seed=0, **options):
    """Save a model as base, train LoRA on its parameters in PEFT, and save that.

    Args:
        folder: Where "base" and "adapter" are made.
        kind: One of ``MODELS``.
        dtype: Storage type of the base.
        original: Save under the names that checkpoints had before transformers 5.
        seed: Of all values.
        **options: Sizes of the model, and LoraConfig's.
    """
    torch.manual_seed(seed)
    model = MODELS[kind](**{k: options.pop(k) for k in SIZES if k in options})
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 or "bias" in name:
            parameter.data.normal_(0, 0.2)
    model = model.to(dtype).eval()
    model.save_pretrained(folder / "base", save_original_format=original)
    settings = {"r": 3, "lora_alpha": 5, "target_modules": [], "target_parameters": BOTH, **options}
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**settings)).eval()
    train(wrapped, seed)
    wrapped.save_pretrained(folder / "adapter")
    saved_whole = "modules_to_save" in options
    found = {} if saved_whole else exact(folder / "exact", wrapped, original)
    return Case(folder / "base", folder / "adapter", wrapped, found, type(model))


def delta(wrapper, *, b_layout="peft", turn=False):
    """s B A of every expert by definition, in float64, as the class holds its parameter."""
    a, b = (oracle.float64(m["default"].weight) for m in (wrapper.lora_A, wrapper.lora_B))
    experts, rank = wrapper.num_experts, wrapper.r["default"]
    a = a.reshape(experts, rank, -1)
    b = b.reshape(-1, rank, experts) if b_layout == "peft" else (
        b.reshape(-1, experts, rank).transpose(0, 2, 1))  # fmt: skip
    transposed = getattr(wrapper.get_base_layer(), "is_transposed", False) and experts > 1
    products = [b[:, :, e] @ a[e] for e in range(experts)]
    if transposed != turn:
        products = [p.T for p in products]
    scaling = wrapper.scaling["default"]
    shape = tuple(wrapper.get_param().shape)
    return torch.tensor(scaling * oracle.np.stack(products)).reshape(shape)


def exact(folder, wrapped, original=True, **how):
    """Every tensor of the right merge in float64, under a checkpoint's names."""
    inner = wrapped.get_base_model()
    parameters = {}
    for path, module in wrapped.base_model.model.named_modules():
        if isinstance(module, ParamWrapper):
            name = f"{path.replace('.base_layer', '')}.{module.parameter_name}"
            parameters[name] = module.get_param().data.double() + delta(module, **how)
        elif isinstance(module, Linear):
            a, b = (m["default"].weight.double() for m in (module.lora_A, module.lora_B))
            W = module.get_base_layer().weight.double()
            parameters[f"{path}.weight"] = W + module.scaling["default"] * (b @ a)
    twin = type(inner)(inner.config).double()
    state = {
        n.replace(".base_layer", ""): t.double() if t.is_floating_point() else t
        for n, t in inner.state_dict().items()
        if ".lora_" not in n
    }
    twin.load_state_dict(state | {n: p.detach() for n, p in parameters.items()})
    twin.save_pretrained(folder, save_original_format=original)
    return tensors(folder)


def tensors(folder):
    """All tensors of a folder."""
    return {
        k: v for f in sorted(Path(folder).glob("*.safetensors")) for k, v in load_file(f).items()
    }


def worst(folder, expected):
    """The largest distance of a merged folder's tensors from the exact ones, in ulps."""
    found = tensors(folder)
    assert found.keys() == expected.keys()
    return max(oracle.ulps(found[n], oracle.float64(expected[n])) for n in found
               if found[n].is_floating_point())  # fmt: skip


def relative(found, exact):
    """The largest difference, relative to the largest exact value."""
    return float((found - exact).abs().max() / exact.abs().max())


def swap_nesting(adapter):
    """Store the factors of two nested parameters as if the other had been wrapped first."""
    path = adapter / "adapter_model.safetensors"
    held = {}
    for name, tensor in load_file(path).items():
        inner = ".experts.base_layer."
        held[name.replace(inner, ".experts.") if inner in name else
             name.replace(".experts.", inner)] = tensor  # fmt: skip
    save_file(held, path)


def as_old_peft(case, original):
    """Give an adapter the factors of PEFT before 0.19, and return the right merge of them.

    There A ran over the first of a slice's dimensions and B over the second.
    """
    generator = torch.Generator().manual_seed(9)
    path = case.adapter / "adapter_model.safetensors"
    held, before = {}, load_file(path)
    for name in before:
        other = name.replace("lora_A", "lora_B") if "lora_A" in name else name.replace("_B", "_A")
        shape = before[other].shape[::-1]
        held[name] = torch.randn(shape, generator=generator) * 0.15
    save_file(held, path)
    config = case.adapter / "adapter_config.json"
    config.write_text(config.read_text().replace(peft.__version__, "0.18.1"))
    for path_, module in case.wrapped.base_model.model.named_modules():
        if isinstance(module, ParamWrapper):
            for part in ("lora_A", "lora_B"):
                getattr(module, part)["default"].weight.data = held[
                    f"base_model.model.{path_}.{part}.weight"
                ]
    return exact(case.adapter.parent / "old", case.wrapped, original, turn=True)
