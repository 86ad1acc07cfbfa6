"""Every kind of adapter fits exactly one format, and inspection tells trainer and axis."""

import re

import pytest
import torch
from safetensors.torch import save_file

from dora_export.adapters import FORMATS, ReadOptions, read_adapter
from tests import (
    lycoris_models,
    pipelines,
    small,
    test_aitoolkit,
    test_lycoris_files,
    test_megatron,
    test_merged_dora,
    test_nvlabs,
    test_small_trainers,
)
from tests.fixtures import MLX, TORCHTUNE
from tests.trainers import inspected

OPTIONS = ReadOptions(allow_pickle=True)


def megatron(folder):
    test_megatron.write(folder)
    return folder / "adapter.safetensors"


def nvlabs(folder):
    test_nvlabs.write(folder)
    return folder / "adapter"


def catid(folder):
    save_file(test_small_trainers.model().state_dict(), folder / "state.safetensors")
    return folder / "state.safetensors"


def qdora(folder):
    test_small_trainers.write_qdora(folder)
    return folder / "adapter.safetensors"


def linear_with_dora_merged(folder):
    state = test_merged_dora.with_dora(test_merged_dora.plain()).state_dict()
    torch.save(state, folder / "state.pt")
    return folder / "state.pt"


def lycoris(case, dora, prefix):
    def make(folder):
        modules = lycoris_models.attach(lycoris_models.net(), case, dora)
        save_file(lycoris_models.state(modules, prefix), folder / "adapter.safetensors")
        return folder / "adapter.safetensors"

    return make


def comfyui(folder):
    _, made = test_lycoris_files.layers("in")
    tensors = test_lycoris_files.named(
        made, "diffusion_model.", False, ".lora_B.weight", ".lora_A.weight"
    )
    save_file(tensors, folder / "adapter.safetensors")
    return folder / "adapter.safetensors"


def ai_toolkit(folder):
    return test_aitoolkit.write(folder, test_aitoolkit.adapter())


def diffusers(folder):
    tensors = {n.replace("base_model.model.", "unet."): t
               for n, t in pipelines.adapter(pipelines.tensors()["unet"]).items()}  # fmt: skip
    save_file(tensors, folder / "pytorch_lora_weights.safetensors")
    return folder


def onetrainers_diffusers(folder):
    tensors = {n.replace("base_model.model.", "transformer."): t
               for n, t in pipelines.adapter(pipelines.tensors()["unet"]).items()}  # fmt: skip
    flat = {n: t for n, t in tensors.items() if n.endswith("magnitude_vector") and t.ndim == 1}
    scales = {n.replace("lora_magnitude_vector", "dora_scale"): t.reshape(-1, 1)
              for n, t in flat.items()}  # fmt: skip
    only = [n.removesuffix(".dora_scale") for n in scales]
    tensors = {n: t for n, t in tensors.items() if n.split(".lora_")[0] in only}
    factors = {n: t for n, t in tensors.items() if not n.endswith("magnitude_vector")}
    save_file(factors | scales, folder / "lora.safetensors")
    return folder / "lora.safetensors"


def peft(folder):
    return small.write_pair(folder)[1]


CASES = {
    "ai-toolkit": (ai_toolkit, "ai-toolkit", {"alpha": 3.0}),
    "diffusers": (diffusers, "diffusers", {}),
    "diffusers, by OneTrainer": (onetrainers_diffusers, "diffusers", {}),
    "peft": (peft, "peft", {}),
    "peft weights": (lambda f: peft(f) / "adapter_model.safetensors", "peft", {}),
    "peft config": (lambda f: peft(f) / "adapter_config.json", "peft", {}),
    "torchtune export": (lambda f: TORCHTUNE / "dora/adapter", "peft", {}),
    "torchtune": (lambda f: TORCHTUNE / "dora/adapter/adapter_model.pt", "torchtune", {}),
    "mlx dora": (lambda f: MLX / "dora/adapter", "mlx", {}),
    "mlx lora": (lambda f: MLX / "lora/adapter", "mlx", {}),
    "mlx experts": (lambda f: MLX / "experts/adapter", "mlx", {}),
    "mlx weights": (lambda f: MLX / "tied/adapter/adapters.safetensors", "mlx", {}),
    "nvlabs": (nvlabs, "nvlabs", {}),
    "megatron": (megatron, "megatron", {"alpha": 7.0}),
    "kohya": (lycoris("locon tucker", None, "lora_unet"), "lycoris", {}),
    "LyCORIS loha": (lycoris("loha", "in", "lycoris"), "lycoris", {}),
    "LyCORIS lokr": (lycoris("lokr", "out", "lora_te1"), "lycoris", {}),
    "ComfyUI": (comfyui, "lycoris", {}),
    "catid": (catid, "catid", {}),
    "qdora": (qdora, "qdora", {}),
    "linear": (linear_with_dora_merged, "linear-with-dora-merged", {"alpha": 4.0}),
}


# What inspection calls the trainer, as far as a file of the format can say.
TRAINERS = {
    "ai-toolkit": "ai-toolkit", "diffusers": "diffusers", "peft": "PEFT", "torchtune": "torchtune",
    "mlx": "mlx-lm", "nvlabs": "NVlabs/DoRA", "megatron": "Megatron-Bridge",
    "lycoris": "LyCORIS|kohya|ComfyUI", "catid": "catid/dora", "qdora": "fsdp_qlora",
    "linear-with-dora-merged": "LinearWithDoRAMerged",
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_exactly_one_format_matches(case, tmp_path):
    make, expected, options = CASES[case]
    path = make(tmp_path)
    assert [f.name for f in FORMATS if f.matches(path, OPTIONS)] == [expected]
    adapter = read_adapter(path, ReadOptions(allow_pickle=True, **options))
    assert adapter.format == expected
    flags = [f"--{name}={value}" for name, value in options.items()]
    shown = inspected(path, "--allow-pickle", *flags)
    assert re.search(rf"format +{expected}\n", shown)
    assert re.search(rf"trainer +.*{TRAINERS[expected]}", shown)
    # Which axis, and how that is known: by a name, a shape, or what the format always has.
    axis = re.search(r"axis +(out|in), by (the format: .+|the name .+|the shape of .+)", shown)
    assert (axis is not None) == (adapter.facts["method"] == "DoRA")
    assert axis is None or f"one per {axis[1]}put" in shown


def test_every_format_of_a_trainer_has_a_case():
    """Formats with fixtures of their own in this module; others bring their own cases."""
    own = {"peft", "torchtune", "mlx", "nvlabs", "megatron", "catid", "qdora", "lycoris"}
    own |= {"diffusers", "ai-toolkit"}
    assert own <= {expected for _, expected, _ in CASES.values()} & {f.name for f in FORMATS}
