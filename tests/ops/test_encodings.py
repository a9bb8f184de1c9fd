"""Encodings as data: what they refuse, what they represent, and how two collections differ."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from edgepass.ops.encodings import Encoding, EncodingTable, describe
from edgepass.ops.errors import EncodingError
from tests.ops.encoding_cases import RANGES, encodings, tensor_encoding


@given(encodings())
@example(Encoding(torch.tensor(39.0), torch.tensor(635), -(2**31), 2**31 - 1))
def test_the_ends_of_the_range_are_what_the_formula_says(encoding: Encoding) -> None:
    low, high = encoding.real_range()
    scale, zero = encoding.scale.double(), encoding.zero_point.double()
    torch.testing.assert_close(low.double(), scale * (encoding.quant_min - zero))
    torch.testing.assert_close(high.double(), scale * (encoding.quant_max - zero))


@pytest.mark.parametrize(("limits", "bits", "dtype"), RANGES)
def test_bits_and_dtype_follow_from_the_range(limits, bits, dtype) -> None:
    encoding = tensor_encoding(0.5, 0, limits)
    assert (encoding.bits, encoding.dtype) == (bits, dtype)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.0, 0, 0, 255), "accepted are finite positive scales"),
        ((-1.0, 0, 0, 255), "accepted are finite positive scales"),
        ((float("nan"), 0, 0, 255), "accepted are finite positive scales"),
        ((float("inf"), 0, 0, 255), "accepted are finite positive scales"),
        ((1.0, 256, 0, 255), "got zero_point=256, accepted are 0 to 255"),
        ((1.0, -1, 0, 255), "got zero_point=-1, accepted are 0 to 255"),
        ((1.0, 0, 0, 2**20), "unknown range: got 0 to 1048576"),
        ((1.0, 5, 9, 3), "unknown range: got 9 to 3"),
    ],
)
def test_impossible_encodings_are_refused(arguments, message) -> None:
    scale, zero, low, high = arguments
    with pytest.raises(EncodingError, match=message):
        Encoding(torch.tensor(scale), torch.tensor(zero), low, high)


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(EncodingError, match=r"got scale=\[3\] and zero_point=\[3\]"):
        Encoding(torch.ones(3), torch.zeros(3), -7, 7, axis=0, block=32)


@given(encodings())
def test_an_encoding_does_not_differ_from_itself(encoding: Encoding) -> None:
    assert encoding.difference(encoding) == 0
    assert EncodingTable({"x": encoding}).diff(EncodingTable({"x": encoding})) == []


def test_a_difference_names_what_and_how_much() -> None:
    first = EncodingTable({"same": tensor_encoding(1.0), "moved": tensor_encoding(1.0)})
    second = EncodingTable({"same": tensor_encoding(1.0), "moved": tensor_encoding(1.01)})
    assert first.diff(second, tolerance=0.02) == []
    (found,) = first.diff(second, tolerance=1e-4)
    assert found.name == "moved" and found.reason.startswith("differs by 0.01")


def test_names_of_one_side_and_other_kinds_are_listed() -> None:
    first = EncodingTable({"a": tensor_encoding(1.0), "b": tensor_encoding(1.0)})
    second = EncodingTable({"b": tensor_encoding(1.0, 0, (0, 65535))}, {"c": tensor_encoding(1.0)})
    found = {each.name: each.reason for each in first.diff(second, tolerance=9.0)}
    assert found["a"] == "only in the first" and found["c"] == "only in the second"
    assert "uint8" in found["b"] and "uint16" in found["b"]


def test_a_zero_point_counts_in_steps_of_the_range() -> None:
    one, other = tensor_encoding(1.0, 100), tensor_encoding(1.0, 103)
    assert one.difference(other) == pytest.approx(3 / 255)


@given(st.sampled_from([1, 4]), st.sampled_from([1, 8]))
def test_a_description_says_the_granularity(channels: int, blocks: int) -> None:
    scale = torch.ones(channels, blocks)
    text = describe(Encoding(scale, torch.zeros_like(scale), -7, 7, axis=0, block=16))
    assert text == f"int4, {channels} channels in blocks of 16, -7 to 7"
