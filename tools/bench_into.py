"""How fast and in how much memory a graph of 2.2 GB takes merged weights.

Makes a synthetic Llama in bfloat16 with a DoRA adapter of rank 16 on all seven projections, and a
float32 graph of it as torch's exporter lays one out: matrices transposed, external data, names
lost. Then, in turn and several times, whole processes: ``cp`` of the graph's files, ``cp`` and
``sync``, and ``dora-export onnx --into``, which waits for the disk, and with ``--no-sync``, which
does not, as ``cp`` does not. Inside the figures of ``--into`` are: finding the base in the graph,
comparing every byte of what changes with it, merging, writing, checking what was written, and
SHA-256 of the graph's files before and after. Not inside is the run beside the unmerged model
(``--no-verify``), which loads that model into torch.

With ``--real BASE ADAPTER GRAPH`` a graph that can be run is timed with that run and without.

Run: ``python tools/bench_into.py --work build/bench-into`` (about 9 GB of disk; ``--layers 1`` for
a quick look).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

HIDDEN, INNER, KV, VOCABULARY, RANK, ALPHA = 2048, 8192, 512, 8192, 16, 32.0
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KV, HIDDEN),
    "self_attn.v_proj": (KV, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}
GRAPH, DATA = "model.onnx", "model.onnx.data"
Timing = tuple[float, float, int | None]  # wall and CPU seconds, bytes of memory


def bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Return float32 values cut to bfloat16's bits."""
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def base_tensors(layers: int) -> Iterator[tuple[str, NDArray[np.uint16]]]:
    """Yield the base's tensors one by one, bfloat16 as bits."""
    rng = np.random.default_rng(0)

    def normal(shape: tuple[int, ...]) -> NDArray[np.uint16]:
        return bfloat16(rng.standard_normal(shape, np.float32) * np.float32(0.02))

    yield "model.embed_tokens.weight", normal((VOCABULARY, HIDDEN))
    for layer in range(layers):
        for name, shape in SHAPES.items():
            yield f"model.layers.{layer}.{name}.weight", normal(shape)


def save_base(folder: Path, layers: int) -> None:
    """Write the base as one safetensors file, a tensor at a time."""
    folder.mkdir(parents=True)
    entries: dict[str, Any] = {}
    offset = 0
    shapes = {"model.embed_tokens": (VOCABULARY, HIDDEN)}
    shapes |= {f"model.layers.{i}.{n}": s for i in range(layers) for n, s in SHAPES.items()}
    for name, (rows, columns) in shapes.items():
        nbytes = rows * columns * 2
        entries[f"{name}.weight"] = {"dtype": "BF16", "shape": [rows, columns],
                                     "data_offsets": [offset, offset + nbytes]}  # fmt: skip
        offset += nbytes
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for _, bits in base_tensors(layers):
            file.write(bits.tobytes())
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": HIDDEN}
    (folder / "config.json").write_text(json.dumps(config))


def save_adapter(folder: Path, layers: int) -> None:
    """Write a trained-like DoRA adapter."""
    from safetensors.numpy import save_file  # noqa: PLC0415 - not needed to print the usage

    folder.mkdir(parents=True)
    rng = np.random.default_rng(1)
    tensors = {}
    for layer in range(layers):
        for name, (out, inner) in SHAPES.items():
            key = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{key}.lora_A.weight"] = rng.standard_normal((RANK, inner), np.float32) * 0.02
            tensors[f"{key}.lora_B.weight"] = rng.standard_normal((out, RANK), np.float32) * 0.02
            norm = 0.02 * np.sqrt(inner)
            tensors[f"{key}.lora_magnitude_vector"] = (
                norm * (1 + 0.1 * rng.standard_normal(out))
            ).astype(np.float32)
    tensors = {n: np.ascontiguousarray(t, np.float32) for n, t in tensors.items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "use_dora": True, "bias": "none",
              "target_modules": [n.split(".")[1] for n in SHAPES]}  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))


def save_graph(folder: Path, layers: int) -> None:
    """Write a graph of the base, its weights widened to float32 and turned, a tensor at a time."""
    folder.mkdir(parents=True)
    nodes, stored, offset = [], [], 0
    with (folder / DATA).open("wb") as file:
        for i, (name, bits) in enumerate(base_tensors(layers)):
            values = (bits.astype(np.uint32) << 16).view(np.float32)
            turned = values if "embed" in name else np.ascontiguousarray(values.T)
            tensor = TensorProto(name=f"val_{i}", data_type=1, dims=turned.shape,
                                 data_location=TensorProto.EXTERNAL)  # fmt: skip
            for key, value in (("location", DATA), ("offset", offset), ("length", turned.nbytes)):
                tensor.external_data.add(key=key, value=str(value))
            file.write(turned.tobytes())
            offset += turned.nbytes
            stored.append(tensor)
            source, op = ("ids", "Gather") if "embed" in name else (f"x_{i}", "MatMul")
            inputs = [f"val_{i}", source] if op == "Gather" else [source, f"val_{i}"]
            nodes.append(helper.make_node(op, inputs, [f"y_{i}"]))
    given = [helper.make_tensor_value_info("ids", TensorProto.INT64, [1])]
    given += [helper.make_tensor_value_info(f"x_{i}", 1, [1, s.dims[0]])
              for i, s in enumerate(stored) if i]  # fmt: skip
    results = [helper.make_tensor_value_info(n.output[0], 1, [1, s.dims[1]])
               for n, s in zip(nodes, stored, strict=True)]  # fmt: skip
    graph = helper.make_graph(nodes, "bench", given, results, stored)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, folder / GRAPH)


