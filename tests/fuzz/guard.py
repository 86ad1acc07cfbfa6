"""Watches one call: its errors, time, memory, and the files and programs that it reaches for.

Memory is watched twice. A limit on what the process may allocate (RLIMIT_DATA) makes an excess a
``MemoryError``, whatever the process took and gave back before: what the C library keeps of that
is held meanwhile. And where the kernel lets the peak of what is resident be reset (not in every
sandbox), that peak counts mapped files as well.

Time is watched twice as well: what the call computes, by the processor's clock, and how long it
waits, in ticks of an alarm in which it computes nothing. Ticks that a process sleeps through, since
it was stopped or its disk is slow, arrive as one, so that a busy or paused machine is not taken for
a hang.
"""

import ctypes
import os
import re
import resource
import signal
import sys
import time
import traceback
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from dora_export import api
from dora_export.errors import DoraExportError, VerifyError
from dora_export.machine import require_space

SECONDS = 20.0  # of computing, in all threads; most calls take milliseconds
TICK = 1.0  # second
IDLE = 0.005  # of a tick: less is no computing
TICKS = 120  # without computing
MEMORY = 300 << 20
SPACE = 6 << 30  # of address space beyond what is there: a bomb must not take the machine down
# Event -> where in its arguments the changed paths are, and the folders they are relative to.
CHANGES = {
    "os.remove": [(0, 1)], "os.rmdir": [(0, 1)], "os.mkdir": [(0, 2)], "os.symlink": [(1, 2)],
    "os.rename": [(0, 2), (1, 3)], "os.link": [(0, 2), (1, 3)], "os.chmod": [(0, 2)],
    "os.chown": [(0, 3)], "os.utime": [(0, 3)], "os.truncate": [(0, None)],
    "shutil.rmtree": [(0, 1)],
}  # fmt: skip
FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "os.startfile", "socket.connect",
             "socket.getaddrinfo", "pty.spawn",
             "webbrowser.open")  # fmt: skip
HARMLESS = re.compile(r"/(dev/null|proc/.*)|.*\.(pyc|pyc\.\d+)")


class Hang(BaseException):
    """A call computed too long, or waits."""


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
        for at, folder_at in CHANGES[event]:
            path, folder = arguments[at], arguments[folder_at] if folder_at else None
            if isinstance(path, int):
                continue
            if isinstance(folder, int) and folder >= 0:
                path = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), os.fsdecode(path))
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


def _status(field):
    found = re.search(rf"^{field}:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.M)
    assert found, f"/proc/self/status has no {field}: memory cannot be watched here"
    return int(found[1]) * 1024


def _reset_peak():
    """Let VmHWM count from here; return what is resident, or None if this system does not."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    resident = _status("VmRSS")
    return resident if _status("VmHWM") <= resident + (8 << 20) else None


def _address_space():
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


@contextmanager
def _limit(kind, most):
    soft, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(kind, (soft, hard))


class _Allocated(ctypes.Structure):
    """What glibc's mallinfo2 returns."""

    _fields_ = [(name, ctypes.c_size_t) for name in
                "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
                .split()]  # fmt: skip


_libc = ctypes.CDLL(None)
_libc.malloc.argtypes, _libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
_libc.free.argtypes = [ctypes.c_void_p]
if hasattr(_libc, "mallinfo2"):  # not in other C libraries, which keep little
    _libc.mallinfo2.restype = _Allocated
    _libc.mallopt(-8, 1)  # M_ARENA_MAX: each further arena keeps up to 64 MB that it does not tell


@contextmanager
def _kept_memory_held():
    """Hold what was freed and not given back to the system, or a call could take that unseen."""
    held = []
    for size in (1 << 20, 1 << 17) if hasattr(_libc, "mallinfo2") else ():
        before = _libc.mallinfo2()
        for _ in range(before.fordblks // size):
            held.append(_libc.malloc(size))
            now = _libc.mallinfo2()
            if (now.arena, now.hblkhd) != (before.arena, before.hblkhd):  # it was new memory
                _libc.free(held.pop())
                break
    try:
        yield
    finally:
        for block in held:
            _libc.free(block)


@contextmanager
def _asking_for_address_space():
    """Let a merge ask for the address space of threads, which is no memory yet."""

    def ask(nbytes, what):
        with _limit(resource.RLIMIT_DATA, resource.getrlimit(resource.RLIMIT_DATA)[1]):
            require_space(nbytes, what)

    api.require_space = ask
    try:
        yield
    finally:
        api.require_space = require_space


@contextmanager
def _bounded():
    started, idle = time.process_time(), 0
    last = started

    def ring(*_):
        nonlocal idle, last
        now = time.process_time()
        # One that others leave little time computes some of it in every tick.
        idle += now - last < IDLE * TICK
        last = now
        if idle > TICKS:
            raise Hang("waiting")
        if now - started > SECONDS:
            raise Hang

    before = signal.signal(signal.SIGALRM, ring)
    with (
        _asking_for_address_space(),
        _kept_memory_held(),
        _limit(resource.RLIMIT_AS, _address_space() + SPACE),
        _limit(resource.RLIMIT_DATA, _status("VmData") + MEMORY),
    ):
        signal.setitimer(signal.ITIMER_REAL, TICK, TICK)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)


def _causes(error):
    """An error, and those that it was raised from or after."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def problem(call, folder, writable=()):
    """Return what is wrong with a call, in a line and more, or None."""
    global _watched
    watched = Watched(Path(os.path.realpath(folder)), writable)
    before = _reset_peak()
    found = None
    with _bounded():
        try:
            _watched = watched
            call()
        except DoraExportError as error:
            text = str(error)
            if any(isinstance(cause, MemoryError) for cause in _causes(error)):
                found = f"memory: more was asked for\n{traceback.format_exc()}"
            elif type(error) is VerifyError:
                found = f"wrong: {text}"
            elif any(not (c.isprintable() or c == "\n") for c in text):
                found = f"unprintable: {text!a:.300}"
        except Hang as hang:
            kind = "hang, waiting" if hang.args else "hang"
            found = f"{kind}: {_place(hang.__traceback__)}\n{traceback.format_exc()}"
        except MemoryError as error:
            found = f"memory: {_place(error.__traceback__)}\n{traceback.format_exc()}"
        except Exception as error:
            place = _place(error.__traceback__)
            found = f"{type(error).__name__}: {place}\n{traceback.format_exc()}"
        finally:
            _watched = None
    if watched.broken:
        return f"outside: {watched.broken[0]}"
    if found is None and before is not None and (taken := _status("VmHWM") - before) > MEMORY:
        found = f"memory: {taken >> 20} MB"
    return found


def _place(trace):
    """Return the last line of the package that a traceback goes through."""
    frames = [f for f in traceback.extract_tb(trace) if "/dora_export/" in f.filename]
    if not frames:
        return "?"
    return f"{frames[-1].filename.rpartition('/dora_export/')[2]}:{frames[-1].lineno}"
