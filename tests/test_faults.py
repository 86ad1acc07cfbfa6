"""Faults of the machine: each is one clear refusal, and nothing is half published or lost."""

import builtins
import errno
import json
import mmap
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import dora_export
from dora_export import api, engine, machine, tensors, worker
from dora_export.errors import InputError, MachineError, OutputError
from dora_export.tensors import FileRange
from dora_export.writers import files, side_files, staging
from dora_export.writers.files import FileSink
from tests import faults, on_small_disks, small
from tests.faults import Broken, Calls, attempt, disk, raiser


@pytest.fixture(autouse=True)
def no_hang():
    """A test that takes a minute hangs."""

    def told(*_):
        raise AssertionError("hangs")

    before = signal.signal(signal.SIGALRM, told)
    signal.setitimer(signal.ITIMER_REAL, 60, 1)  # and again: what hangs may hang in its cleaning up
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def at(tmp_path):
    small.write_pair(tmp_path)
    return tmp_path


def weights(at, out="out"):
    return (at / out / "model.safetensors").read_bytes()


# --- disks that fill up or die, for real ---


@pytest.fixture(scope="module")
def small_disks(tmp_path_factory):
    """What happened to merges on small disks: case -> result."""
    words, names = faults.mounting(), list(on_small_disks.CASES)
    try:
        faults.mounting(loop=True)
        names += on_small_disks.ON_LOOPS
    except pytest.skip.Exception:
        pass  # the tests of these skip, with the reason
    folder = tmp_path_factory.mktemp("disks")
    command = [*words, sys.executable, "-B", "-m", "tests.on_small_disks", folder, *names]
    result = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, check=False, timeout=50,
        cwd=Path(__file__).parents[1], env={**os.environ, "PYTHONPATH": "."},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def on_disk(small_disks, case):
    if case in on_small_disks.ON_LOOPS:
        faults.mounting(loop=True)
    result = small_disks[case]
    assert "failure" not in result, result["failure"]
    return result


@pytest.mark.parametrize("case", ["fills", "fills without fallocate"])
def test_disk_that_fills_anywhere_is_one_clear_refusal(small_disks, case):
    result = on_disk(small_disks, case)
    assert result["published"] > 5
    assert len(result["refusals"]) > 15
    for refusal in result["refusals"]:
        assert "No space left on device" in refusal
        assert "free some space and run the same command again" in refusal
    full = {Path(refusal.partition(":")[0]).name for refusal in result["refusals"]}
    assert {"model.safetensors", "config.json", "README.md"} <= full


def test_disk_that_another_program_fills_meanwhile_is_one_clear_refusal(small_disks):
    for refusal in on_disk(small_disks, "fills meanwhile")["refusals"]:
        # Space for the weights was reserved: it is the files beside them that find none.
        assert "config.json: No space left on device while writing" in refusal


def test_file_system_without_fallocate_works_and_tells_when_it_is_full(small_disks):
    result = on_disk(small_disks, "no fallocate")
    assert result["fallocate"] == -1
    assert result["good"] is None
    assert "model.safetensors: No space left on device" in result["refusals"][0]


def test_disk_that_loses_what_it_took_is_heard_when_it_is_synced(small_disks):
    (refusal,) = on_disk(small_disks, "dies at sync")["refusals"]
    assert "No space left on device" in refusal or "Input/output error" in refusal


def test_disk_that_dies_while_the_base_is_read_is_one_clear_refusal(small_disks):
    (refusal,) = on_disk(small_disks, "dies while read")["refusals"]
    assert "base/model.safetensors: cannot be read at byte " in refusal
    assert "Input/output error. The disk or the network behind it fails" in refusal


def test_read_only_file_system_is_refused_as_output_and_good_as_input(small_disks):
    result = on_disk(small_disks, "read-only")
    assert "Read-only file system. Pass another -o" in result["refusals"][0]
    assert result["same"]


def test_base_and_output_may_lie_on_different_file_systems(small_disks):
    result = on_disk(small_disks, "other disk")
    assert result["apart"]
    assert result["refusals"] == [None]


def test_mount_point_is_refused_before_any_work(small_disks):
    result = on_disk(small_disks, "mount point")
    assert "a mount point cannot be replaced by a rename. Pass a folder" in result["refusals"][0]
    assert result["left"] == ["adapter", "base", "disk"]


# --- every call that writes fails, one after the other ---


class Fallocate:
    """libc with a fallocate of ours."""

    real = files.ctypes.CDLL(None, use_errno=True)

    def __init__(self, *codes):
        self.codes = list(codes)

    def fallocate64(self, *args):
        code = self.codes.pop(0) if self.codes else 0
        if code:
            files.ctypes.set_errno(code)
            return -1
        return self.real.fallocate64(*args)

    def statfs(self, *args):
        return self.real.statfs(*args)


