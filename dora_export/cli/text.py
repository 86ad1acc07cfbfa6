"""Reports as text, and progress: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import re
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import click

from dora_export.api import Progress
from dora_export.cli import streams
from dora_export.cli.explain import COLOURS
from dora_export.errors import printable, shown
from dora_export.report import Engine, InspectReport, MergeReport
from dora_export.verification.model import TensorResult, TierResult, Verdict, VerifyReport
from dora_export.verification.statement import (
    Group,
    State,
    accuracy,
    groups,
    headline,
    misrounded,
    tier_state,
)
from dora_export.words import compact, count, number, share, size

NOTE = 2000  # characters of a note that are shown
PATH = 5000  # characters of a path that are shown: all that a system takes
LINE_SECONDS = 10.0  # between two plain progress lines
LISTED = 8  # findings of one kind told one by one; more are told by their places
WORST = 5  # tensors
MORE_CODES = 4  # of findings that are worth an explanation
LEFT = 3  # files that were not taken over
Unit = Literal["bytes", "values"]
MARKS = {"yes": ("✓", "green"), "no": ("✗", "red"), "wrong": ("!", "yellow")}

VERDICTS: dict[Verdict, tuple[str, str]] = {
    "right": ("✓", "green"), "wrong": ("✗", "red"), "unchecked": ("?", "yellow")
}  # fmt: skip
STATES: dict[State, tuple[str, str]] = {
    "right": VERDICTS["right"], "wrong": VERDICTS["wrong"], "unchecked": VERDICTS["unchecked"],
    "warning": ("!", "yellow"), "skipped": ("–", "yellow"),
}  # fmt: skip


@contextmanager
def progress(
    what: str, *, quiet: bool, unit: Unit = "bytes", end: str = "checking and publishing"
) -> Iterator[Progress | None]:
    """Yield a callback for what is done and in all, shown on stderr; None if ``quiet``.

    Args:
        what: What goes on, until all is done.
        quiet: Show nothing.
        unit: What is counted.
        end: What goes on after that.
    """
    if quiet:
        yield None
    elif sys.stderr.isatty():
        with _bar(what, unit, end) as on_progress:
            yield on_progress
    else:
        yield _lines(what, unit)


@contextmanager
def _bar(what: str, unit: Unit, end: str) -> Iterator[Progress]:
    from rich.console import Console  # noqa: PLC0415 - a tenth of a second, for terminals only
    from rich.progress import (  # noqa: PLC0415
        BarColumn,
        DownloadColumn,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )
    from rich.progress import Progress as RichProgress  # noqa: PLC0415

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        *(
            (DownloadColumn(), TransferSpeedColumn())
            if unit == "bytes"
            else (TaskProgressColumn(),)
        ),
        TimeRemainingColumn(),
    )
    bar = RichProgress(*columns, console=Console(stderr=True), transient=True)
    task = bar.add_task(what, total=None)

    def show(done: int, total: int) -> None:
        phase = what if done < total else end
        bar.update(task, description=phase, completed=done, total=total)

    with bar:
        yield show


def _lines(what: str, unit: Unit) -> Progress:
    last = time.monotonic()
    counted = size if unit == "bytes" else "{:,}".format

    def show(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last >= LINE_SECONDS:
            last = time.monotonic()
            # Hours of work do not end because nobody listens any more.
            streams.tell(f"{what}: {counted(done)} of {counted(total)} ({done / total:.0%})")

    return show


def merge_summary(report: MergeReport, output: Path) -> str:
    """Return what a merge did, in a few lines that can be pasted."""
    done = "would merge" if report.dry_run else "merged"
    counts = report.tensors
    kind = f"{report.adapter_format}, magnitude {report.magnitude}"
    kind = kind if report.method == "DoRA" else report.adapter_format
    head = f"{done} {count(counts.get('merged', 0), f'{report.method} tensor')} ({kind})"
    rest = [f"{counts[s]} {s}" for s in ("replaced", "added", "cast", "unchanged") if s in counts]
    ignored = f", {len(report.ignored)} ignored" if report.ignored else ""
    each = zip(report.adapters, report.weights, strict=True) if len(report.adapters) > 1 else ()
    lines = [
        click.style(head, bold=True),
        *(f"  {i}. {shown(path, PATH)}, weight {w:g}" for i, (path, w) in enumerate(each, 1)),
        f"  adapter tensors used {report.adapter_tensors_used}/{report.adapter_tensors}{ignored}"
        f" · base tensors {', '.join(rest) or 'all merged'} · names {report.names}",
        f"  {report.dtypes[0]} -> {report.dtypes[1]}, math {report.precision} or better"
        f" · {_verified(report)}",
        f"  {size(report.output_bytes)} in {count(len(report.files), 'weight file')}"
        f" and {count(len(report.side_files), 'side file')}"
        f" · {_memory(report)} · {report.seconds:.1f} s",
    ]
    if report.resumed_bytes:
        there, whole = size(report.resumed_bytes), size(report.weight_bytes)
        resumed, were = ("would resume", "are") if report.dry_run else ("resumed", "were")
        lines.append(f"  {resumed}: {there} of {whole} {were} already there")
    if report.left_behind:
        lines.append(f"  left behind: {_left(report.left_behind)}")
    lines += [f"  {shown(note, NOTE)}" for note in report.notes]
    lines.append(
        "nothing written (--dry-run)"
        if report.dry_run
        else f"-> {shown(output, PATH)}/   manifest {shown(output / 'dora_export.json', PATH)}"
    )
    return "\n".join(lines)


def _left(files: Mapping[str, str]) -> str:
    """Return files and why they are not there; all of them are in the report as JSON."""
    named = [f"{shown(name)} ({why})" for name, why in list(files.items())[:LEFT]]
    more = [f"and {len(files) - LEFT} more"] if len(files) > LEFT else []
    return f"{', '.join([*named, *more])}; copy what the model needs"


def _verified(report: MergeReport) -> str:
    if report.worst_ulp is None:
        return "not checked"
    where = f" in {shown(report.worst_tensor)}" if report.worst_tensor else ""
    sampled = "sampled rows" if report.verified == "fast" else "every element"
    return f"checked {sampled}: worst {report.worst_ulp:.2f} ulp{where}"


def _memory(report: MergeReport) -> str:
    planned = f"buffers at most {size(report.memory_bytes)}"
    if report.peak_rss_bytes is None or report.dry_run:
        return planned
    return f"peak memory {size(report.peak_rss_bytes)} ({planned})"


def said_by(source: object) -> str:
    """Return where a number is from, behind it, or nothing."""
    return f", by {source}" if source else ""


def inspect_summary(report: InspectReport) -> str:
    """Return what an adapter is, as an aligned list."""
    facts = report.facts
    numbers = {
        name: ", ".join(f"{v:g}" for v in facts.get(name, ()))
        for name in ("rank", "alpha", "scaling")
    }
    rows = [
        ("format", report.format),
        ("method", f"{facts.get('method', '?')}, magnitude {facts.get('magnitude', 'none')}"),
        ("algorithm", str(facts.get("algorithm", ""))),
        ("trainer", str(facts.get("trainer", ""))),
        ("axis", str(facts.get("axis", ""))),
        ("begun with", str(facts.get("begun with", ""))),
        ("experts", str(facts.get("experts", ""))),
        ("rank", numbers["rank"]),
        ("alpha", numbers["alpha"] + (" (rslora)" if facts.get("rslora") else "")),
        ("scaling", numbers["scaling"] + said_by(facts.get("scaling from"))),
        ("size", f"{report.parameters:,} parameters, {size(report.nbytes)}"),
        ("layers", ", ".join(f"{shown(name)} x{n}" for name, n in report.modules.items())),
        ("trained on", shown(report.base_name or "not said", 400)),
    ]
    if report.fits:
        assert report.output_bytes is not None, "Bug: a fitting base has a size"
        fits = f"fits, {report.merged} tensors would change"
        rows.append(("base", f"{shown(report.base, PATH)}: {fits}"))
        rows.append(("merged size", size(report.output_bytes)))
    elif report.base is not None:
        rows.append(("base", f"{shown(report.base, PATH)}: does not fit: {report.misfit}"))
    lines = [click.style(shown(report.path, PATH), bold=True)]
    lines += [f"  {name:<12} {printable(value)}" for name, value in rows if value]
    lines += ["  served unmerged by", *(_engine(e) for e in report.engines)]
    lines += [f"  {warned(warning)}" for warning in report.warnings]
    lines += [f"  note: {shown(note, NOTE)}" for note in report.notes]
    return "\n".join(lines)


def warned(warning: str) -> str:
    """Return a warning as a line of its own."""
    return f"{click.style('warning:', fg='yellow', bold=True)} {printable(warning)}"


def _engine(engine: Engine) -> str:
    mark, colour = MARKS[engine.takes]
    return f"    {click.style(mark, fg=colour)} {engine.name:<20} {engine.why}"


def verify_summary(report: VerifyReport) -> str:
    """Return what a verification found: the verdict first, then every finding."""
    sign, colour = VERDICTS[report.verdict]
    found = groups(report.findings)
    lines = [click.style(f"{sign} {headline(report)}", fg=colour, bold=True)]
    lines += [_tier(report, tier) for tier in report.tiers]
    lines += _accuracy(report)
    for group in found:
        lines += _finding(group)
    lines += _worst(report)
    lines += [f"  note: {shown(note, NOTE)}" for note in report.notes]
    memory = (
        "" if report.peak_rss_bytes is None else f" · peak memory {size(report.peak_rss_bytes)}"
    )
    lines.append(
        f"  {shown(report.method)} · {report.level} · written by {shown(report.maker)}"
        f" · {report.seconds:.1f} s{memory}"
    )
    telling = [g.meaning.code for g in found if g.meaning.severity != "note"] or [
        g.meaning.code for g in found
    ]
    if telling:
        also = f" (and {', '.join(telling[1:MORE_CODES])})" if telling[1:] else ""
        lines.append(f"what it means and what to do: dora-export explain {telling[0]}{also}")
    return "\n".join(lines)


def fitted(summary: str) -> str:
    """Return text with long lines broken between words on a terminal, as it is elsewhere."""
    if not sys.stdout.isatty():
        return summary
    width = shutil.get_terminal_size().columns
    return "\n".join(part for line in summary.split("\n") for part in _broken(line, width))


def _broken(line: str, width: int) -> Iterator[str]:
    """Yield a line's parts; what follows the first is indented deeper."""
    indent = " " * (len(line) - len(line.lstrip(" ")) + 4)
    part = ""
    for word in re.findall(r" *[^ ]+", line):
        if part.strip() and len(click.unstyle(part + word)) > width:
            yield part
            part = indent + word.lstrip(" ")
        else:
            part += word
    yield part


