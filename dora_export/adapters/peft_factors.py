"""A and B of one PEFT layer, however the variant of LoRA stores them: in blocks, grouped, pruned.

Source: github.com/huggingface/peft 0.21.2, src/peft/tuners/lora/variants.py
(BdLoraLinearVariant, QALoraLinearVariant) and src/peft/tuners/adalora/layer.py (SVDLinear).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dora_export.adapters.peft_config import PeftConfig
from dora_export.errors import shown
from dora_export.tensors import Arrange, Operand, TensorRef


@dataclass(frozen=True)
class Factors:
    """The low-rank product of one layer.

    Attributes:
        down: A, ``(rank, in * kernel)``.
        up: B, ``(out, rank)``.
        scaling: Factor on ``B A``, dimensionless.
        keys: Adapter tensors behind them.
    """

    down: Operand
    up: Operand
    scaling: float
    keys: tuple[str, ...]


@dataclass(frozen=True)
class BlockDiagonal:
    """Lays blocks that are stored one below the other along a diagonal; zeros are the rest.

    Attributes:
        count: How many blocks.
    """

    count: int

    def __call__(self, stacked: NDArray[Any]) -> NDArray[Any]:
        """Return ``(rows, count * columns)`` for ``(rows, columns)``."""
        rows, columns = stacked.shape
        whole = np.zeros((self.count, rows // self.count, self.count, columns), stacked.dtype)
        for i, block in enumerate(stacked.reshape(self.count, -1, columns)):
            whole[i, :, i] = block
        return whole.reshape(rows, self.count * columns)


@dataclass(frozen=True)
class RepeatedColumns:
    """Repeats each column, neighbours alike.

    Attributes:
        times: How often.
    """

    times: int

    def __call__(self, values: NDArray[Any]) -> NDArray[Any]:
        """Return ``(rows, times * columns)`` for ``(rows, columns)``."""
        return np.repeat(values, self.times, axis=1)


def factors(
    module: str, parts: Mapping[str, TensorRef], pair: tuple[str, str], config: PeftConfig
) -> Factors | str:
    """Return a layer's A and B arranged as plain LoRA's, or what is wrong with them.

    Args:
        module: Path of the layer in the model that PEFT wrapped.
        parts: Its stored tensors: those of ``pair``, and "E" (AdaLoRA's singular values).
        pair: Names of A and B in ``parts``.
        config: The adapter's settings.
    """
    a, b = parts[pair[0]], parts[pair[1]]
    if (config.masks is not None) != ("E" in parts):
        return (f"{shown(module)}: lora_E belongs to peft_type ADALORA, whose every layer has one; "
                "the config and the tensors are not of one adapter")  # fmt: skip
    blocks_a, blocks_b = config.blocks(module)
    rank, stored = config.rank(module), (a.shape[:1], b.shape[1:2])
    if len(b.shape) > 2 and stored[0] == (rank,) and 0 < b.shape[1] < rank:
        return (f"{shown(module)}: a convolution with {rank // b.shape[1]} groups; "
                "LoRA on grouped convolutions is not supported")  # fmt: skip
    wrong = (
        stored[0] != (rank,)
        or stored[1] != (rank // blocks_b,)
        or len(a.shape) < 2
        or any(n != 1 for n in b.shape[2:])
        or rank % blocks_a
        or rank % blocks_b
        or b.shape[0] % blocks_b
    )
    if wrong:
        blocks = f" in {max(blocks_a, blocks_b)} blocks" if max(blocks_a, blocks_b) > 1 else ""
        return (f"{shown(module)}: rank {rank}{blocks} by the config, "
                f"but lora_A is {a.shape} and lora_B {b.shape}")  # fmt: skip
    found = Factors(Operand.matrix(a), Operand.matrix(b), config.scaling(module), (a.name, b.name))
    if "E" in parts:
        return _with_singular_values(module, found, a, parts["E"])
    found = replace(found, down=_in_blocks(found.down, blocks_a), up=_in_blocks(found.up, blocks_b))
    return found if config.group_size is None else _grouped(found, config.group_size)


def _with_singular_values(module: str, found: Factors, a: TensorRef, e: TensorRef) -> Factors | str:
    """Return AdaLoRA's B (A * E): a factor on every row of A."""
    if e.shape != (a.shape[0], 1) or len(a.shape) != 2:
        return f"{shown(module)}: lora_A is {a.shape} and lora_E {e.shape}"
    down = Operand.computed((a, e), a.shape, _rows_scaled)
    return replace(found, down=down, keys=(*found.keys, e.name))


def _rows_scaled(a: NDArray[np.float64], e: NDArray[np.float64]) -> NDArray[np.float64]:
    return a * e


def _in_blocks(factor: Operand, blocks: int) -> Operand:
    """Return a factor that is stored as its diagonal blocks, one below the other."""
    if blocks == 1:
        return factor
    rows, columns = factor.shape
    steps: tuple[Arrange, ...] = (*factor.steps, BlockDiagonal(blocks))
    return replace(factor, shape=(rows, columns * blocks), steps=steps)


def _grouped(found: Factors, size: int) -> Factors:
    """Return QA-LoRA's factors: A sees the mean of every ``size`` inputs, times their groups."""
    rank, groups = found.down.shape
    steps: tuple[Arrange, ...] = (*found.down.steps, RepeatedColumns(size))
    down = replace(found.down, shape=(rank, groups * size), steps=steps)
    return replace(found, down=down, scaling=found.scaling * groups / size)
