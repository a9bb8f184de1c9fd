"""Quantization that no rule has fused: no runtime computes its operators, so none is written.

Of constants it is computed here, once. Of activations it becomes plain aten, bit for bit, outside
the delegates; the float linear between may go inside. ``Int8DynamicActivationInt8WeightConfig``
comes with ``aten._int_mm``, which the portable kernels lack, too.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.ao.quantization.fx._decomposed
from torch import Tensor
from torch.fx import Node

from edgepass.lowering.vulkan_graph import GraphEditor
from edgepass.lowering.vulkan_plain import put_plain_form
from edgepass.passes.targets import operator_name, parameters

_DIALECTS = ("torchao.", "quantized_decomposed.")


def rewrite_unfused(editor: GraphEditor) -> None:
    """Replace every operator of the two quantization dialects that is left in a graph."""
    for node in list(editor.graph.nodes):
        if node.op != "call_function" or not node.users:
            continue
        name = operator_name(node.target)
        if name.startswith(_DIALECTS) and _is_constant(editor, node):
            _fold(editor, node)
        elif name in _FORMS:
            form, tensors = _bind(_FORMS[name], node)
            put_plain_form(editor, node, form, tensors)
    editor.graph.eliminate_dead_code()


def _is_constant(editor: GraphEditor, node: Node) -> bool:
    sources, mutable = node.all_input_nodes, editor.program.mutable_constants()
    known = [editor.constant(each) is not None and each not in mutable for each in sources]
    return bool(sources) and all(known) and isinstance(node.meta["val"], Tensor)


def _fold(editor: GraphEditor, node: Node) -> None:
    """Put the result in the place of a call on constants; equal calls give one constant."""

    def compute() -> Tensor:
        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), editor.constant)
        with torch.no_grad():
            return node.target(*args, **kwargs)

    source = node.all_input_nodes[0]
    name = f"{editor.constant_name(source)}_{operator_name(node.target).partition('.')[2]}"
    key = ("folded", node.target, str(node.args), str(node.kwargs))
    editor.replace(node, editor.program.derive_constant(key, name, compute))


def _bind(form: Callable[..., Any], node: Node) -> tuple[Callable[..., Any], list[Node]]:
    """Return ``form`` as a function of the nodes among the call's arguments, and these."""
    names = [each.name for each in parameters(node.target) or ()]
    arguments = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    places = [name for name, value in arguments.items() if isinstance(value, Node)]
    bound = {name: value for name, value in arguments.items() if name not in places}

    def of_tensors(*tensors: Tensor) -> Any:
        return form(**bound, **dict(zip(places, tensors, strict=True)))

    return of_tensors, [arguments[name] for name in places]


def _torchao(name: str) -> Callable[..., Any]:
    """A torchao operator traces into what it is made of."""
    return partial(getattr(torch.ops.torchao, name).default)


def choose_per_tensor(input: Tensor, quant_min: int, quant_max: int, eps: float, dtype: Any) -> Any:
    low, high = input.amin().clamp(max=0), input.amax().clamp(min=0)
    scale = ((high - low) / float(quant_max - quant_min)).clamp(min=eps).expand(1)
    zero = (quant_min - torch.round(low / scale)).clamp(quant_min, quant_max)
    return scale.to(torch.float64), zero.to(torch.int64)


def choose_per_token(input: Tensor, dtype: Any) -> Any:
    low, high = (
        input.amin(dim=-1, keepdim=True).clamp(max=0),
        input.amax(dim=-1, keepdim=True).clamp(min=0),
    )
    scale = ((high - low) / 255.0).clamp(min=torch.finfo(torch.float32).eps)
    first, last = low / scale, high / scale
    zero = torch.where((-128 + first) + (127 + last) > 0, -128 - first, 127 - last)
    return scale.to(torch.float64), zero.clamp(-128, 127).round().to(torch.int64)


def quantize_per_tensor(
    input: Tensor, scale: Any, zero_point: Any, quant_min: int, quant_max: int, dtype: Any
) -> Tensor:
    inverse = 1.0 / scale
    if isinstance(scale, Tensor):
        inverse, zero_point = inverse.to(torch.float32), zero_point.to(torch.float32)
    wide = input.to(torch.float32)
    return (torch.round(wide * inverse) + zero_point).clamp(quant_min, quant_max).to(dtype)


def dequantize_per_tensor(
    input: Tensor,
    scale: Any,
    zero_point: Any,
    quant_min: int,
    quant_max: int,
    dtype: Any,
    out_dtype: Any = None,
) -> Tensor:
    if isinstance(scale, Tensor):
        scale, zero_point = scale.to(torch.float32), zero_point.to(torch.float32)
    return ((input.to(torch.float32) - zero_point) * scale).to(out_dtype or torch.float32)


def quantize_per_token(
    input: Tensor, scales: Tensor, zero_points: Tensor, quant_min: int, quant_max: int, dtype: Any
) -> Tensor:
    moved = torch.round(input * (1.0 / scales) + zero_points)
    return moved.clamp(quant_min, quant_max).to(dtype)


def dequantize_per_token(
    input: Tensor,
    scales: Tensor,
    zero_points: Tensor,
    quant_min: int,
    quant_max: int,
    dtype: Any,
    output_dtype: Any,
) -> Tensor:
    return ((input - zero_points) * scales).to(output_dtype)


def int_mm(self: Tensor, mat2: Tensor) -> Tensor:
    return torch.mm(self.to(torch.int32), mat2.to(torch.int32))


_FORMS: dict[str, Callable[..., Any]] = {
    "torchao.choose_qparams_affine": _torchao("choose_qparams_affine"),
    "torchao.quantize_affine": _torchao("quantize_affine"),
    "torchao.dequantize_affine": _torchao("dequantize_affine"),
    "quantized_decomposed.choose_qparams": choose_per_tensor,
    "quantized_decomposed.choose_qparams_per_token_asymmetric": choose_per_token,
    "quantized_decomposed._choose_qparams_per_token_asymmetric_impl": choose_per_token,
    "quantized_decomposed.quantize_per_tensor": quantize_per_tensor,
    "quantized_decomposed.dequantize_per_tensor": dequantize_per_tensor,
    "quantized_decomposed.quantize_per_token": quantize_per_token,
    "quantized_decomposed.dequantize_per_token": dequantize_per_token,
    "aten._int_mm": int_mm,
}
