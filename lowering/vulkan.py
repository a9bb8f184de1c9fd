"""Lowering to the Vulkan runtime: from edgepass's operators to the bytes of a ``.pte``.

The program's fused operators become those of the stock runtime (``et_vk.linear_dq8ca_q4gsw``,
``et_vk.rms_norm``, ``et_vk.apply_rotary_emb_hf``, ``llama.sdpa_with_kv_cache``). A decoder whose
operators are all taken is one delegate and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from executorch.exir import (
    EdgeProgramManager,
    ExecutorchBackendConfig,
    ExecutorchProgramManager,
    to_edge,
)
from torch.export import ExportedProgram

from edgepass.lowering.edge_forms import edge_config
from edgepass.lowering.stages import Stages
from edgepass.lowering.vulkan_declined import Declined, Fused
from edgepass.lowering.vulkan_edge import to_edge_directly
from edgepass.lowering.vulkan_lowered import name_for_runtime
from edgepass.lowering.vulkan_partition import EdgepassVulkanPartitioner
from edgepass.lowering.vulkan_rewrite import Rewritten, rewrite_for_vulkan
from edgepass.ops.errors import InvalidArgumentError

DTYPES = ("fp32", "fp16")
# One operator inside a delegate. Outside, the portable kernels only have what it decomposes to.
_LINEAR = torch.ops.aten.linear.default


@dataclass(frozen=True)
class VulkanFacts:
    """What became of a program's operators.

    ``fused`` are the linears and embeddings that became operators of the runtime, ``declined`` all
    operators of edgepass that stay outside the delegates, each with its reason.
    """

    fused: tuple[Fused, ...]
    declined: tuple[Declined, ...]


@dataclass(frozen=True)
class VulkanProgram:
    """A program lowered for Vulkan; ``buffer`` are the bytes of the ``.pte`` file."""

    manager: ExecutorchProgramManager
    facts: VulkanFacts

    @property
    def buffer(self) -> bytes:
        """The bytes of the ``.pte`` file."""
        return bytes(self.manager.buffer)


def lower_vulkan(
    program: ExportedProgram,
    *,
    dtype: str = "fp32",
    merge_linears: bool = True,
    stages: Stages | None = None,
    config: ExecutorchBackendConfig | None = None,
) -> VulkanProgram:
    """Lower a program that holds edgepass's operators to a ``.pte`` for the Vulkan runtime.

    Args:
        program: as ``torch.export.export`` gives it and the passes fuse it; it is not changed.
        dtype: what the delegates compute in, "fp32" or "fp16". Inputs and outputs keep their
            dtypes; caches and constants follow ``dtype``.
        merge_linears: compute linears of one activation (Q, K and V; gate and up) as one.
        stages: where the stages ("rewrite", "edge", "delegate", "emit") are timed.
        config: of ``to_executorch``.

    Raises:
        InvalidArgumentError: another ``dtype``.
        ProgramError: ``program`` is no exported program, or was lowered already.
    """
    if dtype not in DTYPES:
        raise InvalidArgumentError(f"unknown dtype: got dtype={dtype!r}, accepted are fp32 or fp16")
    stages, half = stages or Stages(), dtype == "fp16"
    with stages.stage("rewrite"):
        rewritten = rewrite_for_vulkan(program, merge=merge_linears, half=half)
    edge = _delegated(rewritten, half, stages, keep=(_LINEAR,))
    if _calls_outside(edge, _LINEAR):
        edge = _delegated(rewritten, half, stages, keep=())
    with stages.stage("emit"):
        manager = edge.to_executorch(config or ExecutorchBackendConfig())
    return VulkanProgram(manager, VulkanFacts(rewritten.fused, rewritten.declined))


def _delegated(
    rewritten: Rewritten, half: bool, stages: Stages, keep: tuple[Any, ...]
) -> EdgeProgramManager:
    """In the edge dialect, with its delegates; operators of ``keep`` are not decomposed."""
    with stages.stage("edge"):
        edge = _to_edge(rewritten, keep)
    with stages.stage("delegate"):
        edge = edge.to_backend(EdgepassVulkanPartitioner(half=half, whole=rewritten.whole))
        name_for_runtime(edge)
    return edge


def _to_edge(rewritten: Rewritten, keep: tuple[Any, ...]) -> EdgeProgramManager:
    if rewritten.whole:
        return EdgeProgramManager(to_edge_directly(rewritten.program), compile_config=edge_config())
    config = edge_config()
    config.preserve_ops = list(keep)
    return to_edge(rewritten.program, compile_config=config)


def _calls_outside(edge: EdgeProgramManager, operator: Any) -> bool:
    """Tell whether a call of ``operator`` was left outside the delegates."""
    graph = edge.exported_program().graph
    return any(getattr(node.target, "_op", None) is operator for node in graph.nodes)
