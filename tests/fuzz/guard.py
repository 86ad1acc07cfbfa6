"""Watches one call: its errors, time, memory, and the files and programs that it reaches for."""

import os
import re
import resource
import signal
import sys
import traceback
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from dora_export.errors import DoraExportError

SECONDS = 20.0  # of a busy machine; most calls take milliseconds
MEMORY = 300 << 20
SPACE = 6 << 30  # of address space beyond what is there: a bomb must not take the machine down
CHANGES = ("os.remove", "os.rmdir", "os.mkdir", "os.rename", "os.link", "os.symlink", "os.truncate",
           "os.chmod", "os.chown", "shutil.rmtree", "os.utime")  # fmt: skip
FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "os.startfile", "socket.connect",
             "socket.getaddrinfo", "pty.spawn",
             "webbrowser.open")  # fmt: skip
HARMLESS = re.compile(r"/(dev/null|proc/.*)|.*\.(pyc|pyc\.\d+)")


class Hang(BaseException):
    """A call took too long."""


@dataclass
class Watched:
    """What may be touched while a call runs, and what was.

    Attributes:
        folder: The case: nothing outside of it may be written, and ``secret`` not be read.
        writable: Names in it that may be written.
        broken: What must not have happened.
    """

    folder: Path
    writable: tuple[str, ...]
    broken: list[str] = field(default_factory=list)


_watched: Watched | None = None


def _hook(event, arguments):
    watched = _watched
    if watched is None:
        return
    if event == "open":
        path, _, flags = arguments
        if isinstance(path, int):
            return
        writes = bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND))
        if writes or "secret" in os.fsdecode(path):
            _check(watched, event, path, writes)
    elif event in CHANGES:
        for path in arguments[:2] if event in ("os.rename", "os.link") else arguments[:1]:
            if not isinstance(path, int):
                _check(watched, event, path, True)
    elif event in FORBIDDEN or (event == "subprocess.Popen" and not _is_matcher(arguments[1])):
        watched.broken.append(f"{event}{arguments!r:.200}")


def _is_matcher(command):
    """Whether this is the program that matches patterns."""
    return list(command)[1:3] == ["-I", "-S"]


def _check(watched, event, path, writes):
    if HARMLESS.fullmatch(os.fsdecode(path)):
        return
    head, leaf = os.path.split(os.path.abspath(os.fsdecode(path)))
    place = os.path.join(os.path.realpath(head), leaf)
    if event == "open":  # which follows a link; the others are about the link itself
        place = os.path.realpath(place)
    if event == "os.mkdir" and os.path.isdir(place):
        return  # parents=True, exist_ok=True asks for what is there
    if not writes:
        if Path(place) == watched.folder / "secret":
            watched.broken.append(f"read {place}")
        return
    allowed = [str(watched.folder / name) for name in watched.writable]
    if not any(place == a or place.startswith(f"{a}/") for a in allowed):
        watched.broken.append(f"{event} {place}")


sys.addaudithook(_hook)


def _peak():
    return int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


def _address_space():
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


@contextmanager
def _bounded():
    def ring(*_):
        raise Hang

    before = signal.signal(signal.SIGALRM, ring)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_address_space() + SPACE, limits[1]))
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, limits)


def problem(call, folder, writable=()):
    """Return what is wrong with a call, in a line and more, or None."""
    global _watched
    watched = Watched(Path(os.path.realpath(folder)), writable)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM counts from here
    before = _peak()
    found = None
    with _bounded():
        try:
            _watched = watched
            call()
        except DoraExportError as error:
            text = str(error)
            if any(not (c.isprintable() or c == "\n") for c in text):
                found = f"unprintable: {text!a:.300}"
        except Hang:
            found = f"hang: {_place(sys.exc_info()[2])}\n{traceback.format_exc()}"
        except Exception as error:
            place = _place(error.__traceback__)
            found = f"{type(error).__name__}: {place}\n{traceback.format_exc()}"
        finally:
            _watched = None
    if watched.broken:
        return f"outside: {watched.broken[0]}"
    if found is None and (taken := _peak() - before) > MEMORY:
        found = f"memory: {taken >> 20} MB"
    return found


def _place(trace):
    """Return the last line of the package that a traceback goes through."""
    frames = [f for f in traceback.extract_tb(trace) if "/dora_export/" in f.filename]
    if not frames:
        return "?"
    return f"{frames[-1].filename.rpartition('/dora_export/')[2]}:{frames[-1].lineno}"
