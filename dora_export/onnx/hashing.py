"""SHA-256 of a graph's files before and after, computed while the second are being written.

One chunk of each at a time: where the processor can, two take hardly longer than one.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np

from dora_export import fused
from dora_export.machine import start
from dora_export.tensors import Bytes
from dora_export.writers.ranges import Ranges

CHUNK = 512 << 10  # bytes of each side at once: both stay in the processor's cache
BEHIND = 64 << 20  # bytes that may wait to be hashed before whoever writes them does
BLOCK = 64
NOTHING = np.empty(0, np.uint8)
# FIPS 180-4, 5.3.3
INITIAL = (0x6A09E667, 0xBB67AE85, 0x3C6EF372, 0xA54FF53A,
           0x510E527F, 0x9B05688C, 0x1F83D9AB, 0x5BE0CD19)  # fmt: skip


class Sha256:
    """A digest in work that can be computed together with another one's.

    Bytes come in multiples of a block's, but for the last.
    """

    def __init__(self) -> None:
        self._state = bytearray(np.array(INITIAL, np.uint32).tobytes())
        self._tail = NOTHING
        self._nbytes = 0
        self._library = None if fused.digests_two() else hashlib.sha256()

    def update(self, data: Bytes, other: Sha256, other_data: Bytes) -> None:
        """Take in what comes next, and in another digest what comes next there."""
        if self._library is not None and other._library is not None:
            self._library.update(data.data)
            other._library.update(other_data.data)
            return
        fused.digest_two(self._state, self._whole(data), other._state, other._whole(other_data))

    def _whole(self, data: Bytes) -> Bytes:
        """Return the whole blocks of what comes next, and keep the rest."""
        assert not (self._tail.size and data.size), "Bug: more comes after an incomplete block"
        whole = data.size - data.size % BLOCK
        if data.size:
            self._tail = data[whole:].copy()
        self._nbytes += data.size
        return data[:whole]

    def hexdigest(self) -> str:
        """Return the digest of all that came; nothing can come afterwards."""
        if self._library is not None:
            return self._library.hexdigest()
        zeros = -(self._tail.size + 9) % BLOCK
        length = (self._nbytes * 8).to_bytes(8, "big")
        last = self._tail.tobytes() + b"\x80" + bytes(zeros) + length
        fused.digest_two(
            self._state, np.frombuffer(last, np.uint8), bytearray(len(self._state)), NOTHING
        )
        return np.frombuffer(self._state, np.uint32).astype(">u4").tobytes().hex()


class _Side:
    """Files read one after the other, a chunk at a time."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = list(paths)
        self._buffer = np.empty(CHUNK, np.uint8)
        self._file: BinaryIO | None = None
        self.at, self.offset = 0, 0  # which file, and how much of it has been read
        self.digest = Sha256()
        self.digests: list[str] = []

    @property
    def done(self) -> bool:
        return self.at == len(self._paths)

    def chunk(self) -> Bytes:
        """Return what comes next of a file; nothing once at its end, and at the end of all."""
        if self.done:
            return NOTHING
        if self._file is None:
            self._file = self._paths[self.at].open("rb", buffering=0)
        got = 0
        while got < CHUNK and (count := self._file.readinto(self._buffer[got:].data)):  # type: ignore[attr-defined]
            got += count
        self.offset += got
        return self._buffer[:got]

    def turn_to_next(self) -> None:
        self.close()
        self.digests.append(self.digest.hexdigest())
        self.at, self.offset, self.digest = self.at + 1, 0, Sha256()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file = None


class Digests:
    """SHA-256 of files that are there, and of files that are being written.

    Use as a context manager; what is computed is dropped if the block fails.

    Args:
        before: Files that are there.
        after: Files that are being written.
        sizes: Bytes that each of those will have.
    """

    def __init__(self, before: Sequence[Path], after: Sequence[Path], sizes: Sequence[int]) -> None:
        self._before, self._after, self._sizes = list(before), list(after), list(sizes)
        self._written = [Ranges() for _ in after]
        self._changed = threading.Condition()
        self._complete = self._ended = self._starved = False
        self._behind = 0  # bytes that can be read and have not been
        self._waiting = threading.Lock()
        self._found: tuple[list[str], list[str]] | None = None
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="digest", daemon=True)

    def __enter__(self) -> Digests:
        start(self._thread)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._changed:
            self._ended = True
            self._changed.notify_all()
        self._thread.join()

    def finished(self, file: int, start: int, stop: int) -> None:
        """Note that bytes of a file that is being written can be read from now on."""
        with self._changed:
            self._written[file].add(start, stop)
            self._behind += stop - start
            self._starved = False  # or else it will say so again
            self._changed.notify_all()

    def keep_up(self, wanted: Callable[[], bool]) -> None:
        """Wait while hashing is far behind, unless another thread does that already.

        Hashing goes in one thread, which on few processors those that write would outrun, to be
        idle while it goes on alone. Nobody waits while it waits for bytes itself.

        Args:
            wanted: Whether there is more to write; called from time to time.
        """
        if not self._waiting.acquire(blocking=False):
            return
        try:
            with self._changed:
                self._changed.wait_for(
                    lambda: self._ended or self._starved or self._behind <= BEHIND or not wanted()
                )
        finally:
            self._waiting.release()

    def results(self) -> tuple[list[str], list[str]]:
        """Return the digests of the files before and after, all of which have been written.

        Raises:
            OSError: A file cannot be read.
        """
        with self._changed:
            self._complete = True
            self._changed.notify_all()
        self._thread.join()
        if self._failure is not None:
            raise self._failure
        assert self._found is not None, "Bug: asked after the end"
        return self._found

    def _run(self) -> None:
        try:
            self._found = self._computed()
        except Exception as error:  # raised where the digests are wanted
            self._failure = error
        finally:
            with self._changed:
                self._ended = True  # nobody is to wait for more
                self._changed.notify_all()

    def _computed(self) -> tuple[list[str], list[str]] | None:
        before, after = _Side(self._before), _Side(self._after)
        try:
            for one, other in self._chunks(before, after):
                before.digest.update(one, after.digest, other)
                for side, data in ((before, one), (after, other)):
                    if not side.done and data.size < CHUNK:
                        side.turn_to_next()
        finally:
            before.close()
            after.close()
        return None if self._ended else (before.digests, after.digests)

    def _chunks(self, before: _Side, after: _Side) -> Iterator[tuple[Bytes, Bytes]]:
        """Yield what comes next of both, until there is no more of either, or nobody wants it."""
        while not (before.done and after.done):
            if not after.done:
                size = self._sizes[after.at]
                stop = min(after.offset + CHUNK, size)
                with self._changed:
                    self._changed.wait_for(lambda: self._can_be_read(after, stop))  # noqa: B023
                    self._behind -= stop - after.offset
            if self._ended:
                return
            yield before.chunk(), after.chunk()

    def _can_be_read(self, side: _Side, stop: int) -> bool:
        there = self._written[side.at].covers(side.offset, stop)
        self._starved = not there
        self._changed.notify_all()
        return there or self._complete or self._ended
