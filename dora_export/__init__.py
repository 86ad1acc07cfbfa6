"""Merge DoRA and LoRA adapters into plain weights.

Data flows one way: an adapter reader turns files into updates (``dora_export.update``), naming and
plan pair them with the base's tensors, the engine runs the formula piece by piece, a writer stages
the output and publishes it by one rename. ``dora_export.api`` strings the stages together.

Importing this package imports nothing else: names are resolved when they are used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dora_export._version import __version__

if TYPE_CHECKING:
    from dora_export.adapters.model import Adapter
    from dora_export.api import inspect, load_adapter, merge, verify
    from dora_export.api_convert import convert
    from dora_export.api_onnx import export_onnx
    from dora_export.errors import DoraExportError
    from dora_export.onnx.model import GraphOptions, GraphReport
    from dora_export.onnx.module import export_module
    from dora_export.onnx.session import AdapterSession
    from dora_export.report import ConvertReport, InspectReport, MergeReport
    from dora_export.update import Update
    from dora_export.verification.model import Finding, TensorResult, VerifyReport

__all__ = [
    "Adapter",
    "AdapterSession",
    "ConvertReport",
    "DoraExportError",
    "Finding",
    "GraphOptions",
    "GraphReport",
    "InspectReport",
    "MergeReport",
    "TensorResult",
    "Update",
    "VerifyReport",
    "__version__",
    "convert",
    "export_module",
    "export_onnx",
    "inspect",
    "load_adapter",
    "merge",
    "verify",
]

_HOMES = {
    "Adapter": "adapters.model",
    "AdapterSession": "onnx.session",
    "ConvertReport": "report",
    "DoraExportError": "errors",
    "Finding": "verification.model",
    "GraphOptions": "onnx.model",
    "GraphReport": "onnx.model",
    "InspectReport": "report",
    "MergeReport": "report",
    "TensorResult": "verification.model",
    "Update": "update",
    "VerifyReport": "verification.model",
    "convert": "api_convert",
    "export_module": "onnx.module",
    "export_onnx": "api_onnx",
    "inspect": "api",
    "load_adapter": "api",
    "merge": "api",
    "verify": "api",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"dora_export.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'dora_export' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)
