"""A model class traced to a graph."""

from __future__ import annotations

from pathlib import Path

from dora_export.onnx.model import GraphError, Made, Request


def check(request: Request) -> None:
    """Refuse what cannot be traced, from the config alone.

    Raises:
        GraphError: It cannot.
    """
    del request


def make(request: Request, folder: Path | None) -> Made:
    """Trace the model in ``folder``, merged, and write its graph into ``request.folder``.

    Raises:
        GraphError: It cannot be traced.
    """
    raise GraphError(f"{folder}: tracing is not part of this version; {request.options}.")
