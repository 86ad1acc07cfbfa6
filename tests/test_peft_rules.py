"""rank_pattern and alpha_pattern as the version of PEFT read them that trained the adapter."""

import itertools
import re
from dataclasses import asdict
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import save_file

import dora_export
from dora_export.adapters import peft_patterns
from dora_export.errors import AdapterError
from tests import oracle, small

R, ALPHA = 4, 8.0
MODULES = ["q_proj", "layers.1.q_proj", "layers.11.q_proj", "layers.1.k_proj", "my_q_proj",
           "layers.1.attn.q_proj"]  # fmt: skip
KEYS = ["q_proj", "layers.1.q_proj", "^layers.1.q_proj", "^q_proj", "1.q_proj", "q_proj|k_proj",
        r"layers\.\d+\.q_proj", "attn.q_proj"]  # fmt: skip


def first(keys, module, around):
    """The first key that PEFT's expression finds, else the module itself."""
    return next((k for k in keys if re.match(around % k, module)), module)


def since_0_15(ranks, alphas, module):
    return tuple(first(m, module, r"(.*\.)?(%s)$") for m in (ranks, alphas))


def in_0_14(ranks, alphas, module):
    return tuple(first(m, module, r".*\.%s$") for m in (ranks, alphas))


def until_0_13(ranks, alphas, module):
    return (first([*ranks, *alphas], module, r".*\.%s$"),) * 2


def of_products_until_0_14(ranks, alphas, module):
    return (first([*ranks, *alphas], module, r"(.*\.)?%s$"),) * 2


BY_VERSION = {"0.21.2": since_0_15, "0.15.0": since_0_15, "1.0.0.dev0@1a2b": since_0_15,
              "0.14.0": in_0_14, "0.13.2": until_0_13, "0.5.0": until_0_13}  # fmt: skip
# Method -> version -> rule. Source: src/peft/tuners/{loha,lokr}/model.py, _create_and_replace.
OF_PRODUCTS = {"0.21.2": since_0_15, "0.15.0": since_0_15, "0.14.0": of_products_until_0_14,
               "0.13.2": of_products_until_0_14, "0.6.0": of_products_until_0_14}  # fmt: skip
RULES = [("LORA", *item) for item in BY_VERSION.items()] + [
    (method, *item) for method in ("LOHA", "LOKR") for item in OF_PRODUCTS.items()]  # fmt: skip


def patterns():
    """Maps of one and two keys, of both fields."""
    for one, two in itertools.permutations(KEYS, 2):
        yield {one: 3}, {two: 5.0}
        yield {one: 3, two: 6}, {two: 7.0}
        yield {}, {one: 5.0, two: 7.0}


@pytest.mark.parametrize(("method", "version", "rule"), RULES)
def test_keys_are_looked_up_as_that_version_did(method, version, rule):
    rules = peft_patterns.rules_of({"peft_type": method, "peft_version": version})
    assert len(rules) == 1
    expressions = [k for k in KEYS if "|" not in k and "\\" not in k]  # others cost a process each
    for ranks, alphas in patterns():
        if not {*ranks, *alphas} <= {*expressions}:
            continue
        found = peft_patterns.held_against(Path("c"), ranks, alphas, MODULES, rules, (R, ALPHA))
        for module in MODULES:
            got = found.ranks.get(module, module), found.alphas.get(module, module)
            want = rule(ranks, alphas, module)
            assert [ranks.get(got[0]), alphas.get(got[1])] == [
                ranks.get(want[0]), alphas.get(want[1])], (ranks, alphas, module)  # fmt: skip


# Each asks a process for its matches.
@pytest.mark.parametrize(
    ("method", "version", "rule"),
    [("LORA", "0.21.2", since_0_15), ("LORA", "0.14.0", in_0_14), ("LORA", "0.13.2", until_0_13),
     ("LOHA", "0.14.0", of_products_until_0_14)],
)  # fmt: skip
@pytest.mark.parametrize("key", ["q_proj|k_proj", r"layers\.\d+\.q_proj"])
def test_expressions_are_taken_as_that_version_took_them(method, version, rule, key):
    rules = peft_patterns.rules_of({"peft_type": method, "peft_version": version})
    found = peft_patterns.held_against(Path("c"), {}, {key: 5.0}, MODULES, rules, (R, ALPHA))
    for module in MODULES:
        want = rule({}, {key: 5.0}, module)[1]
        assert (found.alphas.get(module) == key) == (want == key), module


# What the configs of each version had for the first time, beside what all had.
FIELDS = {
    ("0.15",): {"eva_config": None, "exclude_modules": None, "trainable_token_indices": None},
    ("0.14",): {"eva_config": None, "exclude_modules": None, "lora_bias": False},
    ("0.5",): {"layers_pattern": None, "layers_to_transform": None, "loftq_config": {}},
    peft_patterns.RULES: {"layers_pattern": None},
}


