"""What the benchmarks share: fresh processes, resource counts, runs in turn, fits and tables."""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any


@dataclass
class Usage:
    """What a block of code used; filled in when the block ends.

    CPU seconds are user and system time of all threads and finished child processes. The peak is
    the largest resident set of the whole process while the block ran.
    """

    wall_seconds: float = math.nan
    cpu_seconds: float = math.nan
    peak_rss_bytes: int = 0


@contextmanager
def measured() -> Iterator[Usage]:
    """Count what the block under ``with`` uses (Linux only: the peak is read from /proc)."""
    usage = Usage()
    Path("/proc/self/clear_refs").write_text("5")  # starts the peak anew
    wall, cpu = time.perf_counter(), _cpu_seconds()
    yield usage
    usage.wall_seconds = time.perf_counter() - wall
    usage.cpu_seconds = _cpu_seconds() - cpu
    usage.peak_rss_bytes = _peak_rss_bytes()


def in_fresh_process(script: str, arguments: Sequence[str]) -> dict[str, Any]:
    """Run ``python script *arguments --result FILE`` and return the JSON object it leaves there.

    Raises:
        RuntimeError: the process failed; the message ends with the last lines of its output.
    """
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        done = subprocess.run(
            [sys.executable, script, *arguments, "--result", str(result)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        if done.returncode != 0 or not result.exists():
            tail = "\n".join(done.stdout.splitlines()[-15:])
            raise RuntimeError(f"{' '.join(arguments)} ended with {done.returncode}:\n{tail}")
        return json.loads(result.read_text())


def in_turn(contestants: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Call each contestant once a round, A B A B: what drifts in the machine drifts for all."""
    samples: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, run in contestants.items():
            samples[name].append(run())
    return samples


def paired_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """Return the median of the ratios of one round each."""
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))


def fitted_exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Return ``p`` of the least-squares fit ``values = c * sizes ** p`` in logarithms.

    NaN when there are fewer than two sizes.
    """
    if len(set(sizes)) < 2:
        return math.nan
    logarithms = [[math.log(number) for number in numbers] for numbers in (sizes, values)]
    return statistics.linear_regression(*logarithms).slope


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a Markdown table; floats are shown with three significant digits."""
    lines = [header, ["---"] * len(header), *([_cell(value) for value in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def machine() -> str:
    """Return one line on what ran this: processor, cores, load, date and versions."""
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "executorch", "torchao"))
    return (
        f"{time.strftime('%Y-%m-%d')}, {model}, {os.cpu_count()} cores, "
        f"load {os.getloadavg()[0]:.1f}, {packages}"
    )


def _cell(value: object) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _cpu_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _peak_rss_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0