def below(at):
    """Whether a call is about the output, or what is hidden beside it."""

    def concerns(first, *rest):
        path = os.readlink(f"/proc/self/fd/{first}") if isinstance(first, int) else str(first)
        # Making a folder that is there is asking whether it is: its answer does not matter.
        asks = rest == (0o777,) and os.path.isdir(path)
        return path.startswith((f"{at}/out", f"{at}/.out")) and not asks

    return concerns


class Clumsy:
    """A side file that cannot be written."""

    def __init__(self, file, code):
        self.file, self.code = file, code

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()

    def write(self, _data):
        raise disk(self.code)


SIDE_FILES = ("config.json", "tokenizer.json", "README.md", "dora_export.json")
ALL_CALLS = {"open": 3, "mkdir": 1, "pwrite": 5, "fsync": 7, "rename": 1}  # at least
CODES = [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS]


@pytest.mark.parametrize("threads", [pytest.param(1, marks=pytest.mark.nightly), 3])
@pytest.mark.parametrize("name", ALL_CALLS)
def test_fault_in_any_call_that_writes_is_one_clear_refusal(at, monkeypatch, name, threads):
    calls = Calls(monkeypatch, os, name, below(at))
    assert attempt(at, "out-good", threads=threads) is None
    count = calls.count
    assert count >= ALL_CALLS[name]
    for number in range(count):
        for code in CODES:
            calls.fail(number, code)
            refusal = attempt(at, f"out-{number}-{code}", threads=threads)
            calls.fail(None, 0)
            assert os.strerror(code) in refusal
            assert "Nothing was published" in refusal or "Pass another -o" in refusal or (
                "whole and in place" in refusal and name in ("open", "fsync"))  # fmt: skip


@pytest.mark.parametrize("name", ["open", "mkdir", "pwrite", "fsync", "rename"])
def test_fault_while_replacing_an_output_keeps_the_old_one_or_the_new_one(at, monkeypatch, name):
    calls = Calls(monkeypatch, os, name, below(at))
    assert attempt(at) is None
    assert attempt(at, force=True) is None
    assert attempt(at, "out-2") is None
    calls.fail(None, 0)
    assert attempt(at, force=True, restart=True) is None
    for number in range(calls.count):
        calls.fail(number, errno.EIO)
        refusal = attempt(at, force=True, restart=True)
        calls.fail(None, 0)
        assert "Input/output error" in refusal
    assert attempt(at, force=True) is None


def test_folder_that_cannot_be_listed_is_not_left_out_of_the_sync(at, monkeypatch):
    hidden = [f"{at}/.out-good."]
    calls = Calls(monkeypatch, os, "scandir", lambda *path: str(*path).startswith(hidden[0]))
    assert attempt(at, "out-good") is None
    count = calls.count
    assert count > 0
    refusals = []
    for number in range(count):
        hidden[0] = f"{at}/.out-{number}."
        calls.fail(number, errno.EIO)
        refusals.append(attempt(at, f"out-{number}"))
        calls.fail(None, 0)
    assert all("Input/output error" in refusal for refusal in refusals)
    assert any("cannot be listed: Input/output error. Nothing was published" in refusal
               for refusal in refusals)  # fmt: skip


@pytest.mark.parametrize("name", SIDE_FILES)
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_disk_that_fills_at_a_side_file_is_one_clear_refusal(at, monkeypatch, name, code):
    real = Path.open

    def clumsy(path, mode="r", *args, **options):
        file = real(path, mode, *args, **options)
        return Clumsy(file, code) if mode == "xb" and path.name == name else file

    monkeypatch.setattr(Path, "open", clumsy)
    refusal = attempt(at)
    assert f"{name}: {os.strerror(code)} while writing. Nothing was published" in refusal


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG])
def test_space_that_cannot_be_reserved_is_one_clear_refusal(at, monkeypatch, code):
    monkeypatch.setattr(files.ctypes, "CDLL", lambda *_, **__: Fallocate(code))
    assert os.strerror(code) in attempt(at)


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EPERM])
def test_file_system_that_cannot_reserve_space_does_without(at, monkeypatch, code):
    assert attempt(at, "out-1") is None
    libc = Fallocate(code)
    monkeypatch.setattr(files.ctypes, "CDLL", lambda *_, **__: libc)
    assert attempt(at) is None
    assert libc.codes == []
    assert small.entries(at / "out") == small.entries(at / "out-1")


def test_signal_while_space_is_reserved_is_no_fault(tmp_path, monkeypatch):
    libc = Fallocate(errno.EINTR, errno.EINTR)
    monkeypatch.setattr(files.ctypes, "CDLL", lambda *_, **__: libc)
    with (tmp_path / "file").open("wb") as file:
        files._reserve(file.fileno(), 8192)
        status = os.fstat(file.fileno())
    assert libc.codes == []
    assert status.st_size == 8192
    assert status.st_blocks * 512 >= 8192  # reserved, not left out


