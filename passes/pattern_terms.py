"""What patterns are made of: one class for each kind of expectation about a graph value.

Rules are written with the functions of ``pattern.py``; this module is what those return.
"""

import operator
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch.fx import Node

if TYPE_CHECKING:
    from edgepass.passes.matching import Search

# A search's remaining work: (pattern, value, the node that uses the value, further goals).
# () is no work left, None is a dead end.
Goals = tuple | None

MISSING: Any = object()


class Pattern:
    """What a graph value must be. ``advance`` turns one goal into the goals it leaves over."""

    __slots__ = ("shared",)

    def __init__(self) -> None:
        self.shared = False  # true if the pattern function uses this object more than once

    def children(self) -> Iterator["Pattern"]:
        return iter(())

    def advance(self, search: "Search", value: Any, owner: Node | None, rest: tuple) -> Goals:
        """Return the goals left when this pattern meets ``value``, or None if it cannot match."""
        raise TypeError(f"{type(self).__name__} cannot be matched")

    def retry(
        self, search: "Search", value: Any, owner: Node | None, rest: tuple, way: int
    ) -> Goals:
        """Return the goals of the next way to match, registered with ``search.choices``."""
        raise TypeError(f"{type(self).__name__} has one way to match")

    def describe(self) -> str:
        """Say what is expected, as a noun phrase."""
        raise TypeError(f"{type(self).__name__} has no description")


class Value(Pattern):
    """A named value: binds at its first use, must be the same at the next."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def advance(self, search: "Search", value: Any, owner: Node | None, rest: tuple) -> Goals:
        known = search.bindings.get(self.name, MISSING)
        if known is MISSING:
            search.bind(self.name, value)
            return rest
        return rest if known is value or same_constant(known, value) else None

    def describe(self) -> str:
        return f"the same value as `{self.name}`"


class Attribute(Value):
    """A named Python constant: a number, dtype, string, or list without nodes."""

    __slots__ = ()

    def advance(self, search: "Search", value: Any, owner: Node | None, rest: tuple) -> Goals:
        if _holds_node(value):
            return None
        return super().advance(search, value, owner, rest)

    def describe(self) -> str:
        return f"a constant `{self.name}`"


class Anything(Pattern):
    """Any value, not bound."""

    __slots__ = ()

    def advance(self, search: "Search", value: Any, owner: Node | None, rest: tuple) -> Goals:
        return rest

    def describe(self) -> str:
        return "anything"


class Literal(Pattern):
    """One Python constant, compared by value; bool and number are kept apart."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value

    def advance(self, search: "Search", value: Any, owner: Node | None, rest: tuple) -> Goals:
        return rest if same_constant(self.value, value) else None

    def describe(self) -> str:
        return repr(self.value)


class Axis(Pattern):
    """A dimension of the owner's first tensor, counted from either end, alone or in a list."""

    __slots__ = ("dimension",)

    def __init__(self, dimension: int) -> None:
        super().__init__()
        self.dimension = dimension

    def advance(self, search: "Search", value: Any, owner: Node | None, rest: tuple) -> Goals:
        if isinstance(value, (list, tuple)):
            if len(value) != 1:
                return None
            value = value[0]
        if not isinstance(value, int) or isinstance(value, bool):
            return None
        if value == self.dimension:
            return rest
        rank = _operand_rank(owner)
        return rest if rank is not None and (value - self.dimension) % rank == 0 else None

    def describe(self) -> str:
        return f"dimension {self.dimension}"


class Sequence(Pattern):
    """A list argument whose items are patterns."""

    __slots__ = ("items",)

    def __init__(self, items: tuple[Pattern, ...]) -> None:
        super().__init__()
        self.items = items

    def children(self) -> Iterator[Pattern]:
        return iter(self.items)

    def advance(self, search: "Search", value: Any, owner: Node | None, rest: tuple) -> Goals:
        if not isinstance(value, (list, tuple)) or len(value) != len(self.items):
            return None
        for item, element in zip(reversed(self.items), reversed(value), strict=True):
            rest = (item, element, owner, rest)
        return rest

    def describe(self) -> str:
        return f"a list of {len(self.items)}"


