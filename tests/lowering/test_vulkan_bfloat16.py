"""bfloat16 programs in float32: what is cast, and what keeps its dtype."""

import torch
from torch import Tensor, nn

from edgepass.lowering.vulkan_bfloat16 import widen_bfloat16
from edgepass.lowering.vulkan_graph import GraphEditor
from edgepass.lowering.vulkan_plain import is_outside
from edgepass.passes.program import WorkingProgram
from edgepass.passes.targets import is_call
from tests.lowering.vulkan_programs import EagerRun, Mlp, export_tokens, sqnr_db


class Narrow(nn.Module):
    """A parameter, a buffer, a cast and a scalar, in bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 16, dtype=torch.bfloat16))
        self.register_buffer("shift", torch.randn(8, dtype=torch.bfloat16))

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.linear(x.to(torch.bfloat16), self.weight)
        return (y + self.shift) * 2


def widened(module: nn.Module, x: Tensor) -> WorkingProgram:
    dims = ({1: torch.export.Dim("tokens", min=1, max=31)},)
    working = WorkingProgram(torch.export.export(module, (x,), dynamic_shapes=dims))
    widen_bfloat16(GraphEditor(working))
    return working


def test_only_inputs_and_outputs_stay_narrow() -> None:
    working = widened(Narrow(), torch.randn(1, 5, 16, dtype=torch.bfloat16))
    narrow = [
        node
        for node in working.graph.nodes
        if getattr(node.meta.get("val"), "dtype", None) == torch.bfloat16
    ]
    (given,) = working.user_inputs
    assert narrow == [given, working.graph.output_node().args[0][0]]
    casts = [node for node in working.graph.nodes if is_call(node, "aten.to") and is_outside(node)]
    assert len(casts) == 2


def test_the_result_is_that_of_the_float32_twin() -> None:
    module = Narrow().eval()
    x = torch.randn(1, 5, 16, dtype=torch.bfloat16)
    got = EagerRun(widened(module, x).to_exported())(x)
    y = nn.functional.linear(x.float(), module.weight.float()) + module.shift.float()
    assert got.dtype == torch.bfloat16
    assert sqnr_db(got, (y * 2).bfloat16()) > 60


def test_the_users_program_keeps_its_tensors() -> None:
    module = Narrow()
    widened(module, torch.randn(1, 5, 16, dtype=torch.bfloat16))
    assert module.weight.dtype == module.shift.dtype == torch.bfloat16


def test_other_programs_are_left_alone() -> None:
    working = WorkingProgram(export_tokens(Mlp(), 64))
    before = str(working.graph)
    widen_bfloat16(GraphEditor(working))
    assert str(working.graph) == before
