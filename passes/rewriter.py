"""Applies a set of rules to a program: one walk over the nodes, rules indexed by anchor."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch.fx import Node

from edgepass.ops.errors import PassError
from edgepass.passes.aliasing import MutationTable, has_effect
from edgepass.passes.editor import Editor
from edgepass.passes.matching import Match, NearMiss
from edgepass.passes.program import WorkingProgram
from edgepass.passes.rule import CompiledRule, Refusal, RewriteRule
from edgepass.passes.targets import operator_name

_REWRITES_AT_ONE_NODE = 64  # more than this at one place means that two rules undo each other


@dataclass
class RuleCount:
    """How often a rule was tried at an anchor, refused by its check, and applied."""

    tried: int = 0
    refused: int = 0
    applied: int = 0


@dataclass(slots=True)
class RefusedMatch:
    """A match that a rule's check declined at ``anchor``."""

    rule: str
    anchor: Node
    refusal: Refusal

    @property
    def reason(self) -> str:
        """Why, as a sentence."""
        return self.refusal.reason

    @property
    def node(self) -> Node:
        """The node that decided it."""
        return self.refusal.node


@dataclass(slots=True)
class Replacement:
    """One rewritten value: the name it had, the node that has taken its place, and the rule."""

    old_name: str
    new: Node
    rule: str


@dataclass
class RewriteLog:
    """What a walk did: counts of every rule (zeros too), refusals, near misses, replacements."""

    counts: dict[str, RuleCount] = field(default_factory=dict)
    refusals: list[RefusedMatch] = field(default_factory=list)
    near_misses: list[NearMiss] = field(default_factory=list)
    replacements: list[Replacement] = field(default_factory=list)

    @property
    def changed(self) -> bool:
        """Whether any rule was applied."""
        return bool(self.replacements) or any(c.applied for c in self.counts.values())


class Rewriter:
    """A set of rules, indexed by the operators at which their patterns are anchored.

    At one anchor the rules are tried in the order given, and the first that accepts wins. The walk
    goes from inputs to outputs, so a rule sees its inputs rewritten already.
    """

    def __init__(self, rules: Sequence[RewriteRule]) -> None:
        self.rules = [CompiledRule(rule) for rule in rules]
        self._index: dict[str, list[CompiledRule]] = {}
        for compiled in self.rules:
            for name in compiled.anchors:
                self._index.setdefault(name, []).append(compiled)
        self._by_target: dict[int, list[CompiledRule]] = {}  # by identity, see targets.py

    def apply(self, program: WorkingProgram, log: RewriteLog | None = None) -> RewriteLog:
        """Rewrite ``program`` wherever a rule accepts, and say what was done (in ``log``, too)."""
        log = RewriteLog() if log is None else log
        log.counts.update({compiled.name: RuleCount() for compiled in self.rules})
        mutations = program.find_mutations() or None
        for node in list(program.graph.nodes):
            if node.op == "call_function" and not node._erased and self._rules_at(node):
                self._settle(node, program, mutations, log)
        program.complete_constants()
        return log

    def _rules_at(self, node: Node) -> list[CompiledRule]:
        rules = self._by_target.get(id(node.target))
        if rules is None:
            rules = self._index.get(operator_name(node.target), [])
            self._by_target[id(node.target)] = rules
        return rules

    def _settle(
        self, node: Node, program: WorkingProgram, mutations: MutationTable | None, log: RewriteLog
    ) -> None:
        """Apply rules at ``node``, then at what they put there, until none accepts."""
        pending, rewrites = [node], 0
        while pending:
            current = pending.pop()
            if current._erased:
                continue
            created = self._rewrite_at(current, program, mutations, log)
            rewrites += created is not None
            if rewrites > _REWRITES_AT_ONE_NODE:
                raise PassError(
                    f"rules do not settle at node={current.name}: "
                    f"the last was {log.replacements[-1].rule}, expected a rewrite that ends"
                )
            if created:
                pending.extend(each for each in reversed(created) if self._rules_at(each))

    def _rewrite_at(
        self, node: Node, program: WorkingProgram, mutations: MutationTable | None, log: RewriteLog
    ) -> list[Node] | None:
        """Apply the first rule that accepts at ``node``; return the nodes it made, or None."""
        for compiled in self._rules_at(node):
            count = log.counts[compiled.name]
            count.tried += 1
            match = compiled.match(node, program)
            if isinstance(match, NearMiss):
                log.near_misses.append(match)
                continue
            crossing = None if mutations is None else _crosses_write(match, mutations)
            refusal = crossing or compiled.rule.check(match)
            if refusal is not None:
                count.refused += 1
                log.refusals.append(RefusedMatch(compiled.name, node, refusal))
                continue
            count.applied += 1
            return _replace(compiled.rule, match, log)
        return None


def _replace(rule: RewriteRule, match: Match, log: RewriteLog) -> list[Node]:
    """Run the rule's rewrite, redirect the users, and erase matched nodes that nothing uses."""
    editor = Editor(match.program, match.anchor, rule.name)
    result = rule.rewrite(match, editor)
    replaced: Mapping[Node, Node] = {match.anchor: result} if isinstance(result, Node) else result
    for old, new in replaced.items():
        if new in editor.created and "val" not in new.meta and "val" in old.meta:
            new.meta["val"] = old.meta["val"]
        old.replace_all_uses_with(new, propagate_meta=False)
        log.replacements.append(Replacement(old.name, new, rule.name))
    editor.complete_metadata()
    _erase_dead(match.nodes)
    return editor.created


def _erase_dead(nodes: Sequence[Node]) -> None:
    pending = [node for node in nodes if not node.users]
    while pending:
        node = pending.pop()
        if node.users or node._erased or has_effect(node):
            continue
        inputs = node.all_input_nodes
        node.graph.erase_node(node)
        for each in inputs:
            if not each.users and each in nodes:
                pending.append(each)


def _crosses_write(match: Match, mutations: MutationTable) -> Refusal | None:
    """Refuse a match that would read a buffer after the program has changed it."""
    for node in match.nodes:
        for source in node.all_input_nodes:
            if mutations.is_changed(source):
                write = mutations.write_between(source, node, match.anchor)
                if write is not None and write not in match.nodes:
                    return Refusal(
                        f"{source.name} is read before {write.name} changes it in place", write
                    )
    return None
