"""Output files written piece by piece from many threads, each on the disk when the last is in.

Writing is at the speed of copying: space is reserved first, untouched ranges are copied by the
kernel (shared, on file systems that can), and finished data is sent to the disk while the rest is
still being computed, so that the final sync has little left to do. Whoever keeps a journal is told
which bytes are on the disk, after they are.
"""

from __future__ import annotations

import ctypes
import errno
import os
import queue
import sys
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from dora_export import fused
from dora_export.errors import OutputError, VerifyError
from dora_export.machine import advice, start
from dora_export.paged import BOUNCE_BYTES, PAGE, lies_on_pages, pages_of, placed
from dora_export.tensors import FileRange
from dora_export.writers import direct
from dora_export.writers.edges import Edges
from dora_export.writers.ranges import Ranges

SYNC_BYTES = 128 << 20  # unsynced bytes of one file after which a sync starts in the background
COPY_CHUNK = 8 << 20
# Written to the page cache at once. More makes Linux look for large runs of free memory, which on a
# virtual machine its host has mostly taken back: 2.2 GB written 64 MB at a time took ten times as
# long as in pieces of this size, which ``cp`` writes as well.
WRITE_BYTES = 128 << 10
# Fewer bytes than these go through the page cache even where others go past it: the disk is asked
# once for each write past the cache, and takes about as long for a page as for many.
DIRECT_BYTES = 256 << 10
# Finished files that may wait for their sync, open: workers that are faster than the disk wait, and
# a model of hundreds of shards stays below any limit on open files.
WAITING = 8


Synced = Callable[[Mapping[str, Ranges]], None]
Finished = Callable[[int, int, int], None]  # position of a file, first byte, one past the last


class _File:
    """One output file: opened when its first byte comes, closed and synced when all are in.

    Attributes:
        name: What ``on_synced`` calls it.
        held: Bytes that were on the disk before this run.
        finished: Bytes that are held, or have been written.
        pending: Of those, the ones that no sync has been started for.
        queued: A sync has been asked for that has not begun.
        failed: A sync has failed: which bytes are on the disk cannot be known any more.
        direct: A second descriptor, for writes past the page cache, where they are wanted and can
            be had; as long as ``descriptor``.
    """

    def __init__(
        self, path: Path, name: str, nbytes: int, held: Ranges, *, past_cache: bool
    ) -> None:
        self.path, self.name, self.nbytes, self.held = path, name, nbytes, held
        self.lock = threading.Lock()
        self.made = False
        self.descriptor: int | None = None
        self.direct: int | None = None
        self.past_cache = past_cache and nbytes >= DIRECT_BYTES
        self.finished, self.pending = Ranges(held), Ranges()
        self.queued = self.synced_once = self.failed = False

    @property
    def complete(self) -> bool:
        return self.finished.covers(0, self.nbytes)

    def open(self) -> int:
        with self.lock:
            if self.descriptor is None:
                flags = os.O_RDWR | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
                if self.held:
                    flags |= getattr(os, "O_NOFOLLOW", 0)
                elif not self.made:
                    flags |= os.O_CREAT | os.O_EXCL
                descriptor = os.open(self.path, flags, 0o666)
                try:
                    if not self.made and not self.held:
                        _reserve(descriptor, self.nbytes)
                    self.direct = direct.opened(self.path) if self.past_cache else None
                except OSError:
                    os.close(descriptor)
                    raise
                self.made, self.descriptor = True, descriptor
            return self.descriptor

    def close(self) -> None:
        """Close the file, if it is open."""
        descriptors = (self.direct, self.descriptor)
        self.direct = self.descriptor = None
        for descriptor in descriptors:
            if descriptor is not None:
                os.close(descriptor)

    def finish(self, ranges: Iterable[tuple[int, int]]) -> bool:
        """Note that bytes have been written; return whether it is time to ask for a sync."""
        with self.lock:
            for start, stop in ranges:
                self.finished.add(start, stop)
                self.pending.add(start, stop)
            due = not self.queued and (self.complete or self.pending.nbytes >= SYNC_BYTES)
            self.queued = self.queued or due
            return due

    def rest(self) -> None:
        """Close the file until more bytes come, unless it is complete and waits for its sync."""
        with self.lock:
            if not self.complete:
                self.close()


