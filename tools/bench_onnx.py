"""Time a decoder's graphs beside onnxruntime-genai's builder and torch, all in one run.

``tools/bench_onnx.py --base BASE --adapter ADAPTER --work DIR [--rounds 5] [--loads 1]`` exports
what is not in DIR yet and times, in turn, round by round:

- prefill latency of a prompt and decoding speed of our graphs (fp32 and int4; as traced, fused, and
  fused for one sequence, whose attention rotates positions as the builder's does) and of the
  builder's (fp32, int4; where onnxruntime-genai is installed), in onnxruntime with the cache fed
  back;
- torch eager, merged and unmerged (PEFT's active adapter);
- a traced graph of the unmerged model, whose norms are computed anew in every step.

The builder is given the merged weights in float32, never the adapter: it drops magnitudes silently.
It is run with the Python that runs this: ``pip install onnxruntime-genai`` there first (beside the
project's own environment if that must not change). ``--only WORD;...`` times what has one of the
words in its name; everything at once takes 6 GB. ``--quality`` compares predictions instead.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import shutil
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

PROMPT, TOKENS = 64, 32  # tokens of the prompt, and written behind it
TOKENS_IN_TORCH = 8  # which takes ten times as long for each
RATIOS = (
    ("ours, fp32", "builder, fp32"),
    ("ours, fp32 fused", "builder, fp32"),
    ("ours, fp32 fused, one sequence", "builder, fp32"),
    ("ours, int4", "builder, int4"),
    ("ours, int4 fused", "builder, int4"),
    ("ours, int4 fused, 4-bit head", "builder, int4"),
    ("ours, int4 fused, one sequence", "builder, int4"),
    ("ours, int4 fused, one sequence, 4-bit head", "builder, int4"),
    ("unmerged DoRA, fp32", "ours, fp32"),
    ("torch eager, merged", "ours, fp32"),
    ("torch eager, unmerged", "torch eager, merged"),
)
Turn = Callable[[], tuple[float, float]]  # seconds of the prefill, and of a step behind it
Maker = tuple[Callable[..., Turn], tuple[Any, ...]]  # with its arguments


TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16,
         "tensor(int64)": np.int64, "tensor(int32)": np.int32}  # fmt: skip


def values_of(slots: dict[str, Any], ids: Any, seen: int, past: dict[str, Any]) -> Any:
    """Return the inputs of a graph: new tokens behind ``past``, ``seen`` of them in all."""
    values = {
        "input_ids": ids,
        "attention_mask": np.ones((1, seen), np.int64),
        "position_ids": np.arange(seen - ids.shape[1], seen)[None],
        **past,
    }
    return {n: values[n].astype(TYPES[slot.type]) for n, slot in slots.items()}


def empty(path: Path, slots: dict[str, Any]) -> dict[str, Any]:
    """Return a cache of nothing."""

    def width(stated: int | str) -> int:
        if isinstance(stated, int):
            return stated
        # The builder's graphs have a name there.
        config = json.loads((path.parent / "genai_config.json").read_text())
        return int(config["model"]["decoder"]["head_size"])

    return {n: np.zeros((1, slot.shape[1], 0, width(slot.shape[3])), np.float32)
            for n, slot in slots.items() if n.startswith("past")}  # fmt: skip


def of_graph(path: Path, threads: int) -> Turn:
    """Return what times one graph with a cache; sessions are made once."""
    import onnxruntime  # noqa: PLC0415 - seconds

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    slots = {i.name: i for i in session.get_inputs()}
    outputs = [o.name for o in session.get_outputs()]
    none = empty(path, slots)

    def turn() -> tuple[float, float]:
        ids = np.arange(100, 100 + PROMPT)[None]
        started = time.perf_counter()
        found = dict(
            zip(outputs, session.run(None, values_of(slots, ids, PROMPT, none)), strict=True)
        )
        prefilled = time.perf_counter()
        for step in range(TOKENS):
            token = found["logits"][:, -1:].argmax(-1)
            past = {n: found[n.replace("past_key_values", "present")] for n in none}
            values = values_of(slots, token, PROMPT + step + 1, past)
            found = dict(zip(outputs, session.run(None, values), strict=True))
        return prefilled - started, (time.perf_counter() - prefilled) / TOKENS

    return turn


TEXT = """The harbour was quiet when the ship came in. The captain walked down to the pier and
asked where he could buy rope, bread and fresh water. Green plants use sunlight to make sugar from
carbon dioxide and water. In 1969 two astronauts landed on the Moon, while a third stayed in orbit
around it. To bake bread you need flour, water, salt and yeast; mix them, let the dough rise for an
hour and bake it in a hot oven."""


def print_quality(graphs: dict[str, Path], base: Path) -> None:
    """Print how far each graph's predictions for a text are from those of our fp32 graph."""
    from tokenizers import Tokenizer  # noqa: PLC0415 - not needed for timing

    ids = np.array([Tokenizer.from_file(str(base / "tokenizer.json")).encode(TEXT).ids])
    said = {name: log_probabilities(path, ids) for name, path in graphs.items()}
    sure = said["ours, fp32"]
    print(f"predictions for {ids.shape[1]} tokens of text, beside those of 'ours, fp32'")
    for name, found in said.items():
        far = float((np.exp(sure) * (sure - found)).sum(-1).mean())
        same = float((sure.argmax(-1) == found.argmax(-1)).mean())
        print(f"{name:<34} KL {far:.4f}, top-1 the same in {same:.1%}")


