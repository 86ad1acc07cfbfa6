"""Containers of tensors: what is believed of a file, what is written into one."""

import json
import math
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from dora_export import limits
from dora_export.errors import InputError
from dora_export.storage import read_tensors
from dora_export.storage.json_file import read_index
from dora_export.storage.safetensors import header_bytes, read_header
from dora_export.tensors import BY_TORCH, DTYPES, F32
from tests import small

W = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


def write(path, header, data=bytes(24), length=None):
    """A file with this header, given as JSON-ready data, text or bytes."""
    text = header if isinstance(header, str | bytes) else json.dumps(header)
    text = text.encode() if isinstance(text, str) else text
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def changed(**fields):
    return {"w": W | fields}


MALFORMED = {
    "header longer than the file": ("{}", b"", 1000, "not a whole safetensors file"),
    "header longer than any file": ("{}", b"", 2**64 - 1, "not a whole safetensors file"),
    "header of nothing": ("", b"", 0, "not a whole safetensors file"),
    "no JSON": ("{w:", b"", None, "not JSON"),
    "no UTF-8": (b'{"\xff":1}', b"", None, "not JSON"),
    "deep nesting": ('{"w":' + "[" * 200_000, b"", None, "not JSON: nested too deeply"),
    "nesting that a parser takes": ('{"w":' + "[" * 70 + "]" * 70 + "}", b"", None, "too deeply"),
    "number of a million digits": ('{"w":' + "1" * 10**6 + "}", b"", None, "not JSON"),
    "a list": ("[]", b"", None, "not a JSON object"),
    "a name twice": (f'{{"w":{json.dumps(W)},"w":0}}', None, None, "names a tensor twice"),
    "a field twice": ('{"w":{"shape":[1],"shape":[2]}}', None, None, "two things of one name"),
    "half a character in a name": ('{"\\ud800": {}}', b"", None, "half a character"),
    "metadata of numbers": ({"__metadata__": {"a": 1}, "w": W}, None, None, "map of strings"),
    "metadata in a list": ({"__metadata__": ["a"], "w": W}, None, None, "map of strings"),
    "half a character in metadata": (
        '{"__metadata__": {"a": "\\udfff"}}', b"", None, "map of strings",
    ),
    "a tensor that is a number": ({"w": 1}, None, None, "no dtype, shape and data_offsets"),
    "a tensor without a shape": (
        {"w": {"dtype": "F32", "data_offsets": [0, 24]}}, None, None, "no dtype, shape",
    ),
    "three offsets": (changed(data_offsets=[0, 24, 30]), None, None, "no dtype, shape"),
    "an unknown dtype": (changed(dtype="F31"), None, None, "dtype F31 is not known"),
    "a dtype that is a list": (changed(dtype=["F32"]), None, None, "is not known"),
    "a dtype that is null": (changed(dtype=None), None, None, "is not known"),
    "a shape that is a number": (changed(shape=6), None, None, "not sizes"),
    "a negative shape": (changed(shape=[-2, -3]), None, None, "not sizes"),
    "a broken shape": (changed(shape=[2.0, 3]), None, None, "not sizes"),
    "a true shape": (changed(shape=[True, 6]), None, None, "not sizes"),
    "a shape in text": (changed(shape=["2", "3"]), None, None, "not sizes"),
    "many dimensions": (changed(shape=[1] * 17), None, None, "not sizes"),
    "offsets in text": (changed(data_offsets=["0", "24"]), None, None, "not sizes"),
    "negative offsets": (changed(data_offsets=[-24, 0]), None, None, "not sizes"),
    "offsets that overflow": (changed(data_offsets=[0, 2**70]), None, None, "not sizes"),
    "offsets in the wrong order": (changed(data_offsets=[24, 0]), None, None, "expected 24 bytes"),
    "too few bytes": (changed(data_offsets=[0, 20]), None, None, r"expected 24 bytes for \(2, 3\)"),
    "a shape that overflows": (changed(shape=[2**62, 2**62]), None, None, "expected .* bytes"),
    "data past the end": (
        {"w": W, "x": W | {"data_offsets": [24, 48]}}, None, None, "bytes end at .* truncated",
    ),
    "data that ends early": ({"w": W}, bytes(10), None, "bytes end at .* truncated"),
    "a hole": ({"w": W | {"data_offsets": [8, 32]}}, bytes(32), None, "a hole or an overlap"),
    "an overlap": (
        {"w": W, "x": W | {"data_offsets": [12, 36]}}, bytes(36), None, "a hole or an overlap",
    ),
    "one range twice": ({"w": W, "x": W}, None, None, "a hole or an overlap"),
    "bytes after the last tensor": ({"w": W}, bytes(30), None, "6 bytes follow"),
    "data without tensors": ({}, bytes(3), None, "3 bytes follow"),
}  # fmt: skip


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_safetensors_are_refused(case, tmp_path):
    header, data, length, reason = MALFORMED[case]
    path = write(tmp_path / "x.safetensors", header, bytes(24) if data is None else data, length)
    with pytest.raises(InputError, match=reason):
        read_header(path)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"weight_map": {"w": "a", "w": "b"}}', "places tensor 'w' twice"),
        ('{"weight_map": {"w": "a", "w": "a"}}', "places tensor 'w' twice"),
        ('{"weight_map": {"w": "a"}, "weight_map": {"w": "b"}}', "says 'weight_map' twice"),
        ('{"weight_map": {}} x', "something follows its end"),
    ],
)
def test_indexes_that_say_something_twice_are_refused(text, reason, tmp_path):
    (tmp_path / "index.json").write_text(text)
    with pytest.raises(InputError, match=reason):
        read_index(tmp_path / "index.json")