class FileSink:
    """Files of known sizes that pieces are written into, in any order, from any thread.

    Use as a context manager; on leaving without an error all files are complete and on the disk.
    On leaving with an error what is finished is put on the disk, and told of, as well.

    Args:
        folder: An existing folder.
        names: Files to make in it, or in sub-folders ("/" between the parts), which are made too;
            none may exist, but for those of which ``held`` has bytes.
        sizes: Their sizes in bytes.
        held: For each file the bytes that are on the disk already, if any.
        on_synced: Called from a thread of its own with names of files and ranges whose bytes have
            come to the disk, and after that the file's entry in its folder and the folder's own.
        sync: Put files on the disk; without it they are complete, and the system writes them out
            when it likes. ``on_synced`` is never called then.
        read_again: Whether all of it will be read right after: it is kept in the page cache.
        on_finished: Called from any thread with bytes that can be read from now on.
    """

    def __init__(
        self,
        folder: Path,
        names: Sequence[str],
        sizes: Sequence[int],
        held: Sequence[Ranges] = (),
        on_synced: Synced = lambda _: None,
        *,
        sync: bool = True,
        read_again: bool = False,
        on_finished: Finished = lambda *_: None,
    ) -> None:
        held = held or [Ranges() for _ in names]
        # What must be on the disk goes there at once. What need not is sooner in the page cache.
        past_cache = sync and not read_again and direct.pays(folder)
        self._folder = folder
        self._bounces = threading.local()
        self._files = [
            _File(folder / name, name, nbytes, ranges, past_cache=past_cache)
            for name, nbytes, ranges in zip(names, sizes, held, strict=True)
        ]
        self._edges = Edges(sizes, held)
        self._on_synced, self._on_finished = on_synced, on_finished
        self._sync_wanted = sync
        self._to_sync: queue.Queue[_File | None] = queue.Queue(WAITING)
        self._failure: BaseException | None = None
        self._syncer = threading.Thread(target=self._sync_files, name="sync", daemon=True)

    def __enter__(self) -> FileSink:
        for parent in dict.fromkeys(file.path.parent for file in self._files):
            make_folder(parent)
        start(self._syncer)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.flush()
        except BaseException as failed:  # raised below, unless another error is on its way
            self._failure = self._failure or failed
        for file in self._files:
            self._to_sync.put(file)
        self._to_sync.put(None)
        self._syncer.join()
        for file in self._files:
            with suppress(OSError):  # nothing of it counts: an error is on its way
                file.close()
        if kind is None:
            self._check_sync()
            unfinished = [f.path.name for f in self._files if not f.complete]
            assert not unfinished, f"Bug: bytes were never written: {unfinished}"

    def holds(self, file: int, offset: int, nbytes: int) -> bool:
        """Return whether bytes were on the disk before this run."""
        return self._files[file].held.covers(offset, offset + nbytes)

    def has(self, file: int, offset: int, nbytes: int) -> bool:
        """Return whether bytes can be read: from a run before, or written by this one.

        Parts of pages may wait for the rest of them: ``flush`` writes what is there.
        """
        target = self._files[file]
        with target.lock:
            return target.finished.covers(offset, offset + nbytes)

    def write_header(self, file: int, header: bytes) -> None:
        """Make a file, reserve its space and put its first bytes into place.

        All files can be made before the first piece, so that a full disk shows at once: a file
        that waits for pieces is not held open.

        Raises:
            OutputError: The disk is full, or writing fails.
            VerifyError: It is held from a run before, and is not what that wrote.
        """
        if self.holds(file, 0, len(header)):
            _check_held(self._files[file].path, header)
            return
        self.write(file, 0, np.frombuffer(header, np.uint8))
        target = self._files[file]
        try:
            target.rest()
        except OSError as error:
            raise refusal(target.path, error) from error

    def flush(self) -> None:
        """Write what waits for the rest of its page; called when no more comes.

        Raises:
            OutputError: The disk is full, or writing fails.
        """
        for page in self._edges.waiting():
            target = self._files[page.file]
            try:
                descriptor = target.open()
                for start, stop in page.put:
                    part = page.data[start - page.offset : stop - page.offset]
                    self._put_cached(target, descriptor, start, part)
            except OSError as error:
                raise refusal(target.path, error) from error
            self._edges.drop(page)
            for start, stop in page.put:
                self._finish(page.file, start, stop)

    def write(self, file: int, offset: int, data: NDArray[np.uint8]) -> None:
        """Put bytes into an output file.

        Raises:
            OutputError: The disk is full, or writing fails.
        """
        self._check_sync()
        data = data.reshape(-1)
        self._put(file, offset, data)
        self._finish(file, offset, offset + data.size)

    def put(self, file: int, offset: int, stride: int, rows: NDArray[np.uint8]) -> None:
        """Put rows of bytes into an output file, ``stride`` bytes apart; ``finish`` tells of them.

        Raises:
            OutputError: The disk is full, or writing fails.
        """
        self._check_sync()
        target = self._files[file]
        try:
            descriptor = target.open()
            rows = np.ascontiguousarray(rows)
            if rows.shape[1] == stride or len(rows) == 1:
                self._put(file, offset, rows.reshape(-1))
                return
            with target.lock:
                if not fused.write_rows(descriptor, offset, stride, rows):
                    for row in rows:
                        self._put_at(descriptor, offset, row.data)
                        offset += stride
        except OSError as error:
            raise refusal(target.path, error) from error

    def finish(self, file: int, offset: int, nbytes: int) -> None:
        """Note that all bytes of a range have been put into place."""
        self._finish(file, offset, offset + nbytes)

    def copy(self, file: int, offset: int, source: FileRange) -> None:
        """Put a range of another file into an output file.

        Raises:
            InputError: The source ends too early.
            OutputError: The disk is full, or writing fails.
        """
        self._check_sync()
        target = self._files[file]
        try:
            descriptor = target.open()
        except OSError as error:
            raise refusal(target.path, error) from error
        if target.direct is None or not target.past_cache:
            done = _kernel_copy(source, descriptor, offset)
            self._copy(file, offset, source, done, source.nbytes)
        else:
            shared = direct.share(source, descriptor, offset)
            self._copy(file, offset, source, 0, shared.start)
            self._copy(file, offset, source, shared.stop, source.nbytes)
        # Only now, in one go: a file is closed as soon as all of its bytes are said to be in.
        self._finish(file, offset, offset + source.nbytes)

    def _copy(self, file: int, offset: int, source: FileRange, start: int, stop: int) -> None:
        """Read bytes ``[start, stop)`` of a source, and write them."""
        while start < stop:
            chunk = self._bounce(offset + start, stop - start)
            source.read(start, chunk)
            self._put(file, offset + start, chunk)
            start += chunk.size

    def _put(self, file: int, offset: int, data: NDArray[np.uint8]) -> None:
        """Put bytes into a file: whole pages past the page cache, where that pays."""
        target = self._files[file]
        try:
            descriptor = target.open()
            if target.direct is None:
                self._put_cached(target, descriptor, offset, data)
                return
            pages = pages_of(offset, data.size)
            self._put_edge(file, descriptor, offset, data[: pages.start])
            self._put_edge(file, descriptor, offset + pages.stop, data[pages.stop :])
            if data.size < DIRECT_BYTES:
                self._put_cached(target, descriptor, offset + pages.start, data[pages])
            else:
                self._put_pages(target, descriptor, offset + pages.start, data[pages])
        except OSError as error:
            raise refusal(target.path, error) from error

    def _put_edge(self, file: int, descriptor: int, offset: int, data: NDArray[np.uint8]) -> None:
        """Put a part of a page into a file together with the rest of it, when that is there."""
        if not data.size:
            return
        target = self._files[file]
        waits, page = self._edges.add(file, offset, data)
        if not waits:
            self._put_cached(target, descriptor, offset, data)
        if page is not None:
            self._put_pages(target, descriptor, page.offset, page.data)
            self._edges.drop(page)
            self._finish(file, page.offset, page.offset + PAGE)

    def _put_pages(
        self, target: _File, descriptor: int, offset: int, data: NDArray[np.uint8]
    ) -> None:
        """Put whole pages into a file."""
        done = 0
        while done < data.size:
            part = data[done:]
            if target.past_cache and not lies_on_pages(part):  # copy it to where it can go from
                part = self._bounce(offset + done, part.size)
                np.copyto(part, data[done : done + part.size])
            written = self._put_past(target, offset + done, part) if lies_on_pages(part) else 0
            self._put_cached(target, descriptor, offset + done + written, part[written:])
            done += part.size

    def _put_past(self, target: _File, offset: int, data: NDArray[np.uint8]) -> int:
        """Put whole pages on the disk; return how many bytes went, from the first on."""
        done = 0
        while done < data.size and target.direct is not None and target.past_cache:
            try:
                done += _pwrite(target.direct, data[done:].data, offset + done)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                target.past_cache = False  # a device that asks for more than whole pages
            if done % PAGE:
                break  # a short write: what follows it begins within a page
        return done

    def _put_cached(
        self, target: _File, descriptor: int, offset: int, data: NDArray[np.uint8]
    ) -> None:
        # The kernel lets one writer into a file at a time and lets others spin: queue here.
        with target.lock:
            self._put_at(descriptor, offset, data.data)

    def _bounce(self, offset: int, most: int) -> NDArray[np.uint8]:
        """Return this thread's buffer for bytes of a file, up to a page's end if not to the last.

        Args:
            offset: Where in the file they begin.
            most: How many there are.
        """
        if not hasattr(self._bounces, "buffer"):
            self._bounces.buffer = np.empty(BOUNCE_BYTES, np.uint8)
        most = min(most, BOUNCE_BYTES - PAGE - offset % PAGE)
        return placed(self._bounces.buffer, offset, most)

    def _put_at(self, descriptor: int, offset: int, view: memoryview) -> None:
        done = 0
        while done < len(view):
            at = offset + done
            done += _pwrite(descriptor, view[done : done + WRITE_BYTES - at % WRITE_BYTES], at)

    def _finish(self, file: int, start: int, stop: int) -> None:
        target = self._files[file]
        if target.finish(self._edges.outside(file, start, stop)):
            self._to_sync.put(target)
        self._check_sync()
        self._on_finished(file, start, stop)

    def _check_sync(self) -> None:
        if self._failure is not None:
            raise self._failure  # of a sync: no use in going on

    def _sync_files(self) -> None:
        while (file := self._to_sync.get()) is not None:
            try:
                self._sync(file)
            except BaseException as error:  # raised where the next bytes are finished
                self._failure = self._failure or error

    def _sync(self, file: _File) -> None:
        """Put what is finished on the disk, then tell of it: never of bytes that came later."""
        with file.lock:
            ranges, file.pending, file.queued = file.pending, Ranges(), False
            descriptor, complete = file.descriptor, file.complete
        if descriptor is None or not ranges or file.failed:
            return
        if self._sync_wanted:
            try:
                os.fsync(descriptor)
            except OSError as error:
                # The kernel forgets which bytes it could not write: a later sync proves nothing.
                file.failed = True
                raise refusal(file.path, error) from error
            if not file.synced_once:
                for folder in (file.path.parent, *file.path.parent.parents):
                    sync_folder(folder)
                    if folder == self._folder:
                        break
                file.synced_once = True
            self._on_synced({file.name: ranges})
        if complete:
            file.close()


