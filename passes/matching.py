"""Solves a pattern against one anchor node, and remembers how far it got when it fails."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch.fx import Node

from edgepass.passes.pattern_terms import Pattern
from edgepass.passes.refusal import Refusal
from edgepass.passes.targets import parameters, render_value

if TYPE_CHECKING:
    from edgepass.passes.program import WorkingProgram


class Search:
    """Depth-first search with backtracking over the ways in which a pattern can match.

    ``bindings`` holds values by name, and nodes by pattern object where the pattern function uses
    that object more than once. ``nodes`` are the calls matched so far. Both are undone to the
    lengths that a choice recorded when it is taken up again.
    """

    __slots__ = ("bindings", "choices", "depth", "misses", "nodes", "trail")

    def __init__(self) -> None:
        self.bindings: dict[Any, Any] = {}
        self.nodes: list[Node] = []
        self.trail: list[Any] = []
        self.choices: list[tuple] = []
        self.depth = -1
        self.misses: list[tuple[Pattern, Any, Node | None]] = []

    def bind(self, key: Any, value: Any) -> None:
        self.bindings[key] = value
        self.trail.append(key)

    def offer(
        self, pattern: Pattern, value: Any, owner: Node | None, rest: tuple, way: int
    ) -> None:
        """Register another way to match, to be taken up if the present one fails."""
        self.choices.append((pattern, value, owner, rest, way, len(self.trail), len(self.nodes)))

    def run(self, root: Pattern, anchor: Node) -> bool:
        """Match ``root`` at ``anchor``; on False, ``misses`` are the deepest failures."""
        goals: Any = (root, anchor, None, ())
        while goals:
            pattern, value, owner, rest = goals
            goals = pattern.advance(self, value, owner, rest)
            while goals is None:
                self._note_miss(pattern, value, owner)
                if not self.choices:
                    return False
                pattern, value, owner, rest, way, _, _ = self._take_choice()
                goals = pattern.retry(self, value, owner, rest, way)
        return True

    def _take_choice(self) -> tuple:
        choice = self.choices.pop()
        trail_length, node_count = choice[5:]
        while len(self.trail) > trail_length:
            del self.bindings[self.trail.pop()]
        del self.nodes[node_count:]
        return choice

    def _note_miss(self, pattern: Pattern, value: Any, owner: Node | None) -> None:
        if len(self.nodes) > self.depth:
            self.depth = len(self.nodes)
            self.misses = [(pattern, value, owner)]
        elif len(self.nodes) == self.depth:
            self.misses.append((pattern, value, owner))


class Match:
    """A matched subgraph: the values that the pattern names are attributes.

    ``anchor`` is the node at the pattern's root, ``nodes`` every matched call (the anchor first),
    ``program`` the program that holds them, ``facts`` what ``check`` derived for ``rewrite``.
    A name bound only in an alternative that was not taken is None.
    """

    anchor: Node
    nodes: tuple[Node, ...]
    program: "WorkingProgram"
    facts: dict[str, Any]

    def __init__(
        self, search: Search, anchor: Node, names: Sequence[str], program: "WorkingProgram"
    ) -> None:
        values, bound = self.__dict__, search.bindings
        for name in names:
            values[name] = bound.get(name)
        self.anchor = anchor
        nodes = search.nodes
        self.nodes = tuple(dict.fromkeys(nodes) if len(nodes) > 1 else nodes)
        self.program = program
        self.facts = {}

    def __getattr__(self, name: str) -> Any:  # reached only for what __init__ did not set
        raise AttributeError(
            f"the pattern names no value {name!r}; the match has {[*self.__dict__]}"
        )

    def __contains__(self, name: str) -> bool:
        return self.__dict__.get(name) is not None

    def sole_use(self, name: str) -> Refusal | None:
        """Refuse if the matched value ``name`` is used outside this match, too."""
        node = getattr(self, name)
        if isinstance(node, Node):
            for user in node.users:
                if user not in self.nodes:
                    return Refusal(f"{node.name} is also used by {render_value(user)}", user)
        return None


MATCH_FIELDS = frozenset(Match.__annotations__)


@dataclass(slots=True)
class NearMiss:
    """The deepest partial match of a rule at an anchor where its pattern failed.

    ``depth`` counts the calls that did match. The sentence is made on demand: most are never read.
    """

    rule: str
    anchor: Node
    depth: int
    misses: tuple[tuple[Pattern, Any, Node | None], ...]

    @property
    def _place(self) -> tuple[Any, Node | None]:
        """The found value and its user; of several, one that is a call tells most."""
        calls = [miss for miss in self.misses if getattr(miss[1], "op", "") == "call_function"]
        _, value, owner = (calls or self.misses)[0]
        return value, owner

    @property
    def node(self) -> Node:
        """The node at which the match stopped: the found value, or the call that has it."""
        value, owner = self._place
        return value if isinstance(value, Node) else owner or self.anchor

    @property
    def reason(self) -> str:
        """What was expected and what was found, as one sentence."""
        value, owner = self._place
        same_place = [miss for miss in self.misses if miss[1] is value and miss[2] is owner]
        expected = " or ".join(dict.fromkeys(pattern.describe() for pattern, _, _ in same_place))
        return f"expected {expected}{_as_argument(value, owner)}, found {render_value(value)}"


def _as_argument(value: Any, owner: Node | None) -> str:
    if owner is None:
        return ""
    schema = parameters(owner.target)
    for position, given in enumerate(owner.args):
        if given is value and schema is not None and position < len(schema):
            return f" as `{schema[position].name}` of {render_value(owner)}"
    for name, given in owner.kwargs.items():
        if given is value:
            return f" as `{name}` of {render_value(owner)}"
    return f" in {render_value(owner)}"