@pytest.mark.parametrize("nbytes", [0, 1, 7, 8, 9])
def test_safetensors_without_a_header_are_refused(nbytes, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(bytes(nbytes))
    with pytest.raises(InputError, match="not a whole safetensors file"):
        read_header(path)


def test_header_larger_than_the_reference_allows_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", limits.HEADER_BYTES + 1))
        file.truncate(limits.HEADER_BYTES * 2)  # a hole, not 200 MB
    with pytest.raises(InputError, match="not a whole safetensors file"):
        read_header(path)


def test_missing_file_folder_and_unknown_suffix_are_refused(tmp_path):
    (tmp_path / "x.safetensors").mkdir()
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(InputError, match="No such file"):
        read_header(tmp_path / "nothing")
    with pytest.raises(InputError, match="Is a directory"):
        read_header(tmp_path / "x.safetensors")
    with pytest.raises(InputError, match="Check the path"):
        read_tensors(tmp_path / "nothing.safetensors", allow_pickle=True)
    with pytest.raises(InputError, match="unknown kind of file"):
        read_tensors(tmp_path / "x.gguf", allow_pickle=True)


def test_any_order_of_entries_and_blanks_after_the_header_are_read(tmp_path):
    entries = {
        "b": {"dtype": "I64", "shape": [], "data_offsets": [24, 32]},
        "empty": {"dtype": "F16", "shape": [0, 4], "data_offsets": [32, 32]},
        "a": W,
    }
    path = write(tmp_path / "x.safetensors", json.dumps(entries) + " " * 13, bytes(32))
    header = read_header(path)
    assert [(t.name, t.shape) for t in header.tensors.values()] == [
        ("a", (2, 3)),
        ("b", ()),
        ("empty", (0, 4)),
    ]
    assert dict(header.metadata) == {}


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_of_the_table_is_one_of_safetensors_and_torch(dtype, tmp_path):
    found = DTYPES[dtype]
    assert np.dtype(found.raw).itemsize == found.itemsize
    torch_dtype = getattr(torch, found.torch)
    assert torch_dtype.itemsize == found.itemsize
    path = tmp_path / "x.safetensors"
    path.write_bytes(header_bytes([("w", found, (3,))], {}) + bytes(3 * found.itemsize))
    with safe_open(path, "pt") as file:
        assert file.get_tensor("w").dtype is torch_dtype
    if found.mergeable:
        limit = torch.finfo(torch_dtype).max
        assert found.largest == limit
        bits = torch.tensor([torch.inf, torch.nan, limit], dtype=torch_dtype).view(torch.uint8)
        masked = bits.numpy().view(found.raw) & np.array(found.exponent_mask, found.raw)
        assert (masked == found.exponent_mask).tolist() == [True, True, False]


NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(
    lambda name: name != "__metadata__"
)
SHAPES = st.lists(st.integers(0, 4), max_size=4).map(tuple)
TENSORS = st.lists(
    st.tuples(NAMES, st.sampled_from(sorted(DTYPES)), SHAPES), max_size=6, unique_by=lambda t: t[0]
)


@settings(max_examples=150, deadline=None)
@given(TENSORS, st.dictionaries(NAMES, NAMES, max_size=3), st.sampled_from([0, 500, 4096]))
def test_written_headers_are_read_the_same_by_the_library_and_by_us(
    tmp_path_factory, tensors, metadata, data_start
):
    entries = [(name, DTYPES[dtype], shape) for name, dtype, shape in tensors]
    header = header_bytes(entries, metadata, data_start)
    sizes = [math.prod(shape) * dtype.itemsize for _, dtype, shape in entries]
    data = np.random.default_rng(0).integers(0, 2, sum(sizes), np.uint8).tobytes()
    path = tmp_path_factory.mktemp("h") / "x.safetensors"
    path.write_bytes(header + data)
    assert len(header) % 8 == 0 or len(header) == data_start
    assert len(header) >= data_start

    ours = read_header(path)
    assert dict(ours.metadata) == metadata
    assert ours.data_start == len(header)
    with safe_open(path, "pt") as library:
        assert (library.metadata() or {}) == metadata
        assert sorted(library.keys()) == sorted(ours.tensors) == sorted(n for n, *_ in entries)
        at = 0
        for (name, dtype, shape), size in zip(entries, sizes, strict=True):
            ref, tensor = ours.tensors[name], library.get_tensor(name)
            assert (ref.dtype, ref.shape) == (dtype, shape) == (
                BY_TORCH[str(tensor.dtype).removeprefix("torch.")],
                tuple(tensor.shape),
            )  # fmt: skip
            assert ref.raw().tobytes() == data[at : at + size] == small.bits(tensor)
            at += size


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damaged_headers_are_refused_or_read_as_the_library_does(tmp_path_factory, data):
    """Whatever is done to a header, there is no other error than a refusal."""
    path = tmp_path_factory.mktemp("d") / "x.safetensors"
    save_file({"w": torch.ones(2, 3), "x": torch.zeros(4, dtype=torch.int64)}, path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        ours = read_header(path)
    except InputError:
        return
    with safe_open(path, "pt") as library:
        assert sorted(library.keys()) == sorted(ours.tensors)
        for name, ref in ours.tensors.items():
            assert ref.raw().tobytes() == small.bits(library.get_tensor(name))


def test_reading_past_a_file_that_was_cut_is_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"w": torch.ones(2, 3)}, path)
    ref = read_header(path).tensors["w"]
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(InputError, match="truncated or changed while it was read"):
        ref.raw()
    path.unlink()
    with pytest.raises(InputError, match="cannot be read at byte"):
        ref.raw()


