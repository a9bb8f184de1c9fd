"""Attention with its cache and rotary embedding, as the Vulkan runtime computes them.

The runtime holds tokens before heads: ``[1, S, H, D]`` activations, ``[1, C, Hkv, D]`` caches. In
edgepass they are ``[1, H, S, D]`` and ``[1, Hkv, C, D]``.
"""

from __future__ import annotations

import contextlib
import math
import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from edgepass.lowering.vulkan_declined import Declined, Refused
from edgepass.lowering.vulkan_graph import GraphEditor
from edgepass.lowering.vulkan_legality import ATTENTION, ROTARY, require
from edgepass.passes.positions import PositionAnalysis, PositionFunction, positions_reason
from edgepass.passes.rule import Refusal
from edgepass.passes.targets import argument, is_call

_aten, _et_vk, _llama = torch.ops.aten, torch.ops.et_vk, torch.ops.llama
_VIEWS = ("aten.unsqueeze", "aten.view", "aten.reshape", "aten.expand", "aten.clone")


@dataclass(frozen=True)
class _Cache:
    """One cache: its buffer, the node that writes the new rows, and the rows."""

    buffer: Node
    update: Node
    rows: Node


class AttentionLowering:
    """Rewrites each ``edgepass::cached_attention`` of a graph, or says why it stays."""

    def __init__(self, editor: GraphEditor) -> None:
        self.editor = editor
        self.declined: list[Declined] = []
        self._analysis = PositionAnalysis(editor.program)
        self._positions: dict[Node, Node] = {}

    def run(self) -> None:
        """Rewrite every attention and then the rotary embeddings that are left."""
        for node in list(self.editor.graph.nodes):
            if is_call(node, "edgepass.cached_attention"):
                try:
                    self._rewrite_attention(node)
                except Refused as refused:
                    self.declined.append(Declined.of(node, refused))
        for node in list(self.editor.graph.nodes):
            if is_call(node, "edgepass.rotary") and node.users:
                try:
                    self._rewrite_rotary(node)
                except Refused as refused:
                    self.declined.append(Declined.of(node, refused))

    def _rewrite_attention(self, node: Node) -> None:
        keys, values = self._cache(node, "k_cache"), self._cache(node, "v_cache")
        self._check(node, keys, values)
        graph, q = self.editor.graph, argument(node, "q")
        with graph.inserting_before(node):
            queries, rows = self._rotated_pair(q, keys.rows)
            queries = self._scaled(node, queries)
            attended = self.editor.call(
                _llama.sdpa_with_kv_cache.default,
                *(queries, rows, self._tokens_first(values.rows)),
                *(self._new_cache(keys), self._new_cache(values)),
                # The runtime reads the number of tokens off the query; 1 is what stock writes.
                *(self._position(argument(node, "input_pos")), 1, None, 0.0, True, None),
                like=node,
                val=queries.meta["val"],
            )
        self._replace_heads_first(node, attended)
        for dead in (node, keys.update, values.update):
            graph.erase_node(dead)

    def _check(self, node: Node, keys: _Cache, values: _Cache) -> None:
        q, cache = argument(node, "q").meta["val"], keys.buffer.meta["val"]
        window, rows = argument(node, "window"), cache.shape[2]
        facts = {
            "batch": q.shape[0],
            "channels of a head": q.shape[3],
            "window": f"{window} of {rows} rows" if 0 < window < rows else "none",
            "cap of the scores": argument(node, "softcap") or "none",
            "caches": len({keys.buffer, values.buffer}),
            "position": self._source(argument(node, "input_pos")),
        }
        require(ATTENTION, facts)

    def _source(self, position: Node) -> str:
        """What the legality table calls the source of a position."""
        return "an input of the program" if self.editor.is_user_input(position) else "computed"

    def _cache(self, node: Node, name: str) -> _Cache:
        """Find the buffer and its one update behind an argument of attention."""
        update = argument(node, name)
        if not is_call(update, "aten.index_copy_"):
            raise Refused(f"{name} is not the result of an in-place index_copy_")
        buffer, dim, index, rows = update.args
        content = self.editor.constant(buffer)
        if content is None:
            raise Refused(f"{name} is not a buffer of the program")
        if set(buffer.users) != {update} or set(update.users) != {node}:
            raise Refused(f"the cache {buffer.name} is used by more than one attention")
        if dim % 4 != 2:
            raise Refused(f"the cache is written along dimension {dim}, not along its rows")
        self._check_index(index, argument(node, "input_pos"), content.shape[2])
        require(ATTENTION, {"cache content": "other values" if content.any() else "zeros"})
        return _Cache(buffer, update, rows)

    def _check_index(self, index: Node, input_pos: Node, rows: int) -> None:
        """Refuse a cache that is not written at ``input_pos .. input_pos + S - 1``."""
        reason = self._analysis.ask(index, positions_reason, rows)
        if reason is not None:
            raise Refused(reason.reason if isinstance(reason, Refusal) else reason)
        function = self._analysis.function(index)
        if not isinstance(function, PositionFunction) or function.position is not input_pos:
            raise Refused("the cache is not written at the position that attention is given")

    def _position(self, input_pos: Node) -> Node:
        """Return the SymInt in the tensor ``input_pos``, read on the device."""
        if input_pos not in self._positions:
            # A SymInt input would lower too, but the stock serialiser writes it as null.
            with self.editor.graph.inserting_before(self.editor.first_call()):
                self._positions[input_pos] = self.editor.call(
                    _et_vk.select_as_symint.default, input_pos, 0, 0, like=input_pos
                )
        return self._positions[input_pos]

    def _rotated_pair(self, q: Node, k: Node) -> tuple[Node, Node]:
        """Return q and k with tokens first, rotated by one call if one pair of tables does it."""
        if is_call(q, "edgepass.rotary") and is_call(k, "edgepass.rotary"):
            with contextlib.suppress(Refused):  # each is tried alone later, and then reported
                angles = self._angles(q)
                if angles == self._angles(k):
                    return self._rotate(q, argument(q, "x"), argument(k, "x"), angles)
        return self._tokens_first(q), self._tokens_first(k)

    def _rewrite_rotary(self, node: Node) -> None:
        """Rotate one tensor alone; the runtime's operator wants two, so it is given twice."""
        x, angles = argument(node, "x"), self._angles(node)
        with self.editor.graph.inserting_before(node):
            rotated, _ = self._rotate(node, x, x, angles)
        self._replace_heads_first(node, rotated)
        self.editor.graph.erase_node(node)

    def _rotate(
        self, node: Node, q: Node, k: Node, angles: tuple[Node, Node, Node]
    ) -> tuple[Node, Node]:
        cos, sin, input_pos = angles
        pair = self.editor.call(
            _et_vk.apply_rotary_emb_hf.default,
            *(self._tokens_first(q), self._tokens_first(k), cos, sin, self._position(input_pos)),
            like=node,
        )
        first = self.editor.call(operator.getitem, pair, 0, like=node)
        return first, self.editor.call(operator.getitem, pair, 1, like=node)

    def _angles(self, node: Node) -> tuple[Node, Node, Node]:
        """Return the tables of a rotation and the position at which it takes their rows."""
        cos, sin = (self._rows(argument(node, name)) for name in ("cos", "sin"))
        x, width = argument(node, "x").meta["val"], cos.meta["val"].shape[-1]
        if cos.args[1] is not sin.args[1]:
            raise Refused("cosine and sine are taken at two positions")
        facts = {
            "pairs": "neighbours" if argument(node, "interleaved") else "halves",
            "batch": x.shape[0],
            "channels of a head": x.shape[3],
            "rotated channels": width,
            "position": self._source(cos.args[1]),
        }
        require(ROTARY, facts)
        return cos.args[0], sin.args[0], cos.args[1]

    def _rows(self, angles: Any) -> Node:
        """Return the ``position_rows`` node behind angles that were only reshaped since."""
        rows = angles
        while is_call(rows, *_VIEWS):
            rows = rows.args[0]
        table = rows.args[0] if is_call(rows, "edgepass.position_rows") else None
        if self.editor.constant(table) is None:
            raise Refused("its tables are not rows of a constant at the position")
        *lead, tokens, width = angles.meta["val"].shape
        shape = rows.meta["val"].shape
        if any(size != 1 for size in lead) or str(tokens) != str(shape[0]) or width != shape[1]:
            raise Refused(f"its tables are not one row a token: {list(angles.meta['val'].shape)}")
        return rows

    def _scaled(self, node: Node, q: Node) -> Node:
        """Multiply q by what the scale has beyond 1/sqrt(D), which the runtime always applies."""
        factor = argument(node, "scale") * math.sqrt(q.meta["val"].shape[-1])
        if math.isclose(factor, 1.0, rel_tol=1e-7):
            return q
        constant = torch.full((1, 1, 1, 1), factor, dtype=q.meta["val"].dtype)
        scale = self.editor.add_constant("attention_scale", constant)
        return self.editor.call(_aten.mul.Tensor, q, scale, like=node, val=q.meta["val"])

    def _tokens_first(self, node: Node) -> Node:
        """Return ``[1, S, H, D]`` for a node of ``[1, H, S, D]``, undoing a transpose if it can."""
        if _swaps_heads(node):
            return node.args[0]
        if is_call(node, "edgepass.rms_norm"):
            x, weight, eps = (argument(node, name) for name in ("x", "weight", "eps"))
            return self.editor.call(node.target, self._tokens_first(x), weight, eps, like=node)
        return self.editor.call(_aten.transpose.int, node, 1, 2, like=node)

    def _replace_heads_first(self, node: Node, tokens_first: Node) -> None:
        """Let the users of ``node``, ``[1, H, S, D]``, read ``tokens_first``, ``[1, S, H, D]``."""
        for user in list(node.users):
            if _swaps_heads(user):
                user.replace_all_uses_with(tokens_first)
        if any(not _swaps_heads(user) for user in node.users):
            with self.editor.graph.inserting_before(node):
                heads = self.editor.call(_aten.transpose.int, tokens_first, 1, 2, like=node)
            node.replace_all_uses_with(heads)
        for user in list(node.users):
            self.editor.graph.erase_node(user)

    def _new_cache(self, cache: _Cache) -> Node:
        """Return a buffer of zeros with tokens before heads, ``[1, C, Hkv, D]``."""
        value = cache.buffer.meta["val"]
        _, heads, rows, width = value.shape
        empty = torch.zeros((1, rows, heads, width), dtype=value.dtype)
        return self.editor.add_constant(self.editor.constant_name(cache.buffer), empty)


def _swaps_heads(node: Any) -> bool:
    if is_call(node, "aten.transpose"):
        return sorted(dim % 4 for dim in node.args[1:3]) == [1, 2] and _rank(node) == 4
    return is_call(node, "aten.permute") and list(node.args[1]) == [0, 2, 1, 3]


def _rank(node: Node) -> int:
    value = node.meta["val"]
    return value.dim() if isinstance(value, Tensor) else 0
