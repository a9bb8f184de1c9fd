"""What stock's Vulkan lowering gets wrong, aborts on or refuses, lowered here and run.

The reference is the quantized module in eager. Each case runs in the simulator with the runtime's
arithmetic, in one loaded program with token counts that go up and down. Agreement is 66 dB or more
where one activation may round the other way, else 100.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, export
from torchao.quantization import (
    Int8DynamicActivationIntxWeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    quantize_,
)
from torchao.quantization.granularity import PerAxis, PerGroup
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.quant_primitives import MappingType

import edgepass
from edgepass.lowering.lower import LoweredProgram
from edgepass.lowering.vulkan_operators import has_operator
from edgepass.simulator.simulate import SimulatedProgram
from tests.lowering.vulkan_files import delegates
from tests.lowering.vulkan_programs import sqnr_db

_COUNTS = (6, 17, 2, 9)


def dynamic(group: Any = 32, **options: Any) -> Int8DynamicActivationIntxWeightConfig:
    granularity = PerAxis(0) if group == "row" else PerGroup(group)
    dtype = options.pop("weight_dtype", torch.int4)
    return Int8DynamicActivationIntxWeightConfig(
        weight_dtype=dtype, weight_granularity=granularity, **options
    )


def weight_only(group: int, dtype: torch.dtype = torch.int4) -> IntxWeightOnlyConfig:
    return IntxWeightOnlyConfig(weight_dtype=dtype, granularity=PerGroup(group))


def quantized(module: nn.Module, config: Any) -> nn.Module:
    quantize_(module.eval(), config)
    return module


def linear(k: int = 64, n: int = 16, bias: bool = False, dtype: Any = torch.float32) -> nn.Module:
    torch.manual_seed(k + n)
    return nn.Sequential(nn.Linear(k, n, bias=bias)).to(dtype)


def rows(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (torch.randn(*shape, generator=generator) * scale).to(dtype)


def lower(module: nn.Module, x: Tensor, **options: Any) -> LoweredProgram:
    """Lower a module of one ``[.., tokens, K]``, and check that a device could load it."""
    dims = ({x.dim() - 2: Dim("tokens", min=1, max=31)},)
    with torch.no_grad():
        program = export(module, (x,), dynamic_shapes=dims)
    lowered = edgepass.lower(program, backend="vulkan", **options)
    found = delegates(lowered.buffer)
    assert all(has_operator(name) for each in found for name in each.operators)
    return lowered


def agreement(
    module: nn.Module, make: Callable[[int], Tensor], wanted: nn.Module | None = None
) -> tuple[float, LoweredProgram]:
    """The worst agreement in dB over all token counts, and the lowered program."""
    lowered = lower(module, make(_COUNTS[0]))
    simulated, reference, found = SimulatedProgram(lowered.buffer), wanted or module, []
    for count in _COUNTS:
        x = make(count)
        with torch.no_grad():
            expected = reference(x)
        (got,) = simulated.run([x])
        assert got.shape == expected.shape
        assert got.dtype == expected.dtype
        found.append(sqnr_db(got, expected))
    return min(found), lowered


def is_whole(lowered: LoweredProgram) -> bool:
    report = lowered.report
    whole = report["delegates"] == {"forward": 1} and report["outside_delegates"]["forward"] == {}
    return whole and report["linears"]["unfused"] == []


@pytest.mark.parametrize("group", [96, 100, 256, 512, "row"])
def test_long_groups(group: int | str) -> None:
    k = 384 if group == "row" else 2 * int(group)
    decibels, lowered = agreement(quantized(linear(k), dynamic(group)), lambda m: rows(1, m, k))
    assert decibels >= 66
    assert is_whole(lowered)


@pytest.mark.parametrize("n", [12, 20, 13, 1])
def test_output_features_that_are_no_multiple_of_8(n: int) -> None:
    module = quantized(linear(n=n, bias=True), dynamic())
    decibels, lowered = agreement(module, lambda m: rows(1, m, 64))
    assert decibels >= 66
    assert is_whole(lowered)


def test_asymmetric_weights() -> None:
    module = quantized(linear(), dynamic(weight_mapping_type=MappingType.ASYMMETRIC))
    decibels, lowered = agreement(module, lambda m: rows(1, m, 64))
    assert decibels >= 66
    assert is_whole(lowered)


@pytest.mark.parametrize("lead", [(2,), (2, 3)])
def test_batches(lead: tuple[int, ...]) -> None:
    for config in (dynamic(), weight_only(32)):
        module = quantized(linear(bias=True), config)
        decibels, lowered = agreement(module, lambda m: rows(*lead, m, 64))
        assert decibels >= 66
        assert is_whole(lowered)


def test_half_precision_scales_in_a_float_model() -> None:
    module = quantized(linear(), dynamic())
    weight = module[0].weight
    scale = weight.scale.to(torch.float16)
    weight.scale = scale.to(torch.float32)
    wanted, lowered = agreement(module, lambda m: rows(1, m, 64))
    weight.scale = scale
    decibels = agreement(module, lambda m: rows(1, m, 64))[0]
    assert min(wanted, decibels) >= 66
    assert is_whole(lowered)


def test_a_half_precision_model_with_bias() -> None:
    module = quantized(linear(bias=True, dtype=torch.float16), dynamic())
    decibels, lowered = agreement(module, lambda m: rows(1, m, 64, dtype=torch.float16))
    assert decibels >= 40
    assert is_whole(lowered)


@pytest.mark.parametrize("scale", [1e-6, 1e-4, 1e-8])
def test_rows_of_small_activations(scale: float) -> None:
    module = quantized(linear(), dynamic())
    decibels, lowered = agreement(module, lambda m: rows(1, m, 64, scale=scale))
    assert decibels >= 66
    assert is_whole(lowered)


@pytest.mark.parametrize("group", [50, 2, 10])
def test_groups_that_are_no_multiple_of_4(group: int) -> None:
    for config in (dynamic(group), weight_only(group)):
        module = quantized(linear(100), config)
        decibels, lowered = agreement(module, lambda m: rows(1, m, 100))
        assert decibels >= 66
        assert is_whole(lowered)


@pytest.mark.parametrize("k", [50, 63, 3])
def test_input_features_that_are_no_multiple_of_4(k: int) -> None:
    module = quantized(linear(k), dynamic("row"))
    decibels, lowered = agreement(module, lambda m: rows(1, m, k))
    assert decibels >= 66
    assert is_whole(lowered)


class Viewing(nn.Module):
    """A linear with views of the user's own behind it."""

    def __init__(self, rank: int):
        super().__init__()
        self.linear, self.rank = linear()[0], rank

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        if self.rank == 3:
            return y.view(1, -1, 4, 4).transpose(1, 2)
        return y.view(-1, 4, 4).transpose(0, 1)


