"""The documents name tests and modules that there are."""

import re
from pathlib import Path

import pytest

from dora_export.adapters import FORMATS

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# Formats by the names that docs/formats.md has for them.
WORDS = {
    "peft": "PEFT", "mlx": "MLX", "torchtune": "torchtune", "nvlabs": "NVlabs",
    "megatron": "Megatron", "lycoris": "LyCORIS", "diffusers": "diffusers",
    "ai-toolkit": "ai-toolkit", "qdora": "QDoRA", "catid": "catid",
    "linear-with-dora-merged": "LinearWithDoRAMerged",
}  # fmt: skip


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_tests_that_a_document_names_are_there(document):
    named = re.findall(r"\b(test_\w+\.py)(?:::(test_\w+))?", document.read_text())
    missing = []
    for file, test in named:
        path = ROOT / "tests" / file
        text = path.read_text() if path.is_file() else ""
        if not text or (test and not re.search(rf"^def {test}\(", text, re.MULTILINE)):
            missing.append(f"{file}::{test}")
    assert not missing
    assert named or document.name not in ("README.md", "formats.md")


def test_every_format_has_its_rule_and_its_kinds():
    text = (ROOT / "docs/formats.md").read_text()
    rules, kinds = (text.split(f"\n## {title}")[1].split("\n## ")[0] for title in (
        "Rules", "Kinds of layers"))  # fmt: skip
    assert {f.name for f in FORMATS} == WORDS.keys()
    for name, word in WORDS.items():
        assert re.search(rf"^\| {word}\b", rules, re.MULTILINE), name
        assert re.search(rf"^\| {word}\b.*test_\w+\.py::", kinds, re.MULTILINE), name
    modules = set(re.findall(r"`([a-z_]+)`", "".join(
        line.split("|")[1] for line in rules.splitlines() if line.startswith("| "))))  # fmt: skip
    assert modules
    assert all((ROOT / f"dora_export/adapters/{m}.py").is_file() for m in modules)
