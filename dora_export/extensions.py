"""The package's compiled modules: there or not, of these sources, and fit for this processor."""

from __future__ import annotations

import os
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from dora_export.errors import MachineError
from dora_export.machine import ADVICE, advice

SWITCH = "DORA_EXPORT_KERNEL"  # "numpy" in this environment variable leaves them all out


@cache
def loaded(name: str, sources: str) -> Any:
    """Return a compiled module, or None where it is not there or the processor is too old.

    Args:
        name: Of the module.
        sources: What a build of this version's sources says that it was made from.

    Raises:
        MachineError: It was made from others, or the system cannot load it.
    """
    if find_spec(name) is None:
        return None
    try:
        module = import_module(name)
    except ImportError as error:
        # The loader says why in words only: too many open files, no memory, a library that is
        # missing.
        number = next((n for n in ADVICE if os.strerror(n) in str(error)), 0)
        what = advice(
            OSError(number, ""),
            f"Install the package again (pip install .), or set {SWITCH}=numpy to do without it.",
        )
        raise MachineError(
            f"{error.path or name}: cannot be loaded: {error.msg}. {what}"
        ) from error
    if getattr(module, "name", None) != sources:
        raise MachineError(
            f"{module.__file__}: built from other sources than this version's. Install the "
            f"package again (pip install .), or set {SWITCH}=numpy to do without it."
        )
    return module if module.usable else None


def available(name: str, sources: str) -> bool:
    """Return whether a compiled module is there and not switched off."""
    return os.environ.get(SWITCH) != "numpy" and loaded(name, sources) is not None
