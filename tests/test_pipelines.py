"""Pipelines of several models: read as one checkpoint, written in the same layout, verified."""

import json
import os
import shutil

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import dora_export
from dora_export.checkpoints import locate, open_checkpoint
from dora_export.errors import InputError
from tests import pipelines, small
from tests.pipelines import check_merged, write_pair
from tests.small import entries, run

UNET = "unet/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
FILES = {
    "README.md", "dora_export.json", "model_index.json", "scheduler/scheduler_config.json",
    "text_encoder/config.json", "text_encoder/model.safetensors", "tokenizer/merges.txt",
    "tokenizer/tokenizer_config.json", "tokenizer/vocab.json", UNET, "unet/config.json", VAE,
    "vae/config.json",
}  # fmt: skip


def merged(base, adapter, out, *options):
    result = run("merge", base, adapter, "-o", out, "--verify", "full", *options)
    assert result.exit_code == 0, result.stdout + result.stderr
    return out


def files(folder):
    return {name for name, digest in entries(folder).items() if digest is not None}


def refusal(*args):
    result = run(*args)
    assert result.exit_code == 2, result.stdout + result.stderr
    return " ".join(result.stderr.split())


def test_pipeline_is_merged_whole_into_its_own_layout(tmp_path):
    base, adapter = write_pair(tmp_path)
    # What repositories hold beside a pipeline and what is no part of it.
    for clutter in ("vae_1_0/model.safetensors", "sd.safetensors", "unet/model.onnx_data",
                    "unet/openvino_model.bin", "unet/flax_model.msgpack"):  # fmt: skip
        (base / clutter).parent.mkdir(exist_ok=True)
        (base / clutter).write_bytes(b"x")
    small.write_json(base / "vae_1_0/config.json", {})
    out = merged(base, adapter, tmp_path / "out")
    assert files(out) == FILES
    check_merged(out, base)
    assert entries(out)[VAE] == entries(base)[VAE]
    with safe_open(out / UNET, "pt") as file:
        assert "mid_block.conv.weight" in file.keys()  # noqa: SIM118 - not a dictionary
    manifest = json.loads((out / "dora_export.json").read_text())
    assert {f["name"] for f in manifest["base"]["files"]} == {
        UNET, VAE, "text_encoder/model.safetensors"
    }  # fmt: skip


def test_shards_stay_shards_with_an_index_for_each_model(tmp_path):
    base, adapter = write_pair(tmp_path)
    pipelines.write_shards(base, "unet")
    pipelines.write_shards(base, "text_encoder")
    out = merged(base, adapter, tmp_path / "out")
    check_merged(out, base)
    for part, stem in (("unet", "diffusion_pytorch_model"), ("text_encoder", "model")):
        index = json.loads((out / part / f"{stem}.safetensors.index.json").read_text())
        assert index == json.loads((base / part / f"{stem}.safetensors.index.json").read_text())
    assert run("verify", base, adapter, out).exit_code == 0


def test_each_model_is_cut_into_shards_of_its_own(tmp_path):
    base, adapter = write_pair(tmp_path)
    out = merged(base, adapter, tmp_path / "out", "--max-shard-size", "2kB")
    check_merged(out, base)
    own = sorted(n for n in files(out) if n.startswith("unet/"))
    assert own[1] == "unet/diffusion_pytorch_model-00001-of-00004.safetensors"
    assert own[-1] == "unet/diffusion_pytorch_model.safetensors.index.json"
    assert VAE in files(out)
    assert run("verify", base, adapter, out).exit_code == 0


def test_component_folder_keeps_its_file_name(tmp_path):
    base, adapter = write_pair(tmp_path)
    out = merged(base / "unet", adapter, tmp_path / "out")
    assert files(out) == {"README.md", "config.json", "diffusion_pytorch_model.safetensors",
                          "dora_export.json"}  # fmt: skip
    exact = pipelines.expected(load_file(base / UNET), pipelines.adapter(load_file(base / UNET)))
    written = load_file(out / "diffusion_pytorch_model.safetensors")
    assert all(small.oracle.ulps(written[name], exact[name]) <= 1 for name in exact)
    cut = merged(base / "unet", adapter, tmp_path / "cut", "--max-shard-size", "4kB")
    assert "diffusion_pytorch_model-00001-of-00003.safetensors" in files(cut)
    assert "diffusion_pytorch_model.safetensors.index.json" in files(cut)


