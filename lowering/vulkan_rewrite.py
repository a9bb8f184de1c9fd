"""From edgepass's operators to the Vulkan runtime's, on the raw graph of ``torch.export``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.export import ExportedProgram
from torch.fx import Node

from edgepass.lowering.vulkan_attention import AttentionLowering
from edgepass.lowering.vulkan_bfloat16 import widen_bfloat16
from edgepass.lowering.vulkan_declined import Declined, Fused, Refused
from edgepass.lowering.vulkan_edge import has_direct_form
from edgepass.lowering.vulkan_graph import GraphEditor
from edgepass.lowering.vulkan_legality import NORM, require
from edgepass.lowering.vulkan_linear import LinearLowering
from edgepass.lowering.vulkan_plain import rewrite_plainly
from edgepass.lowering.vulkan_shapes import settle_shapes
from edgepass.lowering.vulkan_unfused import rewrite_unfused
from edgepass.passes.program import WorkingProgram
from edgepass.passes.targets import argument, is_call


@dataclass(frozen=True)
class Rewritten:
    """A program in the runtime's operators, and what became of edgepass's.

    ``whole`` tells that one delegate can take all of it, without stock's passes.
    """

    program: ExportedProgram
    whole: bool
    fused: tuple[Fused, ...]
    declined: tuple[Declined, ...]


def rewrite_for_vulkan(program: ExportedProgram, *, merge: bool, half: bool) -> Rewritten:
    """Return a copy of ``program`` whose edgepass operators are all replaced.

    What the runtime computes right becomes an ``et_vk`` or ``llama`` operator; the rest becomes
    plain aten, marked to stay outside, and is listed with its reason.
    """
    editor = GraphEditor(WorkingProgram(program))
    widen_bfloat16(editor)
    rewrite_unfused(editor)
    attention = AttentionLowering(editor)
    attention.run()
    linears = LinearLowering(editor, merge=merge, half=half)
    linears.run()
    norms = _rewrite_norms(editor)
    editor.graph.eliminate_dead_code()
    rewrite_plainly(editor)
    settle_shapes(editor)
    editor.graph.eliminate_dead_code()
    whole = has_direct_form(editor.program)
    if not whole:
        _separate_positions(editor)
    declined = (*attention.declined, *linears.declined, *norms)
    return Rewritten(editor.build(), whole, tuple(linears.fused), declined)


def _rewrite_norms(editor: GraphEditor) -> list[Declined]:
    declined = []
    for node in list(editor.graph.nodes):
        if not is_call(node, "edgepass.rms_norm"):
            continue
        x, weight, eps = (argument(node, name) for name in ("x", "weight", "eps"))
        try:
            _check_norm(editor, x, weight)
        except Refused as refused:
            declined.append(Declined.of(node, refused, editor.constant_name(weight)))
            continue
        with editor.graph.inserting_before(node):
            norm = editor.call(
                *(torch.ops.et_vk.rms_norm.default, x, weight, eps),
                like=node,
                val=node.meta["val"],
            )
        node.replace_all_uses_with(norm)
        editor.graph.erase_node(node)
    return declined


def _check_norm(editor: GraphEditor, x: Node, weight: Node) -> None:
    constant = editor.constant(weight) is not None
    require(NORM, {"weight": "constant" if constant else "computed", "rank": x.meta["val"].dim()})


def _separate_positions(editor: GraphEditor) -> None:
    """Let each reader take the position from the input tensor itself.

    Between two delegates a SymInt is serialised as null, so each must read its own.
    """
    target = torch.ops.et_vk.select_as_symint.default
    for position in editor.graph.find_nodes(op="call_function", target=target):
        for reader in list(position.users)[1:]:
            with editor.graph.inserting_before(reader):
                own = editor.call(target, *position.args, like=position)
            reader.replace_input_with(position, own)
