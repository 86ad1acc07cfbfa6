"""What the machine denies, told as a refusal: files, memory and threads that cannot be had.

Where a module knows more (which byte of which input, which output), it says so itself; what no
module expects ends here, so that a fault of the machine is never a traceback.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from dora_export.errors import MachineError

ADVICE = {
    errno.EACCES: "Check its permissions.",
    errno.EPERM: "Check its permissions.",
    errno.EROFS: "Its file system is read-only; use another one.",
    errno.ENOSPC: "Free some space.",
    errno.EDQUOT: "Free some space, or have the quota raised.",
    errno.EFBIG: "Raise the limit on file sizes (ulimit -f), or use another file system.",
    errno.EMFILE: "Raise the limit on open files (ulimit -n), or pass --threads 1.",
    errno.ENFILE: "The machine has too many files open; close some programs.",
    errno.ENOMEM: "Free some memory, or pass --threads 1.",
    errno.EIO: "The disk or the network behind it fails; use a copy on another one.",
    errno.ESTALE: "The network file system has lost it; mount it again.",
    errno.ENAMETOOLONG: "Use a shorter path.",
    errno.ELOOP: "Its links go round in a circle; repair them.",
}


def advice(error: OSError, otherwise: str = "Check the path and the disk.") -> str:
    """Return what to do about what the system says, as a sentence."""
    return ADVICE.get(error.errno or 0, otherwise)


@contextmanager
def faults_told() -> Iterator[None]:
    """Turn what the system denies into ``MachineError``; also works as a decorator.

    Raises:
        MachineError: The block met an ``OSError`` or a ``MemoryError``.
    """
    try:
        yield
    except OSError as error:
        what = error.strerror or str(error)
        where = "a file" if error.filename is None else str(error.filename)
        raise MachineError(f"{where}: {what}. {advice(error)}") from error
    except MemoryError as error:
        raise MachineError(
            "out of memory: the system gives no more. Close other programs, or raise the limit "
            "(ulimit -v)."
        ) from error


@contextmanager
def memory_told(bound: int) -> Iterator[None]:
    """Turn running out of memory into a refusal that says how much is needed.

    Args:
        bound: The most bytes that the block's buffers take at once.

    Raises:
        MachineError: The block met a ``MemoryError``.
    """
    try:
        yield
    except MemoryError as error:
        raise MachineError(
            f"out of memory: buffers take up to {bound / 1e6:.0f} MB on top of the program itself. "
            "Pass --threads 1, a smaller --block (in bytes), or free some memory."
        ) from error


def require_space(nbytes: int, what: str) -> None:
    """Refuse work for which there is no address space; nothing is kept.

    Some C libraries (OpenBLAS) end the process where an allocation fails, without a chance to say
    anything. So what they will take is asked for beforehand. It is a matter of ``ulimit -v`` and of
    machines that commit no more memory than they have; elsewhere address space is plenty.

    Args:
        nbytes: How much the work takes at most.
        what: Whose need it is, for the message.

    Raises:
        MachineError: The system does not give as much.
    """
    if os.name == "nt":
        return
    try:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
        mmap.mmap(-1, nbytes, flags=flags).close()
    except (OSError, MemoryError) as error:
        raise MachineError(
            f"memory: {what} needs up to {nbytes / 1e6:.0f} MB of address space, and the system "
            "does not give as much. Raise the limit (ulimit -v), or pass --threads 1 and a smaller "
            "--block."
        ) from error


def start(thread: threading.Thread) -> None:
    """Start a thread.

    Raises:
        MachineError: The system gives no more threads.
    """
    try:
        thread.start()
    except (RuntimeError, MemoryError) as error:  # RuntimeError: can't start new thread
        raise no_thread(thread.name, error) from error


def no_thread(name: str, error: Exception) -> MachineError:
    """Return the refusal for a thread that the system does not give."""
    return MachineError(
        f"cannot start thread '{name}': {error}. Pass --threads 1, or raise the limits on "
        "processes and memory (ulimit -u, ulimit -v)."
    )
