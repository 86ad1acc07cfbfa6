"""The unmerged reference under the names of an exported graph, caches included.

A cache goes in as ``past_key_values.N.key`` and ``.value`` and comes out as ``present.N.key`` and
``.value``, each ``(batch, heads, length, dim)``, as optimum and onnxruntime-genai name them.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dora_export.errors import shown
from dora_export.plan import Plan
from dora_export.tensors import DTYPES, DType
from dora_export.verification import inputs, models, parity, script
from dora_export.verification.hypotheses import BASE, MISTAKES, Leaning, leaning
from dora_export.verification.inputs import Batch
from dora_export.verification.measured import GraphMeasured, Progress, Unsupported
from dora_export.verification.models import ModelClass
from dora_export.verification.parity import choices
from dora_export.verification.pooling import Derive
from dora_export.verification.reference import (
    Reference,
    call,
    changed_steps,
    named,
    numbers,
    precisions,
    unit,
)
from dora_export.verification.runner import Arrays, GraphUnusable, Runner
from dora_export.verification.script import DERIVED, PAST, PRESENT, Padding, Script
from dora_export.verification.sidebyside import trained_tokens

STAGES = 4


class NamedReference:
    """The reference as something that takes and gives arrays by name.

    Attributes:
        layers: Layers of its cache; 0 if it runs without one.
        config: The model's.
    """

    def __init__(self, reference: Reference, *, cached: bool, derive: Derive | None = None) -> None:
        """Take the model.

        Args:
            reference: The model.
            cached: Whether to run it with a cache.
            derive: Gives outputs that the graph has beside the model's, from inputs and outputs.

        Raises:
            Unsupported: A cache is asked for of an encoder-decoder, which keeps two.
        """
        config: Any = reference.model.config
        if cached and getattr(config, "is_encoder_decoder", False):
            where = type(reference.model).__name__
            raise Unsupported(where, "the cache of an encoder-decoder is not supported")
        self._reference = reference
        self._cached = cached
        self._derive = derive
        self.config = config
        self.layers = int(config.num_hidden_layers) if cached else 0

    def run(self, values: Arrays) -> dict[str, NDArray[Any]]:
        """Return the outputs by name.

        Raises:
            Unsupported: The model cannot be called so.
        """
        model, precision = self._reference.model, self._reference.precision
        given = {n: torch.from_numpy(v) for n, v in values.items() if not n.startswith(PAST)}
        options: dict[str, Any] = {}
        if self._cached:
            options = {"use_cache": True, "past_key_values": self._cache(values)}
        elif "use_cache" in _arguments(model):
            options = {"use_cache": False}
        found = call(model, given, precision, **options)
        result = {script.output_name(n, given): v for n, v in named(found).items()
                  if not n.startswith("past_key_values")}  # fmt: skip
        if self._cached:
            for position, pair in enumerate(_pairs(found)):
                for part, tensor in zip(("key", "value"), pair, strict=True):
                    result[f"{PRESENT}{position}.{part}"] = _array(tensor)
        return result if self._derive is None else result | self._derive(values, result)

    def _cache(self, values: Arrays) -> Any:
        from transformers import DynamicCache  # noqa: PLC0415 - an extra

        cache = DynamicCache()
        for layer in range(self.layers):
            names = [f"{PAST}{layer}.{part}" for part in ("key", "value")]
            if names[0] in values:
                pair = [torch.from_numpy(values[n]).to(self._reference.precision) for n in names]
                cache.update(*pair, layer)
        return cache


def _pairs(output: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield keys and values of a model's cache, layer by layer."""
    cache = getattr(output, "past_key_values", None)
    if cache is None:
        raise Unsupported(type(output).__name__, "the model gives no cache")
    for layer in getattr(cache, "layers", cache):
        yield (layer.keys, layer.values) if hasattr(layer, "keys") else (layer[0], layer[1])


def _array(tensor: Tensor) -> NDArray[Any]:
    """Return a copy: a cache goes on growing."""
    narrow = tensor.dtype in (torch.bfloat16, torch.float16)
    found: NDArray[Any] = (tensor.float() if narrow else tensor.clone()).numpy()
    return found


