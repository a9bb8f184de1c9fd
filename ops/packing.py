"""Int4 weights as bytes: the layouts that the backends read, and back.

*Linear layout* (XNNPACK qbint4 filters, ``et_vk.linear_*q4gsw``): uint8 ``[N, ceil(K/2)]``; a
nibble holds w + 8 for w in -8..7; the even column is in the low nibble. The last nibble of an odd
K holds 8, the value 0.
*Embedding layout* (``quantized_decomposed.embedding_4bit``): the same with the even column in the
high nibble.

Two neighbouring int8 values are read as one 16-bit number, and the work is done in chunks that
stay in the cache, so that each byte crosses the memory bus once.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from edgepass.ops.checks import check_dtype, refuse

_CHUNK = 1 << 17  # pairs of values that are unpacked at once: with scratch and result, 0.6 MB
_PACKED_AT_ONCE = 1 << 19  # pairs: fewer would pay more for the calls than they save in the cache
_PARALLEL = 1 << 21  # pairs from which on a thread pays for its start


def pack_int4(w: torch.Tensor) -> torch.Tensor:
    """Pack int8 ``[N, K]`` of values -8..7 into the linear layout, uint8 ``[N, ceil(K/2)]``.

    Raises InvalidArgumentError on another rank or dtype and on a value outside -8..7.
    """
    check_dtype("pack_int4", "w", w, (torch.int8,))
    if w.dim() != 2:
        refuse("pack_int4", "w.shape", list(w.shape), "[N, K]")
    if w.shape[1] % 2:
        w = torch.nn.functional.pad(w, (0, 1))
    # NumPy's memory is in huge pages from 4 MB on, where the system has them: fewer first touches.
    packed = np.empty((w.shape[0], w.shape[1] // 2), np.uint8)
    values = w.detach().contiguous().numpy().reshape(-1, 2)
    if not _in_parts(_pack, values, packed.reshape(-1)):
        low, high = (int(bound) for bound in w.aminmax())
        refuse("pack_int4", "w", f"{low}..{high}", "values in -8..7")
    return torch.from_numpy(packed)


def unpack_int4(packed: torch.Tensor, k: int) -> torch.Tensor:
    """Unpack the linear layout, uint8 ``[N, ceil(k/2)]``, into int8 ``[N, k]`` of -8..7."""
    check_dtype("unpack_int4", "packed", packed, (torch.uint8,))
    if packed.dim() != 2 or packed.shape[1] != (k + 1) // 2:
        refuse("unpack_int4", "packed.shape", list(packed.shape), f"[N, ceil(k/2)] with k={k}")
    w = torch.empty((packed.shape[0], 2 * packed.shape[1]), dtype=torch.int8)
    pairs = w.numpy().reshape(-1).view(np.uint16)
    _in_parts(_unpack, packed.contiguous().numpy().reshape(-1), pairs)
    return w[:, :k].contiguous()


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

    scales: float ``[N, K/group_size]``; zeros: int8 or float of that shape, or None for 0.
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
    rows = max(1, _CHUNK // k)
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


def _in_parts(work: Callable[..., bool], source: np.ndarray, target: np.ndarray) -> bool:
    """Call ``work`` on parts of two flat arrays, one a thread, and tell whether all return True."""
    threads = torch.get_num_threads() if len(source) >= _PARALLEL else 1
    if threads == 1:
        return work(source, target)
    share = -(-len(source) // threads)
    parts = [slice(start, start + share) for start in range(0, len(source), share)]
    with ThreadPoolExecutor(threads) as pool:  # numpy lets go of the interpreter's lock
        return all(list(pool.map(lambda part: work(source[part], target[part]), parts)))


def _pack(values: np.ndarray, packed: np.ndarray) -> bool:
    """Pack ``[pairs, 2]`` of even and odd values into bytes; return False if one is no int4.

    A pair is the 16-bit number even + 256 * odd. The upper byte of its product with 256 + 16 is
    even + 16 * odd; seen from one byte later, it is a lower byte, which is what narrowing keeps.
    """
    scratch = np.empty(2 * min(_PACKED_AT_ONCE, len(values)) + 1, np.uint8)
    for start in range(0, len(values), _PACKED_AT_ONCE):
        chunk = values[start : start + _PACKED_AT_ONCE].reshape(-1).view(np.uint8)
        nibbles = np.add(chunk, 8, out=scratch[: chunk.size])
        if np.maximum.reduce(nibbles) > 15:  # -8..7 is 0..15 now, all else above, modulo 256
            return False
        pairs = nibbles.view(np.uint16)
        np.multiply(pairs, 0x0110, out=pairs)
        upper = scratch[1 : chunk.size + 1].view(np.uint16)
        np.copyto(packed[start : start + _PACKED_AT_ONCE], upper, casting="unsafe")
    return True


def _unpack(packed: np.ndarray, pairs: np.ndarray) -> bool:
    """Undo ``_pack``."""
    nibbles = np.empty(min(_CHUNK, packed.size), np.uint16)
    for start in range(0, packed.size, _CHUNK):
        chunk = packed[start : start + _CHUNK]
        spread = np.left_shift(chunk, 4, out=nibbles[: chunk.size], dtype=np.uint16)
        np.bitwise_or(spread, chunk, out=spread)
        np.bitwise_and(spread, 0x0F0F, out=spread)
        target = pairs[start : start + _CHUNK]
        np.subtract(spread.view(np.uint8), 8, out=target.view(np.uint8))
    return True