def test_only_variant_is_taken_and_keeps_its_name(tmp_path):
    base, adapter = write_pair(tmp_path, variant="fp16")
    out = merged(base, adapter, tmp_path / "out")
    assert "unet/diffusion_pytorch_model.fp16.safetensors" in files(out)
    check_merged(out, base)
    assert run("verify", base, adapter, out).exit_code == 0
    cut = merged(base, adapter, tmp_path / "cut", "--max-shard-size", "4kB")
    stem = "unet/diffusion_pytorch_model"
    assert f"{stem}.safetensors.index.fp16.json" in files(cut)
    assert f"{stem}.fp16-00001-of-00003.safetensors" in files(cut)
    assert run("verify", base, adapter, cut).exit_code == 0


def test_weights_without_variant_win_where_they_are_whole(tmp_path):
    base, adapter = write_pair(tmp_path)
    for variant in ("fp16", "non_ema"):
        pipelines.write_weights(base, "unet", pipelines.tensors(seed=9)["unet"], variant)
    result = run("merge", base, adapter, "-o", tmp_path / "out")
    assert "those of 'fp16', 'non_ema' are left out" in result.stdout
    assert files(tmp_path / "out") == FILES
    check_merged(tmp_path / "out", base)


def test_variant_completed_by_weights_without_one_is_taken(tmp_path):
    base = pipelines.write(tmp_path / "base", variant="fp16")
    (base / "vae/diffusion_pytorch_model.fp16.safetensors").rename(base / VAE)
    checkpoint = open_checkpoint(base)
    assert sorted(f.name for f in checkpoint.files)[1] == (
        "unet/diffusion_pytorch_model.fp16.safetensors"
    )
    assert VAE in [f.name for f in checkpoint.files]


def test_two_whole_variants_are_not_chosen_between(tmp_path):
    base, adapter = write_pair(tmp_path, variant="fp16")
    for part, own in pipelines.tensors().items():
        pipelines.write_weights(base, part, own, "bf16")
    said = refusal("merge", base, adapter, "-o", tmp_path / "out")
    assert "the variants bf16 and fp16 are both whole" in said
    assert "Pass --variant bf16, or another of them" in said
    out = merged(base, adapter, tmp_path / "out", "--variant", "fp16")
    assert {f for f in files(out) if f.endswith("safetensors")} == {
        f"{part}/{stem}.fp16.safetensors" for part, stem in pipelines.STEMS.items()
    }
    check_merged(out, base)
    assert run("verify", base, adapter, out, "--variant", "fp16").exit_code == 0


def test_variant_asked_for_comes_before_weights_without_one(tmp_path):
    base, adapter = write_pair(tmp_path)
    half = {n: t.to(torch.bfloat16) for n, t in pipelines.tensors(seed=9)["unet"].items()}
    pipelines.write_weights(base, "unet", half, "bf16")
    report = dora_export.merge(base, adapter, tmp_path / "out", variant="bf16", verify="full")
    name = "unet/diffusion_pytorch_model.bf16.safetensors"
    assert {f for f in files(tmp_path / "out") if f.endswith("safetensors")} == {
        name, VAE, "text_encoder/model.safetensors"}  # fmt: skip
    exact = pipelines.expected(half, pipelines.adapter(pipelines.tensors()["unet"]))
    written = load_file(tmp_path / "out" / name)
    assert all(small.oracle.ulps(written[n], W) <= 1 for n, W in exact.items())
    assert "the weights of variant 'bf16' are merged" in " ".join(report.notes)
    whole = load_file(base / UNET)
    alone = dora_export.merge(base / "unet", adapter, tmp_path / "one", variant="bf16")
    assert "the weights of variant 'bf16' are merged" in " ".join(alone.notes)
    assert load_file(tmp_path / "one" / name.partition("/")[2]).keys() == whole.keys()


