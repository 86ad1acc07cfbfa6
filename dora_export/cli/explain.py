"""The catalogue of findings on a terminal; needs neither numpy nor torch."""

from __future__ import annotations

from difflib import get_close_matches
from itertools import groupby

import click

from dora_export.errors import DoraExportError, shown
from dora_export.verification.catalog import FINDINGS, MEANINGS, Severity, Tier

WIDTH = 80
COLOURS: dict[Severity, str] = {
    "wrong": "red",
    "unchecked": "yellow",
    "warning": "yellow",
    "note": "cyan",
}
TIERS: dict[Tier, str] = {
    "ledger": "files, names, shapes, types and bytes",
    "oracle": "changed tensors against the exact result",
    "forward": "the merged model against the unmerged one",
    "onnx": "a graph against the unmerged model",
}
SEVERITIES: dict[Severity, str] = {
    "wrong": "fails the verification: exit code 1",
    "unchecked": "keeps it from passing: exit code 3",
    "warning": "worth a look, the model is right",
    "note": "worth knowing",
}


def table() -> str:
    """Return all findings by tier, a line each."""
    lines = []
    for tier, meanings in groupby(FINDINGS, key=lambda m: m.tier):
        lines += ["", f"{click.style(tier, bold=True)}: {TIERS[tier]}"]
        for m in meanings:
            severity = click.style(f"{m.severity:<9}", fg=COLOURS[m.severity])
            lines.append(f" {m.code:<20} {severity} {m.title}")
    return "\n".join([*lines[1:], "", "dora-export explain CODE says more about one."])


def entry(code: str) -> str:
    """Return what a finding means and what to do.

    Raises:
        DoraExportError: There is none of this code.
    """
    if code not in MEANINGS:
        near = get_close_matches(code.lower(), MEANINGS, n=3, cutoff=0.5)
        like = f" Did you mean {' or '.join(near)}?" if near else ""
        raise DoraExportError(
            f"'{shown(code)}': no finding has this code.{like} "
            "'dora-export explain' lists them all."
        )
    m = MEANINGS[code]
    severity = click.style(m.severity, fg=COLOURS[m.severity], bold=True)
    return "\n".join([
        f"{click.style(m.code, bold=True)}: {m.title}",
        f"{severity} ({SEVERITIES[m.severity]}), found by the {m.tier} tier",
        "",
        "What it means",
        _wrapped(m.means),
        "",
        "What to do",
        _wrapped(m.do),
    ])  # fmt: skip


def _wrapped(text: str) -> str:
    return click.wrap_text(text, WIDTH, initial_indent="  ", subsequent_indent="  ")
