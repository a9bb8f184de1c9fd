"""Patterns of calls: an operator, its arguments in schema order, and its outputs."""

from collections.abc import Iterator
from types import EllipsisType
from typing import TYPE_CHECKING, Any

from torch.fx import Node

from edgepass.passes.pattern_terms import Goals, Literal, Output, Pattern, same_constant
from edgepass.passes.targets import operator_name, parameters

if TYPE_CHECKING:
    from edgepass.passes.matching import Search

_COMMUTATIVE = frozenset(
    {
        "aten.add",
        "aten.mul",
        "aten.maximum",
        "aten.minimum",
        "aten.logical_and",
        "aten.bitwise_and",
        "operator.add",
        "operator.mul",
    }
)


class Call(Pattern):
    """A call of one of ``names`` whose arguments, put in schema order, match."""

    __slots__ = ("arguments", "keywords", "names", "open", "plans")

    def __init__(self, names: tuple[str, ...], arguments: tuple, keywords: dict) -> None:
        super().__init__()
        self.names = names
        self.open = bool(arguments) and isinstance(arguments[-1], EllipsisType)
        given = arguments[:-1] if self.open else arguments
        self.arguments: tuple[Pattern, ...] = tuple(given)
        self.keywords = keywords
        self.plans: dict[int, _Plan | None] = {}  # by identity, see targets.py

    def __getitem__(self, index: int) -> "Output":
        return Output(self, index)

    def children(self) -> Iterator[Pattern]:
        yield from self.arguments
        yield from self.keywords.values()

    def advance(self, search: "Search", value: Any, owner: Node | None, rest: tuple) -> Goals:
        if value.__class__ is not Node or value.op != "call_function":
            return None
        try:
            plan = self.plans[id(value.target)]
        except KeyError:
            plan = self.plans[id(value.target)] = _plan_call(self, value.target)
        if plan is None:
            return None
        if self.shared:
            known = search.bindings.get(self)
            if known is not None:
                return rest if known is value else None
            search.bind(self, value)
        search.nodes.append(value)
        if plan.swapped is not None:
            search.offer(self, value, owner, rest, 1)
        return plan.goals(plan.steps, search, value, rest)

    def retry(
        self, search: "Search", value: Any, owner: Node | None, rest: tuple, way: int
    ) -> Goals:
        plan = self.plans[id(value.target)]
        assert plan is not None and plan.swapped is not None, "retry of a call with one order"
        return plan.goals(plan.swapped, search, value, rest)

    def describe(self) -> str:
        return " or ".join(self.names)


class _Plan:
    """How a call pattern meets one operator: (position, name, default, pattern) per argument."""

    __slots__ = ("steps", "swapped")

    def __init__(self, steps: list[tuple], swapped: list[tuple] | None) -> None:
        self.steps, self.swapped = steps, swapped

    @staticmethod
    def goals(steps: list[tuple], search: "Search", node: Node, rest: tuple) -> Goals:
        arguments, keywords = node.args, node.kwargs
        given = len(arguments)
        for position, name, default, pattern in steps:
            value = arguments[position] if position < given else keywords.get(name, default)
            if pattern.__class__ is Literal:
                if not same_constant(pattern.value, value):
                    return (pattern, value, node, ())  # fails as a goal of its own
            else:
                rest = (pattern, value, node, rest)
        return rest


def _plan_call(call: Call, target: Any) -> _Plan | None:
    """Bind the call pattern to ``target``'s schema, or return None if it cannot be that call."""
    name = operator_name(target)
    if name not in call.names:
        return None
    schema = parameters(target)
    if schema is None:
        steps = [(i, "", None, each) for i, each in enumerate(call.arguments)]
    else:
        names = [parameter.name for parameter in schema]
        if len(call.arguments) > len(schema) or any(key not in names for key in call.keywords):
            return None
        wanted = dict(zip(names, call.arguments, strict=False)) | call.keywords
        steps = []
        for position, parameter in enumerate(schema):
            pattern = wanted.get(parameter.name)
            if pattern is None and not call.open:
                if parameter.required:
                    return None
                pattern = Literal(parameter.default)
            if pattern is not None:
                steps.append((position, parameter.name, parameter.default, pattern))
    swapped = None
    if name in _COMMUTATIVE and len(call.arguments) >= 2:
        first, second = steps[0], steps[1]
        swapped = [(*first[:3], second[3]), (*second[:3], first[3]), *steps[2:]]
    return _Plan(_cheapest_last(steps), swapped and _cheapest_last(swapped))


def _cheapest_last(steps: list[tuple]) -> list[tuple]:
    # Goals are a stack: the last pushed is tried first. Calls decide more than plain values do.
    def eagerness(step: tuple) -> int:
        return 2 if isinstance(step[3], (Call, Output)) else 1 if list(step[3].children()) else 0

    literals = [step for step in steps if isinstance(step[3], Literal)]
    others = [step for step in reversed(steps) if not isinstance(step[3], Literal)]
    return literals + sorted(others, key=eagerness)
