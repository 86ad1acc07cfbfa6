"""torch's answer to ``Arithmetic``: the formula on one CUDA device, one stream per worker.

Each worker thread owns a stream and pinned host buffers, so one worker's copies overlap with
another's arithmetic and a third's file reading. On ``torch.device("cpu")`` the same code runs
without streams, which is how it is tested where there is no GPU.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dora_export.errors import DeviceError
from dora_export.tensors import DType


def open_device(name: str) -> torch.device:
    """Return the CUDA device called ``name`` ("cuda" or "cuda:N").

    Raises:
        DeviceError: The name is no CUDA device, or there is none of that number here.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise DeviceError(f"--device {name}: not a device. Use cpu, cuda or cuda:N.") from error
    if device.type != "cuda":
        raise DeviceError(f"--device {name}: not supported. Use cpu, cuda or cuda:N.")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if (device.index or 0) >= count:
        build = "" if torch.version.cuda else " (this torch is a build without CUDA)"
        raise DeviceError(
            f"--device {name}: torch {torch.__version__} sees {count} CUDA device(s){build}. "
            "Use --device cpu, or install a CUDA build of torch on a machine with a GPU."
        )
    return torch.device("cuda", device.index or 0)


class TorchArithmetic:
    """torch on one device; on CUDA each instance has a stream of its own.

    Args:
        device: Where to compute.
        precision: Working precision.
    """

    xp: Any = torch
    tile_elements = 1 << 23  # 32 MiB of float32: enough to fill a GPU, small beside its memory
    compiled = False

    def __init__(self, device: torch.device, precision: torch.dtype) -> None:
        self.device, self.precision = device, precision
        stream: Any = torch.cuda.Stream  # its constructor has no annotations
        self.stream = stream(device) if device.type == "cuda" else None
        if self.stream is not None:
            torch.cuda.set_device(device)
            torch.cuda.set_stream(self.stream)  # streams are current per thread
            if torch.backends.cuda.matmul.allow_tf32:
                raise DeviceError(
                    "torch.backends.cuda.matmul.allow_tf32 is set: float32 products would be "
                    "rounded to 10 bits. Set it to False before merging."
                )

    def empty(self, size: int) -> torch.Tensor:  # noqa: D102 - as in the Protocol
        return torch.empty(size, dtype=self.precision, device=self.device)

    def put(self, host: NDArray[Any]) -> torch.Tensor:  # noqa: D102
        values = torch.from_numpy(np.ascontiguousarray(host)).to(self.device)
        if self.stream is not None:
            self.stream.synchronize()
        return values

    def as_working(self, values: torch.Tensor) -> torch.Tensor:  # noqa: D102
        return values.to(self.precision)

    def host(self, values: torch.Tensor) -> NDArray[Any]:  # noqa: D102
        array: NDArray[Any] = values.cpu().numpy()
        return array

    def widen(self, raw: NDArray[Any], dtype: DType, out: torch.Tensor) -> None:  # noqa: D102
        stored = _as_torch(raw, dtype)
        out.view(-1).copy_(stored.to(self.device, non_blocking=True).view(-1))

    def narrow(  # noqa: D102
        self, values: torch.Tensor, dtype: DType, raw: NDArray[Any], work: torch.Tensor
    ) -> None:
        target = _as_torch(raw, dtype)
        if values.dtype == torch.float64 and target.dtype in (torch.bfloat16, torch.float16):
            values = _odd_float32(values)
        # One rounding, nearest even, on the device; then the stored bits travel.
        target.view(-1).copy_(values.view(-1).to(target.dtype), non_blocking=True)
        if self.stream is not None:
            self.stream.synchronize()

    def add_product(  # noqa: D102
        self, values: torch.Tensor, left: torch.Tensor, right: torch.Tensor, work: torch.Tensor
    ) -> None:
        values.addmm_(left, right)

    def row_squares(self, values: torch.Tensor) -> torch.Tensor:  # noqa: D102
        norms: torch.Tensor = torch.linalg.vector_norm(values, dim=1, dtype=torch.float64)
        return norms.square_()

    def column_squares(self, values: torch.Tensor, work: torch.Tensor) -> torch.Tensor:  # noqa: D102
        norms: torch.Tensor = torch.linalg.vector_norm(values, dim=0, dtype=torch.float64)
        return norms.square_()

    def host_buffer(self, nbytes: int) -> NDArray[np.uint8]:  # noqa: D102
        # Pinned: the device copies from and to it while the CPU goes on.
        memory = torch.empty(nbytes, dtype=torch.uint8, pin_memory=self.stream is not None)
        array: NDArray[np.uint8] = memory.numpy()
        return array


def _as_torch(raw: NDArray[Any], dtype: DType) -> torch.Tensor:
    """Return stored host bytes as a tensor of their own dtype, sharing the memory."""
    return torch.from_numpy(raw.view(np.uint8)).view(getattr(torch, dtype.torch))


def _odd_float32(values: torch.Tensor) -> torch.Tensor:
    """Round float64 to float32, inexact results to an odd last bit: see ``cast._odd_float32``."""
    single = values.to(torch.float32)
    bits, wide = single.view(torch.int32), single.double()
    even = (wide != values) & torch.isfinite(single) & ((bits & 1) == 0)
    step = torch.where(values.abs() > wide.abs(), 1, -1).to(torch.int32)
    return torch.where(even, bits + step, bits).view(torch.float32)
