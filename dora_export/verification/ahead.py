"""Checks of a merge that begin while it is being written: of each tensor, once all of it is there.

The disk is slower than the checks, so their time goes by while it takes the rest. Nothing is
checked less for that: where a later write strays into a tensor that has been looked at, its own
place stays empty, and is found wrong.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from dora_export.plan import Plan, Step
from dora_export.tensors import FileRange, TensorRef
from dora_export.verification.model import Finding, Level, TensorResult
from dora_export.verification.oracle import tensor_check
from dora_export.verification.tensor_ledger import Difference, difference, spans

# Operands of one tensor in float64: what is larger is checked after the merge has let go of its own
# memory.
MOST_BYTES = 64 << 20
BLOCK_BYTES = 16 << 20  # of base and output, and what computing on them takes

Result = TypeVar("Result")


def bytes_beside(plan: Plan, threads: int) -> int:
    """Return the most memory that checks beside the writing take at once."""
    operands = max((_operand_bytes(s) for s in plan.steps if _is_small(s)), default=0)
    return threads * (2 * operands + BLOCK_BYTES)


class Ahead:
    """Begins checks of tensors as they are finished; gives their results to whoever asks later.

    Use as a context manager: on leaving, what has begun is waited for, and the rest dropped.

    Args:
        plan: The merge.
        folder: Where its weight files are being written.
        level: As in ``check``.
        threads: How many checks run side by side; 0: none does, and nothing is begun.
    """

    def __init__(self, plan: Plan, folder: Path, level: Level, threads: int) -> None:
        self._files = [(folder / file.name, list(file.offsets())) for file in plan.files]
        self._starts = [[offset for _, offset in steps] for _, steps in self._files]
        self._check = tensor_check(plan, level)
        self._pool = ThreadPoolExecutor(threads, "check") if threads else None
        self._lock = threading.Lock()
        self._seen: set[tuple[int, int]] = set()
        self._begun: dict[Hashable, Future[Any]] = {}

    def __enter__(self) -> Ahead:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def written(
        self, file: int, start: int, stop: int, is_there: Callable[[int, int, int], bool]
    ) -> None:
        """Begin to check the tensors that some finished bytes have made whole.

        Args:
            file: Position of the file in the plan.
            start: First byte that was finished.
            stop: One past the last.
            is_there: Whether a range of a file (position, offset, bytes) is finished.
        """
        if self._pool is None:
            return
        path, steps = self._files[file]
        first = max(0, bisect_right(self._starts[file], start) - 1)
        for number in range(first, len(steps)):
            step, offset = steps[number]
            if offset >= stop:
                break
            if not is_there(file, offset, step.nbytes):
                continue
            with self._lock:
                if (file, number) in self._seen:
                    continue
                self._seen.add((file, number))
            self._begin(step, FileRange(path, offset, step.nbytes))

    def check(self, step: Step, ref: TensorRef) -> tuple[TensorResult, tuple[Finding, ...]]:
        """Return what ``oracle.tensor_check`` says of a changed tensor."""
        return self._result(_key(ref), self._check, step, ref)

    def compare(
        self, source: TensorRef, stored: TensorRef, start: int, stop: int
    ) -> Difference | str:
        """Return the difference of a span of an untouched tensor, as ``difference`` does."""
        return self._result((_key(stored), start), difference, source, stored, start, stop)

    def _begin(self, step: Step, place: FileRange) -> None:
        ref = TensorRef(step.name, step.dtype, step.shape, place)
        if step.changes and _is_small(step):
            self._submit(_key(ref), self._check, step, ref)
        elif not step.changes:
            for start, stop in spans(step):
                self._submit((_key(ref), start), difference, step.source, ref, start, stop)

    def _submit(self, key: Hashable, work: Callable[..., Any], *arguments: Any) -> None:
        assert self._pool is not None, "Bug: nothing begins without threads"
        with suppress(RuntimeError):  # the system gives no more threads: it is checked later
            self._begun[key] = self._pool.submit(work, *arguments)

    def _result(self, key: Hashable, work: Callable[..., Result], *arguments: Any) -> Result:
        """Return what has been found already, or find it now if nobody has begun to."""
        begun = self._begun.pop(key, None)
        if begun is None or begun.cancel():
            return work(*arguments)
        found: Result = begun.result()
        return found


def _key(ref: TensorRef) -> Hashable:
    # The whole place: what is read elsewhere, or as another type, was not what has been checked.
    return ref.dtype.name, ref.shape, ref.source


def _is_small(step: Step) -> bool:
    if any(change.function is not None for change in step.changes):
        return False  # a function of the whole tensor
    return _operand_bytes(step) <= MOST_BYTES


def _operand_bytes(step: Step) -> int:
    """Return what the largest region's operands take in float64."""
    sizes: dict[tuple[int, int], int] = {}
    for change in step.changes:
        operands = [*(change.delta.operands if change.delta is not None else ())]
        operands += [change.magnitude] if change.magnitude is not None else []
        size = sum(ref.size for o in operands for ref in o.refs)
        size += change.value.size if change.value is not None else 0
        place = (change.start, change.rows)
        sizes[place] = sizes.get(place, 0) + size
    return 8 * max(sizes.values(), default=0)
