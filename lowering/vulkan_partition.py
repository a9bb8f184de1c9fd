"""Which nodes go into Vulkan delegates: all of them, or what stock and the limits allow."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from executorch.backends.vulkan.partitioner.vulkan_partitioner import (
    VulkanPartitioner,
    VulkanSupportedOperators,
)
from executorch.backends.vulkan.utils import (
    DEFAULT_BUFFER_LIMIT,
    DEFAULT_TEXTURE_LIMITS,
    SMALL_TEXTURE_LIMITS,
)
from executorch.exir.backend.compile_spec_schema import CompileSpec
from executorch.exir.backend.partitioner import DelegationSpec, Partitioner, PartitionResult
from executorch.exir.backend.utils import tag_constant_data, tag_mutated_buffer
from executorch.exir.dialects._ops import ops as exir_ops
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node
from torch.fx.passes.infra.partitioner import CapabilityBasedPartitioner

from edgepass.lowering.vulkan_backend import EdgepassVulkanBackend
from edgepass.lowering.vulkan_legality import (
    EMBEDDING_OF_FLOATS,
    GELU,
    LINEAR_OF_FLOATS,
    SPLIT,
    SQUEEZE,
    accepted,
)
from edgepass.lowering.vulkan_operators import has_operator
from edgepass.lowering.vulkan_plain import is_outside

_edge = exir_ops.edge
_POSITION = _edge.et_vk.select_as_symint.default
# Stock applies the float dtypes of these to every argument, and so refuses packed weights.
_ACCEPTED = frozenset(
    {
        _POSITION,
        _edge.et_vk.linear_q4gsw.default,
        _edge.et_vk.linear_dq8ca_q4gsw.default,
    }
)

_PRODUCTS = (_edge.aten.mm.default, _edge.aten.addmm.default)
_TRANSPOSES = (_edge.aten.permute_copy.default, _edge.aten.t_copy.default)


class EdgepassVulkanPartitioner(Partitioner):
    """Tags nodes for Vulkan; ``whole`` tags every call, which a program must be known to bear."""

    def __init__(self, *, half: bool, whole: bool) -> None:
        super().__init__()
        stock = VulkanPartitioner({"force_fp16": True} if half else {})
        self.compile_specs: list[CompileSpec] = stock.delegation_spec.compile_specs
        self.whole = whole

    def partition(self, exported_program: ExportedProgram) -> PartitionResult:
        """Tag the nodes and the constants that only they use."""
        spec = DelegationSpec(EdgepassVulkanBackend.__name__, self.compile_specs)
        groups = [_calls(exported_program)] if self.whole else _partitions(exported_program)
        return _tag(exported_program, groups, spec)


class RightOnVulkan(VulkanSupportedOperators):
    """Stock's table of supported operators, less what the runtime then computes wrong."""

    def __init__(
        self,
        program: ExportedProgram,
        *,
        symbols: bool,
        partitioner: VulkanPartitioner | None = None,
    ) -> None:
        """``symbols`` allows sizes to be computed inside a delegate of ``program``.

        ``partitioner`` is a stock one whose lists and limits apply too.
        """
        options = {} if partitioner is None else partitioner.options
        small = options.get("small_texture_limits", False)
        texture = SMALL_TEXTURE_LIMITS if small else DEFAULT_TEXTURE_LIMITS
        super().__init__(
            options.get("texture_limits", texture),
            options.get("buffer_limit", DEFAULT_BUFFER_LIMIT),
            require_dynamic_shape=options.get("require_dynamic_shapes", False),
            skip_bool_tensors=options.get("skip_bool_tensors", False),
            operator_blocklist=getattr(partitioner, "operator_blocklist", None),
            operator_allowlist=getattr(partitioner, "operator_allowlist", None),
            nn_module_blocklist=getattr(partitioner, "nn_module_blocklist", None),
            nn_module_allowlist=getattr(partitioner, "nn_module_allowlist", None),
        )
        self.symbols = symbols
        self.constants = _constants(program)

    def is_node_supported(self, submodules: Mapping[str, Any], node: Node) -> bool:
        """Tell whether a delegate may hold ``node``."""
        if node.op != "call_function" or not has_operator(_operator(node)):
            return False
        if is_outside(node) or _is_wrong(node) or self._computes_parameters(node):
            return False
        if _has_symbols(node) and not self.symbols:
            return False
        return node.target in _ACCEPTED or super().is_node_supported(submodules, node)

    def _computes_parameters(self, node: Node) -> bool:
        """Tell whether what the runtime packs at load is computed; stock does not ask."""
        operator, packed = _packed(node)
        names = [each.name for each in packed if isinstance(each, Node)]
        kinds = ["constant" if name in self.constants else "computed" for name in names]
        return not all(accepted(operator, "parameters").holds(kind) for kind in kinds)


