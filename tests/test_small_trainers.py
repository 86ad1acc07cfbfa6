"""catid's DoRALayer and QDoRA: forwards written from their definitions.

Sources: github.com/catid/dora, dora.py; github.com/AnswerDotAI/fsdp_qlora, scripts/dora.py.
"""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional

import dora_export
from dora_export.adapters.qdora import A, B
from tests import oracle, small
from tests.trainers import distance, inspected, merged, refused

SHAPES = {"layers.0.q": (16, 16), "layers.0.up": (24, 16), "layers.0.down": (16, 24)}
R = 3


# --- catid ---


class DoRALayer(nn.Module):
    """Norms down the columns; lora_A on the left, without a scaling."""

    def __init__(self, linear, rank):
        super().__init__()
        out, inputs = linear.weight.shape
        self.weight, self.bias = linear.weight, linear.bias
        self.m = nn.Parameter(linear.weight.norm(dim=0, keepdim=True))
        self.lora_A = nn.Parameter(torch.zeros(out, rank))
        self.lora_B = nn.Parameter(torch.zeros(rank, inputs))

    def forward(self, x):
        adapted = self.weight + self.lora_A @ self.lora_B
        return functional.linear(x, self.m * adapted / adapted.norm(dim=0, keepdim=True), self.bias)


def model(seed=0):
    """A model with two adapted layers, one square, and one that is not; as if trained."""
    torch.manual_seed(seed)
    layers = nn.Sequential(
        DoRALayer(nn.Linear(10, 10), R),
        nn.ReLU(),
        DoRALayer(nn.Linear(10, 17), R),
        nn.LayerNorm(17),
    )
    with torch.no_grad():
        for name, parameter in layers.named_parameters():
            if "lora" in name:
                parameter.normal_(0, 0.4)
            elif name.endswith(".m"):
                parameter.mul_(0.6 + 0.8 * torch.rand_like(parameter))
    return layers.eval()


def definition(state, layer, axis=0, swapped=False):
    W, A, B, m = (oracle.float64(state[f"{layer}.{p}"])
                  for p in ("weight", "lora_B", "lora_A", "m"))  # fmt: skip
    return oracle.dora(W, B.T if swapped else A, A.T if swapped else B, m, 1.0, axis=axis)


