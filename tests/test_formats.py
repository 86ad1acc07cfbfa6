"""Every kind of adapter fits exactly one format, and inspection tells trainer and axis."""

import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from dora_export.adapters import FORMATS, TAKEN_BY, ReadOptions, read_adapter, read_adapters
from dora_export.errors import AdapterError, InputError
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
    test_torchtune,
)
from tests.fixtures import CONVERTED, MLX, TORCHTUNE
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


def by_simpletuner(layout):
    """A UNet's adapter as SimpleTuner names it, with the entries it adds."""

    def make(folder):
        own = {n.removeprefix("base_model.model."): t
               for n, t in pipelines.adapter(pipelines.tensors()["unet"]).items()}  # fmt: skip
        modules = {n.partition(".lora_")[0] for n in own}
        tensors = {f"unet.{n}": t for n, t in own.items()}
        if layout == "ComfyUI":
            tensors = {f"diffusion_model.{n}": t for n, t in own.items()}
            tensors |= {f"diffusion_model.{m}.alpha": torch.tensor(2.0) for m in modules}
        if layout == "LyCORIS":
            modules = lycoris_models.attach(lycoris_models.net(), "lokr", "out")
            tensors = lycoris_models.state(modules, "lycoris")
        said = (
            {"lycoris_config": '{"algo": "lokr", "dora_wd": true}'} if layout == "LyCORIS" else {}
        )
        added = {"global_step": "9", "modelspec.implementation": "diffusers"}
        save_file(tensors, folder / "pytorch_lora_weights.safetensors", said | added)
        return folder

    return make


def of_peft(method, **settings):
    """An adapter of one of PEFT's methods, trained on linear layers, by PEFT itself."""

    def make(folder):
        import peft

        model = torch.nn.ModuleDict({"a": torch.nn.Linear(6, 8), "b": torch.nn.Linear(8, 8)})
        config = getattr(peft, f"{method}Config")(target_modules=["a", "b"], **settings)
        wrapped = peft.get_peft_model(model, config)
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad and "magnitude" not in name:
                parameter.data.normal_(0, 0.3)
        wrapped.save_pretrained(folder / "adapter")
        return folder / "adapter"

    return make


def bare_peft(folder):
    (peft(folder) / "adapter_config.json").unlink()
    return folder / "adapter"


def divided(folder):
    test_nvlabs.peft_divided(folder)
    return folder / "adapter"


def llama4(folder):
    test_torchtune.llama4(folder, dora=True)
    return folder / "adapter/adapter_model.pt"


def by_onetrainer(folder):
    base, made = test_lycoris_files.layers("in")
    return test_lycoris_files.write(
        folder, base, test_lycoris_files.named(made, "lora_transformer_"), {"ot_revision": "1"}
    )[1]


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
    "SimpleTuner": (by_simpletuner("standard"), "diffusers", {}),
    "SimpleTuner, for ComfyUI": (by_simpletuner("ComfyUI"), "diffusers", {}),
    "SimpleTuner, LyCORIS": (by_simpletuner("LyCORIS"), "lycoris", {}),
    "OneTrainer": (by_onetrainer, "lycoris", {}),
    "torchtune, Llama 4": (llama4, "torchtune", {}),
    "peft without its config": (bare_peft, "peft", {"alpha": 4.0}),
    "TensorRT-LLM": (divided, "peft", {}),
    "peft, rslora and patterns": (
        of_peft("Lora", use_dora=True, use_rslora=True, rank_pattern={"b": 3}), "peft", {}),
    "peft, AdaLoRA": (of_peft("AdaLora", total_step=9), "peft", {}),
    "peft, LoHa": (of_peft("LoHa"), "peft", {}),
    "peft, LoKr": (of_peft("LoKr"), "peft", {}),
    "peft, OFT": (of_peft("OFT", oft_block_size=2, r=0), "peft", {}),
    "peft, VeRA": (of_peft("Vera", r=2), "peft", {}),
}  # fmt: skip


