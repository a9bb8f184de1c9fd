"""Linears as 1x1 convolutions, which HTP computes right where block-quantized linears go wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Node

from edgepass.passes.editor import Editor
from edgepass.passes.graph_pass import GraphPass
from edgepass.passes.matching import Match
from edgepass.passes.pattern import ops
from edgepass.passes.rule import Refusal, RewriteRule
from edgepass.passes.shapes import fake_tensor

aten = ops("aten")


class ConvertLinear(RewriteRule):
    """``linear`` of a float constant ``w [N, K]`` to ``conv2d`` of ``w [N, K, 1, 1]``."""

    name = "convert-linear"

    def pattern(self, x: Any, weight: Any, bias: Any) -> Any:
        return aten.linear(x, weight, bias)

    def check(self, match: Match) -> Refusal | None:
        x, weight = fake_tensor(match.x), match.program.constant(match.weight)
        if x is None or not 2 <= x.dim() <= 3:
            rank = None if x is None else x.dim()
            return Refusal(f"the input has rank {rank}, accepted are 2 and 3", match.anchor)
        if weight is None or not weight.is_floating_point():
            return Refusal("the weight is not a float constant", match.anchor)
        return None

    def rewrite(self, match: Match, editor: Editor) -> Node:
        x, out = match.x.meta["val"], match.anchor.meta["val"]
        batch, rows, width = (1, *x.shape) if x.dim() == 2 else x.shape
        call, weight = editor.call, match.weight
        columns = match.program.derive_constant(
            ("conv2d", weight),
            f"{match.program.qualified_name(weight)}_conv2d",
            lambda: match.program.required_constant(weight).detach()[:, :, None, None],
        )
        image = call(torch.ops.aten.view.default, match.x, [batch, rows, 1, width])
        image = call(torch.ops.aten.permute.default, image, [0, 3, 2, 1])
        image = call(
            torch.ops.aten.conv2d.default,
            image,
            columns,
            *([] if match.bias is None else [match.bias]),
        )
        image = call(torch.ops.aten.permute.default, image, [0, 3, 2, 1])
        return call(torch.ops.aten.reshape.default, image, list(out.shape))


@dataclass(frozen=True)
class LinearToConv2d(GraphPass):
    """Convert every linear of a float constant.

    What it does: ``[.., S, K]`` becomes an image ``[B, K, 1, S]``, convolved with a 1x1 kernel that
    shares the weight's memory, and is turned back.
    Refuses when: the input's rank is not 2 or 3, or the weight is computed or quantized.
    Numerics: the same products in the order of the convolution's kernel.
    Backends: QNN, for block-quantized (LPBQ) weights.
    """

    name: ClassVar[str] = "linear-to-conv2d"
    agreement_db: ClassVar[float] = 110.0

    def rules(self) -> Sequence[RewriteRule]:
        return (ConvertLinear(),)
