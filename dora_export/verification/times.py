"""The times of a diffusion, whose sines are float32's in whatever precision the model computes.

diffusers' ``Timesteps`` multiplies a time by up to 1000 (a guidance as well) and takes sines of the
product in float32, so a last place of it is 1e-4 of a sine. Two exact implementations part there,
and a reference in float64 does not see it: it is part of the noise of computing in float32.
Source: github.com/huggingface/diffusers, src/diffusers/models/embeddings.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def round_up(model: nn.Module) -> None:
    """Let a model embed every time as the next one that float32 has."""
    for module in model.modules():
        if type(module).__name__ == "Timesteps":
            module.register_forward_pre_hook(_next)


def _next(module: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
    time = given[0].float()
    return (torch.nextafter(time, time + 1), *given[1:])
