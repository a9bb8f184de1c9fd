"""How attention is annotated for HTP: KV caches of 8 or 16 bits beside 16-bit activations.

HTP multiplies a 16-bit by an 8-bit value at full speed, and a cache of 8 bits is half as large. So
the second input of each attention matmul, its cache, and what extends the cache share one symmetric
encoding. The stock ``annotate_kv_8bit`` expects convolutions as projections: with linears it walks
on up to the embedding. For 16 bits stock gives the matmul's input alone a signed encoding, so that
its cache would be read by another than it is written with.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Container
from typing import Any

import torch
from executorch.backends.qualcomm.quantizer.observers.per_block_param_observer import (
    PerBlockParamObserver,
)
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

from edgepass.lowering.qnn_block_sizes import BlockSizes
from edgepass.ops.errors import InvalidArgumentError
from edgepass.passes.kv_pairs import joined_values
from edgepass.passes.value_names import (
    JOINS,
    call_name,
    is_dequantize,
    is_quantize,
    is_view,
    module_path,
)

PROJECTIONS = ("aten.linear", "aten.conv2d")
_TRANSPOSITIONS = ("aten.transpose", "aten.permute", "aten.t")


_INT16_JOINS = ("aten.cat", "aten.slice_scatter")

# HTP multiplies by a 16-bit value as two signed bytes, 256 * 127 + 127: what is above saturates.
TWO_BYTE_MAX = 256 * 127 + 127


def kv_annotation(observer: Any = MinMaxObserver, bits: int = 8) -> Callable[[GraphModule], None]:
    """An annotation for ``add_custom_quant_annotations`` that gives KV caches 8 or 16 bits.

    ``observer`` makes the observers of the activations. The annotation raises InvalidArgumentError
    for a join that HTP does not compute in signed 16 bits.
    """

    def annotate(module: GraphModule) -> None:
        cache = _cache_spec(observer, bits)
        rest = get_16a8w_qnn_ptq_config(act_observer=observer)
        rows: dict[Node, SharedQuantizationSpec] = {}
        for node in module.graph.nodes:
            if _is_attention(node):
                _annotate_matmul(node, rest, cache)
                _annotate_source(node.args[1], node, cache, rows)
        _annotate_returned(module.graph.output_node(), rows)

    return annotate


def _cache_spec(observer: Any, bits: int) -> QuantizationSpec:
    """Symmetric: of 8 bits unsigned, of 16 signed, as HTP wants a product's second factor.

    Of 16 bits what is seen fills the steps to ``TWO_BYTE_MAX``; see ``widen_caches``.
    """
    if bits == 8:
        return get_8a8w_qnn_ptq_config(act_symmetric=True, act_observer=observer).input_activation
    activation = get_16a8w_qnn_ptq_config(act_observer=observer).input_activation
    return dataclasses.replace(
        activation,
        dtype=torch.int16,
        quant_min=-TWO_BYTE_MAX,
        quant_max=TWO_BYTE_MAX,
        qscheme=torch.per_tensor_symmetric,
    )


def widen_caches(module: GraphModule) -> None:
    """Give 16-bit caches of a converted graph the whole of int16, the range of files and devices.

    Scales stay. A value beyond what was seen then differs from the device's by 0.4 % at most.
    """
    for node in module.graph.nodes:
        if (is_quantize(node) or is_dequantize(node)) and node.args[3:5] == (
            -TWO_BYTE_MAX,
            TWO_BYTE_MAX,
        ):
            node.args = (*node.args[:3], -(2**15), 2**15 - 1, *node.args[5:])
    module.recompile()


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


def _annotate_source(
    node: Node, user: Node, cache: QuantizationSpec, rows: dict[Node, SharedQuantizationSpec]
) -> None:
    """Let views and joins between a projection and ``user`` compute in the cache's encoding.

    ``rows`` collects what changes to the cache's encoding when it is read: the value and the
    encoding that it takes.
    """
    views = []
    while is_view(node):
        views.append(node)
        node = node.args[0]  # type: ignore[assignment]
    for view in _in_cache_encoding(views, node):
        _share(view, [view.args[0]], cache)  # type: ignore[list-item]
        user = view
    if call_name(node) in JOINS:
        _check_join(node, cache)
        parts = joined_values(node)
        _share(node, parts, cache)
        for part in parts:
            _annotate_source(part, node, cache, rows)
    elif node.op == "call_function":
        source: Node = user.args[0] if is_view(user) else node  # type: ignore[assignment]
        first = joined_values(user)[0] if call_name(user) in JOINS else source
        rows[source] = SharedQuantizationSpec((first, user))


def _check_join(join: Node, cache: QuantizationSpec) -> None:
    """HTP scatters no signed 16 bits: such a join would leave the delegate, with other numbers."""
    if cache.dtype == torch.int16 and call_name(join) not in _INT16_JOINS:
        raise InvalidArgumentError(
            f"got kv_bits=16 for {join.name}, a join by {call_name(join)}, accepted are 8, or "
            f"joins by {', '.join(_INT16_JOINS)}"
        )


def _annotate_returned(output: Node, rows: dict[Node, SharedQuantizationSpec]) -> None:
    """Let the graph return rows as the cache takes them, where the change to it is behind them.

    Else a step would write other integers than the next one reads.
    """
    returned = {node: rows[node] for node in output.all_input_nodes if node in rows}
    if returned:
        output.meta[Q_ANNOTATION_KEY] = QuantizationAnnotation(
            input_qspec_map=returned, _annotated=True
        )


def _in_cache_encoding(views: list[Node], source: Node) -> list[Node]:
    """Those of ``views`` (nearest to the matmul first) that take the cache's encoding.

    HTP reshapes within one dtype only, and the stock passes put reshapes of their own behind a
    projection and lose the change of dtype there. So it comes at the last transposition.
    """
    if call_name(source) not in PROJECTIONS or not views:
        return views
    turns = (i for i, view in enumerate(views) if call_name(view) in _TRANSPOSITIONS)
    return views[: next(turns, 0) + 1]


def _share(node: Node, inputs: list[Node], cache: QuantizationSpec) -> None:
    first = inputs[0]
    shared = SharedQuantizationSpec((first, node))
    specs: dict[Node, QuantizationSpec | SharedQuantizationSpec] = dict.fromkeys(inputs, shared)
    specs[first] = cache
    node.meta[Q_ANNOTATION_KEY] = QuantizationAnnotation(
        input_qspec_map=specs, output_qspec=shared, _annotated=True
    )


def keep_float_activations(module: GraphModule) -> None:
    """Drop what a recipe with float activations says of them, which stock PT2E cannot prepare.

    The stock rules let outputs share the encoding of an input that has none.
    """
    for node in module.graph.nodes:
        annotation = node.meta.get(Q_ANNOTATION_KEY)
        if annotation is None:
            continue
        annotation.input_qspec_map = {
            source: spec
            for source, spec in annotation.input_qspec_map.items()
            if isinstance(spec, QuantizationSpec)
        }
        if not isinstance(annotation.output_qspec, QuantizationSpec):
            annotation.output_qspec = None


def projection_paths(module: GraphModule) -> list[str]:
    """The module path of each linear and convolution."""
    return [module_path(n) for n in module.graph.nodes if call_name(n) in PROJECTIONS]


def block_sizes(
    module: GraphModule,
    sizes: BlockSizes,
    whole: Container[str] = (),
    rows: Container[str] = (),
) -> dict[str, tuple]:
    """The map for ``QnnQuantizer.set_block_size_map``: linears and convolutions.

    ``whole`` are the paths of those without blocks, ``rows`` of those with one a row. Raises
    InvalidArgumentError for sizes that do not divide or that name no module with blocks.
    """
    nodes = [node for node in module.graph.nodes if call_name(node) in PROJECTIONS]
    paths = {node: module_path(node) for node in nodes if module_path(node) not in whole}
    sizes.check_used(path for path in paths.values() if path not in rows)
    found = {}
    for node, path in paths.items():
        _, width, *rest = node.args[1].meta["val"].shape
        size = int(width) if path in rows else sizes.of(path, width)
        found[node.name] = (1, size, *(1,) * len(rest))
    return found


def own_block_sizes(sizes: dict[str, tuple]) -> Callable[[GraphModule], None]:
    """An annotation that gives each projection in ``sizes`` a weight observer of its own blocks.

    The stock quantizer puts every size into one shared observer, so that the last one counts.
    """

    def annotate(module: GraphModule) -> None:
        for node in module.graph.nodes:
            if node.name in sizes:
                specs = node.meta[Q_ANNOTATION_KEY].input_qspec_map
                spec = specs[node.args[1]]
                keywords = {**spec.observer_or_fake_quant_ctr.p.keywords}
                keywords["block_size"] = sizes[node.name]
                own = PerBlockParamObserver.with_args(**keywords)
                specs[node.args[1]] = dataclasses.replace(spec, observer_or_fake_quant_ctr=own)

    return annotate
