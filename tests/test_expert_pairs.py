"""Merged mixtures whose experts are stacked where the base's are not, or apart where they are.

transformers itself puts them so: each right merge is loaded and saved anew by the model's class.
"""

import shutil

import pytest
import torch
from safetensors.torch import load_file

import dora_export
from dora_export.tensors import HeldBytes, JoinedBytes
from tests import moe_models
from tests.moe_models import prepare
from tests.rider_models import WARNINGS
from tests.small import edit_tensors, write_shards
from tests.test_ledger import flip

# Reasons stand beside the entries.
pytestmark = [pytest.mark.filterwarnings(w) for w in WARNINGS]

NIGHTLY = pytest.mark.nightly
KINDS = [("mixtral", True), ("qwen3_moe", False),
         *(pytest.param(*case, marks=NIGHTLY) for case in (
             ("mixtral", False), ("qwen3_moe", True), ("qwen2_moe", True), ("deepseek_v3", True),
             ("deepseek_v3", False), ("qwen3_vl_moe", False)))]  # fmt: skip


def wrong(report):
    return sorted((f.code, f.where) for f in report.findings if f.severity == "wrong")


def saved_otherwise(case, folder, original):
    """The right merge as the class saves it under the other names."""
    ours = folder / "ours"
    dora_export.merge(case.base, case.adapter, ours, verify="none")
    model = case.model_class.from_pretrained(ours)
    twin = type(model)(model.config).to(model.dtype)  # one that knows no names of a checkpoint
    twin.load_state_dict(model.state_dict())
    twin.save_pretrained(folder / "merged", save_original_format=not original)
    return folder / "merged"


@pytest.mark.parametrize(("kind", "original"), KINDS)
def test_a_merge_that_holds_its_experts_otherwise_is_right(kind, original, tmp_path):
    case = prepare(tmp_path, kind, original=original)
    merged = saved_otherwise(case, tmp_path, original)
    base, theirs = moe_models.tensors(case.base), moe_models.tensors(merged)
    assert any(n not in base for n in theirs) == (kind != "qwen3_vl_moe")
    report = dora_export.verify(case.base, case.adapter, merged)
    assert (report.exit_code, wrong(report)) == (0, [])
    assert {t.status for t in report.tensors} == {"exact"}
    assert {t.name for t in report.tensors if ".experts" in t.name} <= base.keys()
    notes = [f.what for f in report.findings if f.code == "names-renamed"]
    word = "stacked" if original else "apart"
    assert [f"experts {word}" in note for note in notes] == [True] * (kind != "qwen3_vl_moe")


@pytest.fixture(scope="module", params=[True, False], ids=["apart in the base", "stacked there"])
def otherwise(request, tmp_path_factory):
    """A mixture with an adapter on some of its experts' matrices, and its merge held otherwise."""
    folder = tmp_path_factory.mktemp("otherwise")
    case = prepare(folder, "mixtral", torch.bfloat16, original=request.param,
                   target_parameters=["experts.down_proj"])  # fmt: skip
    return case, saved_otherwise(case, folder, request.param), request.param


@pytest.fixture
def merged(otherwise, tmp_path):
    return shutil.copytree(otherwise[1], tmp_path / "merged")


SINGLE = "model.layers.1.block_sparse_moe.experts.2.{}.weight"
STACK = "model.layers.1.mlp.experts.{}"


def found(otherwise, merged, **options):
    report = dora_export.verify(otherwise[0].base, otherwise[0].adapter, merged, **options)
    assert report.exit_code == (1 if wrong(report) else 0)
    return wrong(report)


def edit(merged, change):
    edit_tensors(merged / "model.safetensors", change)


@pytest.mark.parametrize("level", ["fast", "full"])
def test_faults_in_experts_held_otherwise_are_found_where_they_are(otherwise, merged, level):
    original = otherwise[2]
    assert found(otherwise, merged, level=level) == []
    file = merged / "model.safetensors"
    flip(file, STACK.format("gate_up_proj") if original else SINGLE.format("w3"), 5)
    first = SINGLE.format("w1").replace(".2.", ".0.")  # of the stack's bytes
    where = first if original else STACK.format("gate_up_proj")
    assert found(otherwise, merged, level=level) == [("bytes-differ", where)]


def test_an_expert_in_anothers_place_is_named(otherwise, merged):
    def swap(held):
        if otherwise[2]:
            stack = held[STACK.format("down_proj")].clone()
            stack[[1, 2]] = stack[[2, 1]]
            return {**held, STACK.format("down_proj"): stack}
        one, other = SINGLE.format("w2"), SINGLE.format("w2").replace(".2.", ".1.")
        return {**held, one: held[other], other: held[one].clone()}

    edit(merged, swap)
    ones = [SINGLE.format("w2").replace(".2.", f".{i}.") for i in (1, 2)]
    wheres = ones if otherwise[2] else [f"{STACK.format('down_proj')}[{i}]" for i in (1, 2)]
    assert found(otherwise, merged) == [("tensor-of-another", where) for where in wheres]


def test_gate_and_up_exchanged_are_no_pair(otherwise, merged):
    def exchange(held):
        if otherwise[2]:
            name = STACK.format("gate_up_proj")
            return {**held, name: held[name].roll(moe_models.INNER, 1)}
        one, other = SINGLE.format("w1"), SINGLE.format("w3")
        return {**held, one: held[other], other: held[one].clone()}

    edit(merged, exchange)
    assert {code for code, _ in found(otherwise, merged)} == {"bytes-differ"}


def test_experts_that_are_not_whole_are_missing_and_extra(otherwise, merged):
    def without_one(held):
        if not otherwise[2]:
            return {n: t for n, t in held.items() if n != SINGLE.format("w2")}
        name = STACK.format("down_proj")
        return {**held, name: held[name][:-1].clone()}

    edit(merged, without_one)
    told = found(otherwise, merged)
    assert {code for code, _ in told} == {"tensor-missing", "tensor-extra"}
    assert all(".layers.1." in where and ("w2" in where or "down_proj" in where)
               for _, where in told)  # fmt: skip


def test_shards_and_a_lost_file_are_told_by_the_names_that_are_there(otherwise, merged):
    config = (merged / "config.json").read_text()
    held = load_file(merged / "model.safetensors")
    shutil.rmtree(merged)
    write_shards(merged, held)
    (merged / "config.json").write_text(config)
    assert [code for code, _ in found(otherwise, merged) if code.startswith("tensor")] == []
    first = sorted(merged.glob("*.safetensors"))[0]
    first.unlink()
    told = found(otherwise, merged)
    assert ("file-missing", first.name) in told


def test_joined_bytes_are_those_of_their_parts_one_after_another(tmp_path):
    make = torch.Generator().manual_seed(1)
    parts = [torch.randint(0, 255, (n,), generator=make, dtype=torch.uint8).numpy()
             for n in (5, 1, 0, 9)]  # fmt: skip
    whole = b"".join(p.tobytes() for p in parts)
    joined = JoinedBytes(tuple(HeldBytes(tmp_path, p) for p in parts))
    assert joined.nbytes == 15
    for start in range(15):
        for stop in range(start, 16):
            out = torch.zeros(stop - start, dtype=torch.uint8).numpy()
            joined.read(start, out)
            assert out.tobytes() == whole[start:stop]
