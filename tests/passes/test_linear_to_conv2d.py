"""Linears become convolutions of the same numbers; each near miss says why it stays."""

import pytest
import torch
from torch import nn

from edgepass.passes.linear_to_conv2d import LinearToConv2d
from tests.passes.programs import count, export, find, reasons, run_passes, sqnr_db


class Shared(nn.Module):
    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.first = nn.Linear(12, 20, bias=bias)
        self.second = nn.Linear(20, 12, bias=bias)

    def forward(self, x):
        return self.second(self.first(x).relu()) + self.first(x)[..., :12]


@pytest.mark.parametrize("shape", [(5, 12), (1, 5, 12), (3, 1, 12)])
@pytest.mark.parametrize("bias", [True, False])
def test_each_rank_and_bias(shape, bias) -> None:
    module, x = Shared(bias), torch.randn(shape)
    program, log = run_passes([LinearToConv2d()], export(module, (x,)), (x,))
    assert log.counts["convert-linear"].applied == 3
    assert count(program, "aten.linear") == 0
    result = program.to_exported().module()(x)
    assert sqnr_db(module.double()(x.double()), result) > 110


def test_the_weight_keeps_its_memory_and_its_module() -> None:
    module, x = Shared(), torch.randn(5, 12)
    program, _ = run_passes([LinearToConv2d()], export(module, (x,)), (x,))
    convolutions = find(program, "aten.conv2d")
    paths = [list(node.meta["nn_module_stack"].values())[-1][0] for node in convolutions]
    assert paths == ["first", "second", "first"]
    kernels = [program.constant(node.args[1]) for node in convolutions]
    assert kernels[0].data_ptr() == module.first.weight.data_ptr()
    assert convolutions[0].args[1] is convolutions[2].args[1]


def test_a_second_run_changes_nothing() -> None:
    x = torch.randn(5, 12)
    _, log = run_passes([LinearToConv2d(), _Again()], export(Shared(), (x,)), (x,))
    assert not log.changed


class _Again(LinearToConv2d):
    name = "again"


def test_what_is_not_a_matrix_stays() -> None:
    x = torch.randn(2, 3, 5, 12)
    _, log = run_passes([LinearToConv2d()], export(nn.Linear(12, 4), (x,)), (x,))
    assert reasons(log, "convert-linear") == ["the input has rank 4, accepted are 2 and 3"]


def test_a_computed_weight_stays() -> None:
    inputs = torch.randn(5, 12), torch.randn(4, 12)
    _, log = run_passes([LinearToConv2d()], export(torch.nn.functional.linear, inputs), inputs)
    assert reasons(log, "convert-linear") == ["the weight is not a float constant"]
