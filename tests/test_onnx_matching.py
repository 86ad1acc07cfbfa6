"""What a graph holds of its base is found by content, however an exporter has laid it out."""

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch

from dora_export import fused
from dora_export.checkpoints import open_checkpoint
from dora_export.onnx import matching_lines, matching_proof
from dora_export.onnx.graph_file import open_graph
from dora_export.onnx.lines import Lines
from dora_export.onnx.matching import KEPT, Weight
from dora_export.onnx.matching_graph import match_graph
from dora_export.onnx.matching_proof import proven
from dora_export.onnx.memory import Memory
from dora_export.plan import Step

RNG = np.random.default_rng(3)
BASE = {
    "layer.0.q.weight": RNG.standard_normal((12, 16)),
    "layer.0.k.weight": RNG.standard_normal((4, 16)),
    "layer.0.v.weight": RNG.standard_normal((4, 16)),
    "layer.0.up.weight": RNG.standard_normal((24, 16)),
    "layer.0.square.weight": RNG.standard_normal((16, 16)),
    "layer.0.q.bias": RNG.standard_normal(12),
    "layer.0.k.bias": RNG.standard_normal(4),
    "layer.0.norm.weight": RNG.standard_normal(16),
    "conv.weight": RNG.standard_normal((6, 3, 2, 5)),
    "experts.weight": RNG.standard_normal((3, 10, 16)),
    "model.embed_tokens.weight": RNG.standard_normal((30, 16)),
}
BASE = {name: values.astype(np.float32) for name, values in BASE.items()}
Q, K, V = (BASE[f"layer.0.{x}.weight"] for x in "qkv")
EMBEDDING = BASE["model.embed_tokens.weight"]


def weights(folder, base=None, changed=(), dtype=np.float32):
    """The base on disk, as what a plan would say of it."""
    folder.mkdir(exist_ok=True)
    base = {n: np.ascontiguousarray(v, dtype) for n, v in (base or BASE).items()}
    save_file(base, folder / "model.safetensors")
    tensors = open_checkpoint(folder).tensors
    return [
        Weight(name, ref, Step(name, ref.dtype, ref, status="merged") if name in changed else None)
        for name, ref in tensors.items()
    ]


def graph(path, stored, nodes=None):
    """A graph that stores arrays by name; each goes into a MatMul unless ``nodes`` says more."""
    names = list(stored)
    made = nodes or [helper.make_node("MatMul", ["x", n], [f"y_{n}"], name=f"/m/{n}")
                     for n in names]  # fmt: skip
    out = [helper.make_tensor_value_info(made[0].output[0], 1, None)]
    proto = helper.make_graph(
        made, "g", [helper.make_tensor_value_info("x", 1, None)], out,
        [numpy_helper.from_array(np.ascontiguousarray(v), n) for n, v in stored.items()],
    )  # fmt: skip
    onnx.save(helper.make_model(proto, opset_imports=[helper.make_opsetid("", 20)]), path)
    return open_graph(path)


def look(tmp_path, stored, changed, base=None, nodes=None, dtype=np.float32):
    made = graph(tmp_path / "model.onnx", stored, nodes)
    return match_graph(made, weights(tmp_path / "base", base, changed, dtype), threads=1)


def rebuilt(matched, base, name):
    """What the match says a stored tensor is, put together from the base."""
    (match,) = [m for m in matched.matches if m.tensor.name == name]
    lines = np.zeros((match.lines.count, match.length), np.float32)
    for run in match.runs():
        if run.weight is not None:
            rows = base[run.weight].reshape(-1, match.length)
            rows = rows[run.first_row : run.first_row + run.count]
            lines[run.first_line : run.first_line + run.count] = rows
    if match.lines.by_column:
        panels = lines.reshape(match.lines.panels, match.lines.columns, match.lines.rows)
        lines = np.moveaxis(panels, 1, 2)
    return lines.reshape(match.tensor.shape), match


