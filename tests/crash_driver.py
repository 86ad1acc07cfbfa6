"""Runs the command line in a process that kills itself at a chosen instant.

    python tests/crash_driver.py '{"step": "after the rename"}' merge BASE ADAPTER -o OUT

The first argument is a JSON object:

step        Name of a step in ``STEPS`` to be killed at.
event       Number of the change to the file system to be killed at, from 1.
when        "before" the event, "half" way through what it writes, or "after" it.
visit       Which time the step is reached, from 1.
swaps       false: pretend that the file system cannot swap two folders.
sync_bytes  Bytes of a file after which it is synced and the journal written.
slow        Seconds that each write of weights takes longer.
count_to    File to write the number of events into when the run has ended.
hold_at     Name of a step to stop at, after making the file ``hold_at``'s ``held``.
held        That file; the run goes on when it is gone.
heard       File to make when SIGINT or SIGTERM has been heard.
"""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

from dora_export import api
from dora_export.cli import main
from dora_export.writers import files, journal, side_files, staging
from dora_export.writers.staging import MARK

PARTIAL, REPLACED = ".dora_export-partial", ".dora_export-replaced"
PAGE = 4096
TRACKED = ("mkdir", "open", "write", "pwrite", "copy_file_range", "ftruncate", "fsync", "rename",
           "unlink", "rmdir")  # fmt: skip


def die():
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)  # the signal is on its way


class Hooks:
    """Calls something before or after functions of the package or of ``os``, at the n-th visit."""

    def __init__(self, visit, act):
        self.left, self.act = visit, act
        self.lock = threading.Lock()

    def reached(self):
        with self.lock:
            self.left -= 1
            return self.left == 0

    def before(self, where, name, fits=lambda *args: True):
        real = getattr(where, name)

        def call(*args, **options):
            if fits(*args) and self.reached():
                self.act()
            return real(*args, **options)

        setattr(where, name, call)

    def after(self, where, name, fits=lambda *args: True):
        real = getattr(where, name)

        def call(*args, **options):
            result = real(*args, **options)
            if fits(*args) and self.reached():
                self.act()
            return result

        setattr(where, name, call)

    def half(self, name, fits):
        real = getattr(os, name)

        def call(descriptor, data, *rest):
            if fits(descriptor, data, *rest) and self.reached():
                real(descriptor, half(data), *rest)
                self.act()
            return real(descriptor, data, *rest)

        setattr(os, name, call)


def half(data):
    """Half of what is written; whole pages of whole pages, which may go past the page cache."""
    count = len(data) // 2
    return data[: count if len(data) % PAGE else count // PAGE * PAGE]


def named(path, end):
    return str(path).endswith(end)


def is_record(descriptor, data, *_):
    return b'{"done"' in bytes(data[:64])


def is_journal(descriptor):
    return Path(f"/proc/self/fd/{descriptor}").resolve().name == MARK


def is_weights(descriptor):
    return Path(f"/proc/self/fd/{descriptor}").resolve().suffix == ".safetensors"


def to_final(source, target):
    return named(source, PARTIAL)


STEPS = {
    "after the plan": lambda h: h.before(api, "check_adapter"),
    "the staging folder is made": lambda h: h.after(os, "mkdir", lambda p, *_: named(p, PARTIAL)),
    "the journal is empty": lambda h: h.before(journal.Journal, "begin"),
    "the journal's first record is cut off": lambda h: h.half(
        "write", lambda _, data: b'{"identity"' in bytes(data[:64])
    ),
    "a shard is made": lambda h: h.after(files, "_reserve"),
    "in the middle of a shard": lambda h: h.half("pwrite", lambda *_: True),
    "before data is synced": lambda h: h.before(os, "fsync", is_weights),
    "data is synced, the record not written": lambda h: h.before(journal.Journal, "done"),
    "in the middle of a record": lambda h: h.half("write", is_record),
    "a record is written, not synced": lambda h: h.before(os, "fsync", is_journal),
    "the weights are done": lambda h: h.before(side_files, "write"),
    "before the manifest": lambda h: h.before(api.manifest, "as_json"),
    "before the check": lambda h: h.before(api, "check"),
    "before the last syncs": lambda h: h.before(os, "walk", lambda p, *_: named(p, PARTIAL)),
    "before the rename": lambda h: h.before(staging, "_publish"),
    "after the rename": lambda h: h.after(os, "rename", to_final),
    "before the journal goes": lambda h: h.before(staging, "_settle"),
    "the journal is gone": lambda h: h.after(os, "unlink", lambda p, *_: named(p, MARK)),
    # with --force
    "before the swap": lambda h: h.before(staging, "_exchange"),
    "after the swap": lambda h: h.after(staging, "_exchange"),
    "between the two renames": lambda h: h.after(
        os, "rename", lambda source, target: named(target, REPLACED)
    ),
    "while the old output is removed": lambda h: h.after(
        os, "unlink", lambda p, *_: named(Path(p).parent, (PARTIAL, REPLACED))
    ),
    "the old output is gone": lambda h: h.after(
        os, "rmdir", lambda p, *_: named(p, (PARTIAL, REPLACED))
    ),
    # of a run that goes on with another's work
    "the journal is put right": lambda h: h.after(staging, "_taken_over"),
}


def kill_at_event(number, when):
    """Count changes to the file system, and die at one of them."""
    seen, lock = [0], threading.Lock()

    def track(name):
        real = getattr(os, name)

        def call(*args, **options):
            if name == "open" and not args[1] & os.O_CREAT:
                return real(*args, **options)
            with lock:
                seen[0] += 1
                mine = seen[0] == number
            if mine and when == "before":
                die()
            if mine and when == "half" and name in ("write", "pwrite"):
                real(args[0], half(args[1]), *args[2:])
                die()
            result = real(*args, **options)
            if mine:
                die()
            return result

        setattr(os, name, call)

    for name in TRACKED:
        track(name)
    return seen


def run(plan, words):
    files.SYNC_BYTES = plan.get("sync_bytes", files.SYNC_BYTES)
    if not plan.get("swaps", True):
        staging._exchange = lambda *_: False
    if delay := plan.get("slow"):
        real = os.pwrite

        def pwrite(*args):
            time.sleep(delay)
            return real(*args)

        os.pwrite = pwrite
    if "heard" in plan:
        tell_when_interrupted(Path(plan["heard"]))
    if "hold_at" in plan:
        STEPS[plan["hold_at"]](Hooks(plan.get("visit", 1), lambda: hold(Path(plan["held"]))))
    if "step" in plan:
        STEPS[plan["step"]](Hooks(plan.get("visit", 1), die))
    seen = kill_at_event(plan.get("event", 0), plan.get("when"))
    sys.argv[1:] = words
    print("ready", flush=True)
    try:
        main()
    finally:
        if "count_to" in plan:
            Path(plan["count_to"]).write_text(str(seen[0]))


def tell_when_interrupted(heard):
    real = signal.default_int_handler

    def handler(number, frame):
        heard.touch()
        real(number, frame)

    signal.default_int_handler = handler  # which the command line takes for SIGTERM
    signal.signal(signal.SIGINT, handler)


def hold(held):
    held.touch()
    while held.exists():
        time.sleep(0.01)


if __name__ == "__main__":
    run(json.loads(sys.argv[1]), sys.argv[2:])