def test_failing_sync_stops_the_run_and_not_only_its_end(at, monkeypatch):
    """With hundreds of files to come, the first that the disk refuses is the last one."""
    base = small.base_tensors()
    base |= {f"model.extra.{i}": base["model.norm.weight"] + i for i in range(40)}
    made = many_shards(at, base, shards=40)
    reals, synced, done = os.fsync, [], []

    def fsync(descriptor):
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        raise disk(errno.EIO)

    def progress(now, total):
        done.append((now, total))

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(files, "WAITING", 1)  # so that the writer is not far ahead
    refusal = attempt(at, base=made.name, threads=1, progress=progress)
    assert "cannot be written: Input/output error. Nothing was published" in refusal
    assert len(synced) < 10
    assert done[-1][0] < done[-1][1]
    monkeypatch.setattr(os, "fsync", reals)
    dora_export.merge(made, at / "adapter", at / "out", threads=1)


def test_write_that_neither_fails_nor_advances_is_no_endless_loop(at, monkeypatch):
    answers = [0] * 100
    monkeypatch.setattr(os, "pwrite", lambda *_: answers.pop())
    assert "cannot be written: Input/output error" in attempt(at)
    assert len(answers) > 80


def test_any_fault_of_the_sync_thread_is_raised_and_nobody_waits_for_it(at, monkeypatch):
    real = os.fsync

    def fsync(descriptor):
        if threading.current_thread().name == "sync":
            raise RuntimeError("not of the disk")
        return real(descriptor)

    base = many_shards(at, small.base_tensors(), shards=8)
    monkeypatch.setattr(files, "WAITING", 1)
    monkeypatch.setattr(os, "fsync", fsync)
    threads = set(threading.enumerate())
    with pytest.raises(RuntimeError, match="not of the disk"):
        dora_export.merge(base, at / "adapter", at / "out")
    assert set(threading.enumerate()) <= threads
    assert not (at / "out").exists()


def test_slow_sync_makes_writers_wait_with_few_files_open(at, monkeypatch):
    base = many_shards(at, small.base_tensors(), shards=8)
    real, opened = os.fsync, []

    def fsync(descriptor):
        time.sleep(0.02)
        opened.append(sum(f.endswith(".safetensors") for f in open_files() if "partial" in f))
        return real(descriptor)

    monkeypatch.setattr(files, "WAITING", 2)
    monkeypatch.setattr(os, "fsync", fsync)
    # One more is synced, one waits for its place in the queue, and one more is written.
    assert attempt(at, base=base.name, threads=1) is None
    assert 1 < max(opened) <= 5


def open_files():
    folder = Path("/proc/self/fd")
    for entry in list(folder.iterdir()):
        try:
            yield os.readlink(entry)
        except OSError:  # closed meanwhile
            continue


def many_shards(at, base, shards):
    """A base of one shard per tensor, or of so many with small tensors beside."""
    folder = at / "many"
    folder.mkdir()
    names = list(base)
    parts = [names[i::shards] for i in range(shards)]
    places = {}
    for i, part in enumerate(parts, 1):
        file = f"model-{i:05}-of-{shards:05}.safetensors"
        save_file({n: base[n] for n in part}, folder / file, {"format": "pt"})
        places |= dict.fromkeys(part, file)
    small.write_json(folder / "model.safetensors.index.json", {"weight_map": places})
    small.write_json(folder / "config.json", small.CONFIG)
    return folder


# --- short and interrupted calls ---


def test_signals_in_the_middle_of_calls_change_nothing(tmp_path):
    """The interval timer's signals interrupt system calls wherever they are."""
    on_small_disks.wide_pair(tmp_path)
    dora_export.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "calm", threads=1)
    heard = []
    before = signal.signal(signal.SIGALRM, lambda *_: heard.append(1))
    signal.setitimer(signal.ITIMER_REAL, 0.0003, 0.0003)
    try:
        for i in range(5):
            dora_export.merge(
                tmp_path / "base", tmp_path / "adapter", tmp_path / str(i), threads=1,
                block_bytes=4096, verify="full",
            )  # fmt: skip
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert len(heard) > 50
    calm = small.entries(tmp_path / "calm")
    assert all(small.entries(tmp_path / str(i)) == calm for i in range(5))


def broken_reads(monkeypatch, name, **how):
    """Let reads of files of one name be short, or fail from a byte on."""

    def opener(path, mode, buffering):
        file = builtins.open(path, mode, buffering=buffering)  # noqa: SIM115 - the reader's own
        return Broken(file, **how) if Path(path).name == name else file

    monkeypatch.setattr(tensors, "open", opener, raising=False)
    monkeypatch.delattr(os, "copy_file_range")


def test_short_reads_are_continued(at, monkeypatch):
    broken_reads(monkeypatch, "model.safetensors", most=5)
    assert attempt(at) is None


