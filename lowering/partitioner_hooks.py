"""Methods of ExecuTorch's partitioners that edgepass puts in the place of stock's, and takes back.

ExecuTorch asks each partitioner three things: to transform the program before anything is
decomposed (``transform_for_pre_decomposition``, public), and later to tag nodes (``partition``).
A hook replaces one of these on the partitioner's class, so that whoever constructs a stock
partitioner gets it.
"""

from __future__ import annotations

import inspect
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from typing import Any

from torch.export import ExportedProgram
from torch.fx import Node

from edgepass.lowering.shape_symbols import settle_symbols
from edgepass.ops.errors import EdgepassError, ProgramError
from edgepass.passes.pipelines import fusion_pipeline
from edgepass.passes.program import WorkingProgram

_ABSENT: Any = object()
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Hook:
    """``replacement(stock, partitioner, program)`` takes the place of ``owner.method``.

    ``stock`` is the method that was there, ``partitioner`` the user's own instance.
    """

    owner: type
    method: str
    replacement: Callable[[Callable[..., Any], Any, ExportedProgram], Any]


class HookSet:
    """Hooks that are put in and taken out together. Safe to use from several threads."""

    def __init__(self, hooks: Callable[[], list[Hook]]) -> None:
        """``hooks`` is called when they are first wanted: it imports the backends."""
        self._make = hooks
        self._lock = threading.RLock()
        self._replaced: list[tuple[Hook, Any]] = []

    @property
    def installed(self) -> bool:
        """Whether the hooks are in."""
        return bool(self._replaced)

    def install(self) -> None:
        """Put every hook in; nothing if they are in already.

        Raises ProgramError if a partitioner no longer has a method of that form.
        """
        with self._lock:
            if self._replaced:
                return
            hooks = self._make()
            for hook in hooks:
                _check(hook)
            for hook in hooks:
                own = hook.owner.__dict__.get(hook.method, _ABSENT)
                stock = getattr(hook.owner, hook.method)
                setattr(hook.owner, hook.method, _method(hook, stock))
                self._replaced.append((hook, own))

    def remove(self) -> None:
        """Take every hook out again; nothing if they are out."""
        with self._lock:
            while self._replaced:
                hook, own = self._replaced.pop()
                if own is _ABSENT:
                    delattr(hook.owner, hook.method)
                else:
                    setattr(hook.owner, hook.method, own)


def _method(hook: Hook, stock: Callable[..., Any]) -> Callable[..., Any]:
    def method(self: Any, exported_program: ExportedProgram) -> Any:
        return hook.replacement(stock, self, exported_program)

    method.__name__ = hook.method
    return method


def _check(hook: Hook) -> None:
    stock = getattr(hook.owner, hook.method, None)
    parameters = [] if stock is None else list(inspect.signature(stock).parameters)
    if parameters != ["self", "exported_program"]:
        raise ProgramError(
            f"cannot register with this ExecuTorch: got {hook.owner.__name__}.{hook.method} of "
            f"parameters={parameters}, expected ['self', 'exported_program']; use executorch 1.5.1"
        )


def fuse_or_leave(
    program: ExportedProgram,
    backend: str,
    rewrite: Callable[[ExportedProgram], ExportedProgram],
    has_fused: Callable[[ExportedProgram], bool],
) -> ExportedProgram:
    """Return ``rewrite`` of the program fused, for the ``backend`` of that name.

    The given one, untouched, if nothing in it is fused; with a warning if something is refused.
    """
    working = WorkingProgram(program)
    try:
        with settle_symbols(program):
            fusion_pipeline().apply(working)
            fused = rewrite(working.to_exported())
    except EdgepassError as error:
        _LOG.warning("edgepass leaves a program to stock %s: %s", backend, error)
        return program
    return fused if has_fused(fused) else program


def tags_are_acyclic(program: ExportedProgram) -> bool:
    """Tell whether the tagged groups of nodes can run one after the other."""

    def place(node: Node) -> Any:
        return node.meta.get("delegation_tag", node)

    sorter: TopologicalSorter = TopologicalSorter()
    for node in program.graph.nodes:
        sources = [source for source in node.all_input_nodes if source.op == "call_function"]
        sorter.add(place(node), *{place(each) for each in sources} - {place(node)})
    try:
        sorter.prepare()
    except CycleError:
        return False
    return True
