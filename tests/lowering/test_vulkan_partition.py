"""What a mixed program keeps outside its Vulkan delegates, and what comes between them."""

import pytest
import torch
from torch import Tensor, nn
from torch.export import export

from edgepass.lowering import report
from edgepass.lowering.vulkan import VulkanProgram, lower_vulkan
from edgepass.simulator.simulate import simulate
from tests.lowering.vulkan_files import delegates
from tests.lowering.vulkan_programs import (
    Decoder,
    ForeignLinear,
    Mlp,
    QuantizedLinear,
    export_decoder,
    export_tokens,
    fused,
    sqnr_db,
)


class Between(nn.Module):
    """A function between two quantized linears."""

    def __init__(self, function):
        super().__init__()
        self.first, self.second = QuantizedLinear(64, 32), QuantizedLinear(32, 64, seed=1)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        h = self.function(self.first(fused.quantize_per_token(x)))
        return self.second(fused.quantize_per_token(h))


def lower(function) -> VulkanProgram:
    return lower_vulkan(export_tokens(Between(function), 64))


def outside(lowered: VulkanProgram) -> dict[str, int]:
    return report.outside_delegates(lowered.manager)["forward"]


def test_exact_gelu_stays_outside() -> None:
    lowered = lower(nn.functional.gelu)
    assert outside(lowered) == {"aten::gelu": 1}
    assert report.delegates(lowered.manager) == {"forward": 2}


def test_an_operator_that_the_runtime_lacks_stays_outside() -> None:
    assert outside(lower(torch.erf)) == {"aten::erf": 1}


def test_an_operator_that_stock_supports_is_inside() -> None:
    lowered = lower(lambda x: torch.softmax(x, dim=-1))
    assert outside(lowered) == {}
    assert report.delegates(lowered.manager) == {"forward": 1}


def test_a_declined_linear_is_outside_and_the_rest_inside() -> None:
    module = Mlp()
    module.second = ForeignLinear(96, 64, 32, bias=True)
    lowered = lower_vulkan(export_tokens(module, 64))
    assert report.delegates(lowered.manager) == {"forward": 1}
    assert outside(lowered)["aten::addmm"] == 1
    assert [each.weight for each in lowered.facts.declined] == ["second.packed"]


def test_each_delegate_reads_the_position_itself() -> None:
    decoder = Decoder(layers=2)
    decoder.layers[0].o = ForeignLinear(64, 64)
    lowered = lower_vulkan(export_decoder(decoder))
    found = delegates(lowered.buffer)
    assert len(found) == 2
    assert [each.operators.count("sdpa_with_kv_cache.default") for each in found] == [1, 1]
    for delegate in found:
        inputs = [delegate.graph.values[index].value for index in delegate.graph.input_ids]
        assert all(type(value).__name__ == "VkTensor" for value in inputs)
        for call in delegate.arguments("sdpa_with_kv_cache.default"):
            assert type(call[5]).__name__ == "SymInt"


def test_a_cache_of_declined_attention_stays_outside() -> None:
    decoder = Decoder(context=32)
    decoder.layers[0].window = 8
    lowered = lower_vulkan(export_decoder(decoder))
    assert outside(lowered)["aten::index_put"] == 2
    assert not any("sdpa" in name for each in delegates(lowered.buffer) for name in each.operators)


class Computed(nn.Module):
    """A float linear of a constant weight, and one whose weight is given."""

    def __init__(self, spelling: str) -> None:
        super().__init__()
        self.linear, self.spelling = nn.Linear(8, 12), spelling

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y = torch.asinh(self.linear(x))
        if self.spelling == "linear":
            return nn.functional.linear(y, weight, bias)
        return torch.addmm(bias, y, weight.t()) if self.spelling == "addmm" else y @ weight.t()


@pytest.mark.parametrize("spelling", ["linear", "addmm", "mm"])
def test_a_linear_of_a_computed_weight_is_decomposed_outside(spelling: str) -> None:
    module = Computed(spelling).eval()
    inputs = torch.randn(3, 8), torch.randn(16, 12), torch.randn(16)
    with torch.no_grad():
        lowered = lower_vulkan(export(module, inputs))
        wanted = module(*inputs)
    product = "aten::mm" if spelling == "mm" else "aten::addmm"
    assert outside(lowered) == {"aten::asinh": 1, product: 1}
    (got,) = simulate(lowered.buffer, inputs)
    assert sqnr_db(got, wanted) > 120


def test_a_linear_beside_what_stays_outside_is_one_operator() -> None:
    module = Computed("linear").linear
    with torch.no_grad():
        program = export(nn.Sequential(module, Asinh()), (torch.randn(3, 8),))
    (delegate,) = delegates(lower_vulkan(program).buffer)
    assert delegate.operators == ["aten.linear.default"]


class Asinh(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.asinh(x)