@pytest.mark.parametrize("part", [0.3, 0.6, 0.99])
@pytest.mark.parametrize("name", ["base/model.safetensors", "adapter/adapter_model.safetensors"])
def test_input_that_cannot_be_read_from_a_byte_on_is_one_clear_refusal(at, monkeypatch, name, part):
    place = int((at / name).stat().st_size * part)
    broken_reads(monkeypatch, Path(name).name, fails_at=place)
    refusal = attempt(at)
    found = re.search(rf"{name}: cannot be read at byte (\d+): Input/output error", refusal)
    assert int(found[1]) >= place
    assert "use a copy on another one" in refusal


def kernel(code=None, *, most=None):
    """A copy_file_range that fails, or that copies some bytes and then no more."""
    real, calls = os.copy_file_range, []

    def copy(source, target, count, start, offset):
        calls.append(count)
        if code is not None:
            raise disk(code)
        return real(source, target, min(count, most), start, offset) if len(calls) % 2 else 0

    return copy


@pytest.mark.parametrize(
    "copy",
    [kernel(c) for c in (errno.EXDEV, errno.EOPNOTSUPP, errno.EINVAL, errno.EPERM, errno.ENOSYS,
                         errno.EBADF, errno.ETXTBSY, errno.EIO)] + [kernel(most=3)],
    ids=["EXDEV", "EOPNOTSUPP", "EINVAL", "EPERM", "ENOSYS", "EBADF", "ETXTBSY", "EIO", "short"],
)  # fmt: skip
def test_bytes_are_right_where_the_kernel_does_not_copy(at, monkeypatch, copy):
    assert attempt(at, "out-1") is None
    monkeypatch.setattr(os, "copy_file_range", copy)
    assert attempt(at) is None
    assert small.entries(at / "out") == small.entries(at / "out-1")


def test_source_of_a_copy_that_ends_early_is_refused_and_no_endless_loop(tmp_path, monkeypatch):
    (tmp_path / "source").write_bytes(bytes(100))
    monkeypatch.setattr(os, "copy_file_range", lambda *_: 0)
    with (
        pytest.raises(InputError, match=r"source: ends at byte 100, expected 200"),
        FileSink(tmp_path, ["file"], [200]) as sink,
    ):
        sink.copy(0, 0, FileRange(tmp_path / "source", 0, 200))


# --- inputs that change while they are read ---


