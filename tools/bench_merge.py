"""Time a DoRA merge against ``cp``, a durable ``cp`` and PEFT, whole process by whole process.

The script makes a synthetic Llama-shaped bfloat16 base (about 2.2 GB at the default 22 layers) and
a PEFT DoRA adapter for it, then runs these commands in turn, round after round:

* ``cp``          ``cp -r BASE OUT``: what it costs to write the bytes to the page cache;
* ``cp+sync``     the same, then ``sync`` on every copied file and on the folder: a durable copy;
* ``merge``       ``python -m dora_export merge BASE ADAPTER -o OUT``, checked as by default;
* ``merge-nosync``  the same with ``--no-sync``, which like ``cp`` does not wait for the disk;
* ``merge-unchecked``  ``merge`` with ``--verify none``;
* ``verify-fast``, ``verify-full``  ``dora_export verify`` of such a merge, sampled and whole;
* ``peft``        ``from_pretrained``, ``merge_and_unload``, ``save_pretrained`` in one Python.

How to read the figures:

* Wall time runs from the start of the command to its end, interpreter start and imports included.
* CPU time is user + system time of the command and of the children it waited for. The write-back
  that the kernel does later, in its own threads, is in nobody's CPU time.
* Peak RSS is ``ru_maxrss``: the largest resident set that any ONE process of the command ever had
  (not a sum over processes). It counts the pages of mapped files that were resident, and does not
  count page cache that the process only read or wrote. Linux starts a child's ``ru_maxrss`` at
  the size of the process that spawned it, so the commands are spawned by a tiny launcher; figures
  no higher than the launcher's own size are shown as "<=".
* Before each run, untimed: the base and the adapter are read once, the previous output is removed,
  the file system is synced, and a file of the base's size is written and removed, so that every
  command starts with a warm cache, no dirty pages and memory that was just freed.
* That matters in a virtual machine: the first use of a page of memory may have to wait for the
  host, and counts as system time; hosts that take free pages back make that happen again and again.
  It can make a ``cp`` of some GB several times slower, whichever command comes first.
* A copy larger than the kernel's dirty limit (``vm.dirty_ratio``) waits for the disk.
* Ratios are taken pair by pair, within a round, and then summarised.

Each output of ``merge`` is compared with a float64 computation of sampled rows, made here with
numpy alone; no figure is printed for an output that is off by more than one bfloat16 ulp, beyond
what float32 arithmetic must lose where W and BA cancel.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

HIDDEN = 2048
FFN = 5632
VOCAB = 32000
HEADS = 16
KV_HEADS = 4
HEAD_DIM = HIDDEN // HEADS
RANK = 16
ALPHA = 32
SEED = 20240214
FIXTURE_VERSION = 1
CHUNK_ELEMENTS = 1 << 20
MAX_ULPS = 1.0
SAMPLED_TENSORS = 3
SAMPLED_ROWS = 3

ITEM_BYTES = {"BF16": 2, "F32": 4}
STORED: dict[str, np.dtype[Any]] = {"BF16": np.dtype("<u2"), "F32": np.dtype("<f4")}

# Output features and input features of each adapted projection.
PROJECTIONS: dict[str, tuple[int, int]] = {
    "self_attn.q_proj": (HEADS * HEAD_DIM, HIDDEN),
    "self_attn.k_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
    "self_attn.v_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HEADS * HEAD_DIM),
    "mlp.gate_proj": (FFN, HIDDEN),
    "mlp.up_proj": (FFN, HIDDEN),
    "mlp.down_proj": (HIDDEN, FFN),
}

DEFAULT_MERGE = "{python} -m dora_export merge {base} {adapter} -o {out}"

VERIFY = ["{python}", "-m", "dora_export", "verify", "{base}", "{adapter}", "{merged}"]

LABELS = {
    "cp": "cp -r",
    "cp+sync": "cp -r, then sync (durable)",
    "merge": "dora-export merge",
    "merge-nosync": "dora-export merge --no-sync",
    "merge-unchecked": "dora-export merge --verify none",
    "verify-fast": "dora-export verify --level fast",
    "verify-full": "dora-export verify --level full",
    "peft": "PEFT merge_and_unload",
}

# Columns that hold text; all others are figures.
TEXT_COLUMNS = ("model", "command", "wall time, same round")

# Numerator and denominator of each reported ratio.
RATIOS = [
    ("merge", "cp"),
    ("merge", "cp+sync"),
    ("merge-nosync", "cp"),
    ("peft", "merge"),
    ("merge", "merge-unchecked"),
    ("verify-fast", "merge"),
    ("verify-full", "merge"),
]
MAKES_NOTHING = ("verify-fast", "verify-full")

# Spawns argv[2:], waits for it, and writes: exit code, wall, user, system, max RSS in KiB, and the
# launcher's own peak RSS in KiB (the floor of the figure before it) to the descriptor argv[1].
LAUNCHER = """
import os, sys, time
fd = int(sys.argv[1])
os.set_inheritable(fd, False)
start = time.perf_counter()
pid = os.posix_spawnp(sys.argv[2], sys.argv[2:], os.environ)
_, status, use = os.wait4(pid, 0)
wall = time.perf_counter() - start
with open("/proc/self/status") as lines:
    floor = next(line.split()[1] for line in lines if line.startswith("VmHWM"))
