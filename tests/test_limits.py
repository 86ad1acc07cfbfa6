"""The limits of SECURITY.md, one by one: what is at a limit is taken, what is beyond is refused."""

import json

import numpy as np
import onnx
import pytest
import torch
from onnx import helper

import dora_export
from dora_export import limits
from dora_export.adapters import patterns
from dora_export.adapters.patterns import first_matches
from dora_export.adapters.peft_parameters import _card
from dora_export.api import _factor
from dora_export.errors import AdapterError, DoraExportError, InputError
from dora_export.onnx import graph_file
from dora_export.onnx.graph_file import open_graph
from dora_export.storage import read_tensors
from dora_export.storage.json_file import is_rank, parse, read_index, read_json, read_list
from dora_export.storage.safetensors import read_header
from dora_export.verification.side_ledger import _template_of, _tokenizer_parts
from dora_export.writers import manifest, side_files
from tests import small
from tests.test_hostile import delimited
from tests.test_storage import write


def hole(path, nbytes, start=b""):
    """A file that takes no room on the disk."""
    with path.open("wb") as file:
        file.write(start)
        file.truncate(nbytes)
    return path


# --- headers and indexes ---


def header_of(count, **metadata):
    entry = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
    said = {"__metadata__": metadata} if metadata else {}
    return json.dumps(said | {f"t{i}": entry for i in range(count)})


def test_tensors_of_a_header(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "HEADER_TENSORS", 3)
    assert len(read_header(write(tmp_path / "a", header_of(3), b"")).tensors) == 3
    with pytest.raises(InputError, match="holds more than 3 tensors"):
        read_header(write(tmp_path / "b", header_of(4), b""))


def test_entries_of_metadata(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "METADATA_ENTRIES", 2)
    monkeypatch.setattr(limits, "METADATA_CHARS", 40)
    read_header(write(tmp_path / "a", header_of(1, x="1", y="n" * 30), b""))
    with pytest.raises(InputError, match="more than 2 entries"):
        read_header(write(tmp_path / "b", header_of(1, x="1", y="2", z="3"), b""))
    with pytest.raises(InputError, match="more than 40 characters"):
        read_header(write(tmp_path / "c", header_of(1, x="n" * 50), b""))


def index_of(path, count, name="model.safetensors"):
    small.write_json(path, {"weight_map": {f"t{i}": name for i in range(count)}})
    return path


