"""config.json, byte for byte the base's but for the values that a merge makes untrue.

Re-saving a config through a library rewrites it (a config re-saved by transformers 5 makes
transformers 4 read another rope_theta), so single values are replaced in the text instead.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

SCALARS = json.JSONDecoder()
BLANK = " \t\r\n"


def edited(text: str, edits: Mapping[str, Any]) -> str:
    """Return the JSON text with some values of its top level and its ``text_config`` replaced.

    A key is changed wherever it stands on those two levels; one that stands on neither is put at
    the end of the top level. ``dtype`` also stands for the older ``torch_dtype`` and is left out
    where neither is present: readers then take the weights' own.

    Args:
        text: A JSON object.
        edits: Keys and their true values.
    """
    for key, value in edits.items():
        names = ("dtype", "torch_dtype") if key == "dtype" else (key,)
        spans = [s for name in names for s in _spans(text, name)]
        if spans:
            for start, end in sorted(spans, reverse=True):
                text = text[:start] + json.dumps(value) + text[end:]
        elif key != "dtype":
            text = _appended(text, key, value)
    return text


def _spans(text: str, key: str) -> list[tuple[int, int]]:
    """Return where the values of ``key`` stand: on the top level and in ``text_config``."""
    top = _members(text, text.index("{"))
    found = [top[key]] if key in top else []
    if "text_config" in top and text[top["text_config"][0]] == "{":
        inner = _members(text, top["text_config"][0])
        found += [inner[key]] if key in inner else []
    return found


def _members(text: str, start: int) -> dict[str, tuple[int, int]]:
    """Return the [start, end) of every value of the object that begins at ``start``."""
    members: dict[str, tuple[int, int]] = {}
    at = _skip(text, start + 1)
    while text[at] != "}":
        key, at = SCALARS.raw_decode(text, at)
        at = _skip(text, _skip(text, at) + 1)  # over the colon
        _, end = SCALARS.raw_decode(text, at)
        members[key] = (at, end)
        at = _skip(text, end)
        if text[at] == ",":
            at = _skip(text, at + 1)
    return members


def _skip(text: str, at: int) -> int:
    while text[at] in BLANK:
        at += 1
    return at


def _appended(text: str, key: str, value: Any) -> str:
    members = _members(text, text.index("{"))
    entry = f"{json.dumps(key)}: {json.dumps(value)}"
    if not members:
        at = text.index("{") + 1
        return f"{text[:at]}{entry}{text[at:]}"
    end = max(end for _, end in members.values())
    first = min(start for start, _ in members.values())
    before = text[: text.rindex('"', 0, text.rindex(":", 0, first))]
    before = before[: before.rindex('"')]
    blank = before[len(before.rstrip(BLANK)) :]  # the indentation of the first member
    return f"{text[:end]},{blank or ' '}{entry}{text[end:]}"
