"""Standard streams that may be closed, full, deaf, or of an encoding without our signs."""

from __future__ import annotations

import codecs
import io
import os
import sys
from contextlib import suppress

import click

# What is printed where the encoding has no such sign; anything else is shown as its escape.
PLAIN = {"✓": "+", "✗": "x", "·": "|", "…": "..."}
BROKEN_PIPE = 141  # 128 + SIGPIPE, as shells report a program whose reader left
LOST = 2


def prepare() -> None:
    """Make standard streams usable: all three there, and no character an error."""
    # A closed 0, 1 or 2 would become the next file opened, and whatever prints would write there.
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    codecs.register_error("dora_export", _plain)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - stays
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="dora_export")


def tell(message: str) -> None:
    """Print a line to stderr; who does not listen misses it, and nothing else comes of that."""
    with suppress(OSError):
        click.echo(message, err=True)


def unheard(error: OSError) -> int:
    """Return the exit code for a report that could not be printed."""
    if isinstance(error, BrokenPipeError):
        return BROKEN_PIPE
    tell(
        f"error: standard output: {error.strerror}. The work is done, its report is lost; send it "
        "elsewhere."
    )
    return LOST


def _plain(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    plain = "".join(PLAIN.get(c, c.encode("unicode_escape").decode()) for c in text)
    return plain, error.end
