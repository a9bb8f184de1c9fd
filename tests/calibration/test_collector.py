"""Collecting once a value gives the observers what running them one by one gives them."""

import pytest
import torch
from torch import nn
from torchao.quantization.pt2e import (
    HistogramObserver,
    MinMaxObserver,
    MovingAverageMinMaxObserver,
)
from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e

from edgepass.calibration.calibrate import Calibration
from edgepass.calibration.collecting_graph import collecting_graph
from edgepass.calibration.collector import Collector
from edgepass.calibration.histogram_observers import LeastErrorObserver, PercentileObserver
from tests.calibration.observed_models import (
    LENGTH,
    Observed,
    chunks,
    encodings,
    inputs,
    observers,
    prepared,
)

STOCK = [
    MinMaxObserver.with_args(eps=1e-12),
    MovingAverageMinMaxObserver.with_args(averaging_constant=0.3, eps=1e-12),
    HistogramObserver.with_args(bins=64, eps=1e-12),
]


def one_by_one(graph, count):
    with torch.no_grad():
        for chunk in chunks(count):
            graph(*inputs(chunk))
    return graph


@pytest.mark.parametrize("observer", STOCK)
@pytest.mark.parametrize("count", [1, 4])
def test_stock_observers_end_bit_by_bit_as_if_run_one_by_one(observer, count) -> None:
    expected, found = one_by_one(prepared(observer), count), prepared(observer)
    Calibration().run(found, chunks(count), inputs)
    assert encodings(found) == encodings(expected)
    assert len(encodings(found)) > 30


def test_histograms_see_each_value_once_and_share_what_they_count() -> None:
    graph = prepared(PercentileObserver.with_args(percentile=90.0, bins=64, eps=1e-12))
    Calibration().run(graph, chunks(3), inputs)
    collecting = collecting_graph(prepared(PercentileObserver.with_args(bins=64)), frozenset())
    assert 0 < len(collecting.streams) < len(collecting.followers) + len(collecting.streams)
    counted = [each for each in observers(graph).values() if hasattr(each, "counts")]
    # Values of one chunk are blocks of LENGTH rows: counts are whole numbers of chunks.
    assert counted and all(int(each.counts.sum()) % (3 * LENGTH) == 0 for each in counted)
    assert not any((each.counts == 0).all() for each in counted)


def test_values_seen_through_views_are_reduced_once() -> None:
    graph = prepared()
    collector = Collector(graph, frozenset())
    calls = [node for node in graph.graph.nodes if node.op == "call_module"]
    reduced = [node for node in calls if node.args[0].op != "get_attr"]
    assert collector.values < len(reduced)
    assert collector.run(inputs(chunks(1)[0])).shape == (collector.values, 2)


class Pointwise(nn.Module):
    def __init__(self, bias: bool, **options) -> None:
        super().__init__()
        self.conv = nn.Conv2d(16, 12, 1, bias=bias, **options)

    def forward(self, x):
        return self.conv(x.transpose(1, 2)[:, :, None]).squeeze(2).transpose(1, 2) * 2.0


@pytest.mark.parametrize(
    ("options", "pointwise"),
    [
        ({"bias": True}, True),
        ({"bias": False}, True),
        ({"bias": True, "groups": 4}, False),
        ({"bias": False, "padding": 1}, False),
        ({"bias": False, "stride": 2}, False),
    ],
)
def test_pointwise_convolutions_run_as_linears(options, pointwise) -> None:
    module = Pointwise(**options)
    if "padding" in options:
        module.forward = lambda x: module.conv(x.transpose(1, 2)[:, :, None]) * 2.0
    expected, found = one_by_one(prepared(module=module), 2), prepared(module=module)
    targets = {str(n.target) for n in collecting_graph(found, frozenset()).module.graph.nodes}
    assert ("aten.linear.default" in targets) == pointwise
    assert ("aten.conv2d.default" in targets) == (not pointwise)
    Calibration().run(found, chunks(2), inputs)
    ends = [
        [torch.stack((each.min_val, each.max_val)) for each in observers(graph).values()]
        for graph in (expected, found)
    ]
    torch.testing.assert_close(*ends, rtol=2e-6, atol=1e-6)


class Unobserved(nn.Module):
    def forward(self, x):
        return x.abs()


def test_a_graph_without_observers_runs() -> None:
    graph = prepared(module=Unobserved())
    assert not observers(graph)
    Calibration().run(graph, chunks(2), inputs)
    assert Collector(graph, frozenset()).run(inputs(chunks(1)[0])).shape == (0, 2)


class Doubling(MinMaxObserver):
    """An observer that changes what it sees, as fake quantizers do."""

    def forward(self, x):
        return super().forward(x) * 2


def test_an_unknown_observer_is_called_and_its_result_used() -> None:
    expected, found = one_by_one(prepared(Doubling), 2), prepared(Doubling)
    Calibration().run(found, chunks(2), inputs)
    assert encodings(found) == encodings(expected)


def test_observers_of_empty_values_are_as_before() -> None:
    class Cut(nn.Module):
        def forward(self, x):
            return torch.cat([x[:, :0] * 2.0, x * 3.0], 1)

    program = torch.export.export(Cut(), (torch.zeros(1, LENGTH, 16),))
    # With its guards, which are calls of a module as observers are.
    graph = prepare_pt2e(program.module(), Observed(MinMaxObserver))
    collector = Collector(graph, frozenset())
    collector.finish(collector.run(inputs(chunks(1)[0]))[None])
    seen = [each.min_val.isfinite().item() for each in observers(graph).values()]
    assert True in seen and False in seen


@pytest.mark.parametrize("observer", [LeastErrorObserver, PercentileObserver, MinMaxObserver])
def test_the_prepared_graph_stays_as_it_was(observer) -> None:
    graph = prepared(observer)
    before = str(graph.graph)
    Calibration().run(graph, chunks(1), inputs)
    assert str(graph.graph) == before
