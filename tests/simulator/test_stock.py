"""Linears lowered by the stock flow: right where the runtime is right, and wrong as it is wrong.

The bounds are what the real runtime gave for linears of these kinds, in dB against the eager
quantized module; which of them applies to a shape follows from the shape.
"""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from executorch.backends.vulkan.partitioner.vulkan_partitioner import VulkanPartitioner
from executorch.exir import to_edge_transform_and_lower
from torch import nn
from torchao.quantization import (
    Int8DynamicActivationIntxWeightConfig,
    IntxWeightOnlyConfig,
    quantize_,
)
from torchao.quantization.granularity import PerAxis, PerGroup
from torchao.quantization.quant_primitives import MappingType

from edgepass.ops.errors import SimulatorError
from edgepass.simulator.simulate import SimulatedProgram
from tests.lowering.vulkan_programs import sqnr_db


@dataclass(frozen=True)
class Case:
    """A linear of K to N in groups (0: whole rows), on an input of ``lead`` rows."""

    k: int
    n: int
    group: int
    lead: tuple[int, ...] = (5,)
    bias: bool = False
    asymmetric: bool = False
    dynamic: bool = True
    dtype: torch.dtype = torch.float32
    scale_dtype: torch.dtype | None = None
    half: bool = False
    normal: bool = False

    def module(self) -> nn.Module:
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(self.k, self.n, bias=self.bias)).eval().to(self.dtype)
        if self.normal:
            nn.init.normal_(module[0].weight)
        mapping = MappingType.ASYMMETRIC if self.asymmetric else MappingType.SYMMETRIC
        groups = PerGroup(self.group) if self.group else PerAxis(0)
        scales = {"scale_dtype": self.scale_dtype} if self.scale_dtype else {}
        config: Any = IntxWeightOnlyConfig(
            weight_dtype=torch.int4, granularity=groups, mapping_type=mapping, **scales
        )
        if self.dynamic:
            config = Int8DynamicActivationIntxWeightConfig(
                weight_dtype=torch.int4,
                weight_granularity=groups,
                weight_mapping_type=mapping,
                **{f"weight_{name}": value for name, value in scales.items()},
            )
        quantize_(module, config)
        return module

    def lowered(self, module: nn.Module, x: torch.Tensor) -> SimulatedProgram:
        program = torch.export.export(module, (x,))
        options = {"force_fp16": True} if self.half else {}
        edge = to_edge_transform_and_lower(program, partitioner=[VulkanPartitioner(options)])
        return SimulatedProgram(bytes(edge.to_executorch().buffer))

    def agreement(self) -> float:
        """Simulator against the eager module, in dB."""
        module = self.module()
        x = torch.randn(*self.lead, self.k).to(self.dtype)
        return sqnr_db(self.lowered(module, x).run([x])[0], module(x))


@pytest.mark.parametrize(
    "case",
    [
        Case(128, 64, 32, bias=True),
        pytest.param(Case(256, 64, 128), marks=pytest.mark.nightly),
        pytest.param(Case(132, 64, 44), marks=pytest.mark.nightly),
        pytest.param(Case(64, 60, 64), marks=pytest.mark.nightly),
        pytest.param(Case(128, 64, 32, (1, 7)), marks=pytest.mark.nightly),
        pytest.param(Case(128, 64, 32, dynamic=False), marks=pytest.mark.nightly),
    ],
)
def test_right_cases(case: Case) -> None:
    # 66 to 76 where one activation rounds the other way.
    assert case.agreement() > 65


def test_one_token_is_weight_only() -> None:
    case = Case(128, 64, 32, (1,))
    module, x = case.module(), torch.randn(1, 128)
    found = case.lowered(module, x).run([x])[0]
    weight = module[0].weight
    weight = getattr(weight, "original_weight_tensor", weight).dequantize()
    assert sqnr_db(found, x.double() @ weight.double().t()) > 120
    assert 35 < sqnr_db(found, module(x)) < 50


@pytest.mark.nightly
@pytest.mark.parametrize(
    "case", [Case(128, 64, 32, half=True), Case(128, 64, 32, bias=True, dtype=torch.float16)]
)
def test_half_precision(case: Case) -> None:
    assert 40 < case.agreement() < 66


@pytest.mark.parametrize(
    ("case", "measured"),
    [
        # Weights as nn.Linear draws them.
        (Case(200, 64, 100, (64,)), (-29, -7)),
        pytest.param(Case(384, 64, 96, (64,)), (-29, -7), marks=pytest.mark.nightly),
        pytest.param(Case(512, 64, 256, (64,)), (-29, -7), marks=pytest.mark.nightly),
        pytest.param(Case(512, 64, 512, (16,)), (-29, -7), marks=pytest.mark.nightly),
        pytest.param(Case(256, 64, 0, (64,)), (-29, -7), marks=pytest.mark.nightly),
        pytest.param(Case(128, 60, 32, (16,)), (6, 11), marks=pytest.mark.nightly),
        # Standard normal weights. The 7 dB of the device are one draw, this is another.
        pytest.param(
            Case(256, 64, 32, (64,), asymmetric=True, normal=True),
            (7, 9),
            marks=pytest.mark.nightly,
        ),
        pytest.param(Case(100, 64, 50, (16,), normal=True), (3.7, 3.7), marks=pytest.mark.nightly),
        pytest.param(
            Case(128, 64, 32, (2, 16), dynamic=False), (2.8, 2.8), marks=pytest.mark.nightly
        ),
        pytest.param(
            Case(128, 64, 32, scale_dtype=torch.float16), (0, 0), marks=pytest.mark.nightly
        ),
    ],
)
def test_wrong_cases(case: Case, measured: tuple[float, float]) -> None:
    """Within 1 dB of what the real runtime gave, where its shapes were natural ones."""
    least, most = measured
    assert least - 1 <= case.agreement() <= most + 1


@pytest.mark.nightly
def test_a_batch_of_quantized_activations_ends_the_process_on_a_device() -> None:
    with pytest.raises(SimulatorError, match="takes one matrix"):
        Case(128, 64, 32, (2, 4)).agreement()


class Halves(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        left, right = torch.chunk(x, 2, dim=-1)
        return left * torch.sigmoid(right)


@pytest.mark.nightly
def test_a_chunk_of_fewer_tokens_keeps_its_largest_size() -> None:
    # Stock takes the example's token count for the largest one here.
    example, dynamic = (torch.randn(16, 64),), ({0: torch.export.Dim("tokens", min=1, max=16)},)
    program = torch.export.export(Halves(), example, dynamic_shapes=dynamic)
    edge = to_edge_transform_and_lower(program, partitioner=[VulkanPartitioner({})])
    simulated = SimulatedProgram(bytes(edge.to_executorch().buffer))
    x = torch.randn(16, 64)
    assert sqnr_db(simulated.run([x])[0], Halves()(x)) > 120
    fewer = simulated.run([x[:3]])[0]
    assert fewer.shape == (16, 32)
    assert sqnr_db(fewer[:3], Halves()(x[:3])) > 120
