"""The ``dora-export`` command and its options; each command imports what its work needs."""

from __future__ import annotations

import json
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import click

from dora_export._version import __version__
from dora_export.cli import convert, onnx, streams
from dora_export.cli.options import adapter_options
from dora_export.errors import DoraExportError
from dora_export.machine import require_space

PROGRAM_BYTES = 192 << 20  # of address space: numpy and what comes with it

EPILOG = """Exit codes: 0 done and right, 1 a check failed, 2 bad input or refused,
3 could not check, 130 interrupted: run it again to go on."""


class _Group(click.Group):
    """A group that turns refusals into one message and an exit code."""

    def make_context(self, *args: Any, **options: Any) -> click.Context:
        try:
            return super().make_context(*args, **options)
        except OSError as error:  # all that happens here is that --help or --version prints
            sys.exit(streams.unheard(error))

    def invoke(self, ctx: click.Context) -> Any:
        try:
            require_space(PROGRAM_BYTES, "the program itself")
            return super().invoke(ctx)
        except DoraExportError as error:
            mark = click.style("error:", fg="red", bold=True)
            streams.tell(f"{mark} {error}")
            ctx.exit(error.exit_code)
        except OSError as error:  # work tells its own as DoraExportError: this one is of printing
            ctx.exit(streams.unheard(error))


def main() -> None:
    """Run the command line and exit."""
    streams.prepare()
    # Workers call BLAS one thread each. Where OpenBLAS cannot have the threads that it starts by
    # itself when numpy is imported, it sends this process SIGINT.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    try:
        # Not standalone: Ctrl-C ends with 130, as shells expect, instead of click's 1.
        sys.exit(cli.main(standalone_mode=False))
    except click.ClickException as error:
        with suppress(OSError):  # as in streams.tell()
            error.show()
        sys.exit(2)
    except (KeyboardInterrupt, click.Abort):
        streams.tell("interrupted; nothing was published.")
        sys.exit(130)


@click.group(cls=_Group, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, "--version", "-V", message="dora-export %(version)s")
def cli() -> None:
    """Merge DoRA and LoRA adapters into plain weights, exactly."""


@cli.command()
@click.argument("base")
@click.argument("adapter", nargs=-1)
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder to publish."
)
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda or cuda:N.")
@click.option("--dtype", help="bf16, fp16 or fp32 for all weights. Default: each one's own.")
@click.option(
    "--precision",
    type=click.Choice(["float32", "float64"]),
    default="float32",
    show_default=True,
    help="float32: within 1 ulp. float64: correctly rounded, slower.",
)
@click.option(
    "--strength", type=float, default=1.0, show_default=True, help="W + STRENGTH * (W' - W)."
)
@click.option(
    "--weight",
    "weights",
    type=float,
    multiple=True,
    metavar="X",
    help="Strength of one adapter, in their order. Once per adapter, or never (1 each).",
)
@click.option(
    "--zero-norm",
    type=click.Choice(["refuse", "zero", "keep-base"]),
    default="refuse",
    show_default=True,
    help="Rows without direction whose magnitude is not zero.",
)
@click.option(
    "--fan-in-fan-out/--no-fan-in-fan-out",
    default=None,
    help="Square weights are stored (in, out), or not. Default: by model type.",
)
@click.option("--max-shard-size", metavar="SIZE", help="Re-shard, e.g. 5GB. Default: as the base.")
@click.option(
    "--threads",
    type=int,
    help="Workers. Default: one per CPU, and two more where they wait for the disk.",
)
@click.option(
    "--block", "block_bytes", type=int, metavar="BYTES", help="Bytes a worker takes at once."
)
@click.option(
    "--verify",
    type=click.Choice(["none", "fast", "full"]),
    default="fast",
    show_default=True,
    help="Check what was written before publishing it.",
)
@click.option("--force", is_flag=True, help="Replace an earlier output of this tool.")
@click.option("--restart", is_flag=True, help="Drop what an interrupted merge left.")
@click.option(
    "--sync/--no-sync",
    default=True,
    help="Wait for the disk, so that a power failure finds the output whole or resumable. "
    "Without, the system writes it out later, as after cp.",
)
@click.option("--allow-merged-base", is_flag=True, help="Merge onto an already merged base.")
@click.option("--dry-run", is_flag=True, help="Plan and check everything; write nothing.")
@adapter_options
def merge(
    base: str, adapter: tuple[str, ...], output: Path, as_json: bool, dry_run: bool, **options: Any
) -> None:
    """Merge ADAPTER (or several, in order) into BASE and publish plain weights as a folder.

    BASE and ADAPTER are folders, files or hub ids. A file that holds its own base (a state dict of
    LinearWithDoRAMerged layers) needs no ADAPTER. A merge that was interrupted is resumed by the
    same command.
    """
    from dora_export.cli.interrupt import interruptible  # noqa: PLC0415

    with interruptible(output):
        from dora_export import api  # noqa: PLC0415
        from dora_export.cli import text  # noqa: PLC0415

        with text.progress(f"merging into {output}", quiet=as_json or dry_run) as on_progress:
            report = api.merge(
                base, adapter or None, output, dry_run=dry_run, progress=on_progress, **options
            )
    if as_json:
        click.echo(json.dumps(report.to_dict(), indent=2))
        return
    for warning in report.warnings:
        click.echo(text.warned(warning), err=True)
    click.echo(text.merge_summary(report, output))


