"""Where a checkpoint keeps the experts that an adapter names in another way.

A trainer sees one matrix of one expert, a stack of all experts, or a stack of gate and up fused
(``expert_names``); a checkpoint may hold any of the three. Here an update of the one becomes
updates of the other: slices, rows, transposes and, where two magnitudes share a fused matrix whose
rows cannot be told apart by a range, one update of both.

PEFT trains a stacked parameter of a class (``target_parameters``) without knowing what its two
dimensions mean: the shapes of A and B tell how ``B A`` lies over a slice, and where they are alike,
PEFT's version and the class do.

Source: github.com/huggingface/peft 0.21.2, src/peft/tuners/lora/layer.py (ParamWrapper) and
src/peft/utils/transformers_weight_conversion.py.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dora_export import conventions
from dora_export.checkpoints.model import Checkpoint
from dora_export.errors import PlanError, shown
from dora_export.expert_names import EXPERT_MODELS, Address, ExpertModel, Part, address
from dora_export.tensors import Operand, TensorRef
from dora_export.update import Layout, Update

WORDS = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj", "gate_up": "gate_up_proj"}


# --- rearrangements


@dataclass(frozen=True)
class Spread:
    """Rows put into a taller matrix of zeros, a fixed step apart.

    Attributes:
        total: Rows of the result.
        first: Where the first row goes.
        step: Distance from one to the next.
    """

    total: int
    first: int
    step: int

    def __call__(self, array: NDArray[Any]) -> NDArray[Any]:
        """Return the taller matrix."""
        out = np.zeros((self.total, *array.shape[1:]), array.dtype)
        out[self.first : self.first + self.step * array.shape[0] : self.step] = array
        return out


@dataclass(frozen=True)
class Every:
    """Rows of a matrix, a fixed step apart: the reverse of ``Spread``.

    Attributes:
        first: The first row taken.
        step: Distance from one to the next.
        count: How many.
    """

    first: int
    step: int
    count: int

    def __call__(self, array: NDArray[Any]) -> NDArray[Any]:
        """Return those rows."""
        return array[self.first : self.first + self.step * self.count : self.step]


@dataclass(frozen=True)
class Joined:
    """Operands of gate and up as one operand of the fused matrix, from their stored tensors.

    Attributes:
        gate: The one.
        up: The other, of the same shape but for the rank.
        how: "A" one over the other; "B" each in its own rows and columns; "m" each in its own rows.
        alternate: Whether rows of gate and up alternate.
    """

    gate: Operand
    up: Operand
    how: str
    alternate: bool

    @property
    def operand(self) -> Operand:
        """The operand itself."""
        (rows, *rest), (more, *rest_up) = self.gate.shape, self.up.shape
        shape = (rows + more, *(a + b for a, b in zip(rest, rest_up, strict=True)))
        if self.how == "A":
            shape = (rows + more, *rest)
        return Operand.computed((*self.gate.refs, *self.up.refs), shape, self)

    def __call__(self, *arrays: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return it, float64, given the stored tensors of both."""
        held = iter(arrays)
        gate, up = (o.value(lambda _: next(held)) for o in (self.gate, self.up))
        if self.how == "A":
            return np.concatenate([gate, up])
        count = gate.shape[0]
        step = 2 if self.alternate else 1
        second = 1 if self.alternate else count
        if self.how == "m":
            both = np.empty(2 * count)
            both[: step * count : step], both[second::step] = gate, up
            return both
        both = np.zeros((2 * count, gate.shape[1] + up.shape[1]))
        both[: step * count : step, : gate.shape[1]] = gate
        both[second::step, gate.shape[1] :] = up
        return both


# --- what the base has


@dataclass(frozen=True)
class Held:
    """Where a base keeps one part of all experts of a block.

    Attributes:
        single: Expert -> its tensor, where each has its own.
        stack: The tensor of all experts, else.
        part: What that holds: the part itself, or "gate_up".
    """

    single: Mapping[int, TensorRef] = field(default_factory=dict)
    stack: TensorRef | None = None
    part: Part = "down"

    @property
    def count(self) -> int:
        """Number of experts."""
        return self.stack.shape[0] if self.stack is not None else len(self.single)


Places = Mapping[tuple[str, Part], Held]


