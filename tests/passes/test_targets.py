"""One name for an operator in every overload and dialect, one order for its arguments."""

import operator

import pytest
import torch
from executorch.exir.dialects._ops import ops as edge_ops

from edgepass.passes.targets import argument, is_call, operator_name, parameters, render_value
from tests.passes.programs import export, find

aten = torch.ops.aten


@pytest.mark.parametrize(
    ("target", "name"),
    [
        (aten.mul.Tensor, "aten.mul"),
        (aten.mul.Scalar, "aten.mul"),
        (aten.view_copy.default, "aten.view"),
        (aten.index_copy.default, "aten.index_copy"),
        (aten._to_copy.default, "aten._to_copy"),
        (edge_ops.edge.aten.mul.Tensor, "aten.mul"),
        (edge_ops.edge.aten.permute_copy.default, "aten.permute"),
        (operator.getitem, "operator.getitem"),
        (operator.mul, "operator.mul"),
        (torch.ops.higher_order.cond, "higher_order.cond"),
        ("p_weight", "p_weight"),
    ],
)
def test_names(target, name) -> None:
    assert operator_name(target) == name


def test_arguments_by_name_whatever_their_place() -> None:
    exported = export(lambda a: torch.add(a.mean([-1], True), a, alpha=2), (torch.ones(2, 3),))
    (mean,), (add,) = find(exported, "aten.mean"), find(exported, "aten.add")
    assert argument(mean, "keepdim") is True
    assert argument(mean, "dtype") is None
    assert argument(add, "alpha") == 2
    with pytest.raises(KeyError):
        argument(mean, "axis")


def test_parameters_of_a_plain_function_are_unknown() -> None:
    assert parameters(operator.mul) is None
    assert [each.name for each in parameters(aten.exp.default)] == ["self"]


def test_values_in_sentences() -> None:
    exported = export(lambda a: a.exp(), (torch.ones(2),))
    (exp,) = find(exported, "aten.exp")
    assert render_value(exp) == "exp (aten.exp)"
    assert render_value(exp.args[0]) == "placeholder inputs_0"
    assert render_value(2.5) == "2.5"
    assert not is_call(exp.args[0], "aten.exp")
