"""Which updates of several adapters go together on one tensor, rule by rule."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dora_export import several
from dora_export.errors import PlanError
from dora_export.tensors import BF16, F16, F32, HeldBytes, Operand, TensorRef
from dora_export.update import Update


def ref(values, name="t", dtype=F32):
    """A stored tensor; of 16 bits, whatever they mean."""
    data = np.asarray(values, np.float32 if dtype is F32 else np.uint16)
    held = HeldBytes(Path("adapter"), data.view(np.uint8).reshape(-1))
    return TensorRef(name, dtype, data.shape, held)


def copy_of(values, adapter, weight=1.0, dtype=F32, **fields):
    key = f"{adapter}:t"
    return Update("x.weight", "replace", (key,), value=ref(values, dtype=dtype), adapter=adapter,
                  weight=weight, **fields)  # fmt: skip


A, B, M = (Operand.plain(ref(np.ones(s))) for s in ((2, 3), (4, 2), (4,)))
LORA = Update("x.weight", "lora", ("a",), down=A, up=B)
DORA = Update("x.weight", "dora", ("a",), down=A, up=B, magnitude=M)
FACTOR = replace(DORA, magnitude_is_factor=True)
COPY = Update("x.weight", "replace", ("a",), value=ref(np.ones((4, 3))))


def tokens(*rows):
    return Update("x.weight", "rows", ("a",), value=ref(np.ones((len(rows), 3))), row_indices=rows)


ORDER = "trained tokens and LoRA on one tensor have no defined order"
DIVIDED = "magnitudes that were divided by the norm beforehand do not mix with other changes"
PART = "one changes all of it, the other a part"
PAIRS = [
    (LORA, LORA, None), (LORA, DORA, None), (DORA, DORA, None),
    (COPY, COPY, "each brings its own whole copy of it"),
    (replace(COPY, index=0), replace(COPY, index=1), None),
    (COPY, LORA, "one replaces it, the other changes it"),
    (COPY, tokens(1), "one replaces it, the other changes it"),
    (tokens(1), tokens(2), None), (tokens(1, 2), tokens(2, 3), "each trained its own rows [2]"),
    (tokens(*range(9)), tokens(*range(9)), "each trained its own rows [0, 1, 2, 3, 4]"),
    (tokens(1), LORA, ORDER), (tokens(1), DORA, ORDER),
    (FACTOR, LORA, DIVIDED), (FACTOR, FACTOR, DIVIDED),
    (replace(FACTOR, rows=(0, 2)), replace(LORA, rows=(2, 4)), None),
    (replace(LORA, index=0), replace(DORA, index=1), None),
    (replace(LORA, index=0), replace(DORA, index=0), None),
    (replace(LORA, index=0), DORA, PART),
    (replace(LORA, rows=(0, 2)), replace(LORA, rows=(2, 4)), None),
    (replace(LORA, rows=(0, 2)), replace(LORA, rows=(0, 2)), None),
    (replace(LORA, rows=(0, 2)), replace(LORA, rows=(1, 4)), PART),
    (replace(LORA, rows=(0, 2)), LORA, PART),
]  # fmt: skip


@pytest.mark.parametrize(("one", "other", "why"), PAIRS)
def test_two_adapters_on_one_tensor(one, other, why):
    for first, second in ((one, other), (other, one)):
        group = [first, replace(second, adapter=1)]
        said = [] if why is None else [f"x.weight: {why} (adapters 1 and 2)"]
        assert list(several.conflicts("x.weight", group)) == said
        assert not list(several.conflicts("x.weight", [first, second]))  # of one adapter


VALUES = np.arange(12.0).reshape(4, 3)


def test_equal_copies_are_one_with_the_tensors_of_both():
    (found,) = several.once([copy_of(VALUES, 0, 0.7), copy_of(VALUES, 1, 0.3)])
    assert found == replace(copy_of(VALUES, 0), source_keys=("0:t", "1:t"), value=found.value)
    assert len(several.once([copy_of(VALUES, i) for i in range(3)])) == 1


def changed(at):
    values = VALUES.copy()
    values.flat[at] = 99
    return values


@pytest.mark.parametrize(
    "other",
    [copy_of(VALUES, 0), copy_of(changed(0), 1), copy_of(changed(-1), 1),
     copy_of(VALUES.reshape(3, 4), 1), copy_of(VALUES, 1, dtype=F16), copy_of(VALUES, 1, index=0),
     replace(copy_of(VALUES, 1), target="y.weight"), replace(copy_of(VALUES, 1), kind="add"),
     replace(copy_of(VALUES, 1), value=None)],
    ids=["one adapter's", "first value", "last value", "shape", "type", "slice", "tensor", "kind",
         "no value"],
)  # fmt: skip
def test_what_is_no_equal_copy_stays_as_it_is(other, monkeypatch):
    monkeypatch.setattr(several, "COMPARED_ELEMENTS", 5)  # the last value is in the third block
    first = copy_of(VALUES, 0, dtype=BF16 if other.value and other.value.dtype is F16 else F32)
    assert len(several.once([first, other])) == 2


def test_weights_that_leave_open_how_much_of_a_copy_are_refused():
    with pytest.raises(PlanError, match=r"x\.weight: 2 adapters .* at weights 1, 0\.5,"):
        several.once([copy_of(VALUES, 0), copy_of(VALUES, 1, 0.5)])


@pytest.mark.parametrize("weight", [float("nan"), float("inf")])
def test_weights_are_finite(weight):
    with pytest.raises(PlanError, match="expected finite numbers"):
        several.check_weights([1.0, weight], 2)


def test_weights_of_what_is_added_are_scalings_and_of_all_else_are_not():
    added = replace(LORA, weight=0.5, scaling=3.0)
    assert [(u.scaling, u.weight) for u in several.weighted([added])] == [(1.5, 1.0)]
    both = [added, replace(DORA, weight=0.5)]
    assert several.weighted(both) == both
