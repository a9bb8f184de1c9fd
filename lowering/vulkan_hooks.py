"""What a stock ``VulkanPartitioner`` does while edgepass is registered."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from executorch.backends.vulkan.partitioner.vulkan_partitioner import VulkanPartitioner
from executorch.exir.backend.partitioner import PartitionResult
from torch.export import ExportedProgram

from edgepass.lowering.partitioner_hooks import Hook
from edgepass.lowering.shape_symbols import settle_symbols
from edgepass.lowering.vulkan_partition import tag_right_nodes
from edgepass.lowering.vulkan_rewrite import rewrite_for_vulkan
from edgepass.ops.errors import EdgepassError
from edgepass.passes.pipelines import fusion_pipeline
from edgepass.passes.program import WorkingProgram
from edgepass.passes.targets import operator_name

_LOG = logging.getLogger(__name__)


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

    The given one, untouched, if nothing in it is fused; with a warning if something is refused.
    """
    working = WorkingProgram(program)
    try:
        with settle_symbols(program):
            fusion_pipeline().apply(working)
            fused = rewrite_for_vulkan(working.to_exported(), merge=True, half=half).program
    except EdgepassError as error:
        _LOG.warning("edgepass leaves a program to stock Vulkan: %s", error)
        return program
    return fused if _has_fused(fused) else program


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
