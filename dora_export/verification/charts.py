"""The three pictures of a report as SVG: distance, magnitudes, size of the update.

All share one frame: a strip per kind of module, a column per layer, so that a bad layer shows as a
vertical line and a bad kind as a horizontal one. Colours are the page's style sheet's; shapes tell
the same as colours do. Every mark carries its numbers as a title.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from xml.etree.ElementTree import Element

from dora_export.errors import printable, shown
from dora_export.verification.grid import Cell, Grid
from dora_export.verification.markup import add, el
from dora_export.verification.model import Status, TensorResult
from dora_export.words import count, number, share, superscript

PLOT_WIDTH = 810.0
CHARACTER = 6.3  # width of one at the style sheet's 11 px, about
LABEL_CHARACTERS = 30
AXIS_WIDTH = 38.0
TICK_GAP = 26.0  # between the middles of two labels under the columns, at least
HEAT_STEPS = 8
LOG_FROM = 12.0  # a scale whose ends differ by more than this factor is logarithmic
HEAT_LOG_FROM = 4.0  # the same for shades, of which there are few
GRAVITY: tuple[Status, ...] = ("wrong", "unchecked", "rounded", "exact")
STATUS_WORDS = {
    "exact": "exact: within 1 ulp",
    "rounded": "right, rounded more than necessary",
    "wrong": "wrong",
    "unchecked": "could not be compared",
}


@dataclass(frozen=True)
class Scale:
    """From values to heights.

    Attributes:
        low: Value at the bottom.
        high: Value at the top.
        log: Whether equal factors are equal heights.
    """

    low: float
    high: float
    log: bool

    def at(self, value: float) -> float:
        """Return the place of a value: 0 at the bottom, 1 at the top, clipped."""
        if math.isnan(value) or self.high <= self.low:
            return 1.0 if math.isnan(value) else 0.5
        value = min(max(value, self.low), self.high)
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


@dataclass(frozen=True)
class _Frame:
    """The geometry that the pictures share."""

    grid: Grid
    strip: float  # height of a row
    inset: float = 4.0  # between the scale's ends and the strip's

    @property
    def step(self) -> float:
        """Width of a column."""
        return min(44.0, PLOT_WIDTH / max(1, len(self.grid.columns)))

    @property
    def left(self) -> float:
        longest = max((len(_short(k)) for k in self.grid.kinds), default=0)
        return 14 + longest * CHARACTER + AXIS_WIDTH

    @property
    def right(self) -> float:
        return self.left + self.step * len(self.grid.columns)

    @property
    def bottom(self) -> float:
        return 6 + self.strip * len(self.grid.kinds)

    def x(self, column: int) -> float:
        """Middle of a column."""
        return self.left + self.step * (column + 0.5)

    def y(self, row: int, part: float) -> float:
        """Height within a strip, 0 at its bottom and 1 at its top."""
        return 6 + self.strip * row + self.inset + (self.strip - 2 * self.inset) * (1 - part)


def error_chart(grid: Grid) -> Element:
    """Return the distance of each tensor from the exact result, in ulps."""
    values = [t.max_ulp for c in grid.cells for t in c.tensors if math.isfinite(t.max_ulp)]
    high = max([1.0, *values])
    scale = Scale(0.0, 1.15, log=False) if high <= 1.15 else Scale(0.25, high * 1.3, log=True)
    if 1.15 < high <= 4:
        scale = Scale(0.0, high * 1.08, log=False)
    frame = _Frame(grid, 40.0 if len(grid.kinds) <= 12 else 30.0)
    svg = _begin(frame, "Largest distance from the exact result per layer, in ulps")
    power = math.floor(math.log10(high))
    labels = [(1.0, "1"), *([(0.5, "½")] if not scale.log else [])]
    labels += [(10.0**power, "10" if power == 1 else f"10{superscript(power)}")] if power else []
    for value, name in ((0.5, "half"), (1.0, "one")):
        _level(svg, frame, scale.at(value), name)
    _axis(svg, frame, [(scale.at(v), text) for v, text in labels])
    for cell in sorted(grid.cells, key=lambda c: _gravest(c) == "wrong"):  # wrong ones on top
        add(svg, _distance(frame, scale, cell))
    return svg


def magnitude_chart(grid: Grid) -> Element:
    """Return boxes of m / ||W||: least, quartiles, largest."""
    cells = [(c, q) for c in grid.cells if (q := _quantiles(c)) is not None]
    scale = _magnitude_scale([q for _, q in cells])
    frame = _Frame(grid, 60.0 if len(grid.kinds) <= 12 else 44.0, inset=8.0)
    svg = _begin(frame, "Magnitudes over the base's norms per layer, m / ||W||")
    _level(svg, frame, scale.at(1.0), "one")
    decimals = max(0, 1 - math.floor(math.log10(scale.high - scale.low)))
    ends = [v for v in (scale.low, scale.high) if abs(scale.at(v) - scale.at(1.0)) > 0.25]
    _axis(svg, frame, [(scale.at(1.0), "1"), *((scale.at(v), f"{v:.{decimals}f}") for v in ends)])
    width = max(1.5, min(14.0, frame.step * 0.6))
    for cell, found in cells:
        add(svg, _box(frame, scale, cell, found, width))
    return svg


def _magnitude_scale(boxes: Sequence[tuple[float, ...]]) -> Scale:
    """Return a scale that holds 1, every box and nearly all whiskers.

    A few rows far off would press all boxes flat; whiskers beyond the scale end in an arrow.
    """
    lows, highs = sorted(q[0] for q in boxes), sorted(q[4] for q in boxes)
    few = len(boxes) // 50
    low = min([1.0, lows[few], *(q[1] for q in boxes)])
    high = max([1.0, highs[len(highs) - 1 - few], *(q[3] for q in boxes)])
    if high == low:
        low, high = low - 0.01, high + 0.01
    return Scale(low, high, low > 0 and high / low > LOG_FROM)


def update_chart(grid: Grid) -> Element:
    """Return a heat map of ||W' - W|| / ||W||."""
    sizes = {id(c): median(t.update_size for t in c.tensors) for c in grid.cells}
    scale = heat_scale(grid)
    frame = _Frame(grid, 24.0)
    svg = _begin(frame, "Size of the update per layer, relative to the base")
    for cell in grid.cells:
        add(svg, _heat(frame, scale, cell, sizes[id(cell)]))
    return svg


