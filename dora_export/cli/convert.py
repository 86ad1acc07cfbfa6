"""``dora-export convert``: an adapter in another format, or as a plain LoRA."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from dora_export.cli.options import adapter_options

WORST = 5  # layers that are listed


@click.command(name="convert")
@click.argument("adapter", nargs=-1, required=True)
@click.option(
    "--to",
    required=True,
    metavar="FORMAT",
    help="peft, mlx, torchtune, lycoris, diffusers; or lora.",
)
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder to publish."
)
@click.option("--base", help="Base model, where rows or names depend on it; for lora always.")
@click.option("--rank", type=int, help="With --to lora: rank of every layer.")
@click.option(
    "--weight", "weights", type=float, multiple=True, metavar="X", help="As in merge; for lora."
)
@click.option(
    "--fan-in-fan-out/--no-fan-in-fan-out",
    default=None,
    help="Square weights are stored (in, out), or not. Default: by model type.",
)
@click.option("--threads", type=int, help="Workers. Default: one per CPU.")
@adapter_options
def command(adapter: tuple[str, ...], to: str, output: Path, as_json: bool, **options: Any) -> None:
    """Write ADAPTER in another format, bit for bit, or as the plain LoRA nearest to it.

    peft, mlx, torchtune, lycoris and diffusers: tensors are only rearranged; what the format cannot
    hold is refused by name. lora: for engines that refuse DoRA, a PEFT folder with the best product
    of --rank R for every layer, and how much of the update each one keeps.
    """
    from dora_export import api_convert  # noqa: PLC0415

    report = api_convert.convert(adapter, to, output, **options)
    if as_json:
        click.echo(json.dumps(report.to_dict(), indent=2))
        return
    from dora_export.cli import text  # noqa: PLC0415

    for warning in report.warnings:
        click.echo(text.warned(warning), err=True)
    click.echo(summary(report, output))


def summary(report: Any, output: Path) -> str:
    """Return what was converted, in a few lines."""
    from dora_export.errors import shown  # noqa: PLC0415
    from dora_export.words import count, size  # noqa: PLC0415

    how = "exactly but for one rounding" if report.rounded else "exactly"
    how = how if report.rank is None else f"approximately, rank {report.rank}"
    head = f"converted {report.method} ({report.source_format}) to {report.target}, {how}"
    lines = [click.style(head, bold=True)]
    if report.energy is not None:
        lines.append(
            f"  keeps {report.energy:.2%} of the update's energy in "
            f"{count(len(report.layers), 'layer')}; relative error {(1 - report.energy) ** 0.5:.2g}"
        )
        lines.append("  least is kept of")
        lines += [
            f"    {loss.energy:7.2%}  {shown(loss.name, 200)} {'x'.join(map(str, loss.shape))}"
            for loss in report.layers[:WORST]
        ]
    lines += [f"  note: {note}" for note in report.notes]
    tensors = count(report.tensors, "tensor")
    lines.append(f"  {tensors}, {size(report.nbytes)} · {report.seconds:.1f} s")
    lines.append(f"-> {shown(output, 5000)}/{report.weights}")
    return "\n".join(lines)
