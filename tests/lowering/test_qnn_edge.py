"""The direct way to the edge dialect: the same numbers, and stock's way for anything else."""

import pytest
import torch
from torch import nn

from edgepass.lowering.qnn_edge import has_direct_form, to_edge_directly
from tests.lowering.qnn_programs import needs_libraries, quantized, tokens
from tests.passes.programs import sqnr_db


@needs_libraries
@pytest.mark.parametrize(
    ("family", "recipe"),
    [("qwen3", "16a4w_block"), ("gemma3_text", "16a4w"), ("llama", "16a8w")],
)
def test_a_decoder_goes_directly_and_computes_the_same(family, recipe) -> None:
    from executorch.backends.qualcomm._passes.qnn_pass_manager import QnnPassManager

    found = quantized(family, recipe)
    form, graph = found.forms["prefill_forward"], found.graphs["prefill_forward"]
    inputs = form.inputs(tokens(form.tokens))
    expected = graph(*inputs)
    exported = torch.export.export(graph, inputs, strict=True)
    program = QnnPassManager().transform_for_export_pipeline(exported)
    assert has_direct_form(program)
    edge = to_edge_directly(program)
    targets = {node.target for node in edge.graph.nodes if node.op == "call_function"}
    assert all(type(target).__name__ == "EdgeOpOverload" for target in targets)
    for one, other in zip(expected, edge.module()(*inputs), strict=True):
        # A convolution rounds its float sums in another order: a value of 16 bits may follow.
        assert sqnr_db(one, other) > 80


def exported(function, *inputs):
    class Model(nn.Module):
        def forward(self, *given):
            return function(*given)

    return torch.export.export(Model(), inputs)


X = torch.randn(2, 3, 4)
DIRECT = {
    "transpose": lambda x: x.transpose(0, -1),
    "a size to be inferred": lambda x: x.reshape(-1, 4),
    "softmax": lambda x: torch.softmax(x, -1),
    "sum of two": lambda x: x + x.sigmoid(),
    "a cast to the same dtype": lambda x: x.sigmoid().to(torch.float32) * x,
    "conv2d": lambda x: torch.conv2d(x[None], x.reshape(3, 2, 2, 2), padding=(1, 0), dilation=2),
}


@pytest.mark.parametrize("name", DIRECT)
def test_each_changed_call_computes_the_same(name) -> None:
    program = exported(DIRECT[name], X)
    assert has_direct_form(program)
    torch.testing.assert_close(to_edge_directly(program).module()(X), DIRECT[name](X))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x * 2.0,
        lambda x: x + x.half(),
        lambda x: x.to(torch.float16),
        lambda x: torch.softmax(x, -1, dtype=torch.float64),
        lambda x: torch.cumsum(x, 0),
        lambda x: x.split(1, 0)[0],
    ],
)
def test_anything_else_goes_stock_s_way(function) -> None:
    assert not has_direct_form(exported(function, X))


def test_a_state_that_changes_goes_stock_s_way() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(3))

        def forward(self, x):
            self.count.add_(x)
            return self.count.sigmoid()

    program = torch.export.export(Counting(), (torch.ones(3),)).run_decompositions({})
    assert not has_direct_form(program)


def test_constants_in_another_layout_go_stock_s_way() -> None:
    module = nn.Linear(3, 4)
    module.weight = nn.Parameter(torch.randn(3, 4).t())
    assert not has_direct_form(torch.export.export(module, (torch.ones(3),)))
