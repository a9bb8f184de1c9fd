"""What the backends share of going to the edge dialect without tracing the graph again."""

from __future__ import annotations

from typing import Any

import torch
from executorch.exir import EdgeCompileConfig
from executorch.exir.dialects._ops import ops as exir_ops
from executorch.exir.verification.verifier import EXIREdgeDialectVerifier
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature
from torch.fx import Node

_aten, _edge = torch.ops.aten, exir_ops.edge

# Same arguments, same meaning: only the name changes.
RENAMED: dict[Any, Any] = {
    _aten.view.default: _edge.aten.view_copy.default,
    _aten.reshape.default: _edge.aten.view_copy.default,
    _aten.unsqueeze.default: _edge.aten.unsqueeze_copy.default,
    _aten.permute.default: _edge.aten.permute_copy.default,
    _aten.slice.Tensor: _edge.aten.slice_copy.Tensor,
    _aten.select.int: _edge.aten.select_copy.int,
    _aten.cat.default: _edge.aten.cat.default,
    _aten.sigmoid.default: _edge.aten.sigmoid.default,
    _aten.tanh.default: _edge.aten.tanh.default,
    _aten.relu.default: _edge.aten.relu.default,
    _aten.gelu.default: _edge.aten.gelu.default,
}
# Of two tensors of one dtype; anything else needs stock's promotions.
BINARY: dict[Any, Any] = {
    _aten.add.Tensor: _edge.aten.add.Tensor,
    _aten.sub.Tensor: _edge.aten.sub.Tensor,
    _aten.mul.Tensor: _edge.aten.mul.Tensor,
    _aten.div.Tensor: _edge.aten.div.Tensor,
}


def edge_config() -> EdgeCompileConfig:
    """Return the configuration of every conversion; a new one, since stock writes into it."""
    return EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True)


def joins_one_dtype(node: Node) -> bool:
    """Tell whether a call of ``BINARY`` has two tensors of one dtype and nothing else."""
    operands = [arg.meta.get("val") for arg in node.args if isinstance(arg, Node)]
    dtypes = [value.dtype for value in operands if isinstance(value, torch.Tensor)]
    return len(dtypes) == 2 and dtypes[0] == dtypes[1] and not node.kwargs


def edge_program(program: ExportedProgram, signature: ExportGraphSignature) -> ExportedProgram:
    """Return ``program``, whose graph is in the edge dialect already, with its verifier."""
    program.graph_module.recompile()
    verifier = EXIREdgeDialectVerifier(edge_compile_config=edge_config(), class_only=True)
    return ExportedProgram(
        root=program.graph_module,
        graph=program.graph,
        graph_signature=signature,
        state_dict=program.state_dict,
        range_constraints=program.range_constraints,
        module_call_graph=program.module_call_graph,
        constants=program.constants,
        verifiers=[verifier],
    )