def log_probabilities(path: Path, ids: Any) -> Any:
    """Return the log-probabilities of a graph's predictions, float64, ``(tokens, vocabulary)``."""
    import onnxruntime  # noqa: PLC0415 - seconds

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    slots = {i.name: i for i in session.get_inputs()}
    logits = session.run(["logits"], values_of(slots, ids, ids.shape[1], empty(path, slots)))[0]
    wide = logits[0].astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(-1, keepdims=True))


def of_torch(model: Any, threads: int) -> Turn:
    """Return what times a model of transformers, eager."""
    import torch  # noqa: PLC0415 - seconds

    def turn() -> tuple[float, float]:
        torch.set_num_threads(threads)
        with torch.no_grad():
            started = time.perf_counter()
            found = model(torch.arange(100, 100 + PROMPT)[None], use_cache=True)
            prefilled = time.perf_counter()
            for _ in range(TOKENS_IN_TORCH):
                token = found.logits[:, -1:].argmax(-1)
                found = model(token, past_key_values=found.past_key_values, use_cache=True)
            return prefilled - started, (time.perf_counter() - prefilled) / TOKENS_IN_TORCH

    return turn


def make_graphs(base: Path, adapter: Path, work: Path) -> dict[str, Path]:
    """Export what is missing; return the graphs by name."""
    from dora_export import GraphOptions, export_onnx, merge  # noqa: PLC0415

    kinds = {
        "ours, fp32": GraphOptions(),
        "ours, fp32 fused": GraphOptions(fuse="cpu"),
        "ours, fp32 fused, one sequence": GraphOptions(fuse="cpu", batch=1),
        "ours, int4": GraphOptions(quantize="int4"),
        "ours, int4 fused": GraphOptions(quantize="int4", fuse="cpu"),
        "ours, int4 fused, 4-bit head": GraphOptions(quantize="int4", fuse="cpu", head_bits=4),
        "ours, int4 fused, one sequence": GraphOptions(quantize="int4", fuse="cpu", batch=1),
        "ours, int4 fused, one sequence, 4-bit head": GraphOptions(  # as the builder's
            quantize="int4", fuse="cpu", batch=1, head_bits=4
        ),
    }
    found = {}
    for name, options in kinds.items():
        folder = work / name.replace(", ", "-").replace(" ", "-")
        if not folder.is_dir():
            print(f"exporting {name} ...", file=sys.stderr, flush=True)
            export_onnx(base, adapter, folder, options=options, verify=False)
        found[name] = folder / "model.onnx"
    if not (work / "merged").is_dir():
        merge(base, adapter, work / "merged", dtype="fp32")
    unmerged = work / "unmerged" / "model.onnx"
    if not unmerged.is_file():
        print("exporting the unmerged model ...", file=sys.stderr, flush=True)
        trace_unmerged(base, adapter, unmerged)
    return {**found, "unmerged DoRA, fp32": unmerged, **by_builder(work)}


