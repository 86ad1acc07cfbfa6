"""Models as graphs have them: flat named tensors in, flat named tensors out, caches included.

A ``Part`` is one graph: a module, example inputs by the graph's names, and the names of the axes
that vary. Example sizes are all different and above 1, since tracing takes 0 and 1 for constants
and equal sizes for the same one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from dora_export.onnx.model import GRAPH
from dora_export.verification.noise import arguments
from dora_export.verification.script import output_name

BATCH, LENGTH, PAST, TOTAL = (
    "batch_size", "sequence_length", "past_sequence_length", "total_sequence_length"
)  # fmt: skip
HEIGHT, WIDTH = "height", "width"
PATCHES = "packed_height_width"  # of an image, row by row
SIZES = {BATCH: 2, LENGTH: 4, PAST: 5, TOTAL: 9, "encoder_sequence_length": 7,
         "decoder_sequence_length": 3}  # fmt: skip
Axes = Mapping[int, str]


@dataclass(frozen=True, eq=False)
class Part:
    """One graph to be traced.

    Attributes:
        module: Takes the inputs in order, returns the outputs in order.
        inputs: Example inputs by name.
        axes: Input name -> axis -> name of the axis, for those that vary.
        outputs: Names of all outputs.
        compared: Outputs that parity asks for beside a cache's; None: all the model's.
        graph: File name.
        facts: For the manifest.
        steps: Name of an axis -> what all of its sizes are multiples of, where that is not 1.
        notes: What the graph does not take although the model may, for the user to be told.
    """

    module: nn.Module
    inputs: Mapping[str, Tensor]
    axes: Mapping[str, Axes]
    outputs: Sequence[str]
    compared: Sequence[str] | None = None
    graph: str = GRAPH
    facts: Mapping[str, Any] = field(default_factory=dict)
    steps: Mapping[str, int] = field(default_factory=dict)
    notes: Sequence[str] = ()


class Flat(nn.Module):
    """A module under the names of a graph.

    Positional arguments are the graph's inputs in order; keywords are their names with
    underscores for dots.
    """

    def __init__(
        self,
        model: nn.Module,
        names: Sequence[str],
        run: Callable[[nn.Module, dict[str, Tensor]], Sequence[Tensor]],
        outputs: Sequence[str],
    ) -> None:
        """Take the model and how to run it.

        Args:
            model: The model.
            names: The graph's inputs.
            run: Returns the outputs for inputs by name.
            outputs: The graph's outputs.
        """
        super().__init__()
        self.model = model
        self._names, self._outputs = list(names), list(outputs)
        self.run = run
        self.by_name = False  # return a mapping

    def forward(self, *given: Tensor, **named: Tensor) -> Any:
        """Return the outputs in order, or by name."""
        values = dict(zip(self._names, given, strict=False))
        values |= {name: named[word(name)] for name in self._names if word(name) in named}
        found = tuple(self.run(self.model, values))
        return dict(zip(self._outputs, found, strict=True)) if self.by_name else found


def word(name: str) -> str:
    """Return a graph's name as a Python identifier."""
    return name.replace(".", "_")


def tensors(found: Any, name: str = "") -> dict[str, Tensor]:
    """Return the floating-point tensors of a model's output by name, but for its cache's.

    The names are those that verification gives them: nested ones are joined by dots.
    """
    if isinstance(found, Tensor):
        return {name or "output": found} if found.is_floating_point() else {}
    pairs: Sequence[tuple[Any, Any]] = []
    if isinstance(found, Mapping):
        pairs = list(found.items())
    elif isinstance(found, Sequence) and not isinstance(found, str):
        pairs = list(enumerate(found))
    result: dict[str, Tensor] = {}
    for key, value in pairs:
        if key != "past_key_values":
            result |= tensors(value, f"{name}.{key}" if name else str(key))
    return result