ORDER = RNG.permutation(12)
LAID_OUT = {
    "as it is": (Q, ["q"]),
    "transposed": (Q.T, ["q"]),
    "packed": (np.concatenate([Q, K, V]), ["q", "k"]),
    "packed, transposed": (np.concatenate([Q, K, V]).T, ["v"]),
    "padded with zeros": (np.concatenate([Q, np.zeros((4, 16), np.float32)]).T, ["q"]),
    "rows in another order": (Q[ORDER], ["q"]),
    "rows interleaved": (np.stack([K, V], 1).reshape(8, 16).T, ["k", "v"]),
    "one more axis": (Q.T[None], ["q"]),
    "square": (BASE["layer.0.square.weight"], ["square"]),
    "square, transposed": (BASE["layer.0.square.weight"].T, ["square"]),
}


@pytest.mark.parametrize("case", LAID_OUT)
def test_a_weight_is_found_however_it_is_laid_out(tmp_path, case):
    stored, names = LAID_OUT[case]
    changed = [f"layer.0.{n}.weight" for n in names]
    matched = look(tmp_path, {"w": stored}, changed)
    made, match = rebuilt(matched, BASE, "w")
    assert np.array_equal(made, stored)
    assert match.evidence == "bytes"
    assert match.evidence == "bytes"
    assert (matched.missing, matched.problems) == ({}, ())
    assert [u.node.name for u in match.uses] == ["/m/w"]


@pytest.mark.parametrize("axes", [(0, 1, 2, 3), (0, 2, 3, 1), (2, 3, 1, 0)])
def test_a_convolution_is_found_in_other_layouts(tmp_path, axes):
    stored = BASE["conv.weight"].transpose(axes)
    matched = look(tmp_path, {"w": stored}, ["conv.weight"])
    (match,) = matched.changed
    assert match.evidence == "bytes"
    assert matched.missing == {}


@pytest.mark.parametrize("stored", [
    BASE["experts.weight"], np.moveaxis(BASE["experts.weight"], 1, 2),
    BASE["experts.weight"].reshape(30, 16), BASE["experts.weight"].reshape(30, 16).T,
], ids=["stacked", "stacked, transposed", "flat", "flat, transposed"])  # fmt: skip
def test_experts_are_found_stacked_or_apart(tmp_path, stored):
    matched = look(tmp_path, {"w": stored}, ["experts.weight"])
    made, _ = rebuilt(matched, BASE, "w")
    assert np.array_equal(made, stored)
    assert matched.missing == {}
    experts = {f"w{i}": e.T for i, e in enumerate(BASE["experts.weight"])}
    apart = look(tmp_path, experts, ["experts.weight"])
    assert len(apart.changed) == 3
    assert apart.missing == {}
    (tmp_path / "missing").mkdir()
    del experts["w1"]
    apart = look(tmp_path / "missing", experts, ["experts.weight"])
    assert apart.missing == {"experts.weight": "2 of its 3 rows only"}


def test_vectors_are_found_alone_and_joined(tmp_path):
    joined = np.concatenate([BASE["layer.0.q.bias"], BASE["layer.0.k.bias"], np.zeros(4)])
    stored = {"b": joined.astype(np.float32), "n": BASE["layer.0.norm.weight"].reshape(1, 16)}
    changed = ["layer.0.q.bias", "layer.0.k.bias", "layer.0.norm.weight"]
    matched = look(tmp_path, stored, changed)
    assert matched.missing == {}
    made, match = rebuilt(matched, BASE, "b")
    assert np.array_equal(made, stored["b"])
    assert [r.weight for r in match.runs()] == ["layer.0.q.bias", "layer.0.k.bias", None]


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
@pytest.mark.parametrize("base", [np.float16, np.float32, np.float64])
def test_the_graph_may_have_another_type_than_the_base(tmp_path, dtype, base):
    stored = np.concatenate([Q, K, V]).astype(base).astype(dtype)
    matched = look(tmp_path, {"w": stored.T, "one": Q.astype(base).astype(dtype)},
                   ["layer.0.q.weight"], dtype=base)  # fmt: skip
    assert [m.evidence for m in matched.changed] == ["bytes"] * 2
    wrong = np.nextafter(stored, dtype(9))  # the last place of every element
    (tmp_path / "wrong").mkdir()
    matched = look(tmp_path / "wrong", {"w": wrong.T}, ["layer.0.q.weight"], dtype=base)
    assert matched.missing == {"layer.0.q.weight": "(12, 16), nothing of it"}


