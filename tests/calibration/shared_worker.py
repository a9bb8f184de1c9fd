"""Started by test_torchrun.py in several processes: calibrates with each observer, writes bytes."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from torchao.quantization.pt2e import MinMaxObserver, MovingAverageMinMaxObserver

from edgepass.calibration.calibrate import Calibration
from edgepass.calibration.histogram_observers import LeastErrorObserver, PercentileObserver
from tests.calibration.observed_models import chunks, encodings, inputs, prepared

COUNT = 7
OBSERVERS = {
    "min_max": MinMaxObserver.with_args(eps=1e-12),
    "moving_average": MovingAverageMinMaxObserver.with_args(averaging_constant=0.2, eps=1e-12),
    "percentile": PercentileObserver.with_args(percentile=99.0, bins=64, eps=1e-12),
    "mse": LeastErrorObserver.with_args(bins=64, eps=1e-12),
}


def calibrated(kind: str, folder: Path | None = None) -> tuple[dict[str, list[str]], list[str]]:
    """The encodings in hexadecimal, and the lines of the log."""
    graph, lines = prepared(OBSERVERS[kind]), []
    Calibration(folder, log=lines.append).run(graph, chunks(COUNT), inputs)
    found = encodings(graph)
    return {name: [each.hex() for each in found[name]] for name in found}, lines


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    results = {kind: calibrated(kind, folder / kind) for kind in OBSERVERS}
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(results))
