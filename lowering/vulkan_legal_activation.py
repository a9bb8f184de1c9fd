"""Activations as the Vulkan runtime takes them: one matrix, whole columns, not too small."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from edgepass.lowering.vulkan_declined import Refused
from edgepass.lowering.vulkan_graph import GraphEditor
from edgepass.lowering.vulkan_legal_groups import GroupPlan
from edgepass.lowering.vulkan_legality import DYNAMIC, VIEW, accepted
from edgepass.ops.quantize import VULKAN_SCALE_FLOOR
from edgepass.passes.targets import argument, is_call

_aten = torch.ops.aten
# From a scale of 3.6e-12 on nothing is flushed; values up to 2e31 do not overflow.
_HIGHEST_LIFT = 24


def must_flatten(x: Node, plan: GroupPlan) -> bool:
    """Tell whether the activation has to become one matrix ``[rows, K]``."""
    value = x.meta["val"]
    spreads = plan.pads and plan.groups > 1
    ranks = accepted(DYNAMIC, "rank")
    return spreads or not ranks.holds(value.dim()) or any(size != 1 for size in value.shape[:-2])


def check_flattening(x: Node) -> None:
    """Refuse an activation with two dynamic sizes: a view can infer only one."""
    shape = list(x.meta["val"].shape)
    if not isinstance(shape[-1], int):
        raise Refused(f"its input features are dynamic: {shape}")
    dynamic = sum(not isinstance(size, int) for size in shape)
    if not accepted(VIEW, "dynamic sizes").holds(dynamic):
        raise Refused(f"an activation {shape} with {dynamic} dynamic sizes: a view infers one")


def lift_exponent(floor: float | None, dtype: torch.dtype) -> int:
    """By which power of two an activation is multiplied before the runtime quantizes it.

    The runtime raises scales to 6.1e-5, edgepass to ``floor``. In float16 it would overflow.
    """
    if dtype != torch.float32:
        return 0
    least = max(floor or 0.0, torch.finfo(dtype).smallest_normal)
    return max(0, min(_HIGHEST_LIFT, round(math.log2(VULKAN_SCALE_FLOOR / least))))


class LegalActivations:
    """Makes the legal form of each activation once, for all the linears that read it."""

    def __init__(self, editor: GraphEditor) -> None:
        self.editor = editor
        self._made: dict[Any, Node] = {}
        self._quantized: dict[Any, list[Node]] = {}

    def legal(self, x: Node, plan: GroupPlan, lift: int) -> Node:
        """Return ``x`` flattened, padded and multiplied by ``2**lift``, as far as it needs it.

        Nodes are inserted at the graph's present insertion point.
        """
        if must_flatten(x, plan):
            x = self._once(("flat", x), lambda: self._flat(x))
        if plan.pads:
            x = self._once((x, plan.groups, plan.padded), lambda: self._padded(x, plan))
        if lift:
            x = self._once(("lifted", x, lift), lambda: self._lifted(x, 2.0**lift))
        return x

    def quantized(self, x: Node, floor: float) -> list[Node]:
        """Return values, scale and zero point of ``x``, quantized once for all its users."""
        key = ("quantized", x, floor)
        if key not in self._quantized:
            target = torch.ops.edgepass.quantize_per_token.default
            call = self.editor.call(target, x, floor, like=x)
            self._quantized[key] = [
                self.editor.call(operator.getitem, call, index, like=x) for index in range(3)
            ]
        return self._quantized[key]

    def _once(self, key: Any, make: Callable[[], Node]) -> Node:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def _flat(self, x: Node) -> Node:
        *rows, k = x.meta["val"].shape
        return self._view(x, [math.prod(rows), k])

    def _padded(self, x: Node, plan: GroupPlan) -> Node:
        if plan.groups == 1:
            return self._pad(x, plan)
        rows = x.meta["val"].shape[0]
        spread = self._view(x, [rows, plan.groups, plan.size])
        return self._view(self._pad(spread, plan), [rows, plan.columns])

    def _pad(self, x: Node, plan: GroupPlan) -> Node:
        value, target = x.meta["val"], _aten.constant_pad_nd.default
        padded = value.new_empty([*value.shape[:-1], plan.padded])
        return self.editor.call(target, x, [0, plan.padded - plan.size], 0.0, like=x, val=padded)

    def _lifted(self, x: Node, by: float) -> Node:
        value = x.meta["val"]
        if self._is_norm_to_quantize(x):
            source, weight, eps = (argument(x, name) for name in ("x", "weight", "eps"))
            lifted = self.editor.derive(weight, "lifted", by, lambda content: content * by)
            return self.editor.call(x.target, source, lifted, eps, like=x, val=value)
        sizes = [1] * value.dim()
        factor = self.editor.program.derive_constant(
            ("lift", *sizes, by), "lift", lambda: torch.full(sizes, by, dtype=value.dtype)
        )
        return self.editor.call(_aten.mul.Tensor, x, factor, like=x, val=value)

    def _is_norm_to_quantize(self, x: Node) -> bool:
        """Tell whether the factor can go into a norm's weight, where it costs nothing."""
        if not is_call(x, "edgepass.rms_norm") or self.editor.constant(x.args[1]) is None:
            return False
        return all(is_call(user, "edgepass.quantize_per_token") for user in x.users)

    def _view(self, x: Node, shape: list[Any]) -> Node:
        # The fake result is given: to infer a size of it would pin the dynamic one.
        value, sizes = x.meta["val"].new_empty(shape), [_number(size) for size in shape]
        return self.editor.call(_aten.view.default, x, sizes, like=x, val=value)


def restore_sizes(result: torch.Tensor) -> list[int]:
    """The sizes of a view that gives ``result`` its shape back, -1 for a dynamic one."""
    return [_number(size) for size in result.shape]


def _number(size: Any) -> int:
    return size if isinstance(size, int) else -1
