"""torchtune's adapters and its exports to PEFT, held against what torchtune's models compute."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import dora_export
from dora_export.adapters import ReadOptions, torchtune
from dora_export.api_convert import convert
from dora_export.errors import DoraExportError
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


@pytest.mark.parametrize("said", ["cohere", ["llama"], {"llama": 1}, 4], ids=str)
def test_model_whose_row_order_is_not_known_is_refused(tmp_path, said):
    base, adapter = copy("dora", tmp_path)
    small.edit_json(base / "config.json", model_type=said)
    message = refused(base, tmp_path / OWN, tmp_path / "out", "--allow-pickle")
    assert "the row order that torchtune trains in depends on the model" in message
    assert f"model_type '{said}'" in message
    with pytest.raises(DoraExportError, match="row order that torchtune trains in"):
        convert(adapter, "torchtune", tmp_path / "converted", base=base, torchtune_dora_fix=True)


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


def test_alpha_of_another_trainers_config_is_not_taken(tmp_path):
    base, file = alone("dora", tmp_path)
    small.write_json(file.with_name("adapter_config.json"),
                     {"peft_type": "DORA", "r": 3, "lora_alpha": 7})  # fmt: skip
    assert "Pass --alpha" in refused(base, file, tmp_path / "out", "--allow-pickle")


def test_axis_that_the_format_does_not_have_is_refused(tmp_path):
    _, file = alone("dora", tmp_path)
    with pytest.raises(DoraExportError, match=r"one magnitude per output\. Leave --axis out"):
        dora_export.load_adapter(file, alpha=7.0, axis="in", allow_pickle=True)


def test_folder_of_two_files_and_a_file_of_another_kind_are_none(tmp_path):
    _, file = alone("dora", tmp_path)
    said = ReadOptions(allow_pickle=True)
    other = shutil.copy(file, file.with_name("adapter_1.pt"))
    assert torchtune.matches(file, said)
    assert not torchtune.matches(file.parent, said)
    renamed = other.rename(other.with_suffix(".txt"))
    assert torchtune.matches(file.parent, said)
    assert not torchtune.matches(renamed, said)


NEEDED = {"r": 3, "lora_alpha": 7, "target_modules": ["q_proj"]}


@pytest.mark.parametrize(
    ("config", "bare"),
    [(NEEDED, True), ({**NEEDED, "peft_type": "LORA", "base_model_name_or_path": "x"}, True),
     ({**NEEDED, "use_dora": True}, True), ({**NEEDED, "bias": "none"}, False),
     *(({k: v for k, v in NEEDED.items() if k != missing}, False) for missing in NEEDED)],
    ids=str,
)  # fmt: skip
def test_export_is_known_by_the_fields_that_torchtune_writes(config, bare):
    assert torchtune.is_export(config) is bare


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
        lambda t: t.update({"decoder.layers.0.layer.attn.q_proj.lora_a.weight":
                            torch.ones(3, 16)}), "only adapters of attention"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_file_that_does_not_add_up_is_refused(case, tmp_path):
    base, file = alone("dora", tmp_path)
    change, reason = BROKEN[case]
    tensors = torch.load(file)
    change(tensors)
    torch.save(tensors, file)
    assert reason in refused(base, file, tmp_path / "out", "--allow-pickle", "--alpha", "7")


# --- Llama 4, whose experts have LoRA of their own; torchtune's code for it is on no registry

E4, H4, I4, V4, R4, A4 = 3, 16, 24, 40, 3, 7.5
SCALE4 = A4 / R4
LINEARS4 = {  # torchtune's name -> Hugging Face's, (out, in)
    **{f"attn.{t}": (f"self_attn.{h}", (n, H4)) for t, h, n in (
        ("q_proj", "q_proj", 16), ("k_proj", "k_proj", 8), ("v_proj", "v_proj", 8),
        ("output_proj", "o_proj", 16))},
    **{f"mlp.shared_expert.{w}": (f"feed_forward.shared_expert.{h}", s) for w, h, s in (
        ("w1", "gate_proj", (I4, H4)), ("w2", "down_proj", (H4, I4)), ("w3", "up_proj", (I4, H4)))},
}  # fmt: skip


def llama4(folder, dtype=torch.float32, dora=False, inner=I4):
    """A base of transformers' class and a trained adapter in torchtune's names."""
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    torch.manual_seed(4)
    config = Llama4TextConfig(
        vocab_size=V4, hidden_size=H4, intermediate_size=inner, intermediate_size_mlp=20,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=4,
        num_local_experts=E4, num_experts_per_tok=1, interleave_moe_layer_step=2,
        tie_word_embeddings=False, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = Llama4ForCausalLM(config)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.2)
    model.to(dtype).save_pretrained(folder / "base", save_original_format=True)
    base, made = loaded(folder / "base"), {}
    names = {f"decoder.layers.1.{t}": f"model.layers.1.{h}" for t, (h, _) in LINEARS4.items()}
    names |= {
        f"decoder.layers.0.mlp.{w}": f"model.layers.0.feed_forward.{h}"
        for w, h in (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj"))
    }  # a dense layer's
    names["decoder.output"] = "lm_head"
    for theirs, ours in names.items():
        out, into = base[f"{ours}.weight"].shape
        made[f"{theirs}.lora_a.weight"] = torch.randn(R4, into) * 0.3
        made[f"{theirs}.lora_b.weight"] = torch.randn(out, R4) * 0.3
        if dora and "shared_expert" not in theirs:
            norm = base[f"{ours}.weight"].float().norm(dim=1)
            made[f"{theirs}.magnitude"] = norm * (0.6 + 0.8 * torch.rand(out))
    for part, (into, out) in (("gate", (H4, inner)), ("up", (H4, inner)), ("down", (inner, H4))):
        key = f"decoder.layers.1.mlp.experts.lora_{part}"
        made[f"{key}_a"] = torch.randn(E4, into, R4) * 0.3
        made[f"{key}_b"] = torch.randn(E4, R4, out) * 0.3
    (folder / "adapter").mkdir()
    torch.save(made, folder / "adapter/adapter_model.pt")
    # written for Llama 4 too, though no weights are exported to PEFT
    small.write_json(
        folder / "adapter/adapter_config.json",
        {"r": R4, "lora_alpha": A4, "target_modules": ["q_proj"], "peft_type": "LORA"},
    )
    return names, base, made


def of_experts(x, W, a, b):
    """_lora_tc_layer_forward: W is (in, out), a (in, rank), b (rank, out)."""
    return x @ W + SCALE4 * ((x @ a) @ b)


def halves_of(base, expert):
    """Gate's, up's and down's weight of one expert, (in, out), as llama4_hf_to_tune takes them."""
    block = "model.layers.1.feed_forward.experts"
    gate, up = np.split(oracle.float64(base[f"{block}.gate_up_proj"])[expert], 2, axis=1)
    return {"gate": gate, "up": up, "down": oracle.float64(base[f"{block}.down_proj"])[expert]}


