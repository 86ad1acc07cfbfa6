"""The unmerged model in one precision: the library's own class, the plan's changes in its weights.

Everything that stands beside it (the merged model, a graph, PEFT) is held against its outputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dora_export.checkpoints.pipeline import variant_of
from dora_export.errors import shown
from dora_export.plan import Plan, Step
from dora_export.tensors import DTYPES, DType, TensorRef
from dora_export.verification import mixture, models, times
from dora_export.verification.hypotheses import mistaken
from dora_export.verification.inputs import Batch
from dora_export.verification.measured import LoadFailure, Unsupported
from dora_export.verification.models import Loaded, ModelClass, Place
from dora_export.verification.noise import arguments
from dora_export.verification.repeated import repeat_layers
from dora_export.verification.terms import Term, stored, terms, values
from dora_export.verification.unmerged import Observer, Parts, Unmerged

# Tensor name -> its changes, or those of each of its slices.
Numbers = Mapping[str, tuple[Term, ...] | Mapping[int, tuple[Term, ...]]]
HIGHER = {"BF16": "F32", "F16": "F32", "F32": "F64", "F64": "F64"}


def precisions(
    plan: Plan, computed: DType | None = None, merged_in: DType | None = None
) -> tuple[DType, DType]:
    """Return the high precision that is exact enough, and the one whose noise may be there.

    The latter is the coarsest type that the merge rounds a weight to, or that a graph computes in.
    Nothing is higher than float64, so a model stored in it is compared to the noise of float32.

    Args:
        plan: The merge.
        computed: Type that the other side computes in, if not in the high precision.
        merged_in: Type that its weights were rounded to, where that may be a finer one.
    """
    rounded = [s.dtype for s in plan.steps if s.dtype.mergeable and not s.copies_bytes]
    coarsest = max(rounded, key=unit, default=DTYPES["F32"])
    if merged_in is not None:
        coarsest = min(coarsest, merged_in, key=unit)
    if computed is not None:
        coarsest = max(coarsest, computed, key=unit)
    high = DTYPES[HIGHER[coarsest.name]]
    return high, DTYPES["F32"] if coarsest.name == "F64" else coarsest


def unit(dtype: DType) -> float:
    """Return the unit roundoff of a storage type: the largest relative error of one rounding."""
    return float(torch.finfo(getattr(torch, dtype.torch)).eps) / 2


def changed_steps(plan: Plan) -> list[Step]:
    """Return the steps whose tensors are other than the base's."""
    return [s for s in plan.steps if s.status not in ("unchanged", "cast")]


def numbers(plan: Plan) -> Numbers:
    """Return the products and norms of all changed weights in float64, by tensor name.

    Raises:
        Unsupported: A change has no activation form.
    """
    settings = plan.settings
    return {
        s.name: mixture.slice_terms(s, settings) if mixture.is_stack(s) else terms(s, settings)
        for s in changed_steps(plan)
        if _has_product(s)
    }


def _has_product(step: Step) -> bool:
    # A bias that goes through its layer's scaling has other values, as one that was trained has.
    is_matrix = len(step.shape) > 1
    return any(
        c.delta is not None or c.magnitude is not None or (c.function is not None and is_matrix)
        for c in step.changes
    )