def trace_unmerged(base: Path, adapter: Path, path: Path) -> None:
    """Trace PEFT's model with its adapter active: norms and products stay in the graph."""
    from dora_export.onnx import engines, files, tasks, tidy  # noqa: PLC0415

    (part,) = tasks.parts(unmerged_model(base, adapter))
    model, _, _ = engines.traced(part, None, "torch")
    tidy.tidy(model)
    files.write(model, path, f"{path.name}.data")


def unmerged_model(base: Path, adapter: Path) -> Any:
    """Return the base with PEFT's adapter active, in float32."""
    import peft  # noqa: PLC0415 - seconds
    import torch  # noqa: PLC0415
    import transformers  # noqa: PLC0415

    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    wrapped = peft.PeftModel.from_pretrained(model, adapter).eval()
    return wrapped.base_model.model  # its layers are PEFT's, and its forward is the model's own


def by_builder(work: Path) -> dict[str, Path]:
    """Return graphs of onnxruntime-genai's builder from the merged weights; none without it."""
    found = {}
    for precision in ("fp32", "int4"):
        folder = work / f"builder-{precision}"
        if not (folder / "model.onnx").is_file():
            command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i",
                       str(work / "merged"), "-o", str(folder), "-p", precision, "-e", "cpu",
                       "-c", str(work / "cache")]  # fmt: skip
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
                print(f"builder {precision}: {reason}", file=sys.stderr)
                shutil.rmtree(folder, ignore_errors=True)
                continue
        found[f"builder, {precision}"] = folder / "model.onnx"
    return found


def of_merged(folder: Path, threads: int) -> Turn:
    """Return what times the merged model in torch."""
    import torch  # noqa: PLC0415 - seconds
    import transformers  # noqa: PLC0415

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return of_torch(model.eval(), threads)


def of_unmerged(base: Path, adapter: Path, threads: int) -> Turn:
    """Return what times the base with its adapter active, in torch."""
    return of_torch(unmerged_model(base, adapter), threads)


def serve(asked: Connection, make: Callable[..., Turn], arguments: tuple[Any, ...]) -> None:
    """Make a turn, warm it up, and take it whenever asked to; the body of a process."""
    warnings.simplefilter("ignore")
    turn = make(*arguments)
    turn()
    asked.send(None)
    while asked.recv():
        asked.send(turn())


@contextmanager
def alone(
    makers: dict[str, Maker],
) -> Iterator[dict[str, Turn]]:
    """Yield turns that are taken in a process each, loaded one after another.

    What is loaded first can be some 10 % slower for as long as it lives, whichever it is: hence
    ``--loads``.
    """
    context, asked = multiprocessing.get_context("spawn"), {}
    processes = []
    for name, (make, arguments) in makers.items():
        asked[name], theirs = context.Pipe()
        processes.append(context.Process(target=serve, args=(theirs, make, arguments), daemon=True))
        processes[-1].start()
        theirs.close()
        asked[name].recv()  # one after another: loading takes memory

    def take(name: str) -> tuple[float, float]:
        asked[name].send(True)
        found: tuple[float, float] = asked[name].recv()
        return found

    try:
        yield {name: partial(take, name) for name in asked}
    finally:
        for process, pipe in zip(processes, asked.values(), strict=True):
            pipe.send(False)
            process.join()


def makers_of(graphs: dict[str, Path], base: Path, adapter: Path, work: Path, threads: int,
              words: list[str]) -> dict[str, Maker]:  # fmt: skip
    """Return what makes everything that is timed, by name; only names with one of the words."""
    every: dict[str, Maker] = {
        **{name: (of_graph, (path, threads)) for name, path in graphs.items()},
        "torch eager, merged": (of_merged, (work / "merged", threads)),
        "torch eager, unmerged": (of_unmerged, (base, adapter, threads)),
    }
    return {name: made for name, made in every.items()
            if not words or any(word in name for word in words)}  # fmt: skip


