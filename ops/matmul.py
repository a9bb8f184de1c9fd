"""Matrix products with packed int4 weights, by the fastest float routine that is exact enough.

Centred activations and weights are small integers, and a group scale times an int4 value is exact
to 2^-24, so that a float32 product stands 120 dB and more above its error: it is the sum over K
that rounds. Libraries add up long stretches of K one by one, which leaves 115 dB at K = 8192 and,
where all products have one sign, at K = 576: sums are cut into blocks here, which keeps 120 dB
with a scale a group (106 to 115 where all products of a sum are equal, scales too). Where few
values are summed into few outputs, one output that cancels out could break that bound, and float64
costs nothing: small products are done there.

One token reads each weight once, for which a call a block is dear: its product is one batched call
over short blocks, whose sums are then added up. That takes another layout of the weight.
"""

import functools
from typing import Any

import torch
import torch.nn.functional as F

from edgepass.ops.packing import dequantize_int4
from edgepass.ops.weight_cache import PreparedWeight, weight_cache

_SMALL_PRODUCT = 1 << 17
_FEW_OUTPUTS = 64
# Longest stretch of K that is summed in one go.
_BLOCK = 384
# oneDNN picks a layout by it, which serves others too: a prefill chunk's gains most.
_TYPICAL_ROWS = 128
_HAS_ONEDNN = torch.backends.mkldnn.is_available()
# An overload by name below: to let torch choose one takes time at each call.
_MULTIPLY: Any = torch.ops.mkldnn._linear_pointwise if _HAS_ONEDNN else None


def is_small(x: torch.Tensor, packed: torch.Tensor) -> bool:
    """Whether the product of ``[..., K]`` and the weight ``[N, K]`` belongs in float64."""
    values, columns = x.numel(), packed.shape[0]
    return values * columns <= _SMALL_PRODUCT or values // x.shape[-1] * columns <= _FEW_OUTPUTS


def matmul_float64(
    x: torch.Tensor,
    packed: torch.Tensor,
    group_size: int,
    scales: torch.Tensor,
    zeros: torch.Tensor,
) -> torch.Tensor:
    """x ``[..., K]`` times the dequantized weight, both in float64: ``[..., N]``."""
    entry = weight_cache.find(packed, scales, zeros, group_size)
    (weight,) = weight_cache.form(
        entry, "float64", lambda: (_dequantize(packed, entry, torch.float64),)
    )
    return F.linear(x, weight)


def matmul_float32(
    x: torch.Tensor,
    packed: torch.Tensor,
    group_size: int,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """x ``[..., K]`` times the dequantized weight plus bias, in float32: ``[..., N]``."""
    entry = weight_cache.find(packed, scales, zeros, group_size)
    if x.numel() == x.shape[-1] and _token_block(x.shape[-1]):
        return _multiply_token(x, packed, entry, bias)
    parts = weight_cache.form(entry, "blocks", lambda: _pack_blocks(packed, entry))
    out = None
    for rows, part in zip(_blocks(x.reshape(-1, x.shape[-1])), parts, strict=True):
        out = _add_product(out, rows, part, bias if out is None else None)
    assert out is not None, "K is 1 or more"
    return out.view(*x.shape[:-1], packed.shape[0])


def _multiply_token(
    x: torch.Tensor, packed: torch.Tensor, entry: PreparedWeight, bias: torch.Tensor | None
) -> torch.Tensor:
    """``matmul_float32`` of one token."""
    length = _token_block(x.shape[-1])
    (blocks,) = weight_cache.form(entry, "token", lambda: _token_form(packed, entry, length))
    out = torch.bmm(x.reshape(-1, 1, length), blocks).sum(0)
    out = out if bias is None else out.add_(bias)
    return out.view(*x.shape[:-1], packed.shape[0])


@functools.cache
def _token_block(k: int) -> int:
    """Length of the equal blocks into which one token is cut; 0 where K has no divisor that fits.

    Up to 32, sums of equal products keep 120 dB.
    """
    return next((length for length in range(32, 15, -1) if k % length == 0), 0)


def _token_form(packed: torch.Tensor, entry: PreparedWeight, length: int) -> tuple[torch.Tensor]:
    """The float32 weight as ``[K/length, length, N]``."""
    weight = _dequantize(packed, entry, torch.float32)
    return (weight.view(weight.shape[0], -1, length).permute(1, 2, 0).contiguous(),)


def _blocks(matrix: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Views of ``[.., K]``, cut along K, all as long as a multiple of 16 allows."""
    k = matrix.shape[1]
    count = -(-k // _BLOCK)
    return matrix.split(-(-k // count // 16) * 16, dim=1)


def _add_product(
    total: torch.Tensor | None, x: torch.Tensor, part: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """``total + x @ part.T + bias`` for x ``[M, k]`` and a part that ``_pack_blocks`` made."""
    if not _HAS_ONEDNN:
        product = F.linear(x, part, bias)
        return product if total is None else total.add_(product)
    if total is None:
        return _MULTIPLY.default(x, part, bias, "none", [], "")
    return _MULTIPLY.binary(x, total, part, bias, "add")


def _pack_blocks(packed: torch.Tensor, entry: PreparedWeight) -> tuple[torch.Tensor, ...]:
    """The blocks of the float32 weight, in oneDNN's own layout (for any number of rows)."""
    weight = _dequantize(packed, entry, torch.float32)
    parts = [part.contiguous() for part in _blocks(weight)]
    if not _HAS_ONEDNN:
        return tuple(parts)
    return tuple(torch.ops.mkldnn._reorder_linear_weight(part, _TYPICAL_ROWS) for part in parts)


def _dequantize(packed: torch.Tensor, entry: PreparedWeight, dtype: torch.dtype) -> torch.Tensor:
    return dequantize_int4(packed, entry.scales, entry.zeros, entry.group_size, dtype)
