#!/usr/bin/env python3
"""Benchmark every engine and run the tests marked gpu on a GPU machine, and write a report: `make gpu-check PYTHON=python3`.

Needs torch, NumPy, Pillow, safetensors and an NVIDIA GPU; nothing is installed. The report names other missing packages (onnxruntime-gpu,
TensorRT, onnxscript, pytest), whose lines stay unmeasured, and the lines for which ten minutes are not enough.
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

Row = dict[str, Any]
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
NEEDED = ("torch", "numpy", "PIL", "safetensors")
NAMED = ("torch", "onnxruntime-gpu", "tensorrt-cu13", "nvidia-cudnn-cu13", "onnx", "onnxscript", "numpy")
BATCHES = [1, 32, 256]


def main() -> int:
    """Write the report; return 2 where there is no GPU to check, 1 where a test failed or the tests could not run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--write", type=Path, help="write the report, in Markdown")
    parser.add_argument("--json", type=Path, help="write the rows, a flat list")
    parser.add_argument("--minutes", type=float, default=9.3, help="time limit of the whole run (%(default)s)")
    options = parser.parse_args()
    end = time.monotonic() + 60 * options.minutes
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        print(f"gpu-check needs {', '.join(missing)}: install them, or name another interpreter with PYTHON=", file=sys.stderr)
        return 2
    import torch

    if not torch.cuda.is_available():
        print("gpu-check needs an NVIDIA GPU that torch sees; there is none here, so nothing was measured", file=sys.stderr)
        return 2
    device = torch.cuda.get_device_name(0)
    passed, said = tests(end)
    rows: list[Row] = []
    for block in measured(end):
        rows += block
        report = document(device, rows, said)
        if options.json:
            rowed = json.dumps([{**row, "device": device, "torch": torch.__version__} for row in rows], indent=1)
            options.json.write_text(rowed + "\n", encoding="utf-8")
        if options.write:  # written block by block, so that an interrupted run keeps its rows
            options.write.write_text(report, encoding="utf-8")
    print(report)
    return 0 if passed else 1


def measured(end: float) -> Iterator[list[Row]]:
    """Yield the rows of benchmarks/engines.py, block by block until the time is up; TensorRT, which builds for minutes, last."""
    import torch

    from benchmarks.engines import ON_GPU, measure, random_bundle
    from ebjdat_serve.bundle import Bundle
    from ebjdat_serve.server.settings import SHIPPED

    plain = [road for road in ON_GPU if road[1] != "tensorrt"]
    slow = [road for road in ON_GPU if road[1] == "tensorrt"]
    with tempfile.TemporaryDirectory() as folder:
        made: dict[str, Bundle] = {}
        for network, roads, least in (("shipped", plain, 60), ("WRN-28-10", plain, 120), ("shipped", slow, 150), ("WRN-28-10", slow, 240)):
            if end - time.monotonic() < least:
                why = f"{least} s were not left"
                yield [{"name": f"{network} {' '.join(road)}", "value": None, "unit": "unmeasured", "why": why} for road in roads]
                continue
            if network not in made:
                made[network] = Bundle.load(SHIPPED) if network == "shipped" else random_bundle(Path(folder), 28, 10)
            rows = measure(made[network], BATCHES, roads, torch.device("cuda"), seconds=3.0)
            yield [{**row, "name": named(row["name"], network), "network": network} for row in rows]


def named(name: str, network: str) -> str:
    """Return a row's name with its network, after the word ratio if there is one."""
    return f"ratio {network} {name[6:]}" if name.startswith("ratio ") else f"{network} {name}"


def document(device: str, rows: list[Row], said: list[str]) -> str:
    """Return the report."""
    lines = [
        "# What ran on a GPU",
        "",
        f"{device}, Python {platform.python_version()}, {versions()}. Written by `make gpu-check`.",
        "",
        *said,
    ]
    ratios = {row["name"]: row["value"] for row in rows if row["unit"] == "ratio"}
    heads = ("what", "value", "unit", "ms", "x eager fp32", "x eager TF32", "of the floor")
    lines += ["", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in rows:
        if row["unit"] not in ("ratio", "unmeasured"):
            name, network = row["name"], row["network"]
            floor = f"ratio {network} floor / {name[len(network) + 1 :]}"
            keys = (f"ratio {name} / eager torch fp32", f"ratio {name} / eager torch TF32", floor)
            found = (row.get("ms"), *(ratios.get(key) for key in keys))
            cells = " | ".join("" if value is None else f"{value:.2f}" for value in found)
            lines.append(f"| {name} | {row['value']:.4g} | {row['unit']} | {cells} |")
    lines += ["", *sorted({f"- unmeasured: {row['name']}: {row['why']}" for row in rows if row["unit"] == "unmeasured"})]
    return "\n".join(lines) + "\n"


def versions() -> str:
    """Return the versions of the relevant packages."""
    found = []
    for name in NAMED:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"{name} absent")
    return ", ".join(found)


def tests(end: float) -> tuple[bool, list[str]]:
    """Run the tests marked gpu; return whether they ran and none failed, and their summary line or why they did not run."""
    absent = [name for name in ("pytest", "hypothesis", "sklearn") if find_spec(name) is None]
    if absent:
        return False, [f"Tests marked gpu: not run, {', '.join(absent)} not installed here."]
    # other versions of torch emit other warnings, which would fail the tests
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-W", "default", "tests/test_gpu.py"]
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, encoding="utf-8", check=False, timeout=max(30.0, (end - time.monotonic()) / 2)
        )
    except subprocess.TimeoutExpired:
        return False, ["Tests marked gpu: not finished within half of the time."]
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    last = (done.stdout.strip() or done.stderr.strip() or f"pytest said nothing and ended with {done.returncode}").splitlines()[-1]
    return done.returncode == 0, [f"Tests marked gpu: {last}", *failed]


if __name__ == "__main__":
    sys.exit(main())
