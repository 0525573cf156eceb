"""The number of CPUs available to this process, by affinity and cgroup quota, not the host's count."""

import math
import os
from pathlib import Path

ROOT = Path("/")


def cpus(root: Path = ROOT) -> int:
    """Return the number of CPUs that affinity and the cgroup quota allow, at least one; /proc and /sys are under ``root``."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(allowed, quota(root))))


def quota(root: Path) -> float:
    """Return the CPU quota, in CPUs, of the process's cgroup and its ancestors; infinite without a limit."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return math.inf  # not Linux
    smallest = math.inf
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            home = root / "sys/fs/cgroup"
        elif "cpu" in controllers.split(","):
            home = root / "sys/fs/cgroup/cpu"
        else:
            continue
        group = home / path.lstrip("/")
        # in a container the path may be the host's, while the mount root is the container's own cgroup
        while group != home.parent:
            smallest = min(smallest, _of_two(group) if not controllers else _of_one(group))
            group = group.parent
    return smallest


def _of_two(group: Path) -> float:
    """Return the limit of a version 2 cgroup: ``cpu.max`` holds a quota, or max, and a period in microseconds."""
    most, _, period = _read(group / "cpu.max").partition(" ")
    return _share(most, period)


def _of_one(group: Path) -> float:
    """Return the limit of a version 1 cgroup: a quota of -1 means none."""
    return _share(_read(group / "cpu.cfs_quota_us"), _read(group / "cpu.cfs_period_us"))


def _share(most: str, period: str) -> float:
    return int(most) / int(period) if most.isdigit() and period.isdigit() and int(most) and int(period) else math.inf


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def threads() -> int:
    """Return the number of compute threads: OMP_NUM_THREADS if it is set to a number, else every available CPU."""
    wanted = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    return int(wanted) if wanted.isdecimal() and int(wanted) else cpus()
