"""Integers that are computed while a program runs: impl/SymIntOps.cpp."""

from __future__ import annotations

from torch import Tensor

from edgepass.simulator.registry import operator


@operator("sym_size.int")
def sym_size(x: Tensor, dim: int) -> int:
    return x.shape[dim]


@operator("add")
def add(left: int, right: int) -> int:
    return left + right


@operator("sub")
def sub(left: int, right: int) -> int:
    return left - right


@operator("mul")
def mul(left: int, right: int) -> int:
    return left * right


@operator("floordiv")
def floordiv(left: int, right: int) -> int:
    return left // right


@operator("et_vk.select_as_symint.default")
def select_as_symint(x: Tensor, dim: int, index: int) -> int:
    """The element at ``index`` along ``dim``, the first one along all others."""
    return int(x.select(dim, index).reshape(-1)[0])
