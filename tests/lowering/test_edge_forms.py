"""What the direct conversions share."""

import pytest
import torch
from torch import nn

from edgepass.lowering.edge_forms import BINARY, RENAMED, edge_config, joins_one_dtype


def test_each_raw_operator_has_an_edge_form_of_the_same_arguments() -> None:
    for raw, edge in (RENAMED | BINARY).items():
        taken = [argument.name for argument in raw._schema.arguments]
        names = [argument.name for argument in edge._schema.arguments]
        assert [name.replace("size", "shape") for name in names] == [
            name.replace("size", "shape") for name in taken
        ]


def test_a_configuration_that_stock_writes_into_is_not_kept() -> None:
    edge_config()._core_aten_ops_exception_list.append(torch.ops.aten.silu.default)
    assert edge_config()._core_aten_ops_exception_list == []


class Sum(nn.Module):
    def __init__(self, other: torch.Tensor | float) -> None:
        super().__init__()
        self.other = other

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.add(x, self.other)


@pytest.mark.parametrize(
    ("other", "direct"),
    [(torch.ones(3), True), (torch.ones(3, dtype=torch.int64), False), (2.0, False)],
)
def test_promotions_are_left_to_stock(other, direct) -> None:
    program = torch.export.export(Sum(other), (torch.ones(3),))
    (call,) = [node for node in program.graph.nodes if node.op == "call_function"]
    assert joins_one_dtype(call) is direct
