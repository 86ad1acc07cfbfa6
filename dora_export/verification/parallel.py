"""Work on many tensors side by side, each in one thread."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from threadpoolctl import threadpool_limits

from dora_export.machine import no_thread

Item = TypeVar("Item")
Result = TypeVar("Result")


def each(
    work: Callable[[Item], Result], items: Iterable[Item], threads: int | None = None
) -> list[Result]:
    """Return ``work(item)`` for every item, in order; the first error ends it all.

    Args:
        work: Called from several threads at once; numpy and file reads leave the interpreter free.
        items: What to work on, the largest first for even loads.
        threads: Workers; None: one per CPU.

    Raises:
        MachineError: The system gives no more threads.
    """
    count = threads or os.cpu_count() or 1
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(count) as pool:
        try:
            futures = [pool.submit(work, item) for item in items]
        except RuntimeError as error:  # can't start new thread
            pool.shutdown(cancel_futures=True)
            raise no_thread("check", error) from error
        try:
            return [future.result() for future in futures]
        finally:
            pool.shutdown(cancel_futures=True)
