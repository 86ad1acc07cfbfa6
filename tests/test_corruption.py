"""Damaged adapters: a refusal, or the merge of what the files say, and nothing else.

What the files say is read here by a few lines of their own, with the safetensors library: every
``lora_A`` has its partners, the config's numbers are numbers, and the formula is the oracle's. A
merge that this reading does not explain is a wrong one.
"""

import json
import math
import re
import shutil
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

import dora_export
from dora_export import DoraExportError
from tests import oracle, small
from tests.small import PREFIX

QUICK = settings(
    max_examples=60, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)  # fmt: skip
LONG = settings(max_examples=5000, deadline=None, suppress_health_check=list(HealthCheck))
WEIGHTS = {"peft": "adapter_model.safetensors", "experts": "adapter_model.safetensors",
           "mlx": "adapters.safetensors"}  # fmt: skip
EXPERTS, RANK = 3, 2
FIXTURES = Path(__file__).parent / "fixtures"


# --- three small adapters


@cache
def sound(kind):
    """A folder with a base and an adapter that fit each other."""
    folder = Path(tempfile.mkdtemp(prefix="sound-"))
    if kind == "peft":
        small.write_pair(folder, dtype=torch.float32)
    elif kind == "mlx":
        shutil.copytree(FIXTURES / "mlx/dora", folder, dirs_exist_ok=True)
    else:
        _experts(folder)
    return folder


def _experts(folder):
    make = torch.Generator().manual_seed(0)
    base, adapter = {}, {}
    for layer in range(2):
        path = f"model.layers.{layer}.mlp.experts"
        base[f"{path}.gate_up_proj"] = torch.randn(EXPERTS, 10, 6, generator=make)
        base[f"{path}.down_proj"] = torch.randn(EXPERTS, 6, 5, generator=make)
        base[f"model.layers.{layer}.norm.weight"] = torch.randn(6, generator=make)
        for nested, (out, inner) in ((".base_layer", (10, 6)), ("", (6, 5))):
            key = f"{PREFIX}{path}{nested}"
            adapter[f"{key}.lora_A.weight"] = torch.randn(RANK * EXPERTS, inner, generator=make)
            adapter[f"{key}.lora_B.weight"] = torch.randn(out, RANK * EXPERTS, generator=make)
    small.write_base(folder / "base", base, config={"model_type": "qwen3_moe"})
    fields = {"r": RANK, "lora_alpha": 5, "use_dora": False, "target_modules": [],
              "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
              "peft_version": "0.21.2", "auto_mapping": None}  # fmt: skip
    small.write_adapter(folder / "adapter", adapter, **fields)


# --- what the files say


class UnclearError(Exception):
    """The files do not say what the merge is."""


def clear(condition):
    if not condition:
        raise UnclearError


def number(value):
    clear(type(value) in (int, float) and math.isfinite(value) and value != 0)
    return value


def said(kind, folder):
    """Every tensor of the merge by definition, float64.

    Raises:
        UnclearError: The adapter lacks a part, or has one too many.
    """
    try:
        base = load_file(folder / "base/model.safetensors")
        held = load_file(folder / "adapter" / WEIGHTS[kind])
        config = json.loads((folder / "adapter/adapter_config.json").read_text())
    except Exception as error:
        raise UnclearError from error
    clear(isinstance(config, dict))
    clear(all(t.is_floating_point() and t.isfinite().all() for t in held.values()))
    exact = {n: oracle.float64(t) for n, t in base.items()}
    values = {n: oracle.float64(t) for n, t in held.items()}
    (_said_by_mlx if kind == "mlx" else _said_by_peft)(exact, values, config)
    clear(not values)  # nothing is left over
    return exact


def _said_by_mlx(exact, values, config):
    settings_ = config.get("lora_parameters")
    clear(isinstance(settings_, dict))
    kind = config.get("fine_tune_type", "lora")
    clear(kind in ("lora", "dora") and settings_.get("alpha") in (None, settings_.get("rank")))
    scale, rank = number(settings_.get("scale")), settings_.get("rank")
    for key in sorted(k for k in values if k.endswith(".lora_a")):
        module = key.removesuffix(".lora_a")
        a, b = values.pop(key), values.pop(f"{module}.lora_b", None)
        clear(b is not None and a.ndim == b.ndim == 2 and a.shape[1] == b.shape[0] == rank)
        clear(f"{module}.weight" in exact)
        if module.endswith("embed_tokens"):  # seen as (tokens, dim): one m per token
            up, down = a, b
        else:
            up, down = b.T, a.T
        m = values.pop(f"{module}.m", None)
        exact[f"{module}.weight"] = product(
            exact[f"{module}.weight"], down, up, scale, m if kind == "dora" else None,
            dora=kind == "dora",
        )  # fmt: skip


