"""The int8 linear against exact integer arithmetic."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from edgepass.ops.errors import InvalidArgumentError
from tests.ops.cases import FLOATS, leads, make_tokens, seeds, sqnr_db

ops = torch.ops.edgepass


def make(n: int, k: int, seed: int, bias: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randint(-128, 128, (n, k), generator=generator, dtype=torch.int8)
    scales = torch.rand(n, generator=generator) * 0.1 + 1e-3
    return weight, scales, torch.randn(n, generator=generator) if bias else None


def exact(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    q, scale, zero = ops.quantize_per_token(x)
    sums = (q.long() - zero.long().unsqueeze(-1)) @ weight.long().t()
    out = sums.double() * scale.double().unsqueeze(-1) * scales.double()
    return out if bias is None else out + bias.double()


@settings(max_examples=60)
@given(
    lead=leads(),
    n=st.integers(1, 40),
    k=st.sampled_from([1, 7, 32, 511, 512, 513, 1536]),
    seed=seeds,
    bias=st.booleans(),
    offset=st.sampled_from([0.0, 5.0, -5.0]),
)
def test_equals_integer_sums(lead, n, k, seed, bias, offset) -> None:
    x = make_tokens((*lead, k), torch.float32, seed, offset)
    arguments = make(n, k, seed, bias)
    assert sqnr_db(exact(x, *arguments), ops.linear_qta8a_qc8w.dynamic(x, *arguments)) >= 120


def test_the_largest_values_are_summed_exactly() -> None:
    x = torch.full((2, 4096), 3.0)
    weight = torch.full((3, 4096), -128, dtype=torch.int8)
    scales = torch.ones(3)
    found = ops.linear_qta8a_qc8w.dynamic(x, weight, scales)
    assert sqnr_db(exact(x, weight, scales, None), found) >= 140


@pytest.mark.parametrize("dtype", FLOATS)
def test_opcheck(dtype) -> None:
    x = make_tokens((2, 3, 32), dtype, 0)
    torch.library.opcheck(ops.linear_qta8a_qc8w.dynamic, (x, *make(5, 32, 0, True)))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"x": torch.zeros(2, 31)}, "weight.shape"),
        ({"x": torch.zeros(2, 32, dtype=torch.int8)}, "x"),
        ({"weight": torch.zeros(5, 32)}, "weight"),
        ({"w_scales": torch.ones(4)}, "w_scales"),
        ({"bias": torch.ones(4)}, "bias"),
    ],
)
def test_refuses(change: dict[str, Tensor], said: str) -> None:
    arguments = {
        "x": torch.zeros(2, 32),
        "weight": torch.zeros(5, 32, dtype=torch.int8),
        "w_scales": torch.ones(5),
        "bias": torch.ones(5),
    }
    with pytest.raises(InvalidArgumentError, match=said):
        ops.linear_qta8a_qc8w.dynamic(**{**arguments, **change})
