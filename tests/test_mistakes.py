"""The mistake list: what can go wrong with a merge, planted one by one, found and named by verify.

Each mistake is planted in a right merge with numpy and the safetensors library.
"""

import copy
import importlib.util
import json
import shutil
import zlib
from functools import lru_cache

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dora_export import api
from tests import oracle
from tests.pairs import (
    DORA_MISTAKES,
    EXPERT,
    LINEARS,
    SCALING,
    O,
    Pair,
    Q,
    other_axis,
    scaled,
    with_scaling,
)
from tests.small import edit_json, edit_tensors, run

OTHER = Q.replace("1", "2")
OTHER_EXPERT = EXPERT.replace("experts.2", "experts.3")
LAST = "model.layers.2.attn.o_proj"


def formula(name, wrong):
    """Plant what a wrong formula of W, A, B, m gives."""
    return lambda pair: pair.plant(**{f"{name}.weight": wrong(*pair.terms(name))})


def values(name, change):
    """Plant a change of the right values."""
    return lambda pair: pair.plant(**{f"{name}.weight": change(pair.right(name).copy())})


def tensors(change):
    """Rewrite the file's tensors."""
    return lambda pair: edit_tensors(pair.merged / "model.safetensors", change)


def config(**fields):
    return lambda pair: edit_json(pair.merged / "config.json", **fields)


def everywhere(wrong):
    def plant(pair):
        pair.plant(**{f"{n}.weight": wrong(*pair.terms(n)) for n in LINEARS})

    return plant


def swap(one, other):
    def plant(pair):
        pair.plant(**{f"{one}.weight": pair.right(other), f"{other}.weight": pair.right(one)})

    return plant


def swap_magnitudes(one, other):
    def plant(pair):
        pair.plant(**{f"{n}.weight": oracle.dora(*pair.terms(n)[:3], pair.terms(m)[3], SCALING)
                      for n, m in ((one, other), (other, one))})  # fmt: skip

    return plant


def flip(name, position, bit):
    """Flip one bit of a tensor's bytes in the file."""

    def plant(pair):
        path = pair.merged / "model.safetensors"
        data = bytearray(path.read_bytes())
        length = int.from_bytes(data[:8], "little")
        first, last = json.loads(data[8 : 8 + length])[f"{name}.weight"]["data_offsets"]
        data[8 + length + range(first, last)[position]] ^= 1 << bit
        path.write_bytes(data)

    return plant


def put(index, value):
    def change(right):
        right[index] = value
        return right

    return change


def scale(index, factor):
    def change(right):
        right[index] *= factor
        return right

    return change


def another_base(pair):
    """Merge the same adapter into another base and put it in the place of the right merge."""
    for name in list(load_file(pair.merged / "model.safetensors")):
        if name not in {f"{n}.weight" for n in LINEARS}:
            noise = oracle.float64(pair.base[name]) * 1.1
            pair.plant(**{name: noise})
    pair.plant(**{f"{n}.weight": oracle.dora(1.1 * pair.terms(n)[0], *pair.terms(n)[1:], SCALING)
                  for n in LINEARS})  # fmt: skip


def one_row_without_b(W, A, B, m):
    B = B.copy()
    B[7] = 0
    return oracle.dora(W, A, B, m, SCALING)


def wrong_shard(pair):
    index = pair.merged / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    places = content["weight_map"]
    places[f"{Q}.weight"] = next(f for f in places.values() if f != places[f"{Q}.weight"])
    index.write_text(json.dumps(content))


def total_size(pair):
    index = pair.merged / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["metadata"]["total_size"] += 2
    index.write_text(json.dumps(content))


def truncated(pair):
    path = pair.merged / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def transposed(ts):
    ts[f"{Q}.weight"] = ts[f"{Q}.weight"].T.contiguous()


def cast_one(ts):
    ts[f"{Q}.weight"] = ts[f"{Q}.weight"].to(torch.float16)


def drop(ts):
    del ts[f"{Q}.weight"]


