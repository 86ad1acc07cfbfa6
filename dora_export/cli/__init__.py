"""The command line: click commands, thin over ``dora_export.api``."""

from dora_export.cli.main import main

__all__ = ["main"]