def _arguments(model: nn.Module) -> frozenset[str]:
    return frozenset(inspect.signature(model.forward).parameters)


# --- the comparison


def measure(
    plan: Plan,
    graph: Path,
    runner: Runner,
    outputs: Sequence[str] | None,
    with_noise: bool,
    prompts: Sequence[str],
    progress: Progress | None,
    padding: Padding = "any",
    tokens: int = 0,
    cls: ModelClass | None = None,
    derive: Derive | None = None,
    merged_in: DType | None = None,
    twin: Runner | None = None,
) -> GraphMeasured:
    """Run everything that the ONNX tier compares; arguments as in ``check_graph``.

    The graph's merged weights were rounded to ``merged_in``, or, where that is None, as the plan
    says. ``twin`` runs the graph of the base, quantised alike: its noise is taken then.

    Raises:
        Unsupported: The model cannot be run unmerged.
        GraphUnusable: The graph cannot be run.
    """
    report = progress or (lambda done, total: None)
    report(0, STAGES)
    cls, factors = cls or models.class_of(plan), numbers(plan)
    high, storage = precisions(plan, DTYPES.get(runner.precision or ""), merged_in)
    reference = Reference(plan, high, factors, cls)
    report(1, STAGES)
    cached = any(n.startswith((PAST, PRESENT)) for n in (*runner.inputs, *runner.outputs))
    ours = NamedReference(reference, cached=cached, derive=derive)
    folder = graph.parent.parent if graph.parent.name == "onnx" else graph.parent
    batches = inputs.batches(reference.model, folder, prompts, trained_tokens(plan))
    given = [{n: v.numpy() for n, v in batch.values.items()} for batch in batches]
    if misnamed := list(_misnamed_inputs(runner, ours, reference.model, given[0])):
        return GraphMeasured(misnamed=misnamed)
    asked = [s for batch, values in zip(batches, given, strict=True)
             for s in script.scripts(batch.name, values, runner.inputs, padding)]  # fmt: skip
    if not asked:
        raise GraphUnusable("graph-unsupported", "takes none of the shapes that can be made up")
    expected = [script.play(s, ours.run, runner.inputs) for s in asked]
    text = _text(ours, runner, batches, given, tokens) if cached and tokens else None
    if text is not None:
        asked, expected = [*asked, text[0]], [*expected, text[1]]
    names = _names(expected[0][0], outputs)
    if misnamed := list(_misnamed_outputs(runner, names)):
        return GraphMeasured(misnamed=misnamed)
    report(2, STAGES)
    found = [script.play(s, runner.run, runner.inputs, like=e[0])
             for s, e in zip(asked, expected, strict=True)]  # fmt: skip
    if misfits := sorted(set(script.misfits(found, expected, names))):
        return GraphMeasured(misfits=misfits)
    # Masks that float32 takes can be too much for a model in float64 (Gemma 2's, where padding is
    # on the left): such calls are held against the model in storage precision, which is as right.
    finite = [script.finite(s, e, names) for s, e in zip(asked, expected, strict=True)]
    aside: list[tuple[Script, list[dict[str, NDArray[Any]]]]] = []
    if any(finite[: len(finite) - (text is not None)]) and not all(finite):
        aside = [pair for pair, good in zip(zip(asked, found, strict=True), finite, strict=True)
                 if not good]  # fmt: skip
        text = text if finite[-1] else None
        kept = [i for i, good in enumerate(finite) if good]
        asked, found, expected = ([asked[i] for i in kept], [found[i] for i in kept],
                                  [expected[i] for i in kept])  # fmt: skip
    bare = []
    leanings: dict[str, Leaning] = {}
    if list(changed_steps(plan)):
        if "vocab_size" not in plan.config_edits:  # the base does not know tokens that were added
            with reference.without_adapter():
                bare = [script.play(s, ours.run, runner.inputs) for s in asked]
        # One call is enough to tell mistakes apart.
        some, one, other = asked[:1], found[:1], expected[:1]
        right, actual = (script.pieces(some, side, names) for side in (other, one))
        if bare:
            leanings[BASE] = leaning(actual, right, script.pieces(some, bare[:1], names))
        for mistake in MISTAKES:
            with reference.with_mistake(mistake):
                wrong = [script.play(some[0], ours.run, runner.inputs)]
            leanings[mistake] = leaning(actual, right, script.pieces(some, wrong, names))
    drawn = reference.drawn()
    del reference, ours
    report(3, STAGES)
    noisy, other_error = [], {}
    exact: Sequence[Sequence[Arrays]] = expected
    if twin is not None:
        exact = bare or (() if list(changed_steps(plan)) else expected)
        if not exact:
            what = "has no base to measure rounding on (the adapter adds tokens), so give a budget"
            raise GraphUnusable("graph-unsupported", what)
        noisy = [script.play(s, twin.run, runner.inputs, like=e[0])
                 for s, e in zip(asked, exact, strict=True)]  # fmt: skip
    if (with_noise and twin is None) or aside:
        rough = Reference(plan, storage, factors, cls, drawn, noisy=True)
        theirs = NamedReference(rough, cached=cached, derive=derive)
        if with_noise and twin is None:
            noisy = [script.play(s, theirs.run, runner.inputs) for s in asked]
        if aside:
            others = [script.play(s, theirs.run, runner.inputs) for s, _ in aside]
            calls, theirs_found = [s for s, _ in aside], [f for _, f in aside]
            other_error = script.compared(calls, theirs_found, others, names)
    report(4, STAGES)
    return GraphMeasured(
        precision=high.torch,
        storage=storage.torch,
        unit=unit(storage),
        merged_in=None if merged_in is None else merged_in.torch,
        graph=None if runner.precision is None else DTYPES[runner.precision].torch,
        calls=[s.to_dict() for s in (*asked, *(s for s, _ in aside))],
        error=parity.added(
            [script.compared(asked, found, expected, names), *([other_error] if aside else [])]
        ),
        noise=script.compared(asked, noisy, exact, names) if noisy else {},
        noise_of_base=twin is not None,
        effect=script.compared(asked, bare, expected, names) if bare else {},
        leanings=leanings,
        text=None if text is None else choices(_last(found[-1]), _last(expected[-1])),
    )


