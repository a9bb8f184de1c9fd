"""Calibrating attention's scores on what the mask shows.

The graph of a whole chunk also computes scores of later tokens, and a graph with caches those of
empty rows. The mask hides both, so their ranges say nothing; observed, they made encodings of one
model differ by up to 8.5 % between its forms. And a sum that reaches down to the hidden scores, 255
below the others, leaves these few steps of its 16 bits.

So while a graph is observed, hidden scores stand at the least visible one, and their sum with the
mask :data:`MARGIN` below. On the device what is hidden saturates there, whatever it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from edgepass.passes.value_names import call_name, is_view

# A hidden score's weight is at most exp(-24) = 4e-11 of any visible one's: with 100,000 of them
# still under half a step of a softmax of 16 bits.
MARGIN = 24.0
# What may stand between the matmul and the sum with the mask (a soft cap is div, tanh, mul).
_ELEMENTWISE = ("aten.div", "aten.mul", "aten.tanh")


def show_visible(prepared: GraphModule) -> int:
    """Let the observers of ``prepared`` see visible scores only; return how many attentions.

    ``prepared`` is a graph of ``prepare_pt2e`` whose attention masks are inputs, added to the
    scores. Undo it with :func:`show_all` before ``convert_pt2e``.
    """
    count = 0
    for node in list(prepared.graph.nodes):
        parts = _masked_sum(node)
        if parts is not None:
            scores, mask = parts
            _look_through(prepared, scores, mask, 0.0)
            _look_through(prepared, node, mask, MARGIN)
            count += 1
    prepared.recompile()
    return count


def show_all(prepared: GraphModule) -> None:
    """Undo :func:`show_visible`; without it this does nothing."""
    for node in prepared.graph.find_nodes(op="call_function", target=visible_scores):
        node.replace_all_uses_with(node.args[0])
        prepared.graph.erase_node(node)
    prepared.recompile()


def visible_scores(scores: Tensor, mask: Tensor, margin: float) -> Tensor:
    """``scores`` ``[..., G * S, C]`` with hidden ones at the least visible one less ``margin``.

    ``mask`` ``[1, 1, S, C]`` is 0 where a score is visible and negative elsewhere; the rows of a
    group of ``G`` heads follow each other. Without a visible score all stay.
    """
    rows = scores.reshape(-1, *mask.shape[-2:])
    shown = mask.reshape(mask.shape[-2:]) == 0
    # Not by picking the visible ones: that copies them, at four times the cost.
    least = rows.where(shown, torch.inf).amin()
    if least == torch.inf:
        return scores
    return rows.where(shown, least - margin).reshape(scores.shape)


def _look_through(prepared: GraphModule, value: Node, mask: Node, margin: float) -> None:
    with prepared.graph.inserting_after(value):
        shown = prepared.graph.call_function(visible_scores, (value, mask, margin))
    value.replace_all_uses_with(shown, delete_user_cb=lambda user: user is not shown)


def _masked_sum(node: Node) -> tuple[Node, Node] | None:
    """The scores' matmul and the mask, if ``node`` adds a mask that is an input to scores."""
    if call_name(node) != "aten.add" or len(node.args) < 2:
        return None
    one, other = node.args[:2]
    for scores, mask in ((one, other), (other, one)):
        matmul, source = _matmul_of(scores), _source(mask)
        if matmul is not None and source is not None and source.op == "placeholder":
            return matmul, source
    return None


def _matmul_of(value: Any) -> Node | None:
    value = _source(value)
    while call_name(value) in _ELEMENTWISE or is_view(value):
        value = _source(value.args[0])
    return value if call_name(value) == "aten.matmul" else None


def _source(value: Any) -> Node | None:
    """What an observer watches; other values are their own source."""
    while isinstance(value, Node) and value.op == "call_module":
        value = value.args[0]
    return value if isinstance(value, Node) else None