def plain(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    axes: Mapping[str, Axes],
    *,
    only: Sequence[str] | None = None,
    options: Mapping[str, Any] | None = None,
    related: bool = False,
) -> Part:
    """Return a model without a cache as a part.

    Args:
        model: The model.
        inputs: Example inputs by the names of its forward, or of ``noise.CONDITIONS``.
        axes: As in ``Part``.
        only: Outputs to keep; None: all that are floating-point tensors of the first level.
        options: What else to call it with.
        related: Tell torch that axes of one name are of one size, where the model does not.
    """
    extra = dict(options or {})
    with torch.no_grad():
        found = tensors(model(**arguments(inputs), **extra))
    names = list(only) if only is not None else [n for n in found if "." not in n]

    def run(model: nn.Module, values: dict[str, Tensor]) -> Sequence[Tensor]:
        if related:
            _relate(values, axes)
        results = tensors(model(**arguments(values), **extra))
        return [results[name] for name in names]

    outputs = [output_name(n, inputs) for n in names]
    return Part(Flat(model, list(inputs), run, outputs), inputs, axes, outputs, compared=outputs)


def fixed(part: Part, name: str, labels: Mapping[int, str], why: str) -> Part:
    """Return a part that says of an input that some of its axes have one size only.

    Args:
        part: The part.
        name: Of the input.
        labels: Axis -> what it is called.
        why: They do not vary.
    """
    sizes = {label: part.inputs[name].shape[axis] for axis, label in labels.items()}
    said = " and ".join(f"{label} {size}" for label, size in sizes.items())
    note = f"the graph takes '{name}' of {said} alone: {why}"
    return replace(
        part, facts={**part.facts, "fixed_axes": {name: sizes}}, notes=(*part.notes, note)
    )


def _relate(values: Mapping[str, Tensor], axes: Mapping[str, Axes]) -> None:
    sizes: dict[str, Any] = {}
    for name, named in axes.items():
        for axis, label in named.items():
            size = values[name].shape[axis]
            torch._check(sizes.setdefault(label, size) == size)  # type: ignore[no-untyped-call]


def cached(model: nn.Module, inputs: Mapping[str, Tensor], axes: Mapping[str, Axes]) -> Part:
    """Return a decoder with its cache as inputs and outputs: one graph for prefill and decoding.

    Every layer keeps all positions, sliding windows too (their masks hide what lies before the
    window), so that all layers have one past length, as run times expect.

    Args:
        model: A decoder.
        inputs: Example inputs for ``SIZES[LENGTH]`` new tokens after ``SIZES[PAST]`` old ones.
        axes: As in ``Part``, of these inputs.
    """
    from transformers import DynamicCache  # noqa: PLC0415 - an extra

    probe = DynamicCache()
    ids = inputs["input_ids"]
    with torch.no_grad():
        model(input_ids=ids, past_key_values=probe, use_cache=True)
    shapes = [(tuple(layer.keys.shape), tuple(layer.values.shape), layer.keys.dtype)
              for layer in probe.layers]  # fmt: skip
    past: dict[str, Tensor] = {}
    for layer, (keys, values, dtype) in enumerate(shapes):
        for kind, shape in (("key", keys), ("value", values)):
            full = (shape[0], shape[1], SIZES[PAST], shape[3])
            past[f"past_key_values.{layer}.{kind}"] = torch.randn(full, dtype=dtype)
    names, layers = list(inputs), len(shapes)

    def run(model: nn.Module, values: dict[str, Tensor]) -> Sequence[Tensor]:
        cache = DynamicCache()
        for layer in range(layers):
            key, value = (values[f"past_key_values.{layer}.{k}"] for k in ("key", "value"))
            cache.update(key, value, layer)
        given = {name: values[name] for name in names}
        found = model(**given, past_key_values=cache, use_cache=True)
        present = [t for layer in found.past_key_values.layers for t in (layer.keys, layer.values)]
        return [found.logits, *present]

    outputs = ["logits"]
    outputs += [f"present.{layer}.{k}" for layer in range(layers) for k in ("key", "value")]
    grown = {name: {0: BATCH, 2: PAST} for name in past}
    return Part(
        Flat(model, [*inputs, *past], run, outputs), {**inputs, **past}, {**axes, **grown},
        outputs, compared=["logits"],
        facts={"layers": layers, "kv_heads": shapes[0][0][1], "head_size": shapes[0][0][3]},
    )  # fmt: skip