code = os.waitstatus_to_exitcode(status)
report = [code, wall, use.ru_utime, use.ru_stime, use.ru_maxrss, floor]
os.write(fd, " ".join(map(str, report)).encode())
"""

PEFT_CHILD = """
import sys
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
merged.save_pretrained(out, safe_serialization=True)
"""

DURABLE_COPY = 'cp -r "$1" "$2" && sync "$2"/* "$2"'


class BenchError(Exception):
    """A command failed, or its output is wrong: there is nothing to report."""


@dataclasses.dataclass(frozen=True)
class Spec:
    """Name, shape and safetensors dtype of a tensor to write."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def elements(self) -> int:
        """Number of elements."""
        return int(np.prod(self.shape))

    @property
    def nbytes(self) -> int:
        """Size of the tensor's data in the file."""
        return self.elements * ITEM_BYTES[self.dtype]


@dataclasses.dataclass(frozen=True)
class Stored:
    """Where a tensor lies in a safetensors file."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int

    def raw(self) -> NDArray[Any]:
        """Maps the tensor read-only, as stored (bfloat16 as unsigned 16-bit integers)."""
        stored = STORED[self.dtype]
        return np.memmap(self.path, stored, mode="r", offset=self.offset, shape=self.shape)

    def rows(self, index: int | slice) -> NDArray[np.float64]:
        """Reads some rows as float64.

        Args:
            index: A row number or a slice of rows.

        Returns:
            The rows' exact values.
        """
        part = np.asarray(self.raw()[index])
        if self.dtype == "BF16":
            part = (part.astype(np.uint32) << 16).view(np.float32)
        return part.astype(np.float64)


@dataclasses.dataclass(frozen=True)
class Fixture:
    """A base folder, an adapter folder, their common label, and a merge of both to verify."""

    size: str
    layers: int
    base: Path
    adapter: Path

    @property
    def merged(self) -> Path:
        """Where the merge to verify lies, beside the base."""
        return self.base.parent / f"{self.size}-merged"


@dataclasses.dataclass(frozen=True)
class Run:
    """One timed run of one command."""

    size: str
    command: str
    round: int
    wall_s: float
    user_s: float
    system_s: float
    peak_rss_bytes: int
    rss_floor_bytes: int
    load_before: float
    worst_ulps: float | None = None

    @property
    def cpu_s(self) -> float:
        """User plus system time."""
        return self.user_s + self.system_s


@dataclasses.dataclass(frozen=True)
class Grid:
    """A table, before it is known how it will be printed."""

    title: str
    headers: list[str]
    rows: list[list[str]]


@dataclasses.dataclass(frozen=True)
class Options:
    """The command line."""

    work: Path
    layers: int
    shards: int
    deep: bool
    deep_layers: int
    deep_rounds: int
    rounds: int
    warmup: int
    peft_rounds: int
    merge_command: list[str]
    json_file: Path | None
    markdown: bool


# --- the synthetic base and adapter ---------------------------------------------------------------


def base_specs(layers: int) -> list[Spec]:
    """Lists the tensors of the base.

    Args:
        layers: Number of decoder layers.

    Returns:
        The tensors, in file order.
    """
    specs = [Spec("model.embed_tokens.weight", (VOCAB, HIDDEN), "BF16")]
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        shapes = {"input_layernorm": (HIDDEN,), "post_attention_layernorm": (HIDDEN,)} | PROJECTIONS
        specs += [Spec(f"{prefix}{part}.weight", shape, "BF16") for part, shape in shapes.items()]
    specs.append(Spec("model.norm.weight", (HIDDEN,), "BF16"))
    specs.append(Spec("lm_head.weight", (VOCAB, HIDDEN), "BF16"))
    return specs


def adapter_specs(layers: int) -> list[Spec]:
    """Lists the tensors of the adapter.

    Args:
        layers: Number of decoder layers.

    Returns:
        A, B and the magnitude of every adapted projection, in file order.
    """
    specs = []
    for layer in range(layers):
        for projection, (out_features, in_features) in PROJECTIONS.items():
            prefix = f"base_model.model.model.layers.{layer}.{projection}."
            specs.append(Spec(f"{prefix}lora_A.weight", (RANK, in_features), "F32"))
            specs.append(Spec(f"{prefix}lora_B.weight", (out_features, RANK), "F32"))
            specs.append(Spec(f"{prefix}lora_magnitude_vector", (out_features,), "F32"))
    return specs


def random_source(name: str) -> np.random.Generator:
    """Makes the random generator that belongs to a tensor's name."""
    return np.random.default_rng([SEED, zlib.crc32(name.encode())])


