"""The observers that a recipe may ask for, as classes that ``prepare_pt2e`` takes."""

from __future__ import annotations

from functools import partial
from typing import Any

from torchao.quantization.pt2e import MinMaxObserver, MovingAverageMinMaxObserver
from torchao.quantization.pt2e.observer import PartialWrapper

from edgepass.calibration.histogram_observers import LeastErrorObserver, PercentileObserver
from edgepass.calibration.recipe_observers import (
    AnyObserver,
    Histogram,
    MovingAverage,
    Mse,
    Percentile,
)


class _Filled(PartialWrapper):
    """A class with some parameters, to which backends add theirs.

    The stock ``with_args`` would wrap the wrapper, which ``prepare_pt2e`` does not look into.
    """

    def with_args(self, **options: Any) -> PartialWrapper:
        return _Filled(partial(self.p, **options))


def observer_class(observer: AnyObserver) -> Any:
    """What makes observers of that kind: it has ``with_args``, as the stock classes have."""
    match observer:
        case MovingAverage():
            return _filled(MovingAverageMinMaxObserver, averaging_constant=observer.constant)
        case Percentile():
            return _filled(PercentileObserver, percentile=observer.percentile, bins=observer.bins)
        case Histogram():
            return _filled(LeastErrorObserver, bins=observer.bins, together=False)
        case Mse():
            return _filled(LeastErrorObserver, steps=observer.steps, together=True)
    return MinMaxObserver


def _filled(kind: type, **options: Any) -> PartialWrapper:
    return _Filled(partial(kind, **options))
