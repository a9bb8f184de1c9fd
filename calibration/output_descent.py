"""Coordinate descent on a layer's output error: integers, then scales, each to its best value.

Each step solves for one variable with all others held, so that the error
``tr((W - W') H (W - W')^T)`` never grows (Behdin et al., "QuantEase", 2023, does the integers).
"""

from __future__ import annotations

import torch
from torch import Tensor

from edgepass.calibration.grids import RoundedWeight, integer_range, safe_scale

_COLUMNS = 64


def descend(
    weight: Tensor, rounded: RoundedWeight, moments: Tensor, bits: int, sweeps: int
) -> RoundedWeight:
    """Improve ``rounded`` of ``weight`` ``[N, K]`` under the second moments H ``[K, K]``.

    Zero points stay. Worked on as ``[K, N]``, so that a column is contiguous.
    """
    if not sweeps:
        return rounded
    groups = rounded.scale.shape[1]
    size = weight.shape[1] // groups
    scale = rounded.scale.t().contiguous()
    zero = torch.zeros_like(scale)
    if rounded.zero_point is not None:
        zero = rounded.zero_point.float().t().contiguous()
    values = rounded.values.t().float().contiguous()
    # H (W - W')^T, kept up to date with every change of W'.
    pull = moments @ (weight - rounded.dequantize()).t()
    for _ in range(sweeps):
        _move_integers(values, scale, zero, pull, moments, size, bits)
        _move_scales(values, scale, zero, pull, moments, size)
    return RoundedWeight(
        values.t().to(torch.int8).contiguous(), scale.t().contiguous(), rounded.zero_point
    )


def _move_integers(
    values: Tensor,
    scale: Tensor,
    zero: Tensor,
    pull: Tensor,
    moments: Tensor,
    size: int,
    bits: int,
) -> None:
    low, high = integer_range(bits)
    for start in range(0, values.shape[0], _COLUMNS):
        end = min(start + _COLUMNS, values.shape[0])
        changes = torch.empty_like(values[start:end])
        near = pull[start:end]
        for j in range(start, end):
            step = scale[j // size]
            best = (pull[j] / (step * moments[j, j])).add_(values[j])
            best.round_().clamp_(low, high)
            change = torch.mul(best - values[j], step, out=changes[j - start])
            values[j] = best
            near.addr_(moments[start:end, j], change, alpha=-1)
        pull[:start].addmm_(moments[:start, start:end], changes, alpha=-1)
        pull[end:].addmm_(moments[end:, start:end], changes, alpha=-1)


def _move_scales(
    values: Tensor, scale: Tensor, zero: Tensor, pull: Tensor, moments: Tensor, size: int
) -> None:
    for group in range(scale.shape[0]):
        rows = slice(group * size, (group + 1) * size)
        steps = values[rows] - zero[group]
        norm = (steps * (moments[rows, rows] @ steps)).sum(0)
        change = (steps * pull[rows]).sum(0) / norm.clamp(min=2**-126)
        moved = safe_scale(scale[group] + change)
        pull.addmm_(moments[:, rows], steps * (moved - scale[group]), alpha=-1)
        scale[group] = moved
