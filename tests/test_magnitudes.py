"""Magnitudes far from the norms they were trained from are told, with the layers and the cause.

Adapters here are trained a little (m within a tenth of ``||W + s B A||``), as real ones are, so
that what is wrong with base, scaling or axis stands out.
"""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import dora_export
from dora_export.checkpoints import open_checkpoint
from dora_export.errors import PlanError
from dora_export.onnx import trace
from dora_export.onnx.model import Made
from dora_export.plan import Settings, plan_merge
from dora_export.verification import magnitudes
from tests import oracle, small
from tests.test_onnx_into import arrays, save_graph

# Name -> shape as it is stored.
SHAPES = {
    "model.layers.0.attn.q_proj": (48, 48),
    "model.layers.0.mlp.down_proj": (24, 48),
    "model.layers.1.attn.q_proj": (48, 48),
    "model.layers.1.mlp.down_proj": (24, 48),
}
WEIGHTS = [f"{name}.weight" for name in SHAPES]
Q, DOWN = "model.layers.{0,1}.attn.q_proj.weight", "model.layers.{0,1}.mlp.down_proj.weight"
TOLD = "magnitudes are far from what training leaves"
R, ALPHA = 4, 6.0


def product(tensors, name):
    return (ALPHA / R) * (tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"])


def write(folder, *, dtype=torch.bfloat16, axis=1, near=0.1, keep=0.1):
    """A base and a trained PEFT adapter: m is the norm along ``axis``, but for ``near`` of it.

    Norms of rows and of columns differ, by a factor in each.
    """
    make = torch.Generator().manual_seed(4)
    base = {"model.norm.weight": torch.ones(48, dtype=dtype)}
    adapter = {}
    for name, (out, inner) in SHAPES.items():
        spread = 0.2 + torch.rand(out, 1, generator=make) * torch.rand(1, inner, generator=make) * 4
        W = (torch.randn(out, inner, generator=make) * spread * 0.1).to(dtype)
        key = small.PREFIX + name
        adapter[f"{key}.lora_A.weight"] = torch.randn(R, inner, generator=make) * 0.1
        adapter[f"{key}.lora_B.weight"] = torch.randn(out, R, generator=make) * keep
        base[f"{name}.weight"] = W
        norm = (W.float() + product(adapter, key)).norm(dim=axis)
        off = 1 + near * (2 * torch.rand(norm.shape, generator=make) - 1)
        adapter[f"{key}.lora_magnitude_vector"] = norm * off
    small.write_base(folder / "base", base)
    small.write_adapter(folder / "adapter", adapter, r=R, lora_alpha=ALPHA)
    return folder / "base", folder / "adapter"


def times(path, factor, end):
    """Multiply the tensors whose names end in ``end``, in place."""
    small.edit_tensors(path, lambda t: {n: v * factor if n.endswith(end) else v
                                        for n, v in t.items()})  # fmt: skip


def warnings(base, adapter, **options):
    return dora_export.merge(base, adapter, base.parent / "out", dry_run=True, **options).warnings


def test_trained_magnitudes_are_no_cause_for_a_word(tmp_path):
    base, adapter = write(tmp_path)
    assert warnings(base, adapter) == ()
    assert dora_export.inspect(adapter, base).warnings == ()
    looked = magnitudes.looks(plan(base, adapter), 0)
    assert [look.step.name for look in looked] == WEIGHTS
    assert all(0.01 < look.off < 0.1 for look in looked)


def plan(base, adapter):
    return plan_merge(open_checkpoint(base), dora_export.load_adapter(adapter), Settings())


def test_another_base_is_told_with_the_layers_that_differ(tmp_path):
    base, adapter = write(tmp_path)
    times(base / "model.safetensors", 0.5, "q_proj.weight")
    times(adapter / "adapter_model.safetensors", 0.5, "q_proj.lora_B.weight")
    (warning,) = warnings(base, adapter)
    assert TOLD in warning
    assert f"in 2 of 4 layers: {Q}." in warning
    assert "down_proj" not in warning
    assert "differs from 1 by 1.0" in warning  # m is twice the norm
    assert "Check that this is the base it was trained on, and the scaling" in warning


def test_a_single_layer_is_told(tmp_path):
    base, adapter = write(tmp_path)
    times(adapter / "adapter_model.safetensors", 1.7, "1.mlp.down_proj.lora_magnitude_vector")
    (warning,) = warnings(base, adapter)
    assert "in 1 of 4 layers: model.layers.1.mlp.down_proj.weight." in warning


def test_what_is_off_by_less_than_half_is_not_told(tmp_path):
    base, adapter = write(tmp_path, near=0.01)
    times(adapter / "adapter_model.safetensors", 1.45, "lora_magnitude_vector")
    assert warnings(base, adapter) == ()
    times(adapter / "adapter_model.safetensors", 1.55 / 1.45, "lora_magnitude_vector")
    assert len(warnings(base, adapter)) == 1


def test_a_scaling_that_drowns_the_base_is_told_as_such(tmp_path):
    base, adapter = write(tmp_path, near=0.02, keep=0.005)
    assert warnings(base, adapter) == ()
    small.edit_json(adapter / "adapter_config.json", lora_alpha=ALPHA * 400)
    (warning,) = warnings(base, adapter)
    assert f"in 4 of 4 layers: {Q}, {DOWN}." in warning
    assert "the adapter's product is too large" in warning
    assert "check the scaling (alpha and rank" in warning
    small.edit_json(adapter / "adapter_config.json", lora_alpha=ALPHA * 4000)
    with pytest.raises(
        PlanError, match=r"times the norms .* product is too large .* --magnitude-is-not-"
    ):
        warnings(base, adapter)


def test_the_norms_of_the_other_axis_are_told_as_such(tmp_path):
    """A flat dora_scale on a square layer leaves the axis to --axis."""
    make = torch.Generator().manual_seed(9)
    W = torch.randn(32, 32, generator=make) * torch.logspace(-1.5, 1.5, 32)[:, None] * 0.1
    A, B = torch.randn(R, 32, generator=make) * 0.05, torch.randn(32, R, generator=make) * 0.05
    file = tmp_path / "pytorch_lora_weights.safetensors"
    small.write_base(tmp_path / "base", {"unet.proj.weight": W, "unet.norm.weight": torch.ones(8)})
    save_file({"unet.proj.lora_A.weight": A, "unet.proj.lora_B.weight": B,
               "unet.proj.dora_scale": (W + B @ A).norm(dim=0)}, file)  # fmt: skip
    assert not any(TOLD in w for w in warnings(tmp_path / "base", file, axis="in"))
    (warning,) = [w for w in warnings(tmp_path / "base", file, axis="out") if TOLD in w]
    assert "They are the norms along the other axis" in warning
    assert "--axis" in warning


def conv1d_and_embedding(folder):
    """GPT-2's layers, stored (in, out), and an embedding: norms run down stored columns."""
    make = torch.Generator().manual_seed(6)
    shapes = {"transformer.h.0.attn.c_attn": (48, 24), "transformer.wte": (200, 48)}
    base = {f"{n}.weight": torch.randn(s, generator=make) * 0.1 for n, s in shapes.items()}
    adapter = {}
    for name, (inner, out) in shapes.items():
        A, B = (
            torch.randn(R, inner, generator=make) * 0.1,
            torch.randn(out, R, generator=make) * 0.1,
        )
        V = base[f"{name}.weight"].T + ALPHA / R * B @ A
        key = small.PREFIX + name
        embedding = name.endswith("wte")
        keys = (
            ("lora_embedding_A", "lora_embedding_B")
            if embedding
            else ("lora_A.weight", "lora_B.weight")
        )
        adapter |= {f"{key}.{k}": v for k, v in zip(keys, (A, B), strict=True)}
        adapter[f"{key}.lora_magnitude_vector"] = V.norm(dim=1)
    config = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}
    small.write_base(folder / "base", base, config=config)
    small.write_adapter(folder / "adapter", adapter, r=R, lora_alpha=ALPHA,
                        target_modules=["c_attn", "wte"])  # fmt: skip
    return folder / "base", folder / "adapter", [f"{n}.weight" for n in shapes]


