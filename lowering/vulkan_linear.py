"""Group-quantized linears and embeddings, as the Vulkan runtime's operators.

The packed weight keeps its bytes: edgepass's linear layout is what ``et_vk.linear_*q4gsw`` reads.
Scales are transposed to ``[K/g, N]``; with quantized activations int32 group sums ``[K/g, N]`` come
along.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from edgepass.lowering import vulkan_kernels  # noqa: F401  (defines the et_vk operators)
from edgepass.lowering.vulkan_declined import Declined, Fused, Refused
from edgepass.lowering.vulkan_graph import GraphEditor
from edgepass.lowering.vulkan_limits import (
    EMBEDDING,
    LINEAR,
    EmbeddingShape,
    LinearShape,
    keeps,
    require,
)
from edgepass.ops.quantize import VULKAN_SCALE_FLOOR
from edgepass.passes.targets import argument, is_call, is_getitem, operator_name

_aten, _et_vk = torch.ops.aten, torch.ops.et_vk
_LINEARS = ("edgepass.linear_qta8a_qga4w", "edgepass.linear_qga4w")
_WEIGHT_ONLY, _DYNAMIC = _et_vk.linear_q4gsw.default, _et_vk.linear_dq8ca_q4gsw.default
_ZERO_BYTE = 0x88  # two nibbles of 8, which stand for the value 0


@dataclass(frozen=True)
class _Site:
    """One linear that the runtime can take: its node, its float input, and how it is computed."""

    node: Node
    x: Node
    weight_only: bool
    group_size: int
    has_bias: bool

    @property
    def key(self) -> tuple[Any, ...]:
        """What must be equal for two linears to be computed as one."""
        return self.x, self.weight_only, self.group_size, self.has_bias


class LinearLowering:
    """Rewrites each fused linear and embedding of a graph, or says why it stays."""

    def __init__(self, editor: GraphEditor, *, merge: bool = True, half: bool = False) -> None:
        """Edit through ``editor``.

        ``merge`` computes linears of one activation (Q, K, V; gate, up) as one, cut by slices.
        ``half`` adds biases by themselves: the runtime's fp16 linear misreads them.
        """
        self.editor = editor
        self.merge = merge
        self.half = half
        self.declined: list[Declined] = []
        self.fused: list[Fused] = []
        self._sites: list[_Site] = []
        self._encodings: dict[Node, tuple[Node, Node]] = {}

    def run(self) -> None:
        """Rewrite every linear and embedding that keeps the runtime's limits."""
        for node in list(self.editor.graph.nodes):
            if is_call(node, "edgepass.embedding_qg"):
                self._try(node, self._rewrite_embedding)
            elif is_call(node, *_LINEARS):
                self._try(node, self._accept)
        for together in _in_order_of_appearance(self._sites, merge=self.merge):
            self._emit(together)

    def _try(self, node: Node, rewrite: Callable[[Node], str]) -> None:
        weight = "weight" if is_call(node, "edgepass.embedding_qg") else "w_packed"
        name = self.editor.constant_name(argument(node, weight))
        own = operator_name(node.target)
        try:
            self.fused.append(Fused(own, rewrite(node), name))
        except Refused as refused:
            self.declined.append(Declined.of(node, refused, name))

    def _accept(self, node: Node) -> str:
        site = self._site(node)
        self._sites.append(site)
        return operator_name(_WEIGHT_ONLY if site.weight_only else _DYNAMIC)

    def _site(self, node: Node) -> _Site:
        x, dynamic = _activation(node)
        shape = _linear_shape(self.editor, node, x, dynamic)
        # The runtime's kernels for one token read the activation as floats in both operators
        # (129 dB against a weight-only reference), so there the sums would be dead bytes.
        as_floats = replace(shape, dynamic_activation=False)
        weight_only = not dynamic or (shape.tokens == 1 and keeps(LINEAR, as_floats))
        require(LINEAR, as_floats if weight_only else shape)
        has_bias = argument(node, "bias") is not None
        return _Site(node, x, weight_only, shape.group_size, has_bias)

    def _emit(self, sites: list[_Site]) -> None:
        """Replace linears that share their activation by one, and slices of its output."""
        first = sites[0].node
        with self.editor.graph.inserting_before(first):
            y = self._linear(sites)
            start = 0
            for site in sites:
                out = y
                end = start + site.node.meta["val"].shape[-1]
                if len(sites) > 1:
                    # Not `split`: with a dynamic token count the runtime's is silently wrong.
                    last = site.node.meta["val"].dim() - 1
                    out = self.editor.call(
                        *(_aten.slice.Tensor, y, last, start, end),
                        like=site.node,
                        val=site.node.meta["val"],
                    )
                start = end
                site.node.replace_all_uses_with(out)
        for site in sites:
            self.editor.graph.erase_node(site.node)

    def _linear(self, sites: list[_Site]) -> Node:
        x, node, group = sites[0].x, sites[0].node, sites[0].group_size
        weight, packed = self._weight(sites)
        scales = self._joined(sites, "w_scales").t().contiguous()
        scales_node = self.editor.add_constant(self._name(node, "scales"), scales)
        bias = self._bias(sites)
        fused_bias = None if self.half else bias
        if sites[0].weight_only:
            target = _WEIGHT_ONLY
            args = (x, weight, scales_node, group, fused_bias)
        else:
            sums = self.editor.add_constant(self._name(node, "sums"), group_sums(packed, group))
            target = _DYNAMIC
            args = (x, *self._encoding(x), weight, sums, scales_node, group, fused_bias)
        y = self.editor.call(target, *args, like=node)
        if bias is None or fused_bias is not None:
            return y
        return self.editor.call(_aten.add.Tensor, y, bias, like=node, val=y.meta["val"])

    def _encoding(self, x: Node) -> tuple[Node, Node]:
        """Return scale and zero point of each token of ``x``, computed once for all its users."""
        if x not in self._encodings:
            value = x.meta["val"]
            block = [1] * (value.dim() - 1) + [value.shape[-1]]
            tokens = value.new_empty(value.shape[:-1])
            with self.editor.graph.inserting_after(x):
                pair = self.editor.call(
                    torch.ops.torchao.choose_qparams_affine.default,
                    *(x, "ASYMMETRIC", block, torch.int8, -128, 127, None, None, torch.int8),
                    like=x,
                    val=(tokens, tokens.to(torch.int8)),
                )
            with self.editor.graph.inserting_after(pair):
                zero = self.editor.call(operator.getitem, pair, 1, like=x)
                scale = self.editor.call(operator.getitem, pair, 0, like=x)
            self._encodings[x] = scale, zero
        return self._encodings[x]

    def _weight(self, sites: list[_Site]) -> tuple[Node, Tensor]:
        """Return the packed rows of all ``sites``, padded to words of 8 columns and as they are."""
        packed = self._joined(sites, "w_packed")
        missing = -packed.shape[1] % 4
        if len(sites) == 1 and not missing:
            return argument(sites[0].node, "w_packed"), packed
        words = torch.nn.functional.pad(packed, (0, missing), value=_ZERO_BYTE)
        return self.editor.add_constant(self._name(sites[0].node, "weight"), words), packed

    def _bias(self, sites: list[_Site]) -> Node | None:
        if not sites[0].has_bias:
            return None
        bias = self._joined(sites, "bias").to(sites[0].node.meta["val"].dtype)
        if self.half:
            bias = bias.reshape([1] * (sites[0].node.meta["val"].dim() - 1) + [-1])
        return self.editor.add_constant(self._name(sites[0].node, "bias"), bias)

    def _joined(self, sites: list[_Site], name: str) -> Tensor:
        tensors = [self.editor.constant(argument(site.node, name)) for site in sites]
        known = [tensor for tensor in tensors if tensor is not None]
        return known[0] if len(known) == 1 else torch.cat(known)

    def _name(self, node: Node, suffix: str) -> str:
        return f"{self.editor.constant_name(argument(node, 'w_packed'))}_{suffix}"

    def _rewrite_embedding(self, node: Node) -> str:
        weight, scales, zeros, group, bits, ids = (
            argument(node, name)
            for name in ("weight", "scales", "zeros", "group_size", "bits", "ids")
        )
        constants = [self.editor.constant(value) for value in (weight, scales)]
        shape = EmbeddingShape(
            k=node.meta["val"].shape[-1],
            group_size=group,
            bits=bits,
            symmetric=_all_zero(self.editor, zeros),
            constant=all(value is not None for value in constants),
            ids_rank=ids.meta["val"].dim(),
        )
        require(EMBEDDING, shape)
        with self.editor.graph.inserting_before(node):
            rows = self.editor.call(
                *(_et_vk.embedding_q4gsw.default, weight, scales, group, ids, True), like=node
            )
        self.editor.replace(node, rows)
        return operator_name(rows.target)


