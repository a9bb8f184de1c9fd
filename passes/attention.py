"""Attention over a static key-value cache, recognised as one operator."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Node

from edgepass.passes.editor import Editor
from edgepass.passes.graph_pass import GraphPass, Order
from edgepass.passes.matching import Match
from edgepass.passes.pattern import any_of, anything, attr, named, ops
from edgepass.passes.positions import (
    PositionAnalysis,
    PositionFunction,
    positions_reason,
    sample_points,
)
from edgepass.passes.program import WorkingProgram
from edgepass.passes.rewriter import RewriteLog, Rewriter
from edgepass.passes.rule import Refusal, RewriteRule
from edgepass.passes.targets import argument, is_call

aten = ops("aten")


def _for_each_query_head(cache: Any) -> Any:
    """The cache itself, or repeated for the query heads of each key-value head."""
    return any_of(cache, (aten.reshape | aten.view)(_grouped(cache), ...))


def _grouped(cache: Any) -> Any:
    return (aten.expand)(aten.unsqueeze(cache, 2), ...)


class CachedAttention(RewriteRule):
    """``sdpa(q, index_copy(k_cache), index_copy(v_cache), mask)`` with a causal mask."""

    name = "cached-attention"

    def __init__(self, analysis: PositionAnalysis) -> None:
        self._analysis = analysis

    def pattern(self, q: Any, k_cache: Any, v_cache: Any, k_index: Any, v_index: Any) -> Any:
        write = aten.index_copy_ | aten.index_copy
        keys = named("keys", write(k_cache, attr("k_axis"), k_index, named("k", anything)))
        values = named("values", write(v_cache, attr("v_axis"), v_index, named("v", anything)))
        attention = aten.scaled_dot_product_attention
        return attention(
            q,
            _for_each_query_head(keys),
            _for_each_query_head(values),
            named("mask", anything),
            ...,
        )

    def check(self, match: Match) -> Refusal | None:
        return (
            _check_attention(match)
            or _check_heads(match)
            or self._check_cache(match, match.k_cache, match.k_axis, match.k_index)
            or self._check_cache(match, match.v_cache, match.v_axis, match.v_index)
            or self._check_mask(match)
        )

    def rewrite(self, match: Match, editor: Editor) -> Node:
        return editor.call(
            torch.ops.edgepass.cached_attention,
            match.q,
            match.keys,
            match.values,
            match.facts["position"],
            _scale(match),
            match.facts["window"],
        )

    def _check_cache(self, match: Match, cache: Node, axis: int, index: Node) -> Refusal | None:
        if axis not in (2, -2):
            return Refusal(f"the cache is written along dimension {axis}, expected 2", cache)
        if not match.program.is_constant(cache):
            return Refusal(f"{cache.name} is no buffer of the program", cache)
        rows = cache.meta["val"].shape[2]
        reason = self._analysis.ask(index, positions_reason, rows)
        if isinstance(reason, Refusal):
            return reason
        return None if reason is None else Refusal(f"{index.name}: {reason}", index)

    def _check_mask(self, match: Match) -> Refusal | None:
        rows = match.k_cache.meta["val"].shape[2]
        if not isinstance(match.mask, Node):
            return Refusal("attention has no mask over the cache's rows", match.anchor)
        answer = self._analysis.ask(match.mask, causal_window, rows)
        if isinstance(answer, Refusal):
            return answer
        if isinstance(answer, str):
            return Refusal(f"{match.mask.name}: {answer}", match.mask)
        position = self._position(match.mask)
        if any(self._position(index) is not position for index in (match.k_index, match.v_index)):
            return Refusal("mask and cache count from different position inputs", match.mask)
        match.facts.update(window=answer, position=position)
        return None

    def _position(self, node: Node) -> Node | None:
        function = self._analysis.function(node)
        return function.position if isinstance(function, PositionFunction) else None


def causal_window(function: PositionFunction, rows: int) -> int | str:
    """The sliding window of a causal mask over ``rows`` cache rows, or why it is no such mask.

    0 stands for no window. The mask is bool (True is visible) or additive (0 visible, at most
    -1e4 hidden), ``[.., tokens, rows]``; it is compared at many positions, all rows among them.
    """
    first = _visible(function(0, rows))
    if isinstance(first, str):
        return first
    if first.shape[-1] != rows or first.numel() != rows * rows:
        return f"it is {list(first.shape)} for {rows} tokens, expected one row for each, all heads"
    last = first.reshape(rows, rows)[-1]
    window = int(last.sum())
    if window == 0:
        return "the last token sees nothing"
    window = 0 if window == rows else window
    for start, length in sample_points(rows):
        got = _visible(function(start, length))
        wanted = _causal(start, length, rows, window)
        if isinstance(got, str) or not torch.equal(got.reshape(-1, rows), wanted):
            return f"for {length} tokens at {start} it is no causal mask (window={window})"
    return window


def _visible(mask: torch.Tensor) -> torch.Tensor | str:
    if mask.dtype == torch.bool:
        return mask
    if not mask.is_floating_point():
        return f"it is {mask.dtype}, expected bool or float"
    if not bool(((mask == 0) | (mask <= -1e4)).all()):
        return "it adds other values than 0 and a large negative one"
    return mask == 0


def _causal(start: int, length: int, rows: int, window: int) -> torch.Tensor:
    tokens = torch.arange(start, start + length).unsqueeze(1)
    columns = torch.arange(rows)
    visible = columns <= tokens
    return visible & (columns > tokens - window) if window else visible


def _check_attention(match: Match) -> Refusal | None:
    dropout, causal = argument(match.anchor, "dropout_p"), argument(match.anchor, "is_causal")
    if dropout != 0.0 or causal:
        got = f"dropout_p={dropout}, is_causal={causal}"
        return Refusal(f"attention has {got}, expected neither beside a mask", match.anchor)
    return None


def _check_heads(match: Match) -> Refusal | None:
    """Every way to repeat the key-value heads must give query head h the head h // groups."""
    q, keys, values = (node.meta["val"] for node in (match.q, match.keys, match.values))
    if any(value.dim() != 4 for value in (q, keys, values)):
        return Refusal("attention is not over [B, H, S, D]", match.anchor)
    if keys.shape != values.shape or keys.shape[-1] != q.shape[-1]:
        return Refusal("keys and values differ in shape", match.anchor)
    if q.shape[1] % keys.shape[1]:
        return Refusal(f"{q.shape[1]} query heads over {keys.shape[1]} key heads", match.anchor)
    for repeated in match.anchor.args[1:3]:
        shape = repeated.meta["val"].shape
        wanted = (keys.shape[0], q.shape[1], *keys.shape[2:])
        grouped = argument(match.anchor, "enable_gqa") and shape == keys.shape
        if tuple(shape) != wanted and not grouped:
            return Refusal(f"{repeated.name} is {list(shape)}, expected {list(wanted)}", repeated)
    return None


