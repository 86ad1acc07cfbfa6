"""MLX adapters: fixtures made by mlx-lm's own layers, held against what those layers compute."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dora_export import load_adapter
from dora_export.errors import AdapterError
from tests import oracle, small
from tests.fixtures import MLX
from tests.trainers import RELATIVE, distance, inspected, loaded, merged, refused

SCALE, RANK = 2.5, 3


def weight(base, adapter, name, scale=SCALE, m=None):
    """The layer's weight by its definition, in float64."""
    W = oracle.float64(base[f"{name}.weight"])
    a, b = (oracle.float64(adapter[f"{name}.lora_{p}"]) for p in "ab")
    A, B = (b, a) if "embed" in name else (a.T, b.T)
    m = adapter.get(f"{name}.m") if m is None else m
    if m is None:
        return oracle.lora(W, A, B, scale)
    return oracle.dora(W, A, B, oracle.float64(m), scale)


def adapted(adapter):
    return sorted({name.rpartition(".")[0] for name in adapter})


def copy(case, folder, dtype=None):
    """A case's base and adapter, to be changed; the base in another dtype."""
    shutil.copytree(MLX / case, folder, dirs_exist_ok=True)
    if dtype is not None:
        file = folder / "base/model.safetensors"
        save_file({n: t.to(dtype) for n, t in load_file(file).items()}, file, {"format": "pt"})
    return folder / "base", folder / "adapter"


@pytest.mark.parametrize("case", ["dora", "lora", "tied"])
def test_merged_weights_are_those_the_trained_layers_computed_with(case, tmp_path):
    written = merged(MLX / case / "base", MLX / case / "adapter", tmp_path / "out")
    forward = load_file(MLX / case / "forward.safetensors")
    base = loaded(MLX / case / "base")
    assert len(forward) >= 3
    for name, want in forward.items():
        if name.endswith(".weight"):
            assert distance(written[name], oracle.float64(want)) <= RELATIVE, name
            assert distance(written[name], oracle.float64(base[name])) > 0.1
    for name, tensor in base.items():
        if name not in forward:
            assert torch.equal(written[name], tensor), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("case", ["dora", "lora"])
def test_merged_weights_are_within_one_ulp_of_the_definition(case, dtype, tmp_path):
    base, adapter = copy(case, tmp_path, dtype)
    written = merged(base, adapter, tmp_path / "out")
    tensors, state = loaded(adapter), loaded(base)
    assert len(adapted(tensors)) == (6 if case == "dora" else 5)
    for name in adapted(tensors):
        assert written[f"{name}.weight"].dtype is dtype
        assert oracle.ulps(written[f"{name}.weight"], weight(state, tensors, name)) <= 1


