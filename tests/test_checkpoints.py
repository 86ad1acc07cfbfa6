"""Base models in every layout they are published in: the output is the same model, merged."""

import json
import shutil

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import dora_export
from dora_export.checkpoints import locate, open_checkpoint
from dora_export.errors import InputError
from tests import small
from tests.small import LINEARS

INDEX = "model.safetensors.index.json"
TWO = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
WEIGHTS_OF_ALL_DTYPES = {
    "f64": torch.randn(3, 5, dtype=torch.float64),
    "f32": torch.randn(3, 5),
    "f16": torch.randn(3, 5).half(),
    "bf16": torch.randn(3, 5).bfloat16(),
    "f8_e4m3": torch.randn(3, 5).to(torch.float8_e4m3fn),
    "f8_e5m2": torch.randn(3, 5).to(torch.float8_e5m2),
    "i64": torch.randint(-(2**62), 2**62, (3, 5)),
    "i8": torch.randint(-128, 127, (3, 5)).to(torch.int8),
    "u8": torch.randint(0, 255, (7,)).to(torch.uint8),
    "u16": torch.randint(0, 60000, (7,)).to(torch.uint16),
    "bool": torch.tensor([True, False, True]),
    "complex": torch.randn(3, dtype=torch.complex64),
    "scalar": torch.tensor(3),
    "empty": torch.empty(0, 4),
    "nan": torch.tensor([torch.nan, torch.inf, -0.0]),
}


@pytest.fixture
def tensors():
    return small.base_tensors()


@pytest.fixture
def trained(tensors):
    return small.adapter_tensors(tensors)


@pytest.fixture
def at(tmp_path, trained):
    small.write_adapter(tmp_path / "adapter", trained)
    return tmp_path


def merge(at, base="base", **options):
    return dora_export.merge(at / base, at / "adapter", at / "out", verify="full", **options)


def names(folder):
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def check_index(folder, files):
    """The index names every tensor's file and the bytes of all tensors."""
    index = json.loads((folder / INDEX).read_text())
    held = {f: load_file(folder / f) for f in files}
    assert index["weight_map"] == {n: f for f, ts in held.items() for n in ts}
    assert index["metadata"]["total_size"] == sum(
        t.nbytes for ts in held.values() for t in ts.values()
    )


# --- layouts ---


def test_one_file(at, tensors, trained):
    small.write_base(at / "base", tensors)
    merge(at)
    small.check_merged(at / "out", tensors, trained)
    assert names(at / "out") == {"model.safetensors", "config.json", "tokenizer.json",
                                 "README.md", "dora_export.json"}  # fmt: skip


def test_shards_keep_their_names_and_contents(at, tensors, trained):
    small.write_shards(at / "base", tensors)
    small.edit_json(at / "base" / INDEX, metadata={"total_size": 1, "made_by": "someone"})
    merge(at)
    small.check_merged(at / "out", tensors, trained)
    check_index(at / "out", TWO)
    assert json.loads((at / "out" / INDEX).read_text())["metadata"]["made_by"] == "someone"
    for file in TWO:
        assert load_file(at / "out" / file).keys() == load_file(at / "base" / file).keys()


def test_index_over_a_single_shard(at, tensors, trained):
    small.write_base(at / "base", tensors)
    (at / "base/model.safetensors").rename(at / "base/model-00001-of-00001.safetensors")
    places = dict.fromkeys(tensors, "model-00001-of-00001.safetensors")
    small.write_json(at / "base" / INDEX, {"weight_map": places})
    merge(at)
    small.check_merged(at / "out", tensors, trained)
    check_index(at / "out", ["model-00001-of-00001.safetensors"])


def test_many_shards(at, tensors, trained):
    (at / "base").mkdir()
    places = {n: f"model-{i:05}-of-{len(tensors):05}.safetensors" for i, n in enumerate(tensors, 1)}
    for name, file in places.items():
        save_file({name: tensors[name]}, at / "base" / file)
    small.write_json(at / "base" / INDEX, {"metadata": {}, "weight_map": places})
    merge(at)
    small.check_merged(at / "out", tensors, trained)
    check_index(at / "out", sorted(places.values()))


