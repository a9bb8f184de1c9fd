"""Killed at random moments and started again, a calibration ends as if nothing had happened."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
WORKER = Path(__file__).with_name("killed_worker.py")


def killed_and_resumed(folder: Path, kind: str, kills: int) -> dict:
    done = subprocess.run(
        [sys.executable, WORKER, folder, kind, str(kills), "0"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("kind", "kills"),
    [("percentile", 20), pytest.param("moving_average", 20, marks=pytest.mark.nightly)],
)
def test_kills_at_random_moments_change_nothing(tmp_path, kind, kills) -> None:
    found = killed_and_resumed(tmp_path, kind, kills)
    assert found["killed"] == kills and found["equal"]
    assert 0 < found["resumed_at"] <= 150
