"""Quantized linears and embeddings in the forms that XNNPACK and the portable kernels have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from edgepass.ops.packing import dequantize_groups, swap_nibbles, unpack_int4
from edgepass.passes.editor import Editor
from edgepass.passes.program import WorkingProgram
from edgepass.passes.targets import argument, is_call, operator_name

_RULE = "prepare-xnnpack"
# XNNPACK's blockwise int4 kernels read whole blocks of a multiple of this many values.
BLOCK = 32


@dataclass(frozen=True)
class Declined:
    """A linear that runs in float32 instead of int4, the weight's name and the reason."""

    weight: str
    reason: str


def prepare_linears(program: WorkingProgram) -> list[Declined]:
    """Give each fused linear and embedding its runtime form; say which ones have none."""
    declined = []
    for node in list(program.graph.nodes):
        if is_call(node, "edgepass.linear_qta8a_qga4w", "edgepass.linear_qga4w"):
            reason = why_not(program, node)
            if reason is None:
                _quantize_inside(program, node)
            else:
                weight = program.qualified_name(argument(node, "w_packed")) or node.name
                declined.append(Declined(weight, reason))
                _float_linear(program, node)
        elif is_call(node, "edgepass.embedding_qg"):
            _runtime_embedding(program, node)
    program.graph.eliminate_dead_code()
    program.remove_unused_constants()
    return declined


def why_not(program: WorkingProgram, node: Node) -> str | None:
    """Why XNNPACK's dynamically quantized int4 kernel cannot compute this linear exactly."""
    if is_call(node, "edgepass.linear_qta8a_qc8w"):
        return None  # the fusing rule has checked all
    if is_call(node, "edgepass.linear_qga4w"):
        return "XNNPACK has no int4 kernel for float activations"
    group_size = argument(node, "group_size")
    if group_size % BLOCK:
        return f"group_size={group_size} is no multiple of {BLOCK}"
    zeros = program.constant(argument(node, "w_zeros"))
    if zeros is None or bool(zeros.any()):
        return "the weight has zero points and XNNPACK's int4 kernel is symmetric"
    if _source(node) is None:
        return "the activation's quantization is not dynamic per token"
    if (_value(_source(node))).dtype != torch.float32:
        return f"the activation is {_value(_source(node)).dtype}, expected torch.float32"
    return None


def _source(node: Node) -> Node | None:
    """The float activation behind a linear, if it is quantized with the standard formula."""
    if node.target is torch.ops.edgepass.linear_qta8a_qga4w.dynamic:
        return node.args[0]
    quantize = {_producer(argument(node, name)) for name in ("x_q", "x_scale", "x_zero")}
    producer = next(iter(quantize))
    if len(quantize) != 1 or not is_call(producer, "edgepass.quantize_per_token"):
        return None
    return argument(producer, "x")


def _producer(value: Node) -> Node:
    return value.args[0] if operator_name(value.target) == "operator.getitem" else value


def _value(node: Any) -> torch.Tensor:
    return node.meta["val"]


def _quantize_inside(program: WorkingProgram, node: Node) -> None:
    names = ("w_packed", "group_size", "w_scales", "w_zeros", "bias")
    arguments = [argument(node, name) for name in names]
    editor = Editor(program, node, _RULE)
    operator = torch.ops.edgepass.linear_qta8a_qga4w.dynamic
    _put(program, node, editor.call(operator, _source(node), *arguments, like=node))


def _float_linear(program: WorkingProgram, node: Node) -> None:
    """The same product in float32, with the weight dequantized into the program."""
    names = ("w_packed", "w_scales", "w_zeros")
    packed, scales, zeros = (argument(node, name) for name in names)
    group_size = argument(node, "group_size")
    columns = int(_value(scales).shape[1]) * group_size

    def dequantize() -> torch.Tensor:
        weight, by, zero = (_tensor(program, each) for each in (packed, scales, zeros))
        return dequantize_groups(unpack_int4(weight, columns), by, zero, group_size).float()

    name = f"{program.qualified_name(packed)}_dequantized"
    constant = program.derive_constant(("dequantized", packed, scales, zeros), name, dequantize)
    editor = Editor(program, node, _RULE)
    x = _float_activation(editor, node)
    bias = argument(node, "bias")
    linear = editor.call(torch.ops.aten.linear.default, x, constant, bias, like=node)
    editor.complete_metadata()
    _put(program, node, linear)


