"""Matrix products with packed int4 weights, by the fastest float routine that is exact enough.

Centred activations and weights are small integers, and a group scale times an int4 value is exact
to 2^-24, so that a float32 product stands 120 dB and more above its error: it is the sum over K
that rounds. Libraries sum in blocks for many rows; for few rows they may add up all of K one by
one (115 dB at K = 8192), so that long sums are cut into blocks here. Where few values are summed
into few outputs, one output that cancels out could break that bound, and float64 costs nothing:
small products are done there.
"""

import functools

import torch
import torch.nn.functional as F

from edgepass.ops.packing import dequantize_int4
from edgepass.ops.weight_cache import PreparedWeight, weight_cache

_SMALL_PRODUCT = 1 << 17
_FEW_OUTPUTS = 64
_FEW_ROWS = 7
_BLOCK = 512
_HAS_MKL = torch.backends.mkl.is_available()


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
    return F.linear(x, _plain(packed, entry, torch.float64))


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
    k = x.shape[-1]
    rows = x.numel() // k
    if rows <= _FEW_ROWS:
        return _sum_of_blocks(x, _plain(packed, entry, torch.float32), bias)
    if not _HAS_MKL:
        return F.linear(x, _plain(packed, entry, torch.float32), bias)
    seen, entry.last_rows = entry.last_rows, rows
    if ("mkl", rows) not in entry.forms and seen not in (0, rows):
        # MKL's form serves one number of rows and takes longer to make than it saves: it pays for
        # the first number seen and for one that repeats.
        return F.linear(x, _plain(packed, entry, torch.float32), bias)
    form = weight_cache.form(entry, "mkl", rows, functools.partial(_pack_mkl, packed, entry, rows))
    # The weight itself is asked for its shape only.
    shape = x.new_empty(1).expand(packed.shape[0], k)
    return torch.ops.mkl._mkl_linear(x, form, shape, bias, rows)


def _sum_of_blocks(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """``F.linear`` of a few rows, whose sums over K are taken in blocks."""
    k, n = x.shape[-1], weight.shape[0]
    blocks = k // _BLOCK
    x = x.contiguous()  # one order of summing, whatever the strides
    if blocks < 2:
        return F.linear(x, weight, bias)
    whole = blocks * _BLOCK
    left = x[..., :whole].reshape(-1, blocks, _BLOCK).transpose(0, 1)
    right = weight[:, :whole].unflatten(1, (blocks, _BLOCK)).permute(1, 2, 0)
    out = torch.bmm(left, right).sum(0).view(*x.shape[:-1], n)
    if whole < k:
        out += F.linear(x[..., whole:], weight[:, whole:])
    return out if bias is None else out.add_(bias)


def _plain(packed: torch.Tensor, entry: PreparedWeight, dtype: torch.dtype) -> torch.Tensor:
    kind = "float32" if dtype == torch.float32 else "float64"
    found = entry.forms.get((kind, 0))
    if found is not None:
        return found
    return weight_cache.form(entry, kind, 0, lambda: _dequantize(packed, entry, dtype))


def _pack_mkl(packed: torch.Tensor, entry: PreparedWeight, rows: int) -> torch.Tensor:
    weight = entry.forms.get(("float32", 0))
    if weight is None:
        weight = _dequantize(packed, entry, torch.float32)
    return torch.ops.mkl._mkl_reorder_linear_weight(weight, rows)


def _dequantize(packed: torch.Tensor, entry: PreparedWeight, dtype: torch.dtype) -> torch.Tensor:
    return dequantize_int4(packed, entry.scales, entry.zeros, entry.group_size, dtype)
