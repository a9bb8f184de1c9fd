"""From a quantized graph to the edge dialect without tracing it again.

Stock ``to_edge_transform_and_lower`` runs each graph on fake tensors about a dozen times before it
is partitioned: two thirds of what a small decoder costs. A quantized decoder needs none of that:
each of its operators has one edge form, and every value is known.
"""

from __future__ import annotations

from typing import Any

import torch
from executorch.exir.dialects._ops import ops as exir_ops
from executorch.exir.passes.remove_unused_parameters_pass import remove_unused_parameters_pass
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import OutputKind
from torch.fx import Node

from edgepass.lowering.edge_forms import BINARY, RENAMED, edge_program, joins_one_dtype
from edgepass.passes.targets import argument

_aten, _edge = torch.ops.aten, exir_ops.edge

# Same arguments, same meaning: only the name changes.
_RENAMED: dict[Any, Any] = {
    **RENAMED,
    _aten.alias.default: _edge.aten.alias_copy.default,
    _aten.embedding.default: _edge.aten.embedding.default,
    _aten.index.Tensor: _edge.aten.index.Tensor,
    _aten.linear.default: _edge.aten.linear.default,
    _aten.matmul.default: _edge.aten.matmul.default,
    _aten.neg.default: _edge.aten.neg.default,
    _aten.rms_norm.default: _edge.aten.rms_norm.default,
}
for _name in ("per_tensor", "per_channel"):
    for _kind in ("quantize", "dequantize"):
        _raw = getattr(torch.ops.quantized_decomposed, f"{_kind}_{_name}").default
        _dialect = getattr(_edge.quantized_decomposed, f"{_kind}_{_name}").default
        _RENAMED[_raw] = _dialect
_RENAMED[torch.ops.torchao.dequantize_affine.default] = _edge.torchao.dequantize_affine.default
_NAMES = {**_RENAMED, **BINARY}
_SHAPED = (_aten.view.default, _aten.reshape.default)


def has_direct_form(program: ExportedProgram) -> bool:
    """Tell whether :func:`to_edge_directly` knows each call of ``program`` (training IR)."""
    signature = program.graph_signature
    if any(spec.kind is not OutputKind.USER_OUTPUT for spec in signature.output_specs):
        return False
    # Stock gives constants a plain memory layout.
    held = [*program.state_dict.values(), *program.constants.values()]
    if not all(isinstance(each, Tensor) and each.is_contiguous() for each in held):
        return False
    others = {node.op for node in program.graph.nodes} - {"call_function", "placeholder", "output"}
    calls = [node for node in program.graph.nodes if node.op == "call_function"]
    return not others and all(map(_is_direct, calls))


def to_edge_directly(program: ExportedProgram) -> ExportedProgram:
    """Return ``program``, of which :func:`has_direct_form` holds, in the edge dialect.

    The graph is changed in place; the program given must not be used afterwards.
    """
    program = remove_unused_parameters_pass(program)
    for node in list(program.graph.nodes):
        if _is_idle(node):
            if node.users:
                node.replace_all_uses_with(node.args[0])
            program.graph.erase_node(node)
        elif node.op == "call_function":
            _to_edge(node)
        # Each later trace would copy the chain of nodes that a node was made from.
        node.meta.pop("from_node", None)
    return edge_program(program, program.graph_signature)


def _is_idle(node: Node) -> bool:
    """A check of what export saw, or a change to the dtype that the value has, if not returned."""
    if any(user.op == "output" for user in node.users):
        return False
    if node.target is _aten._assert_tensor_metadata.default:
        return True
    if node.target is not _aten.to.dtype:
        return False
    return node.args[0].meta["val"].dtype == node.meta["val"].dtype  # type: ignore[union-attr]


def _is_direct(node: Node) -> bool:
    if _is_idle(node):
        return True
    if not isinstance(node.meta.get("val"), Tensor):
        return False
    if any(not isinstance(size, int) for size in node.meta["val"].shape):
        return False
    if node.target in BINARY:
        return joins_one_dtype(node)
    if node.target is _aten.softmax.int:
        return argument(node, "dtype") is None
    return node.target in (_aten.conv2d.default, _aten.transpose.int, *_RENAMED)


def _to_edge(node: Node) -> None:
    """Give a call its edge form."""
    value: Tensor = node.meta["val"]
    if node.target in _SHAPED:
        # The edge operator takes no size to be inferred.
        node.args = (node.args[0], list(value.shape))
    elif node.target is _aten.transpose.int:
        node.args = (node.args[0], _permutation(value.dim(), node.args[1], node.args[2]))
        node.target = _edge.aten.permute_copy.default
    elif node.target is _aten.softmax.int:
        node.args, node.kwargs = (node.args[0], argument(node, "dim"), False), {}
        node.target = _edge.aten._softmax.default
    elif node.target is _aten.conv2d.default:
        names = ("input", "weight", "bias", "stride", "padding", "dilation")
        given = [argument(node, name) for name in names]
        node.args = (*given, False, [0, 0], argument(node, "groups"))
        node.kwargs = {}
        node.target = _edge.aten.convolution.default
    node.target = _NAMES.get(node.target, node.target)
    # Edge operators return contiguous values, where those of the raw graph may be views.
    if not value.is_contiguous():
        node.meta["val"] = value.new_empty(value.shape)


def _permutation(rank: int, one: Any, other: Any) -> list[int]:
    order = list(range(rank))
    order[one], order[other] = order[other], order[one]
    return order
