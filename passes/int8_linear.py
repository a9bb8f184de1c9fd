"""Linears of int8 weights, one scale a channel, with a dynamically quantized activation."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import Node

from edgepass.passes.editor import Editor
from edgepass.passes.graph_pass import GraphPass, Order
from edgepass.passes.linear_form import check_form, place_result
from edgepass.passes.matching import Match
from edgepass.passes.quantized_activation import check_activation, scale_floor
from edgepass.passes.quantized_linear_rules import DynamicallyQuantizedLinear
from edgepass.passes.quantized_weight import (
    GroupedWeight,
    check_scales,
    read_grouped_weight,
)
from edgepass.passes.rule import Refusal, RewriteRule
from edgepass.passes.shapes import fake_tensor


class Int8Linear(DynamicallyQuantizedLinear):
    """A linear of an activation quantized per token and an int8 weight by channel."""

    name = "int8-linear"

    def check(self, match: Match) -> Refusal | None:
        return check_activation(match) or check_form(match, match.x) or _check_weight(match)

    def rewrite(self, match: Match, editor: Editor) -> Node:
        weight: GroupedWeight = match.facts["weight"]
        call = torch.ops.edgepass.linear_qta8a_qc8w.dynamic
        floor = scale_floor(match.choose)
        rest = [match.bias] if floor is None else [match.bias, floor]
        linear = editor.call(call, match.x, weight.values, weight.channel_scales(), *rest)
        return place_result(match, editor, linear, weight.rows)


@dataclass(frozen=True)
class FuseInt8Linear(GraphPass):
    """Fuse quantize, dequantize and linear into ``edgepass::linear_qta8a_qc8w``.

    What it does: a linear of a dynamically quantized activation and an int8 weight with one scale a
    channel becomes one operator on the float activation. Linears of 4 bits have been fused before.

    Before: ``linear(dq(q(x, scale, zero), scale, zero), dequantize(w, w_scales), bias)``
    After: ``linear_qta8a_qc8w.dynamic(x, w, w_scales, bias)``

    Refuses when: the weight has groups, zero points or values that are not int8; the activation is
    not asymmetric int8 per token, or it is not float32.

    Numerics: exact integer sums, scaled in float32: 100 dB or better. The decomposed dialect adds
    the zero point before it rounds, edgepass after: a value half-way may round the other way.

    Backends: XNNPACK.
    """

    name: ClassVar[str] = "fuse-int8-linear"
    after: ClassVar[tuple[Order, ...]] = (
        Order("canonicalize", "quantized parameters must be unwrapped to be read"),
        Order("fuse-quantized-linear", "linears of 4 bits have an operator of their own"),
    )
    agreement_db: ClassVar[float] = 100.0
    rounding_flip_db: ClassVar[float | None] = 30.0

    def rules(self) -> Sequence[RewriteRule]:
        return (Int8Linear(),)


def _check_weight(match: Match) -> Refusal | None:
    weight = read_grouped_weight(match.program, match.dequantized_weight)
    if isinstance(weight, Refusal):
        return weight
    match.facts["weight"] = weight
    if weight.group_size != weight.columns:
        size = weight.group_size
        return Refusal(
            f"the weight {weight.values.name} of 8 bits has groups of {size}, expected one scale "
            "a channel",
            weight.values,
        )
    if weight.is_unsigned or weight.has_zeros:
        return Refusal(f"the weight {weight.values.name} of 8 bits has zero points", weight.values)
    x, result = fake_tensor(match.x), fake_tensor(match.anchor)
    if x is None or result is None or {x.dtype, result.dtype} != {torch.float32}:
        return Refusal(f"{match.x.name} is not float32", match.x)
    return check_scales(weight, result.dtype)
