"""Why a rule declines what its pattern matched."""

from collections.abc import Callable

from torch.fx import Node


class Refusal:
    """Why a rule declines a subgraph that its pattern matched, and the node that decides it.

    ``reason`` may be given as a function that makes the sentence: most are never read.
    """

    __slots__ = ("_reason", "node")

    def __init__(self, reason: str | Callable[[], str], node: Node) -> None:
        self._reason = reason
        self.node = node

    @property
    def reason(self) -> str:
        """The sentence."""
        return self._reason if isinstance(self._reason, str) else self._reason()

    def __repr__(self) -> str:
        return f"Refusal({self.reason!r}, {self.node.name})"