# Keys may hold the adapter's name, and AdaLoRA's lack ".weight".
SPELLINGS = (
    (re.compile(r"\.(lora_[AB])(\.(?!weight$)[^.]+)?(\.weight)?"), r".\1.weight"),
    (re.compile(r"\.lora_magnitude_vector(\.(?!weight$)[^.]+)?(\.weight)?"),
     ".lora_magnitude_vector"),
)  # fmt: skip


def _plainly(values):
    """Give every key its usual spelling; two keys of one are a contradiction."""
    for key in list(values):
        plain = key
        for spelling, usual in SPELLINGS:
            plain = re.sub(spelling.pattern + "$", usual, plain)
        value = values.pop(key)
        clear(plain not in values)
        values[plain] = value


def _said_by_peft(exact, values, config):
    clear(config.get("peft_type", "LORA") == "LORA")
    _plainly(values)
    parameters = config.get("target_parameters") or []
    for key in sorted((k for k in values if k.endswith(".lora_A.weight")), key=len, reverse=True):
        module = key.removesuffix(".lora_A.weight")
        a, b = values.pop(key), values.pop(f"{module}.lora_B.weight", None)
        m = values.pop(f"{module}.lora_magnitude_vector", None)
        clear(b is not None and a.ndim == b.ndim == 2)
        path = module.removeprefix(PREFIX)
        if ".experts" in path:
            inner = path.endswith(".base_layer")
            name = path.removesuffix(".base_layer") + (".gate_up_proj" if inner else ".down_proj")
            clear(any(f".{name}".endswith(f".{p}") for p in parameters) and m is None)
            clear(not config.get("use_dora"))
            rank, scale = ranked(config, name)
            clear(a.shape[0] == b.shape[1] == rank * EXPERTS)
            B = b.reshape(len(b), rank, EXPERTS)
            exact[name] = np.stack([
                product(W, a[e * rank : (e + 1) * rank], B[:, :, e], scale, None, dora=False)
                for e, W in enumerate(exact[name])
            ])  # fmt: skip
        else:
            rank, scale = ranked(config, path)
            clear(a.shape[0] == b.shape[1] == rank and f"{path}.weight" in exact)
            exact[f"{path}.weight"] = product(
                exact[f"{path}.weight"], a, b, scale, m, dora=bool(config.get("use_dora"))
            )


def ranked(config, path):
    """Rank and scaling of a module, by PEFT's rule."""

    def looked_up(field, default):
        for pattern, value in (config.get(field) or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", path):
                return value
        return default

    rank = looked_up("rank_pattern", config.get("r"))
    clear(type(rank) is int and rank > 0)
    alpha = number(looked_up("alpha_pattern", config.get("lora_alpha")))
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def product(W, down, up, scale, m, *, dora):
    clear(up.shape[1] == down.shape[0] and (m is not None) == dora)
    if (up.shape[0], down.shape[1]) != W.shape:  # what is stored transposed
        clear((down.shape[1], up.shape[0]) == W.shape and not dora)
        return W + scale * (up @ down).T
    if not dora:
        return oracle.lora(W, down, up, scale)
    clear(m.size == len(W))
    return oracle.dora(W, down, up, m.reshape(-1), scale)


# --- what happens to them


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 20), st.floats(-10, 10), st.just(float("nan")),
    st.text("abq_.proj*([", max_size=8), st.just([]), st.just({}), st.lists(st.integers(0, 3)),
    st.lists(st.sampled_from(["q_proj", "lm_head", "experts.down_proj"]), max_size=2),
    st.dictionaries(st.sampled_from(["q_proj", ".*", "a(", "down_proj"]), st.integers(0, 9),
                    max_size=2),
)  # fmt: skip
FIELDS = sorted({
    "r", "lora_alpha", "use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "bias",
    "lora_bias", "target_modules", "target_parameters", "modules_to_save", "peft_type", "task_type",
    "fan_in_fan_out", "init_lora_weights", "peft_version", "auto_mapping", "layers_to_transform",
    "trainable_token_indices", "ensure_weight_tying", "use_qalora", "use_bdlora",
    "layer_replication", "lora_B_layout", "unsloth_fused_expert_lora", "base_model_name_or_path",
    "fine_tune_type", "num_layers", "lora_parameters", "model", "something_new",
})  # fmt: skip