# --- pickled files ---


def test_pickled_tensors_of_all_kinds_hold_the_same_bytes(tmp_path):
    shared = torch.randn(6, 4)
    state = {
        "plain": torch.randn(3, 5, dtype=torch.float64),
        "half": torch.randn(3, 5).bfloat16(),
        "transposed": shared.T,
        "rows": shared[1:3],
        "parameter": torch.nn.Parameter(torch.randn(2)),
        "count": torch.tensor(7),
        "empty": torch.empty(0, 3),
        "mask": torch.tensor([True, False]),
    }
    torch.save(state, tmp_path / "new.bin")
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "checkpoint.pth")
    for name in ("new.bin", "old.pt", "checkpoint.pth"):
        refs = read_tensors(tmp_path / name, allow_pickle=True)
        assert list(refs) == list(state)
        for key, tensor in state.items():
            assert refs[key].shape == tuple(tensor.shape)
            assert refs[key].raw().tobytes() == small.bits(tensor.detach())


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        ({"w": torch.ones(2, 2).to_sparse()}, "Only dense tensors"),
        ({"w": torch.ones(2, dtype=torch.complex128)}, "Only dense tensors"),
        ({"w": torch.empty(2, device="meta")}, "Only dense tensors"),
        ({"__metadata__": torch.ones(2)}, "cannot be a tensor's name"),
        ({"\ud800": torch.ones(2)}, "cannot be a tensor's name|restricted loader"),
        ({"w": [torch.ones(2)]}, r"Save model\.state_dict\(\)"),
        ({}, r"Save model\.state_dict\(\)"),
        ([torch.ones(2)], r"Save model\.state_dict\(\)"),
        (torch.ones(2), r"Save model\.state_dict\(\)"),
    ],
    ids=["sparse", "complex", "meta", "metadata", "half", "list", "empty", "sequence", "tensor"],
)
def test_pickled_files_that_are_no_plain_state_dict_are_refused(state, reason, tmp_path):
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(InputError, match=reason):
        read_tensors(tmp_path / "x.pt", allow_pickle=True)


def test_damaged_pickled_file_is_refused_without_advice_to_trust_it(tmp_path):
    path = tmp_path / "x.pt"
    torch.save({"w": torch.ones(100)}, path)
    whole = path.read_bytes()
    for content in (b"", b"\x80\x02}", whole[:-30], whole[:200], b"no pickle at all"):
        path.write_bytes(content)
        with pytest.raises(
            InputError, match=r"restricted loader refuses|not a file saved"
        ) as refusal:
            read_tensors(path, allow_pickle=True)
        assert "weights_only" not in str(refusal.value)
        assert "\n" not in str(refusal.value)


def test_header_names_that_need_escapes_survive(tmp_path):
    name = 'a"b\\c\n\u00e9\U0001f600'
    path = tmp_path / "x.safetensors"
    path.write_bytes(header_bytes([(name, F32, (1,))], {name: name}) + bytes(4))
    with safe_open(path, "np") as file:
        assert list(file.keys()) == [name]
        assert file.metadata() == {name: name}
    assert list(read_header(path).tensors) == [name]
