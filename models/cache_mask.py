"""The additive mask of a graph whose KV caches are inputs."""

from __future__ import annotations

import torch
from torch import Tensor

# What a hidden position adds to its score. Large enough that softmax forgets it, small enough that
# a 16-bit sum of scores and mask keeps steps of 1/257; the stock runner writes it as the lowest
# quantized value.
MASKED = -255.0


def cache_mask(tokens: int, past: int, start: int, count: int, window: int = 0) -> Tensor:
    """Mask float ``[1, 1, S, C]`` for ``S = tokens``, ``C = past + tokens``: 0 where attended.

    The first ``start`` cache positions are visible, then come ``count`` tokens, each seeing itself
    and those before it; elsewhere :data:`MASKED`. ``window`` > 0 hides what is that far behind. The
    ``tokens - count`` padded tokens see themselves only.
    """
    query = (start + torch.arange(tokens))[:, None]
    key = torch.cat([torch.arange(past), start + torch.arange(tokens)])[None]
    place = torch.arange(past + tokens)[None]
    seen = ((place < start) | (place >= past)) & (key <= query)
    if window > 0:
        seen = seen & (key > query - window)
    seen = seen & ((query < start + count) | (key == query))
    return torch.where(seen, 0.0, MASKED)[None, None]
