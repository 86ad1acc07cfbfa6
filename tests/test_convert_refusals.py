"""What keeps an adapter from being written in a format: every reason, for every format; and names.

Adapters are put together in normal form here, since the files of one trainer give few of them; that
each is written once the reason is gone is checked beside.
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dora_export.adapter_writers import WRITERS, Source
from dora_export.adapters.model import Adapter
from dora_export.checkpoints import open_checkpoint
from dora_export.errors import AdapterError
from dora_export.tensors import BF16, F16, F32, HeldBytes, Operand, TensorRef
from dora_export.update import Dense, Hadamard, Kronecker, Product, Update
from tests import small

Q, O, TABLE = (f"model.{n}.weight" for n in (  # noqa: E741
    "layers.0.self_attn.q_proj", "layers.0.self_attn.o_proj", "embed_tokens"))  # fmt: skip
CONV = "model.layers.0.conv.weight"
R = 2


def ref(name, *shape, dtype=F32):
    values = np.arange(1, 1 + int(np.prod(shape)), dtype=np.float32)
    raw = values if dtype is F32 else np.ones(values.size, np.uint16)
    return TensorRef(name, dtype, shape, HeldBytes(Path("adapter"), raw.view(np.uint8)))


def product(target=Q, out=8, inner=6, m=False, rank=R, **fields):
    """A low-rank update as a reader gives it."""
    key = target.removesuffix(".weight")
    made = Update(
        target, "dora" if m else "lora", (f"{key}.A", f"{key}.B"),
        down=Operand.plain(ref(f"{key}.A", rank, inner)),
        up=Operand.plain(ref(f"{key}.B", out, rank)), scaling=1.5,
        magnitude=Operand.vector(ref(f"{key}.m", out)) if m else None,
    )  # fmt: skip
    return replace(made, **fields)


def kernel(target=CONV):
    """A convolution's: A keeps its kernel."""
    down, up = ref("a", R, 6, 3), ref("b", 8, R, 1)
    return product(target, down=Operand.matrix(down), up=Operand.matrix(up), layout="oi")


def whole(kind, target=TABLE, *shape, **fields):
    return Update(target, kind, ("value",), value=ref("value", *(shape or (10, 6))), **fields)


def table(m=False, layout="io", **fields):
    """An embedding's: (dim, tokens) in PEFT, (tokens, dim) in MLX."""
    out, inner = (6, 10) if layout == "io" else (10, 6)
    return product(TABLE, out, inner, m, layout=layout, **fields)


def without_product(delta):
    return product(down=None, up=None, delta=delta)