def add(ts):
    ts["model.layers.9.extra.weight"] = torch.ones(3)


def remove(name):
    return lambda pair: (pair.merged / name).unlink()


def rotary(right):
    return right.reshape(2, -1, 48).swapaxes(0, 1).reshape(-1, 48)


WHOLE = {  # mistakes about whole tensors: found at level "fast" as well
    **{f"one layer: {code}": (formula(Q, wrong), "oracle", code, Q)
       for code, wrong in DORA_MISTAKES.items()},
    "last layer not merged": (formula(LAST, lambda W, A, B, m: W), "oracle", "not-applied", LAST),
    "alpha left out": (formula(Q, with_scaling(1.0)), "oracle", "scaling-other", Q),
    "scaling of another rule": (formula(Q, with_scaling(7.5)), "oracle", "scaling-other", Q),
    "scaling off by sqrt(r) in one layer":
        (formula(Q, with_scaling(SCALING * 3**0.5)), "oracle", "scaling-other", Q),
    "norm on the other axis": (formula(O, other_axis), "oracle", "norm-other-axis", O),
    "magnitudes of another layer":
        (lambda pair: pair.plant(**{f"{Q}.weight": oracle.dora(
            *pair.terms(Q)[:3], pair.terms(OTHER)[3], SCALING)}), "oracle",
         "magnitude-of-another", Q),
    "magnitudes of two layers swapped":
        (swap_magnitudes(Q, OTHER), "oracle", "magnitude-of-another", Q),
    "magnitudes of no layer":
        (formula(Q, lambda W, A, B, m: scaled(W + SCALING * B @ A, m * np.linspace(1, 1.1, 80))),
         "oracle", "magnitude-other", Q),
    "magnitudes a little too large":
        (formula(Q, lambda W, A, B, m: oracle.dora(W, A, B, 1.01 * m, SCALING)), "oracle",
         "magnitude-other", Q),
    "magnitudes that count from one":
        (formula(Q, lambda W, A, B, m: oracle.dora(W, A, B, 1 + m, SCALING)), "oracle",
         "magnitude-other", Q),
    "rows of B rolled":
        (formula(Q, lambda W, A, B, m: oracle.dora(W, A, np.roll(B, 1, 0), m, SCALING)), "oracle",
         "update-permuted", Q),
    "ranks in another order":
        (formula(Q, lambda W, A, B, m: oracle.dora(W, np.roll(A, 1, 0), B, m, SCALING)), "oracle",
         "update-permuted", Q),
    "experts swapped": (swap(EXPERT, OTHER_EXPERT), "oracle", "tensor-of-another", EXPERT),
    "experts' updates in another order":
        (lambda pair: pair.plant(**{f"{EXPERT}.weight": oracle.dora(
            pair.terms(EXPERT)[0], *pair.terms(OTHER_EXPERT)[1:], SCALING)}), "oracle",
         "update-of-another", EXPERT),
    "layers swapped": (swap(Q, OTHER), "oracle", "tensor-of-another", Q),
    "rows in rotary order": (values(Q, rotary), "oracle", "rows-permuted", Q),
    "square tensor transposed":
        (values(O, lambda right: right.T.copy()), "oracle", "transposed-values", O),
    "all scaled": (values(Q, lambda right: right * 1.05), "oracle", "magnitude-other", Q),
    "noise": (values(Q, lambda right: right * (1 + 0.1 * np.sin(np.arange(48)))), "oracle",
              "wrong-values", Q),
    "norm put before the sum":
        (formula(Q, lambda W, A, B, m: scaled(W, m) + SCALING * B @ A), "oracle",
         "wrong-values", Q),
}  # fmt: skip
PARTS = {  # mistakes about parts of tensors, at level "full"
    "one row of B zeroed": (formula(Q, one_row_without_b), "oracle", "rows-wrong", Q),
    "one column scaled": (values(Q, scale(np.s_[:, 5], 1.5)), "oracle", "wrong-values", Q),
    "a block zeroed": (values(Q, put(np.s_[8:16, 8:16], 0.0)), "oracle", "rows-wrong", Q),
    "one element doubled": (values(Q, scale((3, 4), 2.0)), "oracle", "rows-wrong", Q),
    "NaN": (values(Q, put((3, 4), np.nan)), "oracle", "not-finite", Q),
    "infinity": (values(Q, put((3, 4), np.inf)), "oracle", "not-finite", Q),
    "an exponent bit flipped": (flip(Q, -1, 0), "oracle", "rows-wrong", Q),
}
FILES = {  # what the ledger finds, at both levels
    "one byte flipped": (flip("model.norm", 17, 3), "ledger", "bytes-differ", "model.norm.weight"),
    "tensor missing": (tensors(drop), "ledger", "tensor-missing", f"{Q}.weight"),
    "tensor added": (tensors(add), "ledger", "tensor-extra", "model.layers.9.extra.weight"),
    "tensor transposed": (tensors(transposed), "ledger", "transposed", f"{Q}.weight"),
    "tensor cast": (tensors(cast_one), "ledger", "dtype-differs", f"{Q}.weight"),
    "another base": (another_base, "ledger", "another-base", ""),
    "head tied": (config(tie_word_embeddings=True), "ledger", "config-tied", "tie_word_embeddings"),
    "vocabulary": (config(vocab_size=61), "ledger", "config-vocab", "vocab_size"),
    "rotary base": (config(rope_theta=500000.0), "ledger", "config-changed", "rope_theta"),
    "dtype in the config": (config(dtype="float16"), "ledger", "config-dtype", "dtype"),
    "no config": (remove("config.json"), "ledger", "config-missing", "config.json"),
    "no tokenizer": (remove("tokenizer.json"), "ledger", "tokenizer-missing", "tokenizer.json"),
}
SHARDS = {
    "index points to the wrong shard": (wrong_shard, "ledger", "index-wrong", f"{Q}.weight"),
    "total_size": (total_size, "ledger", "total-size", "model.safetensors.index.json"),
    "shard truncated": (truncated, "ledger", "file-unreadable", "model-00002-of-00002.safetensors"),
    "shard missing": (remove("model-00001-of-00002.safetensors"), "ledger", "file-missing",
                      "model-00001-of-00002.safetensors"),
}  # fmt: skip
# What is said of each, beside the title of its code: enough to know what was found, and where.
WORDS = {
    "one layer: not-applied": "the base's values",
    "one layer: applied-twice": "merged onto the merged weight",
    "one layer: sign-flipped": "m (W - s B A) / ||W - s B A||",
    "one layer: norm-of-base": "m V / ||W||",
    "one layer: magnitude-ignored": "V / ||V||",
    "one layer: magnitude-initial": "||W|| V / ||V||",
    "one layer: lora-for-dora": "W + s B A",
    "one layer: factors-ignored": "m W / ||W||",
    "one layer: strength-other": "strength 0.6 instead of 1",
    "last layer not merged": "the base's values",
    "alpha left out": "instead of 2.5 (alpha left out)",
    "scaling of another rule": "instead of 2.5 (alpha, not divided by r)",
    "scaling off by sqrt(r) in one layer": "instead of 2.5 (alpha/sqrt(r) for alpha/r)",
    "norm on the other axis": "one norm and magnitude per stored column",
    "magnitudes of another layer": f"the magnitudes of '{OTHER}.weight'",
    "magnitudes of two layers swapped": f"the magnitudes of '{OTHER}.weight'",
    "magnitudes of no layer": "of the right ones",
    "magnitudes a little too large": "of the right ones",
    "magnitudes that count from one": "(1 + m) V / ||V||",
    "rows of B rolled": "row 0 holds the update of row 79, and ",
    "ranks in another order": "column 0 of B meets row 2 of A, and 2 more of 3",
    "experts swapped": f"the values of '{OTHER_EXPERT}.weight'",
    "experts' updates in another order": f"the update of '{OTHER_EXPERT}.weight'",
    "layers swapped": f"the values of '{OTHER}.weight'",
    "rows in rotary order": "holds what belongs into row",
    "square tensor transposed": "rows and columns are exchanged",
    "all scaled": "1.05",
    "noise": "of the weight's size",
    "norm put before the sum": "of the update's",
    "one row of B zeroed": "1 of 80 rows (7), factors-ignored: m W / ||W||",
    "one column scaled": "of the weight's size",
    "a block zeroed": "8 of 80 rows (8, 9, 10, 11, 12, 13, 14, 15)",
    "one element doubled": "1 of 80 rows (3)",
    "NaN": "1 element is NaN or infinite",
    "infinity": "1 element is NaN or infinite",
    "an exponent bit flipped": "1 of 80 rows (79)",
    "one byte flipped": "1 of 48 elements (1 byte), the first at [4]",
    "tensor missing": "F32 (80, 48)",
    "tensor added": "F32 (3)",
    "tensor transposed": "(48, 80), expected (80, 48)",
    "tensor cast": "F16, expected F32",
    "another base": "3 of 3 tensors that the adapter does not touch differ all over",
    "head tied": "differs from the embedding: loaders overwrite it",
    "vocabulary": "61, lm_head.weight has 60 rows",
    "rotary base": "500000.0, expected 10000.0",
    "dtype in the config": "float16, but the tensors are float32",
    "no config": "not there",
    "no tokenizer": "the base has it",
    "index points to the wrong shard": "places it in model-00002-of-00002.safetensors, found in "
                                       "model-00001-of-00002.safetensors",
    "total_size": "the tensors have 79200 bytes",
    "shard truncated": "its bytes end at 36288, the file has 36188",
    "shard missing": "the index places 8 tensors in it",
}  # fmt: skip
DTYPES = [torch.float32, torch.bfloat16]


