"""Asymmetric weights on a symmetric kernel: what the zero points take away, group by group.

With the activation x as the kernel sees it (rounded to int8, or in floats for one token),
``sum_g s_g sum_k x_k (w_k - z_g) = sum_g s_g sum_k x_k w_k - sum_g s_g z_g sum_k x_k``.
The last sums, one a group, come from the same kernel, with a weight of ones and zeros and the same
encodings: whether it quantized the activation or not, the correction sees what the product saw.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from edgepass.lowering.vulkan_legal_groups import GroupPlan
from edgepass.ops.packing import pack_int4, unpack_int4


def absorb_zeros(packed: Tensor, zeros: Tensor, k: int, group_size: int) -> Tensor | None:
    """Return the weight without zero points; None if they are floats or it leaves -8..7."""
    if zeros.is_floating_point():
        return None
    values = unpack_int4(packed, k).unflatten(1, (-1, group_size)).to(torch.int16)
    moved = (values - zeros.to(torch.int16).unsqueeze(-1)).flatten(1)
    low, high = (int(bound) for bound in moved.aminmax())
    return pack_int4(moved.to(torch.int8)) if low >= -8 and high <= 7 else None


def rows_of_sums(plan: GroupPlan) -> int:
    """How many rows the sums have: one a group, padded to a multiple of 8."""
    return -(-plan.groups // 8) * 8


def summing_weight(plan: GroupPlan) -> Tensor:
    """The packed weight whose row g sums up group g: uint8 ``[rows_of_sums, columns/2]``."""
    weight = torch.zeros(rows_of_sums(plan), plan.groups, plan.padded, dtype=torch.int8)
    for group in range(plan.groups):
        weight[group, group] = 1
    return pack_int4(weight.flatten(1))


def sum_exponent(plan: GroupPlan) -> int:
    """The power of two that divides the sums, so that float16 holds those of a long group."""
    return math.ceil(math.log2(plan.size))


def correction(scales: Tensor, zeros: Tensor, plan: GroupPlan) -> Tensor:
    """What to multiply the sums by: ``-scale * zero``, ``[N, rows_of_sums]`` in scales' dtype."""
    factors = -(scales.double() * zeros.double()) * 2.0 ** sum_exponent(plan)
    missing = rows_of_sums(plan) - plan.groups
    return torch.nn.functional.pad(factors, (0, missing)).to(scales.dtype)
