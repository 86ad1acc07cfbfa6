"""Merging against the float64 oracle and against PEFT itself, on adapters that PEFT made."""

import copy
import math
from dataclasses import replace

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load, load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import dora_export
from dora_export import extensions
from dora_export.adapters.model import Adapter
from dora_export.checkpoints import open_checkpoint
from dora_export.engine import Engine, Resources
from dora_export.errors import ArithmeticRefusal, InputError, PlanError
from dora_export.plan import Settings, plan_merge
from dora_export.storage.safetensors import read_header
from dora_export.tensors import Operand
from dora_export.update import Update
from tests import oracle
from tests import peft_models as models

# PEFT 0.21 asks transformers for an attribute that transformers 5 has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Of the elements that float32 arithmetic rounds to the wrong neighbour: bfloat16 outputs only, all
# others are computed in float64.
MISROUNDED = {torch.bfloat16: 1e-4, torch.float16: 0, torch.float32: 0}
U = 2.0**-24  # float32's rounding error, relative


def merged(base, adapter, out, **options):
    """Merge into ``out`` and return the tensors that are there."""
    dora_export.merge(base, adapter, out, threads=1, **options)
    return load_file(out / "model.safetensors")


def assert_right(got, exact, share=True):
    """One ulp at most, and few elements that are not the correctly rounded ones."""
    assert oracle.ulps(got, exact) <= 1
    if share:  # one element more, for tensors of fewer elements than 1 / share
        assert (
            oracle.misrounded(got, exact) * got.numel() <= 1 + MISROUNDED[got.dtype] * got.numel()
        )


class Cases:
    """Adapters on the zoo of layers and their merges, each made once."""

    def __init__(self, factory):
        self._factory, self._made, self._merged = factory, {}, {}

    def made(self, base, adapter, dora):
        key = (base, adapter, dora)
        if key not in self._made:
            config = peft.LoraConfig(
                r=8, lora_alpha=20, use_dora=dora, target_modules=list(models.ZOO)
            )
            folder = self._factory.mktemp("zoo")
            self._made[key] = models.make(
                folder, models.Zoo(), config, DTYPES[base], DTYPES[adapter]
            )
        return self._made[key]

    def merged(self, base, adapter, dora, precision="float32"):
        key = (base, adapter, dora, precision)
        if key not in self._merged:
            made = self.made(base, adapter, dora)
            out = self._factory.mktemp("merged") / "out"
            self._merged[key] = merged(made.base, made.adapter, out, precision=precision)
        return self._merged[key]


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    return Cases(tmp_path_factory)


method = pytest.mark.parametrize("dora", [True, False], ids=["dora", "lora"])
adapter_dtype = pytest.mark.parametrize("adapter", ["fp32", "bf16"], ids="adapter-{}".format)
base_dtype = pytest.mark.parametrize("base", DTYPES)


@method
@adapter_dtype
@base_dtype
@pytest.mark.parametrize("module", models.ZOO)
def test_merge_is_within_an_ulp_of_the_oracle(cases, module, base, adapter, dora):
    made = cases.made(base, adapter, dora)
    got = cases.merged(base, adapter, dora)[f"{module}.weight"]
    assert got.dtype == DTYPES[base]
    exact = models.merged_weight(made, made.layer(module))
    # Where W and s B A cancel, float32's error is a larger part of what is left.
    assert_right(got, exact, share=module != "cancelled")


@method
@adapter_dtype
def test_merge_by_numpy_is_within_an_ulp_of_the_oracle(cases, tmp_path, monkeypatch, adapter, dora):
    """As where no compiler built the kernel."""
    monkeypatch.setenv(extensions.SWITCH, "numpy")
    made = cases.made("bf16", adapter, dora)
    got = merged(made.base, made.adapter, tmp_path / "out")
    for layer in made.layers:
        exact = models.merged_weight(made, layer)
        assert_right(got[layer.tensor], exact, share=layer.module != "cancelled")


@method
@adapter_dtype
@base_dtype
def test_merge_in_float64_is_correctly_rounded(cases, base, adapter, dora):
    made = cases.made(base, adapter, dora)
    got = cases.merged(base, adapter, dora, "float64")
    for layer in made.layers:
        if base == "fp32" and layer.module == "cancelled":
            continue  # there float64's own error decides some of float32's ties
        exact = oracle.rounded(models.merged_weight(made, layer), DTYPES[base])
        np.testing.assert_array_equal(oracle.float64(got[layer.tensor]), exact, layer.module)