def _check_held(path: Path, header: bytes) -> None:
    """Refuse a header that has changed since it was written: what follows is read by it."""
    try:
        with path.open("rb") as file:
            found = file.read(len(header))
    except OSError as error:
        raise refusal(path, error) from error
    if found != header:
        raise VerifyError(
            f"{path}: begins otherwise than an earlier run has written it. Nothing was published; "
            "check the disk, and run the same command again to start over."
        )


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, unless they are there.

    Raises:
        OutputError: It cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise refusal(folder, error) from error


def sync_folder(folder: Path) -> None:
    """Put a folder's entries on the disk; without effect where folders cannot be opened."""
    if os.name == "nt":
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):  # a file system that cannot
            raise refusal(folder, error) from error


def sync_tree(folder: Path) -> None:
    """Put a folder on the disk, with all that is in it.

    Raises:
        OutputError: The disk fails.
    """
    for root, _, names in os.walk(folder, onerror=_refuse_unlisted):
        for name in names:
            path = Path(root, name)
            try:
                with path.open("rb") as file:
                    os.fsync(file.fileno())
            except OSError as error:
                raise refusal(path, error) from error
        sync_folder(Path(root))


def sync_folders(folder: Path) -> None:
    """Put the entries of a folder, and of all below it, on the disk.

    Raises:
        OutputError: One of them cannot be listed, or the disk fails.
    """
    for root, _, _ in os.walk(folder, onerror=_refuse_unlisted):
        sync_folder(Path(root))


