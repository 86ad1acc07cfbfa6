"""The output is absent or whole at any instant, and nothing of anybody else's is touched."""

import errno
import fcntl
import os
import resource
import subprocess
import sys

import numpy as np
import pytest

import dora_export
from dora_export import api
from dora_export.engine import Engine
from dora_export.errors import ArithmeticRefusal, InputError, MachineError, OutputError, VerifyError
from dora_export.tensors import FileRange
from dora_export.writers import files, side_files, staging
from dora_export.writers.files import FileSink
from dora_export.writers.journal import Job, decode
from dora_export.writers.staging import MANIFEST, MARK, staged
from tests import small

PARTIAL = ".out.dora_export-partial"
REPLACED = ".out.dora_export-replaced"
JOB = Job({}, {})


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


def others(at):
    """Everything but staged work."""
    return {k: v for k, v in small.entries(at).items() if not k.startswith(PARTIAL)}


def done_bytes(at):
    contents = decode((at / PARTIAL / MARK).read_bytes())
    return contents.done_bytes


def swapless(monkeypatch):
    """A file system that cannot swap two folders."""
    monkeypatch.setattr(staging, "_exchange", lambda *_: False)


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
@pytest.mark.parametrize(
    ("error", "keeps"),
    [
        (RuntimeError("boom"), True),
        (KeyboardInterrupt(), True),
        (OutputError("full"), True),
        (ArithmeticRefusal("not finite"), False),
        (VerifyError("7 ulp"), False),
        (InputError("truncated"), False),
    ],
    ids=lambda x: repr(x) if isinstance(x, BaseException) else "",
)
@pytest.mark.parametrize("replaces", [False, True])
def test_failure_at_any_stage_leaves_what_was_there(at, where, name, error, keeps, replaces):
    if replaces:
        merge(at)
    before = small.entries(at)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(where, name, raiser(error))
        with pytest.raises(type(error)):
            merge(at, force=replaces)
    assert others(at) == before
    if not keeps:
        assert not (at / PARTIAL).exists()
    merge(at, force=replaces)
    check(at)


@pytest.mark.parametrize(
    "error",
    [RuntimeError("boom"), KeyboardInterrupt(), OutputError("full"), MemoryError()],
    ids=repr,
)
def test_work_is_kept_where_it_can_be_gone_on_with(at, monkeypatch, error):
    monkeypatch.setattr(side_files, "write", raiser(error))
    # what memory is short of is told with the plan's bound
    raised = MachineError if isinstance(error, MemoryError) else type(error)
    with pytest.raises(raised) as caught:
        merge(at)
    assert done_bytes(at) == (at / PARTIAL / "model.safetensors").stat().st_size
    if isinstance(error, OutputError):
        assert str(at / PARTIAL) in str(caught.value)


def test_nothing_is_kept_where_nothing_is_on_the_disk(at, monkeypatch):
    monkeypatch.setattr(Engine, "run", raiser(RuntimeError()))
    monkeypatch.setattr(FileSink, "write_header", lambda *_: None)
    with pytest.raises(RuntimeError):
        merge(at)
    assert {p.name for p in at.iterdir()} == {"base", "adapter"}


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("calls", [0, 1, 4])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_disk_error_in_the_middle_is_one_clear_refusal_that_can_be_resumed(
    at, code, calls, threads
):
    before = small.entries(at)
    real, made = os.pwrite, []

    def pwrite(*args):
        made.append(args)
        if len(made) > calls:
            raise disk(code)
        return real(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "pwrite", pwrite)
        with pytest.raises(OutputError, match="Nothing was published") as caught:
            merge(at, threads=threads)
    assert others(at) == before
    kept = f"staged work are kept in {at / PARTIAL}: the same command goes on from there"
    assert (kept in str(caught.value)) == (at / PARTIAL).exists() == (calls > 0)
    merge(at)
    check(at)


@pytest.mark.parametrize("name", ["open", "fsync"])
def test_disk_error_outside_of_writes_is_one_clear_refusal(at, monkeypatch, name):
    before = small.entries(at)
    real = getattr(os, name)

    def fail(first, *args, **options):
        path = os.readlink(f"/proc/self/fd/{first}") if name == "fsync" else str(first)
        if path.endswith("model.safetensors") and "partial" in path:
            raise disk(errno.EIO)
        return real(first, *args, **options)

    monkeypatch.setattr(os, name, fail)
    with pytest.raises(OutputError, match=r"model\.safetensors: cannot be written: Input/output"):
        merge(at)
    assert small.entries(at) == before  # after a failed sync nothing is known to be on the disk


