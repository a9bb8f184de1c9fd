"""The public table of candidates, and counts that may not be asked for."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgepass.calibration.cpu_limits import CpuLimits
from edgepass.calibration.thread_candidates import check_threads, thread_candidates
from edgepass.ops.errors import InvalidArgumentError

TABLE = {
    (4, 8): [1, 2, 3, 4, 6, 8],
    (8, 16): [1, 2, 4, 6, 8, 12, 16],
    (36, 72): [4, 9, 18, 27, 36, 54, 72],
    (64, 128): [8, 16, 32, 48, 64, 96, 128],
    # Not in the public table: without second threads, and very small.
    (8, 8): [1, 2, 4, 6, 8],
    (2, 2): [1, 2],
    (1, 2): [1, 2],
    (1, 1): [1],
}


@pytest.mark.parametrize("machine", TABLE, ids=str)
def test_the_table(machine: tuple[int, int]) -> None:
    assert thread_candidates(CpuLimits(*machine)) == TABLE[machine]


@given(cores=st.integers(1, 512), siblings=st.integers(1, 4), cut=st.integers(0, 2000))
def test_any_machine(cores: int, siblings: int, cut: int) -> None:
    threads = max(1, cores * siblings - cut)
    limits = CpuLimits(min(cores, threads), threads)
    candidates = thread_candidates(limits)
    assert candidates == sorted(set(candidates))
    assert candidates[0] >= 1
    assert candidates[-1] == limits.threads
    assert limits.cores in candidates
    assert len(candidates) <= 7


@pytest.mark.parametrize("count", [0, -1, 5, 1000])
def test_a_count_that_is_not_allowed(count: int) -> None:
    limits = CpuLimits(4, 4, "cgroup quota of 4 CPUs")
    with pytest.raises(InvalidArgumentError) as refused:
        check_threads("calibration_num_threads", count, limits)
    assert str(refused.value) == (
        f"got calibration_num_threads={count}, accepted are 1 to 4, the threads that this process "
        "may use (cgroup quota of 4 CPUs)"
    )


def test_a_count_that_is_allowed() -> None:
    for count in (1, 3, 8):
        assert check_threads("threads", count, CpuLimits(4, 8)) == count
