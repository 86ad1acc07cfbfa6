"""SHA-256 of files before and after is hashlib's, whatever is written when."""

import hashlib
import os
import random
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from dora_export import extensions, fused
from dora_export.onnx import hashing
from dora_export.onnx.hashing import Digests, Sha256

SIZES = (0, 1, 55, 56, 63, 64, 65, 119, 120, 127, 128, 129, 1000, 64 * 40)


@pytest.fixture(params=["compiled", "library"])
def kernel(request, monkeypatch):
    if request.param == "library":
        monkeypatch.setenv(extensions.SWITCH, "numpy")
    assert fused.digests_two() == (request.param == "compiled") or not fused.digests_two()


def said(data):
    return hashlib.sha256(data).hexdigest()


@pytest.mark.usefixtures("kernel")
def test_two_messages_side_by_side_have_their_own_digests():
    rng = random.Random(0)
    for one, other in [(a, b) for a in SIZES for b in SIZES]:
        messages = [os.urandom(one), os.urandom(other)]
        arrays = [np.frombuffer(m, np.uint8) for m in messages]
        digests, at = (Sha256(), Sha256()), [0, 0]
        while at[0] < one or at[1] < other:
            parts = []
            for i, array in enumerate(arrays):
                count = 64 * rng.randrange(6)
                parts.append(array[at[i] : at[i] + count])
                at[i] += count
            digests[0].update(parts[0], digests[1], parts[1])
        assert [d.hexdigest() for d in digests] == [said(m) for m in messages]


def test_what_is_no_two_messages_is_refused():
    if not fused.digests_two():
        # Such a processor hashes with the library, and nothing calls what is tested here.
        pytest.skip("this processor has no SHA instructions, or there is no compiled kernel")
    state, blocks, none = bytearray(32), np.zeros(64, np.uint8), np.empty(0, np.uint8)
    for wrong in [
        (state, blocks, state, blocks),
        (state, blocks[:63], bytearray(32), none),
        (bytearray(31), none, state, blocks),
        (state, none, bytearray(32), blocks[:1]),
    ]:
        with pytest.raises(ValueError, match="sha256_two"):
            fused.digest_two(*wrong)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("sizes", [(0, 700), (128, 256), (1000, 5), (640, 641)])
def test_files_are_hashed_as_they_are_written(tmp_path, monkeypatch, sizes):
    """Not a byte is taken before it is said to be there, in whatever order that is said."""
    monkeypatch.setattr(hashing, "CHUNK", 128)
    before = [tmp_path / f"before{i}" for i in range(2)]
    after = [tmp_path / f"after{i}" for i in range(2)]
    for path, nbytes in zip(before, sizes[::-1], strict=True):
        path.write_bytes(os.urandom(nbytes))
    contents = [os.urandom(nbytes) for nbytes in sizes]
    for path, content in zip(after, contents, strict=True):
        path.write_bytes(bytes(len(content)))
    with Digests(before, after, sizes) as digests:
        time.sleep(0.02)  # long enough to read all of them, as they are by now
        for file in (1, 0):
            places = list(range(0, sizes[file], 50))
            random.Random(file).shuffle(places)
            for first in places:
                with after[file].open("r+b") as opened:
                    opened.seek(first)
                    opened.write(contents[file][first : first + 50])
                digests.finished(file, first, min(first + 50, sizes[file]))
        assert digests.results() == (
            [said(p.read_bytes()) for p in before],
            [said(c) for c in contents],
        )


def test_hashing_ends_with_what_it_goes_along_with(tmp_path):
    never = tmp_path / "never"
    with pytest.raises(ZeroDivisionError), Digests([never], [never], [9]):
        raise ZeroDivisionError
    (tmp_path / "empty").touch()
    endless = [Path("/dev/zero")]
    with pytest.raises(ZeroDivisionError), Digests(endless, [tmp_path / "empty"], [0]):
        raise ZeroDivisionError


def test_a_file_that_cannot_be_read_is_told(tmp_path):
    with Digests([tmp_path / "none"], [], []) as digests, pytest.raises(OSError, match="none"):
        digests.results()


def test_one_writer_waits_for_hashing_that_is_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(hashing, "CHUNK", 128)
    monkeypatch.setattr(hashing, "BEHIND", 256)
    path, content = tmp_path / "file", os.urandom(2560)
    path.write_bytes(content)
    may_go_on, update = threading.Semaphore(0), Sha256.update
    monkeypatch.setattr(Sha256, "update", lambda *given: may_go_on.acquire() and update(*given))
    more, ended = [True], []

    def write(digests):
        digests.keep_up(lambda: more[0])
        ended.append(len(ended))

    with Digests([], [path], [2560]) as digests:
        write(digests)  # nothing is there to be hashed
        digests.finished(0, 0, 1024)
        waiting = threading.Thread(target=write, args=(digests,))
        waiting.start()
        while not digests._waiting.locked():
            time.sleep(0.001)
        write(digests)  # another one waits
        assert ended == [0, 1]
        may_go_on.release(4)  # the fifth chunk is in work, 384 bytes are behind
        waiting.join(0.1)
        assert waiting.is_alive()
        may_go_on.release()
        waiting.join(10)
        assert ended == [0, 1, 2]
        may_go_on.release(99)
        digests.finished(0, 1152, 2560)
        write(digests)  # hashing waits for what is still to come
        digests.finished(0, 1024, 1152)
        assert digests.results() == ([], [said(content)])
    more[0] = False
    with Digests([], [path], [2560]) as digests:
        digests.finished(0, 0, 2560)
        write(digests)  # it is behind, but there is no more to write
        may_go_on.release(99)
