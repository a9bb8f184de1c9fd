"""Attention with its caches: impl/SDPA.cpp.

Tokens come before heads: activations ``[1, S, H, D]``, caches ``[1, C, Hkv, D]``. The scale is
always 1/sqrt(D), attention is causal from the position on, and no mask is taken.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from edgepass.simulator.checks import check_rows
from edgepass.simulator.graph import TensorValue
from edgepass.simulator.half import half_accumulate, half_cooperate
from edgepass.simulator.registry import Kernel, Site, as_half, operator, prepared


@dataclass(frozen=True)
class Precision:
    """How the runtime's shaders multiply, for several tokens and for one, and store in between."""

    product: Callable[[Tensor, Tensor], Tensor]
    product_of_one: Callable[[Tensor, Tensor], Tensor]
    held: Callable[[Tensor], Tensor]


FLOAT = Precision(torch.matmul, torch.matmul, torch.Tensor.float)
# Halves of images load as float; only what is stored between the shaders is rounded.
HALF_STORED = Precision(torch.matmul, torch.matmul, as_half)
HALF_SUMS = Precision(half_accumulate, half_cooperate, as_half)


def _precision(q: TensorValue) -> Precision:
    if q.dtype != torch.float16:
        return FLOAT
    return HALF_SUMS if q.is_buffer else HALF_STORED


@prepared("sdpa_with_kv_cache.default")
def sdpa_with_kv_cache(site: Site) -> Kernel:
    _require_plain(site, mask=7, dropout=8, causal=9, scale=10)
    for place in (3, 4):
        cache = site.tensor(place)
        if cache.constant is None or len(cache.shape) != 4:
            raise site.error(f"argument {place} is no cache of the delegate")
        site.taken.add(place)
    return CachedAttention(site.tensor(3).shape, _precision(site.tensor(0)))


def _require_plain(site: Site, **places: int) -> None:
    """Refuse what the runtime refuses: a mask, a dropout, a scale of its own."""
    plain = {"mask": (None,), "dropout": (None, 0.0), "causal": (None, True), "scale": (None,)}
    for name, place in places.items():
        if site.argument(place) not in plain[name]:
            raise site.error(f"{name}={site.argument(place)!r}, accepted is {plain[name][-1]}")


class CachedAttention:
    """``sdpa_with_kv_cache``, whose caches are the device's own; what they start as is not read."""

    def __init__(self, shape: tuple[int, ...], precision: Precision) -> None:
        self.shape, self.precision = shape, precision
        self.reset()

    def reset(self) -> None:
        """Forget every token."""
        self.keys, self.values = torch.zeros(self.shape), torch.zeros(self.shape)

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, keys: None, values: None, start: int, *_: object
    ) -> Tensor:
        update_cache(k, self.keys, start)
        update_cache(v, self.values, start)
        return attend(q, self.keys, self.values, start, self.precision)


@operator("update_cache.default")
def update_cache(rows: Tensor, cache: Tensor, start: int, *_: object) -> Tensor:
    """Write ``[1, S, Hkv, D]`` to the rows of a cache from ``start`` on."""
    check_rows("cache", start, rows.shape[1], cache.shape[1])
    cache[:, start : start + rows.shape[1]] = rows
    return cache


@prepared("llama.custom_sdpa.default")
def custom_sdpa(site: Site) -> Kernel:
    _require_plain(site, mask=4, dropout=5, causal=6, scale=7)
    precision = _precision(site.tensor(0))

    def kernel(q: Tensor, keys: Tensor, values: Tensor, start: int, *_: object) -> Tensor:
        check_rows("cache", start, q.shape[1], keys.shape[1])
        return attend(q, keys, values, start, precision)

    return kernel


def attend(
    q: Tensor, keys: Tensor, values: Tensor, start: int, precision: Precision = FLOAT
) -> Tensor:
    """Return ``[1, S, H, D]``: query i sees the cache's rows 0 to ``start + i``."""
    tokens, heads = q.shape[1:3]
    context = start + tokens
    keys, values = (cache[0, :context].transpose(0, 1) for cache in (keys, values))
    groups = heads // keys.shape[0]
    product = precision.product_of_one if tokens == 1 else precision.product
    if tokens == 1 and precision is HALF_SUMS:
        keys, values = (x.repeat_interleave(groups, 0) for x in (keys, values))
        groups = 1
    # The heads that share keys are rows of one product: [Hkv, groups * S, D].
    rows = q[0].transpose(0, 1).reshape(keys.shape[0], groups * tokens, -1)
    scores = precision.held(product(rows, keys.transpose(1, 2)) * (1.0 / math.sqrt(q.shape[-1])))
    if tokens > 1:
        hidden = torch.ones(tokens, context, dtype=torch.bool).triu(start + 1)
        scores = scores.view(-1, tokens, context).masked_fill_(hidden, -math.inf).view_as(scores)
    out = product(precision.held(scores.softmax(-1)), values)
    return out.view(heads, tokens, -1).transpose(0, 1).unsqueeze(0)


@operator("et_vk.sdpa.default")
def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """Attention without a cache: ``[B, H, S, D]``, an additive mask, a scale."""
    repeats = q.shape[1] // k.shape[1]
    if repeats > 1:
        k, v = (x.repeat_interleave(repeats, 1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
