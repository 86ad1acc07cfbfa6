"""The tables and lists of a report's page: tensors, findings, and the figures of each tier."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any
from xml.etree.ElementTree import Element

from dora_export.errors import shown
from dora_export.verification.charts import legend_mark
from dora_export.verification.markup import add, el
from dora_export.verification.model import Finding, TensorResult
from dora_export.verification.statement import Group
from dora_export.words import compact, count, number, share

MAX_WORST = 20
MAX_TENSORS = 1000
MAX_SAID = 200  # findings of one kind shown with what was found; of the rest, the places
MAX_PLACES = 5000  # of one kind
MAX_OPEN = 20  # rows of a table that is not folded up
MAX_ROWS = 100  # of a list in a tier's figures
MAX_TEXT = 2000
IN_WORDS = {"excess": "of what is allowed", "kl": "KL", "rms": "root mean square"}  # for people
COLUMNS = (
    ("tensor", "name"),
    ("result", ""),
    ("stored as", ""),
    ("worst, ulp", "n"),
    ("not correctly rounded", "n"),
    ("relative error", "n"),
    ("× the least", "n"),
    ("‖W′−W‖/‖W‖", "n"),
    ("m/‖W‖", "n"),
)


def worst_first(tensors: Sequence[TensorResult]) -> list[TensorResult]:
    """Return tensors, wrong ones first, then by distance."""
    return sorted(tensors, key=lambda t: (t.status != "wrong", -t.max_ulp))


def tensor_table(tensors: Sequence[TensorResult], caption: str, label: str) -> Element:
    """Return tensors as a table that can be sorted.

    Args:
        tensors: Its rows, in order.
        caption: What the table holds.
        label: Name of the region that scrolls, for screen readers.
    """
    heads = [el("th", text, scope="col", class_=css or None) for text, css in COLUMNS]
    body = el("tbody", *map(_row, tensors))
    table = el("table", el("caption", caption), el("thead", el("tr", *heads)), body,
               class_="sortable")  # fmt: skip
    return scrolling(table, label)


def scrolling(content: Element, label: str, css: str = "scroll") -> Element:
    """Return a region that scrolls sideways, also by keys."""
    return el("div", content, class_=css, tabindex=0, role="region", aria_label=label)


def _row(tensor: TensorResult) -> Element:
    unchecked = tensor.status == "unchecked"
    median = tensor.magnitude_ratio[2] if tensor.magnitude_ratio is not None else None
    result = el("td", legend_mark(tensor.status), f" {tensor.status}", data_v=tensor.status)
    if tensor.arithmetic and tensor.status == "rounded":
        add(result, f" (in {shown(tensor.arithmetic)})")
    if tensor.diagnosis and tensor.diagnosis != tensor.status:
        add(result, ": ", el("a", tensor.diagnosis, href=f"#{tensor.diagnosis}"))
    return el(
        "tr",
        el("td", el("code", shown(tensor.name)), class_="name"),
        result,
        el("td", f"{shown(tensor.dtype)} {' × '.join(map(str, tensor.shape))}"),
        _cell(None if unchecked else tensor.max_ulp),
        _cell(None if unchecked else tensor.misrounded, share(tensor.misrounded)),
        _cell(None if unchecked else tensor.relative_error),
        _cell(None if unchecked else tensor.error_ratio),
        _cell(tensor.update_size),
        _cell(median, number(median, 4)),
    )


def _cell(value: float | None, text: str | None = None) -> Element:
    known = value is not None and not math.isnan(value)
    # What is not known sorts below everything; JavaScript spells infinity out.
    key = f"{value:.9g}".replace("inf", "Infinity") if known else "-1"
    return el("td", text if known and text else number(value), class_="n", data_v=key)


def finding(group: Group) -> Element:
    """Return all findings of one kind, with what they mean and what to do."""
    meaning = group.meaning
    head = el("h3", el("span", meaning.severity, class_=f"state {meaning.severity}"),
              f" {meaning.title} ", el("code", meaning.code))  # fmt: skip
    section = el(
        "section",
        head,
        el("p", f"{meaning.tier} tier, {count(len(group.findings), 'finding')}", class_="soft"),
        el("p", meaning.means),
        el("p", el("strong", "What to do: "), meaning.do),
        class_=f"finding {meaning.severity}",
        id=meaning.code,
    )
    said, rest = group.findings[:MAX_SAID], group.findings[MAX_SAID:]
    listed = el("ul", *(_said(f) for f in said))
    if len(said) > 12:
        add(section, el("details", el("summary", f"{_all(said, rest)} with what was found"),
                        listed))  # fmt: skip
        add(section, el("p", "Where: ", *_codes(_places(group.findings))))
    else:
        add(section, listed)
    if len(group.findings) > MAX_PLACES:
        left = len(group.findings) - MAX_PLACES
        add(section, el("p", f"and {count(left, 'place')} more; verify --json lists them all"))
    return section


def _all(said: Sequence[Finding], rest: Sequence[Finding]) -> str:
    return f"The first {len(said):,}" if rest else f"All {len(said):,}"


def _said(finding: Finding) -> Element:
    return el("li", el("code", shown(finding.where)), f": {shown(finding.what, 300)}")


def _places(findings: Sequence[Finding]) -> list[str]:
    return compact(f.where for f in findings[:MAX_PLACES])


def _codes(names: Sequence[str]) -> list[Element | str]:
    parts: list[Element | str] = []
    for name in names:
        parts += [", "] if parts else []
        parts.append(el("code", shown(name, 200)))
    return parts


def figures(values: Mapping[str, Any], title: str = "Figures") -> list[Element]:
    """Return a tier's numbers: values as pairs, objects with the same keys as rows of one table.

    An object that is alone with its keys is a pair too.

    Args:
        values: JSON-ready data of any depth.
        title: What they are about.
    """
    pairs, blocks = el("dl", class_="pairs"), []
    alike: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and any(isinstance(v, Mapping) for v in value.values()):
            blocks += [el("h3", _words(key)), *figures(value, _words(key))]
        elif isinstance(value, Mapping):
            if value:
                alike.setdefault(tuple(value), []).append({"of": _words(key), **value})
        elif _is_table(value):
            blocks.append(_table(_words(key), [_flat(row) for row in value]))
        elif value != "":
            content = _text(value)
            block = el("pre", content) if "\n" in content else content
            add(pairs, el("dt", _words(key)), el("dd", block))
    for rows in alike.values():
        if len(rows) == 1:
            of, *entries = rows[0].items()
            said = ", ".join(f"{_words(k)} {_text(v)}" for k, v in entries)
            add(pairs, el("dt", _text(of[1])), el("dd", said))
    tables = [_table(title, rows) for rows in alike.values() if len(rows) > 1]
    return [*([pairs] if len(pairs) else []), *tables, *blocks]


def _is_table(value: object) -> bool:
    rows = isinstance(value, Sequence) and not isinstance(value, str)
    return rows and bool(value) and all(isinstance(v, Mapping) for v in value)  # type: ignore[attr-defined]


def _flat(row: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Return an object's values and those of objects in it, named by their way."""
    flat: dict[str, Any] = {}
    for key, value in row.items():
        name = f"{above}{key}"
        flat |= _flat(value, f"{name} ") if isinstance(value, Mapping) else {name: value}
    return flat