HALF = Product(Operand.plain(ref("l", 8, R)), Operand.plain(ref("r", R, 6)))
LOHA = without_product(Hadamard(HALF, HALF))
LOKR = without_product(Kronecker(Operand.plain(ref("f", 2, 2)), Operand.plain(ref("s", 4, 3))))
DIFF = without_product(Dense(Operand.plain(ref("d", 8, 6))))
CORE = product(down=Operand.computed((ref("c", R, R), ref("x", R, 6)), (R, 6), np.matmul))
EVERY = ("peft", "mlx", "torchtune", "lycoris", "diffusers")
REPEATED = {"layer_replication": ((0, 1), (0, 1))}
MIXED = [product(), product(O, 6, 8, m=True)]
# Updates, the formats that refuse them, the reason, what of the adapter is not as usual.
SHARED = {
    "a parameter": ([product("model.layers.0.experts.gate_up_proj")], EVERY,
                    "gate_up_proj: a parameter that is no layer's weight", {}),
    "LoHa": ([LOHA], EVERY, "q_proj.weight: its update is no low-rank product", {}),
    "LoKr": ([LOKR], EVERY, "its update is no low-rank product", {}),
    "a difference": ([DIFF], EVERY, "its update is no low-rank product", {}),
    "a core": ([CORE], EVERY, "its factors are computed from several tensors", {}),
    "divided": ([product(m=True, magnitude_is_factor=True)], EVERY,
                "its magnitudes were divided by the norm beforehand", {}),
    "an expert": ([product(index=1)], EVERY, "it changes a part of a fused weight", {}),
    "fused rows": ([product(rows=(0, 8))], EVERY, "it changes a part of a fused weight", {}),
    "per input": ([product(m=True, axis="in", magnitude=Operand.vector(ref("m", 6)))],
                  ("peft", "mlx", "torchtune", "diffusers"), "one magnitude per input", {}),
    "an eps": ([product(m=True, eps=2.0**-23)], ("peft", "mlx", "torchtune", "diffusers"),
               "1.19e-07 is added to the norm, the format adds nothing", {}),
    "an open order": ([product(row_order="torchtune")], EVERY,
                      "the order of its rows depends on the base; pass --base", {}),
    "a copy": ([product(), whole("replace")], ("mlx", "torchtune", "lycoris", "diffusers"),
               "embed_tokens.weight: a whole copy of it", {}),
    "a copy beside": ([product(), whole("replace", Q, 8, 6)], ("peft",),
                      "a whole copy beside a low-rank product of the same layer", {}),
    "an addition": ([product(), whole("add")], EVERY, "a whole difference, not factors", {}),
    "tokens": ([product(), whole("rows", row_indices=tuple(range(10)))], EVERY,
               "rows of its own (trained tokens)", {}),
    "magnitudes": ([product(), Update(O, "magnitude", ("m",), magnitude=Operand.vector(
        ref("m", 6)))], EVERY, "o_proj.weight: magnitudes without factors", {}),
    "no product": ([whole("replace")], ("peft", "mlx", "torchtune"),
                   "no layer has a low-rank product", {}),
    "some with m": (MIXED, ("peft",), "some layers have magnitudes and some have not", {}),
    "some with m, one method": (MIXED, ("mlx", "torchtune"), "layers differ in method", {}),
    "some with m, of a component": (MIXED, ("diffusers",),
                                    "unet: some layers have magnitudes and some have not", {}),
    "ranks": ([product(), product(O, 6, 8, rank=3)], ("mlx", "torchtune"),
              "layers differ in rank", {}),
    "scalings": ([product(), product(O, 6, 8, scaling=0.5)], ("mlx", "torchtune"),
                 "layers differ in scaling", {}),
    "repeated layers": ([product()], ("mlx", "torchtune", "lycoris", "diffusers"),
                        "layers of the base are repeated", REPEATED),
    "an unknown layer": ([product("model.blocks.0.q.weight")], ("mlx",),
                         "what mlx-lm calls this layer is not known", {}),
    "an unknown layer of torchtune": ([product("model.layers.0.odd.weight")], ("torchtune",),
                                      "torchtune's text models have no such layer", {}),
    "a kernel": ([kernel("model.layers.0.conv.weight")], ("mlx",), "a convolution", {}),
    "an embedding": ([table()], ("lycoris", "diffusers"), "embed_tokens.weight: an embedding", {}),
    "magnitudes per dimension": ([table(m=True)], ("mlx",),
                                 "one magnitude per dimension, MLX has one per token", {}),
    "magnitudes per token": ([table(m=True, layout="oi")], ("peft",),
                             "one magnitude per token, PEFT has one per dimension", {}),
    "Conv1D": ([product(O, 8, 6)], ("lycoris", "diffusers"),
               "the base stores it (in, out), as GPT-2 does", {}),
    "Conv1D, by the config": ([product()], ("lycoris", "diffusers"),
                              "the base stores it (in, out)", {"square_io": True}),
    "names alike": ([product("model.a.b.weight"), product("model.a_b.weight")], ("lycoris",),
                    "both are lora_unet_model_a_b once '.' is '_'", {}),
    "no eps": ([product(m=True)], ("lycoris",), "DoRA trained without an eps, as in PEFT", {}),
    "another eps": ([product(m=True, eps=2.0**-7)], ("lycoris",),
                    "0.0078 was added to the norm while training, LyCORIS adds 1.2e-07", {}),
    "magnitudes of another type": (
        [product(m=True, eps=0.1, magnitude=Operand.vector(replace(
            ref("m", 8), dtype=replace(F32, name="F8_E4M3"))))], ("lycoris",),
        "its magnitudes are of type F8_E4M3", {}),
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A base that is at once a Llama and, for the image formats, the model of a UNet."""
    tensors = {Q: torch.zeros(8, 6), O: torch.zeros(6, 8), TABLE: torch.zeros(10, 6)}
    config = {**small.CONFIG, "_class_name": "UNet2DConditionModel", "hidden_size": 6,
              "num_attention_heads": 2, "head_dim": 4, "tie_word_embeddings": False}  # fmt: skip
    return open_checkpoint(
        small.write_base(tmp_path_factory.mktemp("base"), tensors, config=config)
    )


def source(updates, base, **fields):
    fields = {"format": "peft", **fields}
    adapter = Adapter(path=Path("adapter"), files=(), tensors={}, updates=tuple(updates), **fields)
    return Source(adapter, tuple(updates), base)


def write(to, *given, **fields):
    return next(w for w in WRITERS if w.name == to).write(source(*given, **fields))


@pytest.mark.parametrize(
    ("case", "to"), [(case, to) for case, (_, refusing, *_) in SHARED.items() for to in refusing]
)
def test_reason_is_told(case, to, base):
    updates, _, reason, fields = SHARED[case]
    with pytest.raises(AdapterError) as refusal:
        write(to, updates, base, **fields)
    assert reason in str(refusal.value)
    assert "\nMerge it instead" in str(refusal.value)


def test_reason_of_many_layers_is_told_once(base):
    layers = [product(f"model.layers.{i}.self_attn.q_proj.weight", m=True) for i in range(20)]
    with pytest.raises(AdapterError) as refusal:
        write("mlx", [replace(u, magnitude_is_factor=True) for u in layers], base)
    assert "layers.0.self_attn.q_proj.weight and 19 more: its magnitudes" in str(refusal.value)
    assert str(refusal.value).count("divided by the norm") == 1


@pytest.mark.parametrize("to", EVERY)
def test_what_has_no_such_reason_is_written(to, base):
    written = write(to, [product(), product(O, 6, 8)], base)
    factors = [t for t in written.tensors if not t.name.endswith("alpha")]
    assert len(factors) == 4
    stored = sorted(np.asarray(t.raw()).ravel().view(np.float32).max() for t in factors)
    assert stored == [R * 6, R * 6, R * 8, R * 8]


@pytest.mark.parametrize("format_", ["peft", "mlx"])
def test_tied_embeddings_are_another_thing_in_the_other_format(format_, base):
    """LoRA on a tied table changes the head as well in MLX, and not in PEFT."""
    to = {"peft": "mlx", "mlx": "peft"}[format_]
    updates = [table(layout="io" if format_ == "peft" else "oi")]
    assert write(to, updates, base, format=format_).tensors
    assert write(format_, updates, base, format=format_).tensors
    tied = replace(base, config={**base.config, "tie_word_embeddings": True})
    with pytest.raises(AdapterError, match="the base ties it to its head, which"):
        write(to, updates, tied, format=format_)
    with pytest.raises(AdapterError, match=r"ties it to its head matters.*pass --base"):
        write(to, updates, None, format=format_)
    assert write(format_, updates, tied, format=format_).tensors


def test_component_of_a_pipeline_has_to_be_known(base):
    plain = replace(base, config={})
    with pytest.raises(AdapterError, match="which component of a pipeline it is in is not said"):
        write("diffusers", [product()], plain)
    with pytest.raises(AdapterError, match=r"(?s)does not tell whether .* not said.*\nPass --base"):
        write("diffusers", [product()], None)
    for to in ("lycoris", "diffusers"):
        with pytest.raises(AdapterError, match=r"whether 'transformer\.' is a component.*--base"):
            write(to, [product("transformer.blocks.0.q.weight")], None)
    with pytest.raises(AdapterError, match="how LyCORIS calls this component of a pipeline is not"):
        write("lycoris", [product("controlnet.decoder.q.weight")], None)


def test_scaling_that_no_alpha_gives_is_refused(base):
    scalings = np.random.default_rng(0).random(50) + 0.5
    odd = next(float(s) for s in scalings if s * 49 / 49 != s)
    around = [odd * 49, np.nextafter(odd * 49, 99), np.nextafter(odd * 49, 0)]
    assert all(alpha / 49 != odd for alpha in around)
    with pytest.raises(AdapterError, match="no alpha gives the scaling"):
        write("peft", [product(rank=49, scaling=odd)], base)
    even = next(float(s) for s in scalings if s * 49 / 49 == s)
    config = write("peft", [product(rank=49, scaling=even)], base).config
    assert config["lora_alpha"] / config["r"] == even


def test_config_of_peft_says_what_the_adapter_says(base):
    """A rank or alpha of one layer is under its last name, or its path where others share that."""
    layers = [product(f"model.layers.{i}.self_attn.q_proj.weight", rank=3 if i == 2 else R)
              for i in range(3)]  # fmt: skip
    layers += [product(O, 6, 8, scaling=2.5)]
    config = write(
        "peft", layers, base, square_io=True, ensure_weight_tying=True, **REPEATED
    ).config
    assert config["rank_pattern"] == {r"^model\.layers\.2\.self_attn\.q_proj": 3}
    assert (config["r"], config["lora_alpha"]) == (R, 3)
    assert config["alpha_pattern"] == {r"^model\.layers\.2\.self_attn\.q_proj": 4.5, "o_proj": 5}
    assert (config["fan_in_fan_out"], config["ensure_weight_tying"]) == (True, True)
    assert config["layer_replication"] == [[0, 1], [0, 1]]
    own = write("peft", layers, base, format="mlx", ensure_weight_tying=True).config
    assert not own["ensure_weight_tying"]
    assert own["layer_replication"] is None


@pytest.mark.parametrize(("to", "format_"), [("peft", "mlx"), ("mlx", "peft")])
def test_embeddings_lie_transposed_in_mlx(to, format_, base):
    made = table(layout="oi" if format_ == "mlx" else "io")
    stored = {t.name.rpartition(".")[2]: t for t in write(to, [made], base, format=format_).tensors}
    one, two = ("lora_embedding_A", "lora_embedding_B") if to == "peft" else ("lora_a", "lora_b")
    a, b = stored[one].raw(), stored[two].raw()
    down, up = (o.value(TensorRef.raw) for o in (made.down, made.up))
    if format_ == "mlx":  # up is (tokens, rank), as MLX's lora_a is
        assert np.array_equal(a.reshape(stored[one].shape), up.T)
        assert np.array_equal(b.reshape(stored[two].shape), down.T)
    else:
        assert np.array_equal(a.reshape(stored[one].shape), down.T)
        assert np.array_equal(b.reshape(stored[two].shape), up.T)
    same = {
        t.name.rpartition(".")[2]: t for t in write(format_, [made], base, format=format_).tensors
    }
    own = ("lora_embedding_A", "lora_embedding_B") if format_ == "peft" else ("lora_a", "lora_b")
    first, second = (down, up) if format_ == "peft" else (up, down)
    assert np.array_equal(same[own[0]].raw().reshape(same[own[0]].shape), first)
    assert np.array_equal(same[own[1]].raw().reshape(same[own[1]].shape), second)


@pytest.mark.parametrize(
    ("layers", "names"),
    [
        (["unet.a", "text_encoder.b"], ["lora_unet_a", "lora_te_b"]),
        (["unet.a", "text_encoder.b", "text_encoder_2.c"],
         ["lora_unet_a", "lora_te1_b", "lora_te2_c"]),
        (["text_encoder.b", "text_encoder_2.encoder.block.0.q"],
         ["lora_te1_b", "lora_te3_encoder_block_0_q"]),
        (["prior.a", "text_encoder.b"], ["lora_prior_unet_a", "lora_prior_te_b"]),
        (["net.a"], ["lycoris_net_a"]),
    ],
)  # fmt: skip
def test_components_are_called_as_sd_scripts_and_onetrainer_call_them(layers, names):
    tensors = write("lycoris", [product(f"{layer}.weight") for layer in layers], None).tensors
    assert [t.name.partition(".")[0] for t in tensors[::3]] == names


def test_alpha_of_lycoris_is_the_adapters_own_or_exact(base):
    own = TensorRef(
        "own.alpha", F16, (), HeldBytes(Path("adapter"), np.float16([1]).view(np.uint8))
    )
    keys = ("q.A", "q.B", "own.alpha")
    adapter = replace(source([], base).adapter, tensors={"own.alpha": own},
                      updates=(product(scaling=0.5, source_keys=keys),))  # fmt: skip
    writer = next(w for w in WRITERS if w.name == "lycoris")
    kept = writer.write(Source(adapter, adapter.updates, base))
    assert kept.tensors[-1].dtype is F16  # and not float32, in which it would be written anew
    assert np.array_equal(kept.tensors[-1].raw().ravel(), own.raw())
    short, long = (write("lycoris", [product(scaling=s)], base) for s in (0.5, 0.7))
    assert (short.tensors[-1].dtype, short.notes) == (F32, ())
    assert long.tensors[-1].dtype.name == "F64"
    assert float(long.tensors[-1].raw().view(np.float64)[()]) / R == 0.7
    assert "alpha is in float64 in 1 of 1 layers" in long.notes[0]


def test_what_other_loaders_make_of_lycoris_magnitudes_is_told(base):
    eps = 2.0**-23
    out = write("lycoris", [product(m=True, eps=eps)], base).notes
    assert ["ComfyUI divides magnitudes of outputs" in note for note in out] == [True]
    m = Operand.vector(ref("m", 6))
    into = write("lycoris", [product(m=True, eps=eps, axis="in", magnitude=m)], base).notes
    assert ["LyCORIS' own loader takes magnitudes of outputs only" in n for n in into] == [True]


def test_metadata_of_diffusers_says_ranks_and_alphas(base):
    layers = [product(), product(O, 6, 8, rank=3, scaling=2.0)]
    said = json.loads(write("diffusers", layers, base).metadata["lora_adapter_metadata"])
    assert said["unet.r"] in (R, 3)
    odd = {R: "o_proj", 3: "q_proj"}[said["unet.r"]]
    assert said["unet.rank_pattern"] == {odd: {"o_proj": 3, "q_proj": R}[odd]}
    assert said["unet.alpha_pattern"] == {odd: {"o_proj": 6, "q_proj": 3}[odd]}
    with pytest.raises(AdapterError, match="several of its layers are the same one of the base"):
        write("diffusers", [product(), product()], base)


def test_bfloat16_factors_keep_their_type(base):
    down = Operand.plain(ref("a", R, 6, dtype=BF16))
    written = write("peft", [product(down=down)], base)
    assert [t.dtype for t in written.tensors] == [BF16, F32]
