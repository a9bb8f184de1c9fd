"""Linears of any form, rewritten exactly into linears that the Vulkan runtime computes right.

What it does, to each ``edgepass::linear_qta8a_qga4w`` and ``linear_qga4w``, in edgepass's own
operators, so that the program still runs in eager and still means the same:

- groups of any size are split, or padded, into legal ones (``vulkan_legal_groups``);
- output features are padded to a multiple of 8, and the result is cut to size by a slice;
- batches of any rank are flattened, and the result gets its shape back;
- activations are lifted by a power of two, so that the runtime does not flush small ones
  (``vulkan_legal_activation``);
- zero points become a correction by the activation's group sums (``vulkan_legal_zeros``);
- scales take the activation's dtype, and biases the result's.

Weights are changed once, whoever reads them: linears that share one, an embedding tied to one.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from edgepass.lowering.vulkan_declined import Declined, Refused
from edgepass.lowering.vulkan_graph import GraphEditor
from edgepass.lowering.vulkan_legal_activation import (
    LegalActivations,
    check_flattening,
    lift_exponent,
    must_flatten,
    restore_sizes,
)
from edgepass.lowering.vulkan_legal_groups import (
    GroupPlan,
    pad_columns,
    pad_first,
    pad_rows,
    plan_groups,
    repeat_scales,
)
from edgepass.lowering.vulkan_legal_zeros import (
    absorb_zeros,
    correction,
    rows_of_sums,
    sum_exponent,
    summing_weight,
)
from edgepass.lowering.vulkan_operands import LINEARS, Operands, read_linear
from edgepass.ops.quantize import VULKAN_SCALE_FLOOR
from edgepass.passes.targets import argument, is_call

_aten, _edgepass = torch.ops.aten, torch.ops.edgepass


class LinearLegalization:
    """Rewrites each fused linear of a graph into legal form, or says why it stays."""

    def __init__(self, editor: GraphEditor, *, half: bool = False) -> None:
        """Edit through ``editor``; ``half`` tells that the delegates compute in float16."""
        self.editor = editor
        self.half = half
        self.declined: list[Declined] = []
        self.legal: dict[Node, str] = {}
        """Each legal linear's weight, ``""`` for linears that only sum up groups."""
        self._activations = LegalActivations(editor)
        self._sums: dict[Any, Node] = {}

    def run(self) -> None:
        """Rewrite every linear that can be made legal."""
        for node in list(self.editor.graph.nodes):
            if is_call(node, *LINEARS):
                name = self.editor.constant_name(argument(node, "w_packed"))
                try:
                    linear, plan = plan_linear(self.editor, node)
                except Refused as refused:
                    self.declined.append(Declined.of(node, refused, name))
                else:
                    self.legal[self._legalize(linear, plan)] = name

    def _legalize(self, linear: Operands, plan: GroupPlan) -> Node:
        """Put the legal form in the linear's place, and return the legal linear."""
        with self.editor.graph.inserting_before(linear.node):
            linear = self._symmetric_if_exact(linear)
            if self._is_legal(linear, plan):
                return linear.node
            x, lift = self._activation(linear, plan)
            rows = -(-linear.n // 8) * 8
            y = product = self._product(linear, plan, x, lift, rows)
            if linear.zeros is not None:
                y = self._corrected(linear, plan, x, lift, y, rows)
            y = self._cut(y, linear.n)
            self.editor.replace(linear.node, self._restored(linear, plan, y))
        return product

    def _is_legal(self, linear: Operands, plan: GroupPlan) -> bool:
        changes = plan.pads or plan.legal != plan.size or linear.n % 8
        lifts = linear.quantizes and self._lift(linear)
        mixed = linear.scales.meta["val"].dtype != linear.x.meta["val"].dtype
        asymmetric = linear.zeros is not None or linear.packed is not argument(
            linear.node, "w_packed"
        )
        return not (changes or lifts or mixed or asymmetric or must_flatten(linear.x, plan))

    def _lift(self, linear: Operands) -> int:
        dtype = linear.x.meta["val"].dtype
        return 0 if self.half or not linear.quantizes else lift_exponent(linear.floor, dtype)

    def _symmetric_if_exact(self, linear: Operands) -> Operands:
        """Take the zero points off the weight where the result still fits four bits."""
        if linear.zeros is None:
            return linear
        packed, zeros = (self._content(each) for each in (linear.packed, linear.zeros))
        moved = absorb_zeros(packed, zeros, linear.k, linear.group_size)
        if moved is None:
            return linear
        weight = self.editor.derive(linear.packed, "symmetric", linear.zeros, lambda _: moved)
        return replace(linear, packed=weight, zeros=None)

    def _activation(self, linear: Operands, plan: GroupPlan) -> tuple[Node, int]:
        x, lift = linear.x, self._lift(linear)
        wanted = _dtype_of_product(linear)
        if x.meta["val"].dtype != wanted:
            x = self.editor.call(_aten.to.dtype, x, wanted, like=x)
        return self._activations.legal(x, plan, lift), lift

    def _product(self, linear: Operands, plan: GroupPlan, x: Node, lift: int, rows: int) -> Node:
        """The legal linear without what the zero points take away: ``[.., rows]``."""
        dtype = _dtype_of_product(linear)
        weight = linear.packed
        if plan.pads:
            weight = self.editor.derive(
                weight, "spread", plan, lambda packed: pad_columns(packed, plan)
            )
        if rows != linear.n:
            weight = self.editor.derive(weight, "rows", rows, lambda packed: pad_rows(packed, rows))
            self._give_to_tables(linear.packed, weight, rows)
        scales = self.editor.derive(
            *(linear.scales, "legal", (plan, rows, lift, dtype)),
            lambda scales: pad_first(repeat_scales(scales.to(dtype) / 2.0**lift, plan), rows),
        )
        bias = linear.bias and self.editor.derive(
            *(linear.bias, "legal", (rows, dtype)), lambda bias: pad_first(bias.to(dtype), rows)
        )
        return self._call(linear, plan, x, lift, (weight, scales, bias))

    def _call(
        self, linear: Operands, plan: GroupPlan, x: Node, lift: int, parameters: tuple[Any, ...]
    ) -> Node:
        weight, scales, bias = parameters
        shape = scales.meta["val"].shape
        zeros = self.editor.program.derive_constant(
            ("zeros", *shape, 0),
            f"zeros_{shape[0]}_{shape[1]}",
            lambda: torch.zeros(tuple(shape), dtype=torch.int8),
        )
        arguments = (weight, plan.legal, scales, zeros, bias)
        if linear.floor is None:
            return self.editor.call(_edgepass.linear_qga4w.default, x, *arguments, like=linear.node)
        floor = min(linear.floor * 2.0**lift, VULKAN_SCALE_FLOOR)
        parts = self._activations.quantized(x, floor)
        target = _edgepass.linear_qta8a_qga4w.default
        return self.editor.call(target, *parts, *arguments, like=linear.node)

    def _corrected(
        self, linear: Operands, plan: GroupPlan, x: Node, lift: int, y: Node, rows: int
    ) -> Node:
        sums, dtype = self._group_sums(linear, plan, x, lift), _dtype_of_product(linear)
        scales, zeros = (self._content(each) for each in (linear.scales, linear.zeros))
        factors = self.editor.derive(
            *(linear.scales, "correction", (linear.zeros, plan, rows, dtype)),
            lambda _: pad_first(correction(scales.to(dtype), zeros, plan), rows),
        )
        taken = self.editor.call(_aten.linear.default, sums, factors, like=linear.node)
        return self.editor.call(_aten.add.Tensor, y, taken, like=linear.node)

    def _group_sums(self, linear: Operands, plan: GroupPlan, x: Node, lift: int) -> Node:
        """Each group's sum of the activation as the kernel sees it, once for all its linears."""
        dtype = _dtype_of_product(linear)
        key = (x, plan, linear.floor)
        if key not in self._sums:
            make = self.editor.program.derive_constant
            weight = make(("sums", plan), "group_sums", lambda: summing_weight(plan))
            shape = (rows_of_sums(plan), plan.columns // plan.legal)
            by = 2.0 ** -(sum_exponent(plan) + lift)
            scales = make(
                ("sums", plan, by, dtype),
                "group_sums_scales",
                lambda: torch.full(shape, by, dtype=dtype),
            )
            self._sums[key] = self._call(linear, plan, x, lift, (weight, scales, None))
            self.legal[self._sums[key]] = ""
        return self._sums[key]

    def _content(self, constant: Any) -> Tensor:
        tensor = self.editor.constant(constant)
        assert tensor is not None, "read_linear takes constants only"
        return tensor

    def _cut(self, y: Node, n: int) -> Node:
        value = y.meta["val"]
        if value.shape[-1] == n:
            return y
        return self.editor.call(_aten.slice.Tensor, y, value.dim() - 1, 0, n, like=y)

    def _restored(self, linear: Operands, plan: GroupPlan, y: Node) -> Node:
        """Give the result the shape and dtype that the program knows it by."""
        result = linear.result
        if y.meta["val"].dtype != result.dtype:
            y = self.editor.call(_aten.to.dtype, y, result.dtype, like=linear.node)
        if must_flatten(linear.x, plan):
            sizes = restore_sizes(result)
            y = self.editor.call(_aten.view.default, y, sizes, like=linear.node, val=result)
        return y

    def _give_to_tables(self, packed: Node, weight: Node, rows: int) -> None:
        """Let embeddings tied to a weight that got more rows read the same bytes."""
        if weight is packed or packed.meta["val"].shape[1] != weight.meta["val"].shape[1]:
            return
        for user in list(packed.users):
            if is_call(user, "edgepass.embedding_qg") and argument(user, "weight") is packed:
                for place in (1, 2):
                    values = user.args[place]
                    if values is not None:
                        more = self.editor.derive(
                            *(values, "rows", rows), lambda each: pad_first(each, rows)
                        )
                        user.update_arg(place, more)
                user.update_arg(0, weight)


def plan_linear(editor: GraphEditor, node: Node) -> tuple[Operands, GroupPlan]:
    """Return what a linear computes with and how its groups become legal, without a change.

    Raises Refused if it cannot be made legal exactly.
    """
    linear = read_linear(editor, node)
    if not isinstance(linear.k, int):
        raise Refused(f"its input features are dynamic: {list(linear.x.meta['val'].shape)}")
    plan = plan_groups(linear.k, linear.group_size, quantizes=linear.quantizes)
    if must_flatten(linear.x, plan):
        check_flattening(linear.x)
    return linear, plan


def _dtype_of_product(linear: Operands) -> torch.dtype:
    """The wider of the dtypes of activation and scales."""
    kinds = {linear.x.meta["val"].dtype, linear.scales.meta["val"].dtype}
    return torch.float16 if kinds == {torch.float16} else torch.float32
