"""State dicts of LinearWithDoRAMerged: base and adapter in one file, one magnitude per input."""

import json
import re

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional

import dora_export
from dora_export.errors import AdapterError, DoraExportError
from tests import oracle, small

ALPHA, RANK = 4.0, 3


class LoRALayer(nn.Module):
    """The published one: alpha as it is, not divided by the rank."""

    def __init__(self, in_dim, out_dim, rank, alpha):
        super().__init__()
        self.A = nn.Parameter(torch.randn(in_dim, rank) / rank**0.5)
        self.B = nn.Parameter(torch.zeros(rank, out_dim))
        self.alpha = alpha


class LinearWithDoRAMerged(nn.Module):
    """The published one: its forward builds the merged weight."""

    def __init__(self, linear, rank, alpha):
        super().__init__()
        self.linear = linear
        self.lora = LoRALayer(linear.in_features, linear.out_features, rank, alpha)
        self.m = nn.Parameter(self.linear.weight.norm(p=2, dim=0, keepdim=True))

    def forward(self, x):
        lora = self.lora.A @ self.lora.B
        numerator = self.linear.weight + self.lora.alpha * lora.T
        denominator = numerator.norm(p=2, dim=0, keepdim=True)
        directional_component = numerator / denominator
        new_weight = self.m * directional_component
        return functional.linear(x, new_weight, self.linear.bias)


def plain(square=False):
    """A model with layers of every kind beside the linear ones."""
    width = 10 if square else 24
    return nn.Sequential(
        nn.Embedding(50, 10),
        nn.Linear(10, width),
        nn.BatchNorm1d(width),
        nn.ReLU(),
        nn.Sequential(nn.Linear(width, 7, bias=False), nn.LayerNorm(7)),
        nn.Linear(7, 7),
        nn.Linear(7, 5),
    )


def with_dora(model, seed=0):
    """Three of four linear layers wrapped, then everything as if trained."""
    torch.manual_seed(seed)
    model[1] = LinearWithDoRAMerged(model[1], RANK, ALPHA)
    model[4][0] = LinearWithDoRAMerged(model[4][0], RANK, ALPHA)
    model[5] = LinearWithDoRAMerged(model[5], RANK, ALPHA)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora.B"):
                parameter.normal_(0, 0.2)
            elif name.endswith(".m"):
                parameter.mul_(0.6 + 0.8 * torch.rand_like(parameter))
        model[2].running_mean.normal_()
        model[2].running_var.uniform_(0.5, 2)
        model[2].num_batches_tracked.fill_(17)
    return model.eval()


LAYERS = ("1", "4.0", "5")


def exact(state, layer, alpha=ALPHA, axis=0):
    """The oracle's merged weight of one layer: norms down the rows, as published."""
    W, A, B, m = (
        oracle.float64(state[f"{layer}.{part}"])
        for part in ("linear.weight", "lora.A", "lora.B", "m")
    )
    return oracle.dora(W, A.T, B.T, m, alpha, axis=axis)


def save(state, path):
    if path.suffix == ".safetensors":
        save_file({k: t.contiguous() for k, t in state.items()}, path)
    else:
        torch.save(state, path)
    return path


def merge(path, *options, out="out"):
    return small.run("merge", path, "-o", path.parent / out, *options)


def refused(path, *options):
    """Standard error of a merge that is refused and leaves nothing."""
    before = small.entries(path.parent)
    result = merge(path, *options)
    assert result.exit_code == 2, result.stdout + result.stderr
    assert small.entries(path.parent) == before
    return result.stderr


