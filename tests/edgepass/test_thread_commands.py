"""``tune-threads`` and ``--calibration-num-threads``: what they print, and what they refuse."""

import json
from pathlib import Path

import pytest
import torch

from edgepass.calibration.cpu_limits import cpu_limits
from edgepass.thread_commands import print_tuning

ALLOWED = cpu_limits().threads
SEVERAL = pytest.mark.skipif(ALLOWED < 2, reason="one thread needs no sweep")


@SEVERAL
def test_both_sweeps_as_json(command, checkpoint: Path) -> None:
    before = torch.get_num_threads()
    code, printed, progress = command(
        *["tune-threads", "--model", checkpoint, "--context", 64, "--budget", 20, "--json"],
    )
    tuning = json.loads(printed)
    assert code == 0
    assert tuning["candidates"][-1] == tuning["cpus"]["threads"] == ALLOWED
    for kind in ("calibration", "decode"):
        trials = {trial["threads"]: trial for trial in tuning[kind]["sweep"]["trials"]}
        assert set(trials) == set(tuning["candidates"])
        assert trials[tuning[kind]["threads"]]["relative"] == 1
        assert tuning[kind]["sweep"]["budget_s"] == 20
    assert "edgepass: sweep calibration\nedgepass: sweep decode\n" in progress
    assert torch.get_num_threads() == before


def test_a_calibration_too_short_says_so(command, checkpoint: Path) -> None:
    options = ["--calibration-tokens", 16, "--context", 8]
    code, printed, _ = command("tune-threads", "--model", checkpoint, *options)
    assert code == 0
    assert "cores, " in printed
    assert ALLOWED == 1 or "as set: 16 tokens are too few to pay for a sweep" in printed


def test_the_picture(capsys) -> None:
    """A bar is as long as its time; the chosen count is named below."""
    trials = [
        {"threads": count, "seconds": seconds, "rounds": 25, "relative": seconds / 0.1}
        for count, seconds in ((1, 0.4), (2, 0.2), (4, 0.1))
    ]
    sweep = {"threads": 4, "trials": trials, "cost_s": 0.5, "budget_s": 0.6}
    swept = {"threads": 4, "why": "swept", "work_s": 50.0, "rows": 64, "sweep": sweep}
    print_tuning(
        {
            "cpus": {"cores": 4, "threads": 4, "why": "affinity of 4 CPUs"},
            "tokens": 512,
            "forward_tokens": 128,
            "context": 128,
            "calibration": swept,
            "decode": {"threads": 2, "why": "as set: short", "work_s": None, "sweep": None},
        }
    )
    printed = capsys.readouterr().out
    lengths = [line.count("█") for line in printed.splitlines() if "█" in line]
    assert lengths[0] == pytest.approx(2 * lengths[1], abs=1)
    assert lengths[0] == pytest.approx(4 * lengths[2], abs=2)
    assert "4 cores, 4 threads (affinity of 4 CPUs)" in printed
    assert "one forward of 128 tokens" in printed
    assert "sweep: 0.5 s, 1.00% of the 50 s that 512 tokens take" in printed
    assert "threads: 4 (swept)" in printed
    assert "threads: 2 (as set: short)" in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--calibration-tokens", 0], "got calibration_tokens=0, accepted are 1 and more"),
        (["--context", -1], "got context=-1, accepted are 1 and more"),
        (["--budget", 0], "got budget=0.0, accepted are seconds above 0"),
        (["--budget", "nan"], "got budget=nan, accepted are seconds above 0"),
        (["--layers", 3], "layers=3, accepted are 1 to 2"),
    ],
)
def test_tune_threads_refuses(refused, checkpoint: Path, options, message: str) -> None:
    assert message in refused("tune-threads", "--model", checkpoint, *options)


@pytest.mark.parametrize("count", [0, -1, 100_000])
def test_a_count_beyond_the_machine_is_refused_before_the_model_is_read(
    refused, tmp_path: Path, count: int
) -> None:
    options = ["--backend", "qnn", "--recipe", "16a4w_block", "--out", tmp_path / "out"]
    line = refused("lower", "--model", "no/such", *options, "--calibration-num-threads", count)
    assert f"got calibration_num_threads={count}, accepted are 1 to {ALLOWED}, the th" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("backend", ["xnnpack", "vulkan"])
def test_a_backend_without_calibration_refuses_the_option(refused, tmp_path, backend) -> None:
    options = ["--backend", backend, "--out", tmp_path / "out", "--calibration-num-threads", 1]
    line = refused("lower", "--model", "no/such", *options)
    assert line.startswith(f"got calibration_num_threads=1 for backend={backend}, which has no")