def _tier(report: VerifyReport, tier: TierResult) -> str:
    state = tier_state(report, tier)
    sign, colour = STATES[state]
    seconds = click.style(f"  {tier.seconds:.1f} s", dim=True) if tier.ran else ""
    summary = shown(tier.summary, 300) if tier.ran else f"not run: {shown(tier.summary, 300)}"
    return f"  {click.style(sign, fg=colour)} {tier.tier:<8} {summary}{seconds}"


def _accuracy(report: VerifyReport) -> list[str]:
    lines = []
    for kind, found in accuracy(report):
        best = "" if kind == "exact" else " (best: 0.5 ulp, none)"
        lines.append(
            f"    {kind}: {count(found.tensors, 'tensor')}, "
            f"{found.elements:,} {found.dtypes} values, worst "
            f"{number(found.worst.max_ulp, ascii_only=True)} ulp, "
            f"{misrounded(found.misrounded, ascii_only=True)}{best}"
        )
    return lines


def _finding(group: Group) -> list[str]:
    """Return a heading and every place: with what was found, or folded where there are many."""
    meaning, found = group.meaning, group.findings
    severity = click.style(meaning.severity, fg=COLOURS[meaning.severity], bold=True)
    many = f" ({len(found):,} times)" if len(found) > 1 else ""
    lines = [f"{severity}: {click.style(meaning.code, bold=True)}, {meaning.title}{many}"]
    if len(found) <= LISTED:
        return lines + [f"    {shown(f.where)}: {shown(f.what, 300)}" for f in found]
    lines += [f"    {shown(name, 200)}" for name in compact(f.where for f in found)]
    return [*lines, f"    e.g. {shown(found[0].where)}: {shown(found[0].what, 300)}"]


def _worst(report: VerifyReport) -> list[str]:
    """Return the tensors that are furthest from exact, where any is worth a look."""
    compared = [t for t in report.tensors if t.status != "unchecked"]
    if all(t.status == "exact" for t in compared):
        return []
    order = sorted(compared, key=lambda t: (t.status != "wrong", -t.max_ulp))[:WORST]
    rows = [("worst tensors", "ulp", "not rounded right", "error/rounding", "update"),
            *map(_tensor, order)]  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            [
                f"{row[0]:<{widths[0]}}",
                *(f"{c:>{w}}" for c, w in zip(row[1:], widths[1:], strict=True)),
            ]
        )
        for row in rows
    ]
    return [click.style(f"  {lines[0]}", dim=True), *(f"  {line}" for line in lines[1:])]


def _tensor(tensor: TensorResult) -> tuple[str, ...]:
    return (
        shown(tensor.name, 70),
        number(tensor.max_ulp, ascii_only=True),
        share(tensor.misrounded, ascii_only=True),
        number(tensor.error_ratio, ascii_only=True),
        number(tensor.update_size, 2, ascii_only=True),
    )
