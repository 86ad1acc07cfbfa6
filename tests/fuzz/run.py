"""Makes a case of a seed and a number, runs it, and keeps what broke."""

import importlib
import os
import shutil
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from tests.fuzz.guard import problem
from tests.fuzz.mutate import mutated
from tests.fuzz.targets import TARGETS

MOST = 2 << 20  # bytes of a file that are changed; a hole has more
SECRET = b"never read, never written"


def prepare(target):
    """Import what a target needs."""
    if target.needs is not None:
        importlib.import_module(target.needs)


@contextmanager
def seeds_of(target):
    """Yield the folders that a target starts from."""
    with tempfile.TemporaryDirectory() as folder:
        made = tuple(Path(folder, str(number)) for number in range(len(target.make)))
        for make, place in zip(target.make, made, strict=True):
            place.mkdir()
            make(place)
        yield target.seeds + made


def made(target, seeds, number, folder):
    """Make the case of this number in a new folder: always the same one."""
    random = Random(number)
    seed = seeds[random.randrange(len(seeds))]
    shutil.copytree(seed, folder)
    (folder / "secret").write_bytes(SECRET)
    roots = [folder / part for part in target.parts] or [folder]
    files = sorted(f for root in roots for f in ([root] if root.is_file() else root.rglob("*"))
                   if f.is_file() and f.name != "secret")  # fmt: skip
    for _ in range(random.choice([1, 1, 1, 1, 2, 3])):
        change(folder, random.choice(files), files, random)


def change(folder, file, files, random):
    """Change a file's content; seldom put something else in its place."""
    how = random.randrange(60)
    if not file.is_file() or file.is_symlink() or how > 5:
        if file.is_file() and not file.is_symlink() and file.stat().st_size <= MOST:
            status = file.stat()
            file.write_bytes(mutated(file.name, file.read_bytes(), random))
            os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
        return
    file.unlink()
    if how == 0:
        file.symlink_to(os.path.relpath(folder / "secret", file.parent))
    elif how == 1:
        file.mkdir()
    elif how == 2:
        os.mkfifo(file)
    elif how == 3:
        other = random.choice(files)
        if other.is_file() and not other.is_symlink():
            shutil.copy(other, file)
    elif how == 4:
        with file.open("wb") as opened:
            opened.truncate(random.choice([0, 7, 1 << 20, 1 << 33]))  # a hole


@dataclass
class Tally:
    """What a run did.

    Attributes:
        tried: Cases by target.
        broke: Signature -> the first case with it, as (target, number, what).
        seconds: Of computing, of the slowest case.
    """

    tried: dict[str, int] = field(default_factory=dict)
    broke: dict[str, tuple[str, int, str]] = field(default_factory=dict)
    seconds: float = 0.0


def run(name, numbers, tally, keep=None):
    """Run cases of a target; those that break are kept as folders in ``keep``."""
    target = TARGETS[name]
    prepare(target)
    with seeds_of(target) as seeds, tempfile.TemporaryDirectory() as place:
        for number in numbers:
            folder = Path(place, "case")
            made(target, seeds, number, folder)
            started = time.process_time()
            what = problem(lambda: target.run(folder), folder, target.writable)  # noqa: B023
            tally.seconds = max(tally.seconds, time.process_time() - started)
            tally.tried[name] = tally.tried.get(name, 0) + 1
            assert (folder / "secret").read_bytes() == SECRET
            shutil.rmtree(folder)
            if what is None or (target.trusts and what.startswith(("hang:", "memory"))):
                continue
            signature = f"{name}: {what.splitlines()[0]}"
            if signature in tally.broke:
                continue
            tally.broke[signature] = (name, number, what)
            if keep is not None:
                case = keep / f"{name}-{number}".replace(" ", "-")
                shutil.rmtree(case, ignore_errors=True)
                made(target, seeds, number, case)
                (case / "what.txt").write_text(what)
