"""NVlabs/DoRA adapters, and TensorRT-LLM's magnitudes divided by the norms.

The forward is that of github.com/NVlabs/DoRA, commonsense_reasoning/peft/src/peft/tuners/dora.py,
class Linear, written from its definition (the fork does not install beside today's libraries); the
division is that of github.com/NVIDIA/TensorRT-LLM, examples/dora/normalize_weights.py.
"""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dora_export import load_adapter
from dora_export.errors import AdapterError
from tests import oracle, small
from tests.trainers import RELATIVE, distance, inspected, merged, refused

R, ALPHA = 3, 7
SHAPES = {"model.layers.0.q_proj": (16, 16), "model.layers.0.up_proj": (24, 16),
          "model.layers.0.down_proj": (16, 24)}  # fmt: skip
ONLY = "model.layers.0.v_proj"
PREFIX = "base_model.model."


def forward(x, W, A, B, m, bias):
    """Activations as the trained layer computes them, float64."""
    N = W + (B @ A) * (ALPHA / R)
    scale = m.ravel() / np.linalg.norm(N, axis=1)
    return x @ W.T + (scale - 1) * (x @ W.T) + bias + scale * (x @ A.T @ B.T) * (ALPHA / R)


def forward_of_magnitudes(x, W, m, bias):
    """The same for a module of Wdecompose_target_modules."""
    scale = m.ravel() / np.linalg.norm(W, axis=1)
    return x @ W.T + (scale - 1) * (x @ W.T) + bias


def write(folder, dtype=torch.float32, name="", **config):
    """A base and a trained adapter with a magnitude-only module."""
    torch.manual_seed(5)
    base, adapter = {}, {}
    dot = f".{name}" if name else ""
    for layer, shape in {**SHAPES, ONLY: (8, 16)}.items():
        W = (torch.randn(shape) * 0.2).to(dtype)
        base[f"{layer}.weight"] = W
        base[f"{layer}.bias"] = torch.randn(shape[0]).to(dtype)
        key = PREFIX + layer
        if layer != ONLY:
            adapter[f"{key}.lora_A{dot}.weight"] = torch.randn(R, shape[1]) * 0.3
            adapter[f"{key}.lora_B{dot}.weight"] = torch.randn(shape[0], R) * 0.2
        m = W.float().norm(dim=1, keepdim=True) * (0.6 + 0.8 * torch.rand(shape[0], 1))
        adapter[f"{key}.weight_m_wdecomp{dot}.weight"] = m
    small.write_base(folder / "base", base)
    (folder / "adapter").mkdir()
    save_file(adapter, folder / "adapter/adapter_model.safetensors")
    settings = {"peft_type": "DORA", "r": R, "lora_alpha": ALPHA, "lora_dropout": 0.05,
                "target_modules": ["q_proj"], "bias": "none", "fan_in_fan_out": False,
                "enable_lora": None, "dora_simple": True, "merge_weights": False,
                "modules_to_save": None, "inference_mode": True, "task_type": "CAUSAL_LM",
                "Wdecompose_target_modules": ["v_proj"]} | config  # fmt: skip
    small.write_json(folder / "adapter/adapter_config.json",
                     {n: v for n, v in settings.items() if v != "absent"})  # fmt: skip
    return base, adapter


def parts(base, adapter, layer, dot=""):
    W, bias = (oracle.float64(base[f"{layer}.{p}"]) for p in ("weight", "bias"))
    keys = (f"{PREFIX}{layer}.{p}{dot}.weight" for p in ("lora_A", "lora_B", "weight_m_wdecomp"))
    A, B, m = (oracle.float64(adapter[k]) if k in adapter else None for k in keys)
    return W, A, B, m, bias


def expected(base, adapter, layer, dot=""):
    """The weight that the forward amounts to: its answer for the identity, less the bias."""
    W, A, B, m, bias = parts(base, adapter, layer, dot)
    x = np.eye(W.shape[1])
    out = forward_of_magnitudes(x, W, m, bias) if A is None else forward(x, W, A, B, m, bias)
    return (out - bias).T


