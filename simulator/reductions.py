"""Sums along dimensions, softmax and norms: impl/Reduce.cpp, Softmax.cpp, RmsNorm.cpp, ..."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from edgepass.simulator.registry import operator


def _along(reduce: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def kernel(x: Tensor, dims: list[int] | None = None, keep: bool = False, *_: Any) -> Tensor:
        return reduce(x, dim=dims or list(range(x.dim())), keepdim=bool(keep))

    return kernel


operator("aten.sum.dim_IntList")(_along(torch.sum))
operator("aten.mean.dim")(_along(torch.mean))
operator("aten.amax.default")(_along(torch.amax))
operator("aten.amin.default")(_along(torch.amin))


@operator("aten.var.dim")
def var(x: Tensor, dims: list[int] | None, unbiased: bool = True, keep: bool = False) -> Tensor:
    return torch.var(x, dim=dims, unbiased=unbiased, keepdim=keep)


@operator("aten.argmax.default")
def argmax(x: Tensor, dim: int | None = None, keep: bool = False) -> Tensor:
    return torch.argmax(x, dim, keepdim=keep)


@operator("aten.argmin.default")
def argmin(x: Tensor, dim: int | None = None, keep: bool = False) -> Tensor:
    return torch.argmin(x, dim, keepdim=keep)


@operator("aten._softmax.default")
def softmax(x: Tensor, dim: int, *_: Any) -> Tensor:
    return torch.softmax(x, dim)


@operator("aten._log_softmax.default")
def log_softmax(x: Tensor, dim: int, *_: Any) -> Tensor:
    return torch.log_softmax(x, dim)


@operator("et_vk.rms_norm.default")
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Squares are summed in float whatever the storage (glsl/rms_norm_texture.glsl)."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


@operator("aten.native_layer_norm.default")
def native_layer_norm(
    x: Tensor, shape: list[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.native_layer_norm(x, shape, weight, bias, eps)


@operator("aten.native_group_norm.default")
def native_group_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, *sizes: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.native_group_norm(x, weight, bias, *sizes)
