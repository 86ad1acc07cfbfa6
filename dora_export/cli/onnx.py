"""``dora-export onnx``: a graph of base + adapter, in one of three ways."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from dora_export.cli import streams
from dora_export.cli.options import adapter_options

OPTIONS = ("task", "dtype", "opset", "fuse", "batch", "pooling", "quantize", "block_size",
           "symmetric", "head_bits", "layout", "share_weights", "engine")  # fmt: skip


@click.command(name="onnx")
@click.argument("base")
@click.argument("adapter", nargs=-1)
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder to publish."
)
@click.option(
    "--into",
    type=click.Path(path_type=Path),
    metavar="GRAPH",
    help="Give this graph of the base the merged weights; nothing is traced.",
)
@click.option(
    "--allow-missing",
    multiple=True,
    metavar="NAME",
    help="A tensor or module that GRAPH lacks on purpose. Repeatable.",
)
@click.option(
    "--adapters", is_flag=True, help="One graph of the base, ADAPTERs swapped at run time."
)
@click.option("--task", help="What the model is for. Default: by its config.")
@click.option(
    "--dtype",
    type=click.Choice(["fp32", "fp16", "bf16"]),
    default="fp32",
    show_default=True,
    help="Of weights and activations.",
)
@click.option("--opset", type=int, help="ONNX operator set. Default: the exporter's.")
@click.option(
    "--fuse",
    type=click.Choice(["none", "cpu", "cuda"]),
    default="none",
    show_default=True,
    help="Fused operators of onnxruntime for this execution provider.",
)
@click.option("--batch", type=int, help="Fix the batch size. Default: any.")
@click.option(
    "--pooling",
    type=click.Choice(["config", "mean", "cls", "last"]),
    help="Pool in the graph; config: as the sentence-transformers folder says.",
)
@click.option(
    "--quantize",
    type=click.Choice(["int8", "int4"]),
    help="int8: dynamic. int4: weights only.",
)
@click.option(
    "--block-size", type=int, default=32, show_default=True, help="Weights per scale of int4."
)
@click.option("--symmetric/--asymmetric", default=True, show_default=True, help="For int4.")
@click.option(
    "--head-bits",
    type=click.Choice(["4", "8"]),
    default="8",
    show_default=True,
    help="Bits of the output head with int4.",
)
@click.option(
    "--layout",
    type=click.Choice(["hf", "transformers-js"]),
    default="hf",
    show_default=True,
    help="hf: all in one folder. transformers-js: graphs in onnx/.",
)
@click.option(
    "--share-weights", is_flag=True, help="Publish model.safetensors, and let the graph read it."
)
@click.option(
    "--engine",
    type=click.Choice(["auto", "torch", "transformers"]),
    default="auto",
    show_default=True,
    help="What traces.",
)
@click.option("--verify/--no-verify", default=True, show_default=True,
              help="Run the graph beside the unmerged model before it is published.")  # fmt: skip
@click.option("--budget", type=float, help="Largest relative difference allowed.")
@click.option("--prompt", "prompts", multiple=True, metavar="TEXT", help="Run on it. Repeatable.")
@click.option("--allow-mismatch", is_flag=True, help="Publish what fails the comparison too.")
@click.option(
    "--html", type=click.Path(path_type=Path), metavar="FILE", help="Write the report as a page."
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
@click.option("--threads", type=int, help="Workers of the merge. Default: one per CPU.")
@click.option("--sync/--no-sync", default=True,
              help="With --into: wait until the graph is on the disk, or leave that to the system, "
              "as cp does.")  # fmt: skip
@click.option("--allow-merged-base", is_flag=True, help="Merge onto an already merged base.")
@click.option("--force", is_flag=True, help="Replace an earlier output of this tool.")
@adapter_options
def command(
    base: str, adapter: tuple[str, ...], output: Path, html: Path | None, force: bool,
    as_json: bool, **given: Any,
) -> None:  # fmt: skip
    """Publish BASE with ADAPTER merged in as an ONNX graph, checked against the unmerged model.

    BASE and ADAPTER are as for merge; without ADAPTER, BASE is merged already. Needs the extra
    "transformers", but for --into.
    """
    from dora_export import api_onnx  # noqa: PLC0415
    from dora_export.cli import text, text_onnx  # noqa: PLC0415
    from dora_export.onnx.model import GraphOptions, GraphReport, ParityError  # noqa: PLC0415
    from dora_export.verification.page import page  # noqa: PLC0415
    from dora_export.writers import page_file  # noqa: PLC0415

    if html is not None:
        page_file.check_target(html, force=force)  # before minutes of work
    given["head_bits"] = int(given["head_bits"])
    options = GraphOptions(**{name: given.pop(name) for name in OPTIONS})

    def tell(stage: str) -> None:
        if not as_json:
            streams.tell(f"{stage} ...")

    def write_page(report: GraphReport | None) -> None:
        if html is not None and report is not None and report.verified is not None:
            page_file.write(html, page(report.verified), force=force)

    try:
        with text.progress(f"merging for {output}", quiet=as_json, end="exporting") as on_progress:
            report = api_onnx.export_onnx(
                base, adapter or None, output, options=options, force=force, on_stage=tell,
                progress=on_progress, **given,
            )  # fmt: skip
    except ParityError as error:
        write_page(error.report)
        raise
    write_page(report)
    if as_json:
        click.echo(json.dumps(report.to_dict(), indent=2, allow_nan=False))
    else:
        for warning in report.warnings:
            click.echo(text.warned(warning), err=True)
        click.echo(text.fitted(text_onnx.summary(report, output)))
        if html is not None and report.verified is not None:
            click.echo(f"-> {html}")
    click.get_current_context().exit(report.exit_code)