@method
@base_dtype
def test_merge_leaves_every_other_tensor_as_it_was(cases, base, dora):
    made = cases.made(base, "fp32", dora)
    got, stored = cases.merged(base, "fp32", dora), load_file(made.base / "model.safetensors")
    changed = {layer.tensor for layer in made.layers}
    assert got.keys() == stored.keys()
    assert len(changed) == len(models.ZOO)
    for name in stored.keys() - changed:
        assert torch.equal(got[name], stored[name]), name


def test_cancelling_layer_leaves_little_of_its_terms(cases):
    """The case is what its name says: without recomputation float32 is wrong there."""
    made = cases.made("bf16", "fp32", dora=False)
    layer = made.layer("cancelled")
    left = models.merged_weight(made, layer)
    assert np.sqrt((left**2).mean()) < 0.01 * np.sqrt((models.base_weight(made, layer) ** 2).mean())
    A, B, _ = models.trained(made, layer)
    W = models.base_weight(made, layer).astype(np.float32)
    in_float32 = W + np.float32(layer.scaling) * (B.astype(np.float32) @ A.astype(np.float32))
    assert oracle.ulps(torch.from_numpy(in_float32).bfloat16(), left) > 1


@method
@pytest.mark.parametrize("module", models.ZOO)
def test_merge_agrees_with_merge_and_unload_in_float32(cases, module, dora):
    made = cases.made("fp32", "fp32", dora)
    layer = made.layer(module)
    theirs = copy.deepcopy(made.model).merge_and_unload().get_submodule(module).weight
    ours = cases.merged("fp32", "fp32", dora)[layer.tensor]

    # Every operation of PEFT's, in the worst case: products of rank terms, two more for s and the
    # sum, and with a norm half of its squares' error, the root, the ratio and the product.
    def bound(W, A, B, m, s):
        terms = np.abs(W) + abs(s) * (np.abs(B) @ np.abs(A))
        error = (A.shape[0] + 3) * U * terms
        if m is None:
            return error + U * terms
        V = W + s * (B @ A)
        norm = np.sqrt((V * V).sum(axis=1, keepdims=True))
        of_norm = np.sqrt((error**2).sum(axis=1, keepdims=True)) / norm + W.shape[1] * U / 2
        return np.abs(m.reshape(-1, 1)) / norm * (error + np.abs(V) * (of_norm + 4 * U))

    limit = models.merged_weight(made, layer, bound)
    distance = np.abs(oracle.float64(ours) - oracle.float64(theirs))
    assert (distance <= 1.01 * limit).all(), (distance / limit).max()  # 1.01: second-order terms


def inputs_of(module):
    """Inputs for one layer of the zoo, float64."""
    layer, generator = models.Zoo().get_submodule(module), torch.Generator().manual_seed(7)
    if isinstance(layer, nn.Embedding):
        return torch.randint(layer.num_embeddings, (3, 11), generator=generator)
    if isinstance(layer, nn.Linear):
        return torch.randn(5, layer.in_features, generator=generator, dtype=torch.float64)
    size = (2, layer.in_channels, *(n + 3 for n in layer.kernel_size))
    return torch.randn(size, generator=generator, dtype=torch.float64)


@method
@pytest.mark.parametrize("module", models.ZOO)
def test_merged_layer_computes_what_the_adapted_layer_does(cases, module, dora):
    made = cases.made("fp32", "fp32", dora)
    adapted = copy.deepcopy(made.model.base_model.model.get_submodule(module)).double()
    plain = models.Zoo()
    plain.load_state_dict(cases.merged("fp32", "fp32", dora, "float64"))
    plain = plain.get_submodule(module).double()
    x = inputs_of(module)
    with torch.no_grad():
        ours, theirs = plain(x), adapted(x)
        plain.weight.abs_()
        if getattr(plain, "bias", None) is not None:
            plain.bias.zero_()
        limit = U * plain(x.abs())  # one rounding of each weight; the rest is in float64
    assert ((ours - theirs).abs() <= 1.0001 * limit).all()
    assert (theirs - made.model.base_model.model.get_submodule(module).base_layer.double()(x)).abs(
    ).max() > 1e3 * limit.max()  # the adapter does something  # fmt: skip


# GPT-2: Conv1D layers, square ones among them, and names without the inner model's prefix


