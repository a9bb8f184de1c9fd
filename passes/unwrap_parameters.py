"""Makes the inner tensors of quantized parameters (tensor subclasses) constants of their own."""

from typing import Any

import torch
from torch.fx import Node

from edgepass.passes.program import INNER_TENSOR, WorkingProgram
from edgepass.passes.rewriter import RefusedMatch, Replacement, RewriteLog, RuleCount
from edgepass.passes.rule import Refusal
from edgepass.passes.targets import is_call, render_value

_NAME = "unwrap-parameter"


def unwrap_parameters(program: WorkingProgram, log: RewriteLog) -> None:
    """Replace each access to a component by a constant that shares its memory.

    A loop, no rule: there are three accesses a linear, more than calls that any rule rewrites,
    and nothing about them is to be matched.
    """
    count = log.counts[_NAME] = RuleCount()
    for node in [each for each in program.graph.nodes if is_call(each, INNER_TENSOR)]:
        count.tried += 1
        tensor = program.constant(node)
        refusal = _check(node, tensor)
        if refusal is not None:
            count.refused += 1
            log.refusals.append(RefusedMatch(_NAME, node, refusal))
            continue
        count.applied += 1
        _replace(node, tensor, program, log)


def _check(node: Node, tensor: torch.Tensor | None) -> Refusal | None:
    if tensor is None:
        return Refusal(f"{render_value(node.args[0])} is no parameter", node)
    if type(tensor) is not torch.Tensor and type(tensor) is not torch.nn.Parameter:
        return Refusal(f"the component is itself a {type(tensor).__name__}", node)
    return None


def _replace(node: Node, tensor: Any, program: WorkingProgram, log: RewriteLog) -> None:
    name = program.qualified_name(node)
    assert name is not None, "established by _check"
    constant = program.derive_constant(node.args, name, lambda: tensor, like=node)
    node.replace_all_uses_with(constant)
    log.replacements.append(Replacement(node.name, constant, _NAME))
    program.graph.erase_node(node)
