"""The hook around a calibration: what is chosen, and that torch's setting comes back."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from edgepass.calibration import tuned_threads as tuning
from edgepass.calibration.cpu_limits import CpuLimits
from edgepass.calibration.tuned_threads import (
    choose_calibration_threads,
    choose_decode_threads,
    tuned_threads,
)
from edgepass.ops.errors import InvalidArgumentError
from tests.models.tiny_models import tiny_model

FOUR = CpuLimits(2, 4, "")


@pytest.fixture(autouse=True)
def present():
    """Begin with a count that no sweep would leave."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield 3
    torch.set_num_threads(before)


@pytest.fixture
def machine(monkeypatch):
    def set_limits(limits: CpuLimits) -> None:
        monkeypatch.setattr(tuning, "cpu_limits", lambda: limits)

    set_limits(FOUR)
    return set_limits


def test_a_given_count_is_taken_without_a_sweep(machine, present) -> None:
    with tuned_threads(nn.Identity(), 1024, 4) as choice:
        assert torch.get_num_threads() == choice.threads == 4
        assert choice.sweep is None
    assert torch.get_num_threads() == present


@pytest.mark.parametrize("count", [0, -2, 5])
def test_a_count_beyond_the_machine_is_refused(machine, present, count) -> None:
    with (
        pytest.raises(InvalidArgumentError, match=f"calibration_num_threads={count}, .* 1 to 4,"),
        tuned_threads(tiny_model(), 1024, count),
    ):
        raise AssertionError("the calibration began")
    assert torch.get_num_threads() == present


@pytest.mark.parametrize("error", [None, KeyboardInterrupt, ValueError])
def test_the_setting_is_restored_whatever_happens(machine, present, error) -> None:
    with pytest.raises(error) if error else nullcontext(), tuned_threads(tiny_model(), 64, 2):
        assert torch.get_num_threads() == 2
        torch.set_num_threads(1)
        if error:
            raise error
    assert torch.get_num_threads() == present


def test_an_error_in_the_sweep_restores_the_setting(machine, present, monkeypatch) -> None:
    def fail(probe, threads: int) -> float:
        torch.set_num_threads(threads)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(tuning.Probe, "__call__", fail)
    with pytest.raises(RuntimeError), tuned_threads(tiny_model(), 1 << 20):
        raise AssertionError("the calibration began")
    assert torch.get_num_threads() == present


def test_a_short_calibration_keeps_the_setting_and_times_nothing(
    machine, present, monkeypatch
) -> None:
    monkeypatch.setattr(tuning.Probe, "__call__", None)
    with tuned_threads(tiny_model(), 100) as choice:
        assert torch.get_num_threads() == choice.threads == present
    assert choice.why == "as set: 100 tokens are too few to pay for a sweep"


def test_the_setting_is_no_candidate_beyond_what_is_allowed(machine) -> None:
    machine(CpuLimits(2, 2, "affinity of 2 CPUs"))
    with tuned_threads(tiny_model(), 100):
        assert torch.get_num_threads() == 2


def test_processes_that_share_the_machine_do_not_sweep(machine, present, monkeypatch) -> None:
    monkeypatch.setattr(tuning.Probe, "__call__", None)
    machine(CpuLimits(2, 2, "2 processes share the machine", 2))
    with tuned_threads(tiny_model(), 1 << 20) as choice:
        assert torch.get_num_threads() == choice.threads == 2
    assert choice.why == "as set: 2 processes share the machine"
    assert torch.get_num_threads() == present


def test_one_thread_needs_no_sweep(machine) -> None:
    machine(CpuLimits(1, 1, "cgroup quota of 1 CPUs"))
    with tuned_threads(tiny_model(), 1 << 20) as choice:
        assert torch.get_num_threads() == 1
    assert "cgroup quota" in choice.why
    assert choose_decode_threads(tiny_model(), 64, 64).threads == 1


def fake_times(monkeypatch, seconds: dict[int, float]) -> None:
    def measure(probe, threads: int) -> float:
        torch.set_num_threads(threads)
        return seconds[threads]

    monkeypatch.setattr(tuning.Probe, "__call__", measure)


def test_the_fastest_count_is_used_and_reported(machine, present, monkeypatch) -> None:
    fake_times(monkeypatch, {1: 4.0, 2: 2.0, 3: 3.0, 4: 5.0})
    with tuned_threads(tiny_model(), 1 << 20, chunk=64) as choice:
        assert torch.get_num_threads() == choice.threads == 2
    report = choice.report()
    assert report["work_s"] == 2.0 * (1 << 20) / 64
    assert {trial["threads"] for trial in report["sweep"]["trials"]} == {1, 2, 3, 4}
    assert torch.get_num_threads() == present


def test_the_decode_step_is_chosen_apart(machine, present, monkeypatch) -> None:
    fake_times(monkeypatch, {1: 1.0, 2: 2.0, 3: 3.0, 4: 5.0})
    assert choose_decode_threads(tiny_model(), 1 << 20, 64).threads == 1
    assert torch.get_num_threads() == present


@pytest.mark.parametrize("choose", [choose_calibration_threads, choose_decode_threads])
def test_a_real_sweep_ends_within_its_candidates(machine, present, choose) -> None:
    choice = choose(tiny_model(), 4096, 64, 60.0, CpuLimits(2, 2))
    assert choice.why == "swept"
    assert choice.threads in {1, 2}
    assert {trial.threads for trial in choice.sweep.trials} == {1, 2}
    assert torch.get_num_threads() == present


@pytest.mark.parametrize("choose", [choose_calibration_threads, choose_decode_threads])
def test_a_model_without_linears_is_refused(machine, choose) -> None:
    with pytest.raises(InvalidArgumentError, match="no linears to time"):
        choose(nn.Embedding(4, 4), 4096, 64)