def group_sums(packed: Tensor, group_size: int) -> Tensor:
    """Sum each group of a packed weight ``[N, K/2]``: int32 ``[K/group_size, N]``.

    ``group_size`` is even and divides K.
    """
    pairs = (packed & 15) + (packed >> 4)
    sums = pairs.unflatten(1, (-1, group_size // 2)).sum(dim=2, dtype=torch.int32)
    return (sums - 8 * group_size).t().contiguous()


def _activation(node: Node) -> tuple[Node, bool]:
    """Return the float activation of a linear, and whether it is quantized per token."""
    if is_call(node, "edgepass.linear_qga4w"):
        return argument(node, "x"), False
    if node.target._overloadname == "dynamic":
        return argument(node, "x"), True
    parts = [argument(node, name) for name in ("x_q", "x_scale", "x_zero")]
    sources = {part.args[0] if is_getitem(part) else part for part in parts}
    if len(sources) != 1 or not is_call(next(iter(sources)), "edgepass.quantize_per_token"):
        raise Refused("its activation is not quantized by quantize_per_token")
    if [part.args[1] for part in parts] != [0, 1, 2]:
        raise Refused("its activation's encoding is not that of its values")
    quantize = next(iter(sources))
    floor = argument(quantize, "scale_floor")
    if floor > VULKAN_SCALE_FLOOR:
        raise Refused(f"its activation's scales are at least {floor}, the runtime's less")
    return argument(quantize, "x"), True


def _linear_shape(editor: GraphEditor, node: Node, x: Node, dynamic: bool) -> LinearShape:
    value = x.meta["val"]
    sizes = [size if isinstance(size, int) else -1 for size in value.shape]
    bias = argument(node, "bias")
    needed = [argument(node, "w_packed"), argument(node, "w_scales")]
    needed += [] if bias is None else [bias]
    return LinearShape(
        rank=value.dim(),
        lead=tuple(sizes[:-2]),
        tokens=sizes[-2] if len(sizes) > 1 else 1,
        k=sizes[-1],
        n=node.meta["val"].shape[-1],
        group_size=argument(node, "group_size"),
        symmetric=_all_zero(editor, argument(node, "w_zeros")),
        constant=all(editor.constant(value) is not None for value in needed),
        dtypes=(_dtype_name(x), _dtype_name(argument(node, "w_scales"))),
        dynamic_activation=dynamic,
    )


def _dtype_name(node: Node) -> str:
    return str(node.meta["val"].dtype).removeprefix("torch.")


def _all_zero(editor: GraphEditor, zeros: Any) -> bool:
    if zeros is None:
        return True
    content = editor.constant(zeros)
    return content is not None and not content.any()


def _in_order_of_appearance(sites: list[_Site], *, merge: bool) -> Iterable[list[_Site]]:
    """Group the sites that may be computed as one; each alone without ``merge``."""
    if not merge:
        return [[site] for site in sites]
    order = {key: i for i, key in reversed(list(enumerate(site.key for site in sites)))}
    ranked = sorted(sites, key=lambda site: order[site.key])
    return [list(group) for _, group in groupby(ranked, key=lambda site: site.key)]