@pytest.mark.parametrize("square", [False, True])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth", ".bin"])
def test_merged_file_loads_into_the_plain_model_and_computes_the_same(tmp_path, suffix, square):
    model = with_dora(plain(square))
    state = model.state_dict()
    path = save(state, tmp_path / f"state{suffix}")
    result = merge(path, "--alpha", "4", "--verify", "full", "--allow-pickle")
    assert result.exit_code == 0, result.stderr
    assert "merged 3 DoRA tensors" in result.stdout
    assert "adapter tensors used 9/9" in result.stdout

    written = load_file(tmp_path / "out/model.safetensors")
    target = plain(square).eval()
    target.load_state_dict(written)  # strict: every name, none besides
    for layer in LAYERS:
        assert oracle.ulps(written[f"{layer}.weight"], exact(state, layer)) <= 1
    for name, tensor in written.items():
        if not any(name == f"{layer}.weight" for layer in LAYERS):
            source = state.get(name, state.get(name.replace(".bias", ".linear.bias")))
            assert tensor.dtype is source.dtype
            assert small.bits(tensor) == small.bits(source), name

    x = torch.randint(0, 50, (64,))
    with torch.no_grad():
        before, after = model(x), target(x)
        moved = plain_forward(state, square, x)
    scale = before.abs().max()
    assert (after - before).abs().max() <= 1e-5 * scale
    assert (moved - before).abs().max() > 1e-2 * scale


