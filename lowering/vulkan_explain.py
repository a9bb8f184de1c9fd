"""What the Vulkan lowering will make of each linear: its operator and form, or why it declines."""

from __future__ import annotations

from torch.fx import Node

from edgepass.lowering.vulkan_bfloat16 import widen_bfloat16
from edgepass.lowering.vulkan_declined import Refused
from edgepass.lowering.vulkan_graph import GraphEditor
from edgepass.lowering.vulkan_legal import plan_linear
from edgepass.lowering.vulkan_legal_activation import must_flatten
from edgepass.lowering.vulkan_legal_groups import GroupPlan
from edgepass.lowering.vulkan_legality import DYNAMIC, WEIGHT_ONLY
from edgepass.lowering.vulkan_operands import Operands
from edgepass.passes.program import WorkingProgram


def tell_linears(program: WorkingProgram, nodes: list[Node]) -> list[tuple[str | None, str | None]]:
    """Return for each fused linear how it is computed and None, or None and why it stays outside.

    Values in bfloat16 become float32 in ``program``, as they do in lowering.
    """
    editor = GraphEditor(program)
    widen_bfloat16(editor)
    return [_tell(editor, node) for node in nodes]


def _tell(editor: GraphEditor, node: Node) -> tuple[str | None, str | None]:
    try:
        return _form(*plan_linear(editor, node)), None
    except Refused as refused:
        return None, str(refused)


def _form(linear: Operands, plan: GroupPlan) -> str:
    parts = [DYNAMIC if linear.quantizes else WEIGHT_ONLY]
    if plan.pads:
        parts.append(f"groups of {plan.size} padded to {plan.padded}")
    if plan.legal != plan.padded:
        parts.append(f"groups of {plan.padded} as groups of {plan.legal}")
    if linear.n % 8:
        parts.append(f"{linear.n} outputs padded to {linear.n + -linear.n % 8}")
    if must_flatten(linear.x, plan):
        parts.append("rows flattened")
    if linear.zeros is not None:
        parts.append("zero points as a correction by group sums")
    return ", ".join(parts)
