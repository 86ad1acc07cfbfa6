"""What the forward tier makes of its numbers: what is allowed, what is said, what is left open."""

import math
from dataclasses import replace

import numpy as np
import pytest

from dora_export.verification.forward import _summary as summary
from dora_export.verification.forward import figures, judge
from dora_export.verification.measured import Layer, Measured, Opinion
from dora_export.verification.parity import (
    Choices,
    Compared,
    Distance,
    added,
    choices,
    compare,
    distance,
    misfits,
    peak_of,
    tolerance,
)

UNIT = 2.0**-8


def far(largest, rms=None, scale=10.0, count=100):
    """A distance of values whose root mean square is 1."""
    rms = largest / 4 if rms is None else rms
    return Distance(count, largest, 0.0, rms * rms * count, scale, float(count))


NOISE = far(1.0)  # so 2 and 0.5 are allowed
BROKEN = Distance(100, math.inf, 0.0, math.inf, 10.0, 100.0)


def layer(name="a.weight", error=None, noise=NOISE, effect=None):
    return Layer(name, UNIT, error or far(0.1), noise, effect or far(50.0))


def measured(**changes):
    found = Measured(
        "Model", "float32", "bfloat16", UNIT, [], {}, [], [],
        layers=[layer()],
        error={"logits": Compared(far(0.2))},
        noise={"logits": Compared(NOISE)},
        effect={"logits": Compared(far(60.0))},
        text=Choices(64, 64),
    )  # fmt: skip
    return replace(found, **changes)


def codes(found):
    return [(f.code, f.where) for f in judge(found)]


def said(found):
    (finding,) = judge(found)
    return finding.what


def test_what_is_within_the_noise_is_right():
    assert codes(measured()) == []
    assert summary(measured()) == (
        "Model: 1 layer, worst at 5% of what the noise of bfloat16 allows; logits at 10%; "
        "64 of 64 greedy tokens equal"
    )
    edge = measured(layers=[layer(error=far(2.0))], error={"logits": Compared(far(2.0))})
    assert codes(edge) == []


@pytest.mark.parametrize("error", [far(2.001, 0.1), far(0.1, 0.501), BROKEN],
                         ids=["largest", "rms", "infinite"])  # fmt: skip
def test_twice_the_noise_is_too_much_in_either_measure(error):
    found = measured(layers=[layer("b", error=far(0.1)), layer("c", error=error)])
    assert codes(found) == [("layer-differs", "c")]
    assert said(found).endswith(f"rms {error.rms:.3g} (allowed 0.5)")
    found = measured(error={"logits": Compared(error)})
    assert codes(found) == [("outputs-differ", "output 'logits'")]
    assert "(allowed 2), rms" in said(found)


def test_worst_layers_come_first_in_findings_and_figures():
    errors = {"b": 3.0, "c": 9.0, "a": 6.0}
    found = measured(layers=[layer(n, error=far(e)) for n, e in errors.items()])
    assert codes(found) == [("layer-differs", n) for n in "cab"]
    assert [one["name"] for one in figures(found)["layers"]] == ["c", "a", "b"]
    assert [one["excess"] for one in figures(found)["layers"]] == [4.5, 3.0, 1.5]
    assert "3 layers, worst at 450% of what" in summary(found)


def test_each_output_is_held_against_its_own_noise():
    two = {"logits": Compared(far(1.5)), "state": Compared(far(1.5))}
    found = measured(error=two, noise={"logits": Compared(NOISE), "state": Compared(far(0.5))})
    assert codes(found) == [("outputs-differ", "output 'state'")]
    assert figures(found)["outputs"]["state"]["excess"] == 1.5
    assert figures(found)["outputs"]["logits"]["excess"] == 0.75


def test_numbers_that_overflow_unmerged_leave_it_unchecked():
    found = measured(layers=[layer("b", noise=BROKEN)], noise={"logits": Compared(BROKEN)})
    unchecked = [(f.code, f.where) for f in judge(found) if f.severity == "unchecked"]
    assert unchecked == [("forward-unsupported", "b"), ("forward-unsupported", "output 'logits'")]
    assert not [f for f in judge(found) if f.severity == "wrong"]


