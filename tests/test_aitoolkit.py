"""ai-toolkit's DoRA, whose forward is written here from its definition."""

import json
import re

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import dora_export
from dora_export.errors import ArithmeticRefusal
from tests import oracle, pipelines, small
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


def test_stored_alpha_counts_and_zero_is_the_rank(tmp_path):
    made = adapter()
    zero = {f"{n.removesuffix('.magnitude')}.alpha": torch.zeros(()) for n in made
            if n.endswith(".magnitude")}  # fmt: skip
    assert re.search(r"scaling +1\n", inspected(write(tmp_path, made | zero)))
    two = {n: t + 2 for n, t in zero.items()}
    assert re.search(r"scaling +0\.666667\n", inspected(write(tmp_path, made | two)))


def alpha(value):
    """All layers with this alpha."""
    return lambda ts: ts | {f"{n.removesuffix('.magnitude')}.alpha": value.clone() for n in ts
                            if n.endswith(".magnitude")}  # fmt: skip


REFUSED = {
    "alpha of 8 bits": (alpha(torch.tensor(2.0).to(torch.float8_e4m3fn)), "F8_E4M3, expected one"),
    "alpha of two": (alpha(torch.ones(2)), "(2,) F32, expected one number"),
    "alpha infinite": (alpha(torch.tensor(float("inf"))), "alpha is inf: it overflowed its type"),
    "twice": (
        lambda ts: ts | {n.replace("lora_up", "lora_B"): t.clone() for n, t in ts.items()},
        "its tensor is there twice",
    ),
    "kernel of A": (
        lambda ts: {n: t[..., None] if "lora_down" in n else t for n, t in ts.items()},
        "expected two ranks",
    ),
    "kernel of B": (
        lambda ts: {n: t[..., None] if "lora_up" in n else t for n, t in ts.items()},
        "expected two ranks",
    ),
    "kernel": (
        lambda ts: {
            n: t[..., None, None] if "lora_" in n.partition(".")[2] else t for n, t in ts.items()
        },
        "expected two ranks",
    ),
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
    shown = inspected(file, "--alpha", "4")
    assert "out, by the format: ai-toolkit" in shown
    for words in (f"rank +{RANK}", "alpha +4", r"scaling +1\.33333"):
        assert re.search(rf"{words}\n", shown)


# --- in other formats' terms


class Layers(torch.nn.Module):
    """The adapted linears under their own names, as PEFT wraps them."""

    def __init__(self, weights):
        super().__init__()
        for name in LINEARS:
            at = self
            *path, leaf = name.split(".")
            for part in path:
                if not hasattr(at, part):
                    at.add_module(part, torch.nn.Module())
                at = getattr(at, part)
            W = weights[f"{name}.weight"].float()
            at.add_module(leaf, torch.nn.Linear(*W.shape[::-1], bias=False))
            getattr(at, leaf).weight.data = W


def trainers_weight(made, name, dtype, alpha):
    """What the trainer's forward multiplies inputs by, float64."""
    key = f"lora_unet_{name.replace('.', '_')}"
    A, B, m = (oracle.float64(made[f"{key}.{p}"]) for p in
               ("lora_down.weight", "lora_up.weight", "magnitude"))  # fmt: skip
    W = oracle.float64(pipelines.tensors(dtype)["unet"][f"{name}.weight"])
    return forward(np.eye(W.shape[1]), W, A, B, m, alpha / RANK).T, (W, A, B, m)


@pytest.mark.parametrize(
    ("alpha", "dtype"), [(ALPHA, torch.float32), (2.0 * RANK, torch.bfloat16)], ids=str
)
def test_dora_of_peft_says_the_same_with_factors_of_its_own(alpha, dtype, tmp_path):
    made, base = adapter(), pipelines.write(tmp_path / "base", dtype)
    own = write(tmp_path, made)
    report = dora_export.convert(own, "peft", tmp_path / "peft", base=base / "unet", alpha=alpha)
    assert report.rounded
    assert "B and the magnitudes of 3 layers are computed for this base" in report.notes[0]
    manifest = json.loads((tmp_path / "peft/dora_export.json").read_text())
    assert manifest["converted"]["exact"] is False
    model = Layers(pipelines.tensors(dtype)["unet"])
    model = peft.PeftModel.from_pretrained(model, tmp_path / "peft").double()
    dora_export.merge(base / "unet", tmp_path / "peft", tmp_path / "out", verify="full")
    got = load_file(tmp_path / "out/diffusion_pytorch_model.safetensors")
    for name in LINEARS:
        right, (W, A, B, m) = trainers_weight(made, name, dtype, alpha)
        with torch.no_grad():
            used = model.base_model.model.get_submodule(name)(torch.eye(W.shape[1]).double()).T
        assert distance(used, right) <= RELATIVE, name
        weight = got[f"{name}.weight"]
        if dtype is torch.float32:
            assert distance(weight, right) <= RELATIVE, name
        else:
            assert oracle.ulps(weight, right) <= 1, name
        for scaling in (1.0, alpha / RANK):  # the factors as they are
            assert distance(used, oracle.dora(W, A, B, m, scaling)) > 1000 * RELATIVE, name


def test_dora_of_diffusers_says_the_same_and_other_formats_say_why_not(tmp_path):
    made, base = adapter(), pipelines.write(tmp_path / "base", torch.float32)
    own = write(tmp_path, made)
    flags = ("--base", base, "--alpha", ALPHA)
    result = small.run("convert", own, "--to", "diffusers", "-o", tmp_path / "lora", *flags)
    assert "to diffusers, exactly but for one rounding" in result.stdout
    merged(base, tmp_path / "lora", tmp_path / "out")
    got = load_file(tmp_path / "out/unet/diffusion_pytorch_model.safetensors")
    for name in LINEARS:
        right, _ = trainers_weight(made, name, torch.float32, ALPHA)
        assert distance(got[f"{name}.weight"], right) <= RELATIVE
    result = small.run("convert", own, "--to", "lycoris", "-o", tmp_path / "x", *flags)
    assert "DoRA trained without an eps" in result.stderr
    result = small.run("convert", own, "--to", "diffusers", "-o", tmp_path / "x", *flags[2:])
    assert result.exit_code == 2
    assert "in another's terms it can be said for one base, pass --base" in result.stderr
    report = dora_export.convert(own, "lora", tmp_path / "plain", base=base, rank=64, alpha=ALPHA)
    assert report.energy == pytest.approx(1.0, abs=1e-12)


def test_layers_whose_alpha_is_the_rank_stay_as_they_are(tmp_path):
    made, base = adapter(), pipelines.write(tmp_path / "base", torch.float32)
    modules = [n.removesuffix(".magnitude") for n in made if n.endswith(".magnitude")]
    alphas = {f"{m}.alpha": torch.tensor(float(RANK)) for m in modules}
    own = write(tmp_path, made | alphas)
    report = dora_export.convert(own, "diffusers", tmp_path / "all", base=base)
    assert (report.rounded, report.notes) == (False, ())
    alphas[f"{modules[0]}.alpha"] += 1
    own = write(tmp_path, made | alphas)
    report = dora_export.convert(own, "diffusers", tmp_path / "lora", base=base)
    assert "of 1 layer are computed" in report.notes[0]
    got = load_file(tmp_path / "lora/pytorch_lora_weights.safetensors")
    assert len(got) == 3 * len(LINEARS)
    for name in LINEARS:
        key = f"lora_unet_{name.replace('.', '_')}"
        B, m = (got[f"unet.{name}.{p}"] for p in ("lora_B.weight", "lora_magnitude_vector"))
        copied = torch.equal(B, made[f"{key}.lora_up.weight"])
        assert copied == torch.equal(m, made[f"{key}.magnitude"]) == (key != modules[0]), name


def test_factors_that_do_not_fit_or_are_no_floats_are_refused(tmp_path):
    made, base = adapter(), pipelines.write(tmp_path / "base", torch.float32)
    narrow = {n: t[:, :-1].contiguous() if "lora_down" in n else t for n, t in made.items()}
    said = refused(base, write(tmp_path, narrow), tmp_path / "out", "--alpha", ALPHA)
    assert "base weight is (16, 16), adapter has A (3, 15) and B (16, 3)" in said
    whole = {n: t.to(torch.int8) if "lora_down" in n else t for n, t in made.items()}
    said = refused(base, write(tmp_path, whole), tmp_path / "out", "--alpha", ALPHA)
    assert "lora_down.weight' is stored as I8, not a float" in said


def test_row_without_magnitude_has_no_such_terms(tmp_path):
    made, base = adapter(), pipelines.write(tmp_path / "base", torch.float32)
    made["lora_unet_mid_block_proj.magnitude"][5] = 0
    own = write(tmp_path, made)
    with pytest.raises(ArithmeticRefusal, match=r"mid_block\.proj\.weight: .* zero in 1 rows .*5"):
        dora_export.convert(own, "diffusers", tmp_path / "lora", base=base, alpha=ALPHA)
    assert not (tmp_path / "lora").exists()