LLAMA4 = [
    pytest.param(dtype, dora, inner, id=f"{dtype}-{'dora' if dora else 'lora'}-{inner}",
                 marks=[] if dora == (inner == I4) else [pytest.mark.nightly])
    for dtype in (torch.float32, torch.bfloat16) for dora in (False, True) for inner in (I4, H4)
]  # fmt: skip


@pytest.mark.parametrize(("dtype", "dora", "inner"), LLAMA4)
def test_llama4_experts_compute_what_torchtunes_do(dtype, dora, inner, tmp_path):
    names, base, made = llama4(tmp_path, dtype, dora, inner)
    written = merged(tmp_path / "base", tmp_path / OWN, tmp_path / "out", "--allow-pickle")
    for expert in range(E4):
        before, after = halves_of(base, expert), halves_of(written, expert)
        for part, W in before.items():
            a, b = (oracle.float64(made[f"decoder.layers.1.mlp.experts.lora_{part}_{side}"])
                    for side in "ab")  # fmt: skip
            want = of_experts(np.eye(len(W)), W, a[expert], b[expert])
            got = torch.tensor(after[part]).to(dtype)
            assert oracle.ulps(got, want) <= 1, (part, expert)
            other = (expert + 1) % E4
            for wrong in (W, W + A4 * (a[expert] @ b[expert]), W + SCALE4 * (a[other] @ b[other])):
                assert oracle.ulps(got, wrong) > 10
    for theirs, ours in names.items():
        W = oracle.float64(base[f"{ours}.weight"])
        a, b = (oracle.float64(made[f"{theirs}.lora_{side}.weight"]) for side in "ab")
        m = made.get(f"{theirs}.magnitude")
        right = oracle.lora(W, a, b, SCALE4) if m is None else oracle.dora(
            W, a, b, oracle.float64(m), SCALE4)  # fmt: skip
        assert oracle.ulps(written[f"{ours}.weight"], right) <= 1, ours
    assert dora == any(n.endswith("magnitude") for n in made)
    shown = inspected(tmp_path / OWN, "--allow-pickle", "--base", tmp_path / "base")
    assert "fits" in shown
    assert f"method       {'DoRA' if dora else 'LoRA'}" in shown


