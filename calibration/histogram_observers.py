"""Observers that choose a range from how the values are spread, by a histogram that can be added.

The bins are steps of a power of two from zero on, of the least power that covers the largest value.
When a larger value comes, neighbouring bins are joined, exactly: a histogram depends on the values
alone, not on their order or on how they were shared out, and histograms of parts add up to that of
the whole, bit by bit, if no value is so small against the largest that float32 cannot hold the
ratio. (The stock HistogramObserver stretches its bins with every batch.)
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchao.quantization.pt2e import UniformQuantizationObserverBase

# The finest step: its inverse is a float32, and no activation of use is finer.
_LEAST = -100


class ElementObserver(UniformQuantizationObserverBase):
    """Per tensor: ``counts`` int64 ``[2 * half]`` of steps ``2**exponent``, and the extremes.

    ``bins`` is rounded up to a power of two; between a quarter and all of them are in use. What
    gives the range is for subclasses to say. Raises AssertionError for schemes other than per
    tensor, as stock observers do.
    """

    counts: Tensor
    exponent: Tensor
    min_val: Tensor
    max_val: Tensor

    def __init__(self, bins: int = 2048, **options: Any) -> None:
        super().__init__(**options)
        assert self.qscheme in (torch.per_tensor_affine, torch.per_tensor_symmetric), self.qscheme
        self.half = 1 << max(1, math.ceil(math.log2(bins)) - 1)
        self.register_buffer("counts", torch.zeros(2 * self.half, dtype=torch.int64))
        self.register_buffer("exponent", torch.tensor(_LEAST))
        self.register_buffer("min_val", torch.tensor(torch.inf))
        self.register_buffer("max_val", torch.tensor(-torch.inf))

    def settings(self) -> tuple[Any, ...]:
        """What makes two observers of one value learn the same."""
        return type(self), self.half

    def forward(self, x: Tensor) -> Tensor:
        """Count the elements of ``x``; values that are not finite leave only the extremes."""
        if x.numel() == 0:
            return x
        values = x.detach().float()
        low, high = torch.aminmax(values)
        self.min_val, self.max_val = self.min_val.minimum(low), self.max_val.maximum(high)
        if torch.isfinite(low) and torch.isfinite(high):
            self._coarsen(self._exponent_for(low, high))
            step = 2.0 ** -int(self.exponent)
            # Scaling by a power of two and rounding down are exact.
            places = (values * step).floor_().add_(self.half).to(torch.int32)
            self.counts += torch.bincount(places.flatten(), minlength=2 * self.half)
        return x

    def _exponent_for(self, low: Tensor, high: Tensor) -> int:
        largest = max(-low.item(), high.item())
        if largest == 0:
            return _LEAST
        return max(_LEAST, math.frexp(largest)[1] - int(math.log2(self.half)))

    def _coarsen(self, exponent: int) -> None:
        """Join bins until a step is at least ``2**exponent``."""
        by = exponent - int(self.exponent)
        if by > 0:
            steps = torch.arange(2 * self.half) - self.half
            places = (steps >> min(by, 62)) + self.half
            self.counts = torch.zeros_like(self.counts).index_add_(0, places, self.counts)
            self.exponent = torch.tensor(exponent)

    def merge(self, others: Sequence[dict[str, Tensor]]) -> None:
        """Take in the state dicts of observers that saw other values."""
        for state in others:
            other = type(self)(bins=2 * self.half)
            other.load_state_dict(state, strict=False)
            exponent = max(int(self.exponent), int(other.exponent))
            self._coarsen(exponent)
            other._coarsen(exponent)
            self.counts = self.counts + other.counts
            self.min_val = self.min_val.minimum(other.min_val)
            self.max_val = self.max_val.maximum(other.max_val)

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point of the chosen range, each ``[1]``."""
        low, high = self.chosen_range() if self.counts.any() else (self.min_val, self.max_val)
        return self._calculate_qparams(torch.as_tensor(low), torch.as_tensor(high))

    @abstractmethod
    def chosen_range(self) -> tuple[Tensor, Tensor]:
        """The least and the largest value that are to be encoded without clipping."""

    def _edges(self) -> Tensor:
        """The lower edge of each bin and the upper one of the last, float64 ``[bins + 1]``."""
        steps = torch.arange(-self.half, self.half + 1, dtype=torch.float64)
        return steps * 2.0 ** int(self.exponent)


class PercentileObserver(ElementObserver):
    """The range that holds ``percentile`` percent of the values, as much left out at either end.

    Ends are edges of bins, the outer ones, within the extremes.
    """

    def __init__(self, percentile: float = 99.99, **options: Any) -> None:
        super().__init__(**options)
        self.percentile = percentile

    def settings(self) -> tuple[Any, ...]:
        return *super().settings(), self.percentile

    def chosen_range(self) -> tuple[Tensor, Tensor]:
        out = (100 - self.percentile) / 200 * int(self.counts.sum())
        below = self.counts.cumsum(0)
        first = int((below > out).nonzero()[0])
        above = self.counts.flip(0).cumsum(0)
        last = len(above) - 1 - int((above > out).nonzero()[0])
        edges = self._edges().float()
        return edges[first].clamp(min=self.min_val), edges[last + 1].clamp(max=self.max_val)


class LeastErrorObserver(ElementObserver):
    """The range of the least expected squared error.

    Inside the range the error is a step squared over 12, outside it the distance to the range. With
    ``together`` both ends shrink by one factor, out of ``steps``; else the upper end, the lower one
    and the upper one again are each moved to the best of ``steps`` places.
    """

    def __init__(self, steps: int = 100, together: bool = True, **options: Any) -> None:
        super().__init__(**options)
        self.steps, self.together = steps, together

    def settings(self) -> tuple[Any, ...]:
        levels = self.quant_max - self.quant_min
        return *super().settings(), self.steps, self.together, self.qscheme, levels

    def chosen_range(self) -> tuple[Tensor, Tensor]:
        low, high = min(self.min_val.item(), 0.0), max(self.max_val.item(), 0.0)
        factors = torch.arange(1, self.steps + 1, dtype=torch.float64) / self.steps
        if self.together or self.qscheme == torch.per_tensor_symmetric:
            best = factors[self._errors(factors * low, factors * high).argmin()]
            low, high = float(best * low), float(best * high)
        else:
            wide = high
            for end in ("high", "low", "high"):
                lows = factors * low if end == "low" else torch.full_like(factors, low)
                highs = factors * wide if end == "high" else torch.full_like(factors, high)
                best = self._errors(lows, highs).argmin()
                low, high = float(lows[best]), float(highs[best])
        return torch.tensor(low), torch.tensor(high)

    def _errors(self, lows: Tensor, highs: Tensor) -> Tensor:
        """The expected squared error of each range, float64."""
        edges = self._edges()
        used = self.counts.nonzero().flatten()
        counts = self.counts[used].double()
        middles = ((edges[:-1] + edges[1:]) / 2)[used].clamp(
            self.min_val.double(), self.max_val.double()
        )
        if self.qscheme == torch.per_tensor_symmetric:
            highs = torch.maximum(-lows, highs)
            lows = -highs
        step = (highs - lows) / (self.quant_max - self.quant_min)
        outside = (lows[:, None] - middles).clamp(min=0) + (middles - highs[:, None]).clamp(min=0)
        inside = (outside == 0) * (step**2 / 12)[:, None]
        return ((outside**2 + inside) * counts).sum(1)
