"""The pattern language: what each construct matches, and what it does not."""

import pytest
import torch
from torch.fx import Node

from edgepass.ops.errors import PassError
from edgepass.passes.matching import Match, NearMiss
from edgepass.passes.pattern import (
    anchor_names,
    any_of,
    anything,
    attr,
    axis,
    bound_names,
    build_pattern,
    maybe,
    named,
    ops,
)
from edgepass.passes.rule import RewriteRule
from tests.passes.programs import export, match_at

aten = ops("aten")
X, Y = torch.randn(2, 3, 4), torch.randn(2, 3, 4)


def rule(pattern):
    """A rule with that pattern, which is a function of its values."""

    class Rule(RewriteRule):
        name = "test"

    Rule.pattern = staticmethod(pattern)
    return Rule()


def matches(pattern, function, *inputs, at):
    found = match_at(rule(pattern), export(function, inputs), *at)
    return isinstance(found, Match)


def bind(pattern, function, *inputs, at) -> Match:
    found = match_at(rule(pattern), export(function, inputs), *at)
    assert isinstance(found, Match), found.reason
    return found


def test_values_are_bound_by_name() -> None:
    found = bind(
        lambda x, y: aten.sub(x, aten.exp(y)), lambda a, b: a - b.exp(), X, Y, at=["aten.sub"]
    )
    assert found.x.op == found.y.op == "placeholder"
    assert found.x is not found.y


def test_a_name_used_twice_is_one_node() -> None:
    square = lambda x: aten.div(aten.exp(x), x)  # noqa: E731
    assert matches(square, lambda a: a.exp() / a, X, at=["aten.div"])
    assert not matches(square, lambda a, b: a.exp() / b, X, Y, at=["aten.div"])


@pytest.mark.parametrize("function", [lambda a, b: a.exp() * b, lambda a, b: b * a.exp()])
def test_multiplication_matches_in_either_order(function) -> None:
    found = bind(lambda x, y: aten.mul(aten.exp(x), y), function, X, Y, at=["aten.mul"])
    assert (found.x.name, found.y.name) == ("inputs_0", "inputs_1")


def test_subtraction_keeps_its_order() -> None:
    pattern = lambda x, y: aten.sub(aten.exp(x), y)  # noqa: E731
    assert not matches(pattern, lambda a, b: b - a.exp(), X, Y, at=["aten.sub"])


def test_a_choice_is_taken_back_when_the_rest_fails() -> None:
    # exp(x) * exp(x) * x: the first factor tried as `exp(y)` leaves no `y` for the other side.
    pattern = lambda x, y: aten.mul(aten.exp(x), aten.exp(aten.exp(y)))  # noqa: E731
    assert matches(pattern, lambda a: a.exp().exp() * a.exp(), X, at=["aten.mul"])


@pytest.mark.parametrize(
    "function",
    [
        lambda a: a.mean(-1, keepdim=True),
        lambda a: a.mean([2], True),
        lambda a: torch.mean(a, dim=(-1,), keepdim=True),
    ],
)
def test_positional_keyword_and_default_arguments_are_one(function) -> None:
    pattern = lambda x: aten.mean(x, axis(-1), True)  # noqa: E731
    assert matches(pattern, function, X, at=["aten.mean"])


def test_an_unmentioned_argument_must_have_its_default() -> None:
    add = lambda x, y: aten.add(x, y)  # noqa: E731
    assert matches(add, lambda a, b: a + b, X, Y, at=["aten.add"])
    assert not matches(add, lambda a, b: torch.add(a, b, alpha=2), X, Y, at=["aten.add"])
    scaled = lambda x, y: aten.add(x, y, ...)  # noqa: E731
    assert matches(scaled, lambda a, b: torch.add(a, b, alpha=2), X, Y, at=["aten.add"])


def test_axis_counts_from_either_end_and_only_the_axis() -> None:
    pattern = lambda x: aten.softmax(x, axis(-1), ...)  # noqa: E731
    assert matches(pattern, lambda a: a.softmax(2), X, at=["aten.softmax"])
    assert not matches(pattern, lambda a: a.softmax(1), X, at=["aten.softmax"])


def test_literals_keep_bool_and_number_apart() -> None:
    power = lambda x: aten.pow(x, 2)  # noqa: E731
    assert matches(power, lambda a: a.pow(2.0), X, at=["aten.pow"])
    assert not matches(power, lambda a: a.pow(3), X, at=["aten.pow"])
    keep = lambda x: aten.mean(x, axis(-1), 1)  # noqa: E731
    assert not matches(keep, lambda a: a.mean(-1, keepdim=True), X, at=["aten.mean"])


