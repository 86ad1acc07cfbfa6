"""Files made to do harm: each is refused in little time and little memory."""

import struct

import pytest

from dora_export import limits
from tests.measured import measured

MB = 1 << 20
MOST_MEMORY = 300 * MB
MOST_SECONDS = 30  # of a busy machine; the slowest takes 4 on an idle one
EMPTY = '"dtype":"U8","shape":[0],"data_offsets":[0,0]'
SOME = 3 * 10**6  # more than any entry may have: what follows is not read
ALL = limits.HEADER_BYTES - 100


def tensors(count):
    return ",".join(f'"{i:x}":{{{EMPTY}}}' for i in range(count))


def metadata(text):
    return f'{{"__metadata__":{{"a":"{text}"}}}}'


HEADERS = {
    "blanks": (lambda: "{" + " " * ALL, "not JSON"),
    "blanks behind it": (lambda: "{}" + " " * ALL + "x", "something follows"),
    "a long name": (lambda: f'{{"{"n" * SOME}":0}}', "more than 20000 characters"),
    "a long number": (lambda: f'{{"w":{"1" * SOME}}}', "more than 20000 characters"),
    "a long shape": (lambda: f'{{"w":{{"shape":[{"0," * SOME}0]}}}}', "more than 20000 characters"),
    "lists": (lambda: f'{{"w":[{"[]," * SOME}0]}}', "more than 20000 characters"),
    "objects": (lambda: f'{{"w":[{"{}," * SOME}0]}}', "more than 20000 characters"),
    "depth": (lambda: '{"w":' + "[" * SOME, "nested too deeply"),
    "depth of objects": (lambda: '{"w":' + '{"a":' * SOME, "nested too deeply"),
    "wide characters": (lambda: f'{{"w":"{"🦜" * SOME}"}}', "more than 20000"),
    "metadata": (lambda: metadata("x" * ALL), "more than 10000000 characters"),
    "wide metadata": (lambda: metadata("🦜" * (ALL // 4)), "more than 10000000 characters"),
    "entries of metadata": (
        lambda: '{"__metadata__":{' + ",".join(f'"{i}":""' for i in range(60_000)) + "}}",
        "more than 50000 entries",
    ),
}
TENSORS = {
    "more tensors than may be": (lambda: f"{{{tensors(500_000)}}}", "more than 300000 tensors"),
    "as many tensors as may be": (lambda: f"{{{tensors(limits.HEADER_TENSORS)}}}", ""),
}


@pytest.mark.parametrize("case", HEADERS)
def test_hostile_header_takes_little_memory_and_time(case, tmp_path):
    check_header(tmp_path, *HEADERS[case])


@pytest.mark.nightly
@pytest.mark.parametrize("case", TENSORS)
def test_header_of_many_tensors_takes_little_memory_and_time(case, tmp_path):
    check_header(tmp_path, *TENSORS[case])


def check_header(tmp_path, make, reason):
    text = make().encode()[: limits.HEADER_BYTES]
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)))
        file.write(text)
    found = measured(
        f"read_header(Path({str(path)!r}))",
        imports="from dora_export.storage.safetensors import read_header",
    )
    assert reason in found.said, found.said[:500]
    assert bool(found.said) == bool(reason)
    assert found.peak <= MOST_MEMORY
    assert found.seconds <= MOST_SECONDS
    print(f"\n{found.peak / MB:.0f} MB, {found.seconds:.2f} s")
