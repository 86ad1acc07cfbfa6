"""Interrupted merges: what is said, what is kept, what goes on, and what is refused."""

import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import dora_export
from dora_export.errors import OutputError
from dora_export.writers.files import FileSink
from dora_export.writers.journal import Journal
from tests import small
from tests.test_crash import MARK, PARTIAL, Kill, Place

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="signals as Linux sends them")
ROOT = Path(__file__).parents[1]
MIDDLE = {"hold_at": "data is synced, the record not written", "visit": 5}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return Place(tmp_path_factory.mktemp("place"))


def held(kill, plan, *options):
    """A run that stands still at a step; returns the process and the file that holds it."""
    file = kill.folder.parent / "held"
    process = kill.start(plan | {"held": str(file)}, *options)
    wait_for(file, process)
    return process, file


def wait_for(file, process):
    end = time.monotonic() + 60
    while not file.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "it never came so far"
        time.sleep(0.01)


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_signal_keeps_the_work_and_says_how_to_go_on(place, tmp_path, sent):
    kill = Kill(place, tmp_path / "x")
    heard = tmp_path / "heard"
    plan = MIDDLE | {"heard": str(heard)}
    process, file = held(kill, plan, "--threads", 1, "--block", 100_000)
    process.send_signal(sent)
    wait_for(heard, process)
    file.unlink()
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    lines = said.splitlines()
    assert "interrupted; nothing was published." in lines
    assert any("of staged work are kept in" in line and "goes on from there" in line
               for line in lines)  # fmt: skip
    kill.check_left()
    command = shlex.split(lines[-1])
    assert "merge" in command
    assert "--block" in command
    words = command[command.index("merge") :]  # the driver is no command of a user's
    done = subprocess.run([sys.executable, "-m", "dora_export", *words], cwd=ROOT, check=False,
                          capture_output=True, text=True, timeout=60)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "were already there" in done.stdout
    kill.check_finished()


def test_second_process_on_the_same_output_is_refused_and_the_first_ends_well(place, tmp_path):
    kill = Kill(place, tmp_path / "x")
    process, file = held(kill, MIDDLE)
    second = kill.start({})
    _, said = second.communicate(timeout=60)
    assert second.returncode == 2
    assert "another run is writing this output. Wait, or pass another -o" in said
    with pytest.raises(OutputError, match="another run is writing this output"):
        place.merge(kill.out, restart=True)
    file.unlink()
    assert process.communicate(timeout=60)[0] is not None
    assert process.returncode == 0
    kill.check_finished()


def interrupted(place, tmp_path):
    kill = Kill(place, tmp_path / "x")
    assert kill.die({"step": "before the last syncs"})
    return kill


CHANGES = {
    "an option": ({"strength": 0.5}, r"--strength: 1\.0 → 0\.5"),
    "the type": ({"dtype": "fp32"}, "--dtype: not given → F32"),
    "the shards": ({"max_shard_size": "3MB"}, "--max-shard-size: 2000000 → 3000000"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_options_are_named_and_refused_unless_it_starts_over(place, tmp_path, change):
    kill = interrupted(place, tmp_path)
    options, said = CHANGES[change]
    before = small.entries(kill.folder)
    paths = place.folder / "base", place.folder / "adapter", kill.out
    options = {"max_shard_size": "2MB", **options}
    with pytest.raises(OutputError, match=f"(?s){said}.*pass --restart to drop it"):
        dora_export.merge(*paths, **options)
    assert small.entries(kill.folder) == before
    assert dora_export.merge(*paths, restart=True, **options).resumed_bytes == 0
    assert not (kill.folder / PARTIAL).exists()


@pytest.mark.parametrize("name", ["base/model.safetensors", "adapter/adapter_model.safetensors"])
def test_other_inputs_are_named_and_refused(tmp_path, name):
    place = Place(tmp_path / "place")
    kill = interrupted(place, tmp_path)
    source = place.folder / name
    if not source.exists():
        source = sorted((place.folder / "base").glob("*.safetensors"))[0]
    small.edit_tensors(source, lambda tensors: {n: t * 1.5 for n, t in tensors.items()})
    what = "base" if "base" in str(source.relative_to(place.folder)) else "adapter"
    with pytest.raises(OutputError, match=f"{what} {source.name}: .* → .*"):
        place.merge(kill.out)


def test_journal_names_bytes_only_after_they_are_on_the_disk(tmp_path, monkeypatch):
    """Every write, sync and record of weights in order: no record is ahead of its bytes' sync."""
    small.write_pair(tmp_path)
    events, fsync, done, put = [], os.fsync, Journal.done, FileSink._put

    def on_fsync(descriptor):
        name = os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)
        if threading.current_thread().name == "sync":  # the others' are about side files
            events.append(("synced", name))

    def on_done(journal, ranges):
        events.append(("recorded", sorted(ranges)))
        done(journal, ranges)

    def on_put(sink, file, offset, view):
        put(sink, file, offset, view)
        events.append(("written", sink._files[file].path.name))

    monkeypatch.setattr(os, "fsync", on_fsync)
    monkeypatch.setattr(Journal, "done", on_done)
    monkeypatch.setattr(FileSink, "_put", on_put)
    paths = tmp_path / "base", tmp_path / "adapter", tmp_path / "out"
    dora_export.merge(*paths, threads=1, block_bytes=1)
    records = [i for i, (kind, _) in enumerate(events) if kind == "recorded"]
    assert records
    for at in records:
        for name in events[at][1]:
            assert ("synced", name) in events[:at], "recorded before it was synced"
        # The file's and the folder's sync come before the record, the journal's own after it.
        assert next(e for e in events[at:] if e[0] == "synced") == ("synced", MARK)
        assert any(kind == "synced" and name == PARTIAL for kind, name in events[:at])
    final = [i for i, event in enumerate(events) if event == ("written", "model.safetensors")][-1]
    assert any(event == ("synced", "model.safetensors") for event in events[final:])
