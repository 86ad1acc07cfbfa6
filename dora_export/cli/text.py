"""Reports as text, and progress: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from dora_export.api import Progress
from dora_export.report import Engine, InspectReport, MergeReport

LINE_SECONDS = 10.0  # between two plain progress lines
MARKS = {"yes": ("✓", "green"), "no": ("✗", "red"), "wrong": ("!", "yellow")}


@contextmanager
def progress(what: str, *, quiet: bool) -> Iterator[Progress | None]:
    """Yield a callback for bytes done and in all, shown on stderr; None if ``quiet``."""
    if quiet:
        yield None
    elif sys.stderr.isatty():
        with _bar(what) as on_progress:
            yield on_progress
    else:
        yield _lines(what)


@contextmanager
def _bar(what: str) -> Iterator[Progress]:
    from rich.console import Console  # noqa: PLC0415 - a tenth of a second, for terminals only
    from rich.progress import (  # noqa: PLC0415
        BarColumn,
        DownloadColumn,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )
    from rich.progress import Progress as RichProgress  # noqa: PLC0415

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    bar = RichProgress(*columns, console=Console(stderr=True), transient=True)
    task = bar.add_task(what, total=None)

    def show(done: int, total: int) -> None:
        phase = what if done < total else "checking and publishing"
        bar.update(task, description=phase, completed=done, total=total)

    with bar:
        yield show


def _lines(what: str) -> Progress:
    last = time.monotonic()

    def show(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last >= LINE_SECONDS:
            last = time.monotonic()
            click.echo(f"{what}: {size(done)} of {size(total)} ({done / total:.0%})", err=True)

    return show


def size(nbytes: float) -> str:
    """Return bytes as people write them, in powers of ten."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(nbytes) < 1000 or unit == "GB":
            break
        nbytes /= 1000
    return f"{nbytes:.0f} {unit}" if unit == "B" or nbytes >= 100 else f"{nbytes:.1f} {unit}"


def merge_summary(report: MergeReport, output: Path) -> str:
    """Return what a merge did, in a few lines that can be pasted."""
    done = "would merge" if report.dry_run else "merged"
    counts = report.tensors
    kind = f"{report.adapter_format}, magnitude {report.magnitude}"
    kind = kind if report.method == "DoRA" else report.adapter_format
    head = f"{done} {_count(counts.get('merged', 0), f'{report.method} tensor')} ({kind})"
    rest = [f"{counts[s]} {s}" for s in ("replaced", "added", "cast", "unchanged") if s in counts]
    ignored = f", {len(report.ignored)} ignored" if report.ignored else ""
    lines = [
        click.style(head, bold=True),
        f"  adapter tensors used {report.adapter_tensors_used}/{report.adapter_tensors}{ignored}"
        f" · base tensors {', '.join(rest) or 'all merged'} · names {report.names}",
        f"  {report.dtypes[0]} -> {report.dtypes[1]}, math {report.precision} or better"
        f" · {_verified(report)}",
        f"  {size(report.output_bytes)} in {_count(len(report.files), 'weight file')}"
        f" and {_count(len(report.side_files), 'side file')}"
        f" · {_memory(report)} · {report.seconds:.1f} s",
    ]
    lines += [f"  {note}" for note in report.notes]
    lines.append(
        "nothing written (--dry-run)"
        if report.dry_run
        else f"-> {output}/   manifest {output / 'dora_export.json'}"
    )
    return "\n".join(lines)


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")


def _verified(report: MergeReport) -> str:
    if report.worst_ulp is None:
        return "not checked"
    where = f" in {report.worst_tensor}" if report.worst_tensor else ""
    sampled = "sampled rows" if report.verified == "fast" else "every element"
    return f"checked {sampled}: worst {report.worst_ulp:.2f} ulp{where}"


def _memory(report: MergeReport) -> str:
    planned = f"buffers at most {size(report.memory_bytes)}"
    if report.peak_rss_bytes is None or report.dry_run:
        return planned
    return f"peak memory {size(report.peak_rss_bytes)} ({planned})"


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
        ("trainer", str(facts.get("trainer", ""))),
        ("axis", str(facts.get("axis", ""))),
        ("rank", numbers["rank"]),
        ("alpha", numbers["alpha"] + (" (rslora)" if facts.get("rslora") else "")),
        ("scaling", numbers["scaling"]),
        ("size", f"{report.parameters:,} parameters, {size(report.nbytes)}"),
        ("layers", ", ".join(f"{name} x{n}" for name, n in report.modules.items())),
        ("trained on", report.base_name or "not said"),
    ]
    if report.fits:
        assert report.output_bytes is not None, "Bug: a fitting base has a size"
        rows.append(("base", f"{report.base}: fits, {report.merged} tensors would change"))
        rows.append(("merged size", size(report.output_bytes)))
    elif report.base is not None:
        rows.append(("base", f"{report.base}: does not fit: {report.misfit}"))
    lines = [click.style(str(report.path), bold=True)]
    lines += [f"  {name:<12} {value}" for name, value in rows if value]
    lines += ["  served unmerged by", *(_engine(e) for e in report.engines)]
    lines += [f"  note: {note}" for note in report.notes]
    return "\n".join(lines)


def _engine(engine: Engine) -> str:
    mark, colour = MARKS[engine.takes]
    return f"    {click.style(mark, fg=colour)} {engine.name:<20} {engine.why}"
