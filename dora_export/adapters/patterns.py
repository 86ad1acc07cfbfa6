r"""PEFT's rank_pattern and alpha_pattern held against module names, in bounded time.

PEFT takes the first key for which ``re.match(rf"(.*\.)?({key})$", module)`` finds something
(before 0.15 ``rf".*\.{key}$"``: not the path itself, nor a key that begins with ``^``), so a
key is any regular expression of Python's. Some of those backtrack for ever on some names, and
``re`` cannot be interrupted from a thread. So names with dots in them, which is what configs hold,
are matched here, where that takes little time; all else is matched by the same ``re`` in a process
that is ended when the time is over. RE2 and the ``regex`` package have bounds of their own, but
read some expressions in another way.

Source: github.com/huggingface/peft 0.21.2 and 0.14.0, src/peft/utils/other.py (get_pattern_key).
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from dora_export import limits
from dora_export.errors import AdapterError, InputError, shown

# What a key, in place of "KEY", is looked for with: as PEFT does, and did before 0.15.
WHOLE = r"(.*\.)?(KEY)$"
BEFORE_0_15 = r".*\.KEY$"
UNGROUPED = r"(.*\.)?KEY$"  # LoHa's and LoKr's before 0.15

# Names whose dots mean any character, perhaps anchored: matched in time linear in their length.
PLAIN = re.compile(r"\^?[\w.-]+\$?", re.ASCII)
LITTLE = 10**8  # characters of all patterns times those of all names: about a second at the worst

# Reads {"patterns": [...], "modules": [...], "around": ...}, tells which pattern it is at, then
# the result.
MATCHER = r"""
import json, re, sys
given = json.load(sys.stdin)
left, found = given["modules"], {}
for number, pattern in enumerate(given["patterns"]):
    print(number, flush=True)
    try:
        match = re.compile(given["around"].replace("KEY", pattern)).match
    except (re.error, OverflowError, RecursionError) as error:
        print(json.dumps({"wrong": str(error)}))
        sys.exit()
    rest = []
    for module in left:
        if match(module):
            found[module] = pattern
        else:
            rest.append(module)
    left = rest
print(json.dumps({"found": found}))
"""


def first_matches(
    config: Path,
    field: str,
    patterns: Iterable[str],
    modules: Iterable[str],
    around: str = WHOLE,
) -> dict[str, str]:
    """Return the first pattern that matches each module, for those modules that one matches.

    Takes at most about ``limits.PATTERN_SECONDS``, whatever the patterns.

    Args:
        config: The file that the patterns come from, for messages.
        field: Their name in it.
        patterns: Regular expressions, in the file's order.
        modules: Module paths in the wrapped model.
        around: WHOLE, BEFORE_0_15 or UNGROUPED.

    Raises:
        AdapterError: A pattern is too long, or no regular expression, or takes too much time.
    """
    patterns, modules = list(patterns), list(modules)
    if not patterns:
        return {}
    where = f"{config}: {field}"
    long = [p for p in patterns if len(p) > limits.PATTERN_CHARS]
    if long:
        raise AdapterError(
            f"{where}: {shown(long[0], 60)} has more than {limits.PATTERN_CHARS} characters. "
            "Name the modules instead."
        )
    characters = sum(map(len, patterns)) * sum(map(len, modules))
    if characters <= LITTLE and all(PLAIN.fullmatch(p) for p in patterns):
        expressions = [(p, re.compile(around.replace("KEY", p))) for p in patterns]
        firsts = ((m, next((p for p, e in expressions if e.match(m)), None)) for m in modules)
        return {module: pattern for module, pattern in firsts if pattern is not None}
    return _matched_apart(where, patterns, modules, around)


def _matched_apart(
    where: str, patterns: Sequence[str], modules: Sequence[str], around: str
) -> dict[str, str]:
    """Match in a process of its own, which is killed when the time is over."""
    try:
        run = subprocess.run(
            [sys.executable, "-I", "-S", "-W", "ignore", "-c", MATCHER],
            input=json.dumps({"patterns": patterns, "modules": modules, "around": around}).encode(),
            capture_output=True,
            timeout=limits.PATTERN_SECONDS,
            check=False,
        )
        told = run.stdout.split(b"\n")
    except subprocess.TimeoutExpired as error:
        told = (error.stdout or b"").split(b"\n")
        at = max((int(line) for line in told if line.isdigit()), default=0)
        raise AdapterError(
            f"{where}: {shown(patterns[at])} takes more than {limits.PATTERN_SECONDS:g} seconds to "
            "match the names of the layers. Name the modules instead."
        ) from error
    numbers = [int(line) for line in told if line.isdigit()]
    last = next((line for line in reversed(told) if line.startswith(b"{")), None)
    if last is None:
        raise InputError(
            f"{where}: cannot be matched: Python ended with {run.returncode} "
            f"({shown(run.stderr[-200:].decode(errors='replace').strip())}). "
            "Name the modules instead."
        )
    result: dict[str, dict[str, str]] = json.loads(last)
    if "wrong" in result:
        raise AdapterError(
            f"{where}: {shown(patterns[numbers[-1]])} is not a regular expression: "
            f"{shown(result['wrong'])}. Correct it."
        )
    return result["found"]
