"""Numbers, sizes and long lists of names as people write them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence

SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
MAX_DIGITS = 9  # of a number within a name; a longer one is taken for text


def number(value: float | None, digits: int = 3, *, ascii_only: bool = False) -> str:
    """Return a number with some significant digits: 0.506, 3.10, 12 400, 8.90×10⁻⁶.

    Args:
        value: Any float; None and NaN become "–".
        digits: Significant digits.
        ascii_only: Write 8.9e-6 and inf, for terminals and files.
    """
    if value is None or math.isnan(value):
        return "-" if ascii_only else "–"
    if math.isinf(value):
        text = "inf" if ascii_only else "∞"
        return text if value > 0 else f"-{text}"
    if value == 0:
        return "0"
    mantissa, _, power = f"{value:.{digits - 1}e}".partition("e")
    exponent = int(power)
    if -3 <= exponent < 5:
        return f"{float(f'{mantissa}e{power}'):,.{max(0, digits - 1 - exponent)}f}"
    if ascii_only:
        return f"{mantissa}e{exponent}"
    return f"{mantissa}×10{superscript(exponent)}"


def superscript(power: int) -> str:
    """Return an integer in raised figures."""
    return str(power).translate(SUPERSCRIPTS)


def share(value: float | None, *, ascii_only: bool = False) -> str:
    """Return a part of one: 44%, 0.31%, and below a thousandth 8.9×10⁻⁶."""
    if value is None or not math.isfinite(value) or abs(value) < 1e-3:
        return number(value, 2, ascii_only=ascii_only)
    return f"{number(100 * value, 2 if value < 0.995 else 3)}%"


def size(nbytes: float) -> str:
    """Return bytes as people write them, in powers of ten."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(nbytes) < 1000 or unit == "GB":
            break
        nbytes /= 1000
    return f"{nbytes:.0f} {unit}" if unit == "B" or nbytes >= 100 else f"{nbytes:.1f} {unit}"


def count(items: int, what: str) -> str:
    """Return how many there are of a thing: "1 tensor", "20,000 tensors"."""
    return f"{items:,} {what}" + ("" if items == 1 else "s")


def index(part: str) -> int | None:
    """Return the number that a part of a dotted name is, or None."""
    if part.isascii() and part.isdecimal() and len(part) <= MAX_DIGITS and str(int(part)) == part:
        return int(part)
    return None


def compact(names: Iterable[str]) -> list[str]:
    """Return names with their numbers folded: ``layers.{0-29}.q_proj``; every name is in there.

    Only whole parts between dots are folded, and only where the folded form stands for exactly
    the names given. Order: as the first name of each form came.
    """
    forms: dict[tuple[str | None, ...], list[tuple[int, ...]]] = defaultdict(list)
    for name in dict.fromkeys(names):
        parts = name.split(".")
        numbers = [index(p) for p in parts]
        form = tuple(p if n is None else None for p, n in zip(parts, numbers, strict=True))
        forms[form].append(tuple(n for n in numbers if n is not None))
    folded = []
    for form, rows in forms.items():
        for sets in _fold(rows):
            values = iter(sets)
            folded.append(".".join(_spans(next(values)) if p is None else p for p in form))
    return folded


def _fold(rows: Sequence[tuple[int, ...]]) -> list[tuple[tuple[int, ...], ...]]:
    """Return products of sets that together are exactly these rows of numbers."""
    if not rows[0]:
        return [()]
    last: dict[tuple[int, ...], set[int]] = defaultdict(set)
    for row in rows:
        last[row[:-1]].add(row[-1])
    alike: dict[tuple[int, ...], list[tuple[int, ...]]] = defaultdict(list)
    for head, values in last.items():
        alike[tuple(sorted(values))].append(head)
    return [(*rest, values) for values, heads in alike.items() for rest in _fold(heads)]


def _spans(values: Sequence[int]) -> str:
    """Return sorted numbers as spans: 7, {0-29}, {0-3,7}."""
    spans: list[list[int]] = []
    for value in values:
        if spans and spans[-1][1] == value - 1:
            spans[-1][1] = value
        else:
            spans.append([value, value])
    text = ",".join(
        f"{a}" if a == b else f"{a},{b}" if b == a + 1 else f"{a}-{b}" for a, b in spans
    )
    return text if len(values) == 1 else f"{{{text}}}"