def test_variant_that_is_not_there_is_refused(tmp_path):
    base, adapter = write_pair(tmp_path, variant="fp16")
    for path in (base, base / "unet"):
        said = refusal("merge", path, adapter, "-o", tmp_path / "out", "--variant", "bf16")
        assert "no variant 'bf16' of the weights is whole" in said
        assert "unet: fp16" in said
        assert "Pass another --variant, or none" in said
    file = base / "unet/diffusion_pytorch_model.fp16.safetensors"
    said = refusal("merge", file, adapter, "-o", tmp_path / "out", "--variant", "fp16")
    assert "is one file, which has no variants. Leave --variant out" in said


@pytest.mark.parametrize("variant", ["other", None])
def test_forward_tier_runs_the_variant_that_was_merged(tmp_path, variant):
    config = LlamaConfig(
        hidden_size=8, intermediate_size=12, num_hidden_layers=1, vocab_size=16,
        num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=False,
    )  # fmt: skip
    base, adapter, out = (tmp_path / n for n in ("base", "adapter", "out"))
    for seed, kind in enumerate((None, "other")):
        torch.manual_seed(seed)
        LlamaForCausalLM(config).save_pretrained(base, variant=kind)
    key = f"{small.PREFIX}model.layers.0.mlp.up_proj.lora_"
    factors = {f"{key}A.weight": torch.randn(3, 8), f"{key}B.weight": torch.randn(12, 3)}
    small.write_adapter(adapter, factors, use_dora=False, target_modules=["up_proj"])
    dora_export.merge(base, adapter, out, variant=variant)
    report = dora_export.verify(base, adapter, out, variant=variant, forward=True)
    assert (report.exit_code, report.findings) == (0, ())
    wrong = dora_export.verify(base, adapter, out, forward=True,
                               variant=None if variant else "other")  # fmt: skip
    assert "outputs-differ" in {f.code for f in wrong.findings}


def test_file_beside_an_index_is_ambiguous(tmp_path):
    base, adapter = write_pair(tmp_path)
    pipelines.write_shards(base, "unet")
    save_file(pipelines.tensors()["unet"], base / UNET)
    said = refusal("merge", base, adapter, "-o", tmp_path / "out")
    assert "diffusion_pytorch_model.safetensors.index.json" in said
    assert "Leave one of them there" in said


def remove_folder(base):
    shutil.rmtree(base / "vae")


def remove_weights(base):
    (base / VAE).unlink()


def name_outside(base):
    small.edit_json(base / "model_index.json", **{"../adapter": ["diffusers", "AutoencoderKL"]})