@pytest.mark.parametrize("rules", FIELDS, ids=str)
def test_version_is_told_by_the_fields_of_its_configs(rules):
    ever = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none"}
    assert peft_patterns.rules_of(ever | FIELDS[rules]) == rules
    assert peft_patterns.rules_of(ever | FIELDS[rules] | {"peft_version": "0.14.1"}) == ("0.14",)


@pytest.mark.parametrize("method", ["LORA", "LOHA"])
def test_version_before_all_rules_has_the_first_of_them(method):
    (rule,) = peft_patterns.rules_of({"peft_type": method, "peft_version": "0.3.0"})
    assert rule == {"LORA": "0.5", "LOHA": "0.6"}[method]


def test_fields_that_tell_the_version_are_peft_s():
    fields = set(asdict(peft.LoraConfig()))
    told = {*peft_patterns.SINCE_0_15, *peft_patterns.SINCE_0_14, *peft_patterns.EVER_SINCE}
    assert told <= fields


# The rank of layer 1's q_proj is under one key, its alpha under another.
PATTERNS = {"rank_pattern": {"q_proj": small.RANK}, "alpha_pattern": {"layers.1.attn.q_proj": 11}}
NAME = "model.layers.1.attn.q_proj"
OLD = {"layers_pattern": None, "layers_to_transform": None, "loftq_config": {}}


def merged(folder, config):
    base = small.base_tensors()
    small.write_base(folder / "base", base)
    held = small.adapter_tensors(base)
    small.write_adapter(folder / "adapter", held, **PATTERNS, **config)
    report = dora_export.merge(folder / "base", folder / "adapter", folder / "out")
    weight = small.load_file(folder / "out/model.safetensors")[f"{NAME}.weight"]
    key = small.PREFIX + NAME
    W, A, B, m = map(oracle.float64, (base[f"{NAME}.weight"], held[f"{key}.lora_A.weight"],
                                      held[f"{key}.lora_B.weight"],
                                      held[f"{key}.lora_magnitude_vector"]))  # fmt: skip
    near = {alpha: oracle.ulps(weight, oracle.dora(W, A, B, m, alpha / small.RANK)) <= 1
            for alpha in (11, small.ALPHA)}  # fmt: skip
    return near, report


@pytest.mark.parametrize(
    ("config", "alpha"),
    [
        ({"peft_version": "0.19.0"}, 11),
        ({"peft_version": "0.14.0"}, 11),
        ({"trainable_token_indices": None}, 11),
        ({"peft_version": "0.13.2"}, small.ALPHA),
        (OLD, small.ALPHA),
    ],
    ids=str,
)
def test_alpha_under_another_key_than_the_rank_is_the_versions(config, alpha, tmp_path):
    near, report = merged(tmp_path, config)
    assert near == {11: alpha == 11, small.ALPHA: alpha != 11}
    told = [w for w in report.warnings if "PEFT now gives" in w]
    assert len(told) == (alpha != 11)
    assert alpha == 11 or told[0].endswith(
        f"PEFT now gives {NAME} rank 3, alpha 11, but trained it with rank 3, alpha 5, by its rule "
        "since 0.5, which is merged; 1 of 4 layers"
    )


def test_alpha_that_versions_take_differently_is_asked_for(tmp_path):
    with pytest.raises(
        AdapterError,
        match=r"q_proj rank 3, alpha 11 as PEFT reads them since 0\.15, and rank 3, alpha 5 as it "
        r"did since 0\.5; .*Write \"peft_version\": \"0\.15\.0\" or \"0\.5\.0\" into it",
    ):
        merged(tmp_path, {})


# LoHa and LoKr, whose configs tell no version before 0.18
PRODUCT = {"r": 3, "alpha": 6, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"1.q_proj": 10}}
LAYER = "layers.1.q_proj"


