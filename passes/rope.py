"""Rotary position embedding (Su et al., 2021) in its Hugging Face and interleaved spellings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Node

from edgepass.passes.editor import Editor
from edgepass.passes.graph_pass import GraphPass, Order
from edgepass.passes.matching import Match
from edgepass.passes.pattern import attr, axis, ops
from edgepass.passes.rule import Refusal, RewriteRule
from edgepass.passes.shapes import same_size
from edgepass.passes.targets import is_call

aten = ops("aten")
edgepass_ops = ops("edgepass")


class RotateHalves(RewriteRule):
    """``x * cos + cat(-x[R/2:], x[:R/2]) * sin``."""

    name = "rotate-halves"

    def pattern(self, x: Any, cos: Any, sin: Any) -> Any:
        low = aten.slice(x, axis(-1), 0, attr("half"), ...)
        high = aten.slice(x, axis(-1), attr("split"), attr("stop"), ...)
        turned = aten.cat([aten.neg(high), low], axis(-1))
        return aten.add(aten.mul(x, cos), aten.mul(turned, sin))

    def check(self, match: Match) -> Refusal | None:
        width = match.x.meta["val"].shape[-1]
        if 2 * match.half != width or match.split != match.half or match.stop < width:
            cut = f"[:{match.half}] and [{match.split}:{match.stop}]"
            return Refusal(f"the halves of {width} channels are cut as {cut}", match.x)
        return _check_angles(match, width)

    def rewrite(self, match: Match, editor: Editor) -> Node:
        return _rotary(match, editor, interleaved=False)


class RotateInterleaved(RewriteRule):
    """``x * cos + flatten(stack(-x[1::2], x[::2])) * sin``, the angles given for each channel."""

    name = "rotate-interleaved"

    def pattern(self, x: Any, cos: Any, sin: Any) -> Any:
        even = aten.slice(x, axis(-1), 0, attr("even_stop"), 2)
        odd = aten.slice(x, axis(-1), 1, attr("odd_stop"), 2)
        turned = aten.flatten(aten.stack([aten.neg(odd), even], -1), -2, ...)
        return aten.add(aten.mul(x, cos), aten.mul(turned, sin))

    def check(self, match: Match) -> Refusal | None:
        width = match.x.meta["val"].shape[-1]
        if width % 2 or match.even_stop < width - 1 or match.odd_stop < width:
            return Refusal(f"the pairs of {width} channels are not all taken", match.x)
        return _check_angles(match, width)

    def rewrite(self, match: Match, editor: Editor) -> Node:
        return _rotary(match, editor, interleaved=True)


class KeepTail(RewriteRule):
    """Partial rotary: the first R channels turned, the others concatenated as they were."""

    name = "rotate-part"

    def pattern(self, x: Any, cos: Any, sin: Any) -> Any:
        head = aten.slice(x, axis(-1), 0, attr("rotated"), ...)
        tail = aten.slice(x, axis(-1), attr("split"), attr("stop"), ...)
        turned = edgepass_ops.rotary(head, cos, sin, attr("interleaved"))
        return aten.cat([turned, tail], axis(-1))

    def check(self, match: Match) -> Refusal | None:
        width = match.x.meta["val"].shape[-1]
        if match.split != match.rotated or match.stop < width:
            cut = f"[:{match.rotated}] and [{match.split}:{match.stop}]"
            return Refusal(f"{width} channels are cut as {cut}", match.x)
        return None

    def rewrite(self, match: Match, editor: Editor) -> Node:
        operator = torch.ops.edgepass.rotary
        return editor.call(operator, match.x, match.cos, match.sin, match.interleaved)


def _check_angles(match: Match, width: int) -> Refusal | None:
    """cos and sin are ``[.., S, R]`` and go with every head alike."""
    x = match.x.meta["val"]
    if x.dim() != 4:
        return Refusal(f"{match.x.name} has rank {x.dim()}, rotary takes [B, H, S, D]", match.x)
    for angles in (match.cos, match.sin):
        value = angles.meta.get("val") if isinstance(angles, Node) else None
        if not isinstance(value, torch.Tensor) or value.dim() < 2 or value.shape[-1] != width:
            return Refusal(f"an angle table is no tensor [.., S, {width}]", match.anchor)
        if value.dim() != 4 or value.shape[1] != 1 or not same_size(value.shape[2], x.shape[2]):
            shape = [str(size) for size in value.shape]
            return Refusal(f"{angles.name} is {shape}, expected [B, 1, S, {width}]", angles)
        if value.dtype != x.dtype:
            return Refusal(f"{angles.name} is {value.dtype}, the values are {x.dtype}", angles)
    return None


def _rotary(match: Match, editor: Editor, *, interleaved: bool) -> Node:
    cos, sin = without_head_axis(match.cos), without_head_axis(match.sin)
    return editor.call(torch.ops.edgepass.rotary, match.x, cos, sin, interleaved)


def without_head_axis(angles: Node) -> Node:
    """The ``[B, S, R]`` behind an ``unsqueeze`` of the head axis, else the value itself."""
    if is_call(angles, "aten.unsqueeze") and angles.args[1] in (1, -3):
        return angles.all_input_nodes[0]
    return angles


@dataclass(frozen=True)
class FuseRotary(GraphPass):
    """Recognise rotary embedding and make it ``edgepass::rotary``.

    What it does: the multiplications, slices, negation and concatenation become one operator; a
    rotation of only the first channels is joined with the channels that pass through.

    Before: ``x * cos + cat(-x[..., R/2:], x[..., :R/2], -1) * sin``
    After: ``edgepass.rotary(x, cos, sin, False)``

    Refuses when: the halves are not equal halves; the angles are not one row a token for all
    heads; dtypes differ.

    Numerics: the same products and sums; 120 dB or better.

    Backends: all.
    """

    name: ClassVar[str] = "fuse-rotary"
    after: ClassVar[tuple[Order, ...]] = (
        Order("canonicalize", "casts that change nothing stand between the parts"),
    )
    agreement_db: ClassVar[float] = 120.0

    def rules(self) -> Sequence[RewriteRule]:
        return (RotateHalves(), RotateInterleaved(), KeepTail())
