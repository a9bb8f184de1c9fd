"""The direct way into the edge dialect: which programs may take it, and the same graph as stock."""

import torch
from executorch.exir import to_edge
from torch import Tensor, nn

from edgepass.lowering.edge_forms import edge_config
from edgepass.lowering.vulkan_edge import has_direct_form, to_edge_directly
from edgepass.lowering.vulkan_rewrite import rewrite_for_vulkan
from edgepass.passes.program import WorkingProgram
from tests.lowering.vulkan_programs import Mlp, export_tokens


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.randn(4, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight)


def is_direct(function) -> bool:
    return has_direct_form(WorkingProgram(export_tokens(Function(function), 8)))


def test_the_graph_is_that_of_stock() -> None:
    program = export_tokens(Mlp(), 64)
    rewritten = [rewrite_for_vulkan(program, merge=True, half=False).program for _ in range(2)]
    stock = to_edge(rewritten[0], compile_config=edge_config()).exported_program()
    direct = to_edge_directly(rewritten[1])
    calls = [
        [node.target for node in each.graph.nodes if node.op == "call_function"]
        for each in (stock, direct)
    ]
    assert calls[0] == calls[1]


def test_operators_of_the_table_are_direct() -> None:
    assert is_direct(lambda x, w: nn.functional.silu(x) * x + torch.tanh(x))


def test_a_constant_weight_is_direct() -> None:
    assert is_direct(lambda x, w: nn.functional.linear(x, w))


def test_a_computed_weight_is_not() -> None:
    assert not is_direct(lambda x, w: nn.functional.linear(x, w + 1))


def test_gelu_is_direct_in_the_form_that_the_runtime_computes() -> None:
    assert is_direct(lambda x, w: nn.functional.gelu(x, approximate="tanh"))
    assert not is_direct(lambda x, w: nn.functional.gelu(x))


def test_five_dimensions_are_not() -> None:
    assert not is_direct(lambda x, w: x.view(1, 1, -1, 2, 4))


def test_integers_are_not() -> None:
    assert not is_direct(lambda x, w: x.to(torch.int32))


def test_a_number_beside_a_tensor_is_not() -> None:
    assert not is_direct(lambda x, w: x * 2.0)
