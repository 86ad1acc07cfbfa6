"""Runs a plan's pieces: worker threads, bounded buffers, on the CPU or a CUDA device.

The engine knows devices, threads and memory; it knows no file names and no formats. Where bytes go
is the business of a ``Sink``.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_info, threadpool_limits

from dora_export import cast, fused, refine
from dora_export.arithmetic import UFUNC_BUFFER, NumpyArithmetic
from dora_export.errors import AdapterError, shown
from dora_export.formula import LoadedChange
from dora_export.machine import start
from dora_export.paged import BOUNCE_BYTES, EDGE_BYTES
from dora_export.pieces import Batch, ColumnSquares, Copy, Merge, Piece, Region, cut, regions
from dora_export.plan import Plan
from dora_export.tensors import PICKED_BYTES, PickedColumns
from dora_export.update import Change
from dora_export.worker import ArithmeticFactory, Sink, Worker, working_precision

MAX_THREADS = 16
BLOCK_BYTES = 2 << 20
GPU_BLOCK_BYTES = 32 << 20
GPU_THREADS = 4  # one reads, one copies in, one computes, one copies out and writes
SCAN_BYTES = 4 << 20


@dataclass(frozen=True)
class Resources:
    """What a run may use.

    Attributes:
        device: "cpu", "cuda" or "cuda:N".
        threads: Workers; None: one per CPU this process may use, at most ``MAX_THREADS``.
        block_bytes: About how many bytes a worker reads and writes at once; None: by device.
    """

    device: str = "cpu"
    threads: int | None = None
    block_bytes: int | None = None

    @property
    def on_cpu(self) -> bool:
        """Whether numpy computes."""
        return self.device == "cpu"

    @property
    def workers(self) -> int:
        """Number of worker threads."""
        if self.threads is not None:
            return self.threads
        available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (
            os.cpu_count() or 1)  # fmt: skip
        return min(MAX_THREADS, available if self.on_cpu else GPU_THREADS)

    @property
    def block(self) -> int:
        """Bytes of a block."""
        return self.block_bytes or (BLOCK_BYTES if self.on_cpu else GPU_BLOCK_BYTES)


def arithmetic_factory(resources: Resources) -> ArithmeticFactory:
    """Return what makes a worker's arithmetic, given a working precision.

    Raises:
        DeviceError: The device is not there.
    """
    if resources.on_cpu:
        return lambda precision: NumpyArithmetic(getattr(np, precision))
    import torch  # noqa: PLC0415 - more than a second of import that the CPU does without

    from dora_export.arithmetic_torch import TorchArithmetic, open_device  # noqa: PLC0415

    device = open_device(resources.device)
    return lambda precision: TorchArithmetic(device, getattr(torch, precision))


def arithmetic_name(resources: Resources) -> str:
    """Return what the last bit of a result depends on: libraries, and the processor they fit."""
    if not resources.on_cpu:
        import torch  # noqa: PLC0415 - as above

        return f"torch {torch.__version__}, {torch.cuda.get_device_name(resources.device)}"
    found = np.show_config(mode="dicts")["SIMD Extensions"].get("found", [])
    kernel = [fused.NAME] if fused.available() else []
    return ", ".join([f"numpy {np.__version__}", *kernel, *found, *_blas_names()])


def _blas_names() -> list[str]:
    """Return numpy's BLAS with the processor type it has chosen."""
    loaded = [lib for lib in threadpool_info() if lib["user_api"] == "blas"]
    shipped = [lib for lib in loaded if "numpy" in lib["filepath"]]
    return sorted(
        {
            f"{lib['internal_api']} {lib['version']} {lib.get('architecture', '')}".rstrip()
            for lib in shipped or loaded
        }
    )


