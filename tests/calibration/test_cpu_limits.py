"""What a process may use, on machines made of files."""

from pathlib import Path

import pytest

from edgepass.calibration.cpu_limits import CpuLimits, cpu_limits


def machine(root: Path, cores: int, siblings: int = 2, packages: int = 1) -> Path:
    """A ``/sys`` of ``cores`` a package; the second CPU of each core comes after all first ones."""
    cpus = root / "sys/devices/system/cpu"
    count = cores * packages
    for cpu in range(count * siblings):
        folder = cpus / f"cpu{cpu}" / "topology"
        folder.mkdir(parents=True)
        (folder / "core_id").write_text(f"{cpu % count % cores}\n")
        (folder / "die_id").write_text("0\n")
        (folder / "physical_package_id").write_text(f"{cpu % count // cores}\n")
    (cpus / "online").write_text(f"0-{count * siblings - 1}\n")
    return root


def quota(root: Path, text: str) -> None:
    for name, line in {
        "proc/self/cgroup": "0::/",
        "proc/self/mountinfo": "30 23 0:26 / /cg rw - cgroup2 cgroup2 rw",
        "cg/cpu.max": text,
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(line)


def limits(root: Path, affinity, **environment: str) -> CpuLimits:
    return cpu_limits(root, environment, lambda: affinity)


def test_a_whole_machine(tmp_path: Path) -> None:
    assert limits(machine(tmp_path, 4), range(8)) == CpuLimits(4, 8)


def test_cores_of_two_packages_are_told_apart(tmp_path: Path) -> None:
    assert limits(machine(tmp_path, 18, packages=2), range(72)) == CpuLimits(36, 72)


@pytest.mark.parametrize(
    ("affinity", "expected"), [([0, 1, 2], (3, 3)), ([0, 4], (1, 2)), ([7], (1, 1))]
)
def test_affinity(tmp_path: Path, affinity, expected) -> None:
    found = limits(machine(tmp_path, 4), affinity)
    assert (found.cores, found.threads) == expected
    assert found.why == f"affinity of {len(affinity)} CPUs"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("600000 100000", CpuLimits(4, 6, "cgroup quota of 6 CPUs")),
        ("350000 100000", CpuLimits(3, 3, "cgroup quota of 3.5 CPUs")),
        ("50000 100000", CpuLimits(1, 1, "cgroup quota of 0.5 CPUs")),
        ("900000 100000", CpuLimits(4, 8)),
    ],
)
def test_a_quota(tmp_path: Path, text: str, expected: CpuLimits) -> None:
    quota(machine(tmp_path, 4), text)
    assert limits(tmp_path, range(8)) == expected


def test_the_processes_of_one_run_share_the_machine(tmp_path: Path) -> None:
    found = limits(machine(tmp_path, 4), range(8), LOCAL_WORLD_SIZE="2", OMP_NUM_THREADS="1")
    assert found == CpuLimits(2, 4, "2 processes share the machine", 2)
    assert limits(tmp_path, range(8), LOCAL_WORLD_SIZE="20").threads == 1


def test_the_limit_of_openmp(tmp_path: Path) -> None:
    found = limits(machine(tmp_path, 4), range(8), OMP_THREAD_LIMIT="5")
    assert found == CpuLimits(4, 5, "OMP_THREAD_LIMIT")
    for nonsense in ("", "x", "0", "-3"):
        assert limits(tmp_path, range(8), OMP_THREAD_LIMIT=nonsense) == CpuLimits(4, 8)


def test_without_sys_each_cpu_is_a_core(tmp_path: Path) -> None:
    assert limits(tmp_path, range(8)) == CpuLimits(8, 8)


def test_on_this_machine() -> None:
    found = cpu_limits()
    assert 1 <= found.cores <= found.threads
