"""The forward tier: right merges pass, wrong ones fail where they are wrong, and why that is so."""

import importlib.util
import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch.nn.functional import linear

import dora_export
from dora_export.adapters import ReadOptions, read_adapter
from dora_export.checkpoints import open_checkpoint
from dora_export.plan import Settings, Step, plan_merge
from dora_export.tensors import DTYPES, HeldBytes, Operand, TensorRef
from dora_export.update import Dense, Hadamard, Kronecker, Product, Update
from dora_export.verification import inputs, models, terms, unmerged
from dora_export.verification.forward import check_forward, judge
from dora_export.verification.hypotheses import mistaken
from dora_export.verification.measured import Measured, Unsupported
from dora_export.verification.reference import Reference, numbers
from tests import oracle, rider_models
from tests.forward_models import KINDS, change, merged_by_peft, prepare
from tests.peft_models import edit_config, edit_json
from tests.rider_models import VOCABULARY, WARNINGS

# Reasons stand beside the entries.
pytestmark = [pytest.mark.filterwarnings(w) for w in WARNINGS]


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Models this small are slower in two threads, and far slower beside other tests."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


TOKENS = 4  # of greedy text: enough to part
Q_PROJ = "model.layers.1.self_attn.q_proj"
KEY = f"base_model.model.{Q_PROJ}"


def check(plan, merged, **options):
    """Run the tier; return its result and what it found beside notes."""
    result, findings = check_forward(plan, merged, **{"tokens": TOKENS, **options})
    json.dumps(result.figures)
    return result, [f for f in findings if f.severity != "note"]


def codes(findings):
    return sorted({f.code for f in findings})


def merged(pair, folder, **options):
    dora_export.merge(pair.base, pair.adapter, folder, **options)
    return folder


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def llama(request, tmp_path_factory):
    """A Llama with a DoRA adapter on two projections, and its right merge."""
    folder = tmp_path_factory.mktemp("llama")
    pair = prepare(folder, rider_models.llama(), request.param,
                   target_modules=["q_proj", "down_proj"])  # fmt: skip
    return pair, merged(pair, folder / "out")


def altered(right, folder, edit):
    """A copy of a merged folder with other tensors."""
    folder.mkdir()
    for file in right.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    change(folder, edit)
    return folder


# --- right merges

# Run by default: every architecture and every kind of rider once. The reference itself is held
# against PEFT for all kinds, below.
RUN = ("llama", "bart", "vit", "resnet", "tied, DoRA embedding", "tied, head", "saved modules",
       "biases", "trained tokens")  # fmt: skip


def some(cases, default):
    """Cases as parameters, those that are not named left to the nightly run."""
    cases = list(cases)
    assert set(default) <= set(cases)
    return [c if c in default else pytest.param(*(c if isinstance(c, tuple) else (c,)),
                                                marks=pytest.mark.nightly)
            for c in cases]  # fmt: skip


@pytest.mark.parametrize("kind", some(KINDS, RUN))
def test_a_right_merge_passes_and_the_base_does_not(kind, tmp_path):
    make, lora = KINDS[kind]
    pair = prepare(tmp_path, make(), **lora)
    plan = pair.plan()
    result, findings = check(plan, merged(pair, tmp_path / "out"))
    assert findings == []
    assert result.ran
    products = {s.name for s in plan.steps if any(c.delta is not None for c in s.changes)}
    assert {layer["name"] for layer in result.figures["layers"]} == products
    assert all(o["excess"] < 0.5 for o in result.figures["outputs"].values())
    opinion = result.figures["peft"]["outputs"]
    # transformers renames this model's parameters, and PEFT does not know them by the old names.
    assert bool(opinion) == (kind != "vit")
    assert all(o["max"] < 1e-6 * o["scale"] for o in opinion.values())

    _, findings = check(plan, pair.base)
    assert {"outputs-differ", "layer-differs"} <= set(codes(findings))
    assert {f.where for f in findings if f.code == "layer-differs"} == products


@pytest.mark.parametrize(("kind", "dtype"), some(
    itertools.product(["llama", "gpt2", "resnet", "bart"], [torch.bfloat16, torch.float16]),
    [("llama", torch.bfloat16), ("gpt2", torch.float16), ("resnet", torch.bfloat16)]))  # fmt: skip
