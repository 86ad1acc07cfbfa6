"""Small pipelines made by hand, as diffusers lays them out, and adapters on their UNet.

Nothing here comes from the package: files are written by the safetensors library, and ``expected``
is the float64 oracle.
"""

import torch
from safetensors.torch import load_file, save_file

from tests import oracle
from tests.small import ALPHA, PREFIX, RANK, entries, write_adapter, write_json

# Name -> (out, in, *kernel); all of them adapted, two of them square.
LAYERS = {
    "down_blocks.0.attentions.0.to_q": (16, 16),
    "down_blocks.0.attentions.0.to_k": (16, 24),
    "mid_block.proj": (24, 16),
    "mid_block.conv": (16, 16, 3, 3),
}
INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": "0.42.1",
    "feature_extractor": [None, None],
    "requires_safety_checker": False,
    "scheduler": ["diffusers", "EulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
CONFIGS = {
    "unet": {"_class_name": "UNet2DConditionModel", "_diffusers_version": "0.42.1",
             "sample_size": 8, "cross_attention_dim": 24},
    "vae": {"_class_name": "AutoencoderKL", "_diffusers_version": "0.42.1", "scaling_factor": 0.18},
    "text_encoder": {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model",
                     "hidden_size": 12, "vocab_size": 30, "torch_dtype": "float16"},
}  # fmt: skip
STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model",
         "text_encoder": "model"}  # fmt: skip


def tensors(dtype=torch.float16, seed=0):
    """Weights of the three models."""
    make = torch.Generator().manual_seed(seed)

    def random(*shape):
        return (torch.randn(shape, generator=make) * 0.2).to(dtype)

    unet = {f"{name}.weight": random(*shape) for name, shape in LAYERS.items()}
    unet |= {f"{name}.bias": random(shape[0]) for name, shape in LAYERS.items()}
    return {
        "unet": unet | {"conv_in.weight": random(16, 4, 3, 3)},
        "vae": {"encoder.conv_in.weight": random(8, 3, 3, 3), "conv_in.weight": random(4, 4)},
        "text_encoder": {
            "text_model.embeddings.token_embedding.weight": random(30, 12),
            "text_model.embeddings.position_ids": torch.arange(7).reshape(1, 7),
            "text_model.encoder.layers.0.mlp.fc1.weight": random(20, 12),
        },
    }


def write(folder, dtype=torch.float16, variant=None):
    """A pipeline with every kind of part, and what repositories hold beside it."""
    parts = tensors(dtype)
    for part, own in parts.items():
        (folder / part).mkdir(parents=True)
        write_weights(folder, part, own, variant)
        write_json(folder / part / "config.json", CONFIGS[part])
    for name, content in (
        ("scheduler/scheduler_config.json", {"_class_name": "EulerDiscreteScheduler",
                                             "_diffusers_version": "0.42.1", "beta_end": 0.012}),
        ("tokenizer/tokenizer_config.json", {"model_max_length": 77, "bos_token": "<s>"}),
        ("tokenizer/vocab.json", {"<s>": 0, "a": 1}),
        ("model_index.json", INDEX),
    ):  # fmt: skip
        (folder / name).parent.mkdir(exist_ok=True)
        write_json(folder / name, content)
    (folder / "tokenizer/merges.txt").write_text("#version: 0.2\n")
    (folder / "README.md").write_text("---\nlicense: openrail\n---\n")
    return folder


def write_weights(folder, part, own, variant=None):
    """The weight file of a model, under the name that diffusers gives a variant."""
    ending = f".{variant}" if variant else ""
    path = folder / part / f"{STEMS[part]}{ending}.safetensors"
    save_file(own, path, {"format": "pt"})
    return path


def write_shards(folder, part):
    """Put shards with an index in the place of a model's weight file."""
    whole = folder / part / f"{STEMS[part]}.safetensors"
    own, places = load_file(whole), {}
    whole.unlink()
    for i, names in enumerate((list(own)[::2], list(own)[1::2]), 1):
        file = f"{STEMS[part]}-{i:05}-of-00002.safetensors"
        save_file({n: own[n] for n in names}, folder / part / file, {"format": "pt"})
        places |= dict.fromkeys(names, file)
    size = sum(t.nbytes for t in own.values())
    index = {"metadata": {"total_size": size}, "weight_map": places}
    write_json(folder / part / f"{STEMS[part]}.safetensors.index.json", index)


def adapter(unet, seed=1):
    """A trained DoRA on all layers of the UNet, as PEFT names it: the module path in the UNet."""
    make = torch.Generator().manual_seed(seed)
    found = {}
    for name, (out, *inner) in LAYERS.items():
        W = unet[f"{name}.weight"].float().flatten(1)
        m = W.norm(dim=1) * (0.6 + 0.8 * torch.rand(out, generator=make))
        ones = [1] * (len(inner) - 1)
        key = PREFIX + name
        found[f"{key}.lora_A.weight"] = torch.randn(RANK, *inner, generator=make) * 0.3
        found[f"{key}.lora_B.weight"] = torch.randn(out, RANK, *ones, generator=make) * 0.2
        found[f"{key}.lora_magnitude_vector"] = m.reshape(1, out, *ones) if ones else m
    return found


def write_pair(folder, **options):
    """A pipeline and an adapter on its UNet."""
    base = write(folder / "base", **options)
    own = adapter(tensors()["unet"])
    return base, write_adapter(folder / "adapter", own, target_modules=["to_q", "to_k"])


def expected(unet, own):
    """The UNet's merged layers by the oracle, in float64: name -> array."""
    merged = {}
    for name, shape in LAYERS.items():
        W, A, B, m = (
            oracle.float64(t).reshape(t.shape[0], -1)
            for t in (unet[f"{name}.weight"], *(own[f"{PREFIX}{name}.{p}"] for p in PARTS))
        )
        exact = oracle.dora(W, A, B, m.ravel(), ALPHA / RANK)
        merged[f"{name}.weight"] = exact.reshape(shape)
    return merged


SIDE_FILES = ("model_index.json", "scheduler/scheduler_config.json", "text_encoder/config.json",
              "tokenizer/merges.txt", "tokenizer/tokenizer_config.json", "tokenizer/vocab.json",
              "unet/config.json", "vae/config.json")  # fmt: skip
PARTS = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")


def check_merged(folder, base):
    """Assert that a pipeline holds the base's bytes but for the UNet's merged layers."""
    parts = tensors()
    exact = expected(parts["unet"], adapter(parts["unet"]))
    for part, own in parts.items():
        written = {}
        for file in sorted((folder / part).glob("*.safetensors")):
            written |= load_file(file)
        assert written.keys() == own.keys()
        for name, tensor in written.items():
            if part == "unet" and name in exact:
                assert tensor.dtype == own[name].dtype
                assert oracle.ulps(tensor, exact[name]) <= 1, name
            else:
                assert torch.equal(tensor, own[name]), name
    for name in SIDE_FILES:
        assert entries(folder)[name] == entries(base)[name], name
