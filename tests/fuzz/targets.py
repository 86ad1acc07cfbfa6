"""What is fed: seeds by folder of the corpus, and the call that reads them."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch  # noqa: F401 - here, not within a watched call

import dora_export
from dora_export import api
from dora_export.checkpoints import open_checkpoint
from dora_export.checkpoints.folder import read_json
from dora_export.cli import text
from dora_export.errors import AdapterError
from dora_export.onnx.graph_file import open_graph
from dora_export.storage.json_file import read_index
from dora_export.storage.safetensors import read_header
from dora_export.verification.page import page
from tests import small

HERE = Path(__file__).parent
CORPUS = HERE / "corpus"
FIXTURES = HERE.parent / "fixtures"
STYLES = re.compile("\x1b\\[(0|1|2|31|32|33)m")  # those of our own
OUTPUTS = ("out", ".out.dora_export-partial", ".out.dora_export-replaced")


@dataclass(frozen=True)
class Target:
    """One way into the package.

    Attributes:
        seeds: Folders to start from.
        run: Reads a case; gets its folder.
        parts: Files and folders of a seed that are damaged; everything if empty.
        writable: What the call may write, by name in the case's folder.
        weight: Share of a long run.
        make: Makes a seed that cannot be stored.
    """

    seeds: tuple[Path, ...]
    run: Callable[[Path], object]
    parts: tuple[str, ...] = ()
    writable: tuple[str, ...] = ()
    weight: int = 1
    make: Callable[[Path], None] | None = None


def adapter_of(folder):
    folder_of_one = folder / "adapter"
    return folder_of_one if folder_of_one.exists() else folder / "adapter.safetensors"


def told(lines):
    """A report must not carry what a terminal obeys."""
    odd = next((c for c in STYLES.sub("", lines) if not (c.isprintable() or c == "\n")), None)
    assert odd is None, f"unprintable {odd!a} in {lines!a}"


def with_alpha(call):
    """Call without alpha, and again with one where that is asked for."""
    try:
        return call()
    except AdapterError as error:
        if "Pass --alpha" not in str(error):
            raise
        return call(alpha=4.0)


def inspect(folder):
    base = folder / "base" if (folder / "base").exists() else None
    report = with_alpha(partial(dora_export.inspect, adapter_of(folder), base, allow_pickle=True))
    told(text.inspect_summary(report))
    json.dumps(report.to_dict())


def merge(folder):
    report = dora_export.merge(
        folder / "base", adapter_of(folder), folder / "out", threads=1, allow_pickle=True
    )
    told(text.merge_summary(report, Path("out")))
    json.dumps(report.to_dict())
    read_json(folder / "out/dora_export.json")


def verify(folder):
    report = dora_export.verify(
        folder / "base", folder / "adapter", folder / "merged", threads=1, allow_pickle=True
    )
    told(text.verify_summary(report))
    json.dumps(report.to_dict(), allow_nan=False)
    page(report)


def interrupted(folder):
    """Leave staged work of a merge that ended in the middle, beside its inputs."""

    def stop(*_):
        raise KeyboardInterrupt

    small.write_pair(folder)
    original, api.write_small = api.write_small, stop
    try:
        dora_export.merge(folder / "base", folder / "adapter", folder / "out", threads=1)
    except KeyboardInterrupt:
        return
    finally:
        api.write_small = original
    raise AssertionError("the merge was not interrupted")


def resume(folder):
    """Whatever is found beside the output, what is published is right."""
    dora_export.merge(folder / "base", folder / "adapter", folder / "out", threads=1, verify="full")
    tensors = small.base_tensors()
    small.check_merged(folder / "out", tensors, small.adapter_tensors(tensors))


def corpus(*names):
    return tuple(CORPUS / name for name in names)


SINGLE = corpus("megatron", "qdora", "catid", "linear-with-dora-merged", "lycoris-loha",
                "lycoris-lokr", "lycoris-locon")  # fmt: skip
TRAINERS = (*(FIXTURES / "mlx" / n for n in ("dora", "experts", "tied")),
            *(FIXTURES / "torchtune" / n for n in ("dora", "lora")))  # fmt: skip

TARGETS = {
    "header": Target(
        corpus("peft"), lambda f: read_header(f / "base/model.safetensors"),
        ("base/model.safetensors",), weight=2,
    ),
    "index": Target(
        corpus("shards"), lambda f: read_index(f / "base/model.safetensors.index.json"),
        ("base/model.safetensors.index.json",),
    ),
    "checkpoint": Target(
        corpus("peft", "shards", "pickled"),
        lambda f: open_checkpoint(f / "base", allow_pickle=True), ("base",), weight=2,
    ),
    "peft": Target(corpus("peft", "nvlabs"), inspect, ("adapter",), weight=3),
    "trainers": Target(TRAINERS, inspect, ("adapter",), weight=2),
    "state dicts": Target(SINGLE, inspect, ("adapter.safetensors",), weight=3),
    "pickled": Target(corpus("pickled"), inspect, ("adapter",), weight=2),
    "config": Target(corpus("peft", "lycoris-lokr"), inspect, ("base/config.json",)),
    "merge": Target(
        corpus("peft", "shards", "pickled", "nvlabs"), merge, ("base", "adapter"), OUTPUTS, weight=3
    ),
    "verify": Target(corpus("merged"), verify, ("merged",), weight=3),
    "resume": Target((), resume, (OUTPUTS[1],), OUTPUTS, weight=2, make=interrupted),
    "graph": Target(corpus("graph"), lambda f: open_graph(f / "model.onnx"), weight=2),
}  # fmt: skip
