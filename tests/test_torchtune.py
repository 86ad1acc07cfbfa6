"""torchtune's adapters and its exports to PEFT, held against what torchtune's models compute."""

import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests import oracle, small
from tests.fixtures import TORCHTUNE
from tests.trainers import RELATIVE, distance, inspected, loaded, merged, refused

RANK, ALPHA, HEAD = 3, 7.0, 4
OWN, EXPORT = "adapter/adapter_model.pt", "adapter"
FIX = "--torchtune-dora-fix"


def forward(case):
    return load_file(TORCHTUNE / case / "forward.safetensors")


def weights(case):
    return {n: t for n, t in forward(case).items() if n.endswith((".weight", ".bias"))}


def copy(case, folder):
    shutil.copytree(TORCHTUNE / case, folder, dirs_exist_ok=True)
    return folder / "base", folder / "adapter"


def logits(folder, tokens):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(tokens).logits


@pytest.mark.parametrize("kind", [OWN, EXPORT])
@pytest.mark.parametrize("case", ["dora", "lora", "qwen2", "qwen2-dora"])
def test_merged_model_computes_what_torchtune_computed(case, kind, tmp_path):
    written = merged(
        TORCHTUNE / case / "base", TORCHTUNE / case / kind, tmp_path / "out", "--allow-pickle"
    )
    base = loaded(TORCHTUNE / case / "base")
    assert len(weights(case)) >= 7
    for name, want in weights(case).items():
        assert distance(written[name], oracle.float64(want)) <= RELATIVE, name
        assert distance(written[name], oracle.float64(base[name])) > 0.1
    tokens, want = forward(case)["tokens"], forward(case)["logits"]
    assert (logits(tmp_path / "out", tokens) - want).abs().max() <= 1e-5 * want.abs().max()
    before = logits(TORCHTUNE / case / "base", tokens)
    assert (before - want).abs().max() > 1e-2 * want.abs().max()


