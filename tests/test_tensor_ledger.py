"""What the ledger says of tensors, one case at a time, in memory: both directions, all, sorted."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dora_export.plan import Step
from dora_export.tensors import BY_TORCH, FileRange
from dora_export.verification import tensor_ledger
from dora_export.verification.ledger import _indexes
from dora_export.verification.subject import StoredFile, Subject
from dora_export.verification.tensor_ledger import check_tensors, difference, equal
from tests.plants import ref

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def matrix(seed=0, rows=6, columns=4, dtype=BF16):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)


def step(name, tensor, *, changes=(), dtype=None, status=None):
    source = ref(name, tensor)
    stored = source.dtype if dtype is None else BY_TORCH[str(dtype).removeprefix("torch.")]
    return Step(name, stored, source, changes, (), status or ("merged" if changes else "unchanged"))


def ledger(steps, merged, **subject):
    """Findings by place, and the ledger."""
    steps = [step(n, t) for n, t in steps.items()] if isinstance(steps, dict) else steps
    tensors = {n: t if hasattr(t, "source") else ref(n, t) for n, t in merged.items()}
    base = {s.name: s.source for s in steps if s.status not in ("replaced", "added")}
    plan = SimpleNamespace(steps=steps, base=SimpleNamespace(tensors=base), adapter_tensors={})
    subject = Subject(Path("merged"), Path("merged"), tensors, {}, **subject)
    found = check_tensors(plan, subject, 1, difference)
    return {f.where: (f.code, f.what) for f in found.findings}, found


def codes(steps, merged, **subject):
    return {where: code for where, (code, _) in ledger(steps, merged, **subject)[0].items()}


# --- lists


def test_lists_hold_all_of_them_sorted_and_escaped():
    same = {f"same.{i}.weight": matrix(i) for i in range(3)}
    only = {f"{n}.weight": matrix(i) for i, n in enumerate(("z", "a\x1b", "m", "b"))}
    for base, merged, key in ((only, {}, "tensors_missing"), ({}, only, "tensors_extra")):
        found, book = ledger(same | base, same | merged)
        assert len(found) == 4
        assert book.figures[key] == [r"a\x1b.weight", "b.weight", "m.weight", "z.weight"]
    _, book = ledger(same | only, same, broken=frozenset({"file"}))
    assert book.figures["tensors_lost_with_files"] == book.figures["tensors_missing"]
    assert len(book.figures["tensors_missing"]) == 4
    different = {n: t + 1 for n, t in only.items()}
    _, book = ledger(same | only, same | different)
    assert list(book.figures["different"]) == [r"a\x1b.weight", "b.weight", "m.weight", "z.weight"]


def test_a_tensor_is_lost_with_the_file_that_the_index_places_it_in():
    base = {"a.weight": matrix(1), "b.weight": matrix(2), "c.weight": matrix(3)}
    index = {"weight_map": {"x.a.weight": "one", "b.weight": "two", "c.weight": "one"}}
    broken = {"index": index, "broken": frozenset({"one"}),
              "stored_names": {"a.weight": "x.a.weight"}}  # fmt: skip
    found, book = ledger(base, {}, **broken)
    assert found == {"b.weight": ("tensor-missing", "BF16 (6, 4)")}
    assert book.figures["tensors_lost_with_files"] == ["a.weight", "c.weight"]
    # a part of a pipeline: its own files, under its own names
    part = Subject(Path("unet"), None, {}, {}, **broken)
    whole = Subject(Path("vae"), None, {}, {})
    parts = {"unet": part, "vae": whole}
    base = {"unet.a.weight": matrix(1), "unet.b.weight": matrix(2), "vae.a.weight": matrix(3)}
    found, book = ledger(base, {}, parts=parts)
    assert set(found) == {"unet.b.weight", "vae.a.weight"}
    assert book.figures["tensors_lost_with_files"] == ["unet.a.weight"]


@pytest.mark.parametrize(("prefix", "what"), [("x.", "with 'x.'"), ("-x.", "without 'x.'")])
def test_a_prefix_is_told_of_the_model_or_of_the_part_that_has_it(prefix, what):
    same = {"a.weight": matrix()}
    found, _ = ledger(same, same, prefix=prefix)
    assert found == {"merged": ("names-prefixed", f"{what} in front")}
    part = Subject(Path("unet"), None, {}, {}, prefix=prefix)
    found, _ = ledger(same, same, parts={"unet": part, "vae": replace(part, prefix="")})
    assert found == {"unet": ("names-prefixed", f"{what} in front")}


# --- what models keep or leave out


BUFFERS = ["rotary_emb.inv_freq", "rotary_emb.original_inv_freq", "embeddings.position_ids",
           "attn.masked_bias", "attn.relative_position_index", "attn.relative_coords_table",
           "model.embed_positions.weights"]  # fmt: skip


@pytest.mark.parametrize("name", BUFFERS)
def test_buffers_that_classes_compute_are_a_warning_on_either_side(name):
    same, buffer = {"a.weight": matrix()}, {name: matrix(1, dtype=F32)}
    for base, merged in ((buffer, {}), ({}, buffer)):
        assert codes(same | base, same | merged) == {name: "computed-buffer"}


def test_only_four_dimensions_make_a_bias_a_causal_mask():
    same = {"a.weight": matrix()}
    for shape, code in (((1, 1, 4, 4), "computed-buffer"), ((4,), "tensor-missing")):
        bias = {"h.0.attn.bias": torch.ones(shape)}
        assert codes(same | bias, same) == {"h.0.attn.bias": code}


@pytest.mark.parametrize("config", [None, {"tie_word_embeddings": True},
                                    {"text_config": {"tie_word_embeddings": True}}])  # fmt: skip
def test_a_missing_head_that_the_embedding_equals_was_stored_once(config):
    both = {EMBED: matrix(), HEAD: matrix()}
    one = {EMBED: matrix()}
    assert codes(both, one, config=config) == {HEAD: "head-left-out"}
    assert codes(one, both, config=config) == {HEAD: "head-stored"}


def test_a_missing_tensor_is_only_tied_to_what_it_equals_and_what_is_there():
    e, h = step(EMBED, matrix()), step(HEAD, matrix())
    one = {EMBED: matrix()}
    cases = {
        "untied": ([e, h], one, {"config": {"tie_word_embeddings": False}}),
        "untied inside": ([e, h], one, {"config": {
            "text_config": {"tie_word_embeddings": False}}}),
        "other values": ([e, step(HEAD, matrix(1))], one, {}),
        "other shape": ([e, step(HEAD, matrix(rows=5))], one, {}),
        "changed": ([e, step(HEAD, matrix(), changes=("a change",))], one, {}),
        "alone": ([step("a.weight", matrix(2)), h], {"a.weight": matrix(2)}, {}),
    }  # fmt: skip
    for name, (steps, merged, options) in cases.items():
        assert codes(steps, merged, **options) == {HEAD: "tensor-missing"}, name
    assert codes([e, h], {}) == {EMBED: "tensor-missing", HEAD: "tensor-missing"}
    query = "model.layers.0.q_proj.weight"  # no layer that models tie, whatever it holds
    assert codes([e, step(query, matrix())], one) == {query: "tensor-missing"}


def test_an_extra_tensor_is_only_a_head_if_it_is_one_and_equals_the_bases_embedding():
    one = {EMBED: matrix()}
    query, other = "model.layers.0.q_proj.weight", "transformer.wte.weight"
    gone = replace(ref(HEAD, matrix()), source=FileRange(Path("/nowhere"), 0, 48))
    for extra in ({HEAD: matrix(1)}, {query: matrix()}, {HEAD: matrix(rows=7)}, {HEAD: gone}):
        assert codes(one, one | extra) == dict.fromkeys(extra, "tensor-extra")
    extra = {other: matrix(1), HEAD: matrix(1)}  # equal, but not to what belongs there
    assert codes(one, one | extra) == dict.fromkeys(extra, "tensor-extra")


def test_what_cannot_be_read_equals_nothing():
    a = ref("a", matrix())
    assert equal(a, ref("b", matrix()))
    assert not equal(a, replace(a, source=FileRange(Path("/nowhere"), 0, 48)))


# --- packed


def test_packed_tensors_are_neither_missing_nor_extra_and_not_called_right():
    base = {f"{n}.weight": matrix(i) for i, n in enumerate("zamb")}
    packed = {f"{n}.{leaf}": torch.ones(3, dtype=torch.int32)
              for n in "zamb" for leaf in ("qweight", "scales")}  # fmt: skip
    found, book = ledger(base, packed)
    what = "4 tensors that the adapter does not touch, such as a.weight (packed)"
    assert found == {"merged": ("not-comparable", what)}
    assert book.quantised == tuple(sorted(base))
    assert book.figures["quantised"] == sorted(base)
    assert book.figures["tensors_missing"] == book.figures["tensors_extra"] == []
    # those that change are the oracle's to tell of
    steps = [step(n, t, changes=("a change",)) for n, t in base.items()]
    assert codes(steps, packed) == {}
    # a scale of no packed weight is a stranger
    lonely = {"z.weight": matrix(), "y.scales": torch.ones(3)}
    assert codes({"z.weight": matrix()}, lonely) == {"y.scales": "tensor-extra"}
    ids = {"ids": torch.arange(4, dtype=torch.int64)}  # integers are no packed floats
    assert codes(ids, {"ids": ids["ids"].int()}) == {"ids": "dtype-differs"}


# --- shapes


def test_rows_are_only_called_the_bases_where_they_can_be(monkeypatch):
    monkeypatch.setattr(tensor_ledger, "ROWS_AT_ONCE", 4)
    taller = torch.cat([matrix(), matrix(9)[:3]])
    words = ": the base's rows, and 3 more, as where a vocabulary was padded"

    def said(step, stored):
        code, what = ledger([step], {"a": stored})[0]["a"]
        assert code == "shape-differs"
        return what.partition(", expected (6, 4)")[2]

    assert said(step("a", matrix()), taller) == words
    wrong = taller.clone()
    wrong[5, 3] += 1  # the last row that both have
    assert said(step("a", matrix()), wrong) == ""
    assert said(step("a", matrix(), changes=("a change",)), taller) == ""
    zeros = torch.zeros(6, 4)  # bytes that are the same in every type
    assert said(step("a", zeros.bfloat16()), torch.zeros(7, 4).half()) == ""
    assert said(step("a", zeros, dtype=BF16), torch.zeros(7, 4)) == ""


# --- types


def three(dtype):
    return {n: matrix(i).to(dtype) for i, n in enumerate("abc")}


def test_one_type_of_all_is_a_cast_and_several_are_mistakes():
    found, book = ledger(three(BF16), three(F32))
    what = "3 of 3 floating-point tensors: F32, expected BF16"
    assert found == {"merged": ("model-cast", what)}
    assert book.cast.name == "F32"
    mixed = three(F32) | {"b": matrix(1).half()}
    found, book = ledger(three(BF16), mixed)
    assert book.cast is None
    assert {where: code for where, (code, _) in found.items()} == dict.fromkeys(
        "abc", "dtype-differs"
    )
    # what had the type already is not counted, and the model's type is that of most bytes
    base = three(BF16) | {"d": torch.ones(2), "e": torch.ones(2), "f": torch.ones(2)}
    found, _ = ledger(base, {n: t.float() for n, t in base.items()})
    what = "3 of 6 floating-point tensors: F32, expected BF16"
    assert found == {"merged": ("model-cast", what)}


def test_buffers_do_not_decide_about_a_cast():
    buffer = {"x.inv_freq": torch.tensor([0.25, 0.5])}
    base = three(BF16) | buffer
    assert codes(base, three(F16) | buffer) == {"merged": "model-cast"}
    cast = three(F16) | {"x.inv_freq": torch.tensor([0.25, 0.5]).half()}
    assert codes(base, cast) == {"merged": "model-cast", "x.inv_freq": "computed-buffer"}
    cast["x.inv_freq"] = cast["x.inv_freq"] * 1.5  # computed anew: one word about it is enough
    assert codes(base, cast) == {"merged": "model-cast", "x.inv_freq": "computed-buffer"}
    flipped = three(BF16) | {"x.inv_freq": torch.tensor([0.25, 0.75])}
    assert codes(base, flipped) == {"x.inv_freq": "bytes-differ"}  # in its own type


@pytest.mark.parametrize("status", ["replaced", "added"])
def test_what_the_adapter_brings_whole_may_stay_in_its_type(status):
    kept = [step(n, t) for n, t in three(BF16).items()]
    brought = step("head", matrix(7, dtype=F32), dtype=BF16, status=status)
    same = three(BF16)
    assert codes([*kept, brought], same | {"head": matrix(7, dtype=F32)}) == {}
    assert codes([*kept, brought], same | {"head": matrix(7, dtype=F32).bfloat16()}) == {}
    half = matrix(7, dtype=F32).half()  # neither the model's nor the adapter's
    assert codes([*kept, brought], same | {"head": half}) == {"head": "dtype-differs"}


# --- values


def test_values_that_are_not_finite_are_compared_after_a_cast():
    strange = torch.tensor([[float("nan"), float("inf"), -0.0, 1.0]])
    base = {n: strange.clone() for n in "ab"}
    steps = [step(n, t, dtype=BF16, status="cast") for n, t in base.items()]
    right = {n: t.bfloat16() for n, t in base.items()}
    assert codes(steps, right) == {}
    for place, value in ((0, 1.0), (1, 1.0), (2, 0.0), (3, float("nan"))):
        wrong = strange.clone().bfloat16()
        wrong[0, place] = value
        found, _ = ledger(steps, right | {"b": wrong})
        what = f"1 of 4 elements after the cast to BF16, the first at [0, {place}]"
        assert found == {"b": ("bytes-differ", what)}


def test_what_cannot_be_read_is_not_counted_as_equal():
    gone = replace(ref("b", matrix(1)), source=FileRange(Path("/nowhere/b"), 0, 48))
    found, book = ledger(three(BF16), three(BF16) | {"b": gone})
    assert [code for code, _ in found.values()] == ["file-unreadable"]
    assert (book.figures["untouched"], book.figures["untouched_equal"]) == (3, 2)


def test_another_base_is_told_by_most_of_its_matrices():
    ones = {f"norm.{i}": torch.ones(4).bfloat16() for i in range(9)}  # every model's
    base = ones | {n: matrix(i) for i, n in enumerate("abcd")}

    def with_other(*names):
        return {n: t + 1 if n in names else t for n, t in base.items()}

    assert codes(base, with_other("a", "b", "c")) == {"merged": "another-base"}
    assert codes(base, with_other("a", "b")) == dict.fromkeys("ab", "bytes-differ")
    big = {n: torch.cat([t] * 40) for n, t in base.items() if n in "abcd"}
    few = {n: t.clone() for n, t in big.items()}
    for t in few.values():
        t[3, 3] += 1  # one element of 960: damage
    assert codes(ones | big, ones | few) == dict.fromkeys("abcd", "bytes-differ")
    for t in few.values():
        t[:10, 0] += 1  # one in a hundred
    assert codes(ones | big, ones | few) == {"merged": "another-base"}
    # a model with one matrix: all its floats count
    small = {"a": matrix(0), "n": matrix(1)[0], "o": matrix(2)[0]}
    other = {n: t + 1 for n, t in small.items()}
    assert codes(small, other) == {"merged": "another-base"}
    assert codes(small, small | {"a": small["a"] + 1}) == {"a": "bytes-differ"}
    alone = {"a": matrix(0)}
    assert codes(alone, {"a": matrix(0) + 1}) == {"a": "bytes-differ"}
    # what the adapter brings whole is no part of the base
    steps = [step(n, t, status="replaced" if n in "bcd" else None) for n, t in base.items()]
    assert codes(steps, with_other("b", "c", "d")) == dict.fromkeys("bcd", "bytes-differ")


def test_nothing_applied_needs_all_of_the_changed_tensors_with_the_bases_bytes():
    base = three(BF16)
    steps = [step("a", base["a"]), *(step(n, base[n], changes=("a change",)) for n in "bc")]
    found, _ = ledger(steps, base)
    what = "all 2 tensors that the adapter changes have the base's bytes"
    assert found == {"merged": ("nothing-applied", what)}
    assert codes(steps, base | {"c": base["c"] + 1}) == {}
    found, _ = ledger(steps, {n: base[n] for n in "ab"})
    what = "the one tensor that the adapter changes and that is here has the base's bytes"
    assert found == {"c": ("tensor-missing", "BF16 (6, 4)"), "merged": ("nothing-applied", what)}
    wide = base | {"c": torch.cat([base["c"]] * 2)}
    assert codes(steps, wide) == {"c": "shape-differs"}
    assert codes([step("a", base["a"])], {"a": base["a"]}) == {}
    narrow = [step(n, base[n], changes=("a change",)) for n in "bc"]
    packed = {"b": base["b"], "c": base["c"].view(torch.uint8)[:, :4].contiguous()}
    assert codes(narrow, packed) == {}


# --- the index


def indexed(weight_map, total=24, **options):
    files = {"one": StoredFile(("b", "a"), 16), "two": StoredFile(("c",), 8)}
    index = {"weight_map": weight_map, "metadata": {"total_size": total}}
    return Subject(Path("m"), None, {}, files, index=index, index_name="index", **options)


def test_an_index_is_held_against_the_files_both_ways():
    right = {"a": "one", "b": "one", "c": "two"}
    assert list(_indexes(indexed(right))) == []
    wrong = {"a": "two", "c": "two", "z": "one"}
    found = {(f.code, f.where, f.what) for f in _indexes(indexed(wrong, 25))}
    assert found == {
        ("index-wrong", "a", "index places it in two, found in one"),
        ("index-wrong", "z", "index places it in one, which does not hold it"),
        ("index-wrong", "b", "in one, not in index"),
        ("total-size", "index", "25, the tensors have 24 bytes"),
    }
    broken = indexed(right | {"y": "gone"}, 99, broken=frozenset({"gone"}))
    assert list(_indexes(broken)) == []  # told with the file
    parts = {"unet": indexed(right, 25), "vae": indexed(right)}
    (finding,) = _indexes(Subject(Path("m"), None, {}, {}, parts=parts))
    assert finding.where == "unet: index"
