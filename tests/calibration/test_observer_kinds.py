"""Each observer of a recipe calibrates a graph, to the range that its name promises."""

import pytest
import torch
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e

from edgepass.calibration.calibrate import Calibration
from edgepass.calibration.observer_kinds import observer_class
from edgepass.calibration.recipe_observers import (
    Histogram,
    MinMax,
    MovingAverage,
    Mse,
    Percentile,
)
from tests.calibration.observed_models import chunks, inputs, observers, prepared

KINDS = [
    MinMax(kind="min_max"),
    MovingAverage(kind="moving_average", constant=0.5),
    Percentile(kind="percentile", percentile=90.0, bins=256),
    Histogram(kind="histogram"),
    Mse(kind="mse", steps=50),
]


def calibrated(kind):
    graph = prepared(observer_class(kind))
    Calibration().run(graph, chunks(4), inputs)
    return graph


def scales(graph):
    found = [each.calculate_qparams()[0] for each in observers(graph).values()]
    return torch.stack([each for each in found if each.numel() == 1]).flatten()


@pytest.mark.parametrize("kind", KINDS[1:], ids=lambda each: each.kind)
def test_no_range_is_wider_than_the_extremes(kind) -> None:
    ratios = scales(calibrated(kind)) / scales(calibrated(KINDS[0]))
    assert (ratios <= 1 + 1e-6).all() and ratios.min() > 0.05
    # So few values are best encoded whole: the two others do not clip them.
    assert (ratios.min() < 0.95) == (kind.kind in ("moving_average", "percentile"))


@pytest.mark.parametrize("kind", KINDS, ids=lambda each: each.kind)
def test_the_graph_converts(kind) -> None:
    converted = convert_pt2e(calibrated(kind))
    assert converted(*inputs(chunks(1)[0]))[0].isfinite().all()
