"""Attention over the visible rows of a cache, and the casts beside it.

The form of attention that runs inside a CPU delegate: the visible rows and an additive mask come
in as tensors, so that no position is needed inside.
"""

import torch
import torch.nn.functional as F

from edgepass.ops.attention import attend_capped
from edgepass.ops.checks import FLOAT_DTYPES, check_dtype, refuse
from edgepass.ops.library import register_operator

_NAME = "masked_attention"


def masked_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor,
    scale: float,
    softcap: float = 0.0,
) -> torch.Tensor:
    """softmax(q k^T * scale + mask) v for grouped-query heads, with ``softcap`` > 0 capped.

    q: float ``[1, H, S, D]``; k, v: ``[1, Hkv, L, D]``, H a multiple of Hkv, in q's dtype or
    float16; mask: additive float ``[S, L]``. A capped score is ``softcap * tanh(s / softcap)``,
    before the mask. Returns ``[1, H, S, D]`` in q's dtype.
    """
    _check(q, k, v)
    if softcap:
        return attend_capped(q, k, v, mask.float(), scale, softcap)
    return F.scaled_dot_product_attention(
        q, k.to(q.dtype), v.to(q.dtype), attn_mask=mask.to(q.dtype), scale=scale, enable_gqa=True
    ).contiguous()


def _masked_attention_fake(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor,
    scale: float,
    softcap: float = 0.0,
) -> torch.Tensor:
    _check(q, k, v)
    return q.new_empty(q.shape)


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    check_dtype(_NAME, "q", q, FLOAT_DTYPES)
    for name, value in (("k", k), ("v", v)):
        check_dtype(_NAME, name, value, (q.dtype, torch.float16))
        if value.dim() != 4 or q.dim() != 4 or q.shape[1] % value.shape[1]:
            refuse(_NAME, f"{name}.shape", list(value.shape), "[1, Hkv, L, D], Hkv dividing H")


def cast(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return a contiguous copy of ``x`` in ``dtype``."""
    return x.to(dtype, copy=True, memory_format=torch.contiguous_format)


def _cast_fake(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return x.new_empty(x.shape, dtype=dtype)


register_operator(
    "masked_attention(Tensor q, Tensor k, Tensor v, Tensor mask, float scale, float softcap=0.0)"
    " -> Tensor",
    masked_attention,
    _masked_attention_fake,
)
register_operator("cast(Tensor x, ScalarType dtype) -> Tensor", cast, _cast_fake)
