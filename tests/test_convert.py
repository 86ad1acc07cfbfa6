"""Adapters in another format, bit for bit: files made by the trainers' own code, there and back.

The trainers' own files are the reference: what comes back is them, tensor by tensor, and PEFT loads
what is written for it and computes the same.
"""

import itertools
import json
import shutil

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

import dora_export
from dora_export.adapter_writers import WRITERS
from dora_export.api_convert import TARGETS, convert
from dora_export.errors import AdapterError, DoraExportError, OutputError
from tests import oracle, peft_models, small, test_small_trainers
from tests.fixtures import MLX, TORCHTUNE
from tests.peft_models import ZOO, Zoo
from tests.trainers import loaded

# PEFT reads a name that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
PEFT_FILE, MLX_FILE = "adapter_model.safetensors", "adapters.safetensors"


def same(one, other):
    """Whether two sets of tensors are equal in names, types, shapes and bits."""
    return one.keys() == other.keys() and all(
        (t.dtype, t.shape, small.bits(t)) == (other[n].dtype, other[n].shape, small.bits(other[n]))
        for n, t in one.items()
    )


def without_embedding(folder):
    """mlx-lm's adapter less the layer that PEFT stores otherwise."""
    path = folder / MLX_FILE
    small.edit_tensors(path, lambda ts: {n: t for n, t in ts.items() if "embed" not in n})
    return folder


def mlx_case(case, folder):
    shutil.copytree(MLX / case / "adapter", folder)
    return without_embedding(folder)


# --- there and back


@pytest.mark.parametrize("case", ["dora", "lora"])
def test_mlx_to_peft_and_back_is_mlx_lms_own_file(tmp_path, case):
    adapter = mlx_case(case, tmp_path / "mlx")
    convert(adapter, "peft", tmp_path / "peft", base=MLX / case / "base")
    convert(tmp_path / "peft", "mlx", tmp_path / "back", base=MLX / case / "base")
    assert same(load_file(tmp_path / "back" / MLX_FILE), load_file(adapter / MLX_FILE))
    was, became = (json.loads((f / "adapter_config.json").read_text()) for f in
                   (adapter, tmp_path / "back"))  # fmt: skip
    assert became["fine_tune_type"] == was["fine_tune_type"]
    for key in ("rank", "scale"):
        assert became["lora_parameters"][key] == was["lora_parameters"][key]
    names = {n.rpartition(".")[0] for n in load_file(adapter / MLX_FILE)}
    keys = became["lora_parameters"]["keys"]
    assert {n for n in names if any(n == k or n.endswith(f".{k}") for k in keys)} == names


@pytest.mark.parametrize("case", ["dora", "lora"])
def test_torchtune_to_peft_and_back_is_torchtunes_own_file(tmp_path, case):
    base, own = TORCHTUNE / case / "base", TORCHTUNE / case / "adapter" / "adapter_model.pt"
    convert(own, "peft", tmp_path / "peft", base=base, allow_pickle=True)
    report = convert(tmp_path / "peft", "torchtune", tmp_path / "back", base=base)
    back = torch.load(tmp_path / "back" / "adapter_model.pt", weights_only=True)
    assert same(back, torch.load(own, weights_only=True))
    config = json.loads((own.parent / "adapter_config.json").read_text())
    became = json.loads((tmp_path / "back" / "adapter_config.json").read_text())
    assert {k: became[k] for k in ("r", "lora_alpha")} == {
        k: config[k] for k in ("r", "lora_alpha")
    }
    assert f"lora_rank {config['r']}" in report.notes[0]
    stored = load_file(tmp_path / "peft" / PEFT_FILE)
    q = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    assert not torch.equal(stored[q], back["layers.0.attn.q_proj.lora_b.weight"])  # rows moved
    assert torch.equal(stored[q].sort(dim=0)[0], back["layers.0.attn.q_proj.lora_b.weight"].sort(
        dim=0)[0])  # fmt: skip


def made_by_peft(folder, **fields):
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=list(ZOO), rank_pattern={"square": 3},
        alpha_pattern={"conv2": 5, "wide": 1}, **fields,
    )  # fmt: skip
    return peft_models.make(folder, Zoo(), config)


