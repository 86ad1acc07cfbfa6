"""What strangers' files name, and links that they plant: nothing leads out of the folder."""

import os
import shutil

import pytest
import torch
from safetensors.torch import save_file

import dora_export
from dora_export.errors import InputError
from dora_export.storage.paths import contained, inside
from tests import small

OUTSIDE = [
    "../x", "a/../x", "a/../../x", "/x", "//host/x", "a//x", "./x", "a/./x", "a/", "", ".", "..",
    "..\\x", "a\\x", "C:x", "C:/x", "C:\\x", "\\\\host\\x", "x\0y", "x" * 256,
    "\ud800", None, 3, ["x"], True,
]  # fmt: skip


@pytest.mark.parametrize("name", OUTSIDE, ids=repr)
def test_names_outside_the_folder_are_refused_on_any_system(name, tmp_path):
    with pytest.raises(InputError, match=r"model\.onnx: names a file outside .* Do not use"):
        inside(tmp_path, name, "model.onnx")


@pytest.mark.parametrize("name", ["x", "a/x", "a b/ü", "...", "..x", "x..", "a/b/c.data"])
def test_names_inside_the_folder_are_taken_whether_or_not_there_is_a_file(name, tmp_path):
    expected = tmp_path / name
    assert inside(tmp_path, name, "index") == expected
    expected.parent.mkdir(parents=True, exist_ok=True)
    expected.write_bytes(b"x")
    assert inside(tmp_path, name, "index") == expected


@pytest.fixture
def at(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "key").write_bytes(b"secret")
    return tmp_path


def plant(at, kind):
    """Plant something that leads out of the model's folder; return its name."""
    model = at / "model"
    if kind == "a link":
        (model / "x").symlink_to("../secret/key")
    elif kind == "an absolute link":
        (model / "x").symlink_to(at / "secret" / "key")
    elif kind == "a link to a link":
        (model / "y").symlink_to(at / "secret" / "key")
        (model / "x").symlink_to("y")
    elif kind == "a link to a folder":
        (model / "folder").symlink_to("../secret")
        return "folder/key"
    elif kind == "a link to nothing":
        (model / "x").symlink_to("../secret/not yet")
    elif kind == "a blob in a folder of no cache":
        (at / "blobs").mkdir()
        (at / "blobs" / ("0" * 64)).write_bytes(b"secret")
        (model / "x").symlink_to(f"../blobs/{'0' * 64}")
    elif kind == "no blob in a cache":
        (at / "models--a--b" / "blobs").mkdir(parents=True)
        (at / "models--a--b" / "blobs" / "key").write_bytes(b"secret")
        (model / "x").symlink_to("../models--a--b/blobs/key")
    elif kind == "a digest beside a cache's blobs":
        (at / "models--a--b" / "private").mkdir(parents=True)
        (at / "models--a--b" / "private" / ("0" * 64)).write_bytes(b"secret")
        (model / "x").symlink_to(f"../models--a--b/private/{'0' * 64}")
    elif kind == "a folder whose name begins alike":
        (at / "model2").mkdir()
        (at / "model2" / "key").write_bytes(b"secret")
        (model / "x").symlink_to("../model2/key")
    return "x"


KINDS = ["a link", "an absolute link", "a link to a link", "a link to a folder",
         "a link to nothing", "a blob in a folder of no cache", "no blob in a cache",
         "a digest beside a cache's blobs", "a folder whose name begins alike"]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_links_that_lead_out_of_the_folder_are_refused(kind, at):
    name = plant(at, kind)
    with pytest.raises(InputError, match=r"a link that leads out of its folder, to .*put a copy"):
        inside(at / "model", name, "index")


@pytest.mark.parametrize("kind", ["fifo", "folder", "socket", "device"])
def test_what_is_no_file_is_refused(kind, at, monkeypatch):
    place = at / "model" / "x"
    if kind == "fifo":
        os.mkfifo(place)
    elif kind == "folder":
        place.mkdir()
    elif kind == "socket":
        import socket

        with socket.socket(socket.AF_UNIX) as listener:
            monkeypatch.chdir(place.parent)  # names of sockets are short
            listener.bind("x")
    else:
        place.symlink_to("/dev/zero")
    reason = "leads out of its folder" if kind == "device" else "not a regular file"
    with pytest.raises(InputError, match=reason):
        inside(at / "model", "x", "index")


