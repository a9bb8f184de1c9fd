"""Causal attention over a static key-value cache, as one operator."""

import math

import torch
import torch.nn.functional as F

from edgepass.ops.checks import FLOAT_DTYPES, check_dtype, check_shape, refuse
from edgepass.ops.library import register_operator

_NAME = "cached_attention"


def cached_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    input_pos: torch.Tensor,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
) -> torch.Tensor:
    """Attend from S tokens at positions ``input_pos + i`` to the cache rows that they may see.

    q: float ``[B, H, S, D]``; caches: ``[B, Hkv, C, D]``, already updated for these tokens, H a
    multiple of Hkv; input_pos: int64 ``[1]``. Token at position p sees rows j <= p, and with
    ``window`` > 0 only j > p - window. With ``softcap`` > 0 a score s becomes
    ``softcap * tanh(s / softcap)`` (Gemma 2). Returns ``[B, H, S, D]`` in q's dtype.
    """
    _check_attention(q, k_cache, v_cache, input_pos, window, softcap)
    start, length = int(input_pos), q.shape[2]
    end = start + length
    if start < 0 or end > k_cache.shape[2]:
        accepted = f"0..{k_cache.shape[2] - length} for {length} tokens, {k_cache.shape[2]} rows"
        refuse(_NAME, "input_pos", start, accepted)
    # Rows that no token sees are cut off: they may be stale, and prefill need not pay for them.
    first = max(0, start - window + 1) if window else 0
    keys, values = k_cache[:, :, first:end], v_cache[:, :, first:end]
    if softcap:
        hidden = None if length == 1 else _mask(start, end, first, window, torch.float32)
        return attend_capped(q, keys, values, hidden, scale, softcap)
    if length == 1:
        return _attend_one(q, keys, values, scale)
    causal = start == 0 and not window
    mask = None if causal else _mask(start, end, first, window, q.dtype)
    return F.scaled_dot_product_attention(
        q, keys, values, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=True
    ).contiguous()


def _attend_one(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float
) -> torch.Tensor:
    """One token sees every row: the heads that share K and V are attended as tokens of one head."""
    batch, heads, _, width = q.shape
    folded = q.reshape(batch, keys.shape[1], heads // keys.shape[1], width)
    out = F.scaled_dot_product_attention(folded, keys, values, scale=scale)
    return out.reshape(q.shape)


def attend_capped(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    softcap: float,
) -> torch.Tensor:
    """softmax(softcap * tanh(q k^T * scale / softcap) + mask) v, taken in float32.

    q: ``[B, H, S, D]``; keys, values: ``[B, Hkv, L, D]``; mask: float32 ``[S, L]``. Returns q's
    shape and dtype.
    """
    batch, heads, tokens, width = q.shape
    shared = keys.shape[1]
    folded = q.float().reshape(batch, shared, heads // shared, tokens, width) * (scale / softcap)
    scores = torch.matmul(folded, keys.float().unsqueeze(2).transpose(-1, -2))
    scores = scores.tanh_().mul_(softcap)
    if mask is not None:
        scores += mask
    out = torch.matmul(scores.softmax(-1), values.float().unsqueeze(2))
    return out.reshape(q.shape).to(q.dtype)


def _mask(start: int, end: int, first: int, window: int, dtype: torch.dtype) -> torch.Tensor:
    """``[end - start, end - first]``: 0 where a token sees a row, else minus infinity."""
    tokens = torch.arange(start, end).unsqueeze(1)
    rows = torch.arange(first, end)
    hidden = rows > tokens
    if window:
        hidden |= rows <= tokens - window
    return torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -torch.inf)


def _cached_attention_fake(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    input_pos: torch.Tensor,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
) -> torch.Tensor:
    _check_attention(q, k_cache, v_cache, input_pos, window, softcap)
    return q.new_empty(q.shape)


def _check_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    input_pos: torch.Tensor,
    window: int,
    softcap: float,
) -> None:
    check_dtype(_NAME, "q", q, FLOAT_DTYPES)
    check_dtype(_NAME, "k_cache", k_cache, (q.dtype,))
    check_dtype(_NAME, "v_cache", v_cache, (q.dtype,))
    check_dtype(_NAME, "input_pos", input_pos, (torch.int64,))
    check_shape(_NAME, "input_pos", input_pos, (1,), "one position")
    if q.dim() != 4:
        refuse(_NAME, "q.shape", list(q.shape), "[B, H, S, D]")
    if k_cache.dim() != 4 or q.shape[1] % k_cache.shape[1]:
        refuse(_NAME, "k_cache.shape", list(k_cache.shape), "[B, Hkv, C, D], Hkv dividing H")
    heads, rows = k_cache.shape[1], k_cache.shape[2]
    wanted = (q.shape[0], heads, rows, q.shape[3])
    check_shape(_NAME, "k_cache", k_cache, wanted, "B, Hkv, C, D")
    check_shape(_NAME, "v_cache", v_cache, wanted, "B, Hkv, C, D")
    if window < 0:
        refuse(_NAME, "window", window, "0 (none) or more")
    if not 0 <= softcap < math.inf:
        refuse(_NAME, "softcap", softcap, "0 (none) or a positive number")


register_operator(
    "cached_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor input_pos, float scale,"
    " int window=0, float softcap=0.0) -> Tensor",
    cached_attention,
    _cached_attention_fake,
)
