"""What is fed: seeds by folder of the corpus, and the call that reads them."""

import hashlib
import json
import re
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from shutil import copytree
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import load_file, save_file

import dora_export
from dora_export import api
from dora_export.api_convert import TARGETS as FORMATS
from dora_export.api_convert import convert as convert_adapter
from dora_export.checkpoints import open_checkpoint
from dora_export.checkpoints.folder import read_json
from dora_export.cli import text, text_onnx
from dora_export.cli.convert import summary as convert_summary
from dora_export.errors import AdapterError, VerifyError
from dora_export.onnx import into as _into  # noqa: F401 - as above
from dora_export.onnx import swappable as _swappable  # noqa: F401
from dora_export.onnx.graph_file import open_graph
from dora_export.onnx.model import GraphOptions
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
        cost: How many times as long a case takes as most do.
        make: Each makes a seed that is not stored as it is.
        needs: A module to import before, not within a watched call.
        trusts: Whether transformers builds what a config asks for, as large and as long as it asks;
            to wait for something is still a fault.
    """

    seeds: tuple[Path, ...]
    run: Callable[[Path], object]
    parts: tuple[str, ...] = ()
    writable: tuple[str, ...] = ()
    weight: int = 1
    cost: int = 1
    make: tuple[Callable[[Path], object], ...] = ()
    needs: str | None = None
    trusts: bool = False


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
    base, adapters = base_of(folder), [adapter_of(folder), *folder.glob("adapter2")]
    if not base.exists():  # in one file with its adapter
        base, adapters = adapters[0], None
    report = with_alpha(
        partial(
            dora_export.merge, base, adapters, folder / "out", threads=1,
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


def session(folder):
    """What a stranger published: a manifest says of damaged files as well what they are."""
    out = folder / "out"
    with suppress(Exception):  # no manifest any more
        assert (out / "dora_export.json").is_file()  # a pipe would be waited for
        said = json.loads((out / "dora_export.json").read_bytes())
        found = said["onnx"]["files"]
        for name in found:
            found[name] = digest(out / name)
            said["onnx"]["bytes"][name] = (out / name).stat().st_size
        for adapter in said["onnx"]["adapters"].values():
            adapter["sha256"] = digest(out / adapter["file"])
            adapter["bytes"] = (out / adapter["file"]).stat().st_size
        (out / "dora_export.json").write_text(json.dumps(said))
    AdapterSession(out)


def digest(path):
    assert path.is_file()
    assert path.stat().st_size < 1 << 20
    return hashlib.sha256(path.read_bytes()).hexdigest()


def sides(folder):
    """Leave a pair with all that is copied, or read for the model card, beside the weights."""
    small.write_pair(folder)
    for name, content in SIDES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content)


def merged_from(name, **options):
    """Return what leaves a seed of the corpus with the merge of its base and adapter."""

    def make(folder):
        copytree(CORPUS / name, folder, dirs_exist_ok=True)
        dora_export.merge(
            base_of(folder), adapter_of(folder), folder / "merged", allow_pickle=True, threads=1,
            **options,
        )  # fmt: skip

    return make


def pickled_merge(folder):
    """Leave a merge that another tool saved."""
    copytree(CORPUS / "merged", folder, dirs_exist_ok=True)
    weights = folder / "merged/model.safetensors"
    torch.save(load_file(weights), folder / "merged/pytorch_model.bin")
    weights.unlink()
    (folder / "merged/dora_export.json").unlink()


def exported(model, graph):
    """Return what leaves a graph that an exporter made, with its base and an adapter."""

    def make(folder):
        for part in ("base", "adapter", f"graphs/{graph}"):
            copytree(FIXTURES / "onnx" / model / part, folder / part.partition("s/")[0])

    return make


def verify_graph(folder):
    report = dora_export.verify(folder / "base", folder / "adapter", folder / "graph/model.onnx")
    told(text.verify_summary(report))
    json.dumps(report.to_dict(), allow_nan=False)
    page(report)


def forward(folder):
    report = dora_export.verify(
        folder / "base", folder / "adapter", folder / "merged", forward=True, level="fast"
    )
    told(text.verify_summary(report))
    json.dumps(report.to_dict(), allow_nan=False)
    page(report)


def forward_case(folder):
    for part in ("base", "adapter"):
        copytree(FIXTURES / "onnx/llama" / part, folder / part)
    dora_export.merge(folder / "base", folder / "adapter", folder / "merged", threads=1)


TRACES = (
    {},
    {"options": GraphOptions(quantize="int8")},
    {"options": GraphOptions(task="feature-extraction", pooling="config")},
    {"adapters": True},
)


def traced(folder):
    """In a way that depends on what was read, so that a case stays the same."""
    found = [f for part in ("base", "adapter") for f in sorted((folder / part).rglob("*"))]
    files = [f for f in found if f.is_file() and not f.is_symlink() and f.stat().st_size < 1 << 20]
    way = TRACES[sum(zlib.crc32(f.read_bytes()) for f in files) % len(TRACES)]
    report = dora_export.export_onnx(
        folder / "base", folder / "adapter", folder / "out", threads=1, **way
    )
    told(text_onnx.summary(report, Path("out")))
    json.dumps(report.to_dict())


def traceable(model):
    """Return what leaves the first layer of a small model, with an adapter."""

    def make(folder):
        warm()
        leave_first_layer(model, folder)

    return make


def leave_first_layer(model, folder):
    for part in ("base", "adapter"):
        copytree(FIXTURES / "onnx" / model / part, folder / part)
    for name in ("base/model.safetensors", "adapter/adapter_model.safetensors"):
        tensors = load_file(folder / name)
        left = r"\.layers?\.1\." if name.startswith("base") else r"\.layers?\.1\.|classifier"
        first = {n: t for n, t in tensors.items() if not re.search(left, n)}
        assert len(first) < len(tensors)
        save_file(first, folder / name, {"format": "pt"})
    small.edit_json(folder / "base/config.json", num_hidden_layers=1)
    small.edit_json(folder / "adapter/adapter_config.json", modules_to_save=None)  # can be swapped
    for name in ("base/modules.json", "base/1_Pooling/config.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(SENTENCES[name])


@cache
def warm():
    """Trace once: what the exporter loads and compiles the first time is no case's."""
    with TemporaryDirectory() as place:
        leave_first_layer("bert", Path(place))
        made = Path(place)
        dora_export.export_onnx(made / "base", made / "adapter", made / "out", threads=1)


