"""Rules that remove or join views: reshapes, permutations, expansions and slices."""

from typing import Any

import torch
from torch.fx import Node

from edgepass.passes.drop_no_ops import check_layout, check_same_kind, check_writes
from edgepass.passes.editor import Editor
from edgepass.passes.matching import Match
from edgepass.passes.pattern import named, ops
from edgepass.passes.rule import Refusal, RewriteRule
from edgepass.passes.shapes import fake_tensor, is_same_kind
from edgepass.passes.targets import argument, is_call, operator_name

aten = ops("aten")

# Views that keep the order of the elements: only the shape differs.
_SHAPES = aten.view | aten.reshape | aten.unsqueeze | aten.squeeze | aten.flatten
_SHAPES |= aten._unsafe_view | aten.unflatten
_PERMUTATIONS = aten.permute | aten.transpose | aten.t


class DropView(RewriteRule):
    """A view with the shape of its input: a reshape, an expansion, or a slice of everything."""

    name = "drop-view"

    def pattern(self, x: Any) -> Any:
        return (_SHAPES | aten.expand | aten.slice)(x, ...)

    def check(self, match: Match) -> Refusal | None:
        return check_same_kind(match.x, match.anchor) or check_layout(match.x, match.anchor)

    def rewrite(self, match: Match, editor: Editor) -> Node:
        return match.x


class JoinReshapes(RewriteRule):
    """A reshape of reshapes: back to an earlier shape, or one reshape from the first."""

    name = "join-reshapes"

    def pattern(self, x: Any) -> Any:
        return _SHAPES(named("inner", _SHAPES(x, ...)), ...)

    def check(self, match: Match) -> Refusal | None:
        wanted = fake_tensor(match.anchor)
        sources = _reshaped_from(match.anchor)[1:]
        if not sources:
            names = f"{match.inner.name} or {match.anchor.name}"
            return Refusal(f"{names} reads the bits as another dtype", match.anchor)
        for source in sources:
            before = fake_tensor(source)
            if before is not None and wanted is not None and is_same_kind(before, wanted):
                match.facts["source"] = source
                return check_writes(source, match) or check_layout(source, match.anchor)
        if not is_call(match.anchor, "aten.view", "aten.reshape"):
            return Refusal(f"no earlier value has the shape of {match.anchor.name}", match.anchor)
        first = fake_tensor(sources[-1])
        if first is None or not first.is_contiguous():
            return Refusal(f"{sources[-1].name} is not contiguous", sources[-1])
        match.facts["reshape"] = sources[-1]
        return None

    def rewrite(self, match: Match, editor: Editor) -> Node:
        if "source" in match.facts:
            return match.facts["source"]
        shape = match.anchor.args[1]
        return editor.call(match.anchor.target, match.facts["reshape"], shape)


class CancelPermutations(RewriteRule):
    """A permutation that changes nothing, or that undoes the one before it."""

    name = "cancel-permutations"

    def pattern(self, x: Any) -> Any:
        return _PERMUTATIONS(x, ...)

    def check(self, match: Match) -> Refusal | None:
        order = permutation(match.anchor)
        source: Any = match.x
        if is_call(source, *_PERMUTATIONS.names) and order != sorted(order):
            inner = permutation(source)
            order = [inner[axis] for axis in order]
            source = source.args[0]
        if order != sorted(order):
            return Refusal(f"{match.anchor.name} moves dimensions to {order}", match.anchor)
        match.facts["source"] = source
        return check_same_kind(source, match.anchor) or check_layout(source, match.anchor)

    def rewrite(self, match: Match, editor: Editor) -> Node:
        return match.facts["source"]


def permutation(node: Node) -> list[int]:
    """Return, for each dimension of a permute, transpose or t, the input's dimension it shows."""
    fake = fake_tensor(node)
    order = list(range(fake.dim())) if fake is not None else []
    name = operator_name(node.target)
    if name == "aten.permute":
        return [axis % len(order) for axis in argument(node, "dims")]
    one, other = (-1, -2) if name == "aten.t" else (argument(node, "dim0"), argument(node, "dim1"))
    if len(order) > 1:
        order[one], order[other] = order[other], order[one]
    return order


def reads_bits(node: Node) -> bool:
    """Tell whether a view reads the bits of its input as another dtype."""
    return node.target is torch.ops.aten.view.dtype


def _reshaped_from(node: Node) -> list[Node]:
    """Return the inputs of a chain of reshapes that ends in ``node``, the nearest first.

    ``view(dtype)`` of the bits is no reshape, though it has the name of one.
    """
    found = []
    while is_call(node, *_SHAPES.names) and not reads_bits(node):
        node = node.args[0]
        found.append(node)
    return found
