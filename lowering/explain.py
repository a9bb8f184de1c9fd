"""What a backend will make of each linear of a fused program, told without lowering it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from edgepass.passes.explain_linears import FUSED_LINEARS, explain_linears
from edgepass.passes.program import WorkingProgram
from edgepass.passes.targets import is_call


@dataclass(frozen=True)
class Fate:
    """How a backend computes one fused linear, or the reason why it declines it."""

    how: str | None = None
    reason: str | None = None


def explain_for_backend(program: WorkingProgram, backend: str) -> list[dict[str, Any]]:
    """Return a row for each linear of a program that the fusing passes have been over.

    A row has its ``name``, whether it is ``fused``, ``how`` the backend computes it, else the
    first ``reason`` why not and the ``node`` that decides it. ``program`` may be changed.
    """
    rows = [vars(row) | {"how": None} for row in explain_linears(program)]
    nodes = [node for node in program.graph.nodes if is_call(node, *FUSED_LINEARS)]
    fates = _TELLERS[backend](program, nodes)
    fused = [row for row in rows if row["fused"]]
    for row, node, fate in zip(fused, nodes, fates, strict=True):
        row.update(how=fate.how, reason=fate.reason, fused=fate.reason is None)
        row["node"] = None if row["fused"] else node.name
    return rows


def _vulkan(program: WorkingProgram, nodes: list[Node]) -> list[Fate]:
    from edgepass.lowering.vulkan_explain import tell_linears

    return [Fate(how, reason) for how, reason in tell_linears(program, nodes)]


def _xnnpack(program: WorkingProgram, nodes: list[Node]) -> list[Fate]:
    from edgepass.lowering.xnnpack_linear import why_not

    reasons = [why_not(program, node) for node in nodes]
    ways = ["qcint8" if is_call(node, "edgepass.linear_qta8a_qc8w") else "qbint4" for node in nodes]
    return [
        Fate(None if reason else f"fully connected, qdint8 activation, {way} weight", reason)
        for reason, way in zip(reasons, ways, strict=True)
    ]


_TELLERS: dict[str, Callable[[WorkingProgram, list[Node]], list[Fate]]] = {
    "vulkan": _vulkan,
    "xnnpack": _xnnpack,
}
