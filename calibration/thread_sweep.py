"""A sweep within a budget: how much work a measurement may time, then which count is chosen."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from edgepass.calibration.thread_selection import (
    LEAST_ROUNDS,
    Budget,
    Measure,
    Sweep,
    select_threads,
)

# What a sweep may cost of the time of the work that it is for, and what it plans to: few tokens
# take longer each than many, so that the work is estimated too high by up to a third.
SHARE = 0.02
PLANNED_SHARE = 0.015
# Rounds that a sweep should afford: with fewer, it times fewer tokens.
GOOD_ROUNDS = 12


@dataclass(frozen=True)
class ThreadChoice:
    """A thread count and ``why`` it is that one.

    ``work_s`` are the seconds that the work was estimated to take, ``rows`` the tokens that a
    measurement timed, and ``sweep`` the sweep; each is None where it did not come to that.
    """

    threads: int
    why: str
    work_s: float | None = None
    rows: int | None = None
    sweep: Sweep | None = None

    def report(self) -> dict[str, Any]:
        """The choice as plain data."""
        return asdict(self)


def sweep_threads(
    candidates: Sequence[int],
    present: int,
    measure_rows: Callable[[int], Measure],
    rows: range,
    forwards: float,
    budget_s: float | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> ThreadChoice:
    """Choose among ``candidates`` for ``forwards`` forwards, for at most 2 % of their time.

    Args:
        candidates: thread counts, ascending, two and more.
        present: the count that is used when the budget affords no sweep.
        measure_rows: gives for a number of tokens the function that times them with a thread count
            and returns the seconds of a whole forward.
        rows: from the fewest tokens to time up to, not including, its stop. A pilot of the fewest
            estimates the work; the sweep times the most (by doubling) that its budget affords.
        budget_s: the budget in seconds, instead of 2 % of the work.
        clock: where seconds are read.
    """
    start, few = clock(), rows.start
    pilot = measure_rows(few)
    pilot(present)  # the first run of a shape also sets up its kernel
    began = clock()
    work_s = pilot(present) * forwards
    round_s = (clock() - began) * sum(max(1.0, present / count) for count in candidates)
    seconds, share = PLANNED_SHARE * work_s, PLANNED_SHARE * forwards
    if budget_s is not None:
        seconds, share = budget_s, math.inf
    spent = clock() - start
    while few < rows.stop - 1 and GOOD_ROUNDS * 2 * round_s <= seconds - spent:
        few, round_s = min(2 * few, rows.stop - 1), 2 * round_s
    if LEAST_ROUNDS * round_s > seconds - spent:
        return ThreadChoice(present, _too_small(seconds), work_s)
    sweep = select_threads(candidates, measure_rows(few), Budget(seconds, share, spent), clock)
    if sweep.threads is None:
        return ThreadChoice(present, _too_small(sweep.budget_s), work_s, few, sweep)
    chosen = {trial.threads: trial.seconds for trial in sweep.trials}[sweep.threads]
    return ThreadChoice(sweep.threads, "swept", chosen * forwards, few, sweep)


def _too_small(budget_s: float) -> str:
    return f"as set: a budget of {budget_s:.3g} s is too small for a sweep"
