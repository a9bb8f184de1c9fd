"""A 16-bit value that becomes 8 bits has the 8-bit encoding, 256 times as fine."""

import torch

from edgepass.calibration.aligned_encodings import align_conversions
from edgepass.passes.quantized_values import quantized_values
from edgepass.passes.value_names import ValueNames
from tests.passes.kv_models import Chunk, chunk_and_step, quantized
from tests.passes.programs import sqnr_db


def conversions(module):
    """(wide, narrow) encodings of each value that is quantized to 8 bits behind 16."""
    values = quantized_values(module, ValueNames(module.graph))
    by_call = {call: value for value in values for call in value.calls}
    pairs = [(by_call.get(value.before), value) for value in values]
    return [
        (before.encoding, value.encoding)
        for before, value in pairs
        if before is not None and (before.encoding.bits, value.encoding.bits) == (16, 8)
    ]


def test_wide_encodings_are_256_times_as_fine_and_a_second_run_changes_nothing() -> None:
    source, _, _, _ = chunk_and_step()
    before = conversions(source)
    assert before and all(wide.scale * 256 != narrow.scale for wide, narrow in before)
    assert align_conversions(source) >= len(before)
    after = conversions(source)
    for (wide, narrow), (_, old) in zip(after, before, strict=True):
        assert narrow.difference(old) == 0
        assert wide.scale * 256 == narrow.scale and wide.zero_point == 256 * narrow.zero_point
        # Nothing that the 8 bits can hold saturates in the 16.
        assert wide.real_range()[0] <= narrow.real_range()[0]
        assert wide.real_range()[1] >= narrow.real_range()[1]
    assert align_conversions(source) == 0


def test_it_costs_no_accuracy() -> None:
    source, _, chunk, x = chunk_and_step()
    exact, before = chunk(x), source(x)
    align_conversions(source)
    for reference, old, new in zip(exact, before, source(x), strict=True):
        assert sqnr_db(reference, new) > sqnr_db(reference, old) - 0.5


def test_the_compiled_code_follows_the_graph() -> None:
    source, _, _, _ = chunk_and_step()
    before = source.code
    align_conversions(source)
    after = source.code
    source.recompile()
    assert before != after == source.code


class TwoWidths(Chunk):
    """Values that no 8-bit encoding follows."""

    def forward(self, x):
        return torch.softmax(x @ (x * 2.0).transpose(1, 2), -1) * 3.0


def test_values_that_stay_wide_are_left_alone() -> None:
    x = torch.randn(1, 4, 16, generator=torch.Generator().manual_seed(0))
    module = quantized(TwoWidths(), [(x,)])
    values = quantized_values(module, ValueNames(module.graph))
    narrow = {v.before for v in values if v.encoding.bits == 8}
    wide = {
        v.calls[0].name: v.encoding
        for v in values
        if v.encoding.bits == 16 and not set(v.calls) & narrow
    }
    align_conversions(module)
    values = quantized_values(module, ValueNames(module.graph))
    after = {value.calls[0].name: value.encoding for value in values}
    assert wide and all(each.difference(after[name]) == 0 for name, each in wide.items())


class ChangeOfSign(torch.nn.Module):
    def forward(self, x):
        quantize = torch.ops.quantized_decomposed.quantize_per_tensor.default
        dequantize = torch.ops.quantized_decomposed.dequantize_per_tensor.default
        wide = 0.25, 1000, 0, 2**16 - 1, torch.int32
        signed = 0.5, 0, -(2**15), 2**15 - 1, torch.int16
        x = dequantize(quantize(x * 2, *wide), *wide)
        return dequantize(quantize(x.transpose(0, 1), *signed), *signed)


def test_a_value_that_becomes_signed_takes_the_same_steps() -> None:
    x = torch.zeros(2, 3)
    module = torch.export.export(ChangeOfSign(), (x,)).module(check_guards=False)
    assert align_conversions(module) == 1 and align_conversions(module) == 0
    values = quantized_values(module, ValueNames(module.graph))
    found = [(v.encoding.scale.item(), v.encoding.zero_point.item()) for v in values]
    assert found == [(0.5, 32768), (0.5, 0)]
    # Both hold the same numbers, up to the ends.
    assert values[0].encoding.real_range() == values[1].encoding.real_range()