@cli.command()
@click.argument("base")
@click.argument("adapter", nargs=-1)
@click.argument("merged")
@click.option(
    "--level",
    type=click.Choice(["fast", "full"]),
    default="full",
    show_default=True,
    help="Every element, or sampled rows of every changed tensor.",
)
@click.option("--forward", is_flag=True, help="Run merged and unmerged model too.")
@click.option(
    "--prompt",
    "prompts",
    multiple=True,
    metavar="TEXT",
    help="Text to run them on; implies --forward. Repeatable.",
)
@click.option(
    "--budget", type=float, help="Largest relative difference of an ONNX graph, if quantised."
)
@click.option(
    "--html", type=click.Path(path_type=Path), metavar="FILE", help="Write the report as a page."
)
@click.option("--force", is_flag=True, help="Let --html replace any file.")
@click.option("--dtype", help="bf16, fp16 or fp32 that all weights should have.")
@click.option("--strength", type=float, help="Strength that was merged with.")
@click.option(
    "--weight",
    "weights",
    type=float,
    multiple=True,
    metavar="X",
    help="Weight that an adapter was merged with, in their order. Once per adapter.",
)
@click.option(
    "--zero-norm",
    type=click.Choice(["refuse", "zero", "keep-base"]),
    help="Rows without direction, as merge treated them.",
)
@click.option(
    "--fan-in-fan-out/--no-fan-in-fan-out",
    default=None,
    help="Square weights are stored (in, out), or not. Default: by model type.",
)
@click.option("--threads", type=int, help="Workers. Default: one per CPU.")
@adapter_options
def verify(
    base: str, adapter: tuple[str, ...], merged: str, html: Path | None, force: bool,
    as_json: bool, **options: Any,
) -> None:  # fmt: skip
    """Prove that MERGED is BASE with ADAPTER merged in, whichever tool wrote it.

    Compares every file, name and untouched byte, and every changed value with the exact one. Ends
    with 0 if all is right, 1 if something is wrong, 3 if something could not be checked. dtype,
    strength, weights and zero-norm default to what the merged model's manifest says. A base that
    holds its own adapter needs no ADAPTER.
    """
    from dora_export import api  # noqa: PLC0415
    from dora_export.cli import text  # noqa: PLC0415
    from dora_export.verification.page import page  # noqa: PLC0415
    from dora_export.writers import page_file  # noqa: PLC0415

    if html is not None:
        page_file.check_target(html, force=force)  # before minutes of work
    options["forward"] = options["forward"] or bool(options["prompts"])
    with text.progress(f"verifying {merged}", quiet=as_json, unit="values", end="summing up") as on:
        report = api.verify(base, adapter or None, merged, progress=on, **options)
    if html is not None:
        page_file.write(html, page(report), force=force)
    if as_json:
        click.echo(json.dumps(report.to_dict(), indent=2, allow_nan=False))
    else:
        click.echo(text.fitted(text.verify_summary(report)))
        if html is not None:
            click.echo(f"-> {html}")
    click.get_current_context().exit(report.exit_code)


@cli.command()
@click.argument("code", required=False)
def explain(code: str | None) -> None:
    """Say what a finding of verify means and what to do; without CODE, list them all."""
    from dora_export.cli import explain as explain_command  # noqa: PLC0415

    click.echo(explain_command.table() if code is None else explain_command.entry(code))


@cli.command()
@click.argument("adapter")
@click.option("--base", help="Base model to hold the adapter against.")
@adapter_options
def inspect(adapter: str, base: str | None, as_json: bool, **options: Any) -> None:
    """Show what ADAPTER is, whether it fits a base, and who serves it unmerged."""
    from dora_export import api  # noqa: PLC0415
    from dora_export.cli import text  # noqa: PLC0415

    report = api.inspect(adapter, base, **options)
    if as_json:
        click.echo(json.dumps(report.to_dict(), indent=2))
        return
    click.echo(text.inspect_summary(report))


@cli.command()
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default=Path("demo-output"),
    show_default=True,
    help="Folder for the demo's models.",
)
@click.option(
    "--tokens", type=int, default=40, show_default=True, help="Tokens to write per prompt."
)
def demo(output: Path, tokens: int) -> None:
    """Merge the small model and adapter inside this package, and let both write."""
    from dora_export.cli import demo as demo_command  # noqa: PLC0415

    demo_command.run(output, tokens)


cli.add_command(convert.command)
cli.add_command(onnx.command)
