"""Rewriting: counts, metadata, users, erased nodes, and what a mutation forbids."""

import pytest
import torch

from edgepass.ops.errors import PassError
from edgepass.passes.pattern import any_of, named, ops
from edgepass.passes.program import WorkingProgram
from edgepass.passes.rewriter import Rewriter
from edgepass.passes.rule import CompiledRule, Refusal, RewriteRule
from tests.passes.programs import count, export, find, reasons

aten = ops("aten")
X = torch.randn(2, 3)


class SinOfExp(RewriteRule):
    """``sin(exp(x))`` becomes ``cos(x)``: wrong numbers, but easy to see."""

    name = "sin-of-exp"

    def pattern(self, x):
        return aten.sin(named("inner", aten.exp(x)))

    def rewrite(self, match, editor):
        return editor.call(torch.ops.aten.cos, match.x)


class SoleSinOfExp(SinOfExp):
    name = "sole-sin-of-exp"

    def check(self, match):
        return match.sole_use("inner")


def rewrite(rule, function, *inputs, **buffers):
    program = WorkingProgram(export(function, inputs, **buffers))
    log = Rewriter([rule]).apply(program)
    program.graph.lint()
    return program, log


def test_a_match_is_replaced_and_counted() -> None:
    program, log = rewrite(SinOfExp(), lambda a: a.exp().sin() + a.sin(), X)
    counted = log.counts["sin-of-exp"]
    assert (counted.tried, counted.applied, counted.refused) == (2, 1, 0)
    assert (count(program, "aten.cos"), count(program, "aten.exp")) == (1, 0)
    assert log.changed


def test_a_rule_that_never_fires_is_counted_with_zeros() -> None:
    _, log = rewrite(SinOfExp(), lambda a: a.tan(), X)
    assert log.counts["sin-of-exp"].applied == 0
    assert not log.changed


def test_an_inner_value_with_other_users_is_kept() -> None:
    program, _ = rewrite(SinOfExp(), lambda a: (lambda e: e.sin() + e)(a.exp()), X)
    assert (count(program, "aten.cos"), count(program, "aten.exp")) == (1, 1)


def test_a_rule_can_demand_sole_use() -> None:
    program, log = rewrite(SoleSinOfExp(), lambda a: (lambda e: e.sin() + e)(a.exp()), X)
    assert count(program, "aten.cos") == 0
    assert reasons(log, "sole-sin-of-exp") == ["exp is also used by add (aten.add)"]
    assert log.refusals[0].node.name == "add"


def test_new_nodes_carry_the_metadata_and_the_rule() -> None:
    exported = export(lambda a: a.exp().sin(), (X,))
    anchor = find(exported, "aten.sin")[0]
    program = WorkingProgram(exported)
    Rewriter([SinOfExp()]).apply(program)
    new = find(program, "aten.cos")[0]
    assert new.meta["edgepass_rule"] == "sin-of-exp"
    assert new.meta["stack_trace"] == anchor.meta["stack_trace"]
    assert new.meta["nn_module_stack"] == anchor.meta["nn_module_stack"]
    assert new.meta["val"].shape == X.shape


class SinWithKeywords(SinOfExp):
    """A replacement that is called with a keyword."""

    name = "sin-with-keywords"

    def rewrite(self, match, editor):
        return editor.call(torch.ops.aten.clone, match.x, memory_format=torch.contiguous_format)


def test_new_nodes_are_users_of_their_inputs_and_found_by_target() -> None:
    program, _ = rewrite(SinWithKeywords(), lambda a: a.exp().sin(), X)
    target = torch.ops.aten.clone.default
    (new,) = program.graph.find_nodes(op="call_function", target=target)
    (source,) = program.user_inputs
    assert list(source.users) == [new]
    assert new.kwargs == {"memory_format": torch.contiguous_format}
    assert torch.equal(program.to_exported().module()(X), X)


def test_a_second_run_changes_nothing() -> None:
    program, _ = rewrite(SinOfExp(), lambda a: a.exp().sin(), X)
    before = str(program.graph)
    assert not Rewriter([SinOfExp()]).apply(program).changed
    assert str(program.graph) == before


def test_a_match_is_refused_across_a_write() -> None:
    def forward(a, cache):
        early = cache.exp()
        cache.add_(a)
        return early.sin() + cache

    program, log = rewrite(SinOfExp(), forward, X, cache=torch.zeros(2, 3))
    assert count(program, "aten.cos") == 0
    assert reasons(log, "sin-of-exp") == ["b_cache is read before add_ changes it in place"]


def test_a_write_before_the_match_forbids_nothing() -> None:
    def forward(a, cache):
        cache.add_(a)
        return cache.exp().sin()

    program, _ = rewrite(SinOfExp(), forward, X, cache=torch.zeros(2, 3))
    assert count(program, "aten.cos") == 1


class Undo(RewriteRule):
    name = "undo"

    def pattern(self, x):
        return any_of(aten.sin(x), aten.cos(x))

    def rewrite(self, match, editor):
        sine = match.anchor.target is torch.ops.aten.sin.default
        return editor.call(torch.ops.aten.cos if sine else torch.ops.aten.sin, match.x)


def test_rules_that_undo_each_other_are_an_error() -> None:
    with pytest.raises(PassError, match="do not settle at node="):
        rewrite(Undo(), lambda a: a.sin(), X)


class Clash(RewriteRule):
    name = "clash"

    def pattern(self, anchor):
        return aten.sin(anchor)


def test_a_value_named_like_a_field_of_the_match_is_an_error() -> None:
    with pytest.raises(PassError, match="rule=clash names a value 'anchor'"):
        CompiledRule(Clash())


class Never(SinOfExp):
    name = "never"

    def check(self, match):
        return Refusal(lambda: f"{match.anchor.name} is never taken", match.anchor)


def test_a_refusal_may_make_its_sentence_late() -> None:
    _, log = rewrite(Never(), lambda a: a.exp().sin(), X)
    assert reasons(log, "never") == ["sin is never taken"]
    assert log.counts["never"].refused == 1


def test_near_misses_are_kept() -> None:
    _, log = rewrite(SinOfExp(), lambda a: a.tan().sin(), X)
    (miss,) = log.near_misses
    assert (miss.rule, miss.anchor.name, miss.depth) == ("sin-of-exp", "sin", 1)
    assert miss.reason == "expected aten.exp as `self` of sin (aten.sin), found tan (aten.tan)"