def _refuse_unlisted(error: OSError) -> None:
    """Stop a walk that would leave a folder out, and so out of what is synced."""
    raise OutputError(
        f"{error.filename}: cannot be listed: {error.strerror}. Nothing was published; check the "
        "disk."
    ) from error


def write_small(path: Path, data: bytes, *, sync: bool = True) -> None:
    """Write a side file and put it on the disk; its mode follows the umask.

    Raises:
        OutputError: The disk is full, or writing fails.
    """
    write_chunks(path, [data], sync=sync)


def write_chunks(path: Path, chunks: Iterable[bytes], *, sync: bool = True) -> None:
    """Write a side file, as ``write_small`` does, from bytes that come one after the other.

    Raises:
        OutputError: As in ``write_small``; what taking the bytes raises goes through.
    """
    make_folder(path.parent)
    try:
        with path.open("xb") as file:
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            if sync:
                os.fsync(file.fileno())
    except OSError as error:
        raise refusal(path, error) from error


def _reserve(descriptor: int, nbytes: int) -> None:
    """Reserve disk space, so that a full disk shows at once and writes need no allocation.

    ``fallocate`` through libc: ``os.posix_fallocate`` would write zeros where it is not supported.
    """
    if sys.platform == "linux" and nbytes:
        libc = ctypes.CDLL(None, use_errno=True)
        length = ctypes.c_int64(nbytes)
        while libc.fallocate64(descriptor, 0, ctypes.c_int64(0), length) != 0:
            code = ctypes.get_errno()
            if code in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EPERM):
                break  # not on this file system, or not in this sandbox
            if code != errno.EINTR:
                raise OSError(code, os.strerror(code))
        else:
            return
    os.ftruncate(descriptor, nbytes)


