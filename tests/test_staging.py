"""The output is absent or whole at any instant, and nothing of anybody else's is touched."""

import errno
import fcntl
import os
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import dora_export
from dora_export import api
from dora_export.engine import Engine
from dora_export.errors import InputError, OutputError
from dora_export.tensors import FileRange
from dora_export.writers import files, side_files, staging
from dora_export.writers.files import FileSink
from dora_export.writers.staging import MANIFEST, MARK, staged
from tests import small

PARTIAL = ".out.dora_export-partial"
REPLACED = ".out.dora_export-replaced"


@pytest.fixture
def at(tmp_path):
    small.write_pair(tmp_path)
    return tmp_path


def merge(at, **options):
    return dora_export.merge(at / "base", at / "adapter", at / "out", **options)


def check(at):
    tensors = small.base_tensors()
    small.check_merged(at / "out", tensors, small.adapter_tensors(tensors))
    assert {p.name for p in at.iterdir()} == {"base", "adapter", "out"}
    assert not (at / "out" / MARK).exists()


def raiser(error):
    def fail(*_args, **_options):
        raise error

    return fail


def disk(code):
    return OSError(code, os.strerror(code))


# --- failures while writing ---


@pytest.mark.parametrize(
    ("where", "name"),
    [
        (Engine, "run"),
        (FileSink, "write"),
        (side_files, "write"),
        (api.manifest, "model_card"),
        (api, "check"),
        (staging, "sync_folder"),
    ],
    ids=lambda x: getattr(x, "__name__", x),
)
@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("replaces", [False, True])
def test_failure_at_any_stage_leaves_what_was_there(at, monkeypatch, where, name, error, replaces):
    if replaces:
        merge(at)
    before = small.entries(at)
    monkeypatch.setattr(where, name, raiser(error))
    with pytest.raises(type(error)):
        merge(at, force=replaces)
    assert small.entries(at) == before


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("calls", [0, 1, 4])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_disk_error_in_the_middle_is_one_clear_refusal(at, monkeypatch, code, calls, threads):
    before = small.entries(at)
    real, made = os.pwrite, []

    def pwrite(*args):
        made.append(args)
        if len(made) > calls:
            raise disk(code)
        return real(*args)

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(OutputError, match="Nothing was published"):
        merge(at, threads=threads)
    assert small.entries(at) == before


@pytest.mark.parametrize("name", ["open", "fsync"])
def test_disk_error_outside_of_writes_is_one_clear_refusal(at, monkeypatch, name):
    before = small.entries(at)
    real = getattr(os, name)

    def fail(first, *args, **options):
        weights = str(first).endswith("model.safetensors") and "partial" in str(first)
        if weights or (name == "fsync" and os.fstat(first).st_size > 1000):
            raise disk(errno.EIO)
        return real(first, *args, **options)

    monkeypatch.setattr(os, name, fail)
    with pytest.raises(OutputError, match=r"model\.safetensors: cannot be written: Input/output"):
        merge(at)
    assert small.entries(at) == before