def _scale(match: Match) -> float:
    scale = argument(match.anchor, "scale")
    return 1.0 / math.sqrt(match.q.meta["val"].shape[-1]) if scale is None else float(scale)


@dataclass(frozen=True)
class FuseCachedAttention(GraphPass):
    """Recognise attention over a static cache and make it ``edgepass::cached_attention``.

    What it does: scaled dot-product attention whose keys and values are caches just written at
    the tokens' positions, under a causal mask, becomes one operator; the mask is dropped and only
    the first position is kept. Grouped-query heads may be repeated or not.

    Before: ``sdpa(q, repeat(index_copy_(k, 2, pos, ..)), repeat(index_copy_(v, ..)), mask)``
    After: ``edgepass.cached_attention(q, index_copy_(..), index_copy_(..), input_pos, scale)``

    Refuses when: the mask is not causal (or causal with a window) for every position tried; the
    cache is not written at exactly the tokens' positions; dropout is on; the heads do not divide.

    Numerics: rows that the mask hides take no part, instead of being weighted with exp(-inf) = 0.

    Backends: all.
    """

    name: ClassVar[str] = "fuse-cached-attention"
    after: ClassVar[tuple[Order, ...]] = (
        Order("canonicalize", "views that change nothing stand between cache and attention"),
    )
    agreement_db: ClassVar[float] = 100.0

    def run(self, program: WorkingProgram) -> RewriteLog:
        rules: Sequence[RewriteRule] = (CachedAttention(PositionAnalysis(program)),)
        log = Rewriter(rules).apply(program)
        if log.changed:
            _erase_replaced(program)
            program.graph.eliminate_dead_code()
            program.remove_unused_constants()
        return log


def _erase_replaced(program: WorkingProgram) -> None:
    """Erase attention that nothing reads: FX keeps it, because with dropout it would be random."""
    for node in reversed(list(program.graph.nodes)):
        if is_call(node, "aten.scaled_dot_product_attention") and not node.users:
            program.graph.erase_node(node)
