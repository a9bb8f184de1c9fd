"""What a stock ``XnnpackPartitioner`` does while edgepass is registered."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir.backend.partitioner import PartitionResult
from executorch.exir.backend.utils import tag_constant_data
from torch.export import ExportedProgram
from torch.fx import Node

from edgepass.lowering.partitioner_hooks import Hook, fuse_or_leave, tags_are_acyclic
from edgepass.lowering.xnnpack import prepare_for_xnnpack
from edgepass.lowering.xnnpack_partition import FusedXnnpackPartitioner
from edgepass.lowering.xnnpack_support import FUSED
from edgepass.passes.targets import operator_name


def xnnpack_hooks() -> list[Hook]:
    """Return the hooks: fuse before decomposing, delegate what was fused."""
    return [
        Hook(XnnpackPartitioner, "transform_for_pre_decomposition", _fuse),
        Hook(XnnpackPartitioner, "partition", _partition),
    ]


def _fuse(stock: Callable[..., Any], partitioner: Any, program: ExportedProgram) -> ExportedProgram:
    return fuse(stock(partitioner, program))


def fuse(program: ExportedProgram) -> ExportedProgram:
    """Return the program fused and prepared for XNNPACK, or the given one: see fuse_or_leave."""
    return fuse_or_leave(program, "XNNPACK", lambda it: prepare_for_xnnpack(it)[0], _has_fused)


def _partition(
    stock: Callable[..., Any], partitioner: Any, program: ExportedProgram
) -> PartitionResult:
    """Stock's partitions, and over them edgepass's delegates of fused operators."""
    if not _has_fused(program):
        return stock(partitioner, program)
    tags = dict(stock(partitioner, program).partition_tags)
    _untag(program, lambda node: node.op == "placeholder")
    ours = FusedXnnpackPartitioner().partition(program).partition_tags
    if not tags_are_acyclic(program):
        # Two ways of grouping may wait for each other: then stock's nodes run outside.
        _untag(program, lambda node: node.meta["delegation_tag"] in tags)
    tag_constant_data(program)
    used = {node.meta.get("delegation_tag") for node in program.graph.nodes}
    tags = {tag: spec for tag, spec in {**tags, **ours}.items() if tag in used}
    return PartitionResult(tagged_exported_program=program, partition_tags=tags)


def _untag(program: ExportedProgram, which: Callable[[Node], bool]) -> None:
    for node in program.graph.nodes:
        if "delegation_tag" in node.meta and which(node):
            del node.meta["delegation_tag"]


def _has_fused(program: ExportedProgram) -> bool:
    return any(
        node.op == "call_function" and _name(node.target) in FUSED for node in program.graph.nodes
    )


def _name(target: Any) -> str:
    overload = getattr(target, "_overloadname", "") or "default"
    return f"{operator_name(target)}.{overload}"