def test_outputs_of_other_shapes_are_wrong():
    found = measured(misfits=["output 'x' is missing"], layers=[], error={}, text=None)
    assert codes(found) == [("outputs-differ", "Model")]
    assert summary(found) == "Model: output 'x' is missing"


def test_layers_that_no_input_reached_are_named():
    (finding,) = judge(measured(idle=["b"]))
    assert (finding.code, finding.where, finding.severity) == ("layer-idle", "b", "unchecked")


def test_an_effect_below_the_noise_is_told_of_layers_and_outputs():
    found = measured(layers=[layer("a"), layer("b", effect=far(2.0)), layer("c", effect=far(1.0))],
                     effect={"logits": Compared(far(2.0))})  # fmt: skip
    assert codes(found) == [("effect-unseen", "output 'logits'"), ("effect-unseen", "b")]
    whats = [f.what for f in judge(found)]
    assert whats[0].startswith("without adapter: max |difference| 2 of 10")
    assert whats[1].startswith("2 of 3 changed layers")


@pytest.mark.parametrize(("parting", "right"), [(4.0, True), (4.01, False)])
def test_greedy_tokens_may_part_where_two_logits_are_as_good_as_equal(parting, right):
    found = measured(text=Choices(64, 62, clearest_parting=parting))
    assert codes(found) == ([] if right else [("text-differs", "greedy text")])
    words = "62 of 64 greedy tokens equal"
    assert summary(found).endswith(words + (", the rest within the noise" if right else ""))
    if not right:
        assert said(found) == (
            "2 of 64 tokens differ; the reference prefers its own by up to 4.01 (allowed 4)"
        )
    assert figures(found)["text"] == {"tokens": 64, "equal": 62}


def test_another_opinion_by_peft_is_a_warning():
    found = measured(opinion=Opinion({"logits": Compared(far(2.1))}))
    (finding,) = judge(found)
    assert (finding.code, finding.severity) == ("peft-differs", "warning")
    assert codes(measured(opinion=Opinion({"logits": Compared(far(2.0))}))) == []


# --- the measure


def test_a_distance_is_that_of_all_values(monkeypatch):
    monkeypatch.setattr("dora_export.verification.parity.CHUNK_ELEMENTS", 3)
    expected = np.array([1.0, -4.0, 0.0, 2.0, 3.0, np.inf, -np.inf])
    found = np.array([1.0, -4.5, 0.0, 2.0, 4.0, np.inf, -np.inf])
    result = distance(found, expected)
    assert (result.count, result.largest, result.scale) == (7, 1.0, 4.0)
    assert (result.total, result.squares, result.energy) == (1.5, 1.25, 30.0)
    assert result.mean == pytest.approx(1.5 / 7)
    assert result.rms == pytest.approx(math.sqrt(1.25 / 7))
    assert result.typical == pytest.approx(math.sqrt(30 / 7))
    assert result.finite
    assert result.to_dict() == {"max": 1.0, "mean": result.mean, "rms": result.rms, "scale": 4.0}
    for wrong in (np.nan, -np.inf):
        other = found.copy()
        other[5] = wrong
        assert not distance(other, expected).finite
        assert distance(other, expected).largest == np.inf


def test_rounding_to_the_storage_type_is_always_allowed():
    lucky = Distance(100, 0.0, 0.0, 0.0, 10.0, 400.0)  # values of 2, none of them rounded
    found = tolerance(lucky, UNIT)
    assert found.largest == pytest.approx(2 * 10 * UNIT)
    assert found.rms == pytest.approx(2 * 2 * UNIT / math.sqrt(3))
    assert tolerance(far(1.0, 0.1), UNIT, peak=20.0).largest == pytest.approx(4.0)
    assert tolerance(far(1.0, 0.1), UNIT).excess(far(1.0, 0.1)) == 0.5
    nothing = tolerance(Distance(), UNIT)
    assert nothing.excess(Distance()) == 0.0
    assert nothing.excess(far(1e-9)) == math.inf


