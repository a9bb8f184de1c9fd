"""Read the dequantization of a weight, in either dialect, as one group-quantized int4 matrix."""

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from edgepass.ops.packing import pack_int4
from edgepass.passes.pattern import ops
from edgepass.passes.program import WorkingProgram
from edgepass.passes.rule import Refusal
from edgepass.passes.targets import argument, operator_name, render_value

torchao = ops("torchao")
quantized_decomposed = ops("quantized_decomposed")

# Every operator that dequantizes a constant matrix by groups of a row.
DEQUANTIZE_WEIGHT = (
    torchao.dequantize_affine
    | quantized_decomposed.dequantize_per_channel_group
    | quantized_decomposed.dequantize_per_channel
)
_WIDE_UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)
_UNSIGNED_OFFSET = 8  # uint4 values 0..15 are stored as -8..7, their zero points go with them


@dataclass(frozen=True)
class GroupedWeight:
    """A matrix ``[rows, columns]`` of small integers with a scale and zero point a group.

    ``values``, ``scales`` and ``zeros`` are the constants' placeholders (``zeros`` None for all
    zero); ``low`` and ``high`` bound the values as stored, ``offset`` above the signed ones.
    """

    program: WorkingProgram
    values: Node
    scales: Node
    zeros: Node | None
    rows: int
    columns: int
    group_size: int
    low: int
    high: int
    offset: int

    @property
    def fits_int4(self) -> bool:
        """Whether the values fit into four bits, signed or not."""
        return self.high - self.offset <= 7 and self.low - self.offset >= -8

    @property
    def is_unsigned(self) -> bool:
        """Whether the values are stored unsigned."""
        return bool(self.offset)

    @property
    def has_zeros(self) -> bool:
        """Whether any zero point differs from 0."""
        if self.offset or self.zeros is None:
            return bool(self.offset)
        return bool(self._tensor(self.zeros).any())

    def packed(self) -> Node:
        """Return the constant in the linear layout, uint8 ``[rows, ceil(columns/2)]``."""
        name = f"{self.program.qualified_name(self.values)}_int4"
        key = ("int4", self.values)
        return self.program.derive_constant(key, name, self._pack, later=True)

    def group_scales(self, dtype: torch.dtype) -> Node:
        """Return the scales as ``[rows, groups]`` of ``dtype``."""
        return self._grouped(self.scales, dtype, 0)

    def channel_scales(self) -> Node:
        """Return the scales of a weight with one a row as float32 ``[rows]``."""
        tensor = self._tensor(self.scales)
        if tensor.dtype == torch.float32 and tuple(tensor.shape) == (self.rows,):
            return self.scales

        def flatten() -> torch.Tensor:
            return tensor.float().flatten().expand(self.rows).contiguous()

        return self._derived(("channels", self.rows), self.scales, flatten)

    def group_zeros(self) -> Node:
        """Return the zero points ``[rows, groups]``: int8, or float32 if they are not whole."""
        if self.zeros is not None:
            whole = is_whole(self._tensor(self.zeros))
            return self._grouped(self.zeros, torch.int8 if whole else torch.float32, self.offset)
        shape, value = self._group_shape, -self.offset
        return self.program.derive_constant(
            ("zeros", shape, value),
            f"zeros_{shape[0]}_{shape[1]}",
            lambda: torch.full(shape, value, dtype=torch.int8),
        )

    @property
    def _group_shape(self) -> tuple[int, int]:
        return (self.rows, self.columns // self.group_size)

    def _tensor(self, node: Node) -> torch.Tensor:
        tensor = self.program.constant(node)
        assert tensor is not None, "read_grouped_weight takes constants only"
        return tensor.detach()

    def _pack(self) -> torch.Tensor:
        values = self._tensor(self.values)
        if self.offset:
            values = (values.to(torch.int16) - self.offset).to(torch.int8)
        return pack_int4(values)

    def _grouped(self, node: Node, dtype: torch.dtype, offset: int) -> Node:
        """Return a constant of encodings by groups: itself if it has that form already."""
        tensor, shape = self._tensor(node), self._group_shape
        if tensor.dtype == dtype and tuple(tensor.shape) == shape and not offset:
            return node

        def regroup() -> torch.Tensor:
            spread = tensor.expand(shape) if tensor.numel() == 1 else tensor.reshape(shape)
            if spread.dtype in _WIDE_UNSIGNED:
                spread = spread.to(torch.int64)  # torch does not subtract from these
            return (spread - offset if offset else spread).to(dtype).contiguous()

        return self._derived(("groups", dtype, shape, offset), node, regroup)

    def _derived(self, kind: Hashable, source: Node, make: Callable[[], torch.Tensor]) -> Node:
        name = f"{self.program.qualified_name(source)}_groups"
        return self.program.derive_constant((kind, source), name, make)


def read_grouped_weight(program: WorkingProgram, dequantize: Node) -> GroupedWeight | Refusal:
    """Return the weight behind one of ``DEQUANTIZE_WEIGHT``, or why it is no grouped matrix."""
    found = _constants(program, dequantize)
    if isinstance(found, Refusal):
        return found
    values, scales, zeros = found
    tensor = program.constant(values)
    assert tensor is not None, "checked by _constants"
    if tensor.dim() != 2 or tensor.dtype not in (torch.int8, torch.uint8):
        form = f"{tensor.dtype} {list(tensor.shape)}"
        return Refusal(f"the weight {values.name} is {form}, expected int8 [N, K]", values)
    group = _group_size(dequantize, tuple(tensor.shape))
    if isinstance(group, Refusal):
        return group
    rows, columns = tensor.shape
    refusal = _check_encodings(program, scales, zeros, rows * (columns // group))
    if refusal is not None:
        return refusal
    low, high = (int(bound) for bound in tensor.aminmax()) if tensor.numel() else (0, 0)
    offset = _UNSIGNED_OFFSET if tensor.dtype == torch.uint8 else 0
    return GroupedWeight(program, values, scales, zeros, rows, columns, group, low, high, offset)


def check_int4(weight: GroupedWeight, dtype: torch.dtype) -> Refusal | None:
    """Refuse values beyond four bits, and scales that ``dtype`` cannot hold exactly."""
    if not weight.fits_int4:
        found = f"values {weight.low}..{weight.high}, beyond 4 bits"
        return Refusal(f"the weight {weight.values.name} has {found}", weight.values)
    return check_scales(weight, dtype)


def check_scales(weight: GroupedWeight, dtype: torch.dtype) -> Refusal | None:
    """Refuse scales that ``dtype``, the result's, cannot hold exactly."""
    scales = weight.program.constant(weight.scales)
    assert scales is not None, "a constant"
    if scales.dtype != dtype and not torch.equal(scales.to(dtype).to(scales.dtype), scales):
        return Refusal(
            f"the scales {weight.scales.name} are {scales.dtype}, the result is {dtype}",
            weight.scales,
        )
    return None


def _constants(program: WorkingProgram, call: Node) -> tuple[Node, Node, Node | None] | Refusal:
    torchao_form = operator_name(call.target).startswith("torchao.")
    names = ("input", "scale", "zero_point") if torchao_form else _decomposed_names(call)
    values, scales, zeros = (argument(call, name) for name in names)
    mutable = program.mutable_constants()
    for node in (values, scales, zeros):
        if node is None:
            continue
        if program.constant(node) is None or node in mutable:
            return Refusal(f"{render_value(node)} of {call.name} is no constant", call)
    return values, scales, zeros


def _decomposed_names(call: Node) -> tuple[str, str, str]:
    first = call.target._schema.arguments[0].name  # type: ignore[union-attr]
    return (first, "scales", "zero_points")


def _group_size(call: Node, shape: tuple[int, ...]) -> int | Refusal:
    """Return how many columns of a row share a scale."""
    rows, columns = shape
    name = operator_name(call.target)
    if name == "torchao.dequantize_affine":
        block = list(argument(call, "block_size"))
        if len(block) != 2 or block[0] not in (1, rows) or (block[0] > 1 and block[1] != columns):
            return Refusal(f"its blocks are {block}, expected [1, group size]", call)
        group = block[1]
    elif name == "quantized_decomposed.dequantize_per_channel":
        axis = argument(call, "axis")
        if axis % 2:
            return Refusal("it has a scale for each column, expected one for each row", call)
        group = columns
    else:
        group = min(argument(call, "group_size"), columns)
    if not isinstance(group, int) or group < 1 or columns % group:
        return Refusal(f"group size {group} does not divide {columns} columns", call)
    return group


def _check_encodings(
    program: WorkingProgram, scales: Node, zeros: Node | None, groups: int
) -> Refusal | None:
    for node in (scales, zeros):
        tensor: Any = program.constant(node)
        if tensor is not None and tensor.numel() not in (1, groups):
            return Refusal(f"{node} has {tensor.numel()} values for {groups} groups", scales)
    zero = program.constant(zeros)
    if zero is None or not zero.numel():
        return None
    # torch finds no bounds of these.
    comparable = zero.double() if zero.dtype in _WIDE_UNSIGNED else zero
    low, high = (bound.item() for bound in comparable.aminmax())
    if low == high == 0:
        return None
    if not math.isfinite(low) or not math.isfinite(high):
        return Refusal(f"the zero points {zeros} are not finite ({low:g}..{high:g})", scales)
    if is_whole(zero) and (low < -120 or high > 127):
        return Refusal(f"the zero points {zeros} are no int8 ({low:g}..{high:g})", scales)
    return None


def is_whole(zeros: torch.Tensor) -> bool:
    """Whether zero points are integers, stored as such or not."""
    return not zeros.is_floating_point() or torch.equal(zeros, zeros.round())
