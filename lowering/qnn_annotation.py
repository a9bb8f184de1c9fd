"""How attention is annotated for HTP: 8-bit KV caches beside 16-bit activations.

HTP multiplies a 16-bit by an 8-bit value at full speed, and a cache of 8 bits is half as large. So
the second input of each attention matmul, its cache, and what extends the cache share one symmetric
8-bit encoding. The stock ``annotate_kv_8bit`` expects convolutions as projections: with linears it
walks on up to the embedding.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from executorch.backends.qualcomm.quantizer.qconfig import (
    QuantizationConfig,
    get_8a8w_qnn_ptq_config,
    get_16a8w_qnn_ptq_config,
)
from executorch.backends.qualcomm.quantizer.rules import Q_ANNOTATION_KEY
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e import MinMaxObserver
from torchao.quantization.pt2e.quantizer import (
    QuantizationAnnotation,
    QuantizationSpec,
    SharedQuantizationSpec,
)

from edgepass.passes.value_names import call_name, is_view

_PROJECTIONS = ("aten.linear", "aten.conv2d")


def kv_annotation(activation_bits: int) -> Callable[[GraphModule], None]:
    """An annotation for ``QnnQuantizer.add_custom_quant_annotations`` that makes KV caches 8-bit.

    ``activation_bits`` (8 or 16) is what everything else of the attention has.
    """

    def annotate(module: GraphModule) -> None:
        cache = get_8a8w_qnn_ptq_config(act_symmetric=True, act_observer=MinMaxObserver)
        rest = _activations(activation_bits)
        for node in module.graph.nodes:
            if _is_attention(node):
                _annotate_matmul(node, rest, cache.input_activation)

    return annotate


def _activations(bits: int) -> QuantizationConfig:
    make = get_8a8w_qnn_ptq_config if bits == 8 else get_16a8w_qnn_ptq_config
    return make(act_observer=MinMaxObserver)


def _is_attention(node: Node) -> bool:
    """A matmul of two computed values: no weight is one of them."""
    return call_name(node) == "aten.matmul" and all(
        isinstance(arg, Node) and arg.op == "call_function" for arg in node.args
    )


def _annotate_matmul(node: Node, rest: QuantizationConfig, cache: QuantizationSpec) -> None:
    left, right = node.args
    node.meta[Q_ANNOTATION_KEY] = QuantizationAnnotation(
        input_qspec_map={left: rest.input_activation, right: cache},
        output_qspec=rest.output_activation,
        _annotated=True,
    )
    _annotate_source(right, node, cache)


def _annotate_source(node: Node, user: Node, cache: QuantizationSpec) -> None:
    """Let views and joins between a projection and its matmul compute in the cache's encoding."""
    if is_view(node):
        source: Node = node.args[0]  # type: ignore[assignment]
        # HTP reshapes within one dtype only, and the stock passes put a reshape of their own behind
        # a linear: the change to 8 bits must come one view later.
        if call_name(source) in _PROJECTIONS and is_view(user):
            return
        _share(node, [source], cache)
        _annotate_source(source, node, cache)
    elif call_name(node) == "aten.cat":
        parts: list[Node] = list(node.args[0])  # type: ignore[arg-type]
        _share(node, parts, cache)
        for part in parts:
            _annotate_source(part, node, cache)


def _share(node: Node, inputs: list[Node], cache: QuantizationSpec) -> None:
    first = inputs[0]
    shared = SharedQuantizationSpec((first, node))
    specs: dict[Node, QuantizationSpec | SharedQuantizationSpec] = dict.fromkeys(inputs, shared)
    specs[first] = cache
    node.meta[Q_ANNOTATION_KEY] = QuantizationAnnotation(
        input_qspec_map=specs, output_qspec=shared, _annotated=True
    )


def block_sizes(module: GraphModule, size_of: Callable[[Node], int | None]) -> dict[str, tuple]:
    """The map for ``QnnQuantizer.set_block_size_map``: each projection that ``size_of`` gives one.

    ``size_of`` takes a linear or conv2d call and returns its block of input features, or None.
    """
    sizes = {}
    for node in module.graph.nodes:
        if call_name(node) in _PROJECTIONS and (size := size_of(node)) is not None:
            rank = node.args[1].meta["val"].dim()
            sizes[node.name] = (1, size, *(1,) * (rank - 2))
    return sizes


def weight_width(node: Node) -> int:
    """The input features of a projection."""
    value: torch.Tensor = node.args[1].meta["val"]  # type: ignore[union-attr]
    return int(value.shape[1])
