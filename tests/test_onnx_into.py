"""Merged weights in a graph of the base: exact, only there, and only if all of it is found."""

import hashlib
import json
import os
import shutil

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import dora_export
from dora_export import GraphReport
from dora_export.errors import DoraExportError, VerifyError
from dora_export.onnx import assembly, files, into, rewritten
from dora_export.onnx.layout import Place
from dora_export.paged import PAGE
from dora_export.writers.files import FileSink
from tests import oracle, small
from tests.small import LINEARS, entries, run

Q, DOWN = "model.layers.0.attn.q_proj", "model.layers.0.mlp.down_proj"
NORM, TABLE = "model.norm.weight", "model.embed_tokens.weight"
TYPES = {torch.float32: 1, torch.float16: 10}


def arrays(base, dtype=torch.float32):
    """The base's weights as a graph of a type has them, under its own names."""
    return {n: t.to(dtype).numpy() for n, t in base.items() if t.is_floating_point()}


def save_graph(path, stored, *, data=None, dtype=torch.float32, extra=(), nodes=None):
    """A graph with an input for every matrix: ``y_i = x_i @ w_i``, or ``nodes``."""
    kind = TYPES[dtype]
    names = [n for n, v in stored.items() if v.ndim == 2]
    made = nodes or [helper.make_node("MatMul", [f"x_{n}", n], [f"y_{n}"]) for n in names]
    graph = helper.make_graph(
        made,
        "g",
        [helper.make_tensor_value_info(f"x_{n}", kind, [None, stored[n].shape[0]]) for n in names],
        [helper.make_tensor_value_info(f"y_{n}", kind, None) for n in names],
        [*(numpy_helper.from_array(np.ascontiguousarray(v), n) for n, v in stored.items()), *extra],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    external = {} if data is None else {
        "save_as_external_data": True, "location": data, "size_threshold": 64}  # fmt: skip
    onnx.save(model, path, **external)
    return path


def loaded(path):
    """What a graph stores, by name."""
    return {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}


def digests(folder, beside):
    return {
        n: hashlib.sha256((folder / n).read_bytes()).hexdigest() for n in ["model.onnx", *beside]
    }


def export(folder, graph, out="out", **options):
    return dora_export.export_onnx(
        folder / "base", folder / "adapter", folder / out, into=graph, verify=False, **options
    )


@pytest.fixture
def pair(tmp_path):
    base = small.base_tensors()
    small.write_base(tmp_path / "base", base)
    adapter = small.adapter_tensors(base)
    small.write_adapter(tmp_path / "adapter", adapter)
    return tmp_path, base, small.expected(base, adapter)


def transposed(base, dtype=torch.float32):
    """All weights as torch's exporter stores them: matrices turned, names lost."""
    found = arrays(base, dtype)
    return {f"val_{i}": v.T if n.endswith("proj.weight") else v
            for i, (n, v) in enumerate(found.items())}  # fmt: skip


@pytest.mark.parametrize("data", [None, "weights.bin"], ids=["inline", "external"])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_merged_values_are_exact_and_nothing_else_changes(pair, data, dtype):
    folder, base, merged = pair
    before = transposed(base, dtype)
    graph = save_graph(folder / "graph/model.onnx", before, data=data, dtype=dtype)
    report = export(folder, graph)
    assert isinstance(report, GraphReport)
    after = loaded(folder / "out/model.onnx")
    assert list(after) == list(before)
    names = dict(zip(before, arrays(base), strict=True))
    for name, array in after.items():
        if (tensor := names[name]) in merged:
            assert oracle.ulps(torch.from_numpy(array.T.copy()), merged[tensor]) <= 1
            assert not np.array_equal(array, before[name])
        else:
            assert array.tobytes() == before[name].tobytes()
    files = {"model.onnx", "config.json", "tokenizer.json", "dora_export.json"}
    assert set(entries(folder / "out")) == files | ({data} if data else set())
    rewritten = json.loads((folder / "out/dora_export.json").read_text())["onnx"]
    proof = {e["name"]: e for e in rewritten["proof"]["initializers"]}
    assert {names[n] for n in proof} == set(merged)
    assert proof["val_3"]["base"] == [f"{Q}.weight[0:20]"]
    assert all(e["lines_are"] == "columns" for e in proof.values())
    beside = [data] if data else []
    assert rewritten["proof"]["graph_files"] == digests(folder / "graph", beside)
    assert rewritten["files"] == digests(folder / "out", beside)


def test_a_mistake_in_the_formula_would_be_seen(pair):
    _, base, merged = pair
    name = f"{Q}.weight"
    W = oracle.float64(base[name])
    wrong = {"base": W, "twice": 2 * merged[name] - W, "next row": np.roll(merged[name], 1, 0)}
    for values in wrong.values():
        assert oracle.ulps(torch.from_numpy(values).float(), merged[name]) > 100


def test_the_graph_file_itself_stays_as_it_is_where_weights_lie_beside_it(pair):
    folder, base, _ = pair
    graph = save_graph(folder / "graph/model.onnx", transposed(base), data="model.onnx.data")
    report = export(folder, graph)
    assert (folder / "out/model.onnx").read_bytes() == graph.read_bytes()
    assert report.way == "into"
    size = (folder / "graph/model.onnx.data").stat().st_size
    assert (folder / "out/model.onnx.data").stat().st_size == size


def test_the_graph_runs_and_gives_the_merged_products(pair):
    folder, base, merged = pair
    graph = save_graph(folder / "graph/model.onnx", transposed(base))
    export(folder, graph)
    session = onnxruntime.InferenceSession(folder / "out/model.onnx")
    rng = np.random.default_rng(0)
    values = {i.name: rng.standard_normal((3, i.shape[1])).astype(np.float32)
              for i in session.get_inputs()}  # fmt: skip
    names = dict(zip(transposed(base), arrays(base), strict=True))
    for output, got in zip(session.get_outputs(), session.run(None, values), strict=True):
        own = output.name.removeprefix("y_")
        if names[own] in merged:
            exact = values[f"x_{own}"].astype(np.float64) @ merged[names[own]].T
            assert np.abs(got - exact).max() < 1e-5 * np.abs(exact).max()
            plain = values[f"x_{own}"] @ oracle.float64(base[names[own]]).T
            assert np.abs(got - plain).max() > 1e-2 * np.abs(exact).max()


def test_packed_padded_and_copied_weights_are_all_rewritten(pair):
    folder, base, merged = pair
    held = arrays(base)
    both = [held[f"model.layers.{i}.attn.q_proj.weight"] for i in range(2)]
    zeros = np.zeros((3, 12), np.float32)
    stored = {
        "packed": np.concatenate([*both, zeros]).T,
        "copy": both[0],
        "mixed": np.concatenate([held[TABLE], both[1]]),
        **{n: held[n] for n in held if "down" in n},
    }
    graph = save_graph(folder / "graph/model.onnx", stored, data="w.data")
    export(folder, graph)
    got = loaded(folder / "out/model.onnx")
    new = [merged[f"model.layers.{i}.attn.q_proj.weight"] for i in range(2)]

    def close(array, exact):
        assert oracle.ulps(torch.from_numpy(array.copy(order="C")), exact) <= 1

    close(got["packed"].T[:40], np.concatenate(new))
    assert not got["packed"].T[40:].any()
    close(got["copy"], new[0])
    assert np.array_equal(got["mixed"][:40], held[TABLE])
    close(got["mixed"][40:], new[1])


def test_values_in_constants_and_branches_are_rewritten(pair):
    folder, base, merged = pair
    held = transposed(base)
    names = dict(zip(held, arrays(base), strict=True))
    q, other = "val_3", "val_5"
    assert {names[q], names[other]} <= set(merged)
    branch = helper.make_graph(
        [helper.make_node("Identity", ["inner"], ["o"])], "b", [],
        [helper.make_tensor_value_info("o", 1, None)],
        [numpy_helper.from_array(np.ascontiguousarray(held[q]), "inner")],
    )  # fmt: skip
    constant = numpy_helper.from_array(np.ascontiguousarray(held[other]), "value")
    nodes = [
        helper.make_node("If", ["c"], ["w"], then_branch=branch, else_branch=branch),
        helper.make_node("Constant", [], ["k"], value=constant),
        helper.make_node("MatMul", [f"x_{q}", "w"], [f"y_{q}"]),
        helper.make_node("MatMul", [f"x_{other}", "k"], [f"y_{other}"]),
    ]
    rest = {n: v for n, v in held.items() if n not in (q, other)}
    graph = save_graph(folder / "graph/model.onnx", rest, nodes=nodes)
    export(folder, graph)
    model = onnx.load(folder / "out/model.onnx")
    for attribute in model.graph.node[0].attribute:
        got = numpy_helper.to_array(attribute.g.initializer[0])
        assert oracle.ulps(torch.from_numpy(got.T.copy()), merged[names[q]]) <= 1
    got = numpy_helper.to_array(model.graph.node[1].attribute[0].t)
    assert oracle.ulps(torch.from_numpy(got.T.copy()), merged[names[other]]) <= 1


def test_values_stored_one_by_one_become_plain_bytes(pair):
    folder, base, merged = pair
    held = transposed(base, torch.float16)
    name = "val_3"
    listed = helper.make_tensor(name, TensorProto.FLOAT16, held[name].shape, held[name].ravel())
    assert not listed.raw_data
    rest = {n: v for n, v in held.items() if n != name}
    graph = save_graph(folder / "graph/model.onnx", rest, dtype=torch.float16, extra=[listed],
                       nodes=[helper.make_node("Identity", [name], ["y"])])  # fmt: skip
    export(folder, graph)
    got = loaded(folder / "out/model.onnx")
    names = dict(zip(held, arrays(base), strict=True))
    assert oracle.ulps(torch.from_numpy(got[name].T.copy()), merged[names[name]]) <= 1
    assert len(got) == len(held)


def test_files_beside_the_graph_go_along_and_the_adapters_tokenizer_wins(pair):
    folder, base, _ = pair
    graph = save_graph(folder / "graph/decoder.onnx", transposed(base), data="w.bin")
    (graph.parent / "genai_config.json").write_text('{"model": 1}')
    (graph.parent / "tokenizer.json").write_text('{"graph": 1}')
    (graph.parent / "other.onnx").write_bytes(graph.read_bytes())
    export(folder, graph)
    out = folder / "out"
    assert sorted(entries(out)) == sorted(
        ["config.json", "decoder.onnx", "dora_export.json", "genai_config.json",
         "tokenizer.json", "w.bin"])  # fmt: skip
    assert (out / "tokenizer.json").read_text() == '{"graph": 1}'
    (folder / "adapter/tokenizer.json").write_text('{"adapter": 1}')
    with (graph.parent / "huge.txt").open("wb") as file:
        file.truncate(1 << 40)  # a hole
    report = export(folder, graph, "again")
    assert any(n.startswith("huge.txt is left behind: 1100 GB") for n in report.notes)
    assert (folder / "again/tokenizer.json").read_text() == '{"adapter": 1}'
    assert (folder / "again/genai_config.json").read_text() == '{"model": 1}'


def test_bytes_do_not_depend_on_threads_or_blocks(pair, monkeypatch):
    folder, base, _ = pair
    graph = save_graph(folder / "graph/model.onnx", transposed(base), data="w.bin")
    export(folder, graph, "one", threads=1)
    monkeypatch.setattr(into, "LEAST_BLOCK", 1)
    monkeypatch.setattr(into, "MOST_BLOCK", 1)
    export(folder, graph, "other", threads=4)
    assert entries(folder / "one") == entries(folder / "other")


@pytest.mark.parametrize(
    "held", [{"TENSOR_BYTES": 0}, {"HELD_BYTES": PAGE + 1000}], ids=["none", "some"]
)
def test_bytes_do_not_depend_on_what_is_put_together_in_memory(pair, monkeypatch, held):
    """Rows that lie in columns go into a tensor in memory, or each where it belongs in the file."""
    folder, base, _ = pair
    graph = save_graph(folder / "graph/model.onnx", transposed(base), data="w.bin")
    pieces = []
    put = FileSink.put

    def counted(self, file, offset, stride, rows):
        pieces.append(len(rows))
        put(self, file, offset, stride, rows)

    monkeypatch.setattr(FileSink, "put", counted)
    monkeypatch.setattr(into, "MOST_BLOCK", 500)
    monkeypatch.setattr(into, "LEAST_BLOCK", 500)
    export(folder, graph, "held")
    assert not pieces
    for name, value in held.items():
        monkeypatch.setattr(assembly, name, value)
    export(folder, graph, "other")
    assert pieces
    assert entries(folder / "held") == entries(folder / "other")


def test_memory_for_tensors_is_bounded_and_given_back(monkeypatch):
    monkeypatch.setattr(assembly, "HELD_BYTES", 2 * (100 + PAGE) - 1)
    held, tensors = assembly.Assembly(), [object() for _ in range(4)]

    def begin(i, nbytes=100, offset=8):
        return held.whole(tensors[i], Place(0, offset, nbytes))

    first = begin(0)
    assert (first.size, first.ctypes.data % PAGE) == (100, 8)
    first[:] = np.arange(100)
    assert begin(1) is None  # no room: it goes the other way, to its end
    assert np.array_equal(begin(0), np.arange(100))
    held.release(tensors[0])
    assert begin(1) is None
    second = begin(2, 90)  # in the memory of the first
    assert second.size == 90
    assert np.shares_memory(first, second)
    held.release(tensors[1])
    assert begin(3) is None
    held.release(tensors[2])
    assert begin(1, 150).size == 150  # what is free is too small, and makes room
    assert begin(3, 100) is None


def refused(folder, graph, match, error=DoraExportError, **options):
    before = entries(folder)
    with pytest.raises(error, match=match) as found:
        export(folder, graph, **options)
    assert entries(folder) == before, "something was left behind"
    return str(found.value)


def test_the_graph_of_another_model_is_refused(pair):
    folder, _, _ = pair
    graph = save_graph(folder / "graph/model.onnx", transposed(small.base_tensors(seed=9)))
    said = refused(folder, graph, "not a graph of .*Pass the base that the graph was exported from")
    assert "none of the base's 7 weights" in said


def test_a_graph_that_holds_a_merge_already_is_refused(pair):
    folder, base, merged = pair
    stored = {n: torch.tensor(merged.get(n, oracle.float64(t))).float() for n, t in base.items()
              if t.is_floating_point()}  # fmt: skip
    graph = save_graph(folder / "graph/model.onnx", transposed(stored))
    said = refused(folder, graph, "none of the 4 tensors that the adapter changes")
    assert "an adapter merged in already" in said
    assert f"{Q}.weight: (20, 12), nothing of it" in said
    graph = save_graph(folder / "graph/model.onnx", transposed(base))
    export(folder, graph)
    refused(folder, folder / "out/model.onnx", "has an adapter merged into it already", out="two")


def test_a_graph_that_lacks_a_part_is_refused_unless_that_is_allowed(pair):
    folder, base, _ = pair
    held = transposed(base)
    names = {n: m for m, n in zip(held, arrays(base), strict=True)}
    lacking = {m: v for m, v in held.items() if m != names[f"{DOWN}.weight"]}
    graph = save_graph(folder / "graph/model.onnx", lacking)
    said = refused(folder, graph, f"--allow-missing {DOWN}.weight")
    assert f"does not hold 1 of the 4 tensors that the adapter changes:\n  {DOWN}.weight" in said
    refused(folder, graph, "no such tensor or module is changed", allow_missing=["model.other"])
    report = export(folder, graph, allow_missing=[DOWN])
    assert any(DOWN in w for w in report.warnings)
    manifest = json.loads((folder / "out/dora_export.json").read_text())["onnx"]
    assert list(manifest["allowed_missing"]) == [f"{DOWN}.weight"]


def test_weights_half_understood_are_refused(pair):
    folder, base, _ = pair
    held = transposed(base)
    q = arrays(base)[f"{Q}.weight"]
    strange = np.concatenate([q, np.random.default_rng(1).random((3, 12), np.float32)])
    graph = save_graph(folder / "graph/model.onnx", {**held, "odd": strange})
    refused(folder, graph, "ways that cannot be told:\n.*'odd'.*3 of 23 lines are of no tensor")


def test_options_of_tracing_are_refused_with_a_graph(pair):
    folder, base, _ = pair
    graph = save_graph(folder / "graph/model.onnx", transposed(base))
    options = dora_export.GraphOptions(dtype="fp16", opset=18)
    refused(folder, graph, "--dtype, --opset: without meaning for --into", options=options)
    with pytest.raises(DoraExportError, match="no adapter given, so nothing would change"):
        dora_export.export_onnx(folder / "base", None, folder / "out", into=graph)


@pytest.mark.parametrize("damage", ["tensor", "beside", "structure"])
def test_what_was_written_is_held_against_the_plan(pair, monkeypatch, damage):
    folder, base, _ = pair
    graph = save_graph(folder / "graph/model.onnx", transposed(base), data="w.bin")
    write = into.write

    def spoilt(plan, matches, parameters, layout, request, sink, *others):
        write(plan, matches, parameters, layout, request, sink, *others)
        path = request.folder / ("model.onnx" if damage == "structure" else "w.bin")
        data = bytearray(path.read_bytes())
        at = {"tensor": matches[0].tensor.source.start + 3, "structure": 1,
              "beside": layout.copied[-1].offset}[damage]  # fmt: skip
        data[at] ^= 0x40
        path.write_bytes(data)

    monkeypatch.setattr(into, "write", spoilt)
    said = refused(folder, graph, "not what was planned", VerifyError)
    what = {"tensor": "ulp off", "beside": "not as it was", "structure": "not as it was"}[damage]
    assert what in said


@pytest.mark.parametrize("turned", [True, False])
def test_a_row_left_as_it_was_is_found_wherever_it_is(pair, monkeypatch, turned):
    folder, base, _ = pair
    stored = transposed(base) if turned else arrays(base)
    graph = save_graph(folder / "graph/model.onnx", stored, data="w.bin")
    write = into.write

    def forgetful(plan, matches, parameters, layout, request, sink, *others):
        write(plan, matches, parameters, layout, request, sink, *others)
        lines = matches[0].lines
        new = np.memmap(request.folder / "w.bin", np.uint8, "r+")
        old = np.fromfile(folder / "graph/w.bin", np.uint8)
        at = slice(lines.tensor.source.start, lines.tensor.source.start + lines.tensor.nbytes)
        rows = [a[at].view("f4").reshape(lines.rows, lines.columns) for a in (new, old)]
        row = (slice(None), 7) if lines.by_column else 7
        assert lines.by_column == turned
        rows[0][row] = rows[1][row]

    monkeypatch.setattr(into, "write", forgetful)
    monkeypatch.setattr(rewritten, "_chosen", lambda *_: iter(()))  # no row by chance
    said = refused(folder, graph, "not what was planned", VerifyError)
    assert "row 7 is" in said


@pytest.mark.parametrize("turned", [True, False])
def test_a_row_that_is_as_it_was_in_the_middle_only_is_not_as_it_was(pair, monkeypatch, turned):
    folder, base, _ = pair
    stored = transposed(base) if turned else arrays(base)
    graph = save_graph(folder / "graph/model.onnx", stored, data="w.bin")
    found = []

    def partly(old, new):
        lines = old.lines
        at = slice(lines.tensor.source.start, lines.tensor.source.start + lines.tensor.nbytes)
        new_rows = np.memmap(new.tensor.source.path, np.uint8, "r+")[at].view("f4")
        old_rows = np.fromfile(folder / "graph/w.bin", np.uint8)[at].view("f4")
        a, b = (r.reshape(lines.rows, lines.columns) for r in (new_rows, old_rows))
        a, b = (a.T, b.T) if lines.by_column else (a, b)
        kept = a[7].copy()
        a[7, 1:-1] = b[7, 1:-1]
        found.append(as_before(old, new))
        a[7] = kept
        return np.zeros_like(found[-1])

    as_before = rewritten._as_before
    monkeypatch.setattr(rewritten, "_as_before", partly)
    dora_export.export_onnx(
        folder / "base", folder / "adapter", folder / "out", into=graph, verify=False
    )
    assert found
    assert not np.concatenate(found).any()


def test_rows_that_a_merge_does_not_change_may_stay(pair):
    folder, base, _ = pair
    adapter = small.adapter_tensors(base, dora=False)
    adapter[f"{small.PREFIX}{Q}.lora_B.weight"][3:5] = 0
    shutil.rmtree(folder / "adapter")
    small.write_adapter(folder / "adapter", adapter, use_dora=False)
    graph = save_graph(folder / "graph/model.onnx", transposed(base), data="w.bin")
    done = dora_export.export_onnx(folder / "base", folder / "adapter", folder / "out", into=graph)
    oracle_tier = done.verified.tiers[1]
    assert oracle_tier.figures["rows_as_before"] == 2
    assert "2 rows are as before, which is what the merge makes of them" in oracle_tier.summary


def test_data_that_does_not_fill_its_type_was_so_before(pair):
    """In a graph that holds its weights: without them the checker has nothing to object to."""
    folder, base, _ = pair
    graph = save_graph(folder / "graph/model.onnx", transposed(base))
    model = onnx.load(graph)
    for value in model.graph.output:
        value.type.tensor_type.shape.dim.add().dim_param = "rows"
    kept = onnx.numpy_helper.from_array(np.ones((97, 32), np.float32), "kept")
    kept.data_type = onnx.TensorProto.COMPLEX128
    model.graph.initializer.append(kept)
    onnx.save(model, graph)
    done = export(folder, graph)
    (note,) = (n for n in done.notes if "onnx's checker refuses the graph, as it did before" in n)
    assert "tensor name: kept" in note


def test_the_checker_may_refuse_what_it_refused_before_and_nothing_else(pair, monkeypatch):
    folder, base, _ = pair
    graph = save_graph(folder / "graph/model.onnx", transposed(base), data="w.bin")
    done = export(folder, graph)  # the outputs of these tests' graphs have no shape
    assert any("onnx's checker refuses the graph, as it did before" in n for n in done.notes)
    model = onnx.load(graph, load_external_data=False)
    for value in model.graph.output:
        value.type.tensor_type.shape.dim.add().dim_param = "rows"
    onnx.save(model, graph)
    assert not any("checker" in n for n in export(folder, graph, "sound").notes)
    write = into.write

    def renamed(plan, matches, parameters, layout, request, sink, *others):
        write(plan, matches, parameters, layout, request, sink, *others)
        path = request.folder / "model.onnx"
        path.write_bytes(path.read_bytes().replace(b"MatMul", b"NatMul"))

    monkeypatch.setattr(into, "write", renamed)
    monkeypatch.setattr(rewritten, "_structure", lambda *_: iter(()))
    monkeypatch.setattr(rewritten, "_copied", lambda *_: None)
    said = refused(folder, graph, "checker refuses the written", VerifyError, out="new")
    assert "No Op registered for NatMul" in said
    assert r"\n" not in said  # the checker says it in several lines


@pytest.mark.parametrize("size", [files.CHECKED_BYTES, 0], ids=["by path", "in memory"])
def test_the_checker_looks_at_graphs_of_any_size(pair, monkeypatch, size):
    folder, base, _ = pair
    graph = save_graph(folder / "graph/model.onnx", transposed(base))
    monkeypatch.setattr(files, "CHECKED_BYTES", size)
    assert any("'shape' of 'type' is required" in n for n in export(folder, graph).notes)


def test_the_disk_is_not_waited_for_on_request(pair, monkeypatch):
    folder, base, _ = pair
    graph = save_graph(folder / "graph/model.onnx", transposed(base), data="w.bin")
    export(folder, graph)
    real, synced = os.fsync, []
    monkeypatch.setattr(
        os, "fsync", lambda descriptor: synced.append(descriptor) or real(descriptor)
    )
    export(folder, graph, "waited")
    assert len(synced) > 4
    synced.clear()
    export(folder, graph, "quick", sync=False)
    assert len(synced) <= 2  # the manifest is small
    assert {n: d for n, d in entries(folder / "quick").items() if n != "dora_export.json"} == {
        n: d for n, d in entries(folder / "out").items() if n != "dora_export.json"}  # fmt: skip
    with pytest.raises(DoraExportError, match="for a graph that is re-weighted"):
        export(folder, graph, "three", sync=False, adapters=True)


def test_the_command_tells_what_it_did_and_refuses_in_one_message(pair):
    folder, base, _ = pair
    graph = save_graph(folder / "graph/model.onnx", transposed(base))
    command = ["onnx", folder / "base", folder / "adapter", "--into", graph, "-o", folder / "out",
               "--no-verify"]  # fmt: skip
    done = run(*command)
    assert done.exit_code == 0, done.output
    assert "exported by re-weighting: dtype F32, opset 20" in done.output
    again = run(*command)
    assert again.exit_code == 2
    gone = run(*command[:4], folder / "graph/gone.onnx", "-o", folder / "new")
    assert gone.exit_code == 2
    assert "Check the path of the graph" in gone.output


def test_linears_of_the_small_model_are_what_these_tests_assume():
    assert list(LINEARS)[:2] == [Q, DOWN]
