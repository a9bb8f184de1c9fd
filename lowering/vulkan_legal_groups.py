"""Weight groups of any size, as equal groups that the Vulkan runtime sums up right.

A long group is split into equal ones with the scale repeated. A group that cannot be split into
legal ones gets columns of zeros, in the weight and in the activation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from edgepass.lowering.vulkan_legality import DYNAMIC, WEIGHT_ONLY, accepted
from edgepass.ops.packing import pack_int4, unpack_int4

# Columns of zeros cost an operator a call: they must save a third of the weight's bytes.
_COST_OF_PADDING = 1.5
_MOST_COLUMNS_ADDED = 64
# A scale and a group sum, 4 bytes each.
_BYTES_OF_A_GROUP = 8
_ZERO_BYTE = 0x88  # two nibbles of 8, which stand for the value 0


@dataclass(frozen=True)
class GroupPlan:
    """``groups`` of ``size`` columns, each padded to ``padded`` and cut into ones of ``legal``."""

    groups: int
    size: int
    padded: int
    legal: int

    @property
    def columns(self) -> int:
        """K after padding."""
        return self.groups * self.padded

    @property
    def pads(self) -> bool:
        """Whether columns are added."""
        return self.padded != self.size


def plan_groups(k: int, group_size: int, *, quantizes: bool) -> GroupPlan:
    """Return the cheapest legal form of groups of ``group_size``, which divides ``k``."""
    operator = DYNAMIC if quantizes else WEIGHT_ONLY
    groups, start = k // group_size, -(-group_size // 4) * 4
    plans = [
        GroupPlan(groups, group_size, padded, legal)
        for padded in range(start, start + _MOST_COLUMNS_ADDED, 4)
        if accepted(operator, "K").holds(groups * padded)
        for legal in range(4, padded + 1, 4)
        if padded % legal == 0 and accepted(operator, "group size").holds(legal)
    ]
    return min(plans, key=_cost)


def _cost(plan: GroupPlan) -> tuple[float, int]:
    size = plan.padded / 2 + _BYTES_OF_A_GROUP * (plan.padded // plan.legal)
    return size * (_COST_OF_PADDING if plan.pads else 1), plan.padded


def pad_columns(packed: Tensor, plan: GroupPlan) -> Tensor:
    """Add the plan's columns of zeros to a packed weight: uint8 ``[N, plan.columns/2]``."""
    values = unpack_int4(packed, plan.groups * plan.size).unflatten(1, (plan.groups, plan.size))
    added = torch.nn.functional.pad(values, (0, plan.padded - plan.size))
    return pack_int4(added.flatten(1))


def repeat_scales(scales: Tensor, plan: GroupPlan) -> Tensor:
    """Give each part of a group its scale: ``[N, groups]`` to ``[N, columns/legal]``."""
    return scales.repeat_interleave(plan.padded // plan.legal, dim=1)


def pad_rows(packed: Tensor, rows: int) -> Tensor:
    """Add rows of zeros to a packed weight, up to ``rows``."""
    missing = rows - packed.shape[0]
    return torch.nn.functional.pad(packed, (0, 0, 0, missing), value=_ZERO_BYTE)


def pad_first(values: Tensor, rows: int) -> Tensor:
    """Add zeros to the first dimension, up to ``rows``."""
    return torch.cat([values, values.new_zeros(rows - values.shape[0], *values.shape[1:])])
