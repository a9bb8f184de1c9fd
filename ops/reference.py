"""What each operator means, in float64 and by another way than its kernel: the tests' yardstick.

Slow and plain on purpose. Integer sums are exact; everything else is float64. Arguments and
shapes are those of the operator of the same name, results are float64.
"""

import torch
from torch import Tensor


def unpack_linear_layout(packed: Tensor, k: int) -> Tensor:
    """Int64 ``[N, k]`` of -8..7 from uint8 ``[N, ceil(k/2)]``, the even column in low nibbles."""
    columns = torch.arange(k)
    nibbles = packed.long()[:, columns // 2] // (16 ** (columns % 2)) % 16
    return nibbles - 8


def quantize_per_token(x: Tensor, scale_floor: float) -> tuple[Tensor, Tensor, Tensor]:
    """Real-number form of the formula: q may differ by one step where float32 rounds the other way.

    The scale is ``(max(high, 0) - min(low, 0)) / 255``, at least ``scale_floor``.
    """
    wide = x.double()
    low = wide.min(dim=-1, keepdim=True).values.clamp_max(0)
    high = wide.max(dim=-1, keepdim=True).values.clamp_min(0)
    scale = ((high - low) / 255).clamp_min(scale_floor)
    zero = -128 - (low / scale).round()
    q = ((wide / scale).round() + zero).clamp(-128, 127)
    return q, scale.squeeze(-1), zero.squeeze(-1)


def linear_qta8a_qga4w(
    x_q: Tensor,
    x_scale: Tensor,
    x_zero: Tensor,
    w_packed: Tensor,
    group_size: int,
    w_scales: Tensor,
    w_zeros: Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    """Exact sums of each group (int64, but for float zero points), scaled and added in float64."""
    w = unpack_linear_layout(w_packed, x_q.shape[-1]).unflatten(1, (-1, group_size))
    w = w - _exact(w_zeros).unsqueeze(-1)
    x = (x_q.long() - x_zero.long().unsqueeze(-1)).unflatten(-1, (-1, group_size))
    out = torch.zeros(*x_q.shape[:-1], w.shape[0], dtype=torch.float64)
    for group in range(w.shape[1]):
        sums = (x[..., group, None, :] * w[:, group]).sum(-1)
        out += sums.double() * w_scales[:, group].double()
    out *= x_scale.double().unsqueeze(-1)
    return out if bias is None else out + bias.double()


def linear_qga4w(
    x: Tensor,
    w_packed: Tensor,
    group_size: int,
    w_scales: Tensor,
    w_zeros: Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    """The dequantized weight, column by column, against x."""
    w = unpack_linear_layout(w_packed, x.shape[-1])
    groups = torch.arange(x.shape[-1]) // group_size
    dequantized = (w - _exact(w_zeros)[:, groups]).double() * w_scales.double()[:, groups]
    out = torch.einsum("...k,nk->...n", x.double(), dequantized)
    return out if bias is None else out + bias.double()


def embedding_qg(
    weight: Tensor, scales: Tensor, zeros: Tensor | None, group_size: int, bits: int, ids: Tensor
) -> Tensor:
    """The whole table dequantized, then looked up."""
    k = scales.shape[1] * group_size
    w = unpack_linear_layout(weight, k) if bits == 4 else weight.long()
    groups = torch.arange(k) // group_size
    if zeros is not None:
        w = w - _exact(zeros)[:, groups]
    return (w.double() * scales.double()[:, groups])[ids.long()]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Division by the root of the mean square plus eps."""
    mean_square = (x.double() ** 2).sum(-1, keepdim=True) / x.shape[-1]
    return x.double() / (mean_square + eps).sqrt() * weight.double()


def rotary(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Each pair of channels as a complex number, turned by cos + i sin.

    The tables' two entries of a pair are taken apart: the first serves the real part.
    """
    out = x.double().clone()
    width = cos.shape[-1]
    cos, sin = (table.double() for table in (cos, sin))
    if cos.dim() < 4:
        cos, sin = cos.unsqueeze(-3), sin.unsqueeze(-3)
    for pair in range(width // 2):
        first, second = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + width // 2)
        real, imaginary = x[..., first].double(), x[..., second].double()
        out[..., first] = real * cos[..., first] - imaginary * sin[..., first]
        out[..., second] = imaginary * cos[..., second] + real * sin[..., second]
    return out


def position_rows(table: Tensor, input_pos: Tensor, length: int) -> Tensor:
    """Row by row."""
    rows = [table[int(input_pos) + i] for i in range(length)]
    return torch.stack(rows).double() if rows else table[:0].double()


def cached_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    input_pos: Tensor,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
) -> Tensor:
    """Softmax over the whole cache with the rows that a token must not see at minus infinity."""
    repeats = q.shape[1] // k_cache.shape[1]
    keys, values = (c.double().repeat_interleave(repeats, 1) for c in (k_cache, v_cache))
    scores = q.double() @ keys.transpose(-1, -2) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    positions = (input_pos + torch.arange(q.shape[2])).unsqueeze(1)
    rows = torch.arange(k_cache.shape[2])
    hidden = rows > positions
    if window:
        hidden |= rows <= positions - window
    # A row that no token sees may hold anything: it is taken out, not multiplied by zero.
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    seen = ~hidden.all(0)
    return weights[..., seen] @ values[:, :, seen]


def _exact(zeros: Tensor) -> Tensor:
    return zeros.double() if zeros.is_floating_point() else zeros.long()
