"""How many cores and threads this process may use: topology, affinity, control groups, siblings."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from edgepass.calibration.cgroup_quota import cpu_quota

_ROOT = Path("/")


@dataclass(frozen=True)
class CpuLimits:
    """What a process may use: ``cores`` physical cores and ``threads`` logical CPUs, 1 and more.

    ``why`` names what makes it less than the machine, or is empty. ``processes`` of one run share
    the machine.
    """

    cores: int
    threads: int
    why: str = ""
    processes: int = 1


def cpu_limits(
    root: Path = _ROOT,
    environment: Mapping[str, str] | None = None,
    affinity: Callable[[], Iterable[int]] | None = None,
) -> CpuLimits:
    """The cores and threads that this process may use.

    These are the logical CPUs of its affinity, their distinct cores (``/sys``; where that is
    absent, as on macOS, each CPU counts as a core), at most the whole CPUs of its control groups'
    quota, at most ``OMP_THREAD_LIMIT``, and its share among the processes that ``torchrun`` started
    on this machine (``LOCAL_WORLD_SIZE``). ``OMP_NUM_THREADS`` is a wish, not a limit.

    ``root``, ``environment`` and ``affinity`` stand for the machine in tests.
    """
    variables = os.environ if environment is None else environment
    cpus = sorted(_affinity() if affinity is None else affinity())
    cores, threads, reasons = _count_cores(cpus, root), len(cpus), []
    if len(cpus) < _online(root, len(cpus)):
        reasons.append(f"affinity of {len(cpus)} CPUs")
    quota = cpu_quota(root)
    limits = {
        "" if quota is None else f"cgroup quota of {quota:g} CPUs": quota,
        "OMP_THREAD_LIMIT": _positive(variables.get("OMP_THREAD_LIMIT")),
    }
    for reason, limit in limits.items():
        if limit is not None and limit < threads:
            threads = max(1, int(limit))
            reasons.append(reason)
    processes = _positive(variables.get("LOCAL_WORLD_SIZE")) or 1
    if processes > 1:
        cores, threads = max(1, cores // processes), max(1, threads // processes)
        reasons.append(f"{processes} processes share the machine")
    return CpuLimits(min(cores, threads), threads, ", ".join(reasons), processes)


def _affinity() -> Iterable[int]:
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return range(os.cpu_count() or 1)


def _count_cores(cpus: list[int], root: Path) -> int:
    """The distinct cores of ``cpus``; each CPU is one where the kernel does not say."""
    return len({_core(root / f"sys/devices/system/cpu/cpu{cpu}/topology", cpu) for cpu in cpus})


def _core(folder: Path, cpu: int) -> tuple[str, ...]:
    # Core numbers are unique within a die of a package only.
    place = [_read(folder / name) for name in ("physical_package_id", "die_id", "core_id")]
    return (str(cpu),) if place[-1] == "" else tuple(place)


def _online(root: Path, default: int) -> int:
    """The number of CPUs in the kernel's list, as in ``0-3,8``."""
    count = 0
    for part in filter(None, _read(root / "sys/devices/system/cpu/online").split(",")):
        first, _, last = part.partition("-")
        count += int(last or first) - int(first) + 1
    return count or default


def _read(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""


def _positive(text: str | None) -> int | None:
    """The number in an environment variable, or None for none or one that makes no sense."""
    return int(text) if text and text.isdecimal() and int(text) > 0 else None
