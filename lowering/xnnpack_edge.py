"""From the prepared graph to the edge dialect without tracing it again.

Stock ``to_edge_transform_and_lower`` runs the whole graph on fake tensors about ten times before it
partitions it. A prepared decoder needs none of that: each of its operators has one edge form, and
every value is known. A program with anything else goes through the stock function.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from executorch.exir.dialects._ops import ops as exir_ops
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import (
    ExportGraphSignature,
    OutputKind,
    OutputSpec,
    TensorArgument,
)
from torch.fx import Graph, Node

import edgepass.ops  # noqa: F401  registers the operators that are named below
from edgepass.lowering.edge_forms import BINARY, RENAMED, edge_program, joins_one_dtype
from edgepass.passes.targets import argument, is_call

_aten, _edge = torch.ops.aten, exir_ops.edge

# Same arguments, same meaning: only the name changes.
_RENAMED: dict[Any, Any] = {
    **RENAMED,
    _aten.permute_copy.default: _edge.aten.permute_copy.default,
    _aten.embedding.default: _edge.aten.embedding.default,
    _aten.linear.default: _edge.aten.linear.default,
    _aten.silu.default: _edge.aten.silu.default,
    _aten.neg.default: _edge.aten.neg.default,
    _aten.tanh.default: _edge.aten.tanh.default,
    _aten.exp.default: _edge.aten.exp.default,
    _aten.rsqrt.default: _edge.aten.rsqrt.default,
    _aten.clamp.default: _edge.aten.clamp.default,
}
for _name in ("embedding_4bit.dtype", "embedding_byte.dtype"):
    _packet, _overload = _name.split(".")
    _RENAMED[getattr(getattr(torch.ops.quantized_decomposed, _packet), _overload)] = getattr(
        getattr(_edge.quantized_decomposed, _packet), _overload
    )
for _name in (
    *("linear_qta8a_qga4w.dynamic", "linear_qta8a_qc8w.dynamic"),
    *("rms_norm", "rotary", "masked_attention", "cast"),
):
    _packet, _, _overload = _name.partition(".")
    _raw, _dialect = getattr(torch.ops.edgepass, _packet), getattr(_edge.edgepass, _packet)
    _RENAMED[getattr(_raw, _overload or "default")] = getattr(_dialect, _overload or "default")
_NAMES = {**_RENAMED, **BINARY}
_UPDATE = torch.ops.llama.update_cache.default
_KEPT = {
    *(operator.getitem, operator.add, operator.ge, operator.le),
    _aten.sym_size.int,
    _aten._local_scalar_dense.default,
    _aten._assert_scalar.default,
}


def has_direct_form(program: ExportedProgram) -> bool:
    """Tell whether :func:`to_edge_directly` knows each call of ``program`` (training IR)."""
    signature = program.graph_signature
    # Its own in-place writes aside, a program that changes its state needs stock's analysis.
    if any(spec.kind is not OutputKind.USER_OUTPUT for spec in signature.output_specs):
        return False
    calls = [node for node in program.graph.nodes if node.op == "call_function"]
    others = {node.op for node in program.graph.nodes} - {"call_function", "placeholder", "output"}
    # A buffer that is itself an output would be returned as it was before its write.
    returned = program.graph.output_node().args[0]
    others |= {node.op for node in returned if isinstance(node, Node)} - {"call_function"}
    return not others and all(map(_is_direct, calls))


def to_edge_directly(program: ExportedProgram) -> ExportedProgram:
    """Return ``program``, of which :func:`has_direct_form` holds, in the edge dialect.

    The graph is changed in place; the program given must not be used afterwards.
    """
    graph = program.graph
    written: dict[Node, Node] = {}
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        for buffer in [source for source in node.all_input_nodes if source in written]:
            node.replace_input_with(buffer, written[buffer])
        if node.target is _UPDATE:
            buffer = node.args[1]
            # A second write of one buffer finds the first's value in its place.
            source = next((b for b, value in written.items() if value is buffer), buffer)
            written[source] = _functionalize(graph, node)
        elif node.target not in _KEPT:
            node.target = _NAMES[node.target]
        if node.target is _aten._local_scalar_dense.default:
            node.meta["unbacked_bindings"] = {node.meta["val"].node.expr: ()}
        _make_contiguous(node)
    signature = _with_writes(program, written)
    return edge_program(program, signature)


def _is_direct(node: Node) -> bool:
    if node.target in _KEPT or node.target is _UPDATE:
        return True
    if node.target in BINARY:
        return joins_one_dtype(node)
    if is_call(node, "aten.embedding"):
        return not argument(node, "scale_grad_by_freq") and not argument(node, "sparse")
    return node.target in _RENAMED


def _functionalize(graph: Graph, update: Node) -> Node:
    """Put the form that ExecuTorch gives an in-place operator in its place; return the new cache.

    ``to_executorch`` turns it back into a write in place.
    """
    rows, cache, start = update.args
    call = torch.ops.higher_order.auto_functionalized_v2
    with graph.inserting_before(update):
        done = graph.call_function(call, (_UPDATE,))
        done.kwargs = {
            "value": rows,
            "start_pos": start,
            "_cache_base_index": 0,
            "_all_bases": [cache],
        }
        value = graph.call_function(operator.getitem, (done, 1))
    fake = cache.meta["val"]
    done.meta = {**update.meta, "val": (fake.new_empty((1,)), fake)}
    value.meta = {**update.meta, "val": fake}
    graph.erase_node(update)
    return value


def _make_contiguous(node: Node) -> None:
    """Edge operators return contiguous values, where those of the raw graph may be views."""
    value = node.meta.get("val")
    if isinstance(value, Tensor) and not value.is_contiguous():
        node.meta["val"] = value.new_empty(value.shape)


def _with_writes(program: ExportedProgram, written: dict[Node, Node]) -> ExportGraphSignature:
    """Return the changed buffers before the user's outputs, and say so in the signature."""
    signature = program.graph_signature
    output = program.graph.output_node()
    output.args = ((*written.values(), *output.args[0]),)
    targets = [signature.inputs_to_buffers[buffer.name] for buffer in written]
    writes = [
        OutputSpec(OutputKind.BUFFER_MUTATION, TensorArgument(name=value.name), target)
        for value, target in zip(written.values(), targets, strict=True)
    ]
    return ExportGraphSignature(signature.input_specs, [*writes, *signature.output_specs])
