"""Pipelines: order checked when built, passes measured, verified and dumped when run."""

from dataclasses import dataclass

import pytest
import torch

from edgepass.ops.errors import PassError, VerificationError
from edgepass.passes.graph_pass import GraphPass, NoMatch, Order
from edgepass.passes.pattern import ops
from edgepass.passes.pipeline import Pipeline
from edgepass.passes.rule import RewriteRule
from tests.passes.programs import count, export

aten = ops("aten")
X = torch.randn(2, 3)


class Square(RewriteRule):
    """``pow(x, 2)`` becomes ``x * x``."""

    name = "square"

    def pattern(self, x):
        return aten.pow(x, 2)

    def rewrite(self, match, editor):
        return editor.call(torch.ops.aten.mul.Tensor, match.x, match.x)


class Cube(Square):
    """A wrong rule: ``pow(x, 3)`` becomes ``x * x``."""

    name = "cube"

    def pattern(self, x):
        return aten.pow(x, 3)


@dataclass(frozen=True)
class ReplaceSquares(GraphPass):
    name = "replace-squares"
    agreement_db = 120.0
    ensures = (NoMatch(lambda: aten.pow(...), "no power is left"),)

    def rules(self):
        return (Square(),)


@dataclass(frozen=True)
class ReplaceCubes(ReplaceSquares):
    name = "replace-cubes"
    ensures = ()

    def rules(self):
        return (Cube(),)


@dataclass(frozen=True)
class First(GraphPass):
    name = "first"
    before = (Order("last", "it goes first"),)


@dataclass(frozen=True)
class Last(GraphPass):
    name = "last"
    after = (Order("first", "it needs the first's result", required=True),)
    requires = (NoMatch(lambda x: aten.sin(x), "no sine is left"),)


def test_passes_run_in_order_and_are_reported() -> None:
    exported = export(lambda a: a.pow(2), (X,))
    result = Pipeline([ReplaceSquares(), ReplaceCubes()]).run(exported)
    assert [each.name for each in result.report.passes] == ["replace-squares", "replace-cubes"]
    report = result.report["replace-squares"]
    assert report.log.counts["square"].applied == 1
    assert report.seconds > 0 and report.nodes_before == report.nodes_after
    assert result.report.never_applied() == ["replace-cubes/cube"]
    assert torch.equal(result.program.module()(X), X * X)


def test_all_violations_of_the_order_come_in_one_error() -> None:
    with pytest.raises(PassError) as caught:
        Pipeline([Last(), First(), First()])
    message = str(caught.value)
    assert "first is listed twice" in message
    assert "last must come after first: it needs the first's result" in message
    assert "first must come before last: it goes first" in message


def test_a_required_pass_must_be_there() -> None:
    with pytest.raises(PassError, match="last needs first: it needs"):
        Pipeline([Last()])


def test_a_mode_removes_passes_and_keeps_the_order() -> None:
    pipeline = Pipeline([First(), ReplaceSquares(), Last()])
    assert pipeline.without("replace-squares").names == ["first", "last"]
    with pytest.raises(PassError, match="cannot remove pass=fuse: the pipeline has"):
        pipeline.without("fuse")
    with pytest.raises(PassError, match="last needs first"):
        pipeline.without("first")


def test_a_broken_requirement_names_pass_contract_and_node() -> None:
    with pytest.raises(PassError, match=r"pass=last requires that no sine is left: found %sin"):
        Pipeline([First(), Last()]).run(export(lambda a: a.sin(), (X,)))


def test_a_broken_post_condition_names_the_node() -> None:
    with pytest.raises(PassError, match=r"replace-squares ensures that no power is left"):
        Pipeline([ReplaceSquares()]).run(export(lambda a: a.pow(5), (X,)))


def test_verification_names_the_first_pass_that_differs(tmp_path, monkeypatch) -> None:
    exported = export(lambda a: a.pow(2) + a.pow(3), (X,))
    pipeline = Pipeline([ReplaceCubes(), ReplaceSquares()])
    with pytest.raises(VerificationError, match=r"pass=replace-cubes changed pow_2 \(rule cube\)"):
        pipeline.run(exported, verify=True, sample_inputs=(X,))
    monkeypatch.setenv("EDGEPASS_DUMP_GRAPHS", str(tmp_path))
    with pytest.raises(VerificationError, match=r"the graph is in .*00-replace-cubes.txt"):
        pipeline.run(exported, verify=True, sample_inputs=(X,))
    assert "aten.mul.Tensor" in (tmp_path / "00-replace-cubes.txt").read_text()


def test_verification_needs_inputs() -> None:
    with pytest.raises(PassError, match="verify=True needs sample_inputs"):
        Pipeline([First()]).run(export(lambda a: a + 1, (X,)), verify=True)


def test_a_program_without_a_match_comes_back_untouched() -> None:
    exported = export(lambda a: a.exp() * 3, (X,))
    result = Pipeline([ReplaceSquares()]).run(exported)
    assert str(result.program.graph) == str(exported.graph)
    assert count(result.program, "aten.exp") == 1


def test_the_given_program_is_not_changed() -> None:
    exported = export(lambda a: a.pow(2), (X,))
    before = str(exported.graph)
    Pipeline([ReplaceSquares()]).run(exported)
    assert str(exported.graph) == before
