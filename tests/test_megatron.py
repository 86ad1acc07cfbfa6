"""Megatron-Bridge adapters: fused layers, split onto the base's names.

The forward is that of github.com/NVIDIA-NeMo/Megatron-Bridge, src/megatron/bridge/peft/
dora_layers.py (DoRALinear), on a fused weight built as param_mapping.py does it; both written from
their definition, since Megatron needs GPUs to install.
"""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import dora_export
from tests import oracle, small
from tests.trainers import distance, inspected, merged, refused

HIDDEN, HEAD, GROUPS, EACH, INNER, R, ALPHA = 16, 4, 2, 2, 24, 3, 7.0
CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN,
          "num_attention_heads": GROUPS * EACH, "num_key_value_heads": GROUPS,
          "tie_word_embeddings": False}  # fmt: skip
LAYER = "model.layers.0"
Q, K, V, OUT = (f"{LAYER}.self_attn.{p}_proj" for p in "qkvo")
GATE, UP, DOWN = (f"{LAYER}.mlp.{p}_proj" for p in ("gate", "up", "down"))
SHAPES = {Q: (16, 16), K: (8, 16), V: (8, 16), OUT: (16, 16), GATE: (24, 16), UP: (24, 16),
          DOWN: (16, 24)}  # fmt: skip
FUSED = {"self_attention.linear_qkv": (Q, K, V), "self_attention.linear_proj": (OUT,),
         "mlp.linear_fc1": (GATE, UP), "mlp.linear_fc2": (DOWN,)}  # fmt: skip


def fuse(parts):
    """Megatron's rows from Hugging Face's: group by group its queries, its key, its value."""
    if len(parts) != 3:
        return np.concatenate(parts)
    q, k, v = parts
    rows = []
    for group in range(GROUPS):
        rows += [q[group * EACH * HEAD : (group + 1) * EACH * HEAD]]
        rows += [t[group * HEAD : (group + 1) * HEAD] for t in (k, v)]
    return np.concatenate(rows)


def split(fused, names):
    """The reverse."""
    if len(names) == 1:
        return [fused]
    if len(names) == 2:
        return np.split(fused, 2)
    q, k, v = [], [], []
    for group in fused.reshape(GROUPS, (EACH + 2) * HEAD, -1):
        q.append(group[: EACH * HEAD])
        k.append(group[EACH * HEAD : (EACH + 1) * HEAD])
        v.append(group[(EACH + 1) * HEAD :])
    return [np.concatenate(rows) for rows in (q, k, v)]


def forward(x, W, A, B, m):
    """Activations of the wrapped fused layer; without a magnitude, of plain LoRA."""
    out = x @ W.T + ALPHA / R * (x @ A.T @ B.T)
    return out if m is None else m / np.linalg.norm(W + ALPHA / R * (B @ A), axis=1) * out


def write(folder, dtype=torch.float32, prefix="", dora=True, biases=(), **config):
    torch.manual_seed(9)
    base = {f"{n}.weight": (torch.randn(s) * 0.2).to(dtype) for n, s in SHAPES.items()}
    base |= {f"{n}.bias": torch.randn(SHAPES[n][0]).to(dtype) for n in biases}
    small.write_base(folder / "base", base, config=CONFIG | config)
    adapter, want = {}, {}
    for layer, names in FUSED.items():
        W = fuse([oracle.float64(base[f"{n}.weight"]) for n in names])
        A, B = torch.randn(R, W.shape[1]) * 0.3, torch.randn(W.shape[0], R) * 0.2
        m = torch.tensor(np.linalg.norm(W, axis=1)).float() * (0.6 + 0.8 * torch.rand(len(W)))
        key = f"{prefix}decoder.layers.0.{layer}.adapter"
        adapter |= {f"{key}.linear_in.weight": A, f"{key}.linear_out.weight": B}
        if dora:
            adapter[f"{key}.weight_magnitude"] = m
        arrays = [oracle.float64(t) for t in (A, B)] + [oracle.float64(m) if dora else None]
        W = forward(np.eye(W.shape[1]), W, *arrays).T
        want |= dict(zip(names, split(W, names), strict=True))
    save_file(adapter, folder / "adapter.safetensors")
    return base, adapter, want


