"""The direct edge form against ExecuTorch's own conversion of the same prepared program."""

import executorch.kernels.quantized  # noqa: F401
import pytest
import torch
from executorch.runtime import Runtime
from torch import nn

from edgepass.calibration.recipes import quantize_model
from edgepass.lowering import xnnpack
from edgepass.lowering.report import delegates, outside_delegates
from edgepass.lowering.vulkan import lower_vulkan
from edgepass.models.decoder import StaticCacheDecoder, export_decoder
from edgepass.ops.errors import ProgramError
from edgepass.passes.pipelines import fusion_pipeline
from tests.models.tiny_models import tiny_model

CONTEXT = 24


def _fused(family: str = "llama"):
    model = tiny_model(family)
    decoder = StaticCacheDecoder(model, CONTEXT)
    quantize_model(model, "8da4w", 32)
    return fusion_pipeline().run(export_decoder(decoder)).program


def _run(manager, steps):
    program = Runtime.get().load_program(manager.buffer)
    method = program.load_method("forward")
    return [method.execute(list(step))[0].clone() for step in steps]


def _steps():
    torch.manual_seed(3)
    position, steps = 0, []
    for count in (5, 1, 9, 1, 2):
        steps.append((torch.randint(0, 96, (1, count)), torch.tensor([position])))
        position += count
    return steps


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_the_program_is_the_one_that_stock_makes(family, monkeypatch) -> None:
    fused = _fused(family)
    direct, _ = xnnpack.lower_xnnpack(fused)
    monkeypatch.setattr(xnnpack, "has_direct_form", lambda program: False)
    stock, _ = xnnpack.lower_xnnpack(fused)
    assert delegates(direct) == delegates(stock)
    assert outside_delegates(direct) == outside_delegates(stock)
    for mine, theirs in zip(_run(direct, _steps()), _run(stock, _steps()), strict=True):
        assert torch.equal(mine, theirs)


class Bits(nn.Module):
    """The magnitude of a linear's outputs, by their sign bits."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(32, 8)

    def forward(self, x):
        return (self.linear(x).view(torch.int32) & 0x7FFFFFFF).view(torch.float32)


def test_a_view_of_the_bits_is_no_reshape() -> None:
    module, x = Bits(), torch.randn(3, 32)
    fused = fusion_pipeline().run(torch.export.export(module, (x,))).program
    prepared, _ = xnnpack.prepare_for_xnnpack(fused)
    assert torch.equal(prepared.module()(x), module(x))
    assert outside_delegates(xnnpack.lower_xnnpack(fused)[0])["forward"]["aten::view_copy"] == 2


def test_a_decoder_is_not_traced_again(monkeypatch) -> None:
    def fail(*args, **kwargs):
        raise AssertionError("stock's conversion was asked for")

    monkeypatch.setattr(xnnpack, "to_edge_transform_and_lower", fail)
    assert delegates(xnnpack.lower_xnnpack(_fused())[0]) == {"forward": 4}


class Summed(nn.Module):
    """An operator without a direct form, between two linears."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x):
        return self.two(torch.cumsum(self.one(x), dim=-1))


class Scaled(nn.Module):
    """A product of two dtypes, which stock promotes."""

    def forward(self, x):
        return x * torch.arange(4)


@pytest.mark.parametrize(("module", "width"), [(Summed(), 32), (Scaled(), 4)])
def test_any_other_program_goes_through_stock(module, width) -> None:
    x = torch.randn(3, width)
    manager, _ = xnnpack.lower_xnnpack(torch.export.export(module, (x,)))
    (result,) = _run(manager, [(x,)])
    torch.testing.assert_close(result, module(x), rtol=1e-5, atol=1e-5)


class Counter(nn.Module):
    """A buffer that is changed by a plain operator: stock knows how to write it back."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(4))

    def forward(self, x):
        self.total.add_(x)
        return self.total * 2.0


def test_a_changed_buffer_is_written_back() -> None:
    x = torch.ones(4)
    manager, _ = xnnpack.lower_xnnpack(torch.export.export(Counter(), (x,)))
    first, second = _run(manager, [(x,), (x,)])
    assert torch.equal(first, x * 2) and torch.equal(second, x * 4)


HALF = [torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", HALF)
def test_a_silu_that_no_kernel_has_is_spelt_out(dtype) -> None:
    module, x = nn.SiLU(), torch.randn(3, 32).to(dtype)
    manager, _ = xnnpack.lower_xnnpack(torch.export.export(module, (x,)))
    (result,) = _run(manager, [(x,)])
    torch.testing.assert_close(result, module(x), rtol=2e-2, atol=2e-2)


class Norm(nn.Module):
    """RMSNorm as Llama spells it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(32) + 0.5)

    def forward(self, x):
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
        return self.weight * wide.to(x.dtype)


@pytest.mark.parametrize("dtype", HALF)
def test_fused_operators_of_half_values_are_refused(dtype) -> None:
    module, x = Norm().to(dtype), torch.randn(2, 4, 32).to(dtype)
    fused = fusion_pipeline().run(torch.export.export(module, (x,))).program
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(ProgramError, match=f"got rms_norm.* with dtype={name}, accepted is float"):
        xnnpack.lower_xnnpack(fused)


def test_one_exported_program_is_lowered_again_and_again(monkeypatch) -> None:
    fused = _fused()
    for backend in (lower_vulkan, xnnpack.lower_xnnpack, lower_vulkan):
        backend(fused)
    monkeypatch.setattr(xnnpack, "has_direct_form", lambda program: False)
    manager, _ = xnnpack.lower_xnnpack(fused)
    assert delegates(manager) == {"forward": 4}