def shrink(path):
    os.truncate(path, path.stat().st_size // 2)


def grow(path):
    with path.open("ab") as file:
        file.write(b"\n")


def rewrite(path):
    """Change a byte in place, and set the clock of the file back."""
    times = path.stat()
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def replace(path):
    """Put another file of the same size and time in its place."""
    other = path.with_name("other")
    shutil.copy2(path, other)
    rewrite(other)
    other.replace(path)


def remove(path):
    path.unlink()


CHANGES = [shrink, grow, rewrite, replace, remove]
INPUTS = ["base/model.safetensors", "adapter/adapter_model.safetensors", "base/tokenizer.json",
          "base/config.json", "adapter/tokenizer.json"]  # fmt: skip


@pytest.fixture
def dressed(at):
    (at / "adapter" / "tokenizer.json").write_text('{"version": "1.0", "own": true}\n')
    return at


def during(at, moment, change, monkeypatch):
    """Change an input in a moment of the run; returns options for the merge."""
    done = []

    def once():
        if not done:
            done.append(1)
            change()

    if moment == "planning":
        real = api.plan_merge
        monkeypatch.setattr(api, "plan_merge", lambda *a: (once(), real(*a))[1])
    elif moment == "checking":
        check = api.check
        monkeypatch.setattr(api, "check", lambda *a, **o: (check(*a, **o), once())[0])
    else:
        part = {"first byte": 0, "last byte": 1}[moment]
        return {"progress": lambda now, total: once() if now >= part * total else None}
    return {}


@pytest.mark.parametrize("moment", ["planning", "first byte", "last byte", "checking"])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", INPUTS)
def test_input_that_changes_meanwhile_is_reported_and_nothing_published(
    dressed, monkeypatch, name, change, moment
):
    path = dressed / name
    if name == "base/tokenizer.json":
        (dressed / "adapter" / "tokenizer.json").unlink()  # it would win
    options = during(dressed, moment, lambda: change(path), monkeypatch)
    refusal = attempt(dressed, changes_inputs=True, **options)
    assert refusal is not None
    assert name in refusal
    if moment == "planning" and change is remove:
        assert "was there and is gone" in refusal
    else:
        assert "inputs changed while they were read" in refusal
        assert "run the same command again when nothing writes to them" in refusal


def test_link_that_leads_elsewhere_meanwhile_is_reported(at, monkeypatch):
    """As the cache does when another revision of a model is downloaded."""
    blobs = at / "models--org--name" / "blobs"
    blobs.mkdir(parents=True)
    old, new = blobs / ("0" * 64), blobs / ("1" * 64)
    link = at / "base" / "model.safetensors"
    link.rename(old)
    save_file(small.base_tensors(seed=9), new, {"format": "pt"})
    link.symlink_to(old)

    def lead_elsewhere():
        (at / "link").symlink_to(new)
        (at / "link").replace(link)

    options = during(at, "first byte", lead_elsewhere, monkeypatch)
    refusal = attempt(at, changes_inputs=True, verify="none", **options)
    assert "base/model.safetensors: was written to or replaced" in refusal


@pytest.mark.parametrize("change", [grow, rewrite, replace])
def test_pickled_base_that_changes_meanwhile_is_reported(at, monkeypatch, change):
    import torch

    torch.save(load_file(at / "base/model.safetensors"), at / "base/pytorch_model.bin")
    (at / "base" / "model.safetensors").unlink()
    path = at / "base" / "pytorch_model.bin"
    options = during(at, "first byte", lambda: change(path), monkeypatch)
    refusal = attempt(at, changes_inputs=True, allow_pickle=True, **options)
    assert "inputs changed while they were read" in refusal
    assert "base/pytorch_model.bin" in refusal


def test_what_does_not_change_inputs_is_no_reason_to_refuse(at, monkeypatch):
    def harmless():
        (at / "base" / "train.log").write_text("a line more")
        for path in (at / "base").iterdir():
            path.read_bytes()

    options = during(at, "first byte", harmless, monkeypatch)
    assert attempt(at, changes_inputs=True, **options) is None


@pytest.mark.parametrize("seconds", [-(10**9), 10**9])
def test_clocks_that_are_off_change_nothing(at, monkeypatch, seconds):
    assert attempt(at, "out-1") is None
    for path in (
        at / "base",
        at / "adapter",
        *(at / "base").iterdir(),
        *(at / "adapter").iterdir(),
    ):
        moment = time.time() + seconds
        os.utime(path, (moment, moment))
    jumps = iter(range(10**9, 0, -1000))
    monkeypatch.setattr(time, "time", lambda: next(jumps))  # set back at every look
    monkeypatch.setattr(time, "time_ns", lambda: next(jumps) * 10**9)
    assert attempt(at) is None
    assert small.entries(at / "out") == small.entries(at / "out-1")


# --- what may not be read or written ---

CLOSED = [
    # what is closed, its permissions, what the refusal names
    ("base/model.safetensors", 0o000, "base/model.safetensors: cannot be read: Permission denied"),
    ("base/config.json", 0o000, "base/config.json: cannot be read: Permission denied"),
    ("base/tokenizer.json", 0o000, "base/tokenizer.json: Permission denied"),
    ("base/README.md", 0o000, "base/README.md: Permission denied"),
    ("base/sub", 0o000, "base/sub: cannot be listed: Permission denied"),
    ("base", 0o300, "base: Permission denied. Check its permissions"),
    ("base", 0o600, "base/"),
    ("adapter/adapter_model.safetensors", 0o000, "adapter_model.safetensors: cannot be read: Perm"),
    ("adapter/adapter_config.json", 0o000, "adapter_config.json: cannot be read: Permission den"),
    ("adapter/additional_chat_templates", 0o000, "additional_chat_templates: Permission denied"),
    ("adapter", 0o000, "adapter: Permission denied. Check its permissions"),
    ("adapter", 0o300, "adapter: Permission denied. Check its permissions"),
    ("parent", 0o555, "parent: cannot make a folder there: Permission denied. Pass another -o"),
    ("parent", 0o000, "parent"),
]
CLOSED_TO_INSPECT = [
    ("base", 0o300, "base: Permission denied. Check its permissions"),
    ("base/model.safetensors", 0o000, "base/model.safetensors: cannot be read: Permission denied"),
    ("adapter/adapter_model.safetensors", 0o000, "adapter_model.safetensors: cannot be read: Perm"),
]
UNDER_PERMISSIONS = """
import json, sys
from pathlib import Path
import dora_export
at, cases = Path(sys.argv[1]), json.loads(sys.argv[2])
said = []
for command, name, mode in cases:
    path = at / name
    before = path.stat().st_mode
    path.chmod(mode)
    try:
        if command == "inspect":
            dora_export.inspect(at / "adapter", at / "base")
        else:
            dora_export.merge(at / "base", at / "adapter", at / "parent" / "out")
        said.append(["done", 0])
    except dora_export.DoraExportError as error:
        said.append([str(error), error.exit_code])
    except Exception as error:
        said.append([repr(error), None])
    finally:
        path.chmod(before)
print(json.dumps(said))
"""


def test_what_may_not_be_read_or_written_is_one_clear_refusal(at):
    words = faults.bound_by_permissions()
    (at / "base" / "README.md").write_text("---\nlicense: mit\n---\n")
    (at / "base" / "sub").mkdir()
    (at / "base" / "sub" / "file.txt").write_text("x")
    (at / "adapter" / "additional_chat_templates").mkdir()
    (at / "adapter" / "additional_chat_templates" / "tool.jinja").write_text("x")
    (at / "parent").mkdir()
    before = small.entries(at)
    cases = [("merge", *case) for case in CLOSED]
    cases += [("inspect", *case) for case in CLOSED_TO_INSPECT]
    command = [*words, sys.executable, "-B", "-c", UNDER_PERMISSIONS, str(at),
               json.dumps([case[:3] for case in cases])]  # fmt: skip
    result = subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=60,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )  # fmt: skip
    said = json.loads(result.stdout)
    for (*case, expected), (message, code) in zip(cases, said, strict=True):
        assert code == 2, (case, message)
        assert expected in message, case
        assert "Permission denied" in message
        assert faults.CLEAR.fullmatch(message), message
    assert small.entries(at) == before