def verify(folder):
    report = dora_export.verify(
        base_of(folder), adapter_of(folder), folder / "merged", threads=1, allow_pickle=True
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
    """Whatever is found beside the output, what is published is right, if not by the first call."""
    merge = partial(
        dora_export.merge, folder / "base", folder / "adapter", folder / "out", threads=1,
        verify="full",
    )  # fmt: skip
    try:
        merge()
    except VerifyError:  # the staged bytes were damaged, and are gone
        merge()
    tensors = small.base_tensors()
    small.check_merged(folder / "out", tensors, small.adapter_tensors(tensors))


SENTENCES = {
    "base/modules.json": '[{"type": "a.Transformer", "path": ""}, '
                         '{"type": "a.Pooling", "path": "1_Pooling"}, {"type": "a.Normalize"}]',
    "base/1_Pooling/config.json": '{"pooling_mode_mean_tokens": true}',
}  # fmt: skip
SIDES = {
    "base/generation_config.json": '{"eos_token_id": [1, 2], "pad_token_id": 0}',
    "base/tokenizer.json": '{"model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []}, '
                           '"added_tokens": [{"id": 2, "content": "<s>"}]}',
    "base/tokenizer_config.json": '{"bos_token": {"content": "<s>"}, "chat_template": "{{ x }}", '
                                  '"added_tokens_decoder": {"2": {"content": "<s>"}}}',
    "base/special_tokens_map.json": '{"bos_token": "<s>"}',
    "base/chat_template.jinja": "{{ messages }}",
    "base/modules.json": '[{"type": "x.Pooling", "path": "1_Pooling"}]',
    "base/1_Pooling/config.json": '{"pooling_mode_mean_tokens": true}',
    "base/README.md": "---\nlicense: mit\ntags:\n- a\nbase_model: org/base\n---\n# Base\n",
    "base/LICENSE": "Do what you like.",
    "base/code.py": "x = 1",
    "adapter/README.md": "---\nlibrary_name: peft\nbase_model: org/base\n---\n# Adapter\n",
    "adapter/tokenizer_config.json": '{"chat_template": "{{ y }}", "bos_token": "<s>"}',
    "adapter/tokenizer.json": '{"model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []}}',
    "adapter/additional_chat_templates/tool.jinja": "{{ z }}",
}  # fmt: skip


def corpus(*names):
    return tuple(CORPUS / name for name in names)


SINGLE = corpus("megatron", "qdora", "catid", "linear-with-dora-merged", "lycoris-loha",
                "lycoris-lokr", "lycoris-locon")  # fmt: skip
TRAINERS = (*(FIXTURES / "mlx" / n for n in ("dora", "experts", "tied")),
            *(FIXTURES / "torchtune" / n for n in ("dora", "lora")))  # fmt: skip
IMAGES = corpus("pipeline", "diffusers", "ai-toolkit", "single-file")
METHODS = corpus("method-ia3", "method-oft", "method-lokr")
# What has a base of its own in its folder, or beside it.
MERGED = (*corpus("megatron", "qdora", "linear-with-dora-merged", "lycoris-loha", "lycoris-lokr",
                  "lycoris-locon"), *TRAINERS)  # fmt: skip
VARIANTS = corpus("riders-tokens", "riders-head", "replicated", "adalora", "bdlora", "onetrainer")
GRAPHS = tuple(
    exported(model, graph)
    for model, graphs in (
        ("bert", "fused optimised slim torch"),
        ("llama", "fused genai-fp32 genai-int4 genai-int8 slim torch transformers"),
    )
    for graph in graphs.split()
)
TRACEABLE = tuple(traceable(model) for model in ("bert", "llama"))

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
    "resume": Target((), resume, (OUTPUTS[1],), OUTPUTS, weight=2, make=(interrupted,)),
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
        (), session, ("out",), ("out/dora_export.json",), make=(swappable,), needs="onnxruntime"
    ),
    "trainers' merges": Target(
        MERGED, merge, ("base", "adapter", "adapter.safetensors"), OUTPUTS, weight=3
    ),
    "riders": Target(
        VARIANTS, merge, ("base", "adapter", "adapter.safetensors"), OUTPUTS, weight=3
    ),
    "side files": Target((), merge, tuple(SIDES), OUTPUTS, weight=2, make=(sides,)),
    "verify others": Target(
        (), verify, ("merged",), weight=3,
        make=(*(merged_from(n) for n in ("pipeline", "single-file", "pickled", "shards")),
              merged_from("peft", max_shard_size=2000), pickled_merge),
    ),
    "into exported": Target(
        (), graph_of, ("graph", "adapter"), OUTPUTS, weight=3, cost=4, make=GRAPHS
    ),
    "adapters exported": Target(
        (), partial(graph_of, adapters=True), ("graph", "adapter"), OUTPUTS, weight=2, cost=4,
        make=GRAPHS[4:],
    ),
    "verify graph": Target(
        (), verify_graph, ("graph",), cost=10, make=GRAPHS[:5],
        needs="transformers.models.llama", trusts=True,
    ),
    "forward": Target(
        (), forward, ("base/config.json", "base/generation_config.json", "merged/config.json"),
        cost=10, make=(forward_case,), needs="transformers.models.llama", trusts=True,
    ),
    "trace": Target(
        (), traced, ("base/config.json",), OUTPUTS, cost=50, make=TRACEABLE,
        needs="transformers.models.bert", trusts=True,
    ),
    # What a class does not ask for is not taken on trust: weights, the adapter, all other files.
    "trace others": Target(
        (), traced,
        ("base/model.safetensors", *SENTENCES, "base/generation_config.json", "adapter"),
        OUTPUTS, cost=25, make=TRACEABLE, needs="transformers.models.bert",
    ),
    "graph": Target(corpus("graph"), lambda f: open_graph(f / "model.onnx"), weight=2),
}  # fmt: skip