def test_float16_of_onnxruntimes_converter_is_told_from_plain_rounding(tmp_path):
    from onnxruntime.transformers.float16 import convert_np_to_float16

    q = Q.copy()
    q[3, :4] = [1e-9, -1e-9, 0.0, 2e5]
    base = {**BASE, "layer.0.q.weight": q}
    with np.errstate(over="ignore"):
        stored = {"plain": q.astype(np.float16), "kept": convert_np_to_float16(q.T)}
    matched = look(tmp_path, stored, ["layer.0.q.weight"], base)
    found = {m.tensor.name: m.encoding.name for m in matched.changed}
    assert found == {"plain": "F16", "kept": "F16, kept from zero"}
    assert all(m.evidence == "bytes" for m in matched.changed)


def test_one_wrong_element_anywhere_is_found(tmp_path):
    for row, column in ((0, 0), (5, 7), (11, 15)):
        wrong = Q.copy()
        wrong[row, column] = np.nextafter(wrong[row, column], 9)
        for stored in (wrong, wrong.T, np.concatenate([wrong, K, V])):
            matched = look(tmp_path, {"w": stored}, ["layer.0.q.weight"])
            assert "layer.0.q.weight" in matched.missing


def test_tensors_half_understood_are_problems(tmp_path):
    strange = np.concatenate([Q, RNG.standard_normal((4, 16)).astype(np.float32)])
    matched = look(tmp_path, {"w": Q.T, "copy": strange}, ["layer.0.q.weight"])
    assert matched.missing == {}
    (problem,) = matched.problems
    assert "'copy': layer.0.q.weight: 4 of 16 lines are of no tensor" in problem
    scaled = look(tmp_path, {"w": Q.T, "scaled": Q * 2}, ["layer.0.q.weight"])
    assert [t.name for t in scaled.strange] == ["scaled"]


def test_half_of_a_weight_is_missing(tmp_path):
    matched = look(tmp_path, {"w": Q[:7].T}, ["layer.0.q.weight"])
    assert matched.missing == {"layer.0.q.weight": "7 of its 12 rows only"}


TWINS = {**BASE, "lm_head.weight": EMBEDDING}
TABLE = helper.make_node("Gather", ["e", "x"], ["h"])
HEAD = [
    helper.make_node("Transpose", ["h_w"], ["t"]),
    helper.make_node("MatMul", ["h", "t"], ["y"]),
]


@pytest.mark.parametrize("changed", ["lm_head.weight", "model.embed_tokens.weight"])
def test_embedding_and_head_of_the_same_values_are_told_apart_by_use(tmp_path, changed):
    stored = {"e": EMBEDDING, "h_w": EMBEDDING}
    matched = look(tmp_path, stored, [changed], TWINS, [TABLE, *HEAD])
    (match,) = matched.changed
    assert match.tensor.name == ("h_w" if changed == "lm_head.weight" else "e")
    assert match.weights[0].name == changed
    assert (matched.missing, matched.problems) == ({}, ())


def test_one_copy_for_ends_that_become_different_is_a_problem(tmp_path):
    nodes = [TABLE, helper.make_node("Transpose", ["e"], ["t"]), HEAD[1]]
    matched = look(tmp_path, {"e": EMBEDDING}, ["lm_head.weight"], TWINS, nodes)
    (problem,) = matched.problems
    assert "give the graph a copy for each" in problem
    assert "lm_head.weight" in matched.missing


def test_tensors_of_the_same_values_are_told_apart_by_name_or_not_at_all(tmp_path):
    base = {f"layer.{i}.q.bias": np.zeros(8, np.float32) for i in range(3)}
    changed = ["layer.1.q.bias"]
    named = {f"model.{name}": values for name, values in base.items()}
    matched = look(tmp_path, named, changed, base)
    assert [m.tensor.name for m in matched.changed] == ["model.layer.1.q.bias"]
    assert (matched.missing, matched.problems) == ({}, ())
    unnamed = {f"val_{i}": values for i, values in enumerate(base.values())}
    matched = look(tmp_path, unnamed, changed, base)
    assert len(matched.problems) == 3
    assert "has the values of layer.0.q.bias and layer.1.q.bias" in matched.problems[0]
    assert matched.missing
    unchanged = look(tmp_path, unnamed, [], base)
    assert (unchanged.problems, unchanged.absent) == ((), ())