def tiny_gpt2(**changes):
    sizes = {"vocab_size": 96, "n_positions": 16, "n_embd": 64, "n_layer": 2, "n_head": 4}
    return GPT2LMHeadModel(GPT2Config(**{**sizes, "bos_token_id": 1, "eos_token_id": 1, **changes}))


def made_gpt2(folder, dora=True, base=torch.float32, adapter=torch.float32):
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        use_dora=dora,
        target_modules=["c_attn", "c_proj", "c_fc"],
        fan_in_fan_out=True,
        task_type="CAUSAL_LM",
    )
    made = models.make(folder, tiny_gpt2(), config, base, adapter)
    models.forget_prefix(made, "transformer.", drop=("lm_head.weight",))
    return made


@method
@adapter_dtype
@base_dtype
def test_merge_of_gpt2_is_within_an_ulp_of_the_oracle(tmp_path, base, adapter, dora):
    made = made_gpt2(tmp_path, dora, DTYPES[base], DTYPES[adapter])
    got = merged(made.base, made.adapter, tmp_path / "out")
    exactly = merged(made.base, made.adapter, tmp_path / "exact", precision="float64")
    assert len(made.layers) == 2 * 4
    for layer in made.layers:
        name = layer.tensor.removeprefix("transformer.")
        exact = models.merged_weight(made, layer, name=name)
        assert_right(got[name], exact)
        np.testing.assert_array_equal(
            oracle.float64(exactly[name]), oracle.rounded(exact, DTYPES[base])
        )