def outputs(model):
    """What every adapted layer of the zoo gives for one input."""
    layers = model.base_model.model
    torch.manual_seed(1)
    x = {"wide": torch.randn(2, 1536), "square": torch.randn(2, 192),
         "cancelled": torch.randn(2, 512), "table": torch.tensor([3, 5]),
         "conv1": torch.randn(1, 128, 5), "conv2": torch.randn(1, 96, 4, 4),
         "conv3": torch.randn(1, 48, 3, 4, 3)}  # fmt: skip
    with torch.no_grad():
        return {name: getattr(layers, name)(value) for name, value in x.items()}


@pytest.mark.parametrize("fields", [{"use_dora": True}, {}, {"use_rslora": True}], ids=str)
def test_peft_loads_what_is_written_and_computes_the_same(tmp_path, fields, recwarn):
    made = made_by_peft(tmp_path, **fields)
    convert(made.adapter, "peft", tmp_path / "again")
    assert same(load_file(tmp_path / "again" / PEFT_FILE), load_file(made.adapter / PEFT_FILE))
    model = Zoo()
    state = load_file(made.base / "model.safetensors")
    model.load_state_dict(state)
    model = peft.PeftModel.from_pretrained(model, tmp_path / "again").eval()
    assert not [w for w in recwarn if "missing adapter keys" in str(w.message)]
    want, got = outputs(made.model), outputs(model)
    assert all(torch.equal(got[name], value) for name, value in want.items())


def peft_pair(folder, *, dora=True, bias=False):
    """A Llama of small.py under names that all three formats know, and a PEFT adapter."""
    layers = {"self_attn.q_proj": (16, 12), "self_attn.k_proj": (16, 12), "mlp.down_proj": (12, 28),
              "self_attn.o_proj": (12, 16)}  # fmt: skip
    make = torch.Generator().manual_seed(2)
    base, adapter = {"model.embed_tokens.weight": torch.randn(40, 12, generator=make)}, {}
    for number, (leaf, (out, inner)) in itertools.product(range(2), layers.items()):
        name = f"model.layers.{number}.{leaf}"
        W = torch.randn(out, inner, generator=make) * 0.1
        base[f"{name}.weight"] = W
        if bias:
            base[f"{name}.bias"] = torch.randn(out, generator=make)
        key = small.PREFIX + name
        adapter[f"{key}.lora_A.weight"] = (torch.randn(3, inner, generator=make) * 0.1).bfloat16()
        adapter[f"{key}.lora_B.weight"] = torch.randn(out, 3, generator=make) * 0.2
        if dora:
            adapter[f"{key}.lora_magnitude_vector"] = W.norm(dim=1) * 1.1
    config = {**small.CONFIG, "num_attention_heads": 4, "head_dim": 4, "hidden_size": 16,
              "tie_word_embeddings": False}  # fmt: skip
    small.write_base(folder / "base", base, config=config)
    small.write_adapter(folder / "adapter", adapter, use_dora=dora,
                        target_modules=["q_proj", "k_proj", "down_proj", "o_proj"])  # fmt: skip
    return folder / "base", folder / "adapter"


FILES = {"peft": "", "mlx": "", "torchtune": "adapter_model.pt"}


