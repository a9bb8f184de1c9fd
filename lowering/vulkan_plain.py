"""Plain aten forms of edgepass's operators, for what the Vulkan runtime cannot take.

Each form is a function that computes what its operator computes; it is traced into the graph in the
operator's place. Its nodes are marked, and the partitioner leaves them outside the delegate.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.experimental.proxy_tensor import make_fx

from edgepass.lowering.vulkan_graph import OUTSIDE, GraphEditor
from edgepass.ops.packing import dequantize_groups, unpack_int4
from edgepass.passes.targets import argument, is_call, operator_name


def mark_outside(node: Node) -> None:
    """Keep a node, and what it is decomposed to, outside every delegate."""
    # `custom` is the one key of a node's meta that decompositions and re-tracing passes hand on.
    node.meta["custom"] = {**(node.meta.get("custom") or {}), OUTSIDE: True}


def is_outside(node: Node) -> bool:
    """Tell whether :func:`mark_outside` was called for a node or for its origin."""
    return bool((node.meta.get("custom") or {}).get(OUTSIDE))


def rewrite_plainly(editor: GraphEditor) -> None:
    """Put the plain forms in the place of all operators of edgepass that are left."""
    for node in list(editor.graph.nodes):
        if is_call(node, "aten.index_copy_"):
            mark_outside(node)
        prepare = _FORMS.get(operator_name(node.target)) if node.op == "call_function" else None
        if prepare is not None:
            put_plain_form(editor, node, *prepare(editor, node))


def put_plain_form(
    editor: GraphEditor, node: Node, form: Callable[..., Any], inputs: list[Any]
) -> None:
    """Put ``form``, traced on ``inputs``, in the place of ``node``, marked to stay outside."""
    with editor.graph.inserting_before(node):
        _replace(editor, node, _trace_into(editor, node, form, inputs))


def _trace_into(
    editor: GraphEditor, node: Node, form: Callable[..., Any], inputs: list[Any]
) -> Any:
    """Trace ``form`` on the values of ``inputs`` and insert its nodes; return its result's."""
    values = [value.meta["val"] if isinstance(value, Node) else value for value in inputs]
    with editor.fake_mode, torch.no_grad():
        traced = make_fx(form, tracing_mode="real", _allow_non_fake_inputs=True)(*values)
    copies: dict[Node, Any] = {}
    placeholders = [n for n in traced.graph.nodes if n.op == "placeholder"]
    copies.update(zip(placeholders, inputs, strict=True))
    for source in traced.graph.nodes:
        if source.op != "call_function":
            continue
        args = torch.fx.node.map_arg(_with_inferred_size(source), lambda n: copies[n])
        kwargs = torch.fx.node.map_arg(source.kwargs, lambda n: copies[n])
        new = editor.call(source.target, *args, like=node, val=source.meta["val"])
        new.kwargs = kwargs
        mark_outside(new)
        copies[source] = new
    return torch.fx.node.map_arg(traced.graph.output_node().args[0], lambda n: copies[n])


def _with_inferred_size(node: Node) -> Any:
    """The arguments of a traced call; a view infers its one dynamic size instead of naming it."""
    if node.target is not torch.ops.aten.view.default:
        return node.args
    x, sizes = node.args
    return x, [size if isinstance(size, (int, Node)) else -1 for size in sizes]


def _replace(editor: GraphEditor, node: Node, result: Any) -> None:
    if isinstance(result, Node):
        node.replace_all_uses_with(result)
    else:
        for user in list(node.users):
            user.replace_all_uses_with(result[user.args[1]])
            editor.graph.erase_node(user)
    editor.graph.erase_node(node)