def test_llama4_names_fit_the_whole_multimodal_checkpoint(tmp_path):
    """As on the Hub: the text model inside, and the projection of images with LoRA as well."""
    _, base, made = llama4(tmp_path)
    config = json.loads((tmp_path / "base/config.json").read_text())
    whole = {f"language_model.{n}": t for n, t in base.items()}
    images = {"vision_model.vision_adapter.mlp.fc1": (12, 20), "multi_modal_projector.linear_1":
              (H4, 12), "vision_model.vision_adapter.mlp.fc2": (12, 12)}  # fmt: skip
    whole |= {f"{n}.weight": torch.randn(shape) * 0.2 for n, shape in images.items()}
    small.write_json(tmp_path / "base/config.json", {
        "model_type": "llama4", "architectures": ["Llama4ForConditionalGeneration"],
        "text_config": config})  # fmt: skip
    save_file(whole, tmp_path / "base/model.safetensors", {"format": "pt"})
    for number, ours in ((0, "vision_model.vision_adapter.mlp.fc1"),
                         (2, "vision_model.vision_adapter.mlp.fc2"),
                         (4, "multi_modal_projector.linear_1")):  # fmt: skip
        key, (out, into) = f"encoders.vision.projection.output.{number}", images[ours]
        made[f"{key}.lora_a.weight"] = torch.randn(R4, into)
        made[f"{key}.lora_b.weight"] = torch.randn(out, R4)
        images[ours] = oracle.lora(*(oracle.float64(t) for t in (
            whole[f"{ours}.weight"], made[f"{key}.lora_a.weight"], made[f"{key}.lora_b.weight"])),
            SCALE4)  # fmt: skip
    torch.save(made, tmp_path / OWN)
    written = merged(tmp_path / "base", tmp_path / OWN, tmp_path / "out", "--allow-pickle")
    for ours, exact in images.items():
        assert distance(written[f"{ours}.weight"], exact) <= RELATIVE
    text = {n.removeprefix("language_model."): t for n, t in written.items()}
    for part, W in halves_of(base, 1).items():
        a, b = (oracle.float64(made[f"decoder.layers.1.mlp.experts.lora_{part}_{side}"])
                for side in "ab")  # fmt: skip
        want = of_experts(np.eye(len(W)), W, a[1], b[1])
        assert distance(torch.tensor(halves_of(text, 1)[part]), want) <= RELATIVE