def test_bytes_and_tensors_of_an_index(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors.index.json"
    # read before it was refused, the hole would be no JSON
    with pytest.raises(InputError, match="larger than 100000000 bytes"):
        read_index(hole(path, limits.INDEX_BYTES + 1))
    monkeypatch.setattr(limits, "INDEX_TENSORS", 3)
    assert len(read_index(index_of(path, 3))["weight_map"]) == 3
    with pytest.raises(InputError, match="places more than 3 tensors"):
        read_index(index_of(path, 4))
    with pytest.raises(InputError, match="an entry of more than 20000 characters"):
        read_index(index_of(path, 1, "n" * 20_001))
    small.write_json(path, {"metadata": "n" * 10_000_001, "weight_map": {}})
    with pytest.raises(InputError, match="an entry of more than 10000000 characters"):
        read_index(path)


# --- other JSON ---


def test_bytes_of_json(tmp_path):
    path = tmp_path / "config.json"
    for read in (read_json, read_list):
        with pytest.raises(InputError, match="larger than 32000000 bytes"):
            read(hole(path, limits.JSON_BYTES + 1))
        with pytest.raises(InputError, match="larger than 32000000 bytes"):
            read(hole(path, 1 << 40))  # which could not be read


def test_json_that_grows_while_it_is_read(tmp_path):
    """Its size is asked for once, and no more is read than is allowed."""
    path = tmp_path / "config.json"
    path.write_bytes(b'{"a": 1}')
    assert read_json(path, most_bytes=8) == {"a": 1}
    with pytest.raises(InputError, match="larger than 7 bytes"):
        read_json(path, most_bytes=7)
    with pytest.raises(InputError, match="larger than 9 bytes"):
        read_json(hole(path, 10), most_bytes=9)


@pytest.mark.parametrize(("one", "closed"), [(b"0,", b"0]"), (b"[],", b"0]"), (b"{},", b"0]")])
def test_values_of_json(one, closed):
    count = limits.JSON_VALUES // (1 if one == b"0," else 2)
    with pytest.raises(InputError, match="more than 1000000 values"):
        parse(b"[" + one * count + closed, "x")
    assert len(parse(b"[" + one * 9 + closed, "x", 19)) == 10


@pytest.mark.parametrize("pair", ["[]", '{"a":}'])
def test_depth_of_json(pair):
    opened, closed = (pair[:-1], pair[-1])

    def nested(depth):
        return (opened * depth + "0" + closed * depth).encode()

    assert parse(nested(limits.JSON_DEPTH), "x")
    for depth in (limits.JSON_DEPTH + 1, 100_000):  # within what the parser itself takes, or not
        with pytest.raises(InputError, match=r"nested more than 64 deep|not JSON"):
            parse(nested(depth), "x")


def test_bytes_and_values_of_a_tokenizer(tmp_path, monkeypatch):
    path = tmp_path / "tokenizer.json"
    with pytest.raises(InputError, match="larger than 64000000 bytes"):
        _tokenizer_parts(hole(path, limits.TOKENIZER_BYTES + 1))
    path.write_text('{"model": {"vocab": {"a": 0, "b": 1}}}')
    monkeypatch.setattr(limits, "TOKENIZER_VALUES", 4)
    assert _tokenizer_parts(path)["vocabulary"] == {"a": 0, "b": 1}
    monkeypatch.setattr(limits, "TOKENIZER_VALUES", 3)
    with pytest.raises(InputError, match="more than 3 values"):
        _tokenizer_parts(path)


# --- numbers ---


def test_rank_of_any_format(tmp_path):
    assert is_rank(limits.RANK)
    assert not any(map(is_rank, (limits.RANK + 1, 0, -1, 2.0, True, "2", None)))
    small.write_pair(tmp_path)
    for fields in ({"r": 10**6 + 1}, {"rank_pattern": {"q_proj": 10**6 + 1}}):
        small.edit_json(tmp_path / "adapter/adapter_config.json", **{"r": 3, **fields})
        with pytest.raises(AdapterError, match="expected a positive integer, got 1000001"):
            dora_export.load_adapter(tmp_path / "adapter")


@pytest.mark.parametrize("alpha", [3e6 + 1, -3e6 - 1])
def test_scaling(tmp_path, alpha):
    small.write_pair(tmp_path)
    small.edit_json(tmp_path / "adapter/adapter_config.json", lora_alpha=alpha)  # by a rank of 3
    with pytest.raises(DoraExportError, match=r"scaling -?1e\+06; at most 1,000,000"):
        dora_export.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")


@pytest.mark.parametrize("value", [1e6 + 1, -1e6 - 1, float("nan"), float("inf"), 10**400, "1"])
def test_strength_and_weights(value):
    assert _factor("strength", -1e6) == -1e6
    with pytest.raises(DoraExportError, match="expected a finite number, at most 1,000,000"):
        _factor("strength", value)
    for said in ({"strength": value}, {"weights": [value]}):
        assert manifest._stored_settings(said) is None


# --- patterns ---


def test_patterns_of_plain_names_that_take_long_are_matched_apart(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(patterns, "_matched_apart", lambda *given: calls.append(given) or {})
    monkeypatch.setattr(patterns, "LITTLE", 6 * 8)
    first_matches(tmp_path, "rank_pattern", ["q_proj"], ["q_proj_a"])
    assert not calls
    first_matches(tmp_path, "rank_pattern", ["q_proj"], ["q_proj_ab"])
    assert len(calls) == 1


# --- pickles ---


@pytest.mark.parametrize("zipped", [True, False])
def test_opcodes_of_a_pickle(tmp_path, monkeypatch, zipped):
    path = tmp_path / "x.bin"
    torch.save({f"{i}": torch.ones(1) for i in range(9)}, path,
               _use_new_zipfile_serialization=zipped)  # fmt: skip
    assert len(read_tensors(path, allow_pickle=True)) == 9
    monkeypatch.setattr(limits, "PICKLE_OPCODES", 100)
    with pytest.raises(InputError, match="more opcodes than any model has"):
        read_tensors(path, allow_pickle=True)


# --- side files ---


def test_side_file(tmp_path):
    at, most = tmp_path / "notes.txt", limits.SIDE_FILE_BYTES
    assert side_files._obstacle(hole(at, most), tmp_path) is None
    assert "a side file has at most 268 MB" in side_files._obstacle(hole(at, most + 1), tmp_path)


def test_model_card_of_an_adapter_is_read_to_its_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "CARD_BYTES", 20)
    for before, found in ((13, True), (14, False)):
        (tmp_path / "README.md").write_text("x" * before + "Unsloth")
        assert _card(tmp_path) is found


def test_modules_of_sentence_transformers_are_read_to_their_limit(tmp_path, monkeypatch):
    text = '[{"path": "2_Dense"}]'
    (tmp_path / "modules.json").write_text(text)
    for most, found in ((len(text), {"2_Dense"}), (len(text) - 1, set())):
        monkeypatch.setattr(limits, "CARD_BYTES", most)
        assert side_files._modules(tmp_path) == found


def test_chat_template_beyond_its_limit_is_held_against_another_as_a_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "TEMPLATE_BYTES", 10)

    def told(content):
        path = tmp_path / "chat_template.jinja"
        path.write_bytes(content)
        return _template_of({path.name: path})

    assert told(b"{{ a }} bc") == "{{ a }} bc"
    long = told(b"{{ a }} bcd")
    assert len(long) == 64  # a digest, not the template
    assert long == told(b"{{ a }} bcd") != told(b"{{ a }} bce")
    assert told(b"\xff") != told(b"\xfe")  # no text, and not the same


