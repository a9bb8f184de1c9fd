"""Started by test_kills.py: calibrates in children that are killed, then to the end.

A child is a process of its own, forked so that torch is imported once. Prints one JSON object: how
many were killed at work, at which chunk the last run went on, and whether its encodings are those
of a run that nothing interrupted.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.fx import GraphModule
from torchao.quantization.pt2e import MovingAverageMinMaxObserver

from edgepass.calibration.calibrate import Calibration
from edgepass.calibration.histogram_observers import PercentileObserver
from tests.calibration.observed_models import chunks, encodings, inputs, prepared

COUNT = 150
OBSERVERS = {
    "moving_average": MovingAverageMinMaxObserver.with_args(averaging_constant=0.2, eps=1e-12),
    "percentile": PercentileObserver.with_args(percentile=99.0, bins=64, eps=1e-12),
}


def calibrate(graph: GraphModule, folder: Path, on_chunk: Callable[[int], None]) -> None:
    Calibration(folder, saving=0.9, progress=lambda _, done, __: on_chunk(done)).run(
        graph, chunks(COUNT), inputs
    )


def killed_child(graph: GraphModule, folder: Path, seconds: float) -> bool:
    """Fork a child that calibrates, kill it ``seconds`` after its first chunk began.

    Returns whether it was still at work. The parent's ``graph`` stays as it is.
    """
    begun, begins = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            calibrate(graph, folder, lambda _: os.write(begins, b"."))
            code = 0
        finally:
            os._exit(code)
    os.read(begun, 1)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    os.close(begun)
    os.close(begins)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "a child failed by itself"
    return os.WIFSIGNALED(status)


def main() -> None:
    folder, kind, kills, seed = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    torch.set_num_threads(1)
    moments = random.Random(seed)
    whole, stopped = prepared(OBSERVERS[kind]), prepared(OBSERVERS[kind])
    started = time.perf_counter()
    calibrate(whole, folder / "whole", lambda _: None)
    seconds = time.perf_counter() - started
    killed, kept = 0, folder / "killed"
    while killed < kills:
        if killed_child(stopped, kept, moments.uniform(0, 1.5) * seconds / kills):
            killed += 1
        else:  # it came to its end: the next begins anew
            Calibration(kept).discard()
    first: list[int] = []
    calibrate(stopped, kept, first.append)
    equal = encodings(stopped) == encodings(whole)
    print(json.dumps({"killed": killed, "resumed_at": first[0], "equal": equal}))


if __name__ == "__main__":
    main()
