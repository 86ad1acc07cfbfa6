"""The oracle tier: every planted mistake gets its name, right merges of any tool pass.

What is planted is computed here with numpy from the formula the mistake stands for.
"""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import dora_export
from dora_export import api
from dora_export.adapters import ReadOptions
from dora_export.checkpoints import open_checkpoint
from dora_export.plan import Settings
from dora_export.verification.oracle import SAMPLES, check_oracle
from tests import oracle, peft_models
from tests.pairs import (
    ALPHA,
    DORA_MISTAKES,
    DTYPES,
    EXPERT,
    LINEARS,
    LORA_MISTAKES,
    SCALING,
    SCALINGS,
    O,
    Pair,
    Q,
    other_axis,
    with_scaling,
)
from tests.small import RANK, edit_tensors
from tests.test_merged_dora import plain, save, with_dora


def run(base, adapter, merged, level="full", options=None, settings=None):
    plan, _ = api._plan(base, adapter, options or ReadOptions(), settings or Settings())
    _, tensors, findings = check_oracle(plan, open_checkpoint(merged).tensors, level)
    assert {t.name for t in tensors} == {s.name for s in plan.steps if s.changes}
    return {t.name: t for t in tensors}, findings


def check(pair, level="full"):
    return run(pair.folder / "base", pair.folder / "adapter", pair.merged, level)


def test_where_nothing_is_there_to_compare_nothing_is_called_right(tmp_path):
    pair = Pair(tmp_path, torch.float32)
    plan, _ = api._plan(tmp_path / "base", tmp_path / "adapter", ReadOptions(), Settings())
    tier, tensors, _ = check_oracle(plan, {}, "full")
    assert (tier.ran, tensors) == (False, ())
    assert tier.summary == f"none of {len(LINEARS)} changed tensors is there to compare"
    one = {f"{O}.weight": open_checkpoint(pair.merged).tensors[f"{O}.weight"]}
    tier, tensors, _ = check_oracle(plan, one, "full")
    assert tier.ran
    assert tier.summary.startswith("1 changed tensor, every element: 1 exact")


def found(pair, name, level="full"):
    """The one finding on a layer, after checking that all other layers are right."""
    tensors, findings = check(pair, level)
    wrong = {n for n, t in tensors.items() if t.status == "wrong"}
    assert wrong == {f"{name}.weight"}
    (finding,) = findings
    assert (finding.where, finding.severity) == (f"{name}.weight", "wrong")
    assert tensors[f"{name}.weight"].diagnosis == finding.code
    return finding