@pytest.mark.parametrize("dora", [True, False])
@pytest.mark.parametrize("to", FILES)
def test_converted_adapter_merges_to_the_same_bytes(tmp_path, to, dora):
    base, adapter = peft_pair(tmp_path, dora=dora)
    report = convert(adapter, to, tmp_path / to, base=base)
    assert report.files
    assert sorted(p.name for p in (tmp_path / to).iterdir()) == list(report.files)
    there = tmp_path / to / FILES[to]
    dora_export.merge(base, adapter, tmp_path / "one")
    dora_export.merge(base, there, tmp_path / "two", verify="full", allow_pickle=True)
    one, two = (tmp_path / n / "model.safetensors" for n in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    assert one.read_bytes() != (base / "model.safetensors").read_bytes()
    convert(there, "peft", tmp_path / "back", base=base, allow_pickle=True)
    assert same(load_file(tmp_path / "back" / PEFT_FILE), load_file(adapter / PEFT_FILE))
    before, after = (
        {u.target: (u.kind, u.scaling, u.rank) for u in dora_export.load_adapter(a).updates}
        for a in (adapter, tmp_path / "back")
    )
    assert before == after


def test_embedding_of_mlx_is_pefts_transposed(tmp_path):
    shutil.copytree(MLX / "lora" / "adapter", tmp_path / "mlx")
    make = torch.Generator().manual_seed(1)
    state = load_file(MLX / "lora" / "base" / "model.safetensors")
    tokens, dim = state["model.embed_tokens.weight"].shape
    a, b = torch.randn(tokens, 3, generator=make), torch.randn(3, dim, generator=make)
    small.edit_tensors(tmp_path / "mlx" / MLX_FILE, lambda ts: {
        **ts, "model.embed_tokens.lora_a": a, "model.embed_tokens.lora_b": b})  # fmt: skip
    with pytest.raises(AdapterError, match=r"embed_tokens.*ties it to its head.*pass --base"):
        convert(tmp_path / "mlx", "peft", tmp_path / "peft")
    convert(tmp_path / "mlx", "peft", tmp_path / "peft", base=MLX / "lora" / "base")
    stored = load_file(tmp_path / "peft" / PEFT_FILE)
    key = "base_model.model.model.embed_tokens.lora_embedding_"
    assert torch.equal(stored[f"{key}A"], a.T)
    assert torch.equal(stored[f"{key}B"], b.T)


def test_what_rides_along_goes_along_to_peft(tmp_path):
    base, adapter = peft_pair(tmp_path)
    with_saved_module(adapter)
    convert(adapter, "peft", tmp_path / "again", base=base)
    config = json.loads((tmp_path / "again/adapter_config.json").read_text())
    assert config["modules_to_save"] == ["model.embed_tokens"]
    dora_export.merge(base, adapter, tmp_path / "one")
    dora_export.merge(base, tmp_path / "again", tmp_path / "two", verify="full")
    one, two = (tmp_path / n / "model.safetensors" for n in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()


def test_tokenizer_goes_along(tmp_path):
    _, adapter = peft_pair(tmp_path)
    (adapter / "tokenizer.json").write_text("{}")
    convert(adapter, "mlx", tmp_path / "mlx")
    assert (tmp_path / "mlx" / "tokenizer.json").read_text() == "{}"


def test_target_modules_are_last_names_only_where_all_of_them_are_adapted(tmp_path):
    base, adapter = peft_pair(tmp_path)
    convert(adapter, "peft", tmp_path / "all", base=base)
    convert(adapter, "peft", tmp_path / "unknown")
    small.edit_tensors(adapter / PEFT_FILE, lambda ts: {
        n: t for n, t in ts.items() if "layers.0" in n or "q_proj" not in n})  # fmt: skip
    small.edit_json(adapter / "adapter_config.json", layers_to_transform=[0, 1])
    convert(adapter, "peft", tmp_path / "some", base=base)
    said = {n: json.loads((tmp_path / n / "adapter_config.json").read_text())["target_modules"]
            for n in ("all", "unknown", "some")}  # fmt: skip
    assert said["all"] == ["down_proj", "k_proj", "o_proj", "q_proj"]
    assert len(said["unknown"]) == 8
    assert "model.layers.0.self_attn.q_proj" in said["some"]
    assert len(said["some"]) == 7


# --- refusals


def edit(path, change):
    small.edit_tensors(path / PEFT_FILE, change)


def with_saved_module(adapter):
    key = f"{small.PREFIX}model.embed_tokens.weight"
    edit(adapter, lambda ts: {**ts, key: torch.ones(40, 12)})
    small.edit_json(adapter / "adapter_config.json", modules_to_save=["embed_tokens"])


def with_ranks(adapter):
    small.edit_json(adapter / "adapter_config.json", alpha_pattern={"q_proj": 2.0})


def unchanged(adapter):
    """The options alone make it one that cannot be held."""


REFUSALS = {
    "modules_to_save into MLX": (
        "mlx", with_saved_module, {}, "embed_tokens.weight: a whole copy of it"),
    "modules_to_save into torchtune": ("torchtune", with_saved_module, {}, "a whole copy of it"),
    "scalings into MLX": ("mlx", with_ranks, {}, "differ in scaling, MLX has one"),
    "scalings into torchtune": ("torchtune", with_ranks, {}, "differ in scaling"),
    "divided magnitudes": (
        "mlx", unchanged, {"magnitude_is_normalised": True}, "divided by the norm beforehand"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_what_a_format_cannot_hold_is_refused(tmp_path, case):
    to, change, options, remedy = REFUSALS[case]
    base, adapter = peft_pair(tmp_path)
    change(adapter)
    out = {"merge": tmp_path / "merged", "lora": tmp_path / "lora"}
    with pytest.raises(AdapterError, match=f"(?s){remedy}.*\nMerge it instead") as refusal:
        convert(adapter, to, tmp_path / "out", base=base, **options)
    assert not (tmp_path / "out").exists()
    # What the message names as the way out is one.
    dora_export.merge(base, adapter, out["merge"], **options)
    if "--to lora --rank R --base BASE" in str(refusal.value):
        convert(adapter, "lora", out["lora"], base=base, rank=2, **options)
    else:
        with pytest.raises(AdapterError, match="a plain LoRA cannot hold all of this"):
            convert(adapter, "lora", out["lora"], base=base, rank=2, **options)


def test_embedding_magnitudes_differ_between_mlx_and_peft(tmp_path):
    with pytest.raises(AdapterError, match="one magnitude per token, PEFT has one per dimension"):
        convert(MLX / "dora" / "adapter", "peft", tmp_path / "out")
    made = made_by_peft(tmp_path, use_dora=True)
    with pytest.raises(
        AdapterError, match=r"(?s)differ in rank.*cancelled.weight and 6 more: .*not known"
    ):
        convert(made.adapter, "mlx", tmp_path / "out")


def test_tied_embedding_is_another_thing_in_mlx(tmp_path):
    base, adapter = peft_pair(tmp_path, dora=False)
    key = f"{small.PREFIX}model.embed_tokens.lora_embedding_"
    edit(adapter, lambda ts: {**ts, f"{key}A": torch.ones(3, 40), f"{key}B": torch.ones(12, 3)})
    small.edit_json(adapter / "adapter_config.json", target_modules=["embed_tokens", "q_proj"])
    with pytest.raises(AdapterError, match=r"embed_tokens.*matters to MLX; pass --base"):
        convert(adapter, "mlx", tmp_path / "out")
    convert(adapter, "mlx", tmp_path / "untied", base=base)
    small.edit_json(base / "config.json", tie_word_embeddings=True)
    with pytest.raises(AdapterError, match="which MLX would change as well"):
        convert(adapter, "mlx", tmp_path / "out", base=base)


def test_torchtune_needs_the_base_and_layers_without_biases(tmp_path):
    base, adapter = peft_pair(tmp_path, bias=True)
    with pytest.raises(AdapterError, match="Pass --base"):
        convert(adapter, "torchtune", tmp_path / "out")
    with pytest.raises(
        AdapterError,
        match=r"torchtune scales the layer's bias .* trainer does not, and the base has one",
    ):
        convert(adapter, "torchtune", tmp_path / "out", base=base)
    small.edit_json(base / "config.json", model_type="strange")
    plain = peft_pair(tmp_path / "plain")
    small.edit_json(plain[0] / "config.json", model_type="strange")
    with pytest.raises(DoraExportError, match="'strange'"):
        convert(plain[1], "torchtune", tmp_path / "out", base=plain[0])


def test_torchtunes_rows_need_the_base(tmp_path):
    own = TORCHTUNE / "lora" / "adapter" / "adapter_model.pt"
    told = r"(?s)q_proj.weight and \d more: the order of its rows .* pass --base.*\nPass --base\.$"
    with pytest.raises(AdapterError, match=told):
        convert(own, "peft", tmp_path / "out", allow_pickle=True)


def test_adapter_of_another_base_is_refused(tmp_path):
    _, adapter = peft_pair(tmp_path)
    other, _ = small.write_pair(tmp_path / "other")
    with pytest.raises(DoraExportError, match="match this base"):
        convert(adapter, "peft", tmp_path / "out", base=other)


def test_magnitudes_per_input_have_no_place(tmp_path):
    path = tmp_path / "state.safetensors"
    save_file({"x.linear.weight": torch.ones(4, 6), "x.lora.A": torch.ones(6, 2),
               "x.lora.B": torch.ones(2, 4), "x.m": torch.ones(1, 6)}, path)  # fmt: skip
    with pytest.raises(AdapterError, match="one magnitude per input"):
        convert(path, "peft", tmp_path / "out", alpha=4.0, axis="in")


@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        (("--to", "gguf"), "Expected one of peft, mlx, torchtune, lycoris, diffusers, lora"),
        (("--to", "mlx", "--rank", 4), "only --to lora has a rank"),
        (("--to", "lora"), "needs --rank"),
        (("--to", "lora", "--rank", 0), "needs --rank"),
        (("--to", "lora", "--rank", 4), "needs --base"),
    ],
    ids=str,
)
def test_command_says_what_is_missing(tmp_path, options, remedy):
    _, adapter = peft_pair(tmp_path)
    result = small.run("convert", adapter, "-o", tmp_path / "out", *options)
    assert result.exit_code == 2, result.output
    assert remedy in result.stderr
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten(tmp_path):
    _, adapter = peft_pair(tmp_path)
    convert(adapter, "mlx", tmp_path / "out")
    before = small.entries(tmp_path / "out")
    with pytest.raises(OutputError, match="exists"):
        convert(adapter, "mlx", tmp_path / "out")
    with pytest.raises(OutputError, match="the adapter"):
        convert(adapter, "mlx", adapter)
    assert small.entries(tmp_path / "out") == before


def test_every_target_is_named_by_the_command(tmp_path):
    assert (*(w.name for w in WRITERS), "lora") == TARGETS
    assert all(name in small.run("convert", "--help").output for name in TARGETS)


# --- biases that a trainer scales along, and norms that leave the scaling out


class Trained(torch.nn.Module):
    """Layers named as test_small_trainers' QDoRA names them, for PEFT to wrap."""

    def __init__(self, state):
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.ModuleDict()])
        for layer, (out, inner) in test_small_trainers.SHAPES.items():
            bias = f"{layer}.bias" in state
            self.layers[0][layer.removeprefix("layers.0.")] = torch.nn.Linear(inner, out, bias)
        self.load_state_dict(state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scaled_biases_go_to_peft_as_trained_ones(tmp_path, dtype, recwarn):
    biases = ["layers.0.q", "layers.0.up"]
    state, adapter, _ = test_small_trainers.write_qdora(tmp_path, dtype, biases=biases)
    base, own, _ = test_small_trainers.qdora_paths(tmp_path)
    report = convert(own, "peft", tmp_path / "peft", base=base)
    assert "those of 2 layers go along scaled" in report.notes[0]
    dora_export.merge(base, own, tmp_path / "one")
    dora_export.merge(base, tmp_path / "peft", tmp_path / "two", verify="full")
    one, two = (tmp_path / n / "model.safetensors" for n in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    if dtype is not torch.float32:
        return
    model = peft.PeftModel.from_pretrained(Trained(state), tmp_path / "peft").eval()
    assert not [w for w in recwarn if "missing adapter keys" in str(w.message)]
    for layer, (_, inner) in test_small_trainers.SHAPES.items():
        x = torch.randn(5, inner)
        names = ("dora_layer.lora_A.weight", "dora_layer.lora_B.weight",
                 "magnitude_layer.magnitude")  # fmt: skip
        stored = (state[f"{layer}.weight"], *(adapter[f"{layer}.{n}"] for n in names))
        terms = map(oracle.float64, stored)
        b = oracle.float64(state[f"{layer}.bias"]) if layer in biases else 0.0
        want = test_small_trainers.qdora_forward(oracle.float64(x), *terms, b)
        with torch.no_grad():
            got = oracle.float64(model.base_model.model.get_submodule(layer)(x))
        assert np.abs(got - want).max() <= 2e-6 * np.abs(want).max()


def test_scaled_biases_are_refused_where_a_format_holds_none_and_peft_is_named(tmp_path):
    test_small_trainers.write_qdora(tmp_path, biases=["layers.0.q"])
    base, own, _ = test_small_trainers.qdora_paths(tmp_path)
    with pytest.raises(
        AdapterError,
        match=r"(?s)layers\.0\.down\.weight and 2 more: its trainer scales .*\nPass --base\.$",
    ):
        convert(own, "peft", tmp_path / "out")
    reason = (
        r"layers\.0\.q\.weight: its trainer scales the layer's bias .* the base has one, and the "
        r"{} format holds none; PEFT's does \(--to peft\)\s.*Merge it instead\.$"
    )
    for to, name in (("mlx", "MLX"), ("lycoris", "LyCORIS"), ("diffusers", "diffusers")):
        with pytest.raises(AdapterError, match="(?s)" + reason.format(name)):
            convert(own, to, tmp_path / "out", base=base)
    assert not (tmp_path / "out").exists()


def test_torchtunes_biases_stay_torchtunes_and_become_pefts(tmp_path):
    base, own = (TORCHTUNE / "qwen2-dora" / n for n in ("base", "adapter/adapter_model.pt"))
    convert(own, "torchtune", tmp_path / "again", base=base, allow_pickle=True)
    back = torch.load(tmp_path / "again" / "adapter_model.pt", weights_only=True)
    assert same(back, torch.load(own, weights_only=True))
    convert(own, "peft", tmp_path / "peft", base=base, allow_pickle=True)
    assert json.loads((tmp_path / "peft/adapter_config.json").read_text())["bias"] == "lora_only"
    dora_export.merge(base, own, tmp_path / "one", allow_pickle=True)
    dora_export.merge(base, tmp_path / "peft", tmp_path / "two", verify="full")
    one, two = (tmp_path / n / "model.safetensors" for n in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()


# --- the nearest plain LoRA


def best(update, rank):
    """The truncated SVD, and its share of the squared norm, in float64."""
    flat = update.reshape(update.shape[0], -1)
    left, values, right = np.linalg.svd(flat, full_matrices=False)
    kept = (left[:, :rank] * values[:rank]) @ right[:rank]
    return kept.reshape(update.shape), float((values[:rank] ** 2).sum() / (values**2).sum())


@pytest.mark.parametrize("rank", [2, 8])
def test_plain_lora_is_the_truncated_svd_that_peft_loads(tmp_path, rank, recwarn):
    made = made_by_peft(tmp_path, use_dora=True)
    report = convert(made.adapter, "lora", tmp_path / "lora", base=made.base, rank=rank)
    model = Zoo()
    model.load_state_dict(load_file(made.base / "model.safetensors"))
    model = peft.PeftModel.from_pretrained(model, tmp_path / "lora").eval()
    assert not [w for w in recwarn if "missing adapter keys" in str(w.message)]
    kept = {layer.name: layer.energy for layer in report.layers}
    assert len(kept) == len(ZOO)
    for layer in made.layers:
        W = peft_models.base_weight(made, layer)
        update = peft_models.merged_weight(made, layer) - W
        nearest, share = best(update, rank)
        got = oracle.float64(getattr(model.base_model.model, layer.module).get_delta_weight(
            "default"))  # fmt: skip
        size = np.linalg.norm(update)
        assert np.linalg.norm(got - nearest) <= 1e-5 * size, layer.module
        assert abs(kept[layer.tensor] - share) <= 1e-9
        worse, _ = best(update, rank - 1)
        if layer.module != "cancelled":  # whose W' is nearly -W, with s B A's own rank
            assert np.linalg.norm(worse - nearest) > 1e-2 * size
    energies = [layer.energy for layer in report.layers]
    assert energies == sorted(energies)


@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16])
def test_plain_lora_of_gpt2s_conv1d_is_transposed(tmp_path, base_dtype):
    config = GPT2Config(n_layer=1, n_embd=24, n_head=2, vocab_size=50, n_positions=16)
    made = peft_models.make(tmp_path, GPT2LMHeadModel(config), peft.LoraConfig(
        r=3, lora_alpha=5, use_dora=True, target_modules=["c_attn", "c_proj"],
        fan_in_fan_out=True), base_dtype)  # fmt: skip
    convert(made.adapter, "lora", tmp_path / "lora", base=made.base, rank=4)
    model = GPT2LMHeadModel(config)
    wrapped = peft.PeftModel.from_pretrained(model, tmp_path / "lora")
    for layer in made.layers:
        update = peft_models.merged_weight(made, layer) - peft_models.base_weight(made, layer)
        module = wrapped.base_model.model.get_submodule(layer.module)
        got = oracle.float64(module.get_delta_weight("default"))
        nearest, _ = best(update, 4)
        assert np.linalg.norm(got - nearest) <= 1e-5 * np.linalg.norm(update), layer.module


def test_plain_lora_of_enough_rank_merges_to_the_same_model(tmp_path):
    base, adapter = peft_pair(tmp_path)
    report = convert(adapter, "lora", tmp_path / "lora", base=base, rank=16)
    assert report.energy == pytest.approx(1.0, abs=1e-12)
    dora_export.merge(base, adapter, tmp_path / "one")
    dora_export.merge(base, tmp_path / "lora", tmp_path / "two", verify="full")
    one, two = loaded(tmp_path / "one"), loaded(tmp_path / "two")
    for name, tensor in one.items():
        assert (two[name] - tensor).abs().max() <= 1e-6, name


def test_config_is_one_that_engines_of_plain_lora_take(tmp_path):
    base, adapter = peft_pair(tmp_path)
    convert(adapter, "lora", tmp_path / "lora", base=base, rank=4)
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    # vLLM, vllm/lora/peft_helper.py: no use_dora, no modules_to_save, bias "none"; one rank.
    assert (config["use_dora"], config["bias"], config.get("modules_to_save")) == (
        False, "none", None)  # fmt: skip
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (4, 4, {})
    stored = load_file(tmp_path / "lora" / PEFT_FILE)
    assert not any("magnitude" in name for name in stored)
    assert {t.shape[0] for n, t in stored.items() if "lora_A" in n} == {4}
    manifest = json.loads((tmp_path / "lora" / "dora_export.json").read_text())["converted"]
    assert (manifest["exact"], manifest["rank"], len(manifest["layers"])) == (False, 4, 8)
    assert 0 < manifest["energy"] < 1


def test_several_adapters_become_one_plain_lora(tmp_path):
    base, first = peft_pair(tmp_path)
    shutil.copytree(first, tmp_path / "second")
    edit(tmp_path / "second", lambda ts: {n: t.flip(0) for n, t in ts.items()})
    adapters, weights = [first, tmp_path / "second"], [1.0, 0.5]
    convert(adapters, "lora", tmp_path / "lora", base=base, rank=16, weights=weights)
    dora_export.merge(base, adapters, tmp_path / "one", weights=weights)
    dora_export.merge(base, tmp_path / "lora", tmp_path / "two")
    one, two = loaded(tmp_path / "one"), loaded(tmp_path / "two")
    assert all((two[name] - tensor).abs().max() <= 1e-5 for name, tensor in one.items())
    with pytest.raises(AdapterError, match=r"2 adapters: only one.*--to lora"):
        convert(adapters, "mlx", tmp_path / "out")


def test_what_is_no_product_cannot_be_a_plain_lora(tmp_path):
    base, adapter = peft_pair(tmp_path)
    with_saved_module(adapter)
    with pytest.raises(AdapterError, match=r"(?s)embed_tokens.*trained whole.*Merge it instead"):
        convert(adapter, "lora", tmp_path / "out", base=base, rank=4)


def test_command_tells_what_is_kept_and_json_has_every_layer(tmp_path):
    base, adapter = peft_pair(tmp_path)
    arguments = ("--to", "lora", "--rank", 2, "--base", base)
    result = small.run("convert", adapter, *arguments, "-o", tmp_path / "one")
    assert result.exit_code == 0, result.output
    assert "of the update's energy in 8 layers" in result.stdout
    assert "least is kept of" in result.stdout
    result = small.run("convert", adapter, *arguments, "-o", tmp_path / "two", "--json")
    report = json.loads(result.stdout)
    assert len(report["layers"]) == 8
    assert report["layers"][0]["energy"] == min(layer["energy"] for layer in report["layers"])
    one, two = (tmp_path / n / PEFT_FILE for n in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()


def test_inspect_names_the_way_out(tmp_path):
    _, adapter = peft_pair(tmp_path)
    assert "convert --to lora --rank R" in small.run("inspect", adapter).output
    _, plain = peft_pair(tmp_path / "plain", dora=False)
    assert "convert --to lora" not in small.run("inspect", plain).output