def heat_scale(grid: Grid) -> Scale:
    """Return the scale of the heat map, over the updates that are not zero."""
    sizes = [median(t.update_size for t in c.tensors) for c in grid.cells]
    some = [v for v in sizes if v > 0 and math.isfinite(v)] or [1.0]
    low, high = min(some), max(some)
    return Scale(low, high, high / low > HEAT_LOG_FROM)


def heat_legend(scale: Scale) -> Element:
    """Return the steps of the heat map with the values between them."""
    parts = [i / HEAT_STEPS for i in range(HEAT_STEPS + 1)]
    if scale.log:
        bounds = [scale.low * (scale.high / scale.low) ** p for p in parts]
    else:
        bounds = [scale.low + p * (scale.high - scale.low) for p in parts]
    width = 44
    label = f"From {number(scale.low, 2)} (palest) to {number(scale.high, 2)}"
    svg = el("svg", viewBox=f"0 0 {width * HEAT_STEPS + 36} 28", width=width * HEAT_STEPS + 36,
             height=28, role="img", aria_label=label)  # fmt: skip
    for i, bound in enumerate(bounds):
        if i < HEAT_STEPS:
            add(svg, el("rect", class_=f"heat h{i}", x=18 + width * i, y=2, width=width, height=11))
        add(svg, el("text", number(bound, 2), class_="bound", x=18 + width * i, y=25))
    return svg


def mark(status: Status, x: float, y: float, radius: float) -> Element:
    """Return the shape of a status: circle, diamond, cross or open square."""
    css = f"mark {status}"
    if status == "exact":
        return el("circle", class_=css, cx=_px(x), cy=_px(y), r=_px(radius))
    if status == "rounded":
        points = ((x, y - radius), (x + radius, y), (x, y + radius), (x - radius, y))
        path = " ".join(f"{_px(a)},{_px(b)}" for a, b in points)
        return el("polygon", class_=css, points=path)
    a, b, c, d = _px(x - radius), _px(x + radius), _px(y - radius), _px(y + radius)
    if status == "wrong":
        return el("path", class_=css, d=f"M{a} {c}L{b} {d}M{a} {d}L{b} {c}")
    return el("path", class_=css, d=f"M{a} {c}H{b}V{d}H{a}Z")


def legend_mark(status: Status) -> Element:
    """Return the shape of a status as a small picture of its own."""
    radius = 5.0 if status == "wrong" else 4.5
    return el("svg", mark(status, 7, 7, radius), viewBox="0 0 14 14", width=14, height=14,
              aria_hidden="true")  # fmt: skip