class Output(Pattern):
    """One output of a call with several."""

    __slots__ = ("call", "index")

    def __init__(self, call: Pattern, index: int) -> None:
        super().__init__()
        self.call, self.index = call, index

    def children(self) -> Iterator[Pattern]:
        yield self.call

    def advance(self, search: "Search", value: Any, owner: Node | None, rest: tuple) -> Goals:
        if value.__class__ is not Node or value.target is not operator.getitem:
            return None
        if value.args[1] != self.index:
            return None
        search.nodes.append(value)
        return (self.call, value.args[0], value, rest)

    def describe(self) -> str:
        return f"output {self.index} of {self.call.describe()}"


class Named(Pattern):
    """Binds what the inner pattern matches to a name."""

    __slots__ = ("inner", "name")

    def __init__(self, name: str, inner: Pattern) -> None:
        super().__init__()
        self.name, self.inner = name, inner

    def children(self) -> Iterator[Pattern]:
        yield self.inner

    def __getitem__(self, index: int) -> Output:
        return Output(self, index)

    def advance(self, search: "Search", value: Any, owner: Node | None, rest: tuple) -> Goals:
        known = search.bindings.get(self.name, MISSING)
        if known is MISSING:
            search.bind(self.name, value)
        elif known is not value:
            return None
        return self.inner.advance(search, value, owner, rest)

    def retry(
        self, search: "Search", value: Any, owner: Node | None, rest: tuple, way: int
    ) -> Goals:
        return self.inner.retry(search, value, owner, rest, way)

    def describe(self) -> str:
        return self.inner.describe()


class AnyOf(Pattern):
    """The first alternative that lets the whole pattern match."""

    __slots__ = ("alternatives",)

    def __init__(self, alternatives: tuple[Pattern, ...]) -> None:
        super().__init__()
        self.alternatives = alternatives

    def children(self) -> Iterator[Pattern]:
        return iter(self.alternatives)

    def advance(self, search: "Search", value: Any, owner: Node | None, rest: tuple) -> Goals:
        if self.shared:
            known = search.bindings.get(self, MISSING)
            if known is not MISSING:
                return rest if known is value else None
            search.bind(self, value)
        return self.retry(search, value, owner, rest, 0)

    def retry(
        self, search: "Search", value: Any, owner: Node | None, rest: tuple, way: int
    ) -> Goals:
        if way + 1 < len(self.alternatives):
            search.offer(self, value, owner, rest, way + 1)
        return (self.alternatives[way], value, owner, rest)

    def describe(self) -> str:
        return " or ".join(dict.fromkeys(each.describe() for each in self.alternatives))


def same_constant(left: Any, right: Any) -> bool:
    """Compare Python constants by value; bool differs from number, list equals tuple."""
    if left.__class__ is int and right.__class__ is int:
        return bool(left == right)
    if isinstance(left, Node) or isinstance(right, Node):
        return left is right
    if isinstance(left, (list, tuple)) and isinstance(right, (list, tuple)):
        return len(left) == len(right) and all(map(same_constant, left, right))
    if isinstance(left, bool) is not isinstance(right, bool):
        return False
    return bool(left == right)


def _holds_node(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(map(_holds_node, value))
    return isinstance(value, Node)


def _operand_rank(node: Node | None) -> int | None:
    """Return the rank of a call's first tensor from its metadata, None if unknown."""
    first = node.args[0] if node is not None and node.args else None
    if isinstance(first, (list, tuple)) and first:
        first = first[0]
    fake: Any = first.meta.get("val") if isinstance(first, Node) else None
    return fake.dim() if hasattr(fake, "dim") else None