def _float_activation(editor: Editor, node: Node) -> Node:
    """The activation that the linear reads: rounded to int8 and back where it was quantized."""
    if is_call(node, "edgepass.linear_qga4w"):
        return node.args[0]
    source = _source(node)
    if source is not None:
        return _round_rows(editor, source)
    aten = torch.ops.aten
    parts = [argument(node, name) for name in ("x_q", "x_scale", "x_zero")]
    rows, scale, zero = (editor.call(aten.to.dtype, part, torch.float32) for part in parts)
    scale, zero = (editor.call(aten.unsqueeze.default, part, -1) for part in (scale, zero))
    return editor.call(aten.mul.Tensor, editor.call(aten.sub.Tensor, rows, zero), scale)


def _round_rows(editor: Editor, x: Node) -> Node:
    """``edgepass::quantize_per_token`` and back, in plain operators."""
    aten, call = torch.ops.aten, editor.call
    low = call(aten.clamp.default, call(aten.amin.default, x, [-1], True), None, 0.0)
    high = call(aten.clamp.default, call(aten.amax.default, x, [-1], True), 0.0)
    width = call(aten.div.Tensor, call(aten.sub.Tensor, high, low), 255.0)
    scale = call(aten.clamp.default, width, torch.finfo(torch.float32).eps)
    offset = call(aten.round.default, call(aten.div.Tensor, low, scale))
    zero = call(aten.clamp.default, call(aten.rsub.Scalar, offset, -128.0), -128.0, 127.0)
    steps = call(aten.mul.Tensor, x, call(aten.reciprocal.default, scale))
    moved = call(aten.add.Tensor, call(aten.round.default, steps), zero)
    stored = call(aten.clamp.default, moved, -128.0, 127.0)
    return call(aten.mul.Tensor, call(aten.sub.Tensor, stored, zero), scale)


def _runtime_embedding(program: WorkingProgram, node: Node) -> None:
    table, scales, zeros, ids = (
        argument(node, name) for name in ("weight", "scales", "zeros", "ids")
    )
    bits = argument(node, "bits")
    if bits == 4:
        # The portable kernel reads the even column from the high half of a byte.
        name, stored = f"{program.qualified_name(table)}_by_row", table
        table = program.derive_constant(
            ("embedding", table), name, lambda: swap_nibbles(_tensor(program, stored))
        )
    quantized = torch.ops.quantized_decomposed
    operator = quantized.embedding_4bit.dtype if bits == 4 else quantized.embedding_byte.dtype
    low, high = (-8, 7) if bits == 4 else (-128, 127)
    offsets = program.constant(zeros) if zeros is not None else None
    zeros = None if offsets is None or not bool(offsets.any()) else zeros
    if zeros is not None and offsets is not None and offsets.dtype != _value(scales).dtype:
        # The portable kernel reads zero points in the scales' dtype.
        dtype = _value(scales).dtype
        zeros = program.derive_constant(
            ("zeros", zeros, dtype),
            f"{program.qualified_name(zeros)}_float",
            lambda: offsets.to(dtype),
        )
    editor = Editor(program, node, _RULE)
    rows = editor.call(
        operator, table, scales, zeros, low, high, ids, like=node, dtype=_value(node).dtype
    )
    _put(program, node, rows)


def _tensor(program: WorkingProgram, node: Node) -> torch.Tensor:
    tensor = program.constant(node)
    assert tensor is not None, f"{node} is a constant: the fusing rule has checked it"
    return tensor


def _put(program: WorkingProgram, node: Node, new: Node) -> None:
    node.replace_all_uses_with(new)
    program.graph.erase_node(node)
