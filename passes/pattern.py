"""The pattern language: a plain Python function that mirrors the subgraph it matches.

A worked example. This rule finds RMSNorm as Llama spells it, with or without casts::

    aten = ops("aten")

    class FuseRmsNorm(RewriteRule):
        name = "rms-norm"

        def pattern(self, x, weight, eps):
            wide = maybe(aten.to | aten._to_copy, x)
            variance = aten.mean(aten.pow(wide, 2), axis(-1), True)
            unit = aten.mul(wide, aten.rsqrt(aten.add(variance, eps)))
            return aten.mul(weight, maybe(aten.to | aten._to_copy, unit))

        def check(self, match):
            if not isinstance(match.eps, float):
                return Refusal(f"eps is {match.eps!r}, not a number", match.anchor)
            return None

        def rewrite(self, match, editor):
            return editor.call(torch.ops.edgepass.rms_norm, match.x, match.weight, match.eps)

How a pattern reads:

- The function's parameters are values. A value matches any node or constant; wherever its name is
  used again, the very same node (or an equal constant) must be found. ``match.x`` gives it back.
- ``aten.mul(...)`` matches a call of any overload (``mul.Tensor``, ``mul.Scalar``) in any dialect.
  Arguments are compared by the operator's schema, so positional, keyword and default are one.
  **An argument that the pattern does not mention must have its default**; a final ``...`` allows
  any. add and mul match their two operands in either order.
- ``(aten.view | aten.reshape)(x, ...)`` is either operator with the same arguments.
- A pattern object used twice stands for one node: ``q = choose(x); f(q[0], q[1])`` asks both
  outputs of the same call.
- Numbers, dtypes, strings and lists are literals; a list may hold patterns (``aten.cat([a, b])``).
- ``any_of(p, q)`` is p or else q. Names bound only in the branch not taken are None.
- ``maybe(op, p)`` is p, or p wrapped in a call of op (with any further arguments).
- ``named("dq", p)`` also binds what p matches. ``attr("dims")`` is a Python constant, no node.
  ``axis(-1)`` is that dimension, however counted, alone or in a list. ``anything`` is not bound.
"""

import inspect
from collections.abc import Callable
from typing import Any

from edgepass.ops.errors import PassError
from edgepass.passes.call_pattern import Call
from edgepass.passes.pattern_terms import (
    AnyOf,
    Anything,
    Attribute,
    Axis,
    Literal,
    Named,
    Output,
    Pattern,
    Sequence,
    Value,
)


class OperatorName:
    """An operator, or several alternatives joined by ``|``; calling it makes a pattern."""

    def __init__(self, *names: str) -> None:
        self.names = names

    def __call__(self, *arguments: Any, **keywords: Any) -> Call:
        if any(each is ... for each in arguments[:-1]):
            raise PassError(f"pattern of {self.names[0]}: ... stands last, for other arguments")
        given = tuple(each if each is ... else as_pattern(each) for each in arguments)
        return Call(self.names, given, {key: as_pattern(each) for key, each in keywords.items()})

    def __or__(self, other: "OperatorName") -> "OperatorName":
        return OperatorName(*self.names, *other.names)


class OperatorNamespace:
    """Gives operators by attribute: ``ops("aten").mul``."""

    def __init__(self, namespace: str) -> None:
        self._namespace = namespace

    def __getattr__(self, name: str) -> OperatorName:
        if name.startswith("__"):
            raise AttributeError(name)
        return OperatorName(f"{self._namespace}.{name}")


def ops(namespace: str) -> OperatorNamespace:
    """Return the operators of ``namespace`` (``"aten"``, ``"torchao"``, ``"operator"``)."""
    return OperatorNamespace(namespace)


anything = Anything()


def any_of(*alternatives: Any) -> Pattern:
    """Match the first alternative that lets the whole pattern match."""
    return AnyOf(tuple(as_pattern(each) for each in alternatives))


def maybe(operator: OperatorName, value: Any) -> Pattern:
    """Match ``value``, or a call of ``operator`` on it with any further arguments."""
    value = as_pattern(value)
    return AnyOf((operator(value, ...), value))


def named(name: str, pattern: Any) -> Named:
    """Match ``pattern`` and bind what it matches to ``name``."""
    return Named(name, as_pattern(pattern))


def attr(name: str) -> Pattern:
    """Match a Python constant (no node inside) and bind it to ``name``."""
    return Attribute(name)


def axis(dimension: int) -> Pattern:
    """Match ``dimension`` of the call's first tensor, from either end, alone or in a list."""
    return Axis(dimension)


def as_pattern(value: Any) -> Pattern:
    """Turn a literal or a list of patterns into a pattern."""
    if isinstance(value, Pattern):
        return value
    if isinstance(value, (list, tuple)) and any(_mentions_pattern(each) for each in value):
        return Sequence(tuple(as_pattern(each) for each in value))
    if isinstance(value, OperatorName):
        raise PassError(f"pattern uses operator={value.names} as a value: call it, as in op(x)")
    return Literal(value)


def build_pattern(function: Callable[..., Any]) -> Pattern:
    """Call a pattern function with one value for each parameter and return its root pattern."""
    values = [Value(name) for name in inspect.signature(function).parameters]
    root = as_pattern(function(*values))
    _mark_shared(root)
    return root


def bound_names(pattern: Pattern) -> set[str]:
    """Return every name that a match of ``pattern`` may bind."""
    names: set[str] = set()
    pending, seen = [pattern], set()
    while pending:
        each = pending.pop()
        if id(each) not in seen:
            seen.add(id(each))
            pending.extend(each.children())
            if isinstance(each, (Value, Named)):
                names.add(each.name)
    return names


def anchor_names(pattern: Pattern) -> tuple[str, ...]:
    """Return the operators at which a match can be anchored. Raises PassError if unbounded."""
    if isinstance(pattern, Call):
        return pattern.names
    if isinstance(pattern, Output):
        return ("operator.getitem",)
    if isinstance(pattern, (AnyOf, Named)):
        names = [name for each in pattern.children() for name in anchor_names(each)]
        return tuple(dict.fromkeys(names))
    raise PassError(f"pattern root={pattern.describe()} is not a call: a rule needs an anchor")


def _mark_shared(root: Pattern) -> None:
    pending, seen = [root], set()
    while pending:
        each = pending.pop()
        if id(each) in seen:
            each.shared = True
            if isinstance(each, (Call, AnyOf)):  # these remember their node, the others do not
                continue
        seen.add(id(each))
        pending.extend(each.children())


def _mentions_pattern(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(_mentions_pattern(each) for each in value)
    return isinstance(value, Pattern)