def test_alternatives_and_wrappers_are_optional() -> None:
    pattern = lambda x: aten.exp(maybe(aten.view | aten.reshape, any_of(aten.sin(x), aten.cos(x))))  # noqa: E731
    for function in (
        lambda a: a.sin().exp(),
        lambda a: a.cos().view(6, 4).exp(),
        lambda a: a.sin().reshape(24).exp(),
    ):
        assert matches(pattern, function, X, at=["aten.exp"])
    assert not matches(pattern, lambda a: a.tan().exp(), X, at=["aten.exp"])


def test_a_name_of_the_branch_not_taken_is_none() -> None:
    pattern = lambda x, bias: any_of(aten.exp(x), aten.add(aten.exp(x), bias))  # noqa: E731
    found = bind(pattern, lambda a: a.exp(), X, at=["aten.exp"])
    assert found.bias is None and "bias" not in found
    with pytest.raises(AttributeError, match="names no value 'scale'"):
        _ = found.scale


def test_attr_takes_constants_only() -> None:
    pattern = lambda x: aten.mul(x, attr("factor"))  # noqa: E731
    assert bind(pattern, lambda a: a * 3, X, at=["aten.mul"]).factor == 3
    assert not matches(pattern, lambda a, b: a * b, X, Y, at=["aten.mul"])


def test_lists_hold_patterns() -> None:
    pattern = lambda x, y: aten.cat([aten.neg(x), y], axis(-1))  # noqa: E731
    assert matches(pattern, lambda a, b: torch.cat((-a, b), -1), X, Y, at=["aten.cat"])
    assert not matches(pattern, lambda a, b: torch.cat((a, -b), -1), X, Y, at=["aten.cat"])
    assert not matches(pattern, lambda a, b: torch.cat((-a, b, b), -1), X, Y, at=["aten.cat"])


def _both_outputs(x):
    sizes = aten.max(x, -1)
    return aten.sub(sizes[0], sizes[1])


def test_outputs_are_those_of_one_call() -> None:
    same = lambda a: (lambda m: m[0] - m[1])(torch.max(a, -1))  # noqa: E731
    apart = lambda a: torch.max(a, -1)[0] - torch.max(a, -1)[1]  # noqa: E731
    swapped = lambda a: (lambda m: m[1] - m[0])(torch.max(a, -1))  # noqa: E731
    assert matches(_both_outputs, same, X, at=["aten.sub"])
    assert not matches(_both_outputs, apart, X, at=["aten.sub"])
    assert not matches(_both_outputs, swapped, X, at=["aten.sub"])


def _one_call_twice(x):
    inner = aten.exp(x)
    return aten.div(inner, aten.sin(inner))


def test_a_pattern_object_used_twice_is_one_node() -> None:
    shared = lambda a: (lambda e: e / e.sin())(a.exp())  # noqa: E731
    assert matches(_one_call_twice, shared, X, at=["aten.div"])
    assert not matches(_one_call_twice, lambda a: a.exp() / a.exp().sin(), X, at=["aten.div"])


def test_named_binds_an_inner_value() -> None:
    found = bind(
        lambda x: aten.exp(named("inner", aten.sin(x))), lambda a: a.sin().exp(), X, at=["aten.exp"]
    )
    assert isinstance(found.inner, Node)
    assert [node.name for node in found.nodes] == ["exp", "sin"]


def test_anything_matches_and_binds_nothing() -> None:
    assert matches(lambda x: aten.add(x, anything), lambda a: a + 5, X, at=["aten.add"])


def test_the_deepest_miss_says_what_was_expected_and_found() -> None:
    pattern = lambda x: aten.mul(x, aten.rsqrt(aten.add(aten.mean(x, axis(-1), True), attr("e"))))  # noqa: E731
    found = match_at(
        rule(pattern),
        export(lambda a: a * torch.rsqrt(a.sum(-1, keepdim=True) + 1), (X,)),
        "aten.mul",
    )
    assert isinstance(found, NearMiss)
    assert found.reason == "expected aten.mean as `self` of add (aten.add), found sum_1 (aten.sum)"
    assert found.node.name == "sum_1"
    assert found.depth == 3


def test_a_root_without_an_operator_is_an_error() -> None:
    with pytest.raises(PassError, match="needs an anchor"):
        anchor_names(build_pattern(lambda x: x))
    with pytest.raises(PassError, match="call it"):
        build_pattern(lambda x: aten.mul(x, aten.exp))
    with pytest.raises(PassError, match="stands last"):
        build_pattern(lambda x: aten.mul(..., x))


def test_anchors_and_names_are_found_through_alternatives() -> None:
    root = build_pattern(
        lambda x: any_of(aten.mm(x, named("w", aten.t(x))), (aten.t | aten.exp)(x))
    )
    assert anchor_names(root) == ("aten.mm", "aten.t", "aten.exp")
    assert bound_names(root) == {"x", "w"}