@method
def test_merged_gpt2_computes_what_the_adapted_model_does(tmp_path, dora):
    made = made_gpt2(tmp_path, dora)
    merged(made.base, made.adapter, tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval().double()
    assert_same_logits(plain, made.model.double(), 96)


@method
def test_merged_llama_computes_what_the_adapted_model_does(tmp_path, dora):
    sizes = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "vocab_size": 96}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads))
    config = peft.LoraConfig(
        r=4, lora_alpha=10, use_dora=dora, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    made = models.make(tmp_path, model, config)
    got = merged(made.base, made.adapter, tmp_path / "out")
    for layer in made.layers:
        assert_right(got[layer.tensor], models.merged_weight(made, layer))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval().double()
    assert_same_logits(plain, made.model.double(), 96)


def assert_same_logits(plain, adapted, vocabulary):
    """Same logits but for one float32 rounding per weight, some of them amplified by the layers."""
    tokens = torch.randint(vocabulary, (2, 9), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        ours, theirs = plain(tokens).logits, adapted(tokens).logits
        with adapted.disable_adapter():
            without = adapted(tokens).logits
    size = theirs.abs().max()
    assert (ours - theirs).abs().max() <= 16 * U * size
    assert (theirs - without).abs().max() > 1e4 * 16 * U * size


@pytest.mark.parametrize("model_type", ["vision-encoder-decoder", "jais", None])
def test_square_conv1d_is_recognised_in_a_model_of_another_type(tmp_path, model_type):
    made = made_gpt2(tmp_path)
    models.edit_json(made.base / "config.json", model_type=model_type)
    models.edit_config(made.adapter, fan_in_fan_out=False)  # PEFT's own flag is not dependable
    got = merged(made.base, made.adapter, tmp_path / "out")
    for layer in made.layers:
        name = layer.tensor.removeprefix("transformer.")
        assert_right(got[name], models.merged_weight(made, layer, name=name))


def test_square_linear_is_recognised_beside_conv1d_layers(tmp_path):
    model = nn.ModuleDict({"vision": nn.Linear(64, 64), "text": tiny_gpt2()})
    config = peft.LoraConfig(
        r=4, use_dora=True, fan_in_fan_out=True, target_modules=["c_proj", "c_attn", "vision"]
    )
    with pytest.warns(UserWarning, match="fan_in_fan_out"):
        made = models.make(tmp_path, model, config)
    got = merged(made.base, made.adapter, tmp_path / "out")
    for layer in made.layers:
        assert_right(got[layer.tensor], models.merged_weight(made, layer))


def test_square_linear_named_like_a_conv1d_is_recognised_by_its_biases(tmp_path):
    block = {"c_attn": nn.Linear(64, 192), "c_proj": nn.Linear(64, 64)}
    model = nn.ModuleDict({"h": nn.ModuleList([nn.ModuleDict(block)])})
    made = models.make(tmp_path, model, peft.LoraConfig(r=4, target_modules=["c_proj"]))
    models.edit_config(made.adapter, fan_in_fan_out=True)
    got = merged(made.base, made.adapter, tmp_path / "out")
    assert_right(got["h.0.c_proj.weight"], models.merged_weight(made, made.layers[0]))


# Scaling


def test_rslora_divides_alpha_by_the_root_of_the_rank(tmp_path):
    config = peft.LoraConfig(
        r=8, lora_alpha=20, use_rslora=True, use_dora=True, target_modules=list(models.ZOO)
    )
    made = models.make(tmp_path, models.Zoo(), config, torch.bfloat16)
    got = merged(made.base, made.adapter, tmp_path / "out")
    assert made.layers[0].scaling == 20 / math.sqrt(8)
    for layer in made.layers:
        assert_right(
            got[layer.tensor], models.merged_weight(made, layer), layer.module != "cancelled"
        )


PATTERNS = {  # in alphabetical order, as PEFT writes them
    "rank_pattern": {"^layers.2.k_proj": 2, "k_proj|o_proj": 6, "layers.1.q_proj": 5, "q_proj": 3},
    "alpha_pattern": {"layers.1.q_proj": 11, "layers.1[01].my_q_proj": 13, "q_proj": 7},
}
STACK = ["q_proj", "k_proj", "my_q_proj", "o_proj"]


@pytest.mark.parametrize("rslora", [False, True], ids=["lora", "rslora"])
@method
def test_patterns_give_every_layer_the_scaling_that_peft_gives_it(tmp_path, dora, rslora):
    config = peft.LoraConfig(
        r=4, lora_alpha=6, use_dora=dora, use_rslora=rslora, target_modules=STACK, **PATTERNS
    )
    made = models.make(tmp_path, models.Stack(), config)
    got = merged(made.base, made.adapter, tmp_path / "out")
    assert len(made.layers) == 12 * 4
    for layer in made.layers:
        assert_right(got[layer.tensor], models.merged_weight(made, layer), share=False)


@pytest.mark.parametrize(
    ("module", "rank", "alpha"),
    [
        ("layers.1.q_proj", 5, 11),
        ("layers.11.q_proj", 3, 7),  # not what layers.1.q_proj says
        ("layers.3.my_q_proj", 4, 6),  # not what q_proj says
        ("layers.10.my_q_proj", 4, 13),
        ("layers.2.k_proj", 2, 6),  # the key with ^ sorts first
        ("layers.5.k_proj", 6, 6),
        ("layers.5.o_proj", 6, 6),
    ],
)
def test_patterns_are_matched_as_whole_path_endings(tmp_path, module, rank, alpha):
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=STACK, **PATTERNS)
    made = models.make(tmp_path, models.Stack(), config)
    updates = {u.target: u for u in dora_export.load_adapter(made.adapter).updates}
    assert updates[f"{module}.weight"].rank == rank
    assert updates[f"{module}.weight"].scaling == alpha / rank == made.layer(module).scaling


def test_first_pattern_in_the_file_wins_as_when_peft_reads_it_back(tmp_path):
    # In memory q_proj comes first and hides the other key; on disk the keys are sorted.
    pattern = {"q_proj": 7, "layers.1.q_proj": 11}
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=STACK, alpha_pattern=pattern)
    made = models.make(tmp_path, models.Stack(), config)
    assert made.layer("layers.1.q_proj").scaling == 7 / 4
    read_back = peft.PeftModel.from_pretrained(models.Stack(), made.adapter)
    updates = {u.target: u for u in dora_export.load_adapter(made.adapter).updates}
    assert updates["layers.1.q_proj.weight"].scaling == 11 / 4
    for layer in made.layers:
        theirs = read_back.base_model.model.get_submodule(layer.module).scaling["default"]
        assert updates[layer.tensor].scaling == theirs


# Wrong formulas: what each test above would say of them


