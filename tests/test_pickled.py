"""Pickled files made to do harm: nothing is executed, unpacked or believed."""

import io
import os
import pickle
import struct
import zipfile

import pytest
import torch

from dora_export import limits
from dora_export.errors import InputError
from dora_export.storage import read_tensors
from tests.measured import measured

MB = 1 << 20
STATE = {"w": torch.arange(6.0).reshape(2, 3), "x": torch.ones(4)}


def saved(path, state=STATE, *, zipped=True):
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    return path


def rezipped(path, change=lambda name, data: data, compression=zipfile.ZIP_STORED, extra=()):
    """Write an archive anew, some records changed, without alignment."""
    with zipfile.ZipFile(path) as archive:
        records = [(name, archive.read(name)) for name in archive.namelist()]
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in records:
            archive.writestr(name, change(name, data))
        for name, data in extra:
            archive.writestr(name, data)
    return path


def refused(path, reason):
    with pytest.raises(InputError, match=reason) as refusal:
        read_tensors(path, allow_pickle=True)
    assert "\n" not in str(refusal.value)
    assert "weights_only" not in str(refusal.value)


class Code:
    """Unpickling it runs a command."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("hidden", ["alone", "beside tensors", "nested"])
def test_code_is_never_executed(zipped, hidden, tmp_path):
    marker = tmp_path / "executed"
    code = Code(marker)
    state = {
        "alone": code,
        "beside tensors": STATE | {"z": code},
        "nested": {"a": [({"b": code},)]},
    }
    saved(tmp_path / "x.bin", state[hidden], zipped=zipped)
    refused(tmp_path / "x.bin", r"restricted loader refuses it \(it asks for (posix|nt)\.system")
    assert not marker.exists()
    pickle.loads(pickle.dumps(code))  # it would have been
    assert marker.exists()


@pytest.mark.parametrize("opcode", [b"cos\nsystem\n", b"cbuiltins\neval\n", b"ccode\ninteract\n"])
def test_bare_pickles_with_code_are_refused(opcode, tmp_path):
    (tmp_path / "x.pt").write_bytes(b"\x80\x02" + opcode + b"(S'true'\ntR.")
    refused(tmp_path / "x.pt", "not a file saved by torch|restricted loader")


def test_records_that_are_compressed_are_refused_before_they_are_unpacked(tmp_path):
    path = saved(tmp_path / "x.bin")
    bomb = (("x/data/9", bytes(200 * MB)),)
    rezipped(path, compression=zipfile.ZIP_DEFLATED, extra=bomb)
    assert path.stat().st_size < MB
    found = measured(
        f"read_tensors(Path({str(path)!r}), allow_pickle=True)",
        imports="import torch\nfrom dora_export.storage import read_tensors",
    )
    assert "is compressed. Do not trust it" in found.said
    assert found.peak < 20 * MB


def test_code_of_a_pickle_that_is_too_long_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "PICKLE_BYTES", 100)
    refused(saved(tmp_path / "x.bin"), "bytes of pickle, more than any model has")
    refused(saved(tmp_path / "y.bin", zipped=False), "not a file saved by torch")


@pytest.mark.parametrize(
    ("zipped", "opcode"),
    [
        pytest.param(z, o, marks=[pytest.mark.nightly] * (z != (o in (b"]", b"("))))
        for z in (True, False)
        for o in (b"]", b"}", b"\x8f", b"(")
    ],
)
def test_pickle_that_makes_millions_of_objects_is_refused_in_little_memory(
    zipped, opcode, tmp_path
):
    code = b"\x80\x02" + opcode * (15 * 10**6) + b"."
    path = saved(tmp_path / "x.bin", zipped=zipped)
    if zipped:
        rezipped(path, lambda name, data: code if name.endswith("data.pkl") else data)
    else:
        path.write_bytes(code)
    found = measured(
        f"read_tensors(Path({str(path)!r}), allow_pickle=True)",
        imports="from dora_export.storage import read_tensors",
    )
    assert "more opcodes than any model has" in found.said
    assert found.peak < 60 * MB


def test_directory_of_too_many_records_is_refused_before_it_is_read(tmp_path, monkeypatch):
    path = rezipped(saved(tmp_path / "x.bin"), extra=[(f"y/{i}", b"") for i in range(99)])
    monkeypatch.setattr(limits, "ZIP_DIRECTORY_BYTES", 4000)
    refused(path, "bytes of directory, more than any model has")


def test_directory_that_two_readers_could_see_in_two_ways_is_refused(tmp_path):
    path = saved(tmp_path / "x.bin")
    content = path.read_bytes()
    other = io.BytesIO()
    with zipfile.ZipFile(other, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", bytes(MB))
    path.write_bytes(content + other.getvalue())  # zipfile takes what stands before for a preface
    refused(path, "its directory is not where it says")


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        (8, 8, "is compressed"),  # method of the first record
        (6, 1, "is encrypted"),
        (40, 0x7FFFFFFF, "ends after the file"),  # the place of the last one, which is not read
    ],
)
def test_records_that_torch_does_not_write_are_refused(field, value, reason, tmp_path):
    path = rezipped(saved(tmp_path / "x.bin"))
    content = bytearray(path.read_bytes())
    at = (content.rindex if field == 40 else content.index)(b"PK\x01\x02") + 2
    struct.pack_into("<I" if field == 40 else "<H", content, at + field, value)
    path.write_bytes(content)
    refused(path, reason)


def test_archives_of_another_zip_version_are_refused(tmp_path):
    path = tmp_path / "model.bin"
    saved(path)
    data, entry = bytearray(path.read_bytes()), b"PK\x01\x02"
    at = data.find(entry)
    while at >= 0:
        struct.pack_into("<H", data, at + 6, 99)  # the version needed to read the record
        at = data.find(entry, at + 4)
    path.write_bytes(data)
    refused(path, r"zip file version 9\.9")


@pytest.mark.parametrize("zipped", [True, False])
def test_views_that_repeat_elements_are_refused(zipped, tmp_path):
    wide = torch.ones(1).expand(1 << 20, 1 << 20)  # 4 bytes that show 4 TB
    refused(saved(tmp_path / "x.bin", {"w": wide}, zipped=zipped), "'w' repeats its elements")


def test_many_views_in_another_order_of_one_storage_are_refused(tmp_path):
    shared = torch.zeros(500, 500)
    refused(saved(tmp_path / "x.bin", {f"{i}": shared.T for i in range(9)}), "than the file has")
    tied = {f"{i}": shared for i in range(9)} | {"t": shared.T}
    assert len(read_tensors(saved(tmp_path / "y.bin", tied), allow_pickle=True)) == 10


ALL = """
import torch
from dora_export.storage import read_tensors

