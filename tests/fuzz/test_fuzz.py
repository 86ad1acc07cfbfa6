"""A fixed, bounded part of the fuzzing, and the watch itself: it must see what it watches for."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from dora_export.errors import InputError, VerifyError
from tests.fuzz import guard
from tests.fuzz.guard import problem
from tests.fuzz.run import Tally, made, prepare, run, seeds_of
from tests.fuzz.targets import TARGETS

COUNTS = {"header": 60, "index": 60, "graph": 40, "verify": 12, "merge": 15, "resume": 10,
          "image merges": 8, "several": 8, "experts": 8, "into": 15, "adapters": 8, "convert": 20,
          "methods": 60, "side files": 6, "verify others": 6, "verify graph": 10, "forward": 10,
          "trace": 6, "trace others": 6}  # fmt: skip
# To import, to make, or to run.
SLOW = ("methods", "session", "trainers' merges", "riders", "into exported", "adapters exported",
        "verify graph", "forward", "trace", "trace others")  # fmt: skip
NAMES = [pytest.param(n, marks=[pytest.mark.nightly] * (n in SLOW)) for n in TARGETS]


@pytest.mark.filterwarnings("ignore")  # what torch says of damaged pickles
@pytest.mark.parametrize("name", NAMES)
def test_reader_returns_or_refuses_whatever_it_is_fed(name):
    tally = Tally()
    run(name, range(COUNTS.get(name, 30)), tally)
    assert tally.broke == {}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name", [n for n in NAMES if n.values != ("convert",)]
)  # one format of many fits
def test_seeds_are_read_to_the_end(name, tmp_path):
    """Or what is fed would all be refused for the same reason, and early."""
    target = TARGETS[name]
    prepare(target)
    with seeds_of(target) as seeds:
        for number, seed in enumerate(seeds):
            assert ended(target, shutil.copytree(seed, tmp_path / str(number))), f"{seed}: refused"


def ended(target, folder):
    """Whether a target reads a case without a refusal."""
    results = []
    assert problem(lambda: results.append(target.run(folder)), folder, target.writable) is None
    return bool(results)


def is_small(path):
    return path.is_file() and path.stat().st_size < 1 << 20


def test_cases_are_the_same_every_time_and_are_damaged(tmp_path):
    target = TARGETS["peft"]
    changed = 0
    for number in range(20):
        for place in ("a", "b"):
            made(target, target.seeds[:1], number, tmp_path / f"{place}{number}")
        one, other = (tmp_path / f"{place}{number}" for place in ("a", "b"))
        contents = [
            {p.relative_to(f): p.read_bytes() for p in f.rglob("*") if is_small(p)}
            for f in (one, other)
        ]
        assert contents[0] == contents[1]
        seed = target.seeds[0]
        kept = {p.relative_to(seed): p.read_bytes() for p in seed.rglob("*") if p.is_file()}
        changed += any(contents[0].get(name) != data for name, data in kept.items())
    assert changed >= 18


class RawError(InputError):
    """An error whose message skips the escaping of its base class."""

    def __str__(self):
        return "a\x1b[5m"


def refused_raw(_):
    raise RawError("a")


def written_wrong(_):
    raise VerifyError("the output is not what was planned")


BAD = {
    "wrong: the output": written_wrong,
    "ValueError": lambda at: int("x"),
    "unprintable": refused_raw,
    "hang": lambda at: time.sleep(9),
    "hang: computing": lambda at: computing(9),
    "memory": lambda at: taken_at_once(),
    "outside: open": lambda at: (at.parent / "x").write_text(""),
    "outside: os.mkdir": lambda at: (at / "other").mkdir(),
    "outside: os.remove": lambda at: (at / "kept").unlink(),
    "outside: shutil.rmtree": lambda at: shutil.rmtree(at / "folder"),
    "outside: os.rmdir": lambda at: os.rmdir("inner", dir_fd=os.open(at / "folder", os.O_RDONLY)),
    "outside: os.symlink": lambda at: (at / "x").symlink_to("out"),
    "outside: os.rename": lambda at: (at / "kept").rename(at / "out" / "kept"),
    "outside: read": lambda at: (at / "link to secret").read_bytes(),
    "outside: os.system": lambda at: os.system("true"),
    "outside: subprocess.Popen": lambda at: subprocess.run(["true"], check=False),
}


def computing(seconds):
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


TOO_MUCH = guard.MEMORY + (100 << 20)


def taken_at_once(nbytes=TOO_MUCH):
    return np.empty(nbytes, np.uint8)


def taken_in_blocks(nbytes=TOO_MUCH):
    """As torch and numpy do; the C library keeps what is below a later block."""
    return [np.empty(1 << 20, np.uint8) for _ in range(nbytes >> 20)]


def taken_and_refused():
    try:
        return taken_in_blocks()
    except MemoryError as error:
        raise InputError("a.json: too large.") from error


LARGER = 450 << 20


def test_watch_sees_memory_after_a_peak_and_where_that_is_not_reset(tmp_path):
    """In a process of its own: the C library keeps what the threads of other tests have freed."""
    lines = "import sys; from tests.fuzz import test_fuzz; test_fuzz.watch_memory(sys.argv[1])"
    result = subprocess.run(
        [sys.executable, "-c", lines, tmp_path], cwd=Path(__file__).parents[2],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr


def watch_memory(folder):
    for reset, take in (
        ("works", taken_at_once),
        ("does nothing", taken_in_blocks),
        ("is denied", taken_and_refused),
    ):
        with pytest.MonkeyPatch.context() as patched:
            watch_memory_where(reset, take, Path(folder), patched)


def watch_memory_where(reset, take, folder, patched):
    write = Path.write_text

    def written(path, text):
        if path != Path("/proc/self/clear_refs"):
            return write(path, text)
        if reset == "is denied":
            raise PermissionError(13, "Permission denied")
        return len(text)

    if reset != "works":
        patched.setattr(Path, "write_text", written)
    taken_at_once(LARGER).fill(1)
    check_seen(take, folder)
    blocks, above = taken_in_blocks(LARGER), np.empty(1 << 20, np.uint8)
    del blocks  # which the C library keeps, being below ``above``
    check_seen(take, folder)
    del above


def check_seen(take, folder):
    found = problem(take, folder)
    assert found is not None
    assert found.startswith("memory: "), found
    assert problem(lambda: taken_at_once(guard.MEMORY - (80 << 20)), folder) is None


def test_watch_sees_mapped_files_where_the_peak_is_reset(tmp_path):
    if guard._reset_peak() is None:
        # Mapped pages count as no data, so RLIMIT_DATA cannot see them: only a peak that counts
        # from the call on can, and this system has none. What is allocated is watched all the same.
        pytest.skip("this kernel does not reset VmHWM")
    with (tmp_path / "hole").open("w+b") as file:
        file.truncate(TOO_MUCH)
        mapped = np.memmap(file, np.uint8, "r")
        found = problem(lambda: mapped[:: guard.resource.getpagesize()].sum(), tmp_path)
    assert found is not None
    seen = re.match(r"memory: (\d+) MB", found)
    assert seen is not None, found
    # The kernel counts what is resident per processor and adds it up late, and the process may
    # have let go of some pages between the reset and the peak.
    assert int(seen[1]) == pytest.approx(TOO_MUCH >> 20, rel=0.02)


@pytest.mark.parametrize("kind", BAD)
def test_watch_sees_what_must_not_happen(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(guard, "TICK", 0.1)
    monkeypatch.setattr(guard, "SECONDS", 0.5 if kind == "hang: computing" else 60.0)
    monkeypatch.setattr(guard, "TICKS", 5 if kind == "hang" else 1000)
    at = tmp_path / "case"
    (at / "out").mkdir(parents=True)
    (at / "folder/inner").mkdir(parents=True)
    for name in ("secret", "kept"):
        (at / name).write_text("x")
    (at / "link to secret").symlink_to("secret")
    found = problem(lambda: BAD[kind](at), at, ("out",))
    assert found is not None
    assert found.startswith(kind.partition(": comp")[0]), found


def test_watch_takes_no_stopped_process_for_one_that_hangs(tmp_path):
    """In a process of its own, which is stopped for five times as long as it may wait."""
    lines = (
        "import os, pathlib, signal, sys\n"
        "from tests.fuzz import guard\n"
        "guard.TICK, guard.TICKS = 0.02, 10\n"
        "stop = lambda: os.kill(os.getpid(), signal.SIGSTOP)\n"
        "sys.exit(guard.problem(stop, pathlib.Path(sys.argv[1])))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", lines, tmp_path], cwd=Path(__file__).parents[2]
    )
    _, status = os.waitpid(process.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status)
    time.sleep(1)
    process.send_signal(signal.SIGCONT)
    assert process.wait(60) == 0


def test_watch_lets_pass_what_may_happen(tmp_path):
    (tmp_path / "out").mkdir()

    def work():
        (tmp_path / "out" / "x").write_text("")
        (tmp_path / "out" / "x").rename(tmp_path / "out" / "y")
        (tmp_path / "out" / "folder/inner").mkdir(parents=True)
        (tmp_path / "out" / "folder/x").write_text("")
        shutil.rmtree(tmp_path / "out" / "folder")
        subprocess.run([sys.executable, "-I", "-S", "-c", ""], check=True)
        raise InputError("a.json: not JSON. Download it again.")

    assert problem(work, tmp_path, ("out",)) is None
