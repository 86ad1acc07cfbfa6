"""The journal of an interrupted run, as anybody could have written it."""

import json
import os
import shutil

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dora_export
from dora_export import api, limits
from dora_export.writers import journal
from dora_export.writers.journal import FORMAT, FORMAT_LABEL, decode, encode
from dora_export.writers.staging import MARK
from tests import small

PARTIAL = ".out.dora_export-partial"
IDENTITY = {"identity": {FORMAT_LABEL: FORMAT, "a": "b"}}
RECORDS = [
    {"done": 3}, {"done": []}, {"done": {"x": 3}}, {"done": {"x": [3]}}, {"done": {"x": [[1]]}},
    {"done": {"x": [[-1, 3]]}}, {"done": {"x": [[0, 1 << 63]]}},
    {"done": {"x": [[0, 10**400]]}}, {"done": {"x": [["0", "3"]]}}, {"done": {"x": [[0, 1.5]]}},
    {"done": {"x": [[True, 3]]}}, {"lost": 3}, {"lost": {"x": 1}}, {"done": None, "lost": None},
]  # fmt: skip
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=12,
)


@pytest.mark.parametrize("record", RECORDS, ids=lambda r: json.dumps(r)[:40])
def test_what_follows_a_record_that_is_none_of_ours_does_not_count(record):
    good = encode(IDENTITY) + encode({"done": {"x": [[0, 4]]}})
    found = decode(good + encode(record) + encode({"done": {"x": [[4, 9]]}}))
    assert {n: list(r) for n, r in found.done.items()} == {"x": [(0, 4)]}
    assert found.nbytes == len(good)


def test_damaged_record_ends_what_counts():
    """A disk may give other bytes that are JSON as well, and name bytes that nobody has written."""
    good = encode(IDENTITY) + encode({"done": {"x": [[0, 4]]}})
    line = encode({"done": {"x": [[4, 7]]}})
    assert list(decode(good + line).done["x"]) == [(0, 7)]
    found = decode(good + line.replace(b"[4,7]", b"[4,9]"))
    assert list(found.done["x"]) == [(0, 4)]
    assert found.nbytes == len(good)
    damaged = encode(IDENTITY).replace(b'"b"', b'"c"')
    assert damaged != encode(IDENTITY)
    assert decode(damaged) is None


@pytest.mark.parametrize("first", [{}, {"identity": 3}, {"identity": {"a": 1}}, {"identity": []}])
def test_journal_without_an_identity_says_nothing(first):
    assert decode(encode(first)) is None


@settings(suppress_health_check=[HealthCheck.too_slow])  # on a busy machine, drawing JSON is
@given(st.lists(st.fixed_dictionaries({}, optional={"identity": JSON, "done": JSON, "lost": JSON})))
def test_any_records_are_read_without_an_error(records):
    decode(b"".join(map(encode, [IDENTITY, *records])))


def test_record_that_is_nested_for_ever_or_no_json_ends_it():
    for text in (b"[" * 100_000, b"{", b"\xff", b"1" * 5000):
        line = journal._digest(text) + b" " + text + b"\n"
        assert decode(encode(IDENTITY) + line).nbytes == len(encode(IDENTITY))


def interrupted(at, monkeypatch):
    """Leave staged work of a merge that ended in the middle."""
    small.write_pair(at)

    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(api, "write_small", stop)
        with pytest.raises(KeyboardInterrupt):
            dora_export.merge(at / "base", at / "adapter", at / "out")
    return at / PARTIAL


def test_staged_file_with_a_second_name_is_not_written_into(tmp_path, monkeypatch):
    """Someone may have put a file of the user's there, under a hard link."""
    staged = interrupted(tmp_path, monkeypatch)
    precious = tmp_path / "precious"
    file = staged / "model.safetensors"
    shutil.copy(file, precious)
    with precious.open("r+b") as opened:
        opened.write(b"precious")
    file.unlink()
    os.link(precious, file)
    before = precious.read_bytes()
    dora_export.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert precious.read_bytes() == before
    tensors = small.base_tensors()
    small.check_merged(tmp_path / "out", tensors, small.adapter_tensors(tensors))


@pytest.mark.parametrize("more", [-100, 100])
def test_staged_file_of_another_size_is_written_anew(tmp_path, monkeypatch, more):
    staged = interrupted(tmp_path, monkeypatch)
    size = (staged / "model.safetensors").stat().st_size
    os.truncate(staged / "model.safetensors", size + more)
    report = dora_export.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out",
                               verify="none")  # fmt: skip
    assert report.resumed_bytes == 0
    tensors = small.base_tensors()
    small.check_merged(tmp_path / "out", tensors, small.adapter_tensors(tensors))


def test_journal_larger_than_any_run_makes_it_is_as_none(tmp_path, monkeypatch):
    staged = interrupted(tmp_path, monkeypatch)
    with (staged / MARK).open("r+b") as file:
        file.truncate(limits.JOURNAL_BYTES + 1)  # a hole
    report = dora_export.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert report.resumed_bytes == 0
