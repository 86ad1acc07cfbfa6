"""Shared by all tests: quiet libraries, no network, and what takes minutes only when asked for."""

import os

import pytest

from dora_export import extensions, fused

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def pytest_collection_modifyitems(config, items):
    """Leave out what takes minutes, unless ``-m`` names it."""
    if "nightly" in config.getoption("-m"):
        return
    nightly = [item for item in items if item.get_closest_marker("nightly")]
    config.hook.pytest_deselected(items=nightly)
    items[:] = [item for item in items if item not in nightly]


@pytest.fixture(params=["compiled", "numpy"])
def either_kernel(request, monkeypatch):
    """Run a test with the compiled kernel and without it."""
    if request.param == "numpy":
        monkeypatch.setenv(extensions.SWITCH, "numpy")
    elif not fused.available():
        # The kernel is optional by design; CI's machine has a compiler, so there this half runs.
        pytest.skip("built without a C compiler")