def quantize_per_token(scale_floor: float, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    low = x.amin(dim=-1).clamp(max=0)
    high = x.amax(dim=-1).clamp(min=0)
    floor = max(scale_floor, torch.finfo(x.dtype).smallest_normal)
    scale = ((high - low) / 255.0).clamp(min=floor)
    zero = (-128 - torch.round(low / scale)).clamp(-128, 127)
    q = (torch.round(x * (1.0 / scale).unsqueeze(-1)) + zero.unsqueeze(-1)).clamp(-128, 127)
    return q.to(torch.int8), scale, zero.to(torch.int8)


def linear_of_quantized(
    x_q: Tensor, x_scale: Tensor, x_zero: Tensor, weight: Tensor, bias: Tensor | None
) -> Tensor:
    x = (x_q.to(weight.dtype) - x_zero.to(weight.dtype).unsqueeze(-1)) * x_scale.unsqueeze(-1)
    return torch.nn.functional.linear(x, weight, bias)


def linear_of_float(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.nn.functional.linear(x.to(weight.dtype), weight, bias)


def linear_quantizing(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return linear_of_quantized(*quantize_per_token(0.0, x), weight, bias)


def embedding(
    group_size: int, table: Tensor, scales: Tensor, zeros: Tensor | None, ids: Tensor
) -> Tensor:
    look_up = torch.nn.functional.embedding
    rows = look_up(ids, table).to(scales.dtype).unflatten(-1, (-1, group_size))
    if zeros is not None:
        rows = rows - look_up(ids, zeros).to(scales.dtype).unsqueeze(-1)
    return (rows * look_up(ids, scales).unsqueeze(-1)).flatten(-2)


def rms_norm(eps: float, x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    mean = wide.pow(2).mean(-1, keepdim=True)
    return (wide * torch.rsqrt(mean + eps) * weight.float()).to(x.dtype)


def rotary(interleaved: bool, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    width = cos.shape[-1]
    turned, kept = x[..., :width].float(), x[..., width:]
    if cos.dim() == 3:
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    if interleaved:
        partner = torch.stack((-turned[..., 1::2], turned[..., ::2]), dim=-1).flatten(-2)
    else:
        half = width // 2
        partner = torch.cat((-turned[..., half:], turned[..., :half]), dim=-1)
    out = (turned * cos.float() + partner * sin.float()).to(x.dtype)
    return out if width == x.shape[-1] else torch.cat((out, kept), dim=-1)


def position_rows(length: Any, table: Tensor, input_pos: Tensor) -> Tensor:
    return table.index_select(0, input_pos + torch.arange(length))


def cached_attention(
    scale: float,
    window: int,
    softcap: float,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    input_pos: Tensor,
) -> Tensor:
    groups = q.shape[1] // k_cache.shape[1]
    keys = k_cache.repeat_interleave(groups, dim=1) if groups > 1 else k_cache
    values = v_cache.repeat_interleave(groups, dim=1) if groups > 1 else v_cache
    tokens = (input_pos + torch.arange(q.shape[2])).unsqueeze(1)
    rows = torch.arange(k_cache.shape[2])
    visible = rows <= tokens
    if window:
        visible = visible & (rows > tokens - window)
    scores = torch.matmul(q, keys.transpose(-2, -1)) * scale
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    scores = torch.where(visible, scores, torch.full((), float("-inf"), dtype=scores.dtype))
    return torch.matmul(torch.softmax(scores, dim=-1), values)


def _with_float_weight(form: Callable[..., Tensor], *names: str) -> Callable[..., Any]:
    """Give a linear's form its dequantized weight as a new constant of the program."""

    def prepare(editor: GraphEditor, node: Node) -> tuple[Callable[..., Any], list[Any]]:
        packed, scales, zeros = (
            editor.required_constant(argument(node, name))
            for name in ("w_packed", "w_scales", "w_zeros")
        )
        inputs = [argument(node, name) for name in names]
        k = inputs[0].meta["val"].shape[-1]
        w = dequantize_groups(unpack_int4(packed, k), scales, zeros, argument(node, "group_size"))
        name = f"{editor.constant_name(argument(node, 'w_packed'))}_float"
        weight = editor.add_constant(name, w.to(scales.dtype))
        return form, [*inputs, weight, argument(node, "bias")]

    return prepare


def _linear(editor: GraphEditor, node: Node) -> tuple[Callable[..., Any], list[Any]]:
    if node.target._overloadname == "dynamic":
        return _with_float_weight(linear_quantizing, "x")(editor, node)
    return _with_float_weight(linear_of_quantized, "x_q", "x_scale", "x_zero")(editor, node)


def _embedding(editor: GraphEditor, node: Node) -> tuple[Callable[..., Any], list[Any]]:
    table, scales, zeros, ids = (argument(node, n) for n in ("weight", "scales", "zeros", "ids"))
    if argument(node, "bits") == 4:
        unpacked = unpack_int4(editor.required_constant(table), node.meta["val"].shape[-1])
        table = editor.add_constant(f"{editor.constant_name(table)}_int8", unpacked)
    return partial(embedding, argument(node, "group_size")), [table, scales, zeros, ids]


def _of(form: Callable[..., Any], settings: str, *names: str) -> Callable[..., Any]:
    """Bind the arguments called ``settings`` and let the form take the tensors ``names``."""

    def prepare(editor: GraphEditor, node: Node) -> tuple[Callable[..., Any], list[Any]]:
        bound = [argument(node, name) for name in settings.split()]
        return partial(form, *bound), [argument(node, name) for name in names]

    return prepare


_FORMS: dict[str, Callable[..., Any]] = {
    "edgepass.quantize_per_token": _of(quantize_per_token, "scale_floor", "x"),
    "edgepass.linear_qta8a_qga4w": _linear,
    "edgepass.linear_qga4w": _with_float_weight(linear_of_float, "x"),
    "edgepass.embedding_qg": _embedding,
    "edgepass.rms_norm": _of(rms_norm, "eps", "x", "weight"),
    "edgepass.rotary": _of(rotary, "interleaved", "x", "cos", "sin"),
    "edgepass.cached_attention": _of(
        *(cached_attention, "scale window softcap", "q", "k_cache", "v_cache", "input_pos")
    ),
}


def _position_rows(editor: GraphEditor, node: Node) -> tuple[Callable[..., Any], list[Any]]:
    table, input_pos, length = (argument(node, n) for n in ("table", "input_pos", "length"))
    if not isinstance(length, Node):
        return partial(position_rows, length), [table, input_pos]
    return position_rows, [length, table, input_pos]


_FORMS["edgepass.position_rows"] = _position_rows
