"""Attention over a static key-value cache, recognised as one operator."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Node

from edgepass.passes.cancel_views import permutation
from edgepass.passes.editor import Editor
from edgepass.passes.graph_pass import GraphPass, Order
from edgepass.passes.matching import Match
from edgepass.passes.pattern import any_of, anything, attr, axis, maybe, named, ops
from edgepass.passes.positions import (
    PositionAnalysis,
    PositionFunction,
    positions_reason,
    sample_points,
)
from edgepass.passes.program import WorkingProgram
from edgepass.passes.rewriter import RewriteLog, Rewriter
from edgepass.passes.rule import Refusal, RewriteRule
from edgepass.passes.shapes import fake_tensor
from edgepass.passes.targets import argument, is_call, render_value

aten = ops("aten")
_CASTS = aten.to | aten._to_copy


def _for_each_query_head(cache: Any) -> Any:
    """The cache itself, or repeated for the query heads of each key-value head."""
    return any_of(cache, (aten.reshape | aten.view)(_grouped(cache), ...))


def _grouped(cache: Any) -> Any:
    return maybe(aten.expand, aten.unsqueeze(cache, 2))  # one head each is not expanded


class CachedAttention(RewriteRule):
    """``sdpa(q, index_copy(k_cache), index_copy(v_cache), mask)`` with a causal mask."""

    name = "cached-attention"

    def __init__(self, analysis: PositionAnalysis) -> None:
        self._analysis = analysis

    def pattern(self, q: Any, k_cache: Any, v_cache: Any, k_index: Any, v_index: Any) -> Any:
        write = aten.index_copy_ | aten.index_copy
        keys = named("keys", write(k_cache, attr("k_axis"), k_index, named("k", anything)))
        values = named("values", write(v_cache, attr("v_axis"), v_index, named("v", anything)))
        return self.attend(q, _for_each_query_head(keys), _for_each_query_head(values))

    def attend(self, q: Any, keys: Any, values: Any) -> Any:
        """Mirror the attention over the caches as every query head reads them."""
        attention = aten.scaled_dot_product_attention
        return attention(
            q, named("all_keys", keys), named("all_values", values), named("mask", anything), ...
        )

    def check_form(self, match: Match) -> Refusal | None:
        """Check what is of this spelling; leave ``scale`` and ``softcap`` in the facts."""
        dropout, causal = argument(match.anchor, "dropout_p"), argument(match.anchor, "is_causal")
        if dropout != 0.0 or causal:
            got = f"dropout_p={dropout}, is_causal={causal}"
            return Refusal(f"attention has {got}, expected neither beside a mask", match.anchor)
        scale = argument(match.anchor, "scale")
        if scale is None:
            scale = 1.0 / math.sqrt(match.q.meta["val"].shape[-1])
        match.facts.update(scale=float(scale), grouped=argument(match.anchor, "enable_gqa"))
        return None

    def check(self, match: Match) -> Refusal | None:
        return (
            _check_rank(match)
            or self.check_form(match)
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
            match.facts["scale"],
            match.facts["window"],
            match.facts.get("softcap", 0.0),
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


class CappedAttention(CachedAttention):
    """``softmax(mask(c * tanh(q k^T * scale / c))) v`` over caches, as Gemma 2 has it."""

    name = "capped-attention"

    def attend(self, q: Any, keys: Any, values: Any) -> Any:
        turned = named("turned", (aten.transpose | aten.permute)(named("all_keys", keys), ...))
        product = aten.matmul(q, turned)
        scores = any_of(aten.mul(product, attr("scale")), product)
        cap = attr("softcap")
        capped = aten.mul(aten.tanh(aten.div(scores, cap)), cap)
        mask = named("mask", anything)
        visible = any_of(
            aten.masked_fill(capped, (aten.logical_not | aten.bitwise_not)(mask), attr("fill")),
            aten.add(capped, mask),
        )
        weights = named("weights", maybe(_CASTS, aten.softmax(visible, axis(-1), ...)))
        return aten.matmul(weights, named("all_values", values))

    def check_form(self, match: Match) -> Refusal | None:
        cap, scale = match.softcap, 1.0 if match.scale is None else match.scale
        if not isinstance(cap, (int, float)) or not 0 < cap < math.inf:
            return Refusal(f"the cap is {cap!r}, expected a positive number", match.anchor)
        if not isinstance(scale, (int, float)):
            return Refusal(f"the scale is {scale!r}, expected a number", match.anchor)
        if permutation(match.turned) != [0, 1, 3, 2]:
            return Refusal(f"{match.turned.name} does not transpose the keys", match.turned)
        dtypes = {match.q.meta["val"].dtype, torch.float32}
        for node in match.nodes:
            value = fake_tensor(node)
            if value is not None and value.is_floating_point() and value.dtype not in dtypes:
                return Refusal(f"{node.name} rounds to {value.dtype} on the way", node)
        match.facts.update(scale=float(scale), grouped=False, softcap=float(cap))
        return _check_masking(match)


def _check_masking(match: Match) -> Refusal | None:
    """A boolean mask must hide by a large negative number, an added one must be float."""
    mask = fake_tensor(match.mask)
    if mask is None or mask.is_floating_point() is not (match.fill is None):
        form = "added" if match.fill is None else "filled"
        return Refusal(f"{render_value(match.mask)} is no mask to be {form}", match.anchor)
    if match.fill is not None and not (isinstance(match.fill, (int, float)) and match.fill <= -1e4):
        return Refusal(f"hidden scores become {match.fill!r}, expected at most -1e4", match.anchor)
    return None


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


def _check_rank(match: Match) -> Refusal | None:
    if any(node.meta["val"].dim() != 4 for node in (match.q, match.keys, match.values)):
        return Refusal("attention is not over [B, H, S, D]", match.anchor)
    return None


def _check_heads(match: Match) -> Refusal | None:
    """Every way to repeat the key-value heads must give query head h the head h // groups."""
    q, keys, values = (node.meta["val"] for node in (match.q, match.keys, match.values))
    if keys.shape != values.shape or keys.shape[-1] != q.shape[-1]:
        return Refusal("keys and values differ in shape", match.anchor)
    if q.shape[1] % keys.shape[1]:
        return Refusal(f"{q.shape[1]} query heads over {keys.shape[1]} key heads", match.anchor)
    for repeated in (match.all_keys, match.all_values):
        shape = repeated.meta["val"].shape
        wanted = (keys.shape[0], q.shape[1], *keys.shape[2:])
        grouped = match.facts["grouped"] and shape == keys.shape
        if tuple(shape) != wanted and not grouped:
            return Refusal(f"{repeated.name} is {list(shape)}, expected {list(wanted)}", repeated)
    return None


@dataclass(frozen=True)
class FuseCachedAttention(GraphPass):
    """Recognise attention over a static cache and make it ``edgepass::cached_attention``.

    What it does: scaled dot-product attention whose keys and values are caches just written at
    the tokens' positions, under a causal mask, becomes one operator; the mask is dropped and only
    the first position is kept. Grouped-query heads may be repeated or not. So does attention
    spelt out in products and a softmax whose scores are capped by a tanh, as in Gemma 2.

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
        analysis = PositionAnalysis(program)
        rules: Sequence[RewriteRule] = (CachedAttention(analysis), CappedAttention(analysis))
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
