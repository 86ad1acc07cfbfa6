"""One graph of the base whose adapters are files that the run time swaps."""

from __future__ import annotations

from dora_export.onnx.model import GraphError, Made, Request


def make(request: Request) -> Made:
    """Write a graph with inputs for adapters, and each adapter, into ``request.folder``.

    Raises:
        GraphError: It cannot be done.
    """
    raise GraphError(
        f"{len(request.plans)} adapters: --adapters is not part of this version. Leave it out to "
        "merge one."
    )
