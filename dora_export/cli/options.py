"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])


def adapter_options(command: F) -> F:
    """Add the options that say what an adapter's files do not."""
    options = [
        click.option(
            "--alpha", type=float, help="Scaling numerator, where the format stores none."
        ),
        click.option(
            "--axis",
            type=click.Choice(["out", "in"]),
            help="What magnitudes count, where the format leaves it open.",
        ),
        click.option(
            "--torchtune-dora-fix/--no-torchtune-dora-fix",
            default=None,
            help="This PEFT adapter is torchtune's export (its rows need order), or is not.",
        ),
        click.option(
            "--magnitude-is-normalised/--magnitude-is-not-normalised",
            default=None,
            help="Magnitudes were divided by the norms (TensorRT-LLM), or were not.",
        ),
        click.option(
            "--base-is-residual",
            is_flag=True,
            help="BASE is the residual model that a PiSSA, OLoRA, ... adapter was trained on.",
        ),
        click.option(
            "--recompute-init",
            is_flag=True,
            help="BASE is the original; compute what PiSSA or OLoRA left of it.",
        ),
        click.option(
            "--moe-b-layout",
            type=click.Choice(["peft", "unsloth"]),
            help="Order of B's columns for stacked experts, where the files do not tell.",
        ),
        click.option(
            "--moe-transposed/--no-moe-transposed",
            default=None,
            help="B A lies transposed over square slices of stacked experts, or does not.",
        ),
        click.option(
            "--trained-in",
            type=click.Choice(["fp32", "bf16", "fp16"]),
            help="Type that LyCORIS trained in, where magnitudes may have been rounded on saving.",
        ),
        click.option(
            "--variant",
            metavar="NAME",
            help="Which weights of BASE, where it has several: fp16 for model.fp16.safetensors.",
        ),
        click.option("--adapter-format", metavar="NAME", help="Format, where more than one fits."),
        click.option(
            "--map-prefix",
            multiple=True,
            metavar="OLD=NEW",
            help="Rename the start of adapter names. Repeatable.",
        ),
        click.option(
            "--allow-pickle",
            is_flag=True,
            help="Read .bin and .pt files, through torch's restricted loader.",
        ),
        click.option(
            "--links-into",
            multiple=True,
            type=click.Path(file_okay=False),
            help="Follow links in BASE and ADAPTER that lead into this folder. Repeatable.",
        ),
        click.option("--json", "as_json", is_flag=True, help="Print the report as JSON."),
    ]
    for option in reversed(options):
        command = option(command)
    return command