def _begin(frame: _Frame, title: str) -> Element:
    """Return a picture with strips, names of kinds and numbers of layers."""
    grid, stacks = frame.grid, list(dict.fromkeys(c.stack for c in frame.grid.columns))
    named = len([s for s in stacks if s]) > 1
    height = frame.bottom + (34 if named else 20)
    wide = frame.right + 12
    svg = el("svg", viewBox=f"0 0 {_px(wide)} {_px(height)}", width=_px(wide), height=_px(height),
             role="img", aria_label=f"{title}. {_extent(grid)}.")  # fmt: skip
    for row, kind in enumerate(grid.kinds):
        y = 6 + frame.strip * row
        css = "strip odd" if row % 2 else "strip"
        add(svg, el("rect", class_=css, x=_px(frame.left), y=_px(y),
                    width=_px(frame.right - frame.left), height=_px(frame.strip)))  # fmt: skip
        label = el("text", _short(kind), class_="kind", x=_px(frame.left - AXIS_WIDTH),
                   y=_px(y + frame.strip / 2 + 4))  # fmt: skip
        add(label, el("title", shown(kind)))
        add(svg, label)
    _columns(svg, frame, named=named)
    return svg


def _extent(grid: Grid) -> str:
    kinds, columns = count(len(grid.kinds), "kind"), count(len(grid.columns), "column")
    return f"{kinds} of modules down, {columns} of layers across; the table below has the numbers"


def _columns(svg: Element, frame: _Frame, *, named: bool) -> None:
    """Number the columns where there is room, part the stacks and name them if ``named``."""
    columns = frame.grid.columns
    step = next((s for s in (1, 2, 5, 10, 20, 50, 100) if s * frame.step >= TICK_GAP), 200)
    free = 0.0
    for i, column in enumerate(columns):
        x = frame.x(i)
        begins = i == 0 or column.stack != columns[i - 1].stack
        if begins and i:
            edge = _px(x - frame.step / 2)
            add(svg, el("line", class_="stack", x1=edge, x2=edge, y1=6, y2=_px(frame.bottom + 4)))
        half = len(column.label) * CHARACTER / 2
        round_one = column.first is None or column.first % step == 0 or "–" in column.label
        if round_one and x - half >= free:
            add(svg, el("text", column.label, class_="tick", x=_px(x), y=_px(frame.bottom + 14)))
            free = x + half + 5
        if begins and named and column.stack:
            _stack_name(svg, frame, i)


def _stack_name(svg: Element, frame: _Frame, first: int) -> None:
    columns = frame.grid.columns
    stack = columns[first].stack
    width = sum(1 for c in columns[first:] if c.stack == stack) * frame.step
    room = int(width / CHARACTER)
    if room >= 3:
        name = el("text", _short(stack, room), class_="stack-name",
                  x=_px(frame.left + first * frame.step + 2), y=_px(frame.bottom + 29))  # fmt: skip
        add(name, el("title", shown(stack)))
        add(svg, name)


def _level(svg: Element, frame: _Frame, part: float, name: str) -> None:
    """Draw a line through every strip."""
    for row in range(len(frame.grid.kinds)):
        y = _px(frame.y(row, part))
        add(svg, el("line", class_=f"level {name}", x1=_px(frame.left), x2=_px(frame.right),
                    y1=y, y2=y))  # fmt: skip


def _axis(svg: Element, frame: _Frame, labels: Sequence[tuple[float, str]]) -> None:
    """Write values at the left of every strip."""
    for row in range(len(frame.grid.kinds)):
        for part, text in labels:
            add(svg, el("text", text, class_="value", x=_px(frame.left - 4),
                        y=_px(frame.y(row, part) + 3.5)))  # fmt: skip


def _gravest(cell: Cell) -> Status:
    return min((t.status for t in cell.tensors), key=GRAVITY.index)


def _distance(frame: _Frame, scale: Scale, cell: Cell) -> Element:
    x, status = frame.x(cell.column), _gravest(cell)
    worst = max(cell.tensors, key=lambda t: (t.status == status, t.max_ulp))
    parts = [scale.at(t.max_ulp) for t in cell.tensors]
    top = frame.y(cell.row, max(parts))
    radius = max(1.6, min(3.6, frame.step * 0.3))
    group = el("g", el("title", _distance_title(cell, worst)))
    if max(parts) - min(parts) > 0.05:
        add(group, el("line", class_="range", x1=_px(x), x2=_px(x), y1=_px(top),
                      y2=_px(frame.y(cell.row, min(parts)))))  # fmt: skip
    add(group, mark(status, x, top, radius * 1.3 if status == "wrong" else radius))
    return group


