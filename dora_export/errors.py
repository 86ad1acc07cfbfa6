"""Every error that a user can cause, in one small tree.

DoraExportError                 catch this one to catch them all
├── InputError                  a file is missing, truncated or not what it says
├── AdapterError                the adapter contradicts itself or is of a kind we refuse
├── PlanError                   base and adapter do not fit each other
├── ArithmeticRefusal           zero norm, NaN or overflow in the merged weight
├── OutputError                 the output exists, is misplaced or does not fit on the disk
├── DeviceError                 the device asked for is not there
├── MachineError                the system denies a file, memory or a thread
└── VerifyError                 what was written is not what was planned (exit code 1)

Messages read ``{where}: {what is wrong}. {what to do}.``; problems of one kind are gathered
and raised together. Names that come from files are shown escaped and shortened; a message as a
whole is fit for a terminal, whatever went into it.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import accumulate

MAX_LISTED = 12  # problems shown in one message; the rest are counted
LINE_CHARS = 800  # of those that stand in one line


class DoraExportError(Exception):
    """Base class of all errors that a user's input or machine can cause.

    Args:
        message: What to tell; what is neither printable nor a line break is escaped.

    Attributes:
        exit_code: What the command line returns for it (2: bad input or refused).
    """

    exit_code = 2

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class InputError(DoraExportError):
    """A file or folder is missing, truncated, or does not hold what it claims."""


class AdapterError(DoraExportError):
    """The adapter contradicts itself, or is of a kind that this tool refuses by name."""


class PlanError(DoraExportError):
    """Base and adapter do not fit each other."""


class ArithmeticRefusal(DoraExportError):  # noqa: N818 - it is a refusal, not a failure
    """A merged row has no defined or no finite value."""


class OutputError(DoraExportError):
    """The output exists already, lies in the wrong place, or does not fit."""


class DeviceError(DoraExportError):
    """The device asked for is not available."""


class MachineError(DoraExportError):
    """The operating system denies access to a file, memory, or a thread."""


class VerifyError(DoraExportError):
    """What was written differs from what was planned."""

    exit_code = 1


def shown(name: object, limit: int = 120) -> str:
    """Return a name from an untrusted file fit for a terminal: escaped and shortened."""
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(name))
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def printable(text: str) -> str:
    """Return a message fit for a terminal: what is neither printable nor a line break, escaped."""
    return "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text
    )


def in_line(parts: Iterable[str]) -> str:
    """Return parts in one line: ``MAX_LISTED`` or ``LINE_CHARS`` of them, the rest counted."""
    found = list(parts)
    ends = accumulate(len(part) + 2 for part in found[:MAX_LISTED])
    count = max(1, sum(end <= LINE_CHARS for end in ends))
    more = f" and {len(found) - count} more" if len(found) > count else ""
    return ", ".join(found[:count]) + more


def listing(problems: Iterable[str]) -> str:
    """Return problems as indented lines, at most ``MAX_LISTED`` of them, the rest counted."""
    lines = list(problems)
    more = [f"... and {len(lines) - MAX_LISTED} more"] if len(lines) > MAX_LISTED else []
    return "".join(f"\n  {line}" for line in lines[:MAX_LISTED] + more)
