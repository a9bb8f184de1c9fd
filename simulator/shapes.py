"""Operators that move values or make them: views, slices, splits, copies, constants."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from edgepass.simulator.checks import check_size
from edgepass.simulator.graph import TensorValue
from edgepass.simulator.registry import Kernel, Site, operator, prepared


@operator("aten.view_copy.default")
def view_copy(x: Tensor, sizes: list[int]) -> Tensor:
    return x.reshape(sizes)


@operator("aten.permute_copy.default", "aten.permute.default")
def permute(x: Tensor, dims: list[int]) -> Tensor:
    return x.permute(dims)


@operator("aten.unsqueeze_copy.default")
def unsqueeze(x: Tensor, dim: int) -> Tensor:
    return x.unsqueeze(dim)


@operator("aten.squeeze_copy.dims")
def squeeze(x: Tensor, dims: list[int]) -> Tensor:
    return x.squeeze(tuple(dims))


@operator("aten.select_copy.int", "aten.select.int")
def select(x: Tensor, dim: int, index: int | None) -> Tensor:
    return x.select(dim, 0 if index is None else index)


@operator("aten.slice_copy.Tensor", "aten.slice.Tensor")
def slice_copy(
    x: Tensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Tensor:
    return torch.slice_copy(x, dim, start, end, step)


@operator("aten.clone.default", "aten._to_copy.default", "dim_order_ops._to_dim_order_copy.default")
def copy(x: Tensor, *_: Any) -> Tensor:
    """The result's own dtype says what it is converted to."""
    return x


@operator("aten.cat.default")
def cat(tensors: list[Tensor], dim: int = 0) -> Tensor:
    return torch.cat(tensors, dim)


@operator("aten.flip.default")
def flip(x: Tensor, dims: list[int]) -> Tensor:
    return x.flip(dims)


@prepared("aten.split_with_sizes_copy.default")
def split_with_sizes(site: Site) -> Kernel:
    """impl/Split.cpp gives the results no resize function: they keep their largest sizes.

    Where the input has fewer values now, the device returns what the memory held before; here
    those are zeros.
    """
    shapes = [value.shape for value in site.results() if isinstance(value, TensorValue)]
    for shape in shapes:
        check_size(shape, site.tensor(0).shape, site.call.name)

    def kernel(x: Tensor, sizes: list[int], dim: int = 0) -> list[Tensor]:
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        return [_window(x, dim, at, shape) for at, shape in zip(starts, shapes, strict=True)]

    return kernel


def _window(x: Tensor, dim: int, start: int, shape: tuple[int, ...]) -> Tensor:
    """``x`` from ``start`` along ``dim`` on, cut or filled with zeros to ``shape``."""
    part = x.narrow(dim, min(start, x.shape[dim]), max(0, x.shape[dim] - start))
    part = part[tuple(slice(0, size) for size in shape)]
    out = x.new_zeros(shape)
    out[tuple(slice(0, size) for size in part.shape)] = part
    return out


def _made(site: Site) -> tuple[int, ...]:
    return site.result().shape


@prepared("aten.expand_copy.default")
def expand(site: Site) -> Kernel:
    def kernel(x: Tensor, sizes: list[int], *_: Any) -> Tensor:
        view = x.expand(sizes)
        check_size(view.shape, _made(site), site.call.name)
        return view

    return kernel


@prepared("aten.repeat.default")
def repeat(site: Site) -> Kernel:
    def kernel(x: Tensor, repeats: list[int]) -> Tensor:
        check_size([x.numel(), *repeats], _made(site), site.call.name)
        return x.repeat(repeats)

    return kernel


@prepared("aten.repeat_interleave.self_int")
def repeat_interleave(site: Site) -> Kernel:
    def kernel(x: Tensor, repeats: int, dim: int | None = None, *_: Any) -> Tensor:
        check_size([x.numel(), repeats], _made(site), site.call.name)
        return x.repeat_interleave(repeats, dim)

    return kernel


@prepared("aten.full.default", "aten.full_like.default")
def full(site: Site) -> Kernel:
    def kernel(like: Tensor | list[int], value: float, *_: Any) -> Tensor:
        return _filled(site, like, value)

    return kernel


@prepared("aten.zeros.default", "aten.zeros_like.default")
def zeros(site: Site) -> Kernel:
    return lambda like, *_: _filled(site, like, 0)


@prepared("aten.ones.default", "aten.ones_like.default")
def ones(site: Site) -> Kernel:
    return lambda like, *_: _filled(site, like, 1)


def _filled(site: Site, like: Tensor | list[int], value: float) -> Tensor:
    sizes = list(like.shape) if isinstance(like, Tensor) else list(like)
    check_size(sizes, _made(site), site.call.name)
    dtype = torch.float32 if site.result().dtype.is_floating_point else site.result().dtype
    return torch.full(sizes, value, dtype=dtype)


@operator("aten.scalar_tensor.default")
def scalar_tensor(value: float, *_: Any) -> Tensor:
    return torch.tensor(value)


@prepared("aten.arange.start_step")
def arange(site: Site) -> Kernel:
    def kernel(start: int | None, end: int, step: int | None = None, *_: Any) -> Tensor:
        places = range(start or 0, end, step or 1)
        check_size([len(places)], _made(site), site.call.name)
        return torch.arange(places.start, places.stop, places.step)

    return kernel


@prepared("aten.constant_pad_nd.default")
def constant_pad_nd(site: Site) -> Kernel:
    def kernel(x: Tensor, pad: list[int], value: float = 0) -> Tensor:
        sizes = list(x.shape)
        for i in range(len(pad) // 2):
            sizes[-1 - i] += pad[2 * i] + pad[2 * i + 1]
        check_size(sizes, _made(site), site.call.name)
        return torch.nn.functional.pad(x, pad, value=value)

    return kernel