def test_full_disk_shows_when_space_is_reserved_and_leaks_no_descriptor(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_reserve", raiser(disk(errno.ENOSPC)))
    before = len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else None
    with (
        pytest.raises(OutputError, match="free some space"),
        FileSink(tmp_path, ["f"], [8]) as sink,
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
    assert others(at) == before


def test_unreadable_source_is_blamed_on_the_source(tmp_path):
    with (
        pytest.raises(InputError, match="gone: cannot be read"),
        FileSink(tmp_path, ["f"], [8]) as sink,
    ):
        sink.copy(0, 0, FileRange(tmp_path / "gone", 0, 8))


def test_source_that_shrinks_while_it_is_copied_is_refused(tmp_path):
    (tmp_path / "source").write_bytes(bytes(5))
    with pytest.raises(InputError, match="truncated"), FileSink(tmp_path, ["f"], [8]) as sink:
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


def test_writes_to_the_page_cache_end_where_pieces_of_128_kib_do(tmp_path, monkeypatch):
    real, made = os.pwrite, []

    def pwrite(file, data, offset):
        made.append((offset, offset + len(data)))
        return real(file, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    data = np.arange(300_000, dtype=np.uint32).view(np.uint8)
    with FileSink(tmp_path, ["file"], [data.size + 100], sync=False) as sink:
        sink.write(0, 100, data)
        sink.write(0, 0, data[:100])
    edge = 128 << 10
    assert all(stop - start <= edge and (stop % edge == 0 or stop == data.size + 100)
               for start, stop in made[:-1])  # fmt: skip
    assert (tmp_path / "file").read_bytes() == data[:100].tobytes() + data.tobytes()


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
    merge(at, force=True)
    check(at)


def test_output_set_aside_by_a_killed_run_is_put_back_first(at, monkeypatch):
    merge(at)
    old = small.entries(at / "out")
    (at / "out").rename(at / REPLACED)
    with pytest.raises(OutputError, match="pass --force"):
        merge(at)
    assert small.entries(at / "out") == old
    assert {p.name for p in at.iterdir()} == {"base", "adapter", "out"}


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


@pytest.mark.parametrize("swaps", [False, True])
def test_foreign_folder_of_the_replaced_name_is_kept(at, monkeypatch, swaps):
    merge(at)
    (at / REPLACED).mkdir()
    (at / REPLACED / "thesis.txt").write_text("mine")
    before = small.entries(at)
    if swaps:
        merge(at, force=True)
    else:
        swapless(monkeypatch)
        with pytest.raises(OutputError, match="cannot be put in place"):
            merge(at, force=True)
    assert others(at) == before


def test_second_run_on_the_same_output_is_refused_and_the_first_one_ends_well(at):
    with staged(at / "out", JOB) as stage:
        with pytest.raises(OutputError, match=r"another run is writing this output\. Wait"):
            merge(at)
        (stage.folder / MANIFEST).write_text("{}")
    assert (at / "out" / MANIFEST).read_text() == "{}"
    assert not (at / PARTIAL).exists()


def test_lock_is_let_go_when_a_run_fails(at):
    with pytest.raises(RuntimeError), staged(at / "out", JOB):
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
    with pytest.raises(OutputError, match="another run"), staged(at / "out", JOB):
        pass


def test_file_system_without_locks_is_no_obstacle(at, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", raiser(disk(errno.ENOLCK)))
    merge(at)
    check(at)


@pytest.mark.parametrize("force", [False, True])
def test_file_that_appears_during_the_run_is_kept(at, force):
    with pytest.raises(OutputError, match="exists already"), staged(at / "out", JOB, force=force):
        small.write_json(at / "out", {"not": "ours"})
    assert (at / "out").is_file()
    assert not (at / PARTIAL).exists()


def test_folder_that_appears_during_the_run_is_kept(at, monkeypatch):
    def arrive(*_args, **_options):
        (at / "out").mkdir()
        (at / "out" / "thesis.txt").write_text("mine")

    monkeypatch.setattr(side_files, "write", arrive)
    with pytest.raises(OutputError, match="exists already"):
        merge(at, verify="none")
    assert [p.name for p in (at / "out").iterdir()] == ["thesis.txt"]
    assert done_bytes(at) > 0  # the folder can be moved out of the way, and the work is not lost


# --- replacing ---


def test_force_keeps_the_old_output_until_the_new_one_is_in_place(at, monkeypatch):
    merge(at)
    old = small.entries(at / "out")
    seen, write = [], side_files.write

    def during(*args, **options):
        seen.append(small.entries(at / "out"))
        return write(*args, **options)

    monkeypatch.setattr(side_files, "write", during)
    merge(at, force=True)
    assert seen == [old]
    check(at)


@pytest.mark.parametrize("error", [disk(errno.EIO), KeyboardInterrupt()], ids=["EIO", "Ctrl-C"])
def test_force_restores_the_old_output_when_the_rename_fails(at, error):
    merge(at)
    before = small.entries(at)
    real = os.rename

    def rename(source, target, **options):
        if os.path.basename(source) == PARTIAL:
            raise error
        return real(source, target, **options)

    with pytest.MonkeyPatch.context() as patch:
        swapless(patch)
        patch.setattr(os, "rename", rename)
        with pytest.raises((OutputError, KeyboardInterrupt)):
            merge(at, force=True)
    assert others(at) == before
    merge(at, force=True)
    check(at)


@pytest.mark.parametrize("swaps", [True, False])
def test_output_is_the_same_whether_or_not_folders_can_be_swapped(at, monkeypatch, swaps):
    merge(at)
    first = small.entries(at / "out")
    (at / "out" / "config.json").write_text("{}")
    if not swaps:
        swapless(monkeypatch)
    merge(at, force=True)
    check(at)
    assert small.entries(at / "out") == first


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can swap two folders")
def test_output_is_never_absent_while_it_is_replaced(at, monkeypatch):
    merge(at)
    seen = []

    def looking(name):
        real = getattr(os, name)

        def call(*args, **options):
            seen.append((at / "out" / MANIFEST).is_file())
            return real(*args, **options)

        monkeypatch.setattr(os, name, call)

    for name in ("rename", "fsync", "unlink", "rmdir"):
        looking(name)
    merge(at, force=True)
    assert len(seen) > 10
    assert all(seen)


def test_folder_swapped_in_at_the_last_moment_is_given_back(at, monkeypatch):
    merge(at)
    real, made = staging._exchange, []

    def exchange(one, other):
        if not made:
            (at / "out").rename(at / "moved")
            (at / "out").mkdir()
            (at / "out" / "thesis.txt").write_text("mine")
        made.append(one)
        return real(one, other)

    monkeypatch.setattr(staging, "_exchange", exchange)
    with pytest.raises(OutputError, match="changed meanwhile"):
        merge(at, force=True)
    assert [p.name for p in (at / "out").iterdir()] == ["thesis.txt"]
    assert done_bytes(at) > 0


def test_folders_above_the_output_are_made_and_taken_back_on_failure(at, monkeypatch):
    output = at / "a" / "b" / "out"
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "run", raiser(ArithmeticRefusal("")))
        with pytest.raises(ArithmeticRefusal):
            dora_export.merge(at / "base", at / "adapter", output)
    assert not (at / "a").exists()
    dora_export.merge(at / "base", at / "adapter", output)
    assert (output / MANIFEST).is_file()


@pytest.fixture
def synced(monkeypatch):
    """Names of what is put on the disk, in order."""
    found, real = [], os.fsync

    def fsync(descriptor):
        found.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    return found


def test_without_sync_nothing_waits_for_the_disk(at, synced):
    merge(at, sync=False)
    check(at)
    assert synced == []
    merge(at, sync=True, force=True)
    check(at)
    assert {"model.safetensors", "config.json", MANIFEST, PARTIAL} <= set(synced)


def test_what_was_published_without_sync_is_synced_by_the_run_that_takes_it_over(at, synced):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(staging, "_settle", raiser(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            merge(at, sync=False)
    assert (at / "out" / MARK).exists()
    assert synced == []
    merge(at)
    check(at)
    assert {"model.safetensors", "config.json", MANIFEST} <= set(synced)
