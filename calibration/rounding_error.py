"""The error that rounding makes: of a weight, and of a value as the model runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from edgepass.calibration.grids import RoundedWeight
from edgepass.ops.quantize import quantize_dequantize

# A value, rounded.
Rounding = Callable[[Tensor], Tensor]


def weight_error(rounded: RoundedWeight, weight: Tensor) -> Tensor:
    """What rounding adds to ``weight`` ``[N, K]``, float32."""
    return rounded.dequantize().sub_(weight)


def rounding_of(bits: int, kind: str | None) -> Rounding:
    """How an activation is rounded to ``bits``: a range a token if ``dynamic``, else one a tensor.

    The range of a tensor is that of the chunk at hand, affine, as a min-max observer finds it.
    """
    if kind == "dynamic" and bits == 8:
        return lambda value: quantize_dequantize(value)
    dimension = -1 if kind == "dynamic" else None
    return lambda value: _round_range(value, bits, dimension)


def _round_range(value: Tensor, bits: int, dimension: int | None) -> Tensor:
    steps = 2**bits - 1
    low: Any
    high: Any
    if dimension is None:
        low, high = torch.aminmax(value)
    else:
        low, high = torch.aminmax(value, dim=dimension, keepdim=True)
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = ((high - low) / steps).clamp(min=torch.finfo(torch.float32).eps)
    zero = (-low / scale).round()
    return ((value / scale + zero).round_().clamp_(0, steps) - zero) * scale
