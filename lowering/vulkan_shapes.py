"""Operators that move data, in the forms that the Vulkan runtime resizes right.

With a dynamic token count the runtime's `split` keeps the largest sizes and returns garbage, and a
symbolic size in a view has to be computed on the device. Slices and inferred sizes are right.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor
from torch.fx import Node

from edgepass.lowering.vulkan_graph import GraphEditor
from edgepass.lowering.vulkan_legality import VIEW, accepted
from edgepass.lowering.vulkan_plain import is_outside
from edgepass.passes.cancel_views import reads_bits
from edgepass.passes.targets import argument, is_call, is_getitem

_aten = torch.ops.aten


def settle_shapes(editor: GraphEditor) -> None:
    """Rewrite views, last-token slices, splits and scalar operands of float tensors."""
    for node in list(editor.graph.nodes):
        if node.op != "call_function" or is_outside(node) or reads_bits(node):
            continue
        if is_call(node, "aten.view", "aten.reshape", "aten.flatten", "aten.unflatten"):
            _infer_dynamic_size(node)
        elif is_call(node, "aten.slice") and _takes_last(node):
            _select_last(editor, node)
        elif is_call(node, "aten.split", "aten.split_with_sizes", "aten.chunk"):
            _cut_by_slices(editor, node)
        elif is_call(node, "aten.add", "aten.sub", "aten.mul", "aten.div"):
            _give_tensor_operand(editor, node)


def _infer_dynamic_size(node: Node) -> None:
    """Let the one dynamic size of a view be inferred, so that no symbol has to be passed."""
    sizes = [size if isinstance(size, int) else -1 for size in node.meta["val"].shape]
    if accepted(VIEW, "dynamic sizes").holds(sizes.count(-1)) and 0 not in sizes:
        if not is_call(node, "aten.view"):
            node.target = _aten.reshape.default
        node.args, node.kwargs = (node.args[0], sizes), {}


def _takes_last(node: Node) -> bool:
    value = node.args[0].meta["val"]
    dim, start, end, step = (argument(node, name) for name in ("dim", "start", "end", "step"))
    reaches_end = end is None or end == sys.maxsize
    return start == -1 and reaches_end and step == 1 and not isinstance(value.shape[dim], int)


def _select_last(editor: GraphEditor, node: Node) -> None:
    """Take the last token by a select, which the runtime resizes right, and restore the rank."""
    x = node.args[0]
    dim = argument(node, "dim") % x.meta["val"].dim()
    with editor.graph.inserting_before(node):
        last = editor.call(_aten.select.int, x, dim, -1, like=node)
        result = editor.call(_aten.unsqueeze.default, last, dim, like=node)
    editor.replace(node, result)


def _cut_by_slices(editor: GraphEditor, node: Node) -> None:
    dim = argument(node, "dim")
    parts = node.meta["val"]
    ends = [0]
    for part in parts:
        ends.append(ends[-1] + part.shape[dim])
    if not all(isinstance(end, int) for end in ends) or not all(map(is_getitem, node.users)):
        return
    for part in list(node.users):
        index = part.args[1]
        with editor.graph.inserting_before(part):
            cut = editor.call(
                *(_aten.slice.Tensor, node.args[0], dim % parts[0].dim()),
                *(ends[index], ends[index + 1]),
                like=part,
                val=part.meta["val"],
            )
        editor.replace(part, cut)
    editor.graph.erase_node(node)


def _give_tensor_operand(editor: GraphEditor, node: Node) -> None:
    """Turn a number beside a float tensor into a constant, of as many dimensions as the tensor."""
    if len(node.args) != 2 or node.kwargs or not isinstance(node.args[0], Node):
        return
    x, number = node.args
    value = node.meta["val"]
    if isinstance(number, (int, float)) and _same_floats(x.meta["val"], value):
        constant = torch.full([1] * value.dim(), float(number), dtype=value.dtype)
        node.update_arg(1, editor.add_constant("scalar", constant))


def _same_floats(x: object, result: Tensor) -> bool:
    return isinstance(x, Tensor) and x.dtype == result.dtype and result.is_floating_point()
