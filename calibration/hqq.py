"""Half-quadratic quantization: torchao's, which needs no data.

Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models" (2023). torchao
offers it with a symmetric grid (scale only); the grid with a float offset is solved here by the
same alternation with a shrinking residual.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchao.quantization import IntxUnpackedToInt8Tensor
from torchao.quantization.quantize_.workflows import IntxChooseQParamsAlgorithm

from edgepass.calibration.grids import (
    GridSpec,
    RoundedWeight,
    from_grid,
    group_size_of,
    round_to,
    row_blocks,
)
from edgepass.calibration.round_to_nearest import spanning_grid
from edgepass.ops.errors import InvalidArgumentError

# The paper's: the norm's exponent, the weight of the quadratic term and its growth.
_EXPONENT, _BETA, _GROWTH, _ROUNDS = 0.7, 10.0, 1.01, 20


def half_quadratic(weight: Tensor, spec: GridSpec) -> RoundedWeight:
    """Round ``weight`` ``[N, K]`` with the grids that HQQ finds.

    Raises InvalidArgumentError for an integer zero point, which it has no form of.
    """
    size = group_size_of(weight, spec)
    if spec.mapping == "asymmetric":
        raise InvalidArgumentError(
            "got mapping='asymmetric' for algorithm='hqq', accepted are symmetric and float_offset"
        )
    if spec.mapping == "float_offset":
        return _with_offsets(weight, spec, size)
    parts = [
        IntxUnpackedToInt8Tensor.from_hp(
            weight[rows].float(),
            (1, size),
            getattr(torch, f"int{spec.bits}"),
            intx_choose_qparams_algorithm=IntxChooseQParamsAlgorithm.HQQ_SCALE_ONLY,
        )
        for rows in row_blocks(*weight.shape)
    ]
    return RoundedWeight(
        torch.cat([part.qdata for part in parts]), torch.cat([part.scale for part in parts]), None
    )


def _with_offsets(weight: Tensor, spec: GridSpec, size: int) -> RoundedWeight:
    groups = weight.float().unflatten(1, (-1, size))
    scale, zero = spanning_grid(groups, spec.bits)
    best, beta = torch.full_like(scale, torch.inf), _BETA
    kept = zero
    for _ in range(_ROUNDS):
        values = round_to(groups, scale, zero, spec.bits)
        residual = groups - from_grid(values, scale, zero)
        error = residual.abs().sum(-1)
        kept, best = torch.where(error < best, zero, kept), torch.minimum(error, best)
        shrunk = residual.abs() - residual.abs().clamp(min=1e-8).pow(_EXPONENT - 1) / beta
        outliers = residual.sign() * shrunk.clamp(min=0)
        zero = (values - (groups - outliers) / scale.unsqueeze(-1)).mean(-1)
        beta *= _GROWTH
    values = round_to(groups, scale, kept, spec.bits)
    return RoundedWeight(values.flatten(1).to(torch.int8), scale, kept)
