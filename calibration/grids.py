"""The values that a group of a weight may take: integers of some bits, a scale, a zero point.

``value = scale * (integer - zero_point)``, torchao's convention. Three mappings:

- ``symmetric``: no zero point, and the scale may be negative: of -8..7 the end with the extra step
  then serves whichever side of the group needs it.
- ``asymmetric``: an integer zero point within the integers' own range.
- ``float_offset``: any zero point: the grid of llama.cpp's Q4_1, scale and float minimum.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from edgepass.ops.errors import InvalidArgumentError

MAPPINGS = ("symmetric", "asymmetric", "float_offset")
# Values a block of rows: it and its scratch stay in the caches, and memory stays bounded.
_BLOCK = 1 << 18


class GridSpec(Protocol):
    """What a recipe says of one weight; ``group_size`` None is one group a row."""

    @property
    def bits(self) -> int: ...
    @property
    def group_size(self) -> int | None: ...
    @property
    def mapping(self) -> str: ...
    @property
    def algorithm(self) -> str: ...


class RoundedWeight(NamedTuple):
    """Integers int8 ``[N, K]``, scales float32 ``[N, G]``, zero points of that shape or None.

    Zero points are int8 (mapping ``asymmetric``) or float32 (``float_offset``).
    """

    values: Tensor
    scale: Tensor
    zero_point: Tensor | None

    @staticmethod
    def joined(parts: Sequence[RoundedWeight]) -> RoundedWeight:
        """The rows of all ``parts``, one below the other."""
        zeros = [part.zero_point for part in parts if part.zero_point is not None]
        return RoundedWeight(
            torch.cat([part.values for part in parts]),
            torch.cat([part.scale for part in parts]),
            torch.cat(zeros) if zeros else None,
        )

    def dequantize(self) -> Tensor:
        """The weight that this stands for, float32 ``[N, K]``."""
        groups = self.values.float().unflatten(1, (self.scale.shape[1], -1))
        if self.zero_point is not None:
            groups -= self.zero_point.float().unsqueeze(-1)
        return (groups * self.scale.unsqueeze(-1)).flatten(1)


def integer_range(bits: int) -> tuple[int, int]:
    """The least and the largest signed integer of ``bits``."""
    return -(1 << (bits - 1)), (1 << (bits - 1)) - 1


def group_size_of(weight: Tensor, spec: GridSpec) -> int:
    """The group size of ``spec`` for a weight ``[N, K]``.

    Raises InvalidArgumentError for what is no matrix of finite floats, a group size that does not
    divide its columns, bits outside 2..8 or an unknown mapping.
    """
    if weight.dim() != 2 or not weight.is_floating_point():
        raise InvalidArgumentError(
            f"got a weight of {weight.dtype} {list(weight.shape)}, accepted are float [N, K]"
        )
    if not 2 <= spec.bits <= 8:
        raise InvalidArgumentError(f"got bits={spec.bits}, accepted are 2 to 8")
    if spec.mapping not in MAPPINGS:
        raise InvalidArgumentError(
            f"got mapping={spec.mapping!r}, accepted are {', '.join(MAPPINGS)}"
        )
    columns = weight.shape[1]
    size = columns if spec.group_size is None else spec.group_size
    if size < 1 or columns % size:
        raise InvalidArgumentError(
            f"got group_size={size}, accepted are divisors of the {columns} columns"
        )
    if not bool(weight.isfinite().all()):
        raise InvalidArgumentError("got a weight with NaN or infinity, accepted are finite ones")
    return size


def round_to(groups: Tensor, scale: Tensor, zero: Tensor | None, bits: int) -> Tensor:
    """The integers nearest to ``groups`` ``[.., g]``, a scale and zero point ``[..]`` each."""
    values = groups / scale.unsqueeze(-1)
    if zero is not None:
        values += zero.unsqueeze(-1)
    return values.round_().clamp_(*integer_range(bits))


def from_grid(values: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    """What integers ``[.., g]`` stand for on the grids of ``scale`` and ``zero`` ``[..]``."""
    shifted = values if zero is None else values - zero.unsqueeze(-1)
    return shifted * scale.unsqueeze(-1)


def row_blocks(rows: int, columns: int) -> Iterator[slice]:
    """Slices of ``range(rows)`` that bound how much of a ``[rows, columns]`` is worked on."""
    step = max(1, _BLOCK // columns)
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def safe_scale(scale: Tensor) -> Tensor:
    """``scale`` with zeros (groups of zeros) replaced by the smallest normal number."""
    return torch.where(scale.abs() < 2**-126, torch.full_like(scale, 2**-126), scale)
