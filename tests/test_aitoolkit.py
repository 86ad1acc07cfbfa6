"""ai-toolkit's DoRA, whose forward is written here from its definition."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import oracle, pipelines
from tests.small import PREFIX, RANK
from tests.trainers import inspected, merged, refused

ALPHA = 4.5
LINEARS = {n: s for n, s in pipelines.LAYERS.items() if len(s) == 2}  # the trainer knows no others


def adapter(flat=True):
    """A trained adapter on the linears, in the trainer's names."""
    made = {}
    for name, tensor in pipelines.adapter(pipelines.tensors()["unet"]).items():
        module, _, part = name.removeprefix(PREFIX).partition(".lora_")
        if module not in LINEARS:
            continue
        key = f"lora_unet_{module.replace('.', '_')}" if flat else f"unet.{module}"
        leaf = {"A.weight": "lora_down.weight", "B.weight": "lora_up.weight",
                "magnitude_vector": "magnitude"}[part]  # fmt: skip
        made[f"{key}.{leaf}"] = tensor
    return made


def write(folder, tensors):
    save_file(tensors, folder / "dora.safetensors")
    return folder / "dora.safetensors"


def forward(x, W, A, B, m, scale):
    """What DoRAModule computes: V from W and the product, rows divided by their norms, times m."""
    V = W + (A.T @ B.T).T * scale
    return x @ (m[:, None] * V / np.linalg.norm(V, axis=1, keepdims=True)).T


@pytest.mark.parametrize("flat", [True, False], ids=["kohya names", "paths"])
def test_merged_layers_compute_the_trainers_forward(flat, tmp_path):
    base = pipelines.write(tmp_path / "base", torch.float32)
    made = adapter(flat)
    merged(base, write(tmp_path, made), tmp_path / "out", "--alpha", ALPHA)
    stored = load_file(tmp_path / "out/unet/diffusion_pytorch_model.safetensors")
    assert len(made) == 3 * len(LINEARS)
    for name in LINEARS:
        key = f"lora_unet_{name.replace('.', '_')}" if flat else f"unet.{name}"
        A, B, m = (oracle.float64(made[f"{key}.{p}"]) for p in
                   ("lora_down.weight", "lora_up.weight", "magnitude"))  # fmt: skip
        W = oracle.float64(pipelines.tensors(torch.float32)["unet"][f"{name}.weight"])
        x = np.random.default_rng(0).standard_normal((5, W.shape[1]))
        ours = x @ oracle.float64(stored[f"{name}.weight"]).T
        right = forward(x, W, A, B, m, ALPHA / RANK)
        size = np.abs(right).max()
        assert np.abs(ours - right).max() / size < 1e-6
        assert np.abs(ours - forward(x, W, A, B, m, 1.0)).max() / size > 1e-3


def test_alpha_must_be_given(tmp_path):
    base = pipelines.write(tmp_path / "base")
    said = refused(base, write(tmp_path, adapter()), tmp_path / "out")
    assert "does not store alpha. Pass --alpha" in said


def test_stored_alpha_leaves_no_choice(tmp_path):
    made = adapter()
    first = next(iter(made)).partition(".")[0]
    made |= {f"{first}.alpha": torch.tensor(2.0)}
    base = pipelines.write(tmp_path / "base")
    said = refused(base, write(tmp_path, made), tmp_path / "out", "--alpha", "3")
    assert "alpha is in the file. Leave --alpha out" in said


REFUSED = {
    "no magnitude": (lambda ts: {n: t for n, t in ts.items() if n != min(ts)}, "missing"),
    "unknown": (lambda ts: ts | {"lora_unet_x.what": torch.ones(1)}, "unknown tensor"),
    "length": (
        lambda ts: {n: t[:-1] if n.endswith("magnitude") else t for n, t in ts.items()},
        "magnitude is",
    ),
    "rank": (
        lambda ts: {n: t[:-1] if n.endswith("down.weight") else t for n, t in ts.items()},
        "expected two ranks",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_file_that_does_not_add_up_is_refused(case, tmp_path):
    change, message = REFUSED[case]
    file = write(tmp_path, {n: t.contiguous() for n, t in change(adapter()).items()})
    base = pipelines.write(tmp_path / "base")
    assert message in refused(base, file, tmp_path / "out", "--alpha", "3")


def test_axis_is_the_formats(tmp_path):
    file = write(tmp_path, adapter())
    base = pipelines.write(tmp_path / "base")
    said = refused(base, file, tmp_path / "out", "--alpha", "3", "--axis", "in")
    assert "one magnitude per output. Leave --axis out" in said
    assert "out, by the format: ai-toolkit" in inspected(file, "--alpha", "3")