MISTAKES = {
    "adapter ignored": lambda W, A, B, m, s: W,
    "plain LoRA": lambda W, A, B, m, s: oracle.lora(W, A, B, s),
    "magnitude ignored": lambda W, A, B, m, s: oracle.dora(
        W, A, B, np.sqrt((W * W).sum(axis=1)), s
    ),
    "norm of W, not of V": lambda W, A, B, m, s: (
        (W + s * B @ A) * (m / np.sqrt((W * W).sum(axis=1)))[:, None]
    ),
    "norm over the other axis": lambda W, A, B, m, s: oracle.dora(W, A, B, m, s, axis=0),
    "norm forgotten": lambda W, A, B, m, s: (W + s * B @ A) * m[:, None],
    "magnitude as it was divided already": lambda W, A, B, m, s: (
        oracle.dora(W, A, B, m, s) * np.sqrt((W * W).sum(axis=1))[:, None]
    ),
    "scaling ignored": lambda W, A, B, m, s: oracle.dora(W, A, B, m, 1.0),
    "alpha over the root of the rank": lambda W, A, B, m, s: oracle.dora(
        W, A, B, m, s * math.sqrt(A.shape[0])
    ),
    "added twice": lambda W, A, B, m, s: oracle.dora(W, A, B, m, 2 * s),
    "rows of m rolled": lambda W, A, B, m, s: oracle.dora(W, A, B, np.roll(m, 1), s),
    "rows of B rolled": lambda W, A, B, m, s: oracle.dora(W, A, np.roll(B, 1, axis=0), m, s),
    "W not transposed": lambda W, A, B, m, s: oracle.dora(W.T, A, B, m, s).T,
    "A and B exchanged": lambda W, A, B, m, s: oracle.dora(W, B.T, A.T, m, s),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_oracle_rejects_each_wrong_formula(cases, tmp_path, mistake):
    gpt2 = made_gpt2(tmp_path, base=torch.bfloat16)
    zoo = cases.made("bf16", "fp32", dora=True)
    for made, module in ((zoo, "square"), (gpt2, "transformer.h.1.attn.c_proj")):
        layer = made.layer(module)
        name = layer.tensor.removeprefix("transformer.")
        exact = models.merged_weight(made, layer, name=name)
        wrong = torch.from_numpy(models.merged_weight(made, layer, MISTAKES[mistake], name))
        assert oracle.ulps(wrong.bfloat16(), exact) > 10
        assert oracle.misrounded(wrong.bfloat16(), exact) > 0.5


# Pickled adapters


def test_pickled_adapter_is_refused_unless_allowed(tmp_path):
    made = made_gpt2(tmp_path)
    expected = merged(made.base, made.adapter, tmp_path / "expected")
    models.pickle_weights(made.adapter)
    with pytest.raises(InputError, match="--allow-pickle"):
        merged(made.base, made.adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    got = merged(made.base, made.adapter, tmp_path / "out", allow_pickle=True)
    assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())


# The normal form: what no PEFT adapter holds, and other formats do


class Memory:
    """Where merged bytes go: a file's worth of memory each."""

    def __init__(self, plan):
        self.files = [np.zeros(file.nbytes, np.uint8) for file in plan.files]
        for file, data in zip(plan.files, self.files, strict=True):
            data[: len(file.header)] = np.frombuffer(file.header, np.uint8)

    def write(self, file, offset, data):
        self.files[file][offset : offset + data.size] = data.reshape(-1)

    def holds(self, file, offset, nbytes):
        return False

    def copy(self, file, offset, source):
        data = np.empty(source.nbytes, np.uint8)
        source.read(0, data)
        self.write(file, offset, data)


class Bench:
    """A base, an adapter's tensors and the engine, without any format between them."""

    def __init__(self, folder, base, **adapter):
        save_file(base, folder / "model.safetensors")
        save_file(adapter, folder / "adapter.safetensors")
        self._base = open_checkpoint(folder / "model.safetensors")
        self.path = folder / "adapter.safetensors"
        self.refs = read_header(self.path).tensors

    def matrix(self, name):
        return Operand.matrix(self.refs[name])

    def vector(self, name):
        return Operand.vector(self.refs[name])

    def plan(self, *updates, **settings):
        adapter = Adapter(self.path, "bench", (self.path,), self.refs, updates)
        return plan_merge(self._base, adapter, Settings(**settings))

    def stored(self, folder, tensors):
        save_file(tensors, folder / "merged.safetensors")
        return read_header(folder / "merged.safetensors").tensors

    def merge(self, *updates, **settings):
        plan = self.plan(*updates, **settings)
        sink = Memory(plan)
        Engine(plan, sink, Resources(threads=1)).run()
        return load(sink.files[0].tobytes())


SHAPES = [(48, 40), (40, 40), (24, 20, 3), (24, 20, 3, 2), (12, 10, 2, 3, 2)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


def case(folder, shape, axis="out", layout="oi", dtype=torch.bfloat16, seed=1):
    """A weight with a trained DoRA update, and its terms as the oracle sees them."""
    torch.manual_seed(seed)
    W = (torch.randn(shape) * 0.05).to(dtype)
    out, inner = (shape[1], shape[0]) if layout == "io" else (shape[0], math.prod(shape[1:]))
    inputs = shape[0] if layout == "io" else shape[1]
    A, B = torch.randn(4, inner) * 0.1, torch.randn(out, 4) * 0.1
    m = torch.empty(out if axis == "out" else inputs).uniform_(0.5, 1.5)
    bench = Bench(folder, {"x.weight": W}, A=A, B=B, m=m)
    update = Update(
        target="x.weight",
        kind="dora",
        source_keys=("A", "B", "m"),
        down=bench.matrix("A"),
        up=bench.matrix("B"),
        scaling=1.7,
        magnitude=bench.vector("m"),
        axis=axis,
        layout=layout,
    )
    return bench, update, [oracle.float64(x) for x in (W, A, B, m)]


def changed(terms, layout="oi", axis="out", eps=0.0, scaling=1.7):
    """m V / (||V|| + eps) for a weight of any number of dimensions, by plain definition."""
    W, A, B, m = terms
    product = scaling * (B @ A)
    V = W + (product.T if layout == "io" else product.reshape(W.shape))
    kept = int((axis == "in") != (layout == "io"))
    sizes = [-1 if i == kept else 1 for i in range(W.ndim)]
    return m.reshape(sizes) * V / (models.over_all_but(V, kept) + eps)


every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
axes = pytest.mark.parametrize("axis", ["out", "in"])


@pytest.mark.usefixtures("either_kernel")
@shapes
@axes
@every_dtype
def test_normal_form_has_one_magnitude_per_output_or_input(tmp_path, shape, axis, dtype):
    bench, update, terms = case(tmp_path, shape, axis, dtype=dtype)
    assert_right(bench.merge(update)["x.weight"], changed(terms, axis=axis))
    exactly = bench.merge(update, precision="float64")["x.weight"]
    assert oracle.misrounded(exactly, changed(terms, axis=axis)) == 0


@pytest.mark.usefixtures("either_kernel")
@axes
@pytest.mark.parametrize("shape", [(48, 40), (40, 40)], ids=str)
def test_normal_form_sees_a_transposed_weight_the_right_way_round(tmp_path, shape, axis):
    bench, update, terms = case(tmp_path, shape, axis, "io")
    exact = changed(terms, "io", axis)
    assert_right(bench.merge(update)["x.weight"], exact)
    if shape[0] == shape[1]:
        assert oracle.ulps(torch.from_numpy(changed(terms, "oi", axis)).bfloat16(), exact) > 10


@pytest.mark.usefixtures("either_kernel")
@pytest.mark.parametrize("shape", [(700, 1536), (33, 1), (1, 33), (3, 200_003)], ids=str)
def test_in_axis_norm_runs_over_all_rows_of_a_column(tmp_path, shape):
    bench, update, terms = case(tmp_path, shape, "in")
    assert_right(bench.merge(update)["x.weight"], changed(terms, axis="in"))


@pytest.mark.usefixtures("either_kernel")
@shapes
@axes
def test_normal_form_adds_eps_to_the_norm(tmp_path, shape, axis):
    bench, update, terms = case(tmp_path, shape, axis)
    got = bench.merge(replace(update, eps=0.03))["x.weight"]
    assert_right(got, changed(terms, axis=axis, eps=0.03))
    assert oracle.ulps(got, changed(terms, axis=axis)) > 3


@pytest.mark.usefixtures("either_kernel")
@shapes
@axes
def test_normal_form_scales_rows_of_the_base_alone(tmp_path, shape, axis):
    bench, update, (W, _, _, m) = case(tmp_path, shape, axis)
    only = replace(update, kind="magnitude", source_keys=("A", "B", "m"), down=None, up=None)
    nothing = [W, np.zeros((1, W[0].size)), np.zeros((W.shape[0], 1)), m]
    assert_right(bench.merge(only)["x.weight"], changed(nothing, axis=axis))


@shapes
@axes
@pytest.mark.parametrize("strength", [0.35, -0.5, 1.5])
def test_strength_goes_that_far_from_the_base_to_the_result(tmp_path, shape, axis, strength):
    bench, update, terms = case(tmp_path, shape, axis)
    exact = terms[0] + strength * (changed(terms, axis=axis) - terms[0])
    assert_right(bench.merge(update, strength=strength)["x.weight"], exact)


def test_strength_zero_gives_the_base(tmp_path):
    bench, update, terms = case(tmp_path, (48, 40))
    got = bench.merge(update, strength=0.0)["x.weight"]
    np.testing.assert_array_equal(oracle.float64(got), terms[0])


@pytest.mark.usefixtures("either_kernel")
@axes
@pytest.mark.parametrize("layout", ["oi", "io"])
def test_index_changes_one_slice_of_a_stack(tmp_path, axis, layout):
    bench, update, (_, A, B, m) = case(tmp_path, (30, 20), axis, layout)
    stack = (torch.randn(4, 30, 20) * 0.05).bfloat16()
    save_file({"x.weight": stack}, tmp_path / "model.safetensors")
    bench = Bench(tmp_path, {"x.weight": stack}, **load_file(tmp_path / "adapter.safetensors"))
    got = bench.merge(replace(update, index=2))["x.weight"]
    exact = changed([oracle.float64(stack[2]), A, B, m], layout, axis)
    assert_right(got[2], exact)
    assert torch.equal(got[[0, 1, 3]], stack[[0, 1, 3]])


@pytest.mark.usefixtures("either_kernel")
@axes
def test_rows_changes_one_part_of_a_fused_weight(tmp_path, axis):
    bench, update, (_, A, B, m) = case(tmp_path, (16, 24), axis)
    fused = (torch.randn(16 + 16 + 8, 24) * 0.05).bfloat16()
    bench = Bench(tmp_path, {"x.weight": fused}, **load_file(tmp_path / "adapter.safetensors"))
    got = bench.merge(replace(update, rows=(16, 32)))["x.weight"]
    assert_right(got[16:32], changed([oracle.float64(fused[16:32]), A, B, m], axis=axis))
    assert torch.equal(got[:16], fused[:16])
    assert torch.equal(got[32:], fused[32:])


def test_rows_of_a_fused_weight_take_an_update_each(tmp_path):
    torch.manual_seed(5)
    fused = (torch.randn(40, 24) * 0.05).bfloat16()
    factors = {f"A{i}": torch.randn(2 + i, 24) * 0.1 for i in range(2)}
    factors |= {f"B{i}": torch.randn(16, 2 + i) * 0.1 for i in range(2)}
    bench = Bench(tmp_path, {"x.weight": fused}, m=torch.rand(16) + 0.5, **factors)
    plain = Update("x.weight", "lora", ("A0", "B0"), bench.matrix("A0"), bench.matrix("B0"), 0.5)
    normed = replace(
        plain,
        kind="dora",
        source_keys=("A1", "B1", "m"),
        down=bench.matrix("A1"),
        up=bench.matrix("B1"),
        magnitude=bench.vector("m"),
    )
    got = bench.merge(replace(plain, rows=(0, 16)), replace(normed, rows=(24, 40)))["x.weight"]
    W, of = oracle.float64(fused), lambda name: oracle.float64(load_file(bench.path)[name])
    assert_right(got[:16], oracle.lora(W[:16], of("A0"), of("B0"), 0.5))
    assert_right(got[24:], oracle.dora(W[24:], of("A1"), of("B1"), of("m"), 0.5))
    assert torch.equal(got[16:24], fused[16:24])


def test_overlapping_rows_are_refused_when_one_of_them_normalises(tmp_path):
    bench, update, _ = case(tmp_path, (16, 24))
    with pytest.raises(PlanError, match="more than one update of which one normalises"):
        bench.merge(replace(update, rows=(0, 16)), replace(update, rows=None))


@every_dtype
def test_add_adds_the_scaled_value_to_a_vector(tmp_path, dtype):
    base, value = torch.randn(300).to(dtype), torch.randn(300)
    bench = Bench(tmp_path, {"x.bias": base}, v=value)
    update = Update("x.bias", "add", ("v",), scaling=0.3, value=bench.refs["v"])
    got = bench.merge(update)["x.bias"]
    assert oracle.misrounded(got, oracle.float64(base) + 0.3 * oracle.float64(value)) == 0


@shapes
def test_add_adds_the_scaled_value_to_a_weight_of_any_shape(tmp_path, shape):
    base, value = torch.randn(shape).bfloat16(), torch.randn(shape)
    bench = Bench(tmp_path, {"x.weight": base}, v=value)
    update = Update("x.weight", "add", ("v",), scaling=-0.7, value=bench.refs["v"])
    got = bench.merge(update)["x.weight"]
    assert oracle.misrounded(got, oracle.float64(base) - 0.7 * oracle.float64(value)) == 0


# Rows without a direction


def zero_case(folder, axis, magnitude):
    """V is exactly zero in rows (or columns) 3 and 5 though W is not; m there as given."""
    torch.manual_seed(2)
    A = torch.randint(-4, 5, (2, 12)).float()
    B = torch.randint(-4, 5, (10, 2)).float()
    A[0], B[:, 0] = 1, 1  # so that no row or column of B A is zero by chance alone
    A[1], B[:, 1] = A[1].abs(), B[:, 1].abs()
    W = torch.randn(10, 12).bfloat16().float()
    cancelling = -0.5 * B @ A
    m = torch.ones(10 if axis == "out" else 12)
    m[[3, 5]] = magnitude
    if axis == "out":
        W[[3, 5]] = cancelling[[3, 5]]
    else:
        W[:, [3, 5]] = cancelling[:, [3, 5]]
    bench = Bench(folder, {"x.weight": W.bfloat16()}, A=A, B=B, m=m)
    update = Update(
        "x.weight", "dora", ("A", "B", "m"), bench.matrix("A"), bench.matrix("B"), 0.5,
        bench.vector("m"), axis,
    )  # fmt: skip
    rows = (slice(None),) if axis == "in" else ()
    others = [i for i in range(W.shape[len(rows)]) if i not in (3, 5)]
    V = oracle.float64(W + 0.5 * B @ A)
    norm = models.over_all_but(V, int(axis == "in"))
    exact = np.divide(V, norm, out=np.zeros_like(V), where=norm > 0)
    return bench, update, W.bfloat16(), exact, (*rows, [3, 5]), (*rows, others)


zero_precision = pytest.mark.parametrize("precision", ["float32", "float64"])


@pytest.mark.usefixtures("either_kernel")
@axes
@zero_precision
def test_zero_norm_with_zero_magnitude_gives_zeros(tmp_path, axis, precision):
    bench, update, _, exact, zero, _ = zero_case(tmp_path, axis, 0.0)
    got = bench.merge(update, precision=precision)["x.weight"]
    assert_right(got, exact)
    assert (got[zero] == 0).all()


@pytest.mark.usefixtures("either_kernel")
@zero_precision
@pytest.mark.parametrize(("axis", "what"), [("out", "rows"), ("in", "columns")])
def test_zero_norm_with_a_magnitude_is_refused(tmp_path, axis, what, precision):
    bench, update, *_ = zero_case(tmp_path, axis, 0.25)
    where = rf"x\.weight: .* is zero in 2 {what} \(3, 5\).*--zero-norm zero.*--zero-norm keep-base"
    with pytest.raises(ArithmeticRefusal, match=where):
        bench.merge(update, precision=precision)


@pytest.mark.usefixtures("either_kernel")
@axes
@zero_precision
def test_zero_norm_becomes_zeros_on_request(tmp_path, axis, precision):
    bench, update, _, exact, zero, _ = zero_case(tmp_path, axis, 0.25)
    got = bench.merge(update, zero_norm="zero", precision=precision)["x.weight"]
    assert_right(got, exact)
    assert (got[zero] == 0).all()


@pytest.mark.usefixtures("either_kernel")
@axes
@zero_precision
def test_zero_norm_keeps_the_base_on_request(tmp_path, axis, precision):
    bench, update, W, exact, zero, others = zero_case(tmp_path, axis, 0.25)
    got = bench.merge(update, zero_norm="keep-base", precision=precision)["x.weight"]
    assert torch.equal(got[zero], W[zero])
    assert (W[zero] != 0).all()
    assert_right(got[others], exact[others])


@pytest.mark.usefixtures("either_kernel")
@zero_precision
def test_zero_row_of_the_base_stays_zero(tmp_path, precision):
    bench, update, (W, A, B, m) = case(tmp_path, (48, 40))
    W[7], B[7], m[7] = 0, 0, 0
    bench = Bench(
        tmp_path,
        {"x.weight": torch.from_numpy(W).bfloat16()},
        **{n: torch.from_numpy(t).float() for n, t in (("A", A), ("B", B), ("m", m))},
    )
    got = bench.merge(update, precision=precision)["x.weight"]
    assert (got[7] == 0).all()
    rest = np.arange(48) != 7
    assert_right(got[rest], changed([W[rest], A, B[rest], m[rest]]))