@st.composite
def damage(draw):
    """A function that changes an adapter's folder, and what it does, for the report."""
    how = draw(st.sampled_from(["key", "drop", "copy", "shape", "dtype", "value", "field", "scale",
                                "bytes", "config bytes", "swap"]))  # fmt: skip
    which, other = draw(st.integers(0, 99)), draw(st.integers(0, 99))
    detail = draw({
        "key": st.tuples(st.integers(0, 200), st.sampled_from("abqAB01._xé\n/")),
        "shape": st.sampled_from(
            ["turned", "shorter", "longer", "flat", "wrapped", "empty", "0-D"]
        ),
        "dtype": st.sampled_from([torch.bfloat16, torch.float16, torch.float64, torch.int32]),
        "value": st.sampled_from([math.nan, math.inf, 0.0, 1e30]),
        "field": st.tuples(st.sampled_from(FIELDS), VALUES),
        "scale": st.tuples(st.sampled_from(["scale", "alpha", "rank"]), VALUES),
        "bytes": st.tuples(st.integers(0, 4000), st.integers(1, 255)),
        "config bytes": st.tuples(st.integers(0, 900), st.integers(1, 255)),
    }.get(how, st.none()))  # fmt: skip
    return how, which, other, detail


def apply(kind, folder, what):
    how, which, other, detail = what
    path, config = folder / "adapter" / WEIGHTS[kind], folder / "adapter/adapter_config.json"
    if how in ("field", "scale"):
        try:
            content = json.loads(config.read_bytes())
        except ValueError:
            return  # damaged beyond further damage
        if not isinstance(content, dict) or not isinstance(
            content.get("lora_parameters", {}), dict
        ):
            return
        place = content.setdefault("lora_parameters", {}) if how == "scale" else content
        place[detail[0]] = detail[1]
        config.write_text(json.dumps(content))
    elif "bytes" in how:
        file = path if how == "bytes" else config
        data = bytearray(file.read_bytes())
        data[detail[0] % len(data)] ^= detail[1]
        file.write_bytes(data)
    else:
        try:
            held = load_file(path)
        except SafetensorError:
            return  # damaged beyond further damage
        names = sorted(held)
        name, second = names[which % len(names)], names[other % len(names)]
        _change(held, name, second, how, detail)
        save_file({n: t.contiguous() for n, t in held.items()}, path, {"format": "pt"})


def _change(held, name, second, how, detail):
    tensor = held[name]
    if how == "drop":
        del held[name]
    elif how == "copy":
        held[second] = tensor.clone()
    elif how == "swap":
        held[name], held[second] = held[second].clone(), tensor.clone()
    elif how == "key":
        at = detail[0] % len(name)
        held[name[:at] + detail[1] + name[at + 1 :]] = held.pop(name)
    elif how == "shape":
        tensor = tensor.reshape(1) if tensor.ndim == 0 else tensor
        held[name] = {
            "turned": lambda t: t.transpose(0, -1) if t.ndim > 1 else t.flip(0),
            "shorter": lambda t: t[:-1],
            "longer": lambda t: torch.cat([t, t[:1]]), "flat": lambda t: t.reshape(-1),
            "wrapped": lambda t: t[None], "empty": lambda t: t[:0], "0-D": lambda t: t.sum(),
        }[detail](tensor)  # fmt: skip
    elif how == "dtype":
        held[name] = tensor.to(detail)
    elif how == "value":
        held[name] = tensor.clone()
        held[name].view(-1)[0] = detail


