"""What the tests of passes share: programs from functions, one pass over one, counts, agreement."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.fx import Node

import edgepass.ops  # noqa: F401  registers the operators
from edgepass.passes.graph_pass import GraphPass
from edgepass.passes.matching import Match, NearMiss
from edgepass.passes.pipeline import Pipeline
from edgepass.passes.program import WorkingProgram
from edgepass.passes.rewriter import RewriteLog
from edgepass.passes.rule import CompiledRule, RewriteRule
from edgepass.passes.targets import is_call


class Function(nn.Module):
    """A function as a module; tensors given by name become its buffers."""

    def __init__(self, function: Callable[..., Any], **buffers: torch.Tensor) -> None:
        super().__init__()
        self.function, self.names = function, tuple(buffers)
        for name, tensor in buffers.items():
            self.register_buffer(name, tensor)

    def forward(self, *inputs: Any) -> Any:
        return self.function(*inputs, **{name: getattr(self, name) for name in self.names})


def export(
    function: Callable[..., Any] | nn.Module,
    inputs: tuple[Any, ...],
    dynamic_shapes: Any = None,
    **buffers: torch.Tensor,
) -> ExportedProgram:
    module = function if isinstance(function, nn.Module) else Function(function, **buffers)
    if dynamic_shapes is not None and not isinstance(function, nn.Module):
        dynamic_shapes = (dynamic_shapes,)  # forward takes them as one *inputs
    with torch.no_grad():
        return torch.export.export(module, inputs, dynamic_shapes=dynamic_shapes, strict=False)


def run_passes(
    passes: Sequence[GraphPass], exported: ExportedProgram, inputs: tuple[Any, ...]
) -> tuple[WorkingProgram, RewriteLog]:
    """Run the passes, verified; return the program and the log of the last pass."""
    program = WorkingProgram(exported)
    report = Pipeline(passes).apply(program, verify=True, sample_inputs=inputs)
    program.graph.lint()
    return program, report.passes[-1].log


def find(program: WorkingProgram | ExportedProgram, *names: str) -> list[Node]:
    return [node for node in program.graph.nodes if is_call(node, *names)]


def count(program: WorkingProgram | ExportedProgram, *names: str) -> int:
    return len(find(program, *names))


def match_at(rule: RewriteRule, exported: ExportedProgram, *names: str) -> Match | NearMiss:
    """Try a rule at the last call of one of ``names``."""
    program = WorkingProgram(exported)
    return CompiledRule(rule).match(find(program, *names)[-1], program)


def reasons(log: RewriteLog, rule: str) -> list[str]:
    return [each.reason for each in log.refusals if each.rule == rule]


def sqnr_db(reference: torch.Tensor, value: torch.Tensor) -> float:
    """Signal to noise in dB, over all elements, in float64."""
    noise = (reference.double() - value.double()).square().sum().item()
    signal = reference.double().square().sum().item()
    return math.inf if noise == 0 else 10 * math.log10(signal / noise)
