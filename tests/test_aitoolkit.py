"""ai-toolkit's DoRA, whose forward is written here from its definition."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import dora_export
from tests import oracle, pipelines
from tests.small import PREFIX, RANK
from tests.trainers import RELATIVE, distance, inspected, merged, refused

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
    """ToolkitModuleMixin.forward with apply_dora: the norm does not see the scaling."""
    V = W + B @ A
    low_rank = (x @ A.T) @ B.T * scale
    return x @ W.T + low_rank + (m / np.linalg.norm(V, axis=1) - 1) * (x @ V.T)


def of_paper(x, W, A, B, m, scale):
    """What PEFT's DoRA computes: the scaling within the norm."""
    return x @ oracle.dora(W, A, B, m, scale).T


# Names, --alpha (PEFT's names stand for alpha the rank).
NAMES = {"kohya": ("lora_down", "lora_up", ALPHA), "PEFT": ("lora_A", "lora_B", None),
         "kohya, the rank": ("lora_down", "lora_up", RANK)}  # fmt: skip


@pytest.mark.parametrize(
    ("dtype", "flat"),
    [(torch.float32, True), (torch.bfloat16, False),
     pytest.param(torch.float16, True, marks=pytest.mark.nightly)],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("names", NAMES)
def test_merged_layers_compute_the_trainers_forward(names, flat, dtype, tmp_path):
    down, up, alpha = NAMES[names]
    base = pipelines.write(tmp_path / "base", dtype)
    made = adapter(flat)
    stored = {n.replace("lora_down", down).replace("lora_up", up): t for n, t in made.items()}
    options = () if alpha is None else ("--alpha", alpha)
    paths = base, write(tmp_path, stored), tmp_path / "out"
    merged(*paths, *options)
    got = load_file(tmp_path / "out/unet/diffusion_pytorch_model.safetensors")
    assert len(made) == 3 * len(LINEARS)
    shapes = set()
    for name in LINEARS:
        key = f"lora_unet_{name.replace('.', '_')}" if flat else f"unet.{name}"
        A, B, m = (oracle.float64(made[f"{key}.{p}"]) for p in
                   ("lora_down.weight", "lora_up.weight", "magnitude"))  # fmt: skip
        W = oracle.float64(pipelines.tensors(dtype)["unet"][f"{name}.weight"])
        scale = 1.0 if alpha is None else alpha / RANK
        weight = got[f"{name}.weight"]
        eye = np.eye(W.shape[1])
        right = forward(eye, W, A, B, m, scale).T
        assert weight.dtype is dtype
        if dtype is torch.float32:
            assert distance(weight, right) <= RELATIVE
        assert oracle.ulps(weight, right) <= 1
        wrong = [W, forward(eye, W, A, B, m, scale + 0.5).T, oracle.lora(W, A, B, scale)]
        wrong += [of_paper(eye, W, A, B, m, scale).T] if scale != 1 else []
        assert all(oracle.ulps(weight, other) > 10 for other in wrong)
        shapes.add(W.shape[0] == W.shape[1])
    assert shapes == {True, False}
    flags = {} if alpha is None else {"alpha": alpha}
    assert dora_export.verify(*paths, **flags).exit_code == 0


def test_row_without_direction_is_refused(tmp_path):
    made = adapter()
    base = pipelines.write(tmp_path / "base", torch.float32)
    name, key = "mid_block.proj", "lora_unet_mid_block_proj"
    file = base / "unet/diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors[f"{name}.weight"][3], made[f"{key}.lora_up.weight"][3] = 0, 0
    save_file(tensors, file, {"format": "pt"})
    said = refused(base, write(tmp_path, made), tmp_path / "out", "--alpha", ALPHA)
    assert "||W + B A|| is zero in 1 rows (first: 3)" in said


def test_alpha_must_be_given(tmp_path):
    base = pipelines.write(tmp_path / "base")
    said = refused(base, write(tmp_path, adapter()), tmp_path / "out")
    assert "does not store alpha. Pass --alpha" in said


def test_alpha_is_the_rank_where_names_are_pefts(tmp_path):
    made = {n.replace("lora_down", "lora_A").replace("lora_up", "lora_B"): t
            for n, t in adapter(flat=False).items()}  # fmt: skip
    base = pipelines.write(tmp_path / "base")
    said = refused(base, write(tmp_path, made), tmp_path / "out", "--alpha", "6")
    assert "alpha is the rank in ai-toolkit's files of these names. Leave --alpha out" in said


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
