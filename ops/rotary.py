"""Rotary position embedding (Su et al., 2021), and the rows of its tables for a position."""

from typing import Any

import torch

from edgepass.ops.checks import FLOAT_DTYPES, check_dtype, check_shape, known_unequal, refuse
from edgepass.ops.library import register_operator


def rotary(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool
) -> torch.Tensor:
    """Rotate the first R channels of ``[B, H, S, D]``; the last D - R pass through.

    cos and sin: ``[S, R]``, ``[B, S, R]`` or ``[B, 1 or H, S, R]`` (1 for B is accepted too), at
    full width R. ``interleaved=False`` pairs channel i with i + R/2 (Hugging Face); True pairs 2i
    with 2i + 1. The result has x's dtype; half types are computed in float32.
    """
    _check_rotary(x, cos, sin)
    width = cos.shape[-1]
    x = x.contiguous()
    turned = x[..., :width].float()
    cos, sin = _with_heads(cos).float(), _with_heads(sin).float()
    out = turned * cos + _rotate(turned, interleaved) * sin
    if width < x.shape[-1]:
        return torch.cat((out.to(x.dtype), x[..., width:]), dim=-1)
    return out.to(x.dtype)


def position_rows(table: torch.Tensor, input_pos: torch.Tensor, length: int) -> torch.Tensor:
    """Rows ``input_pos .. input_pos + length - 1`` of ``[C, R]``: ``[length, R]``.

    input_pos: int64 ``[1]``. Raises InvalidArgumentError when a row lies outside the table.
    """
    _check_position_rows(table, input_pos, length)
    start = int(input_pos)
    if start < 0 or start + length > table.shape[0]:
        accepted = f"0..{table.shape[0] - length} for {length} rows of {table.shape[0]}"
        refuse("position_rows", "input_pos", start, accepted)
    return table[start : start + length].clone(memory_format=torch.contiguous_format)


def _rotate(x: torch.Tensor, interleaved: bool) -> torch.Tensor:
    if interleaved:
        return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def _with_heads(table: torch.Tensor) -> torch.Tensor:
    return table if table.dim() == 4 else table.unsqueeze(-3)


def _rotary_fake(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool
) -> torch.Tensor:
    _check_rotary(x, cos, sin)
    return x.new_empty(x.shape)


def _position_rows_fake(table: torch.Tensor, input_pos: torch.Tensor, length: Any) -> torch.Tensor:
    _check_position_rows(table, input_pos, length)
    return table.new_empty((length, table.shape[1]))


def _check_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    check_dtype("rotary", "x", x, FLOAT_DTYPES)
    if x.dim() != 4:
        refuse("rotary", "x.shape", list(x.shape), "[B, H, S, D]")
    check_dtype("rotary", "cos", cos, FLOAT_DTYPES)
    check_dtype("rotary", "sin", sin, FLOAT_DTYPES)
    check_shape("rotary", "sin", sin, cos.shape, "the shape of cos")
    width = cos.shape[-1] if cos.dim() in (2, 3, 4) else 0
    if width < 2 or width % 2 or width > x.shape[-1]:
        refuse("rotary", "cos.shape", list(cos.shape), "[..., S, R] with R even, 2 <= R <= D")
    lead = _with_heads(cos).shape[:-1]
    for table_size, size in zip(lead, x.shape[4 - 1 - len(lead) : 3], strict=True):
        if table_size != 1 and known_unequal(table_size, size):
            refuse("rotary", "cos.shape", list(cos.shape), f"sizes that fit x {list(x.shape)}")


def _check_position_rows(table: torch.Tensor, input_pos: torch.Tensor, length: Any) -> None:
    if table.dim() != 2:
        refuse("position_rows", "table.shape", list(table.shape), "[C, R]")
    check_dtype("position_rows", "input_pos", input_pos, (torch.int64,))
    check_shape("position_rows", "input_pos", input_pos, (1,), "one position")
    if isinstance(length, int) and length < 0:
        refuse("position_rows", "length", length, "0 or more")


register_operator(
    "rotary(Tensor x, Tensor cos, Tensor sin, bool interleaved) -> Tensor", rotary, _rotary_fake
)
register_operator(
    "position_rows(Tensor table, Tensor input_pos, SymInt length) -> Tensor",
    position_rows,
    _position_rows_fake,
)
