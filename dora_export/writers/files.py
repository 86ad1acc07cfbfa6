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
from dora_export.tensors import FileRange

SYNC_BYTES = 128 << 20  # unsynced bytes of one file after which a sync starts in the background
COPY_CHUNK = 8 << 20


class _File:
    """One output file: opened when its first byte comes, closed and synced when all are in."""

    def __init__(self, path: Path, nbytes: int) -> None:
        self.path, self.nbytes = path, nbytes
        self.lock = threading.Lock()
        self.descriptor: int | None = None
        self.left = nbytes
        self.unsynced = 0

    def open(self) -> int:
        with self.lock:
            if self.descriptor is None:
                flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
                flags |= getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
                descriptor = os.open(self.path, flags, 0o666)
                try:
                    _reserve(descriptor, self.nbytes)
                except OSError:
                    os.close(descriptor)
                    raise
                self.descriptor = descriptor
            return self.descriptor


class FileSink:
    """Files of known sizes that pieces are written into, in any order, from any thread.

    Use as a context manager; on leaving without an error all files are complete and on the disk.

    Args:
        paths: Files to make; none may exist.
        sizes: Their sizes in bytes.
    """

    def __init__(self, paths: Sequence[Path], sizes: Sequence[int]) -> None:
        self._files = [_File(p, n) for p, n in zip(paths, sizes, strict=True)]
        self._to_sync: queue.SimpleQueue[tuple[_File, bool] | None] = queue.SimpleQueue()
        self._unsynced: tuple[Path, OSError] | None = None
        self._syncer = threading.Thread(target=self._sync, name="sync", daemon=True)

    def __enter__(self) -> FileSink:
        self._syncer.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._to_sync.put(None)
        self._syncer.join()
        for file in self._files:
            if file.descriptor is not None:
                os.close(file.descriptor)
                file.descriptor = None
        if kind is None:
            if self._unsynced is not None:
                raise _refusal(*self._unsynced) from self._unsynced[1]
            unfinished = [f.path.name for f in self._files if f.left]
            assert not unfinished, f"Bug: bytes were never written: {unfinished}"

    def write_header(self, file: int, header: bytes) -> None:
        """Put a file's first bytes into place."""
        self.write(file, 0, np.frombuffer(header, np.uint8))

    def write(self, file: int, offset: int, data: NDArray[np.uint8]) -> None:
        """Put bytes into an output file.

        Raises:
            OutputError: The disk is full, or writing fails.
        """
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
        while (item := self._to_sync.get()) is not None:
            file, complete = item
            descriptor = file.descriptor
            assert descriptor is not None, "Bug: a file is closed only when it is complete"
            try:
                os.fsync(descriptor)
            except OSError as error:  # told to the caller when the block ends
                self._unsynced = self._unsynced or (file.path, error)
            if complete:
                file.descriptor = None
                os.close(descriptor)


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
    """Write a side file and put it on the disk; its mode follows the umask."""
    try:
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
        if libc.fallocate64(descriptor, 0, ctypes.c_int64(0), length) == 0:
            return
        code = ctypes.get_errno()
        if code not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
            raise OSError(code, os.strerror(code))
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
    if hasattr(os, "pwrite"):
        return os.pwrite(descriptor, data, offset)
    os.lseek(descriptor, offset, os.SEEK_SET)  # Windows; the file's lock is held
    return os.write(descriptor, data)


def _refusal(path: Path, error: OSError) -> OutputError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return OutputError(
            f"{path}: {error.strerror} while writing. Nothing was published; free some space and "
            "run the same command again."
        )
    return OutputError(
        f"{path}: cannot be written: {error.strerror}. Nothing was published; check the folder."
    )