def to_bf16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Rounds finite float32 values to bfloat16, ties to even, as 16-bit patterns."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def base_chunks(spec: Spec) -> Iterator[NDArray[Any]]:
    """Yields the data of a base tensor piece by piece.

    Args:
        spec: The tensor.

    Yields:
        Consecutive pieces, as bfloat16 bit patterns.
    """
    random = random_source(spec.name)
    mean, spread = (1.0, 0.05) if len(spec.shape) == 1 else (0.0, 0.02)
    for start in range(0, spec.elements, CHUNK_ELEMENTS):
        count = min(CHUNK_ELEMENTS, spec.elements - start)
        values = random.standard_normal(count, dtype=np.float32)
        values *= np.float32(spread)
        values += np.float32(mean)
        yield to_bf16(values)


def row_norms(tensor: Stored) -> NDArray[np.float64]:
    """Computes the Euclidean norm of every row, a few rows at a time."""
    step = max(1, CHUNK_ELEMENTS // tensor.shape[1])
    parts = [
        np.linalg.norm(tensor.rows(slice(row, row + step)), axis=1)
        for row in range(0, tensor.shape[0], step)
    ]
    return np.concatenate(parts)


def adapter_chunks(spec: Spec, base: dict[str, Stored]) -> Iterator[NDArray[Any]]:
    """Yields the data of an adapter tensor.

    Args:
        spec: The tensor.
        base: The base's tensors; a magnitude is near the row norms of the weight it belongs to.

    Yields:
        The whole tensor, as float32.
    """
    random = random_source(spec.name)
    noise = random.standard_normal(spec.shape, dtype=np.float32)
    if spec.name.endswith("lora_A.weight"):
        yield noise / np.float32(np.sqrt(spec.shape[1]))
    elif spec.name.endswith("lora_B.weight"):
        yield noise * np.float32(0.01)
    else:
        module = spec.name.removeprefix("base_model.model.").removesuffix(".lora_magnitude_vector")
        norms = row_norms(base[f"{module}.weight"])
        yield (norms * (1.0 + 0.02 * noise)).astype(np.float32)


def write_safetensors(
    path: Path, specs: Sequence[Spec], chunks: Callable[[Spec], Iterable[NDArray[Any]]]
) -> None:
    """Writes a safetensors file tensor after tensor, holding one piece in memory.

    Args:
        path: The file.
        specs: The tensors, in file order.
        chunks: Gives a tensor's data, piece by piece, in the stored type.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for spec in specs:
        ends = [offset, offset + spec.nbytes]
        header[spec.name] = {"dtype": spec.dtype, "shape": spec.shape, "data_offsets": ends}
        offset = ends[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for spec in specs:
            for chunk in chunks(spec):
                file.write(chunk.data)


def write_json(path: Path, content: object) -> None:
    """Writes an indented JSON file."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def split_shards(specs: Sequence[Spec], shards: int) -> list[list[Spec]]:
    """Splits tensors into groups of consecutive tensors of about the same size.

    Args:
        specs: The tensors.
        shards: Number of groups wanted.

    Returns:
        The groups, none of them empty.
    """
    total = sum(spec.nbytes for spec in specs)
    groups: list[list[Spec]] = [[] for _ in range(shards)]
    done = 0
    for spec in specs:
        groups[min(shards - 1, done * shards // total)].append(spec)
        done += spec.nbytes
    return [group for group in groups if group]


def base_config(layers: int) -> dict[str, Any]:
    """Makes the content of the base's config.json."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "vocab_size": VOCAB,
        "max_position_embeddings": 2048,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "use_cache": True,
        "dtype": "bfloat16",
    }


def adapter_config(layers: int) -> dict[str, Any]:
    """Makes the content of the adapter's adapter_config.json."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": f"synthetic-llama-{layers}-layers",
        "r": RANK,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.0,
        "use_dora": True,
        "use_rslora": False,
        "target_modules": sorted(name.rpartition(".")[2] for name in PROJECTIONS),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
    }


def write_base(folder: Path, layers: int, shards: int) -> None:
    """Writes the base folder.

    Args:
        folder: An existing empty folder.
        layers: Number of decoder layers.
        shards: Number of weight files; more than one come with an index.
    """
    write_json(folder / "config.json", base_config(layers))
    generation = {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2}
    write_json(folder / "generation_config.json", generation)
    groups = split_shards(base_specs(layers), shards)
    if len(groups) == 1:
        write_safetensors(folder / "model.safetensors", groups[0], base_chunks)
        return
    weight_map = {}
    for number, group in enumerate(groups, start=1):
        name = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        write_safetensors(folder / name, group, base_chunks)
        weight_map.update({spec.name: name for spec in group})
    total = sum(spec.nbytes for group in groups for spec in group)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(folder / "model.safetensors.index.json", index)


def write_adapter(folder: Path, base: Path, layers: int) -> None:
    """Writes the adapter folder.

    Args:
        folder: An existing empty folder.
        base: The base folder.
        layers: Number of decoder layers.
    """
    write_json(folder / "adapter_config.json", adapter_config(layers))
    tensors = index_folder(base)
    write_safetensors(
        folder / "adapter_model.safetensors",
        adapter_specs(layers),
        lambda spec: adapter_chunks(spec, tensors),
    )


def make_folder(folder: Path, write: Callable[[Path], None], log: Console) -> None:
    """Makes a folder if it is missing; an interrupted attempt leaves no half-made one behind.

    Args:
        folder: The folder.
        write: Writes the content into an existing empty folder.
        log: Where to say so.
    """
    if folder.exists():
        return
    log.print(f"making {folder.name}")
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write(partial)
    partial.rename(folder)


def make_fixture(work: Path, size: str, layers: int, shards: int, log: Console) -> Fixture:
    """Makes the base and the adapter of one depth, unless they are there.

    Args:
        work: The work folder.
        size: A label, "shallow" or "deep".
        layers: Number of decoder layers.
        shards: Number of weight files.
        log: Where to report progress.

    Returns:
        The two folders.
    """
    base = work / f"base-v{FIXTURE_VERSION}-{layers}layers-{shards}files"
    adapter = work / f"adapter-v{FIXTURE_VERSION}-{layers}layers"
    make_folder(base, lambda folder: write_base(folder, layers, shards), log)
    make_folder(adapter, lambda folder: write_adapter(folder, base, layers), log)
    return Fixture(size, layers, base, adapter)


def require_space(work: Path, layers: Sequence[int]) -> None:
    """Refuses to start when the fixtures and the largest output cannot fit.

    Args:
        work: The work folder.
        layers: The depths that will be made.

    Raises:
        BenchError: There is too little room.
    """
    sizes = [sum(s.nbytes for s in base_specs(n) + adapter_specs(n)) for n in layers]
    present = sum(f.stat().st_size for f in work.glob("*-v*layers*/*") if f.is_file())
    need = sum(sizes) + max(sizes) - present
    free = shutil.disk_usage(work).free
    if free < need:
        raise BenchError(f"{free / 1e9:.1f} GB free in the work folder, {need / 1e9:.1f} needed")


# --- the check ------------------------------------------------------------------------------------


def index_file(path: Path) -> dict[str, Stored]:
    """Reads the header of a safetensors file."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return {
        name: Stored(path, e["dtype"], tuple(e["shape"]), 8 + length + e["data_offsets"][0])
        for name, e in header.items()
    }


def index_folder(folder: Path) -> dict[str, Stored]:
    """Reads the headers of all safetensors files of a folder."""
    tensors: dict[str, Stored] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors.update(index_file(path))
    return tensors


def exact_row(
    weight: Stored, adapter: dict[str, Stored], module: str, row: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Computes one row of m * (W + s BA) / ||W + s BA|| in float64.

    Args:
        weight: The base weight W.
        adapter: The adapter's tensors.
        module: The adapted module's name in the base.
        row: The row.

    Returns:
        The merged row, unrounded, and the error bound of W + s BA in float32. The bound matters
        only for the few elements, about one in a million, where the terms all but cancel.
    """
    prefix = f"base_model.model.{module}."
    w = weight.rows(row)
    a = adapter[f"{prefix}lora_A.weight"].rows(slice(None))
    b = (ALPHA / RANK) * adapter[f"{prefix}lora_B.weight"].rows(row)
    moved = w + b @ a
    factor = adapter[f"{prefix}lora_magnitude_vector"].rows(row) / np.linalg.norm(moved)
    bound = (RANK + 2) * 2.0**-24 * (np.abs(w) + np.abs(b) @ np.abs(a))
    return factor * moved, factor * bound


def bf16_ulps(
    got: NDArray[np.float64], exact: NDArray[np.float64], bound: NDArray[np.float64]
) -> float:
    """Measures the largest error in units of the last place of a bfloat16.

    Args:
        got: Values that were stored as bfloat16.
        exact: What they should be, unrounded.
        bound: The error that float32 arithmetic may leave before the rounding; not counted.

    Returns:
        The largest (|got - exact| - bound) / ulp(exact); 0.5 or less is correct rounding.
    """
    _, exponent = np.frexp(exact)
    ulp = np.ldexp(1.0, np.maximum(exponent - 8, -133))
    return float(np.max((np.abs(got - exact) - bound) / ulp))


def require_same_tensors(base: dict[str, Stored], out: dict[str, Stored]) -> None:
    """Checks that an output has the base's tensors, with their types and shapes.

    Raises:
        BenchError: It has not.
    """
    expected = {name: (tensor.dtype, tensor.shape) for name, tensor in base.items()}
    found = {name: (tensor.dtype, tensor.shape) for name, tensor in out.items()}
    if expected != found:
        wrong = sorted(n for n in expected | found if expected.get(n) != found.get(n))
        raise BenchError(f"{len(wrong)} missing, extra or reshaped tensors, such as {wrong[0]}")


def worst_error(fixture: Fixture, out_folder: Path, seed: int) -> float:
    """Compares sampled rows of an output with a float64 computation.

    Args:
        fixture: What was merged.
        out_folder: The output.
        seed: Chooses the tensors and rows; the last row of each tensor is always among them.

    Returns:
        The largest error found, in bfloat16 ulps.

    Raises:
        BenchError: Tensors are missing, or one that no adapter touches has changed.
    """
    base, adapter = index_folder(fixture.base), index_folder(fixture.adapter)
    out = index_folder(out_folder)
    require_same_tensors(base, out)
    random = np.random.default_rng([SEED, seed])
    suffix = ".lora_magnitude_vector"
    modules = sorted(
        name.removeprefix("base_model.model.").removesuffix(suffix)
        for name in adapter
        if name.endswith(suffix)
    )
    worst = 0.0
    for module in random.choice(modules, SAMPLED_TENSORS, replace=False).tolist():
        weight, merged = base[f"{module}.weight"], out[f"{module}.weight"]
        last = weight.shape[0] - 1
        for row in [*random.choice(last, SAMPLED_ROWS - 1, replace=False).tolist(), last]:
            exact, bound = exact_row(weight, adapter, module, row)
            worst = float(np.maximum(worst, bf16_ulps(merged.rows(row), exact, bound)))
    for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        if not np.array_equal(base[name].raw()[-1:], out[name].raw()[-1:]):
            raise BenchError(f"{name} changed, although no adapter touches it")
    return worst


def check_output(run: Run, fixture: Fixture, out: Path) -> Run:
    """Measures the error of a merged output, and refuses a wrong one from the merge under test.

    Args:
        run: The run that made the output.
        fixture: What was merged.
        out: The output.

    Returns:
        The run, with its error; a copy is returned as it is.

    Raises:
        BenchError: The output of the merge under test is wrong.
    """
    if run.command not in ("merge", "merge-nosync", "merge-unchecked", "peft"):
        return run
    worst = worst_error(fixture, out, run.round + fixture.layers)
    if run.command != "peft" and not worst <= MAX_ULPS:
        raise BenchError(f"wrong output: {worst:.3g} bfloat16 ulps from the float64 result")
    return dataclasses.replace(run, worst_ulps=worst)


# --- the runs -------------------------------------------------------------------------------------


def fill(template: Sequence[str], fixture: Fixture, out: Path) -> list[str]:
    """Puts the real names into a command's {python}, {base}, {adapter} and {out}."""
    names = {
        "{python}": sys.executable,
        "{base}": str(fixture.base),
        "{adapter}": str(fixture.adapter),
        "{merged}": str(fixture.merged),
        "{out}": str(out),
    }
    words = list(template)
    for placeholder, name in names.items():
        words = [word.replace(placeholder, name) for word in words]
    return words


def output_folder(options: Options) -> Path:
    """Names the folder that every command writes."""
    return options.work / "output"


def templates(options: Options) -> dict[str, list[str]]:
    """Gives the command line of each command, with placeholders."""
    return {
        "cp": ["cp", "-r", "{base}", "{out}"],
        "cp+sync": ["sh", "-c", DURABLE_COPY, "sh", "{base}", "{out}"],
        "merge": options.merge_command,
        "merge-nosync": [*options.merge_command, "--no-sync"],
        "merge-unchecked": [*options.merge_command, "--verify", "none"],
        "verify-fast": [*VERIFY, "--level", "fast"],
        "verify-full": [*VERIFY, "--level", "full"],
        "peft": ["{python}", "-c", PEFT_CHILD, "{base}", "{adapter}", "{out}"],
    }


def warm_cache(folders: Iterable[Path]) -> None:
    """Reads every file of some folders once."""
    buffer = memoryview(bytearray(1 << 22))
    for folder in folders:
        for path in sorted(folder.iterdir()):
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass


def settle(fixture: Fixture, out: Path, *, merged: bool) -> None:
    """Removes the last output, flushes the file system, warms the cache and frees memory.

    The memory that a command needs for its output comes last, so that it is still at hand.
    """
    shutil.rmtree(out, ignore_errors=True)
    subprocess.run(["sync", "-f", str(out.parent)], check=True)
    warm_cache([fixture.base, fixture.adapter, *([fixture.merged] if merged else [])])
    scratch = out.with_suffix(".scratch")
    chunk = bytes(1 << 22)
    with scratch.open("wb", buffering=0) as file:
        for _ in range(0, sum(path.stat().st_size for path in fixture.base.iterdir()), len(chunk)):
            file.write(chunk)
    scratch.unlink()


def launch(argv: Sequence[str]) -> list[float]:
    """Runs a command through the launcher.

    Args:
        argv: The command.

    Returns:
        The launcher's figures.

    Raises:
        BenchError: The command could not be started or exited non-zero.
    """
    reader, writer = os.pipe()
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    # An installed package has its bytecode; without it a start is mostly the compiler's.
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    with tempfile.TemporaryFile() as output, os.fdopen(reader) as report:
        try:
            subprocess.run(
                [sys.executable, "-I", "-S", "-c", LAUNCHER, str(writer), *argv],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=[writer],
                env=environment,
                check=False,
            )
        finally:
            os.close(writer)
        figures = [float(word) for word in report.read().split()]
        output.seek(0)
        printed = output.read().decode(errors="replace")[-4000:]
    if not figures or figures[0] != 0:
        code = f"exit code {figures[0]:.0f}" if figures else "not started"
        raise BenchError(f"{code}: {shlex.join(argv)}\n{printed}")
    return figures


def run_once(
    command: str, template: Sequence[str], fixture: Fixture, out: Path, number: int
) -> Run:
    """Times one command once and checks its output.

    Args:
        command: The command's short name.
        template: Its command line, with placeholders.
        fixture: What it works on.
        out: Where its output goes; removed before the run.
        number: The round.

    Returns:
        The figures.
    """
    settle(fixture, out, merged=command in MAKES_NOTHING)
    load = os.getloadavg()[0]
    _, wall, user, system, rss, floor = launch(fill(template, fixture, out))
    run = Run(
        size=fixture.size,
        command=command,
        round=number,
        wall_s=wall,
        user_s=user,
        system_s=system,
        peak_rss_bytes=int(rss) * 1024,
        rss_floor_bytes=int(floor) * 1024,
        load_before=load,
    )
    return check_output(run, fixture, out)


def run_rounds(
    counts: dict[str, int], fixture: Fixture, options: Options, log: Console
) -> list[Run]:
    """Runs the commands in turn, round after round.

    Args:
        counts: How many counted rounds each command takes part in; the order is the running order.
        fixture: What they work on.
        options: The command line.
        log: Where to report progress.

    Returns:
        The counted runs.
    """
    commands = templates(options)
    out = output_folder(options)
    runs = []
    for number in range(1 - options.warmup, max(counts.values()) + 1):
        for command, count in counts.items():
            if number > count or count == 0:
                continue
            run = run_once(command, commands[command], fixture, out, number)
            note = "" if number > 0 else " (warm-up, not counted)"
            log.print(
                f"{fixture.size} round {number}: {command:8} {run.wall_s:7.2f} s wall "
                f"{run.cpu_s:7.2f} s CPU {run.peak_rss_bytes / 1e6:7.0f} MB{note}",
                highlight=False,
                soft_wrap=True,
            )
            if number > 0:
                runs.append(run)
    return runs


# --- the report -----------------------------------------------------------------------------------


def select(runs: Sequence[Run], size: str, command: str) -> list[Run]:
    """Picks the runs of one command on one depth."""
    return [run for run in runs if run.size == size and run.command == command]


def pair_ratios(runs: Sequence[Run], size: str, over: str, under: str) -> list[float]:
    """Divides the wall times of two commands, round by round.

    Args:
        runs: All runs.
        size: The depth.
        over: The numerator's command.
        under: The denominator's command.

    Returns:
        One ratio for each round that has both.
    """
    below = {run.round: run.wall_s for run in select(runs, size, under)}
    above = select(runs, size, over)
    return [run.wall_s / below[run.round] for run in above if run.round in below]


def rss_text(value: float, floor: float) -> str:
    """Writes a peak RSS in MB, or its upper bound where the launcher hides it."""
    return f"<= {floor / 1e6:.0f}" if value <= floor else f"{value / 1e6:.0f}"


def command_row(size: str, command: str, runs: Sequence[Run]) -> list[str]:
    """Summarises the runs of one command on one depth."""
    walls = [run.wall_s for run in runs]
    peaks = [run.peak_rss_bytes for run in runs]
    floor = max(run.rss_floor_bytes for run in runs)
    return [
        size,
        LABELS[command],
        str(len(runs)),
        f"{statistics.median(walls):.2f}",
        f"{min(walls):.2f} - {max(walls):.2f}",
        f"{statistics.median(run.cpu_s for run in runs):.2f}",
        rss_text(statistics.median(peaks), floor),
        rss_text(max(peaks), floor),
    ]


def command_grid(runs: Sequence[Run], fixtures: Sequence[Fixture]) -> Grid:
    """Makes the table of commands."""
    headers = [
        "model",
        "command",
        "runs",
        "wall s, median",
        "wall s, min - max",
        "CPU s, median",
        "peak RSS MB, median",
        "peak RSS MB, max",
    ]
    rows = []
    for fixture in fixtures:
        size = sum(path.stat().st_size for path in fixture.base.iterdir()) / 1e9
        label = f"{fixture.layers} layers, {size:.1f} GB"
        for command in LABELS:
            chosen = select(runs, fixture.size, command)
            if chosen:
                rows.append(command_row(label, command, chosen))
    return Grid("Whole processes, warm page cache", headers, rows)


def ratio_grid(runs: Sequence[Run], fixtures: Sequence[Fixture]) -> Grid:
    """Makes the table of wall-time ratios."""
    rows = []
    for fixture in fixtures:
        for over, under in RATIOS:
            values = pair_ratios(runs, fixture.size, over, under)
            if values:
                name = f"{LABELS[over]} / {LABELS[under]}"
                figures = [statistics.median(values), min(values), max(values)]
                rows.append([f"{fixture.layers} layers", name, *(f"{v:.2f}" for v in figures)])
    headers = ["model", "wall time, same round", "median", "min", "max"]
    return Grid("Ratios", headers, rows)


def depth_grid(runs: Sequence[Run], fixtures: Sequence[Fixture]) -> Grid:
    """Makes the table that compares the peak memory of the two depths."""
    rows = []
    for command in LABELS:
        shallow, deep = select(runs, "shallow", command), select(runs, "deep", command)
        if shallow and deep and command != "cp":
            low = statistics.median(run.peak_rss_bytes for run in shallow)
            high = statistics.median(run.peak_rss_bytes for run in deep)
            figures = [f"{low / 1e6:.0f}", f"{high / 1e6:.0f}", f"{high / low:.2f}"]
            rows.append([LABELS[command], *figures])
    depths = [f"peak RSS MB, {fixture.layers} layers" for fixture in fixtures]
    return Grid("Peak memory by depth (medians)", ["command", *depths, "ratio"], rows)


def print_markdown(grid: Grid) -> None:
    """Prints a table as Markdown, figures aligned to the right."""
    marks = ["---" if header in TEXT_COLUMNS else "---:" for header in grid.headers]
    for row in (grid.headers, marks, *grid.rows):
        print("| " + " | ".join(row) + " |")
    print()


def print_rich(grid: Grid, console: Console) -> None:
    """Prints a table on the terminal."""
    table = Table(title=grid.title)
    for header in grid.headers:
        table.add_column(header, justify="left" if header in TEXT_COLUMNS else "right")
    for row in grid.rows:
        table.add_row(*row)
    console.print(table)


def print_report(runs: Sequence[Run], fixtures: Sequence[Fixture], markdown: bool) -> None:
    """Prints the tables and what the check found.

    Args:
        runs: All counted runs.
        fixtures: The depths that were run.
        markdown: Print Markdown instead of drawn tables.
    """
    console = Console() if sys.stdout.isatty() else Console(width=140)
    makers = [command_grid, ratio_grid, depth_grid]
    for grid in (make(runs, fixtures) for make in makers):
        if grid.rows and markdown:
            print_markdown(grid)
        elif grid.rows:
            print_rich(grid, console)
    for command in ("merge", "peft"):
        errors = [run.worst_ulps for run in runs if run.command == command and run.worst_ulps]
        if errors:
            print(
                f"{LABELS[command]}: sampled rows within {max(errors):.3f} bfloat16 ulps of float64"
            )


def cpu_model() -> str:
    """Reads the processor's name."""
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def version_of(package: str) -> str | None:
    """Reads an installed package's version without importing it."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def first_line(argv: Sequence[str], line: int = 0) -> str:
    """Runs a short command and takes one line of its output."""
    done = subprocess.run(argv, check=True, capture_output=True, text=True)
    return done.stdout.splitlines()[line].strip()


def machine_facts(work: Path) -> dict[str, Any]:
    """Collects what a reader needs to judge the figures.

    Args:
        work: The work folder, for its file system.

    Returns:
        The facts, ready for JSON.
    """
    packages = ["torch", "numpy", "safetensors", "transformers", "peft", "dora_export"]
    vm = Path("/proc/sys/vm")
    dirty = ["dirty_background_ratio", "dirty_background_bytes", "dirty_ratio", "dirty_bytes"]
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": platform.release(),
        "filesystem": first_line(["df", "--output=fstype", str(work)], 1),
        "cp": first_line(["cp", "--version"]),
        "vm": {name: int((vm / name).read_text(encoding="ascii")) for name in dirty},
        "free_pages_reported_to_host": Path("/sys/module/page_reporting").exists(),
        "python": platform.python_version(),
        "packages": {package: version_of(package) for package in packages},
    }


def report_json(
    runs: Sequence[Run], fixtures: Sequence[Fixture], options: Options
) -> dict[str, Any]:
    """Makes the JSON report.

    Args:
        runs: All counted runs.
        fixtures: The depths that were run.
        options: The command line.

    Returns:
        Facts, settings, every run and the ratios.
    """
    return {
        "machine": machine_facts(options.work),
        "settings": {
            "layers": {fixture.size: fixture.layers for fixture in fixtures},
            "shards": options.shards,
            "warmup_rounds": options.warmup,
            "merge_command": " ".join(options.merge_command),
        },
        "runs": [dataclasses.asdict(run) for run in runs],
        "wall_ratios": {
            f"{fixture.size}: {over} / {under}": pair_ratios(runs, fixture.size, over, under)
            for fixture in fixtures
            for over, under in RATIOS
        },
    }


# --- the command line -----------------------------------------------------------------------------


def positive(text: str) -> int:
    """Reads a whole number of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def make_parser() -> argparse.ArgumentParser:
    """Makes the command-line parser."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--work", type=Path, required=True, help="folder for the models and the outputs")
    add("--layers", type=positive, default=22, help="depth of the base (default 22)")
    add("--shards", type=positive, default=1, help="weight files of the base (default 1)")
    add("--rounds", type=positive, default=5, help="counted rounds (default 5)")
    add("--warmup", type=int, default=1, help="rounds before them, not counted (default 1)")
    add("--no-peft", action="store_true", help="leave PEFT out")
    add("--peft-rounds", type=positive, help="rounds that PEFT takes part in (default: all)")
    add("--deep", action="store_true", help="also run cp and the merge on a deeper base")
    add("--deep-layers", type=positive, help="its depth (default: three times --layers)")
    add("--deep-rounds", type=positive, default=3, help="rounds on the deeper base (default 3)")
    add("--merge-command", default=DEFAULT_MERGE, help=f"default: {DEFAULT_MERGE}")
    add("--merge-args", default="", help="further arguments of the merge command")
    add("--json", type=Path, dest="json_file", help="also write every figure to this file")
    add("--markdown", action="store_true", help="print the tables as Markdown")
    return parser


def read_options(arguments: Sequence[str] | None) -> Options:
    """Reads the command line.

    Args:
        arguments: The arguments; the process's own if None.

    Returns:
        The options.
    """
    parser = make_parser()
    given = parser.parse_args(arguments)
    if "{out}" not in given.merge_command:
        parser.error("--merge-command must contain {out}")
    peft_rounds = 0 if given.no_peft else min(given.peft_rounds or given.rounds, given.rounds)
    return Options(
        work=given.work.resolve(),
        layers=given.layers,
        shards=given.shards,
        deep=given.deep,
        deep_layers=given.deep_layers or 3 * given.layers,
        deep_rounds=given.deep_rounds,
        rounds=given.rounds,
        warmup=max(0, given.warmup),
        peft_rounds=peft_rounds,
        merge_command=shlex.split(given.merge_command) + shlex.split(given.merge_args),
        json_file=given.json_file,
        markdown=given.markdown,
    )


def run_bench(options: Options, log: Console) -> None:
    """Makes the models, runs every command and reports.

    Args:
        options: The command line.
        log: Where to report progress.
    """
    depths = {"shallow": options.layers} | ({"deep": options.deep_layers} if options.deep else {})
    options.work.mkdir(parents=True, exist_ok=True)
    require_space(options.work, list(depths.values()))
    fixtures = [
        make_fixture(options.work, size, layers, options.shards, log)
        for size, layers in depths.items()
    ]
    rounds = options.rounds
    counts = dict.fromkeys(LABELS, rounds) | {"peft": options.peft_rounds}
    try:
        merged = fixtures[0].merged
        shutil.rmtree(merged, ignore_errors=True)
        launch(fill(options.merge_command, fixtures[0], merged))
        runs = run_rounds(counts, fixtures[0], options, log)
        shutil.rmtree(merged, ignore_errors=True)
        if options.deep:
            deep_counts = {"cp": options.deep_rounds, "merge": options.deep_rounds}
            runs += run_rounds(deep_counts, fixtures[1], options, log)
    finally:
        shutil.rmtree(output_folder(options), ignore_errors=True)
    if options.json_file:
        write_json(options.json_file, report_json(runs, fixtures, options))
    print_report(runs, fixtures, options.markdown)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark.

    Args:
        arguments: The command line; the process's own if None.

    Returns:
        The exit code: 1 if a command failed or an output is wrong.
    """
    options = read_options(arguments)
    try:
        run_bench(options, Console(stderr=True))
    except BenchError as error:
        print(f"bench_merge: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
