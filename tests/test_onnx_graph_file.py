"""Graphs from anywhere: where their tensors lie is checked before it is used."""

import os
import shutil

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from dora_export.errors import InputError
from dora_export.onnx import wire
from dora_export.onnx.graph_file import open_graph
from dora_export.onnx.lines import Lines
from dora_export.tensors import FileRange, HeldBytes

W = np.arange(48, dtype=np.float32).reshape(6, 8)


def model(initializers, *, opset=20, nodes=(), functions=()):
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"]), *nodes],
        "g",
        [helper.make_tensor_value_info("x", 1, [1, 6])],
        [helper.make_tensor_value_info("y", 1, [1, 8])],
        initializers,
    )
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("own", 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=9, functions=functions)


def external(name="w", location="data.bin", dims=(6, 8), **entries):
    tensor = TensorProto(name=name, data_type=1, dims=dims, data_location=TensorProto.EXTERNAL)
    for key, value in {"location": location, **entries}.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor


@pytest.fixture
def folder(tmp_path):
    """A graph's folder, and beside it something that is none of its business."""
    (tmp_path / "secret.bin").write_bytes(W.tobytes())
    (tmp_path / "model").mkdir()
    (tmp_path / "model/data.bin").write_bytes(bytes(64) + W.tobytes())
    return tmp_path / "model"


def save(folder, *initializers, **options):
    path = folder / "model.onnx"
    path.write_bytes(model(initializers, **options).SerializeToString())
    return path


def values(tensor, dtype=np.float32):
    return tensor.read().view(dtype).reshape(tensor.shape)


def test_every_stored_form_is_found_where_it_lies(folder):
    branch = helper.make_graph(
        [helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(W * 3, "v")),
         helper.make_node("Identity", ["c"], ["o"])],
        "branch", [], [helper.make_tensor_value_info("o", 1, [6, 8])],
        [numpy_helper.from_array(W * 4, "inner")],
    )  # fmt: skip
    function = helper.make_function(
        "own", "Scaled", ["a"], ["b"],
        [helper.make_node("Constant", [], ["f"], value=numpy_helper.from_array(W * 5, "v")),
         helper.make_node("Add", ["a", "f"], ["b"])],
        [helper.make_opsetid("", 20)],
    )  # fmt: skip
    path = save(
        folder,
        external(offset=64, length=W.nbytes),
        numpy_helper.from_array(W * 2, "raw"),
        helper.make_tensor("listed", 1, [3], [1.5, 2.5, 3.5]),
        helper.make_tensor("numbers", TensorProto.INT8, [2], [-5, 7]),
        nodes=[helper.make_node("If", ["raw"], ["q"], then_branch=branch, else_branch=branch)],
        functions=[function],
    )
    found = open_graph(path).by_name
    assert np.array_equal(values(found["", "w"]), W)
    assert found["", "w"].is_external
    assert np.array_equal(values(found["", "raw"]), W * 2)
    assert np.array_equal(values(found["", "listed"]), [1.5, 2.5, 3.5])
    assert isinstance(found["", "listed"].source, FileRange)  # packed: can be written in place
    assert np.array_equal(values(found["", "numbers"], np.int8), [-5, 7])
    assert isinstance(found["", "numbers"].source, HeldBytes)
    assert np.array_equal(values(found["/q.then_branch", "c"]), W * 3)
    assert np.array_equal(values(found["/q.else_branch", "inner"]), W * 4)
    assert np.array_equal(values(found["/Scaled", "f"]), W * 5)


def test_a_graph_is_parsed_without_its_weights(folder):
    large = np.zeros((512, 64), np.float32)
    path = save(folder, numpy_helper.from_array(large, "w"))
    graph = open_graph(path)
    assert len(graph.model.SerializeToString()) < 2000 < large.nbytes
    assert [u.node.op_type for u in graph.uses["w"]] == ["MatMul"]