MISTAKES = {
    "scale divided by the rank": lambda base, a, name: weight(base, a, name, SCALE / RANK),
    "scale forgotten": lambda base, a, name: weight(base, a, name, 1.0),
    "magnitudes dropped": lambda base, a, name: weight(
        base, {n: t for n, t in a.items() if not n.endswith(".m")}, name
    ),
    "magnitudes reordered": lambda base, a, name: weight(base, a, name, m=a[f"{name}.m"].roll(1)),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_tolerance_rejects_each_mistake(mistake, tmp_path):
    written = merged(MLX / "dora/base", MLX / "dora/adapter", tmp_path / "out")
    base, adapter = loaded(MLX / "dora/base"), loaded(MLX / "dora/adapter")
    for name in adapted(adapter):
        wrong = MISTAKES[mistake](base, adapter, name)
        assert distance(written[f"{name}.weight"], wrong) > 1e-3


def test_embedding_magnitudes_are_per_token_not_per_dimension(tmp_path):
    written = merged(MLX / "dora/base", MLX / "dora/adapter", tmp_path / "out")
    forward = load_file(MLX / "dora/forward.safetensors")["model.embed_tokens.weight"]
    assert distance(written["model.embed_tokens.weight"], oracle.float64(forward)) <= RELATIVE
    adapter = load_adapter(MLX / "dora/adapter")
    update = next(u for u in adapter.updates if "embed" in u.target)
    assert update.magnitude.shape == (20,)


def test_tied_embedding_is_adapted_as_input_and_as_head(tmp_path):
    written = merged(MLX / "tied/base", MLX / "tied/adapter", tmp_path / "out")
    forward = load_file(MLX / "tied/forward.safetensors")
    assert "lm_head.weight" not in written
    for end in ("weight", "as_linear"):
        want = oracle.float64(forward[f"model.embed_tokens.{end}"])
        assert distance(written["model.embed_tokens.weight"], want) <= RELATIVE
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is True


# --- experts ---

PARTS = ("gate_proj", "up_proj", "down_proj")
SWITCH = "model.layers.0.mlp.switch_mlp"


def experts_forward():
    """(part, expert) -> the weight that the trained layer computed with."""
    forward = load_file(MLX / "experts/forward.safetensors")
    return {
        (part, e): oracle.float64(forward[f"{SWITCH}.{part}.weight.{e}"])
        for part in PARTS
        for e in range(3)
    }


def stored(base, part, expert):
    return base[f"model.layers.0.mlp.experts.{expert}.{part}.weight"]


def restacked(folder, rename, **config):
    """The experts case with its base's expert tensors stored in another way."""
    base, adapter = copy("experts", folder)
    state = loaded(base)
    others = {n: t for n, t in state.items() if ".experts." not in n}
    stacks = {p: torch.stack([stored(state, p, e) for e in range(3)]) for p in PARTS}
    tensors = others | {n: t.contiguous() for n, t in rename(stacks).items()}
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    small.edit_json(base / "config.json", **config)
    return base, adapter


def test_experts_go_onto_a_tensor_per_expert(tmp_path):
    written = merged(MLX / "experts/base", MLX / "experts/adapter", tmp_path / "out")
    for (part, expert), want in experts_forward().items():
        assert distance(stored(written, part, expert), want) <= RELATIVE


def test_experts_go_onto_mixtral_names(tmp_path):
    names = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
    base, adapter = copy("experts", tmp_path)

    def renamed(tensors):
        found = {}
        for name, tensor in tensors.items():
            for part, short in names.items():
                name = name.replace(f".{part}.", f".{short}.") if ".experts." in name else name
            found[name] = tensor
        return found

    small.edit_tensors(base / "model.safetensors", renamed)
    written = merged(base, adapter, tmp_path / "out")
    for (part, expert), want in experts_forward().items():
        name = f"model.layers.0.mlp.experts.{expert}.{names[part]}.weight"
        assert distance(written[name], want) <= RELATIVE


def test_experts_go_onto_mlx_own_stack(tmp_path):
    base, adapter = restacked(
        tmp_path, lambda stacks: {f"{SWITCH}.{p}.weight": t for p, t in stacks.items()}
    )
    written = merged(base, adapter, tmp_path / "out")
    for (part, expert), want in experts_forward().items():
        assert distance(written[f"{SWITCH}.{part}.weight"][expert], want) <= RELATIVE


def rows_fused(stacks):
    gate_up = torch.cat([stacks["gate_proj"], stacks["up_proj"]], 1)
    return {"gate_up_proj": gate_up, "down_proj": stacks["down_proj"]}


def columns_fused(stacks):
    return {n: t.transpose(1, 2) for n, t in rows_fused(stacks).items()}


def alternating(stacks):
    gate_up = torch.stack([stacks["gate_proj"], stacks["up_proj"]], 2).flatten(1, 2)
    fused = {"gate_up_proj": gate_up, "down_proj": stacks["down_proj"]}
    return {n: t.transpose(1, 2) for n, t in fused.items()}


FUSED = {
    "qwen3_5_moe_text": (rows_fused, lambda t: t, lambda t: t.chunk(2, 1)),
    "qwen3_moe": (rows_fused, lambda t: t, lambda t: t.chunk(2, 1)),
    "llama4_text": (columns_fused, lambda t: t.mT, lambda t: t.mT.chunk(2, 1)),
    "gpt_oss": (alternating, lambda t: t.mT, lambda t: (t.mT[:, ::2], t.mT[:, 1::2])),
}


@pytest.mark.parametrize("model_type", FUSED)
def test_experts_go_onto_fused_tensors(model_type, tmp_path):
    fuse, down, split = FUSED[model_type]
    prefix = "model.layers.0.mlp.experts"
    base, adapter = restacked(
        tmp_path,
        lambda stacks: {f"{prefix}.{n}": t for n, t in fuse(stacks).items()},
        model_type=model_type,
    )
    written = merged(base, adapter, tmp_path / "out")
    gate, up = split(written[f"{prefix}.gate_up_proj"])
    got = {"gate_proj": gate, "up_proj": up, "down_proj": down(written[f"{prefix}.down_proj"])}
    for (part, expert), want in experts_forward().items():
        assert distance(got[part][expert], want) <= RELATIVE


def test_fused_experts_of_an_unknown_model_are_refused(tmp_path):
    base, adapter = restacked(
        tmp_path,
        lambda s: {f"model.layers.0.mlp.experts.{n}": t for n, t in rows_fused(s).items()},
        model_type="mixture_of_ours",
    )
    message = refused(base, adapter, tmp_path / "out")
    assert "'mixture_of_ours' is not among those known" in message
    assert "a tensor per expert" in message


def test_other_number_of_experts_is_refused(tmp_path):
    base, adapter = copy("experts", tmp_path)
    extra = {f"model.layers.0.mlp.experts.3.{p}.weight": torch.ones(2, 2) for p in PARTS}
    small.edit_tensors(base / "model.safetensors", lambda t: t | extra)
    assert "the adapter has 3 experts, the base 4" in refused(base, adapter, tmp_path / "out")


def test_early_flat_stack_of_experts_is_the_same(tmp_path):
    base, adapter = copy("experts", tmp_path)
    small.edit_tensors(
        adapter / "adapters.safetensors",
        lambda t: {n: v.flatten(0, 1) if n.endswith("lora_a") else v for n, v in t.items()},
    )
    written = merged(base, adapter, tmp_path / "out")
    for (part, expert), want in experts_forward().items():
        assert distance(stored(written, part, expert), want) <= RELATIVE


# --- layers trained whole, names, early versions ---


def whole(folder, **config):
    base, adapter = copy("lora", folder)
    state = loaded(base)
    trained = {n: t + 0.125 for n, t in state.items() if n.startswith("model.layers.1.")}
    save_file(trained, adapter / "adapters.safetensors")
    settings = {"fine_tune_type": "full", "num_layers": 1, "lora_parameters": None}
    small.write_json(adapter / "adapter_config.json", settings)
    small.edit_json(base / "config.json", **config)
    return base, adapter, state | trained


def test_layers_trained_whole_replace_the_base(tmp_path):
    base, adapter, want = whole(tmp_path)
    written = merged(base, adapter, tmp_path / "out")
    assert written.keys() == want.keys()
    assert all(torch.equal(written[n], want[n]) for n in want)


def test_whole_layers_of_models_with_other_stored_norms_are_refused(tmp_path):
    base, adapter, _ = whole(tmp_path, model_type="qwen3_next")
    assert "norm weights with one added" in refused(base, adapter, tmp_path / "out")


def test_whole_convolutions_and_quantised_layers_are_refused(tmp_path):
    base, adapter, _ = whole(tmp_path)
    small.edit_tensors(
        adapter / "adapters.safetensors",
        lambda t: t | {"model.conv.weight": torch.ones(2, 3, 3, 3),
                       "model.layers.1.mlp.up_proj.scales": torch.ones(2, 2)},
    )  # fmt: skip
    message = refused(base, adapter, tmp_path / "out")
    assert "'model.conv.weight'" in message
    assert "mlx_lm.fuse" in message
    assert "save the model dequantised" in message


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("language_model.model.", "language_model.model."),
        ("language_model.model.", "model.language_model."),
        ("language_model.model.", "model."),
        ("model.", "language_model.model."),
        ("model.language_model.", "language_model.model."),
    ],
)
def test_multimodal_prefixes_resolve_by_the_checkpoint_own_names(theirs, ours, tmp_path):
    base, adapter = copy("dora", tmp_path)
    for file, prefix in ((base / "model.safetensors", ours),
                         (adapter / "adapters.safetensors", theirs)):  # fmt: skip
        head = "language_model.lm_head." if prefix.startswith("language_model.") else "lm_head."
        small.edit_tensors(
            file,
            lambda t, p=prefix, h=head: {
                n.replace("lm_head.", h) if n.startswith("lm_head") else p + n[6:]: v
                for n, v in t.items()
            },
        )
    written = merged(base, adapter, tmp_path / "out")
    forward = load_file(MLX / "dora/forward.safetensors")
    name = "layers.1.mlp.down_proj.weight"
    assert distance(written[ours + name], oracle.float64(forward[f"model.{name}"])) <= RELATIVE