class KnownNames(Set[str]):
    """All names that a base's tensors go by: its own, those of other conventions, its experts'."""

    def __init__(self, base: Checkpoint, more: Iterable[str] = ()) -> None:
        """Look the base's names through.

        Args:
            base: The base.
            more: Names to count as the base's.
        """
        self.places = _places(base)
        self._own = frozenset((*base.tensors, *more))
        self._model_type = base.config.get("model_type")

    def __contains__(self, name: object) -> bool:
        """Return whether a tensor goes by that name."""
        if not isinstance(name, str):
            return False
        return name in self._own or self.own(name) != name or bool(self._parts(name))

    def __iter__(self) -> Iterator[str]:
        """Yield the base's own names."""
        return iter(self._own)

    def __len__(self) -> int:
        """Return how many names of its own the base has."""
        return len(self._own)

    def own(self, name: str) -> str:
        """Return the base's own name for a tensor whose name ends in another convention."""
        if name in self._own:
            return name
        return conventions.alias(name, self._own, self._model_type) or name

    def _parts(self, name: str) -> tuple[Part, ...]:
        for stacked in (False, True):
            found = address(name, stacked=stacked)
            if found and all((found.block, part) in self.places for part in found.parts):
                return found.parts
        return ()


def _places(base: Checkpoint) -> Places:
    singles: dict[tuple[str, Part], dict[int, TensorRef]] = defaultdict(dict)
    places: dict[tuple[str, Part], Held] = {}
    for name, ref in base.tensors.items():
        found = address(name, stacked=len(ref.shape) == 3)
        if found is not None and found.expert is not None:
            singles[found.block, found.part][found.expert] = ref
        elif found is not None:
            for part in found.parts:
                places[found.block, part] = Held(stack=ref, part=found.part)
    return places | {key: Held(held) for key, held in singles.items()}


# --- updates of the one as updates of the other


def placed(
    updates: Sequence[Update], known: KnownNames, base: Checkpoint, *, whole: bool,
    transposed: bool | None = None,
) -> tuple[Update, ...]:  # fmt: skip
    """Return the updates of experts as updates of the tensors that the base has.

    Args:
        updates: Under the checkpoint's names, those of experts under any.
        known: The base's names.
        base: The checkpoint.
        whole: Whether all experts are adapted or none, so that a gap means lost tensors.
        transposed: What the user says of stacked parameters whose slices are square.

    Raises:
        PlanError: An adapter has other experts than the base; how the base or the adapter's class
            orders what it fuses is not known; or the normal form cannot say what comes of it.
    """
    placing = _Placing(base, known.places, transposed)
    groups: dict[Address, set[int]] = defaultdict(set)
    result: list[Update] = []
    for update in updates:
        where = _address(update)
        if where is None or (
            update.orientation is None and update.index is None and update.target in base.tensors
        ):
            result.append(placing.parameter(update))
            continue
        alike = Address(where.block, where.part, None if where.expert is None else 0)
        groups[alike].add(_expert(update, where))
        result += placing.expert(update, where)
    for where, experts in groups.items():
        _check_experts(where, experts, known.places, whole or where.expert is None)
    return (*result, *placing.joined())


def _address(update: Update) -> Address | None:
    stacked = update.index is not None or update.orientation is not None
    return address(
        update.target, stacked=stacked or (update.value is not None and len(update.value.shape) > 2)
    )


def _expert(update: Update, where: Address) -> int:
    if where.expert is not None:
        return where.expert
    return update.index or 0  # PEFT packs a single expert as a matrix of its own


def _check_experts(where: Address, experts: set[int], places: Places, whole: bool) -> None:
    held = places.get((where.block, where.parts[0]))
    if held is None:
        return
    if max(experts) >= held.count or (whole and len(experts) != held.count):
        raise PlanError(
            f"{shown(where.block)}, {WORDS[where.part]}: the adapter has {len(experts)} experts, "
            f"the base {held.count}. Check that this is the base it was trained on, and that the "
            "rank in the adapter's config is that of its training."
        )


