"""Root mean square layer normalisation (Zhang and Sennrich, 2019) as one operator."""

import torch

from edgepass.ops.checks import FLOAT_DTYPES, check_dtype, check_shape, refuse
from edgepass.ops.library import register_operator


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """``x * rsqrt(mean(x^2, -1) + eps) * weight``, in float32, result in x's dtype.

    x: float ``[..., D]``; weight: float ``[D]``.
    """
    _check_rms_norm(x, weight)
    wide = x.contiguous().float()
    inverse = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    return (wide * inverse).mul_(weight).to(x.dtype)


def _rms_norm_fake(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    _check_rms_norm(x, weight)
    return x.new_empty(x.shape)


def _check_rms_norm(x: torch.Tensor, weight: torch.Tensor) -> None:
    check_dtype("rms_norm", "x", x, FLOAT_DTYPES)
    check_dtype("rms_norm", "weight", weight, FLOAT_DTYPES)
    if x.dim() == 0:
        refuse("rms_norm", "x.shape", list(x.shape), "[..., D]")
    check_shape("rms_norm", "weight", weight, (x.shape[-1],), "the last size of x")


register_operator(
    "rms_norm(Tensor x, Tensor weight, float eps) -> Tensor", rms_norm, _rms_norm_fake
)
