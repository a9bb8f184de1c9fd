"""Lowering to XNNPACK: the fused graph's linears, norms, rotary and attention inside delegates."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from executorch.exir import (
    EdgeProgramManager,
    ExecutorchBackendConfig,
    ExecutorchProgramManager,
    to_edge_transform_and_lower,
)

# These two register the operators that stay outside the delegates.
import executorch.exir.passes._quant_patterns_and_replacements  # noqa: F401  isort: skip
from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401
from torch.export import ExportedProgram

import edgepass.lowering.xnnpack_visitors  # noqa: F401  (registers the visitors)
from edgepass.lowering.edge_forms import edge_config
from edgepass.lowering.shape_symbols import settle_symbols
from edgepass.lowering.shapes_only import replace_delegates, with_shapes_only
from edgepass.lowering.stages import Stages
from edgepass.lowering.xnnpack_edge import has_direct_form, to_edge_directly
from edgepass.lowering.xnnpack_linear import Declined, prepare_linears
from edgepass.lowering.xnnpack_partition import FusedXnnpackPartitioner
from edgepass.lowering.xnnpack_prepare import prepare
from edgepass.passes.program import WorkingProgram


def lower_xnnpack(
    program: ExportedProgram,
    *,
    cache_dtype: torch.dtype = torch.float16,
    stages: Stages | None = None,
) -> tuple[ExecutorchProgramManager, list[Declined]]:
    """Lower a fused program (training IR with ``edgepass::`` operators) for XNNPACK.

    Returns the finished program and the linears that run in float32 outside int4 kernels, each
    with its reason. ``cache_dtype`` is what a KV cache stores: float16 or float32.
    Raises ProgramError if the program's attention is over more than one sequence.
    """
    with settle_symbols(program):
        return _lower(program, cache_dtype, stages or Stages())


def _lower(
    program: ExportedProgram, cache_dtype: torch.dtype, stages: Stages
) -> tuple[ExecutorchProgramManager, list[Declined]]:
    with stages.stage("prepare"):
        prepared, declined = prepare_for_xnnpack(program, cache_dtype)
    with stages.stage("delegate"), _without_known_warnings():
        edge = _delegate(prepared)
    with stages.stage("emit"), _without_known_warnings():
        finished = edge.to_executorch(ExecutorchBackendConfig(extract_delegate_segments=True))
    return finished, declined


def prepare_for_xnnpack(
    program: ExportedProgram, cache_dtype: torch.dtype = torch.float16
) -> tuple[ExportedProgram, list[Declined]]:
    """Return a fused program in the form that is delegated, and the linears that run in float32.

    Arguments and errors are those of :func:`lower_xnnpack`.
    """
    working = WorkingProgram(program)
    declined = prepare_linears(working)
    prepare(working, cache_dtype=cache_dtype)
    return working.to_exported(), declined


def _delegate(prepared: ExportedProgram) -> EdgeProgramManager:
    if has_direct_form(prepared):
        edge = EdgeProgramManager(to_edge_directly(prepared), compile_config=edge_config())
        edge = edge.to_backend(FusedXnnpackPartitioner())
        replace_delegates(edge, lambda each: with_shapes_only(each, each.backend_id))
        return edge
    return to_edge_transform_and_lower(
        prepared, partitioner=[FusedXnnpackPartitioner()], compile_config=edge_config()
    )


@contextmanager
def _without_known_warnings() -> Iterator[None]:
    """Torch deprecates the checks that ExecuTorch's cache operators make at each trace."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", category=FutureWarning)
        warnings.simplefilter("ignore", category=UserWarning)
        yield
