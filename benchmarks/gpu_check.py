#!/usr/bin/env python3
"""On a GPU machine, measure every engine and run the tests marked gpu, and write what happened: `make gpu-check PYTHON=python3`.

Needs torch, NumPy, Pillow, safetensors and an NVIDIA GPU; what else is missing (onnxruntime-gpu, TensorRT, onnxscript, pytest) is named in
the report, and its lines stay unmeasured; nothing is installed. Ends within ten minutes: what there is no time for is named too.
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
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
BUDGET = 560.0
"""Seconds for everything."""


def main() -> int:
    """Write the report; return 2 where there is no GPU to check, 1 where a test failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--write", type=Path, help="the report, Markdown")
    parser.add_argument("--json", type=Path, help="the rows, a flat list")
    options = parser.parse_args()
    end = time.monotonic() + BUDGET
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        print(f"gpu-check needs {', '.join(missing)}: install them, or name another interpreter with PYTHON=", file=sys.stderr)
        return 2
    import torch

    if not torch.cuda.is_available():
        print("gpu-check needs an NVIDIA GPU that torch sees; there is none here, so nothing was measured", file=sys.stderr)
        return 2
    passed, said = tests(end)
    rows = measured(end)
    report = document(torch.cuda.get_device_name(0), rows, said)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    print(report)
    if options.write:
        options.write.write_text(report)
    return 0 if passed else 1


def measured(end: float) -> list[Row]:
    """Return the rows of benchmarks/engines.py for the shipped model, then for a WRN-28-10 of random weights, while there is time."""
    import torch

    from benchmarks.engines import ON_GPU, measure, random_bundle
    from ebjdat_serve.bundle import Bundle
    from ebjdat_serve.server.settings import SHIPPED

    rows: list[Row] = []
    device = torch.device("cuda")
    with tempfile.TemporaryDirectory() as folder:
        for network in ("shipped", "WRN-28-10"):
            bundle = Bundle.load(SHIPPED) if network == "shipped" else random_bundle(Path(folder), 28, 10)
            for batch in BATCHES if network == "shipped" else reversed(BATCHES):
                if time.monotonic() < end - 60:
                    rows += [{**row, "network": network} for row in measure(bundle, [batch], ON_GPU, device, seconds=4.0)]
                else:
                    rows.append({"name": f"batch {batch}", "value": None, "unit": "unmeasured", "why": "no time left", "network": network})
    return rows


def document(device: str, rows: list[Row], said: list[str]) -> str:
    """Return the report."""
    lines = [
        "# What ran on a GPU",
        "",
        f"{device}, Python {platform.python_version()}, {versions()}. Written by `make gpu-check`.",
        "",
        *said,
    ]
    ratios = {(row["network"], row["name"]): row["value"] for row in rows if row["unit"] == "ratio"}
    for network in dict.fromkeys(row["network"] for row in rows):
        own = [row for row in rows if row["network"] == network]
        heads = ("what", "value", "unit", "ms", "x eager fp32", "x eager TF32", "of the floor")
        lines += ["", f"## {network}", "", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
        for row in own:
            if row["unit"] not in ("ratio", "unmeasured"):
                name = row["name"]
                keys = (f"ratio {name} / eager torch fp32", f"ratio {name} / eager torch TF32", f"ratio floor / {name}")
                found = (row.get("ms"), *(ratios.get((network, key)) for key in keys))
                cells = " | ".join("" if value is None else f"{value:.2f}" for value in found)
                lines.append(f"| {name} | {row['value']:.4g} | {row['unit']} | {cells} |")
        lines += ["", *sorted({f"- unmeasured: {row['name']}: {row['why']}" for row in own if row["unit"] == "unmeasured"})]
    return "\n".join(lines) + "\n"


def versions() -> str:
    """Return the versions of what matters."""
    found = []
    for name in NAMED:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"{name} absent")
    return ", ".join(found)


def tests(end: float) -> tuple[bool, list[str]]:
    """Run the tests marked gpu; return whether none failed, and their closing line or why they did not run."""
    absent = [name for name in ("pytest", "hypothesis", "httpx2", "litserve") if find_spec(name) is None]
    if absent:
        return True, [f"Tests marked gpu: not run, {', '.join(absent)} not installed here."]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/test_gpu.py"]
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=max(30.0, (end - time.monotonic()) / 2)
        )
    except subprocess.TimeoutExpired:
        return False, ["Tests marked gpu: not finished within half of the time."]
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return done.returncode == 0, [f"Tests marked gpu: {done.stdout.strip().splitlines()[-1]}", *failed]


if __name__ == "__main__":
    sys.exit(main())
