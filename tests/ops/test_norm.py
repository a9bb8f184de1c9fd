"""RMSNorm against division by the root of the mean square in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from edgepass.ops import reference
from edgepass.ops.errors import InvalidArgumentError
from tests.ops.cases import FLOATS, ROUNDING, leads, make_tokens, seeds

rms_norm = torch.ops.edgepass.rms_norm


@given(
    lead=leads(),
    width=st.integers(1, 600),
    dtype=st.sampled_from(FLOATS),
    weight_dtype=st.sampled_from(FLOATS),
    eps=st.sampled_from([1e-6, 1e-5, 0.1]),
    magnitude=st.sampled_from([1e-3, 1.0, 100.0]),
    seed=seeds,
)
def test_one_rounding_beside_float32(
    lead: tuple[int, ...],
    width: int,
    dtype: torch.dtype,
    weight_dtype: torch.dtype,
    eps: float,
    magnitude: float,
    seed: int,
) -> None:
    x = (make_tokens((*lead, width), torch.float32, seed) * magnitude).to(dtype)
    weight = make_tokens((width,), weight_dtype, seed + 1)
    out = rms_norm(x, weight, eps)
    exact = reference.rms_norm(x, weight, eps)
    assert out.dtype == dtype
    smallest = torch.finfo(dtype).smallest_normal * ROUNDING[dtype] * 4
    assert ((out - exact).abs() <= (ROUNDING[dtype] + 2.0**-21) * exact.abs() + smallest).all()


def test_values_whose_square_leaves_float16() -> None:
    x = torch.full((2, 8), 6e4, dtype=torch.float16)
    assert torch.equal(rms_norm(x, torch.ones(8), 1e-6), torch.ones(2, 8, dtype=torch.float16))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(6,), (0, 6), (2, 3, 6)])
def test_opcheck(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = make_tokens(shape, dtype, 0)
    torch.library.opcheck(rms_norm.default, (x, torch.ones(6), 1e-5))
    if x.dim() == 3:
        torch.library.opcheck(rms_norm.default, (x.transpose(0, 1), torch.ones(6), 1e-5))


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("x", "weight", "message"),
    [
        (torch.zeros(2, 6), torch.ones(5), r"got weight.shape=\[5\]; expected \[6\]"),
        (torch.zeros(2, 6), torch.ones(1, 6), r"got weight.shape=\[1, 6\]"),
        (torch.zeros(()), torch.ones(1), r"got x.shape=\[\]; expected \[..., D\]"),
        (torch.zeros(2, 6).int(), torch.ones(6), r"got x.dtype=int32"),
        (torch.zeros(2, 6), torch.ones(6).double(), r"got weight.dtype=float64"),
    ],
)
def test_bad_input_is_refused(x: Tensor, weight: Tensor, message: str, device: str) -> None:
    with pytest.raises(InvalidArgumentError, match=f"rms_norm: {message}"):
        rms_norm(x.to(device), weight.to(device), 1e-5)
