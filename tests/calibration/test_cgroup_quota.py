"""The least CPU quota of a process's control groups, on trees of files as the kernel shows them."""

from pathlib import Path

import pytest

from edgepass.calibration.cgroup_quota import cpu_quota

V2_MOUNT = "30 23 0:26 {inside} /sys/fs/cgroup rw - cgroup2 cgroup2 rw"
V1_MOUNT = "32 31 0:29 {inside} /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct"


def machine(root: Path, groups: str, mount: str, files: dict[str, str], inside: str = "/") -> Path:
    files = files | {"proc/self/cgroup": groups, "proc/self/mountinfo": mount.format(inside=inside)}
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    return root


def v2(tree: Path, group: str, inside: str = "/", **maxima: str) -> Path:
    """``maxima`` are contents of cpu.max by group, with ``__`` for ``/`` and ``root`` for ``/``."""
    files = {
        f"sys/fs/cgroup/{'' if name == 'root' else name.replace('__', '/')}/cpu.max": text
        for name, text in maxima.items()
    }
    return machine(tree, f"0::{group}", V2_MOUNT, files, inside)


@pytest.mark.parametrize(
    ("text", "quota"), [("200000 100000", 2.0), ("150000 100000", 1.5), ("max 100000", None)]
)
def test_version_2(tmp_path: Path, text: str, quota: float | None) -> None:
    assert cpu_quota(v2(tmp_path, "/box", box=text)) == quota


def test_the_tightest_group_above_holds(tmp_path: Path) -> None:
    root = v2(tmp_path, "/a/b", a__b="max 100000", a="300000 100000", root="400000 100000")
    assert cpu_quota(root) == 3.0


def test_a_group_beside_the_process_s_own_does_not_count(tmp_path: Path) -> None:
    assert cpu_quota(v2(tmp_path, "/a", a="max 100000", b="100000 100000")) is None


def test_in_a_container_the_mount_is_the_group(tmp_path: Path) -> None:
    root = v2(tmp_path, "/docker/abc", inside="/docker/abc", root="250000 100000")
    assert cpu_quota(root) == 2.5


def test_a_group_that_the_mount_does_not_show_counts_as_the_mount_itself(tmp_path: Path) -> None:
    root = v2(tmp_path, "/../other", inside="/docker/abc", root="100000 100000")
    assert cpu_quota(root) == 1.0


@pytest.mark.parametrize(("quota", "expected"), [("350000", 3.5), ("-1", None)])
def test_version_1(tmp_path: Path, quota: str, expected: float | None) -> None:
    folder = "sys/fs/cgroup/cpu,cpuacct/box"
    files = {f"{folder}/cpu.cfs_quota_us": quota, f"{folder}/cpu.cfs_period_us": "100000"}
    groups = "5:memory:/other\n4:cpu,cpuacct:/box\n0::/box"
    assert cpu_quota(machine(tmp_path, groups, V1_MOUNT, files)) == expected


def test_without_control_groups_nothing_limits(tmp_path: Path) -> None:
    assert cpu_quota(tmp_path) is None


@pytest.mark.parametrize("text", ["", "x y", "1 0", "0 100000", "1 2 3"])
def test_what_makes_no_sense_limits_nothing(tmp_path: Path, text: str) -> None:
    assert cpu_quota(v2(tmp_path, "/box", box=text)) is None