def test_a_right_merge_of_16_bit_weights_passes(kind, dtype, tmp_path):
    make, lora = KINDS[kind]
    pair = prepare(tmp_path, make(), dtype, **lora)
    result, findings = check(pair.plan(), merged(pair, tmp_path / "out"))
    assert findings == []
    assert max(layer["excess"] for layer in result.figures["layers"]) < 0.6
    assert min(layer["effect"]["rms"] / layer["noise"]["rms"]
               for layer in result.figures["layers"]) > 50  # fmt: skip


@pytest.mark.parametrize(("kind", "dtype"), some(
    itertools.product(["llama", "gpt2", "bert", "resnet"], [torch.float32, torch.bfloat16]),
    [("llama", torch.bfloat16), ("bert", torch.float32), ("resnet", torch.bfloat16)]))  # fmt: skip
def test_pefts_merge_in_the_storage_precision_passes(kind, dtype, tmp_path):
    """It rounds about as often as running unmerged in that precision does, which is the floor."""
    make, lora = KINDS[kind]
    pair = prepare(tmp_path, make(), dtype, **lora)
    result, findings = check(pair.plan(), merged_by_peft(pair, tmp_path / "peft", dtype))
    assert findings == []
    worst = max(layer["excess"] for layer in result.figures["layers"])
    ours, _ = check(pair.plan(), merged(pair, tmp_path / "out"))
    assert worst > 1.2 * max(layer["excess"] for layer in ours.figures["layers"])


@pytest.mark.parametrize(
    "options", [{"strength": 0.5}, {"dtype": "bf16"}], ids=["strength", "dtype"]
)
def test_what_the_user_decided_is_what_is_checked(options, tmp_path):
    pair = prepare(tmp_path, rider_models.llama(), target_modules=["q_proj"],
                   modules_to_save=["norm", "lm_head"])  # fmt: skip
    out = merged(pair, tmp_path / "out", **options)
    settings = {**options, "dtype": DTYPES["BF16"]} if "dtype" in options else options
    assert check(pair.plan(**settings), out)[1] == []
    assert "outputs-differ" in codes(check(pair.plan(), out)[1])


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_resized_vocabulary_is_run_with_its_new_tokens(tied, tmp_path):
    pair = prepare(tmp_path, rider_models.llama(tie_word_embeddings=tied), resize=3,
                   target_modules=["q_proj", "embed_tokens", "lm_head"])  # fmt: skip
    out = merged(pair, tmp_path / "out")
    result, findings = check(pair.plan(), out)
    assert findings == []
    assert result.figures["peft"]["outputs"]["logits"]["max"] < 1e-6

    def another(held):
        held["model.embed_tokens.weight"][VOCABULARY + 2] *= 1.1

    wrong = altered(out, tmp_path / "wrong", another)
    assert "outputs-differ" in codes(check(pair.plan(), wrong)[1])


def test_a_head_that_the_bases_class_lacks_is_run_with_the_class_that_was_trained(tmp_path):
    pair = prepare(tmp_path, rider_models.llama_classifier(), target_modules=["q_proj"],
                   task_type="SEQ_CLS")  # fmt: skip
    change(pair.base, lambda held: held.pop("score.weight"))
    edit_json(pair.base / "config.json", architectures=["LlamaForCausalLM"])
    out = merged(pair, tmp_path / "out")
    result, findings = check(pair.plan(), out)
    assert findings == []
    assert list(result.figures["outputs"]) == ["logits"]

    def negated(held):
        held["score.weight"] *= -1

    assert codes(check(pair.plan(), altered(out, tmp_path / "wrong", negated))[1]) == [
        "outputs-differ"
    ]


def test_parameters_that_no_file_has_are_the_same_random_ones_in_every_model(tmp_path):
    pair = prepare(tmp_path, rider_models.bert_classifier(), target_modules=["query"])
    change(pair.base, lambda held: held.pop("classifier.weight"))
    result, findings = check(pair.plan(), merged(pair, tmp_path / "out"))
    assert findings == []
    assert result.figures["random"] == ["classifier.weight"]


# --- the reference


def in_float64(pair, kind):
    """The unmerged reference in float64, and inputs that this test chooses itself."""
    plan = pair.plan()
    cls = models.class_of(plan)
    reference = Reference(plan, DTYPES["F64"], numbers(plan), cls)
    make = torch.Generator().manual_seed(3)
    ids = torch.randint(3, VOCABULARY, (2, 9), generator=make)
    size = {"vit": 16, "resnet": 24, "convnext": 32}.get(kind)
    if size:
        values = {"pixel_values": torch.randn(2, 3, size, size, generator=make)}
    else:
        values = {"input_ids": ids}
    if kind == "bart":
        values["decoder_input_ids"] = ids.flip(1)
    return reference, inputs.Batch("test", values)