@pytest.mark.parametrize("rows", [None, 64, 16])
def test_norms_down_stored_columns_are_looked_at_in_sampled_rows(rows, tmp_path, monkeypatch):
    base, adapter, names = conv1d_and_embedding(tmp_path)
    if rows is not None:
        monkeypatch.setattr(magnitudes, "CELLS", 1)
        monkeypatch.setattr(magnitudes, "MIN_ROWS", rows)
    assert warnings(base, adapter) == ()
    looked = magnitudes.looks(plan(base, adapter), 0)
    assert [look.step.name for look in looked] == names
    most = 1e-6 if rows is None else 2 / rows**0.5
    assert all(look.off < most for look in looked)
    assert any(look.off > 1e-6 for look in looked) == (rows is not None)
    times(adapter / "adapter_model.safetensors", 1.7, "wte.lora_magnitude_vector")
    (warning,) = warnings(base, adapter)
    assert "in 1 of 2 layers: transformer.wte.weight." in warning


def test_few_rows_that_hold_most_raise_no_false_alarm(tmp_path, monkeypatch):
    base, adapter, _ = conv1d_and_embedding(tmp_path)
    monkeypatch.setattr(magnitudes, "CELLS", 1)
    monkeypatch.setattr(magnitudes, "MIN_ROWS", 16)
    table = load_file(base / "model.safetensors")
    table["transformer.wte.weight"][101:104] *= 50  # none of the sampled ones
    tensors = load_file(adapter / "adapter_model.safetensors")
    key = f"{small.PREFIX}transformer.wte"
    V = table["transformer.wte.weight"].T + ALPHA / R * (
        tensors[f"{key}.lora_embedding_B"] @ tensors[f"{key}.lora_embedding_A"]
    )
    tensors[f"{key}.lora_magnitude_vector"] = V.norm(dim=1)
    save_file(table, base / "model.safetensors")
    save_file(tensors, adapter / "adapter_model.safetensors")
    assert warnings(base, adapter) == ()
    monkeypatch.setattr(magnitudes, "CONFIRMED", 0)  # the estimate alone would have told
    assert len(warnings(base, adapter)) == 1