def early_vlm(folder):
    base, adapter = copy("lora", folder)
    names = {"lora_a": "A", "lora_b": "B"}
    small.edit_tensors(
        adapter / "adapters.safetensors",
        lambda t: {f"{n.rpartition('.')[0]}.{names[n.rpartition('.')[2]]}": v
                   for n, v in t.items()},
    )  # fmt: skip
    small.write_json(adapter / "adapter_config.json", {"rank": 3, "alpha": 7.5, "dropout": 0.1})
    return base, adapter


def test_early_mlx_vlm_asks_which_scaling_and_takes_either(tmp_path):
    base, adapter = early_vlm(tmp_path)
    message = refused(base, adapter, tmp_path / "out")
    assert "--alpha 22.5 for the former, --alpha 7.5 for the latter" in message
    forward = load_file(MLX / "lora/forward.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    want = oracle.float64(forward[name])  # its scale was 2.5 = 7.5 / 3
    assert distance(merged(base, adapter, tmp_path / "a", "--alpha", "7.5")[name], want) <= RELATIVE
    assert distance(merged(base, adapter, tmp_path / "b", "--alpha", "22.5")[name], want) > 0.1


def test_scale_beside_alpha_asks_and_names_both_candidates(tmp_path):
    base, adapter = copy("dora", tmp_path)
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["lora_parameters"]["alpha"] = 6
    small.write_json(adapter / "adapter_config.json", config)
    message = refused(base, adapter, tmp_path / "out")
    assert "--alpha 15 for the former, --alpha 7.5 for the latter" in message
    state, tensors = loaded(base), loaded(adapter)
    written = merged(base, adapter, tmp_path / "out", "--alpha", "15")
    name = "model.layers.1.self_attn.q_proj"
    want = weight(state, tensors, name, 2.5 * 6 / 3)
    assert distance(written[f"{name}.weight"], want) <= RELATIVE


def test_earlier_checkpoint_of_the_training_is_taken_by_its_file(tmp_path):
    base, adapter = copy("dora", tmp_path)
    earlier = adapter / "0000100_adapters.safetensors"
    save_file({n: v * 0.5 for n, v in loaded(adapter).items()}, earlier)
    state, tensors = loaded(base), load_file(earlier)
    written = merged(base, earlier, tmp_path / "out")
    name = "model.layers.1.self_attn.q_proj"
    assert distance(written[f"{name}.weight"], weight(state, tensors, name)) <= RELATIVE


def test_inspection_names_trainer_axis_and_evidence():
    shown = inspected(MLX / "dora/adapter", "--base", MLX / "dora/base")
    for words in (
        "mlx-lm",
        "one per output",
        "out, by the format",
        "scaling      2.5",
        "fits",
        "its own format",
    ):
        assert words in shown


# --- refusals ---

CONFIGS = {
    "unknown kind": ({"fine_tune_type": "dora2"}, "Expected lora, dora or full"),
    "dora without m": ({"fine_tune_type": "dora"}, "no m, but fine_tune_type is dora"),
    "unknown setting": ({"lora_parameters": {"rank": 3, "scale": 1.0, "rslora": 1}}, "rslora"),
    "no scale": ({"lora_parameters": {"rank": 3}}, "Pass --alpha"),
    "scale of zero": ({"lora_parameters": {"rank": 3, "scale": 0}}, "other than 0"),
    "scale of text": ({"lora_parameters": {"rank": 3, "scale": "2"}}, "other than 0"),
    "alpha of text": ({"lora_parameters": {"rank": 3, "scale": 2.5, "alpha": "3"}}, "alpha '3'"),
    "alpha of zero": ({"lora_parameters": {"rank": 3, "scale": 2.5, "alpha": 0}}, "alpha '0'"),
    "no rank": ({"lora_parameters": {"scale": 2.5}}, "rank 'None'. Expected a positive whole"),
    "another rank": ({"lora_parameters": {"rank": 4, "scale": 2.5}}, "rank 4 by the config"),
    "no parameters": ({"lora_parameters": None}, "lora_parameters is missing"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_config_that_does_not_add_up_is_refused(case, tmp_path):
    base, adapter = copy("lora", tmp_path)
    fields, reason = CONFIGS[case]
    small.edit_json(adapter / "adapter_config.json", **fields)
    assert reason in refused(base, adapter, tmp_path / "out")


Q = "model.layers.1.self_attn.q_proj"
TENSORS = {
    "A missing": (lambda t: t.pop(f"{Q}.lora_a") is None, "lora_a missing"),
    "m missing": (lambda t: t.pop(f"{Q}.m") is None, "refusing to merge it as plain LoRA"),
    "m of another length": (lambda t: t.update({f"{Q}.m": torch.ones(5)}), "expected (16,)"),
    "A transposed": (lambda t: t.update({f"{Q}.lora_a": torch.ones(3, 16)}), "(in, rank)"),
    "B transposed": (lambda t: t.update({f"{Q}.lora_b": torch.ones(16, 3)}), "(rank, out)"),
    "unknown tensor": (lambda t: t.update({"vision_tower.x": torch.ones(3)}), "train_vision"),
    "not a number": (lambda t: t.update({f"{Q}.m": torch.full((16,), torch.nan)}), "NaN"),
    "another layer": (lambda t: t.update({f"{n}x.{p}": t[f"{n}.{p}"].clone() for n in (Q,)
                                         for p in ("lora_a", "lora_b", "m")}), "not in the base"),
}  # fmt: skip


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_do_not_add_up_are_refused(case, tmp_path):
    base, adapter = copy("dora", tmp_path)
    change, reason = TENSORS[case]
    small.edit_tensors(adapter / "adapters.safetensors", lambda t: (change(t), t)[1])
    assert reason in refused(base, adapter, tmp_path / "out")


def read(folder, shapes, settings=None, **options):
    """The normal form of a folder with tensors of these shapes."""
    small.write_json(folder / "adapter_config.json", settings or {
        "fine_tune_type": "lora", "lora_parameters": {"rank": 3, "scale": 2.5}})  # fmt: skip
    save_file({n: torch.ones(s) for n, s in shapes.items()}, folder / "adapters.safetensors")
    return load_adapter(folder, **options)


PAIR = {"q.lora_a": (8, 3), "q.lora_b": (3, 6)}


def test_magnitudes_of_an_adapter_that_is_said_to_have_none_are_not_dropped(tmp_path):
    with pytest.raises(
        AdapterError, match="q: has m, but fine_tune_type is lora; refusing to drop"
    ):
        read(tmp_path, {**PAIR, "q.m": (6,)})


def test_alpha_that_is_the_rank_leaves_the_scale_as_it_is(tmp_path):
    """Both versions of mlx-lm compute the same there."""
    settings = {"fine_tune_type": "lora", "lora_parameters": {"rank": 3, "scale": 2.5, "alpha": 3}}
    (update,) = read(tmp_path, PAIR, settings).updates
    assert update.scaling == 2.5


def test_rank_beside_lora_parameters_is_none_of_early_mlx_vlm(tmp_path):
    settings = {"rank": 64, "alpha": 1, "lora_parameters": {"rank": 3, "scale": 2.5}}
    (update,) = read(tmp_path, PAIR, settings).updates
    assert update.scaling == 2.5


@pytest.mark.parametrize("alpha", [0.0, float("inf"), float("nan")])
def test_alpha_that_is_no_factor_is_refused(alpha, tmp_path):
    with pytest.raises(AdapterError, match="expected a finite number other than 0"):
        read(tmp_path, PAIR, {"rank": 3, "alpha": 7.5}, alpha=alpha)


@pytest.mark.parametrize("name", ["embed_tokens", "wte", "wpe", "word_embeddings", "embed_in",
                                  "tok_embeddings", "embeddings", "embedding"])  # fmt: skip
def test_embedding_has_tokens_first_under_each_of_its_names(name, tmp_path):
    shapes = {f"model.{name}.lora_a": (20, 3), f"model.{name}.lora_b": (3, 8)}
    (update,) = read(tmp_path, shapes).updates
    assert (update.up.shape, update.down.shape) == ((20, 3), (3, 8))


EXPERTS = {"e.lora_a": (4, 3, 8), "e.lora_b": (4, 8, 3)}


def test_square_experts_lie_as_mlx_stores_them(tmp_path):
    updates = read(tmp_path, EXPERTS).updates
    assert [(u.index, u.layout, u.scaling) for u in updates] == [(i, "oi", 2.5) for i in range(4)]


@pytest.mark.parametrize(
    "change",
    [{"e.m": (8,)}, {"e.lora_a": (4, 2, 8), "e.lora_b": (4, 8, 2)}, {"e.lora_a": (5, 3, 8)},
     {"e.lora_a": (4, 2, 8)}, {"e.lora_a": (4, 3, 8, 1)}, {"e.lora_a": (11, 8)}],
    ids=["m", "rank", "experts", "rank of A", "dimensions", "flat"],
)  # fmt: skip
def test_experts_that_do_not_add_up_are_refused(change, tmp_path):
    kind = "dora" if "e.m" in change else "lora"
    settings = {"fine_tune_type": kind, "lora_parameters": {"rank": 3, "scale": 2.5}}
    with pytest.raises(AdapterError, match=r"e: rank 3 by the config needs lora_a \(experts"):
        read(tmp_path, {**EXPERTS, **change}, settings)


WHOLE = {"fine_tune_type": "full"}


def test_layers_trained_whole_are_no_factors_and_say_no_more_than_they_hold(tmp_path):
    found = read(tmp_path, {"lm_head.weight": (20, 8)}, WHOLE)
    assert (found.ensure_weight_tying, found.not_for) == (False, {})
    assert "qwen3_next" in read(tmp_path, {"norm.weight": (8,)}, WHOLE).not_for
    with pytest.raises(AdapterError, match=r"have no scaling\. Leave --alpha out"):
        read(tmp_path, {"lm_head.weight": (20, 8)}, WHOLE, alpha=2.0)
    for ending in ("scales", "biases"):
        with pytest.raises(AdapterError, match=f"'q.{ending}': of a quantised layer"):
            read(tmp_path, {f"q.{ending}": (8, 2)}, WHOLE)
    for settings in (WHOLE, None):
        with pytest.raises(AdapterError, match="holds no tensors"):
            read(tmp_path, {}, settings)


def test_options_that_the_file_answers_are_refused(tmp_path):
    base, adapter = copy("dora", tmp_path)
    assert "Leave --alpha out" in refused(base, adapter, tmp_path / "out", "--alpha", "4")
    assert "Leave --axis out" in refused(base, adapter, tmp_path / "out", "--axis", "in")


def test_weights_that_are_missing_are_named(tmp_path):
    base, adapter = copy("dora", tmp_path)
    (adapter / "adapters.safetensors").unlink()
    assert "no adapters.safetensors" in refused(base, adapter, tmp_path / "out")


def test_forward_of_the_fixture_is_the_definition():
    """The stored outputs and this file's formula were written apart; they must agree."""
    base, adapter = loaded(MLX / "dora/base"), loaded(MLX / "dora/adapter")
    forward = load_file(MLX / "dora/forward.safetensors")
    for name in adapted(adapter):
        want = weight(base, adapter, name)
        assert np.isfinite(want).all()
        assert distance(forward[f"{name}.weight"], want) <= RELATIVE