BROKEN = {
    "folder": (remove_folder, "names folders that are not there: vae. Copy the whole pipeline"),
    "weights": (remove_weights, "no weights found for vae"),
    "outside": (name_outside, "names folders outside its own: ['../adapter']"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_incomplete_pipeline_is_refused(case, tmp_path):
    base, adapter = write_pair(tmp_path)
    damage, message = BROKEN[case]
    damage(base)
    assert message in refusal("merge", base, adapter, "-o", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_pickled_model_of_a_pipeline_needs_permission(tmp_path):
    base, adapter = write_pair(tmp_path)
    torch.save(pipelines.tensors()["vae"], base / "vae/diffusion_pytorch_model.bin")
    (base / VAE).unlink()
    assert "--allow-pickle" in refusal("merge", base, adapter, "-o", tmp_path / "out")
    out = merged(base, adapter, tmp_path / "out", "--allow-pickle")
    assert files(out) == FILES


def test_cast_edits_only_configs_that_name_a_type(tmp_path):
    base, adapter = write_pair(tmp_path)
    out = merged(base, adapter, tmp_path / "out", "--dtype", "bf16")
    assert json.loads((out / "text_encoder/config.json").read_text())["torch_dtype"] == "bfloat16"
    assert entries(out)["unet/config.json"] == entries(base)["unet/config.json"]
    assert all(t.dtype == torch.bfloat16 for t in load_file(out / VAE).values())
    assert run("verify", base, adapter, out).exit_code == 0


def test_names_that_fit_two_models_are_refused_with_both(tmp_path):
    base, adapter = write_pair(tmp_path)
    small.edit_json(base / "model_index.json", unet_2=["diffusers", "UNet2DConditionModel"])
    shutil.copytree(base / "unet", base / "unet_2")
    said = refusal("merge", base, adapter, "-o", tmp_path / "out")
    assert "'unet.' added or 'unet_2.' added" in said
    assert "--map-prefix" in said


# --- verification finds what is wrong with a pipeline


def flip(path, offset=-1):
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


FAULTS = {
    "a byte of an untouched model": (lambda m: flip(m / VAE), "bytes-differ", "vae."),
    "a byte of a merged tensor": (lambda m: flip(m / UNET), None, "unet."),
    "no weights": (lambda m: (m / VAE).unlink(), "file-missing", "vae"),
    "no folder": (lambda m: shutil.rmtree(m / "vae"), "file-missing", "vae"),
    "scheduler": (
        lambda m: small.edit_json(m / "scheduler/scheduler_config.json", beta_end=0.02),
        "config-changed", "scheduler/scheduler_config.json",
    ),
    "no scheduler": (
        lambda m: (m / "scheduler/scheduler_config.json").unlink(),
        "config-missing", "scheduler/scheduler_config.json",
    ),
    "config": (
        lambda m: small.edit_json(m / "unet/config.json", sample_size=9),
        "config-changed", "unet/config.json: sample_size",
    ),
    "no config": (lambda m: (m / "vae/config.json").unlink(), "config-missing", "vae/config.json"),
    "class": (
        lambda m: small.edit_json(m / "model_index.json", scheduler=["diffusers", "PNDMScheduler"]),
        "config-changed", "model_index.json",
    ),
    "no model index": (
        lambda m: (m / "model_index.json").unlink(), "config-missing", "model_index.json"
    ),
    "tokenizer": (
        lambda m: (m / "tokenizer/vocab.json").unlink(), "tokenizer-missing", "tokenizer/vocab.json"
    ),
    "two copies": (
        lambda m: shutil.copy(m / UNET, m / "unet/model.safetensors"), "tensor-twice", "unet"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FAULTS)
def test_fault_in_a_merged_pipeline_is_found(case, tmp_path):
    base, adapter = write_pair(tmp_path)
    out = merged(base, adapter, tmp_path / "out")
    plant, code, where = FAULTS[case]
    plant(out)
    report = dora_export.verify(base, adapter, out)
    assert report.exit_code == 1
    wrong = [f for f in report.findings if f.severity == "wrong"]
    assert any((code in (None, f.code)) and f.where.startswith(where) for f in wrong), wrong
    if case.startswith("no folder"):
        assert not [f for f in wrong if f.code == "tensor-missing"]  # told once, with the folder


def test_index_of_one_model_is_held_against_its_files(tmp_path):
    base, adapter = write_pair(tmp_path)
    pipelines.write_shards(base, "vae")
    out = merged(base, adapter, tmp_path / "out")
    path = out / "vae/diffusion_pytorch_model.safetensors.index.json"
    places = json.loads(path.read_text())["weight_map"]
    small.edit_json(path, weight_map=dict.fromkeys(places, max(places.values())))
    report = dora_export.verify(base, adapter, out)
    assert ("index-wrong", "vae: conv_in.weight") in {(f.code, f.where) for f in report.findings}


# --- interrupted work


def interrupt(base, adapter, out, after):
    def progress(done, total):
        if done >= after * total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        dora_export.merge(base, adapter, out, threads=1, progress=progress)


def partial(out):
    return out.with_name(f".{out.name}.dora_export-partial")


def test_interrupted_merge_goes_on_in_all_folders(tmp_path):
    base, adapter = write_pair(tmp_path)
    whole = merged(base, adapter, tmp_path / "whole")
    interrupt(base, adapter, tmp_path / "out", 0.9)
    assert "unet" in entries(partial(tmp_path / "out"))
    report = dora_export.merge(base, adapter, tmp_path / "out")
    assert report.resumed_bytes > 0
    assert entries(tmp_path / "out") == entries(whole)


def test_link_in_the_place_of_a_staged_folder_is_not_followed(tmp_path):
    base, adapter = write_pair(tmp_path)
    whole = merged(base, adapter, tmp_path / "whole")
    interrupt(base, adapter, tmp_path / "out", 0.9)
    staged = partial(tmp_path / "out")
    for part in ("unet", "vae", "text_encoder"):
        shutil.move(staged / part, tmp_path / f"elsewhere-{part}")
        os.symlink(tmp_path / f"elsewhere-{part}", staged / part)
    elsewhere = {p: entries(tmp_path / f"elsewhere-{p}") for p in ("unet", "vae", "text_encoder")}
    assert dora_export.merge(base, adapter, tmp_path / "out").resumed_bytes == 0
    assert entries(tmp_path / "out") == entries(whole)
    assert not (tmp_path / "out/unet").is_symlink()
    for part, before in elsewhere.items():
        assert entries(tmp_path / f"elsewhere-{part}") == before


def test_work_of_another_base_is_told_by_component(tmp_path):
    base, adapter = write_pair(tmp_path)
    interrupt(base, adapter, tmp_path / "out", 0.9)
    flip(base / VAE)
    said = refusal("merge", base, adapter, "-o", tmp_path / "out")
    assert f"base {VAE}" in said
    assert f"base {UNET}" not in said


def test_input_that_changes_in_a_sub_folder_is_noticed(tmp_path):
    base, adapter = write_pair(tmp_path)
    config = base / "scheduler/scheduler_config.json"

    def progress(done, total):
        config.write_text("{}")

    with pytest.raises(InputError, match=r"scheduler_config\.json: had"):
        dora_export.merge(base, adapter, tmp_path / "out", progress=progress)


# --- the Hugging Face cache


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """A pipeline in a local cache: links in sub-folders to blobs; and the snapshot's folder."""
    cache = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    root = cache / "models--org--pipe"
    snapshot = root / "snapshots" / ("c" * 40)
    for sub in ("blobs", "refs"):
        (root / sub).mkdir(parents=True)
    (root / "refs/main").write_text("c" * 40)
    base = pipelines.write(tmp_path / "published")
    for i, path in enumerate(sorted(p for p in base.rglob("*") if p.is_file())):
        blob = root / "blobs" / f"{i:x}".rjust(64, "0")
        shutil.copy(path, blob)
        link = snapshot / path.relative_to(base)
        link.parent.mkdir(parents=True, exist_ok=True)
        os.symlink(os.path.relpath(blob, link.parent), link)
    return snapshot


def test_cached_pipeline_is_merged_by_its_hub_id(cached, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None, raising=False)
    _, adapter = write_pair(tmp_path)
    out = merged("org/pipe", adapter, tmp_path / "out")
    check_merged(out, cached)
    assert not any(path.is_symlink() for path in out.rglob("*"))


@pytest.mark.parametrize("lacking", ["vae", VAE])
def test_pipeline_that_is_cached_in_part_is_asked_for(lacking, cached, tmp_path, monkeypatch):
    path = cached / lacking
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    whole = pipelines.write(tmp_path / "whole")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(whole))
    assert locate("org/pipe", "base") == whole


def test_link_that_leads_out_of_the_pipeline_is_refused(tmp_path):
    base, adapter = write_pair(tmp_path)
    (base / VAE).rename(tmp_path / "private.safetensors")
    os.symlink(tmp_path / "private.safetensors", base / VAE)
    said = refusal("merge", base, adapter, "-o", tmp_path / "out")
    assert "a link that leads out of its folder" in said


def test_running_a_whole_pipeline_is_told_as_unchecked(tmp_path):
    base, adapter = write_pair(tmp_path)
    out = merged(base, adapter, tmp_path / "out")
    result = run("verify", "--forward", base, adapter, out)
    assert result.exit_code == 3
    assert "name that model's folder" in " ".join(result.stdout.split())
