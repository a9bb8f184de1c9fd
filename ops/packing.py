"""Int4 weights as bytes: the layouts that the backends read, and back.

*Linear layout* (XNNPACK qbint4 filters, ``et_vk.linear_*q4gsw``): uint8 ``[N, ceil(K/2)]``; a
nibble holds w + 8 for w in -8..7; the even column is in the low nibble. The last nibble of an odd
K holds 8, the value 0.
*Embedding layout* (``quantized_decomposed.embedding_4bit``): the same with the even column in the
high nibble.

Two neighbouring int8 values are read as one int16, and the work is done in chunks that stay in
the second-level cache, so that each byte crosses the memory bus once.
"""

import torch

from edgepass.ops.checks import check_dtype, refuse

# Values a chunk: it, its int16 scratch and its result take 1.25 MB. Below 2^18 the fixed cost of
# each torch call shows; above 2^19 the second-level cache overflows.
_CHUNK = 1 << 19


def pack_int4(w: torch.Tensor) -> torch.Tensor:
    """Pack int8 ``[N, K]`` of values -8..7 into the linear layout, uint8 ``[N, ceil(K/2)]``.

    Raises InvalidArgumentError on another rank or dtype and on a value outside -8..7.
    """
    check_dtype("pack_int4", "w", w, (torch.int8,))
    if w.dim() != 2:
        refuse("pack_int4", "w.shape", list(w.shape), "[N, K]")
    if w.shape[1] % 2:
        w = torch.nn.functional.pad(w, (0, 1))
    pairs = w.contiguous().view(-1)
    packed = torch.empty(pairs.numel() // 2, dtype=torch.uint8)
    scratch = torch.empty(min(_CHUNK, pairs.numel()) // 2, dtype=torch.int16)
    for start in range(0, pairs.numel(), _CHUNK):
        chunk = pairs[start : start + _CHUNK]
        _check_range(chunk)
        _pack_chunk(chunk, scratch, packed[start // 2 : (start + _CHUNK) // 2])
    return packed.view(w.shape[0], w.shape[1] // 2)


def unpack_int4(packed: torch.Tensor, k: int) -> torch.Tensor:
    """Unpack the linear layout, uint8 ``[N, ceil(k/2)]``, into int8 ``[N, k]`` of -8..7."""
    check_dtype("unpack_int4", "packed", packed, (torch.uint8,))
    if packed.dim() != 2 or packed.shape[1] != (k + 1) // 2:
        refuse("unpack_int4", "packed.shape", list(packed.shape), f"[N, ceil(k/2)] with k={k}")
    flat = packed.contiguous().view(-1)
    w = torch.empty(2 * flat.numel(), dtype=torch.int8)
    scratch = torch.empty(min(_CHUNK // 2, flat.numel()), dtype=torch.int16)
    for start in range(0, flat.numel(), _CHUNK // 2):
        chunk = flat[start : start + _CHUNK // 2]
        _unpack_chunk(chunk, scratch, w[2 * start : 2 * start + _CHUNK])
    return w.view(packed.shape[0], 2 * packed.shape[1])[:, :k].contiguous()


def pack_embedding_int4(w: torch.Tensor) -> torch.Tensor:
    """Pack int8 ``[V, K]`` of values -8..7 into the embedding layout, uint8 ``[V, ceil(K/2)]``."""
    return swap_nibbles(pack_int4(w))


def unpack_embedding_int4(packed: torch.Tensor, k: int) -> torch.Tensor:
    """Unpack the embedding layout, uint8 ``[V, ceil(k/2)]``, into int8 ``[V, k]`` of -8..7."""
    return unpack_int4(swap_nibbles(packed), k)


def swap_nibbles(packed: torch.Tensor) -> torch.Tensor:
    """Turn the linear layout into the embedding layout or back: uint8 in, uint8 out, any shape."""
    check_dtype("swap_nibbles", "packed", packed, (torch.uint8,))
    return (packed << 4).bitwise_or_(packed >> 4)


def dequantize_groups(
    w: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    group_size: int,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """(w - zero) * scale in ``dtype``, float32 or float64; w: int8 ``[N, K]``.

    scales: float ``[N, K/group_size]``; zeros: int8 of that shape, or None for zeros of 0.
    """
    out = torch.empty(w.shape, dtype=dtype)
    _dequantize_into(out, w, scales, zeros, group_size)
    return out


def dequantize_int4(
    packed: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    group_size: int,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """``dequantize_groups`` of the linear layout, uint8 ``[N, ceil(K/2)]``: ``[N, K]``."""
    k = scales.shape[1] * group_size
    out = torch.empty((packed.shape[0], k), dtype=dtype)
    if zeros is not None and not zeros.any():
        zeros = None
    rows = max(1, _CHUNK // 2 // k)
    for start in range(0, packed.shape[0], rows):
        part = slice(start, start + rows)
        part_zeros = None if zeros is None else zeros[part]
        w = unpack_int4(packed[part], k)
        _dequantize_into(out[part], w, scales[part], part_zeros, group_size)
    return out


def _dequantize_into(
    out: torch.Tensor,
    w: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    group_size: int,
) -> None:
    out.copy_(w)
    groups = out.view(w.shape[0], scales.shape[1], group_size)
    if zeros is not None:
        groups.sub_(zeros.to(out.dtype).unsqueeze(-1))
    groups.mul_(scales.to(out.dtype).unsqueeze(-1))


def _check_range(chunk: torch.Tensor) -> None:
    low, high = (int(bound) for bound in chunk.aminmax())
    if low < -8 or high > 7:
        refuse("pack_int4", "w", f"{low}..{high}", "values in -8..7")


def _pack_chunk(chunk: torch.Tensor, scratch: torch.Tensor, packed: torch.Tensor) -> None:
    """Byte by byte ``even + 16 * odd + 0x88``, modulo 256, of little-endian pairs."""
    pairs = chunk.view(torch.int16)
    odd = scratch[: pairs.numel()]
    torch.bitwise_right_shift(pairs, 8, out=odd)
    torch.add(pairs, odd, alpha=16, out=odd)
    packed.copy_(odd)  # the low byte; the high one is dropped
    packed.add_(0x88)


def _unpack_chunk(packed: torch.Tensor, scratch: torch.Tensor, w: torch.Tensor) -> None:
    pairs = w.view(torch.int16)
    pairs.copy_(packed)
    odd = scratch[: pairs.numel()]
    torch.bitwise_left_shift(pairs, 4, out=odd)
    pairs.bitwise_or_(odd).bitwise_and_(0x0F0F)
    w.sub_(8)