def read_all(paths):
    said = []
    for path in paths:
        try:
            read_tensors(Path(path), allow_pickle=True)
            said.append("read")
        except DoraExportError as error:
            said.append(str(error))
    raise DoraExportError(chr(10).join(said))
"""


def test_storages_of_absurd_size_are_refused_in_little_memory(tmp_path):
    """The opcodes say how many elements a storage has; so do the shapes."""
    paths = []
    for count in (10**9, 2**40, 2**62, -1):
        number = b"\x8a\x08" + struct.pack("<q", count)

        def change(name, data, number=number):
            if not name.endswith(("data.pkl", ".pt")):
                return data
            assert data.count(b"K\x4d") >= 2  # BININT1 77: the storage's size, the shape's
            return data.replace(b"K\x4d", number)

        paths.append(saved(tmp_path / f"{count}.bin", {"w": torch.zeros(77)}))
        rezipped(paths[-1], change)
        paths.append(saved(tmp_path / f"{count}.pt", {"w": torch.zeros(77)}, zipped=False))
        paths[-1].write_bytes(change(".pt", paths[-1].read_bytes()))
    found = measured(f"read_all({[str(p) for p in paths]})", imports=ALL, space=64 << 30)
    said = found.said.splitlines()
    assert len(said) == 8
    assert all("refuses it" in s or "more bytes than the file has" in s for s in said), said
    assert found.peak < 60 * MB


def test_damage_anywhere_is_one_refusal_or_the_same_tensors(tmp_path):
    """Bytes changed at every place of both formats, a few at a time."""
    for zipped in (True, False):
        path = saved(tmp_path / "x.bin", zipped=zipped)
        whole = path.read_bytes()
        for at in range(0, len(whole), 11):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :])
            try:
                read_tensors(path, allow_pickle=True)
            except InputError:
                continue
