"""What is fed: seeds by folder of the corpus, and the call that reads them."""

import json
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from shutil import copytree

import torch  # noqa: F401 - here, not within a watched call

import dora_export
from dora_export import api
from dora_export.api_convert import TARGETS as FORMATS
from dora_export.api_convert import convert as convert_adapter
from dora_export.checkpoints import open_checkpoint
from dora_export.checkpoints.folder import read_json
from dora_export.cli import text, text_onnx
from dora_export.cli.convert import summary as convert_summary
from dora_export.errors import AdapterError
from dora_export.onnx import into as _into  # noqa: F401 - as above
from dora_export.onnx import swappable as _swappable  # noqa: F401
from dora_export.onnx.graph_file import open_graph
from dora_export.onnx.session import AdapterSession
from dora_export.storage.json_file import read_index
from dora_export.storage.safetensors import read_header
from dora_export.verification.page import page
from tests import small

HERE = Path(__file__).parent
CORPUS = HERE / "corpus"
FIXTURES = HERE.parent / "fixtures"
STYLES = re.compile("\x1b\\[(0|1|2|31|32|33|36)m")  # those of our own
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
        needs: A module to import before, not within a watched call.
    """

    seeds: tuple[Path, ...]
    run: Callable[[Path], object]
    parts: tuple[str, ...] = ()
    writable: tuple[str, ...] = ()
    weight: int = 1
    make: Callable[[Path], None] | None = None
    needs: str | None = None


def folder_or_file(folder, name):
    found = folder / name
    return found if found.exists() else folder / f"{name}.safetensors"


def adapter_of(folder):
    return folder_or_file(folder, "adapter")


def base_of(folder):
    return folder_or_file(folder, "base")


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
    base = base_of(folder) if base_of(folder).exists() else None
    report = with_alpha(partial(dora_export.inspect, adapter_of(folder), base, allow_pickle=True))
    told(text.inspect_summary(report))
    json.dumps(report.to_dict())


def merge(folder, **options):
    adapters = [adapter_of(folder), *folder.glob("adapter2")]
    report = with_alpha(
        partial(
            dora_export.merge, base_of(folder), adapters, folder / "out", threads=1,
            allow_pickle=True, **options,
        )
    )  # fmt: skip
    told(text.merge_summary(report, Path("out")))
    json.dumps(report.to_dict())
    read_json(folder / "out/dora_export.json")


def convert(folder):
    """To a format that depends on what was read, so that a case stays the same."""
    adapter = adapter_of(folder)
    files = sorted(f for f in [adapter, *adapter.rglob("*")] if f.is_file())
    chosen = sum(zlib.crc32(f.read_bytes()) for f in files if f.stat().st_size < 1 << 20)
    to = FORMATS[chosen % len(FORMATS)]
    base = base_of(folder) if base_of(folder).exists() else None
    report = with_alpha(
        partial(
            convert_adapter, adapter, to, folder / "out", base=base,
            rank=2 if to == "lora" else None, allow_pickle=True, threads=1,
        )
    )  # fmt: skip
    told(convert_summary(report, Path("out")))
    json.dumps(report.to_dict())


def graph_of(folder, **options):
    """Without running it, which is the runtime's own code."""
    report = dora_export.export_onnx(
        folder / "base", folder / "adapter", folder / "out", into=folder / "graph/model.onnx",
        verify=False, threads=1, **options,
    )  # fmt: skip
    told(text_onnx.summary(report, Path("out")))
    json.dumps(report.to_dict())


def swappable(folder):
    """Leave a graph with places for adapters."""
    copytree(CORPUS / "graphs", folder, dirs_exist_ok=True)
    graph_of(folder, adapters=True)


def verify(folder):
    report = dora_export.verify(
        folder / "base", folder / "adapter", folder / "merged", threads=1, allow_pickle=True
    )
    told(text.verify_summary(report))
    json.dumps(report.to_dict(), allow_nan=False)
    page(report)


def interrupted(folder):
    """Leave staged work of a merge that ended in the middle, beside its inputs."""

    def stop(*_, **_options):
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
IMAGES = corpus("pipeline", "diffusers", "ai-toolkit", "single-file")
METHODS = corpus("method-ia3", "method-oft", "method-lokr")

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
    "image models": Target(IMAGES, inspect, ("base", "base.safetensors"), weight=3),
    "image adapters": Target(IMAGES, inspect, ("adapter", "adapter.safetensors"), weight=2),
    "image merges": Target(IMAGES, merge, writable=OUTPUTS, weight=3),
    "several": Target(corpus("several"), merge, writable=OUTPUTS, weight=2),
    "experts": Target(corpus("experts"), merge, ("base", "adapter"), OUTPUTS, weight=2),
    "methods": Target(
        METHODS, merge, ("base", "adapter"), OUTPUTS, weight=2, needs="peft.tuners.tuners_utils"
    ),
    "convert": Target(
        (*corpus("peft", "pipeline", "diffusers", "lycoris-locon"), *TRAINERS), convert,
        ("base", "adapter", "adapter.safetensors"), OUTPUTS, weight=3,
    ),
    "into": Target(corpus("graphs"), graph_of, ("graph", "adapter"), OUTPUTS, weight=3),
    "adapters": Target(
        corpus("graphs"), partial(graph_of, adapters=True), ("graph", "adapter"), OUTPUTS, weight=3
    ),
    "session": Target(
        (), lambda f: AdapterSession(f / "out"), ("out/dora_export.json",), make=swappable
    ),
    "graph": Target(corpus("graph"), lambda f: open_graph(f / "model.onnx"), weight=2),
}  # fmt: skip
