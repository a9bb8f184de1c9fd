"""What a stock ``VulkanPartitioner`` does while edgepass is registered."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from executorch.backends.vulkan.partitioner.vulkan_partitioner import VulkanPartitioner
from executorch.exir.backend.partitioner import PartitionResult
from torch.export import ExportedProgram

from edgepass.lowering.partitioner_hooks import Hook, fuse_or_leave
from edgepass.lowering.vulkan_partition import tag_right_nodes
from edgepass.lowering.vulkan_rewrite import rewrite_for_vulkan
from edgepass.passes.targets import operator_name


def vulkan_hooks() -> list[Hook]:
    """Return the hooks: fuse before decomposing, delegate what the runtime computes right."""
    return [
        Hook(VulkanPartitioner, "transform_for_pre_decomposition", _fuse),
        Hook(VulkanPartitioner, "partition", _partition),
    ]


def _fuse(stock: Callable[..., Any], partitioner: Any, program: ExportedProgram) -> ExportedProgram:
    return fuse(stock(partitioner, program), half=bool(partitioner.options.get("force_fp16")))


def fuse(program: ExportedProgram, *, half: bool) -> ExportedProgram:
    """Return the program in the Vulkan runtime's operators, computed in float16 if ``half``.

    The given one where ``fuse_or_leave`` says so.
    """

    def rewrite(fused: ExportedProgram) -> ExportedProgram:
        return rewrite_for_vulkan(fused, merge=True, half=half).program

    return fuse_or_leave(program, "Vulkan", rewrite, _has_fused)


class FusedVulkanPartitioner(VulkanPartitioner):
    """A stock partitioner that delegates what :func:`fuse` made of a program."""

    def partition(self, exported_program: ExportedProgram) -> PartitionResult:
        return _partition(VulkanPartitioner.partition, self, exported_program)


def _partition(
    stock: Callable[..., Any], partitioner: Any, program: ExportedProgram
) -> PartitionResult:
    if not _has_fused(program):
        return stock(partitioner, program)
    return tag_right_nodes(program, partitioner)


def _has_fused(program: ExportedProgram) -> bool:
    return any(
        node.op == "call_function" and operator_name(node.target).startswith("et_vk.")
        for node in program.graph.nodes
    )
