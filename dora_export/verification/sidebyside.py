"""The merged model beside the unmerged one: every changed layer, then the whole, then the noise.

At most two models are in memory at once. Layers are compared while the reference runs: each use of
a changed weight is computed again, on the very same input, with the merged weight and in storage
precision, so an error does not smear into the layers after it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dora_export.checkpoints.folder import read_json
from dora_export.checkpoints.pipeline import variant_of
from dora_export.errors import InputError, shown
from dora_export.plan import Plan
from dora_export.tensors import DType
from dora_export.verification import inputs, models, parity
from dora_export.verification.inputs import Batch
from dora_export.verification.measured import Layer, LoadFailure, Measured, Opinion, Progress
from dora_export.verification.models import Loaded, ModelClass
from dora_export.verification.parity import Choices, Compared
from dora_export.verification.reference import (
    Numbers,
    Reference,
    changed_steps,
    load_base,
    numbers,
    outputs,
    precisions,
    unit,
)
from dora_export.verification.terms import Term
from dora_export.verification.unmerged import Call, Parts

STAGES = 5


def measure(
    plan: Plan,
    merged: Path,
    prompts: Sequence[str],
    tokens: int,
    progress: Progress,
) -> Measured:
    """Run everything that the forward tier compares; arguments as in ``check_forward``.

    Raises:
        Unsupported: The model cannot be run unmerged.
        LoadFailure: The merged folder does not load like the base.
    """
    cls = models.class_of(plan)
    high, storage = precisions(plan)
    factors = numbers(plan)
    progress(0, STAGES)
    reference = Reference(plan, high, factors, cls)
    progress(1, STAGES)
    loaded = load_merged(merged, cls, reference)
    progress(2, STAGES)
    run = _Run(share_random(reference, loaded))
    run.compare(plan, reference, loaded, prompts, tokens)
    places = [place.how for place in reference.places.values()]
    idle, precision = reference.idle(), reference.precision
    del reference, loaded
    progress(3, STAGES)
    noise: dict[str, Compared] = {}
    opinion = Opinion()
    if not run.misfits:
        noise = run.noise(plan, factors, cls, storage)
        progress(4, STAGES)
        opinion = run.second_opinion(plan, cls, precision)
    progress(5, STAGES)
    return Measured(
        model=cls.name,
        precision=high.torch,
        storage=storage.torch,
        unit=unit(storage),
        inputs=[batch.to_dict() for batch in run.batches],
        places={how: places.count(how) for how in sorted(set(places))},
        random=sorted(run.fill),
        misfits=run.misfits,
        layers=[layer for layer in run.layers.values() if layer.error.count],
        idle=idle,
        error=parity.added(run.errors),
        noise=noise,
        effect=parity.added(run.effects),
        text=run.text,
        opinion=opinion,
    )


# --- loading the merged model


def load_merged(folder: Path, cls: ModelClass, reference: Reference) -> Loaded:
    """Load the merged model as its reference was loaded.

    Raises:
        LoadFailure: It does not load, is of another class, or lacks what the reference has.
    """
    try:
        config = read_json(folder / "config.json")
    except InputError as error:
        raise LoadFailure(str(error)) from error
    base = reference.plan.base.config
    for key in ("architectures", "_class_name", "model_type"):
        if config.get(key) != base.get(key):
            raise LoadFailure(f"config.json says {key} {shown(config.get(key))}, the base's "
                              f"{shown(base.get(key))}")  # fmt: skip
    loaded = models.load(folder, cls, reference.precision, variant_of(reference.plan.base))
    brought = {place.path for place in reference.places.values()}
    allowed = dict(reference.loaded.problems)
    allowed["missing_keys"] = allowed["missing_keys"] - brought
    for kind, what in models.PROBLEMS.items():
        if more := sorted(loaded.problems[kind] - allowed[kind]):
            names = ", ".join(shown(n) for n in more[:5])
            rest = f" and {len(more) - 5} more" if len(more) > 5 else ""
            raise LoadFailure(f"loaded with tensors {what}: {names}{rest}")
    theirs, ours = loaded.parameters(), reference.shapes()
    for path, shape in ours.items():
        if path not in theirs or tuple(theirs[path].shape) != shape:
            got = tuple(theirs[path].shape) if path in theirs else "none"
            raise LoadFailure(f"{path} has shape {got}, expected {shape}")
    return loaded


def share_random(reference: Reference, merged: Loaded) -> dict[str, Tensor]:
    """Return what the reference drew for want of stored values, shared with the merged model.

    A merged model that stores such a parameter keeps its own, and so differs.
    """
    drawn = reference.drawn()
    theirs = merged.parameters()
    for path in drawn.keys() & merged.problems["missing_keys"]:
        theirs[path].copy_(drawn[path])
    return drawn


# --- layers


class LayerWatch:
    """Compares each use of an unmerged weight with its merged twin; an ``Observer``."""

    def __init__(self, reference: Reference, merged: Loaded, layers: dict[str, Layer]) -> None:
        """Pair the parameters of two models of one class by their paths.

        Args:
            reference: The unmerged one.
            merged: The merged one.
            layers: Tensor name -> where to count; layers are put in here.
        """
        theirs = merged.parameters()
        storage = {s.name: s.dtype for s in changed_steps(reference.plan)}
        self._layers = layers
        self._types: dict[str, torch.dtype] = {}
        self._weights: dict[str, Tensor] = {}
        self._terms: dict[tuple[str, int | None], tuple[Term, ...]] = {}
        for name in reference.weights:
            layers[name] = Layer(name, unit(storage[name]))
            self._types[name] = getattr(torch, storage[name].torch)
            place = reference.places[name]
            self._weights[name] = place.part(theirs[place.path])
        paths = {*reference.loaded.parameters(), *(p.path for p in reference.places.values())}
        self._twins = {id(models.get(reference.model, p)): theirs[p] for p in paths & theirs.keys()}

    def __call__(self, parts: Parts, call: Call, result: Tensor) -> None:
        """Compare one use."""
        bias = None if call.bias is None else self._twins[id(call.bias)]
        exact, layer = result.numpy(), self._layers[parts.name]
        weight = self._weights[parts.name]
        merged = call.plain(weight if parts.index is None else weight[parts.index], bias)
        layer.error += parity.distance(merged.numpy(), exact)
        layer.effect += parity.distance(call.plain(parts.base, call.bias).numpy(), exact)
        narrow = self._types[parts.name]
        noisy = call.to(narrow).run(self._in_storage(parts)).to(result.dtype)
        layer.noise += parity.distance(noisy.numpy(), exact)

    def _in_storage(self, parts: Parts) -> Parts:
        """Return the parts in storage precision; norms are measured once."""
        narrow = parts.to(self._types[parts.name])
        key = (parts.name, parts.index)
        if key not in self._terms:
            self._terms[key] = narrow.measured().terms
        return replace(narrow, terms=self._terms[key])


# --- runs


@dataclass
class _Run:
    """What has been run so far.

    Attributes:
        fill: Parameters that the base does not store, as the reference drew them.
        batches: Inputs, the texts that the reference wrote included.
        expected: The reference's outputs for each of them.
        layers: By tensor name.
        errors: The merged model's outputs from the reference's, by batch and name.
        effects: The base's from the reference's.
        misfits: How the names and shapes of outputs differ.
        text: Choices at the tokens that the reference wrote, or None.
    """

    fill: dict[str, Tensor]
    batches: list[Batch] = field(default_factory=list)
    expected: list[dict[str, NDArray[Any]]] = field(default_factory=list)
    layers: dict[str, Layer] = field(default_factory=dict)
    errors: list[dict[str, Compared]] = field(default_factory=list)
    effects: list[dict[str, Compared]] = field(default_factory=list)
    misfits: list[str] = field(default_factory=list)
    text: Choices | None = None

    def compare(
        self,
        plan: Plan,
        reference: Reference,
        merged: Loaded,
        prompts: Sequence[str],
        tokens: int,
    ) -> None:
        """Run reference and merged model on the same inputs, and the reference's own texts."""
        given = inputs.batches(reference.model, merged.folder, prompts, trained_tokens(plan))
        texts = [reference.write(b, tokens) for b in given if b.grows and tokens > 0]
        reference.observe(LayerWatch(reference, merged, self.layers))
        for batch in (*given, *texts):
            exact = reference.outputs(batch)
            found = outputs(merged.model, batch, reference.precision)
            self.misfits = parity.misfits(found, exact)
            if self.misfits:
                return
            self.batches.append(batch)
            self.expected.append(exact)
            self.errors.append(parity.compare(found, exact, mask_of(batch)))
            if batch in texts:
                chosen = _at_the_end(found, exact, tokens)
                self.text = chosen if self.text is None else self.text + chosen
        reference.reach()
        reference.observe(None)
        if resized(plan) is None:  # the base does not know the tokens that were added
            with reference.without_adapter():
                self.effects = self._compared(reference.outputs, len(given))

    def _compared(
        self, run: Callable[[Batch], dict[str, NDArray[Any]]], count: int | None = None
    ) -> list[dict[str, Compared]]:
        """Return how far another way of running is from the reference, batch by batch."""
        return [
            parity.compare(run(batch), exact, mask_of(batch))
            for batch, exact in zip(self.batches[:count], self.expected[:count], strict=True)
        ]

    def noise(
        self, plan: Plan, factors: Numbers, cls: ModelClass, storage: DType
    ) -> dict[str, Compared]:
        """Return how far the reference in storage precision is from the one in high precision.

        Raises:
            Unsupported: It cannot be run in that precision.
        """
        reference = Reference(plan, storage, factors, cls, self.fill, noisy=True)
        return parity.added(self._compared(reference.outputs))

    def second_opinion(self, plan: Plan, cls: ModelClass, precision: torch.dtype) -> Opinion:
        """Ask PEFT's active adapter for the same outputs.

        Raises:
            Unsupported: The base does not load.
        """
        folders = [a.folder for a in plan.adapters if a.format == "peft" and a.folder is not None]
        if len(folders) != len(plan.adapters):
            return Opinion(said="not asked: the adapter is of another format")
        if plan.settings.strength != 1.0 or set(plan.weights) != {1.0}:
            return Opinion(said="not asked: it has no strength other than 1")
        if not models.is_installed("peft"):
            return Opinion(said="not asked: not installed")
        from peft import PeftModel  # noqa: PLC0415 - an extra

        model: Any = load_base(plan, cls, precision).model
        for path, drawn in self.fill.items():
            models.get(model, path).copy_(drawn)
        rows = resized(plan)
        with models.quiet(cls.library) as warnings, torch.random.fork_rng(devices=[]):
            try:
                if rows is not None:
                    model.resize_token_embeddings(rows, mean_resizing=False)
                model = PeftModel.from_pretrained(model, folders[0])
                for i, folder in enumerate(folders[1:], 1):
                    model.load_adapter(folder, f"adapter_{i}")
                if len(folders) > 1:
                    model.base_model.set_adapter(list(model.peft_config))
                model = model.to(precision).eval()
            except Exception as error:
                # PEFT raises whatever it meets; all of it means that there is no second opinion.
                return Opinion(said=f"fails: {type(error).__name__}: {shown(error, 300)}")
        lacking = [str(w.message) for w in warnings if "missing adapter keys" in str(w.message)]
        if lacking:
            return Opinion(said=f"loads not all of it: {shown(lacking[0], 300)}")
        inner = model.get_base_model()
        found = self._compared(lambda batch: outputs(inner, batch, precision))
        return Opinion(parity.added(found))


def mask_of(batch: Batch) -> NDArray[Any] | None:
    """Return a batch's mask as ``parity.compare`` takes it."""
    return None if batch.mask is None else batch.mask.numpy()


def resized(plan: Plan) -> int | None:
    """Return the size of the vocabulary if the adapter changed it, else None."""
    rows = plan.config_edits.get("vocab_size")
    return None if rows is None else int(rows)


def trained_tokens(plan: Plan) -> list[int]:
    """Return tokens that only the adapter knows, or that it trained apart."""
    rows = [r for s in plan.steps for c in s.changes for r in c.row_indices]
    for step in changed_steps(plan):
        before = plan.base.tensors.get(step.name)
        if before is not None and before.shape != step.shape:
            rows += range(before.shape[0], step.shape[0])
    return list(dict.fromkeys(rows))


def _at_the_end(
    found: Mapping[str, NDArray[Any]], exact: Mapping[str, NDArray[Any]], tokens: int
) -> Choices:
    """Compare the choices that written texts end with."""
    got, best = (np.ascontiguousarray(o["logits"][:, -tokens - 1 : -1]) for o in (found, exact))
    return parity.choices(got, best)
