"""Products of matrices whose accumulator is half precision.

All values are float32 that half can hold. A product of two of them is exact in float32, so that
each step rounds once, as a fused multiply-add does. The steps are passes over the whole result,
which is why these are slow.
"""

from __future__ import annotations

import torch
from torch import Tensor

from edgepass.simulator.registry import as_half

# Lanes that share the sum for one token, in linear_q4gsw_coop.glsl and sdpa_compute_*_coop.glsl.
_LANES = 64


def half_accumulate(left: Tensor, right: Tensor) -> Tensor:
    """``left [.., M, K] @ right [.., K, N]``, rounded to half after each of the K products."""
    total = torch.zeros(*left.shape[:-1], right.shape[-1])
    for k in range(left.shape[-1]):
        total = as_half(torch.addcmul(total, left[..., k : k + 1], right[..., k : k + 1, :]))
    return total


def half_cooperate(left: Tensor, right: Tensor) -> Tensor:
    """``left [.., 1, K] @ right [.., K, N]`` by 64 lanes, each summing every 64th four of K.

    Each lane rounds after each product; then the lanes' sums are added in pairs, in half.
    """
    k, n = right.shape[-2:]
    padding = -k % (4 * _LANES)
    columns = torch.nn.functional.pad(left.transpose(-1, -2), (0, 0, 0, padding))
    rows = torch.nn.functional.pad(right, (0, 0, 0, padding))
    shape = -1, _LANES, 4
    columns, rows = columns.unflatten(-2, shape), rows.unflatten(-2, shape)
    total = torch.zeros(*right.shape[:-2], _LANES, n)
    for step in range(rows.shape[-4]):
        for i in range(4):
            product = columns[..., step, :, i, :], rows[..., step, :, i, :]
            total = as_half(torch.addcmul(total, *product))
    lanes = _LANES
    while lanes > 1:
        lanes //= 2
        total = as_half(total[..., :lanes, :] + total[..., lanes:, :])
    return total
