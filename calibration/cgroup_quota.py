"""The CPU time that control groups leave this process, in whole CPUs (Linux, cgroup v1 and v2)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

_ROOT = Path("/")


def cpu_quota(root: Path = _ROOT) -> float | None:
    """The least quota of the process's control groups in CPUs (1.5: one and a half), or None.

    Read from ``cpu.max`` (v2) and ``cpu.cfs_quota_us`` with ``cpu.cfs_period_us`` (v1), of the
    process's group and of each group above it, since the tightest holds. What cannot be read
    limits nothing. ``root`` stands for the root of the file system.

    Source: the kernel's ``admin-guide/cgroup-v2`` and ``scheduler/sched-bwc``.
    """
    quotas = [quota for folder in _group_folders(root) if (quota := _quota_of(folder)) is not None]
    return min(quotas, default=None)


def _group_folders(root: Path) -> Iterator[Path]:
    """The folders of the process's CPU groups, each followed by those above it."""
    groups = dict(_groups(root))
    for kind, inside, mount in _mounts(root):
        group = groups.get(kind)
        if group is None:
            continue
        # A container may see its group by the host's name, which its mount does not contain.
        below = group.removeprefix(inside.rstrip("/")) if group.startswith(inside) else "/"
        folder = mount / below.strip("/")
        yield from (each for each in (folder, *folder.parents) if each.is_relative_to(mount))


def _groups(root: Path) -> Iterator[tuple[str, str]]:
    """``("cgroup2" | "cgroup", path)`` of the process's groups that can limit CPU time."""
    for line in _lines(root / "proc/self/cgroup"):
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            yield "cgroup2", path
        elif "cpu" in controllers.split(","):
            yield "cgroup", path


def _mounts(root: Path) -> Iterator[tuple[str, str, Path]]:
    """(file system, the group that is mounted, where) of the mounts that show CPU groups."""
    for line in _lines(root / "proc/self/mountinfo"):
        before, _, after = line.partition(" - ")
        fields, kinds = before.split(), after.split()
        if len(fields) < 5 or len(kinds) < 3:
            continue
        if kinds[0] == "cgroup2" or (kinds[0] == "cgroup" and "cpu" in kinds[2].split(",")):
            yield kinds[0], _unescape(fields[3]), root / _unescape(fields[4]).lstrip("/")


def _unescape(field: str) -> str:
    """Spaces and the like are written as ``\\040`` in mountinfo."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)


def _quota_of(folder: Path) -> float | None:
    numbers = " ".join(_lines(folder / "cpu.max")).split()
    if not numbers:
        names = "cpu.cfs_quota_us", "cpu.cfs_period_us"
        numbers = [line for name in names for line in _lines(folder / name)]
    try:
        quota, period = map(int, numbers)
    except ValueError:  # "max", or no such files
        return None
    return quota / period if quota > 0 and period > 0 else None


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text().splitlines()
    except OSError:
        return []
