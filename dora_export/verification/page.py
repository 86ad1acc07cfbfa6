"""A report as one HTML page that needs nothing else: no network, no file beside it.

The page's own style and script are the only ones its Content-Security-Policy lets in; all text
goes through ``markup``, which cannot make markup out of it.
"""

from __future__ import annotations

import base64
import hashlib
from importlib import resources
from xml.etree.ElementTree import Element

from dora_export._version import __version__
from dora_export.errors import shown
from dora_export.verification import charts, tables
from dora_export.verification.grid import Grid, arrange
from dora_export.verification.markup import Child, add, el, render
from dora_export.verification.model import TierResult, Verdict, VerifyReport
from dora_export.verification.statement import groups, headline, precision, proof, tier_state
from dora_export.words import count, number, share, size

GENERATOR = '<meta name="generator" content="dora-export'  # by it we know our own pages
FRAME = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
{generator} {version}">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src '{style_hash}'; \
script-src '{script_hash}'; base-uri 'none'; form-action 'none'">
<meta name="viewport" content="width=device-width, initial-scale=1">
{title}
<style>{style}</style>
</head>
<body>
{body}
<script>{script}</script>
</body>
</html>
"""
SIGNS: dict[Verdict, str] = {
    "right": "M9 17l6 6 11-13",
    "wrong": "M10 10l14 14M24 10L10 24",
    "unchecked": "M12.5 13a4.5 4.5 0 1 1 6.3 4.1c-1.3.6-1.8 1.3-1.8 2.9M17 25v.1",
}
STATES = {
    "right": "✓ right",
    "wrong": "✗ wrong",
    "unchecked": "? not checked",
    "warning": "! right, with warnings",
    "skipped": "– not run",
}


def page(report: VerifyReport) -> str:
    """Return a report as HTML, well-formed, below five megabytes for any number of tensors."""
    folder = resources.files("dora_export.verification")
    style = "\n" + (folder / "page.css").read_text(encoding="utf-8")
    script = "\n" + (folder / "page.js").read_text(encoding="utf-8")
    sections = (_compared, _charts, _worst, _findings, _tiers, _notes)
    main = el("main", _verdict(report), _numbers(report))
    for section in sections:
        add(main, *section(report))
    add(main, _footer(report))
    return FRAME.format(
        generator=GENERATOR,
        version=__version__,
        style_hash=_digest(style),
        script_hash=_digest(script),
        title=render(el("title", f"{headline(report)}: {shown(report.merged)}")),
        style=style,
        body=render(main),
        script=script,
    )


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _verdict(report: VerifyReport) -> Element:
    verdict = report.verdict
    sign = el("svg", el("circle", cx=17, cy=17, r=15, class_="sign"),
              el("path", d=SIGNS[verdict], class_="sign"),
              viewBox="0 0 34 34", width=40, height=40, aria_hidden="true")  # fmt: skip
    proofs = [el("li", _sentence(text)) for text in proof(report)]
    tiers = [el("li", el("strong", t.tier), " ", _state(report, t), f": {shown(t.summary, 300)}")
             for t in report.tiers]  # fmt: skip
    return el(
        "header",
        el("div", sign, el("h1", headline(report)), class_="head"),
        el("ul", *proofs, *tiers),
        class_=f"verdict {verdict}",
    )


def _state(report: VerifyReport, tier: TierResult) -> Element:
    state = tier_state(report, tier)
    return el("span", STATES[state], class_=f"state {state}")


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def _numbers(report: VerifyReport) -> Element | None:
    """Return the key figures as cards; None where nothing was compared."""
    found = precision(report.tensors)
    if found is None:
        return None
    wrong = sum(t.status == "wrong" for t in report.tensors)
    cards = [
        ("changed tensors", f"{len(report.tensors):,}", f"{wrong:,} wrong" if wrong else None),
        ("values compared", _millions(found.elements), None),
        ("worst distance", f"{number(found.worst.max_ulp)} ulp", found.dtypes),
        ("not correctly rounded", share(found.misrounded), None),
        (
            "rounding error over the least possible",
            number(max(t.error_ratio for t in report.tensors if t.status != "unchecked")),
            "at most",
        ),
    ]
    return el("dl", *(_card(*card) for card in cards), class_="numbers")


def _card(name: str, value: str, note: str | None) -> Element:
    noted = el("dd", value) if note is None else el("dd", value, " ", el("small", note))
    return el("div", el("dt", name), noted)


def _millions(items: int) -> str:
    return f"{number(items / 1e6)} million" if items >= 1_000_000 else f"{items:,}"


def _compared(report: VerifyReport) -> list[Element]:
    read = {"full": "full: every byte and every element", "fast": "fast: all names, sampled values"}
    memory = "" if report.peak_rss_bytes is None else f", {size(report.peak_rss_bytes)} of memory"
    pairs: list[tuple[str, Child]] = [
        ("base", el("span", _path(report.base), class_="path")),
        *_adapters(report),
        ("merged", el("span", _path(report.merged), class_="path")),
        ("written by", shown(report.maker, 300)),
        ("level", read[report.level]),
        ("verified by", f"dora-export {__version__}, {report.seconds:.1f} s{memory}"),
    ]
    rows = [part for name, value in pairs for part in (el("dt", name), el("dd", value))]
    return [el("h2", "What was compared"), el("dl", *rows, class_="pairs")]


def _adapters(report: VerifyReport) -> list[tuple[str, Child]]:
    """Return the adapters in order, and after the last of them what they are."""
    paths = [_path(path) for path in report.adapters]
    paths[-1:] = [f"{path} ({shown(report.method)})" for path in paths[-1:]]
    return [("adapter", el("span", path, class_="path")) for path in paths]


def _path(path: object) -> str:
    return shown(path, 1000)


def _charts(report: VerifyReport) -> list[Element]:
    if not report.tensors:
        return []
    grid = arrange(report.tensors)
    across = "A strip per kind of module, a column per layer."
    if grid.shared > 1:
        across += f" Up to {grid.shared:,} tensors (experts, say) share a place."
    if any(c.first is None for c in grid.columns):
        across += " Under – is what stands in no layer."
    if grid.left_out:
        across += f" {count(grid.left_out, 'kind')} of modules without room here."
    parts = [el("h2", "Layer by layer"), el("p", across, class_="soft")]
    parts.append(_chart(
        charts.error_chart(grid), "Distance from the exact result",
        "Largest distance of a tensor's values from the float64 result, in units of the last "
        "place (ulp) of the type it is stored in. Rounding alone costs up to ½ ulp (dashed); at "
        "most 1 ulp (solid) counts as exact.",
        _status_legend(grid),
    ))  # fmt: skip
    if any(t.magnitude_ratio is not None for t in report.tensors):
        parts.append(_chart(
            charts.magnitude_chart(grid), "What the adapter does to the magnitudes: m / ‖W‖",
            "Box: the middle half of a tensor's rows (or columns); bar: the median; whiskers: the "
            "least and the largest (an arrow: further off). On the line, the adapter keeps the "
            "base's length.",
        ))  # fmt: skip
    parts.append(_chart(
        charts.update_chart(grid), "Size of the update: ‖W′ − W‖ / ‖W‖",
        "How much of each tensor the adapter changes, as a whole.", _heat_legend(grid),
    ))  # fmt: skip
    return parts


def _chart(picture: Element, title: str, text: str, legend: Element | None = None) -> Element:
    caption = el("figcaption", el("h3", title), el("p", text), legend)
    return el("figure", caption, tables.scrolling(picture, title, "scroll chart"))


def _status_legend(grid: Grid) -> Element:
    there = {t.status for c in grid.cells for t in c.tensors}
    entries = [
        el("li", charts.legend_mark(s), charts.STATUS_WORDS[s])
        for s in reversed(charts.GRAVITY)
        if s in there
    ]
    return el("ul", *entries, class_="legend")


def _heat_legend(grid: Grid) -> Element:
    scale = charts.heat_scale(grid)
    if scale.high <= scale.low:
        return el("p", f"All {number(scale.low, 2)}.")
    return charts.heat_legend(scale)


def _worst(report: VerifyReport) -> list[Element]:
    tensors = report.tensors
    if not tensors:
        return []
    worst = tables.worst_first(tensors)[: tables.MAX_WORST]
    order = (
        "Wrong ones first, then by distance from the exact result. × the least: the error over "
        "that of rounding the exact values once. m/‖W‖: the median."
    )
    title = f"The worst {len(worst)} of {count(len(tensors), 'changed tensor')}"
    table = tables.tensor_table(worst, title, title)
    parts = [el("h2", "Worst tensors"), el("p", order, class_="soft"), table]
    if len(tensors) > len(worst):
        some = tensors[: tables.MAX_TENSORS]
        all_of_them = f"All {count(len(tensors), 'changed tensor')}"
        if len(tensors) > len(some):
            some = tuple(tables.worst_first(tensors)[: tables.MAX_TENSORS])
            all_of_them = f"The worst {len(some):,} of {count(len(tensors), 'changed tensor')}"
        table = tables.tensor_table(some, all_of_them, all_of_them)
        parts.append(el("details", el("summary", all_of_them), table))
    return parts


def _findings(report: VerifyReport) -> list[Element]:
    found = groups(report.findings)
    if not found:
        return [el("h2", "Findings"), el("p", "None.")]
    return [el("h2", "Findings"), *map(tables.finding, found)]


def _tiers(report: VerifyReport) -> list[Element]:
    parts = []
    for tier in report.tiers:
        line = el("p", _state(report, tier), f": {shown(tier.summary, 300)}")
        if tier.ran:
            add(line, el("span", f" ({tier.seconds:.1f} s)", class_="soft"))
        parts += [
            el("h2", f"{tier.tier.capitalize()} tier"),
            line,
            *tables.figures(tier.figures, f"Figures of the {tier.tier} tier"),
        ]
    return parts


def _notes(report: VerifyReport) -> list[Element]:
    if not report.notes:
        return []
    notes = [el("li", shown(note, 500)) for note in report.notes]
    return [el("h2", "Notes"), el("ul", *notes)]


def _footer(report: VerifyReport) -> Element:
    return el(
        "footer",
        f"dora-export {__version__}. An ulp is the distance between two neighbouring values of the "
        "stored type. ",
        el("code", "dora-export explain CODE"),
        " says more about a finding; ",
        el("code", "dora-export verify --json"),
        f" has every number of this page{'' if report.tensors else ' and more'}.",
    )