def logits_of(wrapped, batch):
    with torch.no_grad():
        values = {k: v.double() if k == "pixel_values" else v for k, v in batch.values.items()}
        return wrapped(**values).logits.double().numpy()


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_computes_what_pefts_active_adapter_does(kind, tmp_path):
    make, lora = KINDS[kind]
    pair = prepare(tmp_path, make(), **lora)
    reference, batch = in_float64(pair, kind)
    ours = reference.outputs(batch)["logits"]
    wrapped = pair.wrapped.double()
    theirs = logits_of(wrapped, batch)
    scale = np.abs(theirs).max()
    # Llama's norms work in float32 whatever they are given; the others are float64 throughout.
    assert np.abs(ours - theirs).max() < 1e-12 * scale

    with reference.without_adapter():
        before = reference.outputs(batch)["logits"]
    if "bias" not in lora:  # PEFT leaves the biases that it trained where they are
        with wrapped.disable_adapter():
            assert np.abs(before - logits_of(wrapped, batch)).max() < 1e-12 * scale
    assert np.abs(before - theirs).max() > 1e-2 * scale
    layers = [m for m in wrapped.modules() if isinstance(m, LoraLayer)]
    if lora.get("use_dora", True):
        for layer in layers:
            layer.lora_variant.pop("default")  # leaves plain LoRA
    else:
        for layer in layers:
            layer.scaling["default"] *= 2
    assert np.abs(ours - logits_of(wrapped, batch)).max() > 1e-2 * scale


def held(name, array):
    """A stored tensor in memory."""
    data = np.ascontiguousarray(array, np.float64).view(np.uint8).reshape(-1)
    return TensorRef(name, DTYPES["F64"], array.shape, HeldBytes(Path("memory"), data))


SHAPES = {"linear": (6, 8), "fan in": (8, 6), "embedding": (9, 6), "conv": (6, 4, 3, 2)}


def use_of(kind, weight):
    """How such a layer uses its weight, and an input for it."""
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    if kind == "embedding":
        return unmerged.lookup(padding_idx=None), torch.tensor([[0, 3, 8, 3, 1]])
    if kind == "conv":
        image = torch.randn(2, 4, 7, 6, dtype=torch.float64)
        return unmerged.convolution(torch.conv2d, weight, stride=2, padding=1), image
    return (unmerged.LINEAR if kind == "linear" else unmerged.FAN_IN), x


@pytest.mark.parametrize("part", [None, (1, 4)], ids=["whole", "rows"])
@pytest.mark.parametrize("axis", ["out", "in", None])
@pytest.mark.parametrize("kind", SHAPES)
def test_every_use_and_axis_gives_what_the_merged_weight_would(kind, axis, part):
    torch.manual_seed(1)
    make = np.random.default_rng(4)
    shape = SHAPES[kind]
    layout = "io" if kind in ("fan in", "embedding") else "oi"
    W = make.normal(size=shape)
    sliced = W if part is None else W[part[0] : part[1]]
    seen = sliced.T if layout == "io" else sliced.reshape(len(sliced), -1)  # (out, inner)
    A, B = make.normal(size=(2, seen.shape[1])), make.normal(size=(seen.shape[0], 2))
    inner = seen.shape[1] if kind != "conv" else 4
    m = make.uniform(0.5, 2, size=seen.shape[0] if axis == "out" else inner)
    update = Update(
        "w", "dora" if axis else "lora", (), Operand.plain(held("A", A)),
        Operand.plain(held("B", B)), scaling=0.7, magnitude=Operand.plain(held("m", m)) if axis
        else None, axis=axis or "out", layout=layout, rows=part, eps=0.01 if axis else 0.0,
    )  # fmt: skip
    step = Step("w", DTYPES["F64"], held("w", W), (update.change(shape),), status="merged")

    if axis is None:
        new = oracle.lora(seen, A, B, 0.7)
    elif axis == "in" and kind == "conv":
        V = (seen + 0.7 * B @ A).reshape(len(seen), 4, 6)
        new = V * (m / (np.sqrt((V * V).sum(axis=(0, 2))) + 0.01))[:, None]
    else:
        new = oracle.dora(seen, A, B, m, 0.7, axis=1 if axis == "out" else 0, eps=0.01)
    expected = W.copy()
    expected[slice(*part) if part else slice(None)] = (
        new.T if layout == "io" else new.reshape(sliced.shape)
    )
    base = torch.from_numpy(W)
    use, x = use_of(kind, base)
    for strength in (1.0, 0.4):
        parts = unmerged.Parts("w", base, terms.terms(step, Settings()), strength)
        exact = use.plain(x, torch.from_numpy(W + strength * (expected - W)))
        for same in (parts, parts.measured()):  # float64's own norms are the float64 norms
            assert torch.allclose(same.compute(use, x), exact, rtol=0, atol=1e-12)
    assert (use.plain(x, base) - use.plain(x, torch.from_numpy(expected))).abs().max() > 0.1


