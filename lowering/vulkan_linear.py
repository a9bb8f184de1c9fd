"""Group-quantized linears and embeddings, as the Vulkan runtime's operators.

The packed weight keeps its bytes: edgepass's linear layout is what ``et_vk.linear_*q4gsw`` reads.
Scales are transposed to ``[K/g, N]``; with quantized activations int32 group sums ``[K/g, N]`` come
along.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from edgepass.lowering import vulkan_kernels  # noqa: F401  (defines the et_vk operators)
from edgepass.lowering.vulkan_declined import Declined, Fused, Refused
from edgepass.lowering.vulkan_graph import GraphEditor
from edgepass.lowering.vulkan_legal import LinearLegalization
from edgepass.lowering.vulkan_legality import EMBEDDING, require
from edgepass.lowering.vulkan_operands import Operands, name_of, read_linear
from edgepass.passes.targets import argument, is_call, operator_name

_aten, _et_vk = torch.ops.aten, torch.ops.et_vk
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
        """Rewrite every linear that can be made legal, and every embedding that is."""
        legalization = LinearLegalization(self.editor, half=self.half)
        legalization.run()
        self.declined += legalization.declined
        for node in list(self.editor.graph.nodes):
            if is_call(node, "edgepass.embedding_qg"):
                name = self.editor.constant_name(argument(node, "weight"))
                self._try(node, self._rewrite_embedding, name)
            elif node in legalization.legal:
                self._try(node, self._accept, legalization.legal[node])
        for together in _in_order_of_appearance(self._sites, merge=self.merge):
            self._emit(together)

    def _try(self, node: Node, rewrite: Callable[[Node], str], name: str) -> None:
        own = operator_name(node.target)
        try:
            runtime_operator = rewrite(node)
        except Refused as refused:
            self.declined.append(Declined.of(node, refused, name))
        else:
            self.fused += [Fused(own, runtime_operator, name)] if name else []

    def _accept(self, node: Node) -> str:
        linear = read_linear(self.editor, node)
        # The runtime's kernels for one token read the activation as floats in both operators
        # (129 dB against a weight-only reference), so there the sums would be dead bytes.
        target = _DYNAMIC if linear.quantizes else _WEIGHT_ONLY
        require(operator_name(target), _facts(linear))
        group, has_bias = linear.group_size, linear.bias is not None
        self._sites.append(_Site(node, linear.x, not linear.quantizes, group, has_bias))
        return operator_name(target)

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
        weight = self._weight(sites)
        scales = self._joined(sites, "w_scales", "transposed", lambda each: each.t().contiguous())
        bias, apart = self._bias(sites), self.half or node.meta["val"].dtype != torch.float32
        fused_bias = None if apart else bias
        args: tuple[Any, ...]
        if sites[0].weight_only:
            target, args = _WEIGHT_ONLY, (x, weight, scales, group, fused_bias)
        else:
            sums = self._joined(sites, "w_packed", "sums", lambda each: group_sums(each, group))
            target = _DYNAMIC
            args = (x, *self._encoding(x), weight, sums, scales, group, fused_bias)
        y = self.editor.call(target, *args, like=node)
        if bias is None or not apart:
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

    def _weight(self, sites: list[_Site]) -> Node:
        """Return the packed rows of all ``sites``, each padded to words of 8 columns."""
        packed = argument(sites[0].node, "w_packed")
        missing = -packed.meta["val"].shape[1] % 4
        if len(sites) == 1 and not missing:
            return packed
        pad = torch.nn.functional.pad
        return self._joined(
            sites, "w_packed", "words", lambda each: pad(each, (0, missing), value=_ZERO_BYTE)
        )

    def _bias(self, sites: list[_Site]) -> Node | None:
        if not sites[0].has_bias:
            return None
        value = sites[0].node.meta["val"]
        apart = self.half or value.dtype != torch.float32
        shape = [1] * (value.dim() - 1) + [-1] if apart else [-1]
        return self._joined(
            sites, "bias", f"row_{len(shape)}", lambda each: each.to(value.dtype).reshape(shape)
        )

    def _joined(
        self, sites: list[_Site], name: str, kind: str, change: Callable[[Tensor], Tensor]
    ) -> Node:
        """Return a constant made of one parameter of all sites, the same for the same weights."""
        nodes = tuple(argument(site.node, name) for site in sites)

        def make() -> Tensor:
            tensors = [self.editor.required_constant(each) for each in nodes]
            return change(torch.cat(tensors) if len(tensors) > 1 else tensors[0])

        label = f"{self.editor.constant_name(nodes[0])}_{kind}"
        key = ("et_vk", kind, sites[0].group_size, nodes)
        return self.editor.program.derive_constant(key, label, make)

    def _rewrite_embedding(self, node: Node) -> str:
        weight, scales, zeros, group, bits, ids = (
            argument(node, name)
            for name in ("weight", "scales", "zeros", "group_size", "bits", "ids")
        )
        constant = all(self.editor.constant(value) is not None for value in (weight, scales))
        facts = {
            "parameters": "constant" if constant else "computed",
            "bits": bits,
            "zero points": 0 if _all_zero(self.editor, zeros) else "other than 0",
            "K": node.meta["val"].shape[-1],
            "group size": group,
            "rank of the ids": ids.meta["val"].dim(),
        }
        require(EMBEDDING, facts)
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


def _facts(linear: Operands) -> dict[str, Any]:
    """What the legality table asks of a linear."""
    value = linear.x.meta["val"]
    dtype, scales = value.dtype, linear.scales.meta["val"].dtype
    return {
        "parameters": "constant",
        "activation dtype": name_of(dtype),
        "scales dtype": "that of the activation" if scales == dtype else name_of(scales),
        "zero points": 0 if linear.zeros is None else "other than 0",
        "rank": value.dim(),
        "batch": next((size for size in value.shape[:-2] if size != 1), 1),
        "K": linear.k,
        "N": linear.n,
        "group size": linear.group_size,
    }


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
