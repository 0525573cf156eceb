"""Tests of the available CPUs: affinity, then the cgroup's quota."""

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ebjdat_serve import cpus as module
from ebjdat_serve.cpus import cpus, quota, threads
from tests.conftest import ROOT


def tree(root: Path, cgroup: str, files: dict[str, str]) -> Path:
    (root / "proc" / "self").mkdir(parents=True)
    (root / "proc" / "self" / "cgroup").write_text(cgroup, encoding="utf-8")
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    return root


ONE, TWO = "sys/fs/cgroup/cpu/cpu.cfs_", "sys/fs/cgroup/"


@pytest.mark.parametrize(
    ("cgroup", "files", "expected"),
    [
        ("0::/\n", {f"{TWO}cpu.max": "150000 100000\n"}, 1.5),  # a container's own name space
        ("0::/\n", {f"{TWO}cpu.max": "max 100000\n"}, math.inf),
        ("0::/\n", {}, math.inf),  # the root of a host has no such file
        ("0::/a/b\n", {f"{TWO}a/cpu.max": "200000 100000\n", f"{TWO}a/b/cpu.max": "max 100000\n"}, 2.0),  # systemd's slices
        ("0::/a/b\n", {f"{TWO}cpu.max": "50000 100000\n"}, 0.5),  # the host's path in a container
        (
            "4:cpu,cpuacct:/docker/x\n0::/\n",
            {f"{ONE}quota_us": "300000", f"{ONE}period_us": "100000"},
            3.0,
        ),
        ("4:cpu,cpuacct:/\n", {f"{ONE}quota_us": "-1", f"{ONE}period_us": "100000"}, math.inf),
        ("3:cpuset:/x\n", {f"{ONE}quota_us": "100000", f"{ONE}period_us": "100000"}, math.inf),
    ],
)
def test_the_cgroups_quota_is_read_wherever_it_stands(tmp_path, monkeypatch, cgroup, files, expected):
    root = tree(tmp_path, cgroup, files)
    assert quota(root) == expected
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    assert cpus(root) == (64 if expected == math.inf else max(1, math.ceil(expected)))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {5})
    assert cpus(root) == 1


def test_elsewhere_the_hosts_count_is_all_there_is(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert cpus(tmp_path) == 6


@pytest.mark.parametrize(("said", "expected"), [("3", 3), ("2,1", 2), ("", 7), ("all", 7), ("0", 7), ("²", 7)])
def test_openmps_own_variable_is_heeded_where_it_is_a_number(monkeypatch, said, expected):
    monkeypatch.setattr(module, "cpus", lambda: 7)
    monkeypatch.setenv("OMP_NUM_THREADS", said)
    assert threads() == expected


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs sched_setaffinity")
@pytest.mark.parametrize(
    "words",
    [
        ("-m", "ebjdat_serve.cli", "serve"),
        pytest.param(("training/train.py",), marks=pytest.mark.slow),
        pytest.param(("training/evaluate.py",), marks=pytest.mark.slow),
    ],
)
def test_a_command_counts_the_cpus_that_it_may_use(words):
    """As ``taskset -c 0`` starts it, on a host that says it has 64."""
    code = "import os, runpy, sys; os.cpu_count = lambda: 64; sys.argv = sys.argv[1:]; "
    if words[0] == "-m":
        code += "runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)"
    else:
        code += "runpy.run_path(sys.argv[0], run_name='__main__')"
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run(
        [sys.executable, "-c", code, *[word for word in words if word != "-m"], "--help"],
        cwd=ROOT,
        env={**environment, "COLUMNS": "200", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        encoding="utf-8",
        check=False,
        preexec_fn=lambda: os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}),
    )
    assert done.returncode == 0, done.stderr
    option, count = ("--processes", 1) if "evaluate" in words[0] else ("--decoders", 2) if "serve" in words else ("--threads", 1)
    said = re.search(rf"  {option} [A-Z]+\s+[^-]*\([^)]*\b(\d+)\)", done.stdout)
    assert said, done.stdout
    assert int(said[1]) == count


def test_nothing_else_counts_cpus():
    files = [file for folder in ("ebjdat_serve", "training", "export") for file in (ROOT / folder).rglob("*.py")]
    assert {file.name for file in files if re.search(r"cpu_count\(|sched_getaffinity", file.read_text(encoding="utf-8"))} == {"cpus.py"}