def timed(command: list[str], peak: bool) -> Timing:
    """Return wall and CPU seconds of a process, and the most memory it held if it can say so."""
    started, before = time.perf_counter(), os.times()
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    seconds, after = time.perf_counter() - started, os.times()
    busy = sum(after[2:4]) - sum(before[2:4])
    return seconds, busy, json.loads(done.stdout)["peak_rss_bytes"] if peak else None


Way = Callable[[], Timing]


def into(base: Path, adapter: Path, graph: Path, out: Path, *options: str) -> Way:
    """Return what times one re-weighting."""
    command = [sys.executable, "-m", "dora_export", "onnx", str(base), str(adapter),
               "--into", str(graph), "-o", str(out), "--json", *options]  # fmt: skip
    return lambda: timed(command, True)


def synthetic(work: Path, out: Path) -> dict[str, Way]:
    """Return what is timed of the synthetic graph, copies first."""
    graph = work / "graph"
    given = (work / "base", work / "adapter", graph / GRAPH, out, "--no-verify")
    return {
        "cp -r": lambda: timed(["cp", "-r", str(graph), str(out)], False),
        "cp -r, then sync": lambda: timed(
            ["sh", "-c", f"cp -r {graph} {out} && sync {out}/*"], False
        ),
        "--into": into(*given),
        "--into --no-sync": into(*given, "--no-sync"),
    }


def rounds(ways: dict[str, Way], out: Path, count: int, pause: float) -> None:
    """Time all in turn and print medians, and the ratios to copies within each round.

    A virtual machine's host takes memory back two seconds after it was freed, and getting it again
    takes many times longer than writing to it. ``cp`` would write at once to what removing the last
    output has freed, and a program that first has something to read would not.
    """
    found: dict[str, list[float]] = {name: [] for name in ways}
    used: dict[str, list[float]] = {name: [] for name in ways}
    peaks: dict[str, int] = {}
    for _ in range(count + 1):  # the first warms the page cache
        for name, run in ways.items():
            shutil.rmtree(out, ignore_errors=True)
            os.sync()
            time.sleep(pause)
            seconds, cpu, peak = run()
            found[name].append(seconds)
            used[name].append(cpu)
            if peak:
                peaks[name] = max(peak, peaks.get(name, 0))
    for name, all_seconds in found.items():
        kept = all_seconds[1:]
        memory = f", peak memory {peaks[name] / 1e6:.0f} MB" if name in peaks else ""
        busy = f"CPU {statistics.median(used[name][1:]):.2f} s"
        print(f"{name:32} median {statistics.median(kept):6.2f} s, {min(kept):.2f} - "
              f"{max(kept):.2f}; {busy}{memory}")  # fmt: skip
    for copy in (name for name in ways if name.startswith("cp")):
        for name in (name for name in ways if not name.startswith("cp")):
            ratios = [a / b for a, b in zip(found[name][1:], found[copy][1:], strict=True)]
            print(f"{name} / {copy}: median {statistics.median(ratios):.2f}, {min(ratios):.2f} - "
                  f"{max(ratios):.2f}")  # fmt: skip
    shutil.rmtree(out, ignore_errors=True)


def main() -> None:
    """Make what is missing, run, and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("build/bench-into"))
    parser.add_argument("--layers", type=int, default=9, help="9 layers: a graph of 2.2 GB")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pause", type=float, default=5.0, help="seconds before each run")
    parser.add_argument("--real", type=Path, nargs=3, metavar=("BASE", "ADAPTER", "GRAPH"))
    given = parser.parse_args()
    if given.real:
        base, adapter, graph = given.real
        out = given.work / "real-out"
        given.work.mkdir(parents=True, exist_ok=True)
        ways = {"--into --no-verify": into(base, adapter, graph, out, "--no-verify"),
                "--into, run beside the unmerged": into(base, adapter, graph, out)}  # fmt: skip
        rounds(ways, out, given.rounds, given.pause)
        return
    work = given.work / str(given.layers)
    if not (work / "graph" / GRAPH).exists():
        shutil.rmtree(work, ignore_errors=True)
        save_base(work / "base", given.layers)
        save_adapter(work / "adapter", given.layers)
        save_graph(work / "graph", given.layers)
    size = sum(p.stat().st_size for p in (work / "graph").iterdir())
    print(f"graph of {size / 1e9:.2f} GB, {given.layers} layers, {os.cpu_count()} CPUs")
    rounds(synthetic(work, work / "out"), work / "out", given.rounds, given.pause)


if __name__ == "__main__":
    main()