def _table(title: str, rows: Sequence[Mapping[str, Any]]) -> Element:
    keys = list(dict.fromkeys(key for row in rows[:MAX_ROWS] for key in row))
    keys = [k for k in keys if any(r.get(k) is not None for r in rows)]
    numeric = {k for k in keys if all(isinstance(r.get(k), int | float | None) for r in rows)}
    more = f", the first {MAX_ROWS} of {len(rows):,}" if len(rows) > MAX_ROWS else ""
    heads = [el("th", _words(k), scope="col", class_="n" if k in numeric else None) for k in keys]
    body = el("tbody")
    for row in rows[:MAX_ROWS]:
        cells = [
            _cell(row.get(k), _text(row.get(k)))
            if k in numeric
            else el("td", _text(row.get(k)), class_="text")
            for k in keys
        ]
        add(body, el("tr", *cells))
    table = el("table", el("caption", title + more), el("thead", el("tr", *heads)), body,
               class_="sortable figures")  # fmt: skip
    region = scrolling(table, title)
    if len(rows) <= MAX_OPEN:
        return region
    return el("details", el("summary", f"{title}: {count(len(rows), 'row')}"), region)


def _words(key: object) -> str:
    return " ".join(IN_WORDS.get(w, w) for w in shown(str(key).replace("_", " ")).split(" "))


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if value is None or isinstance(value, float):
        return number(value)
    if isinstance(value, Sequence) and not isinstance(value, str):
        listed = ", ".join(_text(v) for v in value[:MAX_ROWS])
        more = f" and {len(value) - MAX_ROWS:,} more" if len(value) > MAX_ROWS else ""
        return (listed + more) or "none"
    lines = str(value)[:MAX_TEXT].split("\n")
    return "\n".join(shown(line, MAX_TEXT) for line in lines)