@pytest.mark.parametrize(
    ("tensor", "why"),
    [
        (external(location="../secret.bin"), "outside of the graph's folder"),
        (external(location="sub/../../secret.bin"), "outside of the graph's folder"),
        (external(location="{folder}/../secret.bin"), "outside of the graph's folder"),
        (external(location=""), "outside of the graph's folder"),
        (external(location="*/_ORT_MEM_ADDR_/*"), "outside of the graph's folder"),
        (external(location="link.bin"), "a link that leads outside"),
        (external(location="hard.bin"), "hard links"),
        (external(location="gone.bin"), "'gone.bin' is missing"),
        (external(location="folder"), "which is no file"),
        (external(offset=-4, length=192), "bytes -4 to 188 of 'data.bin', which has 256"),
        (external(offset=99999, length=192), "which has 256"),
        (external(offset=64, length=6_400_000), "which has 256"),
        (external(offset=0, length=8), "said to have 8 bytes, expected 192"),
        (external(offset=0, length=-192), "bytes 0 to -192"),
        (external(offset="zero"), "no number"),
        (external(dims=(6, -8)), "has shape"),
        (external(offset=64, length=192, checksum="0" * 40), "checksum"),
        (TensorProto(name="w", data_type=1, dims=[6, 8], raw_data=b"123"),
         "holds 3 bytes, expected 192"),
    ],
)  # fmt: skip
def test_tensors_that_are_not_where_they_should_be_are_refused(folder, tensor, why):
    (folder / "link.bin").symlink_to(folder.parent / "secret.bin")
    os.link(folder.parent / "secret.bin", folder / "hard.bin")
    (folder / "folder").mkdir()
    for entry in tensor.external_data:
        entry.value = entry.value.replace("{folder}", str(folder))
    path = save(folder, tensor)
    with pytest.raises(InputError, match="Keep the graph and its external data together") as error:
        open_graph(path)
    assert why in str(error.value)
    assert "'w'" in str(error.value)


def test_links_within_the_hugging_face_cache_are_followed(tmp_path):
    repo = tmp_path / "models--org--model"
    snapshot, blobs = repo / "snapshots/abc/onnx", repo / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "11").write_bytes(W.tobytes())
    (blobs / "22").write_bytes(model([external(location="model.onnx_data")]).SerializeToString())
    (snapshot / "model.onnx_data").symlink_to("../../../blobs/11")
    (snapshot / "model.onnx").symlink_to("../../../blobs/22")
    graph = open_graph(snapshot / "model.onnx")
    assert np.array_equal(values(graph.by_name["", "w"]), W)
    (tmp_path / "blobs").mkdir()
    shutil.copy(blobs / "11", tmp_path / "blobs/11")  # another folder of that name
    (snapshot / "model.onnx_data").unlink()
    (snapshot / "model.onnx_data").symlink_to(tmp_path / "blobs/11")
    with pytest.raises(InputError, match="a link that leads outside"):
        open_graph(snapshot / "model.onnx")


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"<html>not found</html>", "not an ONNX model"),
        (b"\x08\x09", "not an ONNX model"),
        (np.random.default_rng(0).bytes(500), "not an ONNX model"),
    ],
)
def test_files_that_are_no_model_are_refused(folder, content, why):
    path = folder / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(InputError, match=why):
        open_graph(path)


def test_a_damaged_model_is_refused_wherever_it_is_cut(folder):
    path = save(folder, numpy_helper.from_array(W, "w"))
    whole = path.read_bytes()
    for size in range(1, len(whole), 7):
        path.write_bytes(whole[:size])
        with pytest.raises(InputError):
            open_graph(path)


def test_graphs_nested_without_end_are_refused(folder):
    inner = b""
    for _ in range(200):  # GraphProto in AttributeProto in NodeProto in GraphProto
        for field in (6, 5, 1):
            inner = wire.varint(field << 3 | 2) + wire.varint(len(inner)) + inner
    path = folder / "model.onnx"
    path.write_bytes(b"\x3a" + wire.varint(len(inner)) + inner)
    with pytest.raises(InputError, match="nested"):
        open_graph(path)


def test_old_opsets_folders_and_missing_files_are_refused(folder):
    with pytest.raises(InputError, match=r"opset 6, expected 7 or later.*version_converter"):
        open_graph(save(folder, numpy_helper.from_array(W, "w"), opset=6))
    with pytest.raises(InputError, match=r"a folder. Pass the .onnx file. It holds model.onnx"):
        open_graph(folder)
    with pytest.raises(InputError, match="Check the path of the graph"):
        open_graph(folder / "other.onnx")


