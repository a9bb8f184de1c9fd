"""The encoding of a tensor as data, and collections of encodings keyed by structural names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from edgepass.ops.errors import EncodingError

_STORAGE = {
    (False, 8): torch.uint8,
    (True, 4): torch.int8,
    (True, 8): torch.int8,
    (True, 16): torch.int16,
    # torch has no kernels for unsigned 16-bit quantization: PT2E keeps such values in int32.
    (False, 16): torch.int32,
    (True, 32): torch.int32,
}


@dataclass(frozen=True, eq=False)
class Encoding:
    """How one tensor is quantized: ``real = scale * (q - zero_point)``, ``q`` clamped to a range.

    ``scale`` is float32 and ``zero_point`` int64, both of shape ``[]`` for one encoding a tensor,
    ``[C]`` for one a channel of ``axis``, or ``[C, B]`` for one a block of ``block`` elements along
    axis 1 within a channel of axis 0. ``quant_min`` and ``quant_max`` bound ``q``.

    Raises EncodingError if scales are not finite and positive, a zero point is out of range, or the
    shapes do not fit.
    """

    scale: Tensor
    zero_point: Tensor
    quant_min: int
    quant_max: int
    axis: int | None = None
    block: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "scale", self.scale.detach().to(torch.float32))
        object.__setattr__(self, "zero_point", self.zero_point.detach().to(torch.int64))
        complaint = self._complaint()
        if complaint:
            raise EncodingError(complaint)

    def _complaint(self) -> str | None:
        rank = 0 if self.axis is None else 1 if self.block is None else 2
        if self.scale.dim() != rank or self.scale.shape != self.zero_point.shape:
            return (
                f"wrong shapes: got scale={list(self.scale.shape)} and "
                f"zero_point={list(self.zero_point.shape)}, accepted are two of rank {rank}"
            )
        if not (self.scale.isfinite().all() and (self.scale > 0).all()):
            return f"got scale={self.scale.min().item()}, accepted are finite positive scales"
        if self.quant_min >= self.quant_max or (self.signed, self.bits) not in _STORAGE:
            return (
                f"unknown range: got {self.quant_min} to {self.quant_max}, accepted are signed "
                "ranges of 4, 8, 16 and 32 bits and unsigned ones of 8 and 16"
            )
        low, high = int(self.zero_point.min()), int(self.zero_point.max())
        if low < self.quant_min or high > self.quant_max:
            return (
                f"got zero_point={low if low < self.quant_min else high}, accepted are "
                f"{self.quant_min} to {self.quant_max}"
            )
        return None

    @property
    def signed(self) -> bool:
        """Whether quantized values may be negative."""
        return self.quant_min < 0

    @property
    def bits(self) -> int:
        """The fewest bits of 4, 8, 16 and 32 that hold the range."""
        for bits in (4, 8, 16, 32):
            low, high = (
                (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if self.signed else (0, 2**bits - 1)
            )
            if low <= self.quant_min and self.quant_max <= high and (self.signed or bits > 4):
                return bits
        return 64

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which a graph keeps the quantized values."""
        return _STORAGE[self.signed, self.bits]

    def real_range(self) -> tuple[Tensor, Tensor]:
        """The least and the largest value that is represented, float32 in the scale's shape."""
        # In float64, so that the ends are rounded once: steps of 32 bits are no float32 numbers.
        scale, zero = self.scale.double(), self.zero_point.double()
        low, high = (scale * (edge - zero) for edge in (self.quant_min, self.quant_max))
        return low.float(), high.float()

    def same_kind(self, other: Encoding) -> bool:
        """Whether both have the same range, axis, block and shape, whatever their numbers."""
        kinds = [
            (each.quant_min, each.quant_max, each.axis, each.block, each.scale.shape)
            for each in (self, other)
        ]
        return kinds[0] == kinds[1]

    def difference(self, other: Encoding) -> float:
        """The largest difference of scales, relative to ``self``; infinite for another kind.

        Zero points that differ by ``n`` count as ``n`` steps of the range.
        """
        if not self.same_kind(other):
            return float("inf")
        scales = ((self.scale - other.scale).abs() / self.scale).max().item()
        steps = (self.zero_point - other.zero_point).abs().max().item()
        return max(scales, steps / (self.quant_max - self.quant_min))


@dataclass(frozen=True)
class Difference:
    """One name on which two collections differ, and how, as a sentence."""

    name: str
    reason: str


@dataclass(frozen=True)
class EncodingTable(Mapping[str, Encoding]):
    """Encodings by name: ``activations`` of computed values, ``parameters`` of constants.

    As a mapping it shows both. ``parameters`` are named as in the model (``lm_head.weight``).
    """

    activations: dict[str, Encoding] = field(default_factory=dict)
    parameters: dict[str, Encoding] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Encoding:
        found = self.activations.get(name) or self.parameters.get(name)
        if found is None:
            raise KeyError(name)
        return found

    def __iter__(self) -> Iterator[str]:
        yield from self.activations
        yield from self.parameters

    def __len__(self) -> int:
        return len(self.activations) + len(self.parameters)

    def diff(self, other: EncodingTable, tolerance: float = 0.0) -> list[Difference]:
        """What differs: names that only one has, kinds, and numbers beyond ``tolerance``.

        ``tolerance`` bounds :meth:`Encoding.difference`.
        """
        return [
            *(Difference(name, "only in the first") for name in self if name not in other),
            *(Difference(name, "only in the second") for name in other if name not in self),
            *filter(None, (_compare(n, self[n], other[n], tolerance) for n in self if n in other)),
        ]


def _compare(name: str, one: Encoding, other: Encoding, tolerance: float) -> Difference | None:
    if not one.same_kind(other):
        return Difference(name, f"{describe(one)} and {describe(other)}")
    found = one.difference(other)
    if found <= tolerance:
        return None
    return Difference(name, f"differs by {found:.3g}: {describe(one)} and {describe(other)}")


def describe(encoding: Encoding) -> str:
    """One line: bits, granularity, range."""
    sign = "int" if encoding.signed else "uint"
    grain = "tensor" if encoding.axis is None else f"{encoding.scale.shape[0]} channels"
    if encoding.block is not None:
        grain += f" in blocks of {encoding.block}"
    low, high = (edge for edge in encoding.real_range())
    return f"{sign}{encoding.bits}, {grain}, {low.min().item():.6g} to {high.max().item():.6g}"
