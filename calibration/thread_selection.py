"""Choosing a thread count by successive halving, from a function that times one of them.

Nothing here knows torch or a machine: ``measure`` and ``clock`` are given, and tests give simulated
ones.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import truediv

# Counts whose times differ by less than this are a tie, which the fewer threads win.
TIE = 0.02
# A median of fewer rounds does not survive one outlier.
LEAST_ROUNDS = 3
# More rounds than this a rung decide nothing that matters, however large the budget.
MOST_ROUNDS = 25
# Kept back of the budget, since the last measurement may take longer than those before it.
RESERVE = 0.1

# Times the work once with a number of threads; returns seconds.
Measure = Callable[[int], float]


@dataclass(frozen=True)
class Budget:
    """What a sweep may cost: ``seconds``, and ``share`` times the fastest time measured so far.

    ``spent`` seconds of it are gone when the sweep begins.
    """

    seconds: float
    share: float = math.inf
    spent: float = 0.0


@dataclass(frozen=True)
class Trial:
    """What was measured of one count: the median ``seconds`` of ``rounds``.

    ``relative`` is its time over the chosen count's, in the rounds that both took part in.
    """

    threads: int
    seconds: float
    rounds: int
    relative: float


@dataclass(frozen=True)
class Sweep:
    """A finished sweep: the chosen ``threads``, the ``trials`` by thread count, what it cost.

    There are no trials of a single candidate, nor if the budget did not last for one round of all
    candidates; ``threads`` is then None.
    """

    threads: int | None
    trials: tuple[Trial, ...]
    cost_s: float
    budget_s: float


def select_threads(
    candidates: Sequence[int],
    measure: Measure,
    budget: Budget,
    clock: Callable[[], float] = time.perf_counter,
) -> Sweep:
    """Choose among ``candidates`` (thread counts, ascending) within ``budget``.

    ``measure(threads)`` times the work once with that many threads; what it costs is read from
    ``clock``, both in seconds. Candidates are measured in rounds, each in turn. When a rung's share
    of the budget is used, the slower half goes; the others keep their rounds. Times are compared
    within a round, so that a machine that slows down for a while slows all of them, and by their
    median over the rounds, so that single outliers do not count.

    Source: successive halving (Jamieson and Talwalkar, 2016).
    """
    race, alive = _Race(candidates, measure, budget, clock), list(candidates)
    while len(alive) > 1:
        rungs = (len(alive) - 1).bit_length()
        race.run_rung(alive, race.spent() + race.left() / rungs)
        ranked, rounds = rank(race.scores(alive)), len(race.times[alive[0]])
        if rounds < LEAST_ROUNDS:
            return race.finish(ranked[0] if rounds else None)
        alive = sorted(ranked[: (len(alive) + 1) // 2])
    return race.finish(alive[0])


def rank(times: Mapping[int, float]) -> list[int]:
    """Thread counts, best first: the fewest threads within ``TIE`` of the fastest, and so on."""
    left, ranked = dict(times), []
    while left:
        fastest = min(left.values())
        ranked.append(min(count for count, value in left.items() if value <= fastest * (1 + TIE)))
        del left[ranked[-1]]
    return ranked


class _Race:
    """The rounds of a sweep, and its account.

    ``times`` are those of whole rounds, ``seen`` all times and ``costs`` what it took to get them.
    """

    def __init__(
        self,
        candidates: Sequence[int],
        measure: Measure,
        budget: Budget,
        clock: Callable[[], float],
    ) -> None:
        self.measure, self.budget, self.clock, self.start = measure, budget, clock, clock()
        self.times: dict[int, list[float]] = {count: [] for count in candidates}
        self.seen: dict[int, list[float]] = {}
        self.costs: dict[int, list[float]] = {}

    def spent(self) -> float:
        return self.budget.spent + self.clock() - self.start

    def allowed(self) -> float:
        fastest = min(map(statistics.median, self.seen.values()), default=math.inf)
        return min(self.budget.seconds, self.budget.share * fastest)

    def left(self) -> float:
        return (1 - RESERVE) * self.allowed() - self.spent()

    def run_rung(self, alive: list[int], end_s: float) -> None:
        """Measure all of ``alive`` in rounds until ``end_s``, or the budget's end."""
        for number in range(MOST_ROUNDS):
            # A rung that begins with too few rounds borrows from those that come.
            few = len(self.times[alive[0]]) < LEAST_ROUNDS
            if not self.run_round(alive, number, math.inf if few else end_s):
                return

    def run_round(self, alive: list[int], number: int, end_s: float) -> bool:
        """Measure each of ``alive`` once, in another order each time; False without room for it."""
        # Most threads first: the slowest are measured when it is known what they will cost.
        order = alive[::-1][number % len(alive) :] + alive[::-1][: number % len(alive)]
        found = {}
        for place, count in enumerate(order):
            # Only what was measured is counted on, lest one outlier rule out all that follow it.
            known = sum(self.expected(each) for each in order[place:] if each in self.costs)
            needed = max(self.expected(count), known)
            if needed > min(self.left(), end_s - self.spent()):
                return False
            began = self.clock()
            found[count] = self.measure(count)
            self.costs.setdefault(count, []).append(self.clock() - began)
            self.seen.setdefault(count, []).append(found[count])
        for count, seconds in found.items():
            self.times[count].append(seconds)
        return True

    def expected(self, count: int) -> float:
        """What a measurement may cost: the median so far, else what it is by another count's.

        Half of the threads take at most twice as long; more threads are hoped to be no slower.
        """
        costs = {each: statistics.median(found) for each, found in self.costs.items()}
        others = (cost * max(1, other / count) for other, cost in costs.items())
        return costs.get(count) or min(others, default=0.0)

    def scores(self, alive: list[int]) -> dict[int, float]:
        """Each count's time over its round's median, as the median over the rounds."""
        if not self.times[alive[0]]:
            return {}
        rounds = zip(*(self.times[count] for count in alive), strict=True)
        middles = list(map(statistics.median, rounds))
        return {
            count: statistics.median(map(truediv, self.times[count], middles)) for count in alive
        }

    def finish(self, chosen: int | None) -> Sweep:
        trials = tuple(
            Trial(count, statistics.median(times), len(times), self.relative(count, chosen))
            for count, times in self.times.items()
            if chosen is not None and times
        )
        return Sweep(chosen, trials, self.spent(), self.allowed())

    def relative(self, count: int, chosen: int) -> float:
        """The median of one count's time over the chosen one's, in the rounds of both."""
        return statistics.median(map(truediv, self.times[count], self.times[chosen]))
