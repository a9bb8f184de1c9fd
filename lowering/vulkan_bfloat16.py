"""Programs in bfloat16, which the Vulkan runtime does not know, computed in float32.

Constants are cast once, here; inputs and outputs keep their dtype, and are cast outside the
delegates. Every value is then at least as precise as the program asked for: results are those of
the program's float32 twin, not bit for bit those in bfloat16.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.utils import _pytree as pytree

from edgepass.lowering.vulkan_graph import GraphEditor
from edgepass.lowering.vulkan_plain import mark_outside

_NARROW, _WIDE = torch.bfloat16, torch.float32


def widen_bfloat16(editor: GraphEditor) -> None:
    """Give every bfloat16 value between the inputs and the outputs of a graph float32."""
    if not any(_is_narrow(node) for node in editor.graph.nodes):
        return
    inputs = [node for node in editor.program.user_inputs if _is_narrow(node)]
    returned = editor.graph.output_node().args[0]
    outputs = {node for node in returned if isinstance(node, Node) and _is_narrow(node)}
    for node in editor.graph.nodes:
        if node not in inputs:
            _widen(editor, node)
    for node in inputs:
        _cast_input(editor, node)
    for node in outputs - set(inputs):
        _cast_output(editor, node)


def _is_narrow(node: Node) -> bool:
    values = pytree.tree_leaves(node.meta.get("val"))
    return any(isinstance(each, Tensor) and each.dtype == _NARROW for each in values)


def _widen(editor: GraphEditor, node: Node) -> None:
    content = editor.constant(node) if node.op == "placeholder" else None
    if content is not None and content.dtype == _NARROW:
        editor.program.replace_constant(node, content.to(_WIDE))
        return
    node.args = pytree.tree_map(_wide_dtype, node.args)
    node.kwargs = pytree.tree_map(_wide_dtype, dict(node.kwargs))
    if "val" in node.meta:
        with editor.fake_mode:
            node.meta["val"] = pytree.tree_map(_wide_value, node.meta["val"])


def _wide_dtype(value: Any) -> Any:
    return _WIDE if value is _NARROW else value


def _wide_value(value: Any) -> Any:
    return value.to(_WIDE) if isinstance(value, Tensor) and value.dtype == _NARROW else value


def _cast_input(editor: GraphEditor, node: Node) -> None:
    readers = [user for user in node.users if user.op != "output"]
    with editor.graph.inserting_before(editor.first_call()):
        cast = editor.call(torch.ops.aten.to.dtype, node, _WIDE, like=node)
    mark_outside(cast)
    for reader in readers:
        reader.replace_input_with(node, cast)


def _cast_output(editor: GraphEditor, node: Node) -> None:
    output = editor.graph.output_node()
    with editor.graph.inserting_before(output):
        cast = editor.call(torch.ops.aten.to.dtype, node, _NARROW, like=node)
    mark_outside(cast)
    output.replace_input_with(node, cast)