def test_bare_safetensors_file(at, tensors, trained):
    save_file(tensors, at / "weights.safetensors")
    merge(at, "weights.safetensors")
    small.check_merged(at / "out", tensors, trained)
    assert names(at / "out") == {"weights.safetensors", "README.md", "dora_export.json"}


def test_file_of_another_name_in_a_folder(at, tensors, trained):
    small.write_base(at / "base", tensors)
    (at / "base/model.safetensors").rename(at / "base/diffusion_model.safetensors")
    merge(at)
    small.check_merged(at / "out", tensors, trained)
    assert (at / "out/diffusion_model.safetensors").is_file()


@pytest.mark.parametrize("zipped", [True, False])
def test_pytorch_file_becomes_a_safetensors_file(at, tensors, trained, zipped):
    small.write_base(at / "base", {"x": torch.ones(1)})
    (at / "base/model.safetensors").unlink()
    torch.save(tensors, at / "base/pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    merge(at, allow_pickle=True)
    small.check_merged(at / "out", tensors, trained)
    assert names(at / "out") == {"model.safetensors", "config.json", "tokenizer.json",
                                 "README.md", "dora_export.json"}  # fmt: skip
    with safe_open(at / "out/model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_pytorch_shards_become_safetensors_shards(at, tensors, trained):
    small.write_shards(at / "base", tensors)
    for file in TWO:
        pickled = file.replace("model-", "pytorch_model-").replace("safetensors", "bin")
        torch.save(load_file(at / "base" / file), at / "base" / pickled)
        (at / "base" / file).unlink()
    index = json.loads((at / "base" / INDEX).read_text())
    places = {n: f.replace("model-", "pytorch_model-").replace("safetensors", "bin")
              for n, f in index["weight_map"].items()}  # fmt: skip
    small.write_json(
        at / "base/pytorch_model.bin.index.json", {"metadata": {}, "weight_map": places}
    )
    (at / "base" / INDEX).unlink()
    with pytest.raises(InputError, match="Pass --allow-pickle"):
        merge(at)
    merge(at, allow_pickle=True)
    small.check_merged(at / "out", tensors, trained)
    check_index(at / "out", TWO)
    assert names(at / "out") == {*TWO, INDEX, "config.json", "README.md", "dora_export.json"}


def test_pickled_adapter_is_read_when_allowed(at, tensors, trained):
    small.write_base(at / "base", tensors)
    (at / "adapter/adapter_model.safetensors").unlink()
    torch.save(trained, at / "adapter/adapter_model.bin")
    merge(at, allow_pickle=True)
    small.check_merged(at / "out", tensors, trained)


def test_safetensors_win_over_pickled_twins_and_an_index_over_a_single_file(at, tensors, trained):
    small.write_shards(at / "base", tensors)
    save_file({"stale": torch.ones(1)}, at / "base/model.safetensors")
    (at / "base/pytorch_model.bin").write_bytes(b"not even a pickle")
    (at / "base/training_args.bin").write_bytes(b"a pickle")
    merge(at)
    small.check_merged(at / "out", tensors, trained)
    assert not {"model.safetensors", "pytorch_model.bin", "training_args.bin"} & names(at / "out")


def test_file_of_the_plain_name_wins_over_variants_of_it(at, tensors, trained):
    small.write_base(at / "base", tensors)
    halves = {n: t.half() if t.is_floating_point() else t for n, t in tensors.items()}
    save_file(halves, at / "base/model.fp16.safetensors")
    save_file({"other": torch.ones(1)}, at / "base/consolidated.safetensors")
    merge(at)
    small.check_merged(at / "out", tensors, trained)
    assert not {"model.fp16.safetensors", "consolidated.safetensors"} & names(at / "out")


def test_adapter_in_the_folder_of_the_base_is_not_taken_for_the_model(at, tensors, trained):
    small.write_base(at / "base", tensors)
    small.write_adapter(at / "base", trained)
    dora_export.merge(at / "base", at / "base", at / "out")
    small.check_merged(at / "out", tensors, trained)
    assert not any("adapter" in name for name in names(at / "out"))


@pytest.mark.parametrize("pair", [("a.safetensors", "b.safetensors"), ("a.bin", "b.bin")])
def test_two_files_of_which_none_is_the_model_are_refused(at, pair):
    (at / "base").mkdir()
    for file in pair:
        save_file({"w": torch.ones(1)}, at / "base" / file)
    with pytest.raises(InputError, match=r"more than one weight file: a\.\w+, b.*Pass the file"):
        merge(at)


def test_two_indexes_of_which_none_is_the_model_are_refused(at, tensors):
    small.write_shards(at / "base", tensors)
    (at / "base" / INDEX).rename(at / "base/x.safetensors.index.json")
    shutil.copy(at / "base/x.safetensors.index.json", at / "base/y.safetensors.index.json")
    with pytest.raises(InputError, match="more than one index"):
        merge(at)


@pytest.mark.parametrize("content", [{}, {"config.json": "{}"}])
def test_folder_without_weights_is_refused(at, content):
    (at / "base").mkdir()
    for name, text in content.items():
        (at / "base" / name).write_text(text)
    with pytest.raises(InputError, match=r"no weights found.*folder of the base model"):
        merge(at)


def test_file_without_tensors_is_refused(at):
    save_file({}, at / "weights.safetensors")
    with pytest.raises(InputError, match=r"holds no tensors. Check"):
        merge(at, "weights.safetensors")


def test_huge_json_is_refused_before_it_is_read(at, tensors):
    small.write_base(at / "base", tensors)
    with (at / "base/config.json").open("wb") as file:
        file.truncate(300_000_000)  # a hole
    with pytest.raises(InputError, match="larger than 32000000 bytes"):
        merge(at)


# --- what passes through ---


def test_untouched_tensors_of_every_dtype_keep_their_bytes(at, tensors):
    everything = tensors | WEIGHTS_OF_ALL_DTYPES
    small.write_base(at / "base", everything)
    merge(at)
    written = load_file(at / "out/model.safetensors")
    assert written.keys() == everything.keys()
    for name, tensor in everything.items():
        if name.removesuffix(".weight") not in LINEARS:
            assert (written[name].dtype, written[name].shape) == (tensor.dtype, tensor.shape)
            assert small.bits(written[name]) == small.bits(tensor), name


def test_odd_headers_keep_metadata_names_and_order(at, tensors, trained):
    odd = tensors | {'\u00e9"\\\n\U0001f600': torch.ones(2), "": torch.ones(1), " ": torch.ones(3)}
    metadata = {"format": "pt", "who": 'some"one\n\u00e9', "empty": ""}
    small.write_base(at / "base", odd, metadata=metadata)
    merge(at)
    with (
        safe_open(at / "base/model.safetensors", "pt") as base,
        safe_open(at / "out/model.safetensors", "pt") as out,
    ):
        assert out.metadata() == metadata
        assert list(out.offset_keys()) == list(base.offset_keys())
    small.check_merged(at / "out", odd, trained)


def test_base_without_metadata_stays_without(at, tensors):
    (at / "base").mkdir()
    save_file(tensors, at / "base/model.safetensors")
    merge(at)
    with safe_open(at / "out/model.safetensors", "pt") as file:
        assert not file.metadata()


def test_header_padded_by_other_tools_keeps_the_place_of_the_data(at, tensors):
    small.write_base(at / "base", tensors)
    path = at / "base/model.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    padded = content[8 : 8 + length] + b" " * (4096 - 8 - length)
    path.write_bytes(len(padded).to_bytes(8, "little") + padded + content[8 + length :])
    merge(at)
    written = (at / "out/model.safetensors").read_bytes()
    assert int.from_bytes(written[:8], "little") == 4096 - 8
    assert len(written) == path.stat().st_size


# --- the Hugging Face cache ---


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A local cache as huggingface_hub lays it out, and no network."""
    folder = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return folder


def into_cache(cache, repo, folder, revision="main", commit="c" * 40):
    """Move a folder's files into the cache: blobs by digest, links by name; return the snapshot."""
    root = cache / f"models--{repo.replace('/', '--')}"
    snapshot = root / "snapshots" / commit
    for sub in (root / "blobs", root / "refs", snapshot):
        sub.mkdir(parents=True, exist_ok=True)
    for i, file in enumerate(sorted(folder.iterdir())):
        blob = root / "blobs" / f"{i:x}{commit[0]}".rjust(64, "0")
        shutil.move(file, blob)
        (snapshot / file.name).symlink_to(f"../../blobs/{blob.name}")
    (root / "refs" / revision).write_text(commit)
    return snapshot


def test_hub_ids_are_found_in_the_local_cache(at, tensors, trained, cache):
    blobs = into_cache(cache, "org/base", small.write_base(at / "base", tensors))
    into_cache(cache, "org/adapter", at / "adapter")
    before = small.entries(cache)
    dora_export.merge("org/base", "org/adapter", at / "out", verify="full")
    small.check_merged(at / "out", tensors, trained)
    assert small.entries(cache) == before
    assert not any(p.is_symlink() for p in (at / "out").rglob("*"))
    manifest = json.loads((at / "out/dora_export.json").read_text())
    blob = (blobs / "model.safetensors").resolve().name
    assert manifest["base"]["files"][0]["sha256"] == blob


def test_snapshot_folder_of_links_is_read_like_any_folder(at, tensors, trained, cache):
    snapshot = into_cache(cache, "org/base", small.write_shards(at / "base", tensors))
    dora_export.merge(snapshot, at / "adapter", at / "out")
    small.check_merged(at / "out", tensors, trained)


def test_revision_of_a_hub_id_is_respected(at, tensors, cache):
    into_cache(cache, "org/base", small.write_base(at / "a", small.base_tensors(seed=5)))
    old = into_cache(cache, "org/base", small.write_base(at / "b", tensors), "v1", "d" * 40)
    assert locate("org/base@v1", "base") == old
    assert locate(f"org/base@{'d' * 40}", "base") == old
    assert locate("org/base", "base") != old
    with pytest.raises(InputError, match="unset HF_HUB_OFFLINE"):
        locate("org/base@v2", "base")


def test_path_wins_over_a_hub_id(at, tensors, cache, monkeypatch):
    into_cache(cache, "org/base", small.write_base(at / "a", tensors))
    small.write_base(at / "org" / "base", tensors)
    monkeypatch.chdir(at)
    assert locate("org/base", "base").resolve() == at / "org" / "base"


def test_snapshot_without_weights_is_no_model(at, tensors, cache):
    """Loading a config or a tokenizer leaves a snapshot that holds nothing else."""
    base = small.write_base(at / "base", tensors)
    (base / "model.safetensors").unlink()
    into_cache(cache, "org/base", base)
    with pytest.raises(InputError, match="no weights found"):
        dora_export.merge("org/base", at / "adapter", at / "out")


@pytest.mark.parametrize("left", ["config", "shard"])
def test_incomplete_snapshot_is_downloaded_where_that_is_allowed(
    at, tensors, cache, monkeypatch, left
):
    base = small.write_shards(at / "base", tensors)
    whole = shutil.copytree(base, at / "whole")
    for file in TWO if left == "config" else TWO[:1]:
        (base / file).unlink()
    if left == "config":
        (base / INDEX).unlink()
    into_cache(cache, "org/base", base)
    asked = []

    def download(repo, **options):
        asked.append((repo, options["revision"]))
        return str(whole)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert locate("org/base", "base") == whole
    assert asked == [("org/base", None)]


def test_whole_snapshot_is_not_asked_for_again(at, tensors, cache, monkeypatch):
    snapshot = into_cache(cache, "org/base", small.write_shards(at / "base", tensors))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None, raising=False)
    assert locate("org/base", "base") == snapshot


def test_failed_download_is_a_refusal_with_the_reason(cache, monkeypatch):
    def download(*_args, **_options):
        raise LocalEntryNotFoundError("the network is unreachable\nand more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(InputError, match=r"the network is unreachable\. Check the path") as refusal:
        locate("org/base", "base")
    assert "and more" not in str(refusal.value)


@pytest.mark.parametrize(
    "name", ["no/such/folder", "no--such/model", "x", "", "../x/y", "org/model@", "a" * 300 + "/b"]
)
def test_name_that_is_neither_path_nor_hub_id_is_refused(name, cache):
    with pytest.raises(InputError, match="Check the path of the adapter"):
        locate(name, "adapter")


def test_opening_reads_no_weights(at, tensors):
    small.write_base(at / "base", tensors)
    checkpoint = open_checkpoint(at / "base")
    (at / "base/model.safetensors").unlink()
    assert checkpoint.nbytes == sum(t.nbytes for t in tensors.values())
    assert checkpoint.tensors.keys() == tensors.keys()