@pytest.mark.parametrize("kind", ["out", "in"])
def test_convolutions_and_eps_of_lycoris_are_looked_at(kind, tmp_path):
    make = torch.Generator().manual_seed(8)
    W = torch.randn(12, 8, 3, 3, generator=make) * 0.1
    down, up = (
        torch.randn(R, 8, 3, 3, generator=make) * 0.1,
        torch.randn(12, R, 1, 1, generator=make) * 0.1,
    )
    V = oracle.float64(W) + ALPHA / R * np.tensordot(
        oracle.float64(up)[:, :, 0, 0], oracle.float64(down), 1
    )
    kept = (1, 2, 3) if kind == "out" else (0, 2, 3)
    norm = torch.tensor(np.sqrt((V * V).sum(axis=kept, keepdims=True)), dtype=torch.float32)
    file = tmp_path / "adapter.safetensors"
    small.write_base(tmp_path / "base", {"conv.weight": W, "norm.weight": torch.ones(8)})
    for factor, told in ((1.0, 0), (1.6, 1)):
        save_file({"lycoris_conv.lora_down.weight": down, "lycoris_conv.lora_up.weight": up,
                   "lycoris_conv.alpha": torch.tensor(ALPHA),
                   "lycoris_conv.dora_scale": norm * factor}, file)  # fmt: skip
        found = warnings(tmp_path / "base", file)
        assert [TOLD in w for w in found] == [True] * told, found
    (look,) = magnitudes.looks(plan(tmp_path / "base", file), 0)
    assert abs(look.off - 0.6) < 1e-5


def test_a_scaling_that_is_given_is_held_against_the_base_in_the_same_file(tmp_path):
    make = torch.Generator().manual_seed(9)
    W = torch.randn(24, 32, generator=make) * 0.1
    A, B = torch.randn(32, R, generator=make) * 0.01, torch.randn(R, 24, generator=make) * 0.05
    m = (W + ALPHA * (A @ B).T).norm(dim=0, keepdim=True)
    path = tmp_path / "state.safetensors"
    save_file({"0.linear.weight": W, "0.lora.A": A, "0.lora.B": B, "0.m": m}, path)
    right = dora_export.merge(path, None, tmp_path / "out", dry_run=True, alpha=ALPHA)
    assert not any(TOLD in w for w in right.warnings)
    wrong = dora_export.merge(path, None, tmp_path / "out", dry_run=True, alpha=ALPHA * 500)
    assert any("check the scaling" in w and "--alpha" in w for w in wrong.warnings)


def test_magnitudes_said_to_be_divided_belong_near_one(tmp_path):
    base, adapter = write(tmp_path)
    (warning,) = warnings(base, adapter, magnitude_is_normalised=True)
    assert "m, divided by the norm as it is, differs from 1 by" in warning
    tensors = load_file(adapter / "adapter_model.safetensors")
    ones = {n: torch.ones_like(v) * 1.1 if "magnitude" in n else v for n, v in tensors.items()}
    save_file(ones, adapter / "adapter_model.safetensors")
    assert warnings(base, adapter, magnitude_is_normalised=True) == ()


def test_rows_without_direction_say_nothing(tmp_path):
    base, adapter = write(tmp_path)

    def zero(tensors):
        return {n: torch.zeros_like(v) if n.endswith(("down_proj.weight", "lora_B.weight")) else v
                for n, v in tensors.items()}  # fmt: skip

    for file in (base / "model.safetensors", adapter / "adapter_model.safetensors"):
        small.edit_tensors(file, zero)
    assert [w for w in warnings(base, adapter, zero_norm="zero") if "down_proj" in w] == []


def test_many_layers_are_drawn_from(tmp_path, monkeypatch):
    base, adapter = write(tmp_path)
    monkeypatch.setattr(magnitudes, "LAYERS", 3)
    looked = magnitudes.looks(plan(base, adapter), 0)
    assert len(looked) == 3
    assert len({look.step.name for look in looked}) == 3


