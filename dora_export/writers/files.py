"""Output files written piece by piece from many threads, each on the disk when the last is in.

Writing is at the speed of copying: space is reserved first, untouched ranges are copied by the
kernel (shared, on file systems that can), and finished data is sent to the disk while the rest is
still being computed, so that the final sync has little left to do.
"""

from __future__ import annotations

import ctypes
import errno
import os
import queue
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from dora_export.errors import OutputError
from dora_export.machine import advice, start
from dora_export.tensors import FileRange

SYNC_BYTES = 128 << 20  # unsynced bytes of one file after which a sync starts in the background
COPY_CHUNK = 8 << 20
# Finished files that may wait for their sync, open: workers that are faster than the disk wait, and
# a model of hundreds of shards stays below any limit on open files.
WAITING = 8


class _File:
    """One output file: made with its space, open while bytes come in, synced when all are in."""

    def __init__(self, path: Path, nbytes: int) -> None:
        self.path, self.nbytes = path, nbytes
        self.lock = threading.Lock()
        self.made = False
        self.descriptor: int | None = None
        self.left = nbytes
        self.unsynced = 0

    def open(self) -> int:
        with self.lock:
            if self.descriptor is None:
                flags = os.O_RDWR | (0 if self.made else os.O_CREAT | os.O_EXCL)
                flags |= getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
                descriptor = os.open(self.path, flags, 0o666)
                try:
                    if not self.made:
                        _reserve(descriptor, self.nbytes)
                except OSError:
                    os.close(descriptor)
                    raise
                self.made, self.descriptor = True, descriptor
            return self.descriptor

    def rest(self) -> None:
        """Close the file until more bytes come, unless it is complete and waits for its sync."""
        with self.lock:
            if self.descriptor is not None and self.left:
                descriptor, self.descriptor = self.descriptor, None
                os.close(descriptor)


class FileSink:
    """Files of known sizes that pieces are written into, in any order, from any thread.

    Use as a context manager; on leaving without an error all files are complete and on the disk.

    Args:
        paths: Files to make; none may exist.
        sizes: Their sizes in bytes.
    """

    def __init__(self, paths: Sequence[Path], sizes: Sequence[int]) -> None:
        self._files = [_File(p, n) for p, n in zip(paths, sizes, strict=True)]
        self._to_sync: queue.Queue[tuple[_File, bool] | None] = queue.Queue(WAITING)
        self._failure: BaseException | None = None  # of the sync thread
        self._abandoned = False
        self._syncer = threading.Thread(target=self._sync, name="sync", daemon=True)

    def __enter__(self) -> FileSink:
        start(self._syncer)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._abandoned = kind is not None
        self._to_sync.put(None)
        self._syncer.join()
        for file in self._files:
            if file.descriptor is not None:
                with suppress(OSError):  # nothing of it counts: an error is on its way
                    os.close(file.descriptor)
                file.descriptor = None
        if kind is None:
            self._check_sync()
            unfinished = [f.path.name for f in self._files if f.left]
            assert not unfinished, f"Bug: bytes were never written: {unfinished}"

    def write_header(self, file: int, header: bytes) -> None:
        """Make a file, reserve its space and put its first bytes into place.

        All files can be made before the first piece, so that a full disk shows at once: a file
        that waits for pieces is not held open.

        Raises:
            OutputError: The disk is full, or writing fails.
        """
        self.write(file, 0, np.frombuffer(header, np.uint8))
        target = self._files[file]
        try:
            target.rest()
        except OSError as error:
            raise _refusal(target.path, error) from error

    def write(self, file: int, offset: int, data: NDArray[np.uint8]) -> None:
        """Put bytes into an output file.

        Raises:
            OutputError: The disk is full, or writing fails.
        """
        self._check_sync()
        target = self._files[file]
        view, done = data.reshape(-1).data, 0
        try:
            descriptor = target.open()
            # The kernel lets one writer into a file at a time and lets others spin: queue here.
            with target.lock:
                while done < len(view):
                    done += _pwrite(descriptor, view[done:], offset + done)
        except OSError as error:
            raise _refusal(target.path, error) from error
        self._account(target, len(view))

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
            raise _refusal(target.path, error) from error
        done = _kernel_copy(source, descriptor, offset)
        self._account(target, done)
        while done < source.nbytes:
            chunk = np.empty(min(COPY_CHUNK, source.nbytes - done), np.uint8)
            source.read(done, chunk)
            self.write(file, offset + done, chunk)
            done += chunk.size

    def _account(self, file: _File, nbytes: int) -> None:
        with file.lock:
            file.left -= nbytes
            file.unsynced += nbytes
            complete = file.left == 0
            if complete or file.unsynced >= SYNC_BYTES:
                file.unsynced = 0
                self._to_sync.put((file, complete))

    def _sync(self) -> None:
        """Sync what comes through the queue; never stops before its end, since writers wait."""
        while (item := self._to_sync.get()) is not None:
            if self._failure is not None or self._abandoned:
                continue
            file, complete = item
            try:
                descriptor = file.descriptor
                assert descriptor is not None, "Bug: a file is closed only when it is complete"
                os.fsync(descriptor)
                if complete:
                    file.descriptor = None
                    os.close(descriptor)
            except OSError as error:  # told to the next who writes, or when the block ends
                self._failure = _refusal(file.path, error)
            except BaseException as error:
                self._failure = error

    def _check_sync(self) -> None:
        if self._failure is not None:
            raise self._failure


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
            raise _refusal(folder, error) from error


def write_small(path: Path, data: bytes) -> None:
    """Write a side file and put it on the disk; its mode follows the umask.

    Raises:
        OutputError: The disk is full, or writing fails.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise _refusal(path, error) from error


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


def _refusal(path: Path, error: OSError) -> OutputError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return OutputError(
            f"{path}: {error.strerror} while writing. Nothing was published; free some space and "
            "run the same command again."
        )
    return OutputError(
        f"{path}: cannot be written: {error.strerror}. Nothing was published. "
        f"{advice(error, 'Check the folder.')}"
    )