def test_path_that_may_not_be_looked_at_is_not_taken_for_a_hub_id(at):
    """Asking a hub for it would tell strangers the names of somebody's folders."""
    (at / "closed").mkdir()
    (at / "base").rename(at / "closed" / "base")
    before = small.entries(at)
    (at / "closed").chmod(0o000)
    with faults.closing_modes(at / "adapter"):
        result = faults.command(
            "merge", "closed/base", "adapter", "-o", "out", cwd=at,
            setup=faults.bound_by_permissions(),
        )  # fmt: skip
    (at / "closed").chmod(0o755)
    faults.check_refused(result, "closed/base: Permission denied. Check its permissions.")
    assert small.entries(at) == before


def test_link_to_nothing_is_not_taken_for_a_hub_id(at, monkeypatch):
    monkeypatch.chdir(at)
    (at / "org").mkdir()
    (at / "org" / "model").symlink_to("gone")
    refusal = attempt(at, base="org/model")
    assert "org/model: a link that leads nowhere: No such file or directory. Repair it" in refusal


@pytest.mark.parametrize("name", ["base/config.json", "base/merges.txt", "adapter/tokenizer.json"])
def test_link_to_a_side_file_that_is_not_there_is_refused(at, name):
    (at / name).unlink(missing_ok=True)
    (at / name).symlink_to(at / "blobs" / "gone")
    refusal = attempt(at)
    assert f"{name}: a link to a file that is not there. Download it again" in refusal


def test_link_to_nothing_that_would_not_be_taken_over_is_no_obstacle(at):
    (at / "base" / "model.gguf").symlink_to("gone")
    assert attempt(at) is None


def test_cache_of_read_only_links_is_good_as_input_and_stays_as_it_is(at):
    """As huggingface_hub keeps models: links to blobs that nobody may write."""
    blobs = at / "models--org--name" / "blobs"
    blobs.mkdir(parents=True)
    inputs = [p for folder in ("base", "adapter") for p in (at / folder).iterdir()]
    for i, path in enumerate(inputs):
        blob = blobs / f"{i:064x}"
        path.rename(blob)
        blob.chmod(0o444)
        path.symlink_to(os.path.relpath(blob, path.parent))
    for folder in (blobs, at / "base", at / "adapter"):
        folder.chmod(0o555)
    marks = {p: (p.stat().st_ino, p.stat().st_ctime_ns) for p in blobs.iterdir()}
    result = faults.command(
        "merge", "base", "adapter", "-o", "out", cwd=at, setup=faults.bound_by_permissions()
    )
    for folder in (blobs, at / "base", at / "adapter"):
        folder.chmod(0o755)
    assert result.returncode == 0, result.stderr
    tensors_ = small.base_tensors()
    small.check_merged(at / "out", tensors_, small.adapter_tensors(tensors_))
    assert {p: (p.stat().st_ino, p.stat().st_ctime_ns) for p in blobs.iterdir()} == marks
    assert not any(p.is_symlink() for p in (at / "out").iterdir())


@pytest.mark.parametrize(("mask", "file", "folder"), [(0o077, 0o600, 0o700), (0o027, 0o640, 0o750)])
def test_modes_of_the_output_follow_the_umask(at, mask, file, folder):
    (at / "base" / "sub").mkdir()
    (at / "base" / "sub" / "text.txt").write_text("x")
    for path in (at / "base").iterdir():
        path.chmod(0o777)
    before = os.umask(mask)
    try:
        assert attempt(at) is None
    finally:
        os.umask(before)
    for path in (at / "out", *(at / "out").rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) == (folder if path.is_dir() else file), path


