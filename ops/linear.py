"""Linear layers with group-quantized int4 weights: 8-bit activations, or weight-only.

``linear_qta8a_qga4w`` follows the ET-VK operator of that name: with the integer sums
``acc[g] = sum_k (x_q - x_zero) * (w - w_zero)`` of each group of columns,
``y = x_scale * sum_g w_scale[g] * acc[g] + bias``.
"""

import torch

from edgepass.ops.checks import (
    FLOAT_DTYPES,
    ZERO_DTYPES,
    check_dtype,
    check_shape,
    known_unequal,
    refuse,
)
from edgepass.ops.library import register_operator
from edgepass.ops.matmul import is_small, matmul_float32, matmul_float64
from edgepass.ops.quantize import quantize_dequantize, quantize_per_token

_NAME = "linear_qta8a_qga4w"
_WEIGHT_ONLY = "linear_qga4w"


def linear_qta8a_qga4w(
    x_q: torch.Tensor,
    x_scale: torch.Tensor,
    x_zero: torch.Tensor,
    w_packed: torch.Tensor,
    group_size: int,
    w_scales: torch.Tensor,
    w_zeros: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Linear of quantized activations, int8 ``[..., K]``, to ``[..., N]`` in w_scales' dtype.

    x_scale: float ``[...]``; x_zero: int8 or int32 ``[...]`` (one encoding a token); w_packed:
    uint8 ``[N, ceil(K/2)]`` in the linear layout; w_scales: float and w_zeros: int8 or
    float, ``[N, K/group_size]``; bias: float ``[N]``.
    """
    _check_quantized(x_q, x_scale, x_zero)
    _check_weight(_NAME, x_q, w_packed, group_size, w_scales, w_zeros, bias)
    weight = (w_packed, group_size, w_scales, w_zeros)
    scale, zero = x_scale.unsqueeze(-1), x_zero.unsqueeze(-1)
    if is_small(x_q, w_packed):
        out = matmul_float64(x_q.double() - zero, *weight) * scale.double()
        out = out if bias is None else out + bias
    else:
        out = matmul_float32(x_q.float().sub_(zero).mul_(scale), *weight, _float_bias(bias))
    return out.to(w_scales.dtype)


def linear_qta8a_qga4w_dynamic(
    x: torch.Tensor,
    w_packed: torch.Tensor,
    group_size: int,
    w_scales: torch.Tensor,
    w_zeros: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """``linear_qta8a_qga4w`` of a float ``[..., K]`` that is quantized per token inside."""
    check_dtype(_NAME, "x", x, FLOAT_DTYPES)
    _check_weight(_NAME, x, w_packed, group_size, w_scales, w_zeros, bias)
    weight = (w_packed, group_size, w_scales, w_zeros)
    if x.dtype != torch.float32 or is_small(x, w_packed):
        q, scale, zero = quantize_per_token(x)
        return linear_qta8a_qga4w(q, scale, zero, *weight, bias)
    out = matmul_float32(quantize_dequantize(x), *weight, _float_bias(bias))
    return out.to(w_scales.dtype)


def linear_qga4w(
    x: torch.Tensor,
    w_packed: torch.Tensor,
    group_size: int,
    w_scales: torch.Tensor,
    w_zeros: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Weight-only linear of a float ``[..., K]``: ``x @ dequantized(w).T + bias``.

    The other arguments and the result are those of ``linear_qta8a_qga4w``.
    """
    check_dtype(_WEIGHT_ONLY, "x", x, FLOAT_DTYPES)
    _check_weight(_WEIGHT_ONLY, x, w_packed, group_size, w_scales, w_zeros, bias)
    weight = (w_packed, group_size, w_scales, w_zeros)
    if is_small(x, w_packed):
        out = matmul_float64(x.double(), *weight)
        out = out if bias is None else out + bias
    else:
        out = matmul_float32(x.float(), *weight, _float_bias(bias))
    return out.to(w_scales.dtype)


def _float_bias(bias: torch.Tensor | None) -> torch.Tensor | None:
    return None if bias is None else bias.float()


def _linear_fake(
    x_q: torch.Tensor,
    x_scale: torch.Tensor,
    x_zero: torch.Tensor,
    w_packed: torch.Tensor,
    group_size: int,
    w_scales: torch.Tensor,
    w_zeros: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    _check_quantized(x_q, x_scale, x_zero)
    _check_weight(_NAME, x_q, w_packed, group_size, w_scales, w_zeros, bias)
    return w_scales.new_empty((*x_q.shape[:-1], w_packed.shape[0]))


def _dynamic_fake(
    x: torch.Tensor,
    w_packed: torch.Tensor,
    group_size: int,
    w_scales: torch.Tensor,
    w_zeros: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    check_dtype(_NAME, "x", x, FLOAT_DTYPES)
    _check_weight(_NAME, x, w_packed, group_size, w_scales, w_zeros, bias)
    return w_scales.new_empty((*x.shape[:-1], w_packed.shape[0]))


def _weight_only_fake(
    x: torch.Tensor,
    w_packed: torch.Tensor,
    group_size: int,
    w_scales: torch.Tensor,
    w_zeros: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    check_dtype(_WEIGHT_ONLY, "x", x, FLOAT_DTYPES)
    _check_weight(_WEIGHT_ONLY, x, w_packed, group_size, w_scales, w_zeros, bias)
    return w_scales.new_empty((*x.shape[:-1], w_packed.shape[0]))


def _check_quantized(x_q: torch.Tensor, x_scale: torch.Tensor, x_zero: torch.Tensor) -> None:
    check_dtype(_NAME, "x_q", x_q, (torch.int8,))
    check_dtype(_NAME, "x_scale", x_scale, FLOAT_DTYPES)
    check_dtype(_NAME, "x_zero", x_zero, (torch.int8, torch.int32))
    check_shape(_NAME, "x_scale", x_scale, x_q.shape[:-1], "one scale a token")
    check_shape(_NAME, "x_zero", x_zero, x_q.shape[:-1], "one zero point a token")


def _check_weight(
    name: str,
    x: torch.Tensor,
    w_packed: torch.Tensor,
    group_size: int,
    w_scales: torch.Tensor,
    w_zeros: torch.Tensor,
    bias: torch.Tensor | None,
) -> None:
    check_dtype(name, "w_packed", w_packed, (torch.uint8,))
    check_dtype(name, "w_scales", w_scales, FLOAT_DTYPES)
    check_dtype(name, "w_zeros", w_zeros, ZERO_DTYPES)
    if x.dim() == 0 or x.shape[-1] == 0:
        argument = "x_q" if x.dtype == torch.int8 else "x"
        refuse(name, f"{argument}.shape", list(x.shape), "[..., K] with K of 1 or more")
    k = x.shape[-1]
    if group_size < 1 or (isinstance(k, int) and k % group_size):
        refuse(name, "group_size", group_size, f"a divisor of K={k}")
    if w_packed.dim() != 2 or known_unequal(w_packed.shape[1], (k + 1) // 2):
        refuse(name, "w_packed.shape", list(w_packed.shape), f"[N, ceil(K/2)] with K={k}")
    n = w_packed.shape[0]
    check_shape(name, "w_scales", w_scales, (n, k // group_size), "N, K/group_size")
    check_shape(name, "w_zeros", w_zeros, (n, k // group_size), "N, K/group_size")
    if bias is not None:
        check_dtype(name, "bias", bias, FLOAT_DTYPES)
        check_shape(name, "bias", bias, (n,), "N")


_WEIGHT_ARGUMENTS = (
    "Tensor w_packed, int group_size, Tensor w_scales, Tensor w_zeros, Tensor? bias=None"
)
register_operator(
    f"{_NAME}(Tensor x_q, Tensor x_scale, Tensor x_zero, {_WEIGHT_ARGUMENTS}) -> Tensor",
    linear_qta8a_qga4w,
    _linear_fake,
)
register_operator(
    f"{_NAME}.dynamic(Tensor x, {_WEIGHT_ARGUMENTS}) -> Tensor",
    linear_qta8a_qga4w_dynamic,
    _dynamic_fake,
)
register_operator(
    f"{_WEIGHT_ONLY}(Tensor x, {_WEIGHT_ARGUMENTS}) -> Tensor", linear_qga4w, _weight_only_fake
)
