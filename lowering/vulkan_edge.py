"""From the raw graph to the edge dialect without tracing it again.

Stock ``to_edge`` runs the whole graph five times or so on fake tensors. A rewritten decoder needs
none of that: each of its operators has one edge form, and every value is known. A program with
anything else goes through stock ``to_edge``.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from executorch.exir.dialects._ops import ops as exir_ops
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Graph, Node

from edgepass.lowering import vulkan_kernels  # noqa: F401  (defines the runtime's operators)
from edgepass.lowering.edge_forms import BINARY, RENAMED, edge_program, joins_one_dtype
from edgepass.lowering.vulkan_legality import GELU, accepted
from edgepass.lowering.vulkan_plain import is_outside
from edgepass.passes.program import WorkingProgram
from edgepass.passes.targets import argument

_aten, _edge = torch.ops.aten, exir_ops.edge

# Same arguments, same meaning: only the name changes.
_RENAMED: dict[Any, Any] = {
    **RENAMED,
    _aten.constant_pad_nd.default: _edge.aten.constant_pad_nd.default,
    _aten.neg.default: _edge.aten.neg.default,
    torch.ops.et_vk.select_as_symint.default: _edge.et_vk.select_as_symint.default,
    torch.ops.et_vk.embedding_q4gsw.default: _edge.et_vk.embedding_q4gsw.default,
    torch.ops.et_vk.linear_q4gsw.default: _edge.et_vk.linear_q4gsw.default,
    torch.ops.et_vk.linear_dq8ca_q4gsw.default: _edge.et_vk.linear_dq8ca_q4gsw.default,
    torch.ops.et_vk.rms_norm.default: _edge.et_vk.rms_norm.default,
    torch.ops.et_vk.apply_rotary_emb_hf.default: _edge.et_vk.apply_rotary_emb_hf.default,
    # As an edge operator it passes for functional: the caches belong to the delegate alone.
    torch.ops.llama.sdpa_with_kv_cache.default: _edge.llama.sdpa_with_kv_cache.default,
    torch.ops.torchao.choose_qparams_affine.default: _edge.torchao.choose_qparams_affine.default,
}
# The runtime packs the weights of these when it loads, so they must be constants.
_WEIGHTED: dict[Any, tuple[Any, tuple[int, ...]]] = {
    _aten.embedding.default: (_edge.aten.embedding.default, (0,)),
    _aten.linear.default: (_edge.aten.linear.default, (1, 2)),
}
_KEPT = {operator.getitem}


def has_direct_form(program: WorkingProgram) -> bool:
    """Tell whether :func:`to_edge_directly` knows each call, so that one delegate takes them all.

    That holds for what the table below names: float32 or float16 values of rank 4 and less.
    """
    calls = [node for node in program.graph.nodes if node.op == "call_function"]
    return all(_is_direct(node) and _has_constant_weights(program, node) for node in calls)


def to_edge_directly(program: ExportedProgram) -> ExportedProgram:
    """Return ``program``, of which :func:`has_direct_form` holds, in the edge dialect.

    The graph is changed in place; the program given must not be used afterwards.
    """
    for node in list(program.graph.nodes):
        if node.op == "call_function" and node.target not in _KEPT:
            _convert(program.graph, node)
    return edge_program(program, program.graph_signature)


def _is_direct(node: Node) -> bool:
    if is_outside(node) or not all(_fits(value) for value in _values(node)):
        return False
    if node.target in BINARY:
        return joins_one_dtype(node)
    if node.target is _aten.gelu.default:
        return accepted(GELU, "approximate").holds(argument(node, "approximate"))
    if node.target in _FORMS or node.target in _KEPT:
        return True
    return (node.target in _RENAMED or node.target in _WEIGHTED) and not node.kwargs


def _has_constant_weights(program: WorkingProgram, node: Node) -> bool:
    _, places = _WEIGHTED.get(node.target, (None, ()))
    weights = [node.args[place] for place in places if place < len(node.args)]
    return all(weight is None or program.is_constant(weight) for weight in weights)


def _values(node: Node) -> list[Any]:
    value = node.meta.get("val")
    return list(value) if isinstance(value, (tuple, list)) else [value]


def _fits(value: Any) -> bool:
    if not isinstance(value, Tensor):
        return True
    return value.dim() <= 4 and value.dtype in (torch.float32, torch.float16, torch.int8)


def _convert(graph: Graph, node: Node) -> None:
    form = _FORMS.get(node.target)
    if form is None:
        node.target = _NAMES[node.target]
        return
    with graph.inserting_before(node):
        form(graph, node)


_NAMES = {**_RENAMED, **BINARY, **{raw: edge for raw, (edge, _) in _WEIGHTED.items()}}


def _transpose(graph: Graph, node: Node) -> None:
    x, first, second = node.args
    order = list(range(x.meta["val"].dim()))
    order[first], order[second] = order[second], order[first]
    node.target, node.args = _edge.aten.permute_copy.default, (x, order)


def _silu(graph: Graph, node: Node) -> None:
    gate = graph.call_function(_edge.aten.sigmoid.default, node.args)
    gate.meta = dict(node.meta)
    node.target, node.args = _edge.aten.mul.Tensor, (node.args[0], gate)


_FORMS: dict[Any, Callable[[Graph, Node], None]] = {
    _aten.transpose.int: _transpose,
    _aten.silu.default: _silu,
}