def survives(kind, what):
    """Merge a damaged adapter; nothing but a refusal or the merge of what it says may come out."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        shutil.copytree(sound(kind), folder, dirs_exist_ok=True)
        for one in what:
            apply(kind, folder, one)
        try:
            dora_export.merge(folder / "base", folder / "adapter", folder / "out", threads=1)
        except DoraExportError:
            assert not (folder / "out").exists()
            return "refused"
        try:
            exact = said(kind, folder)
        except UnclearError:
            pytest.fail(f"merged, though the files do not say what the merge is: {what}")
        with safe_open(folder / "out/model.safetensors", "pt") as file:
            assert set(file.keys()) == set(exact)
            for name, want in exact.items():
                got = file.get_tensor(name)
                if got.is_floating_point():
                    assert oracle.ulps(got, want) <= 1, (name, what)
                else:
                    assert np.array_equal(oracle.float64(got), want), (name, what)
        return "merged"


@pytest.mark.parametrize("kind", WEIGHTS)
def test_the_undamaged_adapter_is_merged_as_this_test_reads_it(kind):
    assert survives(kind, []) == "merged"


@pytest.mark.parametrize("kind", WEIGHTS)
def test_damage_that_only_changes_the_numbers_is_merged_as_they_are_now(kind):
    seen = [survives(kind, [("dtype", which, 0, torch.float64)]) for which in range(4)]
    assert seen == ["merged"] * 4
    field = ("scale", ("scale", 7.25)) if kind == "mlx" else ("field", ("lora_alpha", 7.25))
    assert survives(kind, [(field[0], 0, 0, field[1])]) == "merged"


@pytest.mark.parametrize("kind", WEIGHTS)
@given(what=damage())
@QUICK
def test_a_damaged_adapter_is_refused_or_merged_as_it_says(kind, what):
    survives(kind, [what])


@pytest.mark.nightly
@pytest.mark.parametrize("kind", WEIGHTS)
@given(what=st.lists(damage(), min_size=1, max_size=3))
@LONG
def test_adapters_damaged_in_several_ways_are_refused_or_merged_as_they_say(kind, what):
    survives(kind, what)


# --- single files of trainers, with what their metadata says


@cache
def single(kind):
    """A base's folder, an adapter's tensors, its metadata, and the options that it needs."""
    from tests import pipelines, test_aitoolkit, test_small_trainers, test_torchtune

    folder = Path(tempfile.mkdtemp(prefix="single-"))
    if kind == "qdora":
        _, adapter, _ = test_small_trainers.write_qdora(folder, biases=["layers.0.q"])
        return folder / "base", adapter, {}, {}
    if kind == "torchtune":
        _, _, adapter = test_torchtune.llama4(folder, dora=True)
        return folder / "base", adapter, {}, {"alpha": 7.5}
    if kind == "peft":
        small.write_pair(folder, dtype=torch.float32)
        return folder / "base", load_file(folder / "adapter" / WEIGHTS["peft"]), {}, {"alpha": 4.0}
    base = pipelines.write(folder / "base", torch.float32)
    if kind == "ai-toolkit":
        return base, test_aitoolkit.adapter(), {}, {"alpha": 4.5}
    own = {n.removeprefix(PREFIX): t
           for n, t in pipelines.adapter(pipelines.tensors()["unet"]).items()}  # fmt: skip
    said = {"r": 3, "lora_alpha": 5, "use_dora": True, "peft_type": "LORA"}
    if kind == "diffusers":
        said = {f"unet.{name}": value for name, value in said.items()}
        tensors = {f"unet.{name}": t for name, t in own.items()}
    elif kind == "ComfyUI":
        tensors = {f"diffusion_model.{name}": t for name, t in own.items()}
        modules = {name.partition(".lora_")[0] for name in own}
        tensors |= {f"diffusion_model.{m}.alpha": torch.tensor(5.0) for m in modules}
    else:
        said = {"unet.peft_type": "LOHA", "unet.r": 3, "unet.alpha": 5}
        tensors = {}
        for name, (out, *inner) in pipelines.LAYERS.items():
            columns = math.prod(inner)
            for n in "12":
                tensors[f"unet.{name}.hada_w{n}_a"] = torch.ones(out, 3)
                tensors[f"unet.{name}.hada_w{n}_b"] = torch.ones(3, columns)
    return base, tensors, said, {}


SINGLE = ("qdora", "torchtune", "peft", "ai-toolkit", "diffusers", "ComfyUI", "LoHa")


def single_survives(kind, what):
    """Merge a damaged file: a refusal, or every tensor used; never another error."""
    base, tensors, said, options = single(kind)
    tensors, said = {n: t.clone() for n, t in tensors.items()}, dict(said)
    for how, which, other, detail in what:
        names = sorted(tensors)
        if how in ("field", "scale") and said:
            key = sorted(said)[which % len(said)]
            said[key if other % 3 else f"unet.{detail[0]}"] = detail[1]
        elif how in ("key", "drop", "copy", "swap", "shape", "dtype", "value") and names:
            _change(tensors, names[which % len(names)], names[other % len(names)], how, detail)
    metadata = {"lora_adapter_metadata": json.dumps(said)} if said else {}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "adapter.safetensors"
        save_file({n: t.contiguous() for n, t in tensors.items()}, file, metadata)
        try:
            report = dora_export.merge(base, file, Path(folder) / "out", threads=1, **options)
        except DoraExportError:
            assert not (Path(folder) / "out").exists()
            return "refused"
        assert report.adapter_tensors_used == report.adapter_tensors == len(tensors)
        return "merged"


@pytest.mark.parametrize("kind", SINGLE)
def test_the_undamaged_file_is_merged_whole(kind):
    assert single_survives(kind, []) == "merged"


FOUND = {
    "LoHa's products of two sizes": ("LoHa", ("copy", 5, 3, None)),
    "whole numbers for a factor": ("ai-toolkit", ("dtype", 0, 0, torch.int32)),
}


@pytest.mark.parametrize("case", FOUND)
def test_damage_that_once_was_no_refusal(case):
    kind, what = FOUND[case]
    assert single_survives(kind, [what]) == "refused"


@pytest.mark.parametrize("kind", SINGLE)
@given(what=damage())
@settings(QUICK, max_examples=15)
def test_a_damaged_file_is_refused_or_used_whole(kind, what):
    single_survives(kind, [what])


@pytest.mark.nightly
@pytest.mark.parametrize("kind", SINGLE)
@given(what=st.lists(damage(), min_size=1, max_size=3))
@settings(LONG, max_examples=300)
def test_files_damaged_in_several_ways_are_refused_or_used_whole(kind, what):
    single_survives(kind, what)
