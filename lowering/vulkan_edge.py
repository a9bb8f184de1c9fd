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
from executorch.exir import EdgeCompileConfig
from executorch.exir.dialects._ops import ops as exir_ops
from executorch.exir.verification.verifier import EXIREdgeDialectVerifier
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Graph, Node

from edgepass.lowering import vulkan_kernels  # noqa: F401  (defines the runtime's operators)
from edgepass.lowering.vulkan_plain import is_outside
from edgepass.passes.program import WorkingProgram
from edgepass.passes.targets import argument

_aten, _edge = torch.ops.aten, exir_ops.edge
EDGE_CONFIG = EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True)

# Same arguments, same meaning: only the name changes.
_RENAMED: dict[Any, Any] = {
    _aten.view.default: _edge.aten.view_copy.default,
    _aten.reshape.default: _edge.aten.view_copy.default,
    _aten.unsqueeze.default: _edge.aten.unsqueeze_copy.default,
    _aten.permute.default: _edge.aten.permute_copy.default,
    _aten.slice.Tensor: _edge.aten.slice_copy.Tensor,
    _aten.select.int: _edge.aten.select_copy.int,
    _aten.cat.default: _edge.aten.cat.default,
    _aten.constant_pad_nd.default: _edge.aten.constant_pad_nd.default,
    _aten.sigmoid.default: _edge.aten.sigmoid.default,
    _aten.tanh.default: _edge.aten.tanh.default,
    _aten.relu.default: _edge.aten.relu.default,
    _aten.gelu.default: _edge.aten.gelu.default,
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
# Of two float tensors of one dtype; anything else needs stock's promotions.
_BINARY: dict[Any, Any] = {
    _aten.add.Tensor: _edge.aten.add.Tensor,
    _aten.sub.Tensor: _edge.aten.sub.Tensor,
    _aten.mul.Tensor: _edge.aten.mul.Tensor,
    _aten.div.Tensor: _edge.aten.div.Tensor,
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
    program.graph_module.recompile()
    return ExportedProgram(
        root=program.graph_module,
        graph=program.graph,
        graph_signature=program.graph_signature,
        state_dict=program.state_dict,
        range_constraints=program.range_constraints,
        module_call_graph=program.module_call_graph,
        constants=program.constants,
        verifiers=[EXIREdgeDialectVerifier(edge_compile_config=EDGE_CONFIG, class_only=True)],
    )


def _is_direct(node: Node) -> bool:
    if is_outside(node) or not all(_fits(value) for value in _values(node)):
        return False
    if node.target in _BINARY:
        operands = [arg.meta["val"].dtype for arg in node.args if isinstance(arg, Node)]
        return len(operands) == 2 and operands[0] == operands[1] and not node.kwargs
    if node.target is _aten.gelu.default:
        # Stock takes `approximate="none"` too, and the runtime then computes the tanh form.
        return argument(node, "approximate") == "tanh"
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


_NAMES = {**_RENAMED, **_BINARY, **{raw: edge for raw, (edge, _) in _WEIGHTED.items()}}


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
