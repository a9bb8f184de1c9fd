"""Scales that round with the least squared error, found by trying many.

The field's "MSE" range setting, with two additions that cost no bits: a symmetric scale may be
negative (of -8..7 the longer end then serves either side), and the best candidate is refined in
turns: the scale (and offset) that fits the integers best, then the integers nearest on that grid.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from edgepass.calibration.grids import (
    GridSpec,
    RoundedWeight,
    from_grid,
    group_size_of,
    integer_range,
    round_to,
    row_blocks,
    safe_scale,
)
from edgepass.calibration.round_to_nearest import spanning_grid

# By how much the range that spans a group is shrunk, or widened, in the candidates.
_FACTORS = tuple(0.64 + 0.04 * step for step in range(14))
_REFINEMENTS = 2

# Applies the metric in which errors are measured: [N, G, g] -> [N, G, g], symmetric and positive.
Metric = Callable[[Tensor], Tensor]
Grid = tuple[Tensor, Tensor | None]


def search_scales(
    weight: Tensor, spec: GridSpec, importance: Tensor | None = None
) -> RoundedWeight:
    """Round ``weight`` ``[N, K]`` with the scales of least squared error.

    importance: float ``[K]``, not negative: what a squared error in each column costs; None for 1
    each. Never worse than the grid that spans each group, which is one of the candidates.
    """
    size = group_size_of(weight, spec)
    costs = None if importance is None else importance.float().reshape(-1, size)
    return search_with(weight, spec, lambda each: each if costs is None else each * costs)


def search_with(weight: Tensor, spec: GridSpec, metric: Metric) -> RoundedWeight:
    """``search_scales`` with the error ``d . metric(d)`` a group, for the difference d."""
    size = group_size_of(weight, spec)
    parts = []
    for rows in row_blocks(*weight.shape):
        values, (scale, zero) = _search(weight[rows].float().unflatten(1, (-1, size)), spec, metric)
        if zero is not None and spec.mapping == "asymmetric":
            zero = zero.to(torch.int8)
        parts.append(RoundedWeight(values.flatten(1).to(torch.int8), scale, zero))
    return RoundedWeight.joined(parts)


def _search(groups: Tensor, spec: GridSpec, metric: Metric) -> tuple[Tensor, Grid]:
    """The integers ``[N, G, g]`` and grids ``[N, G]`` of least error."""

    def error(grid: Grid) -> Tensor:
        difference = from_grid(round_to(groups, *grid, spec.bits), *grid).sub_(groups)
        return (metric(difference) * difference).sum(-1)

    grids = _candidates(groups, spec)
    best = next(grids)
    least = error(best)
    for grid in grids:
        best, least = _better(best, least, grid, error(grid))
    for _ in range(_REFINEMENTS):
        values = round_to(groups, *best, spec.bits)
        grid = fit_grid(groups, values, best[1], spec.mapping, metric)
        best, least = _better(best, least, grid, error(grid))
    return round_to(groups, *best, spec.bits), best


def _better(best: Grid, least: Tensor, grid: Grid, error: Tensor) -> tuple[Grid, Tensor]:
    """Group by group the grid of less error, and that error."""
    wins = error < least
    zero = None
    if best[1] is not None and grid[1] is not None:
        zero = torch.where(wins, grid[1], best[1])
    return (torch.where(wins, grid[0], best[0]), zero), torch.where(wins, error, least)


def _candidates(groups: Tensor, spec: GridSpec) -> Iterator[Grid]:
    """Grids ``[N, G]``: first that of ``round_to_nearest``, then shrunk and widened ones."""
    least, most = integer_range(spec.bits)
    low, high = groups.aminmax(dim=-1)
    if spec.mapping == "symmetric":
        yield safe_scale(torch.maximum(high / most, low / least)), None
        reach = torch.maximum(high, -low) / -least
        for factor in _FACTORS:
            yield safe_scale(reach * factor), None
            yield safe_scale(reach * -factor), None
    elif spec.mapping == "asymmetric":
        low, high = low.clamp(max=0), high.clamp(min=0)
        for factor in (1.0, *_FACTORS):
            scale = safe_scale((high - low) * factor / (most - least))
            yield scale, (least - (low * factor / scale).round()).clamp(least, most)
    else:
        yield spanning_grid(groups, spec.bits)
        middle, half = (low + high) / 2, (high - low) / 2
        for factor in _FACTORS:
            scale = safe_scale(2 * half * factor / (most - least))
            yield scale, least - (middle - half * factor) / scale


def fit_grid(
    groups: Tensor, values: Tensor, zero: Tensor | None, mapping: str, metric: Metric
) -> Grid:
    """The grid on which ``values`` ``[N, G, g]`` come nearest to ``groups``: least squares.

    An integer zero point is kept; a float one is fitted with the scale.
    """
    if mapping != "float_offset":
        steps = values if zero is None else values - zero.unsqueeze(-1)
        weighted = metric(steps)
        norm = (weighted * steps).sum(-1)
        fit = (weighted * groups).sum(-1) / norm.clamp(min=2**-126)
        return safe_scale(fit), zero
    weighted, ones = metric(values), metric(torch.ones_like(values))
    qq, q1, qw = ((weighted * each).sum(-1) for each in (values, torch.ones_like(values), groups))
    one, w1 = ones.sum(-1), (ones * groups).sum(-1)
    determinant = (qq * one - q1 * q1).clamp(min=2**-126)
    scale = safe_scale((qw * one - q1 * w1) / determinant)
    minimum = (w1 - scale * q1) / one.clamp(min=2**-126)
    return scale, -minimum / scale
