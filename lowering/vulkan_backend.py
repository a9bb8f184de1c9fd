"""Writing a Vulkan delegate without tracing its graph 16 times.

Stock ``VulkanBackend.preprocess`` runs about 20 passes to fuse patterns and fold quantization, each
of which traces the whole graph anew. A graph that holds the runtime's operators already needs only
the last ones: specs, prepacking, memory layouts, memory planning, serialization. Those are used
here as stock has them, and the bytes are the same (``tests/lowering/test_vulkan_backend.py``). Any
other graph is given to stock.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from functools import cached_property, partial
from typing import Any, final

import torch
from executorch.backends.vulkan._passes import TagMemoryMetaPass, insert_prepack_nodes
from executorch.backends.vulkan.serialization.vulkan_graph_builder import VkGraphBuilder
from executorch.backends.vulkan.serialization.vulkan_graph_serialize import serialize_vulkan_graph
from executorch.backends.vulkan.utils import DEFAULT_TEXTURE_LIMITS
from executorch.backends.vulkan.vulkan_preprocess import VulkanBackend, parse_compile_spec
from executorch.exir.backend.backend_details import BackendDetails, PreprocessResult
from executorch.exir.backend.compile_spec_schema import CompileSpec
from executorch.exir.backend.utils import DelegateMappingBuilder
from executorch.exir.dialects._ops import ops as exir_ops
from executorch.exir.memory_planning import MemoryPlanningAlgorithmSuite, greedy
from executorch.exir.passes import MemoryPlanningPass, SpecPropPass
from executorch.exir.passes.spec_prop_pass import make_spec
from executorch.exir.sym_util import eval_upper_bound
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram
from torch.export._remove_auto_functionalized_pass import unsafe_remove_auto_functionalized_pass
from torch.export.graph_signature import ExportGraphSignature
from torch.fx import Graph, GraphModule, Node
from torch.utils import _pytree as pytree

from edgepass.lowering import vulkan_kernels  # noqa: F401  (defines the runtime's operators)

_edge = exir_ops.edge
# Operators that stock's fusing passes leave as they are.
_FINAL = frozenset(
    {
        operator.getitem,
        torch.ops.aten.sym_size.int,
        torch.ops.llama.sdpa_with_kv_cache.default,
        _edge.llama.sdpa_with_kv_cache.default,
        _edge.torchao.choose_qparams_affine.default,
        _edge.et_vk.select_as_symint.default,
        _edge.et_vk.embedding_q4gsw.default,
        _edge.et_vk.linear_q4gsw.default,
        _edge.et_vk.linear_dq8ca_q4gsw.default,
        _edge.et_vk.rms_norm.default,
        _edge.et_vk.apply_rotary_emb_hf.default,
        _edge.aten.view_copy.default,
        _edge.aten.unsqueeze_copy.default,
        _edge.aten.permute_copy.default,
        _edge.aten.slice_copy.Tensor,
        _edge.aten.select_copy.int,
        _edge.aten.cat.default,
        _edge.aten.constant_pad_nd.default,
        _edge.aten.embedding.default,
        _edge.aten.linear.default,
        _edge.aten.sigmoid.default,
        _edge.aten.tanh.default,
        _edge.aten.relu.default,
        _edge.aten.gelu.default,
        _edge.aten.neg.default,
        _edge.aten.add.Tensor,
        _edge.aten.sub.Tensor,
        _edge.aten.mul.Tensor,
        _edge.aten.div.Tensor,
    }
)


@final
class EdgepassVulkanBackend(BackendDetails):
    """Prepares delegates for the stock runtime's ``VulkanBackend``; only known while lowering."""

    @classmethod
    def copy_exported_program_for_preprocess(
        cls, edge_program: ExportedProgram, compile_specs: list[CompileSpec]
    ) -> ExportedProgram:
        """Return a program with its own graph; the weights are read only, and not copied."""
        graph = Graph()
        copies: dict[Node, Node] = {}
        result = graph.graph_copy(edge_program.graph, copies)
        graph.output(result).meta.update(edge_program.graph.output_node().meta)
        for source, node in copies.items():
            node.name = source.name  # FX would rename an input called `input`; the signature not
        module = GraphModule(edge_program.graph_module, graph)
        return ExportedProgram(
            root=module,
            graph=graph,
            graph_signature=_indexed(edge_program),
            state_dict={k: _alone(v) for k, v in edge_program.state_dict.items()},
            range_constraints=edge_program.range_constraints,
            module_call_graph=edge_program.module_call_graph,
            constants={k: _alone(v) for k, v in edge_program.constants.items()},
            verifiers=edge_program.verifiers,
        )

    @classmethod
    def preprocess(
        cls, edge_program: ExportedProgram, compile_specs: list[CompileSpec]
    ) -> PreprocessResult:
        """Serialize one delegate. The graph of ``edge_program`` is used up."""
        edge_program = unsafe_remove_auto_functionalized_pass(edge_program)
        _use_runtime_names(edge_program.graph)
        if not is_final(edge_program):
            return VulkanBackend.preprocess(edge_program, compile_specs)
        options = parse_compile_spec(compile_specs)
        half = options.get("force_fp16", False)
        _use_upper_bounds(edge_program.graph)
        _set_specs(edge_program)
        insert_prepack_nodes(edge_program)
        module = edge_program.graph_module
        TagMemoryMetaPass(DEFAULT_TEXTURE_LIMITS, force_fp16=half).call(module)
        _plan_memory(module)
        builder = VkGraphBuilder(
            edge_program, DelegateMappingBuilder(generated_identifiers=True), force_fp16=half
        )
        graph = builder.build_graph()
        return PreprocessResult(
            processed_bytes=serialize_vulkan_graph(graph, builder.const_tensors, []),
            debug_handle_map=builder.delegate_mapping_builder.get_delegate_mapping(),
            data_store_output=builder.named_data_store.get_named_data_store_output(),
        )


