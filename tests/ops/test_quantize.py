"""Per-token quantization: torchao's bits, and the shortcut that skips the int8 tensor."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor
from torchao.quantization.quant_primitives import (
    MappingType,
    choose_qparams_affine,
    quantize_affine,
)

from edgepass.ops import reference
from edgepass.ops.errors import InvalidArgumentError
from edgepass.ops.quantize import _CHUNK, _MANY, VULKAN_SCALE_FLOOR, quantize_dequantize
from tests.ops.cases import FLOATS, leads, make_tokens, seeds

quantize = torch.ops.edgepass.quantize_per_token


def torchao_quantize(x: Tensor, eps: float | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Not for K = 1: torchao then takes the range of all tokens at once."""
    block = (1,) * (x.dim() - 1) + (x.shape[-1],)
    scale, zero = choose_qparams_affine(
        x, MappingType.ASYMMETRIC, block, torch.int8, -128, 127, eps, zero_point_dtype=torch.int8
    )
    return quantize_affine(x, block, scale, zero, torch.int8, -128, 127), scale, zero


def assert_same_bits(left: tuple[Tensor, ...], right: tuple[Tensor, ...]) -> None:
    for one, other in zip(left, right, strict=True):
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        assert torch.equal(one, other)


@given(
    lead=leads(1),
    k=st.integers(2, 70),
    dtype=st.sampled_from(FLOATS),
    magnitude=st.sampled_from([1.0, 1e-3, 1e3, 1e-30]),
    offset=st.sampled_from([0.0, 3.0, -3.0]),
    seed=seeds,
)
def test_the_bits_are_those_of_torchao(
    lead: tuple[int, ...], k: int, dtype: torch.dtype, magnitude: float, offset: float, seed: int
) -> None:
    x = make_tokens((*lead, k), torch.float32, seed, offset).mul_(magnitude).to(dtype)
    assert_same_bits(quantize(x), torchao_quantize(x))


@given(st.lists(st.floats(-(2.0**126), 2.0**126, width=32), min_size=2, max_size=12))
@example([0.0, 0.0])
@example([1e38, -1e38])
@example([1e-45, -1e-45])
@example([-127.5, 127.5])
def test_any_finite_token_has_the_bits_of_torchao(values: list[float]) -> None:
    x = torch.tensor([values])
    assert_same_bits(quantize(x), torchao_quantize(x))


@given(exponent=st.floats(-7, 1), seed=seeds)
def test_the_scale_floor_is_that_of_torchao(exponent: float, seed: int) -> None:
    x = make_tokens((3, 17), torch.float32, seed) * 10**exponent
    assert_same_bits(quantize(x, VULKAN_SCALE_FLOOR), torchao_quantize(x, VULKAN_SCALE_FLOOR))
    assert (quantize(x, VULKAN_SCALE_FLOOR)[1] >= torch.tensor(VULKAN_SCALE_FLOOR)).all()


@given(k=st.integers(1, 70), seed=seeds, floor=st.sampled_from([1e-30, 1e-2]))
def test_the_numbers_are_those_of_the_formula(k: int, seed: int, floor: float) -> None:
    x = make_tokens((5, k), torch.float32, seed)
    q, scale, zero = quantize(x, floor)
    exact_q, exact_scale, exact_zero = reference.quantize_per_token(x, floor)
    assert ((scale - exact_scale).abs() <= 2**-22 * exact_scale).all()
    assert ((zero - exact_zero).abs() <= 1).all()
    assert ((q - exact_q).abs() <= 1).all()


def both_ways(x: Tensor) -> tuple[Tensor, Tensor]:
    q, scale, zero = quantize(x)
    exact = (q.float() - zero.float().unsqueeze(-1)) * scale.unsqueeze(-1)
    return quantize_dequantize(x), exact


@given(lead=leads(1), k=st.integers(1, 70), offset=st.sampled_from([0.0, 4.0, -4.0]), seed=seeds)
def test_quantize_dequantize_is_the_two_steps(
    lead: tuple[int, ...], k: int, offset: float, seed: int
) -> None:
    assert torch.equal(*both_ways(make_tokens((*lead, k), torch.float32, seed, offset)))


@given(st.lists(st.floats(-(2.0**126), 2.0**126, width=32), min_size=1, max_size=12))
@example([-127.5, 127.5, 0.5])
@example([-0.5, 254.5, 1.5])
@example([1e-45, -1e-45])
def test_quantize_dequantize_of_any_token(values: list[float]) -> None:
    one, many = torch.tensor(values), torch.tensor([values, values])
    assert torch.equal(*both_ways(one))
    assert torch.equal(*both_ways(many))


@given(seed=seeds)
def test_ties_at_both_ends_of_a_large_activation(seed: int) -> None:
    # One step is exactly 1 and both ends lie half way between two: the sum of the rounded ends
    # is 256 steps, one more than int8 holds.
    x = make_tokens((_MANY // 64, 64), torch.float32, seed)
    x[3, 0], x[3, 1] = -100.5, 154.5
    assert torch.equal(*both_ways(x))


def test_quantize_dequantize_in_several_chunks() -> None:
    assert torch.equal(*both_ways(make_tokens((5, _CHUNK // 2 + 3), torch.float32, 0)))
    assert torch.equal(*both_ways(make_tokens((2, 3, _CHUNK + 3), torch.float32, 0)))


def test_non_contiguous_activation() -> None:
    x = make_tokens((12, 6), torch.float32, 0).t()
    assert_same_bits(quantize(x), quantize(x.contiguous()))
    assert torch.equal(quantize_dequantize(x), quantize_dequantize(x.contiguous()))


@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5)])
def test_no_tokens(shape: tuple[int, ...]) -> None:
    q, scale, zero = quantize(torch.empty(shape))
    assert (q.shape, scale.shape, zero.shape) == (shape, shape[:-1], shape[:-1])
    assert quantize_dequantize(torch.empty(shape)).shape == shape


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(7,), (3, 7), (2, 1, 7)])
def test_opcheck(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = make_tokens(shape, dtype, 0)
    torch.library.opcheck(quantize.default, (x,))
    torch.library.opcheck(quantize.default, (x, VULKAN_SCALE_FLOOR))


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(3, 4, dtype=torch.int8), "got x.dtype=int8; expected float32 or"),
        (torch.zeros(()), "got x.shape=.*; expected .* K of 1 or more"),
        (torch.zeros(3, 0), "got x.shape=.3, 0.; expected .* K of 1 or more"),
    ],
)
def test_bad_input_is_refused(x: Tensor, message: str, device: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        quantize(x.to(device))