def product_adapter(folder, method, **config):
    """One square layer's base and an adapter of rank 2, and what it adds unscaled."""
    rng = np.random.default_rng(3)
    base = {f"{LAYER}.weight": rng.normal(size=(6, 6)).astype(np.float32)}
    shapes = {"lokr_w1": (2, 2), "lokr_w2_a": (3, 2), "lokr_w2_b": (2, 3)}
    if method == "LOHA":
        shapes = {f"hada_w{i}_{side}": (6, 2)[:: 1 if side == "a" else -1]
                  for i in "12" for side in "ab"}  # fmt: skip
    parts = {n: rng.normal(size=shape).astype(np.float32) for n, shape in shapes.items()}
    small.write_base(folder / "base", {n: torch.from_numpy(w) for n, w in base.items()})
    (folder / "adapter").mkdir()
    save_file({f"{small.PREFIX}{LAYER}.{n}": torch.from_numpy(p) for n, p in parts.items()},
              folder / "adapter/adapter_model.safetensors")  # fmt: skip
    small.write_json(folder / "adapter/adapter_config.json",
                     {"peft_type": method, **PRODUCT, **config})  # fmt: skip
    f = {n: p.astype(np.float64) for n, p in parts.items()}
    if method == "LOHA":
        delta = (f["hada_w1_a"] @ f["hada_w1_b"]) * (f["hada_w2_a"] @ f["hada_w2_b"])
    else:
        delta = np.kron(f["lokr_w1"], f["lokr_w2_a"] @ f["lokr_w2_b"])
    return base[f"{LAYER}.weight"].astype(np.float64), delta


@pytest.mark.parametrize("method", ["LOHA", "LOKR"])
@pytest.mark.parametrize(("version", "alpha"), [("0.19.0", 10), ("0.15.0", 10), ("0.14.0", 6)])
def test_alpha_of_products_under_another_key_is_the_versions(method, version, alpha, tmp_path):
    W, delta = product_adapter(tmp_path, method, peft_version=version)
    report = dora_export.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    got = oracle.float64(small.load_file(tmp_path / "out/model.safetensors")[f"{LAYER}.weight"])
    off = {a: np.abs(got - (W + a / 2 * delta)).max() / np.abs(got).max() for a in (10, 6)}
    assert off[alpha] < 2e-6 < 0.1 < off[16 - alpha]
    told = [w for w in report.warnings if "PEFT now gives" in w]
    assert len(told) == (alpha == 6)
    assert alpha == 10 or "rank 2, alpha 10, but trained it with rank 2, alpha 6" in told[0]


def test_alpha_of_products_that_versions_take_differently_is_asked_for(tmp_path):
    product_adapter(tmp_path, "LOKR", exclude_modules=None)
    with pytest.raises(AdapterError, match=r"alpha 10 as PEFT reads them since 0\.15, and rank 2, "
                       r"alpha 6 as it did since 0\.6; .*\"0\.15\.0\" or \"0\.6\.0\""):  # fmt: skip
        dora_export.load_adapter(tmp_path / "adapter")


@pytest.mark.parametrize("method", ["LOHA", "LOKR"])
def test_rank_that_the_factors_do_not_have_is_refused(method, tmp_path):
    product_adapter(tmp_path, method, rank_pattern={}, alpha_pattern={})
    with pytest.raises(AdapterError, match=r"q_proj: rank 3 by the config, .* factors have 2"):
        dora_export.load_adapter(tmp_path / "adapter")


def test_rank_of_the_first_kronecker_factor_counts_as_well(tmp_path):
    first = {"lokr_w1_a": (2, 2), "lokr_w1_b": (2, 2), "lokr_w2": (3, 3)}
    with pytest.raises(AdapterError, match=r"q_proj: rank 3 by the config, .* factors have 2"):
        read_product(tmp_path, "LOKR", first)


def test_key_that_is_the_path_itself_is_not_idle():
    """In 0.14 nothing matched a path of one name, which was then looked up all the same."""
    found = peft_patterns.held_against(
        Path("c"), {"q_proj": 3}, {"k_proj": 5.0}, ["q_proj"], ["0.14"], (R, ALPHA)
    )
    assert found.idle == ("alpha_pattern 'k_proj'",)


@pytest.mark.parametrize("whole", [True, False])
def test_product_with_a_conv1d_is_laid_out_as_pefts_forward_has_it(whole, tmp_path):
    """torch.kron of a matrix and three dimensions, reshaped, as make_kron has it."""
    rng = torch.Generator().manual_seed(2)
    W, w2 = torch.randn(6, 6, 3, generator=rng), torch.randn(3, 3, 3, generator=rng)
    a, b = torch.randn(2, 3, generator=rng), torch.randn(3, 2, generator=rng)
    small.write_base(tmp_path / "base", {f"{LAYER}.weight": W})
    held = {"lokr_w1": a @ b} if whole else {"lokr_w1_a": a, "lokr_w1_b": b}
    (tmp_path / "adapter").mkdir()
    save_file({f"{small.PREFIX}{LAYER}.{n}": t for n, t in {**held, "lokr_w2": w2}.items()},
              tmp_path / "adapter/adapter_model.safetensors")  # fmt: skip
    small.write_json(tmp_path / "adapter/adapter_config.json",
                     {"peft_type": "LOKR", "r": 3, "alpha": 6})  # fmt: skip
    dora_export.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    got = small.load_file(tmp_path / "out/model.safetensors")[f"{LAYER}.weight"].double()
    delta = torch.kron((a @ b).double(), w2.double())
    want = W.double() + 2 * delta.reshape(6, 6, 3)
    assert (got - want).abs().max() <= 2e-6 * want.abs().max()
    by_channels = torch.kron((a @ b).double()[:, :, None], w2.double())
    assert (by_channels - delta.reshape(6, 6, 3)).abs().max() > 0.1


