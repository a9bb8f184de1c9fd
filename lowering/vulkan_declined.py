"""What was given to the Vulkan runtime's fused operators, what was not, and why."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node

from edgepass.passes.targets import operator_name


class Refused(Exception):
    """A rewrite does not apply. The message is the reason, for the report; it is always caught."""


@dataclass(frozen=True)
class Fused:
    """One node that became an operator of the runtime.

    ``operator`` is edgepass's (``edgepass.linear_qta8a_qga4w``), ``runtime_operator`` the
    runtime's (``et_vk.linear_dq8ca_q4gsw``), ``weight`` the qualified name of its weight.
    """

    operator: str
    runtime_operator: str
    weight: str


@dataclass(frozen=True)
class Declined:
    """One node that stays outside the delegate.

    ``node`` is its name in the exported graph, ``operator`` its operator (``edgepass.rotary``),
    ``weight`` the qualified name of its weight (``""`` without one), ``reason`` a sentence.
    """

    node: str
    operator: str
    reason: str
    weight: str = ""

    @classmethod
    def of(cls, node: Node, refused: Refused, weight: str = "") -> Declined:
        """Record ``refused`` for ``node``."""
        return cls(node.name, operator_name(node.target), str(refused), weight)