def test_equal_rows_within_a_packed_weight_are_told_apart_by_their_neighbours(tmp_path):
    q = Q.copy()
    q[5] = q[2] = 0
    q[7] = K[1]
    base = {**BASE, "layer.0.q.weight": q}
    stored = np.concatenate([q, K, V])
    matched = look(tmp_path, {"w": stored.T}, ["layer.0.q.weight", "layer.0.k.weight"], base)
    assert (matched.missing, matched.problems) == ({}, ())
    names = [(r.weight, r.first_row, r.count) for r in matched.changed[0].runs()]
    assert names == [("layer.0.q.weight", 0, 12), ("layer.0.k.weight", 0, 4),
                     ("layer.0.v.weight", 0, 4)]  # fmt: skip


def test_equal_rows_without_neighbours_are_a_problem_if_one_changes(tmp_path):
    base = {"a.weight": np.ones((6, 16), np.float32), "b.weight": np.ones((4, 16), np.float32)}
    stored = np.ones((10, 16), np.float32)
    matched = look(tmp_path, {"w": stored}, ["a.weight"], base)
    assert any("could be rows of several tensors" in p for p in matched.problems)
    assert matched.missing


def test_rows_alike_where_they_are_sampled_are_proven_by_all_their_bytes(tmp_path):
    at = matching_lines.positions(40)
    q = RNG.standard_normal((6, 40)).astype(np.float32)
    other = q.copy()
    free = np.setdiff1d(np.arange(40), at)
    other[:, free] += 1
    matched = look(tmp_path, {"w": np.concatenate([other, K[:, [0] * 40]])},
                   ["q.weight"], {"q.weight": q, "k.weight": K[:, [0] * 40]})  # fmt: skip
    assert any("alike, but not the same values" in p for p in matched.problems)
    assert matched.missing


def test_the_graph_of_another_model_holds_nothing(tmp_path):
    other = {n: RNG.standard_normal(v.shape).astype(np.float32) for n, v in BASE.items()}
    matched = look(tmp_path, other, ["layer.0.q.weight"])
    assert matched.missing == {"layer.0.q.weight": "(12, 16), nothing of it"}
    assert len(matched.absent) == len(BASE) - 1
    assert matched.matches == ()


def test_kept_lines_are_those_of_no_base_row(tmp_path):
    padded = np.concatenate([EMBEDDING, np.zeros((2, 16), np.float32)])
    matched = look(tmp_path, {"w": padded}, ["model.embed_tokens.weight"])
    (match,) = matched.changed
    assert list(match.weight_of[-3:]) == [0, KEPT, KEPT]


def test_columns_are_proven_as_both_sides_are_stored(tmp_path, monkeypatch):
    """Neither converted nor turned first; what takes too much memory is, with the same verdict."""
    rng = np.random.default_rng(5)
    parts = [torch.from_numpy(rng.standard_normal((n, 37))).bfloat16() for n in (40, 9)]
    (tmp_path / "base").mkdir()
    save_torch({"a.weight": parts[0], "b.weight": parts[1]}, tmp_path / "base/model.safetensors")
    base = open_checkpoint(tmp_path / "base").tensors
    changed = [Weight(n, ref, Step(n, ref.dtype, ref, status="merged")) for n, ref in base.items()]
    stored = torch.cat(parts).float().T.contiguous().numpy()
    found = graph(tmp_path / "model.onnx", {"w": stored})
    (match,) = match_graph(found, changed, threads=1).changed
    monkeypatch.setattr(matching_proof, "BLOCK_BYTES", 5 * 49 * 4)  # several bands
    turned, hold = [], Lines.hold
    monkeypatch.setattr(Lines, "hold", lambda *given: turned.append(1) or hold(*given))
    path, at = match.tensor.source.path, match.tensor.source.start
    for room, one_by_one in ((matching_proof.WHOLE_BYTES, not fused.available()), (10, True)):
        monkeypatch.setattr(matching_proof, "WHOLE_BYTES", room)
        turned.clear()
        assert proven(match).evidence == "bytes"
        assert bool(turned) == one_by_one
        for byte in (0, 3, 4 * 49 * 20 + 4 * 40 + 1, stored.nbytes - 1):
            right = path.read_bytes()
            wrong = bytearray(right)
            wrong[at + byte] ^= 1
            path.write_bytes(wrong)
            assert proven(match) is None
            path.write_bytes(right)
    monkeypatch.undo()
    assert proven(match, Memory(10)).evidence == "bytes"  # none left