class Reference:
    """Base and adapter, unmerged.

    Attributes:
        plan: Where they come from.
        precision: Of weights and activations.
        loaded: The model; its changed weights are ``Unmerged``, or hold other values.
        places: Tensor name -> where it is in the model.
        weights: Tensor name -> the weight, for those with a product or a norm.
    """

    def __init__(
        self,
        plan: Plan,
        dtype: DType,
        numbers: Numbers,
        cls: ModelClass,
        fill: Mapping[str, Tensor] | None = None,
        *,
        noisy: bool = False,
    ) -> None:
        """Load the base and give it its adapter.

        Args:
            plan: Base, adapter and what becomes of them.
            dtype: Precision of weights and activations.
            numbers: As ``numbers()`` returns them.
            cls: The library's class.
            fill: Values for parameters that the base does not store, by path; None: random ones.
            noisy: Take the norms in ``dtype`` as well, as one does who computes in it, and times
                as another implementation may round them.

        Raises:
            Unsupported: The base does not load, or a changed tensor is not found in it.
        """
        self.plan = plan
        self._noisy = noisy
        self.precision: torch.dtype = getattr(torch, dtype.torch)
        self.loaded = load_base(plan, cls, self.precision)
        repeat_layers(self.loaded.model, plan)
        for path in self.loaded.problems["missing_keys"]:
            if fill is not None and path in fill:
                models.get(self.model, path).copy_(fill[path])
        steps = changed_steps(plan)
        known = {t.name: t for t in plan.base.tensors.values()}
        refs = {s.name: ref for s in steps if (ref := _stored_in_base(s, known)) is not None}
        self.places: dict[str, Place] = models.places(self.loaded, [s.name for s in steps], refs)
        self.weights: dict[str, Unmerged | mixture.Cells] = {}
        self._stacks = mixture.Stacks()
        self._swaps: list[tuple[str, Tensor, Tensor]] = []
        for step in steps:
            self._change(step, numbers)
        if noisy:
            times.round_up(self.model)

    @property
    def model(self) -> nn.Module:
        """The model."""
        return self.loaded.model

    def _change(self, step: Step, numbers: Numbers) -> None:
        """Give a weight its changes, wherever the model shares it with no tensor of its own."""
        place = self.places[step.name]
        path = place.path
        if place.index is not None or place.turned or mixture.is_stack(step):
            self._change_experts(step, numbers)
            return
        own = {place.path for place in self.places.values()} - {path}
        parameters = self.loaded.parameters()
        parameter = parameters[path]
        paths = [p for p, t in parameters.items() if t is parameter and p not in own]
        if step.name in numbers:
            base = self._base_values(step, parameter)
            changes = numbers[step.name]
            assert isinstance(changes, tuple), "Bug: a matrix has one list of changes"
            new: Tensor = Unmerged.of(self._parts(step, base, changes))
            self.weights[step.name] = new  # type: ignore[assignment]
        elif not step.changes and any(step.source is t for t in self.plan.base.tensors.values()):
            return  # a head parted from the embedding: it keeps the base's values
        else:
            exact = torch.float64 if self.precision == torch.float64 else torch.float32
            new = values(step, self.plan.settings, exact).to(self.precision)
        self._swaps += [(p, parameter, new) for p in paths]
        for p in paths:
            models.put(self.model, p, new)

    def _parts(
        self, step: Step, base: Tensor, changes: tuple[Term, ...], index: int | None = None
    ) -> Parts:
        own = tuple(t.to(self.precision) for t in changes)
        parts = Parts(step.name, base, own, self.plan.settings.strength, index)
        return parts.measured() if self._noisy else parts

    def _change_experts(self, step: Step, numbers: Numbers) -> None:
        """Give a tensor of experts its changes, in the parameter that holds it with others."""
        place = self.places[step.name]
        if place.path not in self._stacks.by_path:
            parameter = self.loaded.parameters()[place.path]
            stack = self._stacks.at(place.path, parameter)
            self._swaps.append((place.path, parameter, stack))
            models.put(self.model, place.path, stack)
        else:
            stack = self._stacks.by_path[place.path]
            parameter = next(base for path, base, _ in self._swaps if path == place.path)
        base = place.part(parameter)
        changes = numbers.get(step.name)
        if changes is None:
            cells = self._replaced(step, base, place)
        elif isinstance(changes, tuple):
            assert place.index is not None, "Bug: a matrix in a stack has its slice"
            cell = mixture.Cell(
                self._parts(step, base, changes), place.index, place.turned, place.outputs
            )
            cells = [cell]
        else:
            cells = [
                mixture.Cell(self._parts(step, base[i], own, i), i, place.turned)
                for i, own in changes.items()
            ]
        for cell in cells:
            stack.add_cell(cell)
        self.weights[step.name] = mixture.Cells(cells)

    def _replaced(self, step: Step, base: Tensor, place: Place) -> list[mixture.Cell]:
        """Return the cells of experts that stored values are put in the place of, or added to."""
        new = values(step, self.plan.settings, torch.float64).to(self.precision)

        def cell(index: int, base: Tensor, new: Tensor, own: int | None) -> mixture.Cell:
            parts = Parts(step.name, base, (Term(value=new, replaces=True),), index=own)
            return mixture.Cell(parts, index, place.turned, place.outputs)

        if place.index is not None:
            return [cell(place.index, base, new, None)]
        return [cell(i, base[i], new[i], i) for i in range(len(new))]

    def reach(self) -> None:
        """Compute with all experts that no input was routed to, as with one that was."""
        with torch.no_grad():
            self._stacks.reach()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every parameter, the changed ones included, by path."""
        paths = {*self.loaded.parameters(), *(place.path for place in self.places.values())}
        return {path: tuple(models.get(self.model, path).shape) for path in sorted(paths)}

    def _base_values(self, step: Step, parameter: Tensor) -> Tensor:
        """Return what the products are added to: the base's values, or a trained copy's."""
        source = stored(step.source).to(self.precision).reshape(step.shape)
        # The model's own memory where it holds these values.
        return parameter if torch.equal(parameter, source) else source

    @contextmanager
    def without_adapter(self) -> Iterator[None]:
        """Let the model compute as the base does."""
        for path, base, _ in self._swaps:
            models.put(self.model, path, base)
        try:
            yield
        finally:
            for path, _, new in self._swaps:
                models.put(self.model, path, new)

    @contextmanager
    def with_mistake(self, name: str) -> Iterator[None]:
        """Let the model compute with a known mistake, see ``hypotheses``."""
        kept = [(path, new) for path, _, new in self._swaps if isinstance(new, Unmerged)]
        made: dict[int, Unmerged] = {}
        for path, weight in kept:
            wrong = made.setdefault(id(weight), Unmerged.of(mistaken(weight.parts, name)))
            models.put(self.model, path, wrong)
        cells = [(cell, cell.parts) for cell in self._stacks.cells()]
        for cell, parts in cells:
            cell.parts = mistaken(parts, name)
        try:
            yield
        finally:
            for cell, parts in cells:
                cell.parts = parts
            for path, weight in kept:
                models.put(self.model, path, weight)

    def drawn(self) -> dict[str, Tensor]:
        """Return copies of the parameters that neither base nor adapter stores, by path."""
        brought = {place.path for place in self.places.values()}
        lacking = self.loaded.problems["missing_keys"] - brought
        return {path: models.get(self.model, path).clone() for path in sorted(lacking)}

    def observe(self, observer: Observer | None) -> None:
        """Let ``observer`` see every use of an unmerged weight from now on."""
        for weight in self.weights.values():
            weight.observer = observer

    def idle(self) -> list[str]:
        """Return the unmerged weights that no forward pass has used yet."""
        return [name for name, weight in self.weights.items() if not weight.uses]

    def outputs(self, batch: Batch) -> dict[str, NDArray[Any]]:
        """Return the named outputs for a batch."""
        return outputs(self.model, batch, self.precision)

    def write(self, batch: Batch, count: int) -> Batch:
        """Return the batch with ``count`` more tokens, each the one with the largest logit.

        Without a cache: slower, and the same for every kind of model.
        """
        for _ in range(count):
            logits = self.outputs(batch)["logits"]
            batch = batch.grown(torch.from_numpy(logits[:, -1].argmax(axis=-1)))
        return batch


def _stored_in_base(step: Step, tensors: Mapping[str, TensorRef]) -> TensorRef | None:
    """Return what the base holds in a step's place, for a tied head what its embedding holds."""
    if step.name in tensors:
        return tensors[step.name]
    return step.source if any(step.source is t for t in tensors.values()) else None