# What inspection calls the trainer, as far as a file of the format can say.
TRAINERS = {
    "ai-toolkit": "ai-toolkit", "diffusers": "diffusers", "peft": "PEFT", "torchtune": "torchtune",
    "mlx": "mlx-lm", "nvlabs": "NVlabs/DoRA", "megatron": "Megatron-Bridge",
    "lycoris": "LyCORIS|kohya|ComfyUI", "catid": "catid/dora", "qdora": "fsdp_qlora",
    "linear-with-dora-merged": "LinearWithDoRAMerged",
}  # fmt: skip
# More of it, where a file says more.
SAID = {
    "SimpleTuner": "SimpleTuner", "SimpleTuner, for ComfyUI": "SimpleTuner",
    "SimpleTuner, LyCORIS": "SimpleTuner, LyCORIS", "OneTrainer": "OneTrainer",
    "torchtune export": "torchtune, exported to PEFT",
    "peft without its config": "PEFT; its adapter_config.json is missing",
    "peft, LoHa": "PEFT; merged by this tool's formula",
    "peft, OFT": "PEFT; merged through PEFT's own layers",
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
    assert re.search(rf"trainer +.*{SAID.get(case, TRAINERS[expected])}", shown)
    # Which axis, and how that is known: by a name, a shape, or what the format always has.
    axis = re.search(r"axis +(out|in), by (the format: .+|the name .+|the shape of .+)", shown)
    assert (axis is not None) == (adapter.facts["method"] == "DoRA")
    assert axis is None or f"one per {axis[1]}put" in shown
    assert not re.search(r"layers .*(^| )\.", shown)  # of a number alone, nothing is in front


def recorded():
    """Adapters that trainers' own code has left in the repository."""
    names = ("adapter_model.safetensors", "adapters.safetensors", "adapter_model.pt")
    files = [p for of in (MLX, TORCHTUNE, CONVERTED) for n in names for p in of.rglob(n)]
    return sorted(p if p.suffix == ".pt" else p.parent for p in files)


@pytest.mark.parametrize("path", recorded(), ids=lambda p: "/".join(p.parts[-3:]))
def test_recorded_adapters_are_told_with_trainer_and_axis(path):
    shown = inspected(path, "--allow-pickle")
    found = re.search(r"format +(\S+)\n", shown)
    assert re.search(rf"trainer +.*({TRAINERS[found[1]]}|{SAID['torchtune export']})", shown)
    assert re.search(r"axis +out, by the format: .+", shown) or "axis" not in shown
    (file,) = (path,) if path.is_file() else path.glob("*.safetensors")
    stored = torch.load(file) if file.suffix == ".pt" else load_file(file)
    dora = any(n.endswith((".m", ".magnitude", ".lora_magnitude_vector")) for n in stored)
    assert dora == bool(re.search(r"method +DoRA", shown)) == ("axis" in shown) == (
        "one per " in shown)  # fmt: skip


def test_every_format_has_a_case():
    assert {expected for _, expected, _ in CASES.values()} == {f.name for f in FORMATS}


@pytest.mark.parametrize(
    "case", ["peft", "peft, LoHa", "peft without its config", "mlx dora", "nvlabs", "diffusers",
             "kohya", "torchtune"])  # fmt: skip
def test_files_behind_a_link_out_of_their_folder_are_refused(case, tmp_path):
    make, _, options = CASES[case]
    (tmp_path / "made").mkdir()
    path = make(tmp_path / "made")
    folder = shutil.copytree(path if path.is_dir() else path.parent, tmp_path / "copy")
    if case == "torchtune":  # alone, and so without PEFT's export that lies beside
        options = {"alpha": 4.0}
        (folder / "adapter_config.json").unlink()
        (folder / "adapter_model.safetensors").unlink(missing_ok=True)
        (folder / "adapter_model.bin").unlink(missing_ok=True)
        (folder / "adapter_model.pt").rename(folder / "adapter_0.pt")
    said = ReadOptions(allow_pickle=True, **options)
    assert read_adapter(folder, said).updates
    (weights,) = folder.glob("*.pt" if case == "torchtune" else "*.safetensors")
    for file in (weights, *folder.glob("adapter_config.json")):
        outside = file.rename(tmp_path / f"outside{file.suffix}")
        file.symlink_to(outside)
        with pytest.raises(InputError, match="a link that leads out of its folder"):
            read_adapter(folder, said)
        file.unlink()
        outside.rename(file)


def test_file_that_fits_two_formats_stops_with_both_and_the_option_that_decides(tmp_path):
    """A model with layers of two classes; the reader that is named says what it makes of them."""
    state = {f"first.{n}": t for n, t in test_small_trainers.model().state_dict().items()}
    other = test_merged_dora.with_dora(test_merged_dora.plain()).state_dict()
    save_file(state | {f"second.{n}": t for n, t in other.items()}, tmp_path / "both.safetensors")
    result = small.run("inspect", tmp_path / "both.safetensors")
    assert result.exit_code == 2
    assert "fits ['catid', 'linear-with-dora-merged']" in result.stderr
    assert "pass --adapter-format, one of:" in result.stderr
    shown = inspected(
        tmp_path / "both.safetensors", "--adapter-format", "linear-with-dora-merged", "--alpha", "4"
    )
    assert "format       linear-with-dora-merged" in shown
    result = small.run("inspect", tmp_path / "both.safetensors", "--adapter-format", "catid")
    assert result.exit_code == 2
    assert "second.1: lora_A, lora_B, weight missing" in result.stderr


def loaded(case, folder, **said):
    make, _, options = CASES[case]
    return read_adapter(make(folder), ReadOptions(allow_pickle=True, **{**options, **said}))


SAYS = {**dict.fromkeys(TAKEN_BY, True), "moe_b_layout": "peft", "trained_in": "bf16"}


@pytest.mark.parametrize("option", TAKEN_BY)
@pytest.mark.parametrize("case", ["mlx dora", "nvlabs", "megatron", "qdora", "peft, LoHa"])
def test_what_a_format_does_not_leave_open_is_refused_where_it_is_said(case, option, tmp_path):
    if CASES[case][1] in TAKEN_BY[option] and case != "peft, LoHa":
        assert loaded(case, tmp_path, **{option: SAYS[option]}).updates
        return
    flag = f"--{option.replace('_', '-')}"
    with pytest.raises(AdapterError, match=f"{flag} is about .*Leave {flag} out"):
        loaded(case, tmp_path, **{option: SAYS[option]})
    if SAYS[option] is True and "residual" not in option and "recompute" not in option:
        assert loaded(case, tmp_path / "no", **{option: False}).updates  # so it is


def test_an_option_for_one_of_several_adapters_is_taken(tmp_path):
    paths = [CASES[c][0](tmp_path) for c in ("mlx dora", "nvlabs")]
    found = read_adapters(paths, ReadOptions(magnitude_is_normalised=True))
    assert [a.updates[0].magnitude_is_factor for a in found] == [False, True]
    with pytest.raises(AdapterError, match=r"--trained-in is about .* of lycoris, this is mlx, nv"):
        read_adapters(paths, ReadOptions(trained_in="bf16"))


@pytest.mark.parametrize("make", [peft, nvlabs])
def test_magnitudes_said_to_be_divided_are_shown_as_such(make, tmp_path):
    shown = inspected(make(tmp_path), "--magnitude-is-normalised")
    assert "magnitude one per output, divided by its norm already" in shown


def test_adapters_of_a_kind_are_told_where_they_are_none(tmp_path):
    torch.save({"model": {"lora_A": torch.ones(2)}}, tmp_path / "lit_model.pth.lora")
    for path in (tmp_path, tmp_path / "lit_model.pth.lora"):
        with pytest.raises(AdapterError, match=r"no known format. LitGPT fuses .* litgpt merge"):
            read_adapter(path, OPTIONS)
    small.write_pair(tmp_path / "run")
    (tmp_path / "run/adapter").rename(tmp_path / "run/style")
    with pytest.raises(AdapterError, match=r"no known format. It holds .*, name one: style"):
        read_adapter(tmp_path / "run", OPTIONS)
