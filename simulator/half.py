"""Sums whose accumulator is half precision."""

from __future__ import annotations

import torch
from torch import Tensor

from edgepass.simulator.registry import as_half


def half_accumulate(rows: Tensor, weight: Tensor) -> Tensor:
    """``rows [M, K] @ weight [N, K].T``, rounded to half after each of the K products.

    All values are float32 that half can hold. A product of two of them is exact in float32, as in
    a fused multiply-add; this takes K passes over the result, which is why it is slow.
    """
    total = torch.zeros(rows.shape[0], weight.shape[0])
    columns = weight.t().contiguous()
    for k in range(rows.shape[1]):
        total = as_half(torch.addr(total, rows[:, k], columns[k]))
    return total
