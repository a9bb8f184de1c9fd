"""One name and one argument order for an operator, whatever its overload or dialect."""

import operator
from dataclasses import dataclass
from typing import Any

from torch._ops import HigherOrderOperator, OpOverload
from torch.fx import Node

# Functional twins of view operators, as the edge dialect spells them. `index_copy`, `_to_copy` and
# `copy` are operators of their own and are deliberately absent.
_VIEWS = (
    *("alias", "as_strided", "detach", "diagonal", "expand", "narrow", "permute", "select"),
    *("slice", "split", "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unfold"),
    *("unsqueeze", "view"),
)
_VIEW_COPIES = {f"aten.{name}_copy": f"aten.{name}" for name in _VIEWS}


@dataclass(frozen=True)
class Parameter:
    """One parameter of an operator's schema. ``default`` is meaningful if not ``required``."""

    name: str
    required: bool
    default: Any


def overload_of(target: Any) -> OpOverload | None:
    """Return the ``OpOverload`` behind a call's target, looking through the edge dialect."""
    if isinstance(target, OpOverload):
        return target
    inner = getattr(target, "_op", None)
    return inner if isinstance(inner, OpOverload) else None


class _OperatorInfo:
    """What is known of one target, found once."""

    __slots__ = ("label", "name", "parameters", "positions", "target")

    def __init__(self, target: Any) -> None:
        self.target = target
        self.name = _name(target)
        self.label = getattr(target, "__name__", self.name).replace(".", "_")
        self.parameters = _parameters(target)
        self.positions = {each.name: i for i, each in enumerate(self.parameters or ())}


# Keyed by identity, because hashing an OpOverload runs Python code; the value keeps it alive.
_KNOWN: dict[int, _OperatorInfo] = {}


def _info(target: Any) -> _OperatorInfo:
    found = _KNOWN.get(id(target))
    if found is None:
        found = _OperatorInfo(target)
        if not isinstance(target, str):
            _KNOWN[id(target)] = found
    return found


def _name(target: Any) -> str:
    overload = overload_of(target)
    if overload is not None:
        name = overload.overloadpacket._qualified_op_name.replace("::", ".")
        return _VIEW_COPIES.get(name, name)
    if isinstance(target, HigherOrderOperator):
        return f"higher_order.{target.name()}"
    if isinstance(target, str):
        return target
    module = getattr(target, "__module__", "").lstrip("_")
    return f"{module}.{getattr(target, '__name__', target)}"


def _parameters(target: Any) -> tuple[Parameter, ...] | None:
    overload = overload_of(target)
    if overload is None:
        return None
    return tuple(
        Parameter(a.name, not a.has_default_value(), a.default_value)
        for a in overload._schema.arguments
    )


def operator_name(target: Any) -> str:
    """Return the name that patterns use for ``target``: ``"aten.mul"`` for ``aten.mul.Tensor``.

    Overloads, the edge dialect's wrappers and its ``*_copy`` view operators share one name; plain
    Python functions are named by their module (``"operator.getitem"``).
    """
    return _info(target).name


def node_label(target: Any) -> str:
    """Return the name that a new call of ``target`` gets, as FX forms it: ``"mul_tensor"``."""
    return _info(target).label


def parameters(target: Any) -> tuple[Parameter, ...] | None:
    """Return the schema's parameters in order, or None for a target without a schema."""
    return _info(target).parameters


def argument(node: Node, name: str) -> Any:
    """Return the argument ``name`` of a call, positional, by keyword or by the schema's default.

    Raises KeyError if the operator of ``node`` has no parameter of that name.
    """
    info, given = _info(node.target), node.args
    position = info.positions[name]
    if position < len(given):
        return given[position]
    assert info.parameters is not None, "a position comes from the parameters"
    return node.kwargs.get(name, info.parameters[position].default)


def has_parameter(target: Any, name: str) -> bool:
    """Tell whether the operator's schema has a parameter ``name``."""
    return name in _info(target).positions


def is_call(node: Any, *names: str) -> bool:
    """Tell whether ``node`` is a call of one of the operators ``names`` (``"aten.view"``)."""
    return (
        isinstance(node, Node) and node.op == "call_function" and _info(node.target).name in names
    )


def is_getitem(node: Any) -> bool:
    """Tell whether ``node`` takes one output of a call with several."""
    return isinstance(node, Node) and node.op == "call_function" and node.target is operator.getitem


def render_value(value: Any) -> str:
    """Describe a graph value in a sentence: ``mul_3 (aten.mul)``, ``placeholder p_w`` or ``2``."""
    if not isinstance(value, Node):
        return repr(value)
    if value.op == "call_function":
        return f"{value.name} ({operator_name(value.target)})"
    return f"{value.op} {value.name}"
