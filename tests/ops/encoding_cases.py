"""Encodings of every kind that a recipe makes, for the tests of what carries them."""

import torch
from hypothesis import strategies as st

from edgepass.ops.encodings import Encoding

RANGES = [
    ((0, 255), 8, torch.uint8),
    ((0, 65535), 16, torch.int32),
    ((-128, 127), 8, torch.int8),
    ((-127, 127), 8, torch.int8),
    ((-7, 7), 4, torch.int8),
    ((-32767, 32767), 16, torch.int16),
    ((-(2**31), 2**31 - 1), 32, torch.int32),
]
PARAMETER_RANGES = [(-7, 7), (-127, 127), (-32767, 32767), (-(2**31), 2**31 - 1), (0, 255)]
ACTIVATION_RANGES = [(0, 255), (0, 65535), (-128, 127), (-32768, 32767)]
SCALES = st.floats(2.0**-24, 2.0**14, width=32)


def tensor_encoding(scale: float, zero: int = 0, limits: tuple[int, int] = (0, 255)) -> Encoding:
    return Encoding(torch.tensor(scale), torch.tensor(zero), *limits)


@st.composite
def encodings(draw, ranges=tuple(limits for limits, _, _ in RANGES)) -> Encoding:
    low, high = draw(st.sampled_from(ranges))
    channels = draw(st.sampled_from([None, 1, 5]))
    count = channels or 1
    scale = torch.tensor(draw(st.lists(SCALES, min_size=count, max_size=count)))
    zeros = st.integers(low, high)
    zero = torch.tensor(draw(st.lists(zeros, min_size=count, max_size=count)))
    if channels is None:
        return Encoding(scale[0], zero[0], low, high)
    return Encoding(scale, zero, low, high, axis=0)


@st.composite
def block_encodings(draw) -> Encoding:
    """Block scales as HTP stores them: whole multiples of a scale of the channel."""
    channels, blocks = draw(st.integers(1, 4)), draw(st.integers(2, 4))
    seed = draw(st.integers(0, 2**16))
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(1, 17, (channels, blocks), generator=generator)
    counts[:, 0] = 16
    channel = torch.rand(channels, 1, generator=generator) + 1e-3
    scale = channel * counts
    return Encoding(scale, torch.zeros_like(scale), -7, 7, axis=0, block=32)