def delta_of(kind, out, inner, make):
    """An update that is no plain product: its normal form and, by numpy, its values."""
    if kind == "dense":
        values = make.normal(size=(out, inner)) * 0.3
        return Dense(Operand.plain(held("D", values))), values
    if kind == "kronecker":
        factors = make.normal(size=(2, 2)), make.normal(size=(out // 2, inner // 2))
        return Kronecker(*(Operand.plain(held("K", f)) for f in factors)), np.kron(*factors)
    rank = 2 if kind == "hadamard" else 4  # 4 times 4 is more than these matrices have
    parts = [make.normal(size=s) for s in ((out, rank), (rank, inner)) * 2]
    left, right, other, another = (Operand.plain(held("H", p)) for p in parts)
    values = (parts[0] @ parts[1]) * (parts[2] @ parts[3])
    return Hadamard(Product(left, right), Product(other, another)), values


@pytest.mark.parametrize("axis", ["out", "in", None])
@pytest.mark.parametrize("layer", SHAPES)
@pytest.mark.parametrize("kind", ["hadamard", "hadamard of high rank", "kronecker", "dense"])
def test_updates_that_are_no_product_give_what_the_merged_weight_would(kind, layer, axis):
    torch.manual_seed(1)
    make = np.random.default_rng(4)
    shape = (10, 6) if layer == "embedding" else SHAPES[layer]
    layout = "io" if layer in ("fan in", "embedding") else "oi"
    W = make.normal(size=shape)
    seen = W.T if layout == "io" else W.reshape(len(W), -1)
    delta, values = delta_of(kind, *seen.shape, make)
    m = make.uniform(0.5, 2, size=len(seen) if axis == "out" else shape[1 - (layout == "io")])
    update = Update(
        "w", "dora" if axis else "lora", (), delta=delta, scaling=0.7, axis=axis or "out",
        magnitude=Operand.plain(held("m", m)) if axis else None, layout=layout,
    )  # fmt: skip
    step = Step("w", DTYPES["F64"], held("w", W), (update.change(shape),), status="merged")
    new = seen + 0.7 * values
    if axis == "out":
        new *= (m / np.linalg.norm(new, axis=1))[:, None]
    elif axis == "in":
        V = new.reshape(len(new), len(m), -1)
        new = (V * (m / np.sqrt((V * V).sum(axis=(0, 2))))[:, None]).reshape(new.shape)
    merged = torch.from_numpy((new.T if layout == "io" else new.reshape(shape)).copy())
    parts = unmerged.Parts("w", torch.from_numpy(W), terms.terms(step, Settings()))
    use, x = use_of(layer, parts.base)
    for same in (parts, parts.measured(), parts.to(torch.float64)):
        assert torch.allclose(same.compute(use, x), use.plain(x, merged), rtol=0, atol=1e-11)
    for mistake in ("half the scaling", *(["magnitudes dropped"] if axis else [])):
        assert (mistaken(parts, mistake).compute(use, x) - use.plain(x, merged)).abs().max() > 0.01


@pytest.mark.parametrize("axis", ["out", "in"])
@pytest.mark.parametrize("layer", SHAPES)
def test_magnitudes_that_were_divided_by_the_norm_are_factors(layer, axis):
    torch.manual_seed(1)
    make = np.random.default_rng(4)
    layout = "io" if layer in ("fan in", "embedding") else "oi"
    W = make.normal(size=SHAPES[layer])
    seen = W.T if layout == "io" else W.reshape(len(W), -1)
    A, B = make.normal(size=(2, seen.shape[1])), make.normal(size=(len(seen), 2))
    channels = W.shape[1 - (layout == "io")]
    m = make.uniform(0.5, 2, size=len(seen) if axis == "out" else channels)
    update = Update("w", "dora", (), Operand.plain(held("A", A)), Operand.plain(held("B", B)), 0.7,
                    Operand.plain(held("m", m)), axis, layout=layout,
                    magnitude_is_factor=True)  # fmt: skip
    step = Step("w", DTYPES["F64"], held("w", W), (update.change(W.shape),), status="merged")
    V = (seen + 0.7 * B @ A).reshape(len(seen), channels, -1)
    new = V * (m[:, None, None] if axis == "out" else m[:, None])
    new = new.reshape(seen.shape)
    merged = torch.from_numpy((new.T if layout == "io" else new.reshape(W.shape)).copy())
    parts = unmerged.Parts("w", torch.from_numpy(W), terms.terms(step, Settings()))
    use, x = use_of(layer, parts.base)
    for same in (parts, parts.measured(), parts.to(torch.float64)):
        assert torch.allclose(same.compute(use, x), use.plain(x, merged), rtol=0, atol=1e-12)
    assert (mistaken(parts, "magnitudes dropped").compute(use, x) - use.plain(x, merged)
            ).abs().max() > 0.1  # fmt: skip


OTHER_METHODS = {  # PEFT keeps the scaling in float32, which holds 2.5
    "loha": (peft.LoHaConfig, {"r": 4, "alpha": 10}),
    "lokr": (peft.LoKrConfig, {"r": 4, "alpha": 10, "decompose_both": True}),
}


@pytest.mark.parametrize("name", OTHER_METHODS)
def test_hadamard_and_kronecker_adapters_run_unmerged(name, tmp_path):
    method, settings = OTHER_METHODS[name]
    pair = prepare(tmp_path, rider_models.llama(), method=method, **settings,
                   target_modules=["q_proj", "down_proj"])  # fmt: skip
    plan = pair.plan()
    reference, batch = in_float64(pair, "llama")
    ours = reference.outputs(batch)["logits"]
    theirs = logits_of(pair.wrapped.double(), batch)
    assert np.abs(ours - theirs).max() < 1e-12 * np.abs(theirs).max()
    with reference.without_adapter():
        assert np.abs(reference.outputs(batch)["logits"] - theirs).max() > 1e-2
    result, findings = check(plan, merged(pair, tmp_path / "out"))
    assert (findings, len(result.figures["layers"])) == ([], 4)
    _, findings = check(plan, pair.base)
    assert {"outputs-differ", "layer-differs"} <= set(codes(findings))


@pytest.mark.parametrize("choice", ["zero", "keep-base"])
def test_rows_without_a_norm_follow_the_users_choice(choice):
    W = np.array([[1.0, 2.0], [3.0, 4.0]])
    update = Update("w", "dora", (), Operand.plain(held("A", np.array([[-1.0, -2.0]]))),
                    Operand.plain(held("B", np.array([[1.0], [0.0]]))),
                    magnitude=Operand.plain(held("m", np.array([2.0, 10.0]))))  # fmt: skip
    step = Step("w", DTYPES["F64"], held("w", W), (update.change((2, 2)),), status="merged")
    numbers = terms.terms(step, Settings(zero_norm=choice))
    parts = unmerged.Parts("w", torch.from_numpy(W), numbers)
    x = torch.tensor([[1.0, 1.0]], dtype=torch.float64)
    first = 3.0 if choice == "keep-base" else 0.0
    assert torch.allclose(parts.compute(unmerged.LINEAR, x), torch.tensor([[first, 14.0]]).double())


def test_a_weight_used_in_an_unknown_way_is_never_just_the_bases():
    weight = unmerged.Unmerged.of(unmerged.Parts("w", torch.eye(3), ()))
    assert weight.shape == (3, 3)
    assert weight.dtype == torch.float32
    assert torch.equal(linear(torch.ones(1, 3), weight), torch.ones(1, 3))
    for use in (lambda: weight @ torch.ones(3), lambda: weight.data, lambda: weight + 0,
                lambda: weight[0], weight.detach, lambda: weight.to(torch.float64),
                lambda: linear(torch.ones(3), torch.eye(3), weight[0])):  # fmt: skip
        with pytest.raises(Unsupported, match=r"^w: the model uses it in torch's"):
            use()
    with pytest.raises(Unsupported, match="multiplies another weight by it"):
        linear(weight, torch.eye(3))


def test_a_weight_used_as_its_transpose_is_unmerged_all_the_same():
    """Falcon multiplies by ``weight.T``."""
    make = np.random.default_rng(5)
    W, A, B, m = (make.normal(size=s) for s in ((6, 8), (2, 8), (6, 2), 6))
    update = Update("w", "dora", (), Operand.plain(held("A", A)), Operand.plain(held("B", B)),
                    scaling=0.7, magnitude=Operand.plain(held("m", m)))  # fmt: skip
    step = Step("w", DTYPES["F64"], held("w", W), (update.change((6, 8)),), status="merged")
    parts = unmerged.Parts("w", torch.from_numpy(W), terms.terms(step, Settings()))
    weight = unmerged.Unmerged.of(parts)
    merged = torch.from_numpy(oracle.dora(W, A, B, m, 0.7, axis=1))
    x, y = (torch.from_numpy(make.normal(size=(3, n))) for n in (8, 6))
    ones = torch.ones(8, dtype=torch.float64)
    uses = {"x @ W.T": x @ weight.T, "mm": torch.mm(x, weight.t()), "mT": x.matmul(weight.mT),
            "twice": linear(x, weight.T.T)}  # fmt: skip
    assert weight.T.shape == (8, 6)
    for name, found in uses.items():
        assert torch.allclose(found, x @ merged.T, rtol=0, atol=1e-12), name
    assert torch.allclose(y @ weight, y @ merged, rtol=0, atol=1e-12)
    assert torch.allclose(linear(y, weight.T, ones), y @ merged + 1, rtol=0, atol=1e-12)
    assert (x @ merged.T - x @ torch.from_numpy(W).T).abs().max() > 0.1
    assert weight.uses == 6
    for use in (lambda: weight.T + 0, lambda: weight.T @ x.T, lambda: weight.T[0]):
        with pytest.raises(Unsupported, match=r"^w: the model uses its transpose in torch's"):
            use()


# --- wrong merges


def plain_lora(pair):
    def edit(held):
        A, B, _ = parts(pair)
        W = load_file(pair.base / "model.safetensors")[f"{Q_PROJ}.weight"]
        set_(held, oracle.lora(oracle.float64(W), A, B, 2.5))

    return edit


def parts(pair, module=Q_PROJ):
    stored = load_file(pair.adapter / "adapter_model.safetensors")
    names = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
    return tuple(oracle.float64(stored[f"base_model.model.{module}.{n}"]) for n in names)


def set_(held, values):
    name = f"{Q_PROJ}.weight"
    held[name] = torch.from_numpy(values).to(held[name].dtype)


def dora(pair, *, A=None, B=None, m=None, scaling=2.5):
    """The layer merged with something else than what belongs there."""

    def edit(held):
        W = load_file(pair.base / "model.safetensors")[f"{Q_PROJ}.weight"]
        own = parts(pair)
        A_, B_, m_ = (
            o if given is None else given for given, o in zip((A, B, m), own, strict=True)
        )
        set_(held, oracle.dora(oracle.float64(W), A_, B_, m_, scaling))

    return edit


def without_adapter(pair):
    def edit(held):
        held[f"{Q_PROJ}.weight"] = load_file(pair.base / "model.safetensors")[f"{Q_PROJ}.weight"]

    return edit


def not_a_number(pair):
    def edit(held):
        held[f"{Q_PROJ}.weight"][3, 5] = torch.nan

    return edit


def without_a_row_of_B(pair):
    B = parts(pair)[1].copy()
    B[7] = 0
    return dora(pair, B=B)


MISTAKES = {
    "right, by this test's own formula": dora,
    "plain LoRA": plain_lora,
    "one layer unmerged": without_adapter,
    "scaling alpha": lambda pair: dora(pair, scaling=10.0),
    "scaling off by sqrt(r)": lambda pair: dora(pair, scaling=5.0),
    "magnitude of another layer": lambda pair: dora(
        pair, m=parts(pair, Q_PROJ.replace("1", "0"))[2]
    ),
    "a row of B zeroed": without_a_row_of_B,
    "NaN": not_a_number,
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_one_layer_is_found_in_that_layer(mistake, llama, tmp_path):
    pair, right = llama
    wrong = altered(right, tmp_path / "wrong", MISTAKES[mistake](pair))
    result, findings = check(pair.plan(), wrong)
    if mistake.startswith("right"):
        assert findings == []
        return
    assert [f.where for f in findings if f.code == "layer-differs"] == [f"{Q_PROJ}.weight"]
    assert "outputs-differ" in codes(findings)
    beyond = mistake == "NaN"
    assert (f"{len(result.figures['layers'])} layers, worst not finite; logits not finite"
            in result.summary) == beyond  # fmt: skip
    assert result.figures["layers"][0]["name"] == f"{Q_PROJ}.weight"
    assert result.figures["layers"][0]["excess"] > 4
    assert result.figures["layers"][1]["excess"] < 0.6


def test_pefts_merge_of_tied_ends_is_found_wrong(tmp_path):
    """It changes both ends where one was trained."""
    make, lora = KINDS["tied, head"]
    pair = prepare(tmp_path, make(), **lora)
    _, findings = check(pair.plan(), merged_by_peft(pair, tmp_path / "peft", torch.float32))
    assert codes(findings) == ["outputs-differ", "text-differs"]


def test_another_bias_is_found(tmp_path):
    make, lora = KINDS["biases"]
    pair = prepare(tmp_path, make(), **lora)

    def edit(held):
        held["transformer.h.0.attn.c_attn.bias"][4] += 1e-3

    wrong = altered(merged(pair, tmp_path / "out"), tmp_path / "wrong", edit)
    findings = check(pair.plan(), wrong)[1]
    assert "layer-differs" in codes(findings)
    assert "outputs-differ" in codes(findings)


@pytest.mark.parametrize(
    ("edit", "why"),
    [
        (lambda held: held.pop("model.norm.weight"), "tensors missing: model.norm.weight"),
        (lambda held: held.update(extra=torch.ones(2)), "not part of the model: extra"),
        (lambda held: held.update({"lm_head.weight": torch.ones(5, 32)}), "lm_head.weight"),
    ],
    ids=["missing", "extra", "shape"],
)
def test_a_folder_that_does_not_load_whole_is_wrong(llama, edit, why, tmp_path):
    pair, right = llama
    result, findings = check(pair.plan(), altered(right, tmp_path / "wrong", edit))
    assert codes(findings) == ["load-fails"]
    assert why in findings[0].what
    assert not result.ran


def test_another_class_and_a_truncated_file_do_not_load(llama, tmp_path):
    pair, right = llama
    other = altered(right, tmp_path / "other", lambda held: None)
    edit_json(other / "config.json", architectures=["LlamaModel"])
    assert "architectures" in check(pair.plan(), other)[1][0].what
    short = altered(right, tmp_path / "short", lambda held: None)
    (short / "model.safetensors").write_bytes((short / "model.safetensors").read_bytes()[:-8])
    assert codes(check(pair.plan(), short)[1]) == ["load-fails"]
    (short / "config.json").unlink()
    assert codes(check(pair.plan(), short)[1]) == ["load-fails"]


# --- what cannot be checked, and second opinions


def test_an_adapter_without_effect_is_told_from_one_that_is_not_there(tmp_path):
    pair = prepare(tmp_path, rider_models.llama(), target_modules=["q_proj"], use_dora=False)

    def untrained(held):
        for name in held:
            if "lora_B" in name:
                held[name].zero_()

    change(pair.adapter, untrained)
    result, findings = check_forward(pair.plan(), merged(pair, tmp_path / "out"), tokens=0)
    assert [(f.code, f.severity) for f in findings] == [("effect-unseen", "note")] * 2
    assert [f.where for f in findings] == ["output 'logits'", Q_PROJ.replace("1", "0") + ".weight"]
    assert result.figures["text"] is None


def test_a_layer_that_no_input_reaches_was_not_checked(llama):
    plan = llama[0].plan()
    reference = Reference(plan, DTYPES["F32"], numbers(plan), models.class_of(plan))
    assert len(reference.idle()) == 4
    reference.outputs(inputs.Batch("test", {"input_ids": torch.tensor([[5, 6]])}))
    assert reference.idle() == []
    found = list(judge(Measured("Model", "float32", "bfloat16", 0.004, [], {}, [], [], idle=["a"])))
    assert [(f.code, f.where, f.severity) for f in found] == [("layer-idle", "a", "unchecked")]


def test_pefts_other_opinion_is_told_with_numbers(llama, tmp_path):
    pair, right = llama
    own = tmp_path / "adapter"
    own.mkdir()
    for file in pair.adapter.iterdir():
        (own / file.name).write_bytes(file.read_bytes())
    plan = plan_merge(open_checkpoint(pair.base), read_adapter(own, ReadOptions()),
                      Settings())  # fmt: skip
    edit_config(own, lora_alpha=20)  # read by PEFT, after the plan was made
    findings = check(plan, right)[1]
    assert codes(findings) == ["peft-differs"]
    assert "max |difference|" in findings[0].what
    assert findings[0].severity == "warning"
    edit_config(own, peft_type="NO_SUCH_METHOD")
    result, findings = check(plan, right)
    assert findings == []
    assert result.figures["peft"]["said"].startswith("fails: ")


def test_without_transformers_nothing_was_checked(llama, monkeypatch):
    pair, right = llama
    plan = pair.plan()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    result, findings = check(plan, right)
    assert [(f.code, f.severity) for f in findings] == [("forward-extra", "unchecked")]
    assert (result.ran, result.figures) == (False, {})


@pytest.mark.parametrize("named", [["Mine"], None], ids=["class named", "none named"])
def test_code_of_the_models_own_is_never_run(llama, tmp_path, monkeypatch, named):
    """Nor asked about: transformers asks at the terminal, and takes a yes."""
    pair, right = llama
    base = altered(pair.base, tmp_path / "base", lambda held: None)
    edit_json(base / "config.json", architectures=named, model_type="mine",
              auto_map={"AutoConfig": "mine.Config", "AutoModel": "mine.Mine"})  # fmt: skip
    (base / "mine.py").write_text("raise SystemExit('run')")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    plan = plan_merge(open_checkpoint(base), read_adapter(pair.adapter, ReadOptions()),
                      Settings())  # fmt: skip
    _, findings = check(plan, right)
    assert codes(findings) == ["forward-unsupported"]
    assert ("'Mine'" if named else "custom code") in findings[0].what


def test_a_changed_tensor_that_the_model_has_not_is_named(llama, tmp_path):
    pair, right = llama
    base = altered(pair.base, tmp_path / "base", lambda h: h.update(
        {f"{Q_PROJ}_2.weight": torch.randn(32, 32)}))  # fmt: skip
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    stored = load_file(pair.adapter / "adapter_model.safetensors")
    stored |= {k.replace(Q_PROJ, f"{Q_PROJ}_2"): v + 0 for k, v in stored.items() if Q_PROJ in k}
    save_file(stored, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text((pair.adapter / "adapter_config.json").read_text())
    plan = plan_merge(open_checkpoint(base), read_adapter(adapter, ReadOptions()),
                      Settings())  # fmt: skip
    _, findings = check(plan, right)
    assert codes(findings) == ["forward-unsupported"]
    assert findings[0].where == f"{Q_PROJ}_2.weight"


def test_prompts_go_through_the_merged_folders_tokenizer(tmp_path):
    demo = dora_export.__path__[0] + "/demo_data"
    out = tmp_path / "out"
    dora_export.merge(f"{demo}/base", f"{demo}/adapter", out)
    plan = plan_merge(open_checkpoint(out.__class__(f"{demo}/base")),
                      read_adapter(out.__class__(f"{demo}/adapter"), ReadOptions()),
                      Settings())  # fmt: skip
    result, findings = check(plan, out, prompts=["the boat", "a much longer text"])
    assert findings == []
    names = [i["name"] for i in result.figures["inputs"]]
    assert names == ["prompt 1", "prompt 2", "prompt 1", "prompt 2"]
    assert result.figures["text"]["tokens"] == 2 * TOKENS
    (out / "tokenizer.json").unlink()
    (out / "tokenizer_config.json").unlink()
    _, findings = check(plan, out, prompts=["the boat"])
    assert codes(findings) == ["forward-unsupported"]
    assert "tokenizer" in findings[0].what


def test_generated_tokens_are_ordinary_of_two_lengths_and_hold_the_trained_ones():
    model = rider_models.llama()
    padded, text = inputs.batches(model, None, (), favoured=[3, 60])
    assert padded.mask.sum(dim=1).tolist() == [16, 11] * 4
    for tokens in (padded.values["input_ids"][padded.mask == 1], text.values["input_ids"]):
        assert not {0, 1, 2} & set(tokens.flatten().tolist())
        assert {3, 60} <= set(tokens.flatten().tolist())


def test_naming_the_tier_imports_no_torch():
    code = "import sys, dora_export.verification.forward; print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"
