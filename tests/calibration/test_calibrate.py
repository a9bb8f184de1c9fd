"""Calibrations that stop and go on: what is kept, what is refused before the long work, the log."""

import pytest
import torch
from torchao.quantization.pt2e import HistogramObserver, MinMaxObserver, MovingAverageMinMaxObserver

from edgepass.calibration.calibrate import Calibration
from edgepass.calibration.histogram_observers import PercentileObserver
from edgepass.calibration.workers import Workers
from edgepass.ops.errors import CalibrationError, EncodingError
from tests.calibration.observed_models import chunks, encodings, inputs, prepared
from tests.passes.kv_models import Chunk

OBSERVERS = {
    "min_max": MinMaxObserver.with_args(eps=1e-12),
    "moving_average": MovingAverageMinMaxObserver.with_args(averaging_constant=0.2, eps=1e-12),
    "stock_histogram": HistogramObserver.with_args(bins=64, eps=1e-12),
    "percentile": PercentileObserver.with_args(percentile=99.0, bins=64, eps=1e-12),
}


class Stopped(Exception):
    pass


def stop_at(count):
    def progress(stage, done, total):
        if done == count:
            raise Stopped

    return progress


@pytest.mark.parametrize("kind", OBSERVERS)
def test_an_interrupted_run_ends_with_the_same_encodings(tmp_path, kind) -> None:
    whole = prepared(OBSERVERS[kind])
    Calibration().run(whole, chunks(7), inputs)
    told = []
    for stop in (2, 2, 5, None):
        graph = prepared(OBSERVERS[kind])
        progress = stop_at(stop) if stop else lambda *each: told.append(each)
        try:
            Calibration(tmp_path, saving=1.0, progress=progress).run(graph, chunks(7), inputs)
        except Stopped:
            continue
    assert encodings(graph) == encodings(whole)
    assert told == [("calibrate", 5, 7), ("calibrate", 6, 7), ("calibrate", 7, 7)]


def test_a_finished_run_is_taken_from_its_checkpoint_until_it_is_discarded(tmp_path) -> None:
    folder = tmp_path / "kept"
    first, again, lines = prepared(), prepared(), []
    Calibration(folder).run(first, chunks(3), inputs)
    calibration = Calibration(folder, log=lines.append)
    calibration.run(again, chunks(3), inputs)
    assert encodings(first) == encodings(again)
    assert "ran 0 of 3 chunks (none), 0 tokens" in lines[0] and "took 3 from" in lines[0]
    calibration.discard()
    assert not folder.exists()


def test_a_resumed_run_uses_the_threads_it_began_with(tmp_path) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        Calibration(tmp_path).run(prepared(), chunks(2), inputs)
        torch.set_num_threads(2)
        lines = []
        Calibration(tmp_path, log=lines.append).run(prepared(), chunks(2), inputs)
        assert "with 1 threads" in lines[0] and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("graph", "data", "part"),
    [
        (prepared(seed=1), chunks(2), "model"),
        (prepared(OBSERVERS["moving_average"]), chunks(2), "recipe"),
        (prepared(), chunks(2, seed=2), "text"),
        (prepared(), chunks(3), "text"),
    ],
)
def test_the_checkpoint_of_another_run_is_refused_and_left(tmp_path, graph, data, part) -> None:
    Calibration(tmp_path).run(prepared(), chunks(2), inputs)
    (path,) = tmp_path.iterdir()
    before = path.read_bytes()
    ran = []
    with pytest.raises(CalibrationError, match=rf"another calibration: .* \({part}="):
        Calibration(tmp_path, progress=lambda *each: ran.append(each)).run(graph, data, inputs)
    assert path.read_bytes() == before and not ran


def test_a_run_of_one_process_from_the_start_has_nothing_to_say() -> None:
    lines = []
    Calibration(log=lines.append).run(prepared(), chunks(1), inputs)
    assert lines == []


def test_no_chunks_are_refused() -> None:
    with pytest.raises(EncodingError, match="no calibration data: got 0 chunks"):
        Calibration().run(prepared(), chunks(0), inputs)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite_is_named_before_any_chunk_runs(bad) -> None:
    module, ran = Chunk(), []
    with torch.no_grad():
        module.second.v.weight[3, 5] = bad
    with pytest.raises(EncodingError, match=r"not finite: got .* in second\.v\.weight during"):
        Calibration(progress=lambda *each: ran.append(each)).run(
            prepared(module=module), chunks(1), inputs
        )
    assert not ran


def test_the_module_that_computes_something_not_finite_is_named_at_its_chunk() -> None:
    module, told = Chunk(), []
    with torch.no_grad():
        module.second.v.weight.fill_(3e38)
    data = chunks(4)
    data[:2] = 0
    with pytest.raises(EncodingError, match=r"not finite: got .* in second\.v \(linear_\d+\)"):
        Calibration(progress=lambda *each: told.append(each[1])).run(
            prepared(module=module), data, inputs
        )
    assert told == [0, 1, 2]


def test_what_cannot_be_shared_out_is_refused() -> None:
    several = Workers(0, 2)
    with pytest.raises(CalibrationError, match="got observers HistogramObserver in 2 processes"):
        Calibration(workers=several).run(prepared(OBSERVERS["stock_histogram"]), chunks(2), inputs)
    with pytest.raises(CalibrationError, match="too few chunks: got 1 for 2 processes"):
        Calibration(workers=several).run(prepared(), chunks(1), inputs)
