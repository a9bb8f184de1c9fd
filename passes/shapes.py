"""What is known of a node's result: shape, dtype, strides. Never adds a guard on a symbol."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Node


def fake_tensor(value: Any) -> torch.Tensor | None:
    """Return the fake tensor that a node's metadata describes, None for anything else."""
    fake = value.meta.get("val") if isinstance(value, Node) else None
    return fake if isinstance(fake, torch.Tensor) else None


def same_size(left: Any, right: Any) -> bool:
    """Tell whether two sizes are the same number or the same symbolic expression."""
    if isinstance(left, int) or isinstance(right, int):
        return type(left) is type(right) and left == right
    return left.node is right.node or bool(left.node.expr == right.node.expr)


def same_sizes(left: Sequence[Any], right: Sequence[Any]) -> bool:
    """Tell whether two shapes, or two lists of strides, are known to be equal."""
    if len(left) != len(right):
        return False
    symbolic = []
    for one, other in zip(left, right, strict=True):
        if not (isinstance(one, int) and isinstance(other, int)):
            symbolic.append((one, other))
        elif not same_size(one, other):
            return False
    # Numbers first: comparing symbolic expressions is slow.
    return all(same_size(one, other) for one, other in symbolic)


def same_layout(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Tell whether elements lie alike in memory; the stride of a dimension of size 1 is free."""
    if not same_sizes(left.shape, right.shape):
        return False
    steps = zip(left.shape, left.stride(), right.stride(), strict=True)
    return all(same_size(size, 1) or same_size(one, other) for size, one, other in steps)


def is_same_kind(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Tell whether dtype, device and shape are known to be equal."""
    if left.dtype != right.dtype or not same_sizes(left.shape, right.shape):
        return False
    return left.device == right.device and left.layout == right.layout