def test_hard_linked_and_mapped_inputs_are_never_written_to(at):
    """What is linked into a backup or mapped by another process is the same afterwards."""
    (at / "backup").mkdir()
    paths = [p for folder in ("base", "adapter") for p in (at / folder).iterdir()]
    for i, path in enumerate(paths):
        os.link(path, at / "backup" / str(i))
    before = {p: (p.stat().st_ino, p.stat().st_mtime_ns, p.stat().st_ctime_ns, p.stat().st_nlink)
              for p in paths}  # fmt: skip
    model = at / "base" / "model.safetensors"
    with model.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        held = bytes(mapped)
        for options in ({}, {"force": True}, {"force": True, "dtype": "fp32"}):
            dora_export.merge(at / "base", at / "adapter", at / "out", **options)
        assert bytes(mapped) == held == model.read_bytes()
    after = {p: (p.stat().st_ino, p.stat().st_mtime_ns, p.stat().st_ctime_ns, p.stat().st_nlink)
             for p in paths}  # fmt: skip
    assert after == before
    inodes = {p.stat().st_ino for p in paths}
    assert not inodes & {p.stat().st_ino for p in (at / "out").iterdir()}


# --- limits: open files, threads, memory ---


def test_hundreds_of_shards_need_few_open_files(at):
    base = small.base_tensors()
    base |= {f"model.extra.{i}": base["model.norm.weight"] + i for i in range(300 - len(base))}
    many_shards(at, base, shards=300)
    arguments = ("merge", "many", "adapter", "-o", "out", "--threads", "4")
    result = faults.command(*arguments, cwd=at, limits="ulimit -n 64")
    assert result.returncode == 0, result.stderr
    assert len(list((at / "out").glob("*.safetensors"))) == 300
    small.check_merged(at / "out", base, small.adapter_tensors(small.base_tensors()))


@pytest.mark.parametrize("limit", [6, 7, 9])
def test_too_few_open_files_are_one_clear_refusal_or_enough(at, limit):
    before = small.entries(at)
    result = faults.command(
        "merge", "base", "adapter", "-o", "out", cwd=at, limits=f"ulimit -n {limit}"
    )
    if result.returncode == 0:
        return
    faults.check_refused(result, "Too many open files", "ulimit -n")
    assert {k: v for k, v in small.entries(at).items() if not k.startswith(".out")} == before


def test_too_many_open_files_is_one_clear_refusal(at, monkeypatch):
    def opener(path, *_args, **_options):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), str(path))

    monkeypatch.setattr(tensors, "open", opener, raising=False)
    refusal = attempt(at)
    assert "Too many open files. Raise the limit on open files (ulimit -n)" in refusal


NOBODY = 54321
AS_SOMEBODY = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups",
               "--inh-caps=-all,+dac_read_search,+dac_override",
               "--ambient-caps=-all,+dac_read_search,+dac_override",
               "--bounding-set=-all,+dac_read_search,+dac_override"]  # fmt: skip


@pytest.mark.parametrize(("limit", "threads"), [(1, 1), (2, 4)])
def test_limit_on_threads_is_one_clear_refusal(at, limit, threads):
    if os.geteuid() != 0 or not faults.works(*AS_SOMEBODY, "true"):
        # RLIMIT_NPROC counts what the user runs already, and does not bind root: only root can
        # become a user who runs nothing. The next test injects the failure for everybody.
        pytest.skip("the limit counts all of a user's processes: needs a user with none (root)")
    before = small.entries(at)
    result = faults.command(
        "merge", "base", "adapter", "-o", "out", "--threads", str(threads), cwd=at,
        limits=f"ulimit -u {limit}", setup=AS_SOMEBODY,
    )  # fmt: skip
    faults.check_refused(result, "cannot start thread", "Pass --threads 1, or raise the limits")
    assert {k: v for k, v in small.entries(at).items() if not k.startswith(".out")} == before


@pytest.mark.parametrize("number", range(4))
def test_thread_that_cannot_be_started_stops_those_that_were(at, monkeypatch, number):
    real, started = threading.Thread.start, []

    def start(thread):
        if not thread.name.startswith(("check", "ThreadPoolExecutor")):  # of checks
            if len(started) == number:
                raise RuntimeError("can't start new thread")
            started.append(thread.name)
        real(thread)

    real_copy = worker.Worker.copy

    def slow_copy(*args):
        time.sleep(0.3)
        real_copy(*args)

    monkeypatch.setattr(worker.Worker, "copy", slow_copy)
    monkeypatch.setattr(threading.Thread, "start", start)
    refusal = attempt(at, threads=3)
    assert f"cannot start thread '{['sync', 'merge-0', 'merge-1', 'merge-2'][number]}'" in refusal
    assert "Pass --threads 1" in refusal


