"""Machines whose time for a thread count is known, and clocks that go as fast as they measure."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

from edgepass.calibration.cpu_limits import CpuLimits


@dataclass(frozen=True)
class Work:
    """One pass in units of one core's time: arithmetic, memory traffic, parallel regions."""

    compute: float
    traffic: float
    regions: int


# A chunk of tokens reuses each weight; a step of decode reads each weight for one token.
CALIBRATION = Work(compute=1.0, traffic=0.04, regions=40)
DECODE = Work(compute=0.008, traffic=0.04, regions=40)


@dataclass(frozen=True)
class Machine:
    """A machine of ``limits`` on which ``bandwidth`` cores use up the memory's.

    ``smt`` is what a second thread adds to a core, ``join`` the time that a thread adds to each
    parallel region, ``busy`` the cores that another program keeps busy, ``node`` the cores of one
    NUMA node (0: there is one node), beyond which memory is ``remote`` times as slow.
    """

    limits: CpuLimits
    bandwidth: float
    smt: float = 0.1
    join: float = 2e-6
    busy: int = 0
    node: int = 0
    remote: float = 1.0

    def seconds(self, threads: int, work: Work) -> float:
        """The time of one pass, without noise."""
        cores = self.limits.cores
        speed = min(threads, cores) + self.smt * max(0, threads - cores)
        if threads > cores - self.busy:
            # A region ends with its slowest thread, which has half of a core.
            speed /= 2
        traffic = work.traffic / min(threads, self.bandwidth)
        if self.node and threads > self.node:
            traffic *= self.remote
            speed /= 1 + (self.remote - 1) / 4
        return max(work.compute / speed, traffic) + work.regions * self.join * threads


# The table of machines, and what makes each of them hard.
MACHINES = {
    "laptop": Machine(CpuLimits(4, 8), bandwidth=2.0, smt=-0.1),
    "bandwidth-bound": Machine(CpuLimits(36, 72), bandwidth=12, smt=0.05),
    "oversubscribed": Machine(CpuLimits(8, 16), bandwidth=4, busy=4),
    "numa": Machine(CpuLimits(64, 128), bandwidth=24, node=32, remote=1.8),
}


class NoisyRun:
    """One run of a machine's work: ``measure`` and the ``clock`` that it moves on.

    Noise is log-normal (``sigma``), an outlier in twenty takes 1.5 to 4 times as long, and for
    spans of time the whole machine is slower.
    """

    def __init__(
        self, machine: Machine, work: Work, seed: int, sigma: float = 0.08, outliers: float = 0.05
    ) -> None:
        self.machine, self.work, self.sigma, self.outliers = machine, work, sigma, outliers
        self.random, self.now = random.Random(seed), 0.0
        self.spell = 40 * machine.seconds(machine.limits.cores, work)
        self.phase = self.random.random()

    def clock(self) -> float:
        return self.now

    def measure(self, threads: int) -> float:
        seconds = self.machine.seconds(threads, self.work)
        seconds *= math.exp(self.random.gauss(0, self.sigma))
        if self.random.random() < self.outliers:
            seconds *= self.random.uniform(1.5, 4)
        if (self.now / self.spell + self.phase) % 3 < 1:
            seconds *= 1.3
        self.now += seconds
        return seconds


Select = Callable[[list[int], NoisyRun, float], int]