def test_pattern_that_gives_no_product_anything_is_told(tmp_path):
    product_adapter(tmp_path, "LOHA", alpha_pattern={"k_proj": 4}, peft_version="0.19.0")
    found = dora_export.load_adapter(tmp_path / "adapter")
    assert found.doubts == ("no layer takes its rank or alpha from alpha_pattern 'k_proj'",)


def read_product(folder, method, shapes, **config):
    save_file({f"{small.PREFIX}{LAYER}.{n}": torch.ones(shape) for n, shape in shapes.items()},
              folder / "adapter_model.safetensors")  # fmt: skip
    settings = {"peft_type": method, "r": 3, "alpha": 6, **config}
    small.write_json(folder / "adapter_config.json",
                     {n: v for n, v in settings.items() if v != "absent"})  # fmt: skip
    return dora_export.load_adapter(folder)


LOHA = {"hada_w1_a": (6, 3), "hada_w1_b": (3, 6), "hada_w2_a": (6, 3), "hada_w2_b": (3, 6)}
CORES = {"hada_t1": (3, 3, 1, 1), "hada_t2": (3, 3, 1, 1)}
TUCKER = {**LOHA, "hada_w1_a": (3, 6), "hada_w2_a": (3, 6), **CORES}
LOKR = {"lokr_w1": (2, 2), "lokr_w2_a": (3, 3), "lokr_w2_b": (3, 3)}
MISFITS = {
    "half of LoHa": ("LOHA", {n: s for n, s in LOHA.items() if n != "hada_w2_b"}, "LoHa tensors"),
    "one core": ("LOHA", {n: s for n, s in TUCKER.items() if n != "hada_t2"}, "LoHa tensors"),
    "two products": ("LOHA", {**LOHA, "hada_w2_a": (4, 3)}, r"products are \(6, 6\) and \(4, 6\)"),
    "ranks of LoHa": ("LOHA", {**LOHA, "hada_w1_a": (6, 2)}, r"LoHa factors \(6, 2\) and \(3, 6\)"),
    "rank of a core": ("LOHA", {**TUCKER, "hada_w1_a": (2, 6)}, r"and core \(3, 3, 1, 1\)"),
    "half of LoKr": ("LOKR", {n: s for n, s in LOKR.items() if n != "lokr_w2_b"}, "LoKr tensors"),
    "whole and in factors": ("LOKR", {**LOKR, "lokr_w1_a": (2, 3), "lokr_w1_b": (3, 2)},
                             "LoKr tensors"),
    "ranks of LoKr": ("LOKR", {**LOKR, "lokr_w2_a": (3, 2)}, r"LoKr factors \(3, 2\) and \(3, 3\)"),
    "rank of LoKr's core": ("LOKR", {**LOKR, "lokr_w2_a": (2, 3), "lokr_t2": (3, 3, 1, 1)},
                            r"and core \(3, 3, 1, 1\)"),
}  # fmt: skip


@pytest.mark.parametrize("case", MISFITS)
def test_factors_that_are_no_product_are_refused(case, tmp_path):
    method, shapes, reason = MISFITS[case]
    with pytest.raises(AdapterError, match=reason):
        read_product(tmp_path, method, shapes)


@pytest.mark.parametrize(
    ("config", "reason"),
    [({"r": 0}, "gives 0, expected a rank"), ({"rank_pattern": {"x": 2.5}}, "gives 2.5, expected"),
     ({"alpha": 0}, "gives 0, expected a number"), ({"alpha_pattern": {"x": "2"}}, "gives 2, exp"),
     ({"rank_pattern": ["q_proj"]}, "rank_pattern: expected a map")],
    ids=str,
)  # fmt: skip
def test_rank_and_alpha_that_are_none_are_refused(config, reason, tmp_path):
    with pytest.raises(AdapterError, match=reason):
        read_product(tmp_path, "LOKR", LOKR, **config)


def test_rank_and_alpha_left_out_are_pefts_defaults(tmp_path):
    eight = {n: tuple(8 if i == 3 else i for i in s) for n, s in LOHA.items()}
    assert read_product(tmp_path, "LOHA", eight, r="absent").updates[0].scaling == 6 / 8
    assert read_product(tmp_path, "LOHA", LOHA, alpha="absent").updates[0].scaling == 8 / 3