def test_thread_of_a_check_that_cannot_be_started_is_one_clear_refusal(at, monkeypatch):
    real = threading.Thread.start

    def start(thread):
        if thread.name.startswith("ThreadPoolExecutor"):
            raise RuntimeError("can't start new thread")
        real(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    assert "cannot start thread 'check'" in attempt(at, threads=3)


@pytest.mark.parametrize(
    "megabytes",
    [48, 260, 400, *(pytest.param(n, marks=pytest.mark.nightly) for n in (120, 200, 320, 480))],
)
def test_too_little_address_space_is_one_clear_refusal(at, megabytes):
    """Some of these are too little for Python's libraries, some for the buffers of the run."""
    before = small.entries(at)
    result = faults.command(
        "merge", "base", "adapter", "-o", "out", "--threads", "2", cwd=at,
        limits=f"ulimit -v {megabytes * 1024}",
    )  # fmt: skip
    faults.check_refused(result, "MB of address space", "Raise the limit (ulimit -v)")
    assert small.entries(at) == before
    enough = faults.command(
        "merge", "base", "adapter", "-o", "out", "--threads", "1", "--block", "65536", cwd=at,
        limits=f"ulimit -v {700 * 1024}",
    )  # fmt: skip
    assert enough.returncode == 0, enough.stderr


MEMORY = [
    (worker.Worker, "load"),
    (worker.Worker, "merge"),
    (worker.Worker, "copy"),
    (engine.Engine, "run"),
    (side_files, "write"),
    (api, "check"),
    (api, "check_adapter"),
]


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("where", "name"), MEMORY, ids=lambda x: getattr(x, "__name__", x))
def test_memory_that_runs_out_is_told_with_the_bound(at, monkeypatch, where, name, threads):
    report = dora_export.merge(at / "base", at / "adapter", at / "dry", threads=threads,
                               dry_run=True)  # fmt: skip
    monkeypatch.setattr(where, name, raiser(MemoryError()))
    refusal = attempt(at, threads=threads)
    assert f"buffers take up to {report.memory_bytes / 1e6:.0f} MB" in refusal
    assert "Pass --threads 1, a smaller --block" in refusal


@pytest.mark.parametrize("name", ["read_adapters", "open_checkpoint", "plan_merge"])
def test_memory_that_runs_out_before_there_is_a_plan_is_told(at, monkeypatch, name):
    monkeypatch.setattr(api, name, raiser(MemoryError()))
    assert "out of memory: the system gives no more. Close other programs" in attempt(at)


# --- workers ---


def test_first_fault_wins_and_the_others_stop(at, monkeypatch):
    ready, seen = threading.Barrier(3), []

    def merge(self, piece, changes):
        seen.append(piece)
        position = ready.wait(10)
        time.sleep(0.05 * position)
        raise OutputError(f"fault {position}: of a worker. Look at it.")

    monkeypatch.setattr(worker.Worker, "merge", merge)
    assert attempt(at, threads=3).startswith("fault 0: of a worker. Look at it.")
    assert len(seen) == 3  # of four tensors: nobody took the last one


def test_fault_of_one_worker_wakes_those_who_wait_for_its_norms(tmp_path, monkeypatch):
    """Columns' norms need all rows first: workers wait for each other there."""
    from tests.test_engine import write_case

    write_case(tmp_path, layers=1, out=300, inputs=64)
    monkeypatch.setattr(worker.Worker, "column_squares", raiser(disk(errno.EIO)))
    begun, threads = time.monotonic(), set(threading.enumerate())
    with pytest.raises(MachineError, match="Input/output error"):
        dora_export.merge(
            tmp_path / "base", tmp_path / "adapter", tmp_path / "out", threads=4, block_bytes=1
        )
    assert time.monotonic() - begun < 20
    assert set(threading.enumerate()) <= threads


def test_no_thread_and_no_descriptor_is_left_behind(at):
    for threads in (1, 4):
        assert attempt(at, f"out-{threads}", threads=threads) is None


# --- the net below ---


@pytest.mark.parametrize("function", ["merge", "inspect", "load_adapter"])
def test_fault_that_no_module_expects_is_told_all_the_same(at, monkeypatch, function):
    error = OSError(errno.ESTALE, os.strerror(errno.ESTALE), "/mnt/far/file")
    monkeypatch.setattr(api, "locate", raiser(error))
    with pytest.raises(MachineError, match=r"/mnt/far/file: .+\. The network file system has lost"):
        getattr(dora_export, function)(*(at / n for n in ("base", "adapter", "out"))) if (
            function == "merge") else getattr(dora_export, function)(at / "adapter")  # fmt: skip


def test_every_advice_is_a_sentence():
    for code, words in machine.ADVICE.items():
        assert words.endswith("."), code
        error = disk(code)
        assert machine.advice(error) == words
    assert machine.advice(OSError("no number"), "Do this.") == "Do this."


def test_lock_of_the_output_is_let_go_after_a_fault(at, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(staging, "_publish", raiser(OutputError("out: a fault. Look.")))
        assert attempt(at) is not None
    assert attempt(at) is None