def plain_forward(state, square, x):
    """The forward with the adapters dropped, which a merge must not equal."""
    names = {n.replace(".linear.", "."): t for n, t in state.items()
             if ".lora." not in n and not n.endswith(".m")}  # fmt: skip
    model = plain(square).eval()
    model.load_state_dict(names)
    return model(x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_merged_weights_are_within_one_ulp_in_every_dtype(tmp_path, dtype, precision):
    state = {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for name, tensor in with_dora(plain()).state_dict().items()
    }
    path = save(state, tmp_path / "state.safetensors")
    options = ("--alpha", "4", "--precision", precision, "--verify", "full")
    assert merge(path, *options).exit_code == 0
    written = load_file(tmp_path / "out/model.safetensors")
    for layer in LAYERS:
        got, want = written[f"{layer}.weight"], exact(state, layer)
        assert got.dtype is dtype
        if dtype is torch.float64:  # the oracle's own precision
            assert np.allclose(got.numpy(), want, rtol=1e-13, atol=0)
            continue
        assert oracle.ulps(got, want) <= 1
        if precision == "float64":
            assert oracle.misrounded(got, want) == 0


MISTAKES = {
    "norm over the other axis": lambda state, layer: exact(
        state | {f"{layer}.m": state[f"{layer}.linear.weight"].norm(dim=1)}, layer, axis=1
    ),
    "alpha divided by the rank": lambda state, layer: exact(state, layer, ALPHA / RANK),
    "alpha of the default 1": lambda state, layer: exact(state, layer, 1.0),
    "magnitudes reordered": lambda state, layer: exact(
        state | {f"{layer}.m": state[f"{layer}.m"].roll(1)}, layer
    ),
    "norm of W alone": lambda state, layer: (
        (oracle.float64(state[f"{layer}.linear.weight"])
         + ALPHA * oracle.float64(state[f"{layer}.lora.A"] @ state[f"{layer}.lora.B"]).T)
        * oracle.float64(state[f"{layer}.m"])
        / oracle.float64(state[f"{layer}.linear.weight"].norm(dim=0, keepdim=True))
    ),
    "adapter ignored": lambda state, layer: oracle.float64(state[f"{layer}.linear.weight"]),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_tolerance_rejects_each_mistake(mistake, tmp_path):
    state = with_dora(plain()).state_dict()
    path = save(state, tmp_path / "state.safetensors")
    assert merge(path, "--alpha", "4").exit_code == 0
    written = load_file(tmp_path / "out/model.safetensors")
    for layer in LAYERS:
        assert oracle.ulps(written[f"{layer}.weight"], MISTAKES[mistake](state, layer)) > 1000


@pytest.mark.parametrize("level", ["fast", "full"])
def test_float64_result_passes_the_check(tmp_path, level):
    state = {n: t.double() if t.is_floating_point() else t
             for n, t in with_dora(plain()).state_dict().items()}  # fmt: skip
    path = save(state, tmp_path / "state.safetensors")
    assert merge(path, "--alpha", "4", "--verify", level).exit_code == 0


def test_another_alpha_gives_another_model(tmp_path):
    state = with_dora(plain()).state_dict()
    path = save(state, tmp_path / "state.safetensors")
    assert merge(path, "--alpha", "2.5").exit_code == 0
    written = load_file(tmp_path / "out/model.safetensors")
    assert oracle.ulps(written["1.weight"], exact(state, "1", alpha=2.5)) <= 1
    manifest = json.loads((tmp_path / "out/dora_export.json").read_text())
    assert manifest["adapters"][0]["settings"]["alpha"] == [2.5]


def test_single_layer_saved_alone_is_merged(tmp_path):
    torch.manual_seed(0)
    layer = LinearWithDoRAMerged(nn.Linear(6, 9), RANK, ALPHA)
    nn.init.normal_(layer.lora.B)
    path = save(layer.state_dict(), tmp_path / "layer.pt")
    assert merge(path, "--alpha", "4", "--allow-pickle").exit_code == 0
    linear = nn.Linear(6, 9)
    linear.load_state_dict(load_file(tmp_path / "out/model.safetensors"))
    x = torch.randn(8, 6)
    with torch.no_grad():
        assert torch.allclose(linear(x), layer(x), atol=1e-5)


def test_python_interface_takes_the_same_file(tmp_path):
    state = with_dora(plain()).state_dict()
    path = save(state, tmp_path / "state.safetensors")
    report = dora_export.merge(path, None, tmp_path / "out", alpha=4)
    assert report.tensors["merged"] == 3
    assert report.adapter_format == "linear-with-dora-merged"
    assert report.magnitude == "one per input"
    adapter = dora_export.load_adapter(path, alpha=4)
    assert sorted(u.target for u in adapter.updates) == ["1.weight", "4.0.weight", "5.weight"]


def test_file_serves_as_the_adapter_of_a_base_of_its_own_names(tmp_path):
    state = with_dora(plain()).state_dict()
    path = save(state, tmp_path / "state.safetensors")
    base = {n.replace(".linear.", "."): t for n, t in state.items()
            if ".lora." not in n and not n.endswith(".m")}  # fmt: skip
    save_file(base, tmp_path / "base.safetensors")
    result = small.run("merge", tmp_path / "base.safetensors", path, "-o", tmp_path / "out",
                       "--alpha", "4")  # fmt: skip
    assert result.exit_code == 0, result.stderr
    written = load_file(tmp_path / "out/base.safetensors")
    assert oracle.ulps(written["5.weight"], exact(state, "5")) <= 1


def test_metadata_and_inspection(tmp_path):
    path = tmp_path / "state.safetensors"
    save_file(with_dora(plain()).state_dict(), path, {"format": "pt", "run": "7"})
    assert merge(path, "--alpha", "4").exit_code == 0
    with safe_open(tmp_path / "out/model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "run": "7"}
    for name in ("plain.safetensors", "plain.pt"):  # without metadata: as transformers asks for
        other = save(with_dora(plain()).state_dict(), tmp_path / name)
        assert merge(other, "--alpha", "4", "--allow-pickle", out=f"of {name}").exit_code == 0
        with safe_open(tmp_path / f"of {name}/model.safetensors", "pt") as file:
            assert file.metadata() == {"format": "pt"}
    shown = small.run("inspect", path, "--alpha", "4")
    assert shown.exit_code == 0
    for words in ("linear-with-dora-merged", "one per input", "rank         3", "3 tensors would"):
        assert words in shown.stdout


# --- refusals ---


def change(state, **parts):
    """A state dict with parts of layer 1 replaced, or dropped where the value is None."""
    changed = dict(state)
    for part, value in parts.items():
        name = "1." + {"A": "lora.A", "B": "lora.B", "m": "m", "W": "linear.weight"}[part]
        changed.pop(name)
        if value is not None:
            changed[name] = value
    return changed


@pytest.fixture
def state():
    return with_dora(plain()).state_dict()


def test_missing_alpha_is_refused_naming_the_option(state, tmp_path):
    assert "Pass --alpha" in refused(save(state, tmp_path / "state.safetensors"))


@pytest.mark.parametrize(
    ("alpha", "reason"),
    [
        ("0", "Check --alpha"),
        ("nan", "--alpha nan: expected a finite"),
        ("inf", "--alpha inf: expected"),
    ],
)
def test_alpha_that_is_no_factor_is_refused(state, tmp_path, alpha, reason):
    path = save(state, tmp_path / "state.safetensors")
    assert reason in refused(path, "--alpha", alpha)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin"])
def test_pickled_file_is_refused_unless_it_is_allowed(state, tmp_path, suffix):
    path = save(state, tmp_path / f"state{suffix}")
    assert "Pass --allow-pickle" in refused(path, "--alpha", "4")


def test_magnitudes_of_the_unmergeable_sibling_are_refused(state, tmp_path):
    path = save(change(state, m=torch.rand(1, 24)), tmp_path / "state.safetensors")
    assert "normalises activations" in refused(path, "--alpha", "4")
    assert "normalises activations" in refused(path, "--alpha", "4", "--axis", "out")


BROKEN = {
    "m of another length": ({"m": torch.rand(1, 11)}, r"expected (1, 10)"),
    "m of three dimensions": ({"m": torch.rand(1, 1, 10)}, r"expected (1, 10)"),
    "m missing": ({"m": None}, "1: m missing"),
    "A missing": ({"A": None}, "1: lora.A missing"),
    "B missing": ({"B": None}, "1: lora.B missing"),
    "weight missing": ({"W": None}, "1: linear.weight missing"),
    "A transposed": ({"A": torch.rand(RANK, 10)}, "needs A (in, rank) and B (rank, out)"),
    "B transposed": ({"B": torch.rand(24, RANK)}, "needs A (in, rank) and B (rank, out)"),
    "ranks that differ": ({"B": torch.rand(RANK + 1, 24)}, "needs A (in, rank)"),
    "A of other inputs": ({"A": torch.rand(9, RANK)}, "needs A (in, rank)"),
    "B of other outputs": ({"B": torch.rand(RANK, 23)}, "needs A (in, rank)"),
    "A flat": ({"A": torch.rand(10)}, "needs A (in, rank)"),
    "a convolution": ({"W": torch.rand(24, 10, 1)}, "expected 2 dimensions"),
    "integer magnitudes": ({"m": torch.ones(1, 10, dtype=torch.int64)}, "not a float"),
    "NaN": ({"A": torch.full((10, RANK), torch.nan)}, "use an earlier checkpoint"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_layer_is_refused(case, state, tmp_path):
    parts, reason = BROKEN[case]
    path = save(change(state, **parts), tmp_path / "state.safetensors")
    assert reason in refused(path, "--alpha", "4")


def test_layer_beside_a_plain_one_of_its_name_is_refused(state, tmp_path):
    path = save(state | {"1.weight": torch.ones(24, 10)}, tmp_path / "state.safetensors")
    assert "has ['weight'] beside linear.weight" in refused(path, "--alpha", "4")
    path = save(state | {"1.bias": torch.ones(24)}, tmp_path / "other.safetensors")
    assert "has ['bias'] beside linear.weight" in refused(path, "--alpha", "4")


@pytest.mark.parametrize("axis", ["in", "out"])
def test_flat_magnitude_of_a_square_layer_asks_for_the_axis_and_takes_it(state, tmp_path, axis):
    flat = state | {"5.m": state["5.m"].reshape(-1)}
    path = save(flat, tmp_path / "state.safetensors")
    message = refused(path, "--alpha", "4")
    assert "--axis in" in message
    assert "--axis out" in message
    assert "'5.m'" in message
    alone = {n: t for n, t in flat.items() if n.startswith("5.")}
    path = save(alone, tmp_path / "alone.safetensors")
    assert merge(path, "--alpha", "4", "--axis", axis).exit_code == 0
    written = load_file(tmp_path / "out/model.safetensors")
    want, other = (exact(flat, "5", axis=a) for a in ((0, 1) if axis == "in" else (1, 0)))
    assert oracle.ulps(written["5.weight"], want) <= 1
    assert oracle.ulps(written["5.weight"], other) > 1000


@pytest.mark.parametrize(
    ("m", "axis"), [((1, 10), "in"), ((10,), "in"), ((24, 1), "out"), ((24,), "out")]
)
def test_shape_of_the_magnitude_decides_the_axis_where_it_can(state, tmp_path, m, axis):
    magnitude = torch.rand(m) + 0.5
    path = save(change(state, m=magnitude), tmp_path / "state.safetensors")
    assert merge(path, "--alpha", "4").exit_code == 0
    written = load_file(tmp_path / "out/model.safetensors")
    want = exact(state | {"1.m": magnitude}, "1", axis=0 if axis == "in" else 1)
    assert oracle.ulps(written["1.weight"], want) <= 1
    other = "out" if axis == "in" else "in"
    with pytest.raises(AdapterError, match="contradicts the shape"):
        dora_export.merge(path, None, tmp_path / "second", alpha=4, axis=other)


def test_output_over_its_own_input_is_refused(state, tmp_path):
    path = save(state, tmp_path / "state.safetensors")
    with pytest.raises(DoraExportError, match="Pass an -o outside"):
        dora_export.merge(path, None, path, alpha=4, force=True)


def test_zero_column_is_refused_by_number_and_solved_by_the_option(state, tmp_path):
    W, A = state["1.linear.weight"].clone(), state["1.lora.A"].clone()
    W[:, 3], A[3] = 0, 0
    path = save(change(state, W=W, A=A), tmp_path / "state.safetensors")
    message = refused(path, "--alpha", "4")
    assert "zero in 1 columns (3)" in message
    assert "--zero-norm" in message
    assert merge(path, "--alpha", "4", "--zero-norm", "zero").exit_code == 0
    written = load_file(tmp_path / "out/model.safetensors")
    assert (written["1.weight"][:, 3] == 0).all()
    assert (written["1.weight"][:, 2] != 0).all()


def layer(out, inputs):
    return {"linear.weight": torch.randn(out, inputs), "lora.A": torch.randn(inputs, 2),
            "lora.B": torch.randn(2, out), "m": torch.rand(1, inputs) + 0.5}  # fmt: skip


def doubts(path, *layers, **said):
    state = {f"{i}.{n}": t for i, held in enumerate(layers) for n, t in held.items()}
    save_file(state, path)
    return dora_export.load_adapter(path, alpha=2.0, **said).doubts


def test_square_layers_alone_are_told_to_be_like_those_of_the_sibling(tmp_path):
    path = tmp_path / "state.safetensors"
    (doubt,) = doubts(path, layer(6, 6), layer(4, 4))
    assert "LinearWithDoRA, which cannot be merged, stores the same shapes" in doubt
    assert doubts(path, layer(6, 6), layer(6, 6), axis="in") == ()
    assert doubts(path, layer(6, 6), layer(6, 4)) == ()


@pytest.mark.parametrize("kept", ["lora.A", "lora.B"])
def test_one_factor_alone_is_no_layer_that_is_left_as_it_is(kept, tmp_path):
    path = tmp_path / "state.safetensors"
    lone = {n: t for n, t in layer(6, 4).items() if n in ("linear.weight", kept)}
    missing = "lora.B, m" if kept == "lora.A" else "lora.A, m"
    with pytest.raises(DoraExportError, match=f"1: {re.escape(missing)} missing"):
        doubts(path, layer(6, 4), lone)
    save_file(lone, path)
    with pytest.raises(DoraExportError, match=f"the layer: {re.escape(missing)} missing"):
        dora_export.load_adapter(path, alpha=2.0)


def test_adapter_names_its_file_and_a_folder_of_that_name_is_none(tmp_path):
    save_file(layer(6, 4), tmp_path / "state.safetensors")
    adapter = dora_export.load_adapter(tmp_path / "state.safetensors", alpha=2.0)
    assert adapter.files == (tmp_path / "state.safetensors",)
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(DoraExportError, match="no known format"):
        dora_export.load_adapter(tmp_path / "folder.safetensors", alpha=2.0)


def test_magnitudes_without_factors_are_refused_and_others_of_their_name_are_left_alone(tmp_path):
    path, lost = tmp_path / "state.safetensors", layer(6, 4)
    del lost["lora.A"], lost["lora.B"]
    with pytest.raises(DoraExportError, match=r"0: lora\.A, lora\.B missing"):
        doubts(path, lost)
    save_file(layer(6, 4) | {"other.m": torch.ones(3)}, path)
    (update,) = dora_export.load_adapter(path, alpha=2.0).updates
    assert update.target == "weight"
