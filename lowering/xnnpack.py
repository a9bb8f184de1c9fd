"""Lowering to XNNPACK: the fused graph's linears, norms, rotary and attention inside delegates."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from executorch.exir import (
    EdgeCompileConfig,
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
from edgepass.lowering.stages import Stages
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
    stages = stages or Stages()
    with stages.stage("prepare"):
        working = WorkingProgram(program)
        declined = prepare_linears(working)
        prepare(working, cache_dtype=cache_dtype)
        prepared = working.to_exported()
    with stages.stage("delegate"), _without_known_warnings():
        edge: EdgeProgramManager = to_edge_transform_and_lower(
            prepared,
            partitioner=[FusedXnnpackPartitioner()],
            compile_config=EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True),
        )
    with stages.stage("emit"), _without_known_warnings():
        finished = edge.to_executorch(ExecutorchBackendConfig(extract_delegate_segments=True))
    return finished, declined


@contextmanager
def _without_known_warnings() -> Iterator[None]:
    """Torch deprecates the checks that ExecuTorch's cache operators make at each trace."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", category=FutureWarning)
        warnings.simplefilter("ignore", category=UserWarning)
        yield
