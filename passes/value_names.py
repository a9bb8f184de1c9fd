"""Names of a graph's values that do not depend on where they stand in it.

A value is named by the module that computes it, the operator, and which of that module's calls of
the operator it is: ``model.layers.0.self_attn/matmul#1``. Views are looked through, since what they
show has the encoding of what they are taken from. So graphs of one model that differ in their
shapes, in their caches or in their views name the same values alike.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterator
from typing import Any

from torch._ops import OpOverloadPacket
from torch.fx import Graph, Node

from edgepass.passes.targets import operator_name, parameters

QUANTIZE = frozenset(
    {
        "quantized_decomposed.quantize_per_tensor",
        "quantized_decomposed.quantize_per_channel",
        "torchao.quantize_affine",
    }
)
DEQUANTIZE = frozenset(name.replace(".quantize", ".dequantize") for name in QUANTIZE)
# Same values in another shape or order.
VIEWS = frozenset(
    f"aten.{name}"
    for name in (
        *("view", "reshape", "_unsafe_view", "transpose", "permute", "t", "unsqueeze", "squeeze"),
        *("expand", "flatten", "unflatten", "clone", "contiguous", "alias", "detach", "mT"),
        *("numpy_T", "swapaxes", "swapdims", "movedim", "moveaxis"),
    )
)
# Operators that put new rows beside or into a cache, and return the whole.
JOINS = frozenset(
    f"aten.{name}" for name in ("cat", "index_put", "index_copy", "slice_scatter", "copy")
)


def call_name(node: Any) -> str:
    """The operator of a call (``"aten.view"``), ``""`` for anything else."""
    if not isinstance(node, Node) or node.op != "call_function":
        return ""
    # PT2E leaves torchao's operators in the graph without an overload.
    target = node.target.default if isinstance(node.target, OpOverloadPacket) else node.target
    return operator_name(target)


def is_quantize(node: Any) -> bool:
    return call_name(node) in QUANTIZE


def is_dequantize(node: Any) -> bool:
    return call_name(node) in DEQUANTIZE


def is_view(node: Any) -> bool:
    return call_name(node) in VIEWS


def root_of(node: Node) -> Node:
    """The value behind a chain of views and quantizations."""
    while is_view(node) or is_quantize(node) or is_dequantize(node):
        node = node.args[0]  # type: ignore[assignment]
    return node


def module_path(node: Node) -> str:
    """The path of the innermost module that the node belongs to, ``""`` for the outermost."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return stack[-1][0] if stack else ""


class ValueNames:
    """The names of one graph's values.

    ``prefix`` is a module path that is left out of them (``decoder.model``). ``joins`` are calls
    that join a cache with its new rows: another form of the model lacks them, so they are not
    counted among the operators of their module.
    """

    def __init__(self, graph: Graph, prefix: str = "", joins: Container[Node] = ()) -> None:
        self._prefix = prefix
        self.calls: Counter[str] = Counter()
        self._names: dict[Node, str] = {}
        joined: Counter[str] = Counter()
        for node in graph.nodes:
            if node.op == "placeholder":
                self._names[node] = node.name
            name = call_name(node)
            if not name or name in QUANTIZE | DEQUANTIZE | VIEWS:
                continue
            where = f"{self.path(node)}/{name.removeprefix('aten.')}"
            count = joined if node in joins else self.calls
            suffix = " of caches" if node in joins else ""
            self._names[node] = f"{where}#{count[where]}{suffix}"
            count[where] += 1

    def path(self, node: Node) -> str:
        """The path of the node's module without the prefix."""
        path = module_path(node)
        return path.removeprefix(self._prefix).removeprefix(".") if self._prefix else path

    def of(self, node: Node) -> str:
        """The name of a computed value or an input."""
        return self._names[node]

    def result(self, node: Node) -> str:
        """The name of what the value behind ``node`` is quantized to where it is computed."""
        return f"{self.of(root_of(node))}.output"

    def returned(self, node: Node) -> str:
        """The name of what the value behind ``node`` is quantized to when the graph returns it."""
        return f"{self.of(root_of(node))}.returned"

    def argument(self, user: Node, value: Node) -> list[str]:
        """The names of ``value`` as the arguments of ``user`` (several if it is passed twice)."""
        return [f"{self.of(user)}.{name}" for name in argument_names(user, value)]

    def parameter(self, user: Node, value: Node) -> str:
        """The name of a constant that ``user`` takes: ``lm_head.weight`` if its module owns it."""
        (name, *_) = argument_names(user, value)
        only = self.calls[self.of(user).partition("#")[0]] == 1
        if name in ("weight", "bias") and only:
            return f"{self.path(user)}.{name}".lstrip(".")
        return f"{self.of(user)}.{name}"


def argument_names(user: Node, value: Node) -> list[str]:
    """The names of the arguments as which ``user`` takes ``value``: ``mat2``, ``tensors[1]``."""
    known = parameters(user.target) or ()
    named = [(known[i].name if i < len(known) else str(i), arg) for i, arg in enumerate(user.args)]
    return list(_places([*named, *user.kwargs.items()], value))


def _places(named: list[tuple[str, Any]], value: Node) -> Iterator[str]:
    for name, argument in named:
        if argument is value:
            yield name
        elif isinstance(argument, (list, tuple)):
            yield from _places([(f"{name}[{i}]", each) for i, each in enumerate(argument)], value)
