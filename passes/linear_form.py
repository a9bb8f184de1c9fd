"""The spellings of a linear layer: ``linear``, ``matmul``, ``addmm``, ``mm`` and ``bmm``."""

from typing import Any

import torch
from torch.fx import Node

from edgepass.passes.cancel_views import permutation
from edgepass.passes.editor import Editor
from edgepass.passes.matching import Match
from edgepass.passes.pattern import Pattern, any_of, maybe, named, ops
from edgepass.passes.rule import Refusal
from edgepass.passes.shapes import fake_tensor, same_size
from edgepass.passes.targets import is_call

aten = ops("aten")
_RESHAPES = aten.view | aten.reshape | aten._unsafe_view
_BROADCASTS = aten.expand | aten.unsqueeze | aten.view | aten.reshape


def linear_form(activation: Any, weight: Any, bias: Any, *, through_view: bool = False) -> Pattern:
    """Match ``activation @ weight.T + bias`` for a weight ``[N, K]``, however it is spelt.

    ``through_view`` looks for the activation behind the view that flattens it for ``mm``. Binds
    ``rows`` (the activation as a product reads it) and ``turned`` (the transposed weight) where
    they exist; check them with ``check_form``.
    """
    turned = named("turned", (aten.t | aten.permute | aten.transpose)(weight, ...))
    spread = named("spread", maybe(_BROADCASTS, maybe(_BROADCASTS, turned)))
    rows = named("rows", maybe(_RESHAPES, activation) if through_view else activation)
    return any_of(
        aten.linear(activation, weight, bias),
        aten.addmm(bias, rows, turned),
        aten.mm(rows, turned),
        aten.matmul(activation, turned),
        aten.bmm(rows, spread),
    )


def check_form(match: Match, x: Node) -> Refusal | None:
    """Refuse views that mix a row's values with another's, and unknown shapes."""
    before, result = fake_tensor(x), fake_tensor(match.anchor)
    if before is None or result is None or before.dim() == 0:
        return Refusal(f"the shape of {match.anchor.name} or of its input is unknown", match.anchor)
    rows = fake_tensor(match.rows) if match.rows is not None else before
    if rows is None or not same_size(rows.shape[-1], before.shape[-1]):
        return Refusal(f"{match.rows.name} changes the row length of {x.name}", match.rows)
    if rows.dtype != before.dtype:
        return Refusal(f"{match.rows.name} is {rows.dtype}, {x.name} {before.dtype}", match.rows)
    if match.turned is not None and permutation(match.turned) != [1, 0]:
        return Refusal(f"{match.turned.name} does not transpose the weight", match.turned)
    return _check_bias(match, result) or _check_spread(match)


def place_result(match: Match, editor: Editor, linear: Node, columns: int) -> Node:
    """Give the result of a product of flattened rows the shape that the product had."""
    rows = match.rows
    if rows is None or rows not in match.nodes or not is_call(rows, *_RESHAPES.names):
        return linear
    return editor.call(rows.target, linear, [*rows.args[1][:-1], columns])


def _check_bias(match: Match, result: torch.Tensor) -> Refusal | None:
    if match.bias is None:
        return None
    bias = fake_tensor(match.bias)
    if bias is None or bias.dim() != 1 or not same_size(bias.shape[0], result.shape[-1]):
        shape = None if bias is None else list(bias.shape)
        return Refusal(f"the bias has shape {shape}, expected one value a column", match.anchor)
    return None


def _check_spread(match: Match) -> Refusal | None:
    """A batched product must multiply every batch with the same weight."""
    node = match.spread
    turned = fake_tensor(match.turned) if match.turned is not None else None
    while node is not None and node is not match.turned:
        step = fake_tensor(node)
        if step is None or turned is None or tuple(step.shape[-2:]) != tuple(turned.shape):
            return Refusal(f"{node.name} does not only repeat the weight", node)
        node = node.args[0]
    return None
