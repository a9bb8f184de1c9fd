"""Operators value by value: impl/UnaryOp.cpp, BinaryOp.cpp, BinaryScalarOp.cpp, Where.cpp."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from edgepass.simulator.registry import Kernel, operator

_PLAIN_UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "aten.abs.default": torch.abs,
    "aten.cos.default": torch.cos,
    "aten.exp.default": torch.exp,
    "aten.hardsigmoid.default": torch.nn.functional.hardsigmoid,
    "aten.hardswish.default": torch.nn.functional.hardswish,
    "aten.log10.default": torch.log10,
    "aten.neg.default": torch.neg,
    "aten.relu.default": torch.relu,
    "aten.relu6.default": torch.nn.functional.relu6,
    "aten.round.default": torch.round,
    "aten.rsqrt.default": torch.rsqrt,
    "aten.sigmoid.default": torch.sigmoid,
    "aten.sin.default": torch.sin,
    "aten.sqrt.default": torch.sqrt,
    "aten.tan.default": torch.tan,
    "aten.tanh.default": torch.tanh,
}
_PLAIN_BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "aten.bitwise_and.Tensor": torch.bitwise_and,
    "aten.bitwise_or.Tensor": torch.bitwise_or,
    "aten.div.Tensor": torch.div,
    "aten.ge.Tensor": torch.ge,
    "aten.gt.Tensor": torch.gt,
    "aten.le.Tensor": torch.le,
    "aten.logical_and.default": torch.logical_and,
    "aten.logical_or.default": torch.logical_or,
    "aten.lt.Tensor": torch.lt,
    "aten.minimum.default": torch.minimum,
    "aten.mul.Tensor": torch.mul,
}
_SCALAR: dict[str, Callable[[Tensor, float], Tensor]] = {
    "aten.eq.Scalar": torch.eq,
    "aten.ge.Scalar": torch.ge,
    "aten.gt.Scalar": torch.gt,
    "aten.le.Scalar": torch.le,
    "aten.lt.Scalar": torch.lt,
    "aten.ne.Scalar": torch.ne,
}


def _register_plain() -> None:
    for name, unary in _PLAIN_UNARY.items():
        operator(name)(_first(unary))
    for name, binary in (_PLAIN_BINARY | _SCALAR).items():
        operator(name)(binary)


def _first(function: Callable[[Tensor], Tensor]) -> Kernel:
    def kernel(x: Tensor, *_: Any) -> Tensor:
        return function(x)

    return kernel


_register_plain()


@operator("aten.gelu.default")
def gelu(x: Tensor, approximate: str = "none") -> Tensor:
    """The tanh form, whatever ``approximate`` says: the runtime has no other."""
    return torch.nn.functional.gelu(x, approximate="tanh")


@operator("aten.clamp.default", "aten.hardtanh.default")
def clamp(x: Tensor, low: float | None = None, high: float | None = None) -> Tensor:
    return x.clamp(-math.inf if low is None else low, math.inf if high is None else high)


@operator("aten.leaky_relu.default")
def leaky_relu(x: Tensor, slope: float = 0.01) -> Tensor:
    return torch.nn.functional.leaky_relu(x, slope)


@operator("aten.hardshrink.default")
def hardshrink(x: Tensor, bound: float = 0.5) -> Tensor:
    return torch.nn.functional.hardshrink(x, bound)


@operator("aten.bitwise_not.default")
def bitwise_not(x: Tensor) -> Tensor:
    return x.logical_not()


@operator("aten.add.Tensor")
def add(x: Tensor, y: Tensor, alpha: float = 1) -> Tensor:
    return torch.add(x, y, alpha=alpha)


@operator("aten.sub.Tensor")
def sub(x: Tensor, y: Tensor, alpha: float = 1) -> Tensor:
    return torch.sub(x, y, alpha=alpha)


@operator("aten.div.Tensor_mode")
def floor_divide(x: Tensor, y: Tensor, *_: Any) -> Tensor:
    """Rounds down, whatever the mode says."""
    return torch.floor(x / y)


@operator("aten.eq.Tensor")
def eq(x: Tensor, y: Tensor) -> Tensor:
    """Floats within 1e-5 of each other are equal (glsl/binary_op_texture.yaml)."""
    return (x - y).abs() < 1e-5 if x.is_floating_point() else x == y


@operator("aten.pow.Tensor_Tensor")
def power(x: Tensor, y: Tensor) -> Tensor:
    """GLSL leaves powers of negative numbers open; drivers give NaN, as exp2(y * log2(x)) does."""
    return torch.where(x < 0, math.nan, torch.pow(x, y))


@operator("aten.pow.Tensor_Scalar")
def power_scalar(x: Tensor, y: float) -> Tensor:
    """The sign of a negative base is kept for odd exponents only (glsl/binary_op_defs.glslh)."""
    result = torch.where(x == 0, float(y == 0), x.abs().pow(y))
    odd = abs(y - round(y)) < 1e-5 and math.fmod(round(y), 2) == 1
    return torch.where(x < 0, -result, result) if odd else result


@operator("aten.where.self")
def where(condition: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return torch.where(condition.bool(), x, y)