def test_the_peak_of_noises_is_that_of_the_finite_ones():
    noises = [far(1.0, 0.5), far(1.0, 0.1), far(math.inf, 0.5), BROKEN, Distance()]
    assert peak_of(noises) == pytest.approx(10.0)
    assert peak_of([]) == 0.0


def test_choices_are_those_of_the_distributions(monkeypatch):
    monkeypatch.setattr("dora_export.verification.parity.CHUNK_ELEMENTS", 6)
    expected = np.log(np.array([[0.7, 0.2, 0.1], [0.4, 0.5, 0.1], [0.1, 0.1, 0.8]]))
    found = np.log(np.array([[0.7, 0.2, 0.1], [0.7, 0.2, 0.1], [0.1, 0.2, 0.7]])) + 3.0
    result = choices(found, expected)
    p, q = np.exp(expected), np.exp(found - 3.0)
    divergence = (p * np.log(p / q)).sum(axis=1)
    assert (result.positions, result.agree) == (3, 2)
    assert result.divergence == pytest.approx(divergence.sum())
    assert result.worst_divergence == pytest.approx(divergence.max())
    assert result.clearest_parting == pytest.approx(math.log(0.5 / 0.4))
    told = result.to_dict()
    assert told["top1_agreement"] == pytest.approx(2 / 3)
    assert told["kl_mean"] == pytest.approx(divergence.sum() / 3)
    broken = found.copy()
    broken[0, 0] = np.nan
    assert choices(broken, expected).worst_divergence == math.inf


def test_padding_is_left_out_and_classes_are_where_they_are():
    expected, mask = np.zeros((1, 3, 2)), np.array([[1, 1, 0]])
    found = expected.copy()
    found[0, 2] = 9.0
    pair = (
        {"logits": found, "pooled": np.ones((1, 2))},
        {"logits": expected, "pooled": np.ones((1, 2))},
    )
    result = compare(*pair, mask)
    assert (result["logits"].distance.largest, result["logits"].distance.count) == (0.0, 4)
    assert result["logits"].choices.positions == 2
    assert result["pooled"].choices is None
    assert compare(*pair)["logits"].distance.largest == 9.0
    maps = np.random.default_rng(0).standard_normal((1, 5, 2, 3))  # (batch, classes, height, width)
    assert compare({"logits": maps}, {"logits": maps})["logits"].choices.positions == 6


def test_runs_are_added_by_name():
    one = {"logits": Compared(far(1.0), Choices(4, 3, 0.5, 0.25, 0.1)), "state": Compared(far(1.0))}
    two = {"logits": Compared(far(3.0), Choices(6, 6, 0.5, 0.5, 0.0)), "cache": Compared(NOISE)}
    found = added([one, two])
    assert list(found) == ["logits", "state", "cache"]
    assert (found["logits"].distance.count, found["logits"].distance.largest) == (200, 3.0)
    assert found["logits"].choices == Choices(10, 9, 1.0, 0.5, 0.1)
    assert found["state"] == one["state"]
    either = Compared(NOISE) + one["logits"]
    assert either.choices == one["logits"].choices == (one["logits"] + Compared(NOISE)).choices


def test_misfits_are_all_told_sorted():
    names = "hgfedcba"
    expected = {n: np.ones(2) for n in names} | {f"shape {n}": np.ones(3) for n in names}
    found = {f"new {n}": np.ones(1) for n in names} | {f"shape {n}": np.ones(2) for n in names}
    assert misfits(found, expected) == [
        *(f"output '{n}' is missing" for n in sorted(names)),
        *(f"output 'new {n}' is not the reference's" for n in sorted(names)),
        *(f"output 'shape {n}' has shape (2,), expected (3,)" for n in sorted(names)),
    ]
