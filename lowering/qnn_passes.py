"""The passes that edgepass brings to the stock QNN pass manager."""

from __future__ import annotations

from typing import Any

import torch
from executorch.exir.pass_base import ExportPass, PassResult
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from edgepass.ops.encodings_file import split_block_scales
from edgepass.passes.value_names import call_name


class SnapBlockScales(ExportPass):
    """Give block-quantized weights the scales that HTP stores: whole multiples of one a channel.

    The stock conversion rounds the scales when it writes the device's tensors, so that the graph
    on the host computes with others. Here the scales change where they are stored, which is in the
    graph that the program was exported from, too.
    """

    def __init__(self, edge_program: ExportedProgram) -> None:
        super().__init__()
        self.edge_program = edge_program

    def call(self, graph_module: GraphModule) -> PassResult:
        changed = False
        for node in graph_module.graph.nodes:
            if call_name(node) == "torchao.dequantize_affine":
                scale = self._constant(node.args[2])
                if scale is not None and scale.numel() > scale.shape[0]:
                    changed |= _snap(scale)
        return PassResult(graph_module, changed)

    def _constant(self, node: Any) -> torch.Tensor | None:
        signature = self.edge_program.graph_signature
        if not isinstance(node, Node):
            return None
        name = signature.inputs_to_buffers.get(node.name) or signature.inputs_to_parameters.get(
            node.name, signature.inputs_to_lifted_tensor_constants.get(node.name)
        )
        stored = self.edge_program.state_dict.get(name)
        return self.edge_program.constants.get(name) if stored is None else stored


def _snap(scale: torch.Tensor) -> bool:
    channel, steps = split_block_scales(scale.detach().reshape(scale.shape[0], -1))
    snapped = (channel[:, None] * steps).reshape(scale.shape)
    if torch.equal(snapped, scale):
        return False
    with torch.no_grad():
        scale.copy_(snapped)
    return True


class DropProvenance(ExportPass):
    """Drop the chains of nodes that a node was made from.

    Each re-trace copies the chain and makes it longer; nothing in the QNN backend reads it.
    """

    def __init__(self) -> None:
        super().__init__()

    def call(self, graph_module: GraphModule) -> PassResult:
        for node in graph_module.graph.nodes:
            node.meta.pop("from_node", None)
        return PassResult(graph_module, False)
