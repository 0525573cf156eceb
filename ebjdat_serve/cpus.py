"""How many CPUs this process may use: never the host's count."""

import math
import os
from pathlib import Path

ROOT = Path("/")


def cpus(root: Path = ROOT) -> int:
    """Return the CPUs that affinity and the cgroup's quota leave to this process, at least one; ``root`` is where /proc and /sys are."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(allowed, quota(root))))


def quota(root: Path) -> float:
    """Return the CPUs' worth of time that the process's cgroup and those above it may use; infinite where nothing limits it."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return math.inf  # no Linux
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
        # in a container the path may be the host's, and what is mounted at home the container's own
        while group != home.parent:
            smallest = min(smallest, _of_two(group) if not controllers else _of_one(group))
            group = group.parent
    return smallest


def _of_two(group: Path) -> float:
    """Return the limit of a cgroup of version 2: ``cpu.max`` holds a quota, or max, and a period in microseconds."""
    most, _, period = _read(group / "cpu.max").partition(" ")
    return _share(most, period)


def _of_one(group: Path) -> float:
    """Return the limit of a cgroup of version 1: a quota of -1 is none."""
    return _share(_read(group / "cpu.cfs_quota_us"), _read(group / "cpu.cfs_period_us"))


def _share(most: str, period: str) -> float:
    return int(most) / int(period) if most.isdigit() and period.isdigit() and int(most) and int(period) else math.inf


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def threads() -> int:
    """Return how many threads to compute with: OMP_NUM_THREADS where it is set to a number, else every CPU that there is."""
    wanted = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    return int(wanted) if wanted.isdigit() and int(wanted) else cpus()
