"""Which single nodes an edgepass XNNPACK delegate can hold, as data.

Shapes may be dynamic where the table's operator infers them at run time; float32 unless said.
"""

from __future__ import annotations

import torch
from executorch.backends.xnnpack.utils.xnnpack_constants import XNN_MAX_TENSOR_DIMS
from torch.fx import Node

# Kept whole by the decompositions before partitioning: one visitor writes each.
PRESERVED = (torch.ops.aten.silu.default, torch.ops.aten.linear.default)

FUSED = frozenset(
    {
        "edgepass.linear_qta8a_qga4w.dynamic",
        "edgepass.linear_qta8a_qc8w.dynamic",
        "edgepass.rms_norm.default",
        "edgepass.rotary.default",
        "edgepass.masked_attention.default",
        "edgepass.cast.default",
    }
)
ELEMENTWISE = frozenset(
    {
        "aten.add.Tensor",
        "aten.sub.Tensor",
        "aten.mul.Tensor",
        "aten.div.Tensor",
        "aten.silu.default",
        "aten.sigmoid.default",
        "aten.tanh.default",
        "aten.neg.default",
        "aten.exp.default",
        "aten.rsqrt.default",
        "aten.sqrt.default",
        "aten.abs.default",
        "aten.clamp.default",
        "aten.gelu.default",
    }
)


def is_supported(node: Node, constants: set[Node]) -> bool:
    """Whether XNNPACK computes this node of an edge-dialect graph, with dynamic sizes too."""
    name = getattr(node.target, "__name__", "")
    if name in FUSED:
        return True
    if not _float_tensors(node):
        return False
    if name in ELEMENTWISE:
        return _plain_elementwise(node, name)
    if name == "aten.view_copy.default":
        return all(isinstance(size, int) for size in node.args[1]) and (
            list(node.args[1]).count(-1) <= 1
        )
    if name == "aten.permute_copy.default":
        return True
    if name == "aten.linear.default":
        return node.args[1] in constants and (len(node.args) < 3 or node.args[2] in constants)
    return False


def _float_tensors(node: Node) -> bool:
    """All tensors of the node are float32, of a rank that XNNPACK holds, and not empty."""
    values = [n.meta.get("val") for n in (node, *node.all_input_nodes)]
    return all(
        isinstance(v, torch.Tensor)
        and v.dtype == torch.float32
        and v.dim() <= XNN_MAX_TENSOR_DIMS
        and not any(isinstance(size, int) and size == 0 for size in v.shape)
        for v in values
    )


def _plain_elementwise(node: Node, name: str) -> bool:
    if name in ("aten.add.Tensor", "aten.sub.Tensor"):
        return node.kwargs.get("alpha", 1) == 1 and len(node.all_input_nodes) == 2
    if name in ("aten.mul.Tensor", "aten.div.Tensor"):
        return all(isinstance(arg, Node) for arg in node.args)
    if name == "aten.gelu.default":
        return node.kwargs.get("approximate", "none") == "none"
    return True