def halves(t):
    """torchtune's rows in Hugging Face's order."""
    return t.reshape(-1, HEAD // 2, 2, *t.shape[1:]).transpose(1, 2).reshape(t.shape)


def definition(base, adapter, ours, theirs, *, order_b=halves, order_m=halves, s=ALPHA / RANK):
    """The layer's weight by its definition, with B and m in a row order."""
    W = oracle.float64(base[f"{ours}.weight"])
    B = adapter[f"{theirs}.lora_b.weight"]
    A = oracle.float64(adapter[f"{theirs}.lora_a.weight"])
    m = adapter[f"{theirs}.magnitude"]
    return oracle.dora(W, A, oracle.float64(order_b(B)), oracle.float64(order_m(m)), s)


Q = ("model.layers.0.self_attn.q_proj", "layers.0.attn.q_proj")
K = ("model.layers.0.self_attn.k_proj", "layers.0.attn.k_proj")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_q_and_k_are_within_one_ulp_and_wrong_orders_are_not(dtype, tmp_path):
    base, _ = copy("dora", tmp_path)
    file = base / "model.safetensors"
    save_file({n: t.to(dtype) for n, t in load_file(file).items()}, file, {"format": "pt"})
    written = merged(base, tmp_path / OWN, tmp_path / "out", "--allow-pickle")
    adapter = torch.load(tmp_path / OWN)
    for ours, theirs in (Q, K):
        got = written[f"{ours}.weight"]
        assert oracle.ulps(got, definition(loaded(base), adapter, ours, theirs)) <= 1
        for wrong in (
            {"order_m": lambda m: m},
            {"order_b": lambda b: b},
            {"order_b": lambda b: b, "order_m": lambda m: m},
            {"s": ALPHA},
        ):
            assert distance(got, definition(loaded(base), adapter, ours, theirs, **wrong)) > 0.05


def without_twin(case, folder):
    """An export alone: nothing beside it shows that torchtune made it."""
    base, adapter = copy(case, folder)
    (adapter / "adapter_model.pt").unlink()
    return base, adapter


@pytest.mark.parametrize(
    ("case", "what"), [("dora", "leaves m of q_proj"), ("qwen2", "leaves B of q_proj")]
)
def test_export_alone_asks_and_takes_either_answer(case, what, tmp_path):
    base, adapter = without_twin(case, tmp_path)
    message = refused(base, adapter, tmp_path / "out")
    assert what in message
    assert FIX in message
    assert "--no-torchtune-dora-fix" in message
    written = merged(base, adapter, tmp_path / "fixed", FIX)
    for name, want in weights(case).items():
        assert distance(written[name], oracle.float64(want)) <= RELATIVE
    left = merged(base, adapter, tmp_path / "left", "--no-torchtune-dora-fix")
    for name, want in weights(case).items():
        wrong = name.endswith(("q_proj.weight", "k_proj.weight"))
        far = distance(left[name], oracle.float64(want))
        assert far > 0.01 if wrong else far <= RELATIVE


def test_plain_export_for_llama_needs_no_answer(tmp_path):
    base, adapter = without_twin("lora", tmp_path)
    written = merged(base, adapter, tmp_path / "out")
    for name, want in weights("lora").items():
        assert distance(written[name], oracle.float64(want)) <= RELATIVE


def test_export_with_use_dora_added_by_hand_still_asks(tmp_path):
    base, adapter = without_twin("dora", tmp_path)
    small.edit_json(adapter / "adapter_config.json", use_dora=True)
    assert FIX in refused(base, adapter, tmp_path / "out")


def test_config_that_peft_wrote_is_not_taken_for_an_export(tmp_path):
    base, adapter = without_twin("dora", tmp_path)
    small.edit_json(adapter / "adapter_config.json", use_dora=True, bias="none", lora_dropout=0.0)
    merged(base, adapter, tmp_path / "out")


def with_biases(base):
    small.edit_tensors(
        base / "model.safetensors",
        lambda t: t | {f"{n.removesuffix('weight')}bias": torch.ones(v.shape[0])
                       for n, v in t.items() if n.endswith("v_proj.weight")},
    )  # fmt: skip


def test_biases_are_scaled_with_their_rows_as_torchtunes_forward_does(tmp_path):
    """Its own merge forgets them."""
    base = loaded(TORCHTUNE / "qwen2-dora/base")
    written = merged(TORCHTUNE / "qwen2-dora/base", TORCHTUNE / "qwen2-dora" / OWN,
                     tmp_path / "out", "--allow-pickle")  # fmt: skip
    biases = [n for n in weights("qwen2-dora") if n.endswith(".bias")]
    assert len(biases) == 3
    adapter = torch.load(TORCHTUNE / "qwen2-dora" / OWN)
    for name in biases:
        leaf = name.split(".")[-2]
        A, B, m = (oracle.float64(adapter[f"layers.0.attn.{leaf}.{p}"])
                   for p in ("lora_a.weight", "lora_b.weight", "magnitude"))  # fmt: skip
        W, b = (oracle.float64(base[f"{name.removesuffix('bias')}{p}"]) for p in ("weight", "bias"))
        norm = np.linalg.norm(W + ALPHA / RANK * (B @ A), axis=1)
        assert oracle.ulps(written[name], b * m / norm) <= 1
        for wrong in (
            b,
            b * m,
            b * m / np.linalg.norm(W, axis=1),
            b * halves(torch.tensor(m)).numpy() / norm,
        ):
            assert distance(written[name], wrong) > 0.02


def test_export_of_dora_with_biases_asks_whether_they_were_scaled(tmp_path):
    base, adapter = copy("dora", tmp_path)
    with_biases(base)
    (adapter / "adapter_model.pt").unlink()
    small.edit_tensors(
        adapter / "adapter_model.safetensors",
        lambda t: {n: v for n, v in t.items() if ".q_proj" not in n and ".k_proj" not in n},
    )
    assert "scales the biases" in refused(base, adapter, tmp_path / "out")


def test_model_whose_row_order_is_not_known_is_refused(tmp_path):
    base, _ = copy("dora", tmp_path)
    small.edit_json(base / "config.json", model_type="cohere")
    message = refused(base, tmp_path / OWN, tmp_path / "out", "--allow-pickle")
    assert "model_type 'cohere'" in message


def test_base_without_a_config_is_refused(tmp_path):
    base, _ = copy("dora", tmp_path)
    (base / "config.json").unlink()
    message = refused(base, tmp_path / OWN, tmp_path / "out", "--allow-pickle")
    assert "with its config.json" in message


@pytest.mark.parametrize("head", [None, 3, 5, "4"])
def test_size_of_a_head_that_cannot_be_is_refused(head, tmp_path):
    base, _ = copy("dora", tmp_path)
    small.edit_json(base / "config.json", head_dim=head, hidden_size=None)
    message = refused(base, tmp_path / OWN, tmp_path / "out", "--allow-pickle")
    assert "the size of a head" in message


def test_size_of_a_head_may_stand_in_the_config(tmp_path):
    base, _ = copy("dora", tmp_path)
    small.edit_json(base / "config.json", head_dim=HEAD, hidden_size=None)
    written = merged(base, tmp_path / OWN, tmp_path / "out", "--allow-pickle")
    for name, want in weights("dora").items():
        assert distance(written[name], oracle.float64(want)) <= RELATIVE


# --- alpha, containers, refusals ---


def alone(case, folder):
    """torchtune's file without the config beside it."""
    base, adapter = copy(case, folder)
    (folder / "own").mkdir()
    file = folder / "own/adapter_0.pt"
    shutil.copy(adapter / "adapter_model.pt", file)
    return base, file


def test_alpha_is_asked_for_and_taken(tmp_path):
    base, file = alone("dora", tmp_path)
    assert "Pass --alpha" in refused(base, file, tmp_path / "out", "--allow-pickle")
    for path, out in ((file, "a"), (file.parent, "b")):  # the file, and the folder that it is in
        written = merged(base, path, tmp_path / out, "--allow-pickle", "--alpha", "7")
        for name, want in weights("dora").items():
            assert distance(written[name], oracle.float64(want)) <= RELATIVE


def test_alpha_that_the_config_holds_is_refused(tmp_path):
    base, _ = copy("dora", tmp_path)
    message = refused(base, tmp_path / OWN, tmp_path / "out", "--allow-pickle", "--alpha", "7")
    assert "Leave --alpha out" in message


def test_config_of_another_rank_is_refused(tmp_path):
    base, adapter = copy("dora", tmp_path)
    small.edit_json(adapter / "adapter_config.json", r=4)
    message = refused(base, tmp_path / OWN, tmp_path / "out", "--allow-pickle")
    assert "r is 4, the tensors of adapter_model.pt have rank 3" in message


def test_pickled_file_needs_permission(tmp_path):
    base, file = alone("dora", tmp_path)
    assert "--allow-pickle" in refused(base, file, tmp_path / "out", "--alpha", "7")


BROKEN = {
    "lora_a missing": (lambda t: t.pop(f"{Q[1]}.lora_a.weight"), "lora_a.weight missing"),
    "magnitude missing": (lambda t: t.pop(f"{Q[1]}.magnitude"), "as plain LoRA"),
    "magnitude of another length": (
        lambda t: t.update({f"{Q[1]}.magnitude": torch.ones(15)}), "expected (16,)"),
    "another rank": (lambda t: t.update({f"{Q[1]}.lora_a.weight": torch.ones(2, 16)}),
                     "expected lora_a (rank, in)"),
    "ranks of their own": (
        lambda t: t.update({f"{Q[1]}.lora_a.weight": torch.ones(2, 16),
                            f"{Q[1]}.lora_b.weight": torch.ones(16, 2)}), "ranks [2, 3]"),
    "a vision model": (
        lambda t: t.update({"decoder.layers.0.attn.q_proj.lora_a.weight": torch.ones(3, 16)}),
        "only adapters of attention"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_file_that_does_not_add_up_is_refused(case, tmp_path):
    base, file = alone("dora", tmp_path)
    change, reason = BROKEN[case]
    tensors = torch.load(file)
    change(tensors)
    torch.save(tensors, file)
    assert reason in refused(base, file, tmp_path / "out", "--allow-pickle", "--alpha", "7")


@pytest.mark.parametrize("alone_there", [True, False])
def test_experts_are_refused_by_name_with_a_way_out(alone_there, tmp_path):
    base, file = alone("lora", tmp_path)
    experts = {f"layers.0.mlp.experts.lora_{part}_{factor}": torch.ones(2, 3, 4)
               for part in ("gate", "up", "down") for factor in "ab"}  # fmt: skip
    torch.save(experts if alone_there else torch.load(file) | experts, file)
    said = refused(base, file, tmp_path / "out", "--allow-pickle", "--alpha", "7")
    assert "LoRA on the experts of a mixture (6 tensors" in said
    assert "Let torchtune merge it" in said
    assert "save_adapter_weights_only: False" in said


def test_inspection_names_trainer_axis_and_evidence():
    base = TORCHTUNE / "dora/base"
    shown = inspected(TORCHTUNE / "dora" / OWN, "--allow-pickle", "--base", base)
    for words in ("trainer      torchtune", "one per output", "out, by the format", "fits"):
        assert words in shown
    shown = inspected(TORCHTUNE / "dora" / EXPORT)
    assert "torchtune, exported to PEFT" in shown