def test_llama4_model_computes_the_forward_written_from_torchtunes(tmp_path):
    """The base's own experts with ``of_experts`` in the place of each product."""
    from transformers import Llama4ForCausalLM

    _, _, made = llama4(tmp_path)
    only = {n: t for n, t in made.items() if ".experts." in n}
    torch.save(only, tmp_path / OWN)
    merged(tmp_path / "base", tmp_path / OWN, tmp_path / "out", "--allow-pickle")
    model = Llama4ForCausalLM.from_pretrained(tmp_path / "base").double().eval()
    block = model.model.layers[1].feed_forward.experts
    own = {n.rpartition("lora_")[2]: t.double() for n, t in only.items()}

    def adapted(hidden):
        x, out = hidden.view(E4, -1, H4), []
        for e in range(E4):
            gate, up = block.gate_up_proj[e].chunk(2, dim=-1)
            h = block.act_fn(of_experts(x[e], gate, own["gate_a"][e], own["gate_b"][e]))
            h = h * of_experts(x[e], up, own["up_a"][e], own["up_b"][e])
            out.append(of_experts(h, block.down_proj[e], own["down_a"][e], own["down_b"][e]))
        return torch.stack(out).reshape(-1, H4)

    tokens = torch.arange(14).reshape(2, 7) * 3 % V4
    with torch.no_grad():
        before = model(tokens).logits
        block.forward = adapted
        want = model(tokens).logits
        got = Llama4ForCausalLM.from_pretrained(tmp_path / "out").double().eval()(tokens).logits
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()
    assert (before - want).abs().max() > 1e-2 * want.abs().max()


LLAMA4_BROKEN = {
    "half of experts": (
        lambda t: t.pop("decoder.layers.1.mlp.experts.lora_up_b"), "lora_b.weight missing"),
    "other experts": (
        lambda t: t.update({f"decoder.layers.1.mlp.experts.lora_up_{s}": torch.ones(*shape)
                            for s, shape in (("a", (2, H4, R4)), ("b", (2, R4, I4)))}),
        "the adapter has 2 experts, the base 3"),
    "turned": (
        lambda t: t.update({"decoder.layers.1.mlp.experts.lora_up_a": torch.ones(E4, R4, H4)}),
        "expected lora_a (experts, in, rank)"),
    "rank": (
        lambda t: t.update({f"decoder.layers.1.mlp.experts.lora_up_{s}": torch.ones(*shape)
                            for s, shape in (("a", (E4, H4, 2)), ("b", (E4, 2, I4)))}),
        "ranks [2, 3]"),
    "a fusion layer": (
        lambda t: t.update({"decoder.layers.3.fusion_layer.attn.q_proj.lora_a.weight":
                            torch.ones(R4, H4)}), "unknown tensor"),
    "experts of another module": (
        lambda t: t.update({"decoder.layers.1.attn.lora_up_a": torch.ones(E4, H4, R4)}),
        "unknown tensor"),
    "experts of another model": (
        lambda t: t.update({"layers.1.mlp.experts.lora_up_a": torch.ones(E4, H4, R4)}),
        "unknown tensor"),
}  # fmt: skip


@pytest.mark.parametrize("case", LLAMA4_BROKEN)
def test_llama4_file_that_does_not_add_up_is_refused(case, tmp_path):
    _, _, made = llama4(tmp_path)
    change, reason = LLAMA4_BROKEN[case]
    change(made)
    torch.save(made, tmp_path / OWN)
    assert reason in refused(tmp_path / "base", tmp_path / OWN, tmp_path / "out", "--allow-pickle")


def test_llama4_names_on_another_model_are_refused(tmp_path):
    llama4(tmp_path)
    tensors = {n: t for n, t in torch.load(tmp_path / OWN).items() if "layers.1" not in n}
    torch.save({n: t for n, t in tensors.items() if ".mlp." not in n}, tmp_path / OWN)
    small.edit_json(tmp_path / "base/config.json", model_type="llama")
    message = refused(tmp_path / "base", tmp_path / OWN, tmp_path / "out", "--allow-pickle")
    assert "of torchtune's Llama 4, by the names in the adapter" in message


def test_inspection_names_trainer_axis_and_evidence():
    base = TORCHTUNE / "dora/base"
    shown = inspected(TORCHTUNE / "dora" / OWN, "--allow-pickle", "--base", base)
    for words in ("trainer      torchtune", "one per output", "out, by the format", "fits"):
        assert words in shown
    shown = inspected(TORCHTUNE / "dora" / EXPORT)
    assert "torchtune, exported to PEFT" in shown
