"""Random operands of the operators, and the two measures that the tests of ``ops`` share."""

import dataclasses
import math

import torch
from hypothesis import strategies as st
from torch import Tensor

from edgepass.ops import pack_int4

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
# Largest relative error of one rounding to each dtype.
ROUNDING = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def sqnr_db(reference: Tensor, value: Tensor) -> float:
    """Signal to error in decibels; infinite when equal (nothing against nothing is equal)."""
    signal = float(reference.double().square().sum())
    error = float((value.double() - reference.double()).square().sum())
    if error == 0:
        return math.inf
    return 10 * math.log10(signal / error) if signal else -math.inf


@dataclasses.dataclass
class Weight:
    """A group-quantized int4 weight in the operators' form."""

    values: Tensor
    packed: Tensor
    group_size: int
    scales: Tensor
    zeros: Tensor
    bias: Tensor | None

    def arguments(self) -> tuple[Tensor, int, Tensor, Tensor, Tensor | None]:
        return self.packed, self.group_size, self.scales, self.zeros, self.bias


def make_weight(
    n: int,
    groups: int,
    group_size: int,
    *,
    dtype: torch.dtype = torch.float32,
    asymmetric: bool = True,
    fraction: float = 0.0,
    bias: bool = False,
    seed: int = 0,
) -> Weight:
    generator = torch.Generator().manual_seed(seed)
    k = groups * group_size
    values = torch.randint(-8, 8, (n, k), generator=generator, dtype=torch.int8)
    scales = (torch.rand(n, groups, generator=generator) * 0.1 + 0.01).to(dtype)
    low, high = (-8, 8) if asymmetric else (0, 1)
    zeros = torch.randint(low, high, (n, groups), generator=generator, dtype=torch.int8)
    if fraction:
        zeros = zeros + fraction
    offsets = torch.randn(n, generator=generator).to(dtype) if bias else None
    return Weight(values, pack_int4(values), group_size, scales, zeros, offsets)


@st.composite
def weights(draw: st.DrawFn, dtype: torch.dtype = torch.float32) -> Weight:
    """Weights of up to 24 x 90 values, odd K included."""
    return make_weight(
        draw(st.integers(1, 24)),
        draw(st.integers(1, 6)),
        draw(st.integers(1, 15)),
        dtype=dtype,
        asymmetric=draw(st.booleans()),
        fraction=draw(st.sampled_from([0.0, 0.37, -31.4])),
        bias=draw(st.booleans()),
        seed=draw(st.integers(0, 2**32 - 1)),
    )


def leads(smallest: int = 0) -> st.SearchStrategy[tuple[int, ...]]:
    """Leading sizes of an activation: rank 1 to 4 with the channels, no tokens included."""
    return st.lists(st.integers(smallest, 4), max_size=3).map(tuple)


def make_tokens(shape: tuple[int, ...], dtype: torch.dtype, seed: int, offset: float = 0) -> Tensor:
    """Normal values; ``offset`` moves all of them, so that ranges lie on one side of zero."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) + offset).to(dtype)


seeds = st.integers(0, 2**32 - 1)
