"""What a fused linear of edgepass computes with, read from its call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from edgepass.lowering.vulkan_declined import Refused
from edgepass.lowering.vulkan_graph import GraphEditor
from edgepass.lowering.vulkan_legality import DYNAMIC, require
from edgepass.ops.quantize import VULKAN_SCALE_FLOOR
from edgepass.passes.targets import argument, is_call, is_getitem

LINEARS = ("edgepass.linear_qta8a_qga4w", "edgepass.linear_qga4w")


@dataclass(frozen=True)
class Operands:
    """One linear ``[.., M, K] -> [.., M, N]``.

    ``x`` is the float activation; ``floor`` the least scale with which it is quantized per token,
    None if it is not quantized. ``packed`` uint8 ``[N, ceil(K/2)]``, ``scales`` float and ``zeros``
    int8 ``[N, K/group_size]``, ``bias`` float ``[N]``: constants; ``zeros`` is None if all are 0.
    """

    node: Node
    x: Node
    floor: float | None
    packed: Node
    group_size: int
    scales: Node
    zeros: Node | None
    bias: Node | None

    @property
    def k(self) -> int:
        return self.x.meta["val"].shape[-1]

    @property
    def n(self) -> int:
        return self.packed.meta["val"].shape[0]

    @property
    def result(self) -> Tensor:
        """The fake value of the result."""
        return self.node.meta["val"]

    @property
    def is_one_token(self) -> bool:
        """Whether the activation always has one row: the runtime then reads it as floats."""
        return all(size == 1 for size in self.x.meta["val"].shape[:-1])

    @property
    def quantizes(self) -> bool:
        """Whether the device may quantize the activation."""
        return self.floor is not None and not self.is_one_token


def read_linear(editor: GraphEditor, node: Node) -> Operands:
    """Return the operands of a call of one of ``LINEARS``.

    Raises Refused if a parameter is no constant, the activation's encoding is not its own, or the
    dtypes are none that the runtime has.
    """
    x, floor = _activation(node)
    packed, scales, zeros, bias = (
        argument(node, name) for name in ("w_packed", "w_scales", "w_zeros", "bias")
    )
    for value in (packed, scales, zeros, bias):
        if value is not None and editor.constant(value) is None:
            raise Refused("its weight, scales, zero points or bias are not constants")
    _check_dtypes(x, scales, floor)
    if not editor.required_constant(zeros).any():
        zeros = None
    return Operands(node, x, floor, packed, argument(node, "group_size"), scales, zeros, bias)


def _activation(node: Node) -> tuple[Node, float | None]:
    """Return the float activation of a linear, and the floor of its scales if it is quantized."""
    if is_call(node, "edgepass.linear_qga4w"):
        return argument(node, "x"), None
    if node.target._overloadname == "dynamic":
        return argument(node, "x"), 0.0
    parts = [argument(node, name) for name in ("x_q", "x_scale", "x_zero")]
    sources = {part.args[0] if is_getitem(part) else part for part in parts}
    if len(sources) != 1 or not is_call(next(iter(sources)), "edgepass.quantize_per_token"):
        raise Refused("its activation is not quantized by quantize_per_token")
    if [part.args[1] for part in parts] != [0, 1, 2]:
        raise Refused("its activation's encoding is not that of its values")
    quantize = next(iter(sources))
    floor = argument(quantize, "scale_floor")
    if floor > VULKAN_SCALE_FLOOR:
        raise Refused(f"its activation's scales are at least {floor}, the runtime's less")
    return argument(quantize, "x"), floor


def _check_dtypes(x: Node, scales: Node, floor: float | None) -> None:
    found = x.meta["val"].dtype, scales.meta["val"].dtype
    require(DYNAMIC, {"activation dtype": name_of(found[0])})
    if found == (torch.float16, torch.float32) and floor is not None:
        raise Refused("a float16 activation is quantized for a float32 linear: in other steps")


def name_of(dtype: Any) -> str:
    """``float32`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")
