"""Lines whose norm float32 has not the range for: refused with the way out, never zero."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import dora_export
from dora_export import fused
from dora_export.errors import ArithmeticRefusal
from tests import oracle, small
from tests import test_lycoris_files as lycoris

NAME = "model.layers.0.attn.q_proj"
A, B, M = (f"{small.PREFIX}{NAME}.{part}" for part in
           ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector"))  # fmt: skip
# Rows times this. Of the first, squares are beyond float32; of the next m / norm is below its
# normal numbers; then squares are, in part, and all of them.
SCALES = {"infinite": 1e37, "tiny factor": 1e19, "coarse": 1e-21, "nothing": 1e-30}


def write(folder, scale, magnitude=1.0):
    """A pair with two rows of one layer scaled, and an update that is zero there."""
    base = small.base_tensors()
    adapter = small.adapter_tensors(base)
    base[f"{NAME}.weight"][[3, 7]] *= scale
    adapter[B][[3, 7]] = 0.0
    adapter[M][[3, 7]] *= magnitude
    small.write_base(folder / "base", base)
    small.write_adapter(folder / "adapter", adapter)
    return folder / "base", folder / "adapter"


@pytest.mark.parametrize("kernel", [True, False], ids=["compiled", "numpy"])
@pytest.mark.parametrize("zero_norm", ["refuse", "zero"])
@pytest.mark.parametrize("scale", SCALES)
def test_rows_that_float32_cannot_hold_are_refused(tmp_path, monkeypatch, scale, zero_norm, kernel):
    if not kernel:
        monkeypatch.setattr(fused, "available", lambda: False)
    magnitude = 1e-21 if scale == "tiny factor" else 1.0
    pair = write(tmp_path, SCALES[scale], magnitude)
    options = {"verify": "none", "zero_norm": zero_norm}
    with pytest.raises(ArithmeticRefusal, match=r"2 rows \(3, 7\).*Pass --precision float64"):
        dora_export.merge(*pair, tmp_path / "out", **options)
    dora_export.merge(*pair, tmp_path / "out", **options, precision="float64")
    got = load_file(tmp_path / "out/model.safetensors")[f"{NAME}.weight"]
    W = oracle.float64(load_file(pair[0] / "model.safetensors")[f"{NAME}.weight"])
    a, b, m = (oracle.float64(load_file(pair[1] / "adapter_model.safetensors")[n])
               for n in (A, B, M))  # fmt: skip
    exact = oracle.dora(W, a, b, m, small.ALPHA / small.RANK)
    assert oracle.ulps(got, exact) <= 1
    assert np.abs(exact[[3, 7]]).max() > 0


@pytest.mark.parametrize("kernel", [True, False], ids=["compiled", "numpy"])
@pytest.mark.parametrize("scale", [1e15, 1e-14])
def test_rows_well_within_float32_are_merged_as_exactly_as_ever(
    tmp_path, monkeypatch, scale, kernel
):
    if not kernel:
        monkeypatch.setattr(fused, "available", lambda: False)
    pair = write(tmp_path, scale)
    report = dora_export.merge(*pair, tmp_path / "out", verify="full")
    assert report.worst_ulp <= 1


@pytest.mark.parametrize("scale", [1e37, 1e-21])
def test_columns_that_float32_cannot_hold_are_refused(tmp_path, scale):
    base, made = lycoris.layers("in")
    base = {name: tensor.to(torch.bfloat16) for name, tensor in base.items()}
    name = next(iter(made))
    base[f"{lycoris.PATHS[name]}.weight"][:, 2] *= scale
    made[name]["down"][:, 2] = 0.0
    pair = lycoris.write(tmp_path, base, lycoris.named(made))[:2]
    with pytest.raises(ArithmeticRefusal, match=r"1 columns \(2\).*Pass --precision float64"):
        dora_export.merge(*pair, tmp_path / "out", verify="none")
    report = dora_export.merge(*pair, tmp_path / "out", verify="full", precision="float64")
    assert report.worst_ulp <= 1
