"""Rules that remove calls whose result is their input."""

from typing import Any

import torch
from torch.fx import Node

from edgepass.passes.editor import Editor
from edgepass.passes.matching import Match
from edgepass.passes.pattern import any_of, attr, ops
from edgepass.passes.rule import Refusal, RewriteRule
from edgepass.passes.shapes import fake_tensor, is_same_kind, same_layout
from edgepass.passes.targets import is_call

aten = ops("aten")

# These read a tensor's strides: `view` of a tensor that is not contiguous is an error.
READS_STRIDES = ("aten.view", "aten.as_strided", "aten.view_as_complex", "aten.unfold")


class DropCast(RewriteRule):
    """``x.to(dtype)`` of a tensor that has that dtype and device already."""

    name = "drop-cast"

    def pattern(self, x: Any) -> Any:
        return (aten.to | aten._to_copy | aten.type_as)(x, ...)

    def check(self, match: Match) -> Refusal | None:
        return _check_copy(match)

    def rewrite(self, match: Match, editor: Editor) -> Node:
        return match.x


class DropCopy(RewriteRule):
    """``clone``, ``contiguous``, ``detach``, ``alias``, ``lift_fresh``, and dropout in eval."""

    name = "drop-copy"

    def pattern(self, x: Any) -> Any:
        copies = aten.clone | aten.contiguous | aten.detach | aten.alias
        copies |= aten.lift_fresh | aten.lift_fresh_copy
        return any_of(copies(x, ...), aten.dropout(x, attr("rate"), False))

    def check(self, match: Match) -> Refusal | None:
        return _check_copy(match)

    def rewrite(self, match: Match, editor: Editor) -> Node:
        return match.x


class DropUnitFactor(RewriteRule):
    """``x * 1`` and ``x / 1``."""

    name = "drop-unit-factor"

    def pattern(self, x: Any) -> Any:
        return any_of(aten.mul(x, 1), aten.div(x, 1))

    def check(self, match: Match) -> Refusal | None:
        return check_same_kind(match.x, match.anchor) or check_writes(match.x, match)

    def rewrite(self, match: Match, editor: Editor) -> Node:
        return match.x


def _check_copy(match: Match) -> Refusal | None:
    return (
        check_same_kind(match.x, match.anchor)
        or check_writes(match.x, match)
        or check_layout(match.x, match.anchor)
    )


def check_same_kind(x: Any, anchor: Node) -> Refusal | None:
    """The result must be known to have its input's dtype, device and shape."""
    before, after = fake_tensor(x), fake_tensor(anchor)
    if before is None or after is None:
        return Refusal(f"the shape of {anchor.name} or of its input is unknown", anchor)
    if not is_same_kind(before, after):
        return Refusal(
            lambda: f"{anchor.name} turns {_describe(before)} into {_describe(after)}", anchor
        )
    return None


def check_writes(source: Node, match: Match) -> Refusal | None:
    """A copy of memory that is changed in place is not its original."""
    mutations = match.program.mutations
    if mutations and (mutations.is_changed(source) or mutations.is_changed(match.anchor)):
        return Refusal(f"{source.name} or its copy is changed in place", match.anchor)
    return None


def check_layout(x: Node, anchor: Node) -> Refusal | None:
    """Strides may change only if no user reads them."""
    before, after = fake_tensor(x), fake_tensor(anchor)
    assert before is not None and after is not None, "checked by check_same_kind"
    if same_layout(before, after):
        return None
    for user in anchor.users:
        if is_call(user, *READS_STRIDES) or user.op == "output":
            return Refusal(f"{anchor.name} changes the strides, which {user.name} reads", user)
    return None


def _describe(tensor: torch.Tensor) -> str:
    shape = ", ".join(str(size) for size in tensor.shape)
    return f"{str(tensor.dtype).removeprefix('torch.')}[{shape}]"
