"""Killed at any instant: the output is absent or whole, and the next run ends it, bit for bit.

Real processes (``crash_driver.py``) that kill themselves with SIGKILL at every named step, at
numbered changes to the file system, or are killed after a random time. The nightly test does it
some hundred times (``make crash``).
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

import dora_export
from dora_export.writers.staging import MANIFEST, MARK
from tests import small
from tests.crash_driver import STEPS
from tests.test_engine import write_case

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="kills as Linux does")

DRIVER = Path(__file__).with_name("crash_driver.py")
PARTIAL, REPLACED = ".out.dora_export-partial", ".out.dora_export-replaced"
SHARD = "2MB"
SYNC_BYTES = 400_000
NIGHTLY_KILLS = 280


class Place:
    """A base, an adapter, and what an undisturbed merge makes of them."""

    def __init__(self, folder):
        self.folder = folder
        write_case(folder, layers=2, out=1100, inputs=700)
        self.old = self.merged("old", strength=0.5)
        self.new = self.merged("new")
        assert self.old.keys() == self.new.keys()
        assert sum(name.endswith(".safetensors") for name in self.new) >= 4
        self.inputs = self.entries_of_inputs()

    def entries_of_inputs(self):
        return small.entries(self.folder / "base") | small.entries(self.folder / "adapter")

    def merge(self, out, **options):
        paths = self.folder / "base", self.folder / "adapter"
        return dora_export.merge(*paths, out, max_shard_size=SHARD, **options)

    def merged(self, name, **options):
        self.merge(self.folder / name, **options)
        return small.entries(self.folder / name)

    def words(self, out, *options):
        return ["merge", self.folder / "base", self.folder / "adapter", "-o", out,
                "--max-shard-size", SHARD, *options]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return Place(tmp_path_factory.mktemp("place"))


class Kill:
    """One output folder, with strangers beside it, and runs that are killed while writing it."""

    def __init__(self, place, folder, *, force=False):
        self.place, self.folder, self.out = place, folder, folder / "out"
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("out.txt", ".out", "out.dora_export-partial/model.safetensors"):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(f"{name} is somebody's")
        self.strangers = small.entries(folder)
        self.force = ["--force"] * force
        if force:
            shutil.copytree(place.folder / "old", self.out)

    def start(self, plan, *options):
        plan = {"sync_bytes": SYNC_BYTES, **plan}
        words = self.place.words(self.out, *self.force, *options)
        return subprocess.Popen(
            [sys.executable, "-B", DRIVER, json.dumps(plan), *map(str, words)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            cwd=DRIVER.parent.parent, env={**os.environ, "PYTHONPATH": str(DRIVER.parent.parent)},
        )  # fmt: skip

    def die(self, plan, *options, after=None):
        """Run until the process is killed, and check what it has left. Return whether it was."""
        process = self.start(plan, *options)
        if after is not None:
            assert process.stdout.readline() == "ready\n"
            time.sleep(after)
            process.kill()
        out, err = process.communicate(timeout=120)
        self.check_left(swaps=plan.get("swaps", True))
        assert process.returncode in (0, -signal.SIGKILL), (plan, out, err)
        return process.returncode != 0

    def check_left(self, *, swaps=True):
        """The output is absent or whole: the new one, or with --force the old one."""
        found = small.entries(self.folder)
        left = {k: v for k, v in found.items() if k.split("/")[0] not in ("out", PARTIAL, REPLACED)}
        assert left == self.strangers
        inside = small.entries(self.out)
        inside.pop(MARK, None)
        if self.out.exists():
            assert inside in ([self.place.old] if self.force else []) + [self.place.new]
        elif self.force:
            assert not swaps
            assert small.entries(self.folder / REPLACED) == self.place.old

    def midway(self):
        """Whether weights were being written: some are there, and not all of them are done."""
        partial = self.folder / PARTIAL
        return any(partial.glob("*.safetensors")) and not (partial / MANIFEST).exists()

    def finish(self, **options):
        """Run it again, undisturbed; return the report."""
        again = (self.folder / PARTIAL).exists()  # it was replacing what was as new already
        if self.force and not (self.out / MARK).exists() and (again or not self.is_new()):
            options["force"] = True
        report = self.place.merge(self.out, **options)
        self.check_finished()
        return report

    def is_new(self):
        return self.out.exists() and small.entries(self.out) == self.place.new

    def check_finished(self):
        found = small.entries(self.folder)
        assert small.entries(self.out) == self.place.new
        rest = {k: v for k, v in found.items() if k.split("/")[0] != "out"}
        assert rest == self.strangers
        assert self.place.entries_of_inputs() == self.place.inputs


# Steps of a run in its middle, and which time they are reached, so that there is work to keep.
MIDDLE = {
    "in the middle of a shard": 20,
    "before data is synced": 5,
    "data is synced, the record not written": 5,
    "in the middle of a record": 5,
    "a record is written, not synced": 5,
}
# Steps while the last weights are on their way to the disk, and steps after that.
SYNCING = ("the weights are done", "before the manifest", "before the check")
WEIGHTS_DONE = ("before the last syncs", "before the rename", "after the rename",
                "before the journal goes")  # fmt: skip
# Steps of a run that replaces, and whether it swaps folders.
FORCED = [
    ("before the swap", True),
    ("after the swap", True),
    ("between the two renames", False),
    *(("while the old output is removed", swaps) for swaps in (True, False)),
    *(("the old output is gone", swaps) for swaps in (True, False)),
]
RESUMED = ("the journal is put right",)


@pytest.mark.parametrize("step", [s for s in STEPS if s not in (*dict(FORCED), *RESUMED)])
def test_killed_at_a_step_the_output_is_absent_or_whole_and_the_next_run_ends_it(
    place, tmp_path, step
):
    kill = Kill(place, tmp_path)
    plan = {"step": step, "visit": MIDDLE.get(step, 1), "slow": 0.002}
    assert kill.die(plan, "--threads", 2, "--block", 100_000), "the step was never reached"
    if step == "the journal is gone":
        kill.check_finished()
        return
    report = kill.finish(threads=3, block_bytes=200_000)
    if step in MIDDLE:
        assert 0 < report.resumed_bytes < report.weight_bytes
    elif step not in SYNCING:  # how many of those are in is the disk's affair
        assert report.resumed_bytes == (report.weight_bytes if step in WEIGHTS_DONE else 0)


@pytest.mark.parametrize(
    "step", ["in the middle of a shard", "before the check", "after the rename"]
)
def test_killed_without_sync_the_output_is_absent_or_whole_and_nothing_is_gone_on_with(
    place, tmp_path, step
):
    kill = Kill(place, tmp_path)
    plan = {"step": step, "visit": MIDDLE.get(step, 1)}
    assert kill.die(plan, "--no-sync", "--threads", 2, "--block", 100_000)
    report = kill.finish()
    assert report.resumed_bytes == (report.weight_bytes if step == "after the rename" else 0)


@pytest.mark.parametrize(("step", "swaps"), FORCED)
def test_killed_while_it_replaces_the_old_output_or_the_new_one_is_there(
    place, tmp_path, step, swaps
):
    kill = Kill(place, tmp_path, force=True)
    assert kill.die({"step": step, "swaps": swaps}), "the step was never reached"
    report = kill.finish()
    assert report.resumed_bytes == report.weight_bytes


def test_killed_again_and_again_at_numbered_events_it_gets_there(place, tmp_path):
    """Each run goes on from where the one before was killed, with other threads and blocks."""
    chance = random.Random(7)
    kill = Kill(place, tmp_path)
    killed = 0
    for number in (12, 18, 25, 31, 40):
        threads, block = chance.choice([1, 2, 5]), chance.choice([100_000, 700_000, 4_000_000])
        plan = {"event": number, "when": chance.choice(["before", "half", "after"])}
        killed += kill.die(plan, "--threads", threads, "--block", block)
        if kill.is_new():
            break
    assert killed >= 3
    if not kill.is_new():
        # How much that is depends on the disk: what is synced in time is in the journal.
        before = resumable_bytes(kill)
        assert kill.finish(threads=1).resumed_bytes == before


def test_killed_while_it_takes_over_it_still_has_what_was_there(place, tmp_path):
    kill = Kill(place, tmp_path)
    assert kill.die({"step": "in the middle of a record", "visit": 4})
    before = resumable_bytes(kill)
    assert kill.die({"step": "the journal is put right"})
    assert resumable_bytes(kill) == before > 0
    assert kill.finish().resumed_bytes == before


def resumable_bytes(kill):
    return kill.place.merge(kill.out, dry_run=True).resumed_bytes


@pytest.mark.nightly
def test_many_kills(place, tmp_path):
    """Kills at random events and instants, into new, resumed and replacing runs."""
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"\nseed {seed}")
    tally, failures = Counter(), []
    chance = random.Random(seed)
    count = Kill(place, tmp_path / "count")
    counted = tmp_path / "events"
    started = time.monotonic()
    assert not count.die({"count_to": str(counted)})
    seconds = time.monotonic() - started
    events = int(counted.read_text())
    for number in range(NIGHTLY_KILLS):
        kill = Kill(place, tmp_path / str(number), force=chance.random() < 0.25)
        try:
            one_kill(kill, chance, tally, events, seconds)
        except AssertionError as error:
            failures.append(f"kill {number} of seed {seed}: {error}")
        shutil.rmtree(kill.folder)
    print(f"kills tried {tally['tried']}, survived {tally['tried'] - len(failures)}, "
          f"landed mid-write {tally['mid-write']}, resumed {tally['resumed']}, "
          f"while replacing {tally['replacing']}, twice in a row {tally['twice']}; "
          f"{events} changes to the file system in an undisturbed run")  # fmt: skip
    assert failures == []
    assert tally["tried"] >= 200
    assert tally["mid-write"] >= tally["tried"] / 3
    assert tally["resumed"] >= tally["tried"] / 4


def one_kill(kill, chance, tally, events, seconds):
    options = ["--threads", chance.choice([1, 2, 4]), "--block", chance.choice([10**5, 10**6])]
    plan = {"swaps": chance.random() < 0.7}
    times = chance.choice([1, 1, 2])
    for again in range(times):
        after = None
        if chance.random() < 0.5:
            plan |= {"event": chance.randrange(1, events + 1)}
            plan |= {"when": chance.choice(["before", "half", "after"])}
        else:
            plan |= {"event": 0, "slow": 0.01}
            after = chance.uniform(0, seconds)
        killed = kill.die(plan, *options, after=after)
        if not killed:
            break
        tally["tried"] += 1
        tally["mid-write"] += kill.midway()
        tally["replacing"] += bool(kill.force)
        tally["twice"] += again > 0
        if kill.is_new() and not kill.force:
            break  # killed when all was done: there is nothing left to start, or to kill
    # Killed while it replaced what was as new already, it has work of its own left beside it.
    left = (kill.out / MARK).exists() or (kill.folder / PARTIAL).exists()
    if left or not kill.is_new():
        report = kill.finish(threads=chance.choice([1, 3]), block_bytes=chance.choice([None, 1]))
        tally["resumed"] += report.resumed_bytes > 0
    kill.check_finished()
