"""An encoder-decoder's graphs run as the model is called: a source and a target in, all logits out.

Exporters write an encoder, a decoder for the first tokens and one for each further token, or the
two decoders in one graph, which ``use_cache_branch`` switches. The names are those of
github.com/huggingface/optimum-onnx, optimum/exporters/onnx/base.py and
optimum/onnxruntime/modeling_seq2seq.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dora_export.errors import shown
from dora_export.verification.runner import Arrays, GraphUnusable, OnnxRuntime, Runner, Slot

ENCODER, FIRST, FURTHER, MERGED = (
    "encoder_model.onnx", "decoder_model.onnx", "decoder_with_past_model.onnx",
    "decoder_model_merged.onnx",
)  # fmt: skip
OWN, STATES, MASK = "last_hidden_state", "encoder_hidden_states", "encoder_attention_mask"
SWITCH = "use_cache_branch"
PAST, SOURCES = "past_key_values.", ".encoder."
PREFILLED = 2  # tokens of a comparison that the first step reads; each further one is a step
# A graph's name, and what stands behind it for its type ("_fp16", "_quantized").
NAMED = re.compile(
    r"(encoder_model|decoder_model_merged|decoder_with_past_model|decoder_model)(_\w+)?\.onnx"
)


def graphs_of(path: Path) -> tuple[Path, ...]:
    """Return the graphs that a graph is run with, itself among them; alone where it stands alone.

    Those of an encoder-decoder lie beside each other under their usual names.

    Raises:
        GraphUnusable: It is one of an encoder-decoder's, and another is missing.
    """
    match = NAMED.fullmatch(path.name)
    if match is None:
        return (path,)
    own, suffix = match[1], match[2] or ""

    def beside(name: str) -> Path:
        return path.with_name(f"{name.removesuffix('.onnx')}{suffix}.onnx")

    encoder, first, further, merged = map(beside, (ENCODER, FIRST, FURTHER, MERGED))
    whole = (encoder, merged) if own == MERGED.removesuffix(".onnx") else (encoder, first, further)
    if own == ENCODER.removesuffix(".onnx") and not first.exists():
        whole = (encoder, merged)
    if missing := [p for p in whole if not p.exists()]:
        if not encoder.exists() and not _reads_source(path):
            return (path,)  # such names were given to decoders alone, too
        raise GraphUnusable(
            "graph-unsupported",
            f"is run together with '{shown(missing[0].name)}', which is not beside it",
        )
    return whole


def _reads_source(path: Path) -> bool:
    names = OnnxRuntime(path).inputs
    return STATES in names or any(SOURCES in name for name in names)


def opened(path: Path) -> Runner:
    """Return what runs a graph, with the others of its encoder-decoder if it is of one.

    Raises:
        GraphUnusable: onnxruntime does not take it, or another is missing.
    """
    graphs = graphs_of(path)
    return OnnxRuntime(path) if len(graphs) == 1 else Together(*graphs)


class Together:
    """The graphs of an encoder-decoder as one.

    The first tokens go through the decoder without a cache, then each through the one with it, so
    that what is compared with the model's one pass is what a user's loop computes.
    """

    def __init__(self, encoder: Path, first: Path, further: Path | None = None) -> None:
        """Open the graphs.

        Args:
            encoder: Gives a source's states.
            first: Decodes the first tokens; without ``further``: both, by its switch.
            further: Decodes each further token.

        Raises:
            GraphUnusable: onnxruntime does not take one.
        """
        self._encoder: Runner = OnnxRuntime(encoder)
        self._first: Runner = OnnxRuntime(first)
        self._further: Runner
        if further is not None:
            self._further = OnnxRuntime(further)
            return
        if SWITCH not in self._first.inputs:
            raise GraphUnusable("graph-unsupported", f"has no input '{SWITCH}'")
        both = self._first
        self._first, self._further = Branch(both, cached=False), Branch(both, cached=True)

    @property
    def inputs(self) -> Mapping[str, Slot]:
        """The encoder's, and the decoder's tokens."""
        return {**self._encoder.inputs, "decoder_input_ids": self._first.inputs["input_ids"]}

    @property
    def outputs(self) -> Sequence[str]:
        """All logits and the encoder's states."""
        return ["logits", f"encoder_{OWN}"]

    @property
    def precision(self) -> str | None:
        """Coarsest floating-point type of the graphs; None: one is quantised."""
        found = [one.precision for one in (self._encoder, self._first, self._further)]
        order = ("BF16", "F16", "F32", "F64")
        return None if None in found else next(p for p in order if p in found)

    def run(self, values: Arrays) -> dict[str, NDArray[Any]]:
        """Return the outputs by name.

        Raises:
            GraphUnusable: onnxruntime fails.
        """
        source = {n: values[n] for n in self._encoder.inputs}
        states = self._encoder.run(source)[OWN]
        ids = values["decoder_input_ids"]
        cut = min(PREFILLED, ids.shape[1])
        known = {STATES: states, MASK: values.get("attention_mask")}
        given = {n: known[n] for n in self._first.inputs if n in known}
        found = self._first.run({"input_ids": ids[:, :cut], **_arrays(given)})
        logits = [found["logits"]]
        cache = _as_past(found)
        for position in range(cut, ids.shape[1]):
            here = {**cache, **known, "input_ids": ids[:, position : position + 1]}
            found = self._further.run(_arrays({n: here[n] for n in self._further.inputs}))
            logits.append(found["logits"])
            cache |= _as_past(found)
        return {"logits": np.concatenate(logits, axis=1), f"encoder_{OWN}": states}


class Branch:
    """One branch of a decoder that is two, as a graph of its own."""

    def __init__(self, both: Runner, *, cached: bool) -> None:
        """Take the graph.

        Args:
            both: Runs it.
            cached: Whether to run the branch that takes a cache.
        """
        self._both, self._cached = both, cached
        self.precision = both.precision

    @property
    def inputs(self) -> Mapping[str, Slot]:
        """What the branch is given: the graph's inputs but for the switch and an unused cache."""
        return {n: slot for n, slot in self._both.inputs.items()
                if n != SWITCH and (self._cached or not n.startswith(PAST))}  # fmt: skip

    @property
    def outputs(self) -> Sequence[str]:
        """The graph's, but for the source's keys and values where they are given."""
        return [n for n in self._both.outputs if not (self._cached and SOURCES in n)]

    def run(self, values: Arrays) -> dict[str, NDArray[Any]]:
        """Return the branch's outputs by name.

        Raises:
            GraphUnusable: onnxruntime fails.
        """
        rows = len(values["input_ids"])
        nothing = {n: np.zeros((rows, *(d or 0 for d in slot.shape[1:])), slot.dtype)
                   for n, slot in self._both.inputs.items() if n.startswith(PAST)}  # fmt: skip
        found = self._both.run({**nothing, **values, SWITCH: np.array([self._cached])})
        return {n: found[n] for n in self.outputs}


def _as_past(found: Arrays) -> dict[str, NDArray[Any]]:
    """Return a step's keys and values under the names that the next one takes them by."""
    return {n.replace("present", "past_key_values"): v
            for n, v in found.items() if n.startswith("present")}  # fmt: skip


def _arrays(values: Mapping[str, NDArray[Any] | None]) -> dict[str, NDArray[Any]]:
    return {n: np.ascontiguousarray(v) for n, v in values.items() if v is not None}
