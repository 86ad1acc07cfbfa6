"""What every test of a fault asks: one clear refusal or a whole output, nothing else touched."""

import contextlib
import errno
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import dora_export
from dora_export import DoraExportError
from tests import small

# Where it is, what is wrong, what to do.
CLEAR = re.compile(r"[^:]+:\s.+[.;\n]\s?.+\.", re.DOTALL)


def disk(code):
    return OSError(code, os.strerror(code))


def raiser(error):
    def fail(*_args, **_options):
        raise error

    return fail


def owned(at):
    """All that is the user's: everything but the output and what is hidden beside it."""
    return {
        name: what
        for name, what in small.entries(at).items()
        if not name.split("/")[0].startswith(("out", ".out"))
    }


def descriptors():
    return len(os.listdir("/proc/self/fd"))


def attempt(at, out="out", *, changes_inputs=False, base="base", **options):
    """Merge ``at``'s pair; return the refusal, or None after a check of all that was published.

    Whatever happens: nothing of the user's is changed, what was at the output stays until it is
    replaced by a whole one, and no thread and no descriptor is left behind.
    """
    before = owned(at)
    output = at / out
    published = small.entries(output) if output.exists() else None
    threads, handles = set(threading.enumerate()), descriptors()
    try:
        dora_export.merge(at / base, at / "adapter", output, **options)
    except DoraExportError as error:
        refusal = error
    else:
        refusal = None
    assert set(threading.enumerate()) <= threads
    assert descriptors() == handles
    if not changes_inputs:
        assert owned(at) == before
    if refusal is None:
        tensors = small.base_tensors()
        small.check_merged(output, tensors, small.adapter_tensors(tensors))
        return None
    check_clear(refusal)
    now = small.entries(output) if output.exists() else None
    if "whole and in place" in str(refusal):
        assert now is not None
        assert "dora_export.json" in now
    else:
        assert now == published
    return str(refusal)


def check_clear(error):
    assert error.exit_code == 2
    message = str(error)
    assert CLEAR.fullmatch(message), message
    assert "Errno" not in message


def command(*args, env=None, cwd=None, limits="", setup=()):
    """Run the command line as another process does, behind ``setup`` and a shell's limits."""
    words = [sys.executable, "-B", "-m", "dora_export", *map(str, args)]
    if limits:
        words = ["bash", "-c", f'{limits}; exec "$@"', "-", *words]
    here = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), **(env or {})}
    return subprocess.run(
        [*setup, *words], capture_output=True, check=False, timeout=60, env=here, cwd=cwd
    )


def check_refused(result, *words):
    """Assert that a process ended with one clear refusal."""
    err = result.stderr.decode()
    assert result.returncode == 2, (result.returncode, err, result.stdout)
    assert err.startswith("error: "), err
    assert CLEAR.fullmatch(err.removeprefix("error: ").strip()), err
    assert "Traceback" not in err
    assert err.count("error:") == 1
    assert result.stdout == b""
    for word in words:
        assert word in err


# --- what this machine lets a test do ---


def works(*words):
    try:
        return subprocess.run(words, capture_output=True, check=False, timeout=20).returncode == 0
    except FileNotFoundError:
        return False


def mounting(*, loop=False):
    """Return the words before a command that lets it mount, seen by nobody else."""
    if works("unshare", "--mount", "true"):
        words = ["unshare", "--mount"]
    elif works("unshare", "--map-root-user", "--mount", "true"):
        words = ["unshare", "--map-root-user", "--mount"]
    else:
        # A container may forbid mounting to all users. The same errors are injected by Calls and
        # RLIMIT_FSIZE in tests that run everywhere.
        pytest.skip("this machine gives no mount namespaces; the injected faults stand for these")
    # A loop device needs root and mkfs.ext4; tmpfs and the injected faults need neither.
    if loop and not (os.access("/dev/loop-control", os.W_OK) and shutil.which("mkfs.ext4")):
        pytest.skip("no loop devices or no mkfs.ext4 here; the injected faults stand for these")
    return words


def bound_by_permissions():
    """Return the words before a command that lets permission bits count, for root too."""
    if os.geteuid() != 0:
        return []
    words = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]
    if not works(*words, "true"):
        # Root without a way to give up its capabilities can be denied nothing.
        pytest.skip("this runs as root, whom permission bits do not bind, and setpriv is missing")
    return words


# --- faults injected into this process ---


class Calls:
    """Stands in for a function of a module; fails in the call of one number."""

    def __init__(self, monkeypatch, module, name, concerns=lambda *_: True):
        self.real, self.concerns = getattr(module, name), concerns
        self.count, self.number, self.code = 0, None, errno.EIO
        monkeypatch.setattr(module, name, self)

    def __call__(self, *args, **options):
        if self.concerns(*args):
            self.count += 1
            if self.count - 1 == self.number:
                raise disk(self.code)
        return self.real(*args, **options)

    def fail(self, number, code):
        self.count, self.number, self.code = 0, number, code


class Broken:
    """A file whose reads are short, or fail from a byte on."""

    def __init__(self, file, most=None, fails_at=None):
        self.file, self.most, self.fails_at = file, most, fails_at

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()

    def fileno(self):
        return self.file.fileno()

    def seek(self, offset):
        return self.file.seek(offset)

    def readinto(self, view):
        at = self.file.tell()
        if self.fails_at is not None and at + len(view) > self.fails_at:
            if at >= self.fails_at:
                raise disk(errno.EIO)
            view = view[: self.fails_at - at]  # as a disk does: first what is good
        return self.file.readinto(view[: self.most])


@contextlib.contextmanager
def closing_modes(*paths):
    """Give back the permissions of paths, so that pytest can remove them."""
    modes = [path.stat().st_mode for path in paths]
    try:
        yield
    finally:
        for path, mode in zip(paths, modes, strict=True):
            path.chmod(mode)