def load_base(plan: Plan, cls: ModelClass, precision: torch.dtype) -> Loaded:
    """Load the base of a plan, as it is stored: its layers once each.

    Raises:
        Unsupported: It does not load, or not into this class.
    """
    folder = plan.base.folder
    if folder is None:
        raise Unsupported(plan.base.path.name, "is a weight file without config.json")
    try:
        loaded = models.load(folder, cls, precision, variant_of(plan.base))
    except LoadFailure as error:
        raise Unsupported(cls.name, f"the base does not load: {error}") from error
    if misshapen := sorted(loaded.problems["mismatched_keys"]):
        raise Unsupported(shown(misshapen[0]), f"has another shape in the base than in {cls.name}")
    return loaded


def outputs(model: nn.Module, batch: Batch, precision: torch.dtype) -> dict[str, NDArray[Any]]:
    """Return a model's floating-point outputs by name.

    Raises:
        Unsupported: The model cannot be called with the batch.
    """
    return named(call(model, batch.values, precision))


def call(
    model: nn.Module, values: Mapping[str, Tensor], precision: torch.dtype, **options: Any
) -> Any:
    """Return what a model gives for inputs by name, cast to its precision.

    Raises:
        Unsupported: The model cannot be called so.
    """
    cast = {k: v.to(precision) if v.is_floating_point() else v for k, v in values.items()}
    with torch.no_grad(), models.quiet():
        try:
            return model(**arguments(cast), **options)
        except Unsupported:
            raise
        except (RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
            # What a model's forward raises on inputs, or a precision, that it was not made for.
            shapes = {name: tuple(v.shape) for name, v in values.items()}
            why = f"cannot be run on {shapes} in {precision}: {shown(error, 300)}"
            raise Unsupported(type(model).__name__, why) from error


def named(found: Any) -> dict[str, NDArray[Any]]:
    """Return the floating-point tensors of a model's output by name, but for its cache's."""
    return dict(_named(found))


def _named(found: Any, name: str = "") -> Iterator[tuple[str, NDArray[Any]]]:
    """Yield the tensors of an output; caches, which are objects of their own, are left out."""
    if isinstance(found, Tensor):
        if found.is_floating_point():
            narrow = found.dtype in (torch.bfloat16, torch.float16)
            yield name or "output", (found.float() if narrow else found).numpy()
    elif isinstance(found, Mapping):
        for key, value in found.items():
            yield from _named(value, f"{name}.{key}" if name else str(key))
    elif isinstance(found, Sequence) and not isinstance(found, str):
        for position, value in enumerate(found):
            yield from _named(value, f"{name}.{position}" if name else str(position))
