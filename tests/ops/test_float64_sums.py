"""Under Float64Sums a float32 result is the float64 one, rounded once."""

import pytest
import torch
import torch.nn.functional as F

from edgepass.ops.float64_sums import Float64Sums

W = torch.randn(64, 1536, generator=torch.Generator().manual_seed(0))
X = torch.randn(32, 1536, generator=torch.Generator().manual_seed(1))
SUMS = {
    "linear": lambda x: F.linear(x, W.to(x.dtype)),
    "bias": lambda x: F.linear(x, W.to(x.dtype), torch.arange(64).to(x.dtype)),
    "matmul": lambda x: x[None] @ W.to(x.dtype).T[None],
    "convolution": lambda x: F.conv2d(x[:, :, None, None], W.to(x.dtype)[:, :, None, None]),
    "softmax": lambda x: torch.softmax(x, -1),
    "log_softmax": lambda x: torch.log_softmax(x, -1),
    "mean": lambda x: x.mean(-1),
    "layer_norm": lambda x: F.layer_norm(x, (1536,)),
}


@pytest.mark.parametrize("name", SUMS)
def test_a_sum_is_that_of_float64_rounded_once(name) -> None:
    with torch.no_grad(), Float64Sums():
        found = SUMS[name](X)
    assert found.dtype == torch.float32
    assert torch.equal(found, SUMS[name](X.double()).float())
    # float32's own sum is another: the mode did something.
    assert not torch.equal(found, SUMS[name](X))


def test_what_is_no_float32_stays_as_it_is() -> None:
    with Float64Sums():
        assert X.double().sum().dtype == torch.float64
        assert torch.arange(5).sum().dtype == torch.int64
        assert torch.equal(X * X, X.clone().pow_(2))
        assert (X[0] > 0).sum().item() == int((X[0] > 0).long().sum())
