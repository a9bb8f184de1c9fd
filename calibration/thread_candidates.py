"""Which thread counts are worth trying on a machine, and which may be asked for."""

from __future__ import annotations

from edgepass.calibration.cpu_limits import CpuLimits
from edgepass.ops.errors import InvalidArgumentError


def thread_candidates(limits: CpuLimits) -> list[int]:
    """The thread counts to try, ascending.

    An eighth, a quarter, a half, three quarters and all of the cores, then half and all of the
    threads beyond them, rounded down, 1 and more: 1, 2, 3, 4, 6, 8 for 4 cores with 8 threads;
    4, 9, 18, 27, 36, 54, 72 for 36 with 72; never more than ``limits.threads``.
    """
    cores, threads = limits.cores, limits.threads
    parts = [cores * eighths // 8 for eighths in (1, 2, 4, 6, 8)]
    return sorted({max(1, count) for count in (*parts, (cores + threads) // 2, threads)})


def check_threads(name: str, count: int, limits: CpuLimits) -> int:
    """Return ``count``; raise InvalidArgumentError unless this process may use so many threads."""
    if not 1 <= count <= limits.threads:
        why = f" ({limits.why})" if limits.why else ""
        raise InvalidArgumentError(
            f"got {name}={count}, accepted are 1 to {limits.threads}, the threads that this "
            f"process may use{why}"
        )
    return count
