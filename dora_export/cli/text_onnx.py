"""What ``dora-export onnx`` prints."""

from __future__ import annotations

from pathlib import Path

from dora_export.cli import text
from dora_export.errors import shown
from dora_export.onnx.model import GraphReport
from dora_export.words import count, size


def summary(report: GraphReport, output: Path) -> str:
    """Return what was made and found, in a few lines."""
    facts = ", ".join(f"{name} {value}" for name, value in report.facts.items()
                      if isinstance(value, str | int) and name in SHOWN)  # fmt: skip
    total = sum(report.files.values())
    lines = [f"exported by {WAYS[report.way]}{facts and f': {facts}'}"]
    if report.verified is None:
        lines.append("  not compared with the unmerged model")
    else:
        lines += text.verify_summary(report.verified).splitlines()
    adapters = report.facts.get("adapters")
    for name, said in (adapters or {}).items() if isinstance(adapters, dict) else ():
        layers = count(len(said["slots"]), "layer")
        lines.append(f"  adapter {shown(name)}: {said['method']} on {layers}")
    lines += [f"  note: {shown(note, text.NOTE)}" for note in report.notes]
    peak = f" · peak memory {size(report.peak_rss_bytes)}" if report.peak_rss_bytes else ""
    lines.append(f"  {size(total)} in {len(report.files)} files{peak} · {report.seconds:.1f} s")
    lines.append(f"-> {output}/")
    return "\n".join(lines)


SHOWN = ("task", "engine", "dtype", "opset", "quantized")
WAYS = {"trace": "tracing", "into": "re-weighting", "adapters": "adding inputs for adapters"}