def peak_memory(base: Path, adapter: Path, work: Path) -> None:
    """Print the most anonymous memory that exporting takes, beside the graph's bytes."""
    out = work / "memory"
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "dora_export", "onnx", str(base), str(adapter), "-o", str(out),
               "--no-verify"]  # fmt: skip
    peak = 0
    with subprocess.Popen(command) as process:
        status = Path(f"/proc/{process.pid}/status")
        while process.poll() is None:
            found = re.search(r"^RssAnon:\s*(\d+) kB", status.read_text(), re.MULTILINE)
            peak = max(peak, 1024 * int(found[1])) if found else peak
            time.sleep(0.02)
    if process.returncode:
        sys.exit(process.returncode)
    nbytes = sum(f.stat().st_size for f in out.glob("model.onnx*"))
    print(f"graph {nbytes / 1e6:.0f} MB, peak anonymous memory {peak / 1e6:.0f} MB, of which "
          "python and torch take about 250 MB whatever the model")  # fmt: skip


def print_ratio(seconds: dict[str, list[tuple[float, float]]], over: str, under: str) -> None:
    """Print how much longer one takes than another, round by round; nothing if one is missing."""
    if over not in seconds or under not in seconds:
        return
    pairs = list(zip(seconds[over], seconds[under], strict=True))
    said = []
    for position, what in enumerate(("prefill", "token")):
        ratios = [a[position] / b[position] for a, b in pairs]
        said.append(
            f"{what} {statistics.median(ratios):.2f} ({min(ratios):.2f} - {max(ratios):.2f})"
        )
    print(f"{over} / {under}: {', '.join(said)}")


def main() -> int:
    """Print the table; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=Path, default=Path("build/real/smollm2-135m"))
    parser.add_argument("--adapter", type=Path, default=Path("build/real/smollm2-135m-dora"))
    parser.add_argument("--work", type=Path, default=Path("build/bench-onnx"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--loads", type=int, default=1, help="times to load all, back and forth")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", default="", help="words of names, joined by semicolons")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quality", action="store_true", help="only compare predictions")
    parser.add_argument("--memory", action="store_true", help="only measure an export's memory")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    given.work.mkdir(parents=True, exist_ok=True)
    if given.memory:
        peak_memory(given.base, given.adapter, given.work)
        return 0
    words = given.only.split(";") if given.only else []
    graphs = make_graphs(given.base, given.adapter, given.work)
    if given.quality:
        print_quality(graphs, given.base)
        return 0
    makers = makers_of(graphs, given.base, given.adapter, given.work, given.threads, words)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in makers}
    for time_loaded in range(given.loads):
        order = list(makers.items())[:: -1 if time_loaded % 2 else 1]
        with alone(dict(order)) as timed:
            for _ in range(given.rounds):
                for name, turn in timed.items():
                    seconds[name].append(turn())
    rows = []
    print(f"{'what':<34} {'prefill ms':>10} {'min - max':>15} {'ms per token':>13} "
          f"{'min - max':>13} {'tokens/s':>9}")  # fmt: skip
    for name, runs in seconds.items():
        prefill = [1000 * first for first, _ in runs]
        step = [1000 * rest for _, rest in runs]
        row = {"name": name, "prefill_ms": prefill, "token_ms": step}
        rows.append(row)
        print(f"{name:<34} {statistics.median(prefill):>10.1f} "
              f"{f'{min(prefill):.1f} - {max(prefill):.1f}':>15} {statistics.median(step):>13.2f} "
              f"{f'{min(step):.2f} - {max(step):.2f}':>13} "
              f"{1000 / statistics.median(step):>9.1f}")  # fmt: skip
    for over, under in RATIOS:
        print_ratio(seconds, over, under)
    if given.json:
        given.json.write_text(json.dumps(rows, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
