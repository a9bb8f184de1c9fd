"""A pass: a frozen dataclass with a stable name, rules, contracts and a place in the order."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch.fx import Node

from edgepass.passes.matching import Search
from edgepass.passes.pattern import anchor_names, build_pattern
from edgepass.passes.program import WorkingProgram
from edgepass.passes.rewriter import RewriteLog, Rewriter
from edgepass.passes.rule import RewriteRule
from edgepass.passes.targets import is_call


@dataclass(frozen=True)
class Order:
    """A pass's place relative to another, and why.

    ``required`` makes a pipeline without the other pass an error.
    """

    other: str
    reason: str
    required: bool = False


@dataclass(frozen=True)
class NoMatch:
    """The contract that no node of the graph matches ``pattern``.

    ``sentence`` says it in words: ``"no aten._assert_tensor_metadata is left"``.
    """

    pattern: Callable[..., Any]
    sentence: str

    def first_violation(self, program: WorkingProgram) -> Node | None:
        """Return the first node that matches the pattern, or None if the contract holds."""
        root = build_pattern(self.pattern)
        anchors = anchor_names(root)
        for node in program.graph.nodes:
            if is_call(node, *anchors) and Search().run(root, node):
                return node
        return None


@dataclass(frozen=True)
class GraphPass:
    """Base of every pass. Options are the fields of the subclass, which is a frozen dataclass.

    ``name`` is stable (``"fuse-rms-norm"``). ``requires`` must hold before and ``ensures`` after
    it. ``after`` and ``before`` order it among others. ``agreement_db`` is the least
    signal-to-noise ratio, in dB, between a value that it rewrote and the original; infinity means
    the same bits. A pass that recomputes an activation's quantization may round a value that lies
    half-way to the other side: ``rounding_flip_db`` then bounds such a row, of which there may be
    a quarter.
    """

    name: ClassVar[str]
    requires: ClassVar[tuple[NoMatch, ...]] = ()
    ensures: ClassVar[tuple[NoMatch, ...]] = ()
    after: ClassVar[tuple[Order, ...]] = ()
    before: ClassVar[tuple[Order, ...]] = ()
    agreement_db: ClassVar[float] = float("inf")
    rounding_flip_db: ClassVar[float | None] = None

    def rules(self) -> Sequence[RewriteRule]:
        """Return the pass's rules, in the order in which they are tried at one anchor."""
        return ()

    def run(self, program: WorkingProgram) -> RewriteLog:
        """Change ``program`` and say what was done. A second run changes nothing."""
        log = Rewriter(self.rules()).apply(program)
        if log.changed:
            program.remove_unused_constants()
        return log
