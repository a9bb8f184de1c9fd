"""What is told of linears without lowering is what lowering then does."""

import pytest
import torch
from torch import Tensor, nn

from edgepass.api import explain
from edgepass.lowering.vulkan import lower_vulkan
from tests.lowering.vulkan_programs import ForeignLinear, QuantizedLinear, export_tokens, fused


class Two(nn.Module):
    """Two linears of one activation, the second asymmetric or with an encoding of its own."""

    def __init__(self, second: QuantizedLinear):
        super().__init__()
        self.first, self.second = QuantizedLinear(256, 12, 256), second

    def forward(self, x: Tensor) -> Tensor:
        quantized = fused.quantize_per_token(x)
        return torch.cat([self.first(quantized), self.second(quantized)], dim=-1)


def asymmetric() -> QuantizedLinear:
    linear = QuantizedLinear(256, 8, 32)
    linear.zeros += 3
    return linear


@pytest.mark.parametrize("backend", ["vulkan", "xnnpack"])
def test_a_declined_linear_is_told_with_its_reason_and_node(backend: str) -> None:
    program = export_tokens(Two(ForeignLinear(256, 8)), 256)
    first, second = explain(program, backend)
    assert first["name"] == "first"
    assert second["name"] == "second"
    assert not second["fused"]
    assert second["how"] is None
    assert second["reason"]
    assert second["node"] in [node.name for node in program.graph.nodes]


def test_how_a_linear_becomes_legal_on_vulkan() -> None:
    first, second = explain(export_tokens(Two(asymmetric()), 256), "vulkan")
    assert first["how"] == (
        "et_vk.linear_dq8ca_q4gsw, groups of 256 as groups of 128, 12 outputs padded to 16"
    )
    assert second["how"] == "et_vk.linear_dq8ca_q4gsw, zero points as a correction by group sums"
    assert first["fused"]
    assert first["reason"] is None


def test_what_is_told_is_what_lowering_declines() -> None:
    program = export_tokens(Two(ForeignLinear(256, 8)), 256)
    told = [row["reason"] for row in explain(program, "vulkan") if not row["fused"]]
    lowered = lower_vulkan(program)
    assert [each.reason for each in lowered.facts.declined] == told
