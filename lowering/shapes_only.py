"""Stand-ins for the original graphs of delegates: the same inputs and outputs, nothing in between.

Passes of ``to_executorch`` run each delegate's original graph on fake tensors to learn no more than
the outputs' shapes (5 of 14 s at 30 layers on Vulkan, half of ``to_executorch`` on XNNPACK).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from executorch.exir import EdgeProgramManager
from executorch.exir.lowered_backend_module import LoweredBackendModule
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)
from torch.fx import Graph, GraphModule, Node


def replace_delegates(
    manager: EdgeProgramManager, replace: Callable[[LoweredBackendModule], LoweredBackendModule]
) -> None:
    """Put ``replace(delegate)`` in the place of each delegate of each method."""
    for method in manager.methods:
        module = manager.exported_program(method).graph_module
        for name, child in list(module.named_children()):
            if isinstance(child, LoweredBackendModule):
                setattr(module, name, replace(child))


def with_shapes_only(module: LoweredBackendModule, backend_id: str) -> LoweredBackendModule:
    """Return the delegate under ``backend_id`` with a stand-in for its original graph."""
    new = LoweredBackendModule(
        shapes_only(module.original_module),
        backend_id,
        module.processed_bytes,
        module.compile_specs,
        module.named_data_store_output,
    )
    new.meta = module.meta
    return new


def shapes_only(program: ExportedProgram) -> ExportedProgram:
    """Return a program with the inputs and outputs of ``program`` that computes zeros.

    ``program`` itself if an output has a dynamic size that no input has.
    """
    graph, signature = Graph(), program.graph_signature
    nodes = {node.name: node for node in program.graph.nodes}
    inputs = [_input(graph, nodes[name]) for name in signature.user_inputs]
    outputs = [_zeros(graph, inputs, nodes[name]) for name in signature.user_outputs]
    if any(output is None for output in outputs):
        return program
    graph.output(tuple(outputs))
    return ExportedProgram(
        root=GraphModule({}, graph),
        graph=graph,
        graph_signature=_plain_signature(inputs, [node for node in outputs if node is not None]),
        state_dict={},
        range_constraints=program.range_constraints,
        module_call_graph=program.module_call_graph,
        verifiers=program.verifiers,
    )


def _input(graph: Graph, source: Node) -> Node:
    node = graph.placeholder(source.name)
    node.meta["val"] = source.meta["val"]
    return node


def _zeros(graph: Graph, inputs: list[Node], source: Node) -> Node | None:
    value = source.meta["val"]
    sizes = [
        size if isinstance(size, int) else _same_size(graph, inputs, size) for size in value.shape
    ]
    if None in sizes:
        return None
    node = graph.call_function(torch.ops.aten.full.default, (sizes, 0), {"dtype": value.dtype})
    node.meta["val"] = value
    return node


def _same_size(graph: Graph, inputs: list[Node], size: torch.SymInt) -> Node | None:
    """Return the size of an input that is the same symbol, None if no input has it."""
    for node in inputs:
        shape = node.meta["val"].shape if isinstance(node.meta["val"], Tensor) else ()
        for dim, candidate in enumerate(shape):
            if str(candidate) == str(size):
                result = graph.call_function(torch.ops.aten.sym_size.int, (node, dim))
                result.meta["val"] = candidate
                return result
    return None


def _plain_signature(inputs: list[Node], outputs: list[Node]) -> ExportGraphSignature:
    return ExportGraphSignature(
        [InputSpec(InputKind.USER_INPUT, TensorArgument(node.name), None) for node in inputs],
        [OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(node.name), None) for node in outputs],
    )
