"""A fixed, bounded part of the fuzzing, and the watch itself: it must see what it watches for."""

import os
import subprocess
import sys
import time

import pytest

from dora_export.errors import InputError
from tests.fuzz import guard
from tests.fuzz.guard import problem
from tests.fuzz.run import Tally, made, run
from tests.fuzz.targets import TARGETS

COUNTS = {"header": 120, "index": 120, "graph": 80, "checkpoint": 60, "verify": 25, "merge": 30,
          "resume": 20}  # fmt: skip


@pytest.mark.filterwarnings("ignore")  # what torch says of damaged pickles
@pytest.mark.parametrize("name", TARGETS)
def test_reader_returns_or_refuses_whatever_it_is_fed(name):
    tally = Tally()
    run(name, range(COUNTS.get(name, 50)), tally)
    assert tally.broke == {}


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


BAD = {
    "ValueError": lambda at: int("x"),
    "unprintable": lambda at: (_ for _ in ()).throw(InputError("a\x1b[5m")).send(None),
    "hang": lambda at: time.sleep(9),
    "memory": lambda at: len(b"x" * (guard.MEMORY + (50 << 20))),
    "outside: open": lambda at: (at.parent / "x").write_text(""),
    "outside: os.mkdir": lambda at: (at / "other").mkdir(),
    "outside: os.remove": lambda at: (at / "kept").unlink(),
    "outside: os.rename": lambda at: (at / "kept").rename(at / "out" / "kept"),
    "outside: read": lambda at: (at / "link to secret").read_bytes(),
    "outside: os.system": lambda at: os.system("true"),
    "outside: subprocess.Popen": lambda at: subprocess.run(["true"], check=False),
}


@pytest.mark.parametrize("kind", BAD)
def test_watch_sees_what_must_not_happen(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(guard, "SECONDS", 0.5 if kind == "hang" else 60.0)
    at = tmp_path / "case"
    (at / "out").mkdir(parents=True)
    for name in ("secret", "kept"):
        (at / name).write_text("x")
    (at / "link to secret").symlink_to("secret")
    found = problem(lambda: BAD[kind](at), at, ("out",))
    assert found is not None
    assert found.startswith(kind), found


def test_watch_lets_pass_what_may_happen(tmp_path):
    (tmp_path / "out").mkdir()

    def work():
        (tmp_path / "out" / "x").write_text("")
        (tmp_path / "out" / "x").rename(tmp_path / "out" / "y")
        subprocess.run([sys.executable, "-I", "-S", "-c", ""], check=True)
        raise InputError("a.json: not JSON. Download it again.")

    assert problem(work, tmp_path, ("out",)) is None
