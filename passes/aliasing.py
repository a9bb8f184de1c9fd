"""Which values share memory with something that the program changes in place.

The raw export keeps ``aten.index_copy_`` on the cache buffers. A rewrite that reads such a buffer
later than the original did, or drops a copy of it, would change the program.
"""

from typing import Any

from torch.fx import Graph, Node

from edgepass.passes.targets import is_getitem, operator_name, overload_of


class _Aliasing:
    """The (name, position) of the arguments that a target's result may view, or that it writes."""

    __slots__ = ("viewed", "written")

    def __init__(self, target: Any) -> None:
        overload = overload_of(target)
        arguments = () if overload is None else tuple(enumerate(overload._schema.arguments))
        marked = [(a.name, i, a.alias_info) for i, a in arguments if a.alias_info is not None]
        self.written = tuple((name, i) for name, i, alias in marked if alias.is_write)
        returns = () if overload is None else overload._schema.returns
        views = any(result.alias_info is not None for result in returns)
        self.viewed = tuple((name, i) for name, i, _ in marked) if views else ()


_ALIASING: dict[int, _Aliasing] = {}  # by identity, see targets.py


def _aliasing(target: Any) -> _Aliasing:
    found = _ALIASING.get(id(target))
    if found is None:
        operator_name(target)  # keeps the target alive, so that its identity stays its own
        found = _ALIASING[id(target)] = _Aliasing(target)
    return found


_EFFECTS: dict[int, bool] = {}


def has_effect(node: Node) -> bool:
    """Tell whether a node does more than return a value. Drawing random numbers is no effect."""
    if node.op != "call_function":
        return node.op in ("placeholder", "output")
    found = _EFFECTS.get(id(node.target))
    if found is not None:
        return found
    if overload_of(node.target) is None:
        return not is_getitem(node) and node.is_impure(impure_random=False)
    operator_name(node.target)  # keeps the target alive, so that its identity stays its own
    found = _EFFECTS[id(node.target)] = node.is_impure(impure_random=False)
    return found


def _operands(node: Node, which: tuple[tuple[str, int], ...]) -> list[Node]:
    found = []
    for name, position in which:
        value = node.args[position] if position < len(node.args) else node.kwargs.get(name)
        for each in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(each, Node):
                found.append(each)
    return found


def _viewed(node: Node) -> Node | None:
    """Return the operand whose memory the result of ``node`` may be a view of."""
    if node.op != "call_function":
        return None
    if is_getitem(node):
        source = node.args[0]
        return source if isinstance(source, Node) else None
    return next(iter(_operands(node, _aliasing(node.target).viewed)), None)


class MutationTable:
    """The values of a graph that alias memory changed in place, and where it is changed."""

    def __init__(self, graph: Graph) -> None:
        self._root: dict[Node, Node] = {}
        self._writes: dict[Node, list[Node]] = {}
        for node in graph.nodes:
            if node.op == "call_function" and (written := _aliasing(node.target).written):
                for each in _operands(node, written):
                    self._writes.setdefault(self.root(each), []).append(node)

    def __bool__(self) -> bool:
        return bool(self._writes)

    def root(self, node: Node) -> Node:
        """Return the node whose memory ``node`` views (itself if it views none)."""
        chain, source = [], node
        while source not in self._root:
            chain.append(source)
            viewed = _viewed(source)
            if viewed is None:
                break
            source = viewed
        found = self._root.get(source, source)
        self._root.update(dict.fromkeys(chain, found))
        return found

    def is_changed(self, node: Node) -> bool:
        """Tell whether some call changes the memory that ``node`` views."""
        return bool(self._writes) and self.root(node) in self._writes

    def changed_roots(self) -> set[Node]:
        """Return the nodes whose memory is changed in place."""
        return set(self._writes)

    def write_between(self, node: Node, first: Node, last: Node) -> Node | None:
        """Return a call after ``first`` and before ``last`` that changes what ``node`` views."""
        for write in self._writes.get(self.root(node), ()):
            if first < write < last:
                return write
        return None
