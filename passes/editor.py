"""What a rule's ``rewrite`` uses to put new nodes in the place of matched ones."""

import operator
from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import map_arg

from edgepass.passes.program import WorkingProgram
from edgepass.passes.targets import is_getitem, node_label

_OF_THE_VALUE = ("val", "tensor_meta", "eager_input_vals")  # metadata that describes one result


class Editor:
    """Inserts nodes before ``anchor``; each carries the anchor's metadata and the rule's name."""

    def __init__(self, program: WorkingProgram, anchor: Node, rule_name: str) -> None:
        self.program = program
        self.anchor = anchor
        self.created: list[Node] = []
        self._rule_name = rule_name

    def call(self, target: Any, *arguments: Any, like: Node | None = None, **keywords: Any) -> Node:
        """Insert a call of ``target`` (an ``OpOverload``, or a packet's ``default``).

        ``like`` names a node whose result has the same shape and dtype, which saves computing them.
        The node that ``rewrite`` returns needs none: it takes the anchor's.
        """
        if isinstance(target, torch._ops.OpOverloadPacket):
            target = target.default
        graph = self.program.graph
        # Given with the call, the arguments would be searched for symbolic sizes, and without a
        # name one is derived from the target: together they cost twice what the rest does.
        with graph.inserting_before(self.anchor):
            node = graph.call_function(target, name=node_label(target))
        # A node's own __setattr__ would file it anew under its target, which stays the same.
        object.__setattr__(node, "args", arguments)
        if keywords:
            object.__setattr__(node, "kwargs", keywords)
        meta = node.meta
        meta.update(self.anchor.meta)
        for name in _OF_THE_VALUE:
            meta.pop(name, None)
        meta["edgepass_rule"] = self._rule_name
        if like is not None and "val" in like.meta:
            meta["val"] = like.meta["val"]
        self.created.append(node)
        return node

    def outputs(self, call: Node, count: int) -> list[Node]:
        """Return the takings of a call's outputs, inserted unless they are there."""
        found = {user.args[1]: user for user in call.users if is_getitem(user)}
        return [found.get(index) or self._take(call, index) for index in range(count)]

    def _take(self, call: Node, index: int) -> Node:
        node = self.call(operator.getitem, call, index)
        if "val" in call.meta:
            node.meta["val"] = call.meta["val"][index]
        return node

    def constant(self, qualified_name: str, tensor: torch.Tensor) -> Node:
        """Add a constant tensor to the program (see ``WorkingProgram.add_constant``)."""
        return self.program.add_constant(qualified_name, tensor)

    def remove(self, node: Node) -> None:
        """Erase a call that has an effect but no users; the rewriter never does so by itself."""
        self.program.graph.erase_node(node)

    def complete_metadata(self) -> None:
        """Compute the fake value of the created nodes that have none."""
        for node in self.created:
            if not node._erased and "val" not in node.meta:
                self.program.complete_constants()
                node.meta["val"] = _fake_result(node)


def _fake_result(node: Node) -> Any:
    fake = map_arg((node.args, node.kwargs), lambda each: each.meta["val"])
    return node.target(*fake[0], **fake[1])  # type: ignore[operator]
