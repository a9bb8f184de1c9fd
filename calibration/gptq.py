"""GPTQ: round column by column, and let the columns to come make up for each error.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers" (2022). Columns go in the order of falling second moments (activation order); the
groups stay those of neighbouring columns, because their scales are chosen beforehand and only the
computation is permuted: the packed layout is that of any other algorithm.
"""

from __future__ import annotations

import torch
from torch import Tensor

from edgepass.calibration.grids import (
    GridSpec,
    RoundedWeight,
    group_size_of,
    integer_range,
    row_blocks,
)
from edgepass.calibration.input_statistics import InputStatistics, check_statistics
from edgepass.calibration.output_descent import descend
from edgepass.calibration.scale_search import search_with
from edgepass.calibration.seqmse import output_metric
from edgepass.ops.errors import CalibrationError

DAMPING = 0.01
_SWEEPS = 2
_COLUMNS = 128


def gptq(
    weight: Tensor,
    spec: GridSpec,
    statistics: InputStatistics,
    *,
    activation_order: bool = True,
    sweeps: int = _SWEEPS,
) -> RoundedWeight:
    """Round ``weight`` ``[N, K]`` for the least squared output error over the calibration inputs.

    The scales are those of ``sequential_mse``. ``sweeps`` times afterwards each integer, then each
    scale, is moved to its best value given all others (``output_descent``).

    Raises CalibrationError for statistics of another layer.
    """
    check_statistics(weight, statistics)
    size = group_size_of(weight, spec)
    moments = statistics.damped(DAMPING)
    order = torch.arange(weight.shape[1])
    if activation_order:
        order = moments.diagonal().argsort(descending=True, stable=True)
    factor = _inverse_factor(moments[order][:, order]).float()
    grid = search_with(weight, spec, output_metric(moments, size))
    parts = []
    for rows in row_blocks(*weight.shape):
        zero = None if grid.zero_point is None else grid.zero_point[rows]
        part = RoundedWeight(grid.values[rows], grid.scale[rows], zero)
        target = weight[rows].float()
        rounded = _compensate(target, part, factor, order, size, spec.bits)
        parts.append(descend(target, rounded, moments.float(), spec.bits, sweeps))
    return RoundedWeight.joined(parts)


def _inverse_factor(moments: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse of ``moments``, float64 ``[K, K]``."""
    lower, failed = torch.linalg.cholesky_ex(moments)
    if failed.item():
        raise CalibrationError(
            f"inputs of a layer too alike: got second moments of {moments.shape[0]} features that "
            "are not positive definite, accepted are more calibration tokens"
        )
    return torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)


def _compensate(
    weight: Tensor, grid: RoundedWeight, factor: Tensor, order: Tensor, size: int, bits: int
) -> RoundedWeight:
    """Integers for the scales of ``grid``, column by column in ``order``.

    Worked on as ``[K, N]``, so that a column is contiguous.
    """
    low, high = integer_range(bits)
    rest = weight.t()[order].contiguous()
    group = (order // size).tolist()
    scales = grid.scale.t().contiguous()
    zeros = None if grid.zero_point is None else grid.zero_point.float().t().contiguous()
    values = torch.empty_like(rest)
    for start in range(0, len(group), _COLUMNS):
        end = min(start + _COLUMNS, len(group))
        errors = torch.empty_like(rest[start:end])
        for j in range(start, end):
            scale = scales[group[j]]
            steps = rest[j] / scale
            if zeros is not None:
                steps += zeros[group[j]]
            torch.clamp(steps.round_(), low, high, out=values[j])
            nearest = values[j] if zeros is None else values[j] - zeros[group[j]]
            error = errors[j - start]
            torch.sub(rest[j], nearest * scale, out=error)
            error /= factor[j, j]
            rest[j + 1 : end].addr_(factor[j, j + 1 : end], error, alpha=-1)
        rest[end:].addmm_(factor[start:end, end:].t(), errors, alpha=-1)
    restored = torch.empty_like(values)
    restored[order] = values
    return RoundedWeight(restored.t().to(torch.int8).contiguous(), grid.scale, grid.zero_point)
