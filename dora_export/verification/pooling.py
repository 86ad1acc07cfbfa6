"""Sentence embeddings of the reference, by an own formula in float64.

As sentence-transformers defines them (``models/Pooling.py``, ``models/Normalize.py``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from dora_export.verification.runner import Arrays

Mode = Literal["mean", "cls", "last"]
STATES, EMBEDDING = "last_hidden_state", "sentence_embedding"
Derive = Callable[[Arrays, Arrays], dict[str, NDArray[Any]]]


def embedding(mode: Mode, *, normalise: bool) -> Derive:
    """Return what gives a model's embedding, ``(batch, dim)``, for its inputs and outputs."""

    def derive(values: Arrays, outputs: Arrays) -> dict[str, NDArray[Any]]:
        states, mask = outputs[STATES], values["attention_mask"]
        rows = [_row(row.astype(np.float64), kept != 0, mode)
                for row, kept in zip(states, mask, strict=True)]  # fmt: skip
        found = np.stack(rows)
        if normalise:
            found = found / np.linalg.norm(found, axis=1, keepdims=True)
        return {EMBEDDING: found.astype(states.dtype)}

    return derive


def _row(states: NDArray[np.float64], kept: NDArray[np.bool_], mode: Mode) -> NDArray[np.float64]:
    if mode == "mean":
        found: NDArray[np.float64] = states[kept].mean(axis=0)
        return found
    place = 0 if mode == "cls" else int(np.flatnonzero(kept)[-1])
    row: NDArray[np.float64] = states[place]
    return row