def memory_bound(plan: Plan, resources: Resources, tile_elements: int) -> int:
    """Return the most host bytes that buffers and loaded adapter tensors take at once.

    It comes on top of what the process holds before the run (the interpreter, libraries, headers),
    and grows with the largest tensor's adapter and row, not with the model.
    """
    buffers, loaded, computing = 0, 0, 0
    for step in plan.steps:
        if step.copies_bytes:
            continue
        working = 8 if working_precision(step, plan.settings) == "float64" else 4
        for region in regions(step):
            tile = region.tile_rows(tile_elements) * region.columns
            itemsize = max(step.source.dtype.itemsize, step.dtype.itemsize)
            block = max(resources.block // step.source.dtype.itemsize, tile) * itemsize
            # stored bytes in and out, two tiles, and what widening, rounding and checking take
            tiles = 7 if region.composed else 5
            buffers = max(buffers, 4 * block + tiles * tile * working + refine.MOST_BYTES)
            loaded = max(loaded, sum(_loaded_bytes(c, region, working) for c in region.changes))
            computing = max(computing, *(_function_bytes(c, region) for c in region.changes), 0)
    copying = resources.block if any(s.copies_bytes for s in plan.steps) else 0
    held = (resources.workers + 1) * loaded + computing
    # also of the thread that writes headers
    written = (resources.workers + 1) * BOUNCE_BYTES + EDGE_BYTES
    return resources.workers * max(buffers, copying) + held + written


def _function_bytes(change: Change, region: Region) -> int:
    """Return what computing a whole tensor takes at once: one tensor at a time does it."""
    if change.function is None:
        return 0
    wide = region.rows * region.columns * 8
    return 3 * wide + change.function.working_bytes() + sum(r.nbytes for r in change.function.refs)


def _loaded_bytes(change: Change, region: Region, working: int) -> int:
    operands = [*(change.delta.operands if change.delta is not None else ())]
    operands += [change.magnitude] if change.magnitude is not None else []
    # each is read, widened and laid out anew, for the kernel and as exactly as it is stored
    stored = sum(ref.nbytes for o in operands for ref in o.refs)
    sources = [ref.source for o in operands for ref in o.refs]
    picked = [s.columns * s.itemsize for s in sources if isinstance(s, PickedColumns)]
    stored += max((max(PICKED_BYTES, row) for row in picked), default=0)
    stored += sum(ref.size * 8 for o in operands if o.combine for ref in o.refs)
    wide = sum(int(np.prod(o.shape)) for o in operands) * working
    value = change.value.size * working if change.value and change.kind == "rows" else 0
    norms = region.columns * 8 * 66 if change.over == "column" else 0
    whole = region.rows * region.columns * 8 if change.function is not None else 0
    return stored + 5 * wide + value + norms + whole


def check_adapter(plan: Plan) -> None:
    """Read every adapter tensor once and refuse inf and NaN before anything is written.

    Raises:
        AdapterError: A tensor holds a value that is not finite.
    """
    broken = []
    used = {key for step in plan.steps for key in step.consumes}
    tensors = plan.adapter_tensors
    for name in sorted(used):
        ref = tensors[name]
        step = SCAN_BYTES // ref.dtype.itemsize
        if ref.dtype.mergeable and any(
            cast.nonfinite(ref.raw(i, min(i + step, ref.size)), ref.dtype).any()
            for i in range(0, ref.size, step)
        ):
            broken.append(name)
    for adapter in plan.adapters:
        if own := [shown(name) for name in broken if name in adapter.tensors]:
            more = f" and {len(own) - 3} more" if len(own) > 3 else ""
            raise AdapterError(
                f"{adapter.path}: NaN or inf in {', '.join(own[:3])}{more}. "
                "The training diverged or the file is damaged; use an earlier checkpoint."
            )


@dataclass
class _Loaded:
    """A region's numbers, shared by the workers on its pieces and dropped with the last of them."""

    pieces_left: int
    sums_left: int
    lock: threading.Lock = field(default_factory=threading.Lock)
    ready: threading.Event = field(default_factory=threading.Event)
    changes: list[LoadedChange] | None = None
    sums: dict[int, NDArray[np.float64]] = field(default_factory=dict)


class Engine:
    """One run of a plan.

    Args:
        plan: What to do.
        sink: Where bytes go.
        resources: Device, threads and block size.
        on_bytes: Called with the number of output bytes finished, from any worker.
    """

    def __init__(
        self,
        plan: Plan,
        sink: Sink,
        resources: Resources,
        on_bytes: Callable[[int], None] = lambda _: None,
    ) -> None:
        self._plan, self._sink, self._resources = plan, sink, resources
        self._on_bytes = on_bytes
        self._make_arithmetic = arithmetic_factory(resources)
        self._tile_elements = self._make_arithmetic("float32").tile_elements
        self._next = threading.Lock()
        self._whole = threading.Lock()  # whole tensors are computed one at a time
        self._failed = threading.Event()
        self._failure: BaseException | None = None
        self._loaded: dict[tuple[str, int], _Loaded] = {}

    def run(self) -> None:
        """Run every piece; returns when all bytes have been handed to the sink.

        Raises:
            DoraExportError: The first refusal or failure of any worker; the others stop.
        """
        pieces = self._to_do(cut(self._plan, self._tile_elements, self._resources.block))
        with threadpool_limits(limits=1, user_api="blas"):
            if self._resources.workers == 1:
                self._work(pieces)
            else:
                self._run_threads(pieces)
        if self._failure is not None:
            raise self._failure

    def _run_threads(self, pieces: Iterator[Piece]) -> None:
        threads = [
            threading.Thread(target=self._work, args=(pieces,), name=f"merge-{i}", daemon=True)
            for i in range(self._resources.workers)
        ]
        started: list[threading.Thread] = []
        try:
            for thread in threads:
                start(thread)
                started.append(thread)
            for thread in threads:
                while thread.is_alive():
                    thread.join(0.2)  # in slices, so that Ctrl-C is heard
        except BaseException as error:
            self._fail(error)
            _join(started)
            raise

    def _to_do(self, batches: Iterator[Batch]) -> Iterator[Piece]:
        """Yield the pieces whose bytes the sink does not hold, and the sums that they need.

        Before a region's first piece, note how many belong to it.
        """
        for batch in batches:
            writing = [p for p in batch if not isinstance(p, ColumnSquares)]
            left = [p for p in writing if not self._sink.holds(p.file, p.offset, p.nbytes)]
            if held := sum(p.nbytes for p in writing) - sum(p.nbytes for p in left):
                self._on_bytes(held)
            if left and isinstance(merge := left[0], Merge):
                sums = [p for p in batch if isinstance(p, ColumnSquares)]
                self._loaded[_key(merge)] = _Loaded(len(left), len(sums))
                yield from sums
            yield from left

    def _work(self, pieces: Iterator[Piece]) -> None:
        buffer = np.setbufsize(UFUNC_BUFFER)
        try:
            worker = Worker(
                self._make_arithmetic, self._plan.settings, self._sink, self._resources.block
            )
            while not self._failed.is_set():
                with self._next:
                    piece = next(pieces, None)
                if piece is None:
                    return
                self._run_piece(worker, piece)
        except BaseException as error:
            self._fail(error)
        finally:
            np.setbufsize(buffer)  # with one worker this is the caller's own thread

    def _run_piece(self, worker: Worker, piece: Piece) -> None:
        if isinstance(piece, Copy):
            worker.copy(piece)
            self._on_bytes(piece.nbytes)
            return
        loaded = self._loaded[_key(piece)]
        with loaded.lock:
            if loaded.changes is None:
                whole = any(c.function is not None for c in piece.region.changes)
                with self._whole if whole else nullcontext():
                    loaded.changes = worker.load(piece.step, piece.region)
        if isinstance(piece, ColumnSquares):
            squares = worker.column_squares(piece, loaded.changes)
            with loaded.lock:
                loaded.sums[piece.position] = squares
                loaded.sums_left -= 1
                if loaded.sums_left == 0:
                    self._finish_norms(worker, piece, loaded)
            return
        if piece.region.column_changes:
            loaded.ready.wait()
            if self._failed.is_set():
                return
        worker.merge(piece, loaded.changes)
        self._on_bytes(piece.nbytes)
        with loaded.lock:
            loaded.pieces_left -= 1
            if loaded.pieces_left == 0:
                del self._loaded[_key(piece)]

    def _finish_norms(self, worker: Worker, piece: ColumnSquares, loaded: _Loaded) -> None:
        """Add the partial sums in a fixed order and turn them into factors."""
        assert loaded.changes is not None, "Bug: sums come after loading"
        positions = piece.region.column_changes
        total = np.zeros((len(positions), piece.region.columns))
        for i in range(len(loaded.sums)):
            total += loaded.sums[i]
        loaded.sums.clear()
        for position, squares in zip(positions, total, strict=True):
            change = loaded.changes[position]
            loaded.changes[position] = worker.with_factors(piece, change, squares)
        loaded.ready.set()

    def _fail(self, error: BaseException) -> None:
        with self._next:
            if self._failure is None:
                self._failure = error
        self._failed.set()
        for loaded in list(self._loaded.values()):
            loaded.ready.set()


def _key(piece: Merge | ColumnSquares) -> tuple[str, int]:
    return piece.step.name, piece.region.start


def _join(threads: list[threading.Thread]) -> None:
    """Wait for workers to end their pieces; another Ctrl-C must not close files under them."""
    while any(thread.is_alive() for thread in threads):
        with suppress(KeyboardInterrupt):
            for thread in threads:
                thread.join()
