"""What the simulator does with signed 16-bit values: products, and changes of sign.

The reference is float64. When the library changes what it does, ``TWO_BYTE_MAX`` and
``check_conversions`` are to be looked at.
"""

import pytest
import torch
from torch import nn

from edgepass.calibration.aligned_encodings import check_conversions
from edgepass.lowering.qnn_annotation import TWO_BYTE_MAX
from edgepass.ops.errors import EncodingError
from tests.lowering.qnn_programs import needs_libraries

pytestmark = needs_libraries

_quantize = torch.ops.quantized_decomposed.quantize_per_tensor.default
_dequantize = torch.ops.quantized_decomposed.dequantize_per_tensor.default


def unsigned(scale: float, zero_point: int) -> tuple:
    return scale, zero_point, 0, 2**16 - 1, torch.int32


def signed(scale: float) -> tuple:
    return scale, 0, -(2**15), 2**15 - 1, torch.int16


def rounded(value: torch.Tensor, encoding: tuple) -> torch.Tensor:
    return _dequantize(_quantize(value, *encoding), *encoding)


class Product(nn.Module):
    """Steps of 2**-14, 1 and 2: HTP drops what is below 256 products of steps."""

    def forward(self, left, right):
        left, right = rounded(left, unsigned(2.0**-14, 32768)), rounded(right, signed(1.0))
        return rounded(left @ right, unsigned(2.0, 32768))


class ChangeOfSign(nn.Module):
    def __init__(self, source: tuple, target: tuple) -> None:
        super().__init__()
        self.source, self.target = source, target

    def forward(self, x):
        x = rounded(rounded(x, self.source).transpose(1, 2), self.source)
        return rounded(rounded(x, self.target).transpose(1, 2), self.target)


def exported(module: nn.Module, *given: torch.Tensor):
    return torch.export.export(module, given, strict=True).module(check_guards=False)


def device(module: nn.Module, given: tuple, integers: list, folder) -> torch.Tensor:
    from edgepass.lowering.qnn_lowering import lower_graphs
    from edgepass.lowering.qnn_recipes import find_chip
    from edgepass.lowering.qnn_simulator import SimulatedProgram

    graphs = {"forward": exported(module, *given)}
    path = folder / "model.pte"
    path.write_bytes(lower_graphs(graphs, {"forward": given}, find_chip("SM8650")).buffer)
    return SimulatedProgram(path).run("forward", integers)[0]


def test_a_factor_of_a_product_saturates_above_two_signed_bytes(tmp_path) -> None:
    factors = torch.tensor([32767, 32700, TWO_BYTE_MAX, 20000, -20000, -TWO_BYTE_MAX, -32768])
    held = factors.clamp(max=TWO_BYTE_MAX + 1)
    left = torch.zeros(1, 1, 8, 32)
    right = torch.zeros(1, 1, 32, 8)
    left[..., 3], right[..., 3, :7] = 1.0, factors.float()
    given = [(left * 2**14 + 32768).to(torch.uint16), right.to(torch.int16)]
    found = device(Product(), (left, right), given, tmp_path)
    assert found.dtype == torch.uint16
    steps = (found.int() - 32768)[0, 0, :, :7]
    assert (steps * 2 - held).abs().max() <= 8


@pytest.mark.parametrize(
    ("source", "target", "share", "most"),
    [
        (unsigned(1e-4, 32768), signed(1e-4), 0, 0),
        (unsigned(1e-4, 30000), signed(1.3e-4), 0.1, 1),
    ],
    ids=["aligned", "not aligned"],
)
def test_a_change_of_sign_is_exact_between_equal_steps(
    source, target, share, most, tmp_path
) -> None:
    module, x = ChangeOfSign(source, target), torch.zeros(1, 256, 256)
    check_conversions(exported(module, x))
    integers = torch.arange(2**16).reshape(x.shape)
    found = device(module, (x,), [integers.to(torch.uint16)], tmp_path)
    exact = (integers - source[1]).double() * source[0] / target[0]
    steps = found.double() - exact.round().clamp(-(2**15), 2**15 - 1)
    assert (steps != 0).double().mean() <= share and steps.abs().max() <= most


def test_steps_that_stock_takes_for_equal_are_refused() -> None:
    x = torch.zeros(1, 4, 4)
    near = exported(ChangeOfSign(unsigned(1e-6, 32768), signed(1.3e-6)), x)
    with pytest.raises(EncodingError, match=r"got quantize_\w+ with scales 1e-06 and 1.3e-06"):
        check_conversions(near)
    for allowed in (unsigned(1e-6, 32767), unsigned(1e-3, 32768), unsigned(1.3e-6, 32768)):
        check_conversions(exported(ChangeOfSign(allowed, signed(1.3e-6)), x))