def test_links_within_the_folder_and_into_a_cache_are_followed(at):
    cache = at / "hub" / "models--org--name"
    snapshot = cache / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    for i, digest in enumerate(["f" * 64, "0" * 40]):  # of a large file, and of a small one
        (cache / "blobs" / digest).write_bytes(b"x")
        (snapshot / f"{i}").symlink_to(f"../../blobs/{digest}")
        (at / "model" / f"{i}").symlink_to(cache / "blobs" / digest)
        assert inside(snapshot, f"{i}", "index") == snapshot / f"{i}"
        assert inside(at / "model", f"{i}", "index") == at / "model" / f"{i}"
    (at / "model" / "sub").mkdir()
    (at / "model" / "sub" / "x").symlink_to("../0")
    (at / "model" / "y").symlink_to("sub/x")
    assert contained(at / "model" / "y", at / "model")
    (at / "link").symlink_to("model")  # the user's own: it names the folder
    assert contained(at / "link" / "y", at / "link")
    assert contained(at / "secret" / ".." / "model" / "y", at / "model")


def test_links_into_a_folder_that_the_user_names_are_followed_and_no_others(at):
    """Shards on another disk, which nobody wants to copy."""
    disk, base = at / "disk", small.write_shards(at / "base", small.base_tensors())
    small.write_adapter(at / "adapter", small.adapter_tensors(small.base_tensors()))
    (disk / "deep").mkdir(parents=True)
    for file in [*base.iterdir(), at / "adapter/adapter_model.safetensors"]:
        shutil.move(file, disk / "deep" / file.name)
        file.symlink_to(disk / "deep" / file.name)
    (at / "alias").symlink_to("disk")
    pair = (at / "base", at / "adapter")
    (at / "dis").mkdir()  # a name that begins alike
    for wrong in ((), [at / "model", at / "dis"]):
        with pytest.raises(InputError, match=r"leads out of .*pass --links-into with its folder"):
            dora_export.merge(*pair, at / "out", links_into=wrong)
    ran = small.run("merge", *pair, "-o", at / "out", "--links-into", at / "alias")
    assert ran.exit_code == 0, ran.output
    tensors = small.base_tensors()
    small.check_merged(at / "out", tensors, small.adapter_tensors(tensors))
    assert not any(p.is_symlink() for p in (at / "out").rglob("*"))
    assert dora_export.verify(*pair, at / "out", links_into=str(disk)).exit_code == 0
    with pytest.raises(InputError, match="leads out of"):  # the word was for one call
        dora_export.inspect(at / "adapter", at / "base")
    (base / "notes.txt").symlink_to(at / "secret" / "key")
    with pytest.raises(InputError, match=r"notes\.txt: a link that leads out of its folder"):
        dora_export.merge(*pair, at / "again", links_into=[disk])
    with pytest.raises(InputError, match=r"--links-into .*nowhere: no such folder\. Name"):
        dora_export.merge(*pair, at / "again", links_into=[at / "nowhere"])


@pytest.mark.parametrize("kind", ["shard", "whole file", "index", "adapter", "config"])
def test_a_model_with_a_planted_link_is_refused_and_nothing_is_written(kind, at):
    base = small.base_tensors()
    small.write_base(at / "base", base)
    small.write_adapter(at / "adapter", small.adapter_tensors(base))
    secret = at / "secret" / "model.safetensors"
    save_file({"private": torch.ones(3)}, secret)
    place = {
        "shard": at / "base" / "model-00002-of-00002.safetensors",
        "whole file": at / "base" / "model.safetensors",
        "index": at / "base" / "model.safetensors.index.json",
        "adapter": at / "adapter" / "adapter_model.safetensors",
        "config": at / "base" / "config.json",
    }[kind]
    if kind == "shard":
        index = '{"weight_map": {"private": "model-00002-of-00002.safetensors"}}'
        (at / "base" / "model.safetensors.index.json").write_text(index)
    if place.exists():
        place.rename(at / "secret" / place.name)
    else:
        (at / "secret" / place.name).write_bytes(secret.read_bytes() if kind == "shard" else b"{}")
    place.symlink_to(at / "secret" / place.name)
    result = small.run("merge", str(at / "base"), str(at / "adapter"), "-o", str(at / "out"))
    assert result.exit_code == 2
    assert "a link that leads out of its folder" in result.output
    assert sorted(p.name for p in at.iterdir()) == ["adapter", "base", "model", "secret"]
    with pytest.raises(InputError, match="a link that leads out of its folder"):
        dora_export.inspect(at / "adapter", at / "base")  # which copies nothing, and reads
