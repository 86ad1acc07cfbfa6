"""The demo: the model and adapter inside the package, merged and set side by side."""

from __future__ import annotations

import json
import shutil
import textwrap
from importlib import resources
from importlib.util import find_spec
from pathlib import Path

import click

from dora_export import api
from dora_export.cli import text
from dora_export.errors import OutputError
from dora_export.machine import faults_told
from dora_export.writers.staging import MANIFEST

DATA = Path(str(resources.files("dora_export") / "demo_data"))
COLUMN = 46  # characters of each text column


def run(output: Path, tokens: int) -> None:
    """Inspect, merge and let base and merged model write the same prompts.

    Args:
        output: Folder for ``base``, ``adapter`` and ``merged``.
        tokens: Tokens to write per prompt.

    Raises:
        OutputError: The folder holds something that is not the demo's.
    """
    base, adapter, merged = (output / name for name in ("base", "adapter", "merged"))
    if merged.exists() and not (merged / MANIFEST).is_file():
        raise OutputError(f"{merged}: not made by this demo. Pass another -o.")
    with faults_told():
        for folder in (base, adapter):
            shutil.copytree(DATA / folder.name, folder, dirs_exist_ok=True)
    _say(f"dora-export inspect {adapter} --base {base}")
    click.echo(text.inspect_summary(api.inspect(adapter, base)))
    _say(f"dora-export merge {base} {adapter} -o {merged} --verify full")
    report = api.merge(base, adapter, merged, verify="full", force=True, restart=True)
    click.echo(text.merge_summary(report, merged))
    if find_spec("transformers") is None:
        click.echo("\nto see both models write: pip install transformers")
        return
    _say("what they write (greedy)")
    prompts = json.loads((DATA / "prompts.json").read_text(encoding="utf-8"))
    for prompt in prompts:
        click.echo(_side_by_side(*(_continue(m, prompt, tokens) for m in (base, merged))))


def _say(heading: str) -> None:
    click.echo(f"\n{click.style('$' if heading.startswith('dora') else '#', dim=True)} "
               f"{click.style(heading, fg='cyan')}")  # fmt: skip


def _continue(model: Path, prompt: str, tokens: int) -> str:
    """Return the prompt and what a model writes after it, greedily."""
    import torch  # noqa: PLC0415 - seconds of import, for the last step only
    import transformers  # noqa: PLC0415

    transformers.utils.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    network = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    written = network.generate(**inputs, do_sample=False, max_new_tokens=tokens)
    return str(tokenizer.decode(written[0], skip_special_tokens=True))


def _side_by_side(left: str, right: str) -> str:
    columns = [textwrap.wrap(side, COLUMN) for side in (left, right)]
    height = max(map(len, columns))
    columns = [["base", *columns[0]], ["merged", *columns[1]]]
    padded = [c + [""] * (height + 1 - len(c)) for c in columns]
    lines = [f"  {a:<{COLUMN}}   {b}".rstrip() for a, b in zip(*padded, strict=True)]
    lines[0] = click.style(lines[0], dim=True)
    return "\n".join([*lines, ""])
