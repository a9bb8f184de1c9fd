"""A whole sweep on simulated machines: pilot, tokens timed, choice, and what it costs in all."""

from dataclasses import dataclass

import pytest

from edgepass.calibration.thread_candidates import thread_candidates
from edgepass.calibration.thread_selection import LEAST_ROUNDS
from edgepass.calibration.thread_sweep import SHARE, ThreadChoice, sweep_threads
from tests.calibration.simulated_machines import CALIBRATION, DECODE, MACHINES, NoisyRun, Work

RUNS, ENOUGH, NEAR = 100, 95, 1.05
CHUNK, LAYERS = 1024, 20


@dataclass(frozen=True)
class Job:
    """A work, the rows that may be timed of it, and how often it is done."""

    work: Work
    rows: range
    forwards: int


JOBS = {
    "calibration": Job(CALIBRATION, range(32, CHUNK + 1), 32),
    "decode": Job(DECODE, range(1, 2), 4096),
}
CASES = [(machine, job) for machine in MACHINES for job in JOBS]


def sweep(machine: str, job: Job, seed: int, **options) -> tuple[ThreadChoice, float]:
    """One noisy sweep in which a measurement is one of 20 layers, and all that it cost."""
    simulated = MACHINES[machine]
    run = NoisyRun(simulated, job.work, seed)

    def measure_rows(rows: int):
        def measure(threads: int) -> float:
            began = run.now
            seconds = run.measure(threads)
            run.now = began + seconds * rows / (job.rows.stop - 1) / LAYERS
            return seconds

        return measure

    candidates, present = thread_candidates(simulated.limits), simulated.limits.cores
    choice = sweep_threads(
        candidates, present, measure_rows, job.rows, job.forwards, clock=run.clock, **options
    )
    return choice, run.now


@pytest.mark.parametrize(("machine", "name"), CASES)
def test_near_the_best_for_two_percent_of_the_work(machine: str, name: str) -> None:
    job = JOBS[name]
    times = {
        count: MACHINES[machine].seconds(count, job.work)
        for count in thread_candidates(MACHINES[machine].limits)
    }
    near = 0
    for seed in range(RUNS):
        choice, cost = sweep(machine, job, seed)
        near += times[choice.threads] <= NEAR * min(times.values())
        assert choice.sweep.cost_s == pytest.approx(cost)
        assert cost <= SHARE * times[choice.threads] * job.forwards
    assert near >= ENOUGH


def test_more_work_is_timed_with_more_tokens() -> None:
    job = JOBS["calibration"]
    rows = [
        sweep("laptop", Job(job.work, job.rows, forwards), 0)[0].rows
        for forwards in (4, 32, 256, 4096)
    ]
    assert rows == sorted(rows)
    assert rows[0] == 32
    assert rows[-1] == CHUNK


def test_work_that_is_too_short_is_not_swept() -> None:
    job = Job(CALIBRATION, JOBS["calibration"].rows, 1)
    for machine in MACHINES:
        choice, _ = sweep(machine, job, 0)
        assert choice.threads == MACHINES[machine].limits.cores
        assert choice.sweep is None
        assert choice.why.startswith("as set: a budget of ")


def test_a_given_budget_stands_for_the_share() -> None:
    short = Job(CALIBRATION, JOBS["calibration"].rows, 1)
    choice, cost = sweep("laptop", short, 0, budget_s=100.0)
    assert choice.why == "swept"
    assert choice.rows == CHUNK
    assert choice.sweep.budget_s == 100.0
    assert SHARE * choice.work_s < cost < 100.0


def test_a_wrong_pilot_is_noticed_by_the_first_round() -> None:
    """With the present count the work seems 50 times as long as with the best one."""
    now, asked = [0.0], []

    def measure_rows(rows: int):
        def measure(threads: int) -> float:
            asked.append(threads)
            seconds = {1: 1.0, 2: 50.0}[threads]
            now[0] += seconds / 1000
            return seconds

        return measure

    choice = sweep_threads([1, 2], 2, measure_rows, range(1, 2), 20, clock=lambda: now[0])
    assert choice.threads == 1
    assert choice.work_s == 20.0
    # 2 % of the 1000 seconds of the pilot would have paid for 25 rounds.
    assert {trial.rounds for trial in choice.sweep.trials} < {*range(1, LEAST_ROUNDS + 2)}
