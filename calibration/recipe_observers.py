"""How a recipe asks for the range of a static activation to be found."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from edgepass.calibration.recipe_section import Section


class MinMax(Section):
    """The least and the largest value seen."""

    kind: Literal["min_max"]


class MovingAverage(Section):
    """Least and largest value of each batch, averaged; ``constant`` is the newest one's part."""

    kind: Literal["moving_average"]
    constant: Annotated[float, Field(gt=0, le=1)] = 0.01


class Histogram(Section):
    """The range of the least expected rounding error, by a histogram of ``bins``."""

    kind: Literal["histogram"]
    bins: Annotated[int, Field(ge=16)] = 2048


class Percentile(Section):
    """The range that holds ``percentile`` percent of the values, by a histogram of ``bins``."""

    kind: Literal["percentile"]
    percentile: Annotated[float, Field(gt=50, le=100)] = 99.99
    bins: Annotated[int, Field(ge=16)] = 2048


class Mse(Section):
    """The range of the least squared error among ``steps`` that shrink the whole one."""

    kind: Literal["mse"]
    steps: Annotated[int, Field(ge=2)] = 100


AnyObserver = MinMax | MovingAverage | Histogram | Percentile | Mse
Observer = Annotated[AnyObserver, Field(discriminator="kind")]
