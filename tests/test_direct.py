"""Writes past the page cache: the same bytes as through it, whatever the system makes of them."""

import errno
import fcntl
import itertools
import os
import struct
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dora_export
from dora_export import engine
from dora_export.errors import OutputError
from dora_export.paged import BOUNCE_BYTES, EDGE_BYTES, PAGE, lies_on_pages, pages_of, placed
from dora_export.tensors import FileRange
from dora_export.writers import direct, edges, files
from dora_export.writers.files import FileSink
from dora_export.writers.ranges import Ranges
from tests import faults, small
from tests.test_engine import write_case


class Device:
    """Plain writes in the place of direct ones, refused unless they are of whole pages.

    Attributes:
        past: Ranges that went past the cache.
        cached: Ranges that went through it.
        answer: Called with the offset and the size of a write past the cache; returns how many
            bytes of it are written, or raises.
    """

    def __init__(self, patch):
        self.past, self.cached = [], []
        self.answer = lambda offset, nbytes: nbytes
        self._pwrite, self._lock = os.pwrite, threading.Lock()
        patch.setattr(direct, "pays", lambda folder: True)
        patch.setattr(direct, "opened", lambda path: os.open(path, os.O_WRONLY))
        patch.setattr(os, "pwrite", self._written)

    def _written(self, descriptor, data, offset):
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE != os.O_WRONLY:
            self._note(self.cached, offset, len(data))
            return self._pwrite(descriptor, data, offset)
        address = np.frombuffer(data, np.uint8).ctypes.data
        if offset % PAGE or len(data) % PAGE or address % PAGE:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        count = self.answer(offset, len(data))
        self._note(self.past, offset, count)
        return self._pwrite(descriptor, data[:count], offset)

    def _note(self, where, offset, nbytes):
        with self._lock:
            where.append((offset, offset + nbytes))


