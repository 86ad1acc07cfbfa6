"""Magnitudes beside the norms they were trained from, looked at in some lines of every layer.

DoRA begins with ``m = ||W||`` and stays near ``||W + s B A||``. Where it is far from it, base, axis
or scaling are most likely not the trainer's, although every name and shape fits. A few lines of
each layer are read, so that this takes a moment even beside a large model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from dora_export.pieces import Region, regions
from dora_export.plan import Plan, Settings, Step
from dora_export.tensors import TensorRef
from dora_export.unscaled_norm import UnscaledNorm
from dora_export.update import Product
from dora_export.verification.exact import Exact, read_columns, read_rows
from dora_export.verification.parallel import each
from dora_export.verification.values import Floats, floats, operand_values
from dora_export.words import compact, number

LAYERS = 128  # of one adapter; more are drawn, so that every kind of layer is likely among them
LINES = 16  # of each layer: rows, or columns where norms run down them
CELLS = 1 << 25  # elements read in all where norms run down columns, MIN_ROWS permitting
MIN_ROWS = 64  # of a tensor, evenly spread: the norm of a column is known to a tenth then
CONFIRMED = 1 << 28  # elements of doubtful layers that are read whole
CROSSED = 4  # doubtful layers whose norms along the other axis are looked at
FAR = 0.5  # |m / norm - 1| of a layer's middle line from which it is doubtful
NEAR = 0.1  # what explains magnitudes is nearer to them than this
NAMED = 5  # folded names of layers

Picked = NDArray[np.intp]


@dataclass(frozen=True)
class Look:
    """Some lines of one layer.

    Attributes:
        step: Its tensor.
        region: Where in it, with the change of one adapter alone.
        magnitudes: m of the lines; the factor itself where it was divided by the norm beforehand.
        norms: ``||W + s B A||`` of them, without eps, or 1 where m is the factor.
        bare: ``||W||`` of them.
        exact: The norms are those of whole lines.
    """

    step: Step
    region: Region
    magnitudes: Floats
    norms: Floats
    bare: Floats
    exact: bool = True

    @property
    def off(self) -> float:
        """Median of ``|m / norm - 1|``; 0 where no line has a direction."""
        return _off(self.magnitudes, self.norms)


def _off(magnitudes: Floats, norms: Floats) -> float:
    there = np.isfinite(norms) & (norms > 0)
    return float(np.median(np.abs(magnitudes[there] / norms[there] - 1))) if there.any() else 0.0


def looks(plan: Plan, position: int) -> list[Look]:
    """Return a look at the layers of one adapter of a plan that have magnitudes."""
    found = [
        (step, alone)
        for step in plan.steps
        for region in regions(step)
        if (alone := _alone(region, position)) is not None
    ]
    if len(found) > LAYERS:
        drawn = np.random.default_rng(0).choice(len(found), LAYERS, replace=False)
        found = [found[i] for i in np.sort(drawn)]
    cells = CELLS // max(1, sum(region.changes[0].over == "column" for _, region in found))
    return list(_confirmed(each(lambda place: _look(*place, cells), found)))


def doubt(looked: Sequence[Look]) -> str | None:
    """Return what to tell of magnitudes far from their norms, or None where none are."""
    far = [look for look in looked if look.off > FAR]
    if not far:
        return None
    names = compact(look.step.name for look in far)
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    middle = number(float(np.median([look.off for look in far])), 2, ascii_only=True)
    divided = all(look.region.changes[0].magnitude_is_factor for look in far)
    quotient = "m, divided by the norm as it is," if divided else "m / ||W + s B A||"
    return (
        f"magnitudes are far from what training leaves: {quotient} differs from 1 by {middle} "
        f"(median) in {len(far)} of {len(looked)} layers: {', '.join(names[:NAMED])}{more}. "
        f"{reason(far)}. Nothing is wrong if it was trained so: let the merged model answer a "
        "prompt of the training data"
    )


def are_of_the_base(looked: Sequence[Look]) -> bool:
    """Return whether magnitudes are ``||W||``, beside which the product is too large."""
    return all(_off(look.magnitudes, look.bare) < NEAR for look in looked)


def reason(far: Sequence[Look]) -> str:
    """Return the likeliest cause, by what the magnitudes are near to instead."""
    if are_of_the_base(far):
        return (
            "They are the norms of the base's own lines, so the adapter's product is too large "
            "beside it: check the scaling (alpha and rank in the adapter's config, or --alpha)"
        )
    if all(_crossed(look) < NEAR for look in far[:CROSSED]):
        return (
            "They are the norms along the other axis: check what one magnitude belongs to in the "
            "trainer's settings (--axis, where the format leaves it open)"
        )
    return "Check that this is the base it was trained on, and the scaling"


def _alone(region: Region, position: int) -> Region | None:
    """Return a region as one adapter alone would change it, if by one norm."""
    own = [c for c in region.changes if c.adapter == position]
    if len(own) != 1:
        return None
    change = own[0]
    if isinstance(change.function, UnscaledNorm):  # its norm is that of W + B A
        function = change.function
        change = replace(change, kind="dora", function=None, scaling=1.0, over="row",
                         delta=Product(function.up, function.down),
                         magnitude=function.magnitude)  # fmt: skip
    return replace(region, changes=(change,)) if change.magnitude is not None else None


def _look(step: Step, region: Region, cells: int) -> Look:
    """Look at some lines; at columns in as many rows as ``cells`` elements allow."""
    change = region.changes[0]
    assert change.magnitude is not None, "Bug: _alone() picks layers with magnitudes"
    m = operand_values(change.magnitude).ravel()
    lines = _spread(m.size, LINES)
    if change.magnitude_is_factor:
        ones = np.ones(lines.size)
        return Look(step, region, m[lines], ones, ones)
    if change.over == "row":
        base = read_rows(step.source, region, lines)
        norms, bare = _norms(base + _rows_of_product(step, region, lines)), _norms(base)
        return Look(step, region, m[lines], norms, bare)
    columns = (lines[:, None] * change.group + np.arange(change.group)).ravel()
    rows = _spread(region.rows, max(MIN_ROWS, cells // max(1, region.columns)))
    whole = rows.size == region.rows
    read = read_columns(step.source, region, columns) if whole else None
    base = _cells(step, region, rows, columns) if read is None else read
    product = Exact.open(step.source, region, Settings()).product(rows, columns)
    # (rows, columns) to (columns that share a norm, the rest)
    lying = [
        v.T.reshape(lines.size, -1) for v in (base if product is None else base + product, base)
    ]
    norms, bare = (np.sqrt(region.rows / rows.size) * _norms(v) for v in lying)
    return Look(step, region, m[lines], norms, bare, whole)


def _spread(size: int, count: int) -> Picked:
    """Return ``count`` positions of ``size``, or all there are, evenly spread."""
    return np.unique(np.linspace(0, size - 1, min(count, size)).astype(np.intp))


def _rows_of_product(step: Step, region: Region, rows: Picked) -> Floats | float:
    """Return some rows of ``s B A``, with no more of B widened than it takes."""
    change = region.changes[0]
    if not isinstance(change.delta, Product) or change.delta.left.combine is not None:
        product = Exact.open(step.source, region, Settings()).product(rows, slice(None))
        return 0.0 if product is None else product
    left = change.delta.left
    stored = left.value(TensorRef.raw)[rows]
    up = floats(stored.ravel(), left.ref.dtype).reshape(stored.shape)
    result: Floats = change.scaling * up @ operand_values(change.delta.right)
    return result


def _cells(step: Step, region: Region, rows: Picked, columns: Picked) -> Floats:
    """Return some columns of some stored rows, a row at a time."""
    starts = region.start + rows * region.columns
    picked = [step.source.raw(int(a), int(a) + region.columns)[columns] for a in starts]
    return floats(np.concatenate(picked), step.source.dtype).reshape(rows.size, -1)


def _norms(values: Floats) -> Floats:
    with np.errstate(over="ignore", invalid="ignore"):  # inf and NaN are no norms, and left out
        norms: Floats = np.sqrt(np.einsum("ij,ij->i", values, values))
    return norms


def _confirmed(looked: Sequence[Look]) -> Iterator[Look]:
    """Yield the looks, doubtful ones of sampled columns again with whole columns."""
    left = CONFIRMED
    for look in looked:
        cells = look.region.rows * look.region.columns
        if look.exact or look.off <= FAR or cells > left:
            yield look
        else:
            left -= cells
            yield _look(look.step, look.region, cells)


def _crossed(look: Look) -> float:
    """Return how far a square layer's magnitudes are from the norms along the other axis."""
    change = look.region.changes[0]
    if look.region.rows != look.region.columns or change.magnitude_is_factor:
        return math.inf
    turned = replace(change, over="column" if change.over == "row" else "row")
    region = replace(look.region, changes=(turned,))
    return _look(look.step, region, region.rows * region.columns).off
