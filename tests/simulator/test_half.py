"""Half accumulators, against NumPy's half arithmetic one number at a time."""

import numpy as np
import pytest
import torch

from edgepass.simulator.half import half_accumulate, half_cooperate
from edgepass.simulator.registry import as_half


def fused(total: np.float16, x: float, y: float) -> np.float16:
    """A multiply-add that rounds once: the product and the sum are exact in float64."""
    return np.float16(np.float64(total) + np.float64(x) * np.float64(y))


def accumulated(row: np.ndarray, column: np.ndarray) -> float:
    total = np.float16(0)
    for x, y in zip(row, column, strict=True):
        total = fused(total, x, y)
    return float(total)


def cooperated(row: np.ndarray, column: np.ndarray) -> float:
    lanes = [np.float16(0)] * 64
    for k in range(len(row)):
        lane = k // 4 % 64
        lanes[lane] = fused(lanes[lane], row[k], column[k])
    while len(lanes) > 1:
        middle = len(lanes) // 2
        lanes = [lanes[i] + lanes[i + middle] for i in range(middle)]
    return float(lanes[0])


@pytest.mark.parametrize(("k", "rows"), [(5, 3), (300, 2)])
def test_accumulate_rounds_each_product(k: int, rows: int) -> None:
    generator = torch.Generator().manual_seed(k)
    left = as_half(torch.randn(2, rows, k, generator=generator))
    right = as_half(torch.randn(2, k, 4, generator=generator))
    found = half_accumulate(left, right)
    for b, m, n in np.ndindex(2, rows, 4):
        expected = accumulated(left[b, m].numpy(), right[b, :, n].numpy())
        assert found[b, m, n].item() == expected


@pytest.mark.parametrize("k", [4, 256, 600])
def test_cooperate_sums_in_lanes(k: int) -> None:
    generator = torch.Generator().manual_seed(k)
    left = as_half(torch.randn(1, k, generator=generator))
    right = as_half(torch.randn(k, 8, generator=generator))
    found = half_cooperate(left, right)
    for n in range(8):
        assert found[0, n].item() == cooperated(left[0].numpy(), right[:, n].numpy())
