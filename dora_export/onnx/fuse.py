"""Operators of a graph fused into onnxruntime's own, for one execution provider."""

from __future__ import annotations

import importlib.util

import onnx_ir as ir

from dora_export.onnx.engines import quiet
from dora_export.onnx.model import GraphError, GraphOptions

MODULE = "transformers.exporters.onnxruntime_fusions"


def check(options: GraphOptions) -> None:
    """Refuse fusions that the installed transformers has not.

    Raises:
        GraphError: It has not.
    """
    if options.fuse == "none":
        return
    try:
        there = importlib.util.find_spec(MODULE) is not None
    except ModuleNotFoundError:
        there = False
    if not there:
        raise GraphError(
            f"--fuse {options.fuse}: this version of transformers brings no fusions for "
            "onnxruntime. Install transformers 5.23 or later, or leave the option out."
        )


def fuse(model: ir.Model, provider: str) -> None:
    """Fuse in place: norms, rotary embeddings, attention.

    ``GroupQueryAttention`` takes the place of a decoder's attention where the batch is fixed to 1:
    for several new tokens it takes one sequence only.

    Raises:
        GraphError: The fusions fail.
    """
    from transformers.exporters.onnxruntime_fusions import (  # noqa: PLC0415 - an extra
        fuse_for_onnxruntime,
    )

    try:
        with quiet():
            fuse_for_onnxruntime(model, provider)
    except Exception as error:
        # The fusions raise whatever they meet in a graph they were not made for.
        raise GraphError(
            f"--fuse {provider}: fails with {type(error).__name__}: {error}. Leave the option out."
        ) from error