def _kernel_copy(source: FileRange, descriptor: int, offset: int) -> int:
    """Copy inside the kernel as far as it can; return the bytes copied.

    Not every pair of files supports it, and an error does not say which of the two it is about:
    the caller reads and writes the rest, and meets it there if it was a real one.
    """
    done = 0
    if not hasattr(os, "copy_file_range"):
        return done
    with suppress(OSError), open(source.path, "rb", buffering=0) as file:
        while done < source.nbytes:
            count = min(COPY_CHUNK, source.nbytes - done)
            got = os.copy_file_range(
                file.fileno(), descriptor, count, source.start + done, offset + done
            )
            if got == 0:
                break
            done += got
    return done


def _pwrite(descriptor: int, data: memoryview, offset: int) -> int:
    """Write at least one byte and return how many; the file's lock is held."""
    if hasattr(os, "pwrite"):
        written = os.pwrite(descriptor, data, offset)
    else:  # Windows
        os.lseek(descriptor, offset, os.SEEK_SET)
        written = os.write(descriptor, data)
    if written == 0:  # neither an error nor progress: asking again would be for ever
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    return written


def refusal(path: Path, error: OSError) -> OutputError:
    """Return what to tell the user of a failure to write a file."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return OutputError(
            f"{path}: {error.strerror} while writing. Nothing was published; free some space and "
            "run the same command again."
        )
    return OutputError(
        f"{path}: cannot be written: {error.strerror}. Nothing was published. "
        f"{advice(error, 'Check the folder.')}"
    )