class _Placing:
    """Places updates one by one, and keeps back those that go in pairs."""

    def __init__(self, base: Checkpoint, places: Places, transposed: bool | None) -> None:
        self._base, self._places, self._transposed = base, places, transposed
        self._pairs: dict[tuple[str, int], dict[Part, Update]] = defaultdict(dict)

    # -- a parameter of a class, under the same name

    def parameter(self, update: Update) -> Update:
        """Return an update of a tensor that the base has as the class has it."""
        ref = self._base.tensors.get(update.target)
        if update.orientation is None or ref is None:
            return update
        update = replace(update, orientation=None) if len(ref.shape) != 3 else self._slice(update)
        return replace(update, layout="oi") if len(ref.shape) == 2 else update

    def _slice(self, update: Update) -> Update:
        """Return an update of one slice, its layout decided where the shape leaves it open."""
        ref = self._base.tensors[update.target]
        index = update.index or 0
        if ref.shape[1] != ref.shape[2]:
            return replace(update, index=index, orientation=None)  # the shape decides
        straight = self._straight(update, one=ref.shape[0] == 1)
        model = self._model_or_none()
        turned = model is not None and model.either and self._layout(ref) != model.layout
        layout: Layout = "oi" if straight != turned else "io"
        return replace(update, index=index, layout=layout, orientation=None)

    def _straight(self, update: Update, *, one: bool) -> bool:
        """Return whether ``B A`` lies over a square slice of the class's parameter as it is."""
        if self._transposed is not None:
            return not self._transposed
        if update.orientation == "straight" or one:
            return True  # PEFT adds a single expert as it is, whatever the class says
        if update.orientation == "transposed":
            return False
        model = self._model_or_none()
        if update.orientation == "by class" and model is not None:
            return not model.is_transposed
        why = (
            "the config does not say which PEFT wrote it" if update.orientation == "by version"
            else f"whether the class of '{shown(self._base.config.get('model_type'))}' says "
            "is_transposed is not known"
        )  # fmt: skip
        raise PlanError(
            f"{shown(update.target)}: a stack of square matrices, and {why}: PEFT before 0.19, and "
            "later ones for classes with is_transposed, add the transpose of B A, later ones B A "
            "itself. Pass --moe-transposed for the former, --no-moe-transposed for the latter."
        )

    # -- experts

    def expert(self, update: Update, where: Address) -> Iterator[Update]:
        """Yield the updates of the base's tensors that an update of experts is."""
        ref = self._base.tensors.get(update.target)
        if ref is not None and len(ref.shape) == 3:
            if update.orientation is not None:
                yield self._slice(update)
            else:
                yield update
            return
        held = {part: self._places.get((where.block, part)) for part in where.parts}
        if None in held.values():
            yield replace(update, orientation=None)  # "not in the base", says the plan
            return
        if update.kind not in ("lora", "dora", "magnitude"):
            raise PlanError(
                f"{shown(update.target)}: the adapter replaces whole experts, which this base "
                "stores in another way. Save the base as the adapter's class holds it, or merge "
                "with PEFT."
            )
        index = _expert(update, where)
        places = {part: place for part, place in held.items() if place is not None}
        update = replace(self._as_computed(update, places), orientation=None)
        if len(places) == 1:
            yield from self._put(update, next(iter(places.items())), index)
        elif (place := places["gate"]).stack is not None and place.part == "gate_up":
            yield self._into(update, place.stack, index)
        else:
            for part, place in places.items():
                yield from self._put(self._half(update, part), (part, place), index)

    def _as_computed(self, update: Update, places: Mapping[Part, Held]) -> Update:
        """Return an update of a class's parameter with B A as ``(out, in)``, as an expert's is."""
        if update.orientation is None or update.up is None or update.down is None:
            return update
        out, inner = self._size(places)
        given = (update.up.shape[0], update.down.shape[1])
        if out == inner:
            one = next(iter(places.values())).count == 1
            model = self._model(update.target)
            swapped = self._straight(update, one=one) != (model.layout == "oi")
        else:
            swapped = given == (inner, out)
        if not swapped:
            return update
        return replace(update, up=update.down.T, down=update.up.T)

    def _size(self, places: Mapping[Part, Held]) -> tuple[int, int]:
        """Return outputs and inputs of an expert's matrix, of gate and up together."""
        place = next(iter(places.values()))
        if place.stack is None:
            out, inner = next(iter(place.single.values())).shape
            return out * len(places), inner
        rows, columns = place.stack.shape[1:]
        layout = self._layout(place.stack)
        out, inner = (rows, columns) if layout == "oi" else (columns, rows)
        return out * len(places) // (2 if place.part == "gate_up" else 1), inner

    def _half(self, update: Update, part: Part) -> Update:
        """Return what an update of gate and up fused does to one of them."""
        assert update.up is not None, "Bug: only products are halved"
        rows = update.up.shape[0] // 2
        alternate = self._model(update.target).alternate
        position = 0 if part == "gate" else 1
        pick = Every(position, 2, rows) if alternate else Every(position * rows, 1, rows)
        return replace(update, up=update.up.with_rows(pick, rows))

    def _put(self, update: Update, at: tuple[Part, Held], index: int) -> Iterator[Update]:
        """Yield an update of one part of one expert, on the tensor that holds it."""
        part, place = at
        if place.stack is None:
            if index in place.single:  # else _check_experts() tells
                ref = place.single[index]
                yield replace(update, target=ref.name, index=None, layout="oi")
        elif place.part == part:
            yield self._into(update, place.stack, index)
        else:
            yield from self._fused(update, part, place.stack, index)

    def _into(self, update: Update, stack: TensorRef, index: int) -> Update:
        return replace(update, target=stack.name, index=index, layout=self._layout(stack))

    def _fused(self, update: Update, part: Part, stack: TensorRef, index: int) -> Iterator[Update]:
        """Yield an update of gate or up alone on the tensor that holds both."""
        rows = _rows(update)
        layout, alternate = self._layout(stack), self._model(stack.name).alternate
        position = 0 if part == "gate" else 1
        update = replace(update, target=stack.name, index=index, layout=layout)
        if layout == "oi" and not alternate:
            yield replace(update, rows=(position * rows, (position + 1) * rows))
        elif update.magnitude is not None or update.up is None:
            self._pairs[stack.name, index][part] = update
        else:
            step = Spread(2 * rows, position if alternate else position * rows, 1 + alternate)
            yield replace(update, up=update.up.with_rows(step, step.total))

    def joined(self) -> Iterator[Update]:
        """Yield the updates that were kept back, those of gate and up as one.

        Raises:
            PlanError: One of the two is missing: the other's rows would have to keep their own
                norms, which no update says.
        """
        for (name, _), pair in self._pairs.items():
            gate, up = pair.get("gate"), pair.get("up")
            if gate is None or up is None or not _alike(gate, up):
                raise PlanError(
                    f"{shown(name)}: DoRA on one of gate and up, or on both in different ways, of "
                    "experts whose rows this base mixes. Save the base with a tensor per expert."
                )
            yield self._both(gate, up, self._model(name).alternate)

    def _both(self, gate: Update, up: Update, alternate: bool) -> Update:
        def joined(a: Operand | None, b: Operand | None, how: str) -> Operand:
            assert a is not None, "Bug: _alike() has looked"
            assert b is not None, "Bug: _alike() has looked"
            return Joined(a, b, how, alternate).operand

        return replace(
            gate,
            source_keys=(*gate.source_keys, *up.source_keys),
            down=joined(gate.down, up.down, "A"),
            up=joined(gate.up, up.up, "B"),
            magnitude=joined(gate.magnitude, up.magnitude, "m"),
        )

    # -- what the model is

    def _layout(self, stack: TensorRef) -> Layout:
        """Return whether slices of a stack are ``(out, in)`` or ``(in, out)``."""
        if ".switch_mlp." in f".{stack.name}":
            return "oi"  # MLX's own
        model = self._model(stack.name)
        return self._layout_by_size(stack) if model.either else model.layout

    def _layout_by_size(self, stack: TensorRef) -> Layout:
        """Return how a checkpoint holds all of its stacks, by one of them that is not square."""
        hidden = self._base.setting("hidden_size")
        for (_, part), held in self._places.items():
            if held.stack is None or hidden not in held.stack.shape[1:]:
                continue
            rows, columns = held.stack.shape[1:]
            if rows != columns:
                return "oi" if (rows == hidden) == (part == "down") else "io"
        raise PlanError(
            f"{shown(stack.name)}: checkpoints of this model hold experts as (out, in) or as "
            "(in, out), and neither shapes nor hidden_size in config.json tell which this is. "
            "Merge with PEFT."
        )

    def _model_or_none(self) -> ExpertModel | None:
        found = (EXPERT_MODELS[t] for t in self._base.model_types if t in EXPERT_MODELS)
        return next(found, None)

    def _model(self, name: str) -> ExpertModel:
        if (model := self._model_or_none()) is not None:
            return model
        raise PlanError(
            f"{shown(name)}: holds all experts in an order that depends on the model, and "
            f"'{shown(self._base.config.get('model_type'))}' is not among those known "
            f"({', '.join(sorted(EXPERT_MODELS))}). "
            "Save the base with a tensor per expert, or merge with the trainer's own tool."
        )


def _rows(update: Update) -> int:
    if update.up is not None:
        return update.up.shape[0]
    assert update.magnitude is not None, "Bug: an update without rows"
    return update.magnitude.shape[0]


def _alike(gate: Update, up: Update) -> bool:
    """Return whether two updates of one matrix can be one of both."""
    same = (gate.kind, gate.axis, gate.eps, gate.scaling, gate.magnitude_is_factor) == (
        up.kind, up.axis, up.eps, up.scaling, up.magnitude_is_factor
    )  # fmt: skip
    return same and gate.axis == "out" and gate.kind == "dora" and None not in (gate.up, up.up)
