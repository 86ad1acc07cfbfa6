"""A graph of the base re-weighted: what the adapter changes is changed in its initializers."""

from __future__ import annotations

from dora_export.onnx.model import GraphError, Made, Request


def make(request: Request) -> Made:
    """Write ``request.into`` with merged weights into ``request.folder``.

    Raises:
        GraphError: It cannot be done.
    """
    raise GraphError(f"{request.into}: --into is not part of this version. Leave it out to trace.")
