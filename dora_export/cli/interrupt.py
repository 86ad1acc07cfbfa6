"""Ctrl-C and SIGTERM: one way to stop a merge, and how to go on with it."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from dora_export.errors import DoraExportError

EXIT_CODE = 130  # as shells expect of a command that Ctrl-C ended


@contextmanager
def interruptible(output: Path) -> Iterator[None]:
    """Run a merge into ``output``; if it is interrupted, say what is kept, and exit with 130.

    SIGTERM does what Ctrl-C does while the block runs.

    Raises:
        click.exceptions.Exit: The block was interrupted.
    """
    try:
        with _sigterm_as_ctrl_c():
            yield
    except KeyboardInterrupt:
        click.echo(_message(output), err=True)
        raise click.exceptions.Exit(EXIT_CODE) from None


@contextmanager
def _sigterm_as_ctrl_c() -> Iterator[None]:
    ours = (
        threading.current_thread() is threading.main_thread()  # the only one that may
        and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL  # nobody has decided otherwise
    )
    if ours:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _message(output: Path) -> str:
    from dora_export.writers.staging import find_leftover, kept  # noqa: PLC0415 - quick start

    try:
        leftover = find_leftover(output.absolute())
    except DoraExportError:
        leftover = None  # cannot be looked into; what is in the way, the next run will say
    if leftover is not None and leftover.published:
        return f"interrupted, but {output} was published already and is whole."
    lines = ["interrupted; nothing was published."]
    if leftover is not None and leftover.done_bytes:
        lines.append(kept(leftover.folder, leftover.done_bytes))
    else:
        lines[0] += " To start again:"
    return "\n".join([*lines, f"  {_command()}"])


def _command() -> str:
    """Return the command that goes on with the merge of this process, to be typed into a shell."""
    program, *words = sys.argv
    start = [program]
    if Path(program).name == "__main__.py":
        start = [sys.executable, "-m", "dora_export"]
    command = [*start, *(word for word in words if word != "--restart")]
    return subprocess.list2cmdline(command) if os.name == "nt" else shlex.join(command)
