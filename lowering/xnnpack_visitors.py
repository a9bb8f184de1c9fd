"""How each fused edgepass operator is written into an XNNPACK delegate.

The stock ``XnnpackBackend.preprocess`` finds these visitors by the operator's edge name.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from executorch.backends.xnnpack.operators.node_visitor import (
    NodeVisitor,
    register_node_visitor,
)
from executorch.backends.xnnpack.serialization.xnnpack_graph_schema import (
    XNNAdd,
    XNNConvert,
    XNNGraph,
    XNNMultiply,
    XNNNegate,
    XNNReciprocalSquareRoot,
    XNNSigmoid,
    XNNSoftmax,
    XNNSquare,
    XNNTanh,
)
from executorch.backends.xnnpack.utils.utils import get_param_tensor
from torch.fx import Node

from edgepass.lowering.xnnpack_emitter import DATATYPES, Emitter

ValueIds = dict[object, int]


class FusedOpVisitor(NodeVisitor):
    """A visitor that writes one fused operator as several XNNPACK nodes."""

    def define_node(
        self, node: Node, xnn_graph: XNNGraph, vals_to_ids: ValueIds, debug_handle: int
    ) -> None:
        emitter = Emitter(xnn_graph, self._named_data_store, debug_handle)
        self.emit(node, emitter, vals_to_ids)

    def emit(self, node: Node, emitter: Emitter, ids: ValueIds) -> None:
        raise AssertionError(f"{type(self).__name__} must say how {node.target} is written")

    def input(self, node: Node, emitter: Emitter, ids: ValueIds) -> int:
        """The value of an activation or of a small float constant; defined on first use."""
        self.define_tensor(node, emitter.graph, ids)
        return ids[node]

    output = input

    def constant(self, node: Node) -> torch.Tensor:
        tensor = get_param_tensor(self.exported_program, node)
        assert tensor is not None, f"{node} must be a constant of the delegate"
        return tensor

    def shared(self, ids: ValueIds, key: object, make: Callable[[], int]) -> int:
        """A derived value that several nodes of the delegate use: made once."""
        if key not in ids:
            ids[key] = make()
        return ids[key]


@register_node_visitor
class LinearVisitor(FusedOpVisitor):
    """Dynamic per-token int8 activation, blockwise int4 weight: convert, fully connected."""

    target = "edgepass.linear_qta8a_qga4w.dynamic"

    def emit(self, node: Node, emitter: Emitter, ids: ValueIds) -> None:
        x, packed, group_size, scales, _zeros, *rest = node.args
        bias = rest[0] if rest else None
        source = self.input(x, emitter, ids)
        # Q, K and V (gate and up) read the same activation: it is quantized once.
        rows = self.shared(ids, (x, "rows"), lambda: emitter.quantize_rows(source))
        weight = emitter.int4_filter(self.constant(packed), self.constant(scales), group_size)
        bias_id = None if bias is None else emitter.constant(self.constant(bias))
        emitter.fully_connected(rows, weight, bias_id, self.output(node, emitter, ids))


@register_node_visitor
class Int8LinearVisitor(FusedOpVisitor):
    """Dynamic per-token int8 activation, int8 weight by channel: convert, fully connected."""

    target = "edgepass.linear_qta8a_qc8w.dynamic"

    def emit(self, node: Node, emitter: Emitter, ids: ValueIds) -> None:
        x, weight, scales, *rest = node.args
        bias = rest[0] if rest else None
        source = self.input(x, emitter, ids)
        rows = self.shared(ids, (x, "rows"), lambda: emitter.quantize_rows(source))
        filter_id = emitter.int8_filter(self.constant(weight), self.constant(scales))
        bias_id = None if bias is None else emitter.constant(self.constant(bias))
        emitter.fully_connected(rows, filter_id, bias_id, self.output(node, emitter, ids))


@register_node_visitor
class RmsNormVisitor(FusedOpVisitor):
    """x * rsqrt(mean(x^2) + eps) * weight; the mean is a fully connected of 1/D, eps its bias."""

    target = "edgepass.rms_norm.default"

    def emit(self, node: Node, emitter: Emitter, ids: ValueIds) -> None:
        source, weight, eps = node.args
        x = self.input(source, emitter, ids)
        width = emitter.dims(x)[-1]
        mean = emitter.constant(torch.full((1, width), 1.0 / width))
        variance = emitter.fully_connected(
            emitter.unary(XNNSquare, x), mean, emitter.constant(torch.tensor([eps]))
        )
        normed = emitter.binary(XNNMultiply, x, emitter.unary(XNNReciprocalSquareRoot, variance))
        gain = emitter.constant(self.constant(weight))
        emitter.binary(XNNMultiply, normed, gain, self.output(node, emitter, ids))


@register_node_visitor
class RotaryVisitor(FusedOpVisitor):
    """x * cos + rotate(x) * sin over the first R channels; the others pass through."""

    target = "edgepass.rotary.default"

    def emit(self, node: Node, emitter: Emitter, ids: ValueIds) -> None:
        source, cos, sin, interleaved = node.args
        x = self.input(source, emitter, ids)
        cosine, sine = self.input(cos, emitter, ids), self.input(sin, emitter, ids)
        out = self.output(node, emitter, ids)
        width, rotated = emitter.dims(x)[-1], emitter.dims(cosine)[-1]
        part = x if rotated == width else emitter.slice_last(x, 0, rotated)
        turned = self.rotate_pairs(emitter, part) if interleaved else rotate_half(emitter, part)
        left = emitter.binary(XNNMultiply, part, cosine)
        right = emitter.binary(XNNMultiply, turned, sine)
        if rotated == width:
            emitter.binary(XNNAdd, left, right, out)
            return
        tail = emitter.slice_last(x, rotated, width)
        emitter.concatenate_last(emitter.binary(XNNAdd, left, right), tail, out)

    @staticmethod
    def rotate_pairs(emitter: Emitter, x: int) -> int:
        """(a, b) -> (-b, a) for each pair of neighbouring channels."""
        dims = emitter.dims(x)
        pairs = [*dims[:-1], dims[-1] // 2, 2]
        split = emitter.reshape(x, inferred(pairs, len(dims) - 2), pairs)
        turned = rotate_half(emitter, split)
        return emitter.reshape(turned, inferred(dims, len(dims) - 2), dims)


def rotate_half(emitter: Emitter, x: int) -> int:
    """(a, b) -> (-b, a) for the halves of the last dimension."""
    width = emitter.dims(x)[-1]
    first, second = emitter.slice_last(x, 0, width // 2), emitter.slice_last(x, width // 2, width)
    return emitter.concatenate_last(emitter.unary(XNNNegate, second), first)


def inferred(dims: list[int], index: int) -> list[int]:
    """A reshape target: XNNPACK infers the dimension that is given as 0."""
    return [0 if i == index else size for i, size in enumerate(dims)]


@register_node_visitor
class MaskedAttentionVisitor(FusedOpVisitor):
    """softmax(cap(q k^T * scale) + mask) v; query heads of one KV head are folded into a batch."""

    target = "edgepass.masked_attention.default"

    def emit(self, node: Node, emitter: Emitter, ids: ValueIds) -> None:
        query, key, value, mask, scale, *rest = node.args
        softcap = rest[0] if rest else 0.0
        q, k, v, m = (self.input(n, emitter, ids) for n in (query, key, value, mask))
        _, heads, tokens, width = emitter.dims(q)
        _, kv_heads, rows, _ = emitter.dims(k)
        groups = heads // kv_heads
        folded = [kv_heads, groups, tokens, width]
        factor = scale / softcap if softcap else scale
        q = emitter.binary(XNNMultiply, q, emitter.constant(torch.tensor([factor])))
        q = emitter.reshape(q, inferred(folded, 2), folded)
        cache = [kv_heads, 1, rows, width]
        k, v = (self.as_float(emitter, x) for x in (k, v))
        k, v = (emitter.reshape(x, inferred(cache, 2), cache) for x in (k, v))
        scores = emitter.matmul(q, k, transpose_b=True)
        if softcap:
            ceiling = emitter.constant(torch.tensor([softcap]))
            scores = emitter.binary(XNNMultiply, emitter.unary(XNNTanh, scores), ceiling)
        scores = emitter.binary(XNNAdd, scores, m)
        out = emitter.matmul(emitter.unary(XNNSoftmax, scores), v, transpose_b=False)
        flat = [1, heads, tokens, width]
        emitter.reshape(out, inferred(flat, 2), flat, self.output(node, emitter, ids))

    @staticmethod
    def as_float(emitter: Emitter, x: int) -> int:
        """A cache may be stored in half; the products are taken in float32."""
        if emitter.graph.xvalues[x].xvalue_union.datatype == DATATYPES[torch.float32]:
            return x
        return emitter.unary(XNNConvert, x)


@register_node_visitor
class SiluVisitor(FusedOpVisitor):
    """XNNPACK has no silu: x * sigmoid(x)."""

    target = "aten.silu.default"

    def emit(self, node: Node, emitter: Emitter, ids: ValueIds) -> None:
        x = self.input(node.args[0], emitter, ids)
        gate = emitter.unary(XNNSigmoid, x)
        emitter.binary(XNNMultiply, x, gate, self.output(node, emitter, ids))


@register_node_visitor
class CastVisitor(FusedOpVisitor):
    """float32 to float16 and back."""

    target = "edgepass.cast.default"

    def emit(self, node: Node, emitter: Emitter, ids: ValueIds) -> None:
        x = self.input(node.args[0], emitter, ids)
        emitter.unary(XNNConvert, x, self.output(node, emitter, ids))