def test_tensors_stored_twice_or_overlapping_are_refused(folder):
    twice = numpy_helper.from_array(W, "w")
    with pytest.raises(InputError, match="stored twice"):
        open_graph(save(folder, twice, twice))
    with pytest.raises(InputError, match="share some of their bytes"):
        open_graph(save(folder, external(offset=0), external("v", offset=4)))
    open_graph(save(folder, external(offset=0), external("v", offset=0)))  # one copy for two names


@pytest.mark.parametrize("count", [1, 3, 60])
def test_replaced_tensors_keep_the_rest_of_the_model(folder, count):
    stored = [helper.make_tensor(f"z{i}", TensorProto.INT8, [1], [-5]) for i in range(count)]
    path = save(folder, numpy_helper.from_array(W, "w"), *stored)
    graph, old = open_graph(path), path.read_bytes()
    new = {f"z{i}": helper.make_tensor(f"z{i}", TensorProto.INT8, [99], range(99))
           for i in range(count)}  # fmt: skip
    spans = [graph.by_name["", name].span for name in new]
    edits = {(s.message.start, s.message.stop): t.SerializeToString()
             for s, t in zip(spans, new.values(), strict=True)}  # fmt: skip
    pieces = wire.spliced(len(old), edits, spans)
    got = b"".join(p if isinstance(p, bytes) else old[p[0] : p[1]] for p in pieces)
    expected = model([numpy_helper.from_array(W, "w"), *new.values()])
    assert onnx.ModelProto.FromString(got) == expected


@pytest.mark.parametrize("shape", [(6, 8), (3, 4, 5)])
@pytest.mark.parametrize("by_column", [False, True])
@pytest.mark.parametrize("kernel", ["compiled", "numpy"])
def test_lines_are_read_and_placed_alike(folder, shape, by_column, kernel, monkeypatch):
    monkeypatch.setenv("DORA_EXPORT_KERNEL", kernel)
    whole = np.random.default_rng(0).integers(0, 99, shape).astype(np.float32)
    path = save(folder, numpy_helper.from_array(whole, "w"))
    tensor = open_graph(path).by_name["", "w"]
    panels, (rows, columns) = int(np.prod(shape[:-2])), shape[-2:]
    lines = Lines(tensor, 4, panels, rows, columns, by_column)
    expected = np.moveaxis(whole, -1, -2) if by_column else whole
    expected = expected.reshape(lines.count, lines.length)
    made, put = np.zeros((2, whole.nbytes), np.uint8)
    for first in range(0, lines.count, 5):
        last = min(first + 5, lines.count)
        block = lines.read(first, last)
        assert np.array_equal(block.view(np.float32), expected[first:last])
        for at, stride, piece in lines.placed(first, block):
            for i, row in enumerate(piece):
                made[at + i * stride :][: row.size] = row
        if by_column:
            lines.put(first, block, put)
    assert not by_column or np.array_equal(made, put)
    assert np.array_equal(made.view(np.float32).reshape(shape), whole)


@pytest.mark.parametrize("where", ["tensor", "input of a node", "node", "input of the graph"])
def test_names_that_are_no_text_are_refused(where, folder):
    """Protobuf gives them as bytes; a report could not name them."""
    name = {"tensor": b"stored", "input of a node": b"read by", "node": b"called",
            "input of the graph": b"given"}[where]  # fmt: skip
    nodes = [helper.make_node("Add", ["read by", "y"], ["z"], name="called")]
    made = model([numpy_helper.from_array(W, "stored")], nodes=nodes)
    made.graph.input.append(helper.make_tensor_value_info("given", 1, [1]))
    data = made.SerializeToString()
    assert data.count(name) == 1
    path = folder / "model.onnx"
    path.write_bytes(data)
    assert open_graph(path)
    path.write_bytes(data.replace(name, b"\xfb" + name[1:]))
    with pytest.raises(InputError, match=r"the name b'\\xfb.* is no text in UTF-8\. Download"):
        open_graph(path)