def check(pair, mistake, level, words=""):
    plant, tier, code, where = mistake
    plant(pair)
    report = api.verify(pair.folder / "base", pair.folder / "adapter", pair.merged, level=level)
    assert (report.verdict, report.exit_code) == ("wrong", 1)
    wrong = [f for f in report.findings if f.severity == "wrong"]
    coded = [f for f in wrong if (f.tier, f.code) == (tier, code)]
    found = [f for f in coded if where in f.where and words in f.what]
    assert found, [(f.tier, f.code, f.where, f.what) for f in wrong]
    return wrong


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Pairs whose right merge passes at both levels: the controls of every mistake below."""

    @lru_cache
    def make(dtype, shards):
        pair = Pair(tmp_path_factory.mktemp("right"), dtype, shards=shards)
        for level in ("fast", "full"):
            control = api.verify(
                pair.folder / "base", pair.folder / "adapter", pair.merged, level=level
            )
            assert (control.exit_code, control.findings) == (0, ())
        return pair

    return make


@pytest.fixture
def right(tmp_path, pairs):
    """Make a copy of a right pair, to plant a mistake in."""

    def make(dtype, shards=False):
        pair = copy.copy(pairs(dtype, shards))
        shutil.copytree(pair.folder, tmp_path, dirs_exist_ok=True)
        pair.folder, pair.merged = tmp_path, tmp_path / "merged"
        return pair

    return make


def test_the_list_is_long_enough():
    assert len({**WHOLE, **PARTS, **FILES, **SHARDS}) >= 40
    assert {**WHOLE, **PARTS, **FILES, **SHARDS}.keys() == WORDS.keys()


@pytest.mark.parametrize("level", ["fast", "full"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", WHOLE)
def test_mistake_about_a_whole_tensor(right, name, dtype, level):
    wrong = check(right(dtype), WHOLE[name], level, WORDS[name])
    assert {f.tier for f in wrong} == {"oracle"}
    assert len(wrong) == (2 if "swapped" in name else 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PARTS)
def test_mistake_about_a_part_of_a_tensor(right, name, dtype):
    wrong = check(right(dtype), PARTS[name], "full", WORDS[name])
    assert len(wrong) == 1


@pytest.mark.parametrize("level", ["fast", "full"])
@pytest.mark.parametrize("name", FILES)
def test_mistake_about_files(right, name, level):
    check(right(torch.float32), FILES[name], level, WORDS[name])


@pytest.mark.parametrize("level", ["fast", "full"])
@pytest.mark.parametrize("name", SHARDS)
def test_mistake_about_shards(right, name, level):
    check(right(torch.bfloat16, shards=True), SHARDS[name], level, WORDS[name])


@pytest.mark.parametrize("level", ["fast", "full"])
@pytest.mark.parametrize("code", ["not-applied", "applied-twice", "lora-for-dora"])
def test_mistake_about_all_tensors(right, code, level):
    mistake = (everywhere(DORA_MISTAKES[code]), "oracle", code, Q)
    wrong = check(right(torch.bfloat16), mistake, level)
    oracle_says = [f for f in wrong if f.tier == "oracle"]
    assert {f.code for f in oracle_says} == {code}
    assert len(oracle_says) == len(LINEARS)


@pytest.mark.parametrize("level", ["fast", "full"])
def test_what_cannot_be_checked_is_not_right(right, tmp_path, level):
    pair = right(torch.float32)
    tensor, file = pair.stored(f"{Q}.weight")
    edit_tensors(file, lambda ts: {**ts, f"{Q}.weight": tensor.to(torch.float8_e4m3fn)})
    report = api.verify(tmp_path / "base", tmp_path / "adapter", pair.merged, level=level)
    assert (report.verdict, report.exit_code) == ("unchecked", 3)
    assert "quantised" in {f.code for f in report.findings}


def test_the_command_ends_with_the_verdict(right, tmp_path, monkeypatch):
    pair = right(torch.bfloat16)
    args = ["verify", tmp_path / "base", tmp_path / "adapter", pair.merged, "--level", "fast"]
    assert run(*args).exit_code == 0
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)  # no transformers
    unchecked = run(*args, "--forward")
    assert (unchecked.exit_code, "forward-extra" in unchecked.output) == (3, True)
    monkeypatch.undo()
    WHOLE["last layer not merged"][0](pair)
    wrong = run(*args)
    assert (wrong.exit_code, "not-applied" in wrong.output, LAST in wrong.output) == (1, True, True)


def test_sampling_finds_mistakes_about_whole_tensors(right, tmp_path):
    """200 plants of random kinds and sizes in random tensors: none is missed.

    Sizes go down to a third of a mistake; what disappears in the rounding of bfloat16 is no fault.
    """
    pair = right(torch.bfloat16)
    held = {f"{n}.weight": pair.stored(f"{n}.weight")[0] for n in LINEARS}
    random = np.random.default_rng(zlib.crc32(b"plants"))
    names, missed = list(LINEARS), []
    codes = [c for c in DORA_MISTAKES if c != "strength-other"]
    for start in range(20):
        planted = {}
        for name in random.permutation(names)[:10]:
            code = str(random.choice(codes))
            strength = 1.0 if random.random() < 0.5 else float(random.uniform(0.3, 0.9))
            exact = pair.right(name)
            wrong = DORA_MISTAKES[code](*pair.terms(name))
            planted[str(name)] = exact + strength * (wrong - exact)
        tensors = held | {f"{n}.weight": torch.from_numpy(v).to(torch.bfloat16)
                           for n, v in planted.items()}  # fmt: skip
        rest = {n: t for n, t in pair.base.items() if n not in tensors}
        save_file({**rest, **tensors}, pair.merged / "model.safetensors", {"format": "pt"})
        report = api.verify(tmp_path / "base", tmp_path / "adapter", pair.merged, level="fast")
        status = {t.name.removesuffix(".weight"): t.status for t in report.tensors}
        missed += [(start, n) for n in planted if status[n] != "wrong"]
        assert all(status[n] == "exact" for n in names if n not in planted)
    assert missed == []
