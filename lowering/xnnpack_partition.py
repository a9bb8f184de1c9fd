"""Which nodes go into which XNNPACK delegate.

Two nodes share a delegate when equally many crossings (delegate -> outside -> delegate) lie
before them. That makes the delegates as few as the graph allows and acyclic by construction:
a path that leaves a delegate and comes back always raises the count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from executorch.backends.xnnpack.xnnpack_preprocess import XnnpackBackend
from executorch.exir.backend.compile_spec_schema import CompileSpec
from executorch.exir.backend.partitioner import DelegationSpec, Partitioner, PartitionResult
from executorch.exir.backend.utils import tag_constant_data
from executorch.exir.dialects.edge._ops import EdgeOpOverload
from torch.export import ExportedProgram
from torch.fx import Node

from edgepass.lowering.xnnpack_support import PRESERVED, is_supported

# With this spec the stock preprocess runs one graph pass instead of seventeen: none of the
# others applies to the nodes that this partitioner admits.
COMPILE_SPECS = [CompileSpec("dqlinear_partitioner", b"1")]


class FusedXnnpackPartitioner(Partitioner):
    """Delegates fused edgepass operators, and the plain ones between them, to XNNPACK."""

    def __init__(self) -> None:
        super().__init__()
        self.delegation_spec = DelegationSpec(XnnpackBackend.__name__, COMPILE_SPECS)

    def partition(self, exported_program: ExportedProgram) -> PartitionResult:
        constants = constant_placeholders(exported_program)

        def inside(node: Node) -> bool:
            return node.op == "call_function" and is_supported(node, constants)

        tags = {}
        for node, level in crossing_levels(exported_program.graph.nodes, inside).items():
            if inside(node):
                tag = f"edgepass_xnnpack_{level}"
                node.meta["delegation_tag"] = tag
                tags[tag] = self.delegation_spec
        tag_constant_data(exported_program)
        return PartitionResult(tagged_exported_program=exported_program, partition_tags=tags)

    def ops_to_not_decompose(
        self, ep: ExportedProgram
    ) -> tuple[list[torch._ops.OpOverload], Callable[[Node], bool] | None]:
        # ExecuTorch asks twice. Before decomposing: with sizes kept too, nothing is left to
        # decompose and it skips a whole trace. After partitioning: what is named must be inside
        # delegates, where sizes never are.
        in_edge_dialect = any(isinstance(n.target, EdgeOpOverload) for n in ep.graph.nodes)
        return [*PRESERVED, *(() if in_edge_dialect else (torch.ops.aten.sym_size.int,))], None


def constant_placeholders(program: ExportedProgram) -> set[Node]:
    """The placeholders whose tensors never change: parameters, constants, unmutated buffers."""
    signature = program.graph_signature
    mutated = set(signature.buffers_to_mutate.values())
    names = set(signature.inputs_to_parameters) | set(signature.inputs_to_lifted_tensor_constants)
    names |= {name for name, target in signature.inputs_to_buffers.items() if target not in mutated}
    return {n for n in program.graph.nodes if n.op == "placeholder" and n.name in names}


def crossing_levels(nodes: Iterable[Node], inside: Callable[[Node], bool]) -> dict[Node, int]:
    """How often the longest path to each node has entered a delegate from computed outside values.

    An in-place operator hands its level on to the placeholder that it writes: whoever reads the
    buffer afterwards reads a computed value, though the graph shows no edge.
    """
    levels: dict[Node, int] = {}
    within: dict[Node, bool] = {}
    written: set[Node] = set()
    for node in nodes:
        within[node] = inside(node)
        level = 0
        for source in node.all_input_nodes:
            computed = source.op == "call_function" or source in written
            enters = within[node] and computed and not within[source]
            level = max(level, levels[source] + int(enters))
        levels[node] = level
        for buffer in mutated_arguments(node):
            levels[buffer] = max(levels[buffer], level)
            written.add(buffer)
    return levels


def mutated_arguments(node: Node) -> list[Node]:
    """The arguments that the node's operator writes in place, by its schema."""
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function" or schema is None:
        return []
    return [
        arg
        for parameter, arg in zip(schema.arguments, node.args, strict=False)
        if parameter.alias_info is not None
        and parameter.alias_info.is_write
        and isinstance(arg, Node)
    ]
