"""Imports point down: a lower floor never imports a higher one, and there is no circle."""

import ast
import re
from pathlib import Path

import pytest

import dora_export

PACKAGE = Path(dora_export.__file__).parent
FLOORS = (
    "_version errors limits words row_factor unet_names flux_names",
    "machine paged",
    "tensors inputs flat_names conventions expert_names extensions",
    "cast update",
    "storage refine residual scaled_bias unscaled_norm peft_layers",
    "fused",
    "arithmetic",
    "arithmetic_torch formula checkpoints",
    "adapters",
    "naming own_norm roles several tying layouts experts row_orders replication layer_biases "
    "report",
    "diffusion_names",
    "part_names",
    "plan serving adapter_writers",
    "pieces",
    "worker verification",
    "engine lowrank",
    "writers nearest_lora",
    "onnx",
    "api",
    "api_onnx api_convert",
    "cli",
    "__init__ __main__",
)
FLOOR = {name: i for i, names in enumerate(FLOORS) for name in names.split()}
MODULES = sorted(PACKAGE.rglob("*.py"))


def imported(path):
    """Top-level parts of the package that a module imports, lazily or not."""
    nodes = ast.walk(ast.parse(path.read_text()))
    imports = [n for n in nodes if isinstance(n, ast.Import | ast.ImportFrom)]
    names = [
        f"{getattr(n, 'module', '') or ''}.{a.name}".lstrip(".") for n in imports for a in n.names
    ]
    return {name.split(".")[1] for name in names if name.startswith("dora_export.")}


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_to_a_lower_floor(path):
    own = path.relative_to(PACKAGE).with_suffix("").parts[0]
    assert [n for n in imported(path) - {own} if FLOOR[n] >= FLOOR[own]] == []


def test_verify_shares_no_arithmetic_with_the_engine():
    used = {name for path in (PACKAGE / "verification").rglob("*.py") for name in imported(path)}
    assert (
        used
        & {
            "formula",
            "row_factor",
            "engine",
            "worker",
            "arithmetic",
            "arithmetic_torch",
            "refine",
            "cast",
            "fused",
        }
        == set()
    )


def test_verifys_compiled_loop_shares_no_source_with_the_merges():
    project = (PACKAGE.parent / "pyproject.toml").read_text()
    sections = project.split("[[tool.setuptools.ext-modules]]")[1:]
    sources = {
        re.search(r'name = "([\w.]+)"', section)[1]: set(re.findall(r'"([\w/]+\.[ch])"', section))
        for section in sections
    }
    assert sources.keys() == {"dora_export._kernel", "dora_export._oracle"}
    assert not sources["dora_export._kernel"] & sources["dora_export._oracle"]
    for name, own in sources.items():
        assert {f"dora_export/kernel/{n}" for path in own for n in included(path)} <= own, name


def included(path):
    """Headers that a C file takes from its own folder."""
    return re.findall(r'^#include "(.+)"', (PACKAGE.parent / path).read_text(), re.MULTILINE)


def test_readers_know_no_arithmetic():
    folders = ("adapters", "checkpoints", "storage")
    used = {n for f in folders for path in (PACKAGE / f).rglob("*.py") for n in imported(path)}
    assert (
        used & {"formula", "row_factor", "engine", "worker", "arithmetic", "refine", "cast"}
        == set()
    )
