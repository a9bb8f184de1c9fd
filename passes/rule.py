"""A rewrite rule: the subgraph it looks for, the conditions, and what takes its place."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from torch.fx import Node

from edgepass.ops.errors import PassError
from edgepass.passes.matching import MATCH_FIELDS, Match, NearMiss, Search
from edgepass.passes.pattern import anchor_names, bound_names, build_pattern
from edgepass.passes.refusal import Refusal

__all__ = ["CompiledRule", "Refusal", "RewriteRule"]

if TYPE_CHECKING:
    from edgepass.passes.editor import Editor
    from edgepass.passes.program import WorkingProgram


class RewriteRule:
    """Base of every rule. Subclasses set ``name`` and define ``pattern`` and ``rewrite``.

    All that ``rewrite`` relies on, ``check`` has established; what it found out travels in
    ``match.facts``, never on the rule object, which one pipeline may share with another.
    """

    name: ClassVar[str]

    def pattern(self, *values: Any) -> Any:
        """Mirror the subgraph; see ``edgepass.passes.pattern``. Names are parameters."""
        raise TypeError(f"rule {type(self).__name__} defines no pattern")

    def check(self, match: Match) -> Refusal | None:
        """Return None to accept the match, or the reason to leave the graph as it is."""
        return None

    def rewrite(self, match: Match, editor: "Editor") -> Node | Mapping[Node, Node]:
        """Build the replacement of ``match.anchor``, or of several matched nodes, and return it."""
        raise TypeError(f"rule {type(self).__name__} defines no rewrite")


class CompiledRule:
    """A rule with its pattern built once, ready to be tried at any anchor."""

    def __init__(self, rule: RewriteRule) -> None:
        self.rule = rule
        self.name = rule.name
        self.root = build_pattern(rule.pattern)
        self.anchors = anchor_names(self.root)
        names = bound_names(self.root)
        taken = sorted(name for name in names if hasattr(Match, name) or name in MATCH_FIELDS)
        if taken:
            raise PassError(f"rule={rule.name} names a value {taken[0]!r}: a match has that itself")
        self._names = tuple(sorted(names))

    def match(self, anchor: Node, program: "WorkingProgram") -> Match | NearMiss:
        """Match the pattern at ``anchor``; a failure says how far it got."""
        search = Search()
        if search.run(self.root, anchor):
            return Match(search, anchor, self._names, program)
        return NearMiss(self.rule.name, anchor, search.depth, tuple(search.misses))
