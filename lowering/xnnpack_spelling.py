"""Activations that no XNNPACK node computes, spelt out in operators that are delegated."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch.fx import Node

from edgepass.passes.editor import Editor
from edgepass.passes.program import WorkingProgram
from edgepass.passes.targets import argument, is_call

_RULE = "prepare-xnnpack"
_aten = torch.ops.aten


def spell_activation(program: WorkingProgram, node: Node) -> None:
    """Replace ``node`` if it is a silu that is not float32, or the tanh form of gelu."""
    spell: Callable[[Editor, Node], Node]
    if is_call(node, "aten.silu") and node.meta["val"].dtype != torch.float32:
        spell = _silu
    elif is_call(node, "aten.gelu") and argument(node, "approximate") == "tanh":
        spell = _gelu_tanh
    else:
        return
    node.replace_all_uses_with(spell(Editor(program, node, _RULE), node))
    program.graph.erase_node(node)


def _silu(editor: Editor, node: Node) -> Node:
    """x * sigmoid(x): the portable runtime has no silu, and the delegate only float32's."""
    x = node.args[0]
    gate = editor.call(_aten.sigmoid.default, x, like=node)
    return editor.call(_aten.mul.Tensor, x, gate, like=node)


def _gelu_tanh(editor: Editor, node: Node) -> Node:
    """x * (tanh(x * (c + 0.044715 c x^2)) + 1) / 2 with c = sqrt(2 / pi) (Gemma)."""
    x, slope = node.args[0], math.sqrt(2 / math.pi)
    dtype = node.meta["val"].dtype

    def number(value: float) -> Node:
        name = f"gelu_{value:.6f}".replace(".", "_")
        tensor = torch.tensor([value], dtype=dtype)
        return editor.program.derive_constant(
            (_RULE, name, dtype), f"edgepass.{name}", tensor.clone
        )

    def multiply(left: object, right: object) -> Node:
        return editor.call(_aten.mul.Tensor, left, right, like=node)

    def add(left: object, right: object) -> Node:
        return editor.call(_aten.add.Tensor, left, right, like=node)

    steepness = add(multiply(multiply(x, x), number(0.044715 * slope)), number(slope))
    bent = editor.call(_aten.tanh.default, multiply(x, steepness), like=node)
    half = number(0.5)
    return multiply(x, add(multiply(bent, half), half))
