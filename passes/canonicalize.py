"""Bring a raw exported program into the one form that the other passes match."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from edgepass.passes.cancel_views import CancelPermutations, DropView, JoinReshapes
from edgepass.passes.drop_guards import DropMetadataAssertion, DropSymbolAssertion
from edgepass.passes.drop_no_ops import DropCast, DropCopy, DropUnitFactor
from edgepass.passes.graph_pass import GraphPass, NoMatch
from edgepass.passes.pattern import anything, ops
from edgepass.passes.program import WorkingProgram
from edgepass.passes.rewriter import RewriteLog, Rewriter, RuleCount
from edgepass.passes.rule import RewriteRule
from edgepass.passes.unwrap_parameters import unwrap_parameters

aten = ops("aten")


def _dropout() -> Any:
    return aten.dropout(anything, anything, False)


@dataclass(frozen=True)
class Canonicalize(GraphPass):
    """Remove what changes nothing, unwrap quantized parameters, keep one of equal constants.

    What it does: drops metadata assertions that hold, assertions on input sizes, casts to the
    same dtype, copies, dropout in eval, factors of 1, views that keep the shape, and pairs of
    views that cancel; makes the inner tensors of a quantized parameter constants of their own;
    merges equal constants (tied tables) into one; removes calls that nothing uses.

    Before: ``linear(to(x, float32), dequantize(access_subclass_inner_tensor(p, "qdata"), ...))``
    After: ``linear(x, dequantize(p_qdata, ...))``

    Refuses when: a cast changes dtype or device; a copy, or what it copies, is changed in place;
    the strides change and a user reads strides (``view``) or is the output; an assertion guards a
    symbol that the program computes.

    Numerics: the same bits.

    Backends: all.
    """

    name: ClassVar[str] = "canonicalize"
    ensures: ClassVar[tuple[NoMatch, ...]] = (
        NoMatch(_dropout, "no dropout of an evaluated model is left"),
    )

    def rules(self) -> Sequence[RewriteRule]:
        return (
            DropMetadataAssertion(),
            DropSymbolAssertion(),
            DropCast(),
            DropCopy(),
            DropUnitFactor(),
            DropView(),
            JoinReshapes(),
            CancelPermutations(),
        )

    def run(self, program: WorkingProgram) -> RewriteLog:
        log = RewriteLog()
        unwrap_parameters(program, log)
        Rewriter(self.rules()).apply(program, log)
        merged = program.merge_equal_constants()
        erased = program.remove_dead_calls()
        program.remove_unused_constants()
        log.counts["merge-equal-constants"] = RuleCount(merged, 0, merged)
        log.counts["remove-dead-calls"] = RuleCount(erased, 0, erased)
        return log