def pages(ranges):
    return {p for start, stop in ranges for p in range(start // PAGE, -(-stop // PAGE))}


@pytest.fixture
def device(monkeypatch):
    monkeypatch.setattr(files, "DIRECT_BYTES", 1)
    monkeypatch.setattr(files, "BOUNCE_BYTES", 3 * PAGE)
    return Device(monkeypatch)


def cut_up(nbytes, seed=0):
    """Odd cuts of a file, among them neighbours within one page and pieces of many pages."""
    draw = np.random.default_rng(seed)
    sizes = draw.choice([1, 37, PAGE - 1, PAGE, 3 * PAGE, 9 * PAGE + 5], 400).cumsum()
    return [0, *sizes[sizes < nbytes].tolist(), nbytes]


def written(folder, content, source=None):
    """Write a file in odd pieces, from several threads, in no order."""
    cuts = cut_up(content.size)
    pieces = list(itertools.pairwise(cuts))
    np.random.default_rng(1).shuffle(pieces)
    with FileSink(folder, ["f"], [content.size]) as sink, ThreadPoolExecutor(3) as pool:

        def put(piece):
            start, stop = (int(n) for n in piece)
            if source is not None:
                sink.copy(0, start, FileRange(source, start, stop - start))
            elif start % 2:  # as it lies in its file
                data = placed(np.empty(stop - start + PAGE, np.uint8), start, stop - start)
                data[:] = content[start:stop]
                sink.write(0, start, data)
            else:
                sink.write(0, start, content[start:stop])

        list(pool.map(put, pieces))
    assert (folder / "f").read_bytes() == content.tobytes()
    return pieces


CONTENT = np.random.default_rng(2).integers(0, 256, 100 * PAGE + 77).astype(np.uint8)


@pytest.mark.parametrize("copied", [False, True], ids=["computed", "copied"])
def test_whole_pages_go_past_the_cache_and_no_others(tmp_path, device, copied):
    source = tmp_path / "source"
    source.write_bytes(CONTENT.tobytes())
    written(tmp_path, CONTENT, source if copied else None)
    assert pages(device.past) == set(range(100))
    assert pages(device.cached) == {100}  # the last is none to its end


def test_little_goes_through_the_cache(tmp_path, device, monkeypatch):
    monkeypatch.setattr(files, "DIRECT_BYTES", 5 * PAGE)
    pieces = written(tmp_path, CONTENT)
    large = [(a, b) for a, b in pieces if b - a >= 5 * PAGE]
    whole = {p for a, b in large for p in range(-(-int(a) // PAGE), int(b) // PAGE)}
    common = {int(a) // PAGE for a, _ in pieces if a % PAGE} - {100}  # put together: whole again
    assert pages(device.past) == whole | common
    assert not pages(device.cached) & pages(device.past)
    assert len(whole) > 30
    assert pages(device.cached)


@pytest.mark.parametrize("short", [PAGE, 512, 100], ids=lambda n: f"{n} bytes at once")
def test_short_writes_are_gone_on_with(tmp_path, device, short):
    device.answer = lambda offset, nbytes: short
    written(tmp_path, CONTENT)
    assert device.past


def test_device_that_wants_more_than_pages_gets_cached_writes(tmp_path, device):
    def answer(offset, nbytes):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    device.answer = answer
    written(tmp_path, CONTENT)
    assert not device.past


def test_nothing_is_copied_for_a_device_once_it_has_refused(tmp_path, device, monkeypatch):
    """What lies otherwise in memory than in the file goes through the cache from where it lies."""

    def answer(offset, nbytes):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    def no_bounce(self, offset, most):
        raise AssertionError("copied")

    device.answer = answer
    half = CONTENT.size // 2 // PAGE * PAGE
    apart = placed(np.empty(half + 2 * PAGE, np.uint8), 1, half)
    apart[:] = CONTENT[half : 2 * half]
    with FileSink(tmp_path, ["f"], [2 * half]) as sink:
        sink.write(0, 0, CONTENT[:half])
        monkeypatch.setattr(FileSink, "_bounce", no_bounce)
        sink.write(0, half, apart)
    assert (tmp_path / "f").read_bytes() == CONTENT[: 2 * half].tobytes()


def test_file_system_without_direct_writes_gets_cached_ones(tmp_path, device, monkeypatch):
    def refuse(path, flags, *mode):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(path, flags, *mode)

    real = os.open
    monkeypatch.undo()  # of the device: the real way to open a file
    monkeypatch.setattr(files, "DIRECT_BYTES", 1)
    monkeypatch.setattr(direct, "pays", lambda folder: True)
    monkeypatch.setattr(os, "open", refuse)
    written(tmp_path, CONTENT)


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
def test_disk_that_fails_is_told_of_and_nothing_stays_open(tmp_path, device, code):
    def answer(offset, nbytes):
        if offset >= 50 * PAGE:
            raise OSError(code, os.strerror(code))
        return nbytes

    device.answer = answer
    before = faults.descriptors()
    with pytest.raises(OutputError, match=os.strerror(code)):
        written(tmp_path, CONTENT)
    assert faults.descriptors() == before


def test_bytes_are_said_to_be_on_the_disk_after_a_sync_that_follows_them(tmp_path, device):
    """A write past the cache may still lie in the device's own, and its blocks be in no inode."""
    told, synced = [], []
    real = os.fsync

    def fsync(descriptor):
        synced.append(list(device.past))
        real(descriptor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        patch.setattr(files, "SYNC_BYTES", 10 * PAGE)
        with FileSink(tmp_path, ["f"], [CONTENT.size], on_synced=told.append) as sink:
            for start in range(0, CONTENT.size, 7 * PAGE):
                sink.write(0, start, CONTENT[start : start + 7 * PAGE])
                before = [list(r["f"]) for r in told]
                assert len(before) <= len(synced)
    assert Ranges([r for one in told for r in one["f"]]).covers(0, CONTENT.size)
    assert pages(synced[-1]) == pages(device.past)


@pytest.mark.parametrize("words", ["the base's own", "odd"])
def test_merge_is_the_same_past_the_cache(tmp_path, device, monkeypatch, words):
    """Whatever the length of the header, and so wherever in a page the tensors begin."""
    write_case(tmp_path, layers=2, out=1100, inputs=700)
    shards = {"max_shard_size": "2MB"} if words == "odd" else {}
    merge(tmp_path, "past", **shards)
    assert sum(b - a for a, b in device.past) > 3_000_000
    with monkeypatch.context() as patch:
        patch.setattr(direct, "pays", lambda folder: False)
        device.past.clear()
        merge(tmp_path, "through", **shards)
    assert not device.past
    assert small.entries(tmp_path / "past") == small.entries(tmp_path / "through")


def test_merge_that_need_not_be_on_the_disk_stays_in_the_cache(tmp_path, device):
    write_case(tmp_path, layers=1, out=300, inputs=200)
    merge(tmp_path, "out", sync=False)
    assert device.cached
    assert not device.past


def test_what_is_read_again_stays_in_the_cache(tmp_path, device):
    with FileSink(tmp_path, ["f"], [CONTENT.size], read_again=True) as sink:
        sink.write(0, 0, CONTENT)
    assert device.cached
    assert not device.past


def test_merged_rows_lie_as_in_their_file(tmp_path, device, monkeypatch):
    """Or they would be copied once more before they can go past the cache."""
    write_case(tmp_path, layers=2, out=1100, inputs=700)
    bounced = []
    real = FileSink._bounce

    def bounce(self, offset, most):
        bounced.append(most)
        return real(self, offset, most)

    monkeypatch.setattr(FileSink, "_bounce", bounce)
    monkeypatch.setattr(files, "DIRECT_BYTES", 64 << 10)
    merge(tmp_path, "out", verify="none")
    copied = sum(b - a for a, b in device.past) - sum(min(n, 2 * PAGE) for n in bounced)
    assert copied > 3_000_000


def merge(at, out, **options):
    return dora_export.merge(at / "base", at / "adapter", at / out, **options)


def test_memory_bound_counts_the_buffers_of_the_writer(tmp_path, device, monkeypatch):
    write_case(tmp_path, layers=2, out=1100, inputs=700)
    monkeypatch.setattr(files, "DIRECT_BYTES", 1)
    monkeypatch.setattr(files, "BOUNCE_BYTES", BOUNCE_BYTES)
    made, real = {}, FileSink._bounce

    def bounce(self, offset, most):
        found = real(self, offset, most)
        made[threading.get_ident()] = self._bounces.buffer.nbytes
        return found

    monkeypatch.setattr(FileSink, "_bounce", bounce)
    report = merge(tmp_path, "out", threads=2)
    with monkeypatch.context() as patch:
        patch.setattr(engine, "BOUNCE_BYTES", 0)
        without = merge(tmp_path, "without", threads=2, dry_run=True)
    assert made
    assert set(made.values()) == {BOUNCE_BYTES}
    assert report.memory_bytes - without.memory_bytes == 3 * BOUNCE_BYTES  # and the main thread's
    with monkeypatch.context() as patch:
        patch.setattr(engine, "EDGE_BYTES", 0)
        without = merge(tmp_path, "without", threads=2, dry_run=True)
    assert report.memory_bytes - without.memory_bytes == EDGE_BYTES


# --- parts of pages ---


def check_what_is_there(sink, path, content, pieces):
    """Everything that is said to be there can be read from the file."""
    found = np.fromfile(path, np.uint8)
    there = [(a, b) for a, b in pieces if sink.has(0, int(a), int(b - a))]
    assert all(np.array_equal(found[a:b], content[a:b]) for a, b in there)
    return there


def test_part_of_a_page_is_there_with_the_rest_of_it_and_not_before(tmp_path, device):
    """Nor is it said to be on the disk: a merge that is killed then would go on without it."""
    synced = []
    # two of three pieces begin with a page
    cuts = [n - n % (PAGE if i % 3 else 1) for i, n in enumerate(cut_up(CONTENT.size)[:-1])]
    pieces = list(itertools.pairwise([*sorted(set(cuts)), CONTENT.size]))
    odd, even = pieces[1::2], pieces[::2]
    with FileSink(tmp_path, ["f"], [CONTENT.size], on_synced=synced.append) as sink:
        for start, stop in odd:
            sink.write(0, start, CONTENT[start:stop])
        path = tmp_path / "f"
        put = Ranges([*odd, (100 * PAGE, CONTENT.size)])  # the last page waits for nothing

        def whole(at):
            start = at // PAGE * PAGE
            return start == at or put.covers(start, min(start + PAGE, CONTENT.size))

        before = [piece for piece in odd if all(map(whole, piece))]
        assert len(before) > 3
        assert check_what_is_there(sink, path, CONTENT, odd) == before
        for start, stop in even[:-1]:
            sink.write(0, start, CONTENT[start:stop])
        assert len(check_what_is_there(sink, path, CONTENT, pieces)) > len(pieces) - 4
        sink.flush()
        assert check_what_is_there(sink, path, CONTENT, pieces) == [
            piece for piece in pieces if piece != even[-1]
        ]
        sink.write(0, even[-1][0], CONTENT[even[-1][0] :])
    assert path.read_bytes() == CONTENT.tobytes()
    assert Ranges(r for one in synced for r in one["f"]) == Ranges([(0, CONTENT.size)])


def test_parts_are_checked_when_their_page_comes(tmp_path, device):
    """Whoever waits for a tensor hears of its last bytes."""
    told = []
    middle = 5 * PAGE + 9
    with FileSink(
        tmp_path, ["f"], [9 * PAGE], on_finished=lambda *found: told.append(found)
    ) as sink:
        sink.write(0, 0, CONTENT[:middle])
        assert not sink.has(0, 0, middle)
        assert sink.has(0, 0, 5 * PAGE)
        told.clear()
        sink.write(0, middle, CONTENT[middle : 9 * PAGE])
        assert (0, 5 * PAGE, 6 * PAGE) in told
        assert sink.has(0, 0, 9 * PAGE)


def test_nobody_is_told_of_a_page_before_it_is_written(tmp_path, device):
    read = []

    def on_finished(file, start, stop):
        if sink.has(file, start, stop - start):
            found = np.fromfile(tmp_path / "f", np.uint8)
            read.append(np.array_equal(found[start:stop], CONTENT[start:stop]))

    with FileSink(tmp_path, ["f"], [9 * PAGE], on_finished=on_finished) as sink:
        for start in range(0, 9 * PAGE, 3 * PAGE // 2):
            sink.write(0, start, CONTENT[start : start + 3 * PAGE // 2])
    assert len(read) == 3 + 3  # pages of two pieces, and pieces that end with one
    assert all(read)


def test_merge_is_checked_with_all_its_parts_in_place(tmp_path, device, monkeypatch):
    """Also with those that wait to the end."""
    write_case(tmp_path, layers=2, out=1100, inputs=700)
    real, waiting = edges.Edges.add, []

    def add(self, *part):
        waiting.append(part)
        return real(self, *part)[0], None

    monkeypatch.setattr(edges.Edges, "add", add)
    report = merge(tmp_path, "out", verify="full")
    assert report.verified == "full"
    assert len(waiting) > 10


@pytest.mark.parametrize("kept", [5 * PAGE, 5 * PAGE + 100])
def test_what_an_earlier_run_has_written_of_a_page_stays(tmp_path, device, kept):
    (tmp_path / "f").write_bytes(CONTENT[:kept].tobytes() + bytes(CONTENT.size - kept))
    with FileSink(tmp_path, ["f"], [CONTENT.size], [Ranges([(0, kept)])]) as sink:
        middle = kept + 3 * PAGE
        sink.write(0, kept, CONTENT[kept:middle])
        assert sink.has(0, 0, middle - middle % PAGE)
        sink.write(0, middle, CONTENT[middle:])
    assert (tmp_path / "f").read_bytes() == CONTENT.tobytes()


def test_parts_are_on_the_disk_after_an_error(tmp_path, device):
    synced = []

    def fail():
        with FileSink(tmp_path, ["f"], [CONTENT.size], on_synced=synced.append) as sink:
            sink.write(0, 100, CONTENT[100 : 7 * PAGE + 3])
            raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="else"):
        fail()
    assert Ranges(r for one in synced for r in one["f"]) == Ranges([(100, 7 * PAGE + 3)])
    found = np.fromfile(tmp_path / "f", np.uint8)
    assert np.array_equal(found[100 : 7 * PAGE + 3], CONTENT[100 : 7 * PAGE + 3])


def test_disk_that_fails_with_the_last_part_is_told_of(tmp_path, device, monkeypatch):
    real = os.pwrite

    def full(descriptor, data, offset):
        if offset == PAGE:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(descriptor, data, offset)

    def write():
        with FileSink(tmp_path, ["f"], [2 * PAGE]) as sink:
            sink.write(0, 0, CONTENT[: PAGE + 5])
            monkeypatch.setattr(os, "pwrite", full)

    before = faults.descriptors()
    with pytest.raises(OutputError, match=os.strerror(errno.ENOSPC)):
        write()
    assert faults.descriptors() == before
    assert not [t for t in threading.enumerate() if t.name == "sync"]


def test_few_pages_wait(tmp_path, device, monkeypatch):
    """However many parts come that nothing is put to."""
    monkeypatch.setattr(edges, "MOST_PAGES", 3)
    data = np.arange(50 * PAGE, dtype=np.uint8)
    with FileSink(tmp_path, ["f"], [data.size]) as sink:
        for start in range(0, data.size, PAGE):
            sink.write(0, start, data[start : start + 10])
        assert len(sink._edges.waiting()) == 3
        for start in range(0, data.size, PAGE):
            sink.write(0, start + 10, data[start + 10 : start + PAGE])
    assert (tmp_path / "f").read_bytes() == data.tobytes()
    assert edges.EDGE_BYTES // (2 * PAGE) == 512


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=6),
       st.integers(0, 30), st.integers(0, 30))  # fmt: skip
def test_ranges_say_what_they_hold(pairs, start, stop):
    ranges = Ranges(pairs)
    held = {n for a, b in pairs for n in range(a, b)}
    asked = set(range(start, stop))
    assert ranges.touches(start, stop) == bool(held & asked)
    assert ranges.covers(start, stop) == (asked <= held)
    assert ranges.nbytes == len(held)


# --- sharing blocks ---


@pytest.mark.parametrize("apart", [0, 1], ids=["alike", "otherwise"])
def test_copied_pages_are_shared_where_they_lie_alike(tmp_path, device, monkeypatch, apart):
    """A file system that shares whole pages, as XFS does."""
    source = tmp_path / "source"
    source.write_bytes(CONTENT.tobytes())
    asked = []

    def ioctl(descriptor, code, request):
        given, start, nbytes, offset = struct.unpack("=qQQQ", request)
        assert code == 0x4020940D
        assert start % PAGE == nbytes % PAGE == offset % PAGE == 0
        asked.append((offset, offset + nbytes))
        os.lseek(descriptor, offset, os.SEEK_SET)
        os.write(descriptor, os.pread(given, nbytes, start))

    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    begin, stop = 5 * PAGE + 100, 80 * PAGE + 9
    with FileSink(tmp_path, ["f"], [CONTENT.size]) as sink:
        sink.write(0, 0, CONTENT[:begin])
        device.past.clear()
        sink.copy(0, begin, FileRange(source, begin - apart, stop - begin))
        assert pages(device.past) & pages(asked) == set()
        sink.write(0, stop, CONTENT[stop:])
    expected = CONTENT.copy()
    expected[begin:stop] = CONTENT[begin - apart : stop - apart]
    assert (tmp_path / "f").read_bytes() == expected.tobytes()
    assert asked == ([] if apart else [(6 * PAGE, 80 * PAGE)])


def test_more_is_handed_over_at_once(tmp_path, device, monkeypatch):
    """Where nothing has to stay within a cache; unless the user says how much."""
    write_case(tmp_path, layers=2, out=1100, inputs=700)
    monkeypatch.setattr(direct, "BLOCK_BYTES", 1_500_000)
    monkeypatch.setattr(direct, "WAITING", 0)
    reports = {
        "direct": merge(tmp_path, "direct"),
        "cached": merge(tmp_path, "cached", sync=False),
        "said": merge(tmp_path, "said", block_bytes=1_000_000),
    }
    memory = {name: report.memory_bytes for name, report in reports.items()}
    assert memory["said"] < memory["direct"] < memory["cached"]


def test_workers_that_wait_for_the_disk_leave_no_processor_idle(tmp_path, device, monkeypatch):
    """More of them than processors; unless the user says how many."""
    write_case(tmp_path, layers=1, out=300, inputs=200)
    started = []
    monkeypatch.setattr(engine, "start", lambda thread: started.append(thread) or thread.start())

    def workers(name, **options):
        started.clear()
        merge(tmp_path, name, verify="none", **options)
        return len(started)

    processors = engine.Resources().workers
    assert workers("direct") == processors + direct.WAITING > processors
    assert workers("said", threads=2) == 2
    assert workers("cached", sync=False) in (processors, 0)  # one works in the caller's thread


# --- with this machine's own file systems ---


def test_real_direct_writes_give_the_same_bytes(tmp_path, monkeypatch):
    if not direct.pays(tmp_path):
        # There the real thing cannot be had; all tests above run on any system, on a device that
        # refuses what a real one does. On CI's ext4 this one runs.
        pytest.skip("the temporary folder's file system is written through the page cache")
    monkeypatch.setattr(files, "DIRECT_BYTES", 1)
    opened, real = [], direct.opened
    monkeypatch.setattr(direct, "opened", lambda path: opened.append(real(path)) or opened[-1])
    written(tmp_path, CONTENT)
    assert None not in opened


def test_memory_and_kernel_file_systems_are_written_through_the_cache():
    assert not direct.pays(Path("/proc"))
    assert direct.pays(Path("/no/such/folder")) == direct.pays(Path("/"))


def test_pages_of_bytes():
    assert pages_of(5, 4 * PAGE) == slice(PAGE - 5, 4 * PAGE - 5)
    assert pages_of(2 * PAGE, PAGE) == slice(0, PAGE)
    assert pages_of(2 * PAGE, PAGE - 1) == slice(0, 0)
    assert pages_of(PAGE - 3, 2) == slice(2, 2)
    data = placed(np.zeros(9 * PAGE, np.uint8), 5, 4 * PAGE)
    assert lies_on_pages(data[PAGE - 5 :])
    assert not lies_on_pages(data)
