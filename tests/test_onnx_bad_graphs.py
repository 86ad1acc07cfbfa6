"""Graphs that cannot be used: one message, exit code 2, and nothing is left behind."""

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from tests import small
from tests.test_onnx_into import DOWN, Q, arrays, save_graph, transposed


@pytest.fixture
def folder(tmp_path):
    base = small.base_tensors()
    small.write_base(tmp_path / "base", base)
    small.write_adapter(tmp_path / "adapter", small.adapter_tensors(base))
    save_graph(tmp_path / "graph/model.onnx", transposed(base), data="w.bin")
    return tmp_path


def of_another_model(folder, path):
    save_graph(path, transposed(small.base_tensors(seed=9)))


def partly_matching(folder, path):
    held = transposed(small.base_tensors())
    names = dict(zip(arrays(small.base_tensors()), held, strict=True))
    save_graph(path, {n: v for n, v in held.items() if n != names[f"{DOWN}.weight"]})


def half_a_weight(folder, path):
    held = transposed(small.base_tensors())
    names = dict(zip(arrays(small.base_tensors()), held, strict=True))
    save_graph(path, {n: v[:, :9] if n == names[f"{Q}.weight"] else v for n, v in held.items()})


def without_its_data(folder, path):
    (folder / "graph/w.bin").unlink()


def with_data_cut_short(folder, path):
    data = (folder / "graph/w.bin").read_bytes()
    (folder / "graph/w.bin").write_bytes(data[: len(data) // 2])


def outside(folder, path):
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            entry.value = "../base/model.safetensors" if entry.key == "location" else entry.value
    onnx.save(model, path)


def by_a_link(folder, path):
    (folder / "graph/w.bin").rename(folder / "elsewhere.bin")
    (folder / "graph/w.bin").symlink_to(folder / "elsewhere.bin")


def damaged(folder, path):
    data = bytearray(path.read_bytes())
    data[len(data) // 3 : len(data) // 3 + 40] = b"\xff" * 40
    path.write_bytes(data)


def cut_off(folder, path):
    path.write_bytes(path.read_bytes()[:-9])


def too_old(folder, path):
    model = onnx.load(path, load_external_data=False)
    model.opset_import[0].version = 6
    onnx.save(model, path)


def quantised(op, values, inputs, **attributes):
    """A graph whose q_proj of layer 0 goes into an operator as no known tool quantises it."""

    def make(folder, path):
        held = transposed(small.base_tensors())
        names = dict(zip(arrays(small.base_tensors()), held, strict=True))
        del held[names[f"{Q}.weight"]]
        save_graph(path, held)
        model = onnx.load(path)
        node = helper.make_node(op, inputs, ["odd"], "odd", domain="com.microsoft", **attributes)
        model.graph.node.append(node)
        model.graph.initializer.extend(numpy_helper.from_array(v, n) for n, v in values.items())
        onnx.save(model, path)

    return make


rng = np.random.default_rng(0)
BLOCKS = {"B": rng.integers(0, 255, (20, 1, 8), np.uint8), "scales": np.ones((20, 1), np.float32)}
calibrated = quantised("MatMulNBits", BLOCKS, ["x", "B", "scales"], K=12, N=20, bits=4,
                       block_size=16)  # fmt: skip
two_bits = quantised("MatMulNBits", BLOCKS, ["x", "B", "scales"], K=12, N=20, bits=2, block_size=16)
other_axes = quantised(
    "GatherBlockQuantized",
    {"B": BLOCKS["B"][:, 0], "scales": BLOCKS["scales"]},
    ["B", "ids", "scales"], gather_axis=1, quantize_axis=0, block_size=16,
)  # fmt: skip

BAD = {
    of_another_model: "not a graph of",
    partly_matching: "does not hold 1 of the 4 tensors",
    half_a_weight: "9 of its 20 rows only",
    without_its_data: "'w.bin' is missing",
    with_data_cut_short: "its data is said to be bytes",
    outside: "outside of the graph's folder",
    by_a_link: "a link that leads outside",
    damaged: "not an ONNX model, or damaged",
    cut_off: "not an ONNX model, or damaged",
    too_old: "opset 6, expected 7 or later",
    calibrated: "1 quantised weights (odd) are not what rounding the base to nearest",
    two_bits: "odd: 2 bits",
    other_axes: "odd: looked up along other axes",
}


@pytest.mark.parametrize("way", ["merged", "adapters"])
@pytest.mark.parametrize(
    ("spoil", "said"),
    BAD.items(),
    ids=lambda v: getattr(v, "__name__", None) if callable(v) else "",
)
def test_a_bad_graph_is_one_error_and_leaves_nothing(folder, spoil, said, way):
    path = folder / "graph/model.onnx"
    spoil(folder, path)
    before = small.entries(folder)
    done = small.run("onnx", folder / "base", folder / "adapter", "--into", path, "-o",
                     folder / "out", *(["--adapters"] if way == "adapters" else []))  # fmt: skip
    assert done.exit_code == 2, done.output
    assert said in " ".join(done.output.split())
    assert done.output.count("error:") == 1
    assert "Traceback" not in done.output
    assert small.entries(folder) == before, "something was left behind"