@pytest.mark.parametrize("rank", [2, 3])
def test_views_behind_a_linear(rank: int) -> None:
    module = quantized(Viewing(rank), dynamic())
    decibels, lowered = agreement(module, lambda m: rows(*[1, m, 64][3 - rank :]))
    assert decibels >= 66
    assert is_whole(lowered)


class Twice(nn.Module):
    """One module used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = linear(64, 64, bias=True)[0]

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(torch.relu(self.linear(x)))


def test_a_module_used_twice_is_packed_once() -> None:
    decibels, lowered = agreement(quantized(Twice(), dynamic()), lambda m: rows(1, m, 64))
    assert decibels >= 30  # of two layers: an activation of the second may round the other way
    assert is_whole(lowered)
    (found,) = delegates(lowered.buffer)
    weights = found.arguments("et_vk.linear_dq8ca_q4gsw.default")
    for place in (3, 4, 5):
        keys = {found.graph.constants[each[place].constant_id].named_key for each in weights}
        assert len(keys) == 1


@pytest.mark.parametrize(
    "config",
    [
        dynamic(weight_dtype=torch.int8),
        dynamic(weight_dtype=torch.int5),
        dynamic(weight_dtype=torch.int6),
        weight_only(32, torch.int8),
        Int8WeightOnlyConfig(),
    ],
)
def test_weights_beyond_4_bits_stay_float_with_a_reason(config: Any) -> None:
    decibels, lowered = agreement(quantized(linear(), config), lambda m: rows(1, m, 64))
    assert decibels >= 100
    (row,) = lowered.report["linears"]["unfused"]
    assert row["reason"]


@pytest.mark.parametrize("per_channel", [True, False])
def test_pt2e_dynamic_quantization(per_channel: bool) -> None:
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )

    x = rows(1, 6, 64)
    config = get_symmetric_quantization_config(is_per_channel=per_channel, is_dynamic=True)
    with torch.no_grad():
        prepared = prepare_pt2e(
            export(linear(), (x,)).module(), XNNPACKQuantizer().set_global(config)
        )
        prepared(x)
        module = convert_pt2e(prepared)
        lowered = edgepass.lower(export(module, (x,)), backend="vulkan")
        wanted = module(x)
    assert all(has_operator(name) for each in delegates(lowered.buffer) for name in each.operators)
    assert sqnr_db(SimulatedProgram(lowered.buffer).run([x])[0], wanted) >= 100
    (row,) = lowered.report["linears"]["unfused"]
    assert row["reason"]


class Float32Twin(nn.Module):
    """A quantized bfloat16 linear computed in float32, the result rounded once."""

    def __init__(self, narrow: nn.Module):
        super().__init__()
        weight = narrow.weight
        scales = weight.scale.float().repeat_interleave(weight.block_size[1], 1)
        self.weight, self.bias = weight.qdata * scales, narrow.bias.float()

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(quantize(x.float()), self.weight, self.bias).bfloat16()


def test_bfloat16_is_computed_in_float32() -> None:
    module = quantized(linear(bias=True, dtype=torch.bfloat16), dynamic())
    twin = Float32Twin(module[0])
    decibels, lowered = agreement(module, lambda m: rows(1, m, 64, dtype=torch.bfloat16), twin)
    assert decibels >= 66
    assert lowered.report["delegates"] == {"forward": 1}
    assert lowered.report["outside_delegates"]["forward"] == {"aten::_to_copy": 2}


def quantize(x: Tensor) -> Tensor:
    """Rows rounded to int8 and back."""
    q, scale, zero = torch.ops.edgepass.quantize_per_token(x)
    return (q.float() - zero.unsqueeze(-1)) * scale.unsqueeze(-1)
