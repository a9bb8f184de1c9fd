"""Rotary embeddings: impl/RotaryEmbedding.cpp. Tables are checked to hold each position."""

from __future__ import annotations

import torch
from torch import Tensor

from edgepass.simulator.checks import check_rows
from edgepass.simulator.registry import operator


@operator("et_vk.apply_rotary_emb_hf.default")
def apply_rotary_emb_hf(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, start: int
) -> tuple[Tensor, Tensor]:
    """q ``[1, S, H, D]``, k ``[1, S, Hkv, D]``, tables ``[C, W]``: halves of the first W turn."""
    tokens = q.shape[1]
    check_rows("rotary table", start, tokens, cos.shape[-2])
    cos, sin = (
        table.reshape(-1, table.shape[-1])[start : start + tokens].unsqueeze(1)
        for table in (cos, sin)
    )
    return _turn_halves(q, cos, sin), _turn_halves(k, cos, sin)


def _turn_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    # The shader takes the first half's columns of the tables for both halves.
    half = cos.shape[-1] // 2
    cos, sin = cos[..., :half], sin[..., :half]
    first, second, kept = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin, kept), dim=-1)


@operator("et_vk.apply_rotary_emb.default")
def apply_rotary_emb(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """As above with tables ``[S, D/2]`` of the tokens at hand; neighbouring channels turn."""
    check_rows("rotary table", 0, q.shape[1], cos.shape[-2])
    cos, sin = (table[..., : q.shape[1], :].unsqueeze(-2) for table in (cos, sin))
    return _turn_neighbours(q, cos, sin), _turn_neighbours(k, cos, sin)


def _turn_neighbours(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    even, odd = x[..., ::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


@operator("et_vk.apply_rotary_emb_interleaved.default")
def apply_rotary_emb_interleaved(x: Tensor, freqs: Tensor) -> Tensor:
    """x ``[B, N, C]``, freqs of N * C values: cosine and sine of each pair, side by side."""
    pairs = freqs.reshape(x.shape[1], -1, 2)
    return _turn_neighbours(x, pairs[..., 0], pairs[..., 1])