def _distance_title(cell: Cell, worst: TensorResult) -> str:
    if worst.status == "unchecked":
        numbers = STATUS_WORDS["unchecked"]
    else:
        numbers = (
            f"{number(worst.max_ulp)} ulp of {worst.dtype}, "
            f"{share(worst.misrounded)} not correctly rounded"
        )
    kind = f"{worst.status}: {worst.diagnosis}" if worst.diagnosis else worst.status
    return f"{_who(cell, worst)}\n{numbers}\n{kind}"


def _who(cell: Cell, worst: TensorResult | None = None) -> str:
    if len(cell.tensors) == 1:
        return shown(cell.tensors[0].name)
    many = count(len(cell.tensors), "tensor")
    if worst is None:
        return f"{many}, e.g. {shown(cell.tensors[0].name)}"
    return f"{many}, the worst: {shown(worst.name)}"


def _quantiles(cell: Cell) -> tuple[float, ...] | None:
    """Return the extremes and the medians of the quartiles of a cell's tensors."""
    found = [t.magnitude_ratio for t in cell.tensors if t.magnitude_ratio is not None]
    found = [q for q in found if all(map(math.isfinite, q))]
    if not found:
        return None
    low, *middle, high = zip(*found, strict=True)
    return (min(low), *(median(values) for values in middle), max(high))


def _box(
    frame: _Frame, scale: Scale, cell: Cell, found: tuple[float, ...], width: float
) -> Element:
    x = frame.x(cell.column)
    least, lower, middle, upper, largest = (frame.y(cell.row, scale.at(v)) for v in found)
    numbers = (
        f"m / ‖W‖: median {number(found[2], 4)}, half of them {number(found[1], 4)} to "
        f"{number(found[3], 4)}, all {number(found[0], 4)} to {number(found[4], 4)}"
    )
    height = max(1.2, lower - upper)
    whisker = {"x1": _px(x), "x2": _px(x), "y1": _px(largest), "y2": _px(least)}
    box = {"x": _px(x - width / 2), "y": _px(upper), "width": _px(width), "height": _px(height)}
    median_ = {"x1": box["x"], "x2": _px(x + width / 2), "y1": _px(middle), "y2": _px(middle)}
    return el(
        "g",
        el("title", f"{_who(cell)}\n{numbers}"),
        el("line", class_="whisker", **whisker),
        _arrow(x, largest, -1) if found[4] > scale.high else None,
        _arrow(x, least, 1) if found[0] < scale.low else None,
        el("rect", class_="box", **box),
        el("line", class_="median", **median_),
    )


def _arrow(x: float, y: float, down: int) -> Element:
    """Return the end of a whisker that goes on beyond the scale."""
    points = ((x - 3, y), (x + 3, y), (x, y + 5 * down))
    return el("polygon", class_="beyond", points=" ".join(f"{_px(a)},{_px(b)}" for a, b in points))


def _heat(frame: _Frame, scale: Scale, cell: Cell, middle: float) -> Element:
    level = min(HEAT_STEPS - 1, int(scale.at(middle) * HEAT_STEPS))
    css = "heat zero" if middle == 0 else f"heat h{level}"
    sizes = [t.update_size for t in cell.tensors]
    spread = f", {number(min(sizes))} to {number(max(sizes))}" if len(sizes) > 1 else ""
    gap = 1.0 if frame.step >= 6 else 0.0
    title = el("title", f"{_who(cell)}\n‖W′ − W‖ / ‖W‖ = {number(middle)}{spread}")
    return el("rect", title, class_=css, x=_px(frame.x(cell.column) - frame.step / 2 + gap / 2),
              y=_px(6 + frame.strip * cell.row + 0.5), width=_px(frame.step - gap),
              height=_px(frame.strip - 1))  # fmt: skip


def _short(name: str, limit: int = LABEL_CHARACTERS) -> str:
    """Return a name with its middle left out if it is long: its end tells most."""
    name = printable(name)
    if len(name) <= limit:
        return name
    tail = (limit - 1) * 2 // 3
    return f"{name[: limit - 1 - tail]}…{name[len(name) - tail :]}"


def _px(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
