"""Linear layers with int8 weights, one scale a channel, and 8-bit activations a token.

XNNPACK's ``qd8-f32-qc8w`` computes it: ``y = x_scale * w_scale * sum_k (x_q - x_zero) * w + bias``.
"""

import torch

from edgepass.ops.checks import FLOAT_DTYPES, check_dtype, check_shape, known_unequal, refuse
from edgepass.ops.library import register_operator
from edgepass.ops.quantize import DEFAULT_SCALE_FLOOR, quantize_per_token

_NAME = "linear_qta8a_qc8w"
# 255 * 128 * 512 is below 2**24: sums of so many products are exact in float32, in any order.
_EXACT_COLUMNS = 512


def linear_qta8a_qc8w_dynamic(
    x: torch.Tensor,
    weight: torch.Tensor,
    w_scales: torch.Tensor,
    bias: torch.Tensor | None = None,
    scale_floor: float = DEFAULT_SCALE_FLOOR,
) -> torch.Tensor:
    """Linear of a float ``[..., K]``, quantized per token inside, to ``[..., N]`` of its dtype.

    weight: int8 ``[N, K]``; w_scales: float ``[N]``; bias: float ``[N]``; scale_floor: the least
    scale of a token.
    """
    _check(x, weight, w_scales, bias)
    q, scale, zero = quantize_per_token(x, scale_floor)
    rows, columns = q.float().sub_(zero.unsqueeze(-1)), weight.float()
    out = torch.zeros(*x.shape[:-1], weight.shape[0])
    for start in range(0, weight.shape[1], _EXACT_COLUMNS):
        part = slice(start, start + _EXACT_COLUMNS)
        out += torch.nn.functional.linear(rows[..., part], columns[:, part])
    out *= scale.float().unsqueeze(-1)
    out *= w_scales.float()
    return (out if bias is None else out + bias.float()).to(x.dtype)


def _fake(
    x: torch.Tensor,
    weight: torch.Tensor,
    w_scales: torch.Tensor,
    bias: torch.Tensor | None = None,
    scale_floor: float = DEFAULT_SCALE_FLOOR,
) -> torch.Tensor:
    _check(x, weight, w_scales, bias)
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _check(
    x: torch.Tensor,
    weight: torch.Tensor,
    w_scales: torch.Tensor,
    bias: torch.Tensor | None,
) -> None:
    check_dtype(_NAME, "x", x, FLOAT_DTYPES)
    check_dtype(_NAME, "weight", weight, (torch.int8,))
    check_dtype(_NAME, "w_scales", w_scales, FLOAT_DTYPES)
    if x.dim() == 0 or x.shape[-1] == 0:
        refuse(_NAME, "x.shape", list(x.shape), "[..., K] with K of 1 or more")
    if weight.dim() != 2 or known_unequal(weight.shape[1], x.shape[-1]):
        refuse(_NAME, "weight.shape", list(weight.shape), f"[N, K] with K={x.shape[-1]}")
    check_shape(_NAME, "w_scales", w_scales, (weight.shape[0],), "N")
    if bias is not None:
        check_dtype(_NAME, "bias", bias, FLOAT_DTYPES)
        check_shape(_NAME, "bias", bias, (weight.shape[0],), "N")


register_operator(
    f"{_NAME}.dynamic(Tensor x, Tensor weight, Tensor w_scales, Tensor? bias=None, "
    f"float scale_floor={DEFAULT_SCALE_FLOOR!r}) -> Tensor",
    linear_qta8a_qc8w_dynamic,
    _fake,
)