def merge_own(path, *options):
    return small.run("merge", path, "-o", path.parent / "out", "--verify", "full", *options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_catid_file_becomes_the_plain_model(dtype, tmp_path):
    trained = model()
    state = {n: t.to(dtype) for n, t in trained.state_dict().items()}
    save_file(state, tmp_path / "state.safetensors")
    result = merge_own(tmp_path / "state.safetensors")
    assert result.exit_code == 0, result.stderr
    written = load_file(tmp_path / "out/model.safetensors")
    plain = nn.Sequential(nn.Linear(10, 10), nn.ReLU(), nn.Linear(10, 17), nn.LayerNorm(17))
    plain.load_state_dict(written)  # strict: every name, none besides
    for layer in ("0", "2"):
        assert oracle.ulps(written[f"{layer}.weight"], definition(state, layer)) <= 1
    assert distance(written["0.weight"], definition(state, "0", axis=1)) > 1e-2
    if dtype is torch.float32:
        x = torch.randn(32, 10)
        with torch.no_grad():
            assert (plain(x) - trained(x)).abs().max() <= 1e-5


CATID = {
    "B missing": (lambda t: t.pop("0.lora_B"), "lora_B missing"),
    "weight missing": (lambda t: t.pop("0.weight"), "weight missing"),
    "flat m": (lambda t: t.update({"0.m": torch.ones(10)}), "expected (1, 10)"),
    "m of the other axis": (lambda t: t.update({"2.m": torch.ones(17, 1)}), "expected (1, 10)"),
    "A transposed": (lambda t: t.update({"2.lora_A": torch.ones(R, 17)}), "lora_A (out, rank)"),
}


@pytest.mark.parametrize("case", CATID)
def test_broken_catid_file_is_refused(case, tmp_path):
    change, reason = CATID[case]
    state = dict(model().state_dict())
    change(state)
    save_file(state, tmp_path / "state.safetensors")
    result = merge_own(tmp_path / "state.safetensors")
    assert result.exit_code == 2
    assert reason in result.stderr


def test_catid_options_that_the_format_answers_are_refused(tmp_path):
    path = tmp_path / "state.safetensors"
    save_file(model().state_dict(), path)
    assert "Leave --alpha out" in merge_own(path, "--alpha", "2").stderr
    assert "Leave --axis out" in merge_own(path, "--axis", "out").stderr
    shown = inspected(path)
    for words in ("catid", "one per input", "in, by the format"):
        assert words in shown


# --- QDoRA ---


def qdora_forward(x, W, A, B, m, bias=0.0):
    """The bias goes through the scaling, too."""
    norm = np.linalg.norm(W + B @ A, axis=1)
    return (x @ W.T + bias + x @ A.T @ B.T) / norm * m


def write_qdora(folder, dtype=torch.float32, wrapper="", biases=()):
    torch.manual_seed(2)
    base, adapter, want = {}, {}, {}
    for layer, shape in SHAPES.items():
        W = (torch.randn(shape) * 0.2).to(dtype)
        A, B = torch.randn(R, shape[1]) * 0.3, torch.randn(shape[0], R) * 0.2
        m = W.float().norm(dim=1) * (0.6 + 0.8 * torch.rand(shape[0]))
        base[f"{layer}.weight"] = W
        key = f"{wrapper}{layer}"
        adapter |= {f"{key}.dora_layer.{wrapper}lora_A.weight": A,
                    f"{key}.dora_layer.{wrapper}lora_B.weight": B,
                    f"{key}.magnitude_layer.magnitude": m}  # fmt: skip
        x = np.eye(shape[1])
        want[f"{layer}.weight"] = qdora_forward(x, *map(oracle.float64, (W, A, B, m))).T
    base |= {f"{n}.bias": torch.randn(SHAPES[n][0]).to(dtype) for n in biases}
    small.write_base(folder / "base", base)
    save_file(adapter, folder / "adapter.safetensors")
    return base, adapter, want


def qdora_paths(folder):
    return folder / "base", folder / "adapter.safetensors", folder / "out"


@pytest.mark.parametrize("wrapper", ["", "_fsdp_wrapped_module."])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_qdora_weights_are_those_of_the_forward(dtype, wrapper, tmp_path):
    base, adapter, want = write_qdora(tmp_path, dtype, wrapper)
    written = merged(*qdora_paths(tmp_path))
    for name, weight in want.items():
        assert oracle.ulps(written[name], weight) <= 1
        key = f"{wrapper}{name.removesuffix('.weight')}.dora_layer.{wrapper}lora"
        A, B = (oracle.float64(adapter[f"{key}_{p}.weight"]) for p in "AB")
        assert distance(written[name], oracle.lora(oracle.float64(base[name]), A, B, 1.0)) > 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_qdora_bias_goes_through_the_scaling(dtype, tmp_path):
    base, adapter, _ = write_qdora(tmp_path, dtype, biases=["layers.0.q", "layers.0.up"])
    written = merged(*qdora_paths(tmp_path))
    for layer in SHAPES:
        assert (f"{layer}.bias" in written) == (layer != "layers.0.down")
    for layer in ("layers.0.q", "layers.0.up"):
        W, b = (oracle.float64(base[f"{layer}.{p}"]) for p in ("weight", "bias"))
        parts = (
            "dora_layer.lora_A.weight",
            "dora_layer.lora_B.weight",
            "magnitude_layer.magnitude",
        )
        A, B, m = (oracle.float64(adapter[f"{layer}.{part}"]) for part in parts)
        got = written[f"{layer}.bias"]
        assert oracle.ulps(got, qdora_forward(np.zeros(W.shape[1]), W, A, B, m, b)) <= 1
        for wrong in (
            b,
            b * m,
            b * m / np.linalg.norm(W, axis=1),
            b / np.linalg.norm(W + B @ A, axis=1),
        ):
            assert oracle.ulps(got, wrong) > 10


def test_qdora_layer_computes_the_forward_bias_and_all_and_verification_agrees(tmp_path):
    base, adapter, _ = write_qdora(tmp_path, biases=["layers.0.q"])
    paths = qdora_paths(tmp_path)
    written = merged(*paths)
    assert dora_export.verify(*paths).exit_code == 0
    tensors = [oracle.float64(t) for t in (
        base["layers.0.q.weight"], adapter["layers.0.q.dora_layer.lora_A.weight"],
        adapter["layers.0.q.dora_layer.lora_B.weight"],
        adapter["layers.0.q.magnitude_layer.magnitude"], base["layers.0.q.bias"])]  # fmt: skip
    x = np.random.default_rng(0).standard_normal((5, 16))
    ours = x @ oracle.float64(written["layers.0.q.weight"]).T
    ours += oracle.float64(written["layers.0.q.bias"])
    assert np.abs(ours - qdora_forward(x, *tensors)).max() <= 1e-6 * np.abs(ours).max()
    stored = load_file(tmp_path / "out/model.safetensors")
    stored["layers.0.q.bias"] = base["layers.0.q.bias"]  # as a merge that forgets it leaves it
    save_file(stored, tmp_path / "out/model.safetensors", {"format": "pt"})
    report = dora_export.verify(*paths)
    assert report.exit_code == 1
    assert [t.name for t in report.tensors if t.status == "wrong"] == ["layers.0.q.bias"]


def test_qdora_bias_of_a_row_without_direction_is_refused(tmp_path):
    write_qdora(tmp_path, biases=["layers.0.q"])
    for file, name in (("base/model.safetensors", "layers.0.q.weight"),
                       ("adapter.safetensors", "layers.0.q.dora_layer.lora_B.weight")):  # fmt: skip
        small.edit_tensors(tmp_path / file, lambda t, n=name: (t[n][3].zero_(), t)[1])
    message = refused(*qdora_paths(tmp_path), "--zero-norm", "zero")
    assert "layers.0.q.bias: ||W + s B A|| is zero in 1 rows (first: 3)" in message
    assert "no defined value" in message


QDORA = {
    "m missing": (lambda t: t.pop("layers.0.q.magnitude_layer.magnitude"), "magnitude missing"),
    "m of another length": (
        lambda t: t.update({"layers.0.up.magnitude_layer.magnitude": torch.ones(16)}),
        "magnitude (out,)"),
    "unknown": (lambda t: t.update({"layers.0.q.base_layer.W_q": torch.ones(3)}), "unknown tensor"),
    **{f"{part} of {shape}": (
        lambda t, p=part, s=shape: t.update({f"layers.0.q.{p}": torch.ones(s)}),
        "lora_A (rank, in), lora_B (out, rank)")
       for part, shape in ((A, (16,)), (A, (4, 16)), (B, (16,)), (B, (16, 4)), (A, (3, 4, 4)))},
}  # fmt: skip


@pytest.mark.parametrize("case", QDORA)
def test_broken_qdora_file_is_refused(case, tmp_path):
    write_qdora(tmp_path)
    change, reason = QDORA[case]
    small.edit_tensors(tmp_path / "adapter.safetensors", lambda t: (change(t), t)[1])
    assert reason in refused(*qdora_paths(tmp_path))


def test_qdora_options_and_inspection(tmp_path):
    write_qdora(tmp_path)
    paths = qdora_paths(tmp_path)
    assert "Leave --alpha out" in refused(*paths, "--alpha", "2")
    assert "Leave --axis out" in refused(*paths, "--axis", "in")
    shown = inspected(paths[1], "--base", paths[0])
    for words in ("QDoRA", "out, by the format", "dequantises to", "fits"):
        assert words in shown
