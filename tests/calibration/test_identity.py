"""What tells calibrations apart is the same in every process, and differs where they do."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torchao.quantization.pt2e import MinMaxObserver

from edgepass.calibration.histogram_observers import LeastErrorObserver, PercentileObserver
from edgepass.calibration.identity import identity_of
from tests.calibration.observed_models import chunks, prepared

ROOT = Path(__file__).resolve().parents[2]


def passed_on(value):
    """A Python function in the graph, such as passes put there."""
    return value * 1.0


def with_function():
    graph = prepared(PercentileObserver.with_args(percentile=99.0))
    call = next(node for node in graph.graph.nodes if node.op == "call_function")
    with graph.graph.inserting_after(call):
        new = graph.graph.call_function(passed_on, (call,))
    call.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
    graph.recompile()
    return graph


def test_another_process_finds_the_same() -> None:
    script = "import tests.calibration.test_identity as t, json; print(json.dumps(t.found()))"
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
    )
    assert json.loads(done.stdout.splitlines()[-1]) == found()


def found() -> dict[str, str]:
    return identity_of(with_function(), chunks(2))


def scaled_weight():
    graph = prepared()
    with torch.no_grad():
        graph.get_parameter("second.v.weight")[0, 0] += 1e-3
    return graph


@pytest.mark.parametrize(
    ("graph", "data", "part"),
    [
        (scaled_weight, chunks(2), "model"),
        (lambda: prepared(PercentileObserver), chunks(2), "recipe"),
        (lambda: prepared(MinMaxObserver.with_args(eps=1e-3)), chunks(2), "recipe"),
        (with_function, chunks(2), "recipe"),
        (prepared, chunks(2).flip(0), "text"),
        (prepared, chunks(2)[:, :-1], "text"),
    ],
)
def test_each_difference_shows_in_its_part(graph, data, part) -> None:
    before, after = identity_of(prepared(), chunks(2)), identity_of(graph(), data)
    assert {name for name in before if before[name] != after[name]} == {part}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (PercentileObserver.with_args(percentile=99.0), PercentileObserver),
        (PercentileObserver.with_args(bins=64), PercentileObserver),
        (LeastErrorObserver.with_args(together=False), LeastErrorObserver),
    ],
)
def test_parameters_of_observers_count(one, other) -> None:
    first, second = (identity_of(prepared(each), chunks(1))["recipe"] for each in (one, other))
    assert first != second