@pytest.mark.parametrize("name", ["", "default"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_merged_weights_are_those_of_the_forward(dtype, name, tmp_path):
    base, adapter = write(tmp_path, dtype, name)
    written = merged(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    for layer in (*SHAPES, ONLY):
        got = written[f"{layer}.weight"]
        want = expected(base, adapter, layer, f".{name}" if name else "")
        assert oracle.ulps(got, want) <= 1
        assert distance(got, oracle.float64(base[f"{layer}.weight"])) > 0.05
        assert torch.equal(written[f"{layer}.bias"], base[f"{layer}.bias"])


def test_wrong_formulas_fail_the_tolerance(tmp_path):
    base, adapter = write(tmp_path)
    written = merged(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    for layer in SHAPES:
        W, A, B, m, _ = parts(base, adapter, layer)
        for wrong in (
            oracle.dora(W, A, B, m, ALPHA),
            oracle.lora(W, A, B, ALPHA / R),
            W * m / np.linalg.norm(W, axis=1, keepdims=True),
            m * (W + ALPHA / R * (B @ A)),
        ):
            assert distance(written[f"{layer}.weight"], wrong) > 1e-2


def test_the_visual_fork_never_applies_magnitudes_alone(tmp_path):
    base, adapter = write(tmp_path, Wdecompose_target_modules="absent",
                          wdecompose_target_modules=["v_proj"])  # fmt: skip
    written = merged(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert torch.equal(written[f"{ONLY}.weight"], base[f"{ONLY}.weight"])
    manifest = json.loads((tmp_path / "out/dora_export.json").read_text())
    assert "magnitudes only" in json.dumps(manifest)
    for layer in SHAPES:
        assert distance(written[f"{layer}.weight"], expected(base, adapter, layer)) <= RELATIVE


def test_trained_biases_replace_the_base(tmp_path):
    write(tmp_path, bias="all")
    trained = {f"{PREFIX}{ONLY}.bias": torch.full((8,), 3.0)}
    file = tmp_path / "adapter/adapter_model.safetensors"
    small.edit_tensors(file, lambda t: t | trained)
    written = merged(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert torch.equal(written[f"{ONLY}.bias"], torch.full((8,), 3.0))


def test_inspection_names_trainer_axis_and_evidence(tmp_path):
    write(tmp_path)
    shown = inspected(tmp_path / "adapter", "--base", tmp_path / "base")
    for words in ("nvlabs", "NVlabs/DoRA", "out, by the format", "fits"):
        assert words in shown


CONFIGS = {
    "transposed": ({"fan_in_fan_out": True}, "over the wrong dimension"),
    "merged linear": ({"enable_lora": [True]}, "fused layers"),
    "saved modules": ({"modules_to_save": ["score"]}, "modules trained whole"),
    "unknown": ({"rank_pattern": {"q": 4}}, "rank_pattern: a setting of unknown effect"),
    "rank of text": ({"r": "3"}, "r '3'"),
    "no alpha": ({"lora_alpha": "absent"}, "lora_alpha 'None'"),
    "alpha of zero": ({"lora_alpha": 0}, "lora_alpha '0'"),
    "an initialisation": ({"init_lora_weights": "pissa"}, "an initialisation of unknown effect"),
    "another rank": ({"r": 4}, "r is 4"),
    "lora_only": ({"bias": "lora_only"}, "does not save the magnitudes"),
    "silent fork": ({"Wdecompose_target_modules": None}, "names no Wdecompose_target_modules"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_config_that_does_not_add_up_is_refused(case, tmp_path):
    fields, reason = CONFIGS[case]
    write(tmp_path, **fields)
    assert reason in refused(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")


def test_options_that_the_file_answers_are_refused(tmp_path):
    write(tmp_path, init_lora_weights=True, base_model_name_or_path="some/base")
    for option in ({"alpha": 4.0}, {"axis": "in"}):
        with pytest.raises(AdapterError, match=f"Leave --{next(iter(option))} out"):
            load_adapter(tmp_path / "adapter", **option)
    found = load_adapter(tmp_path / "adapter", axis="out")
    assert (found.doubtful_magnitudes, found.base_name) == (True, "some/base")
    said = load_adapter(tmp_path / "adapter", magnitude_is_normalised=True)
    assert not said.doubtful_magnitudes
    assert all(u.magnitude_is_factor for u in said.updates if u.magnitude)
    assert {u.kind for u in said.updates} == {"dora", "magnitude"}


Q = f"{PREFIX}model.layers.0.q_proj"
TENSORS = {
    "m missing": (lambda t: t.pop(f"{Q}.weight_m_wdecomp.weight"), "weight_m_wdecomp missing"),
    "A missing": (lambda t: t.pop(f"{Q}.lora_A.weight"), "lora_A missing"),
    "flat m": (lambda t: t.update({f"{Q}.weight_m_wdecomp.weight": torch.ones(16)}), "(16,)"),
    "in-axis m": (lambda t: t.update({f"{Q}.weight_m_wdecomp.weight": torch.ones(1, 16)}),
                  "(1, 16)"),
    "unknown": (lambda t: t.update({f"{Q}.bias": torch.ones(16)}), "unknown tensor"),
    "two adapters": (lambda t: t.update({f"{Q}.lora_A.a.weight": torch.ones(3, 16)}),
                     "several adapters"),
}  # fmt: skip


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_do_not_add_up_are_refused(case, tmp_path):
    write(tmp_path)
    change, reason = TENSORS[case]
    file = tmp_path / "adapter/adapter_model.safetensors"
    small.edit_tensors(file, lambda t: (change(t), t)[1])
    assert reason in refused(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")


# --- TensorRT-LLM's magnitudes: the trained ones divided by the norms, names as before ---


def divided(file, base, a, b, m, s):
    """Rewrite an adapter as the script does; returns the weights that the original amounts to."""
    tensors, want = load_file(file), {}
    for key in [k for k in tensors if k.endswith(m)]:
        layer = key.removesuffix(m).removeprefix(PREFIX)
        W = oracle.float64(base[f"{layer}.weight"])
        if f"{PREFIX}{layer}{a}" in tensors:
            A, B = (oracle.float64(tensors[f"{PREFIX}{layer}{p}"]) for p in (a, b))
            W = oracle.lora(W, A, B, s)
        factor = (oracle.float64(tensors[key]).ravel() / np.linalg.norm(W, axis=1)).astype("f4")
        tensors[key] = torch.tensor(factor).reshape(tensors[key].shape)
        want[f"{layer}.weight"] = factor.astype("f8")[:, None] * W
    save_file(tensors, file)
    return want


def nvlabs_divided(folder):
    base, _ = write(folder)
    base = {n: t * (20 if n.endswith("weight") else 1) for n, t in base.items()}
    save_file(base, folder / "base/model.safetensors", {"format": "pt"})
    file = folder / "adapter/adapter_model.safetensors"
    scaled = {n: t * (20 if "lora_B" in n or "wdecomp" in n else 1)
              for n, t in load_file(file).items()}  # fmt: skip
    save_file(scaled, file)
    return divided(file, base, ".lora_A.weight", ".lora_B.weight",
                   ".weight_m_wdecomp.weight", ALPHA / R)  # fmt: skip


def peft_divided(folder):
    base = {n: t * (20 if "proj" in n else 1)
            for n, t in small.base_tensors(dtype=torch.float32).items()}  # fmt: skip
    small.write_base(folder / "base", base)
    small.write_adapter(folder / "adapter", small.adapter_tensors(base))
    file = folder / "adapter/adapter_model.safetensors"
    scaling = small.ALPHA / small.RANK
    keys = (".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector")
    return divided(file, base, *keys, scaling)


@pytest.mark.parametrize("make", [nvlabs_divided, peft_divided])
def test_divided_magnitudes_are_refused_until_said(make, tmp_path):
    want = make(tmp_path)
    paths = (tmp_path / "base", tmp_path / "adapter")
    message = refused(*paths, tmp_path / "out")
    assert "look divided by the norms already" in message
    assert "--magnitude-is-normalised" in message
    written = merged(*paths, tmp_path / "out", "--magnitude-is-normalised")
    assert len(want) >= 4
    for name, weight in want.items():
        assert distance(written[name], weight) <= RELATIVE
    other = merged(*paths, tmp_path / "other", "--magnitude-is-not-normalised")
    assert all(distance(other[name], weight) > 0.1 for name, weight in want.items())


def test_magnitudes_far_from_every_norm_are_refused(tmp_path):
    base, _ = small.write_pair(tmp_path, dtype=torch.float32)
    file = tmp_path / "adapter/adapter_model.safetensors"
    small.edit_tensors(
        file, lambda t: {n: v * (1e3 if "magnitude" in n else 1) for n, v in t.items()}
    )
    message = refused(base, tmp_path / "adapter", tmp_path / "out")
    assert "times the norms of the rows" in message
    merged(base, tmp_path / "adapter", tmp_path / "out", "--magnitude-is-not-normalised")


def test_rows_of_norm_one_leave_nothing_to_see_and_are_taken_as_trained(tmp_path):
    base = {n: t / t.norm(dim=1, keepdim=True) if "proj" in n else t
            for n, t in small.base_tensors(dtype=torch.float32).items()}  # fmt: skip
    small.write_base(tmp_path / "base", base)
    small.write_adapter(tmp_path / "adapter", small.adapter_tensors(base))
    merged(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
