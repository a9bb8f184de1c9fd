"""Plain aten forms against the operators that they stand for."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepass.lowering import vulkan_plain as plain
from edgepass.lowering.vulkan_plain import is_outside, mark_outside
from edgepass.ops import dequantize_groups, unpack_int4
from tests.lowering.vulkan_programs import QuantizedLinear, fused, sqnr_db


@given(st.integers(1, 4), st.integers(1, 64), st.sampled_from([0.0, 6.1e-5]), st.integers(0, 99))
def test_quantization_has_the_same_values(tokens: int, k: int, floor: float, seed: int) -> None:
    x = torch.randn(tokens, k, generator=torch.Generator().manual_seed(seed)) * 10.0 ** (seed % 5)
    got, wanted = plain.quantize_per_token(floor, x), fused.quantize_per_token(x, floor)
    assert all(map(torch.equal, got, wanted))


@given(st.booleans(), st.sampled_from([4, 32]), st.integers(0, 9))
@settings(max_examples=10)
def test_linears_have_the_same_values(bias: bool, group_size: int, seed: int) -> None:
    linear = QuantizedLinear(64, 12, group_size, bias, seed)
    linear.zeros += seed % 3
    weight = dequantize_groups(unpack_int4(linear.packed, 64), *linear.weight()[2:4], group_size)
    x = torch.randn(2, 3, 64)
    quantized = fused.quantize_per_token(x)
    assert sqnr_db(plain.linear_of_float(x, weight, linear.bias), linear.of_float(x)) > 120
    got = plain.linear_of_quantized(*quantized, weight, linear.bias)
    assert sqnr_db(got, linear(quantized)) > 120
    assert sqnr_db(plain.linear_quantizing(x, weight, linear.bias), linear(quantized)) > 120


@given(st.sampled_from([4, 8]), st.booleans())
@settings(max_examples=8)
def test_embeddings_have_the_same_values(bits: int, asymmetric: bool) -> None:
    table = QuantizedLinear(64, 10)
    zeros = table.zeros + 1 if asymmetric else None
    unpacked = unpack_int4(table.packed, 64)
    stored = table.packed if bits == 4 else unpacked
    ids = torch.tensor([[1, 9, 0]])
    got = plain.embedding(32, unpacked, table.scales, zeros, ids)
    assert torch.equal(got, fused.embedding_qg(stored, table.scales, zeros, 32, bits, ids))


@given(st.booleans(), st.sampled_from([2, 8, 16]), st.sampled_from([2, 3, 4]))
def test_rotations_have_the_same_values(interleaved: bool, width: int, rank: int) -> None:
    x = torch.randn(1, 3, 5, 16)
    cos, sin = torch.randn(5, width), torch.randn(5, width)
    for _ in range(rank - 2):
        cos, sin = cos[None], sin[None]
    got = plain.rotary(interleaved, x, cos, sin)
    assert sqnr_db(got, fused.rotary(x, cos, sin, interleaved)) > 120


def test_norms_have_the_same_values() -> None:
    x, weight = torch.randn(2, 3, 32), torch.randn(32)
    assert sqnr_db(plain.rms_norm(1e-6, x, weight), fused.rms_norm(x, weight, 1e-6)) > 120


@given(st.integers(0, 5), st.integers(1, 5))
def test_position_rows_are_the_same(start: int, length: int) -> None:
    table, position = torch.randn(10, 4), torch.tensor([start])
    wanted = fused.position_rows(table, position, length)
    assert torch.equal(plain.position_rows(length, table, position), wanted)


@given(st.integers(0, 6), st.integers(1, 6), st.integers(0, 5), st.sampled_from([1, 2, 4]))
@settings(max_examples=10)
@pytest.mark.parametrize("cap", [0.0, 0.5])
def test_attention_has_the_same_values(
    cap: float, start: int, tokens: int, window: int, kv: int
) -> None:
    q = torch.randn(1, 4, tokens, 8)
    keys, values = torch.randn(1, kv, 12, 8), torch.randn(1, kv, 12, 8)
    position = torch.tensor([start])
    wanted = fused.cached_attention(q, keys, values, position, 0.3, window, cap)
    got = plain.cached_attention(0.3, window, cap, q, keys, values, position)
    assert sqnr_db(got, wanted) > 110


def test_a_mark_keeps_what_was_noted_before() -> None:
    node = torch.fx.Graph().placeholder("x")
    node.meta["custom"] = {"note": 1}
    assert not is_outside(node)
    mark_outside(node)
    assert is_outside(node)
    assert node.meta["custom"]["note"] == 1
