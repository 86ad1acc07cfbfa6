"""A plan cut into pieces that know nothing of each other: byte ranges of output files.

Threads, a GPU, a resumed or a distributed run all run the same pieces. What a piece computes
depends on the tensor's shape alone: arithmetic goes tile by tile, and where a tile begins follows
from the shape, so the bytes do not depend on how many tiles a piece holds or who runs it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dora_export.plan import OutputFile, Plan, Step
from dora_export.tensors import FileRange, HeldBytes
from dora_export.update import Change

COPY_BYTES = 32 << 20  # of one copying piece: small enough to share the work and show progress
NORM_CHUNKS = 64  # partial sums of a column norm; each takes one float64 per column


@dataclass(frozen=True)
class Region:
    """Rows of one tensor that share their changes.

    Attributes:
        start: First element in the flattened tensor.
        rows: Stored rows.
        columns: Elements per row.
        changes: In order; empty: only the dtype changes.
    """

    start: int
    rows: int
    columns: int
    changes: tuple[Change, ...] = ()

    @property
    def column_changes(self) -> tuple[int, ...]:
        """Positions of the changes that need a norm per column."""
        norms = (c.over == "column" and not c.magnitude_is_factor for c in self.changes)
        return tuple(i for i, norm in enumerate(norms) if norm)

    @property
    def composed(self) -> bool:
        """Whether more than one change, or a part of one, decides about an element."""
        return len(self.changes) > 1 or any(c.weight != 1.0 for c in self.changes)

    def tile_rows(self, tile_elements: int) -> int:
        """Rows that go through the formula at once."""
        return max(1, min(self.rows, tile_elements // self.columns))

    def norm_rows(self, tile_elements: int) -> int:
        """Rows per partial sum of a column norm: a multiple of the tile."""
        tile = self.tile_rows(tile_elements)
        return max(16, -(-self.rows // (NORM_CHUNKS * tile))) * tile


@dataclass(frozen=True)
class Copy:
    """Bytes taken over as they are.

    Attributes:
        file: Position of the output file in the plan.
        offset: Where the bytes go.
        source: Where they come from.
        start: First byte within the source.
        nbytes: How many.
    """

    file: int
    offset: int
    source: FileRange | HeldBytes
    start: int
    nbytes: int


@dataclass(frozen=True)
class ColumnSquares:
    """Partial sums of squares per column, needed before the merge of the region.

    Attributes:
        step: The tensor.
        region: Its rows.
        first_row: First row of the sums.
        last_row: One past its last row.
        position: Which of the region's partial sums.
    """

    step: Step
    region: Region
    first_row: int
    last_row: int
    position: int


@dataclass(frozen=True)
class Merge:
    """Rows of a region to be merged and written.

    Attributes:
        step: The tensor.
        region: Its rows.
        first_row: First row of this piece within the region.
        last_row: One past its last row.
        file: Position of the output file in the plan.
        offset: Where the first of the bytes goes.
    """

    step: Step
    region: Region
    first_row: int
    last_row: int
    file: int
    offset: int

    @property
    def nbytes(self) -> int:
        """Bytes written."""
        return (self.last_row - self.first_row) * self.region.columns * self.step.dtype.itemsize


Piece = Copy | ColumnSquares | Merge
Batch = Sequence[Piece]


def regions(step: Step) -> tuple[Region, ...]:
    """Return a tensor's regions, gaps between changed ones included, in the order of elements."""
    groups: dict[tuple[int, int, int], list[Change]] = {}  # a stack of experts has hundreds
    for change in step.changes:
        groups.setdefault((change.start, change.rows, change.columns), []).append(change)
    found = [Region(*place, tuple(changes)) for place, changes in groups.items()]
    found.sort(key=lambda r: r.start)
    filled: list[Region] = []
    at = 0
    for region in [*found, Region(step.source.size, 0, 1)]:
        assert region.start >= at, f"Bug: {step.name}: changes overlap in part"
        if region.start > at:
            filled.append(Region(at, region.start - at, 1))
        if region.rows:
            filled.append(region)
        at = region.start + region.rows * region.columns
    return tuple(filled)


def cut(plan: Plan, tile_elements: int, block_bytes: int) -> Iterator[Batch]:
    """Yield a plan's pieces in the order of the output's bytes, those of one region together.

    A region's partial sums come before its merges, which need all of them.

    Args:
        plan: What to cut.
        tile_elements: Elements that go through the formula at once.
        block_bytes: About how many bytes a merging piece reads; at least one tile.
    """
    for position, file in enumerate(plan.files):
        for copy in _copies(position, file):
            yield (copy,)
        for step, offset in file.offsets():
            if not step.copies_bytes:
                for region in regions(step):
                    yield _pieces(step, region, position, offset, tile_elements, block_bytes)


def _copies(position: int, file: OutputFile) -> Iterator[Copy]:
    """Yield a file's untouched bytes, neighbours in source and output taken together."""
    run: Copy | None = None
    for step, offset in file.offsets():
        source = step.source.source
        if not step.copies_bytes or not step.nbytes:
            continue
        assert isinstance(source, FileRange | HeldBytes), "Bug: only operands are picked"
        if (
            run is not None
            and isinstance(source, FileRange)
            and isinstance(run.source, FileRange)
            and source.path == run.source.path
            and source.start == run.source.start + run.nbytes
            and offset == run.offset + run.nbytes
        ):
            whole = FileRange(source.path, run.source.start, run.nbytes + step.nbytes)
            run = Copy(position, run.offset, whole, 0, whole.nbytes)
            continue
        if run is not None:
            yield from _chunks(run)
        run = Copy(position, offset, source, 0, step.nbytes)
    if run is not None:
        yield from _chunks(run)


def _chunks(copy: Copy) -> Iterator[Copy]:
    for start in range(0, copy.nbytes, COPY_BYTES):
        nbytes = min(COPY_BYTES, copy.nbytes - start)
        yield Copy(copy.file, copy.offset + start, copy.source, start, nbytes)


def _pieces(
    step: Step, region: Region, position: int, offset: int, tile_elements: int, block_bytes: int
) -> list[Piece]:
    pieces: list[Piece] = []
    if region.column_changes:
        rows = region.norm_rows(tile_elements)
        for i, first in enumerate(range(0, region.rows, rows)):
            last = min(first + rows, region.rows)
            pieces.append(ColumnSquares(step, region, first, last, i))
    tile = region.tile_rows(tile_elements)
    tile_bytes = tile * region.columns * step.source.dtype.itemsize
    rows = tile * max(1, block_bytes // tile_bytes)
    start = offset + region.start * step.dtype.itemsize
    for first in range(0, region.rows, rows):
        at = start + first * region.columns * step.dtype.itemsize
        pieces.append(Merge(step, region, first, min(first + rows, region.rows), position, at))
    return pieces