@pytest.mark.parametrize("level", ["fast", "full"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dora", [True, False])
def test_right_merge_is_exact(tmp_path, dtype, dora, level):
    pair = Pair(tmp_path, dtype, dora)
    tensors, findings = check(pair, level)
    assert findings == ()
    assert {t.status for t in tensors.values()} == {"exact"}
    for name, (out, inner) in LINEARS.items():
        result = tensors[f"{name}.weight"]
        W, exact = pair.terms(name)[0], pair.right(name)
        rows = out if level == "full" else min(out, SAMPLES)
        assert (result.elements, result.shape) == (rows * inner, (out, inner))
        if level == "full":
            got = load_file(tmp_path / "merged" / "model.safetensors")[f"{name}.weight"]
            assert result.max_ulp == pytest.approx(oracle.ulps(got, exact), rel=1e-6)
            gap = np.linalg.norm(oracle.float64(got) - exact) / np.linalg.norm(exact)
            assert result.relative_error == pytest.approx(gap, rel=1e-6)
            size = np.linalg.norm(exact - W) / np.linalg.norm(W)
            assert result.update_size == pytest.approx(size, rel=1e-9)
            if dora:
                ratio = pair.terms(name)[3] / np.linalg.norm(W, axis=1)
                expected = np.quantile(ratio, (0, 0.25, 0.5, 0.75, 1))
                assert result.magnitude_ratio == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("level", ["fast", "full"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("code", DORA_MISTAKES)
def test_wrong_dora_formula_is_named(tmp_path, code, dtype, level):
    pair = Pair(tmp_path, dtype)
    pair.plant(**{f"{Q}.weight": DORA_MISTAKES[code](*pair.terms(Q))})
    assert found(pair, Q, level).code == code


@pytest.mark.parametrize("level", ["fast", "full"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("code", LORA_MISTAKES)
def test_wrong_lora_formula_is_named(tmp_path, code, dtype, level):
    pair = Pair(tmp_path, dtype, dora=False)
    W, A, B, _ = pair.terms(Q)
    pair.plant(**{f"{Q}.weight": LORA_MISTAKES[code](W, A, B)})
    assert found(pair, Q, level).code == code


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("words", SCALINGS)
def test_other_scaling_is_named_with_its_rule(tmp_path, words, dtype):
    pair = Pair(tmp_path, dtype)
    pair.plant(**{f"{Q}.weight": with_scaling(SCALINGS[words])(*pair.terms(Q))})
    finding = found(pair, Q)
    assert finding.code == "scaling-other"
    assert words in finding.what


def test_rank_stabilised_scaling_left_out_is_named(tmp_path):
    pair = Pair(tmp_path, use_rslora=True)
    pair.plant(**{f"{Q}.weight": with_scaling(ALPHA / RANK)(*pair.terms(Q))})
    finding = found(pair, Q)
    assert (finding.code, "alpha/r for alpha/sqrt(r)" in finding.what) == ("scaling-other", True)


@pytest.mark.parametrize("level", ["fast", "full"])
def test_norm_over_the_other_axis_of_a_square_layer_is_named(tmp_path, level):
    pair = Pair(tmp_path)
    pair.plant(**{f"{O}.weight": other_axis(*pair.terms(O))})
    assert found(pair, O, level).code == "norm-other-axis"


@pytest.mark.parametrize("level", ["fast", "full"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_magnitudes_of_another_layer_are_named_with_the_layer(tmp_path, dtype, level):
    pair = Pair(tmp_path, dtype)
    W, A, B, _ = pair.terms(Q)
    other = Q.replace("1", "2")
    pair.plant(**{f"{Q}.weight": oracle.dora(W, A, B, pair.terms(other)[3], SCALING)})
    finding = found(pair, Q, level)
    assert finding.code == "magnitude-of-another"
    assert other in finding.what


def test_magnitudes_of_no_layer_are_told_from_wrong_values(tmp_path):
    pair = Pair(tmp_path)
    W, A, B, m = pair.terms(Q)
    m = m * np.random.default_rng(0).uniform(0.99, 1.01, m.shape)
    pair.plant(**{f"{Q}.weight": oracle.dora(W, A, B, m, SCALING)})
    assert found(pair, Q).code == "magnitude-other"


@pytest.mark.parametrize("level", ["fast", "full"])
@pytest.mark.parametrize("dora", [True, False])
def test_swapped_experts_are_named(tmp_path, dora, level):
    pair = Pair(tmp_path, torch.bfloat16, dora)
    other = EXPERT.replace("experts.2", "experts.3")
    pair.plant(**{f"{EXPERT}.weight": pair.right(other), f"{other}.weight": pair.right(EXPERT)})
    _, findings = check(pair, level)
    assert [(f.code, f.where) for f in findings] == [
        ("tensor-of-another", f"{EXPERT}.weight"),
        ("tensor-of-another", f"{other}.weight"),
    ]
    assert other in findings[0].what


@pytest.mark.parametrize("dora", [True, False])
def test_update_in_another_order_of_experts_is_named(tmp_path, dora):
    pair = Pair(tmp_path, torch.bfloat16, dora)
    other = EXPERT.replace("experts.2", "experts.0")
    W, (_, A, B, m) = pair.terms(EXPERT)[0], pair.terms(other)
    mixed = oracle.dora(W, A, B, m, SCALING) if dora else oracle.lora(W, A, B, SCALING)
    pair.plant(**{f"{EXPERT}.weight": mixed})
    finding = found(pair, EXPERT)
    assert (finding.code, other in finding.what) == ("update-of-another", True)


@pytest.mark.parametrize("level", ["fast", "full"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_in_another_order_are_named(tmp_path, dtype, level):
    pair = Pair(tmp_path, dtype)
    halves = pair.right(Q).reshape(2, -1, 48).swapaxes(0, 1).reshape(-1, 48)  # rotary order
    pair.plant(**{f"{Q}.weight": halves})
    assert found(pair, Q, level).code == "rows-permuted"


@pytest.mark.parametrize("level", ["fast", "full"])
def test_transposed_square_tensor_is_named(tmp_path, level):
    pair = Pair(tmp_path)
    pair.plant(**{f"{O}.weight": pair.right(O).T.copy()})
    assert found(pair, O, level).code == "transposed-values"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dora", [True, False])
def test_one_row_of_b_set_to_zero_is_found(tmp_path, dora, dtype):
    pair = Pair(tmp_path, dtype, dora)
    W, A, B, m = pair.terms(Q)
    B = B.copy()
    B[13] = 0
    wrong = oracle.dora(W, A, B, m, SCALING) if dora else oracle.lora(W, A, B, SCALING)
    pair.plant(**{f"{Q}.weight": wrong})
    finding = found(pair, Q)
    assert finding.code == "rows-wrong"
    assert "1 of 80 rows (13)" in finding.what
    assert ("factors-ignored" if dora else "not-applied") in finding.what


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_value_that_is_not_finite_is_found(tmp_path, dtype, value):
    pair = Pair(tmp_path, dtype)
    wrong = pair.right(Q).copy()
    wrong[4, 5] = value
    pair.plant(**{f"{Q}.weight": wrong})
    finding = found(pair, Q)
    assert finding.code == "not-finite"
    assert finding.what.startswith("1 element")


@pytest.mark.parametrize("dtype", DTYPES)
def test_single_wrong_element_is_found(tmp_path, dtype):
    pair = Pair(tmp_path, dtype)
    wrong = pair.right(Q).copy()
    wrong[4, 5] *= 1.3
    pair.plant(**{f"{Q}.weight": wrong})
    finding = found(pair, Q)
    assert finding.code == "rows-wrong"
    assert "1 of 80 rows (4)" in finding.what


def test_noise_fits_no_mistake(tmp_path):
    pair = Pair(tmp_path)
    noise = 1 + 0.05 * np.random.default_rng(0).standard_normal((80, 48))
    pair.plant(**{f"{Q}.weight": pair.right(Q) * noise})
    finding = found(pair, Q)
    assert finding.code == "wrong-values"
    assert "off by 0.046" in finding.what


def test_merge_computed_in_bfloat16_but_stored_in_float32_is_coarse(tmp_path):
    pair = Pair(tmp_path)
    W, A, B, m = (torch.from_numpy(t).bfloat16() for t in pair.terms(Q))
    V = W + SCALING * (B @ A)
    pair.plant(**{f"{Q}.weight": (V * (m / V.norm(dim=1))[:, None]).float().numpy()})
    tensors, (finding,) = check(pair)
    result = tensors[f"{Q}.weight"]
    assert (finding.code, finding.severity) == ("coarse-rounding", "warning")
    assert (result.status, result.arithmetic) == ("rounded", "BF16")
    assert result.error_ratio > 1000


def test_quantised_tensor_is_unchecked(tmp_path):
    pair = Pair(tmp_path)

    def change(tensors):
        tensors[f"{Q}.weight"] = tensors[f"{Q}.weight"].to(torch.float8_e4m3fn)

    edit_tensors(tmp_path / "merged" / "model.safetensors", change)
    tensors, (finding,) = check(pair)
    assert (finding.code, finding.severity) == ("quantised", "unchecked")
    assert tensors[f"{Q}.weight"].status == "unchecked"


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("use_dora", [True, False])
def test_merge_by_peft_is_right_with_its_own_rounding(tmp_path, dtype, adapter_dtype, use_dora):
    config = peft_models.peft.LoraConfig(
        r=4, lora_alpha=10, use_dora=use_dora, target_modules=["wide", "square", "table", "conv2"]
    )
    made = peft_models.make(tmp_path, peft_models.Zoo(), config, dtype, adapter_dtype)
    merged = made.model.merge_and_unload()
    state = {n: t.detach().contiguous() for n, t in merged.state_dict().items()}
    save_file(state, tmp_path / "theirs.safetensors")
    tensors, findings = run(made.base, made.adapter, tmp_path / "theirs.safetensors")
    # PEFT's arithmetic is the adapter's, which may be coarser than what it stores
    coarse = {"coarse-rounding"} if (dtype, adapter_dtype) == (torch.float32, torch.bfloat16) else {
        "rounded"}  # fmt: skip
    assert {f.code for f in findings} <= coarse
    assert {t.status for t in tensors.values()} <= {"exact", "rounded"}
    if use_dora and adapter_dtype is dtype:
        wide = tensors["wide.weight"]
        assert (wide.status, wide.arithmetic) == ("rounded", {"float32": "F32", "bfloat16": "BF16"}[
            str(dtype).removeprefix("torch.")])  # fmt: skip
        assert wide.error_ratio > 1.2
    dora_export.merge(made.base, made.adapter, tmp_path / "ours", verify="none")
    tensors, findings = run(made.base, made.adapter, tmp_path / "ours")
    assert findings == ()
    assert {t.status for t in tensors.values()} == {"exact"}


@pytest.mark.parametrize("level", ["fast", "full"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_down_columns_are_checked_too(tmp_path, dtype, level):
    state = {n: t.to(dtype) for n, t in with_dora(plain(square=True)).state_dict().items()}
    save(state, tmp_path / "state.safetensors")
    options = ReadOptions(alpha=4.0)
    dora_export.merge(tmp_path / "state.safetensors", None, tmp_path / "out", alpha=4.0,
                      verify="none")  # fmt: skip
    files = (tmp_path / "state.safetensors", None, tmp_path / "out", level, options)
    tensors, findings = run(*files)
    assert findings == ()
    assert {t.status for t in tensors.values()} == {"exact"}
    weights = next((tmp_path / "out").glob("*.safetensors"))
    edit_tensors(weights, lambda ts: {n: t * 1.25 if n in tensors else t for n, t in ts.items()})
    tensors, findings = run(*files)
    assert {t.status for t in tensors.values()} == {"wrong"}
    assert {f.code for f in findings} == {"magnitude-other"}