def paths(folder):
    return folder / "base", folder / "adapter.safetensors", folder / "out"


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "model.module."])
@pytest.mark.parametrize("dora", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_merged_weights_are_those_of_the_fused_forward(dtype, dora, prefix, tmp_path):
    base, _, want = write(tmp_path, dtype, prefix, dora)
    written = merged(*paths(tmp_path), "--alpha", "7")
    assert len(want) == 7
    for name, weight in want.items():
        assert oracle.ulps(written[f"{name}.weight"], weight) <= 1, name
        assert distance(written[f"{name}.weight"], oracle.float64(base[f"{name}.weight"])) > 0.05


@pytest.mark.parametrize("mistake", ["plain rows of q", "value before key", "up before gate"])
def test_wrong_splits_fail_the_tolerance(mistake, tmp_path):
    base, adapter, _ = write(tmp_path)
    written = merged(*paths(tmp_path), "--alpha", "7")
    layer, name = "self_attention.linear_qkv", Q
    rows = range(16)
    if mistake == "value before key":
        name, rows = K, [*range(12, 16), *range(28, 32)]
    if mistake == "up before gate":
        layer, name, rows = "mlp.linear_fc1", GATE, range(24, 48)
    A, B, m = (oracle.float64(adapter[f"decoder.layers.0.{layer}.adapter.{p}"])
               for p in ("linear_in.weight", "linear_out.weight", "weight_magnitude"))  # fmt: skip
    W = oracle.float64(base[f"{name}.weight"])
    wrong = oracle.dora(W, A, B[list(rows)], m[list(rows)], ALPHA / R)
    assert distance(written[f"{name}.weight"], wrong) > 0.05


def test_alpha_is_asked_for(tmp_path):
    write(tmp_path)
    assert "Pass --alpha" in refused(*paths(tmp_path))
    assert "Leave --axis out" in refused(*paths(tmp_path), "--alpha", "7", "--axis", "in")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_biases_of_the_fused_layer_are_scaled_and_others_are_not(dtype, tmp_path):
    base, adapter, _ = write(tmp_path, dtype, biases=(Q, K, V, OUT, DOWN))
    written = merged(*paths(tmp_path), "--alpha", "7")
    for name in (OUT, DOWN):  # added behind the scaling
        assert torch.equal(written[f"{name}.bias"], base[f"{name}.bias"])
    key = "decoder.layers.0.self_attention.linear_qkv.adapter"
    A, B, m = (oracle.float64(adapter[f"{key}.{p}"])
               for p in ("linear_in.weight", "linear_out.weight", "weight_magnitude"))  # fmt: skip
    W = fuse([oracle.float64(base[f"{n}.weight"]) for n in (Q, K, V)])
    b = fuse([oracle.float64(base[f"{n}.bias"]) for n in (Q, K, V)])
    norm = np.linalg.norm(W + ALPHA / R * (B @ A), axis=1)
    right, unscaled = (split(t[:, None], (Q, K, V)) for t in (m / norm * b, b))
    wrong = split((m / norm)[:, None], (Q, K, V))[0][::-1] * unscaled[0]
    for name, want, other in zip((Q, K, V), right, unscaled, strict=True):
        assert oracle.ulps(written[f"{name}.bias"], want.ravel()) <= 1, name
        assert distance(written[f"{name}.bias"], other.ravel()) > 0.05
    assert distance(written[f"{Q}.bias"], wrong.ravel()) > 0.05


def test_model_that_fuses_otherwise_is_refused(tmp_path):
    write(tmp_path, model_type="qwen3_next")
    assert "model_type 'qwen3_next'" in refused(*paths(tmp_path), "--alpha", "7")


def test_half_of_a_tensor_parallel_adapter_is_refused(tmp_path):
    write(tmp_path)
    for layer, words in (("mlp.linear_fc1", "gate and up"), ("self_attention.linear_qkv", "heads")):
        small.edit_tensors(
            tmp_path / "adapter.safetensors",
            lambda t, layer=layer: {n: v[: len(v) // 2] if layer in n and "_in." not in n else v
                                    for n, v in t.items()},
        )  # fmt: skip
        assert words in refused(*paths(tmp_path), "--alpha", "7")
        write_again(tmp_path)


def write_again(folder):
    (folder / "adapter.safetensors").unlink()
    write(folder)


def test_head_size_must_be_known(tmp_path):
    write(tmp_path, hidden_size=None)
    assert "the size of a head" in refused(*paths(tmp_path), "--alpha", "7")


KEY = "decoder.layers.0.mlp.linear_fc2.adapter"
BROKEN = {
    "m missing": (lambda t: t.pop(f"{KEY}.weight_magnitude"),
                  "missing for 1 of 4 layers (first: decoder.layers.0.mlp.linear_fc2)"),
    "A missing": (lambda t: t.pop(f"{KEY}.linear_in.weight"), "linear_in.weight missing"),
    "m of another length": (
        lambda t: t.update({f"{KEY}.weight_magnitude": torch.ones(3)}), "weight_magnitude (out,)"),
    **{f"{part} of {shape}": (
        lambda t, p=part, s=shape: t.update({f"{KEY}.{p}.weight": torch.ones(s)}),
        "linear_in (rank, in), linear_out (out, rank)")
       for part, shape in (("linear_in", (R,)), ("linear_in", (R, 4, 6)), ("linear_out", (16,)),
                           ("linear_out", (16, R + 1)))},
    "B missing": (lambda t: t.pop(f"{KEY}.linear_out.weight"), "linear_out.weight missing"),
    "not of a layer": (
        lambda t: t.update({"head.adapter.linear_in.weight": torch.ones(3, 16)}), "not known"),
    "experts": (
        lambda t: t.update({"decoder.layers.0.mlp.experts.linear_fc1.adapter.linear_in.weight":
                            torch.ones(3, 16)}), "not known"),
    "base weights": (lambda t: t.update({"decoder.final_layernorm.weight": torch.ones(16)}),
                     "unknown tensor"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_file_that_does_not_add_up_is_refused(case, tmp_path):
    write(tmp_path)
    change, reason = BROKEN[case]
    small.edit_tensors(tmp_path / "adapter.safetensors", lambda t: (change(t), t)[1])
    assert reason in refused(*paths(tmp_path), "--alpha", "7")


def test_sharded_checkpoint_is_refused_with_the_command_that_gathers_it(tmp_path):
    write(tmp_path)
    (tmp_path / "iter").mkdir()
    (tmp_path / "iter/__0_0.distcp").write_bytes(b"")
    message = refused(tmp_path / "base", tmp_path / "iter", tmp_path / "out", "--alpha", "7")
    assert "dcp_to_torch" in message


def test_inspection_names_trainer_axis_and_doubt(tmp_path):
    write(tmp_path)
    base, adapter, _ = paths(tmp_path)
    shown = inspected(adapter, "--alpha", "7", "--base", base)
    for words in ("Megatron-Bridge", "out, by the format", "fits", "tensor parallelism",
                  "DoRA, magnitude one per output", "scaling      2.33333\n"):  # fmt: skip
        assert words in shown


def test_inspection_of_plain_lora_says_nothing_of_magnitudes(tmp_path):
    write(tmp_path, dora=False)
    shown = inspected(tmp_path / "adapter.safetensors", "--alpha", "7")
    assert "LoRA, magnitude none" in shown
    assert f"rank         {R}\n" in shown
    updates = dora_export.load_adapter(tmp_path / "adapter.safetensors", alpha=7).updates
    assert {(u.kind, u.scales_bias) for u in updates} == {("lora", False)}
    assert "axis" not in shown
    assert "parallelism" not in shown
