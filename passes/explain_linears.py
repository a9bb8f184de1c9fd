"""Say of every linear of a program whether it is fused, or the first reason why not, and where."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch.export import ExportedProgram
from torch.fx import Node

from edgepass.passes.matching import NearMiss
from edgepass.passes.program import WorkingProgram
from edgepass.passes.quantized_linear_rules import DynamicallyQuantizedLinear, WeightOnlyLinear
from edgepass.passes.rule import CompiledRule
from edgepass.passes.targets import is_call

FUSED_LINEARS = (
    "edgepass.linear_qta8a_qga4w",
    "edgepass.linear_qga4w",
    "edgepass.linear_qta8a_qc8w",
)
_LINEARS = ("aten.linear", "aten.addmm")
_PRODUCTS = ("aten.mm", "aten.matmul", "aten.bmm")  # linears if one factor is a constant


@dataclass(frozen=True)
class LinearRow:
    """One linear: the path of its module, whether it is fused, else the reason and the node."""

    name: str
    fused: bool
    reason: str | None = None
    node: str | None = None


def explain_linears(program: WorkingProgram | ExportedProgram) -> list[LinearRow]:
    """Return a row for each linear of a program that ``fuse-quantized-linear`` has been over.

    Products of two computed values, as in attention, are no linears.
    """
    if isinstance(program, ExportedProgram):
        program = WorkingProgram(program)
    rules = [CompiledRule(DynamicallyQuantizedLinear()), CompiledRule(WeightOnlyLinear())]
    rows = []
    for node in program.graph.nodes:
        if is_call(node, *FUSED_LINEARS):
            rows.append(LinearRow(module_path(node), fused=True))
        elif _is_linear(node, program):
            reason, where = _why_not(node, rules, program)
            rows.append(LinearRow(module_path(node), False, reason, where.name))
    return rows


def module_path(node: Node) -> str:
    """Return the path of the innermost module that a node comes from, or the node's name."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [entry[0] for entry in stack.values()]
    return (paths[-1] if paths else "") or node.name


def _why_not(node: Node, rules: list[CompiledRule], program: WorkingProgram) -> tuple[str, Node]:
    """Return the reason of the rule that came nearest: a refusal, else the deepest near miss."""
    misses: list[NearMiss] = []
    for compiled in rules:
        match = compiled.match(node, program)
        if isinstance(match, NearMiss):
            misses.append(match)
            continue
        refusal = compiled.rule.check(match)
        if refusal is not None:
            return refusal.reason, refusal.node
        return "fuse-quantized-linear has not run", node
    # Of two as near as each other tell the last: that the weight is not quantized.
    nearest = max(reversed(misses), key=lambda miss: miss.depth)
    return nearest.reason, nearest.node


def _is_linear(node: Node, program: WorkingProgram) -> bool:
    if not is_call(node, *_PRODUCTS):
        return is_call(node, *_LINEARS)
    return any(_sources_are_constant(each, program) for each in node.all_input_nodes)


def _sources_are_constant(node: Node, program: WorkingProgram) -> bool:
    """Tell whether a value is computed from constants that the program never changes."""
    mutable = program.mutable_constants()
    return all(program.is_constant(each) and each not in mutable for each in _sources(node))


def _sources(node: Node) -> Iterator[Node]:
    pending, seen = [node], {node}
    while pending:
        each = pending.pop()
        inputs = each.all_input_nodes
        if not inputs:
            yield each
        for source in inputs:
            if source not in seen:
                seen.add(source)
                pending.append(source)