def _last(results: Sequence[Arrays]) -> NDArray[Any]:
    """Return the logits that the next token is chosen by, call by call."""
    return np.concatenate([one["logits"][:, -1] for one in results])


def _text(
    ours: NamedReference,
    runner: Runner,
    batches: Sequence[Batch],
    given: Sequence[Arrays],
    tokens: int,
) -> tuple[Script, list[dict[str, NDArray[Any]]]] | None:
    """Return what the reference writes, with a cache, behind a batch without padding."""
    for batch, values in zip(batches, given, strict=True):
        if batch.grows == "input_ids" and "input_ids" in values:
            start = values["input_ids"][:1]
            most = getattr(ours.config, "max_position_embeddings", None)
            room = tokens if most is None else min(tokens, most - start.shape[1])
            if room > 0:
                return script.written("greedy text", start, room, ours.run, runner.inputs)
    return None


def _misnamed_inputs(
    runner: Runner, reference: NamedReference, model: nn.Module, batch: Arrays
) -> Iterator[str]:
    have = set(runner.inputs)
    past = {f"{PAST}{i}.{part}" for i in range(reference.layers) for part in ("key", "value")}
    known = {*batch, *past, *(n for n in DERIVED if n in _arguments(model))}
    needed = {n for n in batch if n not in DERIVED}
    if any(n.startswith(PAST) for n in have):
        needed |= past
    yield from (f"has no input '{n}'" for n in sorted(needed - have))
    yield from (f"its input '{shown(n)}' is not the model's" for n in sorted(have - known))


def _names(expected: Arrays, wanted: Sequence[str] | None) -> list[str]:
    """Return the outputs that the graph has to have."""
    own = [n for n in expected if not n.startswith(PRESENT)]
    return [*(own if wanted is None else wanted), *(n for n in expected if n not in own)]


def _misnamed_outputs(runner: Runner, names: Sequence[str]) -> Iterator[str]:
    have = set(runner.outputs)
    yield from (f"has no output '{n}'" for n in sorted(set(names) - have))
    yield from (f"its output '{shown(n)}' is not the model's" for n in sorted(have - set(names)))