def test_each_of_several_adapters_is_held_against_the_unmerged_base(tmp_path):
    base, first = write(tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    for file in first.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    times(other / "adapter_model.safetensors", 1.8, "magnitude_vector")
    report = dora_export.merge(base, [first, other], tmp_path / "out", dry_run=True)
    (warning,) = [w for w in report.warnings if TOLD in w]
    assert warning.startswith("'other': magnitudes are far")


def test_ai_toolkits_norm_leaves_the_scaling_out(tmp_path):
    make = torch.Generator().manual_seed(3)
    W = torch.randn(24, 16, generator=make) * 0.1
    A, B = torch.randn(R, 16, generator=make) * 0.3, torch.randn(24, R, generator=make) * 0.3
    file = tmp_path / "adapter.safetensors"
    small.write_base(tmp_path / "base", {"layer.weight": W, "norm.weight": torch.ones(8)})
    for factor, told in ((1.0, 0), (1.6, 1)):
        m = (W + B @ A).norm(dim=1) * factor
        save_file({"lora_unet_layer.lora_down.weight": A, "lora_unet_layer.lora_up.weight": B,
                   "lora_unet_layer.magnitude": m}, file)  # fmt: skip
        found = warnings(tmp_path / "base", file, alpha=20 * R)
        assert [TOLD in w for w in found] == [True] * told, found


def test_every_command_tells_it_and_the_manifest_keeps_it(tmp_path):
    base, adapter = write(tmp_path, dtype=torch.float32)
    times(base / "model.safetensors", 0.5, "proj.weight")
    merged = small.run("merge", base, adapter, "-o", tmp_path / "out")
    assert merged.exit_code == 0, merged.stderr
    assert f"warning: {TOLD}" in merged.stderr
    kept = json.loads((tmp_path / "out/dora_export.json").read_text())["notes"]
    assert any(TOLD in note for note in kept)
    inspected = small.run("inspect", adapter, "--base", base)
    assert f"  warning: {TOLD}" in inspected.stdout
    verified = small.run("verify", base, adapter, tmp_path / "out")
    assert verified.exit_code == 0
    assert f"note: {TOLD}" in verified.stdout
    assert "prompt of the training data" in verified.stdout  # whole, not cut off
    nearest = ("convert", adapter, "--base", base, "--rank", 2, "--to", "lora")
    for command in (nearest, ("convert", adapter, "--base", base, "--to", "mlx")):
        converted = small.run(*command, "-o", tmp_path / f"as-{command[-1]}")
        assert converted.exit_code == 0, converted.stderr
        assert f"warning: {TOLD}" in converted.stderr


def test_the_graph_command_tells_it(tmp_path, monkeypatch):
    """Of a graph with merged weights, with swapped adapters, and traced from the merge."""
    base, adapter = write(tmp_path, dtype=torch.float32)
    times(base / "model.safetensors", 0.5, "proj.weight")
    graph = save_graph(tmp_path / "graph/model.onnx", arrays(load_file(base / "model.safetensors")))
    into = ("onnx", base, adapter, "--into", graph, "--no-verify", "-o")
    for more, told in (((), TOLD), (("--adapters",), f"'adapter': {TOLD}")):
        made = small.run(*into, tmp_path / f"out{len(more)}", *more)
        assert made.exit_code == 0, made.stderr
        assert f"warning: {told}" in made.stderr

    def trace_make(request, folder):
        shutil.copy(graph, request.folder / "model.onnx")
        return Made(("model.onnx",), {}, ())

    monkeypatch.setattr(trace, "check", lambda request: None)
    monkeypatch.setattr(trace, "make", trace_make)
    traced = small.run("onnx", base, adapter, "--no-verify", "-o", tmp_path / "traced")
    assert traced.exit_code == 0, traced.stderr
    assert traced.stderr.count(f"warning: {TOLD}") == 1


def test_dry_run_and_inspect_refuse_what_a_merge_refuses(tmp_path):
    base, adapter = write(tmp_path)
    times(adapter / "adapter_model.safetensors", 1e3, "lora_magnitude_vector")
    dry = small.run("merge", base, adapter, "-o", tmp_path / "out", "--dry-run")
    assert dry.exit_code == 2
    assert "times the norms of the rows" in dry.stderr
    inspected = small.run("inspect", adapter, "--base", base)
    assert "does not fit" in inspected.stdout
    assert "times the norms of the rows" in inspected.stdout
    converted = small.run("convert", adapter, "--base", base, "--to", "mlx", "-o", tmp_path / "mlx")
    assert "times the norms of the rows" in converted.stderr
    times(adapter / "adapter_model.safetensors", float("nan"), "lora_A.weight")
    dry = small.run("merge", base, adapter, "-o", tmp_path / "out", "--dry-run")
    assert (dry.exit_code, "NaN or inf" in dry.stderr) == (2, True)
