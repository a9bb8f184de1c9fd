"""Two processes of torchrun end with the encodings of one, and say what each of them did."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.calibration.shared_worker import COUNT, OBSERVERS, calibrated

ROOT = Path(__file__).resolve().parents[2]
WORKER = Path(__file__).with_name("shared_worker.py")


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> tuple[Path, list[dict]]:
    """The folder of two processes and what each of them found."""
    folder = tmp_path_factory.mktemp("shared")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
            *(str(WORKER), str(folder)),
        ],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("kind", OBSERVERS)
def test_two_processes_end_with_the_encodings_of_one_bit_by_bit(shared, one_thread, kind) -> None:
    expected, _ = calibrated(kind)
    _, (first, second) = shared
    assert len(expected) > 30
    assert first[kind][0] == expected
    assert second[kind][0] == expected


@pytest.mark.parametrize("rank", [0, 1])
def test_the_log_says_what_each_process_did(shared, rank) -> None:
    (line,) = shared[1][rank]["min_max"][1]
    own = list(range(rank, COUNT, 2))
    numbers = ", ".join(map(str, own))
    assert line.startswith(f"rank {rank} of 2: ran {len(own)} of {COUNT} chunks ({numbers}), ")


def test_each_process_has_a_checkpoint_of_its_own(shared) -> None:
    names = {path.name for path in (shared[0] / "min_max").iterdir()}
    assert names == {"0of2.safetensors", "1of2.safetensors"}
