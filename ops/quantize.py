"""Per-token dynamic quantization of activations: asymmetric int8, one encoding a token.

The formula is that of ``torchao.quantization.quant_primitives.choose_qparams_affine`` (ASYMMETRIC)
and ``quantize_affine``, bit for bit: every step is taken in the input's dtype.
"""

import ctypes
import math

import torch

from edgepass.ops.checks import FLOAT_DTYPES, check_dtype, refuse
from edgepass.ops.library import register_operator

# torchao's default floor is the smallest normal number of the input's dtype; this is float32's.
DEFAULT_SCALE_FLOOR = torch.finfo(torch.float32).smallest_normal
VULKAN_SCALE_FLOOR = 6.1e-5
# Steps between the ends of int8, as a tensor: a Python number is turned into one at each call.
_STEPS = torch.tensor(255.0)
# Distance from a whole number of steps; the quotient's own error is below 2^-15.
_NEARLY_HALF = 0.4999
# Values a chunk: with its result 8 MB of float32; smaller ones pay more for their calls.
_CHUNK = 1 << 20
# Values from which on a look at all tokens is cheaper than two passes over them.
_MANY = 1 << 16


def quantize_per_token(
    x: torch.Tensor, scale_floor: float = DEFAULT_SCALE_FLOOR
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantize float ``[..., K]``: int8 ``[..., K]``, scale ``[...]`` in x's dtype, zero ``[...]``.

    The scale is at least ``scale_floor`` and at least the smallest normal number of x's dtype.
    """
    _check_activation(x)
    rows = x.reshape(-1, x.shape[-1])
    low, high = _range(rows)
    scale = _scale(low, high, scale_floor)
    zero = (-128 - (low / scale).round_()).clamp_(-128, 127)
    q = (rows * (1.0 / scale)).round_().add_(zero).clamp_(-128, 127)
    tokens = x.shape[:-1]
    return (
        q.to(torch.int8).view(x.shape),
        scale.view(tokens),
        zero.to(torch.int8).view(tokens),
    )


def quantize_dequantize(x: torch.Tensor) -> torch.Tensor:
    """Float32 ``[..., K]`` as a device sees it: ``(q - zero) * scale`` of ``quantize_per_token``.

    With r = round(low / scale) the zero point is -128 - r, exactly, so that q - zero is the
    rounded quotient clamped to r..r + 255.
    """
    x = x.contiguous()
    if x.numel() == x.shape[-1]:
        low, high = (bound.item() for bound in x.aminmax())
        if math.isfinite(high - low):
            return _quantize_dequantize_token(x, min(low, 0.0), max(high, 0.0))
    if x.numel() < _MANY:
        return _quantize_dequantize_few(x)
    out = torch.empty_like(x)
    tokens, results = x.view(-1, x.shape[-1]), out.view(-1, x.shape[-1])
    rows = max(1, _CHUNK // x.shape[-1])
    for start in range(0, tokens.shape[0], rows):
        _quantize_dequantize_rows(tokens[start : start + rows], results[start : start + rows])
    return out


def _quantize_dequantize_token(x: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """One token, with its encoding in Python numbers: ten calls into torch less, which is what
    decoding one token at a time spends its time on. A float64 quotient or difference of float32
    values, rounded to float32, is the float32 one."""
    scale = max(_float32(_float32(high - low) / 255.0), DEFAULT_SCALE_FLOOR)
    lowest = round(_float32(low / scale))
    out = x * _float32(1.0 / scale)
    return out.round_().clamp_(lowest, lowest + 255).mul_(scale)


def _quantize_dequantize_few(x: torch.Tensor) -> torch.Tensor:
    """A few tokens, whose time goes into calls and not into values: as few calls as can be."""
    low, high = _range(x)
    scale = high.sub_(low).div_(_STEPS).clamp_min_(DEFAULT_SCALE_FLOOR)
    lowest = low.div_(scale).round_()
    out = (x * scale.reciprocal()).round_()
    torch.maximum(out, lowest, out=out)
    torch.minimum(out, lowest.add_(_STEPS), out=out)
    return out.mul_(scale)


def _quantize_dequantize_rows(x: torch.Tensor, out: torch.Tensor) -> None:
    low, high = _range(x)
    scale = _scale(low, high, DEFAULT_SCALE_FLOOR)
    steps = low.div_(scale)
    lowest = steps.round()
    torch.mul(x, scale.reciprocal(), out=out)
    out.round_()
    # The ends of a range are at most 255 steps apart. They round to more only when both lie half
    # way between two steps; without such a row two passes over the activations are saved.
    if steps.sub_(lowest).abs_().max().item() > _NEARLY_HALF:
        torch.maximum(out, lowest, out=out)
        torch.minimum(out, lowest.add_(_STEPS), out=out)
    out.mul_(scale)


def _range(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The ends of each row's range, which holds 0: both ``[..., 1]``. (Two passes: torch's aminmax
    along a dimension takes ten times as long as amin.)"""
    low = rows.amin(-1, keepdim=True).clamp_max_(0)
    return low, rows.amax(-1, keepdim=True).clamp_min_(0)


def _scale(low: torch.Tensor, high: torch.Tensor, floor: float) -> torch.Tensor:
    floor = max(floor, torch.finfo(low.dtype).smallest_normal)
    return (high - low).div_(_STEPS).clamp_min_(floor)


def _float32(value: float) -> float:
    return ctypes.c_float(value).value


def _quantize_per_token_fake(
    x: torch.Tensor, scale_floor: float = DEFAULT_SCALE_FLOOR
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    _check_activation(x)
    tokens = x.shape[:-1]
    return (
        x.new_empty(x.shape, dtype=torch.int8),
        x.new_empty(tokens),
        x.new_empty(tokens, dtype=torch.int8),
    )


def _check_activation(x: torch.Tensor) -> None:
    check_dtype("quantize_per_token", "x", x, FLOAT_DTYPES)
    if x.dim() == 0 or x.shape[-1] == 0:
        refuse("quantize_per_token", "x.shape", list(x.shape), "[..., K] with K of 1 or more")


register_operator(
    f"quantize_per_token(Tensor x, float scale_floor={DEFAULT_SCALE_FLOOR!r})"
    " -> (Tensor q, Tensor scale, Tensor zero)",
    quantize_per_token,
    _quantize_per_token_fake,
)
