"""The two rules that fuse a linear of a quantized weight."""

from typing import Any

import torch
from torch.fx import Node

from edgepass.passes.editor import Editor
from edgepass.passes.linear_form import check_form, linear_form, place_result
from edgepass.passes.matching import Match
from edgepass.passes.pattern import named
from edgepass.passes.quantized_activation import (
    check_activation,
    dynamic_quantization,
    quantize_once,
)
from edgepass.passes.quantized_weight import (
    DEQUANTIZE_WEIGHT,
    GroupedWeight,
    check_int4,
    read_grouped_weight,
)
from edgepass.passes.rule import Refusal, RewriteRule
from edgepass.passes.shapes import fake_tensor
from edgepass.passes.targets import is_call

_DEQUANTIZE_ACTIVATION = (
    "torchao.dequantize_affine",
    "quantized_decomposed.dequantize_per_token",
    "quantized_decomposed.dequantize_per_tensor",
)


class DynamicallyQuantizedLinear(RewriteRule):
    """A linear of an activation quantized per token and an int4 weight."""

    name = "dynamically-quantized-linear"

    def pattern(self, x: Any, bias: Any) -> Any:
        weight = named("dequantized_weight", DEQUANTIZE_WEIGHT(...))
        return linear_form(dynamic_quantization(x), weight, bias, through_view=True)

    def check(self, match: Match) -> Refusal | None:
        return check_activation(match) or check_form(match, match.x) or _check_weight(match)

    def rewrite(self, match: Match, editor: Editor) -> Node:
        quantized = quantize_once(match, editor)
        parts = editor.outputs(quantized, 3)
        call = torch.ops.edgepass.linear_qta8a_qga4w
        return _place(match, editor, call, *parts)


class WeightOnlyLinear(RewriteRule):
    """A linear of a float activation and an int4 weight."""

    name = "weight-only-linear"

    def pattern(self, x: Any, bias: Any) -> Any:
        weight = named("dequantized_weight", DEQUANTIZE_WEIGHT(...))
        return linear_form(x, weight, bias, through_view=True)

    def check(self, match: Match) -> Refusal | None:
        if is_call(match.x, *_DEQUANTIZE_ACTIVATION):
            return Refusal(
                f"its input {match.x.name} is quantized in a way that no rule takes", match.x
            )
        return check_form(match, match.x) or _check_weight(match)

    def rewrite(self, match: Match, editor: Editor) -> Node:
        return _place(match, editor, torch.ops.edgepass.linear_qga4w, match.x)


def _check_weight(match: Match) -> Refusal | None:
    weight = read_grouped_weight(match.program, match.dequantized_weight)
    if isinstance(weight, Refusal):
        return weight
    result = fake_tensor(match.anchor)
    assert result is not None, "checked by check_form"
    match.facts["weight"] = weight
    return check_int4(weight, result.dtype)


def _place(match: Match, editor: Editor, operator: Any, *activation: Node) -> Node:
    weight: GroupedWeight = match.facts["weight"]
    result = fake_tensor(match.anchor)
    assert result is not None, "checked by check_form"
    linear = editor.call(
        operator,
        *activation,
        weight.packed(),
        weight.group_size,
        weight.group_scales(result.dtype),
        weight.group_zeros(),
        *([] if match.bias is None else [match.bias]),
    )
    return place_result(match, editor, linear, weight.rows)