# --- graphs ---


def graph_at(path, nodes=1, numbers=(), **model):
    """A chain of nodes from one tensor on, the first with numbers."""
    kinds = [helper.make_node("Relu", [f"t{i}"], [f"t{i + 1}"]) for i in range(nodes)]
    if numbers:
        kinds[0].attribute.append(helper.make_attribute("numbers", numbers))
    values = [onnx.numpy_helper.from_array(np.ones(3, np.float32), f"w{i}") for i in range(2)]
    graph = helper.make_graph(kinds, "g", [], [], values)
    onnx.save(helper.make_model(graph, **model), path)
    return path


def test_fields_tensors_and_bytes_of_a_graph(tmp_path, monkeypatch):
    small_one = graph_at(tmp_path / "a.onnx")
    assert len(open_graph(small_one).tensors) == 2
    monkeypatch.setattr(limits, "GRAPH_FIELDS", 60)
    open_graph(small_one)
    for beyond in (
        graph_at(tmp_path / "b.onnx", nodes=20),
        graph_at(tmp_path / "c.onnx", numbers=[1] * 60),
        graph_at(tmp_path / "d.onnx", numbers=[1.0] * 60),
    ):
        with pytest.raises(InputError, match="more than 60 fields"):
            open_graph(beyond)
    plain = onnx.load(small_one)
    for kind, number in (("attribute", 8), ("tensor", 1)):  # a list in one field, a byte a number
        packed = delimited(number, bytes(60))
        node = plain.graph.node[0].SerializeToString()
        part = delimited(1, node + delimited(5, packed)) if kind == "attribute" else (
            delimited(1, node) + delimited(5, packed))  # fmt: skip
        (tmp_path / "p.onnx").write_bytes(plain.SerializeToString() + delimited(7, part))
        with pytest.raises(InputError, match="more than 60 fields"):
            open_graph(tmp_path / "p.onnx")
    dims = graph_at(tmp_path / "e.onnx")
    content = onnx.load(dims)
    content.graph.initializer[0].dims.extend([1] * 60)
    onnx.save(content, dims)
    with pytest.raises(InputError, match="more than 60 fields"):
        open_graph(dims)
    monkeypatch.setattr(limits, "GRAPH_TENSORS", 1)
    with pytest.raises(InputError, match="more than 1 tensors"):
        open_graph(small_one)
    monkeypatch.undo()
    wordy = graph_at(tmp_path / "f.onnx", doc_string="n" * 5000)
    monkeypatch.setattr(limits, "GRAPH_BYTES", 5000)
    open_graph(small_one)
    with pytest.raises(InputError, match="bytes without the weights"):
        open_graph(wordy)


def test_graph_larger_than_a_protobuf_message(tmp_path):
    path = hole(tmp_path / "x.onnx", graph_file.PROTOBUF_BYTES + 1, b"\x08\x08")
    with pytest.raises(InputError, match="more than the 2 GiB that a protobuf message can hold"):
        open_graph(path)