def test_full_disk_shows_when_space_is_reserved_and_leaks_no_descriptor(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_reserve", raiser(disk(errno.ENOSPC)))
    before = len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else None
    with (
        pytest.raises(OutputError, match="free some space"),
        FileSink([tmp_path / "f"], [8]) as sink,
    ):
        sink.write(0, 0, np.zeros(8, np.uint8))
    if before is not None:
        assert len(os.listdir("/proc/self/fd")) == before


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
from dora_export.cli import main
sys.argv[1:] = sys.argv[2:]
main()
"""


@pytest.mark.parametrize("limit", [1000, 3000])
def test_limit_on_file_sizes_is_one_clear_refusal(at, limit):
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != limit
    before = small.entries(at)
    command = ["merge", at / "base", at / "adapter", "-o", at / "out"]
    result = subprocess.run(
        [sys.executable, "-B", "-c", LIMITED, str(limit), *map(str, command)],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith("error: ")
    assert "model.safetensors: File too large while writing. Nothing was published" in result.stderr
    assert "Traceback" not in result.stderr
    assert small.entries(at) == before


def test_unreadable_source_is_blamed_on_the_source(tmp_path):
    with (
        pytest.raises(InputError, match="gone: cannot be read"),
        FileSink([tmp_path / "f"], [8]) as sink,
    ):
        sink.copy(0, 0, FileRange(tmp_path / "gone", 0, 8))


def test_source_that_shrinks_while_it_is_copied_is_refused(tmp_path):
    (tmp_path / "source").write_bytes(bytes(5))
    with pytest.raises(InputError, match="truncated"), FileSink([tmp_path / "f"], [8]) as sink:
        sink.copy(0, 0, FileRange(tmp_path / "source", 0, 8))


# --- copying ---


def absent(monkeypatch):
    monkeypatch.delattr(os, "copy_file_range", raising=False)


def refused(code):
    return lambda patch: patch.setattr(os, "copy_file_range", raiser(disk(code)), raising=False)


def short(patch):
    """The kernel copies some bytes, then no more."""
    real, calls = getattr(os, "copy_file_range", None), []

    def copy(source, target, count, start, offset):
        calls.append(count)
        if real is None or len(calls) % 2 == 0:
            return 0
        return real(source, target, min(count, 7), start, offset)

    patch.setattr(os, "copy_file_range", copy, raising=False)


@pytest.mark.parametrize(
    "arrange",
    [absent, refused(errno.EXDEV), refused(errno.EINVAL), refused(errno.EPERM), short],
    ids=["absent", "EXDEV", "EINVAL", "EPERM", "short"],
)
def test_output_is_the_same_where_the_kernel_cannot_copy(at, monkeypatch, arrange):
    merge(at)
    (at / "out").rename(at / "first")
    arrange(monkeypatch)
    merge(at)
    assert small.entries(at / "out") == small.entries(at / "first")


def test_output_is_the_same_where_writes_are_short(at, monkeypatch):
    merge(at)
    (at / "out").rename(at / "first")
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, offset: real(file, data[:100], offset))
    merge(at)
    assert small.entries(at / "out") == small.entries(at / "first")


def test_output_is_the_same_where_pwrite_and_fallocate_are_missing(at, monkeypatch):
    merge(at)
    (at / "out").rename(at / "first")
    monkeypatch.delattr(os, "pwrite")
    monkeypatch.setattr(sys, "platform", "other")
    merge(at)
    assert small.entries(at / "out") == small.entries(at / "first")


# --- order ---


def test_data_is_on_the_disk_before_the_output_has_its_name(at, monkeypatch):
    small.write_shards(at / "base", small.base_tensors())
    (at / "base/model.safetensors").unlink()
    (at / "base" / "sub").mkdir()
    (at / "base" / "sub" / "template.txt").write_text("x")
    events = []
    fsync, rename = os.fsync, os.rename

    def on_fsync(descriptor):
        status = os.fstat(descriptor)
        events.append((status.st_dev, status.st_ino))
        return fsync(descriptor)

    def on_rename(source, target, **options):
        events.append((os.path.basename(source), os.path.basename(target)))
        return rename(source, target, **options)

    monkeypatch.setattr(os, "fsync", on_fsync)
    monkeypatch.setattr(os, "rename", on_rename)
    merge(at)
    published = events.index((PARTIAL, "out"))
    out = at / "out"
    for path in (out, *out.rglob("*")):
        status = path.stat()
        assert (status.st_dev, status.st_ino) in events[:published], path
    parent = at.stat()
    assert (parent.st_dev, parent.st_ino) in events[published:]


# --- leftovers, strangers, two runs ---


def test_leftovers_of_a_killed_run_are_cleared(at):
    partial = at / PARTIAL
    (partial / "sub").mkdir(parents=True)
    (partial / MARK).touch()
    (partial / "model.safetensors").write_bytes(b"half")
    (partial / "sub" / "file").write_text("half")
    (partial / "link").symlink_to(at / "base", target_is_directory=True)
    base = small.entries(at / "base")
    merge(at)
    check(at)
    assert small.entries(at / "base") == base


def test_run_killed_before_the_mark_is_made_does_not_block_the_next(at):
    (at / PARTIAL).mkdir()
    merge(at)
    check(at)


def test_run_killed_while_it_replaces_does_not_block_the_next(at):
    merge(at)
    (at / "out").rename(at / REPLACED)  # killed between the two renames
    merge(at)
    check(at)


def test_foreign_folder_of_the_staging_name_is_refused_and_kept(at):
    (at / PARTIAL).mkdir()
    (at / PARTIAL / "thesis.txt").write_text("mine")
    before = small.entries(at)
    with pytest.raises(OutputError, match=r"not this tool's\. Remove it"):
        merge(at)
    assert small.entries(at) == before


def test_link_of_the_staging_name_is_refused_and_kept(at):
    (at / "elsewhere").mkdir()
    (at / PARTIAL).symlink_to(at / "elsewhere", target_is_directory=True)
    with pytest.raises(OutputError, match=r"not this tool's\. Remove it"):
        merge(at)
    assert list((at / "elsewhere").iterdir()) == []


def test_foreign_folder_of_the_replaced_name_is_kept(at):
    merge(at)
    (at / REPLACED).mkdir()
    (at / REPLACED / "thesis.txt").write_text("mine")
    before = small.entries(at)
    with pytest.raises(OutputError, match="cannot be put in place"):
        merge(at, force=True)
    assert small.entries(at) == before


def test_second_run_on_the_same_output_is_refused_and_the_first_one_ends_well(at):
    with staged(at / "out") as folder:
        with pytest.raises(OutputError, match=r"another run is writing this output\. Wait"):
            merge(at)
        (folder / MANIFEST).write_text("{}")
    assert (at / "out" / MANIFEST).read_text() == "{}"
    assert not (at / PARTIAL).exists()


def test_lock_is_let_go_when_a_run_fails(at):
    with pytest.raises(RuntimeError), staged(at / "out"):
        raise RuntimeError
    merge(at)
    check(at)


def test_mark_that_another_run_has_just_published_is_no_lock(at, monkeypatch):
    """A run opens the mark, the other one renames the folder and lets go, the first one locks."""
    real = fcntl.flock

    def flock(descriptor, operation):
        (at / PARTIAL).rename(at / "out")
        return real(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(OutputError, match="another run"), staged(at / "out"):
        pass


def test_file_system_without_locks_is_no_obstacle(at, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", raiser(disk(errno.ENOLCK)))
    merge(at)
    check(at)


@pytest.mark.parametrize("force", [False, True])
def test_file_that_appears_during_the_run_is_kept(at, force):
    with pytest.raises(OutputError, match="exists already"), staged(at / "out", force=force):
        small.write_json(at / "out", {"not": "ours"})
    assert (at / "out").is_file()
    assert not (at / PARTIAL).exists()


def test_folder_that_appears_during_the_run_is_kept(at, monkeypatch):
    def arrive(*_args):
        (at / "out").mkdir()
        (at / "out" / "thesis.txt").write_text("mine")

    monkeypatch.setattr(side_files, "write", arrive)
    with pytest.raises(OutputError, match="exists already"):
        merge(at, verify="none")
    assert [p.name for p in (at / "out").iterdir()] == ["thesis.txt"]
    assert not (at / PARTIAL).exists()


# --- replacing ---


def test_force_keeps_the_old_output_until_the_new_one_is_in_place(at, monkeypatch):
    merge(at)
    old = small.entries(at / "out")
    seen, write = [], side_files.write

    def during(*args):
        seen.append(small.entries(at / "out"))
        return write(*args)

    monkeypatch.setattr(side_files, "write", during)
    merge(at, force=True)
    assert seen == [old]
    check(at)


@pytest.mark.parametrize("error", [disk(errno.EIO), KeyboardInterrupt()], ids=["EIO", "Ctrl-C"])
def test_force_restores_the_old_output_when_the_rename_fails(at, monkeypatch, error):
    merge(at)
    before = small.entries(at)
    real = os.rename

    def rename(source, target, **options):
        if os.path.basename(source) == PARTIAL:
            raise error
        return real(source, target, **options)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises((OutputError, KeyboardInterrupt)):
        merge(at, force=True)
    assert small.entries(at) == before


def test_folders_above_the_output_are_made_and_taken_back_on_failure(at, monkeypatch):
    output = at / "a" / "b" / "out"
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "run", raiser(RuntimeError()))
        with pytest.raises(RuntimeError):
            dora_export.merge(at / "base", at / "adapter", output)
    assert not (at / "a").exists()
    dora_export.merge(at / "base", at / "adapter", output)
    assert (output / MANIFEST).is_file()


# --- signals ---


def big_pair(at):
    """A pair that takes a while: some 100 MB to be merged into float32."""
    tensors = {f"model.layers.{i}.proj.weight": torch.randn(2048, 1024) for i in range(12)}
    small.write_base(at / "base", tensors)
    adapter = {}
    for name in tensors:
        key = small.PREFIX + name.removesuffix(".weight")
        adapter |= {
            f"{key}.lora_A.weight": torch.randn(4, 1024),
            f"{key}.lora_B.weight": torch.randn(2048, 4),
            f"{key}.lora_magnitude_vector": torch.rand(2048) + 0.5,
        }
    small.write_adapter(at / "adapter", adapter, r=4, target_modules=["proj"])


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGKILL], ids=["SIGINT", "SIGKILL"])
def test_signal_in_the_middle_leaves_no_output_and_the_next_run_is_whole(tmp_path, kind):
    big_pair(tmp_path)
    command = [sys.executable, "-m", "dora_export", "merge", "base", "adapter", "-o", "out",
               "--verify", "full", "--threads", "1", "--precision", "float64"]  # fmt: skip
    process = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    weights = tmp_path / PARTIAL / "model.safetensors"
    while not weights.exists() and process.poll() is None:
        time.sleep(0.005)
    assert process.poll() is None, process.communicate()
    process.send_signal(kind)
    _, err = process.communicate(timeout=30)
    assert not (tmp_path / "out").exists()
    if kind is signal.SIGINT:
        assert process.returncode == 130
        assert "nothing was published" in err
        assert "Traceback" not in err
        assert {p.name for p in tmp_path.iterdir()} == {"base", "adapter"}
        return
    assert (tmp_path / PARTIAL / MARK).exists()
    merge(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"base", "adapter", "out"}