def _packed(node: Node) -> tuple[str, list[Any]]:
    """The operator that the runtime will see in a call, and what it packs at load."""
    if node.target == _edge.aten.embedding.default:
        return EMBEDDING_OF_FLOATS, [node.args[0]]
    if node.target == _edge.aten.linear.default:
        return LINEAR_OF_FLOATS, list(node.args[1:])
    if node.target in _PRODUCTS and node.args[-1].target in _TRANSPOSES:
        # Stock makes a linear of it when it writes the delegate.
        return LINEAR_OF_FLOATS, [node.args[-1].args[0], *node.args[:-2]]
    return LINEAR_OF_FLOATS, []


def _constants(program: ExportedProgram) -> frozenset[str]:
    """The names of the inputs of a graph whose content never changes."""
    signature = program.graph_signature
    mutated = set(signature.buffers_to_mutate.values())
    buffers = {name for name, to in signature.inputs_to_buffers.items() if to not in mutated}
    others = (*signature.inputs_to_parameters, *signature.inputs_to_lifted_tensor_constants)
    return frozenset(buffers.union(others))


def _operator(node: Node) -> str:
    """The name of what a call computes, looking into operators that were made functional."""
    name = node.target.__name__
    return node.args[0].__name__ if name.startswith("auto_functionalized") else name


def tag_right_nodes(program: ExportedProgram, partitioner: VulkanPartitioner) -> PartitionResult:
    """Tag, for stock's backend, what the limits and a stock ``partitioner``'s options allow."""
    return _tag(program, _partitions(program, partitioner), partitioner.delegation_spec)


def _tag(
    program: ExportedProgram, groups: list[list[Node]], spec: DelegationSpec
) -> PartitionResult:
    tags: dict[str, DelegationSpec] = {}
    for number, nodes in enumerate(groups):
        for node in nodes:
            node.meta["delegation_tag"] = f"vulkan_{number}"
        tags[f"vulkan_{number}"] = spec
    tag_constant_data(program)
    tag_mutated_buffer(program)
    return PartitionResult(tagged_exported_program=program, partition_tags=tags)


def _calls(program: ExportedProgram) -> list[Node]:
    return [node for node in program.graph.nodes if node.op == "call_function"]


def _partitions(
    program: ExportedProgram, stock: VulkanPartitioner | None = None
) -> list[list[Node]]:
    groups = _propose(program, RightOnVulkan(program, symbols=True, partitioner=stock))
    if not any(map(_leaks_symbol, groups)):
        return groups
    # Between delegates a SymInt is serialised as null, without a word.
    return _propose(program, RightOnVulkan(program, symbols=False, partitioner=stock))


def _propose(program: ExportedProgram, right: RightOnVulkan) -> list[list[Node]]:
    partitions = CapabilityBasedPartitioner(
        program.graph_module, right, allows_single_node_partition=True
    ).propose_partitions()
    return [list(partition.nodes) for partition in partitions]


def _leaks_symbol(group: list[Node]) -> bool:
    """Tell whether a SymInt enters or leaves a group of nodes."""
    inside = set(group)
    entering = [source for node in group for source in node.all_input_nodes]
    leaving = [node for node in group if not set(node.users) <= inside]
    crossing = (set(entering) - inside) | set(leaving)
    return any(map(_is_symbol, crossing))


def _has_symbols(node: Node) -> bool:
    sources = [node, *node.all_input_nodes]
    return any(_is_symbol(source) and source.target != _POSITION for source in sources)


def _is_symbol(node: Node) -> bool:
    return isinstance(node.meta.get("val"), torch.SymInt)


def _is_wrong(node: Node) -> bool:
    """Tell whether the runtime computes a call wrong that stock's table takes."""
    value = node.args[0].meta.get("val") if node.args and isinstance(node.args[0], Node) else None
    if node.target == _edge.aten.gelu.default:
        form = node.kwargs.get("approximate", "none")
        return not accepted(GELU, "approximate").holds(form)
    if node.target == _edge.aten.squeeze_copy.dims:
        if value is None:
            return True
        dimensions = [dim % value.dim() for dim in node.args[1]]
        return not all(map(accepted(SQUEEZE, "dimension").holds, dimensions))
    if node.target == _edge.aten.split_with_sizes_copy.default and isinstance(value, Tensor):
        dynamic = sum(not isinstance(size, int) for size in value.shape)
        return not accepted(SPLIT, "dynamic sizes").holds(dynamic)
    return False