def is_final(program: ExportedProgram) -> bool:
    """Tell whether a delegate's graph holds only operators that stock would not change."""
    return all(node.target in _FINAL for node in program.graph.nodes if node.op == "call_function")


class _IndexedSignature(ExportGraphSignature):
    """A signature that does not change any more, so that its tables are made once.

    Stock makes them anew for each question, one or more a node: that grows with the square of the
    layers (2 of 10 s at 30).
    """

    @cached_property
    def inputs_to_parameters(self) -> Mapping[str, str]:
        return super().inputs_to_parameters

    @cached_property
    def inputs_to_buffers(self) -> Mapping[str, str]:
        return super().inputs_to_buffers

    @cached_property
    def inputs_to_lifted_tensor_constants(self) -> Mapping[str, str]:
        return super().inputs_to_lifted_tensor_constants

    @cached_property
    def buffers_to_mutate(self) -> Mapping[str, str]:
        return super().buffers_to_mutate


def _indexed(program: ExportedProgram) -> ExportGraphSignature:
    signature = program.graph_signature
    if not is_final(program):
        return signature
    return _IndexedSignature(signature.input_specs, signature.output_specs)


def _alone(value: Any) -> Any:
    """Return a tensor that owns all of its storage: the stock writer writes the whole of it."""
    if not isinstance(value, Tensor) or value.untyped_storage().nbytes() == value.nbytes:
        return value
    copy = value.detach().clone(memory_format=torch.contiguous_format)
    return nn.Parameter(copy, requires_grad=False) if isinstance(value, nn.Parameter) else copy


def _use_runtime_names(graph: Graph) -> None:
    # Operators are serialised by the name of their target. This one is registered in the runtime
    # without its namespace, which only the edge dialect's wrapper shows.
    attention = torch.ops.llama.sdpa_with_kv_cache.default
    for node in graph.find_nodes(op="call_function", target=_edge.llama.sdpa_with_kv_cache.default):
        node.target = attention


def _use_upper_bounds(graph: Graph) -> None:
    """Give each value the largest sizes that it can have, which are what the delegate allocates.

    Layouts are chosen by these sizes. Stock chooses by the example's: with a context of 4,096 and
    7 example tokens it would put 4,095 x 9 x 64 into an image of at most 2,048 slices.
    """
    mode, bounds = FakeTensorMode(), {}

    def at_most(size: Any) -> int:
        key = str(size)
        if key not in bounds:
            bounds[key] = size if isinstance(size, int) else eval_upper_bound(size)
        return bounds[key]

    def largest(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        with mode:
            return torch.empty([at_most(size) for size in value.shape], dtype=value.dtype)

    for node in graph.nodes:
        if "val" in node.meta:
            node.meta["val"] = pytree.tree_map(largest, node.meta["val"])


def _set_specs(program: ExportedProgram) -> None:
    """Give each node the ``TensorSpec`` of its value, as ``SpecPropPass`` does after tracing."""
    module = program.graph_module
    for node in module.graph.nodes:
        if node.op == "output":
            node.meta["spec"] = pytree.tree_map(_spec_of, node.args[0])
        elif node.target is operator.getitem:
            node.meta["spec"] = node.args[0].meta["spec"][node.args[1]]
        else:
            node.meta["spec"] = pytree.tree_map(make_spec, node.meta.get("val"))
    SpecPropPass().update_placeholder_tensor_specs(program, module)


def _spec_of(node: Any) -> Any:
    return node.meta.get("spec") if isinstance(node, Node) else None


def _plan_memory(module: GraphModule) -> None:
    # Without out-variants the planner would refuse the graph; stock sets the same flag.
    module.encounter_to_out_var_failure = True
    algorithm = partial(greedy, allow_overlapping_allocations=False)
    suite = MemoryPlanningAlgorithmSuite(algo_list=[algorithm])
    MemoryPlanningPass(memory_planning_algo=suite).run(module)
